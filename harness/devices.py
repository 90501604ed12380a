"""Members on several devices, such as the GPUs of a node.

The arrays of members are split over the devices, and each has a copy of the other arguments. The
program is the same on each device, for the members there. No member needs another, so the devices
don't wait for each other. Where members don't divide, copies of the last one fill them up. These
copies are at the end of the results, too. They are never evaluated, logged or saved.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# What each program was last given beside the members, by the program's Spread and the argument's
# position: the argument, the number of devices, and the copies on them
COPIES = {}


def forget_copies():
    """Free the memory of the copies, as when it has run out."""
    COPIES.clear()


def devices_work():
    """Return whether JAX's devices still compute."""
    try:
        for device in jax.local_devices():
            np.asarray(jax.device_put(np.ones(8), device) + 1)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def host():
    """Return the CPU as JAX's device, or JAX's first one if JAX_PLATFORMS leaves the CPU out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def num_devices(members):
    """Return over how many of JAX's devices so many members are spread.

    It is the fewest on which no device has more members than it would on all devices. 9 members on
    8 devices have two on one of them, so they take 5, and one copy fills these up.
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


def is_none(axis):
    return axis is None


def num_members(axes, arguments):
    """Return how many members there are. Arguments of `axis` 0 have a first axis of members."""
    stacked = [argument for argument, axis in zip(arguments, axes) if axis == 0]
    return len(jax.tree.leaves(stacked)[0])


def split_over_devices(function, axes, arguments):
    """Return `function(*arguments)`, made by each device for its own members.

    `axes` has a 0 for what has a first axis of members, and None for the rest, in the structure
    of the `arguments`.
    """

    def partition(axis):
        return PartitionSpec() if axis is None else PartitionSpec("members")

    specs = tuple(jax.tree.map(partition, axes, is_leaf=is_none))
    mesh = mesh_of(num_devices(num_members(axes, arguments)))
    options = dict(in_specs=specs, out_specs=PartitionSpec("members"), check_vma=False)
    return jax.shard_map(function, mesh=mesh, **options)(*arguments)


class Spread:
    """Puts the arguments of a program of members on the devices that it is spread over.

    `axes` has a 0 for each argument whose arrays have a first axis of members, else None.
    """

    def __init__(self, axes):
        self.axes = axes

    def is_needed(self, arguments):
        """Return whether members go to several devices. An argument may keep them on its own."""
        if jax.local_device_count() == 1 or has_device(arguments):
            return False
        return num_members(self.axes, arguments) > 1

    def place(self, traced, arguments):
        """Return the traced numbers, and the arguments, on the devices."""
        members = num_members(self.axes, arguments)
        number = num_devices(members)
        size = number * math.ceil(members / number)
        placed = []
        for position, (axis, argument) in enumerate(zip(self.axes, arguments)):
            if axis == 0:
                placed.append(split(argument, size, number))
            else:
                placed.append(self.copy(position, argument, number))
        of_members = {name: x for name, x in traced.items() if np.ndim(x) > 0}
        return [{**traced, **split(of_members, size, number)}, *placed]

    def copy(self, position, argument, number):
        """Return an argument with a copy on each of the devices, which all programs share."""
        copies = known_copies(argument, number)
        if copies is None:
            copies = jax.device_put(argument, NamedSharding(mesh_of(number), PartitionSpec()))
        COPIES[self, position] = (argument, number, copies)
        return copies


def known_copies(argument, number):
    """Return the copies that a program has of an argument on so many devices, None if none has."""
    for own_argument, own_number, copies in list(COPIES.values()):
        if own_argument is argument and own_number == number:
            return copies
    return None


def split(arrays, size, number):
    """Return arrays (members, ...) split over so many devices, filled up to a size."""
    sharding = NamedSharding(mesh_of(number), PartitionSpec("members"))

    def split_one(x):
        missing = size - len(x)
        if missing > 0:
            x = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)])
        return jax.device_put(x, sharding)

    return jax.tree.map(split_one, arrays)
