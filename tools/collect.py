"""Makes datasets in D4RL's format the way D4RL did: online SAC in D4RL's environment, recorded.

    pip install -r requirements-collect.txt  # in the virtual environment that make install has made
    python collect.py --env halfcheetah --kinds '[medium-replay]' --medium_steps 80000 --seed 0 --directory data

`random` is the untrained policy, `medium` the one after `medium_steps`, `expert` the one after `expert_steps`;
`medium-replay` and `full-replay` are all that SAC saw up to then; `medium-expert` is one file after the other. The
files bear D4RL's names: `D4RL_DATASET_DIR=data python rebrac.py --dataset_name halfcheetah-medium-replay-v2` finds the
one above, which takes about 15 minutes on two cores. SAC is sbx-rl's, with its defaults and 10,000 random first steps.
Adroit's tasks, of whose kinds D4RL has only `expert`, get files such as pen-medium-replay-v1.hdf5, too, to be named by
`--dataset_path`.
"""

import os
import shlex
import sys
from dataclasses import dataclass, field
from typing import List

from mujoco210 import d4rl, gym  # isort: skip  (before sbx, which also imports gym, but not silently)

import gymnasium
import h5py
import numpy as np
from sbx import SAC
from tqdm import tqdm

from runs import parse

ENVS = {env: f"{env}-medium-v2" for env in ("halfcheetah", "hopper", "walker2d")}
ENVS |= {env: f"{env}-human-v1" for env in ("pen", "door", "hammer", "relocate")}
KINDS = ("random", "medium-replay", "medium", "full-replay", "expert", "medium-expert")


@dataclass
class Config:
    env: str = "halfcheetah"  # see ENVS
    kinds: List[str] = field(default_factory=lambda: ["medium-replay"])  # which datasets to write: see KINDS
    medium_steps: int = 80_000  # environment steps of SAC up to the medium policy
    expert_steps: int = 1_000_000  # and up to the expert
    transitions: int = 1_000_000  # at least so many, in whole episodes, in random, medium and expert
    seed: int = 0  # of SAC, the environment and the rollouts
    directory: str = "data"  # where the files go


class Recorder(gymnasium.Env):
    """A D4RL environment under gymnasium's interface, which sbx needs; it keeps every step that is taken in it."""

    def __init__(self, name, seed):
        self.env = gym.make(name)
        self.env.seed(seed)
        low, high = self.env.action_space.low, self.env.action_space.high
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, self.env.observation_space.shape, np.float32)
        self.steps = []

    def reset(self, *, seed=None, options=None):
        self.observation = self.env.reset().astype(np.float32)
        return self.observation, {}

    def step(self, action):
        observation, reward, done, info = self.env.step(action)
        timeout = info.get("TimeLimit.truncated", False)
        self.steps.append((self.observation, action, np.float32(reward), done and not timeout, timeout))
        self.observation = observation.astype(np.float32)
        return self.observation, float(reward), done and not timeout, timeout, {}

    def dataset(self):
        keys = ("observations", "actions", "rewards", "terminals", "timeouts")
        return {key: np.array(column) for key, column in zip(keys, zip(*self.steps))}


def rollout(model, name, seed, transitions):
    """At least `transitions` steps of the model's stochastic policy, in whole episodes, as a D4RL dataset."""
    env = Recorder(name, seed)
    with tqdm(total=transitions, desc="rollout", disable=not sys.stderr.isatty()) as bar:
        while len(env.steps) < transitions:
            observation, _ = env.reset()
            done = False
            while not done:
                observation, _, terminal, timeout, _ = env.step(model.predict(observation, deterministic=False)[0])
                done = terminal or timeout
                bar.update()
    return env.dataset()


def summary(data, name):
    """Whole episodes, transitions, and the mean and best of the episodes' normalised scores."""
    ends = np.flatnonzero(data["terminals"] | data["timeouts"])
    returns = np.diff(np.cumsum(data["rewards"], dtype=np.float64)[ends], prepend=0.0)
    scores = 100 * d4rl.get_normalized_score(name, returns)
    return dict(
        episodes=len(scores), transitions=len(data["rewards"]), mean_score=scores.mean(), best_score=scores.max()
    )


def write(config, kind, data):
    name = ENVS[config.env]
    file = f"{config.env}-{kind}-{name[-2:]}"
    path = os.path.join(config.directory, os.path.basename(d4rl.infos.DATASET_URLS.get(file, f"{file}.hdf5")))
    with h5py.File(path + ".partial", "w") as file:
        for key, column in data.items():
            file.create_dataset(key, data=column, compression="gzip", compression_opts=9, shuffle=True)
        file.attrs["made_by"] = f"python collect.py {shlex.join(sys.argv[1:])}"
        file.attrs["algorithm"] = f"sbx-rl SAC, seed {config.seed}"
        for key, value in summary(data, name).items():
            file.attrs[key] = value
    os.replace(path + ".partial", path)
    print(path, *(f"{key} {value:.6g}" for key, value in summary(data, name).items()), flush=True)


def main(config):
    for values, known in (([config.env], ENVS), (config.kinds, KINDS)):
        if unknown := set(values) - set(known):
            sys.exit(f"error: unknown {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if min(config.medium_steps, config.transitions) < 1:
        sys.exit("error: medium_steps and transitions must be 1 or more")
    name, wanted = ENVS[config.env], set(config.kinds)
    with_expert = wanted & {"full-replay", "expert", "medium-expert"}
    if with_expert and config.expert_steps <= config.medium_steps:
        sys.exit(f"error: expert_steps must be above medium_steps, {config.medium_steps}")
    os.makedirs(config.directory, exist_ok=True)
    env = Recorder(name, config.seed)
    model = SAC("MlpPolicy", env, learning_starts=10_000, seed=config.seed)

    def roll(kind, seed):
        data = rollout(model, name, seed, config.transitions)
        if kind in wanted:
            write(config, kind, data)
        return data

    if "random" in wanted:
        roll("random", config.seed + 1)
    if wanted == {"random"}:
        return
    model.learn(config.medium_steps, progress_bar=sys.stderr.isatty())
    if "medium-replay" in wanted:
        write(config, "medium-replay", env.dataset())
    if wanted & {"medium", "medium-expert"}:
        medium = roll("medium", config.seed + 2)
    if with_expert:
        steps = config.expert_steps - config.medium_steps
        model.learn(steps, reset_num_timesteps=False, progress_bar=sys.stderr.isatty())
    if "full-replay" in wanted:
        write(config, "full-replay", env.dataset())
    if wanted & {"expert", "medium-expert"}:
        expert = roll("expert", config.seed + 3)
    if "medium-expert" in wanted:
        write(config, "medium-expert", {key: np.concatenate([medium[key], expert[key]]) for key in medium})


if __name__ == "__main__":
    main(parse(Config))
