"""The benchmark's part `gpu`: what a GPU does in 8 minutes. A CPU can run it, too, only smaller.

    python -m tools.benchmark --parts '[gpu]' --rounds 3
    python -m tools.benchmark --parts '[gpu]' --members '[1, 2]' --run_updates 1000  # on a CPU

It prints what it measures. On a GPU it also writes it to data/gpu.md, which tools/README.md shows.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial

import jax
import numpy as np

from harness.checkpoint import read_checkpoint
from harness.errors import UserError, disk_errors
from harness.members import has_accelerator, split_config, stack_configs
from harness.scripts import ROOT, scripts
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
)

LIMIT = 400  # seconds, after which nothing is begun and whole runs are stopped
WHOLE = ("iql", "rebrac")  # scripts whose whole runs are timed, first of all
FILE = os.path.join(ROOT, "data", "hopper_medium-v2.hdf5")


class OutOfTime(Exception):
    """There is no time left to measure something."""


def gpu_part(config, folder):
    """Print the tables, and write them to the config's `gpu_file`."""
    path = config.gpu_file
    if path is None and has_accelerator():
        path = os.path.join(ROOT, "data", "gpu.md")
    if path is None:
        return measure_all(config, folder)
    with disk_errors(path):
        file = open(f"{path}.partial", "w")
    with file, contextlib.redirect_stdout(Both(sys.stdout, file)):
        measure_all(config, folder)
    os.replace(f"{path}.partial", path)  # so an interruption leaves the earlier file whole


def measure_all(config, folder):
    """Measure the parts one after the other, until the time is up."""
    end = time.monotonic() + LIMIT
    print(f"python -m tools.benchmark --parts '[gpu]': {machine()}")
    for about, measure in parts(config, folder, end):
        try:
            check_time(end)
            measure()
        except OutOfTime:
            print(f"\nLeft out for lack of time: {about}.", flush=True)


def check_time(end):
    """Raise OutOfTime if it is later than `end`."""
    if time.monotonic() > end:
        raise OutOfTime


def parts(config, folder, end):
    """Yield pairs of a part's title and the function that measures it, the most wanted first."""
    whole = [name for name in WHOLE if name in config.scripts]
    others = [name for name in config.scripts if name not in WHOLE]
    for name in whole:
        yield f"members of {name}", partial(time_members, config, name)
        yield f"a whole run of {name}", partial(time_run, config, folder, name, end)
    if "rebrac" in whole:
        yield "TD3+BC", partial(time_td3_bc, config)
    for name in whole:
        yield f"the same bits of {name}", partial(compare_bits, config, folder, name, end)
    for name in others:
        yield f"members of {name}", partial(time_members, config, name)


class Both:
    """A stream that writes to two others."""

    def __init__(self, *streams):
        self.streams = streams

    def write(self, text):
        for stream in self.streams:
            stream.write(text)

    def flush(self):
        for stream in self.streams:
            stream.flush()


# --- Members ---


class Members:
    """Some members of an algorithm, whose seeds and learning rates differ, and their program."""

    def __init__(self, config, name, number, **flags):
        script = scripts()[name]
        rates = np.geomspace(1e-4, 1e-3, number)
        configs = []
        for seed, rate in enumerate(rates.tolist()):
            own = dict(seed=seed, actor_learning_rate=rate) | flags
            configs.append(make_config(config, name, **own))
        settings = stack_configs(configs)
        self.data = jax.device_put(random_data())
        self.states = first_states(script, settings, self.data)
        static, self.traced = split_config(settings)
        lowered = script.epoch.program.lower(static, self.traced, self.states, self.data)
        self.epoch = lowered.compile()

    def __call__(self):
        states = self.epoch(self.traced, self.states, self.data)
        self.states, _ = jax.block_until_ready(states)

    def gigabytes(self):
        """Return the device memory that an epoch needs, data and states included."""
        memory = self.epoch.memory_analysis()
        used = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return (used + memory.temp_size_in_bytes - memory.alias_size_in_bytes) / 1e9


def time_members(config, name):
    """Time the updates of several numbers of members, and of a large product of matrices."""
    size = 8192 if has_accelerator() else 1024
    large = ([(size, size), (size, size)], (((1,), (0,)), ((), ())))
    script = scripts()[name]
    products = products_of_two_updates(script, make_config(config, name), random_data())
    work = sum(num_operations(*product) for product in products) / 2  # of an update
    things = {number: Members(config, name, number) for number in config.members}
    seconds = interleaved({"large": multiplier([large], 10), **things}, config.rounds)
    ceiling = 10 * num_operations(*large) / seconds["large"]
    print_head(
        "updates/s of all members",
        f"against {config.members[0]}",
        "share of a large product's rate",
        "GB",
        "minutes for 1,000,000 updates of all",
    )
    for number, members in things.items():
        speed = number * config.updates / seconds[number]
        minutes = minutes_of_a_million(seconds[number], config.updates)
        alone = config.updates / seconds[config.members[0]] * config.members[0]
        memory = np.full(config.rounds, members.gigabytes())
        cells = [spread(speed, ".0f"), spread(speed / alone), spread(work * speed / ceiling, ".4f")]
        cells += [spread(memory), spread(minutes, ".1f")]
        print_row(f"{script.NAME}, members: {number}", *cells)
    print(f"\nA product of matrices ({size}, {size}): {np.median(ceiling) / 1e12:.2f} TFLOP/s.")


def minutes_of_a_million(seconds, updates):
    """Return the minutes that 1,000,000 updates take at this rate."""
    return seconds / updates * 1e6 / 60


def time_td3_bc(config):
    """Time ReBRAC's preset td3-bc, a single run without evaluation."""
    member = Members(config, "rebrac", 1, preset="td3-bc", actor_learning_rate=3e-4)
    seconds = interleaved({"TD3+BC": member}, config.rounds)["TD3+BC"]
    print_head("minutes for 1,000,000 updates")
    print_row("TD3+BC", spread(minutes_of_a_million(seconds, config.updates), ".1f"))


# --- Whole runs ---


def run_script(name, results, end, **flags):
    """Run a script on the bundled Hopper data.

    Returns its directory and the lines that it printed, as pairs of seconds from the start and
    text. A run that isn't finished at the time `end` is killed, and raises OutOfTime.
    """
    words = [sys.executable, f"{name}.py", f"--dataset_name={DATASET}", f"--dataset_path={FILE}"]
    words += [f"--results={results}", *(f"--{key}={value}" for key, value in flags.items())]
    environment = dict(os.environ, WANDB_MODE="disabled")
    started = time.monotonic()
    lines = []
    with tempfile.TemporaryFile("w+") as errors:
        pipes = dict(stdout=subprocess.PIPE, stderr=errors, text=True)
        with subprocess.Popen(words, cwd=ROOT, env=environment, **pipes) as run:
            timer = threading.Timer(end - started, run.kill)
            timer.start()
            try:
                for line in run.stdout:
                    lines.append((time.monotonic() - started, line.strip()))
            finally:
                timer.cancel()
        if run.returncode == -signal.SIGKILL:
            check_time(end)
            raise UserError(f"{' '.join(words)} was killed, perhaps since memory had run out")
        if run.returncode != 0:
            errors.seek(0)
            raise UserError(f"{' '.join(words)} has failed: {errors.read().strip()[-200:]}")
    _, last = lines[-1]
    return last.rpartition("; ")[2], lines


def time_run(config, folder, name, end):
    """Time a whole run with ten evaluations; reckon what 1,000,000 updates take."""
    updates = config.run_updates
    flags = dict(num_updates=updates, eval_every=updates // 10, log_every=updates // 100)
    directory, lines = run_script(name, f"{folder}/whole", end, **flags)
    with open(os.path.join(directory, "finished.json")) as file:
        score = json.load(file)["score"]
    in_all, _ = lines[-1]
    evaluated = [seconds for seconds, line in lines if re.match(r"[\d,]+ updates ", line)]
    minutes = minutes_with_all(evaluated, updates)
    print(
        f"\n{scripts()[name].NAME}, {updates:,} updates on the bundled Hopper data, seed 0: score "
        f"{score}, {in_all:.0f} s in all. With ten times as many evaluations 1,000,000 updates "
        f"take {minutes:.1f} minutes.",
        flush=True,
    )


def minutes_with_all(evaluated, updates):
    """Return the minutes that 1,000,000 updates take, with evaluations.

    `evaluated` has the seconds at which each of ten evaluations ended in a run of `updates`. What
    comes before the first of them, such as compilation, is counted once.
    """
    first, last = evaluated[0], evaluated[-1]
    seconds = (last - first) / (0.9 * updates)  # an update's, with its share of an evaluation
    return (first + (1e6 - 0.1 * updates) * seconds) / 60


def compare_bits(config, folder, name, end):
    """Say whether two runs with --deterministic true end in the same bits."""
    arrays = []
    updates = config.run_updates // 50
    flags = dict(num_updates=updates, eval_every=updates, log_every=updates // 2)
    for results in ("first", "second"):
        deterministic = dict(deterministic="true", actor_dropout=0.1)
        directory, _ = run_script(name, f"{folder}/{results}", end, **flags, **deterministic)
        arrays.append(read_checkpoint(os.path.join(directory, "checkpoint.npz"))[0])
    first, second = arrays
    same = all(np.array_equal(first[key], second[key]) for key in first)
    text = "the same bits" if same else "other bits"
    print(f"\n{scripts()[name].NAME}, --deterministic true, {updates:,} updates twice: {text}.")
