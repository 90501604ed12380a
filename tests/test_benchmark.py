"""The benchmark runs, and what it compares are the programs that it names."""

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
    configs = [script.tuned(script.Config(**flags)) for flags in benchmark.VARIANTS.values()]
    assert (
        len({script.split_config(config)[0] for config in configs}) >= len(configs) - 1
    )  # L1 and EN differ by a number
    assert len(set(configs)) == len(configs)


def test_the_command_prints_a_row_for_each_variant():
    flags = ["--scripts", "[iql]", "--variants", "[LN, DO]", "--rounds", "1", "--updates", "2", "--batch_size", "32"]
    run = subprocess.run([sys.executable, "benchmark.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [line.split(" | ") for line in run.stdout.splitlines() if line.startswith("| iql")]
    assert [row[0] for row in rows] == [f"| iql {key}" for key in ("none", "LN", "DO")]
    assert float(rows[0][2]) == 1 and all(np.isfinite(float(row[1])) for row in rows)
    wrong = subprocess.run(
        [sys.executable, "benchmark.py", "--scripts", "[sac]"], cwd=ROOT, capture_output=True, text=True
    )
    assert wrong.stderr == "error: unknown sac; there are rebrac, iql\n"
