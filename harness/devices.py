"""Members on several devices, such as the GPUs of a node.

The arrays of members are split over the devices, and each has a copy of the other arguments. From
that JAX makes one program for all devices. No member needs another, so they don't wait for each
other. Where members don't divide, copies of the last one fill them up. The results then are longer
than the members. Nothing that comes after them is evaluated, logged or saved.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def num_devices(members):
    """Return over how many of JAX's devices so many members are spread.

    It is the fewest that leave none with more than its share of all: 9 members on 8 devices take
    5, two on each, so that one copy fills them up, and not 7.
    """
    most_on_one = math.ceil(members / jax.local_device_count())
    return math.ceil(members / most_on_one)


@functools.cache
def mesh_of(number):
    """Return so many of JAX's devices as a mesh with the axis "members"."""
    devices = jax.local_devices()[:number]
    return jax.make_mesh((number,), ("members",), axis_types=(AxisType.Auto,), devices=devices)


def has_device(arguments):
    """Return whether an argument was put on one device, as a policy's actor on the CPU."""
    for x in jax.tree.leaves(arguments):
        if isinstance(x, jax.Array) and x.committed and len(x.sharding.device_set) == 1:
            return True
    return False


class Spread:
    """Puts the arguments of a program of members on the devices that it is spread over.

    `is_stacked` says of each argument whether its arrays have a first axis of members.
    """

    def __init__(self, is_stacked):
        self.is_stacked = is_stacked
        self.copies = {}  # of arguments that aren't, by their positions

    def place(self, traced, arguments):
        """Return the traced numbers and the arguments on the devices.

        They are as they were where there is one device, or one member.
        """
        if jax.local_device_count() == 1 or has_device(arguments):
            return traced, arguments
        stacked = [x for x, is_stacked in zip(arguments, self.is_stacked) if is_stacked]
        members = len(jax.tree.leaves(stacked)[0])
        number = num_devices(members)
        if number == 1:
            return traced, arguments
        size = number * math.ceil(members / number)
        placed = []
        for position, argument in enumerate(arguments):
            if self.is_stacked[position]:
                placed.append(split(argument, size, number))
            else:
                placed.append(self.copy(position, argument, number))
        of_members = {name: x for name, x in traced.items() if np.ndim(x) > 0}
        return {**traced, **split(of_members, size, number)}, placed

    def copy(self, position, argument, number):
        """Return an argument with a copy on each of the devices, which is made once."""
        copied, devices, copy = self.copies.get(position, (None, None, None))
        if copied is not argument or devices != number:
            copy = jax.device_put(argument, NamedSharding(mesh_of(number), PartitionSpec()))
            self.copies[position] = (argument, number, copy)
        return copy


def split(arrays, size, number):
    """Return arrays (members, ...) split over so many devices, filled up to a size."""
    sharding = NamedSharding(mesh_of(number), PartitionSpec("members"))

    def split_one(x):
        missing = size - len(x)
        if missing > 0:
            x = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)])
        return jax.device_put(x, sharding)

    return jax.tree.map(split_one, arrays)
