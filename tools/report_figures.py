"""The report's figures.

`rows` is a DataFrame with a row for each finished seed and label of one algorithm, `labels` and
`datasets` are what of it is shown. A function returns None if there is nothing to show.
"""

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from cycler import cycler
from rliable import library

from tools.report_tables import AGGREGATES, INSIDE, mean_and_interval, score_columns

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #999933".split()
LINES = cycler(linestyle=["-", "--", "-.", ":"]) * cycler(linewidth=[1.4, 1.4])
plt.rc("axes", grid=True, axisbelow=True)
plt.rc("axes", prop_cycle=cycler(color=COLOURS) + cycler(marker="os^Dv<>P") + LINES)
plt.rc("axes.spines", top=False, right=False)
plt.rc("figure.constrained_layout", use=True)
plt.rc("font", size=9)
plt.rc("grid", alpha=0.3)
plt.rc("lines", markersize=4)
plt.rc("pdf", fonttype=42)


def make_axes(number, width=3.4, height=2.6, columns=4):
    """Return a figure and so many axes, each of that size."""
    columns = min(number, columns)
    lines = -(-number // columns)
    size = (width * columns, height * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for axis in axes.flat[number:]:
        axis.axis("off")
    return figure, list(axes.flat[:number])


def add_legend(figure, axis):
    """Put an axis's legend below the figure."""
    entries = axis.get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncol=4, frameon=False, fontsize=8)


def learning_curves(rows, labels, datasets):
    """Draw scores by updates: means and standard deviations over the seeds."""
    if rows["updates"].map(len).max() < 2:
        return None
    rows = rows.explode(["updates", "scores"]).astype({"updates": float, "scores": float})
    figure, axes = make_axes(len(datasets))
    for axis, dataset in zip(axes, datasets):
        for label in labels:
            own = rows[(rows["dataset"] == dataset) & (rows["label"] == label)]
            scores = own.pivot(index="updates", columns="seed", values="scores").dropna()
            mean = scores.mean(axis=1)
            std = scores.std(axis=1, ddof=0)
            x = scores.index / 1000
            (line,) = axis.plot(x, mean, label=label, markevery=max(1, len(x) // 6))
            axis.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=0.12)
        axis.set(title=dataset, xlabel="1000 updates", ylabel="score")
    add_legend(figure, axes[0])
    return figure


def draw_intervals(axis, estimates):
    """Draw points and their intervals, a line for each label: rows of label, point, low, high."""
    labels = estimates["label"].astype(str)
    width = estimates["high"] - estimates["low"]
    axis.barh(labels, width, left=estimates["low"], height=0.6, color=COLOURS[0], alpha=0.45)
    axis.plot(estimates["point"], labels, "k|", markersize=9, markeredgewidth=1.4)
    axis.invert_yaxis()


def interval_figure(estimates):
    """Draw the aggregates and their intervals."""
    height = 0.9 + 0.24 * estimates["label"].nunique()
    figure, axes = make_axes(len(AGGREGATES), width=2.9, height=height)
    for axis, measure in zip(axes, AGGREGATES):
        draw_intervals(axis, estimates[estimates["measure"] == measure])
        axis.set_title(measure)
        axis.tick_params(labelleft=axis is axes[0])
    return figure


def improvement_figure(panels):
    """Draw improvements over none and their intervals: {title: estimates}."""
    longest = max(len(estimates) for estimates in panels.values())
    figure, axes = make_axes(len(panels), width=3.2, height=1.1 + 0.17 * longest, columns=3)
    for axis, (title, estimates) in zip(axes, panels.items()):
        draw_intervals(axis, estimates)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=title, xlabel="improvement over none (%)")
    return figure


def performance_profiles(arrays, reps):
    """Draw the share of runs with a score above tau (rliable) and its 95 % band."""
    scores = np.concatenate([array.ravel() for array in arrays.values()])
    low = min(scores.min(), 0)
    taus = np.linspace(low, scores.max() + 0.05 * (scores.max() - low), 101)
    np.random.seed(0)  # noqa: NPY002, from where rliable draws
    profiles, bands = library.create_performance_profile(
        arrays, taus, custom_profile_func=share_above, reps=reps
    )
    figure, (axis,) = make_axes(1, width=5, height=3.4)
    for label, shares in profiles.items():
        (line,) = axis.plot(100 * taus, shares, label=label, markevery=10)
        axis.fill_between(100 * taus, *bands[label], color=line.get_color(), alpha=0.12)
    axis.set(xlabel="score τ", ylabel="share of runs with score > τ")
    add_legend(figure, axis)
    return figure


def share_above(scores, taus):
    return (scores.ravel() > taus[:, None]).mean(1)


def gains_over_none(rows, datasets):
    """Return mean scores minus none's: a row for each label, a column for each dataset."""
    means = rows.groupby(["label", "dataset"])["final"].mean().unstack()[datasets]
    none = means.loc["none"] if "none" in means.index else np.nan
    return means - none


def strength_map(rows, datasets, names):
    """Draw what single regularisers, of these names, gain at each strength."""
    gains = gains_over_none(rows, datasets)
    single = [label for label in gains.index if label.split("(")[0] in names and "+" not in label]
    return heat_map("strength of a regulariser", gains.loc[single])


def pair_map(rows, datasets, names):
    """Draw what pairs of regularisers gain at the paper's strengths, as a mean over datasets."""
    gains = gains_over_none(rows, datasets).mean(axis=1)
    values = pd.DataFrame(index=list(names), columns=list(names), dtype=float)
    for label, gain in gains.items():
        pair = label.split("+")
        if len(pair) == 2 and set(pair) <= set(names):
            values.loc[pair, pair[::-1]] = gain
    paired = ...
    return heat_map("pairs of regularisers (diagonal: one alone)", values)
