"""Seeds, compilation, and the numbers of a config that a compiled program takes as arguments.

The functions of a script are written for one seed and the whole config. `over_seeds` compiles
such a function once for all seeds. It splits the config in two:

- *static*: what the program depends on, such as the number of layers, and every 0. A regulariser
  whose strength is 0 is therefore not in the program.
- *traced*: the floats that aren't 0. They are arguments of the program, so that runs which differ
  only in those share it.
"""

import functools
import inspect
import os
from dataclasses import replace

import jax
import jax.numpy as jnp

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


def is_on(strength):
    """Return whether a coefficient is not 0.

    A 0 is static, so that its term is not compiled. Any other float is a traced array, whose
    value isn't known here but isn't 0.
    """
    return isinstance(strength, jax.Array) or strength > 0


def split_config(config):
    """Return the static config, with None for what it lacks, and the traced numbers."""
    traced = {}
    for name, value in vars(config).items():
        if isinstance(value, float) and value != 0:
            traced[name] = value
    return replace(config, **dict.fromkeys([*traced, *NOT_COMPILED])), traced


def over_seeds(*stacked, donate=None):
    """Decorate `function(config, ...)` of one seed, to run all seeds in one compiled program.

    The arguments named in `stacked` then have a leading axis of seeds, and so do the results. The
    memory of the argument `donate` is used again for the results.

        @over_seeds("state", donate="state")
        def epoch(config, state, data): ...

        states, infos = epoch(config, states, data)

    The program itself is `epoch.program(static, traced, states, data)`.
    """

    def decorate(function):
        names = list(inspect.signature(function).parameters)[1:]
        axes = [0 if name in stacked else None for name in names]
        donated = [2 + names.index(donate)] if donate else []  # after static and traced

        def program(static, traced, *arguments):
            one_seed = functools.partial(function, replace(static, **traced))
            return map_seeds(one_seed, axes, arguments)

        program.__name__ = function.__name__
        compiled = jax.jit(program, static_argnums=0, donate_argnums=donated)

        @functools.wraps(function)
        def call(config, *arguments):
            return compiled(*split_config(config), *arguments)

        call.program = compiled
        return call

    return decorate


def map_seeds(function, axes, arguments):
    """Map `function` over the first axis of the arguments whose entry of `axes` is 0.

    A single seed goes without vmap, which would make it slower on a CPU.
    """
    stacked = [argument for argument, axis in zip(arguments, axes) if axis == 0]
    num_seeds = len(jax.tree.leaves(stacked)[0])
    if num_seeds > 1:
        return jax.vmap(function, axes)(*arguments)
    first = []
    for argument, axis in zip(arguments, axes):
        if axis == 0:
            argument = jax.tree.map(lambda x: x[0], argument)
        first.append(argument)
    return jax.tree.map(lambda x: x[None], function(*first))


def init_states(init_state, config, batch):
    """Return `init_state(config, batch, seed)` of each of the config's seeds, stacked.

    A loop and not a vmap: JAX's batched QR, in IQL's orthogonal initialiser, can hang on a CPU.
    """

    def init(seeds):
        return jax.lax.map(functools.partial(init_state, config, batch), seeds)

    quick_to_compile = {"xla_backend_optimization_level": 0}  # since it runs once
    seeds = config.seed + jnp.arange(config.num_seeds)
    return jax.jit(init, compiler_options=quick_to_compile)(seeds)
