"""Times this project on the machine it runs on.

    python -m tools.benchmark  # all but `gpu`; more than an hour on two cores
    python -m tools.benchmark --parts '[regularisers]' --scripts '[iql]' --rounds 3
    python -m tools.benchmark --parts '[gpu]' --rounds 3  # 8 minutes on a GPU

load          from a file as D4RL has them to ReBRAC's data on the device
start         from the command to the first update, with an empty cache of programs and a full one
memory        the most that a run needs, and an interpreter
updates       updates against their matrix products alone
evaluation    an evaluation's steps against the bare environment, which is given the same actions
regularisers  what each costs
seeds         several trained at once
gpu           members together, and whole runs; not among those that run by default

Everything is timed in `rounds` rounds, in each of which everything that a table compares has its
turn. Ratios are taken within a round, so that they do not depend on how fast the machine is at
the moment. To compare two checkouts, run the benchmark of each in turn, more than once.
"""

import contextlib
import glob
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from typing import List, Optional

if __name__ == "__main__":  # Ctrl-C shows no traceback in the imports, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import h5py
import jax
import numpy as np

from harness.config import parse
from harness.datasets import load_dataset
from harness.environments import make_env, reset
from harness.errors import UserError, one_line_errors
from harness.evaluation import evaluate, evaluation_episodes, make_envs
from harness.inside import make_samples
from harness.lockstep import Envs
from harness.members import check_device
from harness.scripts import ROOT, scripts
from tools.benchmark_gpu import gpu_part
from tools.timing import (
    DATASET,
    first_states,
    interleaved,
    machine,
    make_config,
    multiplier,
    num_operations,
    print_head,
    print_row,
    products_of_two_updates,
    random_data,
    spread,
    trainer,
)

TASKS = (  # of the part `evaluation`
    "halfcheetah-medium-v2",
    "hopper-medium-v2",
    "walker2d-medium-v2",
    "antmaze-umaze-v2",
    "pen-human-v1",
)

# The rows of a script in the part `updates`, and their flags. A script without has one, at 256.
ROWS = {
    "rebrac": {
        "ReBRAC (mse), batch 1024": dict(critic_loss="mse", batch_size=1024),
        "ReBRAC (mse), batch 256": dict(critic_loss="mse"),
        "ReBRAC (hl_gauss), batch 1024": dict(batch_size=1024),
        "ReBRAC (hl_gauss), batch 256": {},
    }
}


@dataclass
class Config:
    parts: List[str] = field(default_factory=lambda: [*PARTS][:-1])  # what to time
    scripts: List[str] = field(default_factory=lambda: list(scripts()))  # algorithms
    variants: Optional[List[str]] = None  # regularisers; default: all, and combinations
    updates: int = 100  # in one timing
    rounds: int = 7  # timings of each
    transitions: List[int] = field(default_factory=lambda: [1_000_000, 2_000_000])  # in a file
    eval_episodes: List[int] = field(default_factory=lambda: [10, 100])  # and as many noisy
    members: List[int] = field(default_factory=lambda: [1, 8, 32, 128])  # of the part `gpu`
    run_updates: int = 100_000  # of a whole run in the part `gpu`
    gpu_file: Optional[str] = None  # for what the part `gpu` prints; default: on a GPU data/gpu.md


def regularisers(script):
    """Return the names of an algorithm's regularisers and combinations, each once."""
    return list(dict.fromkeys([*script.CHOSEN, *script.BEST.values()]))


# --- Runs: loading, start and memory ---


def write_dataset(path, size):
    """Write a file like D4RL's, in episodes of 100 steps; return the bytes of its arrays."""
    data = random_data(size)
    columns = {key: data[key] for key in ("observations", "actions", "rewards", "terminals")}
    columns["timeouts"] = np.arange(size) % 100 == 99
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            file.create_dataset(key, data=column, compression="gzip")
    return sum(column.nbytes for column in columns.values())


def load_part(config, folder):
    """Time what is done until a file's transitions are ready on the device."""
    rebrac = scripts()["rebrac"]

    def load(path):
        settings = rebrac.tuned(rebrac.Config(dataset_name=DATASET, dataset_path=path))
        with contextlib.redirect_stdout(io.StringIO()):
            data = rebrac.make_dataset(settings, load_dataset(settings))
        rebrac.with_value_range(settings, data)
        make_samples(data)
        jax.block_until_ready(jax.device_put(data))

    functions = {}
    for size in config.transitions:
        path = os.path.join(folder, f"{size}.hdf5")
        write_dataset(path, size)
        functions[f"{size:,} transitions"] = partial(load, path)
    print_head("seconds until they are ready")
    for name, seconds in interleaved(functions, config.rounds).items():
        print_row(name, spread(seconds))


def run_command(folder, name, path):
    """Return the command of a run of two updates, with an evaluation of one episode."""
    words = [f"--dataset_name={DATASET}", f"--dataset_path={path}", f"--results={folder}/results"]
    words += ["--log_every=2", "--num_updates=2", "--eval_every=2", "--eval_episodes=1"]
    return [sys.executable, f"{name}.py", *words]


def run_options(folder):
    """Return how a run is started, anew: with its compiled programs in folder/cache."""
    shutil.rmtree(f"{folder}/results", ignore_errors=True)
    variables = dict(JAX_COMPILATION_CACHE_DIR=f"{folder}/cache", WANDB_MODE="disabled")
    return dict(cwd=ROOT, env={**os.environ, **variables})


def start_part(config, folder):
    """Time a run from the command to the first update, which is in train.csv then."""
    path = os.path.join(folder, "start.hdf5")
    write_dataset(path, config.transitions[0])

    def has_started():
        tables = glob.glob(f"{folder}/results/*/*/*/train.csv")
        return any(os.path.getsize(table) for table in tables)

    def start(command, is_cached):
        if not is_cached:
            shutil.rmtree(f"{folder}/cache", ignore_errors=True)
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, **run_options(folder))
        while run.poll() is None and not has_started():
            time.sleep(0.01)
        run.kill()
        if run.wait() not in (0, -signal.SIGKILL):
            raise UserError(f"{' '.join(command)} has failed")

    functions = {}
    for name in config.scripts:
        command = run_command(folder, name, path)
        functions[f"{name}, empty cache"] = partial(start, command, False)
        functions[f"{name}, full cache"] = partial(start, command, True)
    print_head("seconds from the command to the first update")
    for name, seconds in interleaved(functions, config.rounds).items():
        print_row(name, spread(seconds, ".1f"))


# In a process of its own: Linux counts what the parent had when it forked as the child's.
PEAK = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(folder, command):
    """Return the most memory that a command's process has had, in MB."""
    peak = [sys.executable, "-c", PEAK, *command]
    run = subprocess.run(peak, capture_output=True, text=True, **run_options(folder))
    if run.returncode != 0:
        raise UserError(f"{' '.join(command)} has failed: {run.stderr.strip()[-200:]}")
    return int(run.stdout) * 1024 / 1e6


def memory_part(config, folder):
    """Measure the most memory that a run has had, also above the same with 1,000 transitions."""
    sizes = {}  # of the datasets, in MB
    for num in (1000, *config.transitions):
        sizes[num] = write_dataset(f"{folder}/{num}.hdf5", num) / 1e6
    imports = f"import jax, {config.scripts[0]}; jax.devices()"
    commands = {"libraries": [sys.executable, "-c", imports]}
    for name in config.scripts:
        for num in sizes:
            commands[name, num] = run_command(folder, name, f"{folder}/{num}.hdf5")
    peaks = interleaved(commands, config.rounds, partial(peak_memory, folder))
    print_head("MB at most", "above that with 1,000", "as a multiple of the data's size")
    print_row("interpreter and libraries", spread(peaks.pop("libraries"), ".0f"), "| | |")
    for (name, num), peak in peaks.items():
        above = peak - peaks[name, 1000]
        cells = (spread(peak, ".0f"), spread(above, ".0f"), spread(above / sizes[num]))
        print_row(f"{name}, {num:,} transitions", *cells)


# --- Updates ---


def updates_part(config, folder):
    """Time updates, and the share of what their matrix products alone would allow."""
    data = jax.device_put(random_data())
    large = ([(1024, 1024), (1024, 1024)], (((1,), (0,)), ((), ())))  # as `matrix_products` says
    functions = {"large": multiplier([large], 10)}
    operations = {}  # of an update
    for name in config.scripts:
        script = scripts()[name]
        for title, flags in ROWS.get(name, {f"{script.NAME}, batch 256": {}}).items():
            settings = make_config(config, name, **flags)
            products = products_of_two_updates(script, settings, data)
            operations[title] = sum(num_operations(*product) for product in products) / 2
            functions[title] = trainer(script, settings, data)
            functions[f"{title}, products"] = multiplier(products, config.updates // 2)
    seconds = interleaved(functions, config.rounds)
    rate = 10 * num_operations(*large) / seconds["large"]
    print_head("updates/s", "share of its products alone", "share of a large one's rate")
    for title, work in operations.items():
        speed = config.updates / seconds[title]
        share = seconds[f"{title}, products"] / seconds[title]
        cells = (spread(speed, ".0f"), spread(share), spread(work * speed / rate))
        print_row(f"{title}: {work / 1e9:.2f} GFLOP", *cells)
    least, median, most = (f"{value / 1e9:.0f}" for value in np.quantile(rate, [0, 0.5, 1]))
    print(
        f"\nA product of matrices (1024, 1024): {median} GFLOP/s ({least} to {most}).", flush=True
    )


def time_updates(config, name, variants):
    """Return the seconds (rounds,) of an epoch with each of some flags, {title: flags}."""
    data = jax.device_put(random_data())
    functions = {}
    for title, flags in variants.items():
        functions[title] = trainer(scripts()[name], make_config(config, name, **flags), data)
    return interleaved(functions, config.rounds)


def regularisers_part(config, folder):
    """Time updates with each regulariser, against those with none."""
    print_head("updates/s", "time against none")
    for name in config.scripts:
        variants = ["none", *(config.variants or regularisers(scripts()[name]))]
        seconds = time_updates(config, name, {key: dict(regularisers=key) for key in variants})
        for key, times in seconds.items():
            cells = (spread(config.updates / times, ".0f"), spread(times / seconds["none"]))
            print_row(f"{name} {key}", *cells)


def seeds_part(config, folder):
    """Time updates of several seeds, trained at once."""
    print_head("updates/s of all seeds", "against one seed")
    for name in config.scripts:
        seconds = time_updates(config, name, {num: dict(num_seeds=num) for num in (1, 2, 4, 8)})
        for num, times in seconds.items():
            speed = num * config.updates / times
            cells = (spread(speed, ".0f"), spread(num * seconds[1] / times))
            print_row(f"{name}, {num} seeds", *cells)


# --- Evaluation ---


class RecordingEnvs(Envs):
    """Environments that keep what is done in each."""

    def __init__(self, name, number):
        super().__init__(name, number)
        self.actions = [[] for _ in range(number)]

    def step(self, running, actions):
        for i, action in zip(running, actions):
            self.actions[i].append(action.copy())
        return super().step(running, actions)


def replay(env, episodes, actions):
    """Do again in a single environment what was done in an evaluation, of update 0 and seed 0."""
    for (episode, _, _), own in zip(episodes, actions):
        reset(env, 0, 0, episode)
        for action in own:
            env.step(action)


def first_policy(config, name, task, env, eval_episodes):
    """Return a config of the script `name`, and the policy of its first states."""
    script = scripts()[name]
    settings = make_config(config, name, dataset_name=task, eval_episodes=eval_episodes)
    shape = (env.observation_space.shape[0], env.action_space.shape[0])
    data = jax.device_put(random_data(100, *shape))
    actors = first_states(script, settings, data).actor
    return settings, partial(script.policy, settings, actors, data)


def evaluation_part(config, folder):
    """Time evaluations against a bare environment, which is given the same actions.

    The policy is ReBRAC's. BCQ's is timed, too, on HalfCheetah, whose episodes are equally long.
    """
    print_head("steps/s", "share of the bare environment's")
    for name in TASKS:
        env = make_env(name)
        for number in config.eval_episodes:
            time_evaluation(config, name, env, number)


def time_evaluation(config, name, env, number):
    """Time an evaluation of a number of episodes, and of as many more with noise."""
    settings, policy = first_policy(config, "rebrac", name, env, number)
    episodes = evaluation_episodes(settings)
    recording = RecordingEnvs(name, len(episodes))
    evaluate(settings, policy, recording, 0)
    num_steps = sum(len(own) for own in recording.actions)
    title = f"{name}, {len(episodes)} episodes"
    functions = {
        title: partial(evaluate, settings, policy, make_envs(settings), 0),
        f"{title}, bare": partial(replay, env, episodes, recording.actions),
    }
    if name.startswith("halfcheetah") and number == config.eval_episodes[0]:
        settings, policy = first_policy(config, "bcq", name, env, number)
        functions[f"{title}, BCQ"] = partial(evaluate, settings, policy, make_envs(settings), 0)
    seconds = interleaved(functions, config.rounds)
    bare = seconds[f"{title}, bare"]
    for own_title, times in seconds.items():
        print_row(own_title, spread(num_steps / times, ".0f"), spread(bare / times))


# --- Main ---

PARTS = {
    "load": load_part,
    "start": start_part,
    "memory": memory_part,
    "updates": updates_part,
    "evaluation": evaluation_part,
    "regularisers": regularisers_part,
    "seeds": seeds_part,
    "gpu": gpu_part,
}


def check_config(config):
    """Raise UserError if the config makes no sense, before any work."""
    for words, known in ((config.parts, PARTS), (config.scripts, scripts())):
        unknown = sorted(set(words) - set(known))
        if unknown:
            raise UserError(f"unknown {', '.join(unknown)}; there are {', '.join(known)}")
    if not config.scripts:
        raise UserError(f"scripts must be some of {', '.join(scripts())}")
    if not config.members or min(config.members) < 1:
        raise UserError("members must be numbers of 1 or more")
    if config.rounds < 1 or config.updates < 2 or config.updates % 2:
        raise UserError("rounds must be 1 or more, and updates 2, 4, ...")
    if min(config.eval_episodes, default=0) < 1:
        raise UserError("eval_episodes must be 1 or more")
    if config.run_updates < 200 or config.run_updates % 200:
        raise UserError("run_updates must be 200, 400, ...")
    if not config.transitions or min(config.transitions) < 1000:
        raise UserError("transitions must be numbers of 1000 or more")
    for name in config.scripts:
        for variant in config.variants or []:
            make_config(config, name, regularisers=variant)


def main():
    config = parse(Config)
    check_config(config)
    check_device()
    rounds = f"{config.rounds} rounds; {config.updates} updates"
    print(f"{machine()}; {rounds}; batch 256 unless it says")
    for name, part in PARTS.items():
        if name in config.parts:
            with tempfile.TemporaryDirectory() as folder:
                part(config, folder)


if __name__ == "__main__":
    with one_line_errors():
        main()
