"""Members, compilation, and the numbers of a config that a compiled program takes as arguments.

A member is one seed of one run. Members that differ in seeds and numbers alone are trained
together: the seeds of a run, or those of several runs, for which `stack_configs` makes one config.

The functions of a script are written for one member and its whole config. `over_members` compiles
such a function once for all members. It splits the config in two:

- *static*: what the program depends on, such as the number of layers, and every 0. A regulariser
  whose strength is 0 is therefore not in the program.
- *traced*: the floats that aren't 0. They are arguments of the program, so that runs which differ
  only in those share it. Where members differ, it is an array (members,), in which 0 may occur.
"""

import functools
import inspect
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from harness.devices import Spread, host, is_none, num_members, split_over_devices
from harness.errors import UserError, one_line

# Fields that no compiled program depends on
NOT_COMPILED = (
    "seed",
    "dataset_path",
    "dataset_sha256",
    "validation_seed",
    "eval_every",
    "eval_episodes",
    "eval_noise",
    "results",
    "evaluate",
    "video",
)


def check_device():
    """Raise UserError if JAX finds no device, as where JAX_PLATFORMS names what isn't there."""
    try:
        jax.devices()
    except Exception as error:  # a RuntimeError or an AssertionError
        raise UserError(
            f"JAX finds no device for JAX_PLATFORMS={os.getenv('JAX_PLATFORMS')}; unset it, or "
            "install JAX's build for that device, for a GPU as README.md says "
            f"(JAX: {one_line(error) or 'no device'})"
        ) from error


def has_accelerator():
    """Return whether JAX has a GPU or the like."""
    return jax.default_backend() != "cpu"


def is_on(strength):
    """Return whether a coefficient is not 0.

    A 0 is static, so that its term is not compiled. Any other float is a traced array, whose value
    isn't known here. It may be 0 for a member that is trained beside others without a 0.
    """
    return isinstance(strength, jax.Array) or strength > 0


# --- Configs of several members ---


def seeds(config):
    """Return the members' seeds, (members,)."""
    if np.ndim(config.seed) > 0:
        return config.seed
    return config.seed + np.arange(config.num_seeds)


def in_common(config, host_floats):
    """Return in which fields runs must agree to be trained together, and their values.

    They may differ in the seed and in floats, but for a script's HOST_FLOATS. Strengths, named
    actor_... and critic_..., may be 0 in some of them. Other floats are 0 in all or in none, since
    a 0 may mean something else.
    """
    fields = {}
    for name, value in vars(config).items():
        if name == "seed":
            continue
        if isinstance(value, float) and name not in host_floats:
            if name.startswith(("actor_", "critic_")):
                continue
            value = value == 0
        fields[name] = value
    return fields


def stack_configs(configs):
    """Return the config of all members of runs that are trained together.

    Its `num_seeds` is the number of members. Its `seed`, and the floats in which they differ, are
    arrays (members,), run by run.
    """
    if len(configs) == 1:
        return configs[0]
    sizes = [config.num_seeds for config in configs]
    values = dict(num_seeds=sum(sizes), seed=np.concatenate([seeds(config) for config in configs]))
    for name, first in vars(configs[0]).items():
        own = [getattr(config, name) for config in configs]
        if isinstance(first, float) and len(set(own)) > 1:
            values[name] = np.repeat(own, sizes)
    return replace(configs[0], **values)


def split_config(config):
    """Return the static config, with None for what it lacks, and the traced numbers."""
    traced = {}
    for name, value in vars(config).items():
        is_number = isinstance(value, float) and value != 0
        if (is_number or isinstance(value, np.ndarray)) and name not in NOT_COMPILED:
            traced[name] = value
    return replace(config, **dict.fromkeys([*traced, *NOT_COMPILED])), traced


def own_numbers(config):
    """Return the traced numbers in which members differ, arrays (members,) by their names."""
    return {name: x for name, x in split_config(config)[1].items() if np.ndim(x) > 0}


# --- Programs of several members ---


def over_members(*stacked, donate=None, in_turn=False):
    """Decorate `function(config, ...)` of one member, to run all of them in one compiled program.

    Where JAX has several devices, the members are spread over them (devices.py).
    The arguments named in `stacked` then have a leading axis of members, and so do the results.
    The memory of the argument `donate` is used again for the results. With `in_turn` one member
    follows the other, so that all need no more memory than one.

        @over_members("state", donate="state")
        def epoch(config, state, data): ...

        states, infos = epoch(config, states, data)

    The program itself is `epoch.program(static, traced, states, data)`.
    """

    def decorate(function):
        names = list(inspect.signature(function).parameters)[1:]
        axes = [0 if name in stacked else None for name in names]
        donated = [2 + names.index(donate)] if donate else []  # after static and traced

        def program(static, traced, *arguments):
            def one_member(numbers, *arguments):
                return function(replace(static, **numbers), *arguments)

            all_axes = [axes_of_numbers(traced), *axes]
            return map_members(one_member, all_axes, [traced, *arguments], in_turn)

        def program_of_devices(static, traced, *arguments):
            of_one_device = functools.partial(program, static)
            all_axes = [axes_of_numbers(traced), *axes]
            return split_over_devices(of_one_device, all_axes, [traced, *arguments])

        program.__name__ = program_of_devices.__name__ = function.__name__
        compile_it = functools.partial(jax.jit, static_argnums=0, donate_argnums=donated)
        compiled = compile_it(program)
        compiled_for_devices = compile_it(program_of_devices)
        spread = Spread(axes)

        last = None  # config, and how it is split: a policy is called thousands of times

        @functools.wraps(function)
        def call(config, *arguments):
            nonlocal last
            if last is None or last[0] is not config:
                last = (config, split_config(config))
            static, traced = last[1]
            if not spread.is_needed(arguments):
                return compiled(static, traced, *arguments)
            return compiled_for_devices(static, *spread.place(traced, arguments))

        call.program = compiled
        return call

    return decorate


def axes_of_numbers(traced):
    """Return 0 for each traced number in which members differ, and None for the others."""
    return {name: 0 if jnp.ndim(x) else None for name, x in traced.items()}


def map_members(function, axes, arguments, in_turn):
    """Map `function` over the first axis of the arguments whose entry of `axes` is 0.

    A single member goes without vmap, which would make it slower on a CPU.
    """
    number = num_members(axes, arguments)
    if number == 1:
        result = function(*member(0, axes, arguments))
        return jax.tree.map(lambda x: x[None], result)
    if in_turn:
        return jax.lax.map(lambda i: function(*member(i, axes, arguments)), jnp.arange(number))
    return jax.vmap(function, axes)(*arguments)


def member(index, axes, arguments):
    """Return one member's arguments."""

    def own(axis, argument):
        return argument if axis is None else jax.tree.map(lambda x: x[index], argument)

    return jax.tree.map(own, axes, arguments, is_leaf=is_none)


def init_states(init_state, config, batch):
    """Return `init_state(config, batch, seed)` of each member, stacked.

    They are made on the host, since they may be more than one device has room for. A loop and not
    a vmap: JAX's batched QR, in IQL's orthogonal initialiser, can hang on a CPU.
    """

    def init(member):
        seed, numbers = member
        return init_state(replace(config, **numbers), batch, seed)

    quick_to_compile = {"xla_backend_optimization_level": 0}  # since it runs once
    init_all = jax.jit(functools.partial(jax.lax.map, init), compiler_options=quick_to_compile)
    with jax.default_device(host()):
        return init_all((seeds(config), own_numbers(config)))
