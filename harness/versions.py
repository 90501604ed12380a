"""What trains a run: the commit of the code, JAX's version and the device."""

import functools
import os
import subprocess

import jax

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@functools.cache  # a group asks for each of its runs
def made_with():
    """Return a line such as "d425be6a; jax 0.10.2; NVIDIA H200"."""
    return f"{commit(ROOT)}; jax {jax.__version__}; {jax.devices()[0].device_kind}"


def commit(folder):
    """Return the commit that is checked out, with a + if files differ from it."""
    words = ["git", "-C", folder, "describe", "--always", "--dirty=+", "--abbrev=8"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown commit"
    return done.stdout.strip() or "unknown commit"
