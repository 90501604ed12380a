"""CQL with a regularised actor.

The paper: "The Role of Deep Learning Regularizations on Actors in Offline RL" (arXiv 2409.07606).
It leaves open whether the gain depends on the algorithm, and names CQL.
The algorithm: "Conservative Q-Learning for Offline Reinforcement Learning" (CQL, arXiv 2006.04779),
in its form CQL(H), on Soft Actor-Critic (SAC, arXiv 1812.05905). Values are those of CORL
(corl-team/CORL, algorithms/offline/cql.py). tests/README.md lists what differs from it.

    python cql.py --dataset_name hopper-medium-v2  # the baseline, with CORL's values
    python cql.py --dataset_name hopper-medium-v2 --actor_ln true --actor_dropout 0.1
    python cql.py --dataset_name antmaze-umaze-v2 --regularisers DO+LN --seed 3

Shapes: N steps of the data, B of a batch, E episodes; S numbers in a state, A in an action; F
features, I inputs; num samples, or n of each kind. A prime marks what belongs to the next step, or
to a target network, but alpha' is the Lagrange multiplier.

Two CPU cores make about 14 updates a second (Hopper's sizes).
"""

import math
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

NAME = "CQL"  # by this line the tools find the script

# --- Config ---


@dataclass(frozen=True)
class Config:
    """Each field is a flag. None means the default in its comment, or else CORL's value."""

    # Data
    dataset_name: str = "halfcheetah-medium-replay-v2"  # D4RL's name of the dataset
    dataset_path: Optional[str] = None  # file in D4RL's HDF5 format; default: D4RL's own
    dataset_sha256: Optional[str] = None  # checksum that this file must have; default: its own
    normalize_states: Optional[bool] = None  # normalise states to mean 0 and standard deviation 1
    normalize_reward: Optional[bool] = None  # rewards x 100 (AntMaze) or x 1000 / range of returns
    validation_frac: float = 0.0  # fraction of episodes held out; the paper's tuning uses 0.05
    validation_seed: Optional[int] = None  # picks the held-out episodes; default: the file's last
    # Algorithm
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # step size of the targets' Polyak average
    batch_size: int = 256  # transitions per update
    actor_learning_rate: Optional[float] = None  # default: 1e-4 (Gym-MuJoCo 3e-5)
    critic_learning_rate: float = 3e-4  # learning rate of the critics' Adam
    reward_scale: Optional[float] = None  # multiplies rewards after that; default: 1 (AntMaze 10)
    reward_shift: Optional[float] = None  # added to the scaled rewards; default: 0 (AntMaze -5)
    cql_weight: Optional[float] = None  # alpha: the gap's weight; default: 10 (AntMaze 5, Adroit 1)
    n_actions: int = 10  # samples from each of three sources, which estimate CQL's gap
    lagrange_gap: Optional[float] = None  # CQL's tau; 0: no alpha'; default: 0 (AntMaze 0.8)
    gap_clip: Optional[float] = None  # gap >= -gap_clip; 0: no bound; default: 0 (AntMaze 200)
    max_backup: Optional[bool] = None  # targets take the best of n_actions; default: on AntMaze
    bc_steps: int = 0  # first updates, in which log pi of the data replaces Q (no BCN then)
    log_std_min: float = -20.0  # lower bound of the policy's log standard deviation
    log_std_max: float = 2.0  # upper bound of the policy's log standard deviation
    # Networks
    hidden_dim: int = 256  # units in a hidden layer
    actor_layers: int = 3  # hidden layers of the actor
    critic_layers: Optional[int] = None  # hidden layers of each critic; default: 3 (AntMaze 5)
    # Regularisers of the actor; 0 or false is exactly off
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
    actor_bc_noise: float = 0.0  # BCN: std of noise on the actions that Q judges
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
    "reward_shift": "any number",
    "bc_steps": "0 or more",
    "log_std_min": "any number",
    "log_std_max": "any number",
    "actor_dropout": "at least 0 and below 1",
    "actor_l1_ratio": "between 0 and 1",
    "critic_dropout": "at least 0 and below 1",
    "critic_l1_ratio": "between 0 and 1",
}

# Floats that uncompiled code reads, too. Runs trained in one program must agree in these.
HOST_FLOATS = ("validation_frac",)


def constraints(config):
    """Return {requirement: whether it holds}. The first that doesn't is the error's message."""
    has_group_norm = config.actor_gn or config.critic_gn
    schedules = ("none", "cosine", "linear", "exponential")
    return {
        "actor_lr_decay and critic_lr_decay must be none, cosine, linear or exponential": (
            config.actor_lr_decay in schedules and config.critic_lr_decay in schedules
        ),
        "actor_gn and critic_gn need a hidden_dim of 64, 96, ...: 32 groups of two units or more": (
            not has_group_norm or (config.hidden_dim % 32 == 0 and config.hidden_dim > 32)
        ),
        "log_std_min must be below log_std_max": config.log_std_min < config.log_std_max,
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
            dense = hidden_dense(config)  # see "Networks"
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
            dense = hidden_dense(config)
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


def hidden_dense(config):
    """Return a hidden Dense: orthogonal weights, biases 0.

    CORL initialises its critics so. Its actor has PyTorch's default and small last weights.
    """
    return nn.Dense(config.hidden_dim, kernel_init=nn.initializers.orthogonal(math.sqrt(2)))


def last_dense(size):
    """Return a last Dense: small orthogonal weights, biases 0."""
    return nn.Dense(size, kernel_init=nn.initializers.orthogonal(1e-2))


class Actor(nn.Module):
    """Policy tanh(Gaussian): states (B, S) to its means and log standard deviations, (B, A)."""

    config: Config
    action_dim: int

    @nn.compact
    def __call__(self, observations, train):
        config = self.config
        features = ActorHidden(config, name="Hidden_0")(observations, train)
        means = last_dense(self.action_dim)(features)
        log_stds = last_dense(self.action_dim)(features) - 1  # so it starts at -1, as CORL's
        return means, jnp.clip(log_stds, config.log_std_min, config.log_std_max)


class Critics(nn.Module):
    """Two critics: states (B, S) and actions (B, A) to Q values (2, B)."""

    config: Config

    @nn.compact
    def __call__(self, observations, actions, train):
        inputs = jnp.concatenate([observations, actions], -1)
        outputs = []
        for k in range(2):
            features = CriticHidden(self.config, name=f"Hidden_{k}")(inputs, train)
            outputs.append(last_dense(1)(features))
        return jnp.stack(outputs)[..., 0]


# --- The policy's actions and their densities ---


def draw_actions(key, means, log_stds, num):
    """Return `num` actions of the policy at each state, (num, B, A), and log pi of them (num, B).

    Gradients flow to means and log_stds (B, A).
    """
    noise = jax.random.normal(key, (num, *means.shape))
    unbounded = means + jnp.exp(log_stds) * noise
    return jnp.tanh(unbounded), log_prob(unbounded, means, log_stds)


def log_prob(unbounded, means, log_stds):
    """Return log pi(a|s) of a = tanh(unbounded), summed over its dimensions (SAC, appendix C).

    log(1 - tanh(u)^2) is written as 2 (log 2 - u - softplus(-2 u)), which is finite for all u.
    """
    gaussian = jax.scipy.stats.norm.logpdf(unbounded, means, jnp.exp(log_stds))
    log_slope = 2 * (math.log(2) - unbounded - jax.nn.softplus(-2 * unbounded))
    return (gaussian - log_slope).sum(-1)


def log_prob_of_data(actions, means, log_stds):
    """Return log pi(a|s) of actions, clipped to +-(1 - 1e-5), where arctanh is finite."""
    bound = 1 - 1e-5
    return log_prob(jnp.arctanh(jnp.clip(actions, -bound, bound)), means, log_stds)


UNIFORM, CURRENT, NEXT = range(3)  # sources of samples: uniform, pi(.|s), pi(.|s')


class Samples(NamedTuple):
    actions: jax.Array  # (3, n, B, A), by source
    log_probs: jax.Array  # (3, n, B), of what each was drawn from


def draw_samples(config, state, batch, key):
    """Return the actions by which the gap is estimated. The actor has no dropout here."""
    key, uniform_key = jax.random.split(key)
    shape = (config.n_actions, *batch.actions.shape)
    actions = [jax.random.uniform(uniform_key, shape, minval=-1, maxval=1)]
    log_probs = [jnp.full(shape[:-1], -shape[-1] * math.log(2))]
    network = Actor(config, batch.actions.shape[-1])
    for observations in (batch.observations, batch.next_observations):
        key, action_key = jax.random.split(key)
        means, log_stds = forward(network, state.actor, observations)
        drawn, log_pi = draw_actions(action_key, means, log_stds, config.n_actions)
        actions.append(drawn)
        log_probs.append(log_pi)
    return Samples(jnp.stack(actions), jnp.stack(log_probs))


# --- Losses and update ---


class TrainState(NamedTuple):
    actor: dict  # variables: params and batch_stats, as those of the critics
    actor_opt: optax.OptState
    critic: dict  # of both critics
    target_critic: dict
    critic_opt: optax.OptState
    temperature: dict  # its params: the logarithm of SAC's alpha
    temperature_opt: optax.OptState
    multiplier: dict  # its params: the logarithm of alpha', unused without lagrange_gap
    multiplier_opt: optax.OptState
    key: jax.Array


def q_values(config, state, observations, actions):
    """Return min_k Q_k(s, a), (B,), for normalised states (B, S) and actions (B, A)."""
    return forward(Critics(config), state.critic, observations, actions).min(0)


def temperature(params):
    """Return SAC's alpha."""
    return jnp.exp(params["log_alpha"])


def multiplier(params):
    """Return Lagrange's alpha', up to 1e6."""
    return jnp.minimum(jnp.exp(params["log_alpha_prime"]), 1e6)


def repeated(observations, actions):
    """Return states (num B, S) and actions (num B, A), given states (B, S), actions (num, B, A)."""
    observations = jnp.broadcast_to(observations, (len(actions), *observations.shape))
    return observations.reshape(-1, observations.shape[-1]), actions.reshape(-1, actions.shape[-1])


def critic_target(config, state, batch, next_actions):
    """Return r + gamma (1 - d) min_k Q'_k(s', a'), (B,).

    r is scaled and shifted. The target has no entropy, as in CORL. a' is the first of next_actions
    (n, B, A). With max_backup it is that of the n with the largest min_k Q'_k(s', a'), as in CORL.
    """
    if not config.max_backup:
        next_actions = next_actions[:1]
    inputs = repeated(batch.next_observations, next_actions)
    next_values = forward(Critics(config), state.target_critic, *inputs).min(0)
    next_values = next_values.reshape(len(next_actions), -1).max(0)
    rewards = config.reward_scale * batch.rewards + config.reward_shift
    return rewards + config.gamma * (1 - batch.terminals) * next_values


def conservative_gap(config, values, log_probs, data_values):
    """Return log sum_j [exp(Q(s, a_j)) / mu_j(a_j)] - Q(s, a), (2, B), at least -gap_clip.

    It estimates CQL's regulariser (CQL, equation 4 and appendix F). The sample a_j is drawn from
    the density mu_j. `values` (2, num, B) are Q(s, a_j), `log_probs` (num, B) are log mu_j(a_j).
    Samples of pi(.|s') are evaluated at s, as in CORL and the code of CQL's authors. As in both,
    the sum isn't divided by num. So the gap is larger by log num than the estimate, and
    lagrange_gap bounds this larger gap. If Q is constant in the action, it is about
    log num + A log 2.
    """
    gap = jax.nn.logsumexp(values - log_probs, axis=1) - data_values
    if is_on(config.gap_clip):
        gap = jnp.maximum(gap, -config.gap_clip)
    return gap


def critic_loss(params, config, state, batch, target, samples, key):
    """Return (Q(s, a) - target)^2 + cql_weight gap, a mean over the batch (CQL, equation 4).

    As in CORL, the squared error lacks equation 4's factor 1/2. In the Lagrange form the weight is
    alpha' cql_weight, as in CORL; in appendix F it is alpha' alone. The loss is summed over both
    critics; the logged one is their mean. The data's actions and the samples go through the critics
    as one batch. Also returns the critics' variables and scalars to log.
    """
    critic = {**state.critic, "params": params}
    sampled = samples.actions.reshape(-1, *batch.actions.shape)
    actions = jnp.concatenate([batch.actions[None], sampled])
    inputs = repeated(batch.observations, actions)
    values, critic = forward_train(Critics(config), critic, key, *inputs)
    values = values.reshape(2, len(actions), -1)
    data_values = values[:, 0]
    log_probs = samples.log_probs.reshape(len(sampled), -1)
    gap = conservative_gap(config, values[:, 1:], log_probs, data_values).mean(1)
    weight = config.cql_weight
    if is_on(config.lagrange_gap):
        weight = weight * multiplier(state.multiplier["params"])
    td_losses = ((data_values - target) ** 2).mean(1)
    losses = td_losses + weight * gap
    info = {
        "critic_loss": losses.mean(),
        "td_loss": td_losses.mean(),
        "gap": gap.mean(),
        "q": data_values.mean(),
    }
    return losses.sum(), (critic, info)


def multiplier_loss(params, config, gap):
    """Return -alpha' cql_weight (gap - lagrange_gap): alpha' rises while the gap is too large.

    (CQL, appendix F.) The gap is the mean of both critics'. As in CORL the weight multiplies both
    terms. The code of CQL's authors has alpha' (cql_weight gap - lagrange_gap).
    """
    return -multiplier(params) * config.cql_weight * (gap - config.lagrange_gap)


def actor_loss(params, config, state, batch, keys):
    """Return alpha log pi(a|s) - min_k Q_k(s, a) of one a of pi(.|s) (CQL, algorithm 1, step 4).

    It is a mean over the batch. Dropout and input noise act on the actor only. The objective's
    noise (BCN) is added to the action whose Q is taken, not to that of log pi. Noise on Q itself
    would have no gradient. Also returns the actor's variables and scalars to log.
    """
    dropout_key, input_key, objective_key, action_key = keys
    observations = batch.observations
    if is_on(config.actor_input_noise):
        noise = jax.random.normal(input_key, observations.shape)
        observations = observations + config.actor_input_noise * noise
    actor = {**state.actor, "params": params}
    network = Actor(config, batch.actions.shape[-1])
    distribution, actor = forward_train(network, actor, dropout_key, observations)
    drawn, log_probs = draw_actions(action_key, *distribution, 1)
    actions = drawn[0]
    if is_on(config.actor_bc_noise):
        noise = jax.random.normal(objective_key, actions.shape)
        actions = jnp.clip(actions + config.actor_bc_noise * noise, -1, 1)
    loss = actor_objective(config, state, batch, distribution, log_probs[0], actions)
    return loss, (actor, {"actor_loss": loss, "log_pi": log_probs.mean()})


def actor_objective(config, state, batch, distribution, log_probs, actions):
    """Return the actor's loss, given log pi (B,) and the actions (B, A) that go into Q.

    `distribution` has the policy's means and log standard deviations. In the first bc_steps
    updates log pi of the data's action replaces Q.
    """
    objective = q_values(config, state, batch.observations, actions)
    if config.bc_steps > 0:
        adam = state.actor_opt[0]
        data_log_probs = log_prob_of_data(batch.actions, *distribution)
        objective = jnp.where(adam.count < config.bc_steps, data_log_probs, objective)
    return jnp.mean(temperature(state.temperature["params"]) * log_probs - objective)


def temperature_loss(params, log_probs, action_dim):
    """Return -log alpha (log pi(a|s) - A) (SAC, equation 18): the target entropy is -A.

    As in CORL and the code of CQL's authors, log alpha replaces alpha.
    """
    return -params["log_alpha"] * (log_probs.mean() - action_dim)


def actor_optimizer(config):
    """Return the actor's optimiser."""
    num_steps = config.num_updates
    learning_rate = lr_schedule(config.actor_learning_rate, config.actor_lr_decay, num_steps)
    return make_optimizer(
        learning_rate, config.actor_wd, config.actor_l1_ratio, config.actor_wd_kernels_only
    )


def critic_optimizer(config):
    """Return the critics' optimiser."""
    num_steps = config.num_updates
    learning_rate = lr_schedule(config.critic_learning_rate, config.critic_lr_decay, num_steps)
    return make_optimizer(
        learning_rate, config.critic_wd, config.critic_l1_ratio, config.critic_wd_kernels_only
    )


def scalar_optimizer(learning_rate):
    """Return the optimiser of alpha or alpha', which no regulariser reaches."""
    return make_optimizer(learning_rate, wd=0.0, l1_ratio=0.0, kernels_only=False)


def update_critics(config, state, batch, samples):
    """Update the critics once; return the new state and a dictionary of scalars."""
    key, dropout_key, noise_key = jax.random.split(state.key, 3)
    target = critic_target(config, state, batch, samples.actions[NEXT])
    grad_fn = jax.grad(critic_loss, has_aux=True)
    grads, (critic, info) = grad_fn(
        state.critic["params"], config, state, batch, target, samples, dropout_key
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


def update_multiplier(config, state, gap):
    """Update Lagrange's alpha' once; return the new state and a dictionary of scalars."""
    grads = jax.grad(multiplier_loss)(state.multiplier["params"], config, gap)
    variables, opt_state = optimize(
        scalar_optimizer(config.critic_learning_rate),
        state.multiplier,
        state.multiplier_opt,
        grads,
        noise=0.0,
        key=None,
    )
    info = {"multiplier": multiplier(state.multiplier["params"])}
    return state._replace(multiplier=variables, multiplier_opt=opt_state), info


def update_actor(config, state, batch):
    """Update the actor once; return the new state and a dictionary of scalars."""
    key, noise_key, *loss_keys = jax.random.split(state.key, 6)
    params = state.actor["params"]
    grad_fn = jax.grad(actor_loss, has_aux=True)
    grads, (actor, info) = grad_fn(params, config, state, batch, loss_keys)
    if is_on(config.actor_sam):
        uphill = ascend(params, grads, config.actor_sam)
        grads, _ = grad_fn(uphill, config, state, batch, loss_keys)
    actor, actor_opt = optimize(
        actor_optimizer(config), actor, state.actor_opt, grads, config.actor_grad_noise, noise_key
    )
    return state._replace(actor=actor, actor_opt=actor_opt, key=key), info


def update_temperature(config, state, samples):
    """Update SAC's alpha once; return the new state and a dictionary of scalars.

    log pi is that of the samples of pi(.|s). So the actor's dropout and noise don't reach alpha.
    """
    action_dim = samples.actions.shape[-1]
    grads = jax.grad(temperature_loss)(
        state.temperature["params"], samples.log_probs[CURRENT], action_dim
    )
    variables, opt_state = optimize(
        scalar_optimizer(config.actor_learning_rate),
        state.temperature,
        state.temperature_opt,
        grads,
        noise=0.0,
        key=None,
    )
    info = {"temperature": temperature(state.temperature["params"])}
    return state._replace(temperature=variables, temperature_opt=opt_state), info


def update_targets(config, state):
    """Move the critics' target by tau towards the critics (Polyak average)."""
    target_critic = optax.incremental_update(state.critic, state.target_critic, config.tau)
    return state._replace(target_critic=target_critic)


def update(config, state, batch):
    """Update the critics, alpha' (with lagrange_gap), the actor, alpha, and the critics' target.

    The actor is updated by the new critics. A pure function of a TrainState and Transitions.
    Returns the new state and scalars to log.
    """
    key, sample_key = jax.random.split(state.key)
    samples = draw_samples(config, state, batch, sample_key)
    state, critic_info = update_critics(config, state._replace(key=key), batch, samples)
    multiplier_info = {}
    if is_on(config.lagrange_gap):
        state, multiplier_info = update_multiplier(config, state, critic_info["gap"])
    state, actor_info = update_actor(config, state, batch)
    state, temperature_info = update_temperature(config, state, samples)
    info = {**critic_info, **multiplier_info, **actor_info, **temperature_info}
    return update_targets(config, state), info


def init_state(config, batch, seed):
    """Return the state before the first update. Of `batch` only the shapes count."""
    key, actor_key, critic_key = jax.random.split(jax.random.key(seed), 3)
    network = Actor(config, batch.actions.shape[-1])
    actor = init_network(network, actor_key, batch.observations)
    critic = init_network(Critics(config), critic_key, batch.observations, batch.actions)
    log_alpha = {"log_alpha": jnp.float32(0)}  # as CORL's
    log_multiplier = {"log_alpha_prime": jnp.float32(1)}  # as CORL's
    return TrainState(
        actor=actor,
        actor_opt=actor_optimizer(config).init(actor["params"]),
        critic=critic,
        target_critic=critic,
        critic_opt=critic_optimizer(config).init(critic["params"]),
        temperature={"params": log_alpha},
        temperature_opt=scalar_optimizer(config.actor_learning_rate).init(log_alpha),
        multiplier={"params": log_multiplier},
        multiplier_opt=scalar_optimizer(config.critic_learning_rate).init(log_multiplier),
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
    """Return the actions (B, A) in evaluation, tanh of the means, for normalised states (B, S)."""
    network = Actor(config, data["actions"].shape[-1])
    means, _ = forward(network, actor, observations)
    return jnp.tanh(means)


@over_members("actor", "observations")
def policy(config, actor, data, observations):
    """Return the actions (E, A) in evaluation, for states (E, S) as the environment gives them."""
    return act(config, actor, data, (observations - data["mean"]) / data["std"])


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
    """Return the name of the hidden layers that are analysed."""
    return "Hidden_0"


def eval_actor_loss(config, state, batch):
    """Return the actor's loss as evaluation sees it: no dropout, no noise, running statistics.

    Its actions are drawn by the same random numbers in each evaluation.
    """
    network = Actor(config, batch.actions.shape[-1])
    distribution = forward(network, state.actor, batch.observations)
    drawn, log_probs = draw_actions(jax.random.key(0), *distribution, 1)
    return actor_objective(config, state, batch, distribution, log_probs[0], drawn[0])


def overestimation(config, data, state, episodes):
    """Return Q(s, pi(s)) minus the discounted return that the policy achieves from s, as a mean.

    Here s are the first states of the episodes without noise. Rewards are scaled as in training.
    What an episode would gain after its time limit counts as 0.
    """
    starts = (episodes.starts - data["mean"]) / data["std"]
    values = q_values(config, state, starts, act(config, state.actor, data, starts))
    rewards = data["reward_scale"] * episodes.rewards
    rewards = config.reward_scale * rewards + config.reward_shift
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

# Names of `regularisers` -> flags, at the strengths that the paper chose for IQL, whose policy is
# stochastic, too. IQL's learning rate is 3e-4. At the lower ones here an update's weight decay does
# less. BCN's strength is that for ReBRAC, whose noise is on actions, too.
CHOSEN = {
    "DO": dict(actor_dropout=0.1),
    "LN": dict(actor_ln=True),
    "FN": dict(actor_fn=True),
    "GN": dict(actor_gn=True),
    "BN": dict(actor_bn=True),
    "SN": dict(actor_sn=True),
    "L2": dict(actor_wd=0.1, actor_l1_ratio=0.0),
    "L1": dict(actor_wd=0.01, actor_l1_ratio=1.0),
    "EN": dict(actor_wd=0.01, actor_l1_ratio=0.5),
    "InN": dict(actor_input_noise=0.01),
    "BCN": dict(actor_bc_noise=0.01),
    "GrN": dict(actor_grad_noise=0.01),
    # Beyond the paper; SAM's radius is the default of its own paper
    "RMS": dict(actor_rms=True),
    "SAM": dict(actor_sam=0.05),
}

# The paper has no CQL: nothing is tuned per dataset
BEST = {}


def tuned(config):
    """Fill in what the user left open with CORL's values, which are the best documented."""
    config = with_regularisers(config, CHOSEN)
    is_antmaze = domain(config.dataset_name) == "antmaze"
    weights = dict(gym=10.0, antmaze=5.0, adroit=1.0)
    rates = dict(gym=3e-5, antmaze=1e-4, adroit=1e-4)
    defaults = dict(
        normalize_states=not is_antmaze,
        normalize_reward=config.dataset_name == "hopper-medium-v2",
        actor_learning_rate=rates[domain(config.dataset_name)],
        reward_scale=10.0 if is_antmaze else 1.0,
        reward_shift=-5.0 if is_antmaze else 0.0,
        cql_weight=weights[domain(config.dataset_name)],
        lagrange_gap=0.8 if is_antmaze else 0.0,
        gap_clip=200.0 if is_antmaze else 0.0,
        max_backup=is_antmaze,
        critic_layers=5 if is_antmaze else 3,
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
