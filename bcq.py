"""BCQ with a regularised actor.

The paper: "The Role of Deep Learning Regularizations on Actors in Offline RL" (arXiv 2409.07606).
It leaves open whether the gain depends on the algorithm. BCQ is a check of that.
The algorithm: "Off-Policy Deep Reinforcement Learning without Exploration" (BCQ, arXiv 1812.02900),
for continuous actions. The original is its authors' code, sfujim/BCQ.

    python bcq.py --dataset_name hopper-medium-v2  # the baseline, with the original's values
    python bcq.py --dataset_name hopper-medium-v2 --actor_ln true --actor_dropout 0.1
    python bcq.py --dataset_name hopper-medium-v2 --regularisers DO --regularise decoder

The actor is two networks. The decoder of a variational autoencoder (VAE) clones the data's
actions. The perturbation network then changes an action by at most phi, to raise Q. `regularise`
names the network on which the actor's regularisers act. They never act on the encoder.

In evaluation the policy takes the best of many actions. The analysis looks at a simpler one, with
one action, at the latent 0. Features, ranks, dead neurons and the actor's loss are those of the
network in `regularise`, or with both of the perturbation network. All else is of both networks
together. Only the overestimation is of the policy that is evaluated.

Shapes: N steps of the data, B of a batch, E episodes; S numbers in a state, A in an action; F
features, I inputs, L numbers in a latent, n candidates. A prime marks what belongs to the next
step, or to a target network.

Two CPU cores make about 35 updates a second at batch 100 (Hopper's sizes).
"""

import signal
from dataclasses import dataclass, replace
from typing import NamedTuple, Optional, Tuple

if __name__ == "__main__":  # Ctrl-C shows no traceback in the imports, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from harness.config import (
    check,
    given_values,
    parse,
    with_regularisers,
)
from harness.datasets import (
    domain,
    episode_ends,
    episode_returns,
    load_dataset,
    with_checksum,
)
from harness.errors import UserError, one_line_errors
from harness.evaluation import evaluate, make_envs
from harness.inside import (
    NUM_COMPARED,
    action_distance,
    feature_statistics,
    jacobian_norm,
    make_samples,
    weight_norms,
    with_ranks,
)
from harness.members import init_states, is_on, over_members
from harness.policies import evaluate_run, host_policy
from harness.run import Run

NAME = "BCQ"  # by this line the tools find the script

# --- Config ---


@dataclass(frozen=True)
class Config:
    """Each field is a flag. None means the default in its comment, or else the original's."""

    # Data
    dataset_name: str = "halfcheetah-medium-replay-v2"  # D4RL's name of the dataset
    dataset_path: Optional[str] = None  # file in D4RL's HDF5 format; default: D4RL's own
    dataset_sha256: Optional[str] = None  # checksum that this file must have; default: its own
    normalize_states: bool = False  # normalise states to mean 0 and standard deviation 1
    normalize_reward: Optional[bool] = None  # rewards x 100 (AntMaze) or x 1000 / range of returns
    validation_frac: float = 0.0  # fraction of episodes held out; the paper's tuning uses 0.05
    validation_seed: Optional[int] = None  # picks the held-out episodes; default: the file's last
    # Algorithm
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # step size of the targets' Polyak average
    batch_size: int = 100  # transitions per update
    actor_learning_rate: float = 1e-3  # of the VAE and the perturbation network
    critic_learning_rate: float = 1e-3  # learning rate of the critics' Adam
    kl_coef: float = 0.5  # weight of the KL divergence in the VAE's loss
    log_std_min: float = -4.0  # lower bound of the encoder's log standard deviation
    log_std_max: float = 15.0  # upper bound of the encoder's log standard deviation
    latent_clip: float = 0.5  # largest absolute value of the latents that actions are sampled from
    phi: float = 0.05  # the most by which the perturbation network changes an action's entry
    min_weight: float = 0.75  # BCQ's lambda: the smaller critic's weight in targets
    n_candidates: int = 10  # sampled actions for each next state, of which targets take the best
    n_eval_candidates: int = 100  # sampled actions for each state in evaluation; the paper: 10
    rl_start: int = 0  # first updates, in which the VAE alone is trained
    # Networks
    hidden_dim: Optional[int] = None  # units in a hidden layer; default: 400 (GroupNorm: 384)
    last_hidden_dim: Optional[int] = None  # of the last one; default: hidden_dim, else 300 (288)
    vae_hidden_dim: Optional[int] = None  # of the VAE's; default: hidden_dim, else 750 (736)
    actor_layers: int = 2  # hidden layers of the encoder, the decoder, the perturbation network
    critic_layers: int = 2  # hidden layers of each critic
    # Regularisers of the actor; 0 or false is exactly off
    regularise: str = "perturbation"  # on which they act: decoder, perturbation or both
    regularisers: str = "none"  # names joined by +, such as DO+LN
    actor_dropout: float = 0.0  # DO: dropout rate in the actor's loss
    actor_wd: float = 0.0  # L2, L1, EN: decoupled weight decay, multiplied by the learning rate
    actor_l1_ratio: float = 0.0  # fraction of L1 in actor_wd: 0 is L2, 1 is L1, 0.5 the elastic net
    actor_wd_kernels_only: bool = False  # spare biases and normalisation from actor_wd
    actor_ln: bool = False  # LN: LayerNorm
    actor_fn: bool = False  # FN: FeatureNorm, a LayerNorm without scale and bias
    actor_gn: bool = False  # GN: GroupNorm with 32 groups
    actor_bn: bool = False  # BN: BatchNorm
    actor_sn: bool = False  # SN: SpectralNorm of the last hidden Dense
    actor_rms: bool = False  # RMS: RMSNorm; beyond the paper
    actor_input_noise: float = 0.0  # InN: std of noise on the states in the actor's loss
    actor_bc_noise: float = 0.0  # BCN: std of noise on the actions cloned, or judged by Q
    actor_grad_noise: float = 0.0  # GrN: noise on the gradient; its std decays by (1 + t)^-0.55
    actor_sam: float = 0.0  # SAM: radius of sharpness-aware minimisation; beyond the paper
    actor_lr_decay: str = "none"  # none, cosine (to 0), linear (to 1/10), exponential (to 0.99)
    # Regularisers of the critics
    critic_dropout: float = 0.0  # dropout rate in the critics' loss
    critic_wd: float = 0.0  # decoupled weight decay of the critics
    critic_l1_ratio: float = 0.0  # fraction of L1 in critic_wd
    critic_wd_kernels_only: bool = False  # spare biases and normalisation from critic_wd
    critic_ln: bool = False  # LayerNorm in the critics
    critic_fn: bool = False  # FeatureNorm in the critics
    critic_gn: bool = False  # GroupNorm with 32 groups in the critics
    critic_bn: bool = False  # BatchNorm in the critics
    critic_sn: bool = False  # SpectralNorm of the critics' last hidden Dense
    critic_rms: bool = False  # RMSNorm in the critics
    critic_grad_noise: float = 0.0  # noise on the critics' gradient, as actor_grad_noise
    critic_lr_decay: str = "none"  # of the critics' learning rate, as actor_lr_decay
    # Run
    seed: int = 0  # of initialisation, batches, noise and evaluation
    num_seeds: int = 1  # seeds trained at once: seed, seed + 1, ...
    num_updates: int = 1_000_000  # updates in all
    log_every: int = 1000  # updates between rows of train.csv; one compiled scan
    eval_every: Optional[int] = None  # updates between evaluations; default 10,000 (AntMaze 50,000)
    eval_episodes: Optional[int] = None  # episodes in an evaluation; default 10 (AntMaze 100)
    eval_noise: Tuple[Tuple[float, float], ...] = ((0.2, 0.0), (0.0, 0.05))  # on actions, states
    analysis: bool = True  # measure dead neurons, ranks and errors in each evaluation
    deterministic: bool = False  # be bitwise reproducible on a GPU, too; slower
    results: str = "results"  # folder in which each run has its directory
    evaluate: Optional[str] = None  # directory of a run to evaluate; nothing is trained
    video: Optional[str] = None  # file for a video of an evaluated episode, .mp4 or .gif


BOUNDS = {  # by field; integers that aren't listed must be 1 or more, floats 0 or more
    "seed": "0 or more",
    "validation_seed": "0 or more",
    "validation_frac": "at least 0 and below 1",
    "gamma": "between 0 and 1",
    "tau": "between 0 and 1",
    "log_std_min": "any number",
    "log_std_max": "any number",
    "min_weight": "between 0 and 1",
    "rl_start": "0 or more",
    "actor_dropout": "at least 0 and below 1",
    "actor_l1_ratio": "between 0 and 1",
    "critic_dropout": "at least 0 and below 1",
    "critic_l1_ratio": "between 0 and 1",
}

# Floats that uncompiled code reads, too. Runs trained in one program must agree in these.
HOST_FLOATS = ("validation_frac",)


def constraints(config):
    """Return {requirement: whether it holds}. The first that doesn't is the error's message."""
    in_vae, in_others = group_norms(config)
    widths = [config.vae_hidden_dim] if in_vae else []
    widths += [config.hidden_dim, config.last_hidden_dim] if in_others else []
    schedules = ("none", "cosine", "linear", "exponential")
    return {
        "actor_lr_decay and critic_lr_decay must be none, cosine, linear or exponential": (
            config.actor_lr_decay in schedules and config.critic_lr_decay in schedules
        ),
        "networks with GroupNorm need widths of 64, 96, ...: 32 groups of two units or more": (
            all(width % 32 == 0 and width > 32 for width in widths)
        ),
        "log_std_min must be below log_std_max": config.log_std_min < config.log_std_max,
        "regularise must be decoder, perturbation or both": (
            config.regularise in ("decoder", "perturbation", "both")
        ),
        "rl_start must be below num_updates": config.rl_start < config.num_updates,
    }


# --- Data ---


def make_dataset(config, raw):
    """Split a file's steps, by episode, into training and held-out ones; scale rewards and states.

    Returns a dictionary: observations (N, S), normalised; actions (N, A); rewards (N,), scaled, and
    the factor reward_scale; terminals (N,); ends (N,), the last step of each episode; train and
    validation, the indices of the steps that are transitions; mean and std of the states, (S,) or
    the scalars 0 and 1.
    """
    ends = episode_ends(config.dataset_name, raw)
    ends[-1] = True
    held_out = hold_out(config, ends)
    # As in D4RL's qlearning_dataset, a step at a timeout is no transition: its s' isn't known.
    usable = ~raw["timeouts"]
    usable[-1] = False
    train = np.flatnonzero(usable & ~held_out).astype(np.int32)
    validation = np.flatnonzero(usable & held_out).astype(np.int32)
    if len(train) == 0:
        raise UserError("there is no transition to train on")
    print(f"training on {np.sum(ends & ~held_out)} episodes, {len(train)} transitions")
    if len(validation) > 0:
        print(f"held out: {np.sum(ends & held_out)} episodes, {len(validation)} transitions")

    scale = reward_scale(config, raw) if config.normalize_reward else np.float32(1)
    observations = raw["observations"]
    mean = np.float32(0)
    std = np.float32(1)
    if config.normalize_states:
        mean = observations[train].mean(0, dtype=np.float64).astype(np.float32)
        std = observations[train].std(0, dtype=np.float64).astype(np.float32) + np.float32(1e-3)
        observations = (observations - mean) / std
    return dict(
        observations=observations,
        actions=raw["actions"],
        rewards=scale * raw["rewards"],
        reward_scale=scale,
        terminals=raw["terminals"],
        ends=ends,
        train=train,
        validation=validation,
        mean=mean,
        std=std,
    )


def hold_out(config, ends):
    """Return which steps (N,) belong to held-out episodes, given where the episodes end (N,)."""
    episode = np.cumsum(ends) - ends  # the number of each step's episode
    num_episodes = episode[-1] + 1
    num_held_out = round(config.validation_frac * num_episodes)
    if config.validation_frac > 0 and not 0 < num_held_out < num_episodes:
        raise UserError(
            f"validation_frac {config.validation_frac} holds out {num_held_out} of {num_episodes} "
            "episodes; hold out at least one, and not all"
        )
    order = np.arange(num_episodes)
    if config.validation_seed is not None:
        np.random.default_rng(config.validation_seed).shuffle(order)
    return np.isin(episode, order[num_episodes - num_held_out :])


def reward_scale(config, raw):
    """Return 100 on AntMaze, else 1000 / (highest - lowest return of an episode), as IQL does.

    Held-out episodes count, too.
    """
    if domain(config.dataset_name) == "antmaze":
        return np.float32(100)
    return_range = np.ptp(episode_returns(config.dataset_name, raw))
    if return_range == 0:
        raise UserError("all episodes have the same return; use --normalize_reward false")
    return np.float32(1000 / return_range)


class Transitions(NamedTuple):
    observations: jax.Array  # s (B, S)
    actions: jax.Array  # a (B, A)
    rewards: jax.Array  # r (B,)
    next_observations: jax.Array  # s' (B, S), of the next step; without meaning where d is 1
    next_actions: jax.Array  # a' (B, A), of the next step; a itself where d is 1
    terminals: jax.Array  # d (B,), 0.0 or 1.0


def transitions(data, index):
    """Return the transitions of the steps `index` (B,). The next step is the next row."""
    terminals = data["terminals"][index]
    next_index = jnp.where(terminals, index, index + 1)
    return Transitions(
        observations=data["observations"][index],
        actions=data["actions"][index],
        rewards=data["rewards"][index],
        next_observations=data["observations"][index + 1],
        next_actions=data["actions"][next_index],
        terminals=terminals.astype(np.float32),
    )


# --- Regularised layers ---

# Test a strength by `is_on(config.x)`, never by `if config.x` (see harness/members.py):
# - In compiled code a float of the config is traced, so that its value isn't known there.
# - A 0 is not traced. Its term is left out of the program.
# - But if runs that are trained together have 0 and other strengths, then the 0 is traced, too. Its
#   term is compiled and must change nothing.
# - Bools, integers and strings are never traced.
# - Fields on which no program depends, such as `seed`, are None in compiled code.


class ActorHidden(nn.Module):
    """The actor's hidden layers, inputs (B, I) to features (B, F).

    Each layer is a Dense and a ReLU. Then follow, where they are on and in this order, LayerNorm,
    FeatureNorm, GroupNorm, BatchNorm, RMSNorm and dropout. SpectralNorm acts on the Dense of the
    last hidden layer.
    """

    config: Config

    @nn.compact
    def __call__(self, x, train):
        config = self.config
        for layer in range(config.actor_layers):
            is_last = layer == config.actor_layers - 1
            dense = hidden_dense(config, is_last)  # see "Networks"
            if config.actor_sn and is_last:
                x = nn.SpectralNorm(dense)(x, update_stats=train)
            else:
                x = dense(x)
            if is_last:
                self.sow("intermediates", "preactivations", x)  # for `analyse`
            x = nn.relu(x)
            if config.actor_ln:
                x = nn.LayerNorm()(x)
            if config.actor_fn:
                x = nn.LayerNorm(use_scale=False, use_bias=False)(x)
            if config.actor_gn:
                x = nn.GroupNorm(num_groups=32)(x)
            if config.actor_bn:
                x = nn.BatchNorm(use_running_average=not train)(x)
            if config.actor_rms:
                x = nn.RMSNorm()(x)
            if train and is_on(config.actor_dropout):
                x = dropout(self.make_rng("dropout"), config.actor_dropout, x)
        return x


class CriticHidden(nn.Module):
    """A critic's hidden layers, inputs (B, I) to features (B, F), with its own regularisers."""

    config: Config

    @nn.compact
    def __call__(self, x, train):
        config = self.config
        for layer in range(config.critic_layers):
            is_last = layer == config.critic_layers - 1
            dense = hidden_dense(config, is_last)
            if config.critic_sn and is_last:
                x = nn.SpectralNorm(dense)(x, update_stats=train)
            else:
                x = dense(x)
            x = nn.relu(x)
            if config.critic_ln:
                x = nn.LayerNorm()(x)
            if config.critic_fn:
                x = nn.LayerNorm(use_scale=False, use_bias=False)(x)
            if config.critic_gn:
                x = nn.GroupNorm(num_groups=32)(x)
            if config.critic_bn:
                x = nn.BatchNorm(use_running_average=not train)(x)
            if config.critic_rms:
                x = nn.RMSNorm()(x)
            if train and is_on(config.critic_dropout):
                x = dropout(self.make_rng("dropout"), config.critic_dropout, x)
        return x


def dropout(key, rate, x):
    """Drop units at a rate that may be traced, which nn.Dropout's may not."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def init_network(network, key, *inputs):
    """Return a network's variables: params, and batch_stats (of BatchNorm and SpectralNorm)."""
    return {"batch_stats": {}, **network.init(key, *inputs, train=False)}


def forward(network, variables, *inputs):
    """Return the output as in evaluation: without dropout, with running statistics."""
    return network.apply(variables, *inputs, train=False)


def forward_train(network, variables, key, *inputs):
    """Return the output in training, and the variables with updated running statistics."""
    output, updated = network.apply(
        variables, *inputs, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
    )
    return output, {**variables, **updated}


# --- Optimiser ---


def lr_schedule(learning_rate, decay, num_steps):
    """Return a schedule of the learning rate over num_steps, or the constant rate for none.

    cosine ends at 0, linear at a tenth, exponential at 0.99 of it (as in the paper's code).
    """
    if decay == "cosine":
        return optax.cosine_decay_schedule(learning_rate, num_steps)
    if decay == "linear":
        return optax.linear_schedule(learning_rate, learning_rate / 10, num_steps)
    if decay == "exponential":
        return optax.exponential_decay(learning_rate, num_steps, 0.99)
    return learning_rate


def make_optimizer(learning_rate, wd, l1_ratio, kernels_only):
    """Return Adam with decoupled weight decay (the paper's L2, L1 and elastic net).

    theta -= lr (step + wd ((1 - rho) theta + rho sign theta)), where step is Adam's and rho the L1
    ratio. For rho = 0 this is AdamW (arXiv 1711.05101).
    """

    def add_decay(updates, params):
        def add(path, update, param):
            if kernels_only and path[-1].key != "kernel":
                return update
            decay = param
            if is_on(l1_ratio):
                decay = (1 - l1_ratio) * param + l1_ratio * jnp.sign(param)
            return update + wd * decay

        return jax.tree.map_with_path(add, updates, params)

    return optax.chain(
        optax.scale_by_adam(),  # the first, since `optimize` reads its count
        optax.stateless(add_decay) if is_on(wd) else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def ascend(params, grads, radius):
    """Return the parameters at a distance of `radius` up the gradient (SAM, arXiv 2010.01412).

    To first order, no point within this distance has a larger loss. SAM's step uses the gradient
    at these parameters.
    """
    scale = radius / jnp.maximum(optax.tree.norm(grads), 1e-12)  # the gradient may be 0
    return jax.tree.map(lambda param, grad: param + scale * grad, params, grads)


def optimize(optimizer, variables, opt_state, grads, noise, key):
    """Take one step; return the network's variables and the optimiser's state.

    Before Adam the gradient gets Gaussian noise of standard deviation noise / (1 + t)^0.55, where
    t counts the network's own steps, as in the paper's code. arXiv 1511.06807 divides the variance
    by (1 + t)^0.55, not the standard deviation.
    """
    if is_on(noise):
        adam = opt_state[0]
        scale = noise / (1 + adam.count) ** 0.55
        draws = optax.tree.random_like(key, grads)
        grads = jax.tree.map(lambda grad, draw: grad + scale * draw, grads, draws)
    params = variables["params"]
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return {**variables, "params": params}, opt_state


# --- Networks ---


def plain_dense(size, name=None):
    """Return a Dense: weights uniform within +-1 / sqrt(fan_in), biases 0.

    PyTorch, and so the original, draws the biases from this range, too.
    """
    init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return nn.Dense(size, kernel_init=init, name=name)


def hidden_dense(config, is_last):
    """Return a hidden Dense. The last one has a width of its own."""
    return plain_dense(config.last_hidden_dim if is_last else config.hidden_dim)


def network_config(config, network):
    """Return the config of a network: "encoder", "decoder" or "perturbation".

    Without regularisers of the actor, unless `regularise` has them act on this network. With the
    VAE's widths in the VAE, and without rl_start there: it learns from the first update on.
    """
    is_regularised = network != "encoder" and config.regularise in (network, "both")
    if not is_regularised:
        names = [name for name in vars(config) if is_of_regulariser(name)]
        config = replace(config, **{name: getattr(type(config), name) for name in names})
    if network != "perturbation":
        width = config.vae_hidden_dim
        config = replace(config, hidden_dim=width, last_hidden_dim=width, rl_start=0)
    return config


def is_of_regulariser(name):
    """Return whether a field of the config regularises the actor."""
    return name.startswith("actor_") and name not in ("actor_learning_rate", "actor_layers")


# The names of each network's layers in the actor: its hidden layers, and its last Dense
LAYERS = {"perturbation": ("Hidden_0", "Dense_0"), "decoder": ("Hidden_1", "Dense_1")}


def latent_dim(action_dim):
    """Return the number of entries of a latent."""
    return 2 * action_dim


class Encoder(nn.Module):
    """The VAE's encoder: states (B, S) and actions (B, A) to means and log stds of latents."""

    config: Config

    @nn.compact
    def __call__(self, observations, actions, train):
        config = network_config(self.config, "encoder")
        inputs = jnp.concatenate([observations, actions], -1)
        features = ActorHidden(config, name="Hidden_0")(inputs, train)
        means = plain_dense(latent_dim(actions.shape[-1]))(features)
        log_stds = plain_dense(latent_dim(actions.shape[-1]))(features)
        return means, jnp.clip(log_stds, config.log_std_min, config.log_std_max)


class Decoder(nn.Module):
    """The VAE's decoder: states (B, S) and latents (B, 2 A) to actions (B, A) in (-1, 1)."""

    config: Config
    action_dim: int

    @nn.compact
    def __call__(self, observations, latents, train):
        config = network_config(self.config, "decoder")
        hidden, last = LAYERS["decoder"]
        inputs = jnp.concatenate([observations, latents], -1)
        features = ActorHidden(config, name=hidden)(inputs, train)
        return nn.tanh(plain_dense(self.action_dim, last)(features))


class Perturbation(nn.Module):
    """States (B, S) and actions (B, A) to actions that differ by at most phi, in [-1, 1]."""

    config: Config
    action_dim: int

    @nn.compact
    def __call__(self, observations, actions, train):
        config = network_config(self.config, "perturbation")
        hidden, last = LAYERS["perturbation"]
        inputs = jnp.concatenate([observations, actions], -1)
        features = ActorHidden(config, name=hidden)(inputs, train)
        changes = config.phi * nn.tanh(plain_dense(self.action_dim, last)(features))
        return jnp.clip(actions + changes, -1, 1)


class Actor(nn.Module):
    """The decoder and the perturbation network, at the latent 0: states (B, S) to actions (B, A).

    share_scope puts the layers of both networks side by side in its variables, without a level for
    each. So Decoder and Perturbation run on these variables, too: each reads its own layers.
    """

    config: Config
    action_dim: int

    def setup(self):
        self.decoder = Decoder(self.config, self.action_dim)
        self.perturbation = Perturbation(self.config, self.action_dim)
        nn.share_scope(self, self.decoder)
        nn.share_scope(self, self.perturbation)

    def __call__(self, observations, train):
        latents = jnp.zeros((*observations.shape[:-1], latent_dim(self.action_dim)))
        actions = self.decoder(observations, latents, train)
        return self.perturbation(observations, actions, train)


class Critics(nn.Module):
    """Critics: states (B, S) and actions (B, A) to Q values (num_critics, B).

    There are two. With num_critics=1 only the first is evaluated, by its part of the variables.
    """

    config: Config
    num_critics: int = 2

    @nn.compact
    def __call__(self, observations, actions, train):
        inputs = jnp.concatenate([observations, actions], -1)
        outputs = []
        for k in range(self.num_critics):
            features = CriticHidden(self.config, name=f"Hidden_{k}")(inputs, train)
            outputs.append(plain_dense(1)(features))
        return jnp.stack(outputs)[..., 0]


def own_params(actor, network):
    """Return the parameters of the decoder or the perturbation network in the actor's variables."""
    return {name: actor["params"][name] for name in LAYERS[network]}


def with_params(actor, params):
    """Return the actor's variables with other parameters of one of its networks."""
    return {**actor, "params": {**actor["params"], **params}}


# --- Candidate actions ---


def sample_latents(config, key, shape):
    """Return latents of a shape (..., L), from which actions are sampled."""
    return jnp.clip(jax.random.normal(key, shape), -config.latent_clip, config.latent_clip)


def candidates(config, action_dim, actor, perturbation, observations, latents):
    """Return rows (B n, S) of the states (B, S), and an action (B n, A) for each latent (B, n, L).

    The decoder in the variables `actor` makes the actions. The perturbation network in the
    variables `perturbation` then changes them.
    """
    rows = jnp.repeat(observations, latents.shape[1], 0)
    latents = latents.reshape(len(rows), -1)
    actions = forward(Decoder(config, action_dim), actor, rows, latents)
    return rows, forward(Perturbation(config, action_dim), perturbation, rows, actions)


def best_candidates(config, actor, data, observations):
    """Return the best actions (B, A) by Q_1 of n_eval_candidates each (BCQ, equation 11).

    The states (B, S) are as the environment gives them. A state's latents are drawn by a key of
    its bits, the same for all seeds. So the policy is deterministic, where the original draws new
    latents at each step. A state that differs by rounding has other latents.
    """
    action_dim = data["actions"].shape[-1]

    def draw(observation):
        shape = (config.n_eval_candidates, latent_dim(action_dim))
        return sample_latents(config, state_key(observation), shape)

    latents = jax.vmap(draw)(observations)
    states = (observations - data["mean"]) / data["std"]
    rows, actions = candidates(config, action_dim, actor, actor, states, latents)
    values = forward(Critics(config, num_critics=1), actor["critic"], rows, actions)[0]
    best = values.reshape(latents.shape[:2]).argmax(1)
    actions = actions.reshape(*latents.shape[:2], -1)
    return jnp.take_along_axis(actions, best[:, None, None], 1)[:, 0]


def state_key(observation):
    """Return a random key that follows from the bits of a state (S,)."""
    bits = jax.lax.bitcast_convert_type(observation.astype(jnp.float32), jnp.uint32)

    def fold(key, word):
        return jax.random.fold_in(key, word), None

    key, _ = jax.lax.scan(fold, jax.random.key(0), bits)
    return key


# --- Losses and update ---


class TrainState(NamedTuple):
    actor: dict  # of decoder and perturbation network; and a copy of the critics, for `policy`
    decoder_opt: optax.OptState
    actor_opt: optax.OptState  # of the perturbation network
    target_actor: dict  # of the perturbation network
    encoder: dict
    encoder_opt: optax.OptState
    critic: dict  # of both critics
    target_critic: dict
    critic_opt: optax.OptState
    key: jax.Array


def q_values(config, state, observations, actions):
    """Return min_k Q_k(s, a), (B,), for normalised states (B, S) and actions (B, A)."""
    return forward(Critics(config), state.critic, observations, actions).min(0)


def vae_loss(params, config, state, batch, keys):
    """Return ||D(s, z) - a||^2 / |A| + kl_coef KL(N(mu, sigma) || N(0, 1)) / |z|.

    It is a mean over the batch, where mu and sigma are the encoder's and z is drawn from
    N(mu, sigma). The decoder D may be regularised. `params` are the encoder's and the decoder's.
    Also returns the actor's variables and scalars to log.
    """
    dropout_key, input_key, objective_key, latent_key = keys
    own = network_config(config, "decoder")
    encoder = {**state.encoder, "params": params["encoder"]}
    means, log_stds = forward(Encoder(config), encoder, batch.observations, batch.actions)
    latents = means + jnp.exp(log_stds) * jax.random.normal(latent_key, means.shape)
    observations = batch.observations
    if is_on(own.actor_input_noise):
        noise = jax.random.normal(input_key, observations.shape)
        observations = observations + own.actor_input_noise * noise
    bc_targets = batch.actions
    if is_on(own.actor_bc_noise):
        noise = jax.random.normal(objective_key, bc_targets.shape)
        bc_targets = bc_targets - own.actor_bc_noise * noise
    decoder = Decoder(config, batch.actions.shape[-1])
    actor = with_params(state.actor, params["decoder"])
    actions, actor = forward_train(decoder, actor, dropout_key, observations, latents)
    loss, info = vae_objective(config, actions, bc_targets, means, log_stds)
    return loss, (actor, info)


def vae_objective(config, actions, bc_targets, means, log_stds):
    """Return the VAE's loss for the decoder's actions (B, A), and scalars to log."""
    bc = jnp.mean((actions - bc_targets) ** 2)
    kl = -0.5 * jnp.mean(1 + 2 * log_stds - means**2 - jnp.exp(2 * log_stds))
    loss = bc + config.kl_coef * kl
    return loss, {"vae_loss": loss, "bc_loss": bc, "kl_loss": kl}


def critic_target(config, state, batch, key):
    """Return r + gamma (1 - d) max_i [w min_k Q'_k(s', a_i) + (1 - w) max_k Q'_k(s', a_i)], (B,).

    (BCQ, equation 13.) The weight w is min_weight, the paper's lambda. The a_i are n_candidates
    actions of the decoder, which the target of the perturbation network changes.
    """
    batch_size, action_dim = batch.actions.shape
    shape = (batch_size, config.n_candidates, latent_dim(action_dim))
    latents = sample_latents(config, key, shape)
    rows, actions = candidates(
        config, action_dim, state.actor, state.target_actor, batch.next_observations, latents
    )
    values = forward(Critics(config), state.target_critic, rows, actions)
    values = config.min_weight * values.min(0) + (1 - config.min_weight) * values.max(0)
    next_values = values.reshape(batch_size, config.n_candidates).max(1)
    return batch.rewards + config.gamma * (1 - batch.terminals) * next_values


def critic_loss(params, config, state, batch, target, key):
    """Return the squared error of both Q(s, a) to the target.

    The loss is the sum over both critics. The logged one is their mean. Also returns the critics'
    variables and scalars to log.
    """
    critic = {**state.critic, "params": params}
    values, critic = forward_train(Critics(config), critic, key, batch.observations, batch.actions)
    losses = (values - target) ** 2
    info = {"critic_loss": losses.mean(), "q": values.mean()}
    return losses.mean(1).sum(), (critic, info)


def actor_loss(params, config, state, batch, keys):
    """Return -Q_1(s, a + xi(s, a)), where a is an action of the decoder (BCQ, equation 12).

    It is a mean over the batch. The perturbation network xi may be regularised; `params` are its
    own. Noise on the objective is on the actions that Q judges. The decoder and the critics see
    clean states. Also returns the actor's variables and scalars to log.
    """
    dropout_key, input_key, objective_key, latent_key = keys
    own = network_config(config, "perturbation")
    batch_size, action_dim = batch.actions.shape
    latents = sample_latents(config, latent_key, (batch_size, latent_dim(action_dim)))
    decoder = Decoder(config, action_dim)
    actions = forward(decoder, state.actor, batch.observations, latents)
    observations = batch.observations
    if is_on(own.actor_input_noise):
        noise = jax.random.normal(input_key, observations.shape)
        observations = observations + own.actor_input_noise * noise
    perturbation = Perturbation(config, action_dim)
    actor = with_params(state.actor, params)
    actions, actor = forward_train(perturbation, actor, dropout_key, observations, actions)
    if is_on(own.actor_bc_noise):
        noise = jax.random.normal(objective_key, actions.shape)
        actions = jnp.clip(actions + own.actor_bc_noise * noise, -1, 1)
    first_critic = Critics(config, num_critics=1)
    loss = -forward(first_critic, state.critic, batch.observations, actions).mean()
    return loss, (actor, {"actor_loss": loss})


def actor_optimizer(config):
    """Return the optimiser of a network that has this config, see `network_config`."""
    num_steps = config.num_updates - config.rl_start
    learning_rate = lr_schedule(config.actor_learning_rate, config.actor_lr_decay, num_steps)
    return make_optimizer(
        learning_rate, config.actor_wd, config.actor_l1_ratio, config.actor_wd_kernels_only
    )


def critic_optimizer(config):
    """Return the critics' optimiser."""
    num_steps = config.num_updates - config.rl_start
    learning_rate = lr_schedule(config.critic_learning_rate, config.critic_lr_decay, num_steps)
    return make_optimizer(
        learning_rate, config.critic_wd, config.critic_l1_ratio, config.critic_wd_kernels_only
    )


def update_vae(config, state, batch):
    """Update the encoder and the decoder once; return the new state and scalars.

    With SAM only the decoder's parameters move uphill. Both networks' gradients are taken there.
    """
    own = network_config(config, "decoder")
    key, noise_key, *loss_keys = jax.random.split(state.key, 6)
    decoder = own_params(state.actor, "decoder")
    params = {"encoder": state.encoder["params"], "decoder": decoder}
    grad_fn = jax.grad(vae_loss, has_aux=True)
    grads, (actor, info) = grad_fn(params, config, state, batch, loss_keys)
    if is_on(own.actor_sam):
        uphill = {**params, "decoder": ascend(decoder, grads["decoder"], own.actor_sam)}
        grads, _ = grad_fn(uphill, config, state, batch, loss_keys)
    encoder, encoder_opt = optimize(
        actor_optimizer(network_config(config, "encoder")),
        state.encoder,
        state.encoder_opt,
        grads["encoder"],
        noise=0.0,
        key=None,
    )
    decoder, decoder_opt = optimize(
        actor_optimizer(own),
        {"params": decoder},
        state.decoder_opt,
        grads["decoder"],
        own.actor_grad_noise,
        noise_key,
    )
    return state._replace(
        actor=with_params(actor, decoder["params"]),
        decoder_opt=decoder_opt,
        encoder=encoder,
        encoder_opt=encoder_opt,
        key=key,
    ), info


def update_critics(config, state, batch):
    """Update the critics once; return the new state and a dictionary of scalars."""
    key, target_key, dropout_key, noise_key = jax.random.split(state.key, 4)
    target = critic_target(config, state, batch, target_key)
    grad_fn = jax.grad(critic_loss, has_aux=True)
    grads, (critic, info) = grad_fn(
        state.critic["params"], config, state, batch, target, dropout_key
    )
    critic, critic_opt = optimize(
        critic_optimizer(config),
        critic,
        state.critic_opt,
        grads,
        config.critic_grad_noise,
        noise_key,
    )
    return state._replace(critic=critic, critic_opt=critic_opt, key=key), info


def update_actor(config, state, batch):
    """Update the perturbation network once; return the new state and a dictionary of scalars."""
    own = network_config(config, "perturbation")
    key, noise_key, *loss_keys = jax.random.split(state.key, 6)
    params = own_params(state.actor, "perturbation")
    grad_fn = jax.grad(actor_loss, has_aux=True)
    grads, (actor, info) = grad_fn(params, config, state, batch, loss_keys)
    if is_on(own.actor_sam):
        uphill = ascend(params, grads, own.actor_sam)
        grads, _ = grad_fn(uphill, config, state, batch, loss_keys)
    perturbation, actor_opt = optimize(
        actor_optimizer(own),
        {"params": params},
        state.actor_opt,
        grads,
        own.actor_grad_noise,
        noise_key,
    )
    return state._replace(
        # `policy` ranks the candidates by this copy of the critics
        actor={**with_params(actor, perturbation["params"]), "critic": state.critic},
        actor_opt=actor_opt,
        key=key,
    ), info


def update_targets(config, state):
    """Move the targets by tau towards the perturbation network and the critics (Polyak average)."""
    perturbation = {
        "params": own_params(state.actor, "perturbation"),
        "batch_stats": state.actor["batch_stats"],
    }
    return state._replace(
        target_actor=optax.incremental_update(perturbation, state.target_actor, config.tau),
        target_critic=optax.incremental_update(state.critic, state.target_critic, config.tau),
    )


def update(config, state, batch):
    """Update the VAE, the critics, the perturbation network by the new critics, then the targets.

    In the first `rl_start` updates only the VAE's is kept. The other updates are computed, logged
    and discarded. A pure function of a TrainState and Transitions. Returns the new
    state and scalars to log.
    """
    state, vae_info = update_vae(config, state, batch)
    vae_only = state
    state, critic_info = update_critics(config, state, batch)
    state, actor_info = update_actor(config, state, batch)
    state = update_targets(config, state)
    if config.rl_start > 0:
        has_started = state.decoder_opt[0].count > config.rl_start
        state = jax.tree.map(lambda new, old: jnp.where(has_started, new, old), state, vae_only)
    return state, {**critic_info, **actor_info, **vae_info}


def init_state(config, batch, seed):
    """Return the state before the first update. Of `batch` only the shapes count."""
    key, actor_key, critic_key, encoder_key = jax.random.split(jax.random.key(seed), 4)
    actor_network = Actor(config, batch.actions.shape[-1])
    actor = init_network(actor_network, actor_key, batch.observations)
    critic = init_network(Critics(config), critic_key, batch.observations, batch.actions)
    encoder = init_network(Encoder(config), encoder_key, batch.observations, batch.actions)
    decoder = own_params(actor, "decoder")
    perturbation = own_params(actor, "perturbation")
    optimizers = {}
    for network in ("encoder", "decoder", "perturbation"):
        optimizers[network] = actor_optimizer(network_config(config, network))
    return TrainState(
        actor={**actor, "critic": critic},
        decoder_opt=optimizers["decoder"].init(decoder),
        actor_opt=optimizers["perturbation"].init(perturbation),
        target_actor={"params": perturbation, "batch_stats": actor["batch_stats"]},
        encoder=encoder,
        encoder_opt=optimizers["encoder"].init(encoder["params"]),
        critic=critic,
        target_critic=critic,
        critic_opt=critic_optimizer(config).init(critic["params"]),
        key=key,
    )


# --- Training ---


@over_members("state", donate="state")
def epoch(config, state, data):
    """Make `log_every` updates in one scan; return the state and what each `update` logs."""

    def step(state, _):
        key, batch_key = jax.random.split(state.key)
        index = jax.random.choice(batch_key, data["train"], (config.batch_size,))
        return update(config, state._replace(key=key), transitions(data, index))

    return jax.lax.scan(step, state, length=config.log_every)


def act(config, actor, data, observations):
    """Return the actions (B, A) at the latent 0, for normalised states (B, S), for the analysis."""
    network = Actor(config, data["actions"].shape[-1])
    return forward(network, actor, observations)


@over_members("actor", "observations")
def policy(config, actor, data, observations):
    """Return the actions (E, A) in evaluation, for states (E, S) as the environment gives them."""
    return best_candidates(config, actor, data, observations)


def train(config, run):
    """Train to the end, from the last checkpoint if there is one.

    In turn: make `log_every` updates, then evaluate if that is due. Here states, infos, returns
    and measurements have a leading axis of members: the run's seeds, or those of several runs that
    are trained together (harness/members.py).
    """
    data = make_dataset(config, load_dataset(config))
    samples = make_samples(data)
    data = jax.device_put(data)
    envs = make_envs(config)
    example = transitions(data, np.arange(1))
    states = init_states(init_state, config, example)
    states, num_updates = run.restore(states, data)

    def evaluate_and_measure(states, at_update):
        """Return the returns of an evaluation's episodes, and what is measured in the actors."""
        with run.timed("evaluation"):
            act_in_all = host_policy(policy, config, states.actor, data)
            episodes = evaluate(config, act_in_all, envs, at_update)
        if not config.analysis:
            return episodes.returns, {}
        with run.timed("analysis"):
            measured = with_ranks(analyse(config, states, data, samples, episodes))
        return episodes.returns, measured

    while True:
        is_last = num_updates == config.num_updates
        is_due = num_updates % config.eval_every == 0 or is_last
        if is_due and num_updates > run.evaluated:
            # The training is saved first, so that a kill during the evaluation loses none of it
            run.checkpoint(states, num_updates, now=True)
            run.evaluate(evaluate_and_measure, states, num_updates)
        # Save after an evaluation, once a minute, and on a signal, which also ends the run
        run.checkpoint(states, num_updates, now=is_last)
        if is_last:
            return run.finish()
        with run.timed("train"):
            states, infos = jax.block_until_ready(epoch(config, states, data))
        num_updates += config.log_every
        run.log_epoch(num_updates, infos, states)


# --- Appendix: what the analysis asks of the algorithm ---


def analysed_hidden(config):
    """Return the name of the hidden layers that are analysed: see the top of this file."""
    hidden, _ = LAYERS["decoder" if config.regularise == "decoder" else "perturbation"]
    return hidden


def eval_actor_loss(config, state, batch):
    """Return the loss of the network that the analysis looks at, without dropout and noise.

    The perturbation network's is at the latent 0, and the decoder's at the encoder's means.
    """
    action_dim = batch.actions.shape[-1]
    if config.regularise == "decoder":
        means, log_stds = forward(Encoder(config), state.encoder, batch.observations, batch.actions)
        decoder = Decoder(config, action_dim)
        actions = forward(decoder, state.actor, batch.observations, means)
        loss, _ = vae_objective(config, actions, batch.actions, means, log_stds)
        return loss
    actions = forward(Actor(config, action_dim), state.actor, batch.observations)
    first_critic = Critics(config, num_critics=1)
    return -forward(first_critic, state.critic, batch.observations, actions).mean()


def overestimation(config, data, state, episodes):
    """Return Q(s, pi(s)) minus the discounted return that the policy achieves from s, as a mean.

    Here s are the first states of the episodes without noise. Rewards are scaled as in training.
    What an episode would gain after its time limit counts as 0.
    """
    starts = (episodes.starts - data["mean"]) / data["std"]
    actions = best_candidates(config, state.actor, data, episodes.starts)
    values = q_values(config, state, starts, actions)
    rewards = data["reward_scale"] * episodes.rewards
    steps = jnp.arange(rewards.shape[-1])
    discounts = jnp.where(steps < episodes.lengths[:, None], config.gamma**steps, 0)
    return jnp.mean(values - (discounts * rewards).sum(-1))


# --- Appendix: inside the actor ---

NUM_PROBED = 1024  # held-out states of the plasticity probe
PROBE_STEPS = 100  # of behaviour cloning in the plasticity probe


@over_members("state", "episodes", in_turn=True)
def analyse(config, state, data, samples, episodes):
    """Return what is measured inside the actor, by names such as train/dead_neurons.

    It is measured on four batches: the steps samples["train"] and samples["validation"] of the
    data, of which the second may be missing; normalised states samples["random"] (B, S); and the
    states that were visited in an evaluation's `episodes`. Returns scalars, for each batch a matrix
    `gram` (F, F) for `with_ranks`, and `features` (NUM_COMPARED, F), which a report compares with
    other runs'. Features are before the ReLU and the normalisation here, as in the paper.
    """
    batches = {}
    for part in ("train", "validation"):
        if part in samples:
            batches[part] = transitions(data, samples[part])
    inputs = {part: batch.observations for part, batch in batches.items()}
    inputs["evaluation"] = (episodes.visited - data["mean"]) / data["std"]
    inputs["random"] = samples["random"]

    def actions_in(observations):
        return act(config, state.actor, data, observations)

    info = weight_norms(state.actor["params"])
    network = Actor(config, data["actions"].shape[-1])
    for part, observations in inputs.items():
        _, seen = network.apply(state.actor, observations, train=False, mutable="intermediates")
        features = seen["intermediates"][analysed_hidden(config)]["preactivations"][0]
        for key, value in feature_statistics(features).items():
            info[f"{part}/{key}"] = value
        info[f"{part}/jacobian_norm"] = jacobian_norm(actions_in, observations[:NUM_COMPARED])
        if part == "train":
            info["features"] = features[:NUM_COMPARED]
    for part, batch in batches.items():
        info[f"{part}/action_error"] = action_error(config, data, state.actor, batch)
        info[f"{part}/actor_loss"] = eval_actor_loss(config, state, batch)
        info[f"{part}/q_gain"] = q_gain(config, data, state, batch)
    if "validation" in batches:
        for key in ("action_error", "actor_loss"):  # the generalisation gap
            info[f"gap/{key}"] = info[f"validation/{key}"] - info[f"train/{key}"]
        probe = jax.tree.map(lambda x: x[:NUM_PROBED], batches["validation"])
        cloned = plasticity_probe(config, data, state, probe)
        error_before = action_error(config, data, state.actor, probe)
        info["plasticity/loss_left"] = action_error(config, data, cloned, probe) / error_before
    visited = inputs["evaluation"][:NUM_COMPARED]
    distance = action_distance(visited, actions_in(visited), batches["train"])
    info["evaluation/action_distance"] = distance
    info["evaluation/overestimation"] = overestimation(config, data, state, episodes)
    return info


def action_error(config, data, actor, batch):
    """Return the mean squared error of the policy's actions, per dimension of an action."""
    return jnp.mean((act(config, actor, data, batch.observations) - batch.actions) ** 2)


def q_gain(config, data, state, batch):
    """Return how much higher the critics value the policy's actions than the data's, as a mean."""
    actions = act(config, state.actor, data, batch.observations)
    policy_values = q_values(config, state, batch.observations, actions)
    data_values = q_values(config, state, batch.observations, batch.actions)
    return jnp.mean(policy_values - data_values)


def plasticity_probe(config, data, state, batch):
    """Return the actor after PROBE_STEPS of behaviour cloning on the batch.

    The smaller the share of the batch's loss that is left then, the better the actor can still
    learn. If its loss was small before, there was little to learn. The optimiser is new, without
    decay of its rate or of the weights, and without noise. With fresh moments the size of its steps
    depends on the learning rate alone, and not on the loss's unit or on what came before.
    """
    config = replace(config, actor_lr_decay="none", actor_wd=0.0)
    optimizer = actor_optimizer(config)

    def step(copy, _):
        actor, opt_state = copy

        def loss(params):
            return action_error(config, data, {**actor, "params": params}, batch)

        grads = jax.grad(loss)(actor["params"])
        return optimize(optimizer, actor, opt_state, grads, noise=0.0, key=None), None

    start = (state.actor, optimizer.init(state.actor["params"]))
    (actor, _), _ = jax.lax.scan(step, start, length=PROBE_STEPS)
    return actor


# --- Appendix: hyperparameters ---

# Names of `regularisers` -> flags. The paper has no BCQ: these are the strengths that it chose
# for ReBRAC, whose learning rate is the same on Gym-MuJoCo. (On Adroit it is 3e-4.)
CHOSEN = {
    "DO": dict(actor_dropout=0.1),
    "LN": dict(actor_ln=True),
    "FN": dict(actor_fn=True),
    "GN": dict(actor_gn=True),
    "BN": dict(actor_bn=True),
    "SN": dict(actor_sn=True),
    "L2": dict(actor_wd=1e-3, actor_l1_ratio=0.0),
    "L1": dict(actor_wd=1e-5, actor_l1_ratio=1.0),
    "EN": dict(actor_wd=1e-4, actor_l1_ratio=0.5),
    "InN": dict(actor_input_noise=0.003),
    "BCN": dict(actor_bc_noise=0.01),
    "GrN": dict(actor_grad_noise=0.01),
    # Beyond the paper; SAM's radius is the default of its own paper
    "RMS": dict(actor_rms=True),
    "SAM": dict(actor_sam=0.05),
}

# Nothing is tuned per dataset
BEST = {}


def group_norms(config):
    """Return whether there is a GroupNorm in the VAE, and in the networks of the other widths."""
    in_vae = config.actor_gn and config.regularise != "perturbation"
    in_perturbation = config.actor_gn and config.regularise != "decoder"
    return in_vae, in_perturbation or config.critic_gn


def tuned(config):
    """Fill in what the user left open with the original's values.

    Where GroupNorm acts, a width is the nearest below that its 32 groups divide. Then the critics
    have the perturbation network's width, and the encoder the decoder's. So the baseline of GN
    has slightly wider networks.
    """
    config = with_regularisers(config, CHOSEN)
    in_vae, in_others = group_norms(config)
    hidden_dim, last_hidden_dim = (384, 288) if in_others else (400, 300)
    vae_hidden_dim = 736 if in_vae else 750
    is_antmaze = domain(config.dataset_name) == "antmaze"
    defaults = dict(
        normalize_reward=False,
        hidden_dim=hidden_dim,
        last_hidden_dim=config.hidden_dim or last_hidden_dim,
        vae_hidden_dim=config.hidden_dim or vae_hidden_dim,
        eval_every=50_000 if is_antmaze else 10_000,
        eval_episodes=100 if is_antmaze else 10,
    )
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return replace(config, **missing)


# --- Main ---


def main():
    given = parse(Config)
    if given.evaluate is not None:
        return evaluate_run(given, policy, constraints, BOUNDS)
    config = tuned(given)
    check(config, constraints, BOUNDS, given_values(Config))
    config = with_checksum(config)
    with Run(__file__, config, tuned) as run:
        if not run.finished_before:
            train(config, run)


if __name__ == "__main__":
    with one_line_errors():
        main()
