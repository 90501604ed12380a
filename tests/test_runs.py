"""A run: its directory, what it prints, and that the same command resumes it whatever happens."""

import contextlib
import dataclasses
import errno
import fcntl
import glob
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import fields, replace
from types import SimpleNamespace

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from conftest import OURS, ROOT, both_scripts, random_columns
from runs_helpers import (
    EVERYTHING,
    after_epochs,
    before_epochs,
    command_line,
    contents,
    differences,
    exits,
    fails,
    read_until,
    signal_in_epoch,
    signal_in_evaluation,
    stopped,
    table,
)

import harness.record
import harness.run
import iql
import rebrac
from harness.checkpoint import last_checkpoint, read_checkpoint, write_checkpoint
from harness.datasets import normalized_score, with_checksum
from harness.directory import (
    NOT_SAVED,
    Status,
    load_config,
    read_fields,
    run_directory,
    saved_fields,
    status,
)
from harness.environments import d4rl
from harness.errors import BusyError, one_line_errors
from harness.run import Run
from harness.tables import Tables
from harness.versions import commit, made_with

OLD_RUNS = os.path.join(ROOT, "tests", "old_runs")

# --- What is in the directory ---


@both_scripts
def test_a_run_leaves_its_config_tables_checkpoint_and_end(start, script):
    directory = start(script, **EVERYTHING)
    assert sorted(os.listdir(directory)) == [
        "checkpoint.npz",
        "config.yaml",
        "episodes.csv",
        "evaluations.csv",
        "features.npy",
        "finished.json",
        "lock",
        "train.csv",
    ]
    train = [(row["update"], row["seed"]) for row in table(directory, "train.csv")]
    evaluations = [(row["update"], row["seed"]) for row in table(directory, "evaluations.csv")]
    assert train == [(str(update), seed) for update in range(10, 70, 10) for seed in "34"]
    assert evaluations == [(str(update), seed) for update in (20, 40, 60) for seed in "34"]
    assert len(table(directory, "episodes.csv")) == 3 * 2 * 4
    with open(os.path.join(directory, "finished.json")) as file:
        about = json.load(file)
    assert set(about) == {"updates", "seconds", "score", "made_with"}
    assert about["made_with"] == [made_with()]
    assert f"; jax {jax.__version__}; " in made_with()


def test_a_run_knows_each_version_that_has_trained_it(start, monkeypatch):
    monkeypatch.setattr(harness.record, "made_with", lambda: "first")
    stopped(start, monkeypatch)
    monkeypatch.setattr(harness.record, "made_with", lambda: "second")
    directory = start()
    with open(os.path.join(directory, "finished.json")) as file:
        assert json.load(file)["made_with"] == ["first", "second"]


def test_a_run_of_an_older_version_goes_on_as_of_an_unknown_one(start, monkeypatch):
    directory = stopped(start, monkeypatch)
    path = os.path.join(directory, "checkpoint.npz")
    arrays, about = read_checkpoint(path)
    del about["made_with"]
    write_checkpoint(path, arrays, about)
    with open(os.path.join(start(), "finished.json")) as file:
        assert json.load(file)["made_with"] == ["unknown version", made_with()]


def test_the_commit_has_a_plus_where_a_script_differs_from_it_or_is_new(tmp_path, monkeypatch):
    assert commit(str(tmp_path)) == "unknown commit"
    monkeypatch.setenv("GIT_DIR", os.path.join(ROOT, ".git"))  # as in a hook
    assert commit(str(tmp_path)) == "unknown commit"
    monkeypatch.delenv("GIT_DIR")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "script.py").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = commit(str(tmp_path))
    assert re.fullmatch("[0-9a-f]{8}", clean)
    (tmp_path / "notes.txt").write_text("")
    assert commit(str(tmp_path)) == clean
    (tmp_path / "fork.py").write_text("")
    assert commit(str(tmp_path)) == f"{clean}+"
    (tmp_path / "fork.py").unlink()
    (tmp_path / "script.py").write_text("2")
    assert commit(str(tmp_path)) == f"{clean}+"
    (tmp_path / "inside").mkdir()
    assert commit(str(tmp_path / "inside")) == "unknown commit"


@both_scripts
def test_an_evaluation_has_the_mean_scores_of_its_episodes(start, script):
    directory = start(script, **EVERYTHING)
    episodes = table(directory, "episodes.csv")
    columns = ["seed", "update", "episode", "action_noise", "state_noise", "return", "score"]
    assert list(episodes[0]) == columns
    for row in episodes:
        score = normalized_score("halfcheetah-medium-replay-v2", float(row["return"]))
        assert float(row["score"]) == pytest.approx(score, rel=1e-6)
    noises = {
        "score": ("0", "0", 2),
        "score/action_noise=0.2": ("0.2", "0", 1),
        "score/state_noise=0.05": ("0", "0.05", 1),
    }
    for row in table(directory, "evaluations.csv"):
        for column, (action_noise, state_noise, number) in noises.items():
            own = dict(seed=row["seed"], update=row["update"])
            own |= dict(action_noise=action_noise, state_noise=state_noise)
            scores = [
                float(episode["score"]) for episode in episodes if own.items() <= episode.items()
            ]
            assert len(scores) == number
            assert float(row[column]) == pytest.approx(np.mean(scores), rel=1e-6)


@both_scripts
def test_an_evaluation_has_what_is_inside_the_actor(start, script):
    for row in table(start(script, **EVERYTHING), "evaluations.csv"):
        for part in ("train", "validation", "evaluation", "random"):
            assert 0 <= float(row[f"{part}/dead_neurons"]) <= 1
            assert 1 <= float(row[f"{part}/pca_rank"]) <= 64
        assert 0 < float(row["plasticity/loss_left"]) < 1


@both_scripts
def test_train_csv_has_the_means_over_each_epoch(start, monkeypatch, script):
    epochs = []
    after_epochs(monkeypatch, script, lambda number, states, infos: epochs.append(infos))
    rows = iter(table(start(script, **EVERYTHING), "train.csv"))
    assert len(epochs) == 6
    for number, infos in enumerate(epochs, start=1):
        for i in range(2):
            row = next(rows)
            assert list(row) == ["seed", "update", *sorted(infos)]
            assert row["seed"] == str(3 + i)
            assert row["update"] == str(10 * number)
            for key, values in infos.items():
                steps = np.asarray(values[i], np.float64)
                assert float(row[key]) == pytest.approx(steps.mean(), rel=1e-5)
                assert steps.std() > 0  # so that the mean isn't the last step


@both_scripts
def test_the_config_file_holds_the_config_and_starts_the_run(start, script, monkeypatch, capsys):
    directory = start(script, **{**EVERYTHING, "actor_wd": 1e-4})
    config = load_config(script.Config, directory)
    assert config.actor_ln
    assert config.actor_wd == 1e-4
    assert config.gamma == 0.99
    assert config.eval_noise[1] == (0.0, 0.05)
    path = os.path.join(directory, "config.yaml")
    with open(path) as file:
        written = yaml.safe_load(file)
    assert set(written) == {field.name for field in fields(script.Config)} - set(NOT_SAVED)
    words = ["--config_path", path, "--results", directory.split(f"/{script.__name__}/")[0]]
    monkeypatch.setattr("sys.argv", ["script.py", *words])
    script.main()
    assert f"finished already: {directory}" in capsys.readouterr().out


def test_a_finished_run_says_so_and_is_left_alone(start, capsys):
    directory = start()
    before = modification_times(directory)
    assert start() == directory
    (row,) = table(directory, "evaluations.csv")[-1:]
    line = f"finished already: {directory}; final score {float(row['score']):.1f}"
    assert capsys.readouterr().out.splitlines()[-1].startswith(line)
    assert modification_times(directory) == before
    assert start(seed=4) != directory


def modification_times(directory):
    return {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(directory)}


# --- Its name ---


def name_of(**flags):
    config = rebrac.tuned(rebrac.Config(**flags))
    return run_directory("rebrac", config, rebrac.tuned)


def test_the_name_says_what_differs_from_the_defaults():
    name = name_of(actor_ln=True, actor_dropout=0.1, seed=2)
    folder = "results/rebrac/halfcheetah-medium-replay-v2"
    assert name.startswith(f"{folder}/seed=2,actor_dropout=0.1,actor_ln=true-")
    name = name_of(dataset_name="pen-human-v1")
    assert re.fullmatch("results/rebrac/pen-human-v1/seed=0-[0-9a-f]{8}", name)
    assert name_of(batch_size=1024) == name_of()
    assert name_of(batch_size=512) != name_of()
    assert name_of(results="elsewhere") == name_of().replace("results", "elsewhere")


def test_each_field_that_is_saved_changes_the_name():
    others = dict(eval_noise=((0.5, 0.5),), critic_ln=False, analysis=False, clip_targets=False)
    by_type = {"bool": True, "int": 7, "float": 0.123, "str": "mse"}
    names = {name_of()}
    for field in fields(rebrac.Config):
        if field.name in ("dataset_name", "dataset_path", *NOT_SAVED):
            continue
        kind = re.search("bool|int|float|str", str(field.type))[0]
        names.add(name_of(**{field.name: others.get(field.name, by_type[kind])}))
    assert len(names) == len(fields(rebrac.Config)) - 1 - len(NOT_SAVED)
    assert name_of(dataset_path="a.hdf5") == name_of()


def test_a_new_field_changes_no_name(monkeypatch):
    new = dataclasses.make_dataclass(
        "Config", [("actor_ofn", bool, False)], bases=(rebrac.Config,), frozen=True
    )
    flags = dict(actor_ln=True, seed=2, dataset_name="pen-human-v1")

    def name(**more):
        config = rebrac.tuned(new(**flags, **more))
        return run_directory("rebrac", config, rebrac.tuned)

    assert name() == name_of(**flags)
    assert name(actor_ofn=True) != name_of(**flags)


def test_a_run_that_was_begun_under_other_defaults_is_not_mixed_with_this_one(start, monkeypatch):
    directory = stopped(start, monkeypatch)
    path = os.path.join(directory, "config.yaml")
    fields = read_fields(directory)
    with open(path, "w") as file:
        yaml.safe_dump({**fields, "gamma": 0.5}, file)
    fails("was begun when gamma was 0.5 by default, and now it is 0.99; resume it with", start)
    with open(path, "w") as file:
        yaml.safe_dump(fields, file)
    assert start() == directory


def test_a_long_name_is_cut_and_has_no_odd_characters():
    floats = {field.name: 0.5 for field in fields(rebrac.Config) if field.type is float}
    name = name_of(**floats, critic_loss="/a/../b c/ü*")
    assert 100 < len(os.path.basename(name)) < 200
    assert re.fullmatch(r"[\w./=,+-]+", name)


@pytest.mark.parametrize(
    "script, name",
    [
        (
            rebrac,
            "seed=3,actor_layers=1,actor_ln=true,validation_frac=0.2,critic_loss=mse,batc"
            "h_size=8,hidden_dim=4,critic_layers=1,num_updates=60,log_every=10-d42e175e",
        ),
        (
            iql,
            "seed=3,actor_layers=1,actor_ln=true,validation_frac=0.2,batch_size=8,hidden_"
            "dim=4,critic_layers=1,num_updates=60,log_every=10,eval_every=20-92bbfbed",
        ),
    ],
    ids=["rebrac", "iql"],
)
def test_a_run_of_an_earlier_version_still_has_its_name(script, name):
    directory = os.path.join(OLD_RUNS, script.__name__)
    config = load_config(script.Config, directory)
    assert saved_fields(vars(config)) == read_fields(directory)
    assert os.path.basename(run_directory(script.__name__, config, script.tuned)) == name


# --- Its status ---


def test_the_status_of_a_run_that_ends_well(start, monkeypatch, tmp_path):
    seen = []

    def look(epoch):
        seen.append(status(start.directory))

    assert status(str(tmp_path)) == Status("unfinished", "", 0, False)
    directory = stopped(start, monkeypatch)
    assert status(directory) == Status("unfinished", "", 30, False)
    with monkeypatch.context() as patch:
        before_epochs(patch, rebrac, look)
        start()
    # 50 is on the disk with the next checkpoint, which comes with the evaluation
    assert [(run.state, run.update, run.busy) for run in seen] == [
        ("unfinished", 30, True),
        ("unfinished", 40, True),
        ("unfinished", 40, True),
    ]
    assert status(directory) == Status("finished", "", 60, False)


def test_a_failure_that_can_not_be_read_is_one(tmp_path):
    (tmp_path / "failed.txt").mkdir()
    reason = f"can't read {tmp_path}/failed.txt (Is a directory)"
    assert status(str(tmp_path)) == Status("failed", reason, 0, False)


def test_the_status_of_a_run_that_fails(start, monkeypatch):
    with monkeypatch.context() as patch:
        after_epochs(patch, rebrac, make_nan)
        message = fails("critic_loss is nan", start)
    assert status(start.directory) == Status("failed", f"error: {message}\n", 20, False)
    stopped(start, monkeypatch, epochs=2)
    assert status(start.directory) == Status("unfinished", "", 40, False)


def test_an_error_that_nobody_foresaw_is_a_failure(start, monkeypatch):
    def act(epoch):
        raise KeyError("a fault")

    before_epochs(monkeypatch, rebrac, act)
    with pytest.raises(KeyError):
        start()
    assert status(start.directory) == Status("failed", "KeyError: 'a fault'\n", 0, False)


# --- What it prints ---


def evaluation_lines(output):
    """Return what stands in the lines of evaluations, by its names."""
    lines = []
    for line in output.splitlines():
        first, *parts = line.strip().split("  ")
        if first.endswith(" updates"):
            values = dict(part.split(" ", 1) for part in parts)
            lines.append({"update": first.removesuffix(" updates").replace(",", ""), **values})
    return lines


def test_an_evaluations_line_shows_the_tables_numbers(start, capsys):
    directory = start(**EVERYTHING)
    lines = evaluation_lines(capsys.readouterr().out)
    evaluations = table(directory, "evaluations.csv")
    train = table(directory, "train.csv")
    assert [line["update"] for line in lines] == ["20", "40", "60"]
    for line in lines:
        rows = [row for row in evaluations if row["update"] == line["update"]]
        scores = [float(row["score"]) for row in rows]
        assert line["score"] == f"{np.mean(scores):.1f} +- {np.std(scores):.1f} over 2 seeds"
        errors = [float(row["validation/action_error"]) for row in rows]
        assert float(line["validation/action_error"]) == pytest.approx(np.mean(errors), rel=1e-3)
        losses = [float(row["actor_loss"]) for row in train if row["update"] == line["update"]]
        assert float(line["actor_loss"]) == pytest.approx(np.mean(losses), rel=1e-3)


def test_a_score_has_the_deviation_over_the_seeds_means(start, tmp_path, capsys):
    config = rebrac.tuned(rebrac.Config(results=str(tmp_path), num_seeds=2, eval_episodes=2))
    low = -280.178953  # the return of score 0, by D4RL's table; 12135 has score 100
    returns = np.full((2, 4), low)
    returns[:, 0] = 12135
    returns[1, 1] = 12135
    with Run("rebrac.py", config, rebrac.tuned) as run:
        run.records[0].tables.create()
        run.seconds["train"] = 5.0
        run.evaluate(lambda states, update: (returns, {}), None, 1000)
    (line,) = evaluation_lines(capsys.readouterr().out)
    assert line["update"] == "1000"
    assert line["score"] == "75.0 +- 25.0 over 2 seeds"  # of all episodes it would be 43.3
    assert line["updates/s"] == "200"


class Clock:
    """A clock that only stands still or is moved; in place of the module `time`."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(harness.run, "time", SimpleNamespace(monotonic=lambda: self.now))

    def move(self, seconds):
        self.now += seconds


def test_updates_per_second_are_those_of_training_since_the_last_line(start, monkeypatch, capsys):
    """The first epoch is also compiled."""
    clock = Clock(monkeypatch)
    policy = rebrac.policy

    def slow_policy(*arguments):
        clock.move(1.0)
        return policy(*arguments)

    def train(number, states, infos):
        clock.move(9.875 if number == 1 else 0.125)

    after_epochs(monkeypatch, rebrac, train)
    monkeypatch.setattr(rebrac, "policy", slow_policy)
    directory = start(analysis=False)
    output = capsys.readouterr().out
    assert [line["updates/s"] for line in evaluation_lines(output)] == ["2", "80", "80"]
    with open(os.path.join(directory, "finished.json")) as file:
        seconds = json.load(file)["seconds"]
    assert seconds == dict(train=9.875 + 5 * 0.125, evaluation=3 * 15.0, analysis=0.0)
    assert "train 10 s, evaluation 45 s, analysis 0 s" in output.splitlines()[-1]


def test_the_time_of_training_goes_on_after_an_interruption(start, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    after_epochs(monkeypatch, rebrac, lambda number, states, infos: clock.move(0.125))
    stopped(start, monkeypatch)
    clock.move(1000)
    start()
    lines = evaluation_lines(capsys.readouterr().out)
    assert [line["updates/s"] for line in lines] == ["80"] * 3


# --- Resuming ---


@pytest.mark.parametrize(
    "name, flags",
    [*((name, EVERYTHING) for name in OURS), ("cql", {}), ("bcq", {})],  # IQL's in test_group.py
)
def test_a_run_stopped_after_each_epoch_ends_with_the_same_bits(
    start, name, flags, monkeypatch, capsys
):
    script = OURS[name]
    whole = contents(start(script, "whole", **flags))
    for epoch in range(1, 7):
        stopped(start, monkeypatch, epochs=1, script=script, results="parts", **flags)
        line = f"stopped at update {10 * epoch}; the same command resumes there"
        assert line in capsys.readouterr().out
    parts = contents(start(script, "parts", **flags))
    assert "resuming from update 60" in capsys.readouterr().out
    assert differences(whole, parts) == []


def test_ctrl_c_saves_too_and_a_second_one_ends_at_once(start, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, rebrac, 3, signal.SIGINT)
        exits(128 + signal.SIGINT, start)
    assert "stopped at update 30" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, rebrac, 2, signal.SIGINT)
        signal_in_epoch(patch, rebrac, 2, signal.SIGINT)
        exits(128 + signal.SIGINT, start)
    output = capsys.readouterr().out
    assert "stopped at" not in output
    assert "stopped; the same command goes on from the last checkpoint, of update 40" in output
    start()
    output = capsys.readouterr().out
    assert "resuming from update 40" in output  # saved before the evaluation there


def test_a_closed_terminal_saves_too_unless_nohup_has_it_ignored(start, monkeypatch, capsys):
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, too
    try:
        with monkeypatch.context() as patch:
            signal_in_epoch(patch, rebrac, 3, signal.SIGHUP)
            exits(128 + signal.SIGHUP, start)
        assert "stopped at update 30" in capsys.readouterr().out
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with monkeypatch.context() as patch:
            signal_in_epoch(patch, rebrac, 2, signal.SIGHUP)
            start()
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert "final score" in capsys.readouterr().out


def test_two_sigterms_of_a_machine_that_shuts_down_are_one(start, monkeypatch, capsys):
    """And a second one that comes later ends the run at once."""
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, rebrac, 3, times=2)
        exits(128 + signal.SIGTERM, start)
    assert "stopped at update 30" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(harness.run, "SAME_SIGNAL", 0)
        signal_in_epoch(patch, rebrac, 2, times=2)
        exits(128 + signal.SIGTERM, start)
    assert "stopped; the same command goes on from the last " in capsys.readouterr().out


def test_the_second_of_two_sigterms_leaves_the_end_of_a_run_alone(start, monkeypatch):
    """It comes while the run, which the first one has ended, waits for W&B."""
    close = harness.record.Record.close
    closed = []

    def late(record):
        os.kill(os.getpid(), signal.SIGTERM)
        close(record)
        closed.append(record)

    signal_in_evaluation(monkeypatch, rebrac)
    monkeypatch.setattr(harness.record.Record, "close", late)
    handler = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the process would be killed"))
    try:
        exits(128 + signal.SIGTERM, start)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert len(closed) == 1


def test_an_evaluation_ends_at_once_and_is_made_again(start, monkeypatch, capsys):
    whole = contents(start(results="whole"))
    with monkeypatch.context() as patch:
        signal_in_evaluation(patch, rebrac)
        exits(128 + signal.SIGTERM, start)
    assert os.path.getsize(os.path.join(start.directory, "episodes.csv")) == 0
    parts = contents(start())
    assert "resuming from update 20" in capsys.readouterr().out
    assert differences(whole, parts) == []


def test_measuring_leaves_training_as_it_is_bit_for_bit(start):
    measured = contents(start(analysis=True))
    plain = contents(start(analysis=False))
    same = [key for key in measured if key.startswith("states/")] + ["train.csv", "episodes.csv"]
    assert len(same) > 20
    assert not set(same) & set(differences(measured, plain))
    assert measured["evaluations.csv"] != plain["evaluations.csv"]


@pytest.mark.parametrize("script", [rebrac, iql], ids=["rebrac", "iql"])  # with such a run
def test_a_run_of_an_earlier_version_resumes(
    start, script, monkeypatch, tmp_path, small_file, capsys
):
    """Its files lie in old_runs. It was stopped at update 30."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(small_file, "small.hdf5")  # as its config says
    old = os.path.join(OLD_RUNS, script.__name__)
    config = with_checksum(replace(load_config(script.Config, old), results="old"))
    directory = run_directory(script.__name__, config, script.tuned)
    shutil.copytree(old, directory)
    assert status(directory) == Status("unfinished", "", 30, False)
    for results in ("old", "new"):
        words = ["--config_path", f"{old}/config.yaml", "--results", results]
        monkeypatch.setattr("sys.argv", ["script.py", *words])
        script.main()
        assert ("resuming from update 30" in capsys.readouterr().out) == (results == "old")
    assert status(directory) == Status("finished", "", 60, False)
    resumed = table(directory, "train.csv")
    whole = table(directory.replace("old", "new", 1), "train.csv")
    assert len(resumed) == len(whole) == 6
    for row, expected in zip(resumed, whole):  # other processors round otherwise
        assert as_numbers(row) == pytest.approx(as_numbers(expected), rel=0.01, abs=1e-3)


def as_numbers(row):
    return {key: float(text) for key, text in row.items()}


@pytest.mark.parametrize("name", ["rebrac", "bcq"])
def test_a_lone_copy_of_a_script_runs_in_any_folder(name, spawn, quick, tmp_path):
    """It trains, resumes and evaluates with what is installed."""
    shutil.copy(OURS[name].__file__, tmp_path)
    name = f"{name}.py"
    words = [name, *command_line({**quick, "num_updates": 1_000_000})]
    for start in ("training on", "resuming from update"):
        run = spawn(*words, cwd=tmp_path)
        read_until(start, run.stdout)
        read_until(" updates  score ", run.stdout)
        run.send_signal(signal.SIGTERM)
        assert run.wait() == 128 + signal.SIGTERM
    (path,) = glob.glob(f"{tmp_path}/results/*/*/*/config.yaml")
    directory = os.path.dirname(path)
    run = spawn(name, "--evaluate", directory, cwd=tmp_path)
    assert run.communicate()[0].startswith("score ")
    assert run.returncode == 0


# --- Kills ---


class Killed(BaseException):
    """In place of the end of the process."""


class Disk:
    """Counts the uses of the disk. At one of them the process dies, with half of it done."""

    def __init__(self, patch, last=None):
        self.uses = 0
        self.last = last
        for name in ("replace", "fsync", "truncate"):
            patch.setattr(os, name, self.counted(getattr(os, name)))
        patch.setattr(np, "savez", self.counted(np.savez, half_a_checkpoint))
        patch.setattr(Tables, "append", self.counted(Tables.append, half_a_row))

    def counted(self, function, half=None):
        def call(*arguments, **options):
            self.uses += 1
            if self.uses == self.last:
                if half:
                    half(*arguments)
                raise Killed
            return function(*arguments, **options)

        return call


def half_a_checkpoint(file, **arrays):
    file.write(b"PK" * 500)
    file.flush()


def half_a_row(tables, name, rows):
    with open(tables.path(name), "a") as file:
        file.write("3,4")


@pytest.mark.slow
def test_a_kill_at_any_use_of_the_disk_leaves_a_good_state(start, monkeypatch):
    flags = dict(num_updates=20, analysis=False, eval_noise="[]")
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        whole = contents(start(results="whole", **flags))
    assert disk.uses > 25
    for number in range(1, disk.uses + 1):
        with monkeypatch.context() as patch:
            Disk(patch, number)
            with pytest.raises(Killed):
                start(results=f"killed{number}", **flags)
        killed = contents(start(results=f"killed{number}", **flags))
        assert differences(whole, killed) == [], number


@pytest.mark.slow
def test_eight_kills_cost_only_the_work_since_a_checkpoint(spawn, quick, tmp_path, write_dataset):
    """They come at random: at any time of a process, or between an evaluation and 2 s after it."""
    flags = dict(
        quick,
        dataset_name="hopper-medium-replay-v2",
        dataset_path=write_dataset(**random_columns(0, states=11, actions=3)),
        analysis=False,
        eval_episodes=1,
        log_every=100,
        eval_every=500,
        num_updates=10_000,
    )

    def process(results, seed):
        words = command_line({**flags, "results": tmp_path / results, "seed": seed})
        return spawn("rebrac.py", *words)

    def directory(results, seed):
        pattern = os.path.join(tmp_path, results, "rebrac", "*", f"seed={seed},*")
        return next(glob.iglob(pattern), None)

    process("whole", 0).communicate()  # which also fills the cache of compiled programs
    seed, saved = kill_eight_times(process, directory)
    assert saved == sorted(saved)
    assert saved[-1] > 0
    output, _ = process("killed", seed).communicate()
    assert f"resuming from update {saved[-1]}" in output
    assert output.splitlines()[-1].startswith("final score")
    process("whole", seed).communicate()
    whole = contents(directory("whole", seed))
    assert differences(whole, contents(directory("killed", seed))) == []
    assert whole["update"] == 10_000


def kill_eight_times(process, directory):
    """Return the seed that was trained last, and its checkpoint's update after each kill."""
    rng = random.Random(0)
    seed = 0
    kills = 0
    saved = []
    while kills < 8 or not saved or saved[-1] == 0:  # the last one has made some progress
        running = process("killed", seed)
        started = time.monotonic()
        if kills % 2 == 0:  # each fourth makes some progress
            read_until("updates  score" if kills % 4 == 2 else "training on", running.stdout)
        time.sleep(rng.uniform(0, 4 if kills % 2 else 2))
        running.kill()
        output, _ = running.communicate()
        if running.returncode != -signal.SIGKILL:  # it has ended before
            assert running.returncode == 0, output
            seed += 1
            saved = []
            continue
        kills += 1
        found = directory("killed", seed) and last_checkpoint(directory("killed", seed))
        saved.append(found[2]["update"] if found else 0)
        assert not found or found[0].endswith("checkpoint.npz"), "the last one was not whole"
        assert time.monotonic() - started < 60
    return seed, saved


# --- What can go wrong ---


def test_a_second_process_on_the_same_run_says_so_and_stops(quick, tmp_path, capsys):
    config = rebrac.tuned(rebrac.Config(results=str(tmp_path)))
    with Run("rebrac.py", config, rebrac.tuned) as run:
        with pytest.raises(BusyError):
            Run("rebrac.py", config, rebrac.tuned)
        with pytest.raises(SystemExit) as error, one_line_errors():
            Run("rebrac.py", config, rebrac.tuned)
        assert error.value.code == os.EX_TEMPFAIL
        assert capsys.readouterr().err == f"error: another process is training {run.directory}\n"
        assert status(run.directory).busy
    Run("rebrac.py", config, rebrac.tuned)


def test_a_disk_without_locks_is_warned_about_and_trained_on(start, monkeypatch, capsys):
    def fail(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    directory = start()
    assert "warning: no locks on this disk (No locks available)" in capsys.readouterr().out
    assert status(directory) == Status("finished", "", 60, False)


def test_another_users_lock_is_taken_by_reading_it(start, monkeypatch):
    """It keeps a second process out as one's own does."""

    def open_others(path, mode="r", **options):
        if str(path).endswith("/lock") and mode != "r":
            raise PermissionError(errno.EACCES, "Permission denied")
        return open(path, mode, **options)

    directory = stopped(start, monkeypatch)
    monkeypatch.setattr(harness.record, "open", open_others, raising=False)
    with open(os.path.join(directory, "lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as error, one_line_errors():
            start()
    assert error.value.code == os.EX_TEMPFAIL
    assert start() == directory
    assert status(directory).state == "finished"


def test_the_same_data_is_the_same_run_whatever_its_path(
    start, monkeypatch, write_dataset, tmp_path, capsys
):
    path = write_dataset(**random_columns(1))
    directory = stopped(start, monkeypatch, dataset_path=path)
    monkeypatch.chdir(tmp_path)
    moved = f"./.././{tmp_path.name}/elsewhere.h5"
    os.rename(path, moved)
    assert start(dataset_path=moved) == directory
    assert "resuming from update 30" in capsys.readouterr().out
    assert read_fields(directory)["dataset_path"] == moved


def test_other_data_under_the_same_path_are_another_run(start, write_dataset):
    path = write_dataset(**random_columns(1))
    directory = start(dataset_path=path)
    checksum = read_fields(directory)["dataset_sha256"]
    with open(path, "rb") as file:
        assert checksum == hashlib.sha256(file.read()).hexdigest()
    write_dataset(**random_columns(2))
    message = f"has the SHA-256 .*, not the config's dataset_sha256 {checksum}"
    fails(message, start, dataset_path=path, dataset_sha256=checksum)
    assert start(dataset_path=path) != directory


def test_d4rls_name_stands_for_the_file_that_is_there(start, quick, monkeypatch, tmp_path):
    """Another folder may have another file of the same name."""
    directories = []
    for number in (1, 2, 1):
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        path = folder / "halfcheetah_medium_replay-v2.hdf5"
        with h5py.File(path, "w") as file:
            for key, column in random_columns(number).items():
                file[key] = column
        monkeypatch.setattr(d4rl.offline_env, "DATASET_PATH", str(folder))
        monkeypatch.delitem(quick, "dataset_path", raising=False)
        directories.append(start(num_updates=20))
    assert directories[0] == directories[2] != directories[1]


def test_a_table_that_has_lost_rows_is_an_error(start, monkeypatch):
    directory = stopped(start, monkeypatch)
    os.truncate(os.path.join(directory, "train.csv"), 100)
    fails("train.csv has lost rows; remove .* to start anew", start)


def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays(start, monkeypatch, capsys):
    whole = contents(start(results="whole"))
    directory = stopped(start, monkeypatch)
    path = os.path.join(directory, "checkpoint.npz")
    _, before = read_checkpoint(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    half = os.path.getsize(path) // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, limits[1]))  # a write beyond is refused
    try:
        message = fails("can't write to .* \\(File too large\\); once that is fixed, ", start)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.endswith("resumes from the last checkpoint, of update 30")
    _, after = read_checkpoint(path)
    assert after == before
    assert differences(whole, contents(start())) == []
    assert "resuming from update 30" in capsys.readouterr().out


def test_a_table_on_a_full_disk_is_an_error(quick, tmp_path):
    config = rebrac.tuned(rebrac.Config(results=str(tmp_path)))
    with Run("rebrac.py", config, rebrac.tuned) as run:
        (record,) = run.records
        os.symlink("/dev/full", record.path("train.csv"))
        fails("No space left on device", record.write, "train.csv", [dict(seed=0)] * 10_000)
        with contextlib.suppress(OSError):
            record.tables.files.pop("train.csv").close()


def test_a_directory_that_can_not_be_written_to_is_an_error(start, tmp_path):
    (tmp_path / "file").write_text("")
    fails("can't write to .* \\(Not a directory\\)", start, results="file")
    os.chmod(tmp_path, 0o777)
    (tmp_path / "closed").mkdir(mode=0o555)
    config = rebrac.tuned(rebrac.Config(results=str(tmp_path / "closed")))
    user = os.geteuid()
    if user == 0:  # who may write anywhere
        os.seteuid(65534)
    try:
        message = "can't write to .* \\(Permission denied\\)"
        fails(message, Run, "rebrac.py", config, rebrac.tuned)
    finally:
        os.seteuid(user)


def make_nan(number, states, infos):
    """Let a loss of the third epoch be NaN."""
    if number == 3:
        infos["critic_loss"] = infos["critic_loss"].at[0, 2].set(jnp.nan)


def test_nan_in_a_loss_names_update_quantity_and_checkpoint(start, monkeypatch):
    with monkeypatch.context() as patch:
        after_epochs(patch, rebrac, make_nan)
        message = fails("critic_loss is nan after update 26 \\(seed 3\\)", start)
    directory = start.directory
    end = f"; the last good checkpoint is {directory}/checkpoint.npz, of update 20"
    assert message.endswith(end)
    with open(os.path.join(directory, "failed.txt")) as file:
        assert file.read() == f"error: {message}\n"
    assert len(table(directory, "train.csv")) == 2
    whole = contents(start(results="whole"))
    assert differences(whole, contents(start())) == []
    assert not os.path.exists(os.path.join(directory, "failed.txt"))


def test_infinite_parameters_are_named(start, monkeypatch):
    def break_bias(number, states, infos):
        layer = states.actor["params"]["Dense_0"]
        layer["bias"] = layer["bias"].at[0, 1].set(jnp.inf)

    after_epochs(monkeypatch, rebrac, break_bias)
    line = "actor/params/Dense_0/bias is NaN or infinite after update 10 \\(seed 3\\)"
    fails(f"{line}; the last good .* update 0", start)


@both_scripts
def test_a_learning_rate_that_is_too_high_ends_in_that_error(start, script):
    message = "(is nan|is inf|NaN or infinite).*the last good checkpoint is .* of update"
    fails(message, start, script, critic_learning_rate=1e30)
