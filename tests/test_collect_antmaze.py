"""AntMaze's collected files are D4RL's in format and meaning. The walker is the one in data/."""

import os

import h5py
import numpy as np
import pytest
from conftest import ROOT

from harness.datasets import episode_ends, episode_returns, read_dataset
from harness.environments import make_env, reset
from harness.errors import UserError
from tools import collect_antmaze
from tools.collect_antmaze import KINDS, STEPS, Config

WALKER = os.path.join(ROOT, "data", "antmaze_walker.npz")


@pytest.fixture(scope="module", params=["umaze", "umaze-diverse", "large-play"])
def collected(request, tmp_path_factory):
    """Collect three trajectories; return the kind, the file's arrays, and its environment."""
    kind = request.param
    directory = str(tmp_path_factory.mktemp("data"))
    config = Config(walker=WALKER, trajectories=3, processes=1, directory=directory)
    collect_antmaze.collect(config, kind)
    env = make_env(f"antmaze-{kind}-v2")
    path = os.path.join(directory, os.path.basename(env.unwrapped.dataset_url))
    arrays = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: arrays.update({name: item[()]} if hasattr(item, "shape") else {})
        )
    raw = read_dataset(path, env)
    assert np.array_equal(raw["observations"], arrays["observations"])
    return kind, arrays, env


def test_a_file_has_d4rls_columns(collected):
    _, arrays, _ = collected
    shapes = {name: (array.shape, array.dtype.name) for name, array in arrays.items()}
    rows = 3 * STEPS
    assert shapes == {
        "observations": ((rows, 29), "float32"),
        "actions": ((rows, 8), "float32"),
        "rewards": ((rows,), "float32"),
        "terminals": ((rows,), "bool"),
        "timeouts": ((rows,), "bool"),
        "infos/goal": ((rows, 2), "float32"),
        "infos/qpos": ((rows, 15), "float32"),
        "infos/qvel": ((rows, 14), "float32"),
    }


def test_trajectories_go_on_at_the_goal_until_their_time_is_up(collected):
    kind, arrays, _ = collected
    ends = episode_ends(f"antmaze-{kind}-v2", arrays)
    assert np.array_equal(np.flatnonzero(ends), [1000, 2001, 3002])
    assert np.array_equal(ends, arrays["timeouts"])
    returns = episode_returns(f"antmaze-{kind}-v2", arrays)
    assert set(returns) <= {0.0, 1.0}


def test_qpos_and_qvel_are_of_the_state_after_the_step_as_in_d4rls_files(collected):
    _, arrays, _ = collected
    after = np.concatenate([arrays["infos/qpos"], arrays["infos/qvel"]], axis=1)
    inside = ~arrays["timeouts"][:-1]
    np.testing.assert_array_equal(after[:-1][inside], arrays["observations"][1:][inside])


def test_actions_lead_from_one_state_to_the_next_in_the_evaluations_environment(collected):
    _, arrays, env = collected
    reset(env, 0)
    for row in (0, 500, 1500, 2999):
        state = arrays["observations"][row].astype(np.float64)
        env.set_state(state[:15], state[15:])
        after, _, _, _ = env.step(arrays["actions"][row])
        # the ant's legs amplify float32's rounding
        np.testing.assert_allclose(after[:15], arrays["observations"][row + 1, :15], atol=2e-3)


def test_no_step_is_a_jump(collected):
    _, arrays, _ = collected
    moves = np.linalg.norm(np.diff(arrays["observations"][:, :2], axis=0), axis=1)
    assert moves[~arrays["timeouts"][:-1]].max() < 0.5


def test_a_reward_is_given_near_the_evaluations_goal(collected):
    kind, arrays, env = collected
    goals = []
    for number in range(300):
        reset(env, number)
        goals.append(env.target_goal)
    goal = collect_antmaze.evaluation_goal(kind)
    np.testing.assert_allclose(goal, np.mean(goals, axis=0), atol=0.1)

    position_after = arrays["infos/qpos"][:, :2]
    is_near = np.linalg.norm(position_after - goal, axis=1) <= 0.5
    if kind == "umaze-diverse":  # a visit to the goal has one reward
        was_near = np.append(False, is_near[:-1]) & ~np.append(True, arrays["timeouts"][:-1])
        is_near &= ~was_near
    np.testing.assert_array_equal(arrays["rewards"], is_near)
    np.testing.assert_array_equal(arrays["terminals"], is_near)
    if kind == "umaze":
        assert episode_returns("antmaze-umaze-v2", arrays).sum() >= 2


def test_starts_and_goals_are_where_d4rl_has_them(collected):
    kind, arrays, env = collected
    starts = arrays["observations"][::STEPS, :2]
    goals = arrays["infos/goal"][::STEPS]
    if kind == "umaze":
        assert np.abs(starts).max() < 0.2
    else:
        assert len(np.unique(np.round(starts), axis=0)) > 1
        for start in starts:
            assert not env.unwrapped._is_in_collision(start)
    maze = KINDS[kind][0]
    allowed = ("g",) if kind in ("umaze", "large-play") else (0, "r", "g")
    cells = np.argwhere([[cell in allowed for cell in row] for row in maze])
    corners = 4.0 * cells[:, ::-1] - 4.0  # x, y of the cells' middles; the start is at 0, 0
    for goal in goals:
        offsets = goal - corners
        assert ((offsets >= 0) & (offsets <= 1.5)).all(axis=1).any()


@pytest.mark.slow
def test_more_processes_make_the_same_file(tmp_path):
    arrays = []
    for processes in (1, 2):
        directory = tmp_path / str(processes)
        directory.mkdir()
        trajectories = 6  # five are a process's share
        config = Config(
            walker=WALKER, trajectories=trajectories, processes=processes, directory=str(directory)
        )
        collect_antmaze.collect(config, "umaze")
        (path,) = directory.iterdir()
        with h5py.File(path) as file:
            arrays.append({key: file[key][()] for key in ("observations", "actions", "rewards")})
    for key in arrays[0]:
        np.testing.assert_array_equal(arrays[0][key], arrays[1][key])


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(kinds=["umaz"]), "unknown umaz; there are umaze, umaze-diverse"),
        (dict(seed=-1), "seed and walker_steps must be 0 or more"),
        (dict(walker="mine", walker_steps=5), "walker must end in .npz"),
        (dict(trajectories=0), "trajectories and processes must be 1 or more"),
        (dict(walker="nowhere.npz"), "there is no file nowhere.npz; make it by --walker_steps"),
        (dict(walker=os.path.join(ROOT, "data", "antmaze.csv")), "walker must end in .npz"),
        (
            dict(walker=WALKER, walker_steps=5),
            f"{WALKER} is there; leave --walker_steps out",
        ),
    ],
)
def test_a_senseless_flag_is_an_error_before_any_work(flags, message):
    with pytest.raises(UserError, match=f"^{message}"):
        collect_antmaze.check(Config(**flags))


def test_another_file_is_no_walker(tmp_path):
    path = str(tmp_path / "mine.npz")
    for make in (lambda: open(path, "w").close(), lambda: np.savez(path, a=1)):
        make()
        with pytest.raises(UserError, match=f"^{path} is no walker's file$"):
            collect_antmaze.check(Config(walker=path))


def end(job):
    os._exit(1)


def test_a_process_that_is_killed_ends_the_collection(monkeypatch, tmp_path):
    monkeypatch.setattr(collect_antmaze, "walk_trajectories", end)
    config = Config(walker=WALKER, trajectories=6, directory=str(tmp_path))
    with pytest.raises(UserError, match="^a process was killed"):
        collect_antmaze.collect(config, "umaze")
    assert list(tmp_path.iterdir()) == []
