"""Times this project on the machine it runs on, and another checkout of it beside this one.

    python benchmark.py                                                    # everything; about an hour on two cores
    python benchmark.py --parts '[regularisers]' --scripts '[iql]' --rounds 3
    python benchmark.py --parts '[start, updates]' --against ../another_checkout

load: from a file as D4RL has them to data on the device. start: from the command to the first update, with an empty
cache of compiled programs and with a full one. memory: the most a run needs, and an interpreter. updates: both
algorithms against their matrix products alone. evaluation: an evaluation's steps a second, on all cores and in one
process, against the bare environment, which is given the same actions. regularisers: what each costs. seeds: several
trained at once.

Everything is timed in `rounds` rounds, in each of which everything that a table compares has its turn. Ratios are taken
within a round, so that they do not depend on how fast the machine is at the moment.
"""

import contextlib
import importlib
import io
import itertools
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import List, Optional

import h5py
import jax
import numpy as np

import iql
import rebrac
import tasks
from runs import parse

VARIANTS = ["none", *rebrac.CHOSEN, "DO+LN+GrN", "DO+LN+EN"]  # by the paper's abbreviations, at its chosen strengths
PARTS = ("load", "start", "memory", "updates", "evaluation", "regularisers", "seeds")
UPDATES = {  # what the part `updates` compares: a script and its flags
    "ReBRAC (mse), batch 1024": ("rebrac", dict(critic_loss="mse", batch_size=1024)),
    "ReBRAC (mse), batch 256": ("rebrac", dict(critic_loss="mse", batch_size=256)),
    "ReBRAC (hl_gauss), batch 1024": ("rebrac", dict(batch_size=1024)),
    "ReBRAC (hl_gauss), batch 256": ("rebrac", dict(batch_size=256)),
    "IQL, batch 256": ("iql", dict(batch_size=256)),
}


@dataclass
class Config:
    parts: List[str] = field(default_factory=lambda: list(PARTS))
    scripts: List[str] = field(default_factory=lambda: ["rebrac", "iql"])
    variants: List[str] = field(default_factory=lambda: list(VARIANTS))
    dataset_name: str = "hopper-medium-v2"  # whose hyperparameters are taken
    batch_size: int = 256
    updates: int = 100  # in one timing
    rounds: int = 7
    transitions: List[int] = field(default_factory=lambda: [1_000_000, 2_000_000])  # of load, memory; start: the first
    tasks: List[str] = field(default_factory=lambda: ["halfcheetah-medium-v2", "antmaze-umaze-v2", "pen-human-v1"])
    against: Optional[str] = None  # directory of another checkout, for load, start, updates and evaluation


def random_data(size=100_000, states=11, actions=3):
    """As `make_dataset` makes them, of Hopper's shapes."""
    rng = np.random.default_rng(0)
    return dict(
        observations=rng.normal(size=(size, states)).astype(np.float32),
        actions=rng.uniform(-1, 1, (size, actions)).astype(np.float32),
        rewards=rng.normal(size=size).astype(np.float32),
        terminals=np.zeros(size, bool),
        train=np.arange(size - 1, dtype=np.int32),
        mean=np.float32(0),
        std=np.float32(1),
    )


def write_dataset(path, size):
    """Such data as a file like D4RL's, compressed, in episodes of 100 steps; returns its arrays' size in bytes."""
    columns = random_data(size)
    columns = {key: columns[key] for key in ("observations", "actions", "rewards", "terminals")}
    columns["timeouts"] = np.arange(size) % 100 == 99
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            file.create_dataset(key, data=column, compression="gzip")
    return sum(column.nbytes for column in columns.values())


def checkouts(config):
    """The scripts of this checkout, and of another one, by what their rows are called. mujoco210 is this one's."""
    here = SimpleNamespace(directory=os.path.dirname(os.path.abspath(__file__)), rebrac=rebrac, iql=iql, tasks=tasks)
    if not config.against:
        return {"": here}
    modules = {name: sys.modules.pop(name) for name in ("runs", "tasks", "rebrac", "iql")}
    sys.path.insert(0, config.against)
    others = {name: importlib.import_module(name) for name in modules}
    sys.path.remove(config.against)
    sys.modules.update(modules)
    return {"": here, f" in {config.against}": SimpleNamespace(directory=config.against, **others)}


def trainer(script, config, data):
    """A function that trains on for `log_every` updates and returns when they are done."""
    static, traced = script.split_config(config)
    states = [jax.jit(partial(script.init_states, config, data))(config.seed + jax.numpy.arange(config.num_seeds))]

    def train():
        states[0], _ = jax.block_until_ready(script.epoch(static, traced, states[0], data))

    return train


def interleaved(functions, rounds, compiled=False):
    """Seconds (rounds,) of each function, if not yet `compiled` after a first call that compiles; each round calls all
    of them in turn."""
    for function in () if compiled else functions.values():
        function()
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return {name: np.array(times) for name, times in seconds.items()}


def machine():
    """What this runs on, in a line."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(": ")[1].strip() for line in file if line.startswith("model name")]
    device, python = jax.devices()[0].device_kind, platform.python_version()
    return (
        f"{len(models)} cores of {models[0] if models else 'unknown'}; {device}; jax {jax.__version__}; Python {python}"
    )


def matrix_products(jaxpr):
    """The matrix products in a jaxpr and those that it calls: the operands' shapes, and which axes are contracted."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(operand.aval.shape for operand in equation.invars), equation.params["dimension_numbers"]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from [*matrix_products(inner)] * equation.params.get("length", 1)  # a scan's


def ceiling(script, config, data):
    """A function that computes nothing but the matrix products of `log_every` updates, in one compiled scan, and their
    floating-point operations in an update."""
    batches = [config.policy_freq] if hasattr(config, "policy_freq") else []
    freq, index = math.prod(batches), np.zeros([*batches, config.batch_size], int)
    state = jax.eval_shape(lambda: script.init_state(config, data, 0))
    batch = jax.eval_shape(script.transitions, data, index)
    products = [*matrix_products(jax.make_jaxpr(partial(script.update, config))(state, batch).jaxpr)]
    rng = np.random.default_rng(0)
    operands = jax.device_put([[rng.normal(size=x).astype(np.float32) for x in shapes] for shapes, _ in products])

    def step(carry, _):
        operands, total = jax.lax.optimization_barrier(carry)  # so that nothing moves out of the loop
        for (a, b), (_, axes) in zip(operands, products):
            total += jax.lax.optimization_barrier(jax.lax.dot_general(a, b, axes)).ravel()[0]
        return (operands, total), None

    run = jax.jit(lambda x: jax.lax.scan(step, (x, jax.numpy.float32(0)), length=config.log_every // freq)[0][1])
    contracted = [np.prod([shapes[0][axis] for axis in axes[0][0]]) for shapes, axes in products]
    flops = sum(2 * np.prod(x) * np.prod(y) / k for ((x, y), _), k in zip(products, contracted))
    return lambda: run(operands).block_until_ready(), flops / freq


def large_product():
    """A function that multiplies matrices (1024, 1024) ten times; its floating-point operations."""
    a = jax.numpy.ones((1024, 1024))
    multiply = jax.jit(lambda a: a @ a)
    return lambda: [multiply(a).block_until_ready() for _ in range(10)], 10 * 2 * 1024**3


def make_config(config, script, **flags):
    fields = dict(dataset_name=config.dataset_name, batch_size=config.batch_size, log_every=config.updates) | flags
    fields |= dict(v_min=-10.0, v_max=10.0) if hasattr(script, "hl_gauss") else {}
    return script.tuned(script.Config(**fields))


def spread(values, form="{:.2f}"):
    """Median, and least and most."""
    return " | ".join([form.format(np.median(values)), f"{form} to {form}".format(values.min(), values.max())])


def header(*columns):
    """Prints the head of a table; each column but the first has two, for a median and for least and most."""
    cells = [cell for column in columns for cell in (column, "least and most")]
    print(f"\n| | {' | '.join(cells)} |\n|{' --- |' * (len(cells) + 1)}")


def compare(config, functions, title, form, compiled=False):
    """Times functions by their names, and prints a row of seconds for each; of another checkout's also the time
    against this one's."""
    seconds = interleaved(functions, config.rounds, compiled)
    header(title, *(["time against this checkout"] if config.against else []))
    for name, times in seconds.items():
        own = seconds[name.removesuffix(f" in {config.against}")]
        cells = [spread(times, form), *([spread(times / own)] if config.against else [])]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def load_part(config, folder):
    """Seconds until a file's transitions are ready on the device."""

    def load(its, path):
        settings = its.rebrac.tuned(its.rebrac.Config(dataset_name=config.dataset_name, dataset_path=path))
        with contextlib.redirect_stdout(io.StringIO()):
            data = its.rebrac.make_dataset(settings, its.rebrac.load_dataset(settings))
        its.rebrac.make_samples(data)
        its.rebrac.with_value_range(settings, jax.block_until_ready(jax.device_put(data)))

    functions = {}
    for size in config.transitions:
        write_dataset(path := os.path.join(folder, f"{size}.hdf5"), size)
        for label, its in checkouts(config).items():
            functions[f"{size:,} transitions{label}"] = partial(load, its, path)
    compare(config, functions, "seconds until they are ready", "{:.2f}")


def command(config, folder, script, path):
    """A run of two updates, and an evaluation of one episode."""
    flags = dict(dataset_name=config.dataset_name, dataset_path=path, results=os.path.join(folder, "results"))
    flags |= dict(log_every=2, num_updates=2, eval_every=2, eval_episodes=1)
    return [sys.executable, f"{script}.py", *[str(word) for key in flags for word in (f"--{key}", flags[key])]]


def start_part(config, folder):
    """Seconds from the command to the first update, which is in train.csv then."""
    cache = os.path.join(folder, "cache")
    write_dataset(path := os.path.join(folder, "start.hdf5"), config.transitions[0])

    def start(its, script, warm):
        if not warm:
            shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(os.path.join(folder, "results"), ignore_errors=True)
        environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=cache, WANDB_MODE="disabled")
        arguments = command(config, folder, script, path)
        process = subprocess.Popen(arguments, cwd=its.directory, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            written = [os.path.join(*parts[:1], "train.csv") for parts in os.walk(os.path.join(folder, "results"))]
            if any(os.path.exists(name) and os.path.getsize(name) for name in written):
                break
            time.sleep(0.01)
        process.kill()
        if process.wait() not in (0, -signal.SIGKILL):
            sys.exit(f"error: {' '.join(arguments)} in {its.directory} has failed")

    functions = {}
    for script in config.scripts:
        for label, its in checkouts(config).items():
            functions[f"{script}, empty cache{label}"] = partial(start, its, script, False)
            functions[f"{script}, full cache{label}"] = partial(start, its, script, True)
    compare(config, functions, "seconds from the command to the first update", "{:.1f}", compiled=True)


PEAK = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""  # in a process of its own: Linux counts what the parent had when it forked as the child's


def memory_part(config, folder):
    """The most memory that a run has had, above what the same run has with 1,000 transitions; and what an interpreter
    has that has only imported what a run needs."""
    sizes = {n: write_dataset(os.path.join(folder, f"{n}.hdf5"), n) for n in (1000, *config.transitions)}
    directory = os.path.dirname(os.path.abspath(__file__))
    environment = dict(os.environ, WANDB_MODE="disabled", JAX_COMPILATION_CACHE_DIR=os.path.join(folder, "cache"))
    peaks = {(script, n): [] for script in config.scripts for n in sizes}

    def peak_of(arguments):
        arguments = [sys.executable, "-c", PEAK, *arguments]
        run = subprocess.run(arguments, cwd=directory, env=environment, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"error: {' '.join(arguments[3:])} has failed: {run.stderr.strip()[-200:]}")
        return int(run.stdout) * 1024 / 1e6

    for i in range(config.rounds + 1):  # the first fills the cache
        for script, n in peaks:
            shutil.rmtree(os.path.join(folder, "results"), ignore_errors=True)
            peak = peak_of(command(config, folder, script, os.path.join(folder, f"{n}.hdf5")))
            peaks[script, n] += [peak] if i else []
    libraries = [peak_of([sys.executable, "-c", "import jax, rebrac; jax.devices()"]) for _ in range(config.rounds)]
    header("MB at most", "above that with 1,000", "as a multiple of the data's size")
    print(f"| interpreter and libraries | {spread(np.array(libraries), '{:.0f}')} | | | | |")
    for (script, n), peak in peaks.items():
        above = np.array(peak) - peaks[script, 1000]
        cells = spread(np.array(peak), "{:.0f}"), spread(above, "{:.0f}"), spread(above / sizes[n] * 1e6)
        print(f"| {script}, {n:,} transitions | {' | '.join(cells)} |", flush=True)


def updates_part(config, folder):
    """Updates a second, and their share of what the update's matrix products alone would allow."""
    data = jax.device_put(random_data())
    programs, (multiply, flops_of_large) = checkouts(config), large_product()
    functions, flops = {"large": multiply}, {}
    for title, (name, flags) in UPDATES.items():
        if name in config.scripts:
            for label, its in programs.items():
                script = getattr(its, name)
                settings = make_config(config, script, **flags)
                functions[title + label] = trainer(script, settings, data)
            script = globals()[name]  # what the products are is this checkout's, whose `update` is known
            functions[title + ", products"], flops[title] = ceiling(script, make_config(config, script, **flags), data)
    seconds = interleaved(functions, config.rounds)
    rate = flops_of_large / seconds["large"]
    header("updates/s", "share of its products alone", "share of a large one's rate")
    for (title, work), label in itertools.product(flops.items(), programs):
        own, alone = seconds[title + label], seconds[title + ", products"]
        cells = spread(config.updates / own, "{:.0f}"), spread(alone / own), spread(work * config.updates / own / rate)
        print(f"| {title}{label}: {work / 1e9:.2f} GFLOP | {' | '.join(cells)} |")
    print(f"\nA product of matrices (1024, 1024): {np.median(rate) / 1e9:.0f} GFLOP/s ({rate.min() / 1e9:.0f} to "
          f"{rate.max() / 1e9:.0f}).", flush=True)  # fmt: skip


def evaluation_part(config, folder):
    """Steps a second of an evaluation of 10 episodes, and 10 more under noise, and of a bare environment that is given
    the same actions, resets included."""
    for i, name in enumerate(config.tasks):
        functions, steps = {}, {}
        for label, its in checkouts(config).items():
            settings = make_config(config, its.rebrac, dataset_name=name, eval_episodes=10)
            env, rows = its.tasks.make_env(name), its.tasks.conditions(settings)
            data = jax.device_put(random_data(100, env.observation_space.shape[0], env.action_space.shape[0]))
            static, traced = its.rebrac.split_config(settings)
            states = jax.jit(partial(its.rebrac.init_states, settings, data))(np.arange(1))
            policy = partial(its.rebrac.act_all, static, traced, states.actor, data)
            envs = its.rebrac.make_envs(settings)
            played = record_actions(envs, partial(its.tasks.evaluate, settings, policy, envs, 0), len(rows))
            steps[name + label] = sum(map(len, played))
            functions[name + label] = partial(its.tasks.evaluate, settings, policy, envs, 0)
            if not label:
                steps[f"{name}, in one process"] = steps[f"{name}, bare"] = steps[name]
                alone = tasks.Envs(name, len(rows), processes=1)
                functions[f"{name}, in one process"] = partial(tasks.evaluate, settings, policy, alone, 0)
                functions[f"{name}, bare"] = partial(replay, its, env, rows, played)
        seconds = interleaved(functions, config.rounds)
        if not i:
            header("steps/s", "share of the bare environment's")
        for title, times in seconds.items():
            speed, bare = steps[title] / times, steps[name] / seconds[f"{name}, bare"]
            cells = spread(speed, "{:.0f}"), spread(speed / bare)
            print(f"| {title} | {' | '.join(cells)} |", flush=True)


def record_actions(envs, run, number):
    """The actions of each of a number of environments while run() steps them."""
    played, step = [[] for _ in range(number)], envs.step

    def recording(running, actions):
        for i, action in zip(running, actions):
            played[i].append(action.copy())
        return step(running, actions)

    envs.step = recording
    run()
    del envs.step
    return played


def replay(its, env, rows, played):
    for row, actions in zip(rows, played):
        its.tasks.reset(env, 0, 0, row[0])
        for action in actions:
            env.step(action)


def regularisers_part(config, folder):
    """The time with each regulariser against none."""
    data = jax.device_put(random_data())
    header("updates/s", "time against none")
    for name in config.scripts:
        script, functions = globals()[name], {}
        for key in dict.fromkeys(["none", *config.variants]):
            functions[key] = trainer(script, make_config(config, script, regularisers=key), data)
        seconds = interleaved(functions, config.rounds)
        for key, times in seconds.items():
            cells = spread(config.updates / times, "{:.0f}"), spread(times / seconds["none"])
            print(f"| {name} {key} | {' | '.join(cells)} |", flush=True)


def seeds_part(config, folder):
    """Updates a second of all seeds together, trained at once."""
    data = jax.device_put(random_data())
    header("updates/s of all seeds", "against one seed")
    for name in config.scripts:
        script = globals()[name]
        functions = {n: trainer(script, make_config(config, script, num_seeds=n), data) for n in (1, 2, 4, 8)}
        seconds = interleaved(functions, config.rounds)
        for n, times in seconds.items():
            speed = n * config.updates / times
            print(f"| {name}, {n} seeds | {spread(speed, '{:.0f}')} | {spread(n * seconds[1] / times)} |", flush=True)


def main(config):
    known = (
        (config.parts, PARTS),
        (config.scripts, ["rebrac", "iql"]),
        (config.variants, VARIANTS),
        (config.tasks, rebrac.TUNED),
    )
    for words, those in known:
        if unknown := set(words) - set(those):
            sys.exit(f"error: unknown {', '.join(sorted(unknown))}; there are {', '.join(those)}")
    if min(config.rounds, config.updates, config.batch_size, len(config.transitions)) < 1 or config.updates % 2:
        sys.exit("error: rounds and batch_size must be 1 or more, updates 2, 4, ..., and transitions a list of numbers")
    if min(config.transitions) < 1000:
        sys.exit("error: transitions must be 1000 or more")
    if config.against and not os.path.isfile(os.path.join(config.against, "rebrac.py")):
        sys.exit(f"error: {config.against} is no checkout of this project: it has no rebrac.py")
    print(f"{machine()}; {config.rounds} rounds; {config.updates} updates; batch {config.batch_size} unless it says")
    for part in PARTS:
        if part in config.parts:
            with tempfile.TemporaryDirectory() as folder:
                globals()[f"{part}_part"](config, folder)


if __name__ == "__main__":
    main(parse(Config))
