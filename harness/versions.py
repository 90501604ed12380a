"""What trains a run: the commit of the code, JAX's version and the processor."""

import functools
import os
import platform
import subprocess

import jax

from harness.scripts import ROOT


@functools.cache  # a group asks for each of its runs
def made_with():
    """Return a line such as "d425be6a; jax 0.10.2; NVIDIA H200"."""
    device = jax.devices()[0].device_kind
    processor = cpu_model() if device == "cpu" else device
    return f"{commit(ROOT)}; jax {jax.__version__}; {processor}"


def commit(folder):
    """Return the commit of a folder that is the root of a repository.

    It has a + if a Python file differs from it, or is new.
    """
    found = git(folder, "rev-parse", "--show-toplevel", "--short=8", "HEAD").split("\n")
    if len(found) != 2 or os.path.realpath(found[0]) != os.path.realpath(folder):
        return "unknown commit"
    is_changed = git(folder, "status", "--porcelain", "--", "*.py") != ""
    return found[1] + "+" * is_changed


def git(folder, *words):
    """Return what git prints in a folder, nothing where there is no git or no repository."""
    others = {name: word for name, word in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", folder, *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, env=others)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_model():
    """Return the name of the processor."""
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(": ")[1].strip()
    return platform.machine()  # ARM's have no such line
