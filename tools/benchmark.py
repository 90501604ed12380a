"""Times this project on the machine it runs on.

    python -m tools.benchmark  # everything; about an hour on two cores
    python -m tools.benchmark --parts '[regularisers]' --scripts '[iql]' --rounds 3

load          from a file as D4RL has them to ReBRAC's data on the device
start         from the command to the first update, with an empty cache of programs and a full one
memory        the most that a run needs, and an interpreter
updates       updates against their matrix products alone
evaluation    an evaluation's steps against the bare environment, which is given the same actions
regularisers  what each costs
seeds         several trained at once

Everything is timed in `rounds` rounds, in each of which everything that a table compares has its
turn. Ratios are taken within a round, so that they do not depend on how fast the machine is at
the moment. To compare two checkouts, run the benchmark of each in turn, more than once.
"""

import contextlib
import glob
import io
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import List, Optional

if __name__ == "__main__":  # the imports take seconds, in which Ctrl-C shows no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import h5py
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from harness.config import parse
from harness.datasets import load_dataset
from harness.environments import Envs, make_env, reset
from harness.errors import UserError, one_line_errors
from harness.evaluation import evaluate, evaluation_episodes, make_envs
from harness.members import check_device, init_states, split_config
from harness.scripts import ROOT, scripts

DATASET = "hopper-medium-v2"  # whose shapes and hyperparameters are taken
TASKS = ("halfcheetah-medium-v2", "antmaze-umaze-v2", "pen-human-v1")  # of the part `evaluation`

# The rows of a script in the part `updates`, and their flags. A script without has one, at 256.
ROWS = {
    "rebrac": {
        "ReBRAC (mse), batch 1024": dict(critic_loss="mse", batch_size=1024),
        "ReBRAC (mse), batch 256": dict(critic_loss="mse"),
        "ReBRAC (hl_gauss), batch 1024": dict(batch_size=1024),
        "ReBRAC (hl_gauss), batch 256": {},
    }
}
RANGES = {"rebrac": dict(v_min=-10.0, v_max=10.0)}  # flags that a script takes from the dataset


@dataclass
class Config:
    parts: List[str] = field(default_factory=lambda: list(PARTS))  # what to time
    scripts: List[str] = field(default_factory=lambda: list(scripts()))  # algorithms
    variants: Optional[List[str]] = None  # regularisers; default: all, and combinations
    updates: int = 100  # in one timing
    rounds: int = 7  # timings of each
    transitions: List[int] = field(default_factory=lambda: [1_000_000, 2_000_000])  # in a file


def make_config(config, name, **flags):
    """Return a config of the script `name`, whose epoch is one timing."""
    script = scripts()[name]
    fields = dict(dataset_name=DATASET, batch_size=256, log_every=config.updates)
    return script.tuned(script.Config(**{**fields, **RANGES.get(name, {}), **flags}))


def regularisers(script):
    """Return the names of an algorithm's regularisers and combinations, each once."""
    return list(dict.fromkeys([*script.CHOSEN, *script.BEST.values()]))


# --- Data ---


def random_data(size=100_000, state_dim=11, action_dim=3):
    """Return data as a script's `make_dataset` does, of Hopper's shapes."""
    rng = np.random.default_rng(0)
    return dict(
        observations=rng.normal(size=(size, state_dim)).astype(np.float32),
        actions=rng.uniform(-1, 1, (size, action_dim)).astype(np.float32),
        rewards=rng.normal(size=size).astype(np.float32),
        terminals=np.zeros(size, bool),
        train=np.arange(size - 1, dtype=np.int32),
        mean=np.float32(0),
        std=np.float32(1),
    )


def write_dataset(path, size):
    """Write a file like D4RL's, in episodes of 100 steps; return the bytes of its arrays."""
    data = random_data(size)
    columns = {key: data[key] for key in ("observations", "actions", "rewards", "terminals")}
    columns["timeouts"] = np.arange(size) % 100 == 99
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            file.create_dataset(key, data=column, compression="gzip")
    return sum(column.nbytes for column in columns.values())


def first_states(script, config, data):
    return init_states(script.init_state, config, script.transitions(data, np.arange(1)))


# --- Timing and tables ---


def stopwatch(function):
    """Return the seconds that a function takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def interleaved(things, rounds, measure=stopwatch):
    """Return the measures (rounds,) of things by their names. A round measures all of them in turn.

    A first round, in which they compile, doesn't count.
    """
    results = {name: [] for name in things}
    for i in range(1 + rounds):
        for name, thing in things.items():
            result = measure(thing)
            if i > 0:
                results[name].append(result)
    return {name: np.array(values) for name, values in results.items()}


def spread(values, form=".2f"):
    """Return two cells of a table: the median, and the least and the most."""
    return f"{np.median(values):{form}} | {values.min():{form}} to {values.max():{form}}"


def print_head(*titles):
    """Print the head of a table, in which each title stands over the two cells of a `spread`."""
    cells = [f"{title} | least and most" for title in titles]
    print(f"\n| | {' | '.join(cells)} |\n|{' --- |' * (1 + 2 * len(cells))}")


def print_row(name, *cells):
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def machine():
    """Return a line about what this runs on."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(": ")[1].strip() for line in file if line.startswith("model name")]
    model = models[0] if models else "unknown"
    device = jax.devices()[0].device_kind
    python = platform.python_version()
    return f"{len(models)} cores of {model}; {device}; jax {jax.__version__}; Python {python}"


# --- Runs: loading, start and memory ---


def load_part(config, folder):
    """Time what is done until a file's transitions are ready on the device."""
    rebrac = scripts()["rebrac"]

    def load(path):
        settings = rebrac.tuned(rebrac.Config(dataset_name=DATASET, dataset_path=path))
        with contextlib.redirect_stdout(io.StringIO()):
            data = rebrac.make_dataset(settings, load_dataset(settings))
        rebrac.with_value_range(settings, data)
        rebrac.make_samples(data)
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


def trainer(script, config, data):
    """Return a function that makes the updates of an epoch."""
    states = first_states(script, config, data)

    def train():
        nonlocal states
        states, _ = jax.block_until_ready(script.epoch(config, states, data))

    return train


def matrix_products(jaxpr):
    """Yield a jaxpr's matrix products, as often as they happen, also in what it calls.

    Each is the operands' shapes and `dot_general`'s dimension numbers.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shapes = [operand.aval.shape for operand in equation.invars]
            yield shapes, equation.params["dimension_numbers"]
        for inner in jaxprs_in_params(equation.params):
            for _ in range(equation.params.get("length", 1)):  # of a scan
                yield from matrix_products(inner)


def num_operations(shapes, dimension_numbers):
    """Return the floating-point operations of a matrix product."""
    (contracted, _), (batch, _) = dimension_numbers
    left, right = shapes
    shared = math.prod(left[axis] for axis in (*contracted, *batch))
    return 2 * math.prod(left) * math.prod(right) / shared


def products_of_two_updates(script, config, data):
    """Return the matrix products of two updates. Of two, since ReBRAC's actor has one in two."""
    static, traced = split_config(replace(config, log_every=2))
    program = jax.make_jaxpr(script.epoch.program, static_argnums=0)
    epoch = program(static, traced, first_states(script, config, data), data)
    return list(matrix_products(epoch.jaxpr))


def multiplier(products, times):
    """Return a function that does matrix products so many times, in one scan as `epoch` is one."""
    rng = np.random.default_rng(0)
    operands = []
    for shapes, _ in products:
        operands.append([rng.normal(size=shape).astype(np.float32) for shape in shapes])
    operands = jax.device_put(operands)

    def step(carry, _):
        operands, total = jax.lax.optimization_barrier(carry)  # so that nothing leaves the loop
        for (left, right), (_, dimension_numbers) in zip(operands, products):
            product = jax.lax.dot_general(left, right, dimension_numbers)
            total += jax.lax.optimization_barrier(product).ravel()[0]
        return (operands, total), None

    @jax.jit
    def multiply(operands):
        (_, total), _ = jax.lax.scan(step, (operands, jnp.float32(0)), length=times)
        return total

    return lambda: multiply(operands).block_until_ready()


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


def first_policy(config, name, task, env):
    """Return a config of the script `name`, and the policy of its first states."""
    script = scripts()[name]
    settings = make_config(config, name, dataset_name=task, eval_episodes=10)
    shape = (env.observation_space.shape[0], env.action_space.shape[0])
    data = jax.device_put(random_data(100, *shape))
    actors = first_states(script, settings, data).actor
    return settings, partial(script.policy, settings, actors, data)


def evaluation_part(config, folder):
    """Time an evaluation of 10 episodes, and 10 more with noise, against a bare environment.

    The policy is ReBRAC's. On HalfCheetah, whose episodes are equally long, BCQ's is timed, too.
    """
    print_head("steps/s", "share of the bare environment's")
    for name in TASKS:
        env = make_env(name)
        settings, policy = first_policy(config, "rebrac", name, env)
        episodes = evaluation_episodes(settings)
        recording = RecordingEnvs(name, len(episodes))
        evaluate(settings, policy, recording, 0)
        num_steps = sum(len(own) for own in recording.actions)
        alone = Envs(name, len(episodes), processes=1)
        functions = {
            name: partial(evaluate, settings, policy, make_envs(settings), 0),
            f"{name}, in one process": partial(evaluate, settings, policy, alone, 0),
            f"{name}, bare": partial(replay, env, episodes, recording.actions),
        }
        if name.startswith("halfcheetah"):
            settings, policy = first_policy(config, "bcq", name, env)
            functions[f"{name}, BCQ"] = partial(evaluate, settings, policy, make_envs(settings), 0)
        seconds = interleaved(functions, config.rounds)
        bare = seconds[f"{name}, bare"]
        for title, times in seconds.items():
            print_row(title, spread(num_steps / times, ".0f"), spread(bare / times))


# --- Main ---

PARTS = {
    "load": load_part,
    "start": start_part,
    "memory": memory_part,
    "updates": updates_part,
    "evaluation": evaluation_part,
    "regularisers": regularisers_part,
    "seeds": seeds_part,
}


def check_config(config):
    """Raise UserError if the config makes no sense, before any work."""
    for words, known in ((config.parts, PARTS), (config.scripts, scripts())):
        unknown = sorted(set(words) - set(known))
        if unknown:
            raise UserError(f"unknown {', '.join(unknown)}; there are {', '.join(known)}")
    if config.rounds < 1 or config.updates < 2 or config.updates % 2:
        raise UserError("rounds must be 1 or more, and updates 2, 4, ...")
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
