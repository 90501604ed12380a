"""The memory that members need, how many are trained at once, and what happens when it runs out."""

import os
import resource
import subprocess
import sys
from dataclasses import replace

import jax
import psutil
import pytest
from conftest import OURS, ROOT, init_states, small_config, small_data
from runs_helpers import before_epochs, fails
from test_group import (
    PLAIN,
    STRONG,
    STRONGER,
    assert_same_to_rounding,
    hold,
    read,
    start_alone,
    updates,
)

import harness.memory
import harness.run
import iql
import rebrac
from harness import group
from harness.checkpoint import without_keys
from harness.directory import status
from harness.errors import UserError
from harness.members import split_config, stack_configs
from harness.memory import ENVIRONMENT, Memory, needed_memory, num_fitting

__all__ = ["hold", "start_alone"]  # fixtures


def measured(script, config, data):
    """Return the bytes of the arrays and of what a program of a config's members needs beside."""
    states = init_states(script, config, data)
    static, traced = split_config(config)
    program = script.epoch.program.lower(static, traced, states, data).compile()
    used = program.memory_analysis()
    arrays = jax.tree.leaves(without_keys((states, data)))
    beside = used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    copy = sum(x.nbytes for x in jax.tree.leaves(without_keys(states)))
    return sum(x.nbytes for x in arrays) + beside + copy


@pytest.mark.parametrize("script", [rebrac, iql])
def test_what_members_need_is_what_the_program_of_more_members_has(script):
    """Their strengths differ, and 0 is among them."""
    data = small_data()
    runs = []
    for seed in range(6):
        config = small_config(script, seed=seed, batch_size=256, actor_dropout=0.1 * (seed % 2))
        runs.append(replace(config, actor_wd=0.1 * seed))
    config = stack_configs(runs)
    memory = needed_memory(script, config, data)
    assert memory.shared == sum(x.nbytes for x in jax.tree.leaves(data))
    expected = measured(script, config, data)
    assert 0.8 * expected < memory.shared + 6 * memory.each < 1.25 * expected


@pytest.mark.parametrize(
    "accelerator, free, host, devices, members",
    [
        (True, 1000, 1000, 1, 10),  # (0.8 * 1000 - 90) / 70 is 10.1
        (True, 1000, 9000, 8, 80),
        (True, 100, 1000, 2, 2),
        (True, 1000, 100, 8, 8),  # 0.8 * 100 / 10
        (True, 1000, 10, 1, 1),
        (False, 1000, 0, 1, 8),  # (0.8 * 1000 - 90) / 80 is 8.9
    ],
)
def test_as_many_fit_as_the_free_memory_has_room_for(
    accelerator, free, host, devices, members, monkeypatch
):
    monkeypatch.setattr(harness.memory, "has_accelerator", lambda: accelerator)
    monkeypatch.setattr(harness.memory, "free_memory", lambda: free)
    monkeypatch.setattr(harness.memory, "free_host_memory", lambda: host)
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    assert num_fitting(Memory(shared=90, each=70, host=10)) == members


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_job_has_left_counts_as_much_as_the_machines_memory(version, tmp_path, monkeypatch):
    """The process is in the group job/step. The job's limit is the smaller one.

    Of that 3000 bytes are in use, and 500 of these are old pages of files.
    """
    names = {
        1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("", "memory.max", "memory.current", "inactive_file"),
    }
    controller, limit, usage, old_pages = names[version]
    (tmp_path / "proc" / "self").mkdir(parents=True)
    text = f"5:cpu:/other\n4:{controller}:/job/step\n"
    (tmp_path / "proc" / "self" / "cgroup").write_text(text)
    step = tmp_path / "sys" / "fs" / "cgroup" / controller / "job" / "step"
    step.mkdir(parents=True)
    (step / limit).write_text("9000\n" if version == 1 else "max\n")
    (step.parent / limit).write_text("4000\n")
    for folder in (step, step.parent):
        (folder / usage).write_text("3000\n")
        (folder / "memory.stat").write_text(f"cache 700\n{old_pages} 500\nswap 9\n")
    free = harness.memory.free_in_groups(tmp_path)
    assert min(free) == 1500
    os.remove(step.parent / "memory.stat")
    assert min(harness.memory.free_in_groups(tmp_path)) == 1000
    os.remove(step.parent / usage)
    assert min(harness.memory.free_in_groups(tmp_path)) == 4000
    monkeypatch.setattr(harness.memory, "free_in_groups", lambda: free)
    assert harness.memory.free_host_memory() == 1500


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relocate-human-v1", "antmaze-large-play-v2", "hopper-medium-v2"])
def test_an_evaluations_environments_take_no_more_than_is_reckoned(name):
    """In a process of its own, whose memory is not what others have left."""
    code = f"""if True:
        import psutil
        from harness.environments import reset
        from harness.lockstep import make_copy
        envs = [make_copy({name!r}) for _ in range(20)]
        before = psutil.Process().memory_info().rss
        for i in range(100):
            envs.append(make_copy({name!r}))
            reset(envs[-1], 0, 0, i)
        print((psutil.Process().memory_info().rss - before) / 100)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert 0.3 * ENVIRONMENT < float(done.stdout) < ENVIRONMENT, done.stderr


@pytest.mark.parametrize("runs, room, at_once", [(5, 4, 3), (5, 5, 5), (9, 4, 3), (2, 1, 1)])
def test_runs_are_parted_evenly(runs, room, at_once, monkeypatch, quick):
    """Each run here has two seeds, so that there is room for 2 * `room` members and one more."""
    monkeypatch.setattr(group, "num_fitting", lambda memory: 2 * room + 1)
    monkeypatch.setattr(group, "needed_memory", lambda *_: None)
    config = small_config(iql, num_seeds=2, dataset_path=quick["dataset_path"])
    configs = [replace(config, seed=10 * i) for i in range(runs)]
    assert group.num_at_once(iql, configs) == at_once


@pytest.mark.parametrize("script", OURS.values(), ids=OURS)
def test_how_many_fit_is_known_without_a_range_of_values(script, quick):
    """ReBRAC takes it from the dataset, unless it is given."""
    config = small_config(script, dataset_path=quick["dataset_path"])
    if script is rebrac:
        config = replace(config, v_min=None, v_max=None)
    assert group.num_at_once(script, [config, replace(config, seed=1)]) == 2


def test_runs_are_trained_where_it_is_not_known_how_many_fit(start_group, monkeypatch, capsys):
    def fail(script, configs):
        raise TypeError("no numbers")

    monkeypatch.setattr(group, "num_at_once", fail)
    for directory in start_group(PLAIN, STRONG, words=["fit"]):
        assert status(directory).state == "finished"
    assert "how many runs fit isn't known (no numbers); trying all" in capsys.readouterr().err


def test_those_that_do_not_fit_follow(start_group, monkeypatch):
    monkeypatch.setattr(group, "num_fitting", lambda memory: 2)
    directories = start_group(PLAIN, STRONG, STRONGER, words=["fit"])
    company = ["one of 2 runs that are trained together"] * 2
    company.append("one of 1 runs that are trained together")
    for directory, line in zip(directories, company):
        assert status(directory).state == "finished"
        assert line in read(directory, "output.txt")


def test_data_that_can_not_be_read_is_each_runs_own_error(start_group, small_file):
    """And not that of the question how many fit."""
    with open(small_file, "rb") as file:
        content = file.read()
    broken = small_file + ".broken.hdf5"
    with open(broken, "wb") as file:
        file.write(content[: len(content) // 2])
    with pytest.raises(SystemExit):
        start_group(PLAIN, STRONG, words=["fit"], dataset_path=broken)
    for directory in start_group.directories:
        assert broken in status(directory).reason
        assert read(directory, "output.txt").splitlines()[-1].startswith("error: ")


# --- When it runs out ---

# A run needs some 500 MB for its updates. A layer's outputs have 38 MB: malloc never takes so much
# from what it has kept, so that the limit is felt in whatever process.
LARGE = dict(batch_size=300_000, hidden_dim=32, log_every=1, num_updates=2, eval_every=2)


@pytest.fixture
def limit_memory():
    """Return a function that limits what memory this process may still take. None is no limit."""
    before = resource.getrlimit(resource.RLIMIT_AS)

    def limit(more):
        most = before[0] if more is None else psutil.Process().memory_info().vms + more
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))

    yield limit
    limit(None)


def test_a_group_for_which_there_is_no_memory_is_halved(
    start_group, start_alone, limit_memory, monkeypatch
):
    """In its second epoch alone, which can't have the memory that the first had."""

    def act(number):
        limit_memory(100_000_000 if number == 2 else None)

    with monkeypatch.context() as patch:
        before_epochs(patch, iql, act)
        directories = start_group(PLAIN, STRONG, **LARGE)
    members = [PLAIN, STRONG]
    for directory, member, when in zip(directories, members, ["now", "after the others"]):
        line = (
            "memory ran out with 2 runs together; now 1 at once. "
            f"This one goes on {when}, from the last checkpoint, of update 0"
        )
        assert line in read(directory, "output.txt").splitlines()
        assert updates(directory) == [1, 2]
        assert_same_to_rounding(directory, start_alone(member, results="alone", **LARGE))


@pytest.mark.parametrize(
    "error, line",
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 8 bytes."), "memory ran out; "),
        (MemoryError("Unable to allocate 8 bytes"), "memory ran out; "),
        (jax.errors.JaxRuntimeError("INTERNAL:\n a fault"), "JAX has failed; "),
    ],
)
def test_a_run_that_jax_ends_says_how_it_goes_on(error, line, start, monkeypatch):
    with monkeypatch.context() as patch:
        fail_in_epochs(patch, error)
        said = fails(f"^{line}", start, iql)
    assert "the same command resumes from the last checkpoint, of update 20" in said
    assert status(start.directory).reason == f"error: {said}\n"
    assert status(start(iql)).state == "finished"


def test_a_run_that_loses_its_device_has_not_failed(start, monkeypatch):
    """So that another machine takes it up."""
    with monkeypatch.context() as patch:
        lose_device(patch)
        fails("^JAX's device has failed; the same command resumes from the last ", start, iql)
    assert status(start.directory).state == "unfinished"
    assert status(start(iql)).state == "finished"


def test_a_group_that_loses_its_device_ends_without_trying_the_others(start_group, monkeypatch):
    with monkeypatch.context() as patch:
        lose_device(patch)
        monkeypatch.setattr(group, "num_at_once", lambda *about: 2)
        fails("^JAX's device has failed; ", start_group, PLAIN, STRONG, STRONGER, words=["fit"])
    plain, strong, stronger = start_group.directories
    for directory in (plain, strong):
        last = read(directory, "output.txt").splitlines()[-1]
        assert last.startswith("error: JAX's device has failed; the same command resumes from ")
        assert status(directory).state == "unfinished"
    assert not os.path.exists(os.path.join(stronger, "config.yaml"))
    for directory in start_group(PLAIN, STRONG, STRONGER):
        assert status(directory).state == "finished"
    assert "resuming from update 20" in read(plain, "output.txt")


def fail_in_epochs(patch, error):
    """Let an error come in the fourth epoch and after."""

    def act(number):
        if number >= 4:
            raise error

    before_epochs(patch, iql, act)


def lose_device(patch):
    fail_in_epochs(patch, jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ECC_UNCORRECTABLE"))
    patch.setattr(harness.run, "devices_work", lambda: False)


# --- What other processes do meanwhile ---


@pytest.mark.parametrize("state", ["finished", "failed", "busy"])
def test_a_run_that_another_process_has_had_meanwhile_is_left_out(
    state, start_group, hold, monkeypatch
):
    """The second of two that follow each other."""
    files = dict(finished="finished.json", failed="failed.txt")

    def act(number):
        directory = start_group.directories[1]
        if number == 1 and state == "busy":
            hold(directory)
        elif number == 1:
            os.makedirs(directory, exist_ok=True)
            open(os.path.join(directory, files[state]), "w").close()

    monkeypatch.setattr(group, "num_at_once", lambda *about: 1)
    before_epochs(monkeypatch, iql, act)
    plain, strong = start_group(PLAIN, STRONG, words=["fit"])
    assert status(plain).state == "finished"
    assert not os.path.exists(os.path.join(strong, "config.yaml"))


def test_without_a_device_each_run_says_so(start_group, monkeypatch):
    def fail():
        raise UserError("JAX finds no device")

    monkeypatch.setattr(group, "check_device", fail)
    fails("^JAX finds no device$", start_group, PLAIN, STRONG)
    for directory in start_group.directories:
        assert read(directory, "output.txt") == "error: JAX finds no device\n"
