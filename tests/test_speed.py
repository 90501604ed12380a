"""What the compiled programs show of their speed on a GPU, which can't be measured here."""

import os
import re
import subprocess
import sys

import jax
import pytest
from conftest import ACTOR_FLAGS, ROOT, both_scripts, lower_epoch, small_config, state_shapes

import rebrac


def config_for(script, **flags):
    return small_config(script, hidden_dim=64, log_every=10, num_seeds=2, **flags)


@both_scripts
@pytest.mark.parametrize("flags", [{}, ACTOR_FLAGS], ids=["plain", "regularised"])
def test_an_epoch_on_a_gpu_never_asks_the_host(script, flags):
    """It also writes the new states over the old ones."""
    config = config_for(script, **flags)
    text = lower_epoch(script, config, "cuda").as_text()
    assert not re.search("callback|infeed|outfeed|send|recv", text)
    donated = re.findall("tf.aliasing_output|jax.buffer_donor", text)
    assert len(donated) == len(jax.tree.leaves(state_shapes(script, config)))


@both_scripts
def test_an_epoch_is_one_launch_of_a_loop_of_known_length(script):
    """What XLA compiles here has a single loop, of all the updates, and reuses the states."""
    config = config_for(script)
    text = lower_epoch(script, config).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    assert re.findall(r" while\(", entry) == [" while("]
    num_steps = "5" if script is rebrac else "10"
    assert re.findall(r'known_trip_count":{"n":"(\d+)"', entry) == [num_steps]
    reused = re.findall("(?:may|must)-alias", text)
    assert len(reused) == len(jax.tree.leaves(state_shapes(script, config)))


@both_scripts
def test_a_callback_would_be_seen(script, monkeypatch):
    transitions = script.transitions

    def talkative_transitions(*arguments):
        jax.debug.print("here")
        return transitions(*arguments)

    config = config_for(script, critic_dropout=0.25)  # which isn't in jit's cache
    monkeypatch.setattr(script, "transitions", talkative_transitions)
    assert "callback" in lower_epoch(script, config).as_text()


PRINT_FLAGS = """
import os, sys, jax, rebrac
from jax._src import xla_bridge

rebrac.parse(rebrac.Config, sys.argv[1:])
assert not xla_bridge.backends_are_initialized()
print(os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"], os.environ["XLA_FLAGS"])
print(jax.numpy.arange(3).sum())
"""


@pytest.mark.parametrize("deterministic", ["false", "true"])
def test_flags_for_the_gpu_are_set_before_jax_uses_a_device(deterministic):
    """XLA ends a program whose XLA_FLAGS it does not know."""
    environment = {**os.environ, "XLA_FLAGS": ""}
    environment.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None)
    command = [sys.executable, "-c", PRINT_FLAGS, "--deterministic", deterministic]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    flags = ["--xla_gpu_deterministic_ops=true"] if deterministic == "true" else []
    assert run.stdout.split() == ["false", *flags, "3"]
