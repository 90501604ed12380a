"""Whether training has diverged."""

import jax
import jax.numpy as jnp
import numpy as np

from harness.checkpoint import flatten, without_keys
from harness.members import seeds


def find_divergence(config, update, infos, states):
    """Say what is NaN or infinite in the epoch that ends with `update`.

    `infos` are its scalars (members, steps), `states` trees of arrays (members, ...). Returns
    {number of a member: message} for those that have diverged.
    """
    problems = {}
    for key, values in infos.items():
        for member, step in np.argwhere(~np.isfinite(values)):
            in_epoch = (step + 1) * config.log_every // values.shape[1]
            at = update - config.log_every + in_epoch
            problems.setdefault(int(member), f"{key} is {values[member, step]} after update {at}")
    for member in np.flatnonzero(~np.asarray(is_finite(states))):
        for key, array in flatten(without_keys(states)).items():
            if not np.isfinite(np.asarray(array[member])).all():
                message = f"{key} is NaN or infinite after update {update}"
                problems.setdefault(int(member), message)
    found = {}
    for member, seed in enumerate(seeds(config)):  # and not what fills them up (devices.py)
        if member in problems:
            found[member] = f"{problems[member]} (seed {seed})"
    return found


@jax.jit
def is_finite(tree):
    """Return whether all floats in a tree of arrays (members, ...) are finite, (members,)."""
    floats = []
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            floats.append(leaf.reshape(len(leaf), -1))
    return jnp.isfinite(jnp.concatenate(floats, 1)).all(1)
