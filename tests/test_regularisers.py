"""Each regulariser does what its formula says, and nothing at all when it's off."""

import functools
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
    ACTION_DIM,
    ACTOR_FLAGS,
    CRITIC_FLAGS,
    KEYS,
    NORMS,
    assert_close,
    both_scripts,
    init_states,
    lowered_epoch,
    run_epochs,
    same_bits,
    small_batch,
    small_config,
    small_data,
    small_state,
    to_numpy,
)

import rebrac

SMALL = small_config(rebrac)
BATCH = small_batch()
update = jax.jit(rebrac.update, static_argnums=0)
update_critics = jax.jit(rebrac.update_critics, static_argnums=0)
both_networks = pytest.mark.parametrize("network", ["actor", "critic"])


# --- Layers ---


def hidden_layers(network, layers=1, width=64, **flags):
    """Return the hidden layers with some of a network's flags, such as ln, and no others."""
    config = replace(SMALL, actor_layers=layers, critic_layers=layers, hidden_dim=width)
    flags = {f"{network}_{flag}": value for flag, value in flags.items()}
    config = replace(config, **{"critic_ln": False, **flags})
    return rebrac.ActorHidden(config) if network == "actor" else rebrac.CriticHidden(config)


def init_layers(module, spread=0.3):
    """Return the variables of hidden layers, far from their initial values."""
    variables = rebrac.init_network(module, jax.random.key(0), BATCH.observations)

    def perturb(x):
        return x + spread * jax.random.normal(jax.random.key(x.size), x.shape)

    return jax.tree.map(perturb, variables)


def apply_layers(module, variables, train, key=KEYS[0]):
    """Return the features (B, F) of BATCH's states, and the variables after this."""
    if train:
        return rebrac.forward_train(module, variables, key, BATCH.observations)
    return rebrac.forward(module, variables, BATCH.observations), variables


def plain_features(variables):
    """Return ReLU(x W + b), which is what a regulariser of a single layer sees."""
    dense = variables["params"]["Dense_0"]
    x = BATCH.observations @ dense["kernel"] + dense["bias"]
    return np.maximum(np.asarray(x), 0)


def normalised(x, axis):
    return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-6)


@both_networks
@pytest.mark.parametrize("train", [False, True])
def test_layer_norm_normalises_each_row_and_learns_a_scale(network, train):
    module = hidden_layers(network, ln=True)
    variables = init_layers(module)
    features, _ = apply_layers(module, variables, train)
    norm = variables["params"]["LayerNorm_0"]
    expected = normalised(plain_features(variables), -1) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(features, expected, atol=1e-4)


@both_networks
def test_rms_norm_divides_each_row_by_its_root_mean_square_and_learns_a_scale(network):
    module = hidden_layers(network, rms=True)
    variables = init_layers(module)
    features, _ = apply_layers(module, variables, train=True)
    plain = plain_features(variables)
    rms = np.sqrt((plain**2).mean(-1, keepdims=True))
    expected = plain / rms * variables["params"]["RMSNorm_0"]["scale"]
    np.testing.assert_allclose(features, expected, atol=1e-4)
    assert set(variables["params"]["RMSNorm_0"]) == {"scale"}


@both_networks
@pytest.mark.parametrize("train", [False, True])
def test_feature_norm_normalises_each_row_and_learns_nothing(network, train):
    module = hidden_layers(network, fn=True)
    variables = init_layers(module)
    features, _ = apply_layers(module, variables, train)
    np.testing.assert_allclose(features, normalised(plain_features(variables), -1), atol=1e-4)
    assert set(variables["params"]) == {"Dense_0"}


@both_networks
def test_group_norm_has_32_groups(network):
    module = hidden_layers(network, width=128, gn=True)
    variables = init_layers(module)
    features, _ = apply_layers(module, variables, train=False)
    norm = variables["params"]["GroupNorm_0"]
    plain = plain_features(variables)
    groups = normalised(plain.reshape(32, 32, 4), -1)
    expected = groups.reshape(plain.shape) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(features, expected, atol=5e-3, rtol=1e-3)


@both_networks
def test_batch_norm_uses_the_batch_only_in_training(network):
    module = hidden_layers(network, bn=True)
    variables = init_layers(module, spread=0.0)
    features, after = apply_layers(module, variables, train=True)
    plain = plain_features(variables)
    expected = (plain - plain.mean(0)) / np.sqrt(plain.var(0) + 1e-5)
    np.testing.assert_allclose(features, expected, atol=1e-4)
    running = after["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(running["mean"], 0.01 * plain.mean(0), atol=1e-5)
    np.testing.assert_allclose(running["var"], 0.99 + 0.01 * plain.var(0), atol=1e-5)
    features, _ = apply_layers(module, after, train=False)
    expected = (plain - running["mean"]) / np.sqrt(running["var"] + 1e-5)
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_the_target_averages_the_actors_running_statistics():
    config = replace(SMALL, actor_bn=True, policy_freq=1)
    before = small_state(rebrac, config)
    after, _ = update(config, before, jax.tree.map(lambda x: x[None], BATCH))
    new = after.actor["batch_stats"]
    old = before.target_actor["batch_stats"]
    assert not same_bits(new, before.actor["batch_stats"])
    expected = jax.tree.map(lambda a, b: config.tau * a + (1 - config.tau) * b, new, old)
    jax.tree.map(np.testing.assert_allclose, after.target_actor["batch_stats"], expected)
    after_critics, _ = update_critics(config, before, BATCH)
    assert same_bits(after_critics.actor, before.actor)


@both_scripts
def test_each_networks_running_statistics_move_in_training(script):
    config = small_config(script, actor_bn=True, critic_bn=True)
    before = to_numpy(init_states(script, config, small_data()))
    after = run_epochs(script, config, epochs=1)
    moved = {}
    for name, variables in before._asdict().items():
        if isinstance(variables, dict) and variables.get("batch_stats"):
            new = getattr(after, name)
            is_trained = not same_bits(new["params"], variables["params"])  # a fork may keep a copy
            if is_trained:
                moved[name] = not same_bits(new["batch_stats"], variables["batch_stats"])
    assert {"actor", "critic"} < set(moved)
    assert all(moved.values()), moved


@both_networks
def test_spectral_norm_divides_the_last_hidden_dense_alone(network):
    """By its largest singular value: each pass in training is a step of the power iteration."""
    module = hidden_layers(network, layers=2, width=16, sn=True)
    variables = init_layers(module, spread=0.0)
    for _ in range(100):
        _, variables = apply_layers(module, variables, train=True)
    last = variables["params"]["Dense_1"]
    kernel = last["kernel"] / np.linalg.norm(last["kernel"], 2)
    expected = np.maximum(plain_features(variables) @ kernel + last["bias"], 0)
    features, after = apply_layers(module, variables, train=False)
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert same_bits(after, variables)


@both_networks
def test_dropout_drops_and_scales_in_training_only(network):
    module = hidden_layers(network, dropout=0.3)
    variables = init_layers(module)
    plain = plain_features(variables)
    features, _ = apply_layers(module, variables, train=True)
    alive = plain > 0
    kept = np.asarray(features)[alive] / plain[alive]
    assert set(np.round(np.unique(kept), 4)) == {0, np.float32(1.4286)}
    assert abs((kept == 0).mean() - 0.3) < 0.05
    others, _ = apply_layers(module, variables, train=True, key=KEYS[1])
    assert not np.array_equal(features, others)
    features, _ = apply_layers(module, variables, train=False)
    np.testing.assert_allclose(features, plain, atol=1e-5)


@pytest.mark.parametrize("flag", ["actor_dropout", "critic_dropout"])
def test_dropout_is_off_in_targets_and_in_evaluation(flag):
    state = small_state(rebrac, SMALL)
    dropped = replace(SMALL, **{flag: 0.9})
    targets = []
    actions = []
    for config in (SMALL, dropped):
        targets.append(rebrac.critic_target(config, state, BATCH, KEYS[0]))
        actions.append(rebrac.act(config, state.actor, small_data(), BATCH.observations))
    np.testing.assert_array_equal(*targets)
    np.testing.assert_array_equal(*actions)


@both_networks
def test_norms_and_dropout_stand_in_the_papers_order(network):
    """Dense, ReLU, LayerNorm, FeatureNorm, GroupNorm, BatchNorm, ours: RMSNorm, Dropout."""
    norms = dict(ln=True, fn=True, gn=True, bn=True, rms=True)
    module = hidden_layers(network, width=256, dropout=0.3, **norms)
    variables = init_layers(module)
    params = jax.tree.map(np.asarray, variables["params"])

    def scaled(x, norm):
        return x * params[norm]["scale"] + params[norm]["bias"]

    x = scaled(normalised(plain_features(variables), -1), "LayerNorm_0")
    x = normalised(x, -1)
    groups = normalised(x.reshape(32, 32, 8), -1)
    x = scaled(groups.reshape(x.shape), "GroupNorm_0")
    x = scaled((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), "BatchNorm_0")
    x = x / np.sqrt((x**2).mean(-1, keepdims=True)) * params["RMSNorm_0"]["scale"]
    features, _ = apply_layers(module, variables, train=True)
    features = np.asarray(features)
    is_kept = features != 0
    assert is_kept.mean() == pytest.approx(0.7, abs=0.05)
    np.testing.assert_allclose(features[is_kept], x[is_kept] / 0.7, atol=2e-2)


# --- Optimiser ---


def optimizer_of(script, network, config):
    if network == "actor":
        return script.actor_optimizer(config)
    return script.critic_optimizer(config)


def one_step(script, network, **flags):
    """Return parameters after a step of a network's optimiser with flags such as wd, and before."""
    flags = {f"{network}_{flag}": value for flag, value in flags.items()}
    optimizer = optimizer_of(script, network, replace(small_config(script), **flags))
    before = small_state(rebrac, SMALL).actor["params"]
    variables = {"params": before}
    grads = jax.tree.map(jnp.cos, before)
    opt_state = optimizer.init(before)
    after, _ = rebrac.optimize(optimizer, variables, opt_state, grads, 0.0, KEYS[0])
    return after["params"], before


@both_scripts
@both_networks
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_weight_decay_is_decoupled_and_elastic(script, network, ratio):
    with_decay, before = one_step(script, network, wd=0.1, l1_ratio=ratio)
    without, _ = one_step(script, network)
    config = small_config(script)
    learning_rate = getattr(config, f"{network}_learning_rate")
    leaves = zip(*map(jax.tree.leaves, (before, with_decay, without)))
    for theta, ours, plain in leaves:  # of all parameters, as in the paper
        shrunk = learning_rate * 0.1 * ((1 - ratio) * theta + ratio * np.sign(theta))
        np.testing.assert_allclose(ours, plain - shrunk, atol=1e-7)


@both_scripts
@both_networks
def test_weight_decay_on_kernels_only_spares_the_rest(script, network):
    with_decay, _ = one_step(script, network, wd=0.1, wd_kernels_only=True)
    without, _ = one_step(script, network)
    for (path, ours), plain in zip(jax.tree.leaves_with_path(with_decay), jax.tree.leaves(without)):
        assert np.array_equal(ours, plain) == (path[-1].key != "kernel")


SHARES = {  # of the learning rate, after a share of the steps
    "none": lambda t: 1,
    "cosine": lambda t: (1 + np.cos(np.pi * t)) / 2,
    "linear": lambda t: 1 - 0.9 * t,
    "exponential": lambda t: 0.99**t,
}


@both_scripts
@both_networks
@pytest.mark.parametrize("decay", SHARES)
def test_learning_rates_decay_over_own_steps(script, network, decay):
    config = replace(small_config(script), actor_lr_decay=decay, critic_lr_decay=decay)
    num_steps = config.num_updates
    if script is rebrac and network == "actor":
        num_steps = num_steps // config.policy_freq
    learning_rate = getattr(config, f"{network}_learning_rate")
    optimizer = optimizer_of(script, network, config)
    step = jax.jit(optimizer.update)
    opt_state = optimizer.init(jnp.ones(1))
    for t in range(num_steps + 1):  # Adam's direction is 1 as long as the gradient is
        change, opt_state = step(jnp.ones(1), opt_state, jnp.ones(1))
        expected = -learning_rate * SHARES[decay](t / num_steps)
        np.testing.assert_allclose(change, expected, atol=3e-8)


@pytest.mark.parametrize("t", [0, 9])
def test_gradient_noise_decays_with_the_networks_own_steps(t):
    params = {"kernel": jnp.zeros((100, 100)), "bias": jnp.zeros(10_000)}
    optimizer = rebrac.actor_optimizer(SMALL)
    adam, *rest = optimizer.init(params)
    opt_state = (adam._replace(count=jnp.int32(t)), *rest)
    grads = jax.tree.map(lambda p: p + 2.0, params)
    variables = {"params": params}
    _, (adam, *_) = rebrac.optimize(optimizer, variables, opt_state, grads, 0.3, KEYS[0])
    for first_moment in jax.tree.leaves(adam.mu):  # a tenth of the gradient
        assert 10 * first_moment.mean() == pytest.approx(2, abs=0.02)
        assert 10 * first_moment.std() == pytest.approx(0.3 / (1 + t) ** 0.55, rel=0.03)
    assert not np.array_equal(adam.mu["kernel"].ravel(), adam.mu["bias"])


@both_scripts
def test_gradient_noise_reaches_its_own_networks_alone(script):
    config = replace(small_config(script), log_every=1)
    if script is rebrac:
        config = replace(config, policy_freq=1)

    def first_moments(actor_noise, critic_noise):
        noisy = replace(config, actor_grad_noise=actor_noise, critic_grad_noise=critic_noise)
        states = jax.tree.map(lambda x: x[None], small_state(script, config))
        states, _ = script.epoch(noisy, states, small_data())
        moments = {}
        for name, value in states._asdict().items():
            if name.endswith("_opt"):
                leaves = jax.tree.leaves(value[0].mu)
                moments[name] = np.concatenate([np.ravel(leaf) for leaf in leaves])
        return moments

    weak = first_moments(0.01, 0.01)
    strong = first_moments(10.0, 100.0)
    for name in weak:
        expected = 10 if name == "actor_opt" else 100
        if name in ("temperature_opt", "multiplier_opt"):  # CQL's, which no regulariser reaches
            expected = 0
        if name in ("encoder_opt", "decoder_opt"):  # BCQ's, which none reaches by default
            expected = 0
        spread = 10 * (strong[name] - weak[name]).std()  # a moment is a tenth of the gradient
        assert spread == pytest.approx(expected, rel=0.1), name


def test_sam_takes_the_gradient_of_a_quadratic_loss_uphill():
    """Of sum h theta^2 / 2 it is h (theta + radius g / |g|), where g = h theta."""
    theta = np.array([3.0, -1.0, 2.0])
    h = np.array([1.0, 4.0, 0.5])

    def split(x):
        return {"a": jnp.asarray(x[:1]), "b": {"c": jnp.asarray(x[1:])}}

    def loss(params):
        scaled = jax.tree.map(lambda h, x: h * x**2 / 2, split(h), params)
        return sum(leaf.sum() for leaf in jax.tree.leaves(scaled))

    def gradient(theta, radius):
        params = split(theta)
        moved = rebrac.ascend(params, jax.grad(loss)(params), radius)
        return np.concatenate(jax.tree.leaves(jax.grad(loss)(moved)))

    g = h * theta
    for radius in (0.0, 0.1, 2.0):
        expected = h * (theta + radius * g / np.linalg.norm(g))
        np.testing.assert_allclose(gradient(theta, radius), expected, rtol=1e-6)
    np.testing.assert_array_equal(gradient(0 * theta, 0.1), 0 * theta)  # there |g| is 0


def after_one_update(script, **flags):
    """Return the actor's first moments after an update, and all that SAM must leave as it is."""
    config = replace(small_config(script), log_every=1, **flags)
    if script is rebrac:
        config = replace(config, policy_freq=1)
    states = jax.tree.map(lambda x: x[None], small_state(script, config))
    states, infos = script.epoch(config, states, small_data())
    moments = jax.tree.leaves(states.actor_opt[0].mu)
    others = {name: value for name, value in states._asdict().items() if "actor" not in name}
    others |= {"key": None, "batch_stats": states.actor["batch_stats"], "infos": infos}
    return np.concatenate([np.ravel(leaf) for leaf in moments]), others


@both_scripts
def test_sam_changes_the_actors_gradient_alone_and_draws_nothing_anew(script):
    """Losses and running statistics are those of the first pass, and both have the same noise."""
    noisy = dict(
        actor_bn=True,
        actor_dropout=0.3,
        actor_input_noise=0.1,
        actor_bc_noise=0.1,
        actor_grad_noise=0.1,
    )
    plain, others = after_one_update(script, **noisy)
    near, others_near = after_one_update(script, actor_sam=1e-6, **noisy)
    far, others_far = after_one_update(script, actor_sam=0.5, **noisy)
    size = np.abs(plain).max()
    assert np.abs(near - plain).max() < 1e-3 * size
    assert np.abs(far - plain).max() > 1e-2 * size
    for found in (others_near, others_far):
        assert_close(found, others, rtol=1e-4, atol=1e-6)


# --- The actor's loss ---


def test_each_noise_of_the_actors_loss_has_its_own_place():
    """Input noise reaches the actor alone, and the objective's noise the cloned action."""
    state = small_state(rebrac, SMALL)

    def loss(**flags):
        config = replace(SMALL, actor_bc_coef=0.5, **flags)
        return rebrac.actor_loss(state.actor["params"], config, state, BATCH, KEYS)[0]

    def loss_by_hand(seen, cloned):
        actor = rebrac.Actor(SMALL, BATCH.actions.shape[-1])
        actions = rebrac.forward(actor, state.actor, seen)
        outputs = rebrac.forward(rebrac.Critics(SMALL), state.critic, BATCH.observations, actions)
        values = rebrac.critic_values(SMALL, outputs).min(0)
        bc = ((actions - cloned) ** 2).sum(-1).mean()
        return 0.5 * bc - values.mean() / jnp.abs(values).mean()

    plain = loss_by_hand(BATCH.observations, BATCH.actions)
    np.testing.assert_allclose(loss(), plain, rtol=1e-5)
    seen = BATCH.observations + 0.3 * jax.random.normal(KEYS[1], BATCH.observations.shape)
    noisy = loss(actor_input_noise=0.3)
    np.testing.assert_allclose(noisy, loss_by_hand(seen, BATCH.actions), rtol=1e-5)
    cloned = BATCH.actions - 0.3 * jax.random.normal(KEYS[2], BATCH.actions.shape)
    noisy = loss(actor_bc_noise=0.3)
    np.testing.assert_allclose(noisy, loss_by_hand(BATCH.observations, cloned), rtol=1e-5)


def test_critics_stay_as_the_algorithm_has_them_unless_asked():
    """None of the actor's flags matters for them at first, but those that change its network."""
    flags = {name: value for name, value in ACTOR_FLAGS.items() if name not in NORMS}
    plain, _ = update_critics(SMALL, small_state(rebrac, SMALL), BATCH)
    config = replace(SMALL, **flags)
    regularised, _ = update_critics(config, small_state(rebrac, SMALL), BATCH)
    assert same_bits(plain.critic, regularised.critic)


# --- Off is off ---


class PlainActor(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(16)(x))
        return nn.tanh(nn.Dense(ACTION_DIM)(x))


@pytest.mark.parametrize("train", [False, True])
def test_an_actor_without_regularisers_is_the_plain_network(train):
    params = small_state(rebrac, SMALL).actor["params"]
    network = rebrac.Actor(SMALL, ACTION_DIM)

    def ours(params, x):
        variables = {"params": params, "batch_stats": {}}
        if train:
            return rebrac.forward_train(network, variables, KEYS[0], x)[0]
        return rebrac.forward(network, variables, x)

    def plain(params, x):
        layers = {**params["Hidden_0"], "Dense_2": params["Dense_0"]}
        return PlainActor().apply({"params": layers}, x)

    def cost(function):
        grad = jax.grad(lambda params, x: function(params, x).sum())
        return jax.jit(grad).lower(params, BATCH.observations).compile().cost_analysis()

    assert cost(ours) == cost(plain)
    actions = plain(params, BATCH.observations)
    np.testing.assert_array_equal(ours(params, BATCH.observations), actions)


PARTS_OF_REGULARISERS = [
    (jax.random, "bernoulli"),
    (optax.tree, "random_like"),
    (optax, "stateless"),
    (optax, "cosine_decay_schedule"),
    (nn, "GroupNorm"),
    (nn, "BatchNorm"),
    (nn, "SpectralNorm"),
    (nn, "RMSNorm"),
    (optax.tree, "norm"),
    (jnp, "sign"),
]


# Of Gaussian noise, by the algorithms themselves
DRAWS = {"rebrac": 2, "iql": 0, "cql": 3, "bcq": 3}


@both_scripts
def test_off_leaves_no_trace_in_the_program(monkeypatch, script):
    """With everything off, none of the regularisers' building blocks is even reached."""
    text = lowered_epoch(script)

    def unreachable(*arguments, **options):
        raise AssertionError("a regulariser that is off was reached")

    for owner, name in PARTS_OF_REGULARISERS:
        monkeypatch.setattr(owner, name, unreachable)
    draws = []
    normal = jax.random.normal

    def counted_normal(*arguments):
        draws.append(arguments)
        return normal(*arguments)

    monkeypatch.setattr(jax.random, "normal", counted_normal)
    off = {name: type(value)(0) for name, value in {**ACTOR_FLAGS, **CRITIC_FLAGS}.items()}
    jax.clear_caches()  # or a program that has been traced before is not traced again
    assert lowered_epoch(script, **off) == text
    assert len(draws) == DRAWS[script.__name__]
    jax.clear_caches()
    with pytest.raises(AssertionError, match="was reached"):
        lowered_epoch(script, actor_dropout=0.1)


@functools.cache
def program_of_64_units(script):
    return lowered_epoch(script, hidden_dim=64)


@both_scripts
@pytest.mark.parametrize("flag", [*ACTOR_FLAGS, *CRITIC_FLAGS])
def test_on_changes_the_program(flag, script):
    value = {**ACTOR_FLAGS, **CRITIC_FLAGS}[flag]
    on = lowered_epoch(script, hidden_dim=64, **{flag: value})
    assert on != program_of_64_units(script)


@both_scripts
def test_all_regularisers_work_together(script):
    config = small_config(
        script,
        hidden_dim=64,
        actor_layers=1,
        critic_layers=1,
        actor_l1_ratio=0.5,
        critic_l1_ratio=1.0,
        **ACTOR_FLAGS,
        **CRITIC_FLAGS,
    )
    if script is rebrac:
        config = replace(config, policy_freq=1)  # quicker to compile
    data = jax.device_put(small_data())
    states = init_states(script, config, data)
    for _ in range(3):
        states, infos = script.epoch(config, states, data)
    for leaf in jax.tree.leaves((states._replace(key=None), infos)):
        assert np.isfinite(leaf).all()
