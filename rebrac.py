"""ReBRAC with a regularised actor, from "The Role of Deep Learning Regularizations on Actors in Offline RL"
(arXiv 2409.07606), over "Revisiting the Minimalist Approach to Offline RL" (ReBRAC, arXiv 2305.09836).

    python rebrac.py --dataset_name hopper-medium-v2                                      # the paper's baseline
    python rebrac.py --dataset_name hopper-medium-v2 --actor_ln true --actor_dropout 0.1  # its actor regularised
    python rebrac.py --dataset_name pen-human-v1 --critic_loss mse --num_updates 50000    # the original's critic

Two CPU cores make about 24 updates a second at batch 1024, as on Gym-MuJoCo, and 80 at 256, as on Adroit; with mse 29
and 105.
"""

import difflib
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Optional, Tuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from runs import Run, check, compiling, evaluate_run, named_regularisers, parse, with_pca_ranks, with_regularisers
from tasks import episode_returns, evaluate, load_dataset, make_envs, make_samples

# --- Config ---


@dataclass(frozen=True)
class Config:
    # Data
    dataset_name: str = "halfcheetah-medium-replay-v2"  # one of the paper's 36, the keys of TUNED
    dataset_path: Optional[str] = None  # a file in D4RL's HDF5 format (none: D4RL's own, from D4RL_DATASET_DIR)
    normalize_states: bool = False  # to mean 0 and standard deviation 1 over the training data
    normalize_reward: Optional[bool] = None  # AntMaze: x 100; others: x 1000 / (best - worst episode return)
    validation_frac: float = 0.0  # share of the episodes that is held out; 0.05 when tuning
    validation_seed: Optional[int] = None  # shuffles the episodes before that (none: the file's last are held out)
    # Algorithm; where it says none, the paper's value for the dataset is taken
    critic_loss: str = "hl_gauss"  # hl_gauss: classification (the paper); mse: squared error (the original ReBRAC)
    gamma: Optional[float] = None  # discount
    tau: float = 0.005  # share of the new parameters in the targets' moving average
    batch_size: Optional[int] = None  # transitions in an update
    actor_learning_rate: Optional[float] = None
    critic_learning_rate: Optional[float] = None
    actor_bc_coef: Optional[float] = None  # weight of ||pi(s) - a||^2 in the actor's loss
    critic_bc_coef: Optional[float] = None  # weight of ||a' - a'_data||^2 in the critic's target
    actor_q_coef: float = 1.0  # weight of the normalised Q in the actor's loss; 0 is behaviour cloning
    policy_freq: int = 2  # critic updates for each update of the actor and the targets
    target_noise: float = 0.2  # standard deviation of the noise on the target actor's actions
    noise_clip: float = 0.5  # largest absolute value of that noise
    n_classes: Optional[int] = None  # hl_gauss: bins
    v_min: Optional[float] = None  # hl_gauss: smallest and
    v_max: Optional[float] = None  # largest return to go (none: the dataset's)
    v_expand: Optional[float] = None  # hl_gauss: widening of [v_min, v_max], as a share of it
    sigma_frac: float = 0.75  # hl_gauss: standard deviation of a target, in bins
    # Networks
    hidden_dim: int = 256
    actor_layers: int = 3  # hidden layers
    critic_layers: int = 3
    # Actor regularisers; 0 or false is exactly off
    regularisers: str = "none"  # names of CHOSEN such as DO+LN; best or best-L2: as tuned for the dataset
    actor_dropout: float = 0.0  # share of the hidden units dropped in the actor's loss
    actor_wd: float = 0.0  # decoupled weight decay
    actor_l1_ratio: float = 0.0  # share of L1 in the weight decay: 0 is L2, 1 is L1, 0.5 the paper's elastic net
    actor_wd_kernels_only: bool = False  # spare biases and normalisation parameters
    actor_ln: bool = False  # LayerNorm
    actor_fn: bool = False  # FeatureNorm: LayerNorm without scale and bias
    actor_gn: bool = False  # GroupNorm, 32 groups
    actor_bn: bool = False  # BatchNorm
    actor_sn: bool = False  # SpectralNorm of the last hidden Dense
    actor_input_noise: float = 0.0  # standard deviation of noise on the actor's states in its loss
    actor_bc_noise: float = 0.0  # objective noise: standard deviation of noise on the cloned actions
    actor_grad_noise: float = 0.0  # standard deviation of noise on the first gradient; decays by (1 + t)^-0.55
    actor_lr_decay: bool = False  # cosine decay of the actor's learning rate to 0 over the run
    # The same for the critics, which the paper leaves alone
    critic_dropout: float = 0.0
    critic_wd: float = 0.0
    critic_l1_ratio: float = 0.0
    critic_wd_kernels_only: bool = False
    critic_ln: bool = True  # on in ReBRAC
    critic_fn: bool = False
    critic_gn: bool = False
    critic_bn: bool = False
    critic_sn: bool = False
    critic_grad_noise: float = 0.0
    critic_lr_decay: bool = False
    # Run
    seed: int = 0  # everything random in a run follows from it
    num_seeds: int = 1  # seed, seed + 1, ... trained at once
    num_updates: int = 1_000_000  # of the critic
    log_every: int = 1000  # updates in an epoch, which is one compiled scan
    eval_every: Optional[int] = None  # updates between evaluations (none: 10,000; AntMaze: 50,000)
    eval_episodes: Optional[int] = None  # episodes in an evaluation (none: 10; AntMaze: 100)
    eval_noise: Tuple[Tuple[float, float], ...] = ((0.2, 0.0), (0.0, 0.05))  # robustness: on actions and on states
    analysis: bool = True  # what is inside the actor is measured in each evaluation
    deterministic: bool = False  # the same bits each time on a GPU, too, at some cost in speed
    results: str = "results"  # where runs have their directories
    evaluate: Optional[str] = None  # directory of a run: no training, its policies are evaluated
    video: Optional[str] = None  # of one episode of that, .mp4 or .gif


# The names of `regularisers`, at the strengths that the paper chose for all datasets
CHOSEN = named_regularisers(DO=0.1, L2=1e-3, L1=1e-5, EN=1e-4, InN=0.003, BCN=0.01, GrN=0.01)

# The paper's tuned values. Columns: hl_gauss actor_bc_coef, n_classes, v_expand | mse actor_bc_coef, critic_bc_coef |
# best-L2 actor_wd | best actor_ln, actor_dropout, actor_grad_noise
TUNED = {
    "halfcheetah-random-v2": (0.001, 201, 0.05, 0.001, 0.1, 0.1, False, 0.2, 0.01),
    "halfcheetah-medium-v2": (0.001, 201, 0.1, 0.001, 0.01, 0.1, True, 0.1, 0.01),
    "halfcheetah-expert-v2": (0.01, 201, 0.05, 0.01, 0.01, 1e-05, True, 0.0, 0.003),
    "halfcheetah-medium-replay-v2": (0.001, 201, 0.1, 0.01, 0.001, 1e-05, True, 0.2, 0.01),
    "halfcheetah-medium-expert-v2": (0.01, 201, 0.1, 0.01, 0.1, 1e-05, True, 0.0, 0.003),
    "halfcheetah-full-replay-v2": (0.001, 201, -0.05, 0.001, 0.1, 0.01, True, 0.0, 0.01),
    "hopper-random-v2": (0.001, 401, -0.05, 0.001, 0.01, 0.001, False, 0.2, 0.01),
    "hopper-medium-v2": (0.01, 201, -0.05, 0.01, 0.01, 0.01, True, 0.2, 0.01),
    "hopper-expert-v2": (0.05, 401, 0.1, 0.1, 0.1, 1e-05, False, 0.2, 0.003),
    "hopper-medium-replay-v2": (0.01, 401, -0.05, 0.05, 0.5, 1e-05, True, 0.0, 0.003),
    "hopper-medium-expert-v2": (0.05, 401, 0.05, 0.1, 0.01, 0.0001, False, 0.0, 0.003),
    "hopper-full-replay-v2": (0.01, 201, 0.05, 0.01, 0.01, 0.01, False, 0.0, 0.003),
    "walker2d-random-v2": (0.05, 201, 0.05, 0.01, 0.0, 0.0001, True, 0.1, 0.01),
    "walker2d-medium-v2": (0.05, 201, 0.1, 0.05, 0.1, 0.01, False, 0.1, 0.0),
    "walker2d-expert-v2": (0.01, 401, 0.05, 0.01, 0.5, 0.1, False, 0.2, 0.003),
    "walker2d-medium-replay-v2": (0.01, 401, -0.05, 0.05, 0.01, 0.001, False, 0.2, 0.0),
    "walker2d-medium-expert-v2": (0.05, 401, 0.05, 0.01, 0.01, 0.1, False, 0.2, 0.01),
    "walker2d-full-replay-v2": (0.001, 201, 0.1, 0.01, 0.01, 0.1, True, 0.1, 0.0),
    "antmaze-umaze-v2": (0.05, 401, 0.1, 0.003, 0.002, 1e-05, False, 0.2, 0.01),
    "antmaze-umaze-diverse-v2": (0.01, 201, 0.1, 0.003, 0.001, 1e-05, True, 0.1, 0.0),
    "antmaze-medium-play-v2": (0.001, 401, 0.05, 0.001, 0.0005, 0.0001, True, 0.2, 0.003),
    "antmaze-medium-diverse-v2": (0.01, 401, 0.1, 0.001, 0.0, 0.1, True, 0.2, 0.003),
    "antmaze-large-play-v2": (0.01, 401, 0.1, 0.002, 0.001, 1e-05, True, 0.0, 0.0),
    "antmaze-large-diverse-v2": (0.01, 401, 0.1, 0.002, 0.002, 0.0001, True, 0.0, 0.003),
    "pen-human-v1": (0.05, 201, -0.05, 0.1, 0.5, 0.1, True, 0.1, 0.01),
    "pen-cloned-v1": (0.05, 401, 0.05, 0.05, 0.5, 1e-05, False, 0.1, 0.003),
    "pen-expert-v1": (0.01, 401, -0.05, 0.01, 0.01, 0.001, True, 0.1, 0.0),
    "door-human-v1": (0.001, 401, -0.05, 0.1, 0.1, 0.1, True, 0.1, 0.01),
    "door-cloned-v1": (0.05, 201, 0.1, 0.01, 0.1, 0.1, False, 0.2, 0.003),
    "door-expert-v1": (0.05, 401, -0.05, 0.05, 0.01, 0.01, True, 0.1, 0.0),
    "hammer-human-v1": (0.05, 201, -0.05, 0.01, 0.5, 0.1, True, 0.2, 0.0),
    "hammer-cloned-v1": (0.05, 401, 0.05, 0.1, 0.5, 0.001, True, 0.2, 0.01),
    "hammer-expert-v1": (0.01, 401, 0.1, 0.01, 0.01, 0.0001, True, 0.1, 0.003),
    "relocate-human-v1": (0.05, 201, 0.05, 0.1, 0.01, 0.1, True, 0.2, 0.01),
    "relocate-cloned-v1": (0.05, 201, 0.1, 0.1, 0.01, 0.01, False, 0.2, 0.01),
    "relocate-expert-v1": (0.05, 401, 0.05, 0.05, 0.01, 0.01, True, 0.2, 0.003),
}


def tuned(config):
    """Fills in what the user left open: the paper's values for the dataset (its tables of hyperparameters)."""
    name = config.dataset_name
    if name not in TUNED:
        near = difflib.get_close_matches(name, TUNED, n=3, cutoff=0)
        sys.exit(f"error: unknown dataset {name!r}; the nearest names are {', '.join(near)}")
    hl_gauss, antmaze, adroit = config.critic_loss == "hl_gauss", "antmaze" in name, name.endswith("-v1")
    actor_bc_coef, n_classes, v_expand, mse_actor_bc_coef, mse_critic_bc_coef, wd, ln, dropout, noise = TUNED[name]
    best = dict(actor_ln=ln, actor_dropout=dropout, actor_grad_noise=noise)
    config = with_regularisers(config, CHOSEN | {"best-L2": dict(actor_wd=wd, actor_l1_ratio=0.0), "best": best})
    small = adroit or (antmaze and not hl_gauss)
    values = dict(
        normalize_reward=antmaze,
        gamma=0.999 if antmaze else 0.99,
        batch_size=256 if small else 1024,
        actor_learning_rate=3e-4 if small else 1e-3,
        critic_learning_rate=5e-5 if antmaze and small else 3e-4 if small else 1e-3,
        actor_bc_coef=actor_bc_coef if hl_gauss else mse_actor_bc_coef,
        critic_bc_coef=0.001 if hl_gauss else mse_critic_bc_coef,
        n_classes=n_classes,
        v_expand=v_expand,
        eval_every=50_000 if antmaze else 10_000,
        eval_episodes=100 if antmaze else 10,
    )
    if antmaze:
        values.update(v_min=0.0, v_max=100.0)
    return replace(config, **{key: value for key, value in values.items() if getattr(config, key) is None})


def rules(config):
    """What must hold beside the bounds that `check` knows, by the message if it doesn't."""
    return {
        "critic_loss must be hl_gauss or mse": config.critic_loss in ("hl_gauss", "mse"),
        "log_every must be a multiple of policy_freq": config.log_every % max(config.policy_freq, 1) == 0,
        "v_min must be below v_max": None in (config.v_min, config.v_max) or config.v_min < config.v_max,
    }


# --- Data ---


def make_dataset(config, raw):
    """Splits a file's steps, by episode, into those to train on and those held out; scales rewards and states.

    Returns the file's arrays, `ends` (N,) of its episodes, the indices of the steps that make transitions, `train` and
    `validation`, and the `mean` and `std` (S,) by which the states were normalised.
    """
    ends = raw["terminals"] | raw["timeouts"]
    ends[-1] = True
    episode = np.cumsum(ends) - ends
    num_episodes = episode[-1] + 1
    num_held_out = round(config.validation_frac * num_episodes)
    if config.validation_frac > 0 and not 0 < num_held_out < num_episodes:
        sys.exit(f"error: validation_frac {config.validation_frac} of {num_episodes} episodes is {num_held_out}")
    order = np.arange(num_episodes)
    if config.validation_seed is not None:
        np.random.default_rng(config.validation_seed).shuffle(order)
    held_out = np.isin(episode, order[num_episodes - num_held_out :])
    # As in D4RL's qlearning_dataset: a step at a timeout is left out, since its s' isn't known, and so is the last.
    usable = ~raw["timeouts"]
    usable[-1] = False
    train, validation = (np.flatnonzero(usable & part).astype(np.int32) for part in (~held_out, held_out))

    if not len(train):
        sys.exit("error: there is no transition to train on")
    which = "the last" if config.validation_seed is None else f"by validation_seed {config.validation_seed},"
    print(
        f"training on {num_episodes - num_held_out} episodes, {len(train)} transitions; "
        f"held out: {which} {num_held_out}, {len(validation)} transitions"
    )

    observations, rewards = raw["observations"], raw["rewards"]
    if config.normalize_reward and "antmaze" in config.dataset_name:
        rewards = rewards * np.float32(100)
    elif config.normalize_reward:
        if not (spread := np.ptp(episode_returns(raw))):
            sys.exit("error: all episodes have the same return; use --normalize_reward false")
        rewards = rewards * np.float32(1000 / spread)
    mean, std = np.float32(0), np.float32(1)
    if config.normalize_states:
        mean = observations[train].mean(0, dtype=np.float64).astype(np.float32)
        std = observations[train].std(0, dtype=np.float64).astype(np.float32) + np.float32(1e-3)
        observations = (observations - mean) / std
    return dict(
        observations=observations, actions=raw["actions"], rewards=rewards, terminals=raw["terminals"],
        ends=ends, train=train, validation=validation, mean=mean, std=std,
    )  # fmt: skip


class Transitions(NamedTuple):
    observations: jax.Array  # s (B, S)
    actions: jax.Array  # a (B, A)
    rewards: jax.Array  # r (B,)
    next_observations: jax.Array  # s' (B, S), of no meaning where d is 1
    next_actions: jax.Array  # a' (B, A), of the same episode; a itself where d is 1
    terminals: jax.Array  # d (B,), 0.0 or 1.0


def transitions(data, index):
    """The transitions of the steps `index` (B,): what follows a step is the next row, in a file and in `data`."""
    terminals = data["terminals"][index]
    return Transitions(
        observations=data["observations"][index],
        actions=data["actions"][index],
        rewards=data["rewards"][index],
        next_observations=data["observations"][index + 1],
        next_actions=data["actions"][index + 1 - terminals],
        terminals=terminals.astype(np.float32),
    )


# --- Networks: the regularised hidden layers ---


def is_on(strength):
    """False for 0, which is then compiled away; a strength that is traced is on."""
    return isinstance(strength, jax.Array) or strength > 0


class Hidden(nn.Module):
    """Hidden layers of Dense, ReLU, LayerNorm, FeatureNorm, GroupNorm, BatchNorm and Dropout, in the paper's order.

    `network`, "actor" or "critic", says which of the config's regularisers are meant.
    """

    config: Config
    network: str

    @nn.compact
    def __call__(self, x, train):
        flag = lambda key: getattr(self.config, f"{self.network}_{key}")
        last = flag("layers") - 1
        for layer in range(flag("layers")):
            dense = nn.Dense(self.config.hidden_dim, kernel_init=hidden_kernel_init, bias_init=hidden_bias_init)
            x = nn.SpectralNorm(dense)(x, update_stats=train) if flag("sn") and layer == last else dense(x)
            if layer == last:
                self.sow("intermediates", "features", x)
            x = nn.relu(x)
            if flag("ln"):
                x = nn.LayerNorm()(x)
            if flag("fn"):
                x = nn.LayerNorm(use_scale=False, use_bias=False)(x)
            if flag("gn"):
                x = nn.GroupNorm(num_groups=32)(x)
            if flag("bn"):
                x = nn.BatchNorm(use_running_average=not train)(x)
            if train and is_on(flag("dropout")):
                kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - flag("dropout"), x.shape)
                x = jnp.where(kept, x / (1 - flag("dropout")), 0)
        return x


def init_network(network, key, *inputs):
    """Variables of `network`: params, and batch_stats (empty without BatchNorm and SpectralNorm)."""
    return {"batch_stats": {}, **network.init(key, *inputs, train=False)}


def infer(network, variables, *inputs):
    """The network's output as targets and evaluation see it: no dropout, running statistics."""
    return network.apply(variables, *inputs, train=False)


def train_forward(network, variables, key, *inputs):
    """The network's output in training, and its variables with the running statistics that the pass updates.

    Without a key, the output as evaluation sees it."""
    if key is None:
        return infer(network, variables, *inputs), variables
    output, updated = network.apply(variables, *inputs, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
    return output, {**variables, **updated}


# --- Optimiser ---


def make_optimizer(config, network, num_steps):
    """Adam with the decoupled weight decay theta -= lr wd ((1 - rho) theta + rho sign theta), rho the L1 ratio."""
    learning_rate, wd, rho = (getattr(config, f"{network}_{key}") for key in ("learning_rate", "wd", "l1_ratio"))

    def decay(updates, params):
        def add(path, update, param):
            if getattr(config, f"{network}_wd_kernels_only") and path[-1].key != "kernel":
                return update
            return update + wd * ((1 - rho) * param + rho * jnp.sign(param) if is_on(rho) else param)

        return jax.tree.map_with_path(add, updates, params)

    if getattr(config, f"{network}_lr_decay"):  # counted in this network's own steps
        learning_rate = optax.cosine_decay_schedule(learning_rate, num_steps)
    return optax.chain(
        optax.scale_by_adam(),
        optax.stateless(decay) if is_on(wd) else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def optimize(config, network, optimizer, variables, opt_state, grads, key):
    """One step of `network`'s optimiser; returns its variables and the optimiser's state."""
    noise = getattr(config, f"{network}_grad_noise")
    if is_on(noise):
        scale = noise / (1 + opt_state[0].count) ** 0.55  # Adam counts the network's own steps
        grads = jax.tree.map(lambda grad, e: grad + scale * e, grads, optax.tree.random_like(key, grads))
    updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
    return {**variables, "params": optax.apply_updates(variables["params"], updates)}, opt_state


# --- Networks: ReBRAC ---

hidden_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # within +-1 / sqrt(fan_in)
hidden_bias_init = nn.initializers.constant(0.1)


def uniform_init(bound):
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Actor(nn.Module):
    """Deterministic policy: states (B, S) to actions (B, A) in (-1, 1)."""

    config: Config
    action_dim: int

    @nn.compact
    def __call__(self, observations, train):
        features = Hidden(self.config, "actor")(observations, train)
        return nn.tanh(
            nn.Dense(self.action_dim, kernel_init=uniform_init(1e-3), bias_init=uniform_init(1e-3))(features)
        )


class Critics(nn.Module):
    """Two critics: states (B, S) and actions (B, A) to logits (2, B, n_classes), or with mse to values (2, B, 1)."""

    config: Config

    @nn.compact
    def __call__(self, observations, actions, train):
        inputs = jnp.concatenate([observations, actions], -1)
        outputs = self.config.n_classes if self.config.critic_loss == "hl_gauss" else 1
        return jnp.stack([
            nn.Dense(outputs, kernel_init=uniform_init(3e-3), bias_init=uniform_init(3e-3))(
                Hidden(self.config, "critic")(inputs, train)
            )
            for _ in range(2)
        ])  # fmt: skip


def networks(config, actions):
    """The actor's and the critics' modules, for actions of the shape (..., A)."""
    return Actor(config, actions.shape[-1]), Critics(config)


def act(config, actor, data, observations):
    """The policy in evaluation: normalised states (B, S) to actions (B, A)."""
    actor_net, _ = networks(config, data["actions"])
    return infer(actor_net, actor, observations)


# --- Critic: values as classes ---


def with_value_range(config, data):
    """The config with v_min and v_max, unless given: the smallest and largest discounted return to go in the data."""
    returns, discounts, step = np.array(data["rewards"], np.float64), config.gamma * (1.0 - np.array(data["ends"])), 1
    while discounts.any():  # from the returns over 1, 2, 4, ... steps those over twice as many
        returns[:-step] += discounts[:-step] * returns[step:]
        discounts, step = np.append(discounts[:-step] * discounts[step:], np.zeros(step)), 2 * step
    v_min = float(returns.min()) if config.v_min is None else config.v_min
    v_max = float(returns.max()) if config.v_max is None else config.v_max
    if config.critic_loss == "hl_gauss" and not (v_min < v_max and config.v_expand > -1):
        sys.exit(f"error: the values' support, {v_min:g} to {v_max:g}, is empty; set v_min, v_max and v_expand > -1")
    return replace(config, v_min=v_min, v_max=v_max)


def support(config):
    """Edges (n_classes + 1,) of the bins, over [v_min, v_max] widened in all by v_expand of it."""
    margin = config.v_expand * (config.v_max - config.v_min) / 2
    return jnp.linspace(config.v_min - margin, config.v_max + margin, config.n_classes + 1)


def hl_gauss(config, values):
    """Probabilities (..., n_classes) of a Gaussian around each value, cut off at the support's ends (HL-Gauss,
    arXiv 2403.03950). Values outside the support are moved to its end, so that the probabilities always sum to 1."""
    edges = support(config)
    sigma = config.sigma_frac * (edges[1] - edges[0])
    values = jnp.clip(values, edges[0], edges[-1])[..., None]
    cdf = jax.scipy.special.erf((edges - values) / (math.sqrt(2) * sigma))  # up to a factor and a constant
    return jnp.diff(cdf) / (cdf[..., -1:] - cdf[..., :1])


def critic_values(config, outputs):
    """Q values (...) of the critics' outputs (..., n_classes or 1): with HL-Gauss the mean over the bins' centres."""
    if config.critic_loss == "mse":
        return outputs[..., 0]
    edges = support(config)
    return jax.nn.softmax(outputs) @ ((edges[1:] + edges[:-1]) / 2)


# --- Losses and update ---


class TrainState(NamedTuple):
    actor: dict  # variables: params and batch_stats
    target_actor: dict
    actor_opt: optax.OptState
    critic: dict
    target_critic: dict
    critic_opt: optax.OptState
    key: jax.Array


def init_state(config, data, seed):
    """The state before the first update; everything random in a run comes from `seed`."""
    key, actor_key, critic_key = jax.random.split(jax.random.key(seed), 3)
    observations, actions = data["observations"][:1], data["actions"][:1]
    actor_net, critic_net = networks(config, actions)
    actor = init_network(actor_net, actor_key, observations)
    critic = init_network(critic_net, critic_key, observations, actions)
    pairs = zip(optimizers(config), (actor, critic))
    actor_opt, critic_opt = (optimizer.init(variables["params"]) for optimizer, variables in pairs)
    return TrainState(actor, actor, actor_opt, critic, critic, critic_opt, key)


def optimizers(config):
    """Of the actor and the critics; the schedules count each one's own steps."""
    return (
        make_optimizer(config, "actor", config.num_updates // config.policy_freq),
        make_optimizer(config, "critic", config.num_updates),
    )


def critic_target(config, state, batch, key):
    """r + gamma (1 - d) [min_k Q'_k(s', a') - critic_bc_coef ||a' - a'_data||^2] (ReBRAC), shape (B,)."""
    actor_net, critic_net = networks(config, batch.actions)
    noise = config.target_noise * jax.random.normal(key, batch.actions.shape)
    noise = jnp.clip(noise, -config.noise_clip, config.noise_clip)
    next_actions = jnp.clip(infer(actor_net, state.target_actor, batch.next_observations) + noise, -1, 1)
    penalty = jnp.sum((next_actions - batch.next_actions) ** 2, -1)
    outputs = infer(critic_net, state.target_critic, batch.next_observations, next_actions)
    next_values = critic_values(config, outputs).min(0) - config.critic_bc_coef * penalty
    return batch.rewards + config.gamma * (1 - batch.terminals) * next_values


def critic_loss(params, config, state, batch, target, key):
    """Cross-entropy to the target's HL-Gauss, or squared error, summed over the two critics."""
    critic_net = Critics(config)
    variables = {**state.critic, "params": params}
    outputs, variables = train_forward(critic_net, variables, key, batch.observations, batch.actions)
    if config.critic_loss == "mse":
        losses = (outputs[..., 0] - target) ** 2
    else:
        losses = optax.softmax_cross_entropy(outputs, hl_gauss(config, target))
    values = critic_values(config, outputs)
    return losses.mean(1).sum(), (variables, {"critic_loss": losses.mean(), "q": values.mean()})


def actor_loss(params, config, state, batch, keys):
    """actor_bc_coef ||pi(s) - a||^2 - min_k Q_k(s, pi(s)) / mean |min_k Q_k|, with the actor regularised."""
    dropout_key, input_key, objective_key = keys or (None, None, None)
    actor_net, critic_net = networks(config, batch.actions)
    observations, cloned = batch.observations, batch.actions
    if keys and is_on(config.actor_input_noise):
        observations += config.actor_input_noise * jax.random.normal(input_key, observations.shape)
    if keys and is_on(config.actor_bc_noise):
        cloned -= config.actor_bc_noise * jax.random.normal(objective_key, cloned.shape)
    variables = {**state.actor, "params": params}
    actions, variables = train_forward(actor_net, variables, dropout_key, observations)
    bc = jnp.sum((actions - cloned) ** 2, -1).mean()
    loss = config.actor_bc_coef * bc
    if is_on(config.actor_q_coef):
        values = critic_values(config, infer(critic_net, state.critic, batch.observations, actions)).min(0)
        loss -= config.actor_q_coef * values.mean() / jax.lax.stop_gradient(jnp.abs(values).mean())
    return loss, (variables, {"actor_loss": loss, "bc_loss": bc})


def measured_actor_loss(config, state, batch):
    """The actor's loss as evaluation sees it: no dropout, no noise, running statistics."""
    return actor_loss(state.actor["params"], config, state, batch, None)[0]


def update_critics(config, state, batch):
    """One update of the critics; returns the new state and a dictionary of scalars."""
    _, optimizer = optimizers(config)
    key, target_key, dropout_key, noise_key = jax.random.split(state.key, 4)
    target = critic_target(config, state, batch, target_key)
    grads, (critic, info) = jax.grad(critic_loss, has_aux=True)(
        state.critic["params"], config, state, batch, target, dropout_key
    )
    critic, critic_opt = optimize(config, "critic", optimizer, critic, state.critic_opt, grads, noise_key)
    return state._replace(critic=critic, critic_opt=critic_opt, key=key), info


def update(config, state, batches):
    """An update of the critics on each batch (policy_freq, B), then on the last one of the actor and of both targets.

    A pure function of a TrainState and Transitions; returns the new state and a dictionary of scalars.
    """
    state, infos = jax.lax.scan(partial(update_critics, config), state, batches, unroll=True)
    batch, info = jax.tree.map(lambda x: x[-1], (batches, infos))
    optimizer, _ = optimizers(config)
    key, noise_key, *keys = jax.random.split(state.key, 5)
    grads, (actor, actor_info) = jax.grad(actor_loss, has_aux=True)(state.actor["params"], config, state, batch, keys)
    actor, actor_opt = optimize(config, "actor", optimizer, actor, state.actor_opt, grads, noise_key)
    target_actor = optax.incremental_update(actor, state.target_actor, config.tau)
    target_critic = optax.incremental_update(state.critic, state.target_critic, config.tau)
    state = state._replace(
        actor=actor, actor_opt=actor_opt, target_actor=target_actor, target_critic=target_critic, key=key
    )
    return state, info | actor_info


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def epoch(static, traced, states, data):
    """`log_every` updates of each seed's state in one scan; returns the states and the scalars, (seeds, steps).

    `data` is an argument, and so are the config's numbers: runs that differ in those share the compiled program.
    """
    config = replace(static, **traced)

    def step(state, _):
        key, batch_key = jax.random.split(state.key)
        indices = jax.random.choice(batch_key, data["train"], (config.policy_freq, config.batch_size))
        return update(config, state._replace(key=key), transitions(data, indices))

    def run(state):
        return jax.lax.scan(step, state, length=config.log_every // config.policy_freq)

    return over_seeds(run, states)


# --- Seeds and compilation ---


def init_states(config, data, seeds):
    """`init_state` for each of the seeds, along a first axis."""
    first = {key: np.zeros_like(data[key], shape=(1, *data[key].shape[1:])) for key in ("observations", "actions")}
    return jax.lax.map(partial(init_state, config, first), seeds)  # with vmap, JAX's QR can hang on a CPU


def over_seeds(function, *arrays):
    """`function` over the first axis, that of the seeds. One seed goes without vmap, which makes it slower on a CPU."""
    if len(jax.tree.leaves(arrays)[0]) > 1:
        return jax.vmap(function)(*arrays)
    return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], arrays)))


def split_config(config):
    """The config in two: what a compiled program depends on, and the numbers that are its arguments."""
    traced = {key: value for key, value in vars(config).items() if isinstance(value, float) and value}
    not_in_it = "seed dataset_path validation_seed eval_every eval_episodes eval_noise results evaluate video".split()
    return replace(config, **dict.fromkeys([*traced, *not_in_it])), traced


# --- Analysis: inside the actor ---


def measure(features):
    """Of features (B, F), the outputs of the actor's last hidden Dense before its ReLU: the share of neurons that are
    positive nowhere in the batch; mean norm, mean and standard deviation; the Gram matrix, for the `pca_rank`."""
    return {
        "dead_neurons": jnp.mean(jnp.all(features <= 0, 0)),
        "feature_norm": jnp.mean(jnp.linalg.norm(features, axis=1)),
        "feature_mean": features.mean(),
        "feature_std": features.std(),
        "gram": features.T @ features,
    }


def action_error(config, data, actor, batch):
    """Mean squared error of the policy's actions to the data's, over the batch and the actions' dimensions."""
    return jnp.mean((act(config, actor, data, batch.observations) - batch.actions) ** 2)


def plasticity(config, data, state, batch):
    """The actor after 100 steps of behaviour cloning on the batch, from a copy of it and of its optimiser.

    The copy's learning rate does not decay, so that the steps move it at the end of a run, too.
    """
    config = replace(config, actor_lr_decay=False)
    optimizer = optimizers(config)[0]

    def step(copy, key):
        actor, opt_state = copy
        grads = jax.grad(lambda params: action_error(config, data, {**actor, "params": params}, batch))(actor["params"])
        return optimize(config, "actor", optimizer, actor, opt_state, grads, key), None

    opt_state = (*state.actor_opt[:-1], optimizer.init(state.actor["params"])[-1])  # the last is the schedule's
    (actor, _), _ = jax.lax.scan(step, (state.actor, opt_state), jax.random.split(jax.random.key(0), 100))
    return actor


@partial(jax.jit, static_argnums=0)
def analyse(static, traced, states, data, samples, visited):
    """What the paper watches in each seed's actor, by names such as train/dead_neurons; (seeds,), Gram matrices aside.

    On four batches: the steps samples["train"] and samples["validation"] of the data, the normalised random states
    samples["random"] (B, S), and the states `visited` (seeds, B, S) in evaluation. A gap is held-out minus training.
    """
    config = replace(static, **traced)
    actor_net = networks(config, data["actions"])[0]

    def one(state, visited):
        batches = {part: transitions(data, samples[part]) for part in ("train", "validation") if part in samples}
        observations = {part: batch.observations for part, batch in batches.items()}
        observations |= {"evaluation": (visited - data["mean"]) / data["std"], "random": samples["random"]}
        info = {}
        for part, x in observations.items():
            _, seen = actor_net.apply(state.actor, x, train=False, mutable="intermediates")
            info[part] = measure(seen["intermediates"]["Hidden_0"]["features"][0])
        for part, batch in batches.items():
            info[part]["action_error"] = action_error(config, data, state.actor, batch)
            info[part]["actor_loss"] = measured_actor_loss(config, state, batch)
        if "validation" in batches:
            info["gap"] = {key: info["validation"][key] - info["train"][key] for key in ("action_error", "actor_loss")}
            probe = jax.tree.map(lambda x: x[:1024], batches["validation"])
            actors = {"before": state.actor, "after": plasticity(config, data, state, probe)}
            info["plasticity"] = {key: action_error(config, data, actor, probe) for key, actor in actors.items()}
        return {f"{part}/{key}": value for part, values in info.items() for key, value in values.items()}

    return over_seeds(one, states, visited)


# --- Evaluation ---


@partial(jax.jit, static_argnums=0)
def act_all(static, traced, actors, data, observations):
    """The policy of each seed: states (seeds, E, S) as the environment gives them to actions (seeds, E, A)."""
    config, observations = replace(static, **traced), (observations - data["mean"]) / data["std"]
    return over_seeds(lambda actor, states: act(config, actor, data, states), actors, observations)


# --- Training ---


def train(config, run):
    """A run, from its last checkpoint if there is one, to its end."""
    data = make_dataset(config, load_dataset(config))
    samples = make_samples(data)
    data = jax.device_put(data)
    config = with_value_range(config, data)
    static, traced = split_config(config)
    envs = make_envs(config)
    init, seeds = partial(init_states, config, data), config.seed + jnp.arange(config.num_seeds)
    with compiling(epoch, static, traced, jax.eval_shape(init, seeds), data):
        states, update, evaluated = run.restore(init, seeds, data)
    while True:
        due = update > evaluated and (update % config.eval_every == 0 or update == config.num_updates)
        run.checkpoint(states, update, evaluated, now=due)  # where a signal ends the run
        if due:
            with run.timed("evaluation"):
                policy = partial(act_all, static, traced, states.actor, data)
                returns, visited = evaluate(config, policy, envs, update)
            with run.timed("analysis"):
                measured = analyse(static, traced, states, data, samples, visited) if config.analysis else {}
                measured = with_pca_ranks(measured)
            run.log_evaluation(update, returns, measured)
            evaluated = update
            run.checkpoint(states, update, evaluated, now=True)
        if update == config.num_updates:
            return run.finish()
        with run.timed("train"):
            states, infos = jax.block_until_ready(epoch(static, traced, states, data))
        update += config.log_every
        run.log_epoch(update, infos, states)


def main():
    given = parse(Config)
    if given.evaluate:
        return evaluate_run(sys.modules[__name__], given)
    config = tuned(given)
    check(config, rules(config))
    with Run(__file__, config, tuned) as run:
        train(config, run)


if __name__ == "__main__":
    main()
