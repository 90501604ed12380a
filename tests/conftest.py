"""Real environments and generated files, for all tests."""

import os
import subprocess
import sys
import tempfile

import h5py
import numpy as np
import pytest

# The tests compile much and compute little, and the scripts that they start compile the same programs again.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
BUNDLED = os.path.join(ROOT, "data", "halfcheetah_medium_replay-v2.hdf5")


@pytest.fixture(scope="session")
def cheetah():
    import tasks

    return tasks.make_env("halfcheetah-medium-replay-v2")


@pytest.fixture
def write_dataset(tmp_path):
    """Writes columns to a file in D4RL's format; returns its path."""

    def write(name="file.hdf5", **columns):
        path = str(tmp_path / name)
        with h5py.File(path, "w") as file:
            for key, column in columns.items():
                file[key] = column
        return path

    return write


def init_states(script, config, data):
    """The states of a run's seeds before the first update."""
    return script.init_states(config, data, config.seed + np.arange(config.num_seeds))


def random_columns(seed, size=200, states=17, actions=6, ends=0.1):
    """Columns of a file whose episodes end at random, by a terminal, a timeout, or both at once."""
    rng = np.random.default_rng(seed)
    return dict(
        observations=rng.normal(size=(size, states)).astype(np.float32),
        actions=rng.uniform(-1, 1, (size, actions)).astype(np.float32),
        rewards=rng.normal(size=size).astype(np.float32),
        terminals=rng.random(size) < ends / 2,
        timeouts=rng.random(size) < ends / 2,
    )


def gl_backend():
    """Return the first of MuJoCo's OpenGL backends that can draw here, or None."""
    code = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>')).render()"
    for backend in ("egl", "osmesa", "glfw"):
        environment = {**os.environ, "MUJOCO_GL": backend}
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
        if run.returncode == 0:
            return backend
    return None
