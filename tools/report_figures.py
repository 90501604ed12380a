"""The report's figures.

`rows` is a DataFrame with a row for each finished seed and label of one algorithm, `labels` and
`datasets` are what of it is shown. A function returns None if there is nothing to show.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from cycler import cycler
from rliable import library

from tools import report_effects as effects
from tools import report_tables as tables
from tools.report_runs import BASELINE

# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #999933".split()
LINES = ["-", "-", "--", "--", "-.", "-.", ":", ":"]
STYLES = cycler(color=COLOURS) + cycler(marker="os^Dv<>P") + cycler(linestyle=LINES)
plt.switch_backend("Agg")  # no screen
plt.rc("axes", grid=True, prop_cycle=STYLES)
plt.rc("axes.spines", top=False, right=False)
plt.rc("figure.constrained_layout", use=True)
plt.rc("font", size=9)
plt.rc("grid", alpha=0.3)
plt.rc("lines", linewidth=1.4, markersize=4)
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


def add_legend(figure):
    """Put a legend of all axes below the figure."""
    found = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles))
    place = dict(loc="outside lower center", ncol=4, frameon=False, fontsize=8)
    figure.legend(found.values(), found.keys(), **place)


def turn_labels(axis, angle):
    labels = axis.get_xticklabels()
    plt.setp(labels, rotation=angle, ha="right", rotation_mode="anchor", fontsize=8)


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
        axis.set(title=dataset, xlabel="updates (thousands)", ylabel="score")
    add_legend(figure)
    return figure


def draw_intervals(axis, estimates):
    """Draw points and their intervals, a line for each label: rows of label, point, low, high."""
    labels = estimates["label"].astype(str)
    low = estimates["low"]
    axis.hlines(labels, low, estimates["high"], color=COLOURS[0], alpha=0.45, linewidth=9)
    axis.plot(estimates["point"], labels, "k|", markersize=9, markeredgewidth=1.4)
    axis.invert_yaxis()


def interval_figure(estimates):
    """Draw the aggregates and their intervals."""
    height = 0.9 + 0.24 * estimates["label"].nunique()
    figure, axes = make_axes(len(tables.AGGREGATES), width=2.9, height=height)
    for axis, measure in zip(axes, tables.AGGREGATES):
        draw_intervals(axis, estimates[estimates["measure"] == measure])
        axis.set_title(measure)
        axis.tick_params(labelleft=axis is axes[0])
    return figure


def improvement_figure(panels):
    """Draw improvements over the baseline and their intervals: {title: estimates}.

    A title is "ReBRAC, Gym-MuJoCo". Panels of one domain have the same scale.
    """
    longest = max(len(estimates) for estimates in panels.values())
    figure, axes = make_axes(len(panels), width=3.2, height=1.1 + 0.17 * longest, columns=3)
    first_of = {}  # the first panel of each domain
    for axis, (title, estimates) in zip(axes, panels.items()):
        domain = title.split(", ")[-1]
        first = first_of.setdefault(domain, axis)
        if axis is not first:
            axis.sharex(first)
        draw_intervals(axis, estimates)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=title, xlabel="change of the baseline's mean (%)")
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
    add_legend(figure)
    return figure


def share_above(scores, taus):
    return (scores.ravel() > taus[:, None]).mean(1)


def gains_over_baseline(rows, datasets):
    """Return mean scores minus the baseline's: a row for each label, a column for each dataset."""
    means = rows.pivot_table(index="label", columns="dataset", values="final")
    means = means.reindex(columns=datasets)
    return means - (means.loc[BASELINE] if BASELINE in means.index else np.nan)


def single_map(rows, datasets, names):
    """Draw what single regularisers, of these names, gain at each strength."""
    gains = gains_over_baseline(rows, datasets)
    single = [label for label in gains.index if label.split("(")[0] in names and "+" not in label]
    return heat_map("single regularisers", gains.loc[single])


def pair_map(rows, datasets, names):
    """Draw what pairs of regularisers gain at the paper's strengths, as a mean over datasets.

    Those that lack a dataset are left out.
    """
    gains = gains_over_baseline(rows, datasets).mean(axis=1, skipna=False)
    values = pd.DataFrame(index=list(names), columns=list(names), dtype=float)
    for label, gain in gains.items():
        pair = label.split("+")
        if len(pair) <= 2 and set(pair) <= set(names):
            values.loc[pair[0], pair[-1]] = gain
            values.loc[pair[-1], pair[0]] = gain
    paired = [name for name in names if values[name].drop(name).notna().any()]
    title = "pairs of regularisers (diagonal: one alone)"
    return heat_map(title, values.loc[paired, paired])


def interaction_map(found, names):
    """Draw the interactions of pairs, in the places that pair_map has for their gains."""
    values = pd.DataFrame(index=list(names), columns=list(names), dtype=float)
    texts = pd.DataFrame("", index=list(names), columns=list(names))
    for label, effect in found.iterrows():
        if label.count("+") != 1:
            continue
        first, second = label.split("+")
        text = f"{effect['point']:.1f}{star(effect['p'])}"
        for place in ((first, second), (second, first)):
            values.loc[place] = effect["point"]
            texts.loc[place] = text
    paired = [name for name in names if values[name].notna().any()]
    told = f"*: p below {tables.LEVEL}, corrected; empty: not both on, or too few runs"
    title = f"interactions of pairs\n{told}"
    bar = "gain together − sum of the gains"
    return heat_map(title, values.loc[paired, paired], texts.loc[paired, paired], bar)


def star(p):
    return "*" if p < tables.LEVEL else ""


def heat_map(title, values, texts=None, bar="score − baseline's"):
    """Draw a DataFrame of values, NaN where there is none, on colours from red to blue around 0.

    `texts` are written into the cells, or else the values. `bar` is the colour bar's title.
    """
    if not values.notna().any(axis=None):
        return None
    if texts is None:
        texts = values.map("{:.1f}".format)
    lines, columns = values.shape
    figure, axis = plt.subplots(figsize=(3.2 + 0.62 * columns, max(3.2, 1.2 + 0.27 * lines)))
    bound = values.abs().max(axis=None) or 1
    colours = dict(cmap="RdBu", vmin=-bound, vmax=bound, cbar_kws={"label": bar})
    sns.heatmap(values, annot=texts, fmt="", annot_kws={"fontsize": 7}, ax=axis, **colours)
    axis.grid(False)
    axis.set(title=title, xlabel="", ylabel="")
    axis.tick_params("y", rotation=0)
    turn_labels(axis, 40)
    return figure


def inside_figure(rows, datasets):
    """Draw what is inside the actor at the end: the seeds, and a line at each dataset's mean."""
    keys = tables.inside_keys(rows)
    if not keys:
        return None
    labels = list(rows["label"].sort_values().unique())
    rows = rows.assign(place=rows["label"].astype(str).map(labels.index))
    width = max(3.0, 0.42 * len(labels))
    figure, axes = make_axes(len(keys), width=width, height=3.0, columns=2)
    for axis, key in zip(axes, keys):
        draw_seeds(axis, rows, key, datasets)
        axis.set_xticks(range(len(labels)), labels)
        axis.set_title(tables.INSIDE[key][0])
        turn_labels(axis, 60)
    add_legend(figure)
    return figure


def draw_seeds(axis, rows, key, datasets):
    """Draw a column's value of each seed, and a line at each dataset's mean, by rows["place"].

    The datasets stand side by side around each place.
    """
    width = 0.8 / len(datasets)
    for j, dataset in enumerate(datasets):
        own = rows[rows["dataset"] == dataset]
        left = (j - len(datasets) / 2) * width
        middle = own["place"] + left + width / 2
        (points,) = axis.plot(middle, own[key], linestyle="", markersize=3, label=dataset)
        means = own.groupby("place")[key].mean()
        x = means.index + left
        axis.hlines(means, x, x + width, color=points.get_color(), linewidth=1.2)


def explanation_figure(found):
    """Draw what each measure explains of the score, of an `effects.Explanation`, with intervals."""
    height = 1.2 + 0.24 * len(found.p)
    figure, axes = make_axes(len(effects.QUANTITIES), width=3.1, height=height)
    for axis, (quantity, title) in zip(axes, effects.QUANTITIES.items()):
        estimates = found.estimates[found.estimates["quantity"] == quantity]
        draw_intervals(axis, estimates)
        if quantity in effects.TESTED:
            draw_stars(axis, estimates, found.p[effects.TESTED[quantity]])
            axis.set_xlabel(f"*: p below {tables.LEVEL}, corrected")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(title)
        axis.tick_params(labelleft=axis is axes[0])
    return figure


def draw_stars(axis, estimates, p):
    """Draw a star at the end of each interval whose p, by label, is below 0.05."""
    for label, high in zip(estimates["label"], estimates["high"]):
        axis.text(high, label, star(p[label]), va="center", fontsize=12)


def robustness_figure(rows, datasets):
    """Draw scores with noise and without: means over the datasets, 95 % intervals over seeds."""
    means = {}
    halves = {}
    for column in tables.score_columns(rows):
        title = "no noise" if column == "score" else tables.column_title(column)
        values = tables.by_seed(rows, column, datasets)
        means[title], halves[title] = tables.mean_and_interval(values)
    means = pd.DataFrame(means)
    halves = pd.DataFrame(halves)
    if len(means.columns) < 2 or means["no noise"].isna().all():
        return None
    figure, (axis,) = make_axes(1, width=max(4.5, 0.6 * len(means)), height=3.2)
    means.plot.bar(yerr=halves, width=0.8, capsize=2, legend=False, ax=axis)
    axis.set(xlabel="", ylabel="score")
    turn_labels(axis, 60)
    add_legend(figure)
    return figure


def online_performance(curves):
    """Draw the best score to expect by the number of configurations tried: {title: scores}."""
    figure, (axis,) = make_axes(1, width=5, height=3.2)
    for title, scores in curves.items():
        axis.plot(range(1, len(scores) + 1), scores, label=title)
    axis.set(xlabel="configurations tried online", ylabel="expected best score")
    axis.xaxis.get_major_locator().set_params(integer=True)
    add_legend(figure)
    return figure
