"""Weights & Biases gets a run's tables, and can neither stop nor slow the run."""

import contextlib
import glob
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
import wandb
from conftest import ROOT
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
    stopped,
    table,
)
from wandb.sdk.lib.run_stopping import RunStopChecker
from wandb_server import Server

import harness.run
import iql
import rebrac
from harness import wandb_log
from harness.wandb_log import WandB, wandb_mode

# A script's `main` in a process that waits for W&B at most 5 s each time
IMPATIENT = "from harness import wandb_log; wandb_log.TIME_LIMIT = 5; import rebrac; rebrac.main()"


@pytest.fixture(autouse=True)
def wandb_server(monkeypatch):
    """A stand-in for W&B's server. What wandb keeps between runs is taken down with it."""
    monkeypatch.setattr(WandB, "waited_at", -np.inf)
    wandb.teardown()  # what another file's tests have left
    with Server() as server:
        yield server
        server.speak()  # or teardown might wait until it has sent everything
        with contextlib.suppress(ConnectionError):  # where the test has killed wandb's process
            wandb.teardown()


def wandb_command(*words):
    """Run a command of wandb."""
    subprocess.run([sys.executable, "-m", "wandb", *words], check=True, timeout=60)


def log_in(monkeypatch, server):
    """Let runs have an account at a stand-in for W&B's server."""
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)


def steps(history):
    return [row["_step"] for row in history]


def wait_until(condition, process, seconds=60):
    """Wait for what must come while a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate(timeout=60)[0]
        assert time.monotonic() < end
        time.sleep(0.05)


# --- What it gets ---


@pytest.mark.parametrize(
    "interrupt, sent",  # not the last step: an evaluation may be missing
    [(partial(signal_in_epoch, number=3), [10, 20]), (signal_in_evaluation, [10])],
    ids=["epoch", "evaluation"],
)
def test_a_resumed_run_is_the_same_run_there(
    start, wandb_server, monkeypatch, capsys, interrupt, sent
):
    log_in(monkeypatch, wandb_server)
    with monkeypatch.context() as patch:
        interrupt(patch, rebrac)
        exits(128 + signal.SIGTERM, start)
    address = wandb_server.url.removeprefix("http://")
    assert f"W&B: online (an account at {address})" in capsys.readouterr().out
    (name,) = wandb_server.runs
    run = wandb_server.runs[name]
    assert steps(wandb_server.history(name)) == sent
    assert run["state"] == "preempting"
    assert run["exit"] == 1
    directory = start()
    assert list(wandb_server.runs) == [name]
    assert run["exit"] == 0
    assert run["config"]["actor_dropout"] == {"value": 0.0}
    assert run["config"]["algorithm"] == {"value": "rebrac"}
    assert_history_is_that_of(directory, wandb_server.history(name))


def test_it_gets_each_seeds_numbers_and_their_means(start, wandb_server, monkeypatch):
    log_in(monkeypatch, wandb_server)
    directory = start(num_seeds=2)
    (name,) = wandb_server.runs
    last = wandb_server.history(name)[-1]
    scores = [float(row["score"]) for row in table(directory, "evaluations.csv")[-2:]]
    found = [last["seed3/score"], last["seed4/score"], last["score"]]
    assert found == pytest.approx([*scores, np.mean(scores)])


def test_a_finished_run_is_sent_to_the_run_of_a_sweep(start, wandb_server, monkeypatch):
    directory = start()
    log_in(monkeypatch, wandb_server)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    assert start() == directory
    assert steps(wandb_server.history("agents")) == [10, 20, 30, 40, 50, 60]
    assert wandb_server.runs["agents"]["exit"] == 0
    assert not os.path.exists(os.path.join(directory, "wandb_id"))


def test_a_failed_run_has_failed_there(start, wandb_server, monkeypatch):
    log_in(monkeypatch, wandb_server)

    def fail(number):
        if number == 3:
            raise KeyError("a fault")

    before_epochs(monkeypatch, rebrac, fail)
    with pytest.raises(KeyError):
        start()
    (run,) = wandb_server.runs.values()
    assert run["exit"] == 1
    assert run["state"] != "preempting"


@pytest.mark.parametrize("is_beside", [False, True])
def test_a_diverged_run_has_its_last_score_there(start, wandb_server, monkeypatch, is_beside):
    log_in(monkeypatch, wandb_server)
    monkeypatch.setattr(harness.run, "has_accelerator", lambda: is_beside)

    def act(number, states, infos):
        if number == 3:
            infos["critic_loss"] = infos["critic_loss"].at[0, 2].set(np.nan)

    after_epochs(monkeypatch, rebrac, act)
    fails("critic_loss is nan after update 26", start)
    (name,) = wandb_server.runs
    history = wandb_server.history(name)
    assert steps(history) == [10, 20]
    (row,) = table(start.directory, "evaluations.csv")
    assert history[1]["score"] == pytest.approx(float(row["score"]))


def assert_history_is_that_of(directory, history):
    """Hold what W&B has of a run against its tables: a row for each update, in order."""
    expected = {int(row["update"]): row for row in table(directory, "train.csv")}
    for row in table(directory, "evaluations.csv"):
        expected[int(row["update"])] |= row
    assert steps(history) == [10, 20, 30, 40, 50, 60]
    for row in history:
        found = {key: value for key, value in row.items() if not key.startswith("_")}
        numbers = {key: float(text) for key, text in expected[row["_step"]].items()}
        del numbers["seed"], numbers["update"]
        assert found == pytest.approx(numbers, rel=1e-8)


def histories(server):
    """Return what W&B has of each run, by its actor_wd."""
    found = {}
    for name, run in server.runs.items():
        assert run["exit"] == 0
        found[run["config"]["actor_wd"]["value"]] = server.history(name)
    assert len(found) == len(server.runs)
    return found


MEMBERS = (dict(actor_wd=0.1), dict(actor_wd=0.2))


def test_runs_that_are_trained_together_are_runs_of_their_own(
    start_group, wandb_server, monkeypatch
):
    """Also after an interruption."""
    log_in(monkeypatch, wandb_server)
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, iql, 3)
        exits(128 + signal.SIGTERM, start_group, *MEMBERS)
    for name, run in wandb_server.runs.items():
        assert run["state"] == "preempting"
        assert steps(wandb_server.history(name)) == [10, 20]
    directories = start_group(*MEMBERS)
    found = histories(wandb_server)
    assert len(found) == 2
    for directory, member in zip(directories, MEMBERS):
        assert_history_is_that_of(directory, found[member["actor_wd"]])


def test_runs_that_are_trained_together_can_be_sent_later(
    start_group, wandb_server, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)  # where `wandb sync` leaves its own logs
    log_in(monkeypatch, wandb_server)
    monkeypatch.setenv("WANDB_MODE", "offline")
    directories = start_group(*MEMBERS)
    assert wandb_server.runs == {}
    for directory in directories:
        sync_as_printed(output_of(directory))
    found = histories(wandb_server)
    for directory, member in zip(directories, MEMBERS):
        assert_history_is_that_of(directory, found[member["actor_wd"]])


def test_many_runs_wait_once_for_a_server_that_never_answers(
    start_group, wandb_server, monkeypatch
):
    log_in(monkeypatch, wandb_server)
    monkeypatch.setattr(wandb_log, "TIME_LIMIT", 3)
    wandb_server.silent.set()
    modes = watch_starts(monkeypatch)
    directories = start_group(*MEMBERS, dict(actor_wd=0.3))
    assert modes.count("online") == 1
    for directory in directories:
        assert f"later, `wandb sync {directory}/wandb` sends it" in output_of(directory)
        assert glob.glob(f"{directory}/wandb/offline-run-*/run-*.wandb")


def test_many_runs_wait_at_the_same_time_for_their_ends(start_group, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    ends = threading.Barrier(len(MEMBERS))

    def finish(run, exit_code):
        ends.wait(20)
        raise TimeoutError

    monkeypatch.setattr(wandb.Run, "finish", finish)
    for directory in start_group(*MEMBERS):
        assert "W&B has not taken everything in 30 s; later, `wandb sync" in output_of(directory)


def test_a_start_that_fails_leaves_other_runs_alone(start, start_group, wandb_server, monkeypatch):
    """The server doesn't answer while the second run starts. Its own command sends it later."""
    log_in(monkeypatch, wandb_server)
    monkeypatch.setattr(wandb_log, "TIME_LIMIT", 3)

    def act(modes):
        if modes == ["online", "online"]:
            wandb_server.silent.set()
        if modes == ["online", "online", "offline"]:
            wandb_server.speak()

    watch_starts(monkeypatch, act)
    first, second = start_group(*MEMBERS)
    assert "after all" not in output_of(first)
    assert "W&B: off after all" in output_of(second)
    (history,) = histories(wandb_server).values()
    assert_history_is_that_of(first, history)
    wandb.teardown()  # as if the process had ended
    monkeypatch.setattr(WandB, "waited_at", -np.inf)
    assert start(iql, **FAST, **MEMBERS[1]) == second
    assert_history_is_that_of(second, histories(wandb_server)[MEMBERS[1]["actor_wd"]])


def watch_starts(monkeypatch, act=lambda modes: None):
    """Return a list that gets the mode of each wandb.init; `act` is called with it before that."""
    modes = []
    init = wandb.init

    def watched(**options):
        modes.append(options["mode"])
        act(modes)
        return init(**options)

    monkeypatch.setattr(wandb, "init", watched)
    return modes


def output_of(directory):
    with open(os.path.join(directory, "output.txt")) as file:
        return file.read()


def test_an_evaluation_beside_training_comes_before_what_is_trained_beside_it(
    start, wandb_server, monkeypatch
):
    """W&B takes no row of an update before the last one."""
    log_in(monkeypatch, wandb_server)
    monkeypatch.setattr(harness.run, "has_accelerator", lambda: True)
    trained = threading.Event()
    policy = rebrac.policy

    def late(*arguments):
        assert trained.wait(60)
        return policy(*arguments)

    def act(number):
        if number == 2:
            trained.clear()
        if number == 4:  # then update 30 is logged, after the evaluation's 20
            trained.set()

    monkeypatch.setattr(rebrac, "policy", late)
    before_epochs(monkeypatch, rebrac, act)
    directory = start()
    (name,) = wandb_server.runs
    assert_history_is_that_of(directory, wandb_server.history(name))


# --- Its mode ---


def test_it_is_online_with_an_account_or_an_agent_else_off(quick, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_mode()[0] == "disabled"
    netrc.write_text("machine other.example login user password secret\n")
    assert wandb_mode()[0] == "disabled"
    netrc.write_text(f"machine api.wandb.ai login user password {40 * '0'}\n")
    assert wandb_mode()[0] == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    assert wandb_mode()[0] == "disabled"
    netrc.write_text(f"machine wandb.example:8080 login user password {40 * '0'}\n")
    assert wandb_mode() == ("online", "an account at wandb.example:8080")
    netrc.unlink()
    assert wandb_mode()[0] == "disabled"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert wandb_mode() == ("online", "a run of a sweep")
    for mode, expected in {
        "offline": "offline",
        "dryrun": "offline",
        "disabled": "disabled",
    }.items():
        monkeypatch.setenv("WANDB_MODE", mode)
        assert wandb_mode() == (expected, f"WANDB_MODE={mode}")


def test_what_wandbs_commands_set_is_heeded(quick, wandb_server, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    account = f"an account at {wandb_server.url.removeprefix('http://')}"
    wandb_command("login", "--host", wandb_server.url, 40 * "0")
    assert wandb_mode() == ("online", account)
    wandb_command("offline")
    assert wandb_mode() == ("offline", "as `wandb offline` has set it")
    wandb_command("online")
    assert wandb_mode() == ("online", account)
    wandb_command("disabled")
    assert wandb_mode() == ("disabled", "as `wandb disabled` has set it")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert wandb_mode()[0] == "disabled"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_mode() == ("online", "WANDB_MODE=online")


def test_without_a_login_a_terminal_is_not_asked_for_one(quick, monkeypatch, tmp_path):
    try:
        terminal, other_end = pty.openpty()
    except OSError as error:
        pytest.skip(f"there is no pseudo-terminal here ({error})")
    monkeypatch.setenv("WANDB_MODE", "online")
    words = command_line({**quick, "results": tmp_path, "num_updates": 20})
    command = [sys.executable, "-c", IMPATIENT, *words]
    streams = dict(stdin=other_end, stdout=other_end, stderr=other_end)
    run = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)
    os.close(other_end)
    patience = threading.Timer(60, os.killpg, (run.pid, signal.SIGKILL))  # and wandb's process
    patience.start()
    output = b""
    with contextlib.suppress(OSError):  # when the process has ended
        while True:
            output += os.read(terminal, 1000)
    os.close(terminal)
    patience.cancel()
    assert run.wait(60) == 0, output
    assert b"W&B: offline after all (No API key configured." in output
    assert b"Enter your choice" not in output


# --- A server that fails ---


def test_an_unreachable_server_neither_stops_nor_slows_a_run(start, monkeypatch, capsys):
    plain = contents(start(results="plain"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    directory = quick_despite_wandb(start, monkeypatch)
    assert differences(plain, contents(directory)) == []
    output = capsys.readouterr().out
    (line,) = re.findall("W&B: offline after all .*", output)
    assert f"later, `wandb sync {directory}/wandb` sends it" in line
    assert glob.glob(f"{directory}/wandb/offline-run-*/run-*.wandb")


def test_a_server_that_never_answers_costs_the_time_limits(
    start, wandb_server, monkeypatch, capsys
):
    plain = contents(start(results="plain"))
    log_in(monkeypatch, wandb_server)
    wandb_server.silent.set()
    directory = quick_despite_wandb(start, monkeypatch)
    assert differences(plain, contents(directory)) == []
    assert "W&B: offline after all" in capsys.readouterr().out
    assert glob.glob(f"{directory}/wandb/offline-run-*/run-*.wandb")


def test_a_server_that_stops_answering_costs_one_time_limit(
    start, wandb_server, monkeypatch, capsys
):
    plain = contents(start(results="plain"))
    log_in(monkeypatch, wandb_server)
    before_epochs(monkeypatch, rebrac, lambda number: wandb_server.silent.set())
    directory = quick_despite_wandb(start, monkeypatch)
    assert differences(plain, contents(directory)) == []
    line = "W&B has not taken everything in 3 s; the same command sends the rest\n"
    assert line in capsys.readouterr().out
    wandb.teardown()  # as if the process had ended
    wandb_server.silent.clear()
    assert start() == directory
    (name,) = wandb_server.runs
    assert steps(wandb_server.history(name)) == [10, 20, 30, 40, 50, 60]
    assert "W&B: online" in capsys.readouterr().out
    start()
    assert "W&B" not in capsys.readouterr().out


def quick_despite_wandb(start, monkeypatch):
    """Start a run whose programs are compiled; return its directory.

    Its beginning and its end may each take W&B's time limit, 3 s, and training no longer than ever.
    """
    times = []
    monkeypatch.setattr(wandb_log, "TIME_LIMIT", 3)
    before_epochs(monkeypatch, rebrac, lambda number: times.append(time.monotonic()))
    began = time.monotonic()
    directory = start()
    assert times[0] - began < 20
    assert times[-1] - times[0] < 10
    assert time.monotonic() - times[-1] < 20
    return directory


@pytest.mark.parametrize(
    "first, synced, then",
    [
        ("offline", False, "offline"),
        ("offline", True, "offline"),
        ("online", False, "offline"),
        ("offline", False, "online"),
    ],
)
def test_the_printed_command_sends_each_row_once(
    start, wandb_server, monkeypatch, capsys, tmp_path, first, synced, then
):
    monkeypatch.chdir(tmp_path)  # where `wandb sync` leaves its own logs
    log_in(monkeypatch, wandb_server)
    monkeypatch.setenv("WANDB_MODE", first)
    stopped(start, monkeypatch, results="a user's results")
    output = capsys.readouterr().out
    if synced:
        sync_as_printed(output)
    monkeypatch.setenv("WANDB_MODE", then)
    directory = start(results="a user's results")
    output += capsys.readouterr().out
    sync_as_printed(output)
    sync_as_printed(output)  # again, which does nothing
    (name,) = wandb_server.runs
    history = wandb_server.history(name)
    assert steps(history) == [10, 20, 30, 40, 50, 60]
    losses = [float(row["actor_loss"]) for row in table(directory, "train.csv")]
    assert [row["actor_loss"] for row in history] == pytest.approx(losses)
    assert wandb_server.runs[name]["exit"] == 0


def sync_as_printed(output):
    """Run the command by which a run says that W&B gets it later."""
    (command,) = set(re.findall("later, `(wandb sync .*)` sends it", output))
    environment = {key: text for key, text in os.environ.items() if key != "WANDB_MODE"}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    subprocess.run(command, shell=True, check=True, env=environment, timeout=60)


# --- Errors of wandb ---


@pytest.mark.parametrize("method", ["init", "log", "finish"])
def test_an_error_in_wandb_never_ends_training(start, monkeypatch, capsys, method):
    def fail(*arguments, **options):
        raise RuntimeError(f"a fault\nin {method}")

    plain = contents(start(results="plain"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb if method == "init" else wandb.Run, method, fail)
    directory = start()
    assert differences(plain, contents(directory)) == []
    assert f"W&B: off after all (a fault in {method})" in capsys.readouterr().out


def test_a_signal_after_wandb_has_failed_leaves_the_process_to_its_end(start, monkeypatch, capsys):
    """Other than one while W&B begins: os._exit would end these tests."""

    def fail(*arguments, **options):
        raise RuntimeError("a fault")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", fail)
    stopped(start, monkeypatch)
    assert "W&B: off after all (a fault)" in capsys.readouterr().out


def test_the_death_of_wandbs_process_never_ends_training(start, wandb_server, monkeypatch, capsys):
    plain = contents(start(results="plain"))
    log_in(monkeypatch, wandb_server)

    def kill(number):
        if number == 2:
            for child in children(os.getpid()):
                os.kill(child, signal.SIGKILL)

    before_epochs(monkeypatch, rebrac, kill)
    directory = start()
    assert differences(plain, contents(directory)) == []
    assert "W&B: off after all" in capsys.readouterr().out


def children(parent):
    """Return the numbers of a process's children that are W&B's."""
    found = []
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(path) as file:
            number, name, _, own_parent = re.match(
                r"(\d+) \((.*)\) (\S) (\d+)", file.read()
            ).groups()
            if int(own_parent) == parent and name.startswith("wandb"):
                found.append(int(number))
    return found


def test_settings_that_wandb_refuses_never_end_training(start, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    assert os.path.exists(f"{start()}/finished.json")
    assert "W&B: off (1 validation error for Settings mode" in capsys.readouterr().out


def test_a_run_that_can_not_be_marked_as_preempted_still_ends(
    start, wandb_server, monkeypatch, capsys
):
    def fail(run):
        raise RuntimeError("a fault")

    log_in(monkeypatch, wandb_server)
    monkeypatch.setattr(wandb.Run, "mark_preempting", fail)
    stopped(start, monkeypatch)
    output = capsys.readouterr().out
    assert "stopped at update 30" in output
    assert "W&B: off after all (a fault)" in output


# --- Signals and exits ---


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_still_reach_the_run(spawn, quick, wandb_server, monkeypatch, tmp_path, signum):
    """They go to all processes of the group, as Ctrl-C on a terminal."""
    log_in(monkeypatch, wandb_server)
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")  # seconds
    flags = {**quick, "results": tmp_path, "num_updates": 10**6, "eval_every": 10**6}
    run = spawn("rebrac.py", *command_line(flags), "--log_every", "100")
    wait_until(lambda: any(known["history"] for known in wandb_server.runs.values()), run)
    os.killpg(run.pid, signum)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 128 + signum, output
    assert "; the same command resumes there" in output
    (known,) = wandb_server.runs.values()
    assert known["state"] == "preempting"
    assert known["exit"] == 1


@pytest.mark.parametrize("by_agent", [False, True])
def test_a_run_that_is_stopped_there_is_not_preempted(
    start, wandb_server, monkeypatch, capsys, by_agent
):
    """wandb sends SIGINT when W&B says so, and an agent sends SIGTERM: one signal, not two."""
    log_in(monkeypatch, wandb_server)
    if by_agent:
        monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")  # seconds
    monkeypatch.setitem(RunStopChecker.__init__.__kwdefaults__, "poll_interval", 0.1)

    def stop(number):
        (run,) = wandb_server.runs.values()
        run["stopped"] = True
        time.sleep(0.3)
        if by_agent and number == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        before_epochs(patch, rebrac, stop)
        number = signal.SIGTERM if by_agent else signal.SIGINT
        exits(128 + number, start, num_updates=1000, eval_every=1000)
    assert "; the same command resumes there" in capsys.readouterr().out
    (run,) = wandb_server.runs.values()
    assert run["state"] != "preempting"
    assert run["exit"] == 1


def test_a_preempted_run_ends_although_nobody_answers(start, wandb_server, monkeypatch, capsys):
    log_in(monkeypatch, wandb_server)
    monkeypatch.setattr(wandb_log, "TIME_LIMIT", 3)
    monkeypatch.setattr(wandb_log, "ANSWER_LIMIT", 1)
    times = []

    def interrupt(number):
        if number == 3:
            wandb_server.silent.set()
            times.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)

    before_epochs(monkeypatch, rebrac, interrupt)
    exits(128 + signal.SIGTERM, start)
    assert time.monotonic() - times[0] < 20
    assert "W&B has not taken everything in 3 s" in capsys.readouterr().out


def test_a_signal_while_wandb_begins_ends_the_run(
    spawn, quick, wandb_server, monkeypatch, tmp_path
):
    log_in(monkeypatch, wandb_server)
    wandb_server.silent.set()
    run = spawn("-c", IMPATIENT, *command_line({**quick, "results": tmp_path}))
    wait_until(lambda: glob.glob(f"{tmp_path}/*/*/*/wandb/run-*"), run)
    began = time.monotonic()
    run.terminate()
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM, output
    assert time.monotonic() - began < 20
    assert " updates  score " not in output


STUCK = """
import os, signal, time
from wandb.sdk.interface.interface import InterfaceBase
from wandb.sdk.lib.service.service_process import ServiceProcess
InterfaceBase.deliver_run = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
ServiceProcess.join = lambda _: time.sleep(1000)
"""


def test_a_signal_ends_the_run_although_wandbs_own_process_does_not_end(
    spawn, quick, wandb_server, monkeypatch, tmp_path
):
    """It sometimes waits for its parent's end, which waits for it, if it was just beginning."""
    log_in(monkeypatch, wandb_server)
    run = spawn("-c", STUCK + IMPATIENT, *command_line({**quick, "results": tmp_path}))
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM, output
    assert "stopped; the same command goes on" in output


HANGING = """
import time
from harness import wandb_log

def finish(self, *_):
    open(f"{self.directory}/ending", "w").close()
    time.sleep(1000)

wandb_log.WandB.finish = finish
"""


def test_a_second_signal_ends_the_run_while_wandb_ends(
    spawn, quick, wandb_server, monkeypatch, tmp_path
):
    log_in(monkeypatch, wandb_server)
    flags = {**quick, "results": tmp_path, "num_updates": 10**6, "eval_every": 10**6}
    run = spawn("-c", HANGING + IMPATIENT, *command_line(flags), "--log_every", "100")
    wait_until(lambda: any(known["history"] for known in wandb_server.runs.values()), run)
    run.send_signal(signal.SIGINT)
    wait_until(lambda: glob.glob(f"{tmp_path}/*/*/*/ending"), run)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGINT, output


@pytest.mark.parametrize("dies", ["at once", "later"])
def test_a_process_with_a_dead_server_exits(
    spawn, quick, wandb_server, monkeypatch, tmp_path, dies
):
    log_in(monkeypatch, wandb_server)
    if dies == "at once":
        wandb_server.silent.set()
    else:
        wandb_server.short_lived = True
    run = spawn("-c", IMPATIENT, *command_line({**quick, "results": tmp_path}))
    wait_until(lambda: glob.glob(f"{tmp_path}/*/*/*/finished.json"), run)
    began = time.monotonic()
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    assert time.monotonic() - began < 15
    assert "Traceback" not in output
