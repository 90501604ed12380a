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
    before_epochs,
    command_line,
    contents,
    differences,
    exits,
    signal_in_epoch,
    signal_in_evaluation,
    stopped,
    table,
)
from wandb_server import Server

import rebrac
from harness import wandb_log
from harness.wandb_log import wandb_mode

# A script's `main` in a process that waits for W&B at most 5 s each time
IMPATIENT = "from harness import wandb_log; wandb_log.TIME_LIMIT = 5; import rebrac; rebrac.main()"


@pytest.fixture(autouse=True)
def wandb_server():
    """A stand-in for W&B's server. What wandb keeps between runs is taken down with it."""
    wandb.teardown()  # what another file's tests have left
    with Server() as server:
        yield server
        with contextlib.suppress(ConnectionError):  # where the test has killed wandb's process
            wandb.teardown()


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
        assert process.poll() is None, process.stdout.read()
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
    history = wandb_server.history(name)
    assert steps(history) == [10, 20, 30, 40, 50, 60]
    expected = {int(row["update"]): row for row in table(directory, "train.csv")}
    for row in table(directory, "evaluations.csv"):
        expected[int(row["update"])] |= row
    for row in history:
        found = {key: value for key, value in row.items() if not key.startswith("_")}
        numbers = {key: float(text) for key, text in expected[row["_step"]].items()}
        del numbers["seed"], numbers["update"]
        assert found == pytest.approx(numbers, rel=1e-8)


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


# --- Its mode ---


def test_it_is_online_with_an_account_or_an_agent_else_off(quick, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_mode()[0] == "disabled"
    netrc.write_text("machine other.example login user password secret\n")
    assert wandb_mode()[0] == "disabled"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_mode() == ("online", "an account at api.wandb.ai")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
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


def test_without_a_login_a_terminal_is_not_asked_for_one(quick, monkeypatch, tmp_path):
    try:
        terminal, other_end = pty.openpty()
    except OSError as error:
        pytest.skip(f"there is no pseudo-terminal here ({error})")
    monkeypatch.setenv("WANDB_MODE", "online")
    words = command_line({**quick, "results": tmp_path, "num_updates": 20})
    command = [sys.executable, "-c", IMPATIENT, *words]
    run = subprocess.Popen(command, cwd=ROOT, stdin=other_end, stdout=other_end, stderr=other_end)
    os.close(other_end)
    patience = threading.Timer(60, run.kill)
    patience.start()
    output = b""
    with contextlib.suppress(OSError):  # when the process has ended
        while True:
            output += os.read(terminal, 1000)
    os.close(terminal)
    patience.cancel()
    assert run.wait() == 0, output
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
    assert f"later, `wandb sync {directory}/wandb/*run*` sends it" in line
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
    line = f"W&B has not taken everything in 3 s; later, `wandb sync {directory}/wandb/*run*`"
    assert line in capsys.readouterr().out
    assert glob.glob(f"{directory}/wandb/run-*/run-*.wandb")


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


def test_what_was_kept_offline_can_be_sent_later(start, wandb_server, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    directory = start()
    monkeypatch.delenv("WANDB_MODE")
    log_in(monkeypatch, wandb_server)
    paths = glob.glob(f"{directory}/wandb/*run*")  # as the message says
    program = os.path.join(os.path.dirname(sys.executable), "wandb")
    subprocess.run([program, "sync", *paths], cwd=directory, check=True)
    with open(os.path.join(directory, "wandb_id")) as file:
        history = wandb_server.history(file.read())
    assert steps(history) == [10, 20, 30, 40, 50, 60]


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


def test_a_run_that_can_not_be_marked_as_preempted_still_ends(start, monkeypatch, capsys):
    def fail(run):
        raise RuntimeError("a fault")

    monkeypatch.setenv("WANDB_MODE", "offline")
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
    output = run.stdout.read()
    assert run.wait() == 128 + signum, output
    assert "; the same command resumes there" in output
    (known,) = wandb_server.runs.values()
    assert known["state"] == "preempting"
    assert known["exit"] == 1


def test_a_signal_while_wandb_begins_ends_the_run(
    spawn, quick, wandb_server, monkeypatch, tmp_path
):
    log_in(monkeypatch, wandb_server)
    wandb_server.silent.set()
    run = spawn("-c", IMPATIENT, *command_line({**quick, "results": tmp_path}))
    wait_until(lambda: glob.glob(f"{tmp_path}/*/*/*/wandb/run-*"), run)
    began = time.monotonic()
    run.terminate()
    output, _ = run.communicate()
    assert run.returncode == 128 + signal.SIGTERM, output
    assert time.monotonic() - began < 20
    assert " updates  score " not in output


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
    output, _ = run.communicate()
    assert run.returncode == 0, output
    assert time.monotonic() - began < 15
    assert "Traceback" not in output
