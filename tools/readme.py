"""Writes the tables in the READMEs from the data, between markers, and draws their figures.

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

from harness.config import inline_comment
from harness.datasets import DOMAINS
from harness.environments import d4rl
from harness.errors import UserError, one_line_errors
from harness.scripts import ROOT
from tools import readme_long as long
from tools import readme_results as results
from tools import readme_second as second
from tools.readme_results import SCRIPTS, markdown, path_of

WHERE = {  # where a regulariser of the paper acts
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
    "BCN": "noise on the objective: cloned actions (ReBRAC), exponents of the weights (IQL)",
    "GrN": "decaying noise on the gradient, before Adam",
}
BEYOND = {  # the same of those that the paper hasn't
    "RMS": "RMSNorm after each hidden ReLU (not in the paper)",
    "SAM": "sharpness-aware minimisation: the gradient is taken this far uphill (not in the paper)",
}


# --- From the scripts and sweeps ---


def regularisers():
    """The regularisers: flag, where it acts, strength in each script."""
    texts = {**WHERE, **BEYOND}
    rebrac, iql = SCRIPTS.values()
    for name, flags in rebrac.CHOSEN.items():
        if name not in texts and name in iql.CHOSEN:  # a fork's: its field's comment says it
            comment = inline_comment(rebrac.Config, next(iter(flags)))
            texts[name] = comment.comment_inline.removeprefix(f"{name}: ")
    rows = []
    for name, text in texts.items():
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
    total = f"{number_of_runs('rebrac') / 1000:.2f}"
    rows.append(["all of ReBRAC's", "", "", "", "", "", total])
    return markdown(["file", "what varies", "in the paper", *DOMAINS, "10⁹ updates"], rows)


def number_of_runs(algorithm, of_paper=False):
    """Return the runs of an algorithm's files, or of those whose experiments the paper has."""
    number = 0
    for name, runs in experiments(algorithm).items():
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
    rebrac = 24 * rates["ReBRAC (hl_gauss)", 1024] + 12 * rates["ReBRAC (hl_gauss)", 256]
    one_update = {"rebrac": rebrac / 36, "iql": rates["IQL", 256]}  # means over the datasets
    runs = {  # by algorithm
        "one configuration on 36 datasets, 5 seeds": dict.fromkeys(one_update, 180),
        "14: the baseline, 12 regularisers, the combination": dict.fromkeys(one_update, 14 * 180),
        "the files with `yes` above: the paper": {
            name: number_of_runs(name, of_paper=True) for name in one_update
        },
        "all files": {name: number_of_runs(name) for name in one_update},
    }
    rows = []
    for text, numbers in runs.items():
        row = [text]
        for name, number in numbers.items():
            days, operations = number * 1_000_000 * one_update[name]
            gpu_days = operations / 2e12 / 86400
            row += [
                f"{number / 1000:.2f}",
                f"{days:,.0f}",
                f"{gpu_days:,.1f}",
                f"{gpu_days / 8:,.1f}",
            ]
        rows.append(row)
    header = ["days"]
    for name in one_update:
        title = f"{SCRIPTS[name].NAME}: 10⁹ updates"
        header += [title, "two cores", "one GPU", "eight GPUs"]
    return markdown(header, rows)


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


def gpu():
    """What the benchmark's part `gpu` has measured, if it has run on a GPU."""
    path = path_of("data", "gpu.md")
    if not os.path.exists(path):
        return "Nothing was measured on a GPU yet."
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


BLOCKS = {
    "regularisers": regularisers,
    "sweeps": sweep_files,
    "cost": cost,
    "speed": speed,
    "gpu": gpu,
    "regulariser-times": regulariser_times,
    "datasets": datasets,
    "findings": results.findings,
    "files": results.files,
    "scores-rebrac": lambda: results.study_scores("rebrac"),
    "scores-iql": lambda: results.study_scores("iql"),
    "dead-neurons": lambda: results.by_dataset("train/dead_neurons", 3),
    "pca-rank": lambda: results.by_dataset("train/pca_rank", 1),
    "held-out-error": lambda: results.by_dataset("validation/action_error", 3),
    "action-noise": lambda: results.under_noise(results.NOISE[0]),
    "state-noise": lambda: results.under_noise(results.NOISE[1]),
    "reach": results.reach,
    "start": results.start,
    "tau": results.tau,
    "trials": results.trials,
    "coefficients": results.coefficients,
    "demo": results.demo,
    "antmaze": results.antmaze,
    "long": long.table,
    "long-times": long.times,
    "batch": results.batch,
    "curves-cql": lambda: results.curves(results.curves_of("cql")),
    "curves-bcq": lambda: results.curves(results.second_study_of_bcq()),
    "networks-bcq": results.networks,
    "less-data-iql": lambda: second.less_data("iql"),
    "less-data-datasets-iql": lambda: second.less_data_by_dataset("iql"),
    "less-data-rebrac": lambda: second.less_data("rebrac"),
    "less-data-datasets-rebrac": lambda: second.less_data_by_dataset("rebrac"),
    "cloning-rebrac": second.more_cloning,
    "critics-iql": lambda: second.places("iql"),
    "critics-rebrac": lambda: second.places("rebrac"),
    "temperature": second.temperatures,
    "longer": second.longer,
    "repeat-iql": second.repeated,
    "repeat-rebrac": second.other_draws,
    "pairs-iql": second.pairs,
    "explanation-iql": lambda: second.explanation("iql"),
    "explanation-tests-iql": lambda: second.explanation_tests("iql"),
    "explanation-rebrac": lambda: second.explanation("rebrac"),
    "explanation-tests-rebrac": lambda: second.explanation_tests("rebrac"),
    "strengths-dropout": lambda: second.strengths("actor_dropout", (0, 0.1, 0.3, 0.5)),
    "strengths-l2": lambda: second.strengths("actor_wd", (0, 0.001, 0.01, 0.1)),
}
FIGURES = {  # in data/
    "curves-cql": lambda: results.curves_figure(results.curves_of("cql")),
    "curves-bcq": lambda: results.curves_figure(results.second_study_of_bcq()),
    "less-data-iql": lambda: second.less_data_figure("iql"),
    "less-data-rebrac": lambda: second.less_data_figure("rebrac"),
    "second-study": second.front_figure,
    "long": long.figure,
    "interactions-iql": second.interaction_figure,
    "explanation-iql": lambda: second.explanation_figure("iql", "without strong dropout"),
    "explanation-rebrac": lambda: second.explanation_figure("rebrac", "both"),
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


def draw_figure(name, path):
    """Write a figure of FIGURES. The same data and packages make the same file."""
    FIGURES[name]().savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})


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
    for name in FIGURES:
        draw_figure(name, path_of("data", f"{name}.png"))
    print(f"changed: {', '.join(changed) or 'nothing'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
