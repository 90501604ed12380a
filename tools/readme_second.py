"""The second study's tables and figures in data/README.md, from second.csv and repeat.csv there.

`rows` is a DataFrame with a row for each finished run and label of one algorithm.
"""

import functools
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.stats

from harness.scripts import load_script
from tools import report_effects as effects
from tools import report_figures as figures
from tools import report_shares as shares
from tools.readme_long import range_text
from tools.readme_results import COMBINATIONS, STUDIED, as_block, in_order, markdown, path_of
from tools.report_runs import BASELINE, by_label, read_results
from tools.report_tables import (
    LEVEL,
    bold,
    bounds_text,
    by_seed,
    difference_table,
    interval_text,
    mean_and_interval,
    p_text,
    same_as_baseline,
)

REPS = 2000  # of the bootstrap
MOST_SHOWN = 8  # measures of an explanation
TENTH = 0.1  # the share of the episodes that most parts train on
MOST = 0.9  # the largest share
LITTLE = (0.02, 0.05)  # the smallest shares
CHEETAH = "halfcheetah-medium-replay-v2"
PEN = "pen-expert-v1"


@functools.cache  # since it is read for each of many tables
def finished(algorithm, file="second.csv"):
    """Return an algorithm's finished runs in a table of data/, a row for each.

    ReBRAC has other coefficients on each dataset. That is no setting here.
    """
    seeds, _ = read_results([path_of("data", file)])
    seeds = [seed for seed in seeds if seed["state"] == "finished"]
    table = pd.DataFrame([seed for seed in seeds if seed["algorithm"] == algorithm])
    share = table["config"].map(shares.share_of)
    return table.assign(final=table["score"], share=share, settings=[()] * len(table))


def mean_texts(values, sign):
    """Return the means of rows over seeds with their intervals, as texts."""
    return [interval_text(*pair, sign) for pair in zip(*mean_and_interval(values))]


# --- Less data ---


@functools.cache
def less_data_rows(algorithm):
    """Return an algorithm's runs on 2 to 90 % of the episodes.

    A dataset that still lacks some of these shares is left out.
    """
    labels = {BASELINE, "DO", "LN", "L2", "DO+LN", COMBINATIONS[algorithm]}
    runs = finished(algorithm)
    is_own = [not labels.isdisjoint(own) for own in runs["labels"]]
    ((_, rows),) = shares.groups(runs[is_own])
    numbers = rows.groupby("dataset")["share"].nunique()
    return rows[rows["dataset"].isin(numbers.index[numbers == numbers.max()])]


def less_data(algorithm):
    """The differences from the baseline on less data: the report's table."""
    rows = less_data_rows(algorithm)
    return as_block(shares.share_table("", rows, in_order(rows)))


def less_data_by_dataset(algorithm):
    """The baseline's scores on less data, and the others' differences from it, by dataset.

    Bold is a difference whose p is below 0.05, corrected by Holm over the table. The slopes, by
    which the differences grow with each halving of the data, are corrected apart.
    """
    rows = less_data_rows(algorithm)
    scores = {}
    gains = {}
    slopes = {}
    for dataset in in_order(rows):
        own = rows[~rows["label"].isin(same_as_baseline(rows, [dataset]))]
        baseline = shares.by_label_and_share(own, "final", [dataset]).loc[BASELINE]
        scores[dataset] = mean_texts(baseline, "")
        gains[dataset] = shares.gains(own, [dataset])
        slopes[dataset] = shares.per_halving(gains[dataset])
    gains = pd.concat(gains)
    texts, _ = shares.texts_and_p(gains)
    texts = pd.Series(texts, gains.index).unstack(sort=False)  # a column for each share
    titles = [f"{100 * share:g} %" for share in texts]
    slopes = pd.concat(slopes)
    slope_texts, _ = shares.texts_and_p(slopes)
    texts["slope"] = pd.Series(slope_texts, slopes.index)
    lines = []
    for dataset, cells in scores.items():
        lines.append([STUDIED[dataset], BASELINE, *cells, ""])
        for label, cells in texts.loc[dataset].iterrows():
            lines.append([STUDIED[dataset], label, *cells])
    return markdown(["dataset", "regularisers", *titles, "for each halving"], lines)


def less_data_figure(algorithm):
    rows = less_data_rows(algorithm)
    return shares.share_figure(rows, in_order(rows))


# --- Strengths ---


def varied(runs, values):
    """Return the runs that differ from their dataset's baseline in these fields alone.

    The share and the seed may differ, too. `values` is {field: those that it may have}. On Adroit
    IQL's baseline has dropout.
    """
    configs = {}
    for dataset, labels, config in zip(runs["dataset"], runs["labels"], runs["config"]):
        if BASELINE in labels:
            configs[dataset] = config
    free = {*values, "seed", "validation_frac"}
    kept = []
    for dataset, config in zip(runs["dataset"], runs["config"]):
        baseline = configs[dataset]
        is_same = all(value == baseline[key] for key, value in config.items() if key not in free)
        kept.append(is_same and all(config[key] in own for key, own in values.items()))
    return runs[kept]


def strengths(field, values):
    """The differences that strengths of one of IQL's regularisers make on 10 % of the episodes.

    Beside them is the action error on held-out data, a mean over the seeds.
    """
    runs = varied(finished("iql"), {field: values})
    runs = runs[runs["share"] == TENTH]
    names = {value: f"{value:g}" if value else BASELINE for value in values}
    label = [names[config[field]] for config in runs["config"]]
    rows = runs.assign(label=pd.Categorical(label, names.values(), ordered=True))
    columns = {STUDIED[dataset]: [dataset] for dataset in STUDIED}
    cells = difference_table("", rows, {**columns, "mean": list(STUDIED)}).cells
    cells = cells.drop(columns=[f"p, {name}" for name in columns])
    for dataset in STUDIED:
        errors = by_seed(rows, "validation/action_error", [dataset]).mean(axis=1)
        cells[f"held-out error, {STUDIED[dataset]}"] = errors.map("{:.3f}".format)
    return markdown([f"`{field}`", *cells], cells.reset_index().to_numpy())


# --- Actor or critics ---


PLACED = ["LN", "DO", "L2"]  # the regularisers that are tried in the actor and in the critics
MEAN = "mean"
PLACES = {  # what it is on in: (actor, critics) -> label
    (False, False): BASELINE,
    (True, False): "actor",
    (False, True): "critics",
    (True, True): "both",
}


def place_rows(algorithm, name):
    """Return the runs with a regulariser in the actor, the critics, both and neither.

    `label` says in which. All else is the baseline's.
    """
    actor, strength = next(iter(load_script(algorithm).CHOSEN[name].items()))
    fields = (actor, actor.replace("actor", "critic"))
    runs = varied(finished(algorithm), dict.fromkeys(fields, (0, strength)))
    runs = runs[runs["share"].isin([TENTH, MOST])]
    label = [PLACES[tuple(bool(config[key]) for key in fields)] for config in runs["config"]]
    return runs.assign(label=pd.Categorical(label, PLACES.values(), ordered=True))


@functools.cache
def place_scores(algorithm):
    """Return scores by (dataset, name, label, share), with columns of seeds.

    The datasets have the titles of STUDIED, in order, and last there is their mean.
    """
    scores = {}
    for name in PLACED:
        rows = place_rows(algorithm, name)
        datasets = in_order(rows)
        for dataset in datasets:
            scores[STUDIED[dataset], name] = shares.by_label_and_share(rows, "final", [dataset])
        scores[MEAN, name] = shares.by_label_and_share(rows, "final", datasets)
    titles = [*(STUDIED[dataset] for dataset in datasets), MEAN]
    return pd.concat(scores, names=["dataset", "name"]).loc[titles]


def place_gains(algorithm):
    """Return the scores minus those of the same seed with the regulariser in neither."""
    scores = place_scores(algorithm)
    neither = scores.xs(BASELINE, level="label")
    same = scores.index.droplevel("label")
    return (scores - neither.reindex(same).to_numpy()).drop(BASELINE, level="label")


def places(algorithm):
    """The differences that a regulariser of the actor, the critics and both makes from neither.

    Holm corrects p over the means, and apart from them over the single datasets.
    """
    scores = place_scores(algorithm).xs(BASELINE, level="label")
    neither = pd.Series(mean_texts(scores, ""), scores.index).unstack("dataset", sort=False)

    gained = place_gains(algorithm)
    is_mean = gained.index.get_level_values("dataset") == MEAN
    texts = pd.Series("", gained.index)
    texts[~is_mean], _ = shares.texts_and_p(gained[~is_mean])
    texts[is_mean], p = shares.texts_and_p(gained[is_mean])
    p = pd.Series(p, gained.loc[MEAN].index)
    texts = texts.unstack("dataset", sort=False)

    lines = []
    for share, name in itertools.product(gained.index.unique("share"), PLACED):
        start = [f"{100 * share:g} %", name]
        lines.append([*start, "neither", *neither.loc[(name, share)], ""])
        for label in gained.index.unique("label"):
            key = (name, label, share)
            lines.append([*start, label, *texts.loc[key], p_text(p[key])])
    return markdown(["episodes", "regulariser", "in", *texts, "p of the mean"], lines)


def temperatures():
    """IQL's scores on 10 % of HalfCheetah by LN in actor and critics and by the temperature."""
    placed = place_rows("iql", "LN")
    rows = pd.concat([placed[placed["share"] == TENTH], finished("iql", "temperature.csv")])
    cells = {}
    for _, row in rows.sort_values("seed").iterrows():
        config = row["config"]
        if config["dataset_name"] == CHEETAH and config["seed"] in (0, 1, 2):
            kind = (config["critic_ln"], config["temperature"])
            texts = cells.setdefault(kind, {False: [], True: []})
            texts[config["actor_ln"]].append(f"{row['final']:.1f}")
    lines = []
    for (critic_ln, temperature), texts in sorted(cells.items()):
        critics = "LN" if critic_ln else "baseline"
        if temperature == 0:  # all weights are 1, whatever the critics say
            critics = "any"
        scores = [", ".join(texts[actor_ln]) for actor_ln in (False, True)]
        lines.append([critics, f"{temperature:g}", *scores])
    return markdown(["critics", "`temperature`", "actor", "actor with LN"], lines)


def front_figure():
    """Draw gains on less data, and IQL's by regularisers in the actor and the critics.

    IQL's are means over its datasets. All have 95 % intervals.
    """
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 6.8), layout="constrained")
    *others, right = axes.flat
    panels = [("iql", list(STUDIED)), ("rebrac", [CHEETAH]), ("rebrac", [PEN])]
    for axis, (algorithm, datasets) in zip(others, panels):
        rows = less_data_rows(algorithm)
        styles = shares.label_styles(rows)
        shares.draw_bands(axis, shares.gains(rows, datasets), styles)
        if datasets == [CHEETAH]:
            draw_other_draws(axis, styles["DO+LN"])
        axis.axhline(0, color="black", linewidth=0.8)
        name = load_script(algorithm).NAME
        axis.set(title=f"{name}, the actor regularised: {names_of(datasets)}")
        axis.set(xlabel="episodes trained on (%)", ylabel="score − baseline's")
        axis.legend(fontsize="small", ncols=2)

    gained = place_gains("iql").loc[MEAN]
    for j, (share, style) in enumerate(zip(gained.index.unique("share"), figures.STYLES)):
        own = gained.xs(share, level="share")
        own = own.loc[[(name, place) for name in PLACED for place in own.index.unique("label")]]
        means, halves = mean_and_interval(own)
        heights = np.arange(len(own))[::-1] + 0.2 * (0.5 - j)
        style = {**style, "linestyle": ""}
        right.errorbar(means, heights, xerr=halves, label=f"{100 * share:g} %", **style)
    right.set_yticks(np.arange(len(own))[::-1], [f"{name}: {place}" for name, place in own.index])
    right.axvline(0, color="black", linewidth=0.8)
    right.set(title=f"IQL, actor or critics: {names_of(STUDIED)}")
    right.set(xlabel="score − that with it in neither")
    right.legend(title="episodes", fontsize="small")
    return figure


def draw_other_draws(axis, style):
    """Draw what DO+LN gains ReBRAC on other draws of HalfCheetah's episodes."""
    _, gained = of_other_draws()
    means, halves = mean_and_interval(gained)
    style = {**style, "linestyle": "", "marker": "*", "markersize": 9, "capsize": 3}
    label = "DO+LN, eight other draws"
    axis.errorbar(100 * gained.index, means, yerr=halves, label=label, **style)


def names_of(datasets):
    return ", ".join(STUDIED[dataset] for dataset in datasets)


REPEATED = [  # the flag of LN, the share of the episodes, the datasets
    *(("critic_ln", MOST, [dataset]) for dataset in STUDIED),
    ("critic_ln", MOST, list(STUDIED)),
    ("actor_ln", 0.02, ["hopper-medium-v2"]),
]


def repeated_gains(file):
    """Return what LN gains IQL by the runs in a file: a row for each of REPEATED."""
    gained = []
    for flag, share, datasets in REPEATED:
        runs = varied(finished("iql", file), {flag: (False, True)})
        runs = runs[runs["share"] == share]
        label = ["LN" if config[flag] else BASELINE for config in runs["config"]]
        scores = by_seed(runs.assign(label=label), "final", datasets)
        gained.append(scores.loc["LN"] - scores.loc[BASELINE])
    return pd.DataFrame(gained)


def repeated():
    """What LN changes in IQL's critics, and on 2 % of Hopper, by the first seeds and by new ones.

    p and bold are of the new seeds, corrected by Holm over the table.
    """
    first = mean_texts(repeated_gains("second.csv"), "+")
    new, p = shares.texts_and_p(repeated_gains("repeat.csv"))
    lines = []
    for (flag, share, datasets), *cells in zip(REPEATED, first, new, map(p_text, p)):
        name = STUDIED[datasets[0]] if len(datasets) == 1 else MEAN
        lines.append([f"`{flag}`", f"{100 * share:g} %", name, *cells])
    titles = ["LN in", "episodes", "dataset", "seeds 0 to 4", "seeds 20 to 24", "p of the latter"]
    return markdown(titles, lines)


def longer():
    """IQL's scores over longer trainings, with LN in the critics, in the actor too, and in neither.

    Holm corrects p, of the last evaluation.
    """
    runs = finished("iql", "longer.csv")
    places = [(config["actor_ln"], config["critic_ln"]) for config in runs["config"]]
    runs = runs.assign(label=[PLACES[place] for place in places])
    gained = {}
    for dataset in in_order(runs):
        scores = by_seed(runs, "final", [dataset])
        gained[dataset] = scores.drop(BASELINE) - scores.loc[BASELINE]
    gained = pd.concat(gained)
    texts, p = shares.texts_and_p(gained)
    ends = dict(zip(gained.index, zip(texts, map(p_text, p))))

    (updates,) = set(map(tuple, runs["updates"]))
    lines = []
    for dataset, label in itertools.product(in_order(runs), PLACES.values()):
        own = runs[(runs["dataset"] == dataset) & (runs["label"] == label)]
        if len(own) > 0:
            by_update = np.array(own["scores"].tolist()).T
            cells = [range_text(scores, 1) for scores in by_update]
            place = "neither" if label == BASELINE else label
            end = ends.get((dataset, label), ["", ""])
            lines.append([STUDIED[dataset], place, len(own), *cells, *end])
    header = ["dataset", "LN in", "seeds", *(f"{update:,} updates" for update in updates)]
    return markdown([*header, "difference at the end", "p"], lines)


def cheetah_runs(file):
    """Return ReBRAC's runs on 2 and 5 % of HalfCheetah's episodes, with their draw and `coef`."""
    runs = finished("rebrac", file)
    runs = runs[(runs["dataset"] == CHEETAH) & runs["share"].isin(LITTLE)]
    configs = pd.DataFrame(runs["config"].tolist(), runs.index)
    return runs.assign(draw=configs["validation_seed"], coef=configs["actor_bc_coef"])


def little_data(runs):
    """Return the baseline's scores and what DO+LN gains: rows of shares, columns of seeds."""
    scores = shares.by_label_and_share(by_label(runs), "final", [CHEETAH])
    baseline = scores.loc[BASELINE]
    return baseline, scores.loc["DO+LN"] - baseline


def of_other_draws():
    """Return what `little_data` does, by the other draws of the episodes: columns of draws."""
    runs = cheetah_runs("repeat.csv")
    runs = runs[runs["draw"] > 0]
    return little_data(runs.assign(seed=runs["draw"]))


def other_draws():
    """What DO+LN changes in ReBRAC on HalfCheetah, by the first episodes and by other draws.

    p and bold are of the other draws, corrected by Holm over the table.
    """
    first_baseline, first_gained = little_data(cheetah_runs("second.csv"))
    baseline, gained = of_other_draws()
    texts, p = shares.texts_and_p(gained)
    columns = {
        "episodes": [f"{100 * share:g} %" for share in gained.index],
        "baseline": mean_texts(first_baseline, ""),
        "DO+LN": mean_texts(first_gained, "+"),
        "baseline, other draws": mean_texts(baseline, ""),
        "DO+LN, other draws": texts,
        "p": [p_text(one) for one in p],
    }
    return markdown(columns, zip(*columns.values()))


def more_cloning():
    """What DO+LN changes in ReBRAC on HalfCheetah, by the share and the coefficient of cloning.

    p and bold are corrected by Holm over the table.
    """
    runs = pd.concat([cheetah_runs("second.csv"), cheetah_runs("repeat.csv")])
    first_draw = runs[runs["draw"] == 0]
    baselines = {}
    gains = {}
    for coef, own in first_draw.groupby("coef"):
        baselines[coef], gains[coef] = little_data(own)
    baseline = pd.concat(baselines).swaplevel().sort_index()  # rows of (share, coef)
    gained = pd.concat(gains).swaplevel().sort_index()
    texts, p = shares.texts_and_p(gained)
    columns = {
        "episodes": [f"{100 * share:g} %" for share, _ in gained.index],
        "`actor_bc_coef`": [f"{coef:g}" for _, coef in gained.index],
        "baseline": mean_texts(baseline, ""),
        "DO+LN": texts,
        "p": [p_text(one) for one in p],
    }
    return markdown(columns, zip(*columns.values()))


# --- Pairs, and what explains the scores ---


@functools.cache
def pair_rows():
    """Return IQL's runs on 10 % of HalfCheetah's episodes, of the seeds that pairs have."""
    runs = finished("iql")
    own = runs[(runs["share"] == TENTH) & (runs["dataset"] == CHEETAH) & (runs["seed"] < 3)]
    return by_label(own)


@functools.cache
def pair_interactions():
    return effects.interactions(pair_rows(), load_script("iql").CHOSEN, REPS)


def pairs():
    """How many interactions there are and are significant, and how large one must be for that."""
    rows = pair_rows()
    found = pair_interactions()
    terms, _ = effects.contrasts(rows, load_script("iql").CHOSEN)
    seeds = terms.shape[1]
    t = scipy.stats.t.ppf(1 - LEVEL / len(terms) / 2, seeds - 1)
    needed = t / np.sqrt(seeds) * terms.std(axis=1).median()
    baseline = rows.loc[rows["label"] == BASELINE, "final"].mean()
    significant = (found["p"] < LEVEL).sum()
    positive = (found["point"] > 0).sum()
    return (
        f"{significant} of {len(found)} interactions are significant. The smallest p is "
        f"{p_text(found['p'].min())}. {positive} are above 0. An interaction with the median "
        f"standard deviation over the seeds needs {needed:.0f} points to be significant. "
        f"The baseline's score is {baseline:.0f}."
    )


def interaction_figure():
    return figures.interaction_map(pair_interactions(), load_script("iql").CHOSEN)


STRONG = ["DO(0.3)", "DO(0.5)"]
SETS = {  # of runs on 10 % of the episodes -> datasets, and regularisers that are left out
    "iql": {
        "all three": (list(STUDIED), []),
        "without strong dropout": (list(STUDIED), STRONG),
        "HalfCheetah": ([CHEETAH], []),
        "HalfCheetah, without strong dropout": ([CHEETAH], STRONG),
        "HalfCheetah, also without GN": ([CHEETAH], [*STRONG, "GN"]),
        "Hopper": (["hopper-medium-v2"], []),
        "Pen": ([PEN], []),
    },
    "rebrac": {
        "both": ([CHEETAH, PEN], []),
        "HalfCheetah": ([CHEETAH], []),
        "Pen": ([PEN], []),
    },
}


@functools.cache
def explanation_of(algorithm, name):
    """Return the Explanation of a set of an algorithm's runs, whose critics are the baseline's."""
    datasets, left_out = SETS[algorithm][name]
    runs = finished(algorithm)
    rows = by_label(runs[(runs["share"] == TENTH) & runs["dataset"].isin(datasets)])
    is_kept = [
        set(left_out).isdisjoint(label.split("+")) and "critic_" not in label
        for label in rows["label"]
    ]
    return effects.explain(rows[is_kept], load_script(algorithm).CHOSEN, REPS)


def explanation(algorithm):
    """The share of the score's variance that each measure explains alone, by sets of runs (%).

    The arrow is the sign of the slope. Shown are the measures with the largest shares, as means
    over the sets.
    """
    cells = {}
    for name in SETS[algorithm]:
        found = explanation_of(algorithm, name)
        quantities = found.estimates.set_index(["quantity", "label"])
        own = quantities.loc["alone"].assign(slope=quantities.loc["slope", "point"])
        cells[f"{name}: {len(found.sample.about)} runs"] = own
    points = pd.DataFrame({name: own["point"] for name, own in cells.items()})
    shown = points.mean(axis=1).sort_values(ascending=False).index[:MOST_SHOWN]
    lines = []
    for measure in shown:
        line = [measure]
        for own in cells.values():
            row = own.loc[measure]
            arrow = "↑" if row["slope"] > 0 else "↓"
            text = bounds_text(row["point"], row["low"], row["high"], digits=0)
            line.append(f"{arrow} {text}")
        lines.append(line)
    return markdown(["measure", *cells], lines)


TESTS = {  # that the numbers of seeds and regularisers allow -> sets of runs
    "iql": {
        "between": [
            "HalfCheetah",
            "HalfCheetah, without strong dropout",
            "HalfCheetah, also without GN",
        ],
        "within": ["all three", "without strong dropout"],
    },
    "rebrac": {"within": ["both"]},
}
QUESTIONS = {"between": "between regularisers", "within": "same regulariser, other seeds"}


def explanation_tests(algorithm):
    """The p values of some measures, corrected by Holm, where the runs are enough for a test."""
    columns = ["evaluation/action_distance", "validation/action_error", "train/action_error"]
    titles = [effects.measure_title(column) for column in columns]
    lines = []
    for column, names in TESTS[algorithm].items():
        for name in names:
            found = explanation_of(algorithm, name)
            number = found.regularisers if column == "between" else ""
            p = found.p.loc[titles, column]
            lines.append([QUESTIONS[column], name, number, *(bold(p_text(one), one) for one in p)])
    return markdown(["question", "runs", "regularisers", *titles], lines)


def explanation_figure(algorithm, name):
    return figures.explanation_figure(explanation_of(algorithm, name))
