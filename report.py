"""Turns runs' directories, or a W&B project, into the paper's tables and figures, with rliable.

    python report.py                                       # the runs in results/, or else those in data/study
    python report.py --results '[results, elsewhere]' --final mean
    python report.py --wandb team/project

Into `output` go tables.md, tables.tex, each figure as .png and .pdf, and index.html, one page with all of it. Runs are
compared with those of the same settings: whatever else differs from the paper's but datasets, seeds and regularisers
makes sections. Of several seeds trained in one run each counts as a run.
"""

import base64
import csv
import glob
import html
import itertools
import math
import os
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields, replace
from typing import List, NamedTuple, Optional

import matplotlib
import numpy as np
import yaml

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from rliable import library  # noqa: E402
from scipy import stats  # noqa: E402

import iql  # noqa: E402
import rebrac  # noqa: E402
from runs import identity, parse  # noqa: E402

for bootstrap in (library.arch_bs.IIDBootstrap, library.arch_bs.IndependentSamplesBootstrap):
    # rliable was written for arch 5, which took a random_state where today's takes a seed; it gives None
    bootstrap.__init__ = lambda self, *args, random_state=None, init=bootstrap.__init__, **named: init(
        self, *args, **named
    )

SCRIPTS = {"rebrac": rebrac, "iql": iql}
NAMES = {"rebrac": "ReBRAC", "iql": "IQL"}
BEST = {"rebrac": ("best", "best-L2"), "iql": ("best", "best-L1")}  # the names of what is tuned for each dataset
DOMAINS = ("Gym-MuJoCo", "AntMaze", "Adroit")
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933"]  # Okabe and Ito's
MARKERS, LINES = "os^Dv<>P", ["-", "--", "-.", ":"]
WORDS = ["none", "DO", "LN", "FN", "GN", "BN", "SN", "L2", "L1", "EN", "InN", "BCN", "GrN"]  # in their order in tables
INSIDE = {  # what is watched inside the actor, in the last evaluation
    "train/dead_neurons": "dead neurons (share, training data)",
    "evaluation/dead_neurons": "dead neurons (share, evaluation)",
    "train/feature_norm": "feature norm (training data)",
    "train/pca_rank": "PCA rank (training data)",
    "train/action_error": "action error (training data)",
    "validation/action_error": "action error (held-out data)",
    "gap/action_error": "gap of the action error",
    "plasticity": "plasticity (loss left / loss before)",
}


@dataclass
class Config:
    results: List[str] = field(default_factory=lambda: ["results" if glob.glob("results/*/*/*") else "data/study"])
    wandb: Optional[str] = None  # team/project, read instead of directories
    output: str = "report"
    final: str = "last"  # a run's score: of the last evaluation, or the mean of the last 10 (AntMaze: 5)
    reps: int = 2000  # bootstrap resamples
    variants: int = 8  # in a figure of lines, at most


# --- Reading ---


class Seed(NamedTuple):
    """One training seed of a run."""

    algorithm: str
    settings: tuple  # what differs from the paper's but for the regularisers: pairs of a flag and its value
    dataset: str
    labels: tuple  # the names under which it counts: DO+LN, best, ...
    seed: int
    updates: np.ndarray  # (N,) of the evaluations
    scores: np.ndarray  # (N,)
    last: dict  # the last evaluation's row
    status: str  # finished, unfinished or failed
    config: dict

    @property
    def finished(self):
        return self.status == "finished"


def domain(dataset):
    name = dataset.split(" ")[0]  # without that of a file
    return DOMAINS["antmaze" in name] if name.endswith("-v2") else DOMAINS[2]


def place(word):
    return WORDS.index(word) if word in WORDS else len(WORDS)


def strengths(config):
    """Of a config's fields, its actor's regularisers by the paper's abbreviations, with their strengths."""
    kind = {0.0: "L2", 1.0: "L1", 0.5: "EN"}.get(config["actor_l1_ratio"], f"EN({config['actor_l1_ratio']:g})")
    names = {next(iter(flags)): name for name, flags in rebrac.CHOSEN.items()} | {"actor_wd": kind}
    return {name: config[flag] for flag, name in sorted(names.items(), key=lambda x: place(x[1])) if config.get(flag)}


def chosen(script, name):
    """The strength that the paper chose for a regulariser."""
    return next(iter(script.CHOSEN.get(name, {"": None}).values()))


def label(script, found):
    """DO+LN, with the strengths that aren't the paper's choice: DO(0.3)+LN."""
    is_chosen = lambda name, value: value is True or value == chosen(script, name)
    words = [name if is_chosen(name, value) else f"{name}({value:g})" for name, value in found.items()]
    return "+".join(words) or "none"


REGULARISERS = {  # flags that make labels; the others make settings
    flag.name for flag in fields(rebrac.Config)
    if flag.name.startswith(("actor_", "critic_")) and not flag.name.endswith(("rate", "coef", "layers", "loss"))
}  # fmt: skip
UNNAMED = REGULARISERS - {flag for flags in rebrac.CHOSEN.values() for flag in flags}  # no abbreviation
TUNED = {}  # by algorithm, dataset and critic's loss: the paper's config, and the regularisers of its tuned variants


def describe(algorithm, config):
    """Settings, dataset and labels of a run, from its config's fields."""
    script, name = SCRIPTS[algorithm], config["dataset_name"]
    key = algorithm, name, config.get("critic_loss")
    if key not in TUNED:
        plain = script.Config(**{k: config[k] for k in ("dataset_name", "critic_loss") if k in config})
        tuned = {word: strengths(vars(script.tuned(replace(plain, regularisers=word)))) for word in BEST[algorithm]}
        default = identity(vars(script.tuned(plain)))
        if "critic_loss" in config:
            default["critic_loss"] = script.Config.critic_loss
        TUNED[key] = default, tuned
    default, tuned = TUNED[key]
    found, base = strengths(config), strengths(default)
    names = [label(script, {k: v for k, v in found.items() if base.get(k) != v}), label(script, found)]
    names += [word for word, flags in tuned.items() if flags == found]
    if any(k not in found for k in base):
        names = [f"{names[1]} (no {'+'.join(k for k in base if k not in found)})", *names[2:]]
    changed = [k for k, value in config.items() if k in default and value != default[k]]
    if others := [f"{k}={config[k]}" for k in changed if k in UNNAMED]:
        names = ["+".join([word for word in names[:1] if word != "none"] + others)]
    skipped = {*REGULARISERS, "seed", "num_seeds", "dataset_name", "dataset_path", "log_every", "analysis"}
    settings = tuple(sorted((k, str(config[k])) for k in changed if k not in skipped))
    path = config.get("dataset_path")
    if path and os.path.basename(path).replace("_", "-") != f"{name}.hdf5":
        name = f"{name} ({os.path.basename(path)})"
    return settings, name, tuple(dict.fromkeys(names))


class Unreadable(Exception):
    """Says why a run is left out."""


def split_seeds(algorithm, config, rows, status):
    """The seeds of a run: `rows` are its evaluations, dictionaries of numbers. Unreadable if they make no sense."""
    settings, name, labels = describe(algorithm, config)
    by_seed = defaultdict(list)
    for row in rows:
        by_seed[int(row["seed"])].append(row)
    for seed in range(config["seed"], config["seed"] + config["num_seeds"]):
        mine = by_seed.get(seed, [])
        updates, scores = (np.array([row[key] for row in mine], float) for key in ("update", "score"))
        if status == "finished" and (not len(updates) or updates[-1] != config["num_updates"]):
            raise Unreadable("it is said to be finished, but its last evaluation is missing")
        if not np.isfinite(scores).all() or (np.diff(updates) <= 0).any():
            raise Unreadable("its scores are not finite, or its updates out of order")
        last = dict(mine[-1]) if mine else {}
        if "plasticity/before" in last and last["plasticity/before"]:
            last["plasticity"] = last["plasticity/after"] / last["plasticity/before"]
        yield Seed(algorithm, settings, name, labels, seed, updates, scores, last, status, config)


def read_directory(path):
    """The seeds of a run's directory, and the reason why it has no final score, if it hasn't."""
    algorithm = os.path.basename(os.path.dirname(os.path.dirname(os.path.abspath(path))))
    if algorithm not in SCRIPTS:
        raise Unreadable(f"{algorithm} is no algorithm of this project")
    try:
        with open(os.path.join(path, "config.yaml")) as file:
            config = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        config = identity(vars(SCRIPTS[algorithm].Config())) | config
        marks = {"finished.json": "finished", "failed.txt": "failed", "": "unfinished"}
        status = next(word for file, word in marks.items() if os.path.exists(os.path.join(path, file)))
        rows = []
        if os.path.exists(os.path.join(path, "evaluations.csv")):
            with open(os.path.join(path, "evaluations.csv"), newline="") as file:
                header, *lines = [line for line in csv.reader(file)] or [[]]
            whole = [line for line in lines if len(line) == len(header)]
            if len(whole) < len(lines) and (status == "finished" or len(whole) < len(lines) - 1):
                raise Unreadable("evaluations.csv is damaged")
            rows = [dict(zip(header, map(float, line))) for line in whole]
        seeds = list(split_seeds(algorithm, config, rows, status))
    except Unreadable:
        raise
    except (Exception, SystemExit) as error:  # whatever a damaged file or an unknown dataset brings about
        raise Unreadable(" ".join(f"it is damaged: {type(error).__name__} {error}".split())[:150]) from error
    reason = None
    if status == "unfinished":
        done = max((int(seed.updates[-1]) for seed in seeds if len(seed.updates)), default=0)
        reason = f"not finished: its last evaluation is that of update {done:,} of {config['num_updates']:,}"
    elif status == "failed":
        with open(os.path.join(path, "failed.txt"), errors="replace") as file:
            reason = f"failed: {' '.join(file.read().split())[:150]}"
    return seeds, reason


def read_results(folders):
    """The seeds of all runs below the folders, and what was left out: pairs of a directory and a reason."""
    seeds, left_out, seen = [], [], {}
    for folder in folders:
        if not os.path.isdir(folder):
            sys.exit(f"error: there is no directory {folder}")
        for path, inside, files in os.walk(folder):
            inside.sort()
            if "config.yaml" not in files:
                continue
            inside.clear()
            try:
                found, reason = read_directory(path)
            except Unreadable as error:
                left_out.append((path, str(error)))
                continue
            if reason:
                left_out.append((path, reason))
            keep(found, path, seeds, seen, left_out)
    return seeds, left_out


def read_wandb(project):
    """The same of a W&B project."""
    import wandb

    seeds, left_out, seen = [], [], {}
    try:
        found = list(wandb.Api(timeout=60).runs(project, per_page=500, lazy=False))
    except Exception as error:
        sys.exit(f"error: can't read {project} from W&B: {' '.join(str(error).split())[:200]}")
    for run in found:
        config = {key: value for key, value in run.config.items() if not key.startswith("_")}
        try:
            if config.get("algorithm") not in SCRIPTS:
                raise Unreadable("it is no run of this project")
            config = identity(vars(SCRIPTS[config["algorithm"]].Config())) | config
            numbers = range(config["seed"], config["seed"] + config["num_seeds"])
            rows = []
            for row in run.history(samples=1_000_000, pandas=False):
                if row.get("score") is None:
                    continue
                for seed in numbers:
                    prefix = f"seed{seed}/" if len(numbers) > 1 else ""
                    values = {key.removeprefix(prefix): v for key, v in row.items() if key.startswith(prefix)}
                    values = {key: v for key, v in values.items() if isinstance(v, (int, float))}
                    rows.append(values | {"seed": seed, "update": row["_step"]})
            status = {"finished": "finished", "failed": "failed", "crashed": "failed"}.get(run.state, "unfinished")
            own = list(split_seeds(config["algorithm"], config, rows, status))
            if status != "finished":
                left_out.append((f"{project}/{run.id}", f"not finished: W&B says it is {run.state}"))
            keep(own, f"{project}/{run.id}", seeds, seen, left_out)
        except Unreadable as error:
            left_out.append((f"{project}/{run.id}", str(error)))
        except (Exception, SystemExit) as error:
            left_out.append((f"{project}/{run.id}", f"it is damaged: {type(error).__name__} {error}"))
    return seeds, left_out


def keep(found, path, seeds, seen, left_out):
    """Adds the seeds of a run, but for those that another run has brought; a finished one replaces one that isn't."""
    for seed in found:
        key = seed[:5]
        if key not in seen:
            seen[key] = len(seeds)
            seeds.append(seed)
        elif seed.finished and not seeds[seen[key]].finished:
            seeds[seen[key]] = seed
        elif seed.finished:
            left_out.append((path, f"another run has its seed {seed.seed}, too"))


# --- Scores ---


def final_score(config, seed):
    """A finished seed's score: its last evaluation's, or the mean of its last 10, on AntMaze 5."""
    if config.final == "last":
        return seed.scores[-1]
    return seed.scores[-(5 if domain(seed.dataset) == "AntMaze" else 10) :].mean()


def collect(config, seeds):
    """Final scores, and what has none, by label, then dataset: lists of (seed, score); numbers of seeds by status."""
    scores, others = defaultdict(lambda: defaultdict(list)), defaultdict(lambda: defaultdict(Counter))
    for seed in seeds:
        for name in seed.labels:
            if seed.finished:
                scores[name][seed.dataset].append((seed.seed, final_score(config, seed)))
            else:
                others[name][seed.dataset][seed.status] += 1
    order = sorted(set(scores) | set(others), key=rank)
    own = {name: {i for i, seed in enumerate(seeds) if name in seed.labels} for name in order}
    repeats = lambda name, other: own[name] < own[other] or own[name] == own[other] and rank(name) > rank(other)
    order = [name for name in order if not any(repeats(name, other) for other in own)]  # all its runs have the other
    return {name: dict(scores[name]) for name in order}, others


def rank(name):
    """For the order of labels: none, single ones by family and strength, sums, the tuned ones, others."""
    words = [re.match(r"([^(]*)\(?([^)]*)", word).groups() for word in name.split("+")]
    numbers = [(place(word), float(text) if re.fullmatch(r"[\d.e-]+", text) else 0.0) for word, text in words]
    return len(words) if numbers[0][0] < len(WORDS) else 100, numbers, name


def matrix(by_dataset, datasets):
    """Scores (seeds, datasets) / 100 of the seeds that are finished on all datasets; None if those are below two."""
    common = set.intersection(*({seed for seed, _ in by_dataset.get(name, [])} for name in datasets))
    if len(common) < 2:
        return None
    return np.array([[dict(by_dataset[name])[seed] for name in datasets] for seed in sorted(common)]) / 100


def interval(scores, function, reps):
    """rliable's estimates (K, V) and 95 % intervals (2, K, V) by the stratified bootstrap, for V variants at once.

    Of an array of scores (seeds, datasets, V), or of a list of several, from which `function` makes (K, V).
    """
    np.random.seed(0)  # noqa: NPY002, from where rliable draws
    flat = lambda *arrays: function(*arrays).ravel()
    points, intervals = library.get_interval_estimates({"": scores}, flat, reps=reps)
    variants = (scores if isinstance(scores, np.ndarray) else scores[0]).shape[2]
    return points[""].reshape(-1, variants), intervals[""].reshape(2, -1, variants)


def aggregates(scores):
    """IQM, median, mean and optimality gap (4, V) of scores (seeds, datasets, V), as rliable defines them."""
    ordered = np.sort(scores.reshape(-1, scores.shape[2]), 0)
    cut = len(ordered) // 4
    return np.stack([
        ordered[cut : len(ordered) - cut].mean(0),
        np.median(scores.mean(0), 0),
        scores.mean((0, 1)),
        1 - np.minimum(scores, 1).mean((0, 1)),
    ])  # fmt: skip


def probability_of_improvement(x, y):
    """That a seed of x (seeds, datasets, V) is better than one of y, averaged over the datasets, (1, V); ties count
    half."""
    x, y = x[:, None], y[None]
    return ((x > y) + 0.5 * (x == y)).mean((0, 1, 2))[None]


def expected_online_performance(scores):
    """The best score to expect of n of the configurations (K,), drawn without replacement, for n = 1 ... K; (K,)."""
    scores, size = np.sort(scores), len(scores)
    return np.array([
        sum(score * math.comb(i, n - 1) for i, score in enumerate(scores)) / math.comb(size, n)
        for n in range(1, size + 1)
    ])  # fmt: skip


def improvement(x, y):
    """By how many percent the mean of x (seeds, datasets, V) is above that of y, (1, V), if that is positive."""
    return 100 * (x.mean((0, 1)) / y.mean((0, 1)) - 1)[None]


# --- Tables ---


class Table(NamedTuple):
    title: str
    header: list
    rows: list  # of cells; one that begins with * is in bold: the best, or different from none
    note: str = ""


def markdown(table):
    bold = lambda cell: f"**{cell[1:]}**" if cell.startswith("*") else cell
    lines = [f"### {table.title}\n", " | ".join(["", *table.header, ""]).strip()]
    lines.append("| " + " | ".join("---" for _ in table.header) + " |")
    lines += ["".join(f"| {bold(cell)} " if cell else "| " for cell in row) + "|" for row in table.rows]
    return "\n".join(lines) + (f"\n\n{table.note}" if table.note else "") + "\n"


def latex(table):
    escape = lambda text: re.sub(r"([%&_#$])", r"\\\1", text).replace("±", r"$\pm$").replace("–", "--")
    bold = lambda cell: rf"\textbf{{{escape(cell[1:])}}}" if cell.startswith("*") else escape(cell)
    lines = [
        r"\begin{table}", r"\centering", rf"\caption{{{escape(table.title)}. {escape(table.note)}}}",
        r"\resizebox{\linewidth}{!}{%", rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}", r"\toprule",
        " & ".join(map(escape, table.header)) + r" \\", r"\midrule",
        *(" & ".join(map(bold, row)) + r" \\" for row in table.rows), r"\bottomrule", r"\end{tabular}}", r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def as_html(table):
    cell = lambda text: (
        f"<td class=best>{html.escape(text[1:])}</td>" if text.startswith("*") else f"<td>{html.escape(text)}</td>"
    )
    head = "".join(f"<th>{html.escape(text)}</th>" for text in table.header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in table.rows)
    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    return f"<h3>{html.escape(table.title)}</h3><div class=wide><table><tr>{head}</tr>{body}</table></div>{note}"


def score_table(title, scores, others, datasets):
    """Mean and standard deviation over seeds: a row for each label, a column for each dataset, and their mean."""
    expected = max(
        len(scores[name].get(dataset, [])) + others[name][dataset].total() for name in scores for dataset in datasets
    )
    means, cells = {}, {}
    for name, dataset in itertools.product(scores, datasets):
        values = [value for _, value in scores[name].get(dataset, [])]
        rest = ", ".join(f"{n} {status}" for status, n in sorted(others[name][dataset].items()))
        cells[name, dataset] = rest or "missing"
        if values:
            means[name, dataset] = np.mean(values)
            count = (
                f" ({', '.join(filter(None, (f'{len(values)}/{expected}', rest)))})" if len(values) < expected else ""
            )
            cells[name, dataset] = f"{np.mean(values):.1f} ± {np.std(values):.1f}{count}"
    for name in scores:
        if all((name, dataset) in means for dataset in datasets):
            means[name, "mean"] = np.mean([means[name, dataset] for dataset in datasets])
        cells[name, "mean"] = f"{means[name, 'mean']:.1f}" if (name, "mean") in means else "incomplete"
    columns = [*datasets, *(["mean"] if len(datasets) > 1 else [])]
    best = {column: max([m for (_, c), m in means.items() if c == column], default=None) for column in columns}
    mark = lambda name, column: "*" if (name, column) in means and means[name, column] == best[column] else ""
    rows = [
        [name, *(mark(name, column) + cells[name, column] for column in columns)]
        for name in scores
        if any(cells[name, dataset] != "missing" for dataset in datasets)
    ]
    note = f"Mean ± standard deviation over {expected} seeds, or over as many as are finished: (finished/{expected})."
    return Table(title, ["regularisers", *columns], rows, note)


def mean_and_interval(by_dataset, datasets):
    """Of values by dataset, lists of (seed, value), the mean over datasets and seeds, and half the width of its 95 %
    interval over the seeds (Student's t); None if fewer than two seeds have a value on all the datasets."""
    found = matrix(by_dataset, datasets)
    if found is None:
        return None
    values = 100 * found.mean(1)
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def difference_table(title, scores, columns):
    """Mean scores minus that with no regulariser, seed by seed, and their 95 % intervals by the paired t.

    A column is of the mean over one or more datasets, columns[name], of the seeds that are finished on all of them.
    """
    none, rows = {dataset: dict(values) for dataset, values in scores["none"].items()}, []
    for name, mine in scores.items():
        pairs = {d: [(seed, value - none[d][seed]) for seed, value in mine.get(d, []) if seed in none[d]] for d in none}
        rows.append([name])
        for datasets in columns.values():
            found = mean_and_interval(mine if name == "none" else pairs, datasets)
            if not found:
                cell = "incomplete"
            elif name == "none":
                cell = "{:.1f} ± {:.1f}".format(*found)
            elif all(mine[dataset] == scores["none"][dataset] for dataset in datasets):
                cell = "the same runs"
            else:
                mean, half = found
                mark = "*" if abs(mean) > half else ""
                cell = f"{mark}{mean:+.1f} ({mean - half:+.1f} – {mean + half:+.1f})"
            rows[-1].append(cell)
    note = "None's score, and differences from it, seed by seed, with 95 % intervals by Student's t; bold: without 0."
    return Table(title, ["regularisers", *columns], rows, note)


def aggregate_table(title, matrices, reps):
    """rliable's aggregates of each label with 95 % intervals, and the comparison with no regulariser.

    Returns the table; by label the aggregates (4,) and their intervals (2, 4); and the improvement and its interval.
    """
    estimates, better, gains = {}, {}, {}
    for size in {len(values) for values in matrices.values()}:  # numbers of seeds
        names = [name for name in matrices if len(matrices[name]) == size]
        stack = np.stack([matrices[name] for name in names], 2)
        points, intervals = interval(stack, aggregates, reps)
        estimates |= {name: (points[:, i], intervals[:, :, i]) for i, name in enumerate(names)}
        if "none" in matrices:
            baseline = np.repeat(matrices["none"][:, :, None], len(names), 2)
            comparisons = [(better, probability_of_improvement)]
            if matrices["none"].mean() > 0:  # else percents of it mean nothing
                comparisons.append((gains, improvement))
            for found, function in comparisons:
                points, intervals = interval([stack, baseline], function, reps)
                found |= {name: (points[0, i], *intervals[:, 0, i]) for i, name in enumerate(names) if name != "none"}
    estimates, gains = ({name: found[name] for name in matrices if name in found} for found in (estimates, gains))
    rows = []
    for name, (point, (low, high)) in estimates.items():
        cells = [f"{100 * p:.1f} ({100 * a:.1f} – {100 * b:.1f})" for p, a, b in zip(point, low, high)]
        compared = ["", ""]
        if name in better:
            compared = ["{:.2f} ({:.2f} – {:.2f})".format(*better[name]), "none's is not positive"]
        if name in gains:
            compared[1] = "{:+.1f} % ({:+.1f} – {:+.1f})".format(*gains[name])
        rows.append([f"{name} ({len(matrices[name])} seeds)", *cells, *compared])
    header = ["regularisers", "IQM", "median", "mean", "optimality gap", "P(better than none)", "mean against none"]
    note = "95 % intervals by rliable's stratified bootstrap, in brackets."
    return Table(title, header, rows, note), estimates, gains


def last_values(seeds, name, key):
    """A label's values in the last evaluation, of the finished runs, by dataset: lists of (seed, value)."""
    found = defaultdict(list)
    for seed in seeds:
        if seed.finished and name in seed.labels and key in seed.last:
            found[seed.dataset].append((seed.seed, seed.last[key]))
    return found


def inside_table(title, seeds, names, datasets):
    """What is inside the actor in the last evaluation, and the scores under noise: means over datasets and seeds."""
    seeds = [seed for seed in seeds if seed.finished]
    scores = sorted({key for seed in seeds for key in seed.last if key.split("/")[0] == "score"})
    keys = [key for key in [*INSIDE, *scores] if any(key in seed.last for seed in seeds)]
    rows = []
    for name in names:
        cells = []
        for key in keys:
            found = mean_and_interval(last_values(seeds, name, key), datasets)
            digits = 1 if key in scores or "norm" in key or "rank" in key else 3
            cells.append(" ± ".join(f"{value:.{digits}f}" for value in found) if found else "incomplete")
        rows.append([name, *cells])
    header = [INSIDE.get(key, key.removeprefix("score/").replace("_", " ")) for key in keys]
    note = "Means over the datasets, and 95 % intervals over the seeds (Student's t)."
    return Table(title, ["regularisers", *header], [row for row in rows if {*row[1:]} != {"incomplete"}], note)


# --- Figures ---


def style(i):
    return dict(color=COLOURS[i % 8], marker=MARKERS[i % 8], linestyle=LINES[i // 2 % 4], markersize=4, linewidth=1.4)


def grid(n, width=3.4, height=2.6, columns=4):
    """A figure with n axes, and the axes."""
    columns = min(n, columns)
    lines = -(-n // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False)
    for axis in axes.flat[n:]:
        axis.axis("off")
    return figure, list(axes.flat[:n])


def legend(figure, axis):
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0), ncol=4, frameon=False, fontsize=8)


def learning_curves(seeds, names, datasets):
    """Score against updates: mean over the finished seeds, and their standard deviation; None of single evaluations."""
    if all(len(seed.updates) < 2 for seed in seeds):
        return None
    figure, axes = grid(len(datasets))
    for axis, dataset in zip(axes, datasets):
        for i, name in enumerate(names):
            curves = [s for s in seeds if s.finished and s.dataset == dataset and name in s.labels]
            curves = [s for s in curves if np.array_equal(s.updates, curves[0].updates)]
            if curves:
                values = np.stack([s.scores for s in curves])
                mean, std = values.mean(0), values.std(0)
                axis.plot(curves[0].updates / 1000, mean, label=name, markevery=max(1, len(mean) // 6), **style(i))
                axis.fill_between(curves[0].updates / 1000, mean - std, mean + std, color=COLOURS[i % 8], alpha=0.12)
        axis.set(title=dataset, xlabel="1000 updates", ylabel="score")
    legend(figure, max(axes, key=lambda axis: len(axis.lines)))
    return figure


def interval_figure(estimates):
    """The aggregates with their intervals."""
    figure, axes = grid(4, width=2.9, height=0.9 + 0.24 * len(estimates))
    for k, (axis, title) in enumerate(zip(axes, ("IQM", "median", "mean", "optimality gap"))):
        for i, (point, (low, high)) in enumerate(estimates.values()):
            axis.fill_betweenx(
                [i - 0.3, i + 0.3], 100 * low[k], 100 * high[k], color=COLOURS[0], alpha=0.45, linewidth=0
            )
            axis.plot([100 * point[k]] * 2, [i - 0.3, i + 0.3], color="black", linewidth=1.4)
        axis.set(title=title, yticks=range(len(estimates)), yticklabels=list(estimates) if k == 0 else [])
        axis.invert_yaxis()
    return figure


def improvement_figure(gains):
    """By how many percent each label is better than no regulariser, with 95 % intervals: a panel for each title."""
    figure, axes = grid(len(gains), width=3.2, height=1.1 + 0.17 * max(map(len, gains.values())), columns=3)
    for axis, (title, found) in zip(axes, gains.items()):
        axis.axvline(0, color="black", linewidth=0.8)
        for i, (point, low, high) in enumerate(found.values()):
            axis.plot([low, high], [i, i], color=COLOURS[0], linewidth=1.4)
            axis.plot(point, i, "o", color=COLOURS[0], markersize=4)
        axis.set(title=title, yticks=range(len(found)), yticklabels=list(found), xlabel="improvement over none (%)")
        axis.invert_yaxis()
    return figure


def performance_profiles(matrices, reps):
    """The share of runs with a score above tau (rliable), and its 95 % band."""
    figure, (axis,) = grid(1, width=5, height=3.4)
    low, high = (pick([pick(values) for values in matrices.values()]) for pick in (np.min, np.max))
    taus = np.linspace(min(low, 0), high + 0.05 * (high - min(low, 0)), 101)
    np.random.seed(0)  # noqa: NPY002
    above = lambda scores, taus: (scores.ravel() > taus[:, None]).mean(1)
    profiles, bands = library.create_performance_profile(matrices, taus, custom_profile_func=above, reps=reps)
    for i, name in enumerate(matrices):
        axis.plot(100 * taus, profiles[name], label=name, markevery=10, **style(i))
        axis.fill_between(100 * taus, *bands[name], color=COLOURS[i % 8], alpha=0.12)
    axis.set(xlabel="score τ", ylabel="share of runs with score > τ")
    legend(figure, axis)
    return figure


def heat_map(title, values, rows, columns, unit):
    """A matrix of numbers, NaN where there is none, on colours from red to blue around 0, with the numbers."""
    figure, axis = plt.subplots(figsize=(3.2 + 0.62 * len(columns), max(3.2, 1.2 + 0.27 * len(rows))))
    axis.grid(False)
    bound = np.nanmax(np.abs(values), initial=1e-9)
    image = axis.imshow(values, cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if abs(value) > 0.6 * bound else "black"
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_title(title, fontsize=10)
    figure.colorbar(image, label=unit)
    return figure


def mean_score(scores, name, dataset):
    values = [value for _, value in scores.get(name, {}).get(dataset, [])]
    return np.mean(values) if values else np.nan


def strength_map(scores, datasets):
    """Single regularisers by strength: the score minus that without any, for each dataset."""
    names = [name for name in scores if "+" not in name and name.split("(")[0] in WORDS[1:]]
    values = [[mean_score(scores, name, d) - mean_score(scores, "none", d) for d in datasets] for name in names]
    if names and np.isfinite(values).any():
        return heat_map("strength of a regulariser", np.array(values), names, datasets, "score − score without")
    return None


def pair_map(scores, datasets):
    """Pairs of regularisers at the paper's strengths: score minus that without any, its mean over the datasets."""
    words = [word for word in WORDS[1:] if any(word in name.split("+") and name.count("+") == 1 for name in scores)]
    values = np.full((len(words), len(words)), np.nan)
    for (i, a), (j, b) in itertools.product(enumerate(words), repeat=2):
        name = next((n for n in scores if sorted(n.split("+")) == sorted({a, b})), None)
        gains = [mean_score(scores, name, d) - mean_score(scores, "none", d) for d in datasets] if name else []
        if np.isfinite(gains).any():
            values[i, j] = np.nanmean(gains)
    if words and np.isfinite(values).any():
        return heat_map("pairs of regularisers (diagonal: one alone)", values, words, words, "score − score without")
    return None


def distributions(seeds, names, datasets):
    """What is inside the actor at the end: the runs of each label, and a line at the mean of each dataset's."""
    seeds = [seed for seed in seeds if seed.finished]
    keys = [key for key in INSIDE if any(key in seed.last for seed in seeds)]
    if not keys:
        return None
    figure, axes = grid(len(keys), width=max(3.0, 0.42 * len(names)), height=3.0, columns=2)
    for axis, key in zip(axes, keys):
        for j, dataset in enumerate(datasets):
            values = [
                [s.last[key] for s in seeds if s.dataset == dataset and name in s.labels and key in s.last]
                for name in names
            ]
            places = np.arange(len(names)) + (j - (len(datasets) - 1) / 2) * 0.7 / len(datasets)
            points = np.array([(x, value) for x, column in zip(places, values) for value in column]).reshape(-1, 2)
            axis.plot(*points.T, color=COLOURS[j % 8], marker=MARKERS[j % 8], linestyle="", markersize=3, label=dataset)
            means = [np.mean(column) if column else np.nan for column in values]
            axis.hlines(means, places - 0.3 / len(datasets), places + 0.3 / len(datasets), color=COLOURS[j % 8])
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        axis.set_title(INSIDE[key], fontsize=9)
    legend(figure, axes[0])
    return figure


def robustness(seeds, names, datasets):
    """Scores with noise and without: means over the datasets, with 95 % intervals over the seeds."""
    keys = sorted({key for seed in seeds if seed.finished for key in seed.last if key.split("/")[0] == "score"})
    if len(keys) < 2 or not any(mean_and_interval(last_values(seeds, name, "score"), datasets) for name in names):
        return None
    figure, (axis,) = grid(1, width=max(4.5, 0.6 * len(names)), height=3.2)
    for k, key in enumerate(keys):
        found = [mean_and_interval(last_values(seeds, name, key), datasets) or (np.nan, np.nan) for name in names]
        means, half = np.array(found).T
        places = np.arange(len(names)) + (k - (len(keys) - 1) / 2) * 0.8 / len(keys)
        axis.bar(
            places, means, 0.75 / len(keys), yerr=half, capsize=2,
            color=COLOURS[k % 8], hatch=["", "//", "..", "xx"][k % 4], edgecolor="white",
            label="no noise" if key == "score" else key.removeprefix("score/").replace("_", " "),
        )  # fmt: skip
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axis.set_ylabel("score")
    legend(figure, axis)
    return figure


def online_performance(curves):
    """Expected online performance: the best score to expect against the number of configurations tried."""
    figure, (axis,) = grid(1, width=5, height=3.2)
    for i, (name, values) in enumerate(curves.items()):
        axis.plot(range(1, len(values) + 1), values, label=name, **style(i))
    axis.set(xlabel="configurations tried online", ylabel="expected best score")
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    legend(figure, axis)
    return figure


# --- Report ---


def by_settings(seeds):
    """Pairs of settings and their runs, the largest first: each run is wherever all the settings are its own.

    So a dataset whose batch size is 256 anyway is in the section of batch_size=256, too, and IQL in that of a
    critic_loss, which it doesn't have. What is within another is not a section.
    """
    sections = {}
    for settings in {seed.settings for seed in seeds}:
        fits = lambda seed, own=set(settings): (
            set(seed.settings) <= own and all(str(seed.config.get(key, value)) == value for key, value in own)
        )
        sections[settings] = {i for i, seed in enumerate(seeds) if fits(seed)}
    whole = [item for item in sections.items() if not any(item[1] < others for others in sections.values())]
    return [(s, [seeds[i] for i in sorted(own)]) for s, own in sorted(whole, key=lambda item: (-len(item[1]), item[0]))]


def section(config, seeds, emit):
    """The tables and figures of the runs with the same settings."""
    curves, gains = {}, {}
    for algorithm in [name for name in SCRIPTS if any(seed.algorithm == name for seed in seeds)]:
        mine = [seed for seed in seeds if seed.algorithm == algorithm]
        scores, others = collect(config, mine)
        everything = sorted({seed.dataset for seed in mine}, key=lambda d: (DOMAINS.index(domain(d)), d))
        for part in [*dict.fromkeys(map(domain, everything)), "all domains"]:
            datasets = [d for d in everything if part in (domain(d), "all domains")]
            if part == "all domains" and len({domain(d) for d in datasets}) == 1:
                continue
            title = f"{NAMES[algorithm]}, {part}"
            if part != "all domains":
                emit(score_table(f"{title}: scores", scores, others, datasets))
            if "none" in scores and len(scores) > 1:
                columns = {dataset: [dataset] for dataset in datasets if part != "all domains"}
                columns |= {"mean": datasets} if len(datasets) > 1 else {}
                emit(difference_table(f"{title}: differences", scores, columns))
            matrices = {name: matrix(by, datasets) for name, by in scores.items()}
            matrices = {name: values for name, values in matrices.items() if values is not None}
            if not matrices:
                continue
            table, estimates, found = aggregate_table(f"{title}: aggregates", matrices, config.reps)
            panel = title if len(datasets) > 1 else f"{NAMES[algorithm]}, {datasets[0]}"
            gains |= {panel: found} if found else {}
            emit(table)
            emit(f"{title}: aggregates with 95 % intervals", interval_figure(estimates))
            few = dict(list(matrices.items())[: config.variants])
            emit(f"{title}: performance profiles", performance_profiles(few, config.reps))
            means = np.array([100 * values.mean(0) for values in matrices.values()])
            if len(means) > 1:  # as if each dataset were tuned on its own
                curves[panel] = np.mean([expected_online_performance(column) for column in means.T], 0)
        names = [name for name in scores if scores[name]]
        if names:
            title = NAMES[algorithm]
            emit(f"{title}: learning curves", learning_curves(mine, names[: config.variants], everything))
            emit(f"{title}: strength of a regulariser", strength_map(scores, everything))
            emit(f"{title}: pairs of regularisers", pair_map(scores, everything))
            if (table := inside_table(f"{title}: inside the actor", mine, names, everything)).rows:
                emit(table)
            emit(f"{title}: inside the actor", distributions(mine, names[:24], everything))
            emit(f"{title}: robustness", robustness(mine, names[:24], everything))
    if gains:
        emit("improvement over no regulariser", improvement_figure(gains))
    if curves:
        emit("expected online performance", online_performance(curves))


CSS = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px}td,th{padding:3px 9px;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left;white-space:nowrap}.best{font-weight:700}.wide{overflow-x:auto}
.note,li{color:#555;font-size:13px}img{max-width:100%}th{border-bottom:2px solid #222}
h2{border-top:1px solid #ccc;padding-top:1em}"""


def main(config):
    if config.final not in ("last", "mean") or config.reps < 1 or config.variants < 1:
        sys.exit("error: final must be last or mean, reps and variants 1 or more")
    seeds, left_out = read_wandb(config.wandb) if config.wandb else read_results(config.results)
    source = config.wandb or ", ".join(config.results)
    finished = sum(seed.finished for seed in seeds)
    summary = f"{source}: {finished} finished seeds; left out: {len(left_out)}"
    print(summary)
    for path, reason in left_out[:20]:
        print(f"  left out: {path}: {reason}")
    if len(left_out) > 20:
        print(f"  and {len(left_out) - 20} more, which the report lists")
    if not finished:
        sys.exit("error: there is no finished run; name the directories that hold runs with --results '[...]'")
    os.makedirs(config.output, exist_ok=True)
    final = "the last evaluation" if config.final == "last" else "the mean of the last 10 evaluations, on AntMaze 5"
    intro = f"{summary}. A run's score is that of {final}."
    numbers = [0]  # of the section, in the figures' names
    texts = {"md": ["# Report\n", intro, ""], "tex": [f"% {intro}\n% needs booktabs and graphicx\n"], "html": []}
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.3, "pdf.fonttype": 42, "svg.hashsalt": ""})  # fmt: skip

    def emit(thing, figure=None):
        """Writes a table, or a figure under its title, if there is one."""
        if isinstance(thing, Table):
            texts["md"].append(markdown(thing))
            texts["tex"].append(latex(thing))
            texts["html"].append(as_html(thing))
        elif figure is not None:
            name = re.sub(r"[^a-z0-9]+", "-", f"{numbers[0]}-{thing}".lower()).strip("-")
            figure.tight_layout()
            for suffix in ("png", "pdf"):
                figure.savefig(os.path.join(config.output, f"{name}.{suffix}"), dpi=130, bbox_inches="tight")
            plt.close(figure)
            with open(os.path.join(config.output, f"{name}.png"), "rb") as file:
                data = base64.b64encode(file.read()).decode()
            texts["md"].append(f"![{thing}]({name}.png)\n")
            texts["html"].append(
                f'<h3>{html.escape(thing)}</h3><img alt="{html.escape(thing)}" src="data:image/png;base64,{data}">'
            )

    for settings, group in by_settings(seeds):
        settings = ", ".join(f"{key}={value}" for key, value in settings) or "the paper's"
        numbers[0] += 1
        texts["md"].append(f"## Settings: {settings}\n")
        texts["tex"].append(f"% Settings: {settings}\n")
        texts["html"].append(f"<h2>Settings: {html.escape(settings)}</h2>")
        section(config, group, emit)
    if left_out:
        texts["md"] += ["## Left out\n", *(f"- `{path}`: {reason}" for path, reason in left_out), ""]
        items = "".join(f"<li>{html.escape(path)}: {html.escape(reason)}</li>" for path, reason in left_out)
        texts["html"].append(f"<h2>Left out</h2><ul>{items}</ul>")
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>Report</title><style>{CSS}</style><h1>Report</h1>"
    texts["html"] = [f"{page}<p>{html.escape(intro)}</p>", *texts["html"], "</html>"]
    for name, suffix in (("tables.md", "md"), ("tables.tex", "tex"), ("index.html", "html")):
        with open(os.path.join(config.output, name), "w") as file:
            file.write("\n".join(texts[suffix]) + "\n")
    print(f"wrote {os.path.join(config.output, 'index.html')}, tables.md, tables.tex and the figures")


if __name__ == "__main__":
    main(parse(Config))
