"""Writes the paper's experiments as W&B sweeps, sweeps/<algorithm>/<domain>/<experiment>.yaml, and the README's study.

python sweeps/generate.py                # as they are in the repository: each seed is a run of its own
python sweeps/generate.py --num_seeds 5  # five in a run, for a GPU with room; results differ by rounding alone
"""

import argparse
import itertools
import math
import os

import yaml

NAMES = {"rebrac": "ReBRAC", "iql": "IQL", "gym": "Gym-MuJoCo", "antmaze": "AntMaze", "adroit": "Adroit"}
KINDS = "random", "medium", "expert", "medium-replay", "medium-expert", "full-replay"
MAZES = "umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"
DEMONSTRATIONS = "human", "cloned", "expert"
DATASETS = {
    "gym": [f"{env}-{kind}-v2" for env in ("halfcheetah", "hopper", "walker2d") for kind in KINDS],
    "antmaze": [f"antmaze-{maze}-v2" for maze in MAZES],
    "adroit": [f"{hand}-{kind}-v1" for hand in ("pen", "door", "hammer", "relocate") for kind in DEMONSTRATIONS],
}
STUDY = ["halfcheetah-medium-replay-v2", "hopper-medium-v2", "pen-expert-v1"]
DECAYS, NORMS, NOISES = ("L2", "L1", "EN"), ("LN", "FN", "GN", "BN", "SN"), ("InN", "BCN", "GrN")
ALL = ("DO", *NORMS, *DECAYS, *NOISES)
# Of the weight decays at most one, since L2, L1 and the elastic net are one flag's values
PAIRS = [f"{a}+{b}" for a, b in itertools.combinations(ALL, 2) if not {a, b} <= set(DECAYS)]
TRIPLES = [f"DO+{norm}+{other}" for norm in NORMS for other in DECAYS + NOISES]
NOISE_GRID = [0.003, 0.01, 0.03, 0.1, 0.3]
DROPOUT_GRID = [0.1, 0.2, 0.3, 0.5, 0.75, 0.9]
WD_GRID = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
ROBUSTNESS = [[0.2, 0.0], [0.0, 0.05]]  # standard deviations of the noise on actions and on states


def experiments(algorithm):
    """By the experiment's name: what it is, the number of seeds, and its grid, flags by their values."""
    best = ["none", {"rebrac": "best-L2", "iql": "best-L1"}[algorithm], "best"]
    third = {
        "rebrac": dict(actor_grad_noise=[0, 0.003, 0.01]),
        "iql": dict(actor_wd=[0, 0.001, 0.01], actor_l1_ratio=0.5),
    }
    tuning = dict(validation_frac=0.05)
    return {
        "baseline": ("no regulariser", 5, tuning),
        "dropout": ("dropout", 5, dict(actor_dropout=DROPOUT_GRID, **tuning)),
        "weight_decay": ("L2, L1 and the elastic net", 5, dict(actor_wd=WD_GRID, actor_l1_ratio=[0, 1, 0.5], **tuning)),
        "normalisation": ("each normalisation", 5, dict(regularisers=[*NORMS], **tuning)),
        "input_noise": ("input noise", 5, dict(actor_input_noise=NOISE_GRID, **tuning)),
        "objective_noise": ("objective noise", 5, dict(actor_bc_noise=NOISE_GRID, **tuning)),
        "gradient_noise": ("gradient noise", 5, dict(actor_grad_noise=NOISE_GRID, **tuning)),
        "pairs": ("pairs of regularisers at their chosen strengths", 5, dict(regularisers=PAIRS, **tuning)),
        "triples": ("dropout, a normalisation, and one more", 5, dict(regularisers=TRIPLES, **tuning)),
        "tuning": (
            "the combination that is tuned for each dataset",
            5,
            dict(actor_ln=[False, True], actor_dropout=[0, 0.1, 0.2], **third[algorithm], **tuning),
        ),
        "final": ("the tuned ones against none, on all data", 10, dict(regularisers=best)),
        "robustness": ("scores under noise", 5, dict(regularisers=["none", *ALL], eval_noise=ROBUSTNESS)),
        "data_scaling": ("less data", 5, dict(regularisers=best, validation_frac=[0.1, 0.25, 0.5, 0.75, 0.9])),
        "critic": (
            "regularised critics, the actor plain",
            5,
            dict(critic_ln=[False, True], critic_dropout=[0, 0.1], critic_wd=[0, 0.001], **tuning),
        ),
    }  # fmt: skip


def study(algorithm):
    """The grid of the README's study, which two cores can train; collect.py makes two of its datasets.

    ReBRAC has the squared-error critic and the largest of the paper's coefficients: with those for D4RL's larger files
    its actor leaves these (README). The one evaluation has many episodes, since their scores differ much.
    """
    combination = {"rebrac": "DO+LN+GrN", "iql": "DO+LN+EN"}[algorithm]
    return dict(
        **dict(rebrac=dict(critic_loss="mse", actor_bc_coef=0.1), iql={})[algorithm],
        regularisers=["none", *NORMS, "DO", *DECAYS, *NOISES, combination],
        batch_size=256, num_updates=20_000, eval_every=20_000, eval_episodes=100, validation_frac=0.1,
        validation_seed=0,
    )  # fmt: skip


def write(config, algorithm, path, about, datasets, seeds, grid):
    """Writes a sweep's YAML."""
    values = {**grid, "seed": [*range(0, seeds, config.num_seeds)], "dataset_name": datasets}
    if config.num_seeds > 1:
        values["num_seeds"] = config.num_seeds
    varied = {key: value for key, value in values.items() if isinstance(value, list) and key != "eval_noise"}
    runs, updates = math.prod(map(len, varied.values())), grid.get("num_updates", 1_000_000)
    lines = [
        f"# {NAMES[algorithm]}{about}. {runs:,} runs of {updates:,} updates. See generate.py.",
        f"name: {algorithm}-{path.replace('/', '-')}",
        "project: regularised-actors",
        f"program: {algorithm}.py",
        "method: grid",
        "metric: {name: score, goal: maximize}",
        'command: ["${env}", "${interpreter}", "${program}", "${args}"]',
        "parameters:",
    ]
    for key, value in values.items():
        text = yaml.safe_dump({"values" if key in varied else "value": value}, default_flow_style=True, width=90)
        lines.append(f"  {key}: " + text.strip().replace("\n", "\n  "))
    file = os.path.join(config.directory, algorithm, f"{path}.yaml")
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "w") as output:
        output.write("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--num_seeds", type=int, default=1, choices=(1, 5), help="seeds in a run")
    parser.add_argument("--directory", default=os.path.dirname(os.path.abspath(__file__)))
    config = parser.parse_args()
    for algorithm in ("rebrac", "iql"):
        for domain, (experiment, (about, seeds, grid)) in itertools.product(DATASETS, experiments(algorithm).items()):
            about = f" on {NAMES[domain]}: {about}"
            write(config, algorithm, f"{domain}/{experiment}", about, DATASETS[domain], seeds, grid)
        write(config, algorithm, "study", ": the README's study", STUDY, 5, study(algorithm))


if __name__ == "__main__":
    main()
