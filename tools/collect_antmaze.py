"""Makes AntMaze datasets the way D4RL did: an ant that can walk is led through D4RL's mazes.

    python -m tools.collect_antmaze --kinds '[umaze, medium-play]'
    python -m tools.collect_antmaze --walker mine.npz --walker_steps 300000  # train a walker first

1. The walker is a policy for D4RL's ant: it walks in a given direction. SAC (sbx-rl's, online)
   trains it, which needs tools/requirements-collect.txt. The one in data/ has come from this.
2. D4RL's navigation policy leads it from cell to cell to a goal of the maze, with Gaussian noise
   on its actions. A trajectory goes on at the goal, until its time is up.
3. Rewards and terminals are written for the task of the evaluation: 1 near that task's goal.

The files bear D4RL's names. Two things differ from how D4RL made its own. SAC's reward is the speed
in a direction that changes. The goal is the middle of where D4RL draws the evaluation's goals.
"""

import contextlib
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import dataclass, field
from typing import List

if __name__ == "__main__":  # Ctrl-C shows no traceback in the imports, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
from tqdm import tqdm

from harness.checkpoint import write_file
from harness.config import parse
from harness.environments import d4rl, gym, make_env, removing_maze_files
from harness.errors import UserError, disk_errors, make_folder, one_line_errors
from harness.hdf5 import write_columns

ant = d4rl.locomotion.ant
maze_env = d4rl.locomotion.maze_env
wrappers = d4rl.locomotion.wrappers

KINDS = {  # the maze; whether starts, and whether goals, may be any free cell
    "umaze": (maze_env.U_MAZE, False, False),
    "umaze-diverse": (maze_env.U_MAZE, True, True),
    "medium-play": (maze_env.BIG_MAZE, True, False),
    "medium-diverse": (maze_env.BIG_MAZE, True, True),
    "large-play": (maze_env.HARDEST_MAZE, True, False),
    "large-diverse": (maze_env.HARDEST_MAZE, True, True),
}
STEPS = 1001  # of a trajectory: D4RL counts from 0 to 1000
NOISE = 0.2  # standard deviation of the noise on the walker's actions
CELL = 4.0  # side of a maze's cell
REACHED = 0.5  # distance to a goal at which it is reached


@dataclass
class Config:
    kinds: List[str] = field(default_factory=lambda: ["umaze"])  # to write: see KINDS
    trajectories: int = 1000  # in a file, of 1,001 steps each
    walker: str = "data/antmaze_walker.npz"  # the walker's file
    walker_steps: int = 0  # steps of SAC, to make that file first; 0: it is there
    seed: int = 0  # of SAC, the starts, the goals and the noise
    processes: int = 2  # that walk at once; they change no file's content
    directory: str = "collected"  # where the files go


def check(config):
    """Raise UserError if the config makes no sense, before any work."""
    unknown = sorted(set(config.kinds) - set(KINDS))
    if unknown:
        raise UserError(f"unknown {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if min(config.trajectories, config.processes) < 1:
        raise UserError("trajectories and processes must be 1 or more")
    if min(config.seed, config.walker_steps) < 0:
        raise UserError("seed and walker_steps must be 0 or more")
    if not config.walker.endswith(".npz"):
        raise UserError("walker must end in .npz")
    if config.walker_steps == 0 and not os.path.isfile(config.walker):
        raise UserError(f"there is no file {config.walker}; make it by --walker_steps 300000")
    if config.walker_steps == 0:
        try:
            read_walker(config.walker)
        except OSError as error:
            raise UserError(f"can't read {config.walker} ({error.strerror})") from error
        except Exception as error:  # NumPy has many for a file that isn't its own
            raise UserError(f"{config.walker} is no walker's file") from error
    if config.walker_steps and os.path.exists(config.walker):
        raise UserError(
            f"{config.walker} is there; leave --walker_steps out to use it, or name another file "
            "by --walker"
        )


# --- The walker ---


def make_walking_task():
    """Return an environment in which SAC learns to walk, under gymnasium's interface.

    The ant's state has 27 numbers, D4RL's own without x and y. After them come the 2 of a direction
    of length 1, which turns to a random one after 80 to 300 steps. The reward is twice the speed in
    this direction, a little for standing upright, and less for large actions. An episode ends when
    the ant lies on its back, or after 600 steps.
    """
    import gymnasium

    class Walking(gymnasium.Env):
        def __init__(self, seed):
            self.env = wrappers.NormalizedBoxEnv(ant.GoalReachingAntEnv())
            self.env.wrapped_env.seed(seed)
            self.rng = np.random.default_rng(seed)
            self.action_space = gymnasium.spaces.Box(-1, 1, (8,), np.float32)
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (29,), np.float32)

        def turn(self):
            angle = self.rng.uniform(0, 2 * np.pi)
            self.direction = np.array([np.cos(angle), np.sin(angle)])
            self.steps_to_turn = self.rng.integers(80, 301)

        def observe(self, state):
            return np.concatenate([state[:27], self.direction]).astype(np.float32)

        def reset(self, *, seed=None, options=None):
            self.steps = 0
            self.turn()
            return self.observe(self.env.reset()), {}

        def step(self, action):
            before = self.env.get_xy().copy()
            state, _, _, _ = self.env.step(action)
            moved = self.env.get_xy() - before
            _, x, y, _ = state[1:5]  # the torso's orientation, a quaternion
            upright = 1 - 2 * (x**2 + y**2)  # 1: upright, -1: on its back
            speed = moved @ self.direction / self.env.dt
            reward = 2 * speed + 0.3 * upright - 0.01 * np.square(action).sum()
            self.steps += 1
            self.steps_to_turn -= 1
            if self.steps_to_turn == 0:
                self.turn()
            return self.observe(state), float(reward), bool(upright < 0), self.steps == 600, {}

    return Walking


def train_walker(config):
    """Train a walker by SAC, and write the weights of its mean actions."""
    try:
        from sbx import SAC
        from stable_baselines3.common.vec_env import DummyVecEnv
    except ImportError as error:
        raise UserError(f"{error}; first pip install -r tools/requirements-collect.txt") from error
    task = make_walking_task()
    envs = DummyVecEnv([lambda number=number: task(config.seed + number) for number in range(8)])
    model = SAC("MlpPolicy", envs, gradient_steps=2, learning_starts=10_000, seed=config.seed)
    model.learn(config.walker_steps, progress_bar=sys.stderr.isatty())
    layers = model.policy.actor_state.params["params"]
    arrays = {}
    for i in range(3):  # two hidden layers and the mean
        arrays[f"kernel{i}"] = np.asarray(layers[f"Dense_{i}"]["kernel"])
        arrays[f"bias{i}"] = np.asarray(layers[f"Dense_{i}"]["bias"])
    with disk_errors(config.walker):
        write_file(config.walker, lambda file: np.savez(file, **arrays))


def read_walker(path):
    """Return the walker: a function from a state (27,) and a direction (2,) to actions (8,)."""
    with np.load(path) as file:
        layers = [(file[f"kernel{i}"], file[f"bias{i}"]) for i in range(3)]

    def walk(state, direction):
        x = np.concatenate([state, direction / np.linalg.norm(direction)]).astype(np.float32)
        for kernel, bias in layers[:-1]:
            x = np.maximum(x @ kernel + bias, 0)
        kernel, bias = layers[-1]
        return np.tanh(x @ kernel + bias)

    return walk


# --- Walking the mazes ---


def make_maze(kind):
    """Return the environment in which a dataset is collected."""
    maze, starts_anywhere, any_goal = KINDS[kind]
    if any_goal:  # without goals of its own D4RL draws them from all free cells
        maze = deepcopy(maze)
        for row in maze:
            row[:] = [0 if cell == maze_env.GOAL else cell for cell in row]
    options = dict(maze_map=maze, maze_size_scaling=CELL, non_zero_reset=starts_anywhere)
    with removing_maze_files():
        env = ant.AntMazeEnv(**options)
    return wrappers.NormalizedBoxEnv(env)


def walk_trajectories(job):
    """Return the arrays of n trajectories, (n, STEPS, ...), and their last states `end`."""
    kind, path, seeds = job
    walk = read_walker(path)
    trajectories = []
    with contextlib.redirect_stdout(None):  # D4RL's navigation prints four lines a step
        env = make_maze(kind)
        navigate = env.create_navigation_policy(
            lambda state, way: walk(state[2:29], np.asarray(way))  # without x, y and the goal
        )
        for seed in seeds:
            trajectories.append(walk_trajectory(env, navigate, seed))
    return {key: np.stack([one[key] for one in trajectories]) for key in trajectories[0]}


def walk_trajectory(env, navigate, seed):
    """Return the arrays of one trajectory, (STEPS, ...), with the last state as `end` (1, 29)."""
    rng = np.random.default_rng(seed)
    np.random.seed(rng.integers(2**31))  # noqa: NPY002, from where the maze draws
    env.wrapped_env.seed(int(rng.integers(2**31)))
    env.set_target()
    state = env.reset()
    columns = {key: [] for key in ("observations", "actions", "qpos", "qvel")}
    for _ in range(STEPS):
        noisy = navigate(state) + NOISE * rng.standard_normal(8)
        action = np.clip(noisy, -1, 1).astype(np.float32)
        columns["observations"].append(state[:29])  # the rest is the way to the goal
        columns["actions"].append(action)
        state, _, _, _ = env.step(action)
        columns["qpos"].append(env.sim.data.qpos.copy())  # after the step, as in D4RL's files
        columns["qvel"].append(env.sim.data.qvel.copy())
    arrays = {key: np.array(column, np.float32) for key, column in columns.items()}
    goal = np.asarray(env.target_goal, np.float32)
    return {**arrays, "goal": np.tile(goal, (STEPS, 1)), "end": state[None, :29].astype(np.float32)}


def evaluation_goal(kind):
    """Return the middle of where the evaluation's goals are drawn, (2,).

    In x and in y D4RL adds two uniform offsets: up to 1/4 and up to 1/8 of the cell's side.
    """
    env = make_env(f"antmaze-{kind}-v2").unwrapped
    cells = np.argwhere(np.array(env._maze_map) == maze_env.GOAL)
    (cell,) = cells
    return np.array(env._rowcol_to_xy(cell)) + (CELL / 4 + CELL / 8) / 2


def rewards(kind, positions):
    """Return the sparse rewards (n, STEPS) of positions (n, STEPS + 1, 2): 1 near the goal.

    A step's reward is that of the position after it. In umaze-diverse only the first step of each
    visit to the goal has one, as in D4RL's file (D4RL issue 199).
    """
    distance = np.linalg.norm(positions[:, 1:] - evaluation_goal(kind), axis=2)
    is_near = distance <= REACHED
    if kind == "umaze-diverse":
        was_near = np.pad(is_near, ((0, 0), (1, 0)))[:, :-1]
        is_near &= ~was_near
    return is_near


# --- Files ---


def begin_process():
    """Let this process end on Ctrl-C, and when its parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def collect(config, kind):
    """Collect a dataset and write its file."""
    seeds = np.random.SeedSequence([config.seed, list(KINDS).index(kind)])
    seeds = seeds.spawn(config.trajectories)
    jobs = [(kind, config.walker, seeds[i : i + 5]) for i in range(0, len(seeds), 5)]
    parts = []
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(config.processes, context, begin_process)
    try:
        results = pool.map(walk_trajectories, jobs)
        for part in tqdm(results, kind, len(jobs), disable=not sys.stderr.isatty()):
            parts.append(part)
    except BrokenProcessPool as error:
        raise UserError(
            "a process was killed, perhaps since memory had run out; give fewer --processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    data = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    write(config, kind, data)


def write(config, kind, data):
    """Write the arrays (n, STEPS, ...) of n trajectories as a file in D4RL's format."""
    positions = np.concatenate([data["observations"], data["end"]], 1)[:, :, :2]
    is_near = rewards(kind, positions)
    is_last = np.zeros_like(is_near)
    is_last[:, -1] = True
    columns = {
        "observations": data["observations"],
        "actions": data["actions"],
        "rewards": is_near.astype(np.float32),
        "terminals": is_near,
        "timeouts": is_last,
        "infos/goal": data["goal"],
        "infos/qpos": data["qpos"],
        "infos/qvel": data["qvel"],
    }
    url = gym.spec(f"antmaze-{kind}-v2").kwargs["dataset_url"]
    path = os.path.join(config.directory, os.path.basename(url))
    columns = {key: column.reshape(-1, *column.shape[2:]) for key, column in columns.items()}
    attributes = dict(
        made_by=f"python -m tools.collect_antmaze {shlex.join(sys.argv[1:])}",
        evaluation_goal=evaluation_goal(kind),
        episodes=len(is_near),
        transitions=is_near.size,
        mean_score=100 * is_near.any(1).mean(),
        best_score=100.0 * is_near.any(),
    )
    write_columns(path, columns, attributes, level=4)
    first = is_near.argmax(1)[is_near.any(1)]
    after = f", first after {np.median(first):.0f} steps in the median" if len(first) else ""
    print(
        f"{path}: {len(is_near)} trajectories, {is_near.size:,} steps; {len(first)} reach the "
        f"evaluation's goal{after}",
        flush=True,
    )


def main():
    config = parse(Config)
    check(config)
    make_folder(config.directory)
    if config.walker_steps:
        make_folder(os.path.dirname(config.walker) or ".")
        train_walker(config)
    for kind in config.kinds:
        collect(config, kind)


if __name__ == "__main__":
    with one_line_errors():
        main()
