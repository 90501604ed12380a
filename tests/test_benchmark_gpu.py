"""The benchmark's part `gpu`, small and on the CPU."""

import re
import threading
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

import iql
from harness.errors import UserError
from tools import benchmark, benchmark_gpu
from tools.timing import first_states, make_config, random_data

CONFIG = benchmark.Config(parts=["gpu"], scripts=["iql"], updates=2, rounds=1, members=[1, 2])


def test_members_are_the_configs_runs_together():
    """After an epoch each is where its own config ends alone."""
    members = benchmark_gpu.Members(CONFIG, "iql", 2)
    members()
    states = jax.device_get(members.states.critic)
    for i, rate in enumerate((1e-4, 1e-3)):
        own = make_config(CONFIG, "iql", seed=i, actor_learning_rate=rate)
        alone, _ = iql.epoch(own, first_states(iql, own, random_data()), random_data())
        for x, y in zip(jax.tree.leaves(states), jax.tree.leaves(alone.critic)):
            np.testing.assert_allclose(x[i], y[0], rtol=1e-4, atol=1e-6)
    assert 0.005 < members.gigabytes() < 1


def test_the_part_is_not_among_those_that_run_by_default():
    assert "gpu" not in benchmark.Config().parts
    assert "gpu" in benchmark.PARTS


@pytest.mark.slow
def test_a_small_one_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EPISODE_STEPS", "20")
    config = replace(CONFIG, gpu_file=str(tmp_path / "gpu.md"), run_updates=200)
    benchmark_gpu.gpu_part(config, str(tmp_path))
    printed = capsys.readouterr().out
    with open(config.gpu_file) as file:
        assert file.read() == printed
    for number in (1, 2):
        row = re.search(rf"\| IQL, members: {number} \|(.*)\|", printed)[1].split("|")
        assert len(row) == 10
        assert float(row[0]) > 0
        assert 0 < float(row[4]) < 1.5
    about = r"IQL, 200 updates on the bundled Hopper data, seed 0: score .+, \d+ s in all\. "
    about += r"With ten times as many evaluations 1,000,000 updates take ([\d.]+) minutes\."
    assert float(re.search(about, printed)[1]) > 1
    assert "IQL, --deterministic true, 4 updates twice: the same bits." in printed


def test_what_comes_before_the_first_evaluation_is_counted_once():
    evaluated = [30 + 5 * i for i in range(10)]  # seconds; 5 for each 10,000 updates
    minutes = benchmark_gpu.minutes_with_all(evaluated, 100_000)
    assert minutes == pytest.approx((30 + 99 * 5) / 60)


def test_a_run_that_takes_too_long_is_killed(tmp_path):
    end = time.monotonic() + 2
    with pytest.raises(benchmark_gpu.OutOfTime):
        benchmark_gpu.run_script("iql", str(tmp_path), end, num_updates=1_000_000)
    assert time.monotonic() < end + 5


def test_a_run_that_is_killed_before_its_time_has_failed(tmp_path, monkeypatch):
    class Killer(threading.Timer):
        def __init__(self, seconds, kill):
            super().__init__(0.5, kill)

    monkeypatch.setattr(benchmark_gpu.threading, "Timer", Killer)
    with pytest.raises(UserError, match="was killed, perhaps since memory had run out"):
        benchmark_gpu.run_script("iql", str(tmp_path), time.monotonic() + 300)


def test_a_cpu_prints_and_writes_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_gpu, "LIMIT", -1)
    monkeypatch.setattr(benchmark_gpu, "ROOT", str(tmp_path))
    monkeypatch.setattr(benchmark_gpu, "has_accelerator", lambda: False)
    benchmark_gpu.gpu_part(CONFIG, str(tmp_path))
    assert "Left out for lack of time" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()


def test_an_interruption_leaves_the_earlier_file(tmp_path, monkeypatch):
    file = tmp_path / "gpu.md"
    file.write_text("measured before")

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark_gpu, "machine", interrupt)
    with pytest.raises(KeyboardInterrupt):
        benchmark_gpu.gpu_part(replace(CONFIG, gpu_file=str(file)), str(tmp_path))
    assert file.read_text() == "measured before"


def test_td3_bc_is_timed(capsys):
    benchmark_gpu.time_td3_bc(CONFIG)
    row = re.search(r"\| TD3\+BC \| ([\d.]+) \|", capsys.readouterr().out)
    assert float(row[1]) > 1


def test_what_there_is_no_time_for_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_gpu, "LIMIT", -1)
    config = replace(CONFIG, gpu_file=str(tmp_path / "gpu.md"))
    benchmark_gpu.gpu_part(config, str(tmp_path))
    assert capsys.readouterr().out.count("Left out for lack of time: ") == 3
