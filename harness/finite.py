"""Whether training has diverged."""

import jax
import jax.numpy as jnp
import numpy as np

from harness.checkpoint import flatten, without_keys


def find_divergence(config, update, infos, states):
    """Say which quantity is NaN or infinite in the epoch that ends with `update`, "" if none is.

    `infos` are its scalars (seeds, steps), `states` trees of arrays (seeds, ...).
    """
    epoch = config.log_every
    for key, values in infos.items():
        for seed, step in np.argwhere(~np.isfinite(values)):
            at = update - epoch + (step + 1) * epoch // values.shape[1]
            return f"{key} is {values[seed, step]} after update {at} (seed {config.seed + seed})"
    for seed in np.flatnonzero(~np.asarray(is_finite(states))):
        for key, array in flatten(without_keys(states)).items():
            if not np.isfinite(np.asarray(array[seed])).all():
                return f"{key} is NaN or infinite after update {update} (seed {config.seed + seed})"
    return ""


@jax.jit
def is_finite(tree):
    """Return whether all floats in a tree of arrays (seeds, ...) are finite, (seeds,)."""
    floats = []
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            floats.append(leaf.reshape(len(leaf), -1))
    return jnp.isfinite(jnp.concatenate(floats, 1)).all(1)
