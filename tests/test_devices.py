"""Members on several devices. `python tests/test_devices.py` is run on four virtual CPU devices."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import ROOT, of_seed, small_data, to_numpy
from conftest import init_states as init_all
from test_members import mixed_members, networks

from harness.devices import Spread, num_devices
from harness.members import split_config, stack_configs
from harness.scripts import scripts


def run(devices, *words):
    """Run Python on so many virtual CPU devices; return what it printed."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    options = dict(cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, text=True, timeout=500)
    done = subprocess.run([sys.executable, *words], capture_output=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("members, devices", [(1, 1), (3, 3), (4, 4), (5, 3), (9, 3), (10, 4)])
def test_members_take_the_fewest_devices_that_leave_none_with_more(members, devices, monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    assert num_devices(members) == devices


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rebrac", "iql"])
def test_members_on_several_devices_end_where_they_would_on_one(name):
    assert run(4, __file__, name) == "checked\n"


@pytest.mark.slow
def test_the_groups_tests_pass_on_two_devices():
    """Among them are three members, which don't divide, and members that go on in other groups."""
    names = "in_other_groups or one_that_diverges"
    assert " passed" in run(2, "-m", "pytest", "-q", "tests/test_group.py", "-k", names)


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

    traced, placed = Spread([True, False]).place(traced, (states, data))
    text = script.epoch.program.lower(static, traced, *placed).compile().as_text()
    for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert word not in text
    print("checked")


def assert_close(states, expected, bound):
    """Hold the five members' networks against others."""
    states, expected = to_numpy(states), to_numpy(expected)
    for i in range(5):
        found = networks(of_seed(states, i))
        for key, own in networks(of_seed(expected, i)).items():
            assert np.linalg.norm(found[key] - own) <= bound * np.linalg.norm(own), (i, key)


if __name__ == "__main__":
    check(sys.argv[1])
