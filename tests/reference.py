"""ReBRAC and IQL in NumPy, with every gradient by hand.

The tests hold the scripts' updates against these, in double precision. Nothing here is shared
with the scripts: the formulas are those of the papers (ReBRAC: arXiv 2305.09836, HL-Gauss: arXiv
2403.03950, IQL: arXiv 2110.06169).

A network's parameters are nested dictionaries with Flax's names. Each `f(params, x)` has an
`f_back(params, x, grad)`, which takes the gradient dL/dy (B, Y) by the outputs y = f(x) and
returns those by the parameters and by the inputs.

A state is a dictionary of networks' parameters and of their optimisers' states. An update returns
a new one, and its losses.
"""

import numpy as np
from scipy import stats

# --- Layers ---


def dense(params, x):
    """Return y = x W + b."""
    return x @ params["kernel"] + params["bias"]


def dense_back(params, x, grad):
    """Return dL/dW = x^T g and dL/db = sum g, and dL/dx = g W^T."""
    grads = {"kernel": x.T @ grad, "bias": grad.sum(0)}
    return grads, grad @ params["kernel"].T


def standardise(x):
    """Return n = (x - mean) / std over a row's units, and the std."""
    std = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return (x - x.mean(-1, keepdims=True)) / std, std


def layer_norm(params, x):
    """Return y = scale n + bias."""
    n, _ = standardise(x)
    return params["scale"] * n + params["bias"]


def layer_norm_back(params, x, grad):
    """Return dL/dscale = sum g n, dL/dbias = sum g, and dL/dx.

    dL/dx = (h - mean h - n mean(h n)) / std, where h = scale g.
    """
    n, std = standardise(x)
    grads = {"scale": (grad * n).sum(0), "bias": grad.sum(0)}
    h = params["scale"] * grad
    grad = h - h.mean(-1, keepdims=True) - n * (h * n).mean(-1, keepdims=True)
    return grads, grad / std


def layer(params, i, x):
    """Return the outputs of hidden layer i: Dense, ReLU, and LayerNorm if the layer has one."""
    x = np.maximum(dense(params[f"Dense_{i}"], x), 0)
    if f"LayerNorm_{i}" in params:
        x = layer_norm(params[f"LayerNorm_{i}"], x)
    return x


def layer_back(params, i, x, grad):
    """Return the gradients of `layer`. The ReLU lets those of positive outputs through."""
    grads = {}
    outputs = dense(params[f"Dense_{i}"], x)
    name = f"LayerNorm_{i}"
    if name in params:
        grads[name], grad = layer_norm_back(params[name], np.maximum(outputs, 0), grad)
    grad = grad * (outputs > 0)
    name = f"Dense_{i}"
    grads[name], grad = dense_back(params[name], x, grad)
    return grads, grad


def hidden(params, x):
    """Return the features: the outputs of two hidden layers."""
    return layer(params, 1, layer(params, 0, x))


def hidden_back(params, x, grad):
    """Return the gradients of `hidden`."""
    second, grad = layer_back(params, 1, layer(params, 0, x), grad)
    first, grad = layer_back(params, 0, x, grad)
    return {**first, **second}, grad


def network(params, k, x):
    """Return the outputs of a module's network number k: hidden layers and a last Dense."""
    return dense(params[f"Dense_{k}"], hidden(params[f"Hidden_{k}"], x))


def network_back(params, k, x, grad):
    """Return the gradients of `network`."""
    features = hidden(params[f"Hidden_{k}"], x)
    last, grad = dense_back(params[f"Dense_{k}"], features, grad)
    layers, grad = hidden_back(params[f"Hidden_{k}"], x, grad)
    return {f"Hidden_{k}": layers, f"Dense_{k}": last}, grad


# --- Optimiser ---


def tree_map(function, *trees):
    """Return the nested dictionary of a function of the trees' leaves."""
    if not isinstance(trees[0], dict):
        return function(*trees)
    return {key: tree_map(function, *[tree[key] for tree in trees]) for key in trees[0]}


def init_adam(params):
    """Return both moments, 0 at first, and the number of steps."""
    zeros = tree_map(np.zeros_like, params)
    return zeros, zeros, 0


def adam(opt, params, grads, learning_rate):
    """Return the state and the parameters after theta -= lr m^ / (sqrt(v^) + 1e-8)."""
    m, v, t = opt
    t = t + 1
    m = tree_map(lambda m, grad: 0.9 * m + 0.1 * grad, m, grads)
    v = tree_map(lambda v, grad: 0.999 * v + 0.001 * grad**2, v, grads)

    def step(theta, m, v):
        unbiased_m = m / (1 - 0.9**t)
        unbiased_v = v / (1 - 0.999**t)
        return theta - learning_rate * unbiased_m / (np.sqrt(unbiased_v) + 1e-8)

    return (m, v, t), tree_map(step, params, m, v)


def take_step(state, name, grads, learning_rate):
    """Return the state after an optimiser's step of the network `name`."""
    opt, params = adam(state[f"{name}_opt"], state[name], grads, learning_rate)
    return {**state, name: params, f"{name}_opt": opt}


def move_target(state, name, tau):
    """Return the state after theta' = tau theta + (1 - tau) theta'."""
    old = state[f"target_{name}"]
    target = tree_map(lambda new, old: tau * new + (1 - tau) * old, state[name], old)
    return {**state, f"target_{name}": target}


# --- ReBRAC ---


def policy(params, observations):
    """Return pi(s) = tanh(network(s)), (B, A)."""
    return np.tanh(network(params, 0, observations))


def policy_back(params, observations, grad):
    """Return the gradients by the parameters, with tanh' = 1 - tanh^2."""
    actions = policy(params, observations)
    grads, _ = network_back(params, 0, observations, grad * (1 - actions**2))
    return grads


def pairs(observations, actions):
    """Return what a critic sees, (B, S + A)."""
    return np.concatenate([observations, actions], -1)


def bins(config):
    """Return the bins' edges (n + 1,) and centres (n,): [v_min, v_max], widened by v_expand."""
    margin = config.v_expand * (config.v_max - config.v_min) / 2
    edges = np.linspace(config.v_min - margin, config.v_max + margin, config.n_classes + 1)
    return edges, (edges[:-1] + edges[1:]) / 2


def softmax(logits):
    """Return p_i = exp(l_i) / sum_j exp(l_j)."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def hl_gauss(config, values):
    """Return the mass (B, n) of a Gaussian around each value in each bin, cut off at the ends.

    Values outside are moved to the end, or as in the paper's code have almost no mass.
    """
    edges, _ = bins(config)
    sigma = config.sigma_frac * (edges[1] - edges[0])
    if config.clip_targets:
        values = np.clip(values, edges[0], edges[-1])
    cdf = stats.norm.cdf(edges[None], values[:, None], sigma)
    total = cdf[:, -1:] - cdf[:, :1]
    return np.diff(cdf, axis=-1) / (total if config.clip_targets else total + 1e-6)


def critic_values(config, outputs):
    """Return the values (B,) of a critic's outputs (B, n): sum_i p_i c_i, or with mse itself."""
    if config.critic_loss == "mse":
        return outputs[:, 0]
    _, centres = bins(config)
    return softmax(outputs) @ centres


def critic_values_back(config, outputs):
    """Return dQ/dlogit_i = p_i (c_i - Q), (B, n), or with mse 1."""
    if config.critic_loss == "mse":
        return np.ones_like(outputs)
    _, centres = bins(config)
    values = critic_values(config, outputs)
    return softmax(outputs) * (centres - values[:, None])


def rebrac_target(config, state, batch, noise):
    """Return r + gamma (1 - d) [min_k Q'_k(s', a') - critic_bc_coef ||a' - a'_data||^2], (B,).

    a' = pi'(s') + clipped noise. `noise` (B, A) is drawn from a standard Gaussian.
    """
    noise = np.clip(config.target_noise * noise, -config.noise_clip, config.noise_clip)
    next_actions = policy(state["target_actor"], batch.next_observations) + noise
    next_actions = np.clip(next_actions, -1, 1)
    x = pairs(batch.next_observations, next_actions)
    values = [critic_values(config, network(state["target_critic"], k, x)) for k in range(2)]
    penalty = ((next_actions - batch.next_actions) ** 2).sum(-1)
    next_values = np.minimum(*values) - config.critic_bc_coef * penalty
    return batch.rewards + config.gamma * (1 - batch.terminals) * next_values


def rebrac_critic_loss(config, outputs, target):
    """Return the mean over the batch of a critic's loss, and its gradient by the outputs (B, n).

    The cross-entropy -sum_i p*_i log p_i has the gradient p sum_i p*_i - p*, and (Q - y)^2 has
    2 (Q - y).
    """
    if config.critic_loss == "mse":
        error = outputs - target[:, None]
        return (error**2).mean(), 2 * error / len(error)
    wanted = hl_gauss(config, target)
    p = softmax(outputs)
    loss = -(wanted * np.log(p)).sum(-1).mean()
    return loss, (p * wanted.sum(-1, keepdims=True) - wanted) / len(p)


def rebrac_update_critics(config, state, batch, noise):
    """Return the state after an update of both critics, and the mean of their losses."""
    target = rebrac_target(config, state, batch, noise)
    x = pairs(batch.observations, batch.actions)
    grads = {}
    losses = []
    for k in range(2):
        loss, grad = rebrac_critic_loss(config, network(state["critic"], k, x), target)
        own, _ = network_back(state["critic"], k, x, grad)
        grads.update(own)
        losses.append(loss)
    state = take_step(state, "critic", grads, config.critic_learning_rate)
    return state, {"critic_loss": np.mean(losses)}


def rebrac_actor_loss(config, state, batch):
    """Return actor_bc_coef ||pi(s) - a||^2 - actor_q_coef Q / mean |Q|, where Q = min_k Q_k.

    Also returns its gradient by the actions (B, A), with mean |Q| taken for a constant.
    """
    actions = policy(state["actor"], batch.observations)
    x = pairs(batch.observations, actions)
    values = []
    slopes = []  # dQ/da
    for k in range(2):
        outputs = network(state["critic"], k, x)
        values.append(critic_values(config, outputs))
        by_outputs = critic_values_back(config, outputs)
        _, by_inputs = network_back(state["critic"], k, x, by_outputs)
        slopes.append(by_inputs[:, batch.observations.shape[1] :])
    first_is_smaller = values[0] < values[1]
    q = np.minimum(*values)
    slope = np.where(first_is_smaller[:, None], *slopes)

    difference = actions - batch.actions
    bc = (difference**2).sum(-1).mean()
    weight = config.actor_q_coef / np.abs(q).mean()
    loss = config.actor_bc_coef * bc - weight * q.mean()
    grad = (config.actor_bc_coef * 2 * difference - weight * slope) / len(q)
    return loss, grad


def rebrac_update_actor(config, state, batch):
    """Return the state after an update of the actor, then of both targets, and the loss."""
    loss, grad = rebrac_actor_loss(config, state, batch)
    grads = policy_back(state["actor"], batch.observations, grad)
    state = take_step(state, "actor", grads, config.actor_learning_rate)
    state = move_target(state, "actor", config.tau)
    state = move_target(state, "critic", config.tau)
    return state, {"actor_loss": loss}


def rebrac_update(config, state, batches, noises):
    """Update the critics on each batch with its noise, then the actor on the last batch."""
    for batch, noise in zip(batches, noises):
        state, critic_info = rebrac_update_critics(config, state, batch, noise)
    state, actor_info = rebrac_update_actor(config, state, batches[-1])
    return state, {**critic_info, **actor_info}


# --- IQL ---


def values_of(params, k, x):
    """Return a network's only output as (B,)."""
    return network(params, k, x)[:, 0]


def iql_target(state, batch):
    """Return min_k Q'_k(s, a), (B,)."""
    x = pairs(batch.observations, batch.actions)
    return np.minimum(*[values_of(state["target_critic"], k, x) for k in range(2)])


def iql_update_value(config, state, batch, target):
    """Update V by the mean of |expectile - 1(u < 0)| u^2, where u = target - V(s)."""
    u = target - values_of(state["value"], 0, batch.observations)
    weights = np.abs(config.expectile - (u < 0))
    grad = -2 * weights * u / len(u)
    grads, _ = network_back(state["value"], 0, batch.observations, grad[:, None])
    state = take_step(state, "value", grads, config.critic_learning_rate)
    return state, {"value_loss": (weights * u**2).mean()}


def gaussian_policy(config, params, observations):
    """Return the means and log standard deviations (B, A), and the latter before the clipping."""
    features = hidden(params["Hidden_0"], observations)
    means = np.tanh(dense(params["Dense_0"], features))
    raw = dense(params["Dense_1"], features)
    return means, np.clip(raw, config.log_std_min, config.log_std_max), raw


def iql_weights(config, state, batch, target):
    """Return min(exp(temperature (target - V(s))), max_weight), (B,)."""
    advantages = target - values_of(state["value"], 0, batch.observations)
    return np.minimum(np.exp(config.temperature * advantages), config.max_weight)


def iql_actor_loss(config, state, batch, target):
    """Return the mean of -w log pi(a|s), where pi is a Gaussian in each dimension."""
    means, log_stds, _ = gaussian_policy(config, state["actor"], batch.observations)
    log_probs = stats.norm.logpdf(batch.actions, means, np.exp(log_stds)).sum(-1)
    return -(iql_weights(config, state, batch, target) * log_probs).mean()


def iql_update_actor(config, state, batch, target):
    """Update the actor by -w log pi(a|s).

    With z = (a - mean) / std, the gradient of log pi(a|s) is z / std by the mean, and z^2 - 1 by
    log std, where that isn't clipped.
    """
    loss = iql_actor_loss(config, state, batch, target)
    params = state["actor"]
    means, log_stds, raw = gaussian_policy(config, params, batch.observations)
    w = iql_weights(config, state, batch, target)[:, None] / len(means)
    z = (batch.actions - means) / np.exp(log_stds)
    is_inside = (raw > config.log_std_min) & (raw < config.log_std_max)
    by_mean = -w * z / np.exp(log_stds) * (1 - means**2)
    by_log_std = -w * (z**2 - 1) * is_inside

    features = hidden(params["Hidden_0"], batch.observations)
    mean_grads, by_features = dense_back(params["Dense_0"], features, by_mean)
    std_grads, more = dense_back(params["Dense_1"], features, by_log_std)
    layers, _ = hidden_back(params["Hidden_0"], batch.observations, by_features + more)
    grads = {"Hidden_0": layers, "Dense_0": mean_grads, "Dense_1": std_grads}
    state = take_step(state, "actor", grads, config.actor_learning_rate)
    return state, {"actor_loss": loss}


def iql_update_critics(config, state, batch):
    """Update both critics by (Q(s, a) - y)^2, where y = r + gamma (1 - d) V(s')."""
    next_values = values_of(state["value"], 0, batch.next_observations)
    rewards = batch.rewards + config.reward_shift
    target = rewards + config.gamma * (1 - batch.terminals) * next_values
    x = pairs(batch.observations, batch.actions)
    grads = {}
    losses = []
    for k in range(2):
        error = values_of(state["critic"], k, x) - target
        own, _ = network_back(state["critic"], k, x, 2 * error[:, None] / len(error))
        grads.update(own)
        losses.append((error**2).mean())
    state = take_step(state, "critic", grads, config.critic_learning_rate)
    state = move_target(state, "critic", config.tau)
    return state, {"critic_loss": np.mean(losses)}


def iql_update(config, state, batch):
    """Update V, then the actor by the new V, then the critics by it, and the critics' target."""
    target = iql_target(state, batch)
    state, value_info = iql_update_value(config, state, batch, target)
    state, actor_info = iql_update_actor(config, state, batch, target)
    state, critic_info = iql_update_critics(config, state, batch)
    return state, {**value_info, **actor_info, **critic_info}


# --- From JAX ---


def numpy_state(state):
    """Return the networks' parameters of a TrainState, with fresh optimisers."""
    networks = {}
    for name, value in state._asdict().items():
        if isinstance(value, dict):
            networks[name] = tree_map(np.asarray, value["params"])
    optimisers = {f"{name}_opt": init_adam(params) for name, params in networks.items()}
    return {**networks, **optimisers}
