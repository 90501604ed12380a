"""Evaluation on real D4RL environments: start states, lock-step, scores, and what reaches the screen."""

import os
import pty
import subprocess
import sys
import termios
from dataclasses import replace

import numpy as np
import pytest
from conftest import BUNDLED, ROOT

import rebrac
import tasks
from mujoco210 import d4rl

TASKS = {"hopper-medium-v2": 11, "antmaze-large-play-v2": 29, "pen-human-v1": 45}
QUICK = ["--hidden_dim", "16", "--batch_size", "8", "--log_every", "10", "--eval_every", "20", "--num_updates", "40"]


def config_for(name, **fields):
    fields = dict(num_seeds=2, eval_episodes=3, eval_noise=()) | fields
    return replace(rebrac.tuned(rebrac.Config(dataset_name=name)), **fields)


def policy_for(name):
    """A policy that is different for each seed, depends on the state, and lets episodes end at different times."""
    dim = tasks.make_env(name).action_space.shape[0]

    def policy(observations):
        seeds, episodes, states = observations.shape
        weights = np.sin(np.arange(states * dim)).reshape(states, dim)
        return np.tanh(observations @ weights + np.arange(seeds)[:, None, None]).astype(np.float32)

    return policy


def make_envs(config, limit=60):
    """The environments of an evaluation, with short episodes; AntMaze pays the distance to the target."""
    envs = tasks.Envs(config.dataset_name, config.num_seeds * len(tasks.conditions(config)), processes=1)
    envs.start()
    for env in envs.own:
        env._max_episode_steps = limit
        getattr(env.unwrapped, "_wrapped_env", env.unwrapped).reward_type = "dense"
    return envs


NOISE = ((0.2, 0.0), (0.0, 0.05), (0.3, 0.1))


@pytest.mark.parametrize("name", TASKS)
def test_lock_step_returns_are_those_of_one_episode_after_another(name):
    config, policy = config_for(name, seed=5, eval_noise=NOISE), policy_for(name)
    envs = make_envs(config)
    together, visited = tasks.evaluate(config, policy, envs, update=100)
    env, met = envs.own[0], [set(), set()]
    for seed in range(2):
        for i, (episode, action_noise, state_noise) in enumerate(tasks.conditions(config)):
            numbers = (config.seed + seed, 100, episode)
            observation, done, total = tasks.reset(env, *numbers), False, 0.0
            rng, dims = np.random.default_rng(numbers), (len(observation), *env.action_space.shape)
            while not done:
                observation = observation.astype(np.float32)
                if not action_noise and not state_noise:
                    met[seed].add(observation.tobytes())
                draws = rng.standard_normal(sum(dims), np.float32)
                seen = np.broadcast_to(observation + np.float32(state_noise) * draws[: dims[0]], (2, 1, dims[0]))
                action = policy(seen)[seed, 0]
                if action_noise:
                    action = np.clip(action + np.float32(action_noise) * draws[dims[0] :], -1, 1)
                observation, reward, done, _ = env.step(action)
                total += reward
            assert together[seed, i] == pytest.approx(total, rel=1e-4, abs=1e-4)
        assert {state.tobytes() for state in visited[seed]} == met[seed]  # all of them, since there are many draws
    assert together.shape == (2, 3 + 3 * 2) and len(np.unique(together)) == 18
    assert visited.shape == (2, tasks.NUM_STATES, TASKS[name])
    again, _ = tasks.evaluate(config, policy, envs, update=100)
    other, _ = tasks.evaluate(config, policy, envs, update=200)
    assert np.array_equal(together, again) and not np.array_equal(together, other)


@pytest.mark.parametrize("name", TASKS)
def test_more_processes_give_the_same_episodes(name):
    config, policy = config_for(name, eval_episodes=2, eval_noise=NOISE[2:], num_seeds=1), policy_for(name)
    alone, shared = tasks.Envs(name, 4, processes=1), tasks.Envs(name, 4, processes=3)
    returns, visited = tasks.evaluate(config, policy, alone, update=100)
    again, seen = tasks.evaluate(config, policy, shared, update=100)
    assert np.array_equal(again, returns) and np.array_equal(seen, visited)
    processes = [process for process, _ in shared.others]
    assert len(processes) == 2 and all(process.poll() is None for process in processes)
    del shared
    assert all(process.poll() == 0 for process in processes)


def test_seeds_evaluated_together_are_those_evaluated_alone():
    config, policy = config_for("hopper-medium-v2", eval_noise=NOISE[2:]), policy_for("hopper-medium-v2")
    returns, visited = tasks.evaluate(config, policy, make_envs(config), update=100)
    for i in range(config.num_seeds):
        alone = replace(config, seed=config.seed + i, num_seeds=1)
        single = lambda x, i=i: policy(np.repeat(x, config.num_seeds, 0))[i : i + 1]
        own, seen = tasks.evaluate(alone, single, make_envs(alone), update=100)
        assert np.array_equal(own[0], returns[i]) and np.array_equal(seen[0], visited[i])


def test_a_process_that_dies_ends_the_run_with_a_line():
    envs = tasks.Envs("hopper-medium-v2", 4, processes=2)
    envs.reset([(0, 0, i) for i in range(4)])
    envs.others[0][0].kill()
    envs.others[0][0].wait()
    with pytest.raises(SystemExit, match="error: a process that steps environments has died"):
        envs.step(np.arange(4), np.zeros((4, 3)))


def test_as_many_processes_as_cores_but_four_environments_each(monkeypatch):
    sizes = lambda number: list(tasks.Envs("hopper-medium-v2", number).sizes)
    for cores, expected in {1: [20], 2: [10, 10], 3: [6, 7, 7], 64: [4, 4, 4, 4, 4]}.items():
        monkeypatch.setattr(tasks.os, "sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        assert sizes(20) == expected
    assert sizes(3) == [3] and len(sizes(110)) == 8


def test_an_episodes_noise_does_not_depend_on_the_other_pairs():
    config, policy = config_for("hopper-medium-v2", eval_noise=NOISE), policy_for("hopper-medium-v2")
    returns, _ = tasks.evaluate(config, policy, make_envs(config), update=100)
    fewer = replace(config, eval_noise=NOISE[2:], seed=1, num_seeds=1)
    again, _ = tasks.evaluate(fewer, lambda x: policy(np.repeat(x, 2, 0))[1:], make_envs(fewer), update=100)
    assert np.array_equal(again[0], returns[1, [0, 1, 2, 7, 8]])
    still = replace(config, eval_noise=((0.0, 0.0),))
    same, _ = tasks.evaluate(still, policy, make_envs(still), update=100)
    assert np.array_equal(same, returns[:, [0, 1, 2, 0, 1]])


def test_in_training_half_as_many_episodes_are_played_with_each_noise():
    config = config_for("antmaze-umaze-v2", eval_noise=NOISE, eval_episodes=100)
    rows = tasks.conditions(config)
    assert len(rows) == 250 and rows[99] == (99, 0.0, 0.0) and rows[100] == (0, 0.2, 0.0) and rows[-1] == (49, 0.3, 0.1)
    assert len(tasks.conditions(replace(config, eval_episodes=5))) == 5 + 3 * 3
    assert len(tasks.conditions(replace(config, evaluate="a run"))) == 400


@pytest.mark.parametrize("name", TASKS)
def test_each_seed_evaluation_and_episode_has_its_own_start(name):
    env = tasks.make_env(name)

    def start(*numbers):
        observation = tasks.reset(env, *numbers)
        inner = getattr(env.unwrapped, "_wrapped_env", env.unwrapped)
        return (*observation, *np.ravel(getattr(inner, "target_goal", 0)), *inner.sim.model.body_quat.ravel())

    numbers = [(s, u, e) for s in range(2) for u in (0, 1000) for e in range(3)]
    starts = [start(*n) for n in numbers]
    assert len(set(starts)) == len(numbers) and [start(*n) for n in numbers] == starts
    assert len(starts[0]) > TASKS[name]


def test_antmaze_targets_differ_between_episodes():
    env = tasks.make_env("antmaze-medium-diverse-v2")
    targets = set()
    for episode in range(20):
        tasks.reset(env, 0, 0, episode)
        targets.add(env.unwrapped._wrapped_env.target_goal)
    assert len(targets) == 20


def test_scores_are_d4rls():
    low, high = (d4rl.infos.__dict__[f"REF_{end}_SCORE"]["hopper-medium-v2"] for end in ("MIN", "MAX"))
    env = tasks.make_env("hopper-medium-v2")
    assert env.get_normalized_score(high) == 1 and env.get_normalized_score(low) == 0
    config = config_for("hopper-medium-v2")
    np.testing.assert_allclose(tasks.normalized_score(config, np.array([low, high, (low + high) / 2])), [0, 100, 50])


def command(results, *arguments):
    fixed = ["--dataset_path", BUNDLED, "--eval_episodes", "1", "--results", str(results)]
    return [sys.executable, "rebrac.py", *fixed, *QUICK, *arguments]


def test_the_log_is_plain_text_where_there_is_no_terminal(tmp_path):
    run = subprocess.run(command(tmp_path, "--validation_frac", "0.1"), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("W&B: off (no account")
    assert lines[1].startswith("halfcheetah-medium-replay-v2: 80000 steps, 80 whole episodes, whose score is 12.6 on a")
    assert lines[2] == "training on 72 episodes, 71928 transitions; held out: the last 8, 7992 transitions"
    assert len(lines) == 6 and "\r" not in run.stdout
    for line, updates in zip(lines[3:5], (20, 40)):
        assert line.split()[:3] == [str(updates), "updates", "score"]
        for quantity in ("critic_loss", "actor_loss", "updates/s", "validation/action_error", "dead_neurons"):
            assert quantity in line
    assert lines[5].startswith("final score")


def test_a_terminal_gets_a_progress_bar_with_speed_losses_and_score(tmp_path):
    main, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 200))
    run = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=child, stderr=child)
    os.close(child)
    output = b""
    try:
        while chunk := os.read(main, 4096):
            output += chunk
    except OSError:  # Linux's end of file on a pseudo-terminal
        pass
    assert run.wait() == 0
    assert b"\r" in output and b"updates/s" in output
    last_bar = [part for part in output.decode().split("\r") if "40/40" in part][-1]
    assert "score=" in last_bar and "critic_loss=" in last_bar
