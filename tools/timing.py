"""What the benchmarks share: rounds, tables, and an algorithm's updates and matrix products."""

import math
import platform
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from harness.lockstep import available_cores
from harness.members import init_states, split_config
from harness.scripts import scripts
from harness.versions import cpu_model

DATASET = "hopper-medium-v2"  # whose shapes and hyperparameters are taken
RANGE = dict(v_min=-10.0, v_max=10.0)  # in place of what a script takes from the dataset


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
    device = jax.devices()[0].device_kind
    python = platform.python_version()
    cores = available_cores()
    return f"{cores} cores of {cpu_model()}; {device}; jax {jax.__version__}; Python {python}"


# --- Updates ---


def make_config(config, name, **flags):
    """Return a config of the script `name`, whose epoch is one timing."""
    script = scripts()[name]
    fields = dict(dataset_name=DATASET, batch_size=256, log_every=config.updates)
    fields |= {name: value for name, value in RANGE.items() if hasattr(script.Config, name)}
    return script.tuned(script.Config(**{**fields, **flags}))


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


def first_states(script, config, data):
    return init_states(script.init_state, config, script.transitions(data, np.arange(1)))


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
    """Return the matrix products of two updates: ReBRAC's actor is updated in each second one."""
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
