"""How much memory members need on a device, and how many fit."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import psutil

from harness.checkpoint import without_keys
from harness.members import own_numbers, split_config

# Members may take this share of a device's free memory. The rest is for measuring inside the
# actors, which takes up to 0.4 GB for one after the other, and for gaps.
USABLE = 0.8


class Memory(NamedTuple):
    """Bytes on a device."""

    shared: int  # by all members there, such as the data
    each: int  # of a member


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
    return Memory(num_bytes(data), 2 * num_bytes(state) + beside_states)


def first_members(config, number):
    """Return a config of so many members. Its program has all that the config's program has."""
    own = {name: np.resize(x, number) for name, x in own_numbers(config).items()}
    return replace(config, num_seeds=number, **own)


def first_state(script, config, data):
    """Return a state as `init_states` makes it of one member."""
    own = {name: x[0] for name, x in own_numbers(config).items()}
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
    return psutil.virtual_memory().available // jax.local_device_count()


def num_fitting(memory):
    """Return how many members fit on all of JAX's devices, 1 or more."""
    on_each = (USABLE * free_memory() - memory.shared) / memory.each
    return max(1, int(on_each)) * jax.local_device_count()


def is_out_of_memory(error):
    """Return whether an error says that the device's memory ran out, or the host's."""
    if isinstance(error, MemoryError):
        return True
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
