"""Checkpoints: when they come, what is in them, and that a damaged one is noticed."""

import errno
import json
import os
import shutil
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from runs_helpers import (
    after_epochs,
    before_epochs,
    contents,
    differences,
    fails,
    stopped,
)

import harness.record
import harness.run
import rebrac
from harness import checkpoint
from harness.checkpoint import (
    FORMAT,
    flatten,
    last_checkpoint,
    read_checkpoint,
    restore_tree,
    unflatten,
    write_checkpoint,
    write_file,
)
from harness.config import parse
from harness.directory import load_config
from harness.policies import load_policy

# --- When they come ---


def test_a_checkpoint_comes_after_more_than_a_minute(start, monkeypatch):
    now = 0.0
    saved = []  # before each epoch

    def wait(number, states, infos):
        nonlocal now
        now += 25.0

    def look(number):
        saved.append(last_checkpoint(start.directory)[2]["update"])

    monkeypatch.setattr(harness.run, "time", SimpleNamespace(monotonic=lambda: now))
    after_epochs(monkeypatch, rebrac, wait)
    before_epochs(monkeypatch, rebrac, look)
    start(num_updates=90, eval_every=90)
    # The first is made before the first epoch; 25 s, 50 s and 75 s later come the next looks.
    assert saved == [0, 0, 0, 30, 30, 30, 60, 60, 60]


def test_a_checkpoint_comes_before_and_after_an_evaluation(start, monkeypatch):
    made = []
    write = harness.record.write_checkpoint

    def noted(path, tree, about, keep):
        made.append((about["update"], about["evaluated"]))
        write(path, tree, about, keep)

    monkeypatch.setattr(harness.record, "write_checkpoint", noted)
    start()
    assert made == [(0, 0), (20, 0), (20, 20), (40, 20), (40, 40), (60, 40), (60, 60)]


# --- What is in them ---


class State(NamedTuple):
    actor: dict
    steps: jax.Array
    key: jax.Array


def test_a_tree_comes_back_as_it_was(tmp_path):
    path = str(tmp_path / "checkpoint.npz")
    actor = {"params": {"Dense_0": {"kernel": jnp.arange(6.0).reshape(2, 3)}}}
    state = State(actor, jnp.int32(7), jax.random.split(jax.random.key(1), 2))
    write_checkpoint(path, {"states": state}, {"update": 5})
    arrays, about = read_checkpoint(path)
    assert about == {"format": FORMAT, "update": 5}
    assert set(arrays) == {"states/actor/params/Dense_0/kernel", "states/key", "states/steps"}
    kernel = unflatten(arrays, "states/actor")["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(kernel, actor["params"]["Dense_0"]["kernel"])
    found = restore_tree(state, arrays, "states")
    assert isinstance(found, State)
    for path, leaf in flatten(state).items():
        assert flatten(found)[path].dtype == leaf.dtype
        assert (flatten(found)[path] == leaf).all()


def test_a_file_is_whole_or_not_there(tmp_path):
    path = str(tmp_path / "file")
    older = str(tmp_path / "older")

    def write_half(file):
        file.write(b"ha")
        raise KeyboardInterrupt

    for content in (b"first", b"second"):
        write_file(path, lambda file, content=content: file.write(content), keep=older)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, write_half, keep=older)
    assert (tmp_path / "file").read_bytes() == b"second"
    assert (tmp_path / "older").read_bytes() == b"first"


def test_a_file_may_be_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_file("file", lambda file: file.write(b"whole"))
    assert (tmp_path / "file").read_bytes() == b"whole"


# --- Damage ---


@pytest.mark.parametrize("cut", [0, 1, 1000, -1])
def test_with_a_checkpoint_cut_short_the_one_before_is_taken(start, monkeypatch, capsys, cut):
    whole = contents(start(results="whole"))
    directory = stopped(start, monkeypatch)
    path = os.path.join(directory, "checkpoint.npz")
    os.truncate(path, cut if cut >= 0 else os.path.getsize(path) - 1)
    parts = contents(start())
    assert differences(whole, parts) == []
    line = "checkpoint.npz is cut short or damaged; taking the one before it, of update 20"
    assert line in capsys.readouterr().out


def test_without_a_whole_checkpoint_a_run_must_start_anew(start, monkeypatch):
    directory = stopped(start, monkeypatch)
    paths = [os.path.join(directory, name) for name in ("checkpoint.npz", "previous.npz")]
    for path in paths:
        os.truncate(path, 1000)
    message = "checkpoint.npz is cut short or damaged, and there is no other; remove "
    fails(message + directory, start)
    for path in paths:
        os.remove(path)
    fails("has lost its checkpoints; remove it to start anew", start)
    shutil.rmtree(directory)
    assert start() == directory
    os.truncate(paths[0], 1000)  # now that it is finished, it isn't to be removed
    message = "is cut short or damaged, so the policy is lost; the run's tables are whole$"
    fails(message, load_policy, rebrac, directory)


def test_every_cut_and_flipped_byte_is_noticed_or_without_effect(tmp_path):
    path = str(tmp_path / "checkpoint.npz")
    damaged = str(tmp_path / "damaged.npz")
    tree = {"a": {"b": jnp.arange(20.0)}, "key": jax.random.key(1)}
    write_checkpoint(path, tree, {"update": 5})
    with open(path, "rb") as file:
        good = file.read()
    expected, _ = read_checkpoint(path)
    noticed = 0
    for at in range(len(good)):
        flipped = good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :]
        for content in (good[:at], flipped):
            with open(damaged, "wb") as file:
                file.write(content)
            try:
                arrays, about = read_checkpoint(damaged)
            except ValueError as error:
                assert "is cut short or damaged" in str(error)
                noticed += 1
                continue
            assert len(content) == len(good)
            assert about["update"] == 5
            assert all(np.array_equal(arrays[key], expected[key]) for key in expected)
    assert noticed > 1.5 * len(good)


def test_a_checkpoint_that_can_not_be_read_now_stays_the_last_one(start, monkeypatch):
    def fail_to_open(path, mode):
        if mode == "rb":
            raise OSError(errno.EIO, "Input/output error")
        return open(path, mode)

    def fail_to_load(*_, **__):
        raise MemoryError

    directory = stopped(start, monkeypatch)
    before = contents(directory)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "open", fail_to_open, raising=False)
        line = fails("can't read", start)
        assert line == f"can't read {directory}/checkpoint.npz (Input/output error)"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.np, "load", fail_to_load)
        fails("memory ran out", start)
    assert differences(before, contents(directory)) == []
    assert start() == directory


def test_a_pickle_in_a_checkpoint_is_never_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    about = np.frombuffer(json.dumps({"format": FORMAT}).encode(), np.uint8)
    np.savez(tmp_path / "checkpoint.npz", about=about, evil=np.array([Evil()], dtype=object))
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(str(tmp_path / "checkpoint.npz"))
    assert not (tmp_path / "executed").exists()


def test_code_in_a_config_is_never_executed(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"seed: !!python/object/apply:os.mkdir ['{tmp_path}/executed']\n")
    fails("is not the config of a run", load_config, rebrac.Config, str(tmp_path))
    words = ["--config_path", str(path)]
    fails("could not determine a constructor", parse, rebrac.Config, words)
    assert not (tmp_path / "executed").exists()


# --- Of another version ---


def test_a_checkpoint_of_another_version_is_an_error(start, monkeypatch):
    directory = stopped(start, monkeypatch)
    old = os.path.join(ROOT, "tests", "old_runs", "rebrac", "checkpoint.npz")  # of 4 hidden units
    shutil.copy(old, directory)
    line = r"another version of the script: of states/actor/\S+ the shape is .*4.* there and .*64"
    fails(line, start)
    last = os.path.join(directory, "checkpoint.npz")
    shutil.copy(os.path.join(directory, "previous.npz"), last)
    before = contents(directory)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 99)
        line = fails("is of format 2, but this version writes 99", start)
        assert line == f"{last} is of format 2, but this version writes 99; resume with that one"
    assert differences(before, contents(directory)) == []
    assert start() == directory
