"""Files that are not D4RL's, or can't be read: each gets one line that says what is true."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import random_columns
from runs_helpers import fails

from harness.datasets import read_dataset
from harness.errors import UserError
from harness.hdf5 import write_columns

COLUMNS = random_columns(0)
WITHOUT_REWARDS = {key: column for key, column in COLUMNS.items() if key != "rewards"}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "file.hdf5")


@pytest.fixture
def read_fails(cheetah, path):
    """Hold that a file of some arrays can't be read; return the line that says why."""

    def read_fails(message, arrays=None):
        if arrays is not None:
            write(path, arrays)
        line = fails(message, read_dataset, path, cheetah)
        assert path in line
        assert "remove" not in line
        return line

    return read_fails


def write(path, arrays):
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value


def in_groups(template):
    """Return the columns under other names; "{}" in the template is a column's own."""
    return {template.format(key): column for key, column in COLUMNS.items()}


# --- What is no file, or no HDF5 ---


def test_no_file(read_fails, path):
    read_fails("there is no file")
    os.symlink("nowhere.hdf5", path)
    read_fails("there is no file .*: it is a link to nowhere.hdf5")


def test_what_is_no_file(read_fails, path):
    os.mkdir(path)
    read_fails("is a folder or a device")
    os.rmdir(path)
    os.mkfifo(path)  # from which reading would wait for ever
    read_fails("is a folder or a device")


def test_a_file_that_may_not_be_read(cheetah, path, tmp_path, monkeypatch):
    write(path, COLUMNS)
    os.chmod(path, 0)
    os.chmod(tmp_path, 0o755)
    monkeypatch.chdir(tmp_path)
    user = os.geteuid()
    if user == 0:  # who may read anything
        os.seteuid(65534)
    try:
        fails(r"can't read file.hdf5 \(Permission denied\)", read_dataset, "file.hdf5", cheetah)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is an empty file"),
        (b"not HDF5 at all", "is not an HDF5 file"),
        (b"<!DOCTYPE html><html></html>", "is a web page, not an HDF5 file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS"),
        (b"PK\x03\x04", "is a zip archive"),
        (b"\x1f\x8b\x08", "is a gzip archive"),
    ],
)
def test_another_kind_of_file(read_fails, path, content, message):
    with open(path, "wb") as file:
        file.write(content)
    read_fails(message)


@pytest.mark.parametrize("part", [0.02, 0.5, 0.9999])
def test_a_file_that_is_cut_off(read_fails, path, part):
    write(path, COLUMNS)
    os.truncate(path, int(part * os.path.getsize(path)))
    read_fails("is cut off .* get it again")


def test_a_file_that_is_damaged(read_fails, path):
    with h5py.File(path, "w") as file:
        for key, column in COLUMNS.items():
            file.create_dataset(key, data=column, compression="gzip", fletcher32=True)
        start = file["observations"].id.get_chunk_info(0).byte_offset
    with open(path, "r+b") as file:
        file.seek(start + 100)
        file.write(bytes(100))
    read_fails("is damaged.* get it again")


# --- Whole files that can't be read now ---

WRITER = """
import sys, h5py

file = h5py.File(sys.argv[1], "r+", **eval(sys.argv[2]))
file.flush()
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def writer():
    """Return a function that starts a process which has a file open to write."""
    processes = []

    def writer(path, **options):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, path, repr(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        processes.append(process)
        assert process.stdout.readline() == b"open\n"
        return process

    yield writer
    for process in processes:
        process.kill()
        process.communicate()


def test_a_file_that_another_process_writes(read_fails, cheetah, writer, path):
    write(path, COLUMNS)
    process = writer(path)
    read_fails("is open in a process that writes to it")
    process.communicate()
    assert len(read_dataset(path, cheetah)["rewards"]) == 200


def test_a_file_whose_writer_was_killed(read_fails, writer, path):
    with h5py.File(path, "w", libver="latest") as file:
        file["rewards"] = np.zeros(3)
    process = writer(path, libver="latest")
    process.kill()
    process.wait()
    read_fails("was left open by a process that wrote to it; .* h5clear -s")


def test_a_file_on_a_disk_without_locks(cheetah, path, monkeypatch):
    write(path, COLUMNS)

    class File(h5py.File):
        def __init__(self, path, mode, locking=None):
            if locking is None:
                raise OSError(errno.ENOLCK, "unable to lock file")
            super().__init__(path, mode, locking=locking)

    monkeypatch.setattr(h5py, "File", File)
    assert len(read_dataset(path, cheetah)["rewards"]) == 200


# --- Other layouts ---


@pytest.mark.parametrize(
    "template, message",
    [
        ("episode_0/{}", "is a Minari dataset .it has episode_0.; D4RL's layout is observations"),
        ("steps/{}", "is an RLDS dataset"),
        ("data/demo_0/{}", "is a robomimic dataset"),
        ("train/{}", "has no 'observations' .it has train/actions, train/observations, .*rewards"),
        ("{}_1", "has no 'observations' .it has actions_1, "),
    ],
)
def test_another_layout_is_named(read_fails, template, message):
    read_fails(message, in_groups(template))


def test_an_extra_array_makes_no_other_layout(cheetah, path):
    write(path, {**COLUMNS, "steps": 3, "episode_0": 0})
    assert len(read_dataset(path, cheetah)["rewards"]) == len(COLUMNS["rewards"])


def test_many_other_arrays_are_not_all_named(read_fails):
    line = read_fails("has no 'observations'", {f"array_{i}": 0 for i in range(100)})
    assert line.count("array_") == 8


def test_no_array_at_all(read_fails):
    read_fails("has no 'observations' .it has no array", {})


def test_a_group_in_place_of_an_array(read_fails):
    nested = dict(COLUMNS)
    del nested["observations"]
    for key in ("observation", "achieved_goal", "desired_goal"):
        nested[f"observations/{key}"] = COLUMNS["observations"]
    names = "achieved_goal, desired_goal, observation"
    read_fails(f"observations in .* is a group .{names}., as in Gymnasium-Robotics,", nested)
    groups = dict(COLUMNS)
    groups["rewards/values"] = groups.pop("rewards")
    read_fails("rewards in .* is a group .values. where D4RL has one array", groups)


# --- Data that are elsewhere ---


@pytest.mark.parametrize(
    "link, message",
    [
        (h5py.ExternalLink("gone.hdf5", "a"), "is a link to a in gone.hdf5, which isn't there"),
        (h5py.SoftLink("/a"), "is a link to /a in .*file.hdf5, which isn't there"),
    ],
)
@pytest.mark.parametrize("key", ["rewards", "timeouts"])
def test_a_link_that_leads_nowhere(read_fails, link, message, key):
    read_fails(f"{key} in .*file.hdf5 {message}", {**COLUMNS, key: link})


def test_links_that_lead_somewhere(cheetah, path, tmp_path):
    write(tmp_path / "other.hdf5", COLUMNS)
    write(path, {key: h5py.ExternalLink("other.hdf5", key) for key in COLUMNS})
    np.testing.assert_array_equal(read_dataset(path, cheetah)["actions"], COLUMNS["actions"])


def test_a_virtual_array_must_be_whole(read_fails, cheetah, path, tmp_path):
    """HDF5 reads zeros where a source is missing."""
    write(tmp_path / "other.hdf5", COLUMNS)
    layout = h5py.VirtualLayout((200,), "f4")
    layout[:] = h5py.VirtualSource("other.hdf5", "rewards", (200,))
    write(path, WITHOUT_REWARDS)
    with h5py.File(path, "r+") as file:
        file.create_virtual_dataset("rewards", layout)
    np.testing.assert_array_equal(read_dataset(path, cheetah)["rewards"], COLUMNS["rewards"])
    shutil.move(tmp_path / "other.hdf5", tmp_path / "elsewhere.hdf5")
    read_fails("rewards in .* has data in other.hdf5, which isn't there")


def test_a_virtual_array_may_be_of_the_same_file(cheetah, path):
    layout = h5py.VirtualLayout((200,), "f4")
    write(path, WITHOUT_REWARDS)
    with h5py.File(path, "r+") as file:
        file["parts"] = COLUMNS["rewards"]
        layout[:] = h5py.VirtualSource(file["parts"])
        file.create_virtual_dataset("rewards", layout)
    np.testing.assert_array_equal(read_dataset(path, cheetah)["rewards"], COLUMNS["rewards"])


def test_an_array_in_a_raw_file_that_is_gone(read_fails, path):
    write(path, WITHOUT_REWARDS)
    with h5py.File(path, "r+") as file:
        file.create_dataset("rewards", (200,), "f4", external=[("gone.raw", 0, 800)])
    read_fails("rewards in .* has data in gone.raw, which isn't there")


def test_an_array_compressed_by_a_filter_that_h5py_lacks(read_fails, path):
    blosc = 32001
    write(path, WITHOUT_REWARDS)
    with h5py.File(path, "r+") as file:
        space = h5py.h5s.create_simple((200,))
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((200,))
        properties.set_filter(blosc, h5py.h5z.FLAG_OPTIONAL, ())
        array = h5py.h5d.create(file.id, b"rewards", h5py.h5t.NATIVE_FLOAT, space, properties)
        array.write_direct_chunk((0,), bytes(800))
    read_fails("rewards in .* is compressed by HDF5's filter 32001, which h5py lacks")


def test_a_full_disk_leaves_no_file_and_says_so(tmp_path):
    """By a limit on the size of files, which is as good."""
    path = str(tmp_path / "mine.hdf5")
    columns = {"rewards": np.random.default_rng(0).standard_normal(10**6)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(UserError, match=f"^can't write to {path} \\(.*File too large"):
            write_columns(path, columns, {}, level=4)
    finally:
        signal.signal(signal.SIGXFSZ, handler)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.path.exists(path)
    write_columns(path, columns, {"made_by": "me"}, level=4)
    with h5py.File(path) as file:
        assert file.attrs["made_by"] == "me"
        assert np.array_equal(file["rewards"], columns["rewards"])
