"""Times both algorithms' updates with each regulariser against none, interleaved in one run.

    python benchmark.py                              # about 10 minutes on two cores
    python benchmark.py --scripts '[iql]' --rounds 3

In each of `rounds` rounds every variant trains for `updates` updates, in turn. The time against no regulariser is taken
within a round, so that it does not depend on how fast the machine is at the moment.
"""

import importlib
import platform
import sys
import time
from dataclasses import dataclass, field, replace
from typing import List

import jax
import numpy as np
import pyrallis

VARIANTS = {  # by the paper's abbreviations, at its chosen strengths for ReBRAC
    "none": {},
    "DO": dict(actor_dropout=0.1),
    "L2": dict(actor_wd=1e-3),
    "L1": dict(actor_wd=1e-5, actor_l1_ratio=1.0),
    "EN": dict(actor_wd=1e-4, actor_l1_ratio=0.5),
    "LN": dict(actor_ln=True),
    "FN": dict(actor_fn=True),
    "GN": dict(actor_gn=True),
    "BN": dict(actor_bn=True),
    "SN": dict(actor_sn=True),
    "InN": dict(actor_input_noise=0.003),
    "BCN": dict(actor_bc_noise=0.01),
    "GrN": dict(actor_grad_noise=0.01),
    "DO+LN+GrN": dict(actor_dropout=0.1, actor_ln=True, actor_grad_noise=0.01),
}


@dataclass
class Config:
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


def main(config):
    for words, known in ((config.scripts, ["rebrac", "iql"]), (config.variants, VARIANTS)):
        if unknown := set(words) - set(known):
            sys.exit(f"error: unknown {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if min(config.rounds, config.updates // 2, config.batch_size) < 1:
        sys.exit("error: rounds and batch_size must be 1 or more, updates 2 or more")
    print(f"{machine()}; batch {config.batch_size}, {config.rounds} rounds of {config.updates} updates\n")
    print("| | updates/s | time against none, median | least and most |\n| --- | --- | --- | --- |")
    data, chosen = jax.device_put(random_data()), {key: VARIANTS[key] for key in ["none", *config.variants]}
    for name in config.scripts:
        script = importlib.import_module(name)
        fields = dict(dataset_name=config.dataset_name, batch_size=config.batch_size, log_every=config.updates)
        fields |= dict(v_min=-10.0, v_max=10.0) if name == "rebrac" else {}
        plain = script.tuned(script.Config(**fields))
        functions = {key: trainer(script, replace(plain, **flags), data) for key, flags in chosen.items()}
        seconds = interleaved(functions, config.rounds)
        for key, times in seconds.items():
            ratios, speed = times / seconds["none"], config.updates / np.median(times)
            spread = f"{ratios.min():.2f} to {ratios.max():.2f}"
            print(f"| {name} {key} | {speed:.0f} | {np.median(ratios):.2f} | {spread} |", flush=True)


if __name__ == "__main__":
    main(pyrallis.parse(config_class=Config))
