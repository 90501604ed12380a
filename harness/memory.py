"""How much memory members need on a device and on the host, and how many fit."""

import contextlib
import os
import sys
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from harness.checkpoint import without_keys
from harness.environments import gym
from harness.evaluation import evaluation_episodes
from harness.members import has_accelerator, own_numbers, split_config

# Members may take this share of a device's free memory. The rest is for measuring inside the
# actors, which takes up to 0.4 GB for one after the other, and for gaps.
USABLE = 0.8
ENVIRONMENT = 1_200_000  # bytes of one on the host; the largest, Relocate's, have 1,050,000


class Memory(NamedTuple):
    """Bytes that training needs."""

    shared: int  # on a device, by all members there, such as the data
    each: int  # of a member on its device
    host: int  # of a member on the host: what its evaluation plays in and records


def needed_memory(script, config, data):
    """Return the memory that training needs, from the program compiled for two members.

    `config` is of one run, or of several that are trained together. `data` is a script's dataset
    or the shapes of its arrays. Nothing is trained. It takes as long as compiling does.
    """
    static, traced = split_config(first_members(config, 2))
    state = jax.eval_shape(partial(first_state, script, config), data)
    states = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), state)
    program = script.epoch.program.lower(static, traced, states, data).compile()
    used = program.memory_analysis()
    new_outputs = used.output_size_in_bytes - used.alias_size_in_bytes
    beside_states = (new_outputs + used.temp_size_in_bytes) // 2
    # Twice the state: an evaluation that is played beside training has a copy of it
    each = 2 * num_bytes(state) + beside_states
    return Memory(num_bytes(data), each, host_bytes(config, data["mean"].size))


def host_bytes(config, state_dim):
    """Return what one member's evaluation needs on the host, if its episodes are the longest.

    Its states are there twice, once as they were visited and once in one array.
    """
    steps = gym.spec(config.dataset_name).max_episode_steps
    of_a_step = 2 * state_dim * np.float32().nbytes + 2 * np.float64().nbytes
    return len(evaluation_episodes(config)) * (ENVIRONMENT + steps * of_a_step)


def first_members(config, number):
    """Return a config of so many members.

    If one of the config's members has a strength on, the program keeps its term.
    """
    own = {name: np.resize(x, number) for name, x in own_numbers(config).items()}
    return replace(config, num_seeds=number, **own)


def first_state(script, config, data):
    """Return a state as `init_states` makes it of one member, whose numbers are arrays, too."""
    own = {name: jnp.asarray(x[0]) for name, x in own_numbers(config).items()}
    batch = script.transitions(data, np.arange(1))
    return script.init_state(replace(config, **own), batch, 0)


def num_bytes(tree):
    """Return the size of all arrays in a tree, or of those that have such shapes."""
    arrays = jax.tree.leaves(jax.eval_shape(without_keys, tree))
    return sum(array.size * array.dtype.itemsize for array in arrays)


def free_memory():
    """Return the bytes that are free on each of JAX's devices."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return free_host_memory() // jax.local_device_count()


def free_host_memory():
    """Return the bytes that are free on the host, at most what its control groups leave."""
    return min(psutil.virtual_memory().available, *free_in_groups())


def free_in_groups(root="/"):
    """Return the bytes left to the process's control groups, as of a container or SLURM.

    Each group has a limit, and bytes in use. Of these the system can take back old pages of files.
    """
    found = [sys.maxsize]
    try:
        lines = read_text(root, "proc/self/cgroup").splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):  # version 2 has one group for all
            continue
        limit, usage, old_pages = "memory.max", "memory.current", "inactive_file"
        if controllers:
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
            old_pages = "total_inactive_file"
        folder = os.path.join(root, "sys/fs/cgroup", controllers)
        for word in ["", *path.split("/")]:  # from the root down, as each level may have a limit
            folder = os.path.join(folder, word)
            left = number_in(folder, limit)
            if left is None:
                continue
            left -= number_in(folder, usage) or 0
            left += number_in(folder, "memory.stat", old_pages) or 0
            found.append(max(0, left))
    return found


def number_in(folder, name, key=None):
    """Return the number in a control group's file, or after a key if it has several.

    None if it isn't there. The root lacks limits, and "max" is none.
    """
    with contextlib.suppress(OSError, ValueError, LookupError):
        words = read_text(folder, name).split()
        if key is None:
            return int(words[0])
        return int(dict(zip(words[::2], words[1::2]))[key])
    return None


def read_text(*path):
    """Return the contents of a small file."""
    with open(os.path.join(*path)) as file:
        return file.read()


def num_fitting(memory):
    """Return how many members fit on all of JAX's devices and on the host, 1 or more."""
    for_members = USABLE * free_memory() - memory.shared
    if not has_accelerator():  # the devices are the host
        on_each = for_members / (memory.each + memory.host)
        return max(1, int(on_each)) * jax.local_device_count()
    on_devices = max(1, int(for_members / memory.each)) * jax.local_device_count()
    on_host = max(1, int(USABLE * free_host_memory() / memory.host))
    return min(on_devices, on_host)


def is_out_of_memory(error):
    """Return whether an error says that the device's memory ran out, or the host's."""
    if isinstance(error, MemoryError):
        return True
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
