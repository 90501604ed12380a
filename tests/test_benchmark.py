"""The benchmark runs, and what it compares are the programs that it names."""

import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from conftest import ROOT, both_scripts

import bcq
import cql
import iql
import rebrac
from harness.environments import make_env
from harness.errors import UserError
from harness.evaluation import evaluate, evaluation_episodes
from harness.members import split_config
from harness.scripts import scripts
from tools import benchmark

# --- Config ---


@both_scripts
def test_every_variant_is_a_config_of_its_own(script):
    names = ["none", *benchmark.regularisers(script)]
    configs = [script.tuned(script.Config(regularisers=name)) for name in names]
    assert len(set(configs)) == len(configs)
    assert len(configs) >= (16 if script.BEST else 15)  # a fork may have more
    programs = {split_config(config)[0] for config in configs}
    assert len(programs) >= len(configs) - 1  # L1 and EN differ by a number


def test_all_algorithms_and_parts_are_timed():
    config = benchmark.Config()
    assert config.scripts == list(scripts())
    assert {"rebrac", "iql", "cql"} <= set(config.scripts)
    assert len(config.parts) == 7
    benchmark.check_config(config)


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(scripts=["sac"]), "unknown sac; there are rebrac, "),
        (dict(parts=["lod"]), "unknown lod; there are load, start, "),
        (dict(variants=["DP"]), "unknown regulariser 'DP'; "),
        (dict(rounds=0), "rounds must be 1 or more"),
        (dict(updates=3), "updates 2, 4, ..."),
        (dict(run_updates=1050), "run_updates must be 200, 400, ..."),
        (dict(run_updates=0), "run_updates must be 200, 400, ..."),
        (dict(scripts=[]), "scripts must be some of rebrac, "),
        (dict(members=[]), "members must be numbers of 1 or more"),
        (dict(members=[0]), "members must be numbers of 1 or more"),
        (dict(transitions=[]), "transitions must be numbers of 1000 or more"),
    ],
)
def test_a_senseless_flag_is_an_error_before_any_work(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        benchmark.check_config(benchmark.Config(**flags))


# --- Timing ---


def test_each_round_calls_every_function_in_turn():
    calls = []
    functions = {name: partial(calls.append, name) for name in "ab"}
    seconds = benchmark.interleaved(functions, rounds=3)
    assert calls == ["a", "b"] * 4
    for times in seconds.values():
        assert times.shape == (3,)
        assert np.all(times >= 0)


def test_the_first_round_does_not_count():
    values = iter([100, 1, 2])
    measured = benchmark.interleaved({"a": None}, rounds=2, measure=lambda _: next(values))
    np.testing.assert_array_equal(measured["a"], [1, 2])


def test_a_table_has_the_median_the_least_and_the_most(capsys):
    benchmark.print_head("updates/s", "time")
    values = np.array([3.0, 1.0, 10.0])
    benchmark.print_row("a", benchmark.spread(values, ".0f"), benchmark.spread(values))
    assert capsys.readouterr().out.splitlines() == [
        "",
        "| | updates/s | least and most | time | least and most |",
        "| --- | --- | --- | --- | --- |",
        "| a | 3 | 1 to 10 | 3.00 | 1.00 to 10.00 |",
    ]


# --- Matrix products ---


def layer_products(*sizes):
    """Return the multiply-adds of each layer of a network, for a row."""
    return np.array([a * b for a, b in zip(sizes, sizes[1:])])


def expected_products(script):
    """Count an update's multiply-adds for a row by hand, for layers of 16 units.

    A layer has one product forward, one backward for its weights and one for its inputs. Nothing
    needs the gradient by the inputs of a first layer.
    """
    if script is rebrac:
        critic = layer_products(14, 16, 16, 16, 1)
        actor = layer_products(11, 16, 16, 16, 3)
        target = actor.sum() + 2 * critic.sum()
        of_critics = 2 * (3 * critic.sum() - critic[0])
        of_actor = 3 * actor.sum() - actor[0] + 2 * 2 * critic.sum()
        return target + of_critics + of_actor / 2
    if script is bcq:
        critic = layer_products(14, 16, 16, 1)
        perturbation = layer_products(14, 16, 16, 3)
        encoder = np.array([14 * 16, 16 * 16, 2 * 16 * 6])  # with two last layers
        decoder = layer_products(17, 16, 16, 3)
        of_vae = 3 * encoder.sum() - encoder[0] + 3 * decoder.sum()
        target = 10 * (decoder.sum() + perturbation.sum() + 2 * critic.sum())
        of_critics = 2 * (3 * critic.sum() - critic[0])
        of_actor = decoder.sum() + 3 * perturbation.sum() - perturbation[0] + 2 * critic.sum()
        return of_vae + target + of_critics + of_actor
    if script is cql:
        critic = layer_products(14, 16, 16, 16, 1)
        actor = layer_products(11, 16, 16, 16, 3)
        samples = 2 * (actor.sum() + 16 * 3)  # at s and s'
        target = 2 * critic.sum()
        of_critics = 31 * 2 * (3 * critic.sum() - critic[0])  # of the data's action and 30 more
        of_actor = 3 * (actor.sum() + 16 * 3) - actor[0] + 2 * 2 * critic.sum()
        return samples + target + of_critics + of_actor
    critic = layer_products(14, 16, 16, 1)
    actor = layer_products(11, 16, 16, 3)
    value = layer_products(11, 16, 16, 1)
    of_value = 3 * value.sum() - value[0] + 2 * critic.sum()
    of_actor = 3 * (actor.sum() + 16 * 3) - actor[0] + value.sum()  # it has two last layers
    of_critics = 2 * (3 * critic.sum() - critic[0]) + value.sum()
    return of_value + of_actor + of_critics


@both_scripts
def test_the_products_alone_are_those_of_an_update(script):
    flags = dict(critic_loss="mse") if script is rebrac else {}
    config = benchmark.make_config(
        benchmark.Config(updates=4), script.__name__, batch_size=8, hidden_dim=16, **flags
    )
    data = benchmark.random_data(size=100)
    products = benchmark.products_of_two_updates(script, config, data)
    operations = sum(benchmark.num_operations(*product) for product in products)
    assert operations == 2 * (2 * 8 * expected_products(script))
    benchmark.multiplier(products, 2)()


def test_the_operations_of_a_batched_product_are_counted():
    shapes = [(5, 2, 3), (5, 3, 4)]
    assert benchmark.num_operations(shapes, (((2,), (1,)), ((0,), (0,)))) == 5 * 2 * 3 * 4 * 2


# --- Evaluation and memory ---


def test_a_bare_environment_is_given_what_an_evaluation_played(monkeypatch):
    monkeypatch.setenv("EPISODE_STEPS", "15")
    config = iql.tuned(iql.Config(dataset_name="hopper-medium-v2", eval_episodes=2))
    episodes = evaluation_episodes(config)
    envs = benchmark.RecordingEnvs("hopper-medium-v2", len(episodes))
    returns, *_ = evaluate(config, lambda states: np.tanh(states[..., :3]), envs, 0)

    env = make_env("hopper-medium-v2")
    step = env.step
    rewards = []

    def recording_step(action):
        answer = step(action)
        rewards.append(answer[1])
        return answer

    env.step = recording_step
    benchmark.replay(env, episodes, envs.actions)
    assert len(rewards) == sum(len(own) for own in envs.actions)
    np.testing.assert_allclose(sum(rewards), returns.sum(), rtol=1e-9)


def test_a_process_peak_memory_is_its_own(tmp_path):
    """And not that of the process that has started it, which Linux counts in, too."""
    held = np.ones(400_000_000, np.uint8)
    command = [sys.executable, "-c", "x = bytearray(b'1') * 200_000_000"]
    assert 200 < benchmark.peak_memory(str(tmp_path), command) < 260 < held.nbytes / 1e6


# --- All parts ---


def rows_of(output):
    """Return the cells of the tables' rows, without their heads."""
    lines = [line for line in output.splitlines() if re.match(r"\| [^|-]", line)]
    return [line.strip("| ").split(" | ") for line in lines]


def run_benchmark(**flags):
    words = [f"--{key}={value}" for key, value in flags.items()]
    command = [sys.executable, "-m", "tools.benchmark", *words]
    environment = {**os.environ, "EPISODE_STEPS": "15"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout


@pytest.mark.slow
def test_load_start_and_evaluation_print_their_tables():
    output = run_benchmark(
        parts="[load, start, evaluation]",
        scripts="[iql]",
        rounds=1,
        updates=2,
        transitions="[2000]",
        eval_episodes="[1]",
    )
    rows = rows_of(output)
    names = ["2,000 transitions", "iql, empty cache", "iql, full cache"]
    for task in benchmark.TASKS:
        names += [f"{task}, 3 episodes", f"{task}, 3 episodes, bare"]
        if task == "halfcheetah-medium-v2":
            names.append("halfcheetah-medium-v2, 3 episodes, BCQ")
    assert [row[0] for row in rows] == names
    assert all(float(row[1]) > 0 for row in rows[1:])


@pytest.mark.slow
def test_memory_and_the_parts_of_updates_print_their_tables():
    output = run_benchmark(
        parts="[memory, updates, seeds, regularisers]",
        scripts="[iql]",
        variants="[DO]",
        rounds=1,
        updates=2,
        transitions="[2000]",
    )
    rows = rows_of(output)
    assert [row[0] for row in rows] == [
        "interpreter and libraries",
        "iql, 1,000 transitions",
        "iql, 2,000 transitions",
        "IQL, batch 256: 0.56 GFLOP",
        "iql none",
        "iql DO",
        "iql, 1 seeds",
        "iql, 2 seeds",
        "iql, 4 seeds",
        "iql, 8 seeds",
    ]
    assert all(float(row[1]) > 0 for row in rows)
    assert 100 < float(rows[0][1]) < 500  # MB
    assert float(rows[4][3]) == 1  # against none
    assert re.search(r"^A product of matrices \(1024, 1024\): \d+ GFLOP/s", output, re.MULTILINE)
