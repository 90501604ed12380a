"""Interactions and explanations: on made-up runs what was planted is found, and nothing else is.

Estimates are held against least squares with dummies for all blocks. Over many made-up nulls at
most 5 % have a finding.
"""

import itertools

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests

import rebrac
from tools import report_effects, report_figures, report_tables
from tools.report_runs import BASELINE

CHOSEN = {name: rebrac.CHOSEN[name] for name in "DO LN GN L2 EN InN BCN GrN".split()}
MEASURES = ["train/pca_rank", "train/feature_norm", "weight_norm/Hidden_0"]
NULLS = 300
AT_MOST = 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / NULLS)  # of the nulls; 5 %, and chance at 99.5 %


def make_rows(labels, datasets=3, seeds=5):
    """Return rows of made-up runs, without scores."""
    rows = []
    usual = {flag: None for flags in CHOSEN.values() for flag in flags}
    for dataset, seed, label in itertools.product(range(datasets), range(seeds), labels):
        config = dict(usual)
        for name in label.split("+"):
            config.update(CHOSEN.get(name, {}))
        rows.append(dict(dataset=f"d{dataset}", seed=seed, label=label, config=config))
    rows = pd.DataFrame(rows)
    return rows.assign(label=pd.Categorical(rows["label"], labels, ordered=True))


def draw_noise(rng, rows, tails):
    """Return noise whose size differs by dataset, normal or with heavy tails, on blocks' own."""
    size = len(rows)
    noise = rng.normal(size=size) if tails == "normal" else rng.standard_t(2, size)
    spread = rows["dataset"].map({"d0": 1, "d1": 5, "d2": 15})
    block = rows.groupby(["dataset", "seed"]).ngroup()
    return noise * spread + rng.normal(0, 30, block.max() + 1)[block]


def with_scores(rows, scores):
    return rows.assign(final=np.asarray(scores))


def has(rows, *names):
    """Return 1 for the rows whose label has all the names, else 0."""
    return np.array([float(set(names) <= set(label.split("+"))) for label in rows["label"]])


def dummies(*columns):
    """Return an indicator (N, values) of each column's values."""
    return np.hstack([pd.get_dummies(column).to_numpy(float) for column in columns])


def left_over(design, scores):
    """Return what least squares leaves of scores."""
    return scores - design @ np.linalg.lstsq(design, scores)[0]


def share(blocks, design, scores):
    """Return the share of scores' sum of squares within blocks that a design explains."""
    within = left_over(blocks, scores)
    return 1 - (left_over(np.hstack([blocks, design]), scores) ** 2).sum() / (within**2).sum()


# --- Many comparisons ---


def test_holms_correction_is_that_of_its_definition():
    p = np.array([[0.01, 0.04, np.nan], [0.03, 0.005, 0.6]])
    expected = [[0.04, 0.09, np.nan], [0.09, 0.025, 0.6]]  # 4 * 0.01, 3 * 0.03 twice, 5 * 0.005
    np.testing.assert_allclose(report_tables.holm(p), expected)
    assert np.isnan(report_tables.holm([np.nan])).all()
    p = np.random.default_rng(0).uniform(size=30) ** 3
    np.testing.assert_allclose(report_tables.holm(p), multipletests(p, method="holm")[1])


@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_differences_are_found_in_5_of_100_tables_without_any(tails):
    rng = np.random.default_rng(0)
    rows = make_rows([BASELINE, "DO", "LN", "GN", "L2", "InN"], seeds=3)
    scores = pd.DataFrame([draw_noise(rng, rows, tails) for _ in range(NULLS)])
    scores = scores.to_numpy().reshape(NULLS, 3, 3, 6).mean(1)  # over the datasets
    differences = scores[:, :, 1:] - scores[:, :, :1]
    count_findings(differences.transpose(0, 2, 1))


def count_findings(values):
    """Check how many nulls have a finding: tests of a mean 0, (nulls, tests, blocks)."""
    nulls, tests, blocks = values.shape
    p = report_tables.p_values(pd.DataFrame(values.reshape(-1, blocks)))
    found = [report_tables.holm(own).min() < 0.05 for own in p.to_numpy().reshape(nulls, tests)]
    assert np.mean(found) <= AT_MOST


# --- Interactions ---

PAIRS = [BASELINE, *CHOSEN]
PAIRS += [f"{x}+{y}" for x, y in itertools.combinations(CHOSEN, 2) if (x, y) != ("L2", "EN")]
TRIPLES = [BASELINE, "DO", "LN", "GrN", "DO+LN", "DO+GrN", "LN+GrN", "DO+LN+GrN"]


def test_planted_interactions_are_found_and_nothing_else():
    rng = np.random.default_rng(0)
    rows = make_rows(PAIRS)
    scores = 20 * has(rows, "DO") - 9 * has(rows, "GN") + rng.normal(size=len(rows))
    scores += 8 * has(rows, "DO", "LN") - 6 * has(rows, "GN", "InN")
    rows = with_scores(rows, scores)
    found = report_effects.interactions(rows, CHOSEN, 200)
    assert len(found) == 27
    assert set(found.index[found["p"] < 0.05]) == {"DO+LN", "GN+InN"}
    assert found.loc["DO+LN", "point"] == pytest.approx(8, abs=1.5)
    table = report_effects.interaction_table("", found, [])
    assert table.note.startswith("The strongest synergy is DO+LN: +")
    assert " The strongest conflict is GN+InN: -" in table.note
    assert list(table.cells.index[table.cells["interaction"].str.contains(r"\*")]) == [
        "DO+LN",
        "GN+InN",
    ]
    texts = [
        text.get_text() for text in report_figures.interaction_map(found, CHOSEN).axes[0].texts
    ]
    starred = [text for text in texts if text.endswith("*")]
    assert starred == 2 * [f"{found.loc['DO+LN', 'point']:.1f}*"] + 2 * [
        f"{found.loc['GN+InN', 'point']:.1f}*"
    ]


def test_a_planted_interaction_of_three_is_told_from_those_of_two():
    rng = np.random.default_rng(0)
    rows = make_rows(TRIPLES)
    names = ("DO", "LN", "GrN")
    scores = 5 * has(rows, "DO", "LN") + 9 * has(rows, *names) + rng.normal(size=len(rows))
    found = report_effects.interactions(with_scores(rows, scores), CHOSEN, 200)
    assert set(found.index[found["p"] < 0.05]) == {"DO+LN", "DO+LN+GrN"}
    assert found.loc["DO+LN+GrN", "gain"] == pytest.approx(14, abs=1.5)


def test_terms_are_those_of_least_squares():
    rng = np.random.default_rng(0)
    rows = make_rows(TRIPLES, datasets=2, seeds=3)
    rows = with_scores(rows, rng.normal(50, 10, len(rows)))
    terms = [has(rows, *label.split("+")) for label in TRIPLES[1:]]
    blocks = dummies(rows["dataset"] + rows["seed"].astype(str))
    design = np.column_stack([*terms, blocks])
    fitted = np.linalg.lstsq(design, rows["final"].to_numpy())[0][3:7]
    found = report_effects.interactions(rows, CHOSEN, 200)
    assert list(found.index) == TRIPLES[4:]
    np.testing.assert_allclose(found["point"], fitted, atol=1e-8)
    assert (found["low"] < found["point"]).all() and (found["point"] < found["high"]).all()


@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_interactions_are_found_in_5_of_100_nulls(tails):
    rng = np.random.default_rng(0)
    rows = make_rows(TRIPLES, datasets=2, seeds=3)
    main = 20 * has(rows, "DO") - 5 * has(rows, "GrN")
    nulls = []
    for number in range(NULLS):  # as if they were other datasets
        own = with_scores(rows, main + draw_noise(rng, rows, tails))
        nulls.append(own.assign(dataset=f"{number:03}" + own["dataset"]))
    terms, _ = report_effects.contrasts(pd.concat(nulls, ignore_index=True), CHOSEN)
    count_findings(terms.to_numpy().reshape(4, NULLS, 6).transpose(1, 0, 2))


def test_only_what_the_runs_identify_is_told():
    rows = with_scores(make_rows(TRIPLES), 50)

    def told(own):
        found = report_effects.interactions(own, CHOSEN, 2)
        return list(found.index), report_effects.untold(own, CHOSEN, found)

    assert told(rows) == (TRIPLES[4:], [])
    assert told(rows[rows["label"] != "GrN"]) == (["DO+LN"], ["DO+GrN", "LN+GrN", "DO+LN+GrN"])
    one_block = (rows["dataset"] == "d0") & (rows["seed"] == 0)
    assert told(rows[(rows["label"] != "GrN") | one_block])[0] == ["DO+LN"]
    singles = rows[rows["label"].isin([BASELINE, "DO", "LN"])]
    assert told(singles.assign(label=singles["label"].cat.remove_unused_categories())) == ([], [])

    others = rows.copy()  # a strength of a triple alone, as the paper has it
    is_triple = others["label"] == "DO+LN+GrN"
    changed = [{**config, "actor_grad_noise": 0.003} for config in others["config"]]
    others["config"] = others["config"].where(~is_triple, pd.Series(changed, others.index))
    assert told(others) == (TRIPLES[4:7], ["DO+LN+GrN"])
    note = report_effects.missing_text(["DO+LN+GrN"])
    assert note.endswith("have all parts at the same strengths: DO+LN+GrN.")

    dropout = [{**config, "actor_dropout": 0.1} for config in rows["config"]]
    rows = rows.assign(config=dropout)  # as the baseline has on some datasets
    is_pair = rows["label"] == "DO+LN"
    same = rows[rows["label"] == "LN"].assign(label="DO+LN")
    assert told(pd.concat([rows[~is_pair], same]).astype(rows.dtypes)) == (
        ["DO+GrN", "LN+GrN"],
        ["DO+LN", "DO+LN+GrN"],
    )


# --- Explanation ---

SINGLES = [BASELINE, *CHOSEN]


def with_measures(rows, rng, by_label):
    """Add measures whose size is moved by regularisers, `by_label` times as much as by chance."""
    moved = rng.normal(size=(len(MEASURES), len(SINGLES)))
    codes = rows["label"].cat.codes
    for i, name in enumerate(MEASURES):
        rows = rows.assign(**{name: by_label * moved[i][codes] + rng.normal(size=len(rows))})
    return rows


def found_by(rows, column):
    p = report_effects.explain(rows, CHOSEN, 20).p[column]
    return set(p.index[p < 0.05])


@pytest.mark.parametrize(
    "by_label, by_run, expected",
    [
        (3, -3, ({"PCA rank (training data)"}, {"PCA rank (training data)"})),
        (0, 3, (set(), {"PCA rank (training data)"})),
        (3, 0, ({"PCA rank (training data)"}, set())),
    ],
)
def test_a_planted_explanation_is_found_where_it_is_and_nothing_else(by_label, by_run, expected):
    """The score follows a measure between regularisers, or between runs of the same, or both."""
    rng = np.random.default_rng(1)
    rows = with_measures(make_rows(SINGLES), rng, 2)
    rank = rows[MEASURES[0]]
    usual = rank.groupby([rows["label"], rows["dataset"]], observed=True).transform("mean")
    scores = by_label * usual + by_run * (rank - usual) + rng.normal(size=len(rows))
    rows = with_scores(rows, scores)
    assert (found_by(rows, "between"), found_by(rows, "within")) == expected


def test_what_an_explanation_rests_on_is_told():
    """Two regularisers move the measure and the score. Without one of them it may be chance."""
    rng = np.random.default_rng(2)
    rows = make_rows(SINGLES)
    moved = has(rows, "DO") - has(rows, "LN")
    rows["train/pca_rank"] = 10 * moved + rng.normal(size=len(rows))
    rows = with_scores(rows, 9 * moved + rng.normal(size=len(rows)))
    found = report_effects.explain(rows, CHOSEN, 20)
    assert found.rests_on == {"PCA rank (training data)": ["DO", "LN"]}
    text = report_effects.explained(found)
    assert "PCA rank (training data) (but p isn't below 0.05 without DO, LN)." in text


def test_only_single_regularisers_are_compared():
    for label, name in (
        ("DO(0.3)", "DO"),
        ("critic_ln=False", "critic_ln"),
        ("DO+LN", None),
        ("LN+critic_ln=False", None),
        ("LN (no DO)", None),
        ("best", None),
        (BASELINE, None),
    ):
        assert report_effects.regulariser(label, CHOSEN) == name


def test_estimates_are_those_of_least_squares():
    rng = np.random.default_rng(0)
    rows = with_measures(make_rows(SINGLES, datasets=2, seeds=3), rng, 1)
    scores = rng.normal(50, 10, len(rows)) + 4 * rows[MEASURES[0]]
    rows = with_scores(rows, scores)
    block = rows["dataset"] + rows["seed"].astype(str)
    blocks = dummies(block)
    x = rows[MEASURES].to_numpy()
    deviations = left_over(blocks, x)
    for dataset in ("d0", "d1"):  # unit: the standard deviation within a dataset's blocks
        own = rows["dataset"] == dataset
        x[own] /= np.sqrt((deviations[own] ** 2).mean(0))

    found = report_effects.explain(rows, CHOSEN, 200)
    assert sorted(found.sample.columns) == sorted(MEASURES)
    for i, name in enumerate(MEASURES):
        rows_of = found.estimates[
            found.estimates["label"] == report_effects.measure_title(name)
        ].set_index("quantity")
        slope = np.linalg.lstsq(np.column_stack([x[:, i], blocks]), scores)[0][0]
        alone = share(blocks, x[:, [i]], scores)
        beside = share(blocks, x, scores) - share(blocks, np.delete(x, i, 1), scores)
        cells = np.hstack([blocks, dummies(rows["dataset"] + rows["label"].astype(str))])
        same = np.linalg.lstsq(np.column_stack([x[:, i], cells]), scores)[0][0]
        same *= np.sqrt((left_over(cells, x[:, i]) ** 2).mean())
        expected = pd.Series(dict(slope=slope, alone=100 * alone, beside=100 * beside, within=same))
        np.testing.assert_allclose(rows_of["point"][expected.index], expected, rtol=1e-5)
        assert (rows_of["low"] <= rows_of["high"]).all()
    assert found.together == pytest.approx(share(blocks, x, scores))
    labels = dummies(rows["dataset"] + rows["label"].astype(str))
    assert found.label_share == pytest.approx(share(blocks, labels, scores))
    assert found.chance_share == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "tails, by_label, by_kind, seeds",
    [("heavy", 3, 0, 3), ("normal", 0, 3, 5)],
)
def test_explanations_are_found_in_5_of_100_nulls(tails, by_label, by_kind, seeds, monkeypatch):
    """Regularisers move scores and measures, each for itself. Or similar ones share their chance.

    Then runs are not independent.
    """
    monkeypatch.setattr(report_effects, "PERMUTATIONS", 499)
    rng = np.random.default_rng(0)
    rows = with_scores(with_measures(make_rows(SINGLES, 2, seeds), rng, 1), 0.0)
    rows["final"] += rows.index
    layout = report_effects.make_sample(rows)
    codes = rows["label"].cat.codes.to_numpy()
    found = 0
    for _ in range(NULLS):
        moved = rng.normal(0, by_label + by_kind, (len(SINGLES), len(MEASURES)))
        measures = moved[codes] + rng.normal(size=(len(rows), len(MEASURES)))
        scores = draw_noise(rng, rows, tails) + rng.normal(0, by_label, len(SINGLES))[codes]
        shared = rng.normal(0, 7 * by_kind, (2 * seeds, 2))
        is_high = (moved[:, 0] > 0).astype(int)
        scores += shared[layout.about["block"], is_high[codes]]
        values = np.column_stack([measures, scores]).reshape(2 * seeds, len(SINGLES), -1)
        values = (values - values.mean(1, keepdims=True)).reshape(len(rows), -1)
        sample = layout._replace(values=values)
        products = report_effects.block_products(sample)
        rectangles = report_effects.rectangles(sample)
        p, _ = report_effects.corrected_p(sample, products, rectangles, CHOSEN)
        found += p.min() < 0.05
    assert found <= AT_MOST * NULLS


def test_constant_collinear_and_missing_measures_break_nothing():
    rng = np.random.default_rng(0)
    rows = with_measures(make_rows(SINGLES), rng, 2)
    rows["train/action_error"] = rng.uniform(1, 2, len(rows))
    rows["validation/action_error"] = rng.uniform(1, 2, len(rows))
    rows["gap/action_error"] = rows["validation/action_error"] - rows["train/action_error"]
    rows["train/copy"] = 2 * rows[MEASURES[0]] - 7
    rows["random/copy"] = rng.normal(size=len(rows))  # the same on other states
    rows["train/dead_neurons"] = 0.1
    rows["train/srank"] = np.where(rows["seed"] > 0, np.nan, 1.0 + rows.index)
    rows.loc[[3, 4], MEASURES[1]] = [np.nan, np.inf]
    scores = rng.normal(size=len(rows)) + rows[MEASURES[0]]
    rows["score"] = scores
    rows["score/action_noise=0.2"] = scores
    rows["seconds/train"] = scores
    rows = with_scores(rows, scores)
    found = report_effects.explain(rows, CHOSEN, 50)
    errors = ["train/action_error", "validation/action_error", "gap/action_error"]
    expected = {*MEASURES, *errors, "ratio/action_error", "train/copy"}
    assert set(found.sample.columns) == expected
    assert found.sample.constant == ["train/dead_neurons"]
    assert found.sample.missing == ["train/srank"]
    assert found.sample.dropped == 2
    points = found.estimates.set_index(["quantity", "label"])["point"]
    assert np.isfinite(found.estimates[["point", "low", "high"]]).all(axis=None)
    rank = "PCA rank (training data)"
    assert points["alone", "train/copy"] == pytest.approx(points["alone", rank])
    assert points["alone", rank] > 30
    assert points["beside", rank] == points["beside", "train/copy"] == 0  # the other has it all
    assert points["beside", "gap of the action error"] >= 0
    note = report_effects.explanation_table("", found).note
    blocks = rows.groupby(["dataset", "seed"]).ngroups
    assert f"{len(rows) - 2} runs in {blocks} blocks" in note
    assert "too few runs have it: " in note and "Left out: 2 runs that lack a measure." in note
    assert "varies in no block: dead neurons (share, training data)." in note
    assert len(report_figures.explanation_figure(found).axes) == 4


def test_nothing_is_explained_by_too_few_runs():
    rng = np.random.default_rng(0)
    rows = with_scores(make_rows(SINGLES, datasets=1, seeds=2), 1.0)
    rows = with_measures(rows, rng, 1)
    assert report_effects.explain(rows, CHOSEN, 5) is None  # two blocks
    rows = with_measures(make_rows([BASELINE]), rng, 1)
    assert report_effects.explain(with_scores(rows, range(len(rows))), CHOSEN, 5) is None
