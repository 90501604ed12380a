"""Times both algorithms' updates: against their matrix products alone, with each regulariser, and with several seeds.

    python benchmark.py                                                    # about 20 minutes on two cores
    python benchmark.py --parts '[regularisers]' --scripts '[iql]' --rounds 3

In each of `rounds` rounds every variant trains for `updates` updates, in turn. Ratios are taken within a round, so that
they do not depend on how fast the machine is at the moment.
"""

import importlib
import platform
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import List

import jax
import numpy as np
import pyrallis

import rebrac

VARIANTS = ["none", *rebrac.CHOSEN, "DO+LN+GrN"]  # by the paper's abbreviations, at its chosen strengths
PARTS = ("updates", "regularisers", "seeds")
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


def trainer(script, config, data):
    """A function that trains on for `log_every` updates and returns when they are done."""
    static, traced = script.split_config(config)
    states = [script.init_states(config, data)]

    def train():
        states[0], _ = jax.block_until_ready(script.epoch(static, traced, states[0], data))

    return train


def interleaved(functions, rounds):
    """Seconds (rounds,) of each function, after a first call that compiles; each round calls all of them in turn."""
    for function in functions.values():
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
                yield from matrix_products(inner)


def ceiling(script, config, data):
    """A function that computes nothing but the matrix products of `log_every` updates, in one compiled scan, and their
    floating-point operations in an update."""
    freq = getattr(config, "policy_freq", 1)
    variants = [{}] if freq == 1 else [dict(update_actor=i == freq - 1) for i in range(freq)]
    state = jax.eval_shape(lambda: script.init_state(config, data, 0))
    batch = jax.eval_shape(script.transitions, data, np.zeros(config.batch_size, int))
    products = []
    for flags in variants:
        products += matrix_products(jax.make_jaxpr(partial(script.update, config, **flags))(state, batch).jaxpr)
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


def make_config(config, name, **flags):
    fields = dict(dataset_name=config.dataset_name, batch_size=config.batch_size, log_every=config.updates) | flags
    fields |= dict(v_min=-10.0, v_max=10.0) if name == "rebrac" else {}
    script = importlib.import_module(name)
    return script, script.tuned(script.Config(**fields))


def spread(values, form="{:.2f}"):
    """Median, and least and most."""
    return " | ".join([form.format(np.median(values)), f"{form} to {form}".format(values.min(), values.max())])


def updates_part(config, data):
    """Updates a second, and their share of what the update's matrix products alone would allow."""
    multiply, flops_of_large = large_product()
    functions, flops = {"large": multiply}, {}
    for title, (name, flags) in UPDATES.items():
        if name in config.scripts:
            script, own = make_config(config, name, **flags)
            functions[title] = trainer(script, own, data)
            functions[title + ", products"], flops[title] = ceiling(script, own, data)
    seconds = interleaved(functions, config.rounds)
    rate = flops_of_large / seconds["large"]
    columns = ("", "updates/s", "least and most", "GFLOP", "share of its products alone", "least and most",
               "share of a large one's rate", "least and most")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for title, work in flops.items():
        own, alone = seconds[title], seconds[title + ", products"]
        cells = spread(config.updates / own, "{:.0f}"), f"{work / 1e9:.2f}", spread(alone / own)
        print(f"| {title} | {' | '.join(cells)} | {spread(work * config.updates / own / rate)} |", flush=True)
    print(f"\nA product of matrices (1024, 1024): {np.median(rate) / 1e9:.0f} GFLOP/s ({rate.min() / 1e9:.0f} to "
          f"{rate.max() / 1e9:.0f}).\n")  # fmt: skip


def regularisers_part(config, data):
    """The time with each regulariser against none."""
    print("| | updates/s | time against none, median | least and most |\n| --- | --- | --- | --- |")
    for name in config.scripts:
        functions = {}
        for key in dict.fromkeys(["none", *config.variants]):
            functions[key] = trainer(*make_config(config, name, regularisers=key), data)
        seconds = interleaved(functions, config.rounds)
        for key, times in seconds.items():
            speed = config.updates / np.median(times)
            print(f"| {name} {key} | {speed:.0f} | {spread(times / seconds['none'])} |", flush=True)
    print()


def seeds_part(config, data):
    """Updates a second of all seeds together, trained at once."""
    print("| | updates/s of all seeds | least and most | against one seed | least and most |\n" + "| --- " * 5 + "|")
    for name in config.scripts:
        functions = {n: trainer(*make_config(config, name, num_seeds=n), data) for n in (1, 2, 4, 8)}
        seconds = interleaved(functions, config.rounds)
        for n, times in seconds.items():
            speed = n * config.updates / times
            print(f"| {name}, {n} seeds | {spread(speed, '{:.0f}')} | {spread(n * seconds[1] / times)} |", flush=True)
    print()


def main(config):
    known = ((config.parts, PARTS), (config.scripts, ["rebrac", "iql"]), (config.variants, VARIANTS))
    for words, those in known:
        if unknown := set(words) - set(those):
            sys.exit(f"error: unknown {', '.join(sorted(unknown))}; there are {', '.join(those)}")
    if min(config.rounds, config.updates // 2, config.batch_size) < 1:
        sys.exit("error: rounds and batch_size must be 1 or more, updates 2 or more")
    print(
        f"{machine()}; {config.rounds} rounds of {config.updates} updates; batch {config.batch_size} unless it says\n"
    )
    data = jax.device_put(random_data())
    for part in PARTS:
        if part in config.parts:
            globals()[f"{part}_part"](config, data)


if __name__ == "__main__":
    main(pyrallis.parse(config_class=Config))
