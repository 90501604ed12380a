"""The long runs' tables and figure in data/README.md, from their directories in data/long/."""

import functools
import glob
import json

import numpy as np
import pandas as pd

from tools import report_figures as figures
from tools.readme_results import SCRIPTS, markdown, path_of

PERIODS = 4  # parts of the training that the table has
MEASURES = {  # columns of the two tables -> titles and digits
    "score": ("score", 1),
    "score/action_noise=0.2": ("score with noise on the actions", 1),
    "score/state_noise=0.05": ("score with noise on the states", 1),
    "q": ("Q of the data's actions", 1),
    "evaluation/overestimation": ("overestimation", 1),
    "train/action_error": ("action error on training data", 3),
    "validation/action_error": ("action error on held-out data", 3),
    "evaluation/action_distance": ("action distance in evaluation", 3),
    "train/pca_rank": ("PCA rank", 1),
    "train/feature_norm": ("feature norm", 1),
    "train/jacobian_norm": ("norm of the actions' Jacobian", 2),
    "weight_norm": ("weight norm, all layers", 1),
    "plasticity/loss_left": ("loss left after 100 steps of cloning", 3),
}
PANELS = {  # of the figure: title -> columns; the second is drawn dashed
    "score": ["score"],
    "Q of the data's actions": ["q"],
    "overestimation": ["evaluation/overestimation"],
    "action error (dashed: held out)": ["train/action_error", "validation/action_error"],
    "PCA rank": ["train/pca_rank"],
    "norm of the actions' Jacobian": ["train/jacobian_norm"],
    "weight norm, all layers": ["weight_norm"],
    "loss left after 100 steps of cloning": ["plasticity/loss_left"],
}


def directory(algorithm):
    """Return the directory of an algorithm's long run."""
    (path,) = glob.glob(path_of("data", "long", algorithm, "*", "*"))
    return path


@functools.cache
def epochs(algorithm):
    """Return what a run's training logged. A row is of 1,000 updates, and the index the last."""
    return pd.read_csv(f"{directory(algorithm)}/train.csv", index_col="update")


@functools.cache
def evaluations(algorithm):
    """Return a run's evaluations, each with the row of `epochs` that ends there."""
    measured = pd.read_csv(f"{directory(algorithm)}/evaluations.csv", index_col="update")
    layers = measured.filter(like="weight_norm/")
    measured["weight_norm"] = np.sqrt((layers**2).sum(axis=1))
    return measured.join(epochs(algorithm).drop(columns="seed"))


def table():
    """The means of what was measured over each quarter of the training, and its least and most."""
    lines = []
    for column, (title, digits) in MEASURES.items():
        for algorithm, script in SCRIPTS.items():
            values = evaluations(algorithm)[column]
            cells = [range_text(own, digits) for own in np.array_split(values, PERIODS)]
            lines.append([title, script.NAME, *cells])
    last = int(evaluations("iql").index[-1])
    ends = [f"to {last * (i + 1) // PERIODS:,}" for i in range(PERIODS)]
    return markdown(["measure", "algorithm", *ends], lines)


def range_text(values, digits):
    """Return "29.3 (27.1 – 31.5)": the mean, the least and the most."""
    numbers = (values.mean(), values.min(), values.max())
    mean, least, most = (f"{number:.{digits}f}" for number in numbers)
    return f"{mean} ({least} – {most})"


def times():
    """How long the runs took, and on what machine."""
    lines = []
    for algorithm, script in SCRIPTS.items():
        with open(f"{directory(algorithm)}/finished.json") as file:
            about = json.load(file)
        minutes = {phase: seconds / 60 for phase, seconds in about["seconds"].items()}
        cells = [f"{minutes[phase]:.0f}" for phase in ("train", "evaluation", "analysis")]
        rate = about["updates"] / about["seconds"]["train"]
        lines.append([script.NAME, *cells, f"{rate:.0f}", " and ".join(about["made_with"])])
    header = ["", "training (min)", "evaluation (min)", "analysis (min)", "updates/s", "made with"]
    return markdown(header, lines)


def figure():
    """Draw measures of both runs over the updates."""
    drawn, axes = figures.make_axes(len(PANELS), width=3.0, height=2.3)
    for axis, (title, columns) in zip(axes, PANELS.items()):
        for (algorithm, script), color in zip(SCRIPTS.items(), figures.COLOURS):
            for column, line in zip(columns, ("-", "--")):
                values = evaluations(algorithm)[column]
                if column in epochs(algorithm):
                    values = epochs(algorithm)[column]
                label = script.NAME if line == "-" else None
                style = dict(color=color, linestyle=line, marker="", label=label)
                axis.plot(values.index / 1000, values, **style)
        axis.set(title=title, xlabel="updates (thousands)")
        if title == "score":  # whose changes are small
            axis.set_ylim(bottom=0)
    figures.add_legend(drawn)
    return drawn
