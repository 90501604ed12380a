"""Evaluation on D4RL's environments: starts, lock-step, scores, and what reaches the screen."""

import contextlib
import os
import pty
import subprocess
import sys
import termios
from dataclasses import replace

import mujoco_py
import numpy as np
import pytest
from conftest import BUNDLED, ROOT

import rebrac
from harness.datasets import normalized_score
from harness.environments import d4rl, gym, inner, make_env, reset
from harness.errors import UserError
from harness.evaluation import NUM_VISITED, evaluate, evaluation_episodes, normal_draws
from harness.lockstep import Envs, has_usual_wrappers

STATE_DIMS = {"hopper-medium-v2": 11, "antmaze-large-play-v2": 29, "pen-human-v1": 45}
NOISE = ((0.2, 0.0), (0.0, 0.05), (0.3, 0.1))


def config_for(name, **fields):
    fields = dict(num_seeds=2, eval_episodes=3, eval_noise=()) | fields
    return replace(rebrac.tuned(rebrac.Config(dataset_name=name)), **fields)


def policy_for(name):
    """Return a policy that differs between seeds and whose episodes end at different times."""
    action_dim = make_env(name).action_space.shape[0]

    def policy(observations):
        num_seeds, _, state_dim = observations.shape
        weights = np.sin(np.arange(state_dim * action_dim)).reshape(state_dim, action_dim)
        offsets = np.arange(num_seeds)[:, None, None]
        return np.tanh(observations @ weights + offsets).astype(np.float32)

    return policy


def policy_of_seed(policy, seed, num_seeds=2):
    """Return a policy of a single seed, as one for that seed alone."""

    def single(observations):
        return policy(np.repeat(observations, num_seeds, 0))[seed : seed + 1]

    return single


def short_envs(config, limit=60):
    """Return the environments of an evaluation, with short episodes and dense rewards."""
    number = config.num_seeds * len(evaluation_episodes(config))
    envs = Envs(config.dataset_name, number, processes=1)
    envs.start()
    for env in envs.own:
        env._max_episode_steps = limit
        inner(env).reward_type = "dense"  # AntMaze then pays the distance to the target
    return envs


# --- Episodes in lock-step ---


def play(env, policy, numbers, action_noise, state_noise):
    """Play one episode, as `evaluate` says; return its rewards and the states that were met."""
    observation = reset(env, *numbers)
    rng = np.random.default_rng(numbers)
    state_dim = len(observation)
    action_dim = env.action_space.shape[0]
    states = []
    rewards = []
    done = False
    while not done:
        observation = observation.astype(np.float32)
        states.append(observation.tobytes())
        draws = rng.standard_normal(state_dim + action_dim, np.float32)
        seen = observation + np.float32(state_noise) * draws[:state_dim]
        action = policy(seen[None, None])[0, 0]
        if action_noise:
            action = np.clip(action + np.float32(action_noise) * draws[state_dim:], -1, 1)
        observation, reward, done, _ = env.step(action)
        rewards.append(reward)
    return rewards, states


@pytest.mark.parametrize("name", STATE_DIMS)
def test_lock_step_returns_are_those_of_one_after_another(name):
    config = config_for(name, seed=5, eval_noise=NOISE)
    policy = policy_for(name)
    envs = short_envs(config)
    episodes = evaluate(config, policy, envs, update=100)
    together, visited = episodes.returns, episodes.visited
    for seed in range(2):
        single = policy_of_seed(policy, seed)
        met = set()
        for i, (episode, action_noise, state_noise) in enumerate(evaluation_episodes(config)):
            numbers = (config.seed + seed, 100, episode)
            rewards, states = play(envs.own[0], single, numbers, action_noise, state_noise)
            assert together[seed, i] == pytest.approx(sum(rewards), rel=1e-4, abs=1e-4)
            if not action_noise and not state_noise:
                met.update(states)
                assert episodes.starts[seed, i].tobytes() == states[0]
                assert episodes.lengths[seed, i] == len(rewards)
                padded = np.pad(rewards, (0, 1000 - len(rewards)))
                np.testing.assert_allclose(episodes.rewards[seed, i], padded, rtol=1e-3, atol=1e-4)
        assert {state.tobytes() for state in visited[seed]} == met  # all, since many are drawn
    assert together.shape == (2, 3 + 3 * 2)
    assert len(np.unique(together)) == 18
    assert visited.shape == (2, NUM_VISITED, STATE_DIMS[name])
    assert episodes.rewards.shape == (2, 3, 1000)
    again, *_ = evaluate(config, policy, envs, update=100)
    np.testing.assert_array_equal(again, together)
    other, *_ = evaluate(config, policy, envs, update=200)
    assert not np.array_equal(other, together)


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("name", ["halfcheetah-medium-v2", *STATE_DIMS])
def test_steps_in_lock_step_are_those_of_d4rls_environment(name, is_wrapped):
    plain = make_env(name)
    envs = Envs(name, 2, processes=1)
    envs.start()
    for env in (plain, *envs.own):
        env._max_episode_steps = 30
    if is_wrapped:
        plain = Halved(plain)
        envs.own = [Halved(env) for env in envs.own]
    assert has_usual_wrappers(envs.own[0]) != is_wrapped
    assert "do_simulation" in vars(inner(envs.own[0]))
    actions = np.random.default_rng(0).uniform(-1.5, 1.5, (30, 2, *plain.action_space.shape))
    actions = actions.astype(np.float32)
    envs.reset([(0, 0, 0), (0, 0, 1)])
    found = [[], []]  # each episode's steps
    running = np.arange(2)
    for pair in actions:
        for i, *step in zip(running, *envs.step(running, pair[running])):
            found[i].append(step)
        running = np.array([i for i in running if not found[i][-1][2]], int)
    for i in range(2):
        reset(plain, 0, 0, i)
        for pair, (observation, reward, done) in zip(actions, found[i]):
            expected = plain.step(pair[i])
            np.testing.assert_array_equal(observation, expected[0].astype(np.float32))
            assert (reward, done) == expected[1:3]
        assert done


class Halved(gym.ActionWrapper):
    """A wrapper of a user's own."""

    def action(self, action):
        return action / 2


class Keeping(gym.Env):
    """An environment of a user's own, which pays for the change of an action that it keeps."""

    action_space = observation_space = gym.spaces.Box(-1, 1, (1,))

    def seed(self, seed):
        pass

    def reset(self):
        self.last = np.zeros(1)
        return self.last

    def step(self, action):
        change = np.abs(action - self.last)
        self.last = action
        return action, change.item(), False, {}


def test_an_environment_may_keep_its_action():
    gym.register("keeping-v0", entry_point=Keeping)
    envs = Envs("keeping-v0", 1, processes=1)
    envs.reset([(0, 0, 0)])
    paid = []
    for action in (0, 1, -1):
        _, reward, _ = envs.step(np.array([0]), np.array([[action]]))
        paid.append(reward.item())
    assert paid == [0, 1, 2]


class Windy(mujoco_py.MjSim):
    """A simulation of a user's own, in which wind blows in each frame."""

    def step(self):
        self.data.qvel[0] += 0.1
        super().step()


class WindyHopper(gym.envs.mujoco.HopperEnv):
    def __init__(self):
        super().__init__()
        self.sim = Windy(self.model)
        self.data = self.sim.data


def test_an_environments_own_simulation_steps_each_frame():
    gym.register("windy-v0", entry_point=WindyHopper, max_episode_steps=9)
    envs = Envs("windy-v0", 1, processes=1)
    plain = make_env("windy-v0")
    envs.reset([(0, 0, 0)])
    reset(plain, 0, 0, 0)
    observations, *_ = envs.step(np.array([0]), np.zeros((1, 3)))
    expected, *_ = plain.step(np.zeros(3))
    np.testing.assert_array_equal(observations[0], expected.astype(np.float32))
    assert observations[0, 5] > 0.3  # the wind of four frames


@pytest.mark.parametrize("name", STATE_DIMS)
def test_more_processes_give_the_same_episodes(name):
    config = config_for(name, eval_noise=NOISE[2:], num_seeds=1)
    policy = policy_for(name)
    alone = Envs(name, 5, processes=1)
    shared = Envs(name, 5, processes=3)
    returns, visited, *_ = evaluate(config, policy, alone, update=100)
    same_returns, same_visited, *_ = evaluate(config, policy, shared, update=100)
    np.testing.assert_array_equal(same_returns, returns)
    np.testing.assert_array_equal(same_visited, visited)
    processes = [process for process, _ in shared.workers]
    assert [process.poll() for process in processes] == [None, None]
    del shared
    assert [process.poll() for process in processes] == [0, 0]


def test_seeds_evaluated_together_are_those_evaluated_alone():
    config = config_for("hopper-medium-v2", eval_noise=NOISE[2:])
    policy = policy_for("hopper-medium-v2")
    returns, visited, *_ = evaluate(config, policy, short_envs(config), update=100)
    for i in range(2):
        alone = replace(config, seed=config.seed + i, num_seeds=1)
        single = policy_of_seed(policy, i)
        own_returns, own_visited, *_ = evaluate(alone, single, short_envs(alone), update=100)
        np.testing.assert_array_equal(own_returns[0], returns[i])
        np.testing.assert_array_equal(own_visited[0], visited[i])


def test_a_process_that_dies_ends_the_run_with_a_line():
    envs = Envs("hopper-medium-v2", 4, processes=2)
    envs.reset([(0, 0, i) for i in range(4)])
    process, _ = envs.workers[0]
    process.kill()
    process.wait()
    with pytest.raises(UserError, match="a process that steps environments has died"):
        envs.step(np.arange(4), np.zeros((4, 3)))


@pytest.mark.parametrize(
    "cores, number, expected",
    [(1, 20, 1), (2, 20, 2), (3, 20, 3), (64, 20, 5), (64, 3, 1), (64, 110, 27), (64, 1280, 64)],
)
def test_as_many_processes_as_cores_but_four_environments_each(
    monkeypatch, cores, number, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores), raising=False)
    assert Envs("hopper-medium-v2", number).processes == expected


def test_processes_have_equal_shares_of_all_environments():
    envs = Envs("hopper-medium-v2", 11, processes=4)
    envs.reset([(0, 0, i) for i in range(11)])
    assert [list(envs.rows(i)["numbers"][:, 2]) for i in range(4)] == [
        [0, 4, 8],
        [1, 5, 9],
        [2, 6, 10],
        [3, 7],
    ]
    assert len(envs.own) == 3


def test_only_running_environments_are_stepped():
    envs = Envs("hopper-medium-v2", 4, processes=1)
    envs.reset([(0, 0, i) for i in range(4)])
    observations, rewards, done = envs.step(np.array([1, 3]), np.zeros((2, 3), np.float32))
    assert [env._elapsed_steps for env in envs.own] == [0, 1, 0, 1]
    assert observations.shape == (2, 11)
    assert rewards.shape == done.shape == (2,)


def test_noise_is_that_of_one_draw_a_step():
    numbers = [(0, 100, 0), (1, 200, 3)]
    draws = normal_draws(numbers, 7)
    rngs = [np.random.default_rng(row) for row in numbers]
    for _ in range(120):
        expected = [rng.standard_normal(7, np.float32) for rng in rngs]
        np.testing.assert_array_equal(next(draws), expected)
    assert next(normal_draws([], 7)).shape == (0, 7)


def test_an_episodes_noise_does_not_depend_on_the_other_pairs():
    config = config_for("hopper-medium-v2", eval_noise=NOISE)
    policy = policy_for("hopper-medium-v2")
    returns, *_ = evaluate(config, policy, short_envs(config), update=100)
    fewer = replace(config, eval_noise=NOISE[2:], seed=1, num_seeds=1)
    own_returns, *_ = evaluate(fewer, policy_of_seed(policy, 1), short_envs(fewer), update=100)
    np.testing.assert_array_equal(own_returns[0], returns[1, [0, 1, 2, 7, 8]])
    still = replace(config, eval_noise=((0.0, 0.0),))
    same_returns, *_ = evaluate(still, policy, short_envs(still), update=100)
    np.testing.assert_array_equal(same_returns, returns[:, [0, 1, 2, 0, 1]])


def test_in_training_half_as_many_episodes_have_each_noise():
    config = config_for("antmaze-umaze-v2", eval_noise=NOISE, eval_episodes=100)
    rows = evaluation_episodes(config)
    assert len(rows) == 250
    assert rows[99] == (99, 0.0, 0.0)
    assert rows[100] == (0, 0.2, 0.0)
    assert rows[-1] == (49, 0.3, 0.1)
    assert len(evaluation_episodes(replace(config, eval_episodes=5))) == 5 + 3 * 3
    assert len(evaluation_episodes(replace(config, evaluate="a run"))) == 400


# --- Starts and scores ---


@pytest.mark.parametrize("name", STATE_DIMS)
def test_each_seed_evaluation_and_episode_has_its_own_start(name):
    env = make_env(name)

    def start(*numbers):
        """Return all that an episode's start has: the state, the target, the pen's pose."""
        observation = reset(env, *numbers)
        target = np.ravel(getattr(inner(env), "target_goal", 0))
        return (*observation, *target, *inner(env).sim.model.body_quat.ravel())

    numbers = []
    for seed in range(2):
        for update in (0, 1000):
            numbers += [(seed, update, episode) for episode in range(3)]
    starts = [start(*row) for row in numbers]
    assert len(starts[0]) > STATE_DIMS[name]
    assert len(set(starts)) == len(numbers)
    assert [start(*row) for row in numbers] == starts


def test_antmaze_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    num_open = len(os.listdir("/proc/self/fd"))
    env = make_env("antmaze-umaze-v2")
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == num_open
    assert env.reset().shape == (29,)


def test_antmaze_targets_differ_between_episodes():
    env = make_env("antmaze-medium-diverse-v2")
    targets = set()
    for episode in range(20):
        reset(env, 0, 0, episode)
        targets.add(inner(env).target_goal)
    assert len(targets) == 20


def test_scores_are_d4rls():
    low = d4rl.infos.REF_MIN_SCORE["hopper-medium-v2"]
    high = d4rl.infos.REF_MAX_SCORE["hopper-medium-v2"]
    env = make_env("hopper-medium-v2")
    assert env.get_normalized_score(low) == 0
    assert env.get_normalized_score(high) == 1
    returns = np.array([low, high, (low + high) / 2])
    scores = normalized_score("hopper-medium-v2", returns)
    np.testing.assert_allclose(scores, [0, 100, 50])


# --- On the screen ---


@pytest.fixture
def short_run(monkeypatch, tmp_path):
    """The command of a run that is over in seconds."""
    monkeypatch.setenv("EPISODE_STEPS", "15")
    fields = dict(
        dataset_path=BUNDLED,
        validation_frac=0.1,
        results=tmp_path,
        hidden_dim=16,
        batch_size=8,
        log_every=10,
        num_updates=40,
        eval_every=20,
        eval_episodes=1,
    )
    command = [sys.executable, "rebrac.py"]
    for name, value in fields.items():
        command += [f"--{name}", str(value)]
    return command


def test_the_log_is_plain_text_where_there_is_no_terminal(short_run):
    run = subprocess.run(short_run, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert "\r" not in run.stdout
    wandb, dataset, training, held_out, first, second, final = run.stdout.splitlines()
    assert wandb.startswith("W&B: off (no account")
    name = "halfcheetah-medium-replay-v2"
    assert dataset == (
        f"{name}: 80000 steps, 80 whole episodes, whose score is 12.6 on average and 32.7 at best; "
        "not D4RL's own file"
    )
    assert training == "training on 72 episodes, 71928 transitions"
    assert held_out == "held out: 8 episodes, 7992 transitions"
    quantities = (
        "critic_loss",
        "actor_loss",
        "updates/s",
        "validation/action_error",
        "dead_neurons",
    )
    for line, updates in ((first, "20"), (second, "40")):
        assert line.split()[:3] == [updates, "updates", "score"]
        for quantity in quantities:
            assert quantity in line
    assert final.startswith("final score")


def read_all(terminal):
    """Return all that is written to a terminal, until no process has it any longer."""
    output = b""
    with contextlib.suppress(OSError):  # Linux's end of file here
        while chunk := os.read(terminal, 4096):
            output += chunk
    return output.decode()


def test_a_terminal_gets_a_progress_bar_with_losses_and_score(short_run):
    terminal, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 200))
    run = subprocess.Popen(short_run, cwd=ROOT, stdout=child, stderr=child)
    os.close(child)
    output = read_all(terminal)
    os.close(terminal)
    assert run.wait() == 0
    assert "updates/s" in output
    bars = output.split("\r")
    assert len(bars) > 1
    last_bar = [bar for bar in bars if "40/40" in bar][-1]
    assert "score=" in last_bar
    assert "critic_loss=" in last_bar
