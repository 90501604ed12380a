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
SINGLES = [BASELINE, *CHOSEN]
MEASURES = ["train/pca_rank", "train/feature_norm", "weight_norm/Hidden_0"]
PCA_RANK = "PCA rank (training data)"  # the title of the first
NULLS = 300
AT_MOST = 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / NULLS)  # of the nulls; 5 %, and chance at 99.5 %


def make_rows(labels, datasets=3, seeds=5):
    """Return rows of made-up runs, without scores."""
    off = {}
    for flags in CHOSEN.values():
        off |= dict.fromkeys(flags)
    runs = itertools.product(range(datasets), range(seeds), labels)
    rows = []
    for dataset, seed, label in runs:
        config = dict(off)
        for name in label.split("+"):
            config |= CHOSEN.get(name, {})
        rows.append(dict(dataset=f"d{dataset}", seed=seed, label=label, config=config))
    rows = pd.DataFrame(rows)
    rows["label"] = pd.Categorical(rows["label"], labels, ordered=True)
    return rows


def draw_noise(rng, rows, tails):
    """Return noise, normal or with heavy tails, and a block's own on top.

    The first one's size differs by dataset.
    """
    if tails == "normal":
        noise = rng.normal(size=len(rows))
    else:
        noise = rng.standard_t(2, len(rows))
    spread = rows["dataset"].map({"d0": 1, "d1": 5, "d2": 15})
    block = rows.groupby(["dataset", "seed"]).ngroup()
    of_blocks = rng.normal(0, 30, block.max() + 1)
    return noise * spread + of_blocks[block]


def with_scores(rows, scores):
    return rows.assign(final=np.asarray(scores))


def has(rows, *names):
    """Return 1 for the rows whose label has all the names, else 0."""
    words = [label.split("+") for label in rows["label"]]
    return np.array([set(names) <= set(own) for own in words], float)


def dummies(rows, *columns):
    """Return an indicator (N, groups) of the rows' groups, which are equal in these columns."""
    groups = rows[list(columns)].astype(str).agg("".join, axis=1)
    return pd.get_dummies(groups).to_numpy(float)


def least_squares(design, scores):
    """Return the coefficients."""
    return np.linalg.lstsq(design, scores)[0]


def left_over(design, scores):
    """Return what least squares leaves of scores."""
    return scores - design @ least_squares(design, scores)


def share(blocks, design, scores):
    """Return the share of scores' sum of squares within blocks that a design explains."""
    within = left_over(blocks, scores)
    unexplained = left_over(np.hstack([blocks, design]), scores)
    return 1 - (unexplained**2).sum() / (within**2).sum()


def root_mean_square(x):
    return np.sqrt((x**2).mean(0))


def told_from_chance(p):
    """Return the names whose p value is below 0.05."""
    return set(p.index[p < 0.05])


# --- Many comparisons ---


def test_holms_correction_is_that_of_its_definition():
    p = np.array([[0.01, 0.04, np.nan], [0.03, 0.005, 0.6]])
    expected = [[0.04, 0.09, np.nan], [0.09, 0.025, 0.6]]  # 4 * 0.01, 3 * 0.03 twice, 5 * 0.005
    np.testing.assert_allclose(report_tables.holm(p), expected)
    assert np.isnan(report_tables.holm([np.nan])).all()
    p = np.random.default_rng(0).uniform(size=30) ** 3
    _, expected, _, _ = multipletests(p, method="holm")
    np.testing.assert_allclose(report_tables.holm(p), expected)


def test_a_planted_main_effect_is_found_and_nothing_else():
    rng = np.random.default_rng(0)
    rows = make_rows(SINGLES)
    planted = 12 * has(rows, "DO") - 10 * has(rows, "GN")
    rows = with_scores(rows, planted + rng.normal(size=len(rows)))
    columns = {dataset: [dataset] for dataset in ("d0", "d1", "d2")}
    cells = report_tables.difference_table("", rows, {**columns, "mean": list(columns)}).cells
    assert told_from_chance(pd.to_numeric(cells["p, mean"].replace("<0.001", 0))) == {"DO", "GN"}
    for name in (*columns, "mean"):
        assert set(cells.index[cells[name].str.startswith("**")]) == {"DO", "GN"}


@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_differences_are_found_in_5_of_100_tables_without_any(tails):
    rng = np.random.default_rng(0)
    rows = make_rows([BASELINE, "DO", "LN", "GN", "L2", "InN"], seeds=3)
    nulls = []
    for _ in range(NULLS):
        noise = draw_noise(rng, rows, tails).to_numpy()
        scores = noise.reshape(3, 3, 6).mean(0)  # (seeds, labels), over the datasets
        differences = scores[:, 1:] - scores[:, :1]
        nulls.append(differences.T)
    check_findings(np.stack(nulls))


def check_findings(values):
    """Check how many nulls have a finding: tests of a mean 0, (nulls, tests, blocks)."""
    nulls, tests, blocks = values.shape
    table = pd.DataFrame(values.reshape(-1, blocks))
    p = report_tables.p_values(table).to_numpy().reshape(nulls, tests)
    smallest = [report_tables.holm(own).min() for own in p]
    assert np.mean(np.array(smallest) < 0.05) <= AT_MOST


# --- Interactions ---

PAIRS = ["+".join(pair) for pair in itertools.combinations(CHOSEN, 2)]
PAIRS.remove("L2+EN")  # which set the same flags
TRIPLES = [BASELINE, "DO", "LN", "GrN", "DO+LN", "DO+GrN", "LN+GrN", "DO+LN+GrN"]


@pytest.fixture(scope="module")
def planted():
    """Return the interactions of runs where DO+LN gives 8 and GN+InN takes 6."""
    rng = np.random.default_rng(0)
    rows = make_rows(SINGLES + PAIRS)
    alone = 20 * has(rows, "DO") - 9 * has(rows, "GN")
    noise = rng.normal(size=len(rows))
    together = 8 * has(rows, "DO", "LN") - 6 * has(rows, "GN", "InN")
    rows = with_scores(rows, alone + noise + together)
    return report_effects.interactions(rows, CHOSEN, 200)


def test_planted_interactions_are_found_and_nothing_else(planted):
    assert len(planted) == 27
    assert told_from_chance(planted["p"]) == {"DO+LN", "GN+InN"}
    assert planted.loc["DO+LN", "point"] == pytest.approx(8, abs=1.5)


def test_the_table_and_the_map_show_what_is_found(planted):
    table = report_effects.interaction_table("", planted, [])
    assert table.note.startswith("The strongest synergy is DO+LN: +")
    assert " The strongest conflict is GN+InN: -" in table.note
    is_bold = table.cells["interaction"].str.contains(r"\*")
    assert list(table.cells.index[is_bold]) == ["DO+LN", "GN+InN"]

    figure = report_figures.interaction_map(planted, CHOSEN)
    texts = [text.get_text() for text in figure.axes[0].texts]
    starred = [text for text in texts if text.endswith("*")]
    synergy = f"{planted.loc['DO+LN', 'point']:.1f}*"
    conflict = f"{planted.loc['GN+InN', 'point']:.1f}*"
    assert starred == [synergy, synergy, conflict, conflict]


def test_a_planted_interaction_of_three_is_told_from_those_of_two():
    rng = np.random.default_rng(0)
    rows = make_rows(TRIPLES)
    noise = rng.normal(size=len(rows))
    together = 5 * has(rows, "DO", "LN") + 9 * has(rows, "DO", "LN", "GrN")
    rows = with_scores(rows, together + noise)
    found = report_effects.interactions(rows, CHOSEN, 200)
    assert told_from_chance(found["p"]) == {"DO+LN", "DO+LN+GrN"}
    assert found.loc["DO+LN+GrN", "gain"] == pytest.approx(14, abs=1.5)


def test_terms_are_those_of_least_squares():
    rng = np.random.default_rng(0)
    rows = make_rows(TRIPLES, datasets=2, seeds=3)
    scores = rng.normal(50, 10, len(rows))
    terms = [has(rows, *label.split("+")) for label in TRIPLES[1:]]
    blocks = dummies(rows, "dataset", "seed")
    design = np.column_stack([*terms, blocks])
    expected = least_squares(design, scores)[3:7]  # after those of the three alone
    found = report_effects.interactions(with_scores(rows, scores), CHOSEN, 200)
    assert list(found.index) == TRIPLES[4:]
    np.testing.assert_allclose(found["point"], expected, atol=1e-8)


def test_intervals_of_terms_are_of_95_percent():
    """Of many normal blocks they are those of a normal mean."""
    rng = np.random.default_rng(0)
    rows = make_rows([BASELINE, "DO", "LN", "DO+LN"], datasets=10, seeds=20)
    rows = with_scores(rows, rng.normal(size=len(rows)))
    terms, _ = report_effects.contrasts(rows, CHOSEN)
    found = report_effects.interactions(rows, CHOSEN, 5000).loc["DO+LN"]
    half = 1.96 * terms.loc["DO+LN"].std(ddof=0) / np.sqrt(200)
    bounds = np.array([found["low"], found["high"]]) - found["point"]
    np.testing.assert_allclose(bounds, [-half, half], rtol=0.08)


@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_interactions_are_found_in_5_of_100_nulls(tails):
    rng = np.random.default_rng(0)
    rows = make_rows(TRIPLES, datasets=2, seeds=3)
    alone = 20 * has(rows, "DO") - 5 * has(rows, "GrN")
    nulls = []
    for number in range(NULLS):  # as if they were other datasets
        noise = draw_noise(rng, rows, tails)
        own = with_scores(rows, alone + noise)
        own["dataset"] = f"{number:03}" + own["dataset"]
        nulls.append(own)
    rows = pd.concat(nulls, ignore_index=True)
    terms, _ = report_effects.contrasts(rows, CHOSEN)
    values = terms.to_numpy().reshape(4, NULLS, 6)
    check_findings(values.transpose(1, 0, 2))


def estimated(rows):
    """Return which interactions are estimated, and which are not."""
    found = report_effects.interactions(rows, CHOSEN, 2)
    return list(found.index), report_effects.unestimated(rows, CHOSEN, found)


def test_only_what_the_runs_identify_is_estimated():
    rows = with_scores(make_rows(TRIPLES), 50)
    assert estimated(rows) == (TRIPLES[4:], [])
    is_noise = rows["label"] == "GrN"
    found, not_found = estimated(rows[~is_noise])
    assert found == ["DO+LN"]
    assert not_found == ["DO+GrN", "LN+GrN", "DO+LN+GrN"]
    in_one_block = (rows["dataset"] == "d0") & (rows["seed"] == 0)
    found, _ = estimated(rows[~is_noise | in_one_block])
    assert found == ["DO+LN"]
    singles = with_scores(make_rows([BASELINE, "DO", "LN"]), 50)
    assert estimated(singles) == ([], [])


def test_a_triple_is_not_told_from_pairs_of_another_strength():
    """The paper has such ones."""
    rows = with_scores(make_rows(TRIPLES), 50)
    is_triple = rows["label"] == "DO+LN+GrN"
    for config in rows.loc[is_triple, "config"]:
        config["actor_grad_noise"] = 0.003
    assert estimated(rows) == (TRIPLES[4:7], ["DO+LN+GrN"])
    note = report_effects.missing_text(["DO+LN+GrN"])
    assert note.endswith("have all parts at the same strengths: DO+LN+GrN.")


def test_a_pair_is_not_told_from_a_run_that_it_shares():
    """Where the baseline has dropout, as on some datasets, DO+LN is LN's run."""
    rows = with_scores(make_rows(TRIPLES), 50)
    for config in rows["config"]:
        config["actor_dropout"] = 0.1
    is_pair = rows["label"] == "DO+LN"
    shared = rows[rows["label"] == "LN"].assign(label="DO+LN")
    rows = pd.concat([rows[~is_pair], shared]).astype(rows.dtypes)
    assert estimated(rows) == (["DO+GrN", "LN+GrN"], ["DO+LN", "DO+LN+GrN"])


# --- Explanation ---


def with_measures(rows, rng, by_label):
    """Add measures whose size is moved by regularisers, `by_label` times as much as by chance."""
    rows = rows.copy()
    moved = rng.normal(size=(len(MEASURES), len(SINGLES)))
    codes = rows["label"].cat.codes
    for name, own in zip(MEASURES, moved):
        noise = rng.normal(size=len(rows))
        rows[name] = by_label * own[codes] + noise
    return rows


@pytest.mark.parametrize(
    "by_label, by_run, between, within",
    [
        (3, -3, {PCA_RANK}, {PCA_RANK}),
        (0, 3, set(), {PCA_RANK}),
        (3, 0, {PCA_RANK}, set()),
    ],
)
def test_a_planted_explanation_is_found_where_it_is_and_nothing_else(
    by_label, by_run, between, within
):
    """The score follows a measure between regularisers, or between runs of the same, or both."""
    rng = np.random.default_rng(1)
    rows = with_measures(make_rows(SINGLES), rng, 2)
    rank = rows["train/pca_rank"]
    same = rows.groupby(["label", "dataset"], observed=True)
    usual = same["train/pca_rank"].transform("mean")
    noise = rng.normal(size=len(rows))
    rows = with_scores(rows, by_label * usual + by_run * (rank - usual) + noise)
    found = report_effects.explain(rows, CHOSEN, 20)
    assert told_from_chance(found.p["between"]) == between
    assert told_from_chance(found.p["within"]) == within
    axes = report_figures.explanation_figure(found).axes
    starred = {}
    for axis, quantity in zip(axes, report_effects.QUANTITIES):
        stars = [text for text in axis.texts if text.get_text() == "*"]
        starred[quantity] = {text.get_position()[1] for text in stars}
    assert starred == {"slope": between, "alone": set(), "beside": set(), "within": within}


def test_what_an_explanation_rests_on_is_told():
    """Two regularisers move the measure and the score. Without one of them it may be chance."""
    rng = np.random.default_rng(2)
    rows = make_rows(SINGLES)
    moved = has(rows, "DO") - has(rows, "LN")
    rows["train/pca_rank"] = 10 * moved + rng.normal(size=len(rows))
    scores = 9 * moved + rng.normal(size=len(rows))
    found = report_effects.explain(with_scores(rows, scores), CHOSEN, 20)
    assert found.rests_on == {PCA_RANK: ["DO", "LN"]}
    text = report_effects.explained(found)
    assert f"{PCA_RANK} (but without DO, LN p is 0.05 or more, before correction)." in text


def test_only_single_regularisers_are_compared():
    expected = {
        "DO(0.3)": "DO",
        "critic_ln=False": "critic_ln",
        "DO+LN": None,
        "LN+critic_ln=False": None,
        "LN (no DO)": None,
        "best": None,
        BASELINE: None,
    }
    for label, name in expected.items():
        assert report_effects.regulariser(label, CHOSEN) == name


def test_estimates_are_those_of_least_squares():
    rng = np.random.default_rng(0)
    rows = make_rows(SINGLES, datasets=2, seeds=3)
    rows = with_measures(rows, rng, 1)
    scores = rng.normal(50, 10, len(rows)) + 4 * rows["train/pca_rank"]
    rows = with_scores(rows, scores)
    blocks = dummies(rows, "dataset", "seed")
    labels = dummies(rows, "dataset", "label")
    cells = np.hstack([blocks, labels])
    x = rows[MEASURES].to_numpy()
    deviations = left_over(blocks, x)
    for dataset in ("d0", "d1"):  # unit: the standard deviation within a dataset's blocks
        own = rows["dataset"] == dataset
        x[own] /= root_mean_square(deviations[own])

    found = report_effects.explain(rows, CHOSEN, 200)
    assert sorted(found.sample.columns) == sorted(MEASURES)
    assert (found.estimates["low"] <= found.estimates["high"]).all()
    together = share(blocks, x, scores)
    assert found.together == pytest.approx(together)
    assert found.label_share == pytest.approx(share(blocks, labels, scores))
    assert found.chance_share == pytest.approx(1 / 3)
    for i, name in enumerate(MEASURES):
        own = x[:, i]
        others = np.delete(x, i, 1)
        slope = least_squares(np.column_stack([own, blocks]), scores)[0]
        alone = share(blocks, own[:, None], scores)
        beside = together - share(blocks, others, scores)
        within = least_squares(np.column_stack([own, cells]), scores)[0]
        within *= root_mean_square(left_over(cells, own))
        expected = [slope, 100 * alone, 100 * beside, within]
        title = report_effects.measure_title(name)
        is_own = found.estimates["label"] == title
        points = found.estimates[is_own].set_index("quantity")["point"]
        points = points[["slope", "alone", "beside", "within"]]
        np.testing.assert_allclose(points, expected, rtol=1e-5)


def test_intervals_of_slopes_are_those_of_a_bootstrap_of_blocks():
    rng = np.random.default_rng(0)
    rows = with_measures(make_rows(SINGLES, datasets=2, seeds=10), rng, 1)
    rows = with_scores(rows, rng.normal(size=len(rows)) + rows["train/pca_rank"])
    found = report_effects.explain(rows, CHOSEN, 4000)
    *others, scores = found.sample.values.T
    x = others[found.sample.columns.index("train/pca_rank")]
    blocks = pd.DataFrame({"xy": x * scores, "xx": x * x})
    blocks = blocks.groupby(found.sample.about["block"].to_numpy()).sum().to_numpy()
    sums = blocks[rng.integers(0, len(blocks), (4000, len(blocks)))].sum(1)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    own = found.estimates.set_index(["quantity", "label"]).loc[("slope", PCA_RANK)]
    assert own["low"] == pytest.approx(low, abs=0.04 * (high - low))
    assert own["high"] == pytest.approx(high, abs=0.04 * (high - low))


@pytest.mark.parametrize("number, is_tested", [(3, False), (4, True)])
def test_three_regularisers_are_too_few_to_compare(number, is_tested):
    """They would have p of 1/6 at least, and count among what the others' p are corrected for."""
    rng = np.random.default_rng(0)
    rows = with_measures(make_rows(SINGLES[: number + 1]), rng, 1)
    rows = with_scores(rows, rng.normal(size=len(rows)))
    found = report_effects.explain(rows, CHOSEN, 5)
    assert found.regularisers == number
    assert found.p["between"].notna().all() == is_tested
    assert ("too few regularisers" in report_effects.explained(found)) != is_tested


def test_a_run_of_two_labels_counts_once():
    rng = np.random.default_rng(0)
    rows = with_measures(make_rows(SINGLES), rng, 1)
    rows = with_scores(rows, rng.normal(size=len(rows)))
    again = rows[rows["label"] == "DO"].assign(label="LN")
    twice = pd.concat([rows, again]).astype({"label": rows["label"].dtype})
    once = report_effects.explain(rows, CHOSEN, 5)
    pd.testing.assert_frame_equal(
        report_effects.explain(twice, CHOSEN, 5).estimates, once.estimates
    )


def test_p_between_and_within_are_corrected_together():
    rng = np.random.default_rng(0)
    rows = with_measures(make_rows(SINGLES), rng, 1)
    rows = with_scores(rows, rng.normal(size=len(rows)) + rows["train/pca_rank"])
    sample = report_effects.make_sample(rows)
    products = report_effects.block_products(sample)
    found = report_effects.rectangles(sample)
    between, _ = report_effects.between_p(sample, products, CHOSEN)
    within = report_effects.within_p(found)
    p, _ = report_effects.corrected_p(sample, products, found, CHOSEN)
    _, expected, *_ = multipletests([*between, *within], method="holm")
    np.testing.assert_allclose([*p[:, 0], *p[:, 1]], expected)


def test_a_seed_with_few_labels_costs_no_other_its_labels():
    rows = make_rows(SINGLES, datasets=1, seeds=3)
    is_kept = (rows["seed"] < 2) | rows["label"].isin(SINGLES[:2])
    rng = np.random.default_rng(0)
    rows = with_measures(rows[is_kept], rng, 1)
    sample = report_effects.make_sample(with_scores(rows, rng.normal(size=len(rows))))
    (found,) = report_effects.rectangles(sample)
    assert found.values.shape[1:] == (2, len(SINGLES))


def draw_null(rng, rows, tails, by_label, by_kind):
    """Return measures and last a score (N, measures + 1), which nothing but chance connects.

    A regulariser moves each by `by_label`. There are two kinds of regularisers, by the first
    measure, and in a block those of a kind share a part of the score, of size `by_kind`.
    """
    labels = rows["label"].cat.codes.to_numpy()
    width = len(MEASURES)
    moved = rng.normal(0, by_label + by_kind, (len(SINGLES), width))
    noise = rng.normal(size=(len(rows), width))
    measures = moved[labels] + noise
    scores = draw_noise(rng, rows, tails)
    of_labels = rng.normal(0, by_label, len(SINGLES))
    scores += of_labels[labels]
    blocks = rows.groupby(["dataset", "seed"]).ngroup()
    of_kinds = rng.normal(0, 7 * by_kind, (blocks.max() + 1, 2))
    kinds = (moved[:, 0] > 0).astype(int)
    scores += of_kinds[blocks, kinds[labels]]
    return np.column_stack([measures, scores])


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
    rows = with_measures(make_rows(SINGLES, 2, seeds), rng, 1)
    rows = with_scores(rows, rows.index)
    layout = report_effects.make_sample(rows)
    smallest = []
    for _ in range(NULLS):
        values = draw_null(rng, rows, tails, by_label, by_kind)
        by_block = values.reshape(2 * seeds, len(SINGLES), -1)
        deviations = by_block - by_block.mean(1, keepdims=True)
        sample = layout._replace(values=deviations.reshape(values.shape))
        products = report_effects.block_products(sample)
        rectangles = report_effects.rectangles(sample)
        p, _ = report_effects.corrected_p(sample, products, rectangles, CHOSEN)
        smallest.append(p.min())
    assert np.mean(np.array(smallest) < 0.05) <= AT_MOST


@pytest.fixture(scope="module")
def odd():
    """Return the explanation by measures that are constant, collinear, or missing."""
    rng = np.random.default_rng(0)
    rows = with_measures(make_rows(SINGLES), rng, 2)
    rows["train/action_error"] = rng.uniform(1, 2, len(rows))
    rows["validation/action_error"] = rng.uniform(1, 2, len(rows))
    rows["gap/action_error"] = rows["validation/action_error"] - rows["train/action_error"]
    rows["train/copy"] = 2 * rows["train/pca_rank"] - 7
    rows["random/copy"] = rng.normal(size=len(rows))  # the same on other states
    rows["train/dead_neurons"] = 0.1
    rows["train/srank"] = 1.0 + rows.index
    rows.loc[rows["seed"] > 0, "train/srank"] = np.nan
    rows.loc[3, "train/feature_norm"] = np.nan
    rows.loc[4, "train/feature_norm"] = np.inf
    scores = rng.normal(size=len(rows)) + rows["train/pca_rank"]
    rows["score"] = scores
    rows["score/action_noise=0.2"] = scores
    rows["seconds/train"] = scores
    rows["evaluation/overestimation"] = -scores
    return report_effects.explain(with_scores(rows, scores), CHOSEN, 50)


def test_constant_and_missing_measures_are_left_out(odd):
    errors = [f"{batch}/action_error" for batch in ("train", "validation", "gap", "ratio")]
    assert set(odd.sample.columns) == {*MEASURES, *errors, "train/copy"}
    assert odd.sample.constant == ["train/dead_neurons"]
    assert odd.sample.missing == ["train/srank"]
    assert odd.sample.dropped == 2
    note = report_effects.explanation_table("", odd).note
    assert "133 runs in 15 blocks" in note
    assert "too few runs have it: " in note
    assert "Left out: 2 runs that lack a measure." in note
    assert "varies in no block: dead neurons (share, training data)." in note


def test_collinear_measures_break_nothing(odd):
    intervals = odd.estimates[["point", "low", "high"]]
    assert np.isfinite(intervals).all(axis=None)
    points = odd.estimates.set_index(["quantity", "label"])["point"]
    copy = "copy (training data)"
    assert points["alone", copy] == pytest.approx(points["alone", PCA_RANK])
    assert points["alone", PCA_RANK] > 30
    assert points["beside", PCA_RANK] == 0  # the copy has it all
    assert points["beside", copy] == 0
    assert points["beside", "gap of the action error"] >= 0
    figure = report_figures.explanation_figure(odd)
    assert len(figure.axes) == 4


def test_nothing_is_explained_by_too_few_runs():
    rng = np.random.default_rng(0)
    for rows in (make_rows(SINGLES, datasets=1, seeds=2), make_rows([BASELINE])):
        rows = with_scores(rows, range(len(rows)))
        rows = with_measures(rows, rng, 1)
        assert report_effects.explain(rows, CHOSEN, 5) is None
