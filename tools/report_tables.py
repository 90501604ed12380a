"""The report's statistics and tables.

`rows` is a DataFrame with a row for each seed and label of one algorithm. Its column `final` has
the final score, NaN if the run isn't finished.
"""

import html
import math
import re
from typing import NamedTuple

import numpy as np
import pandas as pd
from rliable import library
from scipy import stats

# What is watched inside the actor in the last evaluation: its title, and digits after the point
INSIDE = {
    "train/dead_neurons": ("dead neurons (share, training data)", 3),
    "evaluation/dead_neurons": ("dead neurons (share, evaluation)", 3),
    "train/feature_norm": ("feature norm (training data)", 1),
    "train/pca_rank": ("PCA rank (training data)", 1),
    "train/action_error": ("action error (training data)", 3),
    "validation/action_error": ("action error (held-out data)", 3),
    "gap/action_error": ("gap of the action error", 3),
    "plasticity": ("plasticity (loss left / loss before)", 3),
}
# The columns of the table of aggregates, and their cells
AGGREGATES = {
    "IQM": "{:.1f} ({:.1f} – {:.1f})",
    "median": "{:.1f} ({:.1f} – {:.1f})",
    "mean": "{:.1f} ({:.1f} – {:.1f})",
    "optimality gap": "{:.1f} ({:.1f} – {:.1f})",
}
PROBABILITY = "P(better than none)"
IMPROVEMENT = "mean against none"
COMPARISONS = {
    PROBABILITY: "{:.2f} ({:.2f} – {:.2f})",
    IMPROVEMENT: "{:+.1f} % ({:+.1f} – {:+.1f})",
}


class Table(NamedTuple):
    """A table. Its cells are Markdown, so that **this** is bold."""

    title: str
    cells: pd.DataFrame
    note: str


def to_markdown(table):
    header = ["regularisers", *table.cells]
    lines = [header, ["---"] * len(header), *table.cells.reset_index().to_numpy()]
    lines = ["| " + " | ".join(line) + " |" for line in lines]
    text = "\n".join(lines).replace("|  ", "| ")  # where a cell is empty
    return f"### {table.title}\n\n{text}\n\n{table.note}\n"


def to_latex(table):
    """Return the table as LaTeX, no wider than the text. It needs booktabs and graphicx."""
    lines = [" & ".join(line) + r" \\" for line in table.cells.reset_index().to_numpy()]
    header = " & ".join(["regularisers", *table.cells]) + r" \\"
    body = "\n".join([r"\toprule", header, r"\midrule", *lines, r"\bottomrule"])
    body = re.sub(r"([%_#$])", r"\\\1", body)
    body = re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", body)
    caption = re.sub(r"([%_#$])", r"\\\1", f"{table.title}. {table.note}")
    columns = "l" + "r" * len(table.cells.columns)
    return (
        f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n"
        f"\\resizebox{{\\linewidth}}{{!}}{{%\n\\begin{{tabular}}{{{columns}}}\n"
        f"{body}\n\\end{{tabular}}}}\n\\end{{table}}\n"
    )


def to_html(table):
    """Return the table as HTML."""
    cells = re.sub(r"\*\*(.*?)\*\*", r"<b>\1</b>", table.cells.to_html(border=0))
    return f"<h3>{html.escape(table.title)}</h3>{cells}<p>{html.escape(table.note)}</p>"


# --- Statistics ---


def accept_random_state(bootstrap):
    """Let rliable, written for arch 5, make a bootstrap of arch 8, which has no `random_state`."""
    init = bootstrap.__init__

    def init_without_random_state(self, *data, random_state=None):
        init(self, *data)

    bootstrap.__init__ = init_without_random_state


accept_random_state(library.arch_bs.IIDBootstrap)
accept_random_state(library.arch_bs.IndependentSamplesBootstrap)


def values_by_label(rows, datasets, column="final"):
    """Return a column's values (seeds, datasets) of each label, NaN where there is none."""
    values = {}
    for label, own in rows.groupby("label"):
        values[label] = own.pivot(index="seed", columns="dataset", values=column)
        values[label] = values[label].reindex(columns=datasets)
    return values


def mean_and_interval(values):
    """Return the mean of values (seeds, datasets), and half its 95 % interval over the seeds.

    By Student's t, from the seeds that have a value on all datasets. None for fewer than two.
    """
    means = values.dropna().mean(axis=1)
    if len(means) < 2:
        return None
    return means.mean(), stats.t.ppf(0.975, len(means) - 1) * means.sem()


def score_arrays(rows, datasets):
    """Return by label the scores / 100 (seeds, datasets) of the seeds that have all datasets.

    Labels with fewer than two such seeds are left out.
    """
    arrays = {}
    for label, values in values_by_label(rows, datasets).items():
        if len(values.dropna()) > 1:
            arrays[label] = values.dropna().to_numpy() / 100
    return arrays


def interval(scores, function, reps):
    """Return rliable's estimates (K, V), and their 95 % intervals (2, K, V), of V labels at once.

    `function` makes (K, V) of scores (seeds, datasets, V), or of a list of several. The intervals
    are by the stratified bootstrap.
    """
    np.random.seed(0)  # noqa: NPY002, from where rliable draws
    many = scores if isinstance(scores, list) else [scores]
    points, intervals = library.get_interval_estimates(
        {"": scores}, lambda *scores: function(*scores).ravel(), reps=reps
    )
    shape = function(*many).shape
    return points[""].reshape(shape), intervals[""].reshape(2, *shape)


def aggregates(scores):
    """Return IQM, median, mean and optimality gap (4, V) of scores, as rliable defines them."""
    ordered = np.sort(scores.reshape(-1, scores.shape[2]), axis=0)
    cut = len(ordered) // 4
    iqm = ordered[cut : len(ordered) - cut].mean(0)
    median = np.median(scores.mean(0), axis=0)
    gap = 1 - np.minimum(scores, 1).mean((0, 1))
    return 100 * np.stack([iqm, median, scores.mean((0, 1)), gap])


def probability_of_improvement(x, y):
    """Return how often a seed of x is better than one of y, over datasets, (1, V); ties are half."""
    x = x[:, None]
    y = y[None]
    return ((x > y) + 0.5 * (x == y)).mean((0, 1, 2))[None]


def improvement(x, y):
    """Return by how many percent the mean of x is above that of y, (1, V), if that is positive."""
    return 100 * (x.mean((0, 1)) / y.mean((0, 1)) - 1)[None]


def estimate(arrays, reps):
    """Return aggregates and comparisons with none: rows of label, measure, point, low, high."""
    found = []

    def add(measures, labels, scores, function):
        points, (lows, highs) = interval(scores, function, reps)
        for i, measure in enumerate(measures):
            for j, label in enumerate(labels):
                found.append((label, measure, points[i, j], lows[i, j], highs[i, j]))

    for size in {len(scores) for scores in arrays.values()}:  # those with as many seeds at once
        labels = [label for label in arrays if len(arrays[label]) == size]
        stack = np.stack([arrays[label] for label in labels], axis=2)
        add(AGGREGATES, labels, stack, aggregates)
        if "none" in arrays:
            none = np.repeat(arrays["none"][:, :, None], len(labels), axis=2)
            add([PROBABILITY], labels, [stack, none], probability_of_improvement)
            if none.mean() > 0:  # otherwise percents of it mean nothing
                add([IMPROVEMENT], labels, [stack, none], improvement)
    found = pd.DataFrame(found, columns=["label", "measure", "point", "low", "high"])
    with_itself = (found["label"] == "none") & found["measure"].isin(COMPARISONS)
    return found[~with_itself]


def expected_online_performance(scores):
    """Return the best score to expect of n of the K configurations, for n = 1 ... K.

    They are drawn without replacement: the i-th best from below is the best in comb(i, n - 1) of
    comb(K, n) draws.
    """
    scores = np.sort(scores)
    size = len(scores)
    expected = []
    for n in range(1, size + 1):
        draws = [math.comb(i, n - 1) for i in range(size)]
        expected.append(scores @ draws / math.comb(size, n))
    return np.array(expected)


# --- Tables ---


def bold(cells, where):
    return cells.where(~where, "**" + cells + "**")


def score_table(title, rows, datasets):
    """Return the table of mean scores, with the standard deviations over the seeds."""
    runs = rows[rows["dataset"].isin(datasets)].groupby(["label", "dataset"])
    expected = runs.size().max()
    cells = runs.apply(score_cell, expected).unstack(fill_value="missing")[datasets]
    means = runs["final"].mean().unstack()[datasets]
    if len(datasets) > 1:
        means["mean"] = means.mean(axis=1, skipna=False)
        cells["mean"] = means["mean"].map("{:.1f}".format).replace("nan", "incomplete")
    note = (
        f"Mean ± standard deviation over {expected} seeds, or over as many as are finished: "
        f"(finished/{expected})."
    )
    return Table(title, bold(cells, means == means.max()), note)


def score_cell(runs, expected):
    """Return "36.3 ± 0.1", or "36.3 ± 0.1 (2/3, 1 failed)" of 3 expected, or "1 unfinished"."""
    scores = runs["final"].dropna()
    states = runs["state"].value_counts().drop("finished", errors="ignore").sort_index()
    notes = [f"{number} {state}" for state, number in states.items()]
    if scores.empty:
        return ", ".join(notes)
    if len(scores) == expected:
        return f"{scores.mean():.1f} ± {scores.std(ddof=0):.1f}"
    notes = [f"{len(scores)}/{expected}", *notes]
    return f"{scores.mean():.1f} ± {scores.std(ddof=0):.1f} ({', '.join(notes)})"


def difference_table(title, rows, columns):
    """Return the table of differences from none. A column is a mean over datasets, columns[name]."""
    cells = {}
    for name, datasets in columns.items():
        values = values_by_label(rows, datasets)
        cells[name] = {}
        for label in values:
            text = difference_cell(values[label], values["none"], label == "none")
            if label != "none" and text != "incomplete" and same_runs(rows, label, datasets):
                text = "the same runs"
            cells[name][label] = text
    note = (
        "None's score, and differences from it, seed by seed, with 95 % intervals by Student's t; "
        "bold: without 0."
    )
    return Table(title, pd.DataFrame(cells), note)


def difference_cell(values, none, is_none):
    """Return "**+0.9 (+0.5 – +1.3)**" of two scores (seeds, datasets); none's own "36.3 ± 0.2"."""
    found = mean_and_interval(none if is_none else values - none)
    if found is None:
        return "incomplete"
    mean, half = found
    if is_none:
        return f"{mean:.1f} ± {half:.1f}"
    text = f"{mean:+.1f} ({mean - half:+.1f} – {mean + half:+.1f})"
    return f"**{text}**" if abs(mean) > half else text


def same_runs(rows, label, datasets):
    """Return whether a label's runs are none's, as IQL's are with dropout on Adroit."""
    finished = rows[rows["dataset"].isin(datasets) & rows["final"].notna()]
    own = finished.index[finished["label"] == label]
    return set(own) == set(finished.index[finished["label"] == "none"])


def aggregate_table(title, estimates, arrays):
    """Return the table of aggregates and of comparisons with none."""
    formats = {**AGGREGATES, **COMPARISONS}
    texts = []
    for row in estimates.itertuples():
        texts.append(formats[row.measure].format(row.point, row.low, row.high))
    cells = estimates.assign(text=texts).pivot(index="label", columns="measure", values="text")
    cells = cells.reindex(index=list(arrays), columns=list(formats)).fillna("")
    undefined = (cells[PROBABILITY] != "") & (cells[IMPROVEMENT] == "")
    cells.loc[undefined, IMPROVEMENT] = "none's is not positive"
    cells.index = [f"{label} ({len(scores)} seeds)" for label, scores in arrays.items()]
    return Table(title, cells, "95 % intervals by rliable's stratified bootstrap, in brackets.")


def score_columns(rows):
    """Return the columns of scores in the last evaluation: score, score/action_noise=0.2, ..."""
    return sorted(column for column in rows if column.split("/")[0] == "score")


def inside_table(title, rows, datasets):
    """Return the table of what is inside the actor, and of scores under noise."""
    watched = {key: about for key, about in INSIDE.items() if key in rows}
    for key in score_columns(rows):
        watched[key] = (key.removeprefix("score/").replace("_", " "), 1)
    cells = {}
    for key, (name, digits) in watched.items():
        cells[name] = {}
        for label, values in values_by_label(rows, datasets, key).items():
            found = mean_and_interval(values) or ()
            text = " ± ".join(f"{value:.{digits}f}" for value in found)
            cells[name][label] = text or "incomplete"
    cells = pd.DataFrame(cells)
    cells = cells[(cells != "incomplete").any(axis=1)]
    note = "Means over the datasets, and 95 % intervals over the seeds (Student's t)."
    return Table(title, cells, note)
