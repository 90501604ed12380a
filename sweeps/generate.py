"""Writes the experiments and the two studies of data/README.md as W&B sweeps.

    python sweeps/generate.py  # as they are in the repository: each seed is a run of its own
    python sweeps/generate.py --num_seeds 5 --directory five  # five in a run, for a GPU with room

They go to sweeps/<algorithm>/<domain>/<experiment>.yaml, and the studies beside the domains. With
seeds together sums are rounded otherwise, and results differ by that.
"""

import argparse
import itertools
import math
import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C shows no traceback in the imports, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The scripts beside this folder, and not another checkout's that is installed
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import yaml

from harness.datasets import DOMAINS, domain
from harness.errors import UserError, disk_errors, one_line_errors
from harness.scripts import scripts

# Experiments: what varies, and whether the paper has it
EXPERIMENTS = {
    "baseline": ("the baseline", "yes"),
    "dropout": ("dropout", "yes; IQL without 0.75 and 0.9"),
    "weight_decay": ("L2, L1 and the elastic net", "yes"),
    "normalisation": ("each normalisation", "yes; IQL without BN and SN"),
    "input_noise": ("input noise", "yes"),
    "objective_noise": ("objective noise", "yes"),
    "gradient_noise": ("gradient noise", "yes"),
    "combinations": (
        "two to four regularisers at the strengths chosen for them",
        "yes; of IQL five",
    ),
    "lr_decay": ("DO and DO+LN with decay of the actor's learning rate", "ReBRAC's linear alone"),
    "tuning": ("the combination that is tuned for each dataset", "yes, but see below"),
    "as_run": ("the published configurations, on all data", "yes"),
    "data_scaling": ("less data", "ReBRAC's baseline alone"),
    "final": ("the baseline, and best regularisers, with all else equal, on all data", "no"),
    "batch": ("batch size and rates of as_run, with and without its regularisers", "no"),
    "pairs": ("all pairs of regularisers", "no"),
    "triples": ("dropout, a normalisation, and one more", "no"),
    "robustness": ("scores under noise, for each regulariser", "no"),
    "critic": ("regularised critics, the actor as in the baseline", "no: its open question"),
    "td3_bc": ("TD3+BC on all data", "no"),
    "networks": ("each regulariser on the decoder, the perturbation network, both", "no"),
    "rms_and_sam": ("RMSNorm, sharpness-aware minimisation, and both", "no"),
}
NUM_SEEDS = {"final": 10, "as_run": 10}  # else 5
PAPERS_DATASETS = list(getattr(scripts().get("rebrac"), "TUNED", []))

NORMALISATIONS = ["LN", "FN", "GN", "BN", "SN"]
BEYOND = ["RMS", "SAM"]  # regularisers that the paper hasn't; only `rms_and_sam` has them
DROPOUTS = [0.1, 0.2, 0.3, 0.5, 0.75, 0.9]
WEIGHT_DECAYS = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
NOISES = [0.003, 0.01, 0.03, 0.1, 0.3]
RADII = [0.01, 0.05, 0.1]  # of SAM, around its original's default
ROBUSTNESS = [[0.2, 0.0], [0.0, 0.05]]  # standard deviations of noise on actions and on states

# Those that the paper compares
COMBINATIONS = """
DO+LN DO+L2 DO+L1 DO+EN LN+L2 LN+L1 LN+EN
DO+LN+GrN DO+LN+InN DO+LN+BCN DO+LN+L2 DO+LN+L1 DO+LN+EN DO+EN+GrN DO+EN+BCN
DO+LN+GrN+L2 DO+LN+GrN+L1 DO+LN+GrN+EN DO+LN+BCN+L2
""".split()
DECAYS = ["cosine", "linear", "exponential"]

# The study of data/README.md
STUDY_DATASETS = ["halfcheetah-medium-replay-v2", "hopper-medium-v2", "pen-expert-v1"]
STUDY = dict(
    batch_size=[256],
    num_updates=[20_000],
    eval_every=[20_000],
    eval_episodes=[100],  # many, since there is one evaluation and scores differ much
    validation_frac=[0.1],
    validation_seed=[0],
)
# The squared-error critic, and the largest of the paper's coefficients: with those for D4RL's
# larger files ReBRAC's actor leaves the study's data, which tools/collect.py has made, in part.
STUDY_OF = {
    "rebrac": dict(critic_loss=["mse"], actor_bc_coef=[0.1]),
    "cql": dict(actor_learning_rate=[3e-4]),
}

# Its second study: where do regularisers help?
SECOND_PARTS = {
    "coefficients": "how its coefficients were chosen, on seeds of their own",
    "start": "HL-Gauss whose Q starts at 0, on HalfCheetah",
    "antmaze_tau": "AntMaze with the squared error, by the step of the targets",
    "batch": "the published batch and rates of Adroit, and the published regularisers",
    "less_data": "2 to 90 % of the episodes",
    "dropout": "strengths of dropout on 10 % of the episodes",
    "l2": "strengths of weight decay on 10 % of the episodes",
    "both_ln": "LayerNorm in the actor, in the critics, in both",
    "both_dropout": "dropout in the actor, in the critics, in both",
    "both_l2": "weight decay in the actor, in the critics, in both",
    "cloning": "DO+LN on 2 and 5 % of the episodes with more cloning",
    "repeat": "DO+LN on 2 and 5 % of the episodes once more, with other episodes",
    "repeat_critics": "LayerNorm in the critics once more, with new seeds",
    "longer_critics": "LayerNorm in the critics, ten times as long",
    "longer_both": "LayerNorm in the critics and in the actor, ten times as long",
    "temperature": "LayerNorm in the critics on 10 % of the episodes, with other temperatures",
    "repeat_hopper": "LayerNorm in the actor on 2 % of Hopper once more, with new seeds",
    "pairs": "all pairs on 10 % of the episodes",
    "curves": "learning curves",
    "pen": "Adroit",
    "networks": "regularisers on each of its networks",
    "hopper_curves": "learning curves on Hopper, with the original's weight of the KL divergence",
    "hopper_networks": "its networks on Hopper, with the original's weight of the KL divergence",
    "antmaze": "AntMaze, on a full file of the project's own",
    "long": "one long run",
}
NEW_SEEDS = [20, 21, 22, 23, 24]  # of repetitions
OTHER_DRAWS = [1, 2, 3, 4, 5, 6, 7, 8]  # of the held-out episodes; all other parts have draw 0
SECOND = dict(
    STUDY,
    num_updates=[10_000],
    eval_every=[10_000],
    seed=[0, 1, 2, 3, 4],
    dataset_name=STUDY_DATASETS,
)
SECOND_OF = {  # the settings that fit the bundled data and two cores
    "rebrac": dict(
        batch_size=[128],
        actor_bc_coef=[0.3],
        critic_bc_coef=[0],
        dataset_name=["pen-expert-v1"],  # see parts_for_rebrac
    ),
    "iql": dict(batch_size=[128]),
    "cql": dict(batch_size=[64], actor_learning_rate=[3e-4], eval_episodes=[50]),
    "bcq": dict(batch_size=[100], eval_episodes=[20]),
}
LESS_DATA = [0.1, 0.75, 0.9, 0.95, 0.98]  # shares of the episodes that are held out
FULL_AND_LESS = dict(validation_frac=[0.1, 0.9])
LONG = dict(
    batch_size=[256],
    num_updates=[1_000_000],
    eval_every=[50_000],
    seed=[0],
    dataset_name=STUDY_DATASETS[:1],
)
CURVES = dict(eval_every=[2000], seed=[0, 1, 2], dataset_name=STUDY_DATASETS[:2])


def grids(script, domain_name):
    """Return the grid of each experiment in a domain: flags by lists of their values.

    Without the paper's tuned values an algorithm has no `tuning`, `as_run` or `final`.
    """
    chosen = papers_regularisers(script)
    best = ["none", *reversed(script.BEST)]  # a single regulariser, then the combination
    presets = getattr(script, "PRESETS", {})
    published = [name for name in presets if name.startswith("as-run")]
    decays = [name for name in [*DECAYS, "none"] if name != script.Config.actor_lr_decay]
    held_out = {  # with 5 % of the episodes held out, as where the paper chose
        "baseline": {},
        "dropout": dict(actor_dropout=DROPOUTS),
        "weight_decay": dict(actor_wd=WEIGHT_DECAYS, actor_l1_ratio=[0, 1, 0.5]),
        "normalisation": dict(regularisers=NORMALISATIONS),
        "input_noise": dict(actor_input_noise=NOISES),
        "objective_noise": dict(actor_bc_noise=NOISES),
        "gradient_noise": dict(actor_grad_noise=NOISES),
        "combinations": dict(regularisers=COMBINATIONS),
        "lr_decay": dict(regularisers=["DO", "DO+LN"], actor_lr_decay=decays),
        "pairs": dict(regularisers=pairs(chosen)),
        "triples": dict(regularisers=triples(chosen)),
        "critic": dict(critic_ln=[False, True], critic_dropout=[0, 0.1], critic_wd=[0, 0.001]),
        "rms_and_sam": dict(actor_rms=[False, True], actor_sam=[0, *RADII]),
    }
    found = {
        "robustness": dict(regularisers=["none", *chosen], eval_noise=[ROBUSTNESS]),
        "data_scaling": dict(regularisers=best, validation_frac=[0.1, 0.25, 0.5, 0.75, 0.9]),
    }
    if published:
        found["as_run"] = dict(preset=published)
    if script.BEST:
        found["final"] = dict(regularisers=best)
        held_out["tuning"] = script.TUNING_GRID
    if domain_name == "adroit" and "batch-1024" in presets:
        found["batch"] = dict(preset=["none", "batch-1024"], regularisers=["none", "best"])
    if "td3-bc" in presets:
        found["td3_bc"] = dict(preset=["td3-bc"])
    if hasattr(script.Config, "regularise"):
        networks = ["decoder", "perturbation", "both"]
        held_out["networks"] = dict(regularise=networks, regularisers=["none", *chosen])
    for name, grid in held_out.items():
        found[name] = dict(grid, validation_frac=[0.05])
    return found


def papers_regularisers(script):
    """Return the flags in CHOSEN of the paper's regularisers, and of a fork's own."""
    return {name: flags for name, flags in script.CHOSEN.items() if name not in BEYOND}


def pairs(chosen):
    """Return the pairs of regularisers that share no flag, as two weight decays do."""
    found = []
    for a, b in itertools.combinations(chosen, 2):
        if not chosen[a].keys() & chosen[b].keys():
            found.append(f"{a}+{b}")
    return found


def triples(chosen):
    """Return dropout with a normalisation and another regulariser, in all ways."""
    others = [name for name in chosen if name not in ("DO", *NORMALISATIONS)]
    return [f"DO+{norm}+{other}" for norm, other in itertools.product(NORMALISATIONS, others)]


def study(algorithm, script):
    """Return the grid of the study of data/README.md, which two cores can train."""
    others = [name for name in papers_regularisers(script) if name not in NORMALISATIONS]
    regularisers = ["none", *NORMALISATIONS, *others, script.BEST.get("best", "DO+LN")]
    return {**STUDY_OF.get(algorithm, {}), "regularisers": regularisers, **STUDY}


def second_study(algorithm, script):
    """Return the grids of the second study, none for an algorithm of one's own."""
    if algorithm not in SECOND_OF:
        return {}
    if algorithm == "rebrac":
        parts = parts_for_rebrac(parts_for_both(script))
    elif algorithm == "iql":
        parts = {**parts_for_both(script), **parts_for_iql(script)}
    else:
        parts = parts_for_others(script)
    found = {}
    for name, grid in parts.items():
        grid = {**SECOND, **SECOND_OF[algorithm], **grid}
        found[name] = {flag: values for flag, values in grid.items() if values is not None}
    return found


def second_title(name):
    """Return what a part of the second study is about."""
    part = name.removeprefix("halfcheetah_")
    on = "" if part == name else ", on HalfCheetah with the squared error"
    return SECOND_PARTS[part] + on


def parts_for_both(script):
    """Return the second study's parts that ReBRAC and IQL have."""
    best = script.BEST.get("best")
    l2 = script.CHOSEN["L2"]["actor_wd"]
    regularisers = ["none", "DO", "LN", "L2", "DO+LN", best]
    return {
        "less_data": dict(regularisers=regularisers, validation_frac=LESS_DATA),
        "both_ln": dict(actor_ln=[False, True], critic_ln=[False, True], **FULL_AND_LESS),
        "both_dropout": dict(actor_dropout=[0, 0.1], critic_dropout=[0, 0.1], **FULL_AND_LESS),
        "both_l2": dict(actor_wd=[0, l2], critic_wd=[0, l2], **FULL_AND_LESS),
    }


def parts_for_rebrac(for_both):
    """Return ReBRAC's parts, in which each dataset has coefficients of its own.

    They are data/README.md's choice. On HalfCheetah it isn't HL-Gauss, whose Q starts far too high
    there: in the middle of its range. `start` has a range around 0, up to the data's largest return
    to go. Hopper is left out, since no choice reliably beats the data there.
    """
    cheetah = dict(dataset_name=STUDY_DATASETS[:1], critic_loss=["mse"])
    own = dict(cheetah, actor_bc_coef=[0.1], critic_bc_coef=[0.1])
    on_cheetah = {f"halfcheetah_{name}": {**grid, **own} for name, grid in for_both.items()}
    coefficients = dict(
        actor_bc_coef=[0.03, 0.1, 0.3, 1.0],
        critic_bc_coef=[0, 0.1],
        seed=[10, 11, 12],
        dataset_name=STUDY_DATASETS,
    )
    little_data = dict(regularisers=["none", "DO+LN"], validation_frac=[0.95, 0.98])
    repeat = dict(validation_seed=OTHER_DRAWS, seed=NEW_SEEDS[:1])
    start = dict(v_min=[-420.0], v_max=[420.0], seed=coefficients["seed"])
    start |= dict(actor_bc_coef=[0.1], critic_bc_coef=[0.1], dataset_name=STUDY_DATASETS[:1])
    tau = dict(tau=[0.005, 0.02], critic_loss=["mse"], seed=[0], dataset_name=["antmaze-umaze-v2"])
    tau |= dict(num_updates=[60_000], eval_every=[10_000], analysis=[False])
    tau |= dict.fromkeys(["validation_frac", "validation_seed"])
    batch = dict(preset=["none", "batch-1024"], regularisers=["none", "best"])
    papers = dict.fromkeys(["batch_size", "actor_bc_coef", "critic_bc_coef"])
    return {
        **on_cheetah,
        **for_both,
        "coefficients": coefficients,
        "halfcheetah_coefficients": {**coefficients, **cheetah},
        "halfcheetah_repeat": {**little_data, **repeat, **own},
        "halfcheetah_cloning": {**little_data, **own, "actor_bc_coef": [0.3, 1.0]},
        "start": start,
        "antmaze_tau": {**tau, **papers},
        "batch": {**batch, **papers},  # with the preset's batch, and the paper's coefficients
        "long": {**LONG, **own},
    }


def parts_for_iql(script):
    chosen = papers_regularisers(script)
    all_pairs = ["none", *chosen, *pairs(chosen)]
    longer = dict(validation_frac=[0.1], num_updates=[100_000], eval_every=[20_000])
    return {
        "long": LONG,
        "dropout": dict(actor_dropout=[0, 0.1, 0.3, 0.5], validation_frac=[0.9]),
        "l2": dict(actor_wd=[0, 0.001, 0.01, 0.1], validation_frac=[0.9]),
        "repeat_critics": dict(critic_ln=[False, True], validation_frac=[0.1], seed=NEW_SEEDS),
        "longer_critics": dict(
            longer,
            critic_ln=[False, True],
            dataset_name=[STUDY_DATASETS[0], STUDY_DATASETS[2]],
        ),
        "longer_both": dict(
            longer,
            critic_ln=[True],
            actor_ln=[True],
            dataset_name=STUDY_DATASETS[:1],
        ),
        "temperature": dict(
            critic_ln=[True],
            actor_ln=[False, True],
            temperature=[0, 12],
            validation_frac=[0.9],
            seed=[0, 1, 2],
            dataset_name=STUDY_DATASETS[:1],
        ),
        "repeat_hopper": dict(
            regularisers=["none", "LN"],
            validation_frac=[0.98],
            seed=NEW_SEEDS,
            dataset_name=STUDY_DATASETS[1:2],
        ),
        "pairs": dict(
            regularisers=all_pairs,
            validation_frac=[0.9],
            seed=[0, 1, 2],
            dataset_name=STUDY_DATASETS[:1],
        ),
        "antmaze": dict(
            regularisers=["none", script.BEST["best"]],
            batch_size=[256],
            validation_frac=None,
            validation_seed=None,
            num_updates=[100_000],
            eval_every=[20_000],
            dataset_name=["antmaze-umaze-v2"],
        ),
    }


def parts_for_others(script):
    """Return the second study's parts of CQL, and of BCQ, which has two networks.

    BCQ learns nothing on HalfCheetah with the original's weight of the KL divergence. On Hopper
    it is slower with a smaller one.
    """
    four = dict(CURVES, regularisers=["none", "DO", "LN", "DO+LN"])
    if not hasattr(script.Config, "regularise"):
        pen = dict(CURVES, dataset_name=["pen-expert-v1"], regularisers=["none", "DO+LN"])
        return {"curves": four, "pen": pen}
    networks = dict(CURVES, regularise=["decoder", "perturbation", "both"], regularisers=["DO+LN"])
    cheetah = dict(dataset_name=STUDY_DATASETS[:1], kl_coef=[0.1])
    hopper = dict(dataset_name=STUDY_DATASETS[1:2])
    return {
        "curves": {**four, **cheetah},
        "networks": {**networks, **cheetah},
        "hopper_curves": {**four, **hopper},
        "hopper_networks": {**networks, **hopper},
    }


def write_sweep(path, name, program, title, grid):
    """Write the YAML file of a sweep. `grid` maps flags to lists of values."""
    num_runs = math.prod(len(values) for values in grid.values())
    num_updates = grid.get("num_updates", [1_000_000])[0]
    runs = "1 run" if num_runs == 1 else f"{num_runs:,} runs"
    lines = [
        f"# {title}. {runs} of {num_updates:,} updates. See generate.py.",
        f"name: {name}",
        "project: regularised-actors",
        f"program: {program}",
        "method: grid",
        "metric: {name: score, goal: maximize}",
        'command: ["${env}", "${interpreter}", "${program}", "${args}"]',
        "parameters:",
    ]
    for flag, values in grid.items():
        parameter = {"values": values} if len(values) > 1 else {"value": values[0]}
        text = yaml.safe_dump(parameter, default_flow_style=True, width=90).strip()
        lines.append(f"  {flag}: " + text.replace("\n", "\n  "))
    text = "\n".join(lines) + "\n"
    with disk_errors(path):
        if os.path.exists(path):
            with open(path) as file:
                if file.read() == text:
                    return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(text)
    print(f"wrote {path}")


def write_sweeps(directory, algorithm, script, seeds_in_a_run):
    """Write all sweeps of an algorithm."""

    def write(path, about, grid):
        seeds = grid["seed"]
        if seeds_in_a_run > 1:
            grid = {**grid, "seed": seeds[::seeds_in_a_run]}
            grid["num_seeds"] = [min(seeds_in_a_run, len(seeds))]
        name = f"{algorithm}-{path.replace('/', '-')}"
        file = os.path.join(directory, algorithm, f"{path}.yaml")
        write_sweep(file, name, f"{algorithm}.py", f"{script.NAME}{about}", grid)

    for key, words in DOMAINS.items():
        datasets = [name for name in PAPERS_DATASETS if domain(name) == key]
        for name, grid in grids(script, key).items():
            about = f" on {words}: {EXPERIMENTS[name][0]}"
            seeds = [*range(NUM_SEEDS.get(name, 5))]
            write(f"{key}/{name}", about, {**grid, "seed": seeds, "dataset_name": datasets})
    grid = {**study(algorithm, script), "seed": [0, 1, 2, 3, 4], "dataset_name": STUDY_DATASETS}
    write("study", " in the settings of the study in data/README.md", grid)
    for name, grid in second_study(algorithm, script).items():
        write(f"second_study/{name}", f", second study: {second_title(name)}", grid)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--num_seeds", type=int, default=1, choices=(1, 5), help="seeds in a run")
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument("--directory", default=here, help="where they go; default: here")
    given = parser.parse_args()
    if not PAPERS_DATASETS:
        raise UserError("the datasets come from rebrac.py: put it back beside your own script")
    for algorithm, script in scripts().items():
        write_sweeps(given.directory, algorithm, script, given.num_seeds)


if __name__ == "__main__":
    with one_line_errors():
        main()
