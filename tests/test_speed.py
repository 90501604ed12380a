"""What the compiled programs show about their speed where it can't be measured here: an epoch on a GPU."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import jax
import pytest
from conftest import ROOT, init_states

import benchmark
import iql
import rebrac


def epoch_for(script, platform, compiled=False, **flags):
    """The StableHLO of an epoch, for a platform that needn't be there, and the states that it takes; or the compiled
    program's HLO, for the platform that is there."""
    fields = dict(dataset_name="hopper-medium-v2", batch_size=8, hidden_dim=64, log_every=10, num_seeds=2)
    config = script.tuned(script.Config(**fields | flags))
    if hasattr(config, "v_min"):
        config = replace(config, v_min=-10.0, v_max=10.0)
    data = benchmark.random_data(size=100)
    states = jax.eval_shape(lambda: init_states(script, config, data))
    static, traced = script.split_config(config)
    lowered = script.epoch.trace(static, traced, states, data).lower(lowering_platforms=(platform,))
    return (lowered.compile() if compiled else lowered).as_text(), states


EVERYTHING = dict(
    actor_dropout=0.1, actor_wd=0.01, actor_ln=True, actor_fn=True, actor_gn=True, actor_bn=True, actor_sn=True,
    actor_input_noise=0.1, actor_bc_noise=0.1, actor_grad_noise=0.1,
)  # fmt: skip


@pytest.mark.parametrize("flags", [{}, EVERYTHING])
@pytest.mark.parametrize("script", [rebrac, iql])
def test_an_epoch_on_a_gpu_never_asks_the_host_and_reuses_its_states_memory(script, flags):
    text, states = epoch_for(script, "cuda", **flags)
    assert not re.search("callback|infeed|outfeed|send|recv", text)
    assert len(re.findall("tf.aliasing_output|jax.buffer_donor", text)) == len(jax.tree.leaves(states))


@pytest.mark.parametrize("script", [rebrac, iql])
def test_an_epoch_is_one_launch_of_a_loop_of_known_length(script):
    """What XLA has compiled, for a CPU: its entry has a single loop, of all the updates, and the states are donated."""
    text, states = epoch_for(script, "cpu", compiled=True)
    entry = text[text.index("\nENTRY ") :]
    assert re.findall(r" while\(", entry) == [" while("]
    assert re.findall(r'known_trip_count":{"n":"(\d+)"', entry) == ["5" if script is rebrac else "10"]
    assert len(re.findall("(?:may|must)-alias", text)) == len(jax.tree.leaves(states))


@pytest.mark.parametrize("script", [rebrac, iql])
def test_a_callback_would_be_seen(script, monkeypatch):
    transitions = script.transitions
    monkeypatch.setattr(script, "transitions", lambda *a: jax.debug.print("here") or transitions(*a))
    assert "callback" in epoch_for(script, "cpu", critic_dropout=0.25)[0]  # a config that isn't in jit's cache


def test_flags_for_the_gpu_are_set_before_jax_uses_a_device(tmp_path):
    """XLA ends a program whose XLA_FLAGS it does not know."""
    code = """
import os, jax, rebrac
from jax._src import xla_bridge
rebrac.parse(rebrac.Config, ["--deterministic", "WORD"])
assert not xla_bridge.backends_are_initialized()
print(os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"], os.environ["XLA_FLAGS"], jax.numpy.arange(3).sum())
"""
    words = {}
    for flag in ("false", "true"):
        env = {key: value for key, value in os.environ.items() if key != "XLA_PYTHON_CLIENT_PREALLOCATE"}
        command = [sys.executable, "-c", code.replace("WORD", flag)]
        run = subprocess.run(command, env=env | {"XLA_FLAGS": ""}, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        words[flag] = run.stdout.split()
    assert words == {"false": ["false", "3"], "true": ["false", "--xla_gpu_deterministic_ops=true", "3"]}
