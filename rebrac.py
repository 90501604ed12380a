"""ReBRAC with a regularised actor.

The paper: "The Role of Deep Learning Regularizations on Actors in Offline RL" (arXiv 2409.07606).
The algorithm: "Revisiting the Minimalist Approach to Offline RL" (ReBRAC, arXiv 2305.09836).

    python rebrac.py --dataset_name hopper-medium-v2  # the baseline
    python rebrac.py --dataset_name hopper-medium-v2 --actor_ln true --actor_dropout 0.1
    python rebrac.py --dataset_name pen-human-v1 --critic_loss mse  # the original ReBRAC's critic

Shapes: N steps of the data, B of a batch, E episodes; S numbers in a state, A in an action; F
features, I inputs. A prime marks what belongs to the next step, or to a target network.

Two CPU cores make about 34 updates a second at batch 1024 and 126 at 256 (Hopper's sizes).
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
    read_table,
    with_regularisers,
)
from harness.datasets import (
    domain,
    episode_ends,
    episode_returns,
    load_dataset,
    tuned_values,
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

NAME = "ReBRAC"  # by this line the tools find the script

# --- Config ---


@dataclass(frozen=True)
class Config:
    """Each field is a flag. None means the default in its comment, or else the paper's value."""

    # Data
    dataset_name: str = "halfcheetah-medium-replay-v2"  # D4RL's name of the dataset
    dataset_path: Optional[str] = None  # file in D4RL's HDF5 format; default: D4RL's own
    dataset_sha256: Optional[str] = None  # checksum that this file must have; default: its own
    normalize_states: bool = False  # normalise states to mean 0 and standard deviation 1
    normalize_reward: Optional[bool] = None  # rewards x 100 (AntMaze) or x 1000 / range of returns
    validation_frac: float = 0.0  # fraction of episodes held out; the paper's tuning uses 0.05
    validation_seed: Optional[int] = None  # picks the held-out episodes; default: the file's last
    # Algorithm
    preset: str = "none"  # a name in PRESETS; as-run: the paper's combination as published
    critic_loss: str = "hl_gauss"  # hl_gauss: classification (paper); mse: squared error (ReBRAC)
    gamma: Optional[float] = None  # discount factor; default: 0.99 (AntMaze 0.999)
    tau: float = 0.005  # step size of the targets' Polyak average
    batch_size: Optional[int] = None  # transitions; default: 1024; Adroit, AntMaze (mse) 256
    actor_learning_rate: Optional[float] = None  # default: 1e-3; Adroit, AntMaze (mse) 3e-4
    critic_learning_rate: Optional[float] = None  # default: 1e-3; Adroit 3e-4; AntMaze (mse) 5e-5
    actor_bc_coef: Optional[float] = None  # weight of ||pi(s) - a||^2 in the actor's loss; tuned
    critic_bc_coef: Optional[float] = None  # weight of ||a' - a'_data||^2; 0.001 (mse: tuned)
    actor_q_coef: float = 1.0  # weight of Q / mean |Q| in the actor's loss; 0: cloning only
    policy_freq: int = 2  # critic updates for each update of the actor and the targets
    target_noise: float = 0.2  # standard deviation of the noise on the target actor's actions
    noise_clip: float = 0.5  # largest absolute value of the noise on the target actor's actions
    n_classes: Optional[int] = None  # hl_gauss: number of bins; default: tuned per dataset
    v_min: Optional[float] = None  # hl_gauss: lowest value; default: the data's (AntMaze: 0)
    v_max: Optional[float] = None  # hl_gauss: highest value; default: the data's (AntMaze: 100)
    v_expand: Optional[float] = None  # hl_gauss: v_max - v_min grows by this fraction; tuned
    sigma_frac: float = 0.75  # hl_gauss: standard deviation of a target's Gaussian, in bin widths
    clip_targets: bool = True  # hl_gauss: clip targets to the support; false: as the paper's code
    # Networks
    hidden_dim: int = 256  # units in a hidden layer
    actor_layers: int = 3  # hidden layers of the actor
    critic_layers: int = 3  # hidden layers of each critic
    # Regularisers of the actor; 0 or false is exactly off
    regularisers: str = "none"  # names joined by +, such as DO+LN; or tuned ones: best, best-L2
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
    actor_bc_noise: float = 0.0  # BCN: std of noise on the cloned actions
    actor_grad_noise: float = 0.0  # GrN: noise on the gradient; its std decays by (1 + t)^-0.55
    actor_sam: float = 0.0  # SAM: radius of sharpness-aware minimisation; beyond the paper
    actor_lr_decay: str = "none"  # none, cosine (to 0), linear (to 1/10), exponential (to 0.99)
    # Regularisers of the critics, which the paper leaves alone
    critic_dropout: float = 0.0  # dropout rate in the critics' loss
    critic_wd: float = 0.0  # decoupled weight decay of the critics
    critic_l1_ratio: float = 0.0  # fraction of L1 in critic_wd
    critic_wd_kernels_only: bool = False  # spare biases and normalisation from critic_wd
    critic_ln: bool = True  # LayerNorm in the critics; ReBRAC has it
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
    num_updates: int = 1_000_000  # updates of the critics in all
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
    "v_min": "any number",
    "v_max": "any number",
    "v_expand": "above -1",
    "sigma_frac": "above 0",
    "n_classes": "2 or more",
    "actor_dropout": "at least 0 and below 1",
    "actor_l1_ratio": "between 0 and 1",
    "critic_dropout": "at least 0 and below 1",
    "critic_l1_ratio": "between 0 and 1",
}

# Floats that uncompiled code reads, too. Runs trained in one program must agree in these.
HOST_FLOATS = ("validation_frac", "gamma", "v_min", "v_max")


def constraints(config):
    """Return {requirement: whether it holds}. The first that doesn't is the error's message."""
    has_group_norm = config.actor_gn or config.critic_gn
    has_range = config.v_min is not None and config.v_max is not None
    schedules = ("none", "cosine", "linear", "exponential")
    return {
        "actor_lr_decay and critic_lr_decay must be none, cosine, linear or exponential": (
            config.actor_lr_decay in schedules and config.critic_lr_decay in schedules
        ),
        "actor_gn and critic_gn need a hidden_dim of 64, 96, ...: 32 groups of two units or more": (
            not has_group_norm or (config.hidden_dim % 32 == 0 and config.hidden_dim > 32)
        ),
        "critic_loss must be hl_gauss or mse": config.critic_loss in ("hl_gauss", "mse"),
        "log_every must be a multiple of policy_freq": config.log_every % config.policy_freq == 0,
        "v_min must be below v_max": not has_range or config.v_min < config.v_max,
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
    """Return a hidden Dense as ReBRAC's: weights uniform in +-1 / sqrt(fan_in), biases 0.1."""
    return nn.Dense(
        config.hidden_dim,
        kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        bias_init=nn.initializers.constant(0.1),
    )


def last_dense(size, bound):
    """Return a last Dense: weights and biases uniform within +-bound."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(size, kernel_init=init, bias_init=init)


class Actor(nn.Module):
    """Deterministic policy: states (B, S) to actions (B, A) in (-1, 1)."""

    config: Config
    action_dim: int

    @nn.compact
    def __call__(self, observations, train):
        config = self.config
        features = ActorHidden(config, name="Hidden_0")(observations, train)
        return nn.tanh(last_dense(self.action_dim, 1e-3)(features))


class Critics(nn.Module):
    """Two critics: states (B, S) and actions (B, A) to logits (2, B, n_classes).

    With the squared error they have a single output each, the value: (2, B, 1).
    """

    config: Config

    @nn.compact
    def __call__(self, observations, actions, train):
        inputs = jnp.concatenate([observations, actions], -1)
        num_outputs = self.config.n_classes if self.config.critic_loss == "hl_gauss" else 1
        outputs = []
        for k in range(2):
            features = CriticHidden(self.config, name=f"Hidden_{k}")(inputs, train)
            outputs.append(last_dense(num_outputs, 3e-3)(features))
        return jnp.stack(outputs)


# --- Values as distributions over bins: HL-Gauss ---


def support(config):
    """Return the bins' edges, (n_classes + 1,).

    The support is from v_min to v_max, which `with_value_range` has set. It is widened by v_expand
    times its length, half at each end.
    """
    margin = config.v_expand * (config.v_max - config.v_min) / 2
    return jnp.linspace(config.v_min - margin, config.v_max + margin, config.n_classes + 1)


def hl_gauss(config, values):
    """Return the probabilities (..., n_classes) of a Gaussian around each value (arXiv 2403.03950).

    The Gaussian is truncated to the support. With clip_targets a value outside is first moved to
    the nearest end. Without it, as in the paper's code, the probabilities of a value far outside
    vanish, so that it gives no loss.
    """
    edges = support(config)
    sigma = config.sigma_frac * (edges[1] - edges[0])
    if config.clip_targets:
        values = jnp.clip(values, edges[0], edges[-1])
    # erf is 2 CDF - 1. The 2 and the 1 cancel in the ratio.
    erfs = jax.scipy.special.erf((edges - values[..., None]) / (math.sqrt(2) * sigma))
    total = erfs[..., -1:] - erfs[..., :1]
    if not config.clip_targets:
        total = total + 1e-6  # as in the paper's code
    return jnp.diff(erfs) / total


def critic_values(config, outputs):
    """Return the Q values (...) of critics' outputs (..., n_classes), or with mse (..., 1).

    With HL-Gauss a value is the mean over the bins' centres.
    """
    if config.critic_loss == "mse":
        return outputs[..., 0]
    edges = support(config)
    centres = (edges[1:] + edges[:-1]) / 2
    # A GPU's default, TF32, has 10 bits. Each target would be rounded to them.
    return jnp.matmul(jax.nn.softmax(outputs), centres, precision="highest")


# --- Losses and update ---


class TrainState(NamedTuple):
    actor: dict  # variables: params and batch_stats, as those of the other networks
    target_actor: dict
    actor_opt: optax.OptState
    critic: dict  # of both critics
    target_critic: dict
    critic_opt: optax.OptState
    key: jax.Array


def q_values(config, state, observations, actions):
    """Return min_k Q_k(s, a), (B,), for normalised states (B, S) and actions (B, A)."""
    outputs = forward(Critics(config), state.critic, observations, actions)
    return critic_values(config, outputs).min(0)


def critic_target(config, state, batch, key):
    """Return r + gamma (1 - d) [min_k Q'_k(s', a') - critic_bc_coef ||a' - a'_data||^2], (B,).

    a' is the target actor's action at s' plus clipped noise, clipped to [-1, 1] (ReBRAC).
    """
    noise = config.target_noise * jax.random.normal(key, batch.actions.shape)
    noise = jnp.clip(noise, -config.noise_clip, config.noise_clip)
    network = Actor(config, batch.actions.shape[-1])
    next_actions = forward(network, state.target_actor, batch.next_observations)
    next_actions = jnp.clip(next_actions + noise, -1, 1)
    penalty = jnp.sum((next_actions - batch.next_actions) ** 2, -1)
    outputs = forward(Critics(config), state.target_critic, batch.next_observations, next_actions)
    next_values = critic_values(config, outputs).min(0) - config.critic_bc_coef * penalty
    return batch.rewards + config.gamma * (1 - batch.terminals) * next_values


def critic_loss(params, config, state, batch, target, key):
    """Return the cross-entropy of the critics' logits to HL-Gauss(target), or the squared error.

    The loss is the sum of both critics' losses, and their mean is logged. Also returns the
    critics' variables and scalars to log.
    """
    critic = {**state.critic, "params": params}
    outputs, critic = forward_train(Critics(config), critic, key, batch.observations, batch.actions)
    if config.critic_loss == "mse":
        losses = (outputs[..., 0] - target) ** 2
    else:
        losses = optax.softmax_cross_entropy(outputs, hl_gauss(config, target))
    info = {"critic_loss": losses.mean(), "q": critic_values(config, outputs).mean()}
    return losses.mean(1).sum(), (critic, info)


def actor_loss(params, config, state, batch, keys):
    """Return actor_bc_coef ||pi(s) - a||^2 - actor_q_coef min_k Q_k(s, pi(s)) / mean |min_k Q_k|.

    It is a mean over the batch. No gradient flows through the denominator. The actor has dropout
    and noise. The critics see clean states. Also returns the actor's variables and scalars to log.
    """
    dropout_key, input_key, objective_key = keys
    observations = batch.observations
    if is_on(config.actor_input_noise):
        noise = jax.random.normal(input_key, observations.shape)
        observations = observations + config.actor_input_noise * noise
    bc_targets = batch.actions
    if is_on(config.actor_bc_noise):
        noise = jax.random.normal(objective_key, bc_targets.shape)
        bc_targets = bc_targets - config.actor_bc_noise * noise
    actor = {**state.actor, "params": params}
    network = Actor(config, batch.actions.shape[-1])
    actions, actor = forward_train(network, actor, dropout_key, observations)
    loss, bc = actor_objective(config, state, batch, actions, bc_targets)
    return loss, (actor, {"actor_loss": loss, "bc_loss": bc})


def actor_objective(config, state, batch, actions, bc_targets):
    """Return the actor's loss for its actions (B, A), and the loss's cloning term."""
    bc = jnp.sum((actions - bc_targets) ** 2, -1).mean()
    loss = config.actor_bc_coef * bc
    if is_on(config.actor_q_coef):
        values = q_values(config, state, batch.observations, actions)
        scale = jax.lax.stop_gradient(jnp.abs(values).mean())
        loss = loss - config.actor_q_coef * values.mean() / scale
    return loss, bc


def actor_optimizer(config):
    """Return the actor's optimiser, whose schedule counts the actor's own steps."""
    num_steps = config.num_updates // config.policy_freq
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
    """Update the actor once; return the new state and a dictionary of scalars."""
    key, noise_key, *loss_keys = jax.random.split(state.key, 5)
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


def update_targets(config, state):
    """Move both targets by tau towards the networks (Polyak average)."""
    return state._replace(
        target_actor=optax.incremental_update(state.actor, state.target_actor, config.tau),
        target_critic=optax.incremental_update(state.critic, state.target_critic, config.tau),
    )


def update(config, state, batches):
    """Update the critics on each of `batches` (policy_freq, B, ...), the actor on the last one.

    Then update the targets. A pure function of a TrainState and Transitions. Returns the new state
    and scalars to log. The critics' scalars are from their last update.
    """
    for k in range(config.policy_freq):
        batch = Transitions(*(x[k] for x in batches))
        state, critic_info = update_critics(config, state, batch)
    state, actor_info = update_actor(config, state, batch)
    return update_targets(config, state), {**critic_info, **actor_info}


def init_state(config, batch, seed):
    """Return the state before the first update. Of `batch` only the shapes count."""
    key, actor_key, critic_key = jax.random.split(jax.random.key(seed), 3)
    network = Actor(config, batch.actions.shape[-1])
    actor = init_network(network, actor_key, batch.observations)
    critic = init_network(Critics(config), critic_key, batch.observations, batch.actions)
    return TrainState(
        actor=actor,
        target_actor=actor,
        actor_opt=actor_optimizer(config).init(actor["params"]),
        critic=critic,
        target_critic=critic,
        critic_opt=critic_optimizer(config).init(critic["params"]),
        key=key,
    )


# --- Range of the values ---


def with_value_range(config, data):
    """Set v_min and v_max, unless given, to the data's smallest and largest return to go.

    Held-out episodes count, too. The values of a policy that is much better than the data may lie
    beyond the support. `hl_gauss` says what becomes of such targets.
    """
    if config.critic_loss == "mse":
        return config
    ends = data["ends"] | data["terminals"]
    returns = returns_to_go(data["rewards"], ends, config.gamma)
    v_min = float(returns.min()) if config.v_min is None else config.v_min
    v_max = float(returns.max()) if config.v_max is None else config.v_max
    if v_min >= v_max:
        raise UserError(f"no value is between {v_min:g} and {v_max:g}; set v_min and v_max")
    return replace(config, v_min=v_min, v_max=v_max)


def returns_to_go(rewards, ends, gamma):
    """Return the discounted return from each step to the next end, (N,)."""
    rewards = rewards.tolist()  # since loops over arrays are slow
    ends = ends.tolist()
    returns = np.empty(len(rewards))
    return_to_go = 0.0
    for i in reversed(range(len(rewards))):
        if ends[i]:
            return_to_go = 0.0
        return_to_go = rewards[i] + gamma * return_to_go
        returns[i] = return_to_go
    return returns


# --- Training ---


@over_members("state", donate="state")
def epoch(config, state, data):
    """Make `log_every` updates in one scan; return the state and what each `update` logs."""

    def step(state, _):
        key, batch_key = jax.random.split(state.key)
        index = jax.random.choice(batch_key, data["train"], (config.policy_freq, config.batch_size))
        return update(config, state._replace(key=key), transitions(data, index))

    return jax.lax.scan(step, state, length=config.log_every // config.policy_freq)


def act(config, actor, data, observations):
    """Return the actions (B, A) in evaluation, for normalised states (B, S)."""
    network = Actor(config, data["actions"].shape[-1])
    return forward(network, actor, observations)


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
    config = with_value_range(config, data)
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

    If all values of the batch have one sign, then the second term of the loss is
    exactly -actor_q_coef or actor_q_coef, and only the cloning term varies. See `q_gain`.
    """
    network = Actor(config, batch.actions.shape[-1])
    actions = forward(network, state.actor, batch.observations)
    loss, _ = actor_objective(config, state, batch, actions, batch.actions)
    return loss


def overestimation(config, data, state, episodes):
    """Return Q(s, pi(s)) minus the discounted return that the policy achieves from s, as a mean.

    Here s are the first states of the episodes without noise. Rewards are scaled as in training.
    What an episode would gain after its time limit counts as 0. Q has the penalties of
    `critic_target`, and the return has not, so that the difference is too low by these.
    """
    starts = (episodes.starts - data["mean"]) / data["std"]
    values = q_values(config, state, starts, act(config, state.actor, data, starts))
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


# --- Appendix: the paper's hyperparameters ---

# Names of `regularisers` -> flags, at the strengths that the paper chose for all datasets
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

# Combinations of them -> the strengths that the paper chose anew for these
COMBINED = {
    "DO+LN+GrN": dict(actor_grad_noise=0.003),
    "DO+LN+InN": dict(actor_input_noise=0.01),
    "DO+LN+L2": dict(actor_wd=1e-4),
    "DO+LN+EN": dict(actor_wd=1e-5),
    "DO+EN+BCN": dict(actor_bc_noise=0.1),
    "DO+LN+GrN+L2": dict(actor_grad_noise=0.003, actor_wd=1e-4),
    "DO+LN+GrN+L1": dict(actor_grad_noise=0.003),
    "DO+LN+GrN+EN": dict(actor_grad_noise=0.003, actor_wd=1e-5),
    "DO+LN+BCN+L2": dict(actor_wd=1e-5),
}

# Names of `regularisers` that stand for values tuned per dataset -> what was tuned
BEST = {"best": "DO+LN+GrN", "best-L2": "L2"}

# Names of `preset` -> what it sets
PRESETS = {
    "as-run": "the published configuration of best",
    "as-run-L2": "the published configuration of best-L2",
    "as-run-none": "the published configuration of the baseline",
    "batch-1024": "only the batch size and learning rates that as-run has on Adroit",
    "td3-bc": "TD3+BC (arXiv 2106.06860), see `presets`",
}

# Entries of an action, by task: TD3+BC's coefficient depends on them
ACTION_DIMS = dict(
    halfcheetah=6,
    hopper=3,
    walker2d=6,
    ant=8,
    antmaze=8,
    pen=24,
    door=28,
    hammer=26,
    relocate=30,
)

# The grid in which `best` was tuned
TUNING_GRID = dict(
    actor_ln=[False, True],
    actor_dropout=[0, 0.1, 0.2],
    actor_grad_noise=[0, 0.003, 0.01],
)

# The values that the paper tuned for each dataset:
#   bc, bins, expand    HL-Gauss: actor_bc_coef, n_classes, v_expand. Where v_expand is -0.05, some
#                       of the data's returns are outside the support, and clip_targets matters.
#   mse_bc, critic_bc   squared error: actor_bc_coef, critic_bc_coef
#   l2_wd               best-L2: actor_wd
#   ln, dropout, noise  best: actor_ln, actor_dropout, actor_grad_noise
TUNED = read_table("""
dataset                       bc     bins  expand  mse_bc  critic_bc  l2_wd   ln     dropout  noise
halfcheetah-random-v2         0.001  201   0.05    0.001   0.1        0.1     False  0.2      0.01
halfcheetah-medium-v2         0.001  201   0.1     0.001   0.01       0.1     True   0.1      0.01
halfcheetah-expert-v2         0.01   201   0.05    0.01    0.01       1e-05   True   0.0      0.003
halfcheetah-medium-replay-v2  0.001  201   0.1     0.01    0.001      1e-05   True   0.2      0.01
halfcheetah-medium-expert-v2  0.01   201   0.1     0.01    0.1        1e-05   True   0.0      0.003
halfcheetah-full-replay-v2    0.001  201   -0.05   0.001   0.1        0.01    True   0.0      0.01
hopper-random-v2              0.001  401   -0.05   0.001   0.01       0.001   False  0.2      0.01
hopper-medium-v2              0.01   201   -0.05   0.01    0.01       0.01    True   0.2      0.01
hopper-expert-v2              0.05   401   0.1     0.1     0.1        1e-05   False  0.2      0.003
hopper-medium-replay-v2       0.01   401   -0.05   0.05    0.5        1e-05   True   0.0      0.003
hopper-medium-expert-v2       0.05   401   0.05    0.1     0.01       0.0001  False  0.0      0.003
hopper-full-replay-v2         0.01   201   0.05    0.01    0.01       0.01    False  0.0      0.003
walker2d-random-v2            0.05   201   0.05    0.01    0.0        0.0001  True   0.1      0.01
walker2d-medium-v2            0.05   201   0.1     0.05    0.1        0.01    False  0.1      0.0
walker2d-expert-v2            0.01   401   0.05    0.01    0.5        0.1     False  0.2      0.003
walker2d-medium-replay-v2     0.01   401   -0.05   0.05    0.01       0.001   False  0.2      0.0
walker2d-medium-expert-v2     0.05   401   0.05    0.01    0.01       0.1     False  0.2      0.01
walker2d-full-replay-v2       0.001  201   0.1     0.01    0.01       0.1     True   0.1      0.0
antmaze-umaze-v2              0.05   401   0.1     0.003   0.002      1e-05   False  0.2      0.01
antmaze-umaze-diverse-v2      0.01   201   0.1     0.003   0.001      1e-05   True   0.1      0.0
antmaze-medium-play-v2        0.001  401   0.05    0.001   0.0005     0.0001  True   0.2      0.003
antmaze-medium-diverse-v2     0.01   401   0.1     0.001   0.0        0.1     True   0.2      0.003
antmaze-large-play-v2         0.01   401   0.1     0.002   0.001      1e-05   True   0.0      0.0
antmaze-large-diverse-v2      0.01   401   0.1     0.002   0.002      0.0001  True   0.0      0.003
pen-human-v1                  0.05   201   -0.05   0.1     0.5        0.1     True   0.1      0.01
pen-cloned-v1                 0.05   401   0.05    0.05    0.5        1e-05   False  0.1      0.003
pen-expert-v1                 0.01   401   -0.05   0.01    0.01       0.001   True   0.1      0.0
door-human-v1                 0.001  401   -0.05   0.1     0.1        0.1     True   0.1      0.01
door-cloned-v1                0.05   201   0.1     0.01    0.1        0.1     False  0.2      0.003
door-expert-v1                0.05   401   -0.05   0.05    0.01       0.01    True   0.1      0.0
hammer-human-v1               0.05   201   -0.05   0.01    0.5        0.1     True   0.2      0.0
hammer-cloned-v1              0.05   401   0.05    0.1     0.5        0.001   True   0.2      0.01
hammer-expert-v1              0.01   401   0.1     0.01    0.01       0.0001  True   0.1      0.003
relocate-human-v1             0.05   201   0.05    0.1     0.01       0.1     True   0.2      0.01
relocate-cloned-v1            0.05   201   0.1     0.1     0.01       0.01    False  0.2      0.01
relocate-expert-v1            0.05   401   0.05    0.05    0.01       0.01    True   0.2      0.003
""")


# On AntMaze `best` was tuned once more for the published configuration. There as-run takes these
# values in place of TUNED's.
AS_RUN_ANTMAZE = read_table("""
dataset                       bc     expand  ln     dropout  noise
antmaze-umaze-v2              0.01   0.1     False  0.0      0.01
antmaze-umaze-diverse-v2      0.01   0.1     True   0.1      0.003
antmaze-medium-play-v2        0.01   0.05    True   0.2      0.01
antmaze-medium-diverse-v2     0.01   0.05    True   0.2      0.0
antmaze-large-play-v2         0.01   0.1     True   0.0      0.003
antmaze-large-diverse-v2      0.01   0.05    True   0.0      0.003
""")


def tuned(config):
    """Fill in what the user left open with the paper's values for the dataset."""
    row = tuned_values(TUNED, config.dataset_name)
    best_l2 = dict(actor_wd=row["l2_wd"], actor_l1_ratio=0.0)
    best = dict(actor_ln=row["ln"], actor_dropout=row["dropout"], actor_grad_noise=row["noise"])
    names = {**CHOSEN, "best-L2": best_l2, "best": best}
    config = with_regularisers(config, names, COMBINED, presets(config, best, best_l2))

    is_mse = config.critic_loss == "mse"
    is_antmaze = domain(config.dataset_name) == "antmaze"
    is_adroit = domain(config.dataset_name) == "adroit"
    is_scaled = is_antmaze and config.normalize_reward in (None, True)  # the returns are 0 to 100
    rates = dict(batch_size=1024, actor_learning_rate=1e-3, critic_learning_rate=1e-3)
    if is_adroit:
        rates = dict(batch_size=256, actor_learning_rate=3e-4, critic_learning_rate=3e-4)
    if is_antmaze and is_mse:
        rates = dict(batch_size=256, actor_learning_rate=3e-4, critic_learning_rate=5e-5)
    defaults = dict(
        **rates,
        normalize_reward=is_antmaze,
        gamma=0.999 if is_antmaze else 0.99,
        actor_bc_coef=row["mse_bc"] if is_mse else row["bc"],
        critic_bc_coef=row["critic_bc"] if is_mse else 0.001,  # with HL-Gauss the same for all
        n_classes=row["bins"],
        v_expand=row["expand"],
        v_min=0.0 if is_scaled else None,
        v_max=100.0 if is_scaled else None,
        eval_every=50_000 if is_antmaze else 10_000,
        eval_episodes=100 if is_antmaze else 10,
    )
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return replace(config, **missing)


def presets(config, best, best_l2):
    """Return the fields that each name of PRESETS stands for, given `best` and `best-L2`.

    TD3+BC minimises a difference: (pi(s) - a)^2, as a mean over the action's dimensions, less
    2.5 Q / mean |Q|. Here both terms are divided by 2.5, on which Adam's steps don't depend. Three
    differences are left. Q is the smaller critic's, not the first one's. Networks start as
    ReBRAC's do. On AntMaze rewards are multiplied by 100, not lowered by 1. States are not
    normalised there, as TD3+BC's author advises.
    """
    # On Adroit the regularised runs of the paper have this, but not those of the baseline
    large_batch = dict(batch_size=1024, actor_learning_rate=1e-3, critic_learning_rate=1e-3)
    baseline = dict(clip_targets=False)
    as_run = baseline
    if domain(config.dataset_name) == "adroit":
        as_run = {**baseline, **large_batch}
    published_best = best
    if config.dataset_name in AS_RUN_ANTMAZE:
        row = AS_RUN_ANTMAZE[config.dataset_name]
        published_best = dict(
            actor_bc_coef=row["bc"],
            v_expand=row["expand"],
            actor_ln=row["ln"],
            actor_dropout=row["dropout"],
            actor_grad_noise=row["noise"],
        )
    td3_bc = dict(
        critic_loss="mse",
        critic_bc_coef=0.0,
        critic_ln=False,
        actor_layers=2,
        critic_layers=2,
        normalize_states=domain(config.dataset_name) != "antmaze",
        gamma=0.99,
        batch_size=256,
        actor_learning_rate=3e-4,
        critic_learning_rate=3e-4,
    )
    task = config.dataset_name.split("-")[0]
    if task in ACTION_DIMS:
        td3_bc["actor_bc_coef"] = 1 / (2.5 * ACTION_DIMS[task])
    elif config.preset == "td3-bc" and config.actor_bc_coef is None:
        raise UserError(
            f"td3-bc on {config.dataset_name} needs --actor_bc_coef: "
            "1 / (2.5 times the action's dimension)"
        )
    return {
        "as-run": {**as_run, **published_best},
        "as-run-L2": {**as_run, **best_l2},
        "as-run-none": baseline,
        "batch-1024": large_batch,
        "td3-bc": td3_bc,
    }


# --- Main ---


def main():
    given = parse(Config)
    if given.evaluate is not None:
        return evaluate_run(given, policy, constraints, BOUNDS)
    config = tuned(given)
    check(config, constraints, BOUNDS, given_values(Config))
    if given.dataset_name not in TUNED:
        print(f"{given.dataset_name} has no tuned values: taking the median of its domain's")
    config = with_checksum(config)
    with Run(__file__, config, tuned) as run:
        if not run.finished_before:
            train(config, run)


if __name__ == "__main__":
    with one_line_errors():
        main()
