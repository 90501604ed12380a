"""The report's section on less data: does a regulariser gain more where less is trained on?

`rows` is a DataFrame with a row for each seed, dataset, share and label of one algorithm. `final`
is the final score, and `share` the share of the episodes that was asked for.
"""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from tools import report_figures as figures
from tools import report_tables as tables
from tools.report_runs import BASELINE, by_label, by_settings

GAP = "gap/action_error"
BASELINE_STYLE = dict(color="black", marker="x", linestyle="-")


def groups(seeds):
    """Yield groups of one algorithm's seeds whose settings differ in what is held out alone.

    A group is the other settings, and its finished seeds as `rows`. Kept are the datasets on which
    the baseline has two shares or more, and the labels that have two or more there. A group
    without a regulariser among them is left out.
    """
    seeds = seeds[seeds["final"].notna()]
    pairs = [without_share(*pair) for pair in zip(seeds["settings"], seeds["config"])]
    seeds = seeds.assign(
        share=seeds["config"].map(share_of),
        settings=[settings for settings, _ in pairs],
        config=[config for _, config in pairs],
    )
    for settings, own in by_settings(seeds):
        rows = by_label(own)
        baseline = rows[rows["label"] == BASELINE]
        rows = rows[rows["dataset"].isin(with_shares(baseline, "dataset"))]
        rows = rows[rows["label"].isin(with_shares(rows, "label"))]
        if rows["label"].nunique() > 1:
            yield settings, rows


def share_of(config):
    """Return the share of the episodes that a run was to train on."""
    return round(1 - config["validation_frac"], 6)


def without_share(settings, config):
    """Return settings and a config without the share.

    On all data validation_seed, which then does nothing, is left out, too.
    """
    skipped = ["validation_frac"]
    if config["validation_frac"] == 0:
        skipped.append("validation_seed")
    settings = tuple(pair for pair in settings if pair[0] not in skipped)
    return settings, {key: config[key] for key in config if key not in skipped}


def with_shares(rows, column):
    """Return a column's values that have two shares or more."""
    numbers = rows.groupby(column, observed=True)["share"].nunique()
    return numbers.index[numbers > 1]


def by_label_and_share(rows, column, datasets):
    """Return a column's means over datasets: rows of (label, share), columns of seeds.

    NaN where a run is missing.
    """
    found = {}
    for share, own in rows.groupby("share"):
        found[share] = tables.by_seed(own, column, datasets)
    values = pd.concat(found, names=["share"]).swaplevel()
    present = set(rows["label"])
    labels = [label for label in rows["label"].cat.categories if label in present]
    every = pd.MultiIndex.from_product([labels, found], names=["label", "share"])
    return values.reindex(every)


def gains(rows, datasets):
    """Return each score minus the baseline's of the same seed and share.

    Rows and columns are those of `by_label_and_share`, without the baseline's.
    """
    scores = by_label_and_share(rows, "final", datasets)
    regularised = scores.drop(BASELINE, level="label")
    return regularised.sub(scores.loc[BASELINE], level="share")


def per_halving(gained):
    """Return by how much the gain grows as the data is halved: a row per label, columns of seeds.

    It is the slope of the gain against -log2 of the share, by least squares over the shares that
    a label has. NaN for a seed that lacks one of these.
    """
    slopes = {}
    for label in gained.index.unique("label"):
        own = gained.loc[label].dropna(how="all")
        x = -np.log2(own.index.to_numpy())
        x = x - x.mean() if len(x) > 1 else np.full(len(x), np.nan)
        slopes[label] = own.mul(x, axis=0).sum(skipna=False) / (x @ x)
    return pd.DataFrame(slopes, gained.columns).T


def texts_and_p(values):
    """Return the means of rows over seeds with their intervals as texts, and p values by Holm."""
    p = tables.holm(tables.p_values(values))
    texts = []
    for mean, half, p_value in zip(*tables.mean_and_interval(values), p):
        texts.append(tables.bold(tables.interval_text(mean, half, "+"), p_value))
    return texts, p


def share_table(title, rows, datasets):
    """Return the table of gains at each share, and of how they grow as the data shrinks.

    Holm corrects the gains together, and the slopes together.
    """
    gained = gains(rows, datasets)
    texts, p = texts_and_p(gained)
    found = pd.DataFrame({"gain": texts, "p": p}, gained.index)
    cells = pd.DataFrame(index=gained.index.unique("label"))
    for share in gained.index.unique("share"):
        own = found.xs(share, level="share")
        cells[f"{100 * share:g} %"] = own["gain"]
        cells[f"p, {100 * share:g} %"] = own["p"].map(tables.p_text)
    texts, p = texts_and_p(per_halving(gained))
    cells["for each halving"] = texts
    cells["p, for each halving"] = [tables.p_text(one) for one in p]
    note = (
        "Differences from the baseline that was trained on the same share of the episodes, seed by "
        f"seed; means over {', '.join(datasets)}. `for each halving`: by how much the difference "
        "grows as the data is halved, by least squares. In brackets 95 % intervals of each alone, "
        "by Student's t, which leave out the chance in which episodes were drawn. p is corrected "
        "by Holm: over all differences, and apart from them over `for each halving`. "
        f"{tables.BOLD}{tables.about_spread(cells)}{same_runs(rows, datasets)}"
    )
    return tables.Table(title, cells, note)


def same_runs(rows, datasets):
    """Return a sentence for each dataset on which a label's runs are the baseline's."""
    text = ""
    for dataset in datasets:
        for label in tables.same_as_baseline(rows, [dataset]):
            text += f" On {dataset} {label} is the baseline itself, and counts as 0."
    return text


def share_figure(rows, datasets):
    """Draw gains by the share of the episodes, and below them the gap of the action error.

    Lines are means over the seeds, bands their 95 % intervals.
    """
    styles = label_styles(rows)
    has_gap = GAP in rows and rows[GAP].notna().any()
    lines = 2 if has_gap else 1
    size = (3.4 * len(datasets), 2.6 * lines)
    figure, axes = plt.subplots(lines, len(datasets), figsize=size, squeeze=False, sharex=True)
    for column, dataset in enumerate(datasets):
        own = rows[~rows["label"].isin(tables.same_as_baseline(rows, [dataset]))]
        draw_bands(axes[0, column], gains(own, [dataset]), styles)
        axes[0, column].axhline(0, color="black", linewidth=0.8)
        axes[0, column].set(title=dataset, ylabel="score − baseline's")
        if has_gap:
            draw_bands(axes[1, column], by_label_and_share(own, GAP, [dataset]), styles)
            axes[1, column].set(ylabel="gap of the action error")
        axes[-1, column].set(xlabel="episodes trained on (%)")
    figures.add_legend(figure)
    return figure


def label_styles(rows):
    """Return how each label is drawn: {label: the arguments of a line}."""
    labels = [label for label in rows["label"].sort_values().unique() if label != BASELINE]
    styles = dict(zip(labels, itertools.cycle(figures.STYLES)))
    return {**styles, BASELINE: BASELINE_STYLE}


def draw_bands(axis, values, styles):
    """Draw means and 95 % intervals over the seeds by the share: rows of (label, share)."""
    shares = sorted(values.index.unique("share"))
    axis.set_xscale("log")
    axis.set_xticks([100 * share for share in shares], [f"{100 * share:g}" for share in shares])
    axis.minorticks_off()
    means, halves = tables.mean_and_interval(values)
    for label in values.index.unique("label"):
        x = 100 * means[label].index
        (line,) = axis.plot(x, means[label], label=label, **styles[label])
        low = means[label] - halves[label]
        high = means[label] + halves[label]
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.12)
