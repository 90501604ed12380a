"""Runs that one program trains together: each ends as if it had run alone."""

import contextlib
import fcntl
import glob
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from runs_helpers import (
    FAST,
    after_epochs,
    before_epochs,
    command_line,
    contents,
    differences,
    exits,
    fails,
    signal_in_epoch,
    signal_in_evaluation,
    table,
)

import harness.run
import iql
from harness import group
from harness.checkpoint import last_checkpoint, read_checkpoint
from harness.directory import status
from harness.environments import make_env, reset
from harness.errors import UserError, one_line_errors
from harness.record import Record
from harness.run import Run
from harness.tables import TABLES
from tools import report_runs

PLAIN = dict(seed=3, actor_wd=0.0)
STRONG = dict(seed=4, actor_wd=0.1)
STRONGER = dict(seed=3, actor_wd=0.2)


@pytest.fixture
def start_alone(start, start_group):
    """Return a function that trains a member alone, by its script's own command."""

    def start_alone(member, script=iql, results="results", **flags):
        return start(script, results, **{**FAST, **flags, **member})

    return start_alone


def read(directory, name):
    with open(os.path.join(directory, name)) as file:
        return file.read()


def updates(directory, name="train.csv"):
    return [int(row["update"]) for row in table(directory, name)]


def assert_same_to_rounding(directory, other):
    """Hold a directory's tables and checkpoint against those of another composition."""
    for name in TABLES:
        rows, expected = table(directory, name), table(other, name)
        assert [list(row) for row in rows] == [list(row) for row in expected]
        for row, own in zip(rows, expected, strict=True):
            for key, text in row.items():
                exact = key in ("seed", "update", "episode") or "rank" in key or "dead" in key
                tolerance = {} if exact else dict(rel=1e-3, abs=1e-4)
                if "effective_rank" in key:  # its root makes much of rounding in the Gram matrix
                    tolerance = dict(rel=3e-2)
                assert float(text) == pytest.approx(float(own[key]), **tolerance), key
    arrays, about = read_checkpoint(os.path.join(directory, "checkpoint.npz"))
    expected, about_other = read_checkpoint(os.path.join(other, "checkpoint.npz"))
    assert list(arrays) == list(expected)
    assert {**about, "seconds": 0, "tables": 0} == {**about_other, "seconds": 0, "tables": 0}
    for key, array in arrays.items():
        assert array.shape == expected[key].shape
        if key == "states/key":
            np.testing.assert_array_equal(array, expected[key])
        else:
            bound = 1e-4 * np.abs(expected[key]).max()
            np.testing.assert_allclose(array, expected[key], atol=bound, err_msg=key)


# --- What they leave ---


def members_that_differ_in_everything():
    """Return flags of two members, with other values of each float in which they may differ."""
    members = [dict(seed=3), dict(seed=8)]
    for name, value in vars(small_config(iql)).items():
        if isinstance(value, float) and name not in iql.HOST_FLOATS:
            members[0][name] = value or 0.05
            members[1][name] = 0.9 * (value or 0.1)
    return members


def test_each_directory_is_as_that_of_a_run_alone(start_group, start_alone):
    """With two seeds each, the analysis and noise in evaluation."""
    flags = dict(num_seeds=2, analysis=True, eval_noise="[[0.2, 0], [0, 0.05]]")
    members = members_that_differ_in_everything()
    directories = start_group(*members, **flags)
    for directory, member in zip(directories, members):
        alone = start_alone(member, results="alone", **flags)
        assert os.path.relpath(alone, alone.split("alone")[0] + "alone") in directory
        files = os.listdir(directory)
        assert sorted(files) == sorted([*os.listdir(alone), "output.txt"])
        assert read(directory, "config.yaml") == read(alone, "config.yaml")
        assert_same_to_rounding(directory, alone)
        ends = [json.loads(read(one, "finished.json")) for one in (directory, alone)]
        assert set(ends[0]) == set(ends[1])
        assert ends[0]["score"] == ends[1]["score"]
        lines = read(directory, "output.txt").splitlines()
        assert lines[1] == "one of 2 runs that are trained together"
        evaluations = [line.split()[0] for line in lines if " updates  score " in line]
        assert evaluations == ["20", "40", "60"]
        assert lines[-1].startswith(f"final score {ends[0]['score']}; ")
        assert lines[-1].endswith(f"; {directory}")
    assert contents(directories[0])["train.csv"] != contents(directories[1])["train.csv"]


def test_a_members_directory_is_evaluated_and_reported_as_any(
    start_group, monkeypatch, capsys, tmp_path
):
    directories = start_group(PLAIN, STRONG)
    capsys.readouterr()
    for directory in directories:
        monkeypatch.setattr(sys, "argv", ["iql.py", "--evaluate", directory])
        iql.main()
        score = float(table(directory, "evaluations.csv")[-1]["score"])
        assert capsys.readouterr().out.startswith(f"score {score:.1f} +- 0.0 over 1 episodes")
    seeds, left_out = report_runs.read_results([str(tmp_path / "results")])
    assert left_out == []
    assert [(seed["seed"], seed["state"]) for seed in seeds] == [(3, "finished"), (4, "finished")]
    assert [seed["config"]["actor_wd"] for seed in seeds] == [0.0, 0.1]


def test_the_time_is_shared_and_the_shown_speed_is_the_runs_own(
    start_group, start_alone, monkeypatch, capsys
):
    """Two runs make three epochs of 0.5 s together, and then one of them the others alone."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(harness.run, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def act(number, states, infos):
        clock.now += 0.5

    after_epochs(monkeypatch, iql, act)
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, iql, 3)
        exits(128 + signal.SIGTERM, start_group, PLAIN, STRONG)
    clock.now += 1000
    output = read(start_group.directories[0], "output.txt")
    alone = start_alone(PLAIN)
    speeds = re.findall(" updates  score .*  updates/s (.*)", output + capsys.readouterr().out)
    assert speeds == ["20"] * 3
    assert json.loads(read(alone, "finished.json"))["seconds"]["train"] == 3 * 0.25 + 3 * 0.5
    assert last_checkpoint(start_group.directories[1])[2]["seconds"]["train"] == 3 * 0.25


# --- They go on, in any company ---


def test_they_stop_and_go_on_together_with_the_same_bits(start_group, monkeypatch):
    whole = [contents(one) for one in start_group(PLAIN, STRONG, results="whole")]
    for epochs, update in ((3, 30), (2, 50)):
        with monkeypatch.context() as patch:
            signal_in_epoch(patch, iql, epochs)
            exits(128 + signal.SIGTERM, start_group, PLAIN, STRONG)
        for directory in start_group.directories:
            assert status(directory) == ("unfinished", "", update, False)
            line = f"stopped at update {update}; the same command resumes there"
            assert read(directory, "output.txt").splitlines()[-1] == line
    directories = start_group(PLAIN, STRONG)
    for directory, expected in zip(directories, whole):
        assert "resuming from update 50" in read(directory, "output.txt")
        assert differences(contents(directory), expected) == []


def test_a_kill_between_their_checkpoints_does_not_part_them(start_group, monkeypatch):
    """The first has saved update 40, and the second not yet."""
    whole = [contents(one) for one in start_group(PLAIN, STRONG, results="whole")]
    save = Record.save

    def killed(record, tree, about):
        if about["update"] == 40 and record.config.seed == STRONG["seed"]:
            raise KeyError("a kill")
        save(record, tree, about)

    with monkeypatch.context() as patch:
        patch.setattr(Record, "save", killed)
        with pytest.raises(KeyError):
            start_group(PLAIN, STRONG)
    directories = start_group.directories
    assert [last_checkpoint(one)[2]["update"] for one in directories] == [40, 20]
    start_group(PLAIN, STRONG)
    for directory, expected in zip(directories, whole):
        assert "resuming from update 20" in read(directory, "output.txt")
        assert differences(contents(directory), expected) == []


def test_they_go_on_alone_and_in_other_groups(start_group, start_alone, monkeypatch, capsys):
    """Then each ends once, and to rounding where it does alone."""
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, iql, 3)
        exits(128 + signal.SIGTERM, start_group, PLAIN, STRONG, STRONGER)
    plain, strong, stronger = start_group.directories
    # One is trained further alone, so that it is at another update
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, iql, 2)
        exits(128 + signal.SIGTERM, start_alone, STRONG)
    assert last_checkpoint(strong)[2]["update"] == 50
    # Another is finished by a process of its own
    start_alone(PLAIN)
    assert "resuming from update 30" in capsys.readouterr().out
    finished = os.path.getmtime(os.path.join(plain, "finished.json"))
    fourth = dict(seed=9, actor_wd=0.3)
    new = start_group(PLAIN, fourth, STRONG, STRONGER)[1]
    assert os.path.getmtime(os.path.join(plain, "finished.json")) == finished
    assert "resuming from update 50" in read(strong, "output.txt")
    assert "resuming from update 30" in read(stronger, "output.txt")
    for directory, member in (
        (plain, PLAIN),
        (strong, STRONG),
        (stronger, STRONGER),
        (new, fourth),
    ):
        assert status(directory).state == "finished"
        assert updates(directory) == [10, 20, 30, 40, 50, 60]
        assert updates(directory, "evaluations.csv") == [20, 40, 60]
        assert_same_to_rounding(directory, start_alone(member, results="alone"))


def test_an_evaluation_that_one_of_them_lacks_is_made(start_group, monkeypatch):
    """Both are at update 20, but one was stopped in the evaluation, and the other after it."""
    whole = start_group(PLAIN, STRONG, results="whole")
    with monkeypatch.context() as patch:
        signal_in_evaluation(patch, iql)
        exits(128 + signal.SIGTERM, start_group, PLAIN)
    (plain,) = start_group.directories
    with monkeypatch.context() as patch:
        stop_after_evaluation(patch)
        exits(128 + signal.SIGTERM, start_group, STRONG)
    (strong,) = start_group.directories
    assert positions(plain) == (20, 0, [])
    assert positions(strong) == (20, 20, [20])
    start_group(PLAIN, STRONG)
    for directory, expected in zip((plain, strong), whole):
        assert_same_to_rounding(directory, expected)


def stop_after_evaluation(patch):
    """Let the process get SIGTERM once its first evaluation is logged."""
    log_evaluation = Run.log_evaluation

    def log(*arguments):
        log_evaluation(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(Run, "log_evaluation", log)


def positions(directory):
    """Return the last checkpoint's update, its last evaluation, and those in the table."""
    about = last_checkpoint(directory)[2]
    return about["update"], about["evaluated"], updates(directory, "evaluations.csv")


# --- One of them fails ---


def break_member(monkeypatch, member, epoch, name="critic_loss"):
    """Let a loss of a member be NaN in an epoch."""

    def act(number, states, infos):
        if number == epoch:
            infos[name] = infos[name].at[member, 2].set(jnp.nan)

    after_epochs(monkeypatch, iql, act)


def test_one_that_diverges_ends_alone_and_the_others_go_on(start_group, start_alone, monkeypatch):
    with monkeypatch.context() as patch:
        break_member(patch, member=1, epoch=3)
        plain, strong, stronger = start_group(PLAIN, STRONG, STRONGER)
    assert status(strong).state == "failed"
    message = read(strong, "failed.txt").removeprefix("error: ").rstrip("\n")
    assert message.startswith("critic_loss is nan after update 23 (seed 4); the last good")
    assert message.endswith(f"checkpoint is {strong}/checkpoint.npz, of update 20")
    assert read(strong, "output.txt").splitlines()[-1] == f"error: {message}"
    assert updates(strong) == [10, 20]
    for directory, member in ((plain, PLAIN), (stronger, STRONGER)):
        assert "error" not in read(directory, "output.txt")
        assert "resuming from update 30" in read(directory, "output.txt")
        assert updates(directory) == [10, 20, 30, 40, 50, 60]
        assert_same_to_rounding(directory, start_alone(member, results="alone"))
    start_group(PLAIN, STRONG, STRONGER)  # again, which retries
    assert status(strong).state == "finished"
    assert_same_to_rounding(strong, start_alone(STRONG, results="alone"))


def test_one_that_diverges_on_a_full_disk_keeps_its_own_error(start_group, monkeypatch):
    def save(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr(group.Group, "save", save, raising=True)
    monkeypatch.setattr(group.Group, "checkpoint", lambda *_, **__: None)
    break_member(monkeypatch, member=1, epoch=3)
    exits(1, start_group, PLAIN, STRONG)
    plain, strong = start_group.directories
    assert status(plain).reason == "error: the disk is full\n"
    assert status(strong).reason.startswith("error: critic_loss is nan after update 23")


def test_where_all_diverge_each_has_its_error_and_the_process_fails(start_group, monkeypatch):
    def act(number, states, infos):
        if number == 3:
            infos["critic_loss"] = infos["critic_loss"].at[:, 2].set(jnp.nan)

    after_epochs(monkeypatch, iql, act)
    exits(1, start_group, PLAIN, STRONG, results="odd \udcff [1]")
    for directory, seed in zip(start_group.directories, (3, 4)):
        assert f"(seed {seed})" in read(directory, "failed.txt")
        assert f"(seed {seed})" in read(directory, "output.txt").splitlines()[-1]


def test_where_all_at_one_update_diverge_those_at_another_go_on(start_group, monkeypatch):
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, iql, 3)
        exits(128 + signal.SIGTERM, start_group, STRONG)
    break_member(monkeypatch, member=0, epoch=1)
    exits(1, start_group, PLAIN, STRONG)
    assert "critic_loss is nan after update 3 " in status(start_group.directories[0]).reason
    assert [status(one).state for one in start_group.directories] == ["failed", "finished"]


def test_a_run_of_two_seeds_ends_as_a_whole_where_one_diverges(start_group, monkeypatch):
    break_member(monkeypatch, member=3, epoch=3)
    first, second = start_group(dict(PLAIN, seed=0), dict(STRONG, seed=5), num_seeds=2)
    assert status(first).state == "finished"
    assert "(seed 6)" in status(second).reason


def test_a_run_alone_ends_as_a_whole_where_one_of_its_seeds_diverges(
    start, start_alone, monkeypatch
):
    whole = contents(start_alone(PLAIN, results="whole", num_seeds=2))
    with monkeypatch.context() as patch:
        break_member(patch, member=1, epoch=3)
        message = fails(
            "critic_loss is nan after update 23 .*seed 4", start_alone, PLAIN, num_seeds=2
        )
    assert status(start.directory) == ("failed", f"error: {message}\n", 20, False)
    assert differences(contents(start_alone(PLAIN, num_seeds=2)), whole) == []


@pytest.mark.parametrize("loss", ["cut short", "lost"])
def test_one_without_a_whole_checkpoint_fails_alone(start_group, monkeypatch, loss):
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, iql, 3)
        exits(128 + signal.SIGTERM, start_group, PLAIN, STRONG)
    plain, strong = start_group.directories
    for name in ("checkpoint.npz", "previous.npz"):
        path = os.path.join(plain, name)
        if loss == "cut short":
            os.truncate(path, 1000)
        else:
            os.remove(path)
    with contextlib.suppress(SystemExit):
        start_group(PLAIN, STRONG, STRONGER)  # the last of which is new
    assert status(plain).state == "failed"
    assert re.search("remove (it|/.*) to start anew", status(plain).reason)
    assert f"{read(plain, 'output.txt').splitlines()[-1]}\n" == status(plain).reason
    stronger = start_group.directories[2]
    assert status(stronger).state == "finished"
    assert status(strong).state == "finished"


def test_one_that_was_begun_under_other_defaults_fails_alone(start_group, start_alone, monkeypatch):
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, iql, 1)
        exits(128 + signal.SIGTERM, start_group, PLAIN, STRONG)
    plain, strong = start_group.directories
    config = read(plain, "config.yaml").replace("gamma: 0.99", "gamma: 0.5")
    with open(os.path.join(plain, "config.yaml"), "w") as file:
        file.write(config)
    exits(1, start_group, PLAIN, STRONG)
    state, reason, update, is_busy = status(plain)
    assert (state, update, is_busy) == ("failed", 10, False)
    assert f"{plain} was begun when gamma was 0.5 by default, and now it is 0.99; " in reason
    assert f"{read(plain, 'output.txt').splitlines()[-1]}\n" == reason
    assert read(plain, "config.yaml") == config
    assert status(strong).state == "finished"
    # A run alone says so, too, also of a finished one
    fails("was begun when gamma was 0.5 by default", start_alone, PLAIN)
    with open(os.path.join(plain, "finished.json"), "w") as file:
        file.write('{"score": 1}')
    fails("was begun when gamma was 0.5 by default", start_alone, PLAIN)


def test_one_whose_directory_can_not_be_made_fails_alone(
    start_group, monkeypatch, tmp_path, capsys
):
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, iql, 1)
        exits(128 + signal.SIGTERM, start_group, PLAIN)
    plain = start_group.directories[0]
    shutil.rmtree(plain)
    open(plain, "w").close()  # no directory, which root couldn't write to, either
    exits(1, start_group, PLAIN, STRONG)
    assert f"error: can't write to {plain} (" in capsys.readouterr().out
    assert status(start_group.directories[1]).state == "finished"


def test_an_error_that_nobody_foresaw_is_in_each_output(start_group, monkeypatch):
    def act(number):
        raise KeyError("a fault")

    before_epochs(monkeypatch, iql, act)
    with pytest.raises(KeyError):
        start_group(PLAIN, STRONG)
    for directory in start_group.directories:
        assert status(directory).reason == "KeyError: 'a fault'\n"
        assert read(directory, "output.txt").splitlines()[-1] == "error: 'a fault'"


# --- Another process has some of them ---


@pytest.fixture
def hold():
    """Return a function that holds a run's lock as another process does, to the test's end."""
    locks = []

    def hold(directory):
        os.makedirs(directory, exist_ok=True)
        locks.append(open(os.path.join(directory, "lock"), "a"))
        fcntl.flock(locks[-1], fcntl.LOCK_EX)

    yield hold
    for lock in locks:
        lock.close()


def test_one_that_is_busy_elsewhere_is_left_out(start_group, start_alone, hold, monkeypatch):
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, iql, 1)
        exits(128 + signal.SIGTERM, start_group, PLAIN, STRONG)
    plain, strong = start_group.directories
    hold(plain)
    start_group(PLAIN, STRONG)
    assert status(plain) == ("unfinished", "", 10, True)
    line = f"another process is training {plain}"
    assert read(plain, "output.txt").splitlines()[-1] == line
    assert status(strong).state == "finished"
    assert_same_to_rounding(strong, start_alone(STRONG, results="alone"))


def test_where_all_are_busy_the_process_says_so(start_group, hold, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, iql, 1)
        exits(128 + signal.SIGTERM, start_group, PLAIN, STRONG)
    for directory in start_group.directories:
        hold(directory)
    capsys.readouterr()
    with pytest.raises(SystemExit) as error, one_line_errors():
        start_group(PLAIN, STRONG)
    assert error.value.code == os.EX_TEMPFAIL
    assert capsys.readouterr().err == "error: other processes are training all of these runs\n"


# --- Evaluation beside training ---


@pytest.fixture
def beside(monkeypatch):
    """Let evaluations be played beside training, as on a GPU; return the `Gate` of their policy."""
    monkeypatch.setattr(harness.run, "has_accelerator", lambda: True)
    gate = Gate()
    policy = iql.policy

    def gated(*arguments):
        gate.calls += 1
        assert gate.open.wait(60)
        if gate.error:
            raise gate.error
        return policy(*arguments)

    monkeypatch.setattr(iql, "policy", gated)
    yield gate
    gate.finish()


class Gate:
    """An event for which the policy waits in an evaluation. It is open at first."""

    def __init__(self):
        self.open = threading.Event()
        self.open.set()
        self.calls = 0
        self.error = None

    def finish(self):
        """Let all evaluations come to their ends."""
        self.open.set()
        for thread in threading.enumerate():
            if isinstance(thread, harness.run.Task):
                assert thread.ended.wait(60)


def act_in_epochs(patch, **acts):
    """Call `acts["at3"]()` before the third epoch, and so on."""

    def act(number):
        if f"at{number}" in acts:
            acts[f"at{number}"]()

    before_epochs(patch, iql, act)


def test_an_evaluation_beside_training_changes_nothing(start, start_alone, beside, monkeypatch):
    """Saving waits for its end, also where it is due: the clock goes on by 100 s in each epoch."""
    with monkeypatch.context() as patch:
        patch.setattr(harness.run, "has_accelerator", lambda: False)
        whole = contents(start_alone(PLAIN, results="whole"))
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(harness.run, "time", SimpleNamespace(monotonic=lambda: clock.now))
    seen = []

    def act(number):
        clock.now += 100
        if number == 2:
            beside.open.clear()
        if number >= 3:
            seen.append(positions(start.directory))
        if number == 4:
            beside.finish()

    before_epochs(monkeypatch, iql, act)
    assert differences(contents(start_alone(PLAIN)), whole) == []
    # It began at update 20 and ended after update 30, whose checkpoint was put off
    assert seen[:3] == [(20, 0, []), (20, 0, []), (40, 20, [20])]


def test_the_next_evaluation_waits_for_one_beside_training(start, start_alone, beside, monkeypatch):
    whole = contents(start_alone(PLAIN, results="whole"))
    act_in_epochs(
        monkeypatch,
        at2=beside.open.clear,
        at4=threading.Timer(1, beside.open.set).start,
    )
    assert differences(contents(start_alone(PLAIN)), whole) == []


def test_a_signal_ends_an_evaluation_beside_training_at_once(
    start, start_alone, beside, monkeypatch, capsys
):
    whole = contents(start_alone(PLAIN, results="whole"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "_exit", sys.exit)
        act_in_epochs(
            patch,
            at2=beside.open.clear,
            at4=lambda: os.kill(os.getpid(), signal.SIGTERM),
        )
        exits(128 + signal.SIGTERM, start_alone, PLAIN)
    line = "stopped; the same command goes on from the last checkpoint, of update 20"
    assert line in capsys.readouterr().out
    beside.finish()
    assert positions(start.directory) == (20, 0, [])
    assert differences(contents(start_alone(PLAIN)), whole) == []


AS_ON_A_GPU = """
import harness.run, iql
harness.run.has_accelerator = lambda: True
iql.main()
"""


@pytest.mark.parametrize("eval_every", [5000, 50])
def test_a_process_ends_in_an_evaluation_beside_training(
    spawn, quick, tmp_path, monkeypatch, eval_every
):
    """So do the environments' processes, or its output would stay open.

    The second already waits for the evaluation at update 50, since the next one is due.
    """
    monkeypatch.setenv("EPISODE_STEPS", "1000000")
    flags = {**quick, **FAST, "eval_episodes": 8, "results": tmp_path}
    flags |= dict(num_updates=10**6, eval_every=eval_every)
    run = spawn("-c", AS_ON_A_GPU, *command_line(flags))
    end = time.monotonic() + 60
    update = 0
    while update < eval_every:
        assert run.poll() is None
        assert time.monotonic() < end
        for directory in glob.glob(f"{tmp_path}/iql/*/*"):
            update = status(directory).update
        time.sleep(0.05)
    time.sleep(1)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=20)
    assert run.returncode == 128 + signal.SIGTERM
    last = output.splitlines()[-1]
    assert (
        last
        == f"stopped; the same command goes on from the last checkpoint, of update {eval_every}"
    )


def test_an_environment_leaves_the_output_to_other_threads(monkeypatch, capsys):
    """AntMaze would print its targets."""
    output = sys.stdout
    env = make_env("antmaze-umaze-v2")
    reset_wrapped = env.reset

    def watched():
        assert sys.stdout is output
        return reset_wrapped()

    monkeypatch.setattr(env, "reset", watched)
    reset(env, 0, 0, 0)
    assert capsys.readouterr().out == ""


def test_an_error_in_an_evaluation_beside_training_comes_out(
    start, start_alone, beside, monkeypatch
):
    def fail():
        beside.error = KeyError("a fault")
        beside.open.set()

    act_in_epochs(monkeypatch, at2=beside.open.clear, at3=fail)
    with pytest.raises(KeyError, match="a fault"):
        start_alone(PLAIN)
    assert status(start.directory).reason == "KeyError: 'a fault'\n"
    assert positions(start.directory) == (20, 0, [])


def test_divergence_beside_an_evaluation_costs_neither(start, start_alone, beside, monkeypatch):
    whole = contents(start_alone(PLAIN, results="whole"))
    with monkeypatch.context() as patch:
        break_member(patch, member=0, epoch=3)
        act_in_epochs(
            patch,
            at2=beside.open.clear,
            at3=threading.Timer(1, beside.open.set).start,
        )
        fails("critic_loss is nan after update 23 .*, of update 20$", start_alone, PLAIN)
    assert updates(start.directory, "evaluations.csv") == [20]
    beside.finish()
    assert differences(contents(start_alone(PLAIN)), whole) == []


def test_a_group_with_evaluations_beside_training(start_group, beside, monkeypatch):
    """One diverges while an evaluation is played. It is waited for, and the others go on."""
    whole = start_group(PLAIN, STRONG, results="whole")
    with monkeypatch.context() as patch:
        break_member(patch, member=2, epoch=3)
        act_in_epochs(
            patch,
            at2=beside.open.clear,
            at3=threading.Timer(1, beside.open.set).start,
        )
        *others, stronger = start_group(PLAIN, STRONG, STRONGER)
    assert status(stronger).state == "failed"
    for directory, expected in zip(others, whole):
        assert_same_to_rounding(directory, expected)
