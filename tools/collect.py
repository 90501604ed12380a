"""Makes datasets in D4RL's format the way D4RL did: online SAC in D4RL's environment, recorded.

    pip install -r tools/requirements-collect.txt  # in the environment that make install has made
    python -m tools.collect --env halfcheetah --kinds '[medium-replay]' --medium_steps 80000

`random` is the untrained policy, `medium` the one after `medium_steps`, and `expert` the one after
`expert_steps`. `medium-replay` and `full-replay` are all that SAC saw up to then. `medium-expert`
is one file after the other. SAC is sbx-rl's with its defaults and 10,000 random first steps.

The files bear D4RL's names: `D4RL_DATASET_DIR=collected python rebrac.py --dataset_name
halfcheetah-medium-replay-v2` finds the one above, which takes about 15 minutes on two cores. Of
Adroit's tasks D4RL has only `expert`. Other kinds get names like D4RL's, such as
pen-medium-replay-v1.hdf5. Give these as `--dataset_path`.
"""

import os
import shlex
import signal
import sys
from dataclasses import dataclass, field
from typing import List

if __name__ == "__main__":  # Ctrl-C shows no traceback in the imports, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
from tqdm import tqdm

from harness.config import parse
from harness.datasets import episode_returns, normalized_score
from harness.environments import d4rl, gym
from harness.errors import UserError, make_folder, one_line_errors
from harness.hdf5 import write_columns

try:  # after gym, which sbx would import aloud
    import gymnasium
    from sbx import SAC
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {error}; first pip install -r tools/requirements-collect.txt")

ENVS = {  # a dataset of each, whose environment it is
    "halfcheetah": "halfcheetah-medium-v2",
    "hopper": "hopper-medium-v2",
    "walker2d": "walker2d-medium-v2",
    "pen": "pen-human-v1",
    "door": "door-human-v1",
    "hammer": "hammer-human-v1",
    "relocate": "relocate-human-v1",
}
KINDS = ("random", "medium-replay", "medium", "full-replay", "expert", "medium-expert")


@dataclass
class Config:
    env: str = "halfcheetah"  # see ENVS
    kinds: List[str] = field(default_factory=lambda: ["medium-replay"])  # to write: see KINDS
    medium_steps: int = 80_000  # environment steps of SAC up to the medium policy
    expert_steps: int = 1_000_000  # environment steps of SAC up to the expert policy
    transitions: int = 1_000_000  # at least, in whole episodes, in random, medium and expert
    seed: int = 0  # of SAC, the environment and the rollouts
    directory: str = "collected"  # where the files go


def check(config):
    """Raise UserError if the config makes no sense, before any work."""
    for words, known in (([config.env], ENVS), (config.kinds, KINDS)):
        unknown = sorted(set(words) - set(known))
        if unknown:
            raise UserError(f"unknown {', '.join(unknown)}; there are {', '.join(known)}")
    if not config.kinds:
        raise UserError(f"kinds names no dataset; there are {', '.join(KINDS)}")
    if config.seed < 0:
        raise UserError("seed must be 0 or more")
    if config.medium_steps < 1 or config.transitions < 1:
        raise UserError("medium_steps and transitions must be 1 or more")
    if needs(config, "full-replay", "expert") and config.expert_steps <= config.medium_steps:
        raise UserError(f"expert_steps must be above medium_steps, {config.medium_steps}")


def needs(config, *kinds):
    """Return whether one of the kinds is to be written, or is a part of one that is."""
    wanted = set(config.kinds)
    if "medium-expert" in wanted:
        wanted |= {"medium", "expert"}
    return bool(wanted & set(kinds))


class Recorder(gymnasium.Env):
    """A D4RL environment under gymnasium's interface, which sbx needs. It keeps every step."""

    def __init__(self, name, seed):
        self.env = gym.make(name)
        self.env.seed(seed)
        actions = self.env.action_space
        size = self.env.observation_space.shape
        self.action_space = gymnasium.spaces.Box(actions.low, actions.high, dtype=np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, size, np.float32)
        self.steps = []

    def reset(self, *, seed=None, options=None):
        self.observation = self.env.reset().astype(np.float32)
        return self.observation, {}

    def step(self, action):
        observation, reward, done, info = self.env.step(action)
        timeout = info.get("TimeLimit.truncated", False)
        terminal = done and not timeout
        self.steps.append((self.observation, action, np.float32(reward), terminal, timeout))
        self.observation = observation.astype(np.float32)
        return self.observation, float(reward), terminal, timeout, {}

    def dataset(self):
        """Return the arrays of all steps, as D4RL's files have them."""
        keys = ("observations", "actions", "rewards", "terminals", "timeouts")
        return {key: np.array(column) for key, column in zip(keys, zip(*self.steps))}


def rollout(config, model, number):
    """Return a dataset of whole episodes of the model's stochastic policy.

    `number` distinguishes the rollouts of a config: each has a seed of its own.
    """
    env = Recorder(ENVS[config.env], config.seed + number)
    with tqdm(total=config.transitions, desc="rollout", disable=not sys.stderr.isatty()) as bar:
        while len(env.steps) < config.transitions:
            observation, _ = env.reset()
            done = False
            while not done:
                action, _ = model.predict(observation, deterministic=False)
                observation, _, terminal, timeout, _ = env.step(action)
                done = terminal or timeout
                bar.update()
    return env.dataset()


def summary(data, name):
    """Return the numbers of episodes and transitions, and the episodes' mean and best score."""
    scores = normalized_score(name, episode_returns(name, data))
    return dict(
        episodes=len(scores),
        transitions=len(data["rewards"]),
        mean_score=scores.mean(),
        best_score=scores.max(),
    )


def file_path(config, kind):
    """Return the path of a dataset's file, whose name is D4RL's own where D4RL has one."""
    version = ENVS[config.env].split("-")[-1]
    dataset = f"{config.env}-{kind}-{version}"
    url = d4rl.infos.DATASET_URLS.get(dataset, f"{dataset}.hdf5")
    return os.path.join(config.directory, os.path.basename(url))


def write(config, kind, data):
    """Write a dataset's file if it is wanted, and print a line about it."""
    if kind not in config.kinds:
        return
    path = file_path(config, kind)
    about = summary(data, ENVS[config.env])
    made_by = f"python -m tools.collect {shlex.join(sys.argv[1:])}"
    algorithm = f"sbx-rl SAC, seed {config.seed}"
    write_columns(path, data, dict(made_by=made_by, algorithm=algorithm, **about), level=9)
    print(path, *(f"{key} {value:.6g}" for key, value in about.items()), flush=True)


def collect(config):
    """Train SAC up to the best policy that is needed, and write the datasets on the way."""
    env = Recorder(ENVS[config.env], config.seed)
    model = SAC("MlpPolicy", env, learning_starts=10_000, seed=config.seed)
    has_bar = sys.stderr.isatty()
    if needs(config, "random"):
        write(config, "random", rollout(config, model, 1))
    if not needs(config, *KINDS[1:]):
        return
    model.learn(config.medium_steps, progress_bar=has_bar)
    write(config, "medium-replay", env.dataset())
    if needs(config, "medium"):
        medium = rollout(config, model, 2)
        write(config, "medium", medium)
    if not needs(config, "full-replay", "expert"):
        return
    steps = config.expert_steps - config.medium_steps
    model.learn(steps, reset_num_timesteps=False, progress_bar=has_bar)
    write(config, "full-replay", env.dataset())
    if needs(config, "expert"):
        expert = rollout(config, model, 3)
        write(config, "expert", expert)
    if needs(config, "medium-expert"):
        both = {key: np.concatenate([medium[key], expert[key]]) for key in medium}
        write(config, "medium-expert", both)


def main():
    config = parse(Config)
    check(config)
    make_folder(config.directory)
    collect(config)


if __name__ == "__main__":
    with one_line_errors():
        main()
