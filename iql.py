"""IQL with a regularised actor, from "The Role of Deep Learning Regularizations on Actors in Offline RL"
(arXiv 2409.07606), over "Offline Reinforcement Learning with Implicit Q-Learning" (IQL, arXiv 2110.06169).

    python iql.py --dataset_name hopper-medium-v2                                      # the paper's baseline
    python iql.py --dataset_name hopper-medium-v2 --actor_ln true --actor_dropout 0.1  # its actor regularised
    python iql.py --dataset_name antmaze-umaze-v2 --normalize_reward false --reward_shift -1 \
        --state_dependent_std false --log_std_min -5 --normalize_states false          # the original's settings

Two CPU cores make about 180 updates a second.
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
    normalize_states: bool = True  # to mean 0 and standard deviation 1 over the training data
    normalize_reward: Optional[bool] = None  # AntMaze: x 100; others: x 1000 / (best - worst episode return)
    validation_frac: float = 0.0  # share of the episodes that is held out; 0.05 when tuning
    validation_seed: Optional[int] = None  # shuffles the episodes before that (none: the file's last are held out)
    # Algorithm; where it says none, the paper's value for the dataset is taken
    gamma: float = 0.99  # discount
    tau: Optional[float] = None  # share of the new parameters in the target's moving average
    batch_size: int = 256  # transitions in an update
    actor_learning_rate: float = 3e-4
    critic_learning_rate: float = 3e-4  # of Q and V
    expectile: Optional[float] = None  # of the Q values, that V estimates
    temperature: Optional[float] = None  # inverse: of the advantages, in the weights of the cloned actions
    max_weight: float = 100.0  # largest such weight
    reward_shift: float = 0.0  # added to the rewards; -1 on AntMaze in the original IQL
    state_dependent_std: bool = True  # of the policy; false in the original IQL
    log_std_min: float = -20.0  # of the policy; -5 in the original IQL
    log_std_max: float = 2.0
    # Networks
    hidden_dim: int = 256
    actor_layers: int = 2  # hidden layers
    critic_layers: int = 2  # of Q and of V
    # Actor regularisers; 0 or false is exactly off
    regularisers: str = "none"  # names of CHOSEN such as DO+LN; best or best-L1: as tuned for the dataset
    actor_dropout: Optional[float] = None  # share of the hidden units dropped in the actor's loss (none: 0.1 on Adroit)
    actor_wd: float = 0.0  # decoupled weight decay
    actor_l1_ratio: float = 0.0  # share of L1 in the weight decay: 0 is L2, 1 is L1, 0.5 the paper's elastic net
    actor_wd_kernels_only: bool = False  # spare biases and normalisation parameters
    actor_ln: bool = False  # LayerNorm
    actor_fn: bool = False  # FeatureNorm: LayerNorm without scale and bias
    actor_gn: bool = False  # GroupNorm, 32 groups
    actor_bn: bool = False  # BatchNorm
    actor_sn: bool = False  # SpectralNorm of the last hidden Dense
    actor_input_noise: float = 0.0  # standard deviation of noise on the actor's states in its loss
    actor_bc_noise: float = 0.0  # objective noise: standard deviation of noise on temperature x advantage
    actor_grad_noise: float = 0.0  # standard deviation of noise on the first gradient; decays by (1 + t)^-0.55
    actor_lr_decay: bool = True  # cosine decay of the actor's learning rate to 0 over the run
    # The same for Q and V, which the paper leaves alone
    critic_dropout: float = 0.0
    critic_wd: float = 0.0
    critic_l1_ratio: float = 0.0
    critic_wd_kernels_only: bool = False
    critic_ln: bool = False
    critic_fn: bool = False
    critic_gn: bool = False
    critic_bn: bool = False
    critic_sn: bool = False
    critic_grad_noise: float = 0.0
    critic_lr_decay: bool = False
    # Run
    seed: int = 0  # everything random in a run follows from it
    num_seeds: int = 1  # seed, seed + 1, ... trained at once
    num_updates: int = 1_000_000
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
CHOSEN = named_regularisers(DO=0.1, L2=0.1, L1=0.01, EN=0.01, InN=0.01, BCN=0.3, GrN=0.01)

# The paper's tuned values: expectile, temperature, tau, normalize_reward | best-L1's wd | best's ln, dropout, wd (EN)
TUNED = {
    "halfcheetah-random-v2": (0.95, 10.0, 0.005, False, 0.001, False, 0.0, 0.01),
    "halfcheetah-medium-v2": (0.95, 3.0, 0.005, False, 0.0001, True, 0.0, 0.01),
    "halfcheetah-expert-v2": (0.7, 6.0, 0.005, False, 0.0001, True, 0.0, 0.0),
    "halfcheetah-medium-replay-v2": (0.9, 6.0, 0.005, False, 0.01, True, 0.1, 0.01),
    "halfcheetah-medium-expert-v2": (0.5, 0.5, 0.005, False, 0.0001, False, 0.0, 0.001),
    "halfcheetah-full-replay-v2": (0.5, 0.5, 0.005, False, 0.0001, False, 0.0, 0.001),
    "hopper-random-v2": (0.95, 10.0, 0.005, False, 0.01, True, 0.1, 0.001),
    "hopper-medium-v2": (0.7, 0.5, 0.001, True, 0.01, False, 0.2, 0.01),
    "hopper-expert-v2": (0.9, 0.5, 0.005, False, 0.001, False, 0.0, 0.0),
    "hopper-medium-replay-v2": (0.7, 0.5, 0.001, True, 0.01, True, 0.1, 0.01),
    "hopper-medium-expert-v2": (0.7, 10.0, 0.005, False, 1e-05, False, 0.0, 0.0),
    "hopper-full-replay-v2": (0.7, 3.0, 0.005, False, 0.0001, True, 0.2, 0.001),
    "walker2d-random-v2": (0.9, 0.5, 0.005, False, 0.0001, False, 0.0, 0.0),
    "walker2d-medium-v2": (0.5, 1.0, 0.005, False, 0.01, False, 0.1, 0.001),
    "walker2d-expert-v2": (0.7, 6.0, 0.005, False, 0.01, False, 0.1, 0.01),
    "walker2d-medium-replay-v2": (0.7, 1.0, 0.005, False, 0.0001, True, 0.1, 0.001),
    "walker2d-medium-expert-v2": (0.7, 3.0, 0.005, False, 0.0001, False, 0.1, 0.01),
    "walker2d-full-replay-v2": (0.7, 10.0, 0.005, False, 0.01, True, 0.2, 0.001),
    "antmaze-umaze-v2": (0.7, 10.0, 0.005, True, 0.0001, True, 0.0, 0.001),
    "antmaze-umaze-diverse-v2": (0.9, 10.0, 0.005, True, 1e-05, True, 0.0, 0.0),
    "antmaze-medium-play-v2": (0.9, 6.0, 0.005, True, 1e-05, False, 0.1, 0.01),
    "antmaze-medium-diverse-v2": (0.9, 6.0, 0.005, True, 0.001, False, 0.0, 0.0),
    "antmaze-large-play-v2": (0.9, 10.0, 0.005, True, 0.001, True, 0.0, 0.001),
    "antmaze-large-diverse-v2": (0.9, 6.0, 0.005, True, 0.001, True, 0.1, 0.01),
    "pen-human-v1": (0.7, 0.5, 0.005, False, 0.01, False, 0.1, 0.01),
    "pen-cloned-v1": (0.9, 10.0, 0.005, False, 0.1, False, 0.1, 0.01),
    "pen-expert-v1": (0.9, 0.5, 0.005, False, 0.1, True, 0.0, 0.001),
    "door-human-v1": (0.95, 1.0, 0.005, False, 0.01, True, 0.0, 0.001),
    "door-cloned-v1": (0.7, 1.0, 0.005, False, 0.1, True, 0.2, 0.001),
    "door-expert-v1": (0.9, 10.0, 0.005, False, 0.0001, False, 0.2, 0.01),
    "hammer-human-v1": (0.9, 10.0, 0.005, False, 0.001, False, 0.0, 0.01),
    "hammer-cloned-v1": (0.7, 6.0, 0.005, False, 0.01, True, 0.0, 0.01),
    "hammer-expert-v1": (0.95, 0.5, 0.005, False, 0.0001, False, 0.1, 0.0),
    "relocate-human-v1": (0.7, 10.0, 0.005, False, 0.001, False, 0.0, 0.0),
    "relocate-cloned-v1": (0.7, 1.0, 0.005, False, 0.001, True, 0.2, 0.0),
    "relocate-expert-v1": (0.5, 0.5, 0.005, False, 0.01, True, 0.1, 0.01),
}


def tuned(config):
    """Fills in what the user left open: the paper's values for the dataset (its tables of hyperparameters)."""
    name = config.dataset_name
    if name not in TUNED:
        near = difflib.get_close_matches(name, TUNED, n=3, cutoff=0)
        sys.exit(f"error: unknown dataset {name!r}; the nearest names are {', '.join(near)}")
    antmaze, adroit = "antmaze" in name, name.endswith("-v1")
    expectile, temperature, tau, normalize_reward, l1, ln, dropout, wd = TUNED[name]
    best = dict(actor_ln=ln, actor_dropout=dropout, actor_wd=wd, actor_l1_ratio=0.5)
    config = with_regularisers(config, CHOSEN | {"best-L1": dict(actor_wd=l1, actor_l1_ratio=1.0), "best": best})
    values = dict(
        normalize_reward=normalize_reward,
        tau=tau,
        expectile=expectile,
        temperature=temperature,
        actor_dropout=0.1 if adroit else 0.0,
        eval_every=50_000 if antmaze else 10_000,
        eval_episodes=100 if antmaze else 10,
    )
    return replace(config, **{key: value for key, value in values.items() if getattr(config, key) is None})


def rules(config):
    """What must hold beside the bounds that `check` knows, by the message if it doesn't."""
    return {"log_std_min must be below log_std_max": config.log_std_min < config.log_std_max}


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


# --- Networks: IQL ---

hidden_kernel_init = nn.initializers.orthogonal(math.sqrt(2))
hidden_bias_init = nn.initializers.zeros


class Actor(nn.Module):
    """Gaussian policy: states (B, S) to means (B, A) in (-1, 1), and logarithms of the standard deviations (B, A)."""

    config: Config
    action_dim: int

    @nn.compact
    def __call__(self, observations, train):
        features = Hidden(self.config, "actor")(observations, train)
        means = nn.tanh(nn.Dense(self.action_dim, kernel_init=hidden_kernel_init)(features))
        if self.config.state_dependent_std:
            log_stds = nn.Dense(self.action_dim, kernel_init=nn.initializers.orthogonal(1e-3))(features)
        else:
            log_stds = jnp.broadcast_to(self.param("log_stds", nn.initializers.zeros, (self.action_dim,)), means.shape)
        return means, jnp.clip(log_stds, self.config.log_std_min, self.config.log_std_max)


class Critics(nn.Module):
    """Two critics: states (B, S) and actions (B, A) to Q values (2, B)."""

    config: Config

    @nn.compact
    def __call__(self, observations, actions, train):
        inputs = jnp.concatenate([observations, actions], -1)
        values = [
            nn.Dense(1, kernel_init=hidden_kernel_init)(Hidden(self.config, "critic")(inputs, train)) for _ in "12"
        ]
        return jnp.stack(values)[..., 0]


class Value(nn.Module):
    """States (B, S) to values V (B,)."""

    config: Config

    @nn.compact
    def __call__(self, observations, train):
        return nn.Dense(1, kernel_init=hidden_kernel_init)(Hidden(self.config, "critic")(observations, train))[..., 0]


def networks(config, actions):
    """The actor's, the critics' and the value's modules, for actions of the shape (..., A)."""
    return Actor(config, actions.shape[-1]), Critics(config), Value(config)


def act(config, actor, data, observations):
    """The policy in evaluation, its mean: normalised states (B, S) to actions (B, A)."""
    actor_net, _, _ = networks(config, data["actions"])
    return infer(actor_net, actor, observations)[0]


# --- Losses and update ---


class TrainState(NamedTuple):
    actor: dict  # variables: params and batch_stats
    actor_opt: optax.OptState
    critic: dict
    target_critic: dict
    critic_opt: optax.OptState
    value: dict
    value_opt: optax.OptState
    key: jax.Array


def init_state(config, data, seed):
    """The state before the first update; everything random in a run comes from `seed`."""
    key, actor_key, critic_key, value_key = jax.random.split(jax.random.key(seed), 4)
    observations, actions = data["observations"][:1], data["actions"][:1]
    actor_net, critic_net, value_net = networks(config, actions)
    actor = init_network(actor_net, actor_key, observations)
    critic = init_network(critic_net, critic_key, observations, actions)
    value = init_network(value_net, value_key, observations)
    pairs = zip(optimizers(config), (actor, critic, value))
    actor_opt, critic_opt, value_opt = (optimizer.init(variables["params"]) for optimizer, variables in pairs)
    return TrainState(actor, actor_opt, critic, critic, critic_opt, value, value_opt, key)


def optimizers(config):
    """Of the actor, the critics and the value, which takes the critics' settings."""
    return tuple(make_optimizer(config, network, config.num_updates) for network in ("actor", "critic", "critic"))


def value_loss(params, config, state, batch, target, key):
    """The expectile loss |expectile - 1(u < 0)| u^2 of u = min_k Q'_k(s, a) - V(s) (IQL, equation 5)."""
    values, variables = train_forward(Value(config), {**state.value, "params": params}, key, batch.observations)
    difference = target - values
    weights = jnp.where(difference > 0, config.expectile, 1 - config.expectile)
    loss = jnp.mean(weights * difference**2)
    return loss, (variables, {"value_loss": loss, "v": values.mean()})


def actor_loss(params, config, state, batch, target, keys):
    """-min(exp(temperature A), max_weight) log pi(a|s), A = min_k Q'_k(s, a) - V(s) (IQL, equation 7)."""
    dropout_key, input_key, objective_key = keys or (None, None, None)
    actor_net, _, value_net = networks(config, batch.actions)
    observations = batch.observations
    exponents = config.temperature * (target - infer(value_net, state.value, observations))
    if keys and is_on(config.actor_input_noise):
        observations += config.actor_input_noise * jax.random.normal(input_key, observations.shape)
    if keys and is_on(config.actor_bc_noise):
        exponents += config.actor_bc_noise * jax.random.normal(objective_key, exponents.shape)
    weights = jnp.minimum(jnp.exp(exponents), config.max_weight)
    (means, log_stds), variables = train_forward(
        actor_net, {**state.actor, "params": params}, dropout_key, observations
    )
    log_probs = jax.scipy.stats.norm.logpdf(batch.actions, means, jnp.exp(log_stds)).sum(-1)
    loss = -jnp.mean(weights * log_probs)
    return loss, (variables, {"actor_loss": loss, "bc_loss": -log_probs.mean(), "weight": weights.mean()})


def critic_loss(params, config, state, batch, key):
    """Squared error of both Q(s, a) to r + gamma (1 - d) V(s') (IQL, equation 6), summed over the two."""
    next_values = infer(Value(config), state.value, batch.next_observations)
    target = batch.rewards + config.reward_shift + config.gamma * (1 - batch.terminals) * next_values
    variables = {**state.critic, "params": params}
    values, variables = train_forward(Critics(config), variables, key, batch.observations, batch.actions)
    losses = (values - target) ** 2
    return losses.mean(1).sum(), (variables, {"critic_loss": losses.mean(), "q": values.mean()})


def measured_actor_loss(config, state, batch):
    """The actor's loss as evaluation sees it: no dropout, no noise, running statistics."""
    target = infer(Critics(config), state.target_critic, batch.observations, batch.actions).min(0)
    return actor_loss(state.actor["params"], config, state, batch, target, None)[0]


def update(config, state, batch):
    """One update of V, then of the actor by the new V, then of the critics by it and of their target.

    A pure function of a TrainState and Transitions; returns the new state and a dictionary of scalars.
    """
    actor_optimizer, critic_optimizer, value_optimizer = optimizers(config)
    key, value_key, critic_key, *keys = jax.random.split(state.key, 9)
    actor_keys, noise_keys = keys[:3], keys[3:]
    target = infer(Critics(config), state.target_critic, batch.observations, batch.actions).min(0)
    grads, (value, value_info) = jax.grad(value_loss, has_aux=True)(
        state.value["params"], config, state, batch, target, value_key
    )
    value, value_opt = optimize(config, "critic", value_optimizer, value, state.value_opt, grads, noise_keys[0])
    state = state._replace(value=value, value_opt=value_opt, key=key)
    grads, (actor, actor_info) = jax.grad(actor_loss, has_aux=True)(
        state.actor["params"], config, state, batch, target, actor_keys
    )
    actor, actor_opt = optimize(config, "actor", actor_optimizer, actor, state.actor_opt, grads, noise_keys[1])
    grads, (critic, info) = jax.grad(critic_loss, has_aux=True)(
        state.critic["params"], config, state, batch, critic_key
    )
    critic, critic_opt = optimize(config, "critic", critic_optimizer, critic, state.critic_opt, grads, noise_keys[2])
    target_critic = optax.incremental_update(critic, state.target_critic, config.tau)
    state = state._replace(
        actor=actor, actor_opt=actor_opt, critic=critic, critic_opt=critic_opt, target_critic=target_critic
    )
    return state, {**info, **actor_info, **value_info}


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def epoch(static, traced, states, data):
    """`log_every` updates of each seed's state in one scan; returns the states and the scalars, (seeds, steps).

    `data` is an argument, and so are the config's numbers: runs that differ in those share the compiled program.
    """
    config = replace(static, **traced)

    def step(state, _):
        key, batch_key = jax.random.split(state.key)
        index = jax.random.choice(batch_key, data["train"], (config.batch_size,))
        return update(config, state._replace(key=key), transitions(data, index))

    def run(state):
        return jax.lax.scan(step, state, length=config.log_every)

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
