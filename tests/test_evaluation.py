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
from mujoco210 import d4rl

TASKS = {"hopper-medium-v2": 11, "antmaze-large-play-v2": 29, "pen-human-v1": 45}
QUICK = ["--hidden_dim", "16", "--batch_size", "8", "--log_every", "10", "--eval_every", "20", "--num_updates", "40"]


def config_for(name, **fields):
    return replace(rebrac.tuned(rebrac.Config(dataset_name=name)), num_seeds=2, eval_episodes=3, **fields)


def policy_for(name):
    """A policy that is different for each seed, depends on the state, and lets episodes end at different times."""
    dim = rebrac.make_env(name).action_space.shape[0]

    def policy(observations):
        seeds, episodes, states = observations.shape
        weights = np.sin(np.arange(states * dim)).reshape(states, dim)
        return np.tanh(observations @ weights + np.arange(seeds)[:, None, None]).astype(np.float32)

    return policy


@pytest.mark.parametrize("name", TASKS)
def test_lock_step_scores_are_those_of_one_episode_after_another(name):
    config, policy = config_for(name, seed=5), policy_for(name)
    envs = [rebrac.make_env(name) for _ in range(7)]
    for env in envs:
        env._max_episode_steps = 60
        getattr(env.unwrapped, "_wrapped_env", env.unwrapped).reward_type = "dense"  # AntMaze: distance to the target
    env = envs.pop()
    together = rebrac.evaluate(config, policy, envs, update=100)
    for seed in range(2):
        for episode in range(3):
            observation, done, total = rebrac.reset(env, config.seed + seed, 100, episode), False, 0.0
            while not done:
                batch = np.broadcast_to(observation.astype(np.float32), (2, 3, len(observation)))
                observation, reward, done, _ = env.step(policy(batch)[seed, 0])
                total += reward
            assert together[seed, episode] == pytest.approx(100 * env.get_normalized_score(total), rel=1e-4, abs=1e-4)
    assert together.shape == (2, 3) and len(np.unique(together)) == 6
    assert np.array_equal(together, rebrac.evaluate(config, policy, envs, update=100))
    assert not np.array_equal(together, rebrac.evaluate(config, policy, envs, update=200))


@pytest.mark.parametrize("name", TASKS)
def test_each_seed_evaluation_and_episode_has_its_own_start(name):
    env = rebrac.make_env(name)

    def start(*numbers):
        observation = rebrac.reset(env, *numbers)
        inner = getattr(env.unwrapped, "_wrapped_env", env.unwrapped)
        return (*observation, *np.ravel(getattr(inner, "target_goal", 0)), *inner.sim.model.body_quat.ravel())

    numbers = [(s, u, e) for s in range(2) for u in (0, 1000) for e in range(3)]
    starts = [start(*n) for n in numbers]
    assert len(set(starts)) == len(numbers) and [start(*n) for n in numbers] == starts
    assert len(starts[0]) > TASKS[name]


def test_antmaze_targets_differ_between_episodes():
    env = rebrac.make_env("antmaze-medium-diverse-v2")
    targets = set()
    for episode in range(20):
        rebrac.reset(env, 0, 0, episode)
        targets.add(env.unwrapped._wrapped_env.target_goal)
    assert len(targets) == 20


def test_scores_are_d4rls():
    low, high = (d4rl.infos.__dict__[f"REF_{end}_SCORE"]["hopper-medium-v2"] for end in ("MIN", "MAX"))
    env = rebrac.make_env("hopper-medium-v2")
    assert env.get_normalized_score(high) == 1 and env.get_normalized_score(low) == 0
    returns = []

    class Counted:  # the real environment, which also adds up what it pays
        unwrapped = env.unwrapped

        def reset(self):
            returns.append(0.0)
            return env.reset()

        def step(self, action):
            observation, reward, done, info = env.step(action)
            returns[-1] += reward
            return observation, reward, done, info

    config = replace(config_for("hopper-medium-v2"), num_seeds=1, eval_episodes=1)
    score = rebrac.evaluate(config, policy_for("hopper-medium-v2"), [Counted()], update=0)
    assert score[0, 0] == pytest.approx(100 * (returns[0] - low) / (high - low))


def command(*arguments):
    return [sys.executable, "rebrac.py", "--dataset_path", BUNDLED, "--eval_episodes", "1", *QUICK, *arguments]


def test_the_log_is_plain_text_where_there_is_no_terminal():
    run = subprocess.run(command(), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith(
        "halfcheetah-medium-replay-v2: 80 episodes of score 12.6 on average, 32.7 at best; 79920"
    )
    assert len(lines) == 4 and "\r" not in run.stdout
    for line, updates in zip(lines[1:3], (20, 40)):
        assert line.split()[:3] == [str(updates), "updates", "score"]
        for quantity in ("critic_loss", "actor_loss", "updates/s"):
            assert quantity in line
    assert lines[3].startswith("final score")


def test_a_terminal_gets_a_progress_bar_with_speed_losses_and_score():
    main, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 200))
    run = subprocess.Popen(command(), cwd=ROOT, stdout=child, stderr=child)
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


def test_the_same_command_prints_the_same_numbers():
    def numbers(run):
        lines = run.stdout.splitlines()[:-1]  # the last has the time
        return [line.split("updates/s")[0] for line in lines]

    runs = [subprocess.run(command(), cwd=ROOT, capture_output=True, text=True) for _ in range(2)]
    assert numbers(runs[0]) == numbers(runs[1])
    other = subprocess.run(command("--seed", "1"), cwd=ROOT, capture_output=True, text=True)
    assert numbers(runs[0])[1:] != numbers(other)[1:]
