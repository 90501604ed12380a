"""Measures what a plan of a sweep rests on (plan.py), in a process of its own.

    python -m tools.measure 2 < questions.json  # when 2 programs share the machine

A process of its own, since JAX keeps a GPU's memory for itself.
"""

import functools
import json
import os
import signal
import sys
import time
from dataclasses import replace

if __name__ == "__main__":  # Ctrl-C shows no traceback in the imports, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import jax
import numpy as np

from harness.config import configure_jax, decode
from harness.errors import one_line_errors
from harness.evaluation import evaluation_episodes
from harness.lockstep import Envs, available_cores
from harness.members import check_device, has_accelerator, split_config, stack_configs
from harness.memory import (
    first_members,
    first_state,
    free_host_memory,
    free_memory,
    needed_memory,
    num_bytes,
    num_fitting,
)
from harness.policies import host_policy
from harness.scripts import load_script
from tools.jobs import share_of
from tools.timing import (
    RANGE,
    first_states,
    machine,
    matrix_products,
    num_operations,
    random_data,
    stopwatch,
    trainer,
)

SECONDS = 4  # of measuring a rate


def take_share(processes):
    """Take the cores and GPUs that the first of so many programs has."""
    os.sched_setaffinity(0, share_of(sorted(os.sched_getaffinity(0)), 0, processes))
    gpus = os.getenv("CUDA_VISIBLE_DEVICES")
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(share_of(gpus.split(","), 0, processes))


def measurements(questions):
    """Return what is measured for a plan, from a question about each kind of program.

    "kinds" has the `member_costs` of each kind. "rows" has each row's memory, of its kind with the
    most operations an update, and its steps of environments a second. "speeds" has the rates of
    each script's first kind.
    """
    started = time.monotonic()
    kinds = [Kind(**question) for question in questions]
    speeds = {}
    rows = {}
    for kind in kinds:
        if kind.row not in rows:
            own = [other for other in kinds if other.row == kind.row]
            largest = max(own, key=lambda other: other.costs["operations"])
            rows[kind.row] = dict(memory_of(largest), steps=steps_per_second(kind))
        if kind.script.NAME not in speeds:
            fitting = rows[kind.row]["fitting"] if kind.as_many_as_fit else kind.config.num_seeds
            speeds[kind.script.NAME] = speed_of(kind, fitting)
    return dict(
        kinds=[kind.costs for kind in kinds],
        speeds=speeds,
        rows=rows,
        machine=machine(),
        cores=available_cores(),
        accelerator=has_accelerator(),
        devices=jax.local_device_count(),
        free=free_memory(),
        free_host=free_host_memory(),
        seconds=time.monotonic() - started,
    )


class Kind:
    """A kind of program. `configs` are the runs of one such program, each a dictionary.

    `shapes` are the steps of the data, and the entries of a state and of an action.
    """

    def __init__(self, script, configs, row, as_many_as_fit, shapes):
        self.script = load_script(script)
        self.row = row
        self.as_many_as_fit = as_many_as_fit
        self.size, *self.dims = shapes
        runs = [self.script.Config(**decode(self.script.Config, fields)) for fields in configs]
        config = replace(stack_configs(runs), seed=0)
        for name, value in RANGE.items():
            if getattr(config, name, 0) is None:
                config = replace(config, **{name: value})
        self.config = config  # of all members
        self.about = f"{config.dataset_name}, batch {config.batch_size}"
        self.costs = member_costs(self.script, config, self.data(2))

    def data(self, size):
        return random_data(size, *self.dims)


def member_costs(script, config, data):
    """Return what follows from the shapes of a member, without compiling anything.

    That is the operations of an update, the bytes and number of its arrays, and the columns of
    train.csv.
    """
    state = jax.eval_shape(functools.partial(first_state, script, config), data)
    states = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), state)
    num_updates = getattr(config, "policy_freq", 1)
    static, traced = split_config(replace(first_members(config, 1), log_every=num_updates))
    trace = jax.make_jaxpr(script.epoch.program, static_argnums=0, return_shape=True)
    program, (_, infos) = trace(static, traced, states, data)
    work = sum(num_operations(*product) for product in matrix_products(program.jaxpr))
    return dict(
        operations=work / num_updates,
        bytes=num_bytes(state),
        arrays=len(jax.tree.leaves(state)),
        columns=2 + len(infos),
    )


def memory_of(kind):
    """Return the bytes that a kind needs, how many members fit, and which program it is."""
    memory = needed_memory(kind.script, kind.config, kind.data(kind.size))
    return dict(memory._asdict(), fitting=num_fitting(memory), about=kind.about)


def speed_of(kind, fitting):
    """Return the rates of as many of a kind's members as fit."""
    config = first_members(kind.config, min(kind.config.num_seeds, fitting))
    speed = updates_per_second(kind.script, config, jax.device_put(kind.data(kind.size)))
    operations = speed["updates"] * kind.costs["operations"]
    return dict(speed, operations=operations, about=kind.about)


def updates_per_second(script, config, data):
    """Return the rate of all members, how many they are, and the seconds to compile.

    On a CPU at most two members are measured, since there members together take as long as one
    after the other.
    """
    if not has_accelerator():
        log_every = 10 * getattr(config, "policy_freq", 1)
        config = replace(first_members(config, min(2, config.num_seeds)), log_every=log_every)
    train = trainer(script, config, data)
    first = stopwatch(train)
    times = [stopwatch(train)]
    while sum(times) < SECONDS:
        times.append(stopwatch(train))
    seconds = float(np.median(times))
    rate = config.num_seeds * config.log_every / seconds
    return dict(updates=rate, members=config.num_seeds, start=max(0.0, first - seconds))


def steps_per_second(kind):
    """Return the rate of up to 32 environments that one member's policy steps together.

    They go on after their episodes have ended. On the ground Hopper and Walker2d are quicker, by up
    to 15 %.
    """
    config = first_members(kind.config, 1)
    number = min(32, kind.config.num_seeds * len(evaluation_episodes(config)))
    data = kind.data(2)
    actor = first_states(kind.script, config, data).actor
    act = host_policy(kind.script.policy, config, actor, data)
    envs = Envs(config.dataset_name, number)
    states = envs.reset([(0, 0, episode) for episode in range(number)])
    np.array(act(states[None]))  # compiles it
    started = time.perf_counter()
    rounds = 0
    while time.perf_counter() < started + SECONDS / 2:
        states, _, _ = envs.step(np.arange(number), np.array(act(states[None]))[0])
        rounds += 1
    return rounds * number / (time.perf_counter() - started)


def main():
    take_share(int(sys.argv[1]))
    configure_jax(deterministic=False)
    check_device()
    print(json.dumps(measurements(json.load(sys.stdin))))


if __name__ == "__main__":
    with one_line_errors():
        main()
