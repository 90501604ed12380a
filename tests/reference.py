"""ReBRAC, IQL, BCQ and CQL in NumPy, with every gradient by hand.

The tests hold the scripts' updates against these, in double precision. Nothing here is shared
with the scripts: the formulas are those of the papers (ReBRAC: arXiv 2305.09836, HL-Gauss: arXiv
2403.03950, IQL: arXiv 2110.06169, BCQ: arXiv 1812.02900, CQL: arXiv 2006.04779, SAM: arXiv
2010.01412).

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


def row_mean(x):
    """Return the mean of each row's units, (B, 1)."""
    return x.mean(-1, keepdims=True)


def standardise(x):
    """Return n = (x - mean) / std over a row's units, and the std."""
    variance = x.var(-1, keepdims=True)
    std = np.sqrt(variance + 1e-6)
    return (x - row_mean(x)) / std, std


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
    return grads, (h - row_mean(h) - n * row_mean(h * n)) / std


def root_mean_square(x):
    """Return the root of the mean square of a row's units."""
    return np.sqrt(row_mean(x**2) + 1e-6)


def rms_norm(params, x):
    """Return y = scale x / rms."""
    return params["scale"] * x / root_mean_square(x)


def rms_norm_back(params, x, grad):
    """Return dL/dscale = sum g n, and dL/dx = (h - n mean(h n)) / rms.

    Here n = x / rms and h = scale g.
    """
    rms = root_mean_square(x)
    n = x / rms
    grads = {"scale": (grad * n).sum(0)}
    h = params["scale"] * grad
    return grads, (h - n * row_mean(h * n)) / rms


NORMS = {"LayerNorm": (layer_norm, layer_norm_back), "RMSNorm": (rms_norm, rms_norm_back)}


def layer(params, i, x):
    """Return the outputs of hidden layer i: Dense, ReLU, and the norm that it has, if any."""
    x = dense(params[f"Dense_{i}"], x)
    x = np.maximum(x, 0)
    for norm, (forward, _) in NORMS.items():
        name = f"{norm}_{i}"
        if name in params:
            x = forward(params[name], x)
    return x


def layer_back(params, i, x, grad):
    """Return the gradients of `layer`. The ReLU lets those of positive outputs through."""
    grads = {}
    outputs = dense(params[f"Dense_{i}"], x)
    positive = np.maximum(outputs, 0)
    for norm, (_, backward) in NORMS.items():
        name = f"{norm}_{i}"
        if name in params:
            grads[name], grad = backward(params[name], positive, grad)
    grad = grad * (outputs > 0)
    name = f"Dense_{i}"
    grads[name], grad = dense_back(params[name], x, grad)
    return grads, grad


def hidden(params, x):
    """Return the features: the outputs of two hidden layers."""
    x = layer(params, 0, x)
    return layer(params, 1, x)


def hidden_back(params, x, grad):
    """Return the gradients of `hidden`."""
    between = layer(params, 0, x)
    second, grad = layer_back(params, 1, between, grad)
    first, grad = layer_back(params, 0, x, grad)
    return {**first, **second}, grad


def network(params, k, x):
    """Return the outputs of a module's network number k: hidden layers and a last Dense."""
    features = hidden(params[f"Hidden_{k}"], x)
    return dense(params[f"Dense_{k}"], features)


def network_back(params, k, x, grad):
    """Return the gradients of `network`."""
    features = hidden(params[f"Hidden_{k}"], x)
    last, grad = dense_back(params[f"Dense_{k}"], features, grad)
    layers, grad = hidden_back(params[f"Hidden_{k}"], x, grad)
    return {f"Hidden_{k}": layers, f"Dense_{k}": last}, grad


# --- Optimiser ---


def tree_map(function, *trees):
    """Return the nested dictionary of a function of the trees' leaves."""
    first = trees[0]
    if not isinstance(first, dict):
        return function(*trees)
    mapped = {}
    for key in first:
        children = [tree[key] for tree in trees]
        mapped[key] = tree_map(function, *children)
    return mapped


def leaves(tree):
    """Return the arrays of a nested dictionary."""
    if not isinstance(tree, dict):
        return [tree]
    found = []
    for child in tree.values():
        found += leaves(child)
    return found


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


def ascend(state, name, grads, radius):
    """Return the state with theta + radius g / |g| for the network `name`: SAM's."""
    squares = [(grad**2).sum() for grad in leaves(grads)]
    scale = radius / np.sqrt(sum(squares))
    moved = tree_map(lambda theta, grad: theta + scale * grad, state[name], grads)
    return {**state, name: moved}


def sam_grads(gradients, config, state, *arguments):
    """Return an actor's loss, and its gradients at theta, or with SAM where `ascend` leads."""
    loss, grads = gradients(config, state, *arguments)
    if config.actor_sam:
        moved = ascend(state, "actor", grads, config.actor_sam)
        _, grads = gradients(config, moved, *arguments)
    return loss, grads


def move_target(state, name, tau):
    """Return the state after theta' = tau theta + (1 - tau) theta'."""

    def average(theta, target):
        return tau * theta + (1 - tau) * target

    target_name = f"target_{name}"
    target = tree_map(average, state[name], state[target_name])
    return {**state, target_name: target}


# --- Gaussians ---


def gaussian(params, x):
    """Return means, and log standard deviations before the clipping, of the same features."""
    features = hidden(params["Hidden_0"], x)
    means = dense(params["Dense_0"], features)
    log_stds = dense(params["Dense_1"], features)
    return means, log_stds


def gaussian_back(params, x, by_mean, by_log_std):
    """Return the gradients of `gaussian` by the parameters."""
    features = hidden(params["Hidden_0"], x)
    mean_grads, by_features = dense_back(params["Dense_0"], features, by_mean)
    std_grads, more = dense_back(params["Dense_1"], features, by_log_std)
    layers, _ = hidden_back(params["Hidden_0"], x, by_features + more)
    return {"Hidden_0": layers, "Dense_0": mean_grads, "Dense_1": std_grads}


def is_within(config, log_stds):
    """Return whether each is within its bounds. Where it is clipped it has no gradient."""
    return (log_stds > config.log_std_min) & (log_stds < config.log_std_max)


# --- Critics ---


def pairs(observations, actions):
    """Return what a critic sees, (B, S + A)."""
    return np.concatenate([observations, actions], -1)


def values_of(params, k, x):
    """Return a network's only output as (B,)."""
    outputs = network(params, k, x)
    return outputs[:, 0]


def both_values(params, x):
    """Return the two critics' values."""
    return values_of(params, 0, x), values_of(params, 1, x)


def fit_critics(config, state, batch, target):
    """Update both critics by (Q(s, a) - target)^2."""
    x = pairs(batch.observations, batch.actions)
    grads = {}
    losses = []
    for k in range(2):
        error = values_of(state["critic"], k, x) - target
        grad = 2 * error / len(error)
        own, _ = network_back(state["critic"], k, x, grad[:, None])
        grads.update(own)
        losses.append((error**2).mean())
    state = take_step(state, "critic", grads, config.critic_learning_rate)
    return state, {"critic_loss": np.mean(losses)}


def action_slope(params, k, observations, actions):
    """Return dQ_k/da, (B, A)."""
    x = pairs(observations, actions)
    ones = np.ones((len(x), 1))
    _, by_inputs = network_back(params, k, x, ones)
    state_dim = observations.shape[1]
    return by_inputs[:, state_dim:]


def smaller_q(values, slopes):
    """Return Q = min_k Q_k (B,) and dQ/da (B, A) of both critics' own."""
    first_is_smaller = values[0] < values[1]
    slope = np.where(first_is_smaller[:, None], *slopes)
    return np.minimum(*values), slope


# --- ReBRAC ---


def policy(params, observations):
    """Return pi(s) = tanh(network(s)), (B, A)."""
    return np.tanh(network(params, 0, observations))


def policy_back(params, observations, grad):
    """Return the gradients by the parameters, with tanh' = 1 - tanh^2."""
    actions = policy(params, observations)
    by_outputs = grad * (1 - actions**2)
    grads, _ = network_back(params, 0, observations, by_outputs)
    return grads


def bins(config):
    """Return the bins' edges (n + 1,) and centres (n,): [v_min, v_max], widened by v_expand."""
    margin = config.v_expand * (config.v_max - config.v_min) / 2
    low = config.v_min - margin
    high = config.v_max + margin
    edges = np.linspace(low, high, config.n_classes + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    return edges, centres


def softmax(logits):
    """Return p_i = exp(l_i) / sum_j exp(l_j)."""
    largest = logits.max(-1, keepdims=True)
    p = np.exp(logits - largest)
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
    if not config.clip_targets:
        # The paper's code has twice this distribution, and adds 1e-6 to twice the total.
        total = total + 0.5e-6
    return np.diff(cdf, axis=-1) / total


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
    values = []
    for k in range(2):
        outputs = network(state["target_critic"], k, x)
        values.append(critic_values(config, outputs))
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
    total = wanted.sum(-1, keepdims=True)
    p = softmax(outputs)
    losses = -(wanted * np.log(p)).sum(-1)
    return losses.mean(), (p * total - wanted) / len(p)


def rebrac_update_critics(config, state, batch, noise):
    """Return the state after an update of both critics, and the mean of their losses."""
    target = rebrac_target(config, state, batch, noise)
    x = pairs(batch.observations, batch.actions)
    grads = {}
    losses = []
    for k in range(2):
        outputs = network(state["critic"], k, x)
        loss, grad = rebrac_critic_loss(config, outputs, target)
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
    state_dim = batch.observations.shape[1]
    values = []
    slopes = []  # dQ/da
    for k in range(2):
        outputs = network(state["critic"], k, x)
        by_outputs = critic_values_back(config, outputs)
        _, by_inputs = network_back(state["critic"], k, x, by_outputs)
        values.append(critic_values(config, outputs))
        slopes.append(by_inputs[:, state_dim:])
    q, slope = smaller_q(values, slopes)

    difference = actions - batch.actions
    bc = (difference**2).sum(-1).mean()
    weight = config.actor_q_coef / np.abs(q).mean()
    loss = config.actor_bc_coef * bc - weight * q.mean()
    grad = (config.actor_bc_coef * 2 * difference - weight * slope) / len(q)
    return loss, grad


def rebrac_actor_grads(config, state, batch):
    """Return the actor's loss and its gradients by the parameters."""
    loss, grad = rebrac_actor_loss(config, state, batch)
    return loss, policy_back(state["actor"], batch.observations, grad)


def rebrac_update_actor(config, state, batch):
    """Return the state after an update of the actor, then of both targets, and the loss."""
    loss, grads = sam_grads(rebrac_actor_grads, config, state, batch)
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


def iql_target(state, batch):
    """Return min_k Q'_k(s, a), (B,)."""
    x = pairs(batch.observations, batch.actions)
    return np.minimum(*both_values(state["target_critic"], x))


def iql_update_value(config, state, batch, target):
    """Update V by the mean of |expectile - 1(u < 0)| u^2, where u = target - V(s)."""
    u = target - values_of(state["value"], 0, batch.observations)
    weights = np.abs(config.expectile - (u < 0))
    loss = (weights * u**2).mean()
    grad = -2 * weights * u / len(u)
    grads, _ = network_back(state["value"], 0, batch.observations, grad[:, None])
    state = take_step(state, "value", grads, config.critic_learning_rate)
    return state, {"value_loss": loss}


def gaussian_policy(config, params, observations):
    """Return the means and log standard deviations (B, A), and the latter before the clipping."""
    outputs, raw = gaussian(params, observations)
    log_stds = np.clip(raw, config.log_std_min, config.log_std_max)
    return np.tanh(outputs), log_stds, raw


def iql_weights(config, state, batch, target):
    """Return min(exp(temperature (target - V(s))), max_weight), (B,)."""
    advantages = target - values_of(state["value"], 0, batch.observations)
    weights = np.exp(config.temperature * advantages)
    return np.minimum(weights, config.max_weight)


def iql_actor_loss(config, state, batch, target):
    """Return the mean of -w log pi(a|s), where pi is a Gaussian in each dimension."""
    means, log_stds, _ = gaussian_policy(config, state["actor"], batch.observations)
    stds = np.exp(log_stds)
    log_probs = stats.norm.logpdf(batch.actions, means, stds).sum(-1)
    weights = iql_weights(config, state, batch, target)
    return -(weights * log_probs).mean()


def iql_actor_grads(config, state, batch, target):
    """Return the loss of -w log pi(a|s) and its gradients by the parameters.

    With z = (a - mean) / std, the gradient of log pi(a|s) is z / std by the mean, and z^2 - 1 by
    log std, where that isn't clipped.
    """
    loss = iql_actor_loss(config, state, batch, target)
    weights = iql_weights(config, state, batch, target)
    w = weights[:, None] / len(weights)
    params = state["actor"]
    means, log_stds, raw = gaussian_policy(config, params, batch.observations)
    stds = np.exp(log_stds)
    z = (batch.actions - means) / stds
    by_mean = -w * z / stds
    by_outputs = by_mean * (1 - means**2)
    by_log_std = -w * (z**2 - 1) * is_within(config, raw)
    return loss, gaussian_back(params, batch.observations, by_outputs, by_log_std)


def iql_update_actor(config, state, batch, target):
    """Return the state after an update of the actor, and the loss."""
    loss, grads = sam_grads(iql_actor_grads, config, state, batch, target)
    state = take_step(state, "actor", grads, config.actor_learning_rate)
    return state, {"actor_loss": loss}


def iql_update_critics(config, state, batch):
    """Update both critics by (Q(s, a) - y)^2, where y = r + gamma (1 - d) V(s')."""
    next_values = values_of(state["value"], 0, batch.next_observations)
    rewards = batch.rewards + config.reward_shift
    target = rewards + config.gamma * (1 - batch.terminals) * next_values
    state, info = fit_critics(config, state, batch, target)
    return move_target(state, "critic", config.tau), info


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
    found = {}
    for name, value in state._asdict().items():
        if isinstance(value, dict) and "params" in value:
            params = tree_map(np.asarray, value["params"])
            found[name] = params
            found[f"{name}_opt"] = init_adam(params)
    return found


# --- BCQ ---

# A state of BCQ has its networks apart: encoder, decoder, perturbation and critic. In the actor
# the decoder and the perturbation network have the numbers 0 and 1, in either order.


def bcq_network(actor, k):
    """Return the parameters of the network number k in the actor."""
    return {name: actor[name] for name in (f"Hidden_{k}", f"Dense_{k}")}


def bcq_state(state):
    """Return the networks of bcq.py's TrainState."""
    found = numpy_state(state)
    actor = found.pop("actor")
    del found["actor_opt"]
    numbers = {"decoder": 1, "perturbation": 0}
    for name, k in numbers.items():
        params = bcq_network(actor, k)
        found[name] = params
        found[f"{name}_opt"] = init_adam(params)
    found["target_perturbation"] = found.pop("target_actor")
    return found


def bcq_number(params):
    """Return the number of the decoder or the perturbation network in its layers' names."""
    return 0 if "Hidden_0" in params else 1


def bcq_decode(params, observations, latents):
    """Return the decoder's actions tanh(network(s, z)), (B, A)."""
    k = bcq_number(params)
    x = pairs(observations, latents)
    return np.tanh(network(params, k, x))


def bcq_perturb(config, params, observations, actions):
    """Return a + phi tanh(network(s, a)), at most 1 in absolute value, (B, A)."""
    k = bcq_number(params)
    x = pairs(observations, actions)
    changes = np.tanh(network(params, k, x))
    return np.clip(actions + config.phi * changes, -1, 1)


def bcq_encode(config, params, observations, actions):
    """Return the means and log standard deviations of latents, and the latter unclipped."""
    x = pairs(observations, actions)
    means, raw = gaussian(params, x)
    log_stds = np.clip(raw, config.log_std_min, config.log_std_max)
    return means, log_stds, raw


def bcq_vae_loss(config, state, batch, noise):
    """Return the mean of (D(s, z) - a)^2 plus kl_coef times that of KL, with z = mu + sigma noise.

    KL(N(mu, sigma) || N(0, 1)) = (mu^2 + sigma^2 - 1) / 2 - log sigma.
    """
    means, log_stds, _ = bcq_encode(config, state["encoder"], batch.observations, batch.actions)
    latents = means + np.exp(log_stds) * noise
    error = bcq_decode(state["decoder"], batch.observations, latents) - batch.actions
    kl = (means**2 + np.exp(2 * log_stds) - 1) / 2 - log_stds
    return (error**2).mean() + config.kl_coef * kl.mean()


def bcq_vae_grads(config, state, batch, noise):
    """Return the VAE's loss and its gradients by the encoder's and the decoder's parameters.

    `noise` (B, 2 A) is drawn from a standard Gaussian. By z the decoder's error has a gradient g.
    By mu that of the loss is g + kl_coef mu / n, and by log sigma g sigma noise + kl_coef
    (sigma^2 - 1) / n where that isn't clipped, where n are the latents' entries.
    """
    loss = bcq_vae_loss(config, state, batch, noise)
    encoder = state["encoder"]
    mu, log_sigma, raw = bcq_encode(config, encoder, batch.observations, batch.actions)
    sigma = np.exp(log_sigma)
    latents = mu + sigma * noise

    decoder = state["decoder"]
    actions = bcq_decode(decoder, batch.observations, latents)
    by_actions = 2 * (actions - batch.actions) / actions.size
    by_outputs = by_actions * (1 - actions**2)
    x = pairs(batch.observations, latents)
    decoder_grads, by_inputs = network_back(decoder, bcq_number(decoder), x, by_outputs)
    state_dim = batch.observations.shape[1]
    g = by_inputs[:, state_dim:]

    n = mu.size
    by_mu = g + config.kl_coef * mu / n
    by_log_sigma = g * sigma * noise + config.kl_coef * (sigma**2 - 1) / n
    by_log_sigma = by_log_sigma * is_within(config, raw)
    x = pairs(batch.observations, batch.actions)
    encoder_grads = gaussian_back(encoder, x, by_mu, by_log_sigma)
    return loss, encoder_grads, decoder_grads


def bcq_update_vae(config, state, batch, noise):
    """Update the encoder and the decoder. SAM moves the decoder alone, for both gradients."""
    loss, encoder_grads, decoder_grads = bcq_vae_grads(config, state, batch, noise)
    if config.actor_sam and config.regularise in ("decoder", "both"):
        moved = ascend(state, "decoder", decoder_grads, config.actor_sam)
        _, encoder_grads, decoder_grads = bcq_vae_grads(config, moved, batch, noise)
    state = take_step(state, "encoder", encoder_grads, config.actor_learning_rate)
    state = take_step(state, "decoder", decoder_grads, config.actor_learning_rate)
    return state, {"vae_loss": loss}


def bcq_target(config, state, batch, noise):
    """Return r + gamma (1 - d) max_i [w min_k Q'_k(s', a_i) + (1 - w) max_k Q'_k(s', a_i)], (B,).

    `noise` (B, n, 2 A) is drawn from a standard Gaussian: the latents before they are clipped.
    """
    observations = batch.next_observations
    latents = np.clip(noise, -config.latent_clip, config.latent_clip)
    w = config.min_weight
    candidates = []
    for i in range(latents.shape[1]):
        actions = bcq_decode(state["decoder"], observations, latents[:, i])
        actions = bcq_perturb(config, state["target_perturbation"], observations, actions)
        x = pairs(observations, actions)
        values = both_values(state["target_critic"], x)
        smaller = np.minimum(*values)
        larger = np.maximum(*values)
        candidates.append(w * smaller + (1 - w) * larger)
    next_values = np.max(candidates, 0)
    return batch.rewards + config.gamma * (1 - batch.terminals) * next_values


def bcq_update_critics(config, state, batch, noise):
    """Update both critics by (Q(s, a) - target)^2."""
    target = bcq_target(config, state, batch, noise)
    return fit_critics(config, state, batch, target)


def bcq_perturbation_grads(config, state, batch, noise):
    """Return the loss -Q_1(s, a + xi(s, a)) and its gradients, where a is the decoder's action.

    The gradient by the network's outputs is -dQ/da phi (1 - tanh^2) / B, and 0 where the action
    is clipped.
    """
    latents = np.clip(noise, -config.latent_clip, config.latent_clip)
    decoded = bcq_decode(state["decoder"], batch.observations, latents)
    params = state["perturbation"]
    actions = bcq_perturb(config, params, batch.observations, decoded)
    x = pairs(batch.observations, actions)
    loss = -values_of(state["critic"], 0, x).mean()
    slope = action_slope(state["critic"], 0, batch.observations, actions)

    x = pairs(batch.observations, decoded)
    k = bcq_number(params)
    changes = np.tanh(network(params, k, x))
    is_inside = np.abs(actions) < 1
    by_changes = -slope * config.phi
    by_outputs = by_changes * (1 - changes**2) * is_inside / len(x)
    grads, _ = network_back(params, k, x, by_outputs)
    return loss, grads


def bcq_update_perturbation(config, state, batch, noise):
    """Return the state after an update of the perturbation network, and its loss."""
    loss, grads = bcq_perturbation_grads(config, state, batch, noise)
    if config.actor_sam and config.regularise in ("perturbation", "both"):
        moved = ascend(state, "perturbation", grads, config.actor_sam)
        _, grads = bcq_perturbation_grads(config, moved, batch, noise)
    state = take_step(state, "perturbation", grads, config.actor_learning_rate)
    return state, {"actor_loss": loss}


def bcq_update(config, state, batch, noises):
    """Update the VAE, the critics, the perturbation network by these, then the targets."""
    state, vae_info = bcq_update_vae(config, state, batch, noises["vae"])
    state, critic_info = bcq_update_critics(config, state, batch, noises["target"])
    state, actor_info = bcq_update_perturbation(config, state, batch, noises["actor"])
    state = move_target(state, "perturbation", config.tau)
    state = move_target(state, "critic", config.tau)
    return state, {**vae_info, **critic_info, **actor_info}


# --- CQL ---


def cql_policy(config, params, observations):
    """Return means and log standard deviations (B, A), and the latter before the clipping."""
    means, raw = gaussian(params, observations)
    raw = raw - 1
    log_stds = np.clip(raw, config.log_std_min, config.log_std_max)
    return means, log_stds, raw


def cql_policy_back(config, params, observations, by_mean, by_log_std):
    """Return the gradients by the parameters. A clipped log standard deviation has none."""
    _, _, raw = cql_policy(config, params, observations)
    by_log_std = by_log_std * is_within(config, raw)
    return gaussian_back(params, observations, by_mean, by_log_std)


def cql_log_prob(u, means, log_stds):
    """Return log pi of tanh(u), where log(1 - tanh(u)^2) is -2 log cosh(u)."""
    log_gaussian = stats.norm.logpdf(u, means, np.exp(log_stds))
    log_slope = -2 * np.log(np.cosh(u))
    return (log_gaussian - log_slope).sum(-1)


def cql_draw(config, params, observations, noise):
    """Return actions and log pi for standard noise (n, B, A)."""
    means, log_stds, _ = cql_policy(config, params, observations)
    u = means + np.exp(log_stds) * noise
    return np.tanh(u), cql_log_prob(u, means, log_stds)


def cql_samples(config, state, batch, draws):
    """Return the actions (3 n, B, A) and log-densities (3 n, B): uniform, pi(.|s), pi(.|s')."""
    uniform = draws["uniform"]
    num, size, dimensions = uniform.shape
    log_uniform = np.full((num, size), np.log(0.5) * dimensions)
    actor = state["actor"]
    now, log_now = cql_draw(config, actor, batch.observations, draws["now"])
    later, log_later = cql_draw(config, actor, batch.next_observations, draws["next"])
    actions = np.concatenate([uniform, now, later])
    log_probs = np.concatenate([log_uniform, log_now, log_later])
    return actions, log_probs


def cql_target(config, state, batch, next_actions):
    """Return scale r + shift + gamma (1 - d) Q', (B,), where Q' is min_k Q'_k(s', a').

    a' is the first of next_actions (n, B, A), or with max_backup the one with the largest Q'.
    """
    if not config.max_backup:
        next_actions = next_actions[:1]
    candidates = []
    for actions in next_actions:
        x = pairs(batch.next_observations, actions)
        values = both_values(state["target_critic"], x)
        candidates.append(np.minimum(*values))
    next_values = np.max(candidates, 0)
    rewards = config.reward_scale * batch.rewards + config.reward_shift
    return rewards + config.gamma * (1 - batch.terminals) * next_values


def cql_weight(config, state):
    """Return the gap's weight w: cql_weight, in the Lagrange form times alpha'."""
    if not config.lagrange_gap:
        return config.cql_weight
    alpha = np.exp(state["multiplier"]["log_alpha_prime"])
    return config.cql_weight * min(alpha, 1e6)


def cql_critic_loss(config, values, log_probs, target, weight):
    """Return a critic's loss, its mean gap, and its gradient by the values (1 + 3 n, B).

    The values are Q of the data's action, then Q_j of the samples of densities mu_j. The gap is
    log sum_j exp(Q_j - log mu_j) - Q. The loss is the mean of (Q - y)^2 + w gap.

    With p the softmax of Q_j - log mu_j, the gradient is w p_j by Q_j, and 2 (Q - y) - w by Q.
    The gap has none where it is clipped.
    """
    q = values[0]
    error = q - target
    logits = values[1:] - log_probs
    log_sum = np.log(np.exp(logits).sum(0))
    gap = log_sum - q
    p = softmax(logits.T).T
    is_inside = np.ones(len(q))
    if config.gap_clip:
        is_inside = gap > -config.gap_clip
        gap = np.maximum(gap, -config.gap_clip)
    loss = (error**2 + weight * gap).mean()
    by_q = 2 * error - weight * is_inside
    by_samples = weight * is_inside * p
    grad = np.concatenate([by_q[None], by_samples]) / len(q)
    return loss, gap.mean(), grad


def cql_update_critics(config, state, batch, actions, log_probs):
    """Return the state after an update of both critics, and the means of their losses and gaps."""
    num = config.n_actions
    target = cql_target(config, state, batch, actions[2 * num :])
    weight = cql_weight(config, state)
    judged = [batch.actions, *actions]
    x = np.concatenate([pairs(batch.observations, own) for own in judged])
    grads = {}
    losses = []
    gaps = []
    for k in range(2):
        values = values_of(state["critic"], k, x).reshape(len(judged), -1)
        loss, gap, grad = cql_critic_loss(config, values, log_probs, target, weight)
        own, _ = network_back(state["critic"], k, x, grad.reshape(-1, 1))
        grads.update(own)
        losses.append(loss)
        gaps.append(gap)
    state = take_step(state, "critic", grads, config.critic_learning_rate)
    return state, {"critic_loss": np.mean(losses), "gap": np.mean(gaps)}


def cql_update_multiplier(config, state, gap):
    """Return the state after a step of log alpha' on -alpha' w (gap - tau).

    From 1e6 on alpha' is clipped, and has no gradient.
    """
    alpha = np.exp(state["multiplier"]["log_alpha_prime"])
    grad = -alpha * config.cql_weight * (gap - config.lagrange_gap)
    grad = grad * (alpha < 1e6)
    return take_step(state, "multiplier", {"log_alpha_prime": grad}, config.critic_learning_rate)


def cql_actor_loss(config, state, batch, noise):
    """Return the mean of alpha log pi(a|s) - min_k Q_k(s, a), of a drawn by the noise (B, A).

    Also returns its gradients by a's u, a = tanh(u), and by log std with u held fixed. log pi has
    2 a and -1 there, since (u - mean) / std is the noise.
    """
    alpha = np.exp(state["temperature"]["log_alpha"])
    drawn, log_probs = cql_draw(config, state["actor"], batch.observations, noise[None])
    actions = drawn[0]
    critic = state["critic"]
    values = both_values(critic, pairs(batch.observations, actions))
    slopes = [action_slope(critic, k, batch.observations, actions) for k in range(2)]
    q, slope = smaller_q(values, slopes)
    size = len(actions)
    loss = (alpha * log_probs[0] - q).mean()
    by_u = (alpha * 2 * actions - slope * (1 - actions**2)) / size
    by_log_std = -alpha * np.ones_like(actions) / size
    return loss, by_u, by_log_std


def cql_cloning_loss(config, state, batch, noise):
    """Return the mean of alpha log pi(a|s) - log pi(a_data|s), and its gradients as above.

    The data's have theirs by the mean and log std: z / std, and z^2 - 1.
    """
    alpha = np.exp(state["temperature"]["log_alpha"])
    drawn, log_probs = cql_draw(config, state["actor"], batch.observations, noise[None])
    means, log_stds, _ = cql_policy(config, state["actor"], batch.observations)
    stds = np.exp(log_stds)
    inner = np.clip(batch.actions, -1 + 1e-5, 1 - 1e-5)
    u = np.arctanh(inner)
    z = (u - means) / stds
    data_log_probs = cql_log_prob(u, means, log_stds)
    loss = (alpha * log_probs[0] - data_log_probs).mean()
    size = len(z)
    by_u = alpha * 2 * drawn[0] / size
    by_mean = -z / stds / size
    by_log_std = -alpha / size - (z**2 - 1) / size
    return loss, by_u, by_log_std, by_mean


def cql_actor_grads(config, state, batch, noise):
    """Return the actor's loss and its gradients by the parameters. u = mean + std noise."""
    by_mean = 0
    if state["actor_opt"][2] < config.bc_steps:
        loss, by_u, by_log_std, by_mean = cql_cloning_loss(config, state, batch, noise)
    else:
        loss, by_u, by_log_std = cql_actor_loss(config, state, batch, noise)
    params = state["actor"]
    _, log_stds, _ = cql_policy(config, params, batch.observations)
    by_mean = by_u + by_mean
    by_log_std = by_log_std + by_u * np.exp(log_stds) * noise
    return loss, cql_policy_back(config, params, batch.observations, by_mean, by_log_std)


def cql_update_actor(config, state, batch, noise):
    """Return the state after an update of the actor, and its loss."""
    loss, grads = sam_grads(cql_actor_grads, config, state, batch, noise)
    state = take_step(state, "actor", grads, config.actor_learning_rate)
    return state, {"actor_loss": loss}


def cql_update_temperature(config, state, log_probs):
    """Return the state after a step of log alpha on -log alpha (log pi - |A|)."""
    dimensions = state["actor"]["Dense_0"]["bias"].size
    grad = dimensions - log_probs.mean()
    return take_step(state, "temperature", {"log_alpha": grad}, config.actor_learning_rate)


def cql_update(config, state, batch, draws):
    """Update the critics, alpha', the actor by the new critics, alpha, and the critics' target.

    `draws` are random numbers by their names, (n, B, A), and of "actor" (B, A).
    """
    num = config.n_actions
    actions, log_probs = cql_samples(config, state, batch, draws)
    state, critic_info = cql_update_critics(config, state, batch, actions, log_probs)
    if config.lagrange_gap:
        state = cql_update_multiplier(config, state, critic_info["gap"])
    state, actor_info = cql_update_actor(config, state, batch, draws["actor"])
    state = cql_update_temperature(config, state, log_probs[num : 2 * num])
    state = move_target(state, "critic", config.tau)
    return state, {**critic_info, **actor_info}
