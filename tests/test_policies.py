"""What one does with a run: evaluate it, load its policy, film it."""

import os

import imageio
import jax
import numpy as np
import pytest
from conftest import both_scripts, gl_backend
from runs_helpers import EVERYTHING, fails, table

import bcq
import iql
import rebrac
from harness.checkpoint import read_checkpoint, unflatten
from harness.datasets import load_dataset
from harness.errors import UserError
from harness.evaluation import summary
from harness.policies import load, load_policy


def evaluate(monkeypatch, script, directory, *words):
    monkeypatch.setattr("sys.argv", ["script.py", "--evaluate", str(directory), *words])
    script.main()


# --- Scores ---


def test_a_summary_has_the_deviation_over_seeds_or_episodes():
    scores = np.random.default_rng(0).normal(50, 20, (3, 8))
    means = [sum(row) / 8 for row in scores.tolist()]
    mean = sum(means) / 3
    deviation = (sum((x - mean) ** 2 for x in means) / 3) ** 0.5
    assert summary(scores) == f"{mean:.1f} +- {deviation:.1f} over 3 seeds"
    assert f"{deviation:.1f}" != f"{scores.std():.1f}"
    row = scores[0].tolist()
    deviation = (sum((x - means[0]) ** 2 for x in row) / 8) ** 0.5
    assert summary(scores[:1]) == f"{means[0]:.1f} +- {deviation:.1f} over 8 episodes"


@both_scripts
def test_evaluate_prints_the_last_evaluations_scores(start, script, monkeypatch, capsys):
    directory = start(script, **EVERYTHING)
    last = table(directory, "evaluations.csv")[-2:]
    capsys.readouterr()
    evaluate(monkeypatch, script, directory)
    lines = capsys.readouterr().out.splitlines()
    scores = [float(row["score"]) for row in last]
    assert lines[0] == f"score {np.mean(scores):.1f} +- {np.std(scores):.1f} over 2 seeds"
    assert [line.split()[0] for line in lines[1:]] == [
        "score/action_noise=0.2",
        "score/state_noise=0.05",
    ]


@both_scripts
def test_evaluate_takes_other_episodes_and_noise(start, script, monkeypatch, capsys):
    directory = start(script, **EVERYTHING)
    last = table(directory, "evaluations.csv")[-2:]
    capsys.readouterr()
    words = ["--eval_episodes", "1", "--eval_noise", "[[0.2, 0], [0.5, 0.1]]"]
    evaluate(monkeypatch, script, directory, *words)
    lines = capsys.readouterr().out.splitlines()
    mean = np.mean([float(row["score/action_noise=0.2"]) for row in last])
    assert len(lines) == 3
    assert lines[1].startswith(f"score/action_noise=0.2 {mean:.1f} +- ")
    assert lines[2].startswith("score/action_noise=0.5/state_noise=0.1 ")


def test_what_is_not_a_run_can_not_be_evaluated(tmp_path, monkeypatch):
    message = "config.yaml is not the config of a run"
    for directory in ("nowhere", tmp_path):
        fails(message, evaluate, monkeypatch, rebrac, directory)
    path = tmp_path / "config.yaml"
    for text in ("[1, 2", "unknown_field: 1\n", "seed: word\n", "just words\n"):
        path.write_text(text)
        fails(message, evaluate, monkeypatch, rebrac, tmp_path)
    path.write_text("seed: 1\n")
    fails("has no checkpoint", evaluate, monkeypatch, rebrac, tmp_path)


# --- Policies ---


@both_scripts
def test_a_runs_policy_is_a_function_from_states_to_actions(start, script):
    directory = start(script, **EVERYTHING)
    config, update, policies = load(script.Config, script.policy, directory)
    states = np.random.default_rng(0).normal(size=(2, 4, 17)).astype(np.float32)
    expected = policies(states)
    assert update == 60
    assert expected.shape == (2, 4, 6)
    for i, seed in enumerate((3, 4)):
        policy = load_policy(script, directory, seed)
        np.testing.assert_allclose(policy(states[i]), expected[i], atol=1e-6)
        np.testing.assert_allclose(policy(states[i, 0]), expected[i, 0], atol=1e-6)
    first = load_policy(script, directory)
    assert first(states).shape == (2, 4, 6)
    np.testing.assert_allclose(first(states[0].tolist()), expected[0], atol=1e-6)
    fails("has the seeds 3 to 4, not 2", load_policy, script, directory, seed=2)
    fails("has the seeds 3 to 4, not 5", load_policy, script, directory, seed=5)


@both_scripts
def test_a_runs_policy_is_that_of_its_actor(start, script):
    directory = start(script, **EVERYTHING)
    config, _, policies = load(script.Config, script.policy, directory)
    data = script.make_dataset(config, load_dataset(config))
    arrays, _ = read_checkpoint(os.path.join(directory, "checkpoint.npz"))
    np.testing.assert_array_equal(arrays["data/mean"], data["mean"])
    actor = jax.tree.map(lambda x: x[0], unflatten(arrays, "states/actor"))
    states = np.random.default_rng(0).normal(size=(2, 4, 17)).astype(np.float32)
    if script is bcq:  # which takes the best of the actions that it samples
        ours = bcq.best_candidates(config, actor, data, states[0])
    else:
        ours = script.act(config, actor, data, (states[0] - data["mean"]) / data["std"])
    np.testing.assert_allclose(ours, policies(states)[0], atol=1e-5)


@both_scripts
def test_the_error_for_what_is_no_run_can_be_caught(script, tmp_path):
    with pytest.raises(UserError, match="nowhere/config.yaml is not the config of a run"):
        load_policy(script, "nowhere")
    try:
        load_policy(script, str(tmp_path))
    except ValueError as error:
        assert "is not the config of a run" in str(error)


def test_a_run_of_the_other_script_is_an_error(start):
    directory = start(iql)
    fails("is not the config of a run", load_policy, rebrac, directory)


# --- Videos ---


@pytest.mark.parametrize("name", ["episode.mp4", "episode.gif"])
def test_a_video_shows_all_of_an_episode(start, spawn, monkeypatch, tmp_path, name):
    backend = gl_backend()
    if backend is None:
        pytest.skip("there is no OpenGL here")
    directory = start()
    monkeypatch.setenv("MUJOCO_GL", backend)
    monkeypatch.setenv("EPISODE_STEPS", "30")
    path = str(tmp_path / name)
    words = ["--evaluate", directory, "--eval_episodes", "1", "--video", path]
    run = spawn("rebrac.py", *words)
    output, _ = run.communicate()
    assert run.returncode == 0, output
    assert output.startswith("score ")
    frames = imageio.mimread(path, memtest=False)
    assert len(frames) == 30
    assert frames[0].shape[:2] == (496, 496)
    assert np.abs(frames[0].astype(float) - frames[-1]).max() > 50  # something moves


def test_without_opengl_a_video_is_an_error(start, spawn, monkeypatch, tmp_path):
    directory = start()
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    path = str(tmp_path / "episode.mp4")
    run = spawn("rebrac.py", "--evaluate", directory, "--video", path)
    output, _ = run.communicate()
    assert run.returncode == 1
    assert f"error: can't write {path}: rendering needs OpenGL" in output
    assert not os.path.exists(path)
