"""A run's directory: what is in it, and that whatever happens to the process, the same command goes on from it."""

import contextlib
import csv
import glob
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from functools import partial

import h5py
import imageio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from conftest import ROOT, random_columns
from test_mujoco210 import gl_backend
from wandb_server import Server

import iql
import rebrac
import runs
import tasks

SCRIPTS = {"rebrac": rebrac, "iql": iql}
both = pytest.mark.parametrize("script", SCRIPTS)
QUICK = dict(
    hidden_dim=64, batch_size=8, actor_layers=1, critic_layers=1, log_every=10, eval_every=20, num_updates=60,
    eval_episodes=2, validation_frac=0.2, seed=3,
)  # fmt: skip
EVERYTHING = dict(
    num_seeds=2, actor_dropout=0.3, actor_wd=0.1, actor_ln=True, actor_bn=True, actor_sn=True, actor_input_noise=0.1,
    actor_bc_noise=0.1, actor_grad_noise=0.1, actor_lr_decay=True, critic_bn=True, normalize_states=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("data") / "small.hdf5")
    with h5py.File(path, "w") as file:
        for key, column in random_columns(0).items():
            file[key] = column
    return path


@pytest.fixture
def start(monkeypatch, tmp_path, small_file):
    """A function that runs a script's main with these flags, in short episodes; returns the directory of its run."""
    monkeypatch.setenv("D4RL_SUPPRESS_IMPORT_ERROR", "1")
    for key in [key for key in os.environ if key.startswith("WANDB")]:
        monkeypatch.delenv(key)

    def short(config):
        envs = tasks.Envs(config.dataset_name, config.num_seeds * len(tasks.conditions(config)), processes=1)
        envs.start()
        for env in envs.own:
            env._max_episode_steps = 15
        return envs

    def start(script="rebrac", results="results", **flags):
        module = SCRIPTS[script]
        monkeypatch.setattr(module, "make_envs", short)
        monkeypatch.setattr(runs, "make_envs", short)
        flags = dict(dataset_path=small_file, results=str(tmp_path / results)) | QUICK | flags
        arguments = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        config = module.tuned(runs.parse(module.Config))
        directory = runs.run_directory(script, config, module.tuned)
        start.output = directory
        module.main()
        return directory

    return start


def table(directory, name):
    with open(os.path.join(directory, name), newline="") as file:
        return list(csv.DictReader(file))


def contents(directory):
    """What must be the same in a run that was interrupted: all arrays of the checkpoint, and the tables' bytes."""
    arrays, about = runs.read_checkpoint(os.path.join(directory, "checkpoint.npz"))
    about.pop("seconds")
    result = {key: (array.dtype, array.shape, array.tobytes()) for key, array in arrays.items()} | about
    for name in runs.TABLES:
        with open(os.path.join(directory, name), "rb") as file:
            result[name] = file.read()
    return result


def exits(code, function, *arguments, **options):
    with pytest.raises(SystemExit) as error:
        function(*arguments, **options)
    if isinstance(code, int):
        assert error.value.code == code, error.value.code
    else:
        assert str(error.value.code).startswith("error: ") and "\n" not in str(error.value.code)
        assert re.search(code, str(error.value.code)), error.value.code
    return str(error.value.code)


# --- What is in the directory ---


@both
def test_a_run_leaves_its_config_tables_checkpoint_and_marker(start, script):
    directory = start(script, num_seeds=2)
    assert sorted(os.listdir(directory)) == [
        "checkpoint.npz", "config.yaml", "episodes.csv", "evaluations.csv", "finished.json", "lock", "train.csv",
    ]  # fmt: skip
    train, evaluations, episodes = (table(directory, name) for name in runs.TABLES)
    assert [(row["seed"], row["update"]) for row in train] == [(s, str(u)) for u in range(10, 70, 10) for s in "34"]
    assert [(row["seed"], row["update"]) for row in evaluations] == [(s, u) for u in ("20", "40", "60") for s in "34"]
    assert len(episodes) == 3 * 2 * 4 and list(episodes[0]) == [
        "seed", "update", "episode", "action_noise", "state_noise", "return", "score",
    ]  # fmt: skip
    config = SCRIPTS[script].Config(dataset_name="halfcheetah-medium-replay-v2")
    for row in episodes:
        assert float(row["score"]) == pytest.approx(tasks.normalized_score(config, float(row["return"])), rel=1e-6)
    columns = {"score": ("0", "0"), "score/action_noise=0.2": ("0.2", "0"), "score/state_noise=0.05": ("0", "0.05")}
    for row in evaluations:
        for column, noise in columns.items():
            scores = [
                float(e["score"])
                for e in episodes
                if all(e[key] == row[key] for key in ("seed", "update"))
                and (e["action_noise"], e["state_noise"]) == noise
            ]
            assert len(scores) == (2 if column == "score" else 1) and float(row[column]) == pytest.approx(
                np.mean(scores), rel=1e-6
            )
        for part in ("train", "validation", "evaluation", "random"):
            assert 0 <= float(row[f"{part}/dead_neurons"]) <= 1 and 1 <= float(row[f"{part}/pca_rank"]) <= 64
        assert float(row["plasticity/after"]) < float(row["plasticity/before"])
    with open(os.path.join(directory, "finished.json")) as file:
        assert set(json.load(file)) == {"updates", "seconds", "score"}


@both
def test_the_config_file_holds_the_whole_config_and_starts_the_same_run(start, script, monkeypatch, capsys):
    directory = start(script, actor_ln=True, actor_wd=1e-4)
    module = SCRIPTS[script]
    config = runs.load_config(module.Config, directory)
    assert config.actor_ln and config.actor_wd == 1e-4 and config.gamma == 0.99 and config.eval_noise[1] == (0.0, 0.05)
    with open(os.path.join(directory, "config.yaml")) as file:
        written = yaml.safe_load(file)
    assert set(written) == {f.name for f in fields(module.Config)} - set(runs.NOT_IN_NAME)
    path = os.path.join(directory, "config.yaml")
    results = directory.split(os.sep + script)[0]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--config_path", path, "--results", results])
    exits(0, module.main)
    assert f"finished already: {directory}" in capsys.readouterr().out


def name_of(**flags):
    config = rebrac.tuned(rebrac.Config(**flags))
    return runs.run_directory("rebrac", config, rebrac.tuned)


def test_the_name_says_what_differs_and_the_config_determines_it():
    assert name_of(actor_ln=True, actor_dropout=0.1, seed=2).startswith(
        "results/rebrac/halfcheetah-medium-replay-v2/seed=2,actor_dropout=0.1,actor_ln=true-"
    )
    assert re.fullmatch("results/rebrac/pen-human-v1/seed=0-[0-9a-f]{8}", name_of(dataset_name="pen-human-v1"))
    assert name_of(batch_size=1024) == name_of() and name_of(batch_size=512) != name_of()
    assert name_of(results="elsewhere") == name_of().replace("results", "elsewhere")
    names = set()
    for field in fields(rebrac.Config):
        if field.name in ("dataset_name", *runs.NOT_IN_NAME):
            continue
        value = {"bool": True, "int": 7, "float": 0.123, "str": "mse"}.get(
            re.search("bool|int|float|str", str(field.type))[0]
        )
        value = {"eval_noise": ((0.5, 0.5),), "critic_ln": False, "analysis": False}.get(field.name, value)
        names.add(name_of(**{field.name: value}))
        assert name_of(**{field.name: value}) != name_of(), field.name
    assert len(names) == len(fields(rebrac.Config)) - 1 - len(runs.NOT_IN_NAME)
    long = name_of(**{f.name: 0.5 for f in fields(rebrac.Config) if f.type is float}, dataset_path="/a/../b c/ü*.hdf5")
    assert len(os.path.basename(long)) < 200 and re.fullmatch(r"[\w./=,+-]+", long)


def test_a_finished_run_says_so_and_is_left_alone(start, capsys):
    directory = start()
    before = {name: os.stat(os.path.join(directory, name)).st_mtime_ns for name in os.listdir(directory)}
    exits(0, start)
    assert capsys.readouterr().out.splitlines()[-1] == f"finished already: {directory}"
    assert before == {name: os.stat(os.path.join(directory, name)).st_mtime_ns for name in os.listdir(directory)}
    assert start(seed=4) != directory


# --- Resuming ---


def replace_epoch(patch, module, function):
    function.lower = module.epoch.lower  # which compiles it ahead
    patch.setattr(module, "epoch", function)


def signal_in_epoch(monkeypatch, module, number, signum=signal.SIGTERM):
    """Lets the process get a signal during its epoch of this number, from 1."""
    count, epoch = [0], module.epoch

    def interrupted(*arguments):
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signum)
        return epoch(*arguments)

    replace_epoch(monkeypatch, module, interrupted)


@both
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_run_that_is_stopped_after_each_epoch_ends_bit_for_bit_like_one_that_is_not(
    start, script, options, monkeypatch, capsys
):
    whole = contents(start(script, "whole", **options))
    for epoch in range(1, 7):
        with monkeypatch.context() as patch:
            signal_in_epoch(patch, SCRIPTS[script], 1)
            exits(128 + signal.SIGTERM, start, script, "parts", **options)
        assert f"stopped at update {10 * epoch}; the same command goes on" in capsys.readouterr().out
    parts = contents(start(script, "parts", **options))
    assert "going on from update 60" in capsys.readouterr().out
    assert whole.keys() == parts.keys()
    assert [key for key in whole if whole[key] != parts[key]] == []


def test_ctrl_c_saves_too_and_a_second_one_ends_at_once(start, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, rebrac, 3, signal.SIGINT)
        exits(128 + signal.SIGINT, start)
    assert "stopped at update 30" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, rebrac, 2, signal.SIGINT)
        signal_in_epoch(patch, rebrac, 2, signal.SIGINT)
        exits(128 + signal.SIGINT, start)
    assert "stopped at" not in capsys.readouterr().out
    assert start() and "going on from update 40" in capsys.readouterr().out  # saved before the evaluation at 40


def signal_in_evaluation(monkeypatch, module):
    policy = module.act_all

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return policy(*arguments)

    monkeypatch.setattr(module, "act_all", interrupted)


def test_an_evaluation_ends_at_once_and_is_made_again(start, monkeypatch, capsys):
    whole = contents(start(results="whole"))
    with monkeypatch.context() as patch:
        signal_in_evaluation(patch, rebrac)
        exits(128 + signal.SIGTERM, start)
    assert os.path.getsize(os.path.join(start.output, "episodes.csv")) == 0
    parts = contents(start())
    assert "going on from update 20" in capsys.readouterr().out and whole == parts


def test_measuring_leaves_training_as_it_is_bit_for_bit(start):
    measured, plain = (contents(start(analysis=analysis)) for analysis in ("true", "false"))
    same = [key for key in measured if key.startswith("states/")] + ["train.csv", "episodes.csv"]
    assert len(same) > 20 and all(measured[key] == plain[key] for key in same)
    assert measured["evaluations.csv"] != plain["evaluations.csv"]


def kill_at(monkeypatch, number):
    """The process dies, as by a kill, when it has used the disk so many times, half way through what it writes."""
    count = [0]

    class Killed(BaseException):
        pass

    def counted(function, *, torn=None):
        def wrapper(*arguments, **options):
            count[0] += 1
            if count[0] == number:
                if torn:
                    torn(*arguments)
                raise Killed
            return function(*arguments, **options)

        return wrapper

    def tear(file, **arrays):
        file.write(b"PK" * 500)
        file.flush()

    for name in ("replace", "fsync", "truncate"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(np, "savez", counted(np.savez, torn=tear))
    monkeypatch.setattr(runs.Run, "write", counted(runs.Run.write, torn=lambda run, name, rows: half_a_row(run, name)))
    return Killed, count


def half_a_row(run, name):
    with open(run.path(name), "a") as file:
        file.write("3,4")


def test_a_kill_at_any_use_of_the_disk_leaves_the_last_good_state(start, monkeypatch):
    flags = dict(num_updates=20, eval_every=20, analysis="false", eval_noise="[]", actor_layers=1)
    with monkeypatch.context() as patch:
        _, count = kill_at(patch, -1)
        whole = contents(start(results="whole", **flags))
    number = 0
    for number in range(1, count[0] + 1):
        with monkeypatch.context() as patch:
            killed, _ = kill_at(patch, number)
            with pytest.raises(killed):
                start(results=f"killed{number}", **flags)
        with contextlib.suppress(SystemExit):  # when it was finished already
            start(results=f"killed{number}", **flags)
        assert contents(start.output) == whole, number
    assert number > 25


def test_twenty_kills_at_random_times_cost_no_more_than_the_work_since_the_last_checkpoint(tmp_path, write_dataset):
    path = write_dataset(**random_columns(0, states=11, actions=3))
    flags = QUICK | dict(dataset_name="hopper-medium-replay-v2", dataset_path=path, analysis="false", eval_episodes=1)
    flags |= dict(log_every=100, eval_every=500, num_updates=20_000)
    rng, kills, saved, seed = random.Random(0), 0, [], 0

    def process(results):
        words = [str(word) for key, value in {**flags, "seed": seed}.items() for word in (f"--{key}", value)]
        command = [sys.executable, "-u", "rebrac.py", "--results", str(tmp_path / results), *words]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def directory(results):
        return next(glob.iglob(os.path.join(tmp_path, results, "rebrac", "*", f"seed={seed},*")), None)

    process("whole").communicate()  # which also fills the cache of compiled programs
    while kills < 20:
        running, started = process("killed"), time.monotonic()
        for line in () if kills % 2 else running.stdout:
            if ("updates  score" if kills % 4 == 2 else "training on") in line:  # each fourth makes some progress
                break
        time.sleep(rng.uniform(0, 4 if kills % 2 else 2))
        running.kill()
        output, _ = running.communicate()
        if running.returncode != -signal.SIGKILL:  # it has ended before
            assert running.returncode == 0, output
            saved, seed = [], seed + 1
            continue
        kills += 1
        found = runs.last_checkpoint(directory("killed")) if directory("killed") else None
        saved.append(found[2]["update"] if found else 0)
        assert found is None or found[0].endswith("checkpoint.npz"), "the last checkpoint was not whole"
        assert time.monotonic() - started < 60
    assert saved == sorted(saved) and saved[-1] > 0, saved
    (killed, _), _ = (process(name).communicate() for name in ("killed", "whole"))
    assert f"going on from update {saved[-1]}" in killed and killed.splitlines()[-1].startswith("final score")
    first, second = (contents(directory(name)) for name in ("killed", "whole"))
    assert first == second and first["update"] == 20_000


# --- What can go wrong ---


def stopped(start, monkeypatch, epochs=3, **flags):
    """A run that was stopped after some epochs: its directory."""
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, rebrac, epochs)
        exits(128 + signal.SIGTERM, start, **flags)
    return start.output


def test_a_second_process_on_the_same_run_says_so_and_stops(start, tmp_path, capsys):
    config = rebrac.tuned(rebrac.Config(results=str(tmp_path)))
    with runs.Run("rebrac.py", config, rebrac.tuned) as run:
        exits(os.EX_TEMPFAIL, runs.Run, "rebrac.py", config, rebrac.tuned)
        assert capsys.readouterr().err == f"error: another process is training {run.directory}\n"
    runs.Run("rebrac.py", config, rebrac.tuned)


@pytest.mark.parametrize("cut", [0, 1, 1000, -1])
def test_with_a_checkpoint_cut_short_the_one_before_is_taken(start, monkeypatch, capsys, cut):
    whole = contents(start(results="whole"))
    directory = stopped(start, monkeypatch)
    path = os.path.join(directory, "checkpoint.npz")
    os.truncate(path, cut if cut >= 0 else os.path.getsize(path) - 1)
    assert contents(start()) == whole
    assert "checkpoint.npz is cut short or damaged; taking the one before it, of update 20" in capsys.readouterr().out
    directory = stopped(start, monkeypatch, seed=9)
    for name in ("checkpoint.npz", "previous.npz"):
        os.truncate(os.path.join(directory, name), 1000)
    exits(f"checkpoint.npz is cut short or damaged, and there is no other; remove {directory}", start, seed=9)
    for name in ("checkpoint.npz", "previous.npz"):
        os.remove(os.path.join(directory, name))
    exits("has lost its checkpoints; remove it to start anew", start, seed=9)


def test_every_cut_and_every_flipped_byte_of_a_checkpoint_is_noticed_or_without_effect(tmp_path):
    path, damaged = str(tmp_path / "checkpoint.npz"), str(tmp_path / "damaged.npz")
    tree = {"a": {"b": jnp.arange(20.0)}, "key": jax.random.key(1)}
    runs.write_checkpoint(path, tree, {"update": 5})
    with open(path, "rb") as file:
        good = file.read()
    expected, about = runs.read_checkpoint(path)
    assert sorted(expected) == ["a/b", "key"] and about == {"format": runs.FORMAT, "update": 5}
    noticed = 0
    for at in range(len(good)):
        for content in (good[:at], good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :]):
            with open(damaged, "wb") as file:
                file.write(content)
            try:
                arrays, about = runs.read_checkpoint(damaged)
            except ValueError as error:
                assert "is cut short or damaged" in str(error)
                noticed += 1
            else:
                assert len(content) == len(good) and about["update"] == 5
                assert all(np.array_equal(arrays[key], expected[key]) for key in expected)
    assert noticed > 1.5 * len(good)


def test_a_pickle_in_a_checkpoint_is_never_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    about = np.frombuffer(json.dumps({"format": runs.FORMAT}).encode(), np.uint8)
    np.savez(tmp_path / "checkpoint.npz", about=about, evil=np.array([Evil()], dtype=object))
    with pytest.raises(ValueError, match="damaged"):
        runs.read_checkpoint(str(tmp_path / "checkpoint.npz"))
    (tmp_path / "config.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{tmp_path}/executed']\n")
    exits("is not the config of a run", runs.load_config, rebrac.Config, str(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rebrac.py", "--config_path", str(tmp_path / "config.yaml")])
        exits("could not determine a constructor", runs.parse, rebrac.Config)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_version_is_an_error(start, monkeypatch):
    directory, other = (stopped(start, monkeypatch, **flags) for flags in ({}, {"hidden_dim": 32}))
    shutil.copy(os.path.join(other, "checkpoint.npz"), directory)
    message = r"is of another version of the script: states/actor/\S+ has shape .*32.* there and .*64.* here"
    exits(message, start)
    shutil.copy(os.path.join(directory, "previous.npz"), os.path.join(directory, "checkpoint.npz"))
    with monkeypatch.context() as patch:
        patch.setattr(runs, "FORMAT", 99)
        exits("is of format 2, but this version writes 99", start)
    assert start()


def test_another_dataset_under_the_same_path_is_an_error(start, monkeypatch, write_dataset):
    path = write_dataset(**random_columns(1))
    directory = stopped(start, monkeypatch, dataset_path=path)
    write_dataset(**random_columns(2))
    exits(f"not the dataset with which {re.escape(directory)} began", start, dataset_path=path)
    write_dataset(**random_columns(1))
    assert start(dataset_path=path)


def test_a_table_that_has_lost_rows_is_an_error(start, monkeypatch):
    directory = stopped(start, monkeypatch)
    os.truncate(os.path.join(directory, "train.csv"), 100)
    exits("train.csv has lost rows; remove .* to start anew", start)


def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays(start, monkeypatch, capsys):
    whole = contents(start(results="whole"))
    directory = stopped(start, monkeypatch)
    size = os.path.getsize(os.path.join(directory, "checkpoint.npz"))
    before = runs.read_checkpoint(os.path.join(directory, "checkpoint.npz"))[1]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))  # a write beyond is refused
    try:
        message = (
            "can't write to .* \\(File too large\\); once that is mended, .* from the last checkpoint, of update 30"
        )
        exits(message, start)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert runs.read_checkpoint(os.path.join(directory, "checkpoint.npz"))[1] == before
    assert contents(start()) == whole and "going on from update 30" in capsys.readouterr().out


def test_a_table_on_a_full_disk_is_an_error(start, tmp_path):
    config = rebrac.tuned(rebrac.Config(results=str(tmp_path)))
    with runs.Run("rebrac.py", config, rebrac.tuned) as run:
        os.symlink("/dev/full", run.path("train.csv"))
        exits("No space left on device", run.write, "train.csv", [{"seed": 0}] * 10_000)
        with contextlib.suppress(OSError):
            run.tables.pop("train.csv").close()


def test_a_directory_that_can_not_be_written_to_is_an_error(start, tmp_path):
    (tmp_path / "file").write_text("")
    exits("can't write to .* \\(Not a directory\\)", start, results="file")
    os.chmod(tmp_path, 0o777)
    (tmp_path / "closed").mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:  # who may write anywhere
        os.seteuid(65534)
    try:
        config = rebrac.tuned(rebrac.Config(results=str(tmp_path / "closed")))
        exits("can't write to .* \\(Permission denied\\)", runs.Run, "rebrac.py", config, rebrac.tuned)
    finally:
        os.seteuid(user)


def test_nan_in_a_loss_names_the_update_the_quantity_and_the_checkpoint(start, monkeypatch):
    epoch, calls = rebrac.epoch, []

    def broken(*arguments):
        states, infos = epoch(*arguments)
        calls.append(1)
        if len(calls) == 3:
            infos["critic_loss"] = infos["critic_loss"].at[0, 2].set(jnp.nan)
        return states, infos

    with monkeypatch.context() as patch:
        replace_epoch(patch, rebrac, broken)
        message = exits("critic_loss is nan after update 26 \\(seed 3\\)", start)
    assert message.endswith(f"the last good checkpoint is {start.output}/checkpoint.npz, of update 20")
    with open(os.path.join(start.output, "failed.txt")) as file:
        assert file.read() == message + "\n"
    assert len(table(start.output, "train.csv")) == 2
    assert contents(start()) == contents(start(results="whole")) and not os.path.exists(f"{start.output}/failed.txt")


def test_infinite_parameters_are_named(start, monkeypatch):
    epoch = rebrac.epoch

    def broken(*arguments):
        states, infos = epoch(*arguments)
        states.actor["params"]["Dense_0"]["bias"] = states.actor["params"]["Dense_0"]["bias"].at[0, 1].set(jnp.inf)
        return states, infos

    with monkeypatch.context() as patch:
        replace_epoch(patch, rebrac, broken)
        exits(
            "actor/params/Dense_0/bias is NaN or infinite after update 10 \\(seed 3\\); the last good .* update 0",
            start,
        )


@both
def test_a_learning_rate_that_is_too_high_ends_in_that_error(start, script):
    exits(
        "(is nan|is inf|NaN or infinite).*the last good checkpoint is .* of update",
        start,
        script,
        critic_learning_rate=1e30,
    )


# --- Use of a run's policy ---


@both
def test_evaluate_prints_the_scores_of_the_runs_last_evaluation_and_others(start, script, monkeypatch, capsys):
    directory = start(script, num_seeds=2, actor_bn=True, normalize_states=True)
    mean = lambda column: np.mean([float(row[column]) for row in table(directory, "evaluations.csv")[-2:]])
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--evaluate", directory])
    SCRIPTS[script].main()
    assert capsys.readouterr().out.startswith(f"score {mean('score'):.1f} +- ")
    flags = ["--eval_episodes", "1", "--eval_noise", "[[0.2, 0], [0.5, 0.1]]"]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--evaluate", directory, *flags])
    SCRIPTS[script].main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"score/action_noise=0.2 {mean('score/action_noise=0.2'):.1f} +- ")
    assert len(lines) == 3 and lines[2].startswith("score/action_noise=0.5/state_noise=0.1 ")


@both
def test_a_runs_policy_loads_as_a_function_from_states_to_actions(start, script):
    module = SCRIPTS[script]
    directory = start(script, num_seeds=2, normalize_states=True, actor_bn=True)
    config, update, policies = runs.load(module, directory)
    states = np.random.default_rng(0).normal(size=(2, 4, 17)).astype(np.float32)
    expected = policies(states)
    assert update == 60 and expected.shape == (2, 4, 6)
    for seed in (3, 4):
        policy = runs.load_policy(module, directory, seed)
        np.testing.assert_allclose(policy(states[seed - 3]), expected[seed - 3], atol=1e-6)
        np.testing.assert_allclose(policy(states[seed - 3, 0]), expected[seed - 3, 0], atol=1e-6)
    assert runs.load_policy(module, directory)(states).shape == (2, 4, 6)
    with pytest.raises(ValueError, match="has the seeds 3 to 4, not 2"):
        runs.load_policy(module, directory, seed=2)
    raw = tasks.load_dataset(config)
    data = module.make_dataset(config, raw)
    arrays, _ = runs.read_checkpoint(os.path.join(directory, "checkpoint.npz"))
    np.testing.assert_array_equal(arrays["data/mean"], data["mean"])
    actor = jax.tree.map(lambda x: x[0], runs.unflatten(arrays, "states/actor"))
    ours = module.act(config, actor, data, (states[0] - data["mean"]) / data["std"])
    np.testing.assert_allclose(ours, expected[0], atol=1e-5)


def test_a_video_shows_an_episode_where_there_is_opengl_and_else_says_what_is_missing(start, tmp_path):
    directory, backend = start(), gl_backend()
    code = (
        "import sys, tasks, rebrac; make = tasks.make_env\n"
        "tasks.make_env = lambda name: (env := make(name), setattr(env, '_max_episode_steps', 30))[0]\n"
        "rebrac.main()"
    )
    environment = {**os.environ, **({"MUJOCO_GL": backend} if backend else {})}
    for name in ("episode.mp4", "episode.gif"):
        path = str(tmp_path / name)
        command = [sys.executable, "-c", code, "--evaluate", directory, "--eval_episodes", "1", "--video", path]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        if backend is None:
            assert "error: can't write" in run.stderr and "needs OpenGL" in run.stderr and not os.path.exists(path)
            continue
        assert run.returncode == 0 and run.stdout.startswith("score "), run.stderr
        frames = imageio.mimread(path, memtest=False)
        assert len(frames) == 30 and frames[0].shape[:2] == (496, 496)
        assert np.abs(frames[0].astype(float) - frames[-1]).max() > 50  # something moves


def test_what_is_not_a_run_can_not_be_evaluated(tmp_path, monkeypatch):
    for directory in ("nowhere", str(tmp_path)):
        monkeypatch.setattr(sys, "argv", ["rebrac.py", "--evaluate", directory])
        exits("config.yaml is not the config of a run", rebrac.main)
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    exits("has no checkpoint", rebrac.main)
    (tmp_path / "config.yaml").write_text("[1, 2")
    exits("is not the config of a run", rebrac.main)
    (tmp_path / "config.yaml").write_text("unknown_field: 1\n")
    exits("is not the config of a run", rebrac.main)


# --- Weights & Biases ---


def end_wandb():
    """Takes wandb down, once no run's thread is in it: a W&B run begun later leaves hooks that fail imports."""
    import wandb

    for thread in threading.enumerate():
        if isinstance(thread, runs.WandB):
            thread.join(120)
            assert not thread.is_alive()
    wandb.teardown()


@pytest.fixture
def wandb_server(monkeypatch):
    """A stand-in for W&B's server, with an account there."""
    with Server() as server:
        yield (
            server,
            lambda: (
                monkeypatch.setenv("WANDB_BASE_URL", server.url),
                monkeypatch.setenv("WANDB_API_KEY", "0" * 40),
            ),
        )
        end_wandb()


def steps(history):
    return [row["_step"] for row in history]


@pytest.mark.parametrize(
    "interrupt, sent",  # not the last: an evaluation may be missing
    [(partial(signal_in_epoch, number=3), [10, 20]), (signal_in_evaluation, [10])],
    ids=["epoch", "evaluation"],
)
def test_wandb_gets_the_tables_and_a_resumed_run_is_the_same_run_there(
    start, wandb_server, monkeypatch, capsys, interrupt, sent
):
    server, log_in = wandb_server
    log_in()
    with monkeypatch.context() as patch:
        interrupt(patch, rebrac)
        exits(128 + signal.SIGTERM, start)
    assert "W&B: online (an account at 127.0.0.1)" in capsys.readouterr().out
    (run,) = server.runs
    assert steps(server.history(run)) == sent and server.runs[run]["state"] == "preempting"
    directory = start()
    assert list(server.runs) == [run] and server.runs[run]["exit"] == 0
    history = server.history(run)
    assert steps(history) == [10, 20, 30, 40, 50, 60]
    assert server.runs[run]["config"]["actor_dropout"] == {"value": 0.0}
    rows = {int(row["update"]): row for row in table(directory, "train.csv")}
    for row in table(directory, "evaluations.csv"):
        rows[int(row["update"])] |= row
    for row in history:
        expected = {key: float(value) for key, value in rows[row["_step"]].items() if key not in ("seed", "update")}
        found = {key: value for key, value in row.items() if not key.startswith("_")}
        assert found == pytest.approx(expected, rel=1e-8)


def test_wandb_gets_each_seeds_numbers_and_their_means(start, wandb_server):
    server, log_in = wandb_server
    log_in()
    directory = start(num_seeds=2)
    (run,) = server.runs
    last = server.history(run)[-1]
    scores = [float(row["score"]) for row in table(directory, "evaluations.csv")[-2:]]
    assert [last["seed3/score"], last["seed4/score"], last["score"]] == pytest.approx([*scores, np.mean(scores)])


def test_a_finished_run_is_sent_to_the_wandb_run_of_a_sweep(start, wandb_server, monkeypatch):
    server, log_in = wandb_server
    directory = start()
    log_in()
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    exits(0, start)
    assert steps(server.history("agents")) == [10, 20, 30, 40, 50, 60] and server.runs["agents"]["exit"] == 0
    assert not os.path.exists(os.path.join(directory, "wandb_id"))


def test_an_unreachable_wandb_neither_stops_nor_slows_a_run(start, monkeypatch, capsys):
    plain = contents(start(results="plain"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(runs, "WANDB_SECONDS", 3)
    epochs, epoch = [], rebrac.epoch
    replace_epoch(monkeypatch, rebrac, lambda *arguments: [epochs.append(time.monotonic()), epoch(*arguments)][1])
    began = time.monotonic()
    directory = start()
    assert contents(directory) == plain
    assert epochs[0] - began < 30 and epochs[-1] - epochs[0] < 30 and time.monotonic() - epochs[-1] < 30
    output = capsys.readouterr().out
    assert "W&B: offline after all" in output or "W&B has not taken everything" in output
    end_wandb()
    assert glob.glob(os.path.join(directory, "wandb", "*run-*", "run-*.wandb"))


def test_wandb_is_online_with_an_account_or_an_agent_and_otherwise_off(monkeypatch, tmp_path):
    for key in [key for key in os.environ if key.startswith("WANDB")]:
        monkeypatch.delenv(key)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    assert runs.wandb_mode()[0] == "disabled"
    netrc.write_text("machine other.example login user password secret\n")
    assert runs.wandb_mode()[0] == "disabled"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    assert runs.wandb_mode() == ("online", "an account at api.wandb.ai")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert runs.wandb_mode()[0] == "disabled"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert runs.wandb_mode() == ("online", "a run of a sweep")
    for mode, expected in {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}.items():
        monkeypatch.setenv("WANDB_MODE", mode)
        assert runs.wandb_mode() == (expected, f"WANDB_MODE={mode}")
