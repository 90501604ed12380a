"""Statistics of what is inside an actor, as functions of arrays: for `analyse`, and the report."""

import jax
import jax.numpy as jnp
import numpy as np

NUM_STATES = 10_000  # at most, in each batch on which the actor is measured
NUM_COMPARED = 256  # states for what costs more: features that are kept, Jacobians, neighbours
NUM_NEIGHBOURS = 10  # steps of the data whose actions an action is compared with


def make_samples(data):
    """Return the batches on which the actor is measured, the same in each evaluation.

    `train` and `validation` are indices of steps. `random` are states (NUM_STATES, S), uniform in
    the range of the normalised states for training.
    """
    rng = np.random.default_rng(0)
    samples = {}
    for part in ("train", "validation"):
        if len(data[part]) > 0:
            size = min(len(data[part]), NUM_STATES)
            samples[part] = rng.choice(data[part], size, replace=False)
    low = []
    high = []
    for column in data["observations"].T:  # one at a time, to spare memory
        used = column[data["train"]]
        low.append(used.min())
        high.append(used.max())
    samples["random"] = rng.uniform(low, high, (NUM_STATES, len(low))).astype(np.float32)
    return samples


def exact_matmul(x, y):
    """Return the product of two matrices in float32. A GPU's default is TF32, with 10 bits."""
    return jnp.matmul(x, y, precision="highest")


def feature_statistics(features):
    """Return statistics of features (B, F), the last hidden Dense's outputs before the ReLU.

    dead_neurons is the fraction of neurons that are at most 0 on the whole batch. feature_* are
    the mean norm of a row, and mean and standard deviation over rows and neurons. gram (F, F) is
    for `with_ranks`.
    """
    return {
        "dead_neurons": jnp.mean(jnp.all(features <= 0, 0)),
        "feature_norm": jnp.mean(jnp.linalg.norm(features, axis=1)),
        "feature_mean": features.mean(),
        "feature_std": features.std(),
        "gram": exact_matmul(features.T, features),
    }


def with_ranks(measured):
    """Replace the Gram matrices (members, F, F) of `feature_statistics` by ranks (members,).

    In NumPy, since JAX's batched eigenvalues can hang on a CPU. The other arrays stay. The Gram
    matrices are in float32. So srank and effective_rank come out larger where singular values fall
    fast: srank 54 in place of 49 of 256, where they fall as 1 / k^2.
    """
    measured = jax.device_get(measured)
    grams = [key for key in measured if key.endswith("/gram")]
    for key in grams:
        gram = measured.pop(key).astype(np.float64)
        eigenvalues = np.linalg.eigvalsh(gram)
        squares = eigenvalues[:, ::-1].clip(0)  # of the singular values, largest first
        for name, values in ranks(squares).items():
            measured[key.replace("gram", name)] = values
    return measured


def ranks(squares):
    """Return ranks (members,) of matrices, from their squared singular values (members, F).

    The squares are in descending order, and nothing is centred.

    pca_rank        components that hold 99 % of the squared singular values
    srank           components that hold 99 % of the singular values (arXiv 2010.14498, delta 0.01)
    effective_rank  exp of the entropy of the singular values, as shares (Roy and Vetterli, 2007)
    """
    singular = np.sqrt(squares)
    shares = singular / singular.sum(1, keepdims=True)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return {
        "pca_rank": components_for(0.99, squares),
        "srank": components_for(0.99, singular),
        "effective_rank": np.exp(-(shares * logs).sum(1)),
    }


def components_for(share, values):
    """Return how many of the first values (members, F) hold a share of their sum, (members,)."""
    is_needed = np.cumsum(values, 1) < share * values.sum(1, keepdims=True)
    return is_needed.sum(1) + 1


def weight_norms(params):
    """Return the Frobenius norm of each layer's weights: {"weight_norm/Hidden_0.Dense_0": 3.1}."""
    norms = {}
    for path, value in jax.tree.leaves_with_path(params):
        *layer, last = [entry.key for entry in path]
        if last == "kernel":
            norms[f"weight_norm/{'.'.join(layer)}"] = jnp.linalg.norm(value)
    return norms


def jacobian_norm(policy, observations):
    """Return the mean Frobenius norm of d action / d state over states (B, S).

    `policy` maps states (B, S) to actions (B, A), each by itself.
    """

    def one_action(observation):
        return policy(observation[None])[0]

    jacobians = jax.vmap(jax.jacrev(one_action))(observations)
    return jnp.mean(jnp.linalg.norm(jacobians, axis=(1, 2)))


def action_distance(observations, actions, batch):
    """Return how far actions (B, A) are from the data's in similar states, as a mean.

    For each of the `observations` (B, S), the NUM_NEIGHBOURS nearest states of the data's `batch`
    are found. The distance is that to the nearest of the actions there.
    """
    # |x - y|^2 = |x|^2 + |y|^2 - 2 x y, but without |x|^2, which changes no order
    squares = jnp.sum(batch.observations**2, 1)
    distances = squares - 2 * exact_matmul(observations, batch.observations.T)
    number = min(NUM_NEIGHBOURS, len(batch.actions))
    _, nearest = jax.lax.top_k(-distances, number)
    differences = actions[:, None] - batch.actions[nearest]
    return jnp.linalg.norm(differences, axis=-1).min(1).mean()


def linear_cka(x, y):
    """Return the linear CKA of features (B, F) and (B, G) on the same states (arXiv 1905.00414).

    It is 1 if they differ by rotation, scale and shift, and 0 if they have nothing in common. It is
    NaN if one is the same in all states.
    """
    if (x == x[0]).all() or (y == y[0]).all():
        return np.nan
    x = x - x.mean(0)
    y = y - y.mean(0)
    in_common = np.linalg.norm(x.T @ y) ** 2
    return in_common / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
