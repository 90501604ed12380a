"""Real environments, generated files, and small networks and data, for all tests."""

import csv
import functools
import gc
import os
import subprocess
import sys
import tempfile
from dataclasses import replace

import h5py
import numpy as np
import pytest

# The tests compile much and compute little, and the scripts that they start compile the same
# programs again. JAX reads this when it is imported.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp

import rebrac
from harness import members
from harness.environments import make_env
from harness.scripts import load_script

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUNDLED = os.path.join(ROOT, "data", "halfcheetah_medium_replay-v2.hdf5")

pytest_plugins = ["runs_helpers"]

OURS = {name: load_script(name) for name in ("rebrac", "iql", "cql", "bcq")}  # not a fork's own
both_scripts = pytest.mark.parametrize("script", OURS.values(), ids=OURS)

# What JAX keeps of each program makes Python's collections of garbage ever longer.
gc.set_threshold(100_000, 50, 1000)

# --- Environments and files ---


@pytest.fixture(scope="session")
def cheetah():
    return make_env("halfcheetah-medium-replay-v2")


@pytest.fixture
def write_dataset(tmp_path):
    """Write columns to a file in D4RL's format; return its path."""

    def write(name="file.hdf5", **columns):
        path = str(tmp_path / name)
        with h5py.File(path, "w") as file:
            for key, column in columns.items():
                file[key] = column
        return path

    return write


def random_columns(seed, size=200, states=17, actions=6, ends=0.1):
    """Return columns of a file whose episodes end at random: by a terminal, a timeout, or both."""
    rng = np.random.default_rng(seed)
    return dict(
        observations=rng.normal(size=(size, states)).astype(np.float32),
        actions=rng.uniform(-1, 1, (size, actions)).astype(np.float32),
        rewards=rng.normal(size=size).astype(np.float32),
        terminals=rng.random(size) < ends / 2,
        timeouts=rng.random(size) < ends / 2,
    )


def paper_rows(file):
    """Return pairs of a dataset and its values, from a table of the paper in tests/paper."""
    rows = []
    with open(os.path.join(ROOT, "tests", "paper", file)) as lines:
        for row in csv.DictReader(lines):
            name = row.pop("dataset")
            rows.append((name, {key: paper_value(text) for key, text in row.items()}))
    return rows


def paper_value(text):
    """Return the value of a cell, None where it is empty."""
    words = {"": None, "true": True, "false": False}
    return words[text] if text in words else float(text)


def gl_backend():
    """Return the first of MuJoCo's OpenGL backends that can draw here, or None."""
    code = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>')).render()"
    for backend in ("egl", "osmesa", "glfw"):
        environment = {**os.environ, "MUJOCO_GL": backend}
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
        if run.returncode == 0:
            return backend
    return None


# --- Small networks and data ---

STATE_DIM = 5
ACTION_DIM = 3
KEYS = list(jax.random.split(jax.random.key(7), 3))

# Every regulariser, each switched on
ACTOR_FLAGS = dict(
    actor_dropout=0.3,
    actor_wd=0.1,
    actor_ln=True,
    actor_fn=True,
    actor_gn=True,
    actor_bn=True,
    actor_sn=True,
    actor_rms=True,
    actor_input_noise=0.1,
    actor_bc_noise=0.1,
    actor_grad_noise=0.1,
    actor_sam=0.1,
    actor_lr_decay="cosine",
)
CRITIC_FLAGS = dict(
    critic_dropout=0.3,
    critic_wd=0.1,
    critic_fn=True,
    critic_gn=True,
    critic_bn=True,
    critic_sn=True,
    critic_rms=True,
    critic_grad_noise=0.1,
    critic_lr_decay="cosine",
)
NORMS = ("actor_ln", "actor_fn", "actor_gn", "actor_bn", "actor_sn", "actor_rms")

# Some of the actor's that work at any width
REGULARISED = dict(
    actor_dropout=0.1,
    actor_wd=0.1,
    actor_ln=True,
    actor_bn=True,
    actor_sn=True,
    actor_grad_noise=0.01,
)


def small_config(script, **fields):
    """Return a config of two hidden layers of 16 units, without any regulariser of the actor."""
    small = dict(
        hidden_dim=fields.get("hidden_dim", 16),  # before `tuned`: BCQ's other widths follow
        actor_layers=2,
        critic_layers=2,
        batch_size=8,
        log_every=4,
        num_updates=40,
        actor_dropout=0.0,
        actor_lr_decay="none",
    )
    if hasattr(script.Config, "v_min"):
        small |= dict(v_min=-10.0, v_max=10.0, n_classes=21)
    known = vars(script.Config())  # a fork's may lack critics
    small = {name: value for name, value in small.items() if name in known}
    return replace(script.tuned(script.Config(**small)), **fields)


def small_data(size=64, seed=0):
    """Return what `make_dataset` makes of random steps, all of them for training."""
    rng = np.random.default_rng(seed)
    return dict(
        observations=rng.normal(size=(size, STATE_DIM)).astype(np.float32),
        actions=rng.uniform(-1, 1, (size, ACTION_DIM)).astype(np.float32),
        rewards=rng.normal(size=size).astype(np.float32),
        terminals=rng.random(size) < 0.2,
        train=np.arange(size - 1, dtype=np.int32),
        reward_scale=np.float32(1),
        mean=np.float32(0),
        std=np.float32(1),
    )


def small_batch(size=32):
    """Return the first transitions of `small_data`."""
    return jax.tree.map(jnp.asarray, rebrac.transitions(small_data(), np.arange(size)))


def init_states(script, config, data):
    """Return the states of a config's seeds before the first update."""
    return members.init_states(script.init_state, config, script.transitions(data, np.arange(1)))


def small_state(script, config, seed=0, spread=0.3):
    """Return a state of one seed whose networks, the targets too, are all far from each other."""
    states = init_states(script, replace(config, seed=seed), small_data())
    state = of_seed(states, 0)
    keys = iter(jax.random.split(jax.random.key(seed + 100), 1000))

    def perturb(x):
        return x + spread * jax.random.normal(next(keys), x.shape)

    perturbed = {}
    for name, value in state._asdict().items():
        if isinstance(value, dict) and "params" in value:  # a network's variables
            perturbed[name] = {**value, "params": jax.tree.map(perturb, value["params"])}
    return state._replace(**perturbed)


def of_seed(tree, i):
    """Return the arrays of seed number i, of arrays with a first axis of seeds."""
    return jax.tree.map(lambda x: x[i], tree)


def run_epochs(script, config, epochs=2):
    """Return the states after some epochs on `small_data`."""
    data = jax.device_put(small_data())
    states = init_states(script, config, data)
    for _ in range(epochs):
        states, _ = script.epoch(config, states, data)
    return to_numpy(states)


def lower_epoch(script, config, platform="cpu"):
    """Return an epoch's program before it is compiled, for a platform that needn't be there."""
    static, traced = members.split_config(config)
    states = state_shapes(script, config)
    program = script.epoch.program.trace(static, traced, states, small_data())
    return program.lower(lowering_platforms=(platform,))


def state_shapes(script, config):
    """Return the shapes of `init_states`, at no cost."""
    init = functools.partial(script.init_state, config, small_batch(1))
    return jax.eval_shape(jax.vmap(init), jnp.arange(config.num_seeds))


def lowered_epoch(script, **flags):
    """Return the text of an epoch's program with some flags."""
    return lower_epoch(script, small_config(script, **flags)).as_text()


def assert_in_full_precision(function, *arguments):
    """Assert that a function's matrix products are not in TF32, which is a GPU's default."""
    text = jax.jit(function).lower(*arguments).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def to_numpy(states):
    """Return states as NumPy arrays, their random keys included."""
    return jax.device_get(states._replace(key=jax.random.key_data(states.key)))


def widen(tree):
    """Return a tree with float64 in place of float32."""

    def to_float64(x):
        return x.astype(np.float64) if x.dtype == np.float32 else x

    return jax.tree.map(to_float64, tree)


def assert_close(tree, expected, rtol=1e-7, atol=1e-10):
    """Hold the leaves of a tree against those of another."""
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def same_bits(a, b):
    """Return whether two trees have the same leaves."""
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
