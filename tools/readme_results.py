"""The tables of results in data/README.md: the demo, the study, and the other runs in data/.

The functions in the BLOCKS of `readme.py` return Markdown.
"""

import functools
import os
import re

import numpy as np
import pandas as pd

from harness.scripts import ROOT, load_script
from tools.report_figures import learning_curves
from tools.report_runs import BASELINE, by_label, read_results
from tools.report_tables import (
    bold,
    by_seed,
    difference_table,
    holm,
    interval_text,
    mean_and_interval,
    p_text,
    p_values,
)

SCRIPTS = {name: load_script(name) for name in ("rebrac", "iql")}  # those of the paper
STUDIED = {  # datasets of the study: D4RL's name and a short one
    "halfcheetah-medium-replay-v2": "HalfCheetah",
    "hopper-medium-v2": "Hopper",
    "pen-expert-v1": "Pen",
}
TWELVE = "DO LN FN GN BN SN L2 L1 EN InN BCN GrN".split()  # the regularisers of the paper
COMBINATIONS = {"rebrac": "DO+LN+GrN", "iql": "DO+LN+EN"}  # of the study


def path_of(*parts):
    return os.path.join(ROOT, *parts)


def markdown(header, rows):
    """Return a Markdown table of texts."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def as_block(table):
    """Return a report's table without its title and note."""
    header, *lines = table.lines()
    return markdown(header, lines)


def in_order(rows):
    """Return the datasets of rows, in the order of STUDIED."""
    return [dataset for dataset in STUDIED if dataset in set(rows["dataset"])]


FILES = {  # tables of runs in data/ -> what they are of, and the sweeps: {folder: names}
    "study": ("[the study](#the-study)", {"iql": "study", "rebrac": "study"}),
    "trials": ("[ReBRAC's coefficient](#rebracs-coefficient-for-the-study), tried by hand", {}),
    "second": (
        "[the second study](#the-second-study): less data, strengths, actor or critics, pairs",
        {
            "iql/second_study": "less_data dropout l2 both_ln both_dropout both_l2 pairs",
            "rebrac/second_study": "less_data halfcheetah_less_data both_ln both_dropout both_l2 "
            "halfcheetah_both_ln halfcheetah_both_dropout halfcheetah_both_l2",
        },
    ),
    "repeat": (
        "with other [seeds](#once-more-with-new-seeds), [episodes](#other-draws-of-the-episodes), "
        "[coefficients](#more-cloning)",
        {
            "iql/second_study": "repeat_critics repeat_hopper",
            "rebrac/second_study": "halfcheetah_repeat halfcheetah_cloning",
        },
    ),
    "coefficients": (
        "[ReBRAC's coefficients](#rebracs-coefficients-for-the-second-study)",
        {"rebrac/second_study": "coefficients halfcheetah_coefficients"},
    ),
    "longer": (
        "[longer trainings of IQL](#ln-in-the-critics-in-longer-trainings)",
        {"iql/second_study": "longer_critics longer_both"},
    ),
    "temperature": (
        "[other temperatures of IQL](#actor-or-critics)",
        {"iql/second_study": "temperature"},
    ),
    "start": (
        "[HL-Gauss whose Q starts at 0](#how-far-ahead-the-critics-look)",
        {"rebrac/second_study": "start"},
    ),
    "antmaze_tau": (
        "[larger steps of the targets](#how-far-ahead-the-critics-look)",
        {"rebrac/second_study": "antmaze_tau"},
    ),
    "batch": (
        "[Pen's two-by-two](#pen-batch-and-rates-or-regularisers)",
        {"rebrac/second_study": "batch"},
    ),
    "antmaze": ("[AntMaze](#antmaze)", {"iql/second_study": "antmaze"}),
    "curves": (
        "[CQL and BCQ](#cql-and-bcq-on-the-bundled-data)",
        {
            "cql/second_study": "curves pen",
            "bcq/second_study": "curves hopper_curves networks hopper_networks",
        },
    ),
    "demo": ("[the demo](#the-demo)", {}),
}


def files():
    """The tables of runs in data/, with their numbers of runs and their sweeps."""
    rows = []
    for file, (about, sweeps) in FILES.items():
        number = len(pd.read_csv(path_of("data", f"{file}.csv"), dtype=str))
        texts = []
        for folder, names in sweeps.items():
            links = [f"[{name}](../sweeps/{folder}/{name}.yaml)" for name in names.split()]
            texts.append(f"{folder}: {' '.join(links)}")
        rows.append([f"`{file}.csv`", f"{number:,}", about, "; ".join(texts)])
    return markdown(["file", "runs", "of", "sweeps"], rows)


def demo():
    """The scores of the demo and of behaviour cloning, by seed."""
    seeds, _ = read_results([path_of("data", "demo.csv")])
    rows = []
    for text, coefficient in (("ReBRAC: `make demo`", 1.0), ("behaviour cloning", 0.0)):
        scores = {}
        for seed in seeds:
            if seed["config"]["actor_q_coef"] == coefficient:
                scores[seed["seed"]] = seed["score"]
        texts = [f"{scores[number]:.1f}" for number in range(3)]
        rows.append([text, *texts, f"{np.mean(list(scores.values())):.1f}"])
    return markdown(["", "seed 0", "seed 1", "seed 2", "mean"], rows)


LENGTHS = (10_000, 20_000, 100_000, 300_000, 1_000_000)  # updates of a training


def reach():
    """How many steps ahead the critics look after so many updates, by algorithm and dataset.

    In brackets is the share of the value of a constant reward that is learnt by then. Rows are the
    datasets of STUDIED, and AntMaze's first.
    """
    rows = {}
    for name in ("rebrac", "iql", "cql", "bcq"):
        script = load_script(name)
        for dataset, short in {**STUDIED, "antmaze-umaze-v2": "AntMaze"}.items():
            config = script.tuned(script.Config(dataset_name=dataset))
            moves = np.array(LENGTHS) // getattr(config, "policy_freq", 1)  # of the target
            cells = [reach_text(config, number) for number in moves]
            rows.setdefault((script.NAME, *cells), []).append(short)
    lines = [[name, ", ".join(datasets), *cells] for (name, *cells), datasets in rows.items()]
    return markdown(["", "dataset", *(f"{number:,} updates" for number in LENGTHS)], lines)


def reach_text(config, moves):
    """Return the steps that a reward is carried back by moves of a target, and the share learnt.

    Each move takes the share tau of the way to r + gamma Q'. So the value of a constant reward is
    learnt up to exp(-moves * tau * (1 - gamma)), if the critics fit their targets.
    """
    steps = moves * config.tau
    share = 1 - np.exp(-steps * (1 - config.gamma))
    return f"{steps:,.0f} steps ({100 * share:.0f} %)"


def start():
    """What HL-Gauss scores on HalfCheetah by its range of values, in whose middle Q starts.

    The first row is of coefficients.csv, with the same coefficients.
    """
    paths = [path_of("data", f"{file}.csv") for file in ("coefficients", "start")]
    seeds, _ = read_results(paths)
    rows = {}
    for seed in sorted(seeds, key=lambda seed: seed["seed"]):
        config = seed["config"]
        own = [config[name] for name in ("dataset_name", "actor_bc_coef", "critic_bc_coef")]
        if config["critic_loss"] == "hl_gauss" and own == [next(iter(STUDIED)), 0.1, 0.1]:
            rows.setdefault((config["v_min"], config["v_max"]), []).append(seed)
    lines = []
    for (low, high), own in rows.items():
        span = "that of the data" if low is None else f"{low:g} to {high:g}"
        error = np.mean([seed["evaluation/overestimation"] for seed in own])
        scores = ", ".join(f"{seed['score']:.1f}" for seed in own)
        lines.append([span, f"{error:+.0f}", scores])
    return markdown(["range", "overestimation", "score, by seed"], lines)


def tau():
    """ReBRAC's success on AntMaze over the updates, by the step of its targets."""
    seeds, _ = read_results([path_of("data", "antmaze_tau.csv")])
    lines = []
    (updates,) = {tuple(seed["updates"]) for seed in seeds}
    for seed in seeds:
        lines.append([seed["config"]["tau"], *(f"{score:.0f}" for score in seed["scores"])])
    return markdown(["`tau`", *(f"{update:,} updates" for update in updates)], lines)


CRITICS = dict(hl_gauss="HL-Gauss", mse="squared error")


def trials():
    """The scores of seed 0 by which the study's `actor_bc_coef` was chosen."""
    paths = [path_of("data", "trials.csv"), path_of("data", "study.csv")]
    seeds, _ = read_results(paths)
    cells = {}
    for seed in seeds:
        if (seed["algorithm"], seed["seed"]) != ("rebrac", 0) or BASELINE not in seed["labels"]:
            continue
        config = seed["config"]
        critic = CRITICS[config["critic_loss"]]
        coefficient = f"{config['actor_bc_coef']:g}"
        if coefficient not in ("0.4", "0.1"):
            coefficient = "the paper's"
        cells[f"{critic}, {coefficient}", config["dataset_name"]] = f"{seed['score']:.1f}"
    rows = []
    for critic, coefficient in (
        ("HL-Gauss", "the paper's"),
        ("squared error", "the paper's"),
        ("squared error", "0.4"),
        ("squared error", "0.1"),
    ):
        name = f"{critic}, {coefficient}"
        rows.append([name, *(cells.get((name, dataset), "") for dataset in STUDIED)])
    return markdown(["critic, `actor_bc_coef`", *STUDIED.values()], rows)


@functools.cache  # since it is read for each of many tables
def study():
    """Return the study's seeds, a row for each label, by algorithm."""
    seeds, _ = read_results([path_of("data", "study.csv")])
    table = pd.DataFrame(seeds)
    return {name: by_label(own) for name, own in table.groupby("algorithm", sort=False)}


def seeds_by_dataset(column):
    """Return a column of the study's: rows of labels, columns of (algorithm, dataset, seed)."""
    rows = study()
    found = {}
    for algorithm in SCRIPTS:
        for dataset in STUDIED:
            values = by_seed(rows[algorithm], column, [dataset])
            values.index = values.index.astype(str)
            values = values.rename({COMBINATIONS[algorithm]: "combination"})
            found[algorithm, dataset] = values.reindex([BASELINE, *TWELVE, "combination"])
    return pd.concat(found, axis="columns")


def means_by_dataset(column):
    """Return means over the seeds: rows of labels, columns of (algorithm, dataset)."""
    return seeds_by_dataset(column).T.groupby(level=[0, 1], sort=False).mean().T


def by_dataset(column, digits):
    """The means over the seeds, for each algorithm and dataset."""
    return with_titles(means_by_dataset(column).map(f"{{:.{digits}f}}".format))


def with_titles(cells):
    """Return a Markdown table of texts: rows of labels, columns of (algorithm, dataset)."""
    header = [f"{SCRIPTS[name].NAME}: {STUDIED[dataset]}" for name, dataset in cells]
    return markdown(["", *header], cells.reset_index().to_numpy())


NOISE = ("score/action_noise=0.2", "score/state_noise=0.05")


def under_noise(column):
    """The mean scores with noise.

    Bold is what differs from the baseline, seed by seed: p by Student's t is below 0.05, corrected
    by Holm over both kinds of noise, both algorithms, and all datasets and labels.
    """
    p = {}
    for kind in NOISE:
        for key, values in seeds_by_dataset(kind).T.groupby(level=[0, 1], sort=False):
            changes = values.T - values.T.loc[BASELINE]
            is_other = changes.any(axis=1)  # a label may have the baseline's own runs
            p[kind, *key] = p_values(changes).where(is_other)
    p = pd.DataFrame(p)
    p[:] = holm(p)
    texts = means_by_dataset(column).map("{:.1f}".format)
    for key in texts:
        texts[key] = [bold(*pair) for pair in zip(texts[key], p[column, *key])]
    return with_titles(texts)


def report_tables():
    """Return the tables of data/study/tables.md: {title: lines of cells}."""
    with open(path_of("data", "study", "tables.md"), encoding="utf-8") as file:
        text = file.read()
    found = {}
    for title, body in re.findall(r"^### (.+)\n\n((?:\|.*\n)+)", text, re.MULTILINE):
        found[title] = [
            [cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in body.splitlines()
        ]
    return found


def study_scores(algorithm):
    """The study's differences from the baseline, dataset by dataset and in the mean."""
    tables = report_tables()
    name = SCRIPTS[algorithm].NAME
    means = tables[f"{name}, all domains: differences"]
    columns = {}
    for title in (f"{name}, Gym-MuJoCo: differences", f"{name}, Adroit: differences"):
        header, _, *lines = tables[title]
        for i, dataset in enumerate(header):
            if dataset in STUDIED:
                columns[STUDIED[dataset]] = {line[0]: line[i] for line in lines}
    rows = []
    for label, *of_mean in means[2:]:
        rows.append([label, *(columns[short][label] for short in STUDIED.values()), *of_mean])
    header = ["mean of the three", "p of the mean", "mean, in percent"]
    return markdown(["", *STUDIED.values(), *header], rows)


def findings():
    """What the study found: the mean of the three datasets, in a line for each algorithm."""
    tables = report_tables()
    rows = []
    for algorithm, script in SCRIPTS.items():
        differences = tables[f"{script.NAME}, all domains: differences"]
        (_, baseline, _, _), *others = differences[2:]
        cells = {label: percent for label, _, _, percent in others}
        single = [name for name in TWELVE if name in cells]
        best = max(single, key=lambda name: float(cells[name].split(" %")[0]))
        worst = min(single, key=lambda name: float(cells[name].split(" %")[0]))
        combination = COMBINATIONS[algorithm]
        texts = [f"{name}: {cells[name]}" for name in (best, worst, combination)]
        rows.append([script.NAME, baseline, *texts])
    header = ["", "baseline", "best of the 12", "worst of the 12", "combination, fixed strengths"]
    return markdown(header, rows)


def antmaze():
    """Success on AntMaze data of our own over the updates, beside CORL's on D4RL's."""
    seeds, _ = read_results([path_of("data", "antmaze.csv")])
    table = by_label(pd.DataFrame(seeds))
    table["num_updates"] = table["updates"].map(max)
    table["name"] = table["algorithm"].map(lambda algorithm: SCRIPTS[algorithm].NAME)
    critics = {"mse": " (mse)", "hl_gauss": " (HL-Gauss)", None: ""}
    table["name"] += table["config"].map(lambda config: critics[config.get("critic_loss")])
    published = pd.read_csv(path_of("data", "corl.csv")).set_index(["algorithm", "dataset_name"])
    rows = []
    kinds = ["name", "dataset", "label", "num_updates"]
    for (name, dataset, label, _), own in table.groupby(kinds, observed=True):
        curve = []
        for updates, scores in zip(own["updates"].iloc[0], np.transpose(own["scores"].tolist())):
            curve.append(f"{updates // 1000}: {scores.mean():.0f}")
        last = ", ".join(f"{score:.0f}" for score in own["score"])
        corl = published["mean"][name.split(" (")[0], dataset.split(" [")[0]]
        cells = [label, ", ".join(curve), last, f"{corl:.0f}" if label == BASELINE else ""]
        rows.append([name, dataset, *cells])
    header = ["", "dataset", "regularisers", "thousand updates: mean success (%)"]
    header += ["at the end, by seed", "CORL"]
    return "\n\n".join([markdown(header, rows), *differences(table)])


def differences(table):
    """Return a sentence for each label that has the baseline's seeds: its difference from it."""
    sentences = []
    for (name, dataset, updates), own in table.groupby(["name", "dataset", "num_updates"]):
        scores = own.pivot(index="label", columns="seed", values="score")
        if len(scores) == 1:
            continue
        changes = (scores - scores.loc[BASELINE]).drop(BASELINE)
        means, halves = mean_and_interval(changes)
        for label, p in zip(changes.index, holm(p_values(changes))):
            sentences.append(
                f"{name} with {label} on `{dataset}`, {updates:,} updates, differs from the "
                f"baseline by {interval_text(means[label], halves[label], '+')} points, seed by "
                f"seed; p {p_text(p)}. Interval and p are Student's."
            )
    return sentences


def batch():
    """The two-by-two on Pen: the published batch and rates, and the published regularisers.

    A cell is a mean over the seeds, or a mean of their differences. It has a 95 % interval, and a
    difference has p by Student's t, corrected by Holm over the five.
    """
    seeds, _ = read_results([path_of("data", "batch.csv")])
    columns = {}  # scores by seed
    for seed in seeds:
        is_plain = seed["config"]["actor_dropout"] == 0
        row = "baseline" if is_plain else "DO+LN"
        column = columns.setdefault((row, seed["config"]["batch_size"]), {})
        column[seed["seed"]] = seed["score"]
    scores = pd.DataFrame(columns)
    tables = {"baseline": scores["baseline"], "DO+LN": scores["DO+LN"]}
    tables["difference"] = tables["DO+LN"] - tables["baseline"]
    for name, table in tables.items():
        tables[name] = table.assign(difference=table[1024] - table[256]).T
    values = pd.concat(tables)  # rows of (name, column), columns of seeds

    means, halves = mean_and_interval(values)
    differences = [key for key in values.index if "difference" in key]
    p = dict(zip(differences, holm(p_values(values.loc[differences]))))
    rows = []
    for name in tables:
        row = [name]
        for key in ((name, 256), (name, 1024), (name, "difference")):
            text = interval_text(means[key], halves[key], "+" if key in p else "")
            row.append(bold(f"{text}, p {p_text(p[key])}", p[key]) if key in p else text)
        rows.append(row)
    return markdown(["", "256, rates 3e-4", "1,024, rates 1e-3", "difference"], rows)


def coefficients():
    """ReBRAC's scores by its two coefficients: means, and in brackets each seed's."""
    seeds, _ = read_results([path_of("data", "coefficients.csv")])
    scores = {}
    finished = [seed for seed in seeds if seed["state"] == "finished"]
    for seed in sorted(finished, key=lambda seed: seed["seed"]):
        config = seed["config"]
        critic = CRITICS[config["critic_loss"]]
        row = (critic, config["actor_bc_coef"], config["critic_bc_coef"])
        scores.setdefault(row, {}).setdefault(config["dataset_name"], []).append(seed["score"])
    rows = []
    for (critic, actor_coef, critic_coef), cells in sorted(scores.items()):
        row = [critic, f"{actor_coef:g}", f"{critic_coef:g}"]
        for dataset in STUDIED:
            of_seeds = cells.get(dataset)
            if of_seeds is None:
                row.append("")
            else:
                texts = ", ".join(f"{score:.0f}" for score in of_seeds)
                row.append(f"{np.mean(of_seeds):.1f} ({texts})")
        rows.append(row)
    return markdown(["critic", "`actor_bc_coef`", "`critic_bc_coef`", *STUDIED.values()], rows)


def curves_of(algorithm):
    """Return an algorithm's finished runs in data/curves.csv, a row for each label."""
    seeds, _ = read_results([path_of("data", "curves.csv")])
    table = pd.DataFrame([seed for seed in seeds if seed["algorithm"] == algorithm])
    return by_label(table[table["state"] == "finished"])


KL_COEF = {"halfcheetah-medium-replay-v2": 0.1, "hopper-medium-v2": 0.5}  # of BCQ's second study
ON_NETWORKS = [f"DO+LN on {network}" for network in ("decoder", "perturbation", "both")]


def second_study_of_bcq():
    """Return BCQ's rows with its second study's weights. A label names the network, too."""
    rows = curves_of("bcq")
    configs = pd.DataFrame(rows["config"].tolist(), rows.index)
    rows = rows[configs["kl_coef"] == rows["dataset"].map(KL_COEF)]
    network = configs["regularise"].loc[rows.index]
    label = rows["label"].astype(str)
    label = label.where(label != "DO+LN", label + " on " + network)
    return rows.assign(label=pd.Categorical(label, [BASELINE, "DO", "LN", *ON_NETWORKS]))


def networks():
    """What DO+LN changes on each of BCQ's networks: the report's table of differences."""
    rows = second_study_of_bcq()
    rows = rows[rows["label"].isin([BASELINE, *ON_NETWORKS])]
    label = rows["label"].cat.remove_unused_categories()
    rows = rows.assign(label=label, final=rows["score"])
    columns = {STUDIED[dataset]: [dataset] for dataset in KL_COEF}
    return as_block(difference_table("", rows, {**columns, "mean": list(KL_COEF)}))


def curves(rows):
    """Return the table of the last scores of learning curves, by dataset and regularisers."""
    numbers = sorted(rows["seed"].unique())
    lines = []
    for (dataset, label), own in rows.groupby(["dataset", "label"], observed=True):
        scores = own.set_index("seed")["score"].reindex(numbers)
        texts = [f"{score:.1f}" for score in (scores.mean(), *scores)]
        lines.append([STUDIED[dataset], label, *texts])
    seeds = [f"seed {number}" for number in numbers]
    return markdown(["dataset", "regularisers", "mean", *seeds], lines)


def curves_figure(rows):
    labels = rows["label"].cat.remove_unused_categories().cat.categories
    return learning_curves(rows, labels, in_order(rows))
