"""The report's statistics and tables.

`rows` is a DataFrame with a row for each seed and label of one algorithm. Its column `final` has
the final score, NaN if the run isn't finished.
"""

import re
from typing import NamedTuple

import numpy as np
import pandas as pd
from rliable import library
from scipy import stats

from tools.report_runs import BASELINE

# What is measured inside the actor in the last evaluation: its title, and digits after the point
INSIDE = {
    "train/dead_neurons": ("dead neurons (share, training data)", 3),
    "evaluation/dead_neurons": ("dead neurons (share, evaluation)", 3),
    "train/feature_norm": ("feature norm (training data)", 1),
    "train/pca_rank": ("PCA rank (training data)", 1),
    "train/srank": ("srank (training data)", 1),
    "train/effective_rank": ("effective rank (training data)", 1),
    "cka_to_baseline": ("CKA to the baseline's features", 3),
    "train/jacobian_norm": ("norm of the actions' Jacobian (training data)", 2),
    "train/action_error": ("action error (training data)", 3),
    "validation/action_error": ("action error (held-out data)", 3),
    "gap/action_error": ("gap of the action error", 3),
    "ratio/action_error": ("action error: held-out / training", 3),
    "evaluation/action_distance": ("distance to the data's actions (evaluation)", 3),
    "train/q_gain": ("Q of the policy's actions − of the data's", 2),
    "evaluation/overestimation": ("overestimation of the return", 1),
    "plasticity/loss_left": ("plasticity (share of the loss that is left)", 3),
}
AGGREGATES = ["IQM", "median", "mean", "optimality gap"]
PROBABILITY = "P(better than the baseline)"


class Table(NamedTuple):
    """A table. Its cells are Markdown, so that **this** is bold."""

    title: str
    cells: pd.DataFrame
    note: str
    first: str = "regularisers"  # the first column's name

    def lines(self):
        return [[self.first, *self.cells], *self.cells.reset_index().to_numpy()]


def to_markdown(table):
    header, *lines = table.lines()
    lines = [header, ["---"] * len(header), *lines]
    lines = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text = text.replace("|  ", "| ")  # where a cell is empty
    return f"### {table.title}\n\n{text}\n\n{table.note}\n"


LATEX = r"""\begin{table}
\centering
\caption{%s}
\resizebox{\linewidth}{!}{\begin{tabular}{%s}
\toprule
%s
\midrule
%s
\bottomrule
\end{tabular}}
\end{table}
"""


def to_latex(table):
    header, *lines = [" & ".join(map(escape, line)) + r" \\" for line in table.lines()]
    caption = escape(f"{table.title}. {table.note}")
    columns = "l" + "r" * len(table.cells.columns)
    return LATEX % (caption, columns, header, "\n".join(lines))


def escape(text):
    """Return a cell's Markdown as LaTeX."""
    text = text.replace("\\", r"\textbackslash ")
    text = re.sub(r"([%&_#${}])", r"\\\1", text)
    text = text.replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ")
    text = text.replace("±", r"$\pm$").replace("–", "--").replace("<", "$<$").replace("−", "$-$")
    text = re.sub(r"`(.*?)`", r"\\texttt{\1}", text)
    return re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", text)


# --- Statistics ---

ROUNDING = 1e-9  # a spread that is less, relative to the values, is none


def accept_random_state(bootstrap):
    """Let rliable, written for arch 5, make a bootstrap of arch 8, which has no `random_state`."""
    init = bootstrap.__init__

    def init_without_random_state(self, *data, random_state=None, **named):
        init(self, *data, **named)

    bootstrap.__init__ = init_without_random_state


accept_random_state(library.arch_bs.IIDBootstrap)
accept_random_state(library.arch_bs.IndependentSamplesBootstrap)


def by_seed(rows, column, datasets):
    """Return a column's means over datasets: a row for each label, a column for each seed.

    NaN where a dataset is missing.
    """
    own = rows[rows["dataset"].isin(datasets)]
    values = own.groupby(["label", "seed", "dataset"])[column].mean()
    groups = values.groupby(["label", "seed"])
    return groups.mean().where(groups.count() == len(datasets)).unstack("seed")


def standard_errors(values):
    """Return the standard errors of the means of rows over seeds.

    It is NaN for fewer than two seeds. It is NaN for equal values, too, since without a spread
    chance can't be judged. AntMaze's coarse scores may be equal.
    """
    errors = values.sem(axis=1)
    return errors.where(errors > ROUNDING * values.abs().max(axis=1))


def mean_and_interval(values):
    """Return the means of rows over seeds, and half their 95 % intervals by Student's t.

    A row of fewer than two seeds has neither: NaN. One without a standard error has no interval.
    """
    degrees = values.count(axis=1) - 1
    halves = standard_errors(values) * stats.t.ppf(0.975, degrees)
    return values.mean(axis=1).where(degrees > 0), halves


def p_values(values):
    """Return Student's two-sided p of rows over seeds having the mean 0.

    A row without a standard error has none: NaN. But a row of two zeros or more has 1.
    """
    degrees = values.count(axis=1) - 1
    means = values.mean(axis=1).abs()
    p = pd.Series(2 * stats.t.sf(means / standard_errors(values), degrees), values.index)
    return p.mask((degrees > 0) & (values.abs().max(axis=1) == 0), 1.0)


def holm(p):
    """Return p values corrected by Holm, in an array of the same shape. NaNs don't count."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, axis=None)  # NaNs last
    number = np.isfinite(p).sum()
    factors = np.maximum(number - np.arange(p.size), 1)
    corrected = np.empty(p.size)
    corrected[order] = np.maximum.accumulate(p.flat[order] * factors)
    return np.minimum(corrected, 1).reshape(p.shape)


def score_arrays(rows, datasets):
    """Return by label the scores / 100 (seeds, datasets) of the seeds that have all datasets.

    Labels with fewer than two such seeds are left out.
    """
    arrays = {}
    for label, own in rows.groupby("label"):
        scores = own.pivot(index="seed", columns="dataset", values="final")
        scores = scores.reindex(columns=datasets).dropna()
        if len(scores) > 1:
            arrays[label] = scores.to_numpy() / 100
    return arrays


def interval(function, measures, labels, arrays, reps):
    """Return rliable's estimates and 95 % intervals: rows of measure, label, point, low, high.

    `function` takes the `arrays` of scores, (seeds, datasets, labels), and returns an array
    (measures, labels).
    """

    def flat(*resampled):
        return function(*resampled).ravel()

    np.random.seed(0)  # noqa: NPY002, from where rliable draws
    points, intervals = library.get_interval_estimates({"": arrays}, flat, reps=reps)
    index = pd.MultiIndex.from_product([measures, labels], names=["measure", "label"])
    low, high = intervals[""]
    return pd.DataFrame({"point": points[""], "low": low, "high": high}, index).reset_index()


def aggregates(scores):
    """Return IQM, median, mean and optimality gap (4, labels), as rliable defines them."""
    ordered = np.sort(scores.reshape(-1, scores.shape[2]), axis=0)
    cut = len(ordered) // 4
    iqm = ordered[cut : len(ordered) - cut].mean(0)
    median = np.median(scores.mean(0), axis=0)
    gap = 1 - np.minimum(scores, 1).mean((0, 1))
    return 100 * np.stack([iqm, median, scores.mean((0, 1)), gap])


def probability_of_improvement(x, y):
    """Return how often a seed of x is better than one of y (1, labels). Ties count half."""
    x = x[:, None]
    y = y[None]
    return ((x > y) + 0.5 * (x == y)).mean((0, 1, 2))[None]


def estimate(arrays, reps):
    """Return aggregates and comparisons: rows of measure, label, point, low, high."""
    found = []
    for size in {len(scores) for scores in arrays.values()}:  # those with as many seeds at once
        labels = [label for label in arrays if len(arrays[label]) == size]
        scores = np.stack([arrays[label] for label in labels], axis=2)
        found.append(interval(aggregates, AGGREGATES, labels, [scores], reps))
        if BASELINE in arrays:
            baseline = np.repeat(arrays[BASELINE][:, :, None], len(labels), axis=2)
            pair = [scores, baseline]
            found.append(interval(probability_of_improvement, [PROBABILITY], labels, pair, reps))
    found = pd.concat(found)
    found["label"] = pd.Categorical(found["label"], list(arrays), ordered=True)
    with_itself = (found["label"] == BASELINE) & ~found["measure"].isin(AGGREGATES)
    return found[~with_itself].sort_values("label", kind="stable")


def improvements(rows, datasets):
    """Return by how many percent of the baseline's mean score each label is better than it.

    It is taken seed by seed, over the datasets. Rows of label, point, low, high. The interval is of
    95 %, by Student's t, and takes the baseline's mean as known. There are no rows if its own
    interval includes 0. Labels without an interval, or with the baseline's own runs, have none.
    """
    scores = by_seed(rows, "final", datasets)
    columns = ["label", "point", "low", "high"]
    if BASELINE not in scores.index:
        return pd.DataFrame(columns=columns)
    means, halves = mean_and_interval(scores)
    level = means[BASELINE]
    if not level > halves.fillna(0)[BASELINE]:  # otherwise percents of it mean nothing
        return pd.DataFrame(columns=columns)
    others = scores.drop([BASELINE, *same_as_baseline(rows, datasets)])
    means, halves = mean_and_interval(100 * (others - scores.loc[BASELINE]) / level)
    values = [means.index.astype(str), means, means - halves, means + halves]
    return pd.DataFrame(dict(zip(columns, values))).dropna().reset_index(drop=True)


def expected_online_performance(scores):
    """Return the best score to expect of n of the K configurations, for n = 1 ... K.

    They are drawn with replacement, as in the paper (arXiv 2110.04156). The best of n is among the
    i lowest scores with probability (i / K)^n.
    """
    size = len(scores)
    expected = []
    for n in range(1, size + 1):
        among_lowest = (np.arange(size + 1) / size) ** n
        expected.append(np.sort(scores) @ np.diff(among_lowest))
    return np.array(expected)


# --- Tables ---


def score_table(title, rows, datasets):
    """Return the table of mean scores, with the standard deviations over the seeds."""
    runs = rows[rows["dataset"].isin(datasets)].groupby(["label", "dataset"])
    expected = runs.size().max()
    cells = runs.apply(score_cell, expected).unstack(fill_value="missing")[datasets]
    if len(datasets) > 1:
        by_seeds = by_seed(rows, "final", datasets)
        means = by_seeds.mean(axis=1)
        cells["mean"] = means.map("{:.1f}".format).replace("nan", "incomplete")
    note = "One seed."
    if expected > 1:
        note = (
            f"Mean ± standard deviation over {expected} seeds, or over as many as are finished: "
            f"(finished/{expected}). {STANDARD_DEVIATION}"
        )
    if len(datasets) > 1:
        finished = rows[rows["dataset"].isin(datasets)].dropna(subset="final")
        seeds = finished.groupby("label")["seed"].nunique().reindex(by_seeds.index)
        if (by_seeds.notna().sum(axis=1) < seeds).any():
            note += " The mean is of the seeds that have all datasets."
    return Table(title, cells, note)


def score_cell(runs, expected):
    """Return "36.3 ± 0.1", or "36.3 ± 0.1 (2/3, 1 failed)" of 3 expected, or "1 unfinished"."""
    scores = runs["final"].dropna()
    states = runs["state"].value_counts().drop("finished", errors="ignore").sort_index()
    notes = [f"{number} {state}" for state, number in states.items()]
    if scores.empty:
        return ", ".join(notes)
    text = f"{scores.mean():.1f}"
    if len(scores) > 1:
        text += f" ± {scores.std(ddof=0):.1f}"
    if len(scores) < expected:
        text += f" ({', '.join([f'{len(scores)}/{expected}', *notes])})"
    return text


STANDARD_DEVIATION = "The deviation divides by the number of seeds, as NumPy's does."
IN_PERCENT = "mean, in percent"
LEVEL = 0.05  # what is bold has a p value below it
BOLD = f"Bold: p below {LEVEL}."
NO_SPREAD = "(no spread)"


def about_spread(cells):
    """Return a sentence for the note of a table in which something has no spread."""
    if not any(NO_SPREAD in str(cell) for cell in cells.to_numpy().ravel()):
        return ""
    return f" {NO_SPREAD}: the same in each seed, which says nothing of chance."


def difference_table(title, rows, columns):
    """Return the differences from the baseline. A column is a mean over columns[name].

    Beside each is a column of p values. The column "mean" is a family for Holm, and all others are
    another one. The last column is the difference of the mean over all datasets, in percent.
    """
    labels = list(rows["label"].cat.categories)
    scores = {}
    p = pd.DataFrame(index=labels)
    for name, datasets in columns.items():
        scores[name] = by_seed(rows, "final", datasets).reindex(labels)
        p[name] = p_values(scores[name] - scores[name].loc[BASELINE])
        p.loc[[BASELINE, *same_as_baseline(rows, datasets)], name] = np.nan
    for family in (["mean"], [name for name in columns if name != "mean"]):
        own = p.columns.intersection(family)
        p[own] = holm(p[own])

    cells = pd.DataFrame(index=labels)
    for name, datasets in columns.items():
        means, halves = mean_and_interval(scores[name] - scores[name].loc[BASELINE])
        texts = [interval_text(*pair, "+") for pair in zip(means, halves)]
        cells[name] = [bold(text, own) for text, own in zip(texts, p[name])]
        means, halves = mean_and_interval(scores[name])
        cells.loc[BASELINE, name] = interval_text(means[BASELINE], halves[BASELINE], "")
        cells.loc[same_as_baseline(rows, datasets), name] = "the same runs"
        cells[f"p, {name}"] = p[name].map(p_text)
    percents = improvements(rows, max(columns.values(), key=len))
    if len(percents):
        bounds = percents[["point", "low", "high"]].to_numpy()
        texts = [bounds_text(*row, sign="+", unit=" %") for row in bounds]
        cells[IN_PERCENT] = pd.Series(texts, percents["label"])
        cells[IN_PERCENT] = cells[IN_PERCENT].fillna("")
    families = "over this table's differences"
    if len(columns) > 1:
        families = "over the means, which are the question, "
        families += "and apart from them over the single datasets"
    note = (
        "The baseline's score, and the others' differences from it, seed by seed. In brackets 95 % "
        "intervals of each alone, by Student's t. p is Student's, corrected by Holm: "
        f"{families}. {BOLD}"
    )
    if len(percents):
        note += f" `{IN_PERCENT}`: of the baseline's mean, which counts as known."
    return Table(title, cells, note + about_spread(cells))


def bounds_text(point, low, high, sign="", digits=1, unit=""):
    """Return "36.3 (36.1 – 36.5)". The sign "+" shows all signs: "+5.4 % (-8.4 – +19.2)"."""
    number = f"{{:{sign}.{digits}f}}".format
    return f"{number(point)}{unit} ({number(low)} – {number(high)})"


def bold(text, p):
    """Return a text, in bold if its p value is below LEVEL."""
    return f"**{text}**" if p < LEVEL else text


def p_text(p):
    if np.isnan(p):
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def interval_text(mean, half, sign):
    """Return a mean and its interval as a text, "incomplete" without a mean."""
    if np.isnan(mean):
        return "incomplete"
    if np.isnan(half):
        return f"{mean:{sign}.1f} {NO_SPREAD}"
    return bounds_text(mean, mean - half, mean + half, sign)


def same_as_baseline(rows, datasets):
    """Return the labels whose runs are the baseline's, such as DO of IQL on Adroit."""
    finished = rows[rows["dataset"].isin(datasets) & rows["final"].notna()]
    runs = {label: set(own.index) for label, own in finished.groupby("label")}
    same = [label for label in runs if runs[label] == runs.get(BASELINE)]
    return [label for label in same if label != BASELINE]


def aggregate_table(title, estimates, arrays):
    """Return the table of aggregates and of comparisons with the baseline."""
    cells = pd.DataFrame("", index=list(arrays), columns=[*AGGREGATES, PROBABILITY])
    for row in estimates.itertuples():
        digits = 2 if row.measure == PROBABILITY else 1
        text = bounds_text(row.point, row.low, row.high, digits=digits)
        cells.loc[row.label, row.measure] = text
    cells.index = [f"{label} ({len(scores)} seeds)" for label, scores in arrays.items()]
    return Table(title, cells, "95 % intervals by rliable's stratified bootstrap, in brackets.")


def score_columns(rows):
    """Return the columns of scores in the last evaluation: score, score/action_noise=0.2, ..."""
    return sorted(column for column in rows if column.split("/")[0] == "score")


def column_title(column):
    return column.removeprefix("score/").replace("_", " ")


def spread_text(mean, std, digits):
    """Return "0.50 ± 0.02", or "0.50" of one seed, whose std is NaN, or "incomplete"."""
    if np.isnan(mean):
        return "incomplete"
    text = f"{mean:.{digits}f}"
    return text if np.isnan(std) else f"{text} ± {std:.{digits}f}"


def with_ratios(rows):
    """Add the ratios that the paper tabulates: of action errors, and of scores under noise."""
    rows = rows.copy()
    if "validation/action_error" in rows:
        rows["ratio/action_error"] = rows["validation/action_error"] / rows["train/action_error"]
    for column in score_columns(rows):
        if column != "score":
            rows[f"ratio/{column}"] = (rows[column] / rows["score"]).where(rows["score"] > 0)
    return rows


def inside_keys(rows):
    """Return the keys of INSIDE that the baseline's runs have, or any run if there is no baseline.

    Without the baseline's there is nothing to compare with.
    """
    compared = rows[rows["label"] == BASELINE]
    if compared.empty:
        compared = rows
    return [key for key in INSIDE if key in rows and compared[key].notna().any()]


def inside_table(title, rows, datasets):
    """Return the table of what is inside the actor, and of scores under noise."""
    rows = with_ratios(rows)
    measured = {key: INSIDE[key] for key in inside_keys(rows)}
    for key in score_columns(rows):
        measured[key] = (column_title(key), 1)
        if f"ratio/{key}" in rows:
            measured[f"ratio/{key}"] = (f"{column_title(key)}: share of the score", 2)
    cells = pd.DataFrame(index=rows["label"].cat.categories)
    for key, (name, digits) in measured.items():
        values = by_seed(rows, key, datasets)
        spreads = values.std(axis=1, ddof=0).where(values.count(axis=1) > 1)
        pairs = zip(values.mean(axis=1), spreads)
        texts = [spread_text(mean, std, digits) for mean, std in pairs]
        cells[name] = pd.Series(texts, values.index.astype(str))
    cells = cells.fillna("incomplete")
    cells = cells[(cells != "incomplete").any(axis=1)]
    note = f"Mean over the datasets ± standard deviation over the seeds. {STANDARD_DEVIATION}"
    return Table(title, cells, note)


def published_table(title, published, datasets):
    """Return a table of other people's scores, a DataFrame of data/corl.csv's columns."""
    names = published["source"] + ": " + published["algorithm"]
    mean = published["mean"].map("{:.1f}".format)
    std = published["std"].map(" ± {:.1f}".format).replace(" ± nan", "")
    texts = published.assign(label=names, text=mean + std)
    cells = texts.pivot(index="label", columns="dataset_name", values="text")
    cells = cells.reindex(index=names.unique(), columns=datasets).fillna("")
    note = (
        "Mean ± standard deviation over seeds, as they were published. Not trained here. "
        "They are of D4RL's own files, which the project's bundled datasets are not."
    )
    return Table(title, cells, note)
