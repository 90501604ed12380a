"""Real runs that take seconds, and what tests do to them. A plugin of pytest, for its fixtures."""

import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys

import h5py
import pytest
from conftest import ROOT, random_columns

import iql
import rebrac
from harness import group
from harness.checkpoint import read_checkpoint
from harness.config import parse
from harness.datasets import with_checksum
from harness.directory import run_directory
from harness.errors import UserError
from harness.tables import TABLES

QUICK = dict(
    hidden_dim=64,
    batch_size=8,
    actor_layers=1,
    critic_layers=1,
    log_every=10,
    eval_every=20,
    num_updates=60,
    eval_episodes=2,
    validation_frac=0.2,
    seed=3,
)
EVERYTHING = dict(  # the other program that these tests compile
    num_seeds=2,
    actor_dropout=0.3,
    actor_wd=0.1,
    actor_ln=True,
    actor_bn=True,
    actor_sn=True,
    actor_input_noise=0.1,
    actor_bc_noise=0.1,
    actor_grad_noise=0.1,
    actor_lr_decay="cosine",
    critic_bn=True,
    normalize_states=True,
)

FAST = dict(  # without what takes time in evaluations
    analysis=False,
    eval_noise="[]",
    eval_episodes=1,
)


# --- Starting runs ---


@pytest.fixture(scope="session")
def small_file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("data") / "small.hdf5")
    with h5py.File(path, "w") as file:
        for key, column in random_columns(0).items():
            file[key] = column
    return path


@pytest.fixture
def quick(monkeypatch, tmp_path, small_file):
    """Shorten the episodes and forget any W&B account; return a quick run's flags."""
    monkeypatch.setenv("EPISODE_STEPS", "15")
    for key in list(os.environ):
        if key.startswith("WANDB"):
            monkeypatch.delenv(key)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return dict(dataset_path=small_file, **QUICK)


@pytest.fixture
def start(monkeypatch, tmp_path, quick):
    """Return a function that runs a script with some flags and returns the run's directory.

    If the run doesn't get that far, the directory is `start.directory`.
    """

    def start(script=rebrac, results="results", **flags):
        known = {name: value for name, value in quick.items() if hasattr(script.Config, name)}
        words = command_line({**known, "results": tmp_path / results, **flags})
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
        config = with_checksum(script.tuned(parse(script.Config)))
        start.directory = run_directory(script.__name__, config, script.tuned)
        script.main()
        return start.directory

    return start


@pytest.fixture
def start_group(monkeypatch, tmp_path, quick):
    """Return a function that trains members, dictionaries of flags, and returns their directories.

    If they don't get that far, these are `start_group.directories`. The episodes are short, since
    the robot's contacts with the ground would soon make much of the last bits of its actions.
    """
    monkeypatch.setenv("EPISODE_STEPS", "4")

    def start_group(*members, script=iql, results="results", words=(), **flags):
        flags = {**quick, **FAST, "results": tmp_path / results, **flags}
        lines = [command_line({**flags, **member}) for member in members]
        start_group.directories = []
        for line in lines:
            config = with_checksum(script.tuned(parse(script.Config, line)))
            directory = run_directory(script.__name__, config, script.tuned)
            start_group.directories.append(directory)
        monkeypatch.setattr(sys, "argv", ["group", script.__name__, *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(lines)))
        group.main()
        return start_group.directories

    return start_group


@pytest.fixture
def spawn():
    """Return a function that starts Python as a process; it ends with the test at the latest."""
    processes = []

    def spawn(*words, cwd=ROOT):
        process = subprocess.Popen(
            [sys.executable, "-u", *words],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield spawn
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def command_line(flags):
    words = []
    for key, value in flags.items():
        words += [f"--{key}", str(value)]
    return words


def read_until(text, lines):
    """Read lines of a process up to the first one with `text`; return those read."""
    found = []
    for line in lines:
        found.append(line)
        if text in line:
            return found
    raise AssertionError(f"no line with {text!r} in:\n{''.join(found)}")


# --- What runs leave ---


def table(directory, name):
    """Return the rows of a table as dictionaries of strings."""
    with open(os.path.join(directory, name), newline="") as file:
        return list(csv.DictReader(file))


def contents(directory):
    """Return what must be the same after an interruption: the checkpoint, the tables' bytes."""
    arrays, about = read_checkpoint(os.path.join(directory, "checkpoint.npz"))
    about.pop("seconds")
    result = dict(about)
    for key, array in arrays.items():
        result[key] = (array.dtype, array.shape, array.tobytes())
    for name in TABLES:
        with open(os.path.join(directory, name), "rb") as file:
            result[name] = file.read()
    return result


def differences(some, others):
    """Return in what two `contents` differ."""
    return [key for key in {**some, **others} if some.get(key) != others.get(key)]


# --- How they end ---


def exits(code, function, *arguments, **options):
    """Call a function that must end the process with an exit code."""
    with pytest.raises(SystemExit) as error:
        function(*arguments, **options)
    assert error.value.code == code


def fails(pattern, function, *arguments, **options):
    """Call a function that must raise an error for the user; return its line."""
    with pytest.raises(UserError, match=pattern) as error:
        function(*arguments, **options)
    line = str(error.value)
    assert "\n" not in line
    return line


# --- What happens to them ---


def before_epochs(patch, script, act):
    """Let `act(number)` be called before each epoch, with its number from 1."""
    epoch = script.epoch
    numbers = itertools.count(1)

    def watched(*arguments):
        act(next(numbers))
        return epoch(*arguments)

    patch.setattr(script, "epoch", watched)


def after_epochs(patch, script, act):
    """Let `act(number, states, infos)` be called after each epoch; it may change them."""
    epoch = script.epoch
    numbers = itertools.count(1)

    def watched(*arguments):
        states, infos = epoch(*arguments)
        act(next(numbers), states, infos)
        return states, infos

    patch.setattr(script, "epoch", watched)


def signal_in_epoch(patch, script, number, signum=signal.SIGTERM, times=1):
    """Let the process get a signal, or several, in its epoch of this number, from 1."""

    def act(epoch):
        if epoch == number:
            for _ in range(times):
                os.kill(os.getpid(), signum)

    before_epochs(patch, script, act)


def signal_in_evaluation(patch, script):
    """Let the process get SIGTERM in its first evaluation."""
    policy = script.policy

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return policy(*arguments)

    patch.setattr(script, "policy", interrupted)


def stopped(start, monkeypatch, epochs=3, script=rebrac, **flags):
    """Start a run that is stopped in an epoch; return its directory."""
    with monkeypatch.context() as patch:
        signal_in_epoch(patch, script, epochs)
        exits(128 + signal.SIGTERM, start, script, **flags)
    return start.directory
