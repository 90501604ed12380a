"""Writes the tables in the READMEs from the data, between markers, and draws their curves.

    python -m tools.readme

A block stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. NAME is a key of BLOCKS.
"""

import functools
import os
import re
import runpy
import signal

if __name__ == "__main__":  # Ctrl-C shows no traceback in the imports, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import h5py
import numpy as np
import pandas as pd

from harness.datasets import DOMAINS
from harness.environments import d4rl
from harness.errors import UserError, one_line_errors
from harness.scripts import ROOT, load_script
from tools import report_shares as shares
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
    same_as_baseline,
)

SCRIPTS = {name: load_script(name) for name in ("rebrac", "iql")}  # those of the paper
STUDIED = {  # datasets of the study: D4RL's name and a short one
    "halfcheetah-medium-replay-v2": "HalfCheetah",
    "hopper-medium-v2": "Hopper",
    "pen-expert-v1": "Pen",
}
WHERE = {  # where a regulariser acts
    "DO": "dropout after each hidden layer, in the actor's loss only",
    "LN": "LayerNorm after each hidden ReLU",
    "FN": "FeatureNorm: LayerNorm without scale and bias",
    "GN": "GroupNorm with 32 groups after each hidden ReLU",
    "BN": "BatchNorm after each hidden ReLU",
    "SN": "SpectralNorm of the last hidden Dense",
    "L2": "decoupled weight decay, L2 (`actor_l1_ratio` 0)",
    "L1": "decoupled weight decay, L1 (`actor_l1_ratio` 1)",
    "EN": "decoupled weight decay, elastic net (`actor_l1_ratio` 0.5)",
    "InN": "noise on the states in the actor's loss",
    "BCN": "noise on the objective: cloned actions (ReBRAC), weights (IQL)",
    "GrN": "decaying noise on the gradient, before Adam",
}
BEYOND = {  # the same of those that the paper hasn't
    "RMS": "RMSNorm after each hidden ReLU (not in the paper)",
    "SAM": "sharpness-aware minimisation: the gradient is taken this far uphill (not in the paper)",
}


def path_of(*parts):
    return os.path.join(ROOT, *parts)


def markdown(header, rows):
    """Return a Markdown table of texts."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# --- From the scripts and sweeps ---


def regularisers():
    """The regularisers: flag, where it acts, strength in each script."""
    rows = []
    for name, text in {**WHERE, **BEYOND}.items():
        strengths = []
        for script in SCRIPTS.values():
            flags = script.CHOSEN[name]
            flag, strength = next(iter(flags.items()))
            strengths.append("on" if strength is True else short(strength))
        rows.append([name, f"`{flag}`", text, *strengths])
    return markdown(["name", "flag", "what it is", *titles()], rows)


def short(number):
    """Return 0.1 as "0.1" and 0.00001 as "1e-5"."""
    return f"{number:g}".replace("e-0", "e-")


def titles():
    return [script.NAME for script in SCRIPTS.values()]


@functools.cache
def about_experiments():
    """Return what varies in each experiment, and whether the paper has it."""
    return runpy.run_path(path_of("sweeps", "generate.py"))["EXPERIMENTS"]


def experiments(algorithm):
    """Return each experiment's runs of an algorithm by domain, as the files' first lines say."""
    found = {}
    for name in about_experiments():
        found[name] = dict.fromkeys(DOMAINS, 0)
        for key in DOMAINS:
            path = path_of("sweeps", algorithm, key, f"{name}.yaml")
            if os.path.exists(path):
                with open(path) as lines:
                    number = re.search(r"([\d,]+) runs of 1,000,000 updates", next(lines))[1]
                found[name][key] = int(number.replace(",", ""))
    return found


def sweep_files():
    """The experiments: what varies, whether the paper has it, runs by domain, and updates."""
    rows = []
    counted = {**experiments("rebrac"), "networks": experiments("bcq")["networks"]}
    for name, runs in counted.items():
        counts = [f"{number:,}" for number in runs.values()]
        updates = f"{sum(runs.values()) / 1000:.2f}"
        rows.append([f"`{name}.yaml`", *about_experiments()[name], *counts, updates])
    total = f"{number_of_runs() / 1000:.2f}"
    rows.append(["all of ReBRAC's", "", "", "", "", "", total])
    return markdown(["file", "what varies", "in the paper", *DOMAINS, "10⁹ updates"], rows)


def number_of_runs(of_paper=False):
    """Return the runs of ReBRAC's files, or of those whose experiments the paper has."""
    number = 0
    for name, runs in experiments("rebrac").items():
        if about_experiments()[name][1].startswith("yes") or not of_paper:
            number += sum(runs.values())
    return number


# --- From data/benchmark.md ---


def measured_rows():
    """Return the rows of the benchmark's output: {first cell: other cells}."""
    rows = {}
    with open(path_of("data", "benchmark.md")) as file:
        for line in file:
            if line.startswith("| "):
                name, *cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
                rows[name] = cells
    return rows


SPEED = {  # rows of the benchmark -> titles, and what the second number is a share of
    "1,000,000 transitions": ("load 1,000,000 transitions (s)", ""),
    "2,000,000 transitions": ("load 2,000,000 transitions (s)", ""),
    "rebrac, empty cache": ("ReBRAC: first update after the command (s)", ""),
    "rebrac, full cache": ("ReBRAC: the same, compiled before (s)", ""),
    "iql, empty cache": ("IQL: first update after the command (s)", ""),
    "iql, full cache": ("IQL: the same, compiled before (s)", ""),
    "ReBRAC (mse), batch 1024: 3.43 GFLOP": ("ReBRAC (mse), batch 1024: updates/s", "products"),
    "ReBRAC (mse), batch 256: 0.86 GFLOP": ("ReBRAC (mse), batch 256: updates/s", "products"),
    "ReBRAC (hl_gauss), batch 1024: 4.49 GFLOP": ("ReBRAC, batch 1024: updates/s", "products"),
    "ReBRAC (hl_gauss), batch 256: 1.12 GFLOP": ("ReBRAC, batch 256: updates/s", "products"),
    "IQL, batch 256: 0.56 GFLOP": ("IQL, batch 256: updates/s", "products"),
    "CQL, batch 256: 13.49 GFLOP": ("CQL, batch 256: updates/s", "products"),
    "BCQ, batch 256: 7.67 GFLOP": ("BCQ, batch 256: updates/s", "products"),
    "rebrac, 8 seeds": ("ReBRAC, 8 seeds at once: updates/s of all", "one seed"),
    "iql, 8 seeds": ("IQL, 8 seeds at once: updates/s of all", "one seed"),
}
PLAYED = {  # tasks whose evaluation is timed
    "halfcheetah-medium-v2": "HalfCheetah",
    "hopper-medium-v2": "Hopper",
    "walker2d-medium-v2": "Walker2d",
    "antmaze-umaze-v2": "AntMaze",
    "pen-human-v1": "Pen",
}
for task, task_name in PLAYED.items():
    for episodes in ("20 episodes", "200 episodes"):
        title = f"{task_name}, {episodes}: steps/s"
        SPEED[f"{task}, {episodes}"] = (title, "bare environment")
SPEED["halfcheetah-medium-v2, 20 episodes, BCQ"] = (
    "HalfCheetah, 20 episodes, BCQ: steps/s",
    "bare environment",
)


def speed():
    """The benchmark's main rows: median, range, share of something and its range."""
    measured = measured_rows()
    rows = []
    for name, (title, reference) in SPEED.items():
        median, spread, *others = measured[name]
        share = f"{others[0]} ({between(others[1])}) of {reference}" if reference else ""
        rows.append([title, thousands(median), between(spread), share])
    return markdown(["", "median", "min – max", "relative to"], rows)


def between(text):
    low, high = text.split(" to ")
    return f"{thousands(low)} – {thousands(high)}"


def thousands(text):
    return f"{int(text):,}" if text.isdigit() else text


def regulariser_times():
    """The time of an update with each regulariser, relative to the baseline."""
    measured = measured_rows()
    names = [*WHERE, *BEYOND, SCRIPTS["rebrac"].BEST["best"]]
    rows = []
    for algorithm in ("rebrac", "iql"):
        times = [measured[f"{algorithm} {name}"][2] for name in names]
        rows.append([SCRIPTS[algorithm].NAME, *times])
    return markdown(["", *names], rows)


def cost():
    """The days that the paper's experiments take on three machines, and their updates."""
    pattern = r"(.*), batch (\d+): ([\d.]+) GFLOP"
    rates = {}  # days and floating-point operations of an update
    for name, cells in measured_rows().items():
        match = re.fullmatch(pattern, name)
        if match:
            days = 1 / float(cells[0]) / 86400
            rates[match[1], int(match[2])] = np.array([days, 1e9 * float(match[3])])
    five_seeds = 5 * 1_000_000
    rebrac = 24 * rates["ReBRAC (hl_gauss)", 1024] + 12 * rates["ReBRAC (hl_gauss)", 256]
    per_script = {"ReBRAC": five_seeds * rebrac, "IQL": five_seeds * 36 * rates["IQL", 256]}
    rows = []
    for text, factor in (
        ("one configuration on 36 datasets, 5 seeds", 1),
        ("14: the baseline, 12 regularisers, the combination", 14),
        ("the files with `yes` above: the paper", number_of_runs(of_paper=True) / 180),
        ("all of ReBRAC's files", number_of_runs() / 180),
    ):
        row = [text, f"{0.18 * factor:.2f}"]
        for days, operations in per_script.values():
            gpu_days = factor * operations / 2e12 / 86400
            row += [f"{factor * days:,.0f}", f"{gpu_days:,.1f}", f"{gpu_days / 8:,.1f}"]
        rows.append(row)
    header = ["days", "10⁹ updates"]
    for name in per_script:
        header += [f"{name}: two cores", "one GPU", "eight GPUs"]
    return markdown(header, rows)


# --- From the datasets and results ---


def datasets():
    """The bundled datasets, from the files."""
    about = {
        "halfcheetah-medium-replay-v2": "replay buffer of 80,000 steps of SAC",
        "hopper-medium-v2": "rollouts of the policy after 120,000 steps",
        "pen-expert-v1": "rollouts of the policy after 240,000 steps",
        "antmaze-umaze-v2": "an ant of SAC's, led through the maze",
    }
    rows = []
    for name, text in about.items():
        file_name = os.path.basename(d4rl.infos.DATASET_URLS[name])
        with h5py.File(path_of("data", file_name)) as file:
            numbers = dict(file.attrs)
        rows.append([
            name,
            text,
            f"{numbers['episodes']:,}",
            f"{numbers['transitions']:,}",
            f"{numbers['mean_score']:.1f}",
            f"{numbers['best_score']:.1f}",
        ])  # fmt: skip
    return markdown(["dataset", "what it is", "episodes", "steps", "mean score", "best"], rows)


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


CRITICS = dict(hl_gauss="HL-Gauss", mse="squared error")


def trials():
    """The scores of seed 0 by which the study's `actor_bc_coef` was chosen."""
    paths = [path_of("data", "trials.csv"), path_of("data", "study.csv")]
    seeds, _ = read_results(paths)
    plain = [seed for seed in seeds if seed["algorithm"] == "rebrac" and seed["seed"] == 0]
    cells = {}
    for seed in plain:
        config = seed["config"]
        if BASELINE not in seed["labels"]:
            continue
        critic = CRITICS[config["critic_loss"]]
        coefficient = f"{config['actor_bc_coef']:g}"
        if coefficient not in ("0.4", "0.1"):
            coefficient = "the paper's"
        cells[f"{critic}, {coefficient}", config["dataset_name"]] = f"{seed['score']:.1f}"
    rows = []
    for name in ("HL-Gauss, the paper's", "squared error, the paper's", "squared error, 0.4"):
        rows.append([name, *(cells.get((name, dataset), "") for dataset in STUDIED)])
    name = "squared error, 0.1"
    rows.append([name, *(cells[name, dataset] for dataset in STUDIED)])
    return markdown(["critic, `actor_bc_coef`", *STUDIED.values()], rows)


# The study's combinations
COMBINATIONS = {"rebrac": "DO+LN+GrN", "iql": "DO+LN+EN"}


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
            found[algorithm, dataset] = values.reindex([BASELINE, *WHERE, "combination"])
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
    by Holm over both kinds of noise.
    """
    p = {}
    for kind in NOISE:
        for key, values in seeds_by_dataset(kind).T.groupby(level=[0, 1], sort=False):
            changes = values.T - values.T.loc[BASELINE]
            p[kind, *key] = p_values(changes).where(changes.any(axis=1))  # without the same runs
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
        single = [name for name in WHERE if name in cells]
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
            row.append(f"{text}, p {p_text(p[key])}" if key in p else text)
        rows.append(row)
    return markdown(["", "256, rates 3e-4", "1,024, rates 1e-3", "difference"], rows)


def settings_of_bcq(settings):
    """Return those settings of a run that only BCQ has, as a text."""
    own = [f"`{key}` {value}" for key, value in settings if key in ("kl_coef", "regularise")]
    return ", ".join(own)


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


def as_block(table):
    """Return a report's table without its title and note."""
    header, *lines = table.lines()
    return markdown(header, lines)


def studied_datasets(rows):
    """Return the datasets of rows, in the order of STUDIED."""
    return [dataset for dataset in STUDIED if dataset in set(rows["dataset"])]


@functools.cache  # since it is read for two tables and a figure
def less_data_rows(algorithm):
    """Return an algorithm's runs on 2 to 90 % of the episodes, a row for each label.

    ReBRAC has other coefficients on each dataset. That is no setting here.
    """
    seeds, _ = read_results([path_of("data", "second.csv")])
    labels = {BASELINE, "DO", "LN", "L2", "DO+LN", COMBINATIONS[algorithm]}
    own = [seed for seed in seeds if seed["algorithm"] == algorithm]
    table = pd.DataFrame([seed for seed in own if labels.intersection(seed["labels"])])
    table = table.assign(final=table["score"], settings=[()] * len(table))
    ((_, rows),) = shares.groups(table)
    return rows


def less_data(algorithm):
    """The differences from the baseline on less data: the report's table."""
    rows = less_data_rows(algorithm)
    return as_block(shares.share_table("", rows, studied_datasets(rows)))


def less_data_by_dataset(algorithm):
    """The baseline's scores on less data, and the others' differences from it, by dataset.

    Bold is a difference whose p is below 0.05, corrected by Holm over the table.
    """
    rows = less_data_rows(algorithm)
    scores = {}
    gains = {}
    for dataset in studied_datasets(rows):
        own = rows[~rows["label"].isin(same_as_baseline(rows, [dataset]))]
        baseline = shares.by_label_and_share(own, "final", [dataset]).loc[BASELINE]
        means, halves = mean_and_interval(baseline)
        scores[dataset] = [interval_text(*pair, "") for pair in zip(means, halves)]
        gains[dataset] = shares.gains(own, [dataset])
    gains = pd.concat(gains)
    texts, _ = shares.texts_and_p(gains)
    texts = pd.Series(texts, gains.index).unstack(sort=False)  # a column for each share
    lines = []
    for dataset, cells in scores.items():
        lines.append([STUDIED[dataset], BASELINE, *cells])
        for label, cells in texts.loc[dataset].iterrows():
            lines.append([STUDIED[dataset], label, *cells])
    titles = [f"{100 * share:g} %" for share in texts]
    return markdown(["dataset", "regularisers", *titles], lines)


def draw_figures():
    """Draw the scores of CQL and BCQ over the updates, and gains on less data."""
    found = {}
    for algorithm, rows in dict(cql=curves_of("cql"), bcq=second_study_of_bcq()).items():
        labels = rows["label"].cat.remove_unused_categories().cat.categories
        found[f"curves-{algorithm}"] = learning_curves(rows, labels, studied_datasets(rows))
    rows = less_data_rows("iql")
    found["less-data-iql"] = shares.share_figure(rows, studied_datasets(rows))
    for name, figure in found.items():
        path = path_of("data", f"{name}.png")
        figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})


def curves(algorithm):
    """The scores of an algorithm over the updates, from data/curves.csv.

    A row for each combination of regularisers, and of what else is said of BCQ.
    """
    table = curves_of(algorithm)
    table["others"] = table["settings"].map(settings_of_bcq)
    numbers = sorted(table["seed"].unique())
    rows = []
    for key, own in table.groupby(["dataset", "others", "label"], observed=True):
        curve = own.explode(["updates", "scores"]).groupby("updates")["scores"].mean()
        texts = [f"{updates / 1000:g}: {score:.1f}" for updates, score in curve.items()]
        scores = dict(zip(own["seed"], own["score"]))
        last = [f"{scores[number]:.1f}" if number in scores else "–" for number in numbers]
        dataset, others, label = key
        name = f"{label} ({others})" if others else label
        rows.append([dataset, name, ", ".join(texts), ", ".join(last)])
    by_seed = f"at the end, by seed ({', '.join(map(str, numbers))})"
    return markdown(["dataset", "regularisers", "thousand updates: mean score", by_seed], rows)


def gpu():
    """What the benchmark's part `gpu` has measured, if it has run on a GPU."""
    path = path_of("data", "gpu.md")
    if not os.path.exists(path):
        return "Nothing was measured on a GPU yet."
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


BLOCKS = {
    "antmaze": antmaze,
    "coefficients": coefficients,
    "batch": batch,
    "curves-cql": lambda: curves("cql"),
    "curves-bcq": lambda: curves("bcq"),
    "networks-bcq": networks,
    "less-data-iql": lambda: less_data("iql"),
    "less-data-datasets-iql": lambda: less_data_by_dataset("iql"),
    "regularisers": regularisers,
    "findings": findings,
    "sweeps": sweep_files,
    "cost": cost,
    "speed": speed,
    "gpu": gpu,
    "regulariser-times": regulariser_times,
    "datasets": datasets,
    "demo": demo,
    "trials": trials,
    "scores-rebrac": lambda: study_scores("rebrac"),
    "scores-iql": lambda: study_scores("iql"),
    "dead-neurons": lambda: by_dataset("train/dead_neurons", 3),
    "pca-rank": lambda: by_dataset("train/pca_rank", 1),
    "held-out-error": lambda: by_dataset("validation/action_error", 3),
    "action-noise": lambda: under_noise(NOISE[0]),
    "state-noise": lambda: under_noise(NOISE[1]),
}


def readmes():
    """Return the paths of the project's READMEs."""
    paths = [path_of("README.md")]
    for folder in ("data", "harness", "harness/mujoco210", "sweeps", "tests", "tools"):
        paths.append(path_of(folder, "README.md"))
    return paths


def renew(text):
    """Return a README's text with its blocks written anew."""

    def block(match):
        name = match[1]
        if name not in BLOCKS:
            raise UserError(f"there is no block {name!r}; there are {', '.join(BLOCKS)}")
        return f"<!-- begin {name} -->\n{BLOCKS[name]()}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (\S+) -->\n.*?<!-- end \1 -->", block, text, flags=re.DOTALL)


def main():
    changed = []
    for path in readmes():
        with open(path, encoding="utf-8") as file:
            old = file.read()
        new = renew(old)
        if new != old:
            changed.append(os.path.relpath(path, ROOT))
            with open(path, "w", encoding="utf-8") as file:
                file.write(new)
    draw_figures()
    print(f"changed: {', '.join(changed) or 'nothing'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
