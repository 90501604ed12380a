"""Members on several devices, which are virtual ones of the CPU.

python tests/test_devices.py check iql  # what a test does in a process with several devices
python tests/test_devices.py stop 3 < flags.json  # a group that is stopped in its third epoch
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import ROOT, of_seed, small_data, to_numpy
from conftest import init_states as init_all
from runs_helpers import FAST, command_line, signal_in_epoch
from test_group import PLAIN, STRONG, STRONGER, assert_same_to_rounding, updates
from test_members import mixed_members, networks

import iql
from harness import group
from harness.checkpoint import last_checkpoint
from harness.devices import COPIES, Spread, num_devices
from harness.members import split_config, stack_configs
from harness.scripts import scripts


def run(devices, *words, code=0, **options):
    """Run Python on so many virtual CPU devices, to an exit code; return what it printed."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    options.update(cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, text=True, timeout=500)
    done = subprocess.run([sys.executable, *words], capture_output=True, **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("members, devices", [(1, 1), (3, 3), (4, 4), (5, 3), (9, 3), (10, 4)])
def test_members_take_the_fewest_devices_that_leave_none_with_more(members, devices, monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    assert num_devices(members) == devices


@pytest.mark.slow
def test_members_on_several_devices_end_where_they_would_on_one():
    assert run(4, __file__, "check", "iql") == "checked\n"


@pytest.mark.slow
def test_the_groups_tests_pass_on_two_devices():
    """Among them are three members, which don't divide, and members that go on in other groups."""
    names = "in_other_groups or one_that_diverges"
    assert " passed" in run(2, "-m", "pytest", "-q", "tests/test_group.py", "-k", names)


@pytest.mark.slow
def test_a_group_goes_on_on_another_number_of_devices(start_group, tmp_path, quick):
    """Three runs are stopped on four devices and on two, and end on one."""
    members = [PLAIN, STRONG, STRONGER]
    flags = {**quick, **FAST, "results": tmp_path / "results"}
    whole = start_group(*members, results="whole")
    lines = json.dumps([command_line({**flags, **member}) for member in members])
    for devices, epochs, update in ((4, 3, 30), (2, 2, 50)):
        run(devices, __file__, "stop", str(epochs), input=lines, code=128 + signal.SIGTERM)
        directories = [one.replace("/whole/", "/results/") for one in whole]
        assert [last_checkpoint(one)[2]["update"] for one in directories] == [update] * 3
    for directory, expected in zip(start_group(*members), whole):
        assert updates(directory) == [10, 20, 30, 40, 50, 60]
        assert_same_to_rounding(directory, expected)


def stop(epochs):
    """Train a group to an epoch of this process, in which a signal stops it."""
    sys.argv[1:] = ["iql"]
    with pytest.MonkeyPatch.context() as patch:
        signal_in_epoch(patch, iql, int(epochs))
        group.main()


def check(name):
    """Hold five members on three devices, two on each, against the same on one device."""
    script = scripts()[name]
    three = mixed_members(script)
    members = [*three, replace(three[0], seed=98), replace(three[2], seed=99)]
    config = stack_configs(members)
    data = small_data()
    static, traced = split_config(config)
    expected = init_all(script, config, data)
    states = init_all(script, config, data)
    for bound in (2e-5, 2e-4):  # of the first epoch, and of one with states on several devices
        expected, _ = script.epoch.program(static, traced, expected, data)
        states, infos = script.epoch(config, states, data)
        assert len(jax.tree.leaves(states)[0].sharding.device_set) == 3
        assert {len(leaf) for leaf in jax.tree.leaves((states, infos))} == {6}
        assert_close(states, expected, bound)
    copies = [known for known in COPIES.values() if known[0] is data]
    assert Spread([None]).copy(0, data, 3) is copies[0][2]  # another program makes no second one
    print("checked")


def assert_close(states, expected, bound):
    """Hold the five members' networks against others."""
    states, expected = to_numpy(states), to_numpy(expected)
    for i in range(5):
        found = networks(of_seed(states, i))
        for key, own in networks(of_seed(expected, i)).items():
            assert np.linalg.norm(found[key] - own) <= bound * np.linalg.norm(own), (i, key)


if __name__ == "__main__":
    action, argument = sys.argv[1:]
    dict(check=check, stop=stop)[action](argument)
