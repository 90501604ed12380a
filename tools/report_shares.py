"""The report's section on less data: does a regulariser gain more where less is trained on?

`rows` is a DataFrame with a row for each seed and label of one algorithm. Its column `final` has
the final score, and `share` the share of the episodes that it was trained on.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from tools import report_figures as figures
from tools import report_tables as tables
from tools.report_runs import BASELINE, by_settings

GAP = "gap/action_error"


def by_share(seeds):
    """Yield settings, and the seeds (a DataFrame) that share them but for validation_frac.

    Only those whose validation_frac differs are of use. Their column `share` is made here.
    """
    others = []
    for own in seeds["settings"]:
        others.append(tuple(pair for pair in own if pair[0] != "validation_frac"))
    shares = [round(1 - config["validation_frac"], 6) for config in seeds["config"]]
    for settings, own in by_settings(seeds.assign(settings=others, share=shares)):
        if own["share"].nunique() > 1:
            yield settings, own


def by_seed(rows, column, datasets):
    """Return a column's means over datasets: a row for each label and share, columns of seeds.

    NaN where a dataset is missing.
    """
    found = {}
    for share, own in rows.groupby("share"):
        found[share] = tables.by_seed(own, column, datasets)
    values = pd.concat(found, names=["share"]).swaplevel()
    names = set(rows["label"])
    labels = [name for name in rows["label"].cat.categories if name in names]
    complete = pd.MultiIndex.from_product([labels, found], names=["label", "share"])
    return values.reindex(complete)


def gains(rows, datasets):
    """Return the scores minus the baseline's of the same seed and share, like `by_seed`."""
    scores = by_seed(rows, "final", datasets)
    baseline = scores.loc[BASELINE]
    others = scores.drop(BASELINE, level="label")
    return others.sub(baseline, level="share")


def per_halving(gained):
    """Return by how much the gain grows as the data is halved: a row per label, columns of seeds.

    It is each seed's slope of the gain against -log2 of the share, by least squares. A seed that
    lacks a share has none: NaN.
    """
    halvings = -np.log2(gained.index.unique("share").to_numpy())
    halvings = halvings - halvings.mean()
    slopes = {}
    for label, own in gained.groupby("label", sort=False):
        slopes[label] = pd.Series(halvings @ own.to_numpy() / (halvings @ halvings), own.columns)
    return pd.DataFrame(slopes).T


def share_table(title, rows, datasets):
    """Return the table of gains at each share, and of how they grow as the data shrinks.

    The gains at the shares are a family for Holm, and how they grow is another one.
    """
    gained = gains(rows, datasets)
    p = tables.holm(tables.p_values(gained))
    means, halves = tables.mean_and_interval(gained)
    texts = [tables.interval_text(mean, half, "+") for mean, half in zip(means, halves)]
    texts = [tables.bold(text, own) for text, own in zip(texts, p)]
    cells = pd.Series(texts, gained.index).unstack("share", sort=False).rename(columns=percent)

    slopes = per_halving(gained)
    p = tables.holm(tables.p_values(slopes))
    means, halves = tables.mean_and_interval(slopes)
    texts = [tables.interval_text(mean, half, "+") for mean, half in zip(means, halves)]
    cells["for each halving"] = [tables.bold(text, own) for text, own in zip(texts, p)]
    cells["p"] = [tables.p_text(own) for own in p]
    over = "as means over the datasets" if len(datasets) > 1 else "on one dataset"
    note = (
        "Differences from the baseline that was trained on the same share of the episodes, seed by "
        f"seed, {over}. `for each halving`: by how much the difference grows as the data is "
        "halved, by least squares. In brackets 95 % intervals of each alone, by Student's t. p is "
        "Student's, corrected by Holm; the differences are corrected apart. Bold: p below 0.05."
    )
    return tables.Table(title, cells, note)


def percent(share):
    return f"{100 * share:g} %"


def share_figure(rows, datasets):
    """Draw gains by the share of the episodes, and below them the gap of the action error.

    Lines are means over the seeds, bands their 95 % intervals.
    """
    lines = 2 if GAP in rows else 1
    size = (3.4 * len(datasets), 2.6 * lines)
    figure, axes = plt.subplots(lines, len(datasets), figsize=size, squeeze=False, sharex=True)
    for column, dataset in enumerate(datasets):
        draw_bands(axes[0, column], gains(rows, [dataset]))
        axes[0, column].axhline(0, color="black", linewidth=0.8)
        axes[0, column].set(title=dataset, ylabel="score − baseline's")
        if lines > 1:
            draw_bands(axes[1, column], by_seed(rows, GAP, [dataset]))
            axes[1, column].set(ylabel="gap of the action error")
        axes[-1, column].set(xlabel="episodes trained on (%)")
    figures.add_legend(figure, axes[-1, 0])
    return figure


def draw_bands(axis, values):
    """Draw means and 95 % intervals over the seeds by the share: rows of (label, share)."""
    shares = sorted(values.index.unique("share"))
    axis.set_xscale("log")
    axis.set_xticks([100 * share for share in shares], [f"{100 * share:g}" for share in shares])
    axis.minorticks_off()
    means, halves = tables.mean_and_interval(values)
    styles = {BASELINE: dict(color="black", marker="", linestyle="-")}
    for label in values.index.unique("label"):
        x = 100 * means[label].index
        style = styles.get(label, {})
        (line,) = axis.plot(x, means[label], label=label, **style)
        low = means[label] - halves[label]
        high = means[label] + halves[label]
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.12)
