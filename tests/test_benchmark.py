"""The benchmark runs, and what it compares are the programs that it names."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import benchmark
import iql
import rebrac


def test_each_round_calls_every_function_in_turn():
    calls = []
    seconds = benchmark.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4 and all(len(times) == 3 and (times >= 0).all() for times in seconds.values())


@pytest.mark.parametrize("script", [rebrac, iql])
def test_every_variant_is_a_config_of_its_own(script):
    configs = [script.tuned(script.Config(regularisers=name)) for name in benchmark.VARIANTS]
    assert (
        len({script.split_config(config)[0] for config in configs}) >= len(configs) - 1
    )  # L1 and EN differ by a number
    assert len(set(configs)) == len(configs)


def test_an_unknown_name_is_an_error():
    with pytest.raises(SystemExit, match="error: unknown sac; there are rebrac, iql"):
        benchmark.main(benchmark.Config(scripts=["sac"]))


@pytest.mark.parametrize("script, networks", [(rebrac, 2), (iql, 1)])
def test_the_ceiling_has_the_updates_products(script, networks):
    """Counted by hand: layers' multiply-adds for a row, forward once, backward once for inputs and once for weights."""
    flags = dict(critic_loss="mse", v_min=-1.0, v_max=1.0) if script is rebrac else {}
    config = script.tuned(
        script.Config(dataset_name="hopper-medium-v2", batch_size=8, hidden_dim=16, log_every=2, **flags)
    )
    compute, flops = benchmark.ceiling(script, config, benchmark.random_data(size=100))
    compute()
    layers = lambda sizes: np.array([a * b for a, b in zip(sizes, sizes[1:])])
    hidden = [16] * (3 if script is rebrac else 2)
    critic, actor = layers([14, *hidden, 1]), layers([11, *hidden, 3])
    if script is rebrac:
        target = actor.sum() + 2 * critic.sum()
        of_critics = 2 * (3 * critic.sum() - critic[0])  # nothing needs the first layer's gradient by its inputs
        of_actor = 3 * actor.sum() - actor[0] + 2 * 2 * critic.sum()
        expected = target + of_critics + of_actor / 2
    else:
        value, heads = layers([11, *hidden, 1]), 16 * 3
        of_value = 3 * value.sum() - value[0] + 2 * critic.sum()
        of_actor = 3 * (actor.sum() + heads) - actor[0] + value.sum()
        expected = of_value + of_actor + 2 * (3 * critic.sum() - critic[0]) + value.sum()
    assert flops == 2 * 8 * expected


def test_the_other_parts_print_their_tables_also_of_another_checkout(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("rebrac.py", "iql.py", "runs.py", "tasks.py", "mujoco210.py"):
        shutil.copy(os.path.join(ROOT, name), other)
    flags = dict(
        parts="[load, start, evaluation]", scripts="[iql]", rounds=1, updates=2, batch_size=8,
        transitions="[100000]", tasks="[pen-human-v1]", against=other,
    )  # fmt: skip
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    run = subprocess.run([sys.executable, "benchmark.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    lines = [
        line for line in run.stdout.splitlines() if line.startswith("| ") and not line.startswith(("| |", "| ---"))
    ]
    rows = [line.strip("| ").split(" | ") for line in lines]
    names = [row[0] for row in rows]
    twice = lambda *titles: [title + label for label in ("", f" in {other}") for title in titles]
    pen = "pen-human-v1"
    assert names == [
        *twice("100,000 transitions"),
        *twice("iql, empty cache", "iql, full cache"),
        *(pen, f"{pen}, in one process", f"{pen}, bare", f"{pen} in {other}"),
    ]
    assert all(float(row[1]) > 0 for row in rows)


def test_the_other_parts_print_their_tables():
    flags = dict(
        parts="[memory, updates, seeds, regularisers]", scripts="[iql]", variants="[DO]",
        rounds=1, updates=2, batch_size=8, transitions="[2000]",
    )  # fmt: skip
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    run = subprocess.run([sys.executable, "benchmark.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 100 < float(re.search(r"^\| interpreter and libraries \| (\d+) ", run.stdout, re.MULTILINE)[1]) < 500
    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if line.lower().startswith("| iql")]
    memory = ["iql, 1,000 transitions", "iql, 2,000 transitions"]
    assert [row[0] for row in rows] == [
        *memory, "IQL, batch 256: 0.56 GFLOP", "iql none", "iql DO",
        *[f"iql, {n} seeds" for n in (1, 2, 4, 8)],
    ]  # fmt: skip
    assert all(float(row[1]) > 0 for row in rows) and float(rows[3][3]) == 1


def test_a_bare_environment_is_given_what_an_evaluation_played():
    config = iql.tuned(iql.Config(dataset_name="hopper-medium-v2", eval_episodes=2))
    envs = benchmark.tasks.make_envs(config)
    policy = lambda states: np.tanh(states[..., :3])
    results, total = [], []

    def run():
        results.append(benchmark.tasks.evaluate(config, policy, envs, 0)[0])

    played, env = benchmark.record_actions(envs, run, 6), benchmark.tasks.make_env("hopper-medium-v2")
    step = env.step
    env.step = lambda action: (answer := step(action), total.append(answer[1]))[0]
    benchmark.replay(benchmark, env, benchmark.tasks.conditions(config), played)
    np.testing.assert_allclose(sum(total), results[0].sum(), rtol=1e-9)


def test_a_process_peak_memory_is_its_own():
    """And not that of the process that has started it, which Linux counts in, too."""
    held = np.ones(400_000_000, np.uint8)
    command = [sys.executable, "-c", benchmark.PEAK, sys.executable, "-c", "x = bytearray(b'1') * 200_000_000"]
    peak = int(subprocess.check_output(command)) * (1 if sys.platform == "darwin" else 1024)
    assert 200e6 < peak < 260e6 < held.nbytes
