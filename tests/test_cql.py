"""CQL: updates against a NumPy re-derivation, and what its parts must hold to."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import (
    ACTION_DIM,
    ACTOR_FLAGS,
    KEYS,
    NORMS,
    REGULARISED,
    STATE_DIM,
    assert_close,
    of_seed,
    run_epochs,
    same_bits,
    small_batch,
    small_config,
    small_data,
    small_state,
    widen,
)
from scipy import stats

import cql
import iql
import rebrac

SMALL = small_config(cql, n_actions=3)
BATCH = small_batch()
update = jax.jit(cql.update, static_argnums=0)


def policy(state, observations, config=SMALL):
    """Return the policy's means and log standard deviations."""
    actor = cql.Actor(config, ACTION_DIM)
    return cql.forward(actor, state.actor, observations)


# --- One update ---


def draw_numbers(state, shape, num):
    """Return the random numbers of an update, as the state's key gives them."""
    key, sample_key = jax.random.split(state.key)
    sample_key, uniform_key = jax.random.split(sample_key)
    sample_key, now_key = jax.random.split(sample_key)
    _, next_key = jax.random.split(sample_key)
    key, _, _ = jax.random.split(key, 3)
    *_, actor_key = jax.random.split(key, 6)
    samples = (num, *shape)
    draws = {
        "uniform": jax.random.uniform(uniform_key, samples, minval=-1, maxval=1),
        "now": jax.random.normal(now_key, samples),
        "next": jax.random.normal(next_key, samples),
        "actor": jax.random.normal(actor_key, shape),
    }
    return jax.tree.map(np.asarray, draws)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(lagrange_gap=2.0),
        dict(max_backup=True),
        dict(lagrange_gap=2.0, max_backup=True, gap_clip=0.5),
        dict(bc_steps=2),
        dict(actor_sam=0.3, actor_rms=True),
    ],
    ids=["plain", "lagrange", "max-backup", "lagrange-max-backup-clip", "cloning", "sam-rms"],
)
def test_updates_are_those_of_a_numpy_rederivation(fields):
    config = replace(
        SMALL,
        cql_weight=0.7,
        reward_scale=10.0,
        reward_shift=-5.0,
        log_std_min=-1.5,
        log_std_max=-0.5,
        actor_learning_rate=2e-3,
        **fields,
    )
    with jax.enable_x64(True):  # so that float32's rounding hides no difference
        state = widen(small_state(cql, config, spread=0.8))
        data = widen(small_data())
        data["actions"][::5] = np.sign(data["actions"][::5])  # some are -1 and 1
        expected = reference.numpy_state(state)
        for i in range(4):
            rows = np.arange(8 * i, 8 * i + 8)
            batch = cql.transitions(data, rows)
            draws = draw_numbers(state, batch.actions.shape, config.n_actions)
            expected, losses = reference.cql_update(config, expected, batch, draws)
            state, info = update(config, state, batch)
            for key, value in losses.items():
                np.testing.assert_allclose(info[key], value, rtol=1e-9)
        for name in ("actor", "critic", "target_critic", "temperature", "multiplier"):
            assert_close(getattr(state, name)["params"], expected[name])


def test_a_clipped_gap_and_a_clipped_deviation_are_among_those_held_against_numpy():
    config = replace(SMALL, gap_clip=0.5, log_std_min=-1.5, log_std_max=-0.5)
    state = small_state(cql, config, spread=0.8)
    samples = cql.draw_samples(config, state, BATCH, KEYS[0])
    target = jnp.zeros(len(BATCH.rewards))
    params = state.critic["params"]

    def gap(config):
        _, (_, info) = cql.critic_loss(params, config, state, BATCH, target, samples, KEYS[0])
        return info["gap"]

    unclipped = replace(config, gap_clip=0.0)
    assert gap(config) > gap(unclipped)
    _, log_stds = policy(state, BATCH.observations, config)
    assert log_stds.min() == -1.5
    assert log_stds.max() == -0.5
    assert len(np.unique(log_stds)) > 2


# --- The policy's density ---


def test_the_log_density_is_that_of_a_squashed_gaussian():
    """Against SciPy: that of atanh(a), divided by the slope of tanh."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(50, 2))
    log_stds = rng.uniform(-2, 1, (50, 2))
    actions = rng.uniform(-0.99, 0.99, (50, 2))
    u = np.arctanh(actions)
    slopes = 1 - actions**2
    gaussian = stats.norm.logpdf(u, means, np.exp(log_stds))
    expected = (gaussian - np.log(slopes)).sum(-1)
    ours = cql.log_prob_of_data(actions, means, log_stds)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_integral_of_the_density_is_1():
    edges = np.linspace(-1, 1, 200_001)
    centres = (edges[1:] + edges[:-1]) / 2
    mean = jnp.full((1, 1), 0.3)
    log_std = jnp.zeros((1, 1))
    density = np.exp(cql.log_prob_of_data(centres[:, None], mean, log_std))
    integral = density.sum() * 1e-5
    assert integral == pytest.approx(1, abs=1e-3)


def test_the_density_of_drawn_actions_is_that_of_the_same_actions():
    means = jnp.linspace(-1, 1, 32).reshape(16, 2)
    log_stds = jnp.linspace(-1, 0, 32).reshape(16, 2)
    actions, log_probs = cql.draw_actions(KEYS[0], means, log_stds, 5)
    assert actions.shape == (5, 16, 2)
    expected = cql.log_prob_of_data(actions, means, log_stds)
    np.testing.assert_allclose(log_probs, expected, rtol=1e-3, atol=1e-3)
    assert len(np.unique(actions)) == actions.size


@pytest.mark.parametrize("action", [-1.0, 1.0])
def test_the_density_of_the_datas_outermost_actions_is_finite(action):
    actions = jnp.full((1, 1), action)
    zeros = jnp.zeros((1, 1))

    def log_prob(means):
        return cql.log_prob_of_data(actions, means, log_stds=zeros)[0]

    u = np.arctanh(1 - 1e-5)
    slope = 1 - np.tanh(u) ** 2
    expected = stats.norm.logpdf(u) - np.log(slope)
    np.testing.assert_allclose(log_prob(zeros), expected, rtol=1e-3)
    grad = jax.grad(log_prob)(zeros)
    np.testing.assert_allclose(grad, action * u, rtol=1e-3)


def test_the_density_far_out_is_finite():
    """Where tanh is 1 in float32, log(1 - tanh(u)^2) is about log 4 - 2 |u|."""
    log_std = jnp.zeros((1, 1))
    expected = stats.norm.logpdf(0) - np.log(4) + 100
    for u in (-50.0, 50.0):
        outside = jnp.full((1, 1), u)
        ours = cql.log_prob(outside, outside, log_std)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_evaluation_takes_tanh_of_the_mean():
    state = small_state(cql, SMALL)
    means, _ = policy(state, BATCH.observations)
    actions = cql.act(SMALL, state.actor, small_data(), BATCH.observations)
    np.testing.assert_array_equal(actions, jnp.tanh(means))
    assert np.abs(means).max() > 1


# --- The conservative gap ---


def test_the_samples_estimate_the_integral_over_all_actions():
    """For Q = c a, log of the integral of exp Q over [-1, 1]^A is sum log (2 sinh(c) / c)."""
    slopes = np.array([2.0, -1.0, 0.5])
    config = replace(SMALL, n_actions=20_000)
    batch = small_batch(4)
    state = cql.init_state(config, batch, 0)
    actor = copy.deepcopy(state.actor)
    actor["params"]["Dense_1"]["bias"] = jnp.ones(ACTION_DIM)  # std 1
    state = state._replace(actor=actor)
    samples = cql.draw_samples(config, state, batch, KEYS[0])
    assert samples.actions.shape == (3, 20_000, 4, ACTION_DIM)
    q = samples.actions @ slopes
    data_q = batch.actions @ slopes
    expected = np.log(2 * np.sinh(slopes) / slopes).sum()

    uniform = np.exp(q[0] - samples.log_probs[0])
    by_uniform = np.log(uniform.mean(0))
    np.testing.assert_allclose(by_uniform, expected, atol=0.05)

    q = q.reshape(1, -1, 4)
    log_probs = samples.log_probs.reshape(-1, 4)
    gap = cql.conservative_gap(config, q, log_probs, data_q[None])
    by_all = gap[0] + data_q - np.log(60_000)
    np.testing.assert_allclose(by_all, expected, atol=0.15)


def test_samples_are_of_the_policy_at_their_own_states_without_dropout():
    state = small_state(cql, SMALL)
    config = replace(SMALL, n_actions=4000)
    samples = cql.draw_samples(config, state, BATCH, KEYS[0])
    uniform = samples.actions[0]
    assert np.abs(uniform).max() <= 1
    assert np.abs(uniform.mean()) < 0.01
    log_uniform = ACTION_DIM * np.log(0.5)
    np.testing.assert_allclose(samples.log_probs[0], log_uniform, rtol=1e-6)

    for i, observations in enumerate((BATCH.observations, BATCH.next_observations), start=1):
        means, log_stds = policy(state, observations)
        actions = samples.actions[i]
        inner = np.asarray(actions, np.float64).clip(-0.9999999, 0.9999999)
        sample_means = np.arctanh(inner).mean(0)
        is_inside = np.abs(actions).max(0) < 0.999
        assert is_inside.sum() > 10
        np.testing.assert_allclose(sample_means[is_inside], means[is_inside], atol=0.1)
        log_probs = samples.log_probs[i]
        expected = cql.log_prob_of_data(actions, means, log_stds)
        is_inside = np.abs(actions).max(-1) < 0.99
        np.testing.assert_allclose(log_probs[is_inside], expected[is_inside], atol=0.01)

    config = replace(config, actor_dropout=0.9)
    with_dropout = cql.draw_samples(config, state, BATCH, KEYS[0])
    assert same_bits(with_dropout, samples)


def blind_state(config):
    """Return a state whose critics don't see the action."""
    state = small_state(cql, config)
    critic = copy.deepcopy(state.critic)
    for k in range(2):
        dense = critic["params"][f"Hidden_{k}"]["Dense_0"]
        dense["kernel"] = dense["kernel"].at[STATE_DIM:].set(0)
    return state._replace(critic=critic)


def test_a_q_that_is_constant_in_the_action_has_no_gap():
    """But for a constant that doesn't depend on Q, and so without a gradient."""
    state = blind_state(SMALL)
    samples = cql.draw_samples(SMALL, state, BATCH, KEYS[0])
    target = jnp.zeros(len(BATCH.rewards))

    @jax.jit
    def grads_and_info(weight):
        config = replace(SMALL, cql_weight=weight)
        grad = jax.grad(cql.critic_loss, has_aux=True)
        params = state.critic["params"]
        grads, (_, info) = grad(params, config, state, BATCH, target, samples, KEYS[0])
        return grads, info

    grads, info = grads_and_info(10.0)
    log_probs = np.asarray(samples.log_probs, np.float64).reshape(9, -1)
    constants = np.log(np.exp(-log_probs).sum(0))
    np.testing.assert_allclose(info["gap"] - constants.mean(), 0, atol=1e-4)
    assert abs(info["q"]) > 0.1
    plain, _ = grads_and_info(1e-6)
    for k in range(2):
        layer = grads[f"Hidden_{k}"]["Dense_0"]
        plain_layer = plain[f"Hidden_{k}"]["Dense_0"]
        by_actions = layer["kernel"][STATE_DIM:]
        assert np.abs(by_actions).max() > 0.1  # by which it would come to see the action
        layer["kernel"] = layer["kernel"][:STATE_DIM]
        plain_layer["kernel"] = plain_layer["kernel"][:STATE_DIM]
    assert_close(grads, plain, atol=1e-4)


LAGRANGE = replace(SMALL, lagrange_gap=2.0, cql_weight=5.0)


def test_alpha_prime_rises_while_the_gap_is_too_large():
    state = small_state(cql, LAGRANGE)
    before = state.multiplier["params"]["log_alpha_prime"]
    for gap, sign in ((3.0, 1), (1.0, -1)):
        after, _ = cql.update_multiplier(LAGRANGE, state, jnp.float32(gap))
        change = after.multiplier["params"]["log_alpha_prime"] - before
        np.testing.assert_allclose(change, sign * LAGRANGE.critic_learning_rate, rtol=1e-3)


def test_alpha_prime_stops_at_1e6():
    gap = jnp.float32(3)
    grad = jax.grad(cql.multiplier_loss)
    below = {"log_alpha_prime": jnp.float32(1)}
    slope = grad(below, LAGRANGE, gap)["log_alpha_prime"]
    np.testing.assert_allclose(slope, -np.e * 5 * (3 - 2), rtol=1e-5)
    above = {"log_alpha_prime": jnp.float32(20)}
    slope = grad(above, LAGRANGE, gap)["log_alpha_prime"]
    assert slope == 0
    assert cql.multiplier(above) == 1e6


def test_alpha_rises_while_the_entropy_is_below_its_target():
    """The target is -|A|: log pi, whose mean is minus the entropy, is to be |A|."""
    state = small_state(cql, SMALL)
    samples = cql.draw_samples(SMALL, state, BATCH, KEYS[0])
    before = state.temperature["params"]["log_alpha"]
    for log_pi, sign in ((ACTION_DIM + 0.5, 1), (ACTION_DIM - 0.5, -1)):
        log_probs = jnp.full_like(samples.log_probs, 99.0)
        log_probs = log_probs.at[1].set(log_pi)
        own = samples._replace(log_probs=log_probs)
        after, _ = cql.update_temperature(SMALL, state, own)
        change = after.temperature["params"]["log_alpha"] - before
        np.testing.assert_allclose(change, sign * SMALL.actor_learning_rate, rtol=2e-3)


# --- The actor's loss ---


def test_each_noise_of_the_actors_loss_has_its_own_place():
    """Input noise reaches the actor alone, and the objective's noise what the critics judge."""
    state = small_state(cql, SMALL)
    keys = jax.random.split(KEYS[0], 4)
    observations = BATCH.observations
    alpha = np.exp(state.temperature["params"]["log_alpha"])
    critics = cql.Critics(SMALL)

    def loss(**flags):
        config = replace(SMALL, **flags)
        value, _ = cql.actor_loss(state.actor["params"], config, state, BATCH, keys)
        return value

    def loss_by_hand(seen, noise):
        means, log_stds = policy(state, seen)
        actions, log_probs = cql.draw_actions(keys[3], means, log_stds, 1)
        judged = np.clip(actions[0] + noise, -1, 1)
        values = cql.forward(critics, state.critic, observations, judged)
        return (alpha * log_probs[0] - values.min(0)).mean()

    expected = loss_by_hand(observations, 0)
    np.testing.assert_allclose(loss(), expected, rtol=1e-5)
    seen = observations + 0.3 * jax.random.normal(keys[1], observations.shape)
    expected = loss_by_hand(seen, 0)
    np.testing.assert_allclose(loss(actor_input_noise=0.3), expected, rtol=1e-5)
    noise = 0.3 * jax.random.normal(keys[2], BATCH.actions.shape)
    expected = loss_by_hand(observations, noise)
    np.testing.assert_allclose(loss(actor_bc_noise=0.3), expected, rtol=1e-5)


def test_the_objectives_noise_changes_the_gradient():
    state = small_state(cql, SMALL)
    keys = jax.random.split(KEYS[0], 4)

    def grads(config):
        grad = jax.grad(cql.actor_loss, has_aux=True)
        found, _ = grad(state.actor["params"], config, state, BATCH, keys)
        return found

    noisy = replace(SMALL, actor_bc_noise=0.3)
    assert not same_bits(grads(noisy), grads(SMALL))


@pytest.mark.parametrize("flag", [name for name in ACTOR_FLAGS if name not in NORMS])
def test_a_regulariser_reaches_the_actor_only(flag):
    small = replace(SMALL, lagrange_gap=1.0)
    config = replace(small, **{flag: ACTOR_FLAGS[flag]})
    plain, _ = update(small, small_state(cql, small), BATCH)
    regularised, _ = update(config, small_state(cql, config), BATCH)
    for name in ("critic", "target_critic", "temperature", "multiplier"):
        assert same_bits(getattr(plain, name), getattr(regularised, name)), name
    # A decay begins with the rate itself
    assert same_bits(plain.actor, regularised.actor) == (flag == "actor_lr_decay")
    data = small_data()
    actions = cql.act(small, plain.actor, data, BATCH.observations)
    same_actions = cql.act(config, plain.actor, data, BATCH.observations)
    np.testing.assert_array_equal(same_actions, actions)


def test_normalisations_of_the_actor_reach_the_critics_through_samples_only():
    wide = replace(SMALL, hidden_dim=64)  # for GroupNorm's 32 groups
    plain = small_state(cql, wide)
    samples = cql.draw_samples(wide, plain, BATCH, KEYS[0])
    updated, _ = cql.update_critics(wide, plain, BATCH, samples)
    for flag in NORMS:
        config = replace(wide, **{flag: True})
        state = small_state(cql, config)
        state = state._replace(critic=plain.critic, target_critic=plain.target_critic)
        own_samples = cql.draw_samples(config, state, BATCH, KEYS[0])
        assert not same_bits(own_samples.actions[1:], samples.actions[1:]), flag
        own, _ = cql.update_critics(config, state, BATCH, samples)
        assert same_bits(own.critic, updated.critic), flag


# --- The loop ---


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first = run_epochs(cql, SMALL)
    assert same_bits(first, run_epochs(cql, SMALL))
    other = run_epochs(cql, replace(SMALL, seed=1))
    assert not same_bits(first.actor, other.actor)
    for opt in (first.actor_opt, first.critic_opt, first.temperature_opt):
        assert opt[0].count == 8
    assert first.multiplier_opt[0].count == 0  # without a lagrange_gap


def test_seeds_trained_together_are_those_trained_alone():
    """Without BatchNorm: a bias before it has no gradient but rounding, which Adam makes large."""
    config = replace(SMALL, **REGULARISED)
    config = replace(config, actor_bn=False, critic_bn=False)
    together = run_epochs(cql, replace(config, num_seeds=2))
    for seed in range(2):
        alone = run_epochs(cql, replace(config, seed=seed))
        expected = of_seed(alone, 0)
        assert_close(of_seed(together, seed), expected, rtol=1e-3, atol=1e-5)


def test_critics_and_deviations_start_as_corls():
    """And both critics have as many layers."""
    config = replace(SMALL, hidden_dim=32, critic_layers=5)
    state = cql.init_state(config, small_batch(1), 0)
    for network in (state.actor, state.critic):
        layers = network["params"]["Hidden_0"]
        kernel = np.asarray(layers["Dense_1"]["kernel"])
        np.testing.assert_allclose(kernel.T @ kernel, 2 * np.eye(32), atol=1e-5)
    params = state.critic["params"]
    for k in range(2):
        assert len(params[f"Hidden_{k}"]) == 5
        last = np.asarray(params[f"Dense_{k}"]["kernel"])
        np.testing.assert_allclose(np.linalg.norm(last), 1e-2, rtol=1e-5)
    means, log_stds = policy(state, BATCH.observations, config)
    assert np.abs(means).max() < 0.1
    assert np.abs(log_stds + 1).max() < 0.1
    assert cql.temperature(state.temperature["params"]) == 1
    alpha_prime = cql.multiplier(state.multiplier["params"])
    np.testing.assert_allclose(alpha_prime, np.e, rtol=1e-6)
    assert same_bits(state.critic, state.target_critic)


# --- Hyperparameters ---

DOMAINS = {
    ("halfcheetah", "hopper", "walker2d"): dict(
        cql_weight=10.0, actor_learning_rate=3e-5, lagrange_gap=0.0, critic_layers=3
    ),
    ("pen", "door", "hammer", "relocate"): dict(
        cql_weight=1.0, actor_learning_rate=1e-4, lagrange_gap=0.0, critic_layers=3
    ),
    ("antmaze",): dict(
        cql_weight=5.0,
        actor_learning_rate=1e-4,
        lagrange_gap=0.8,
        critic_layers=5,
        gap_clip=200.0,
        max_backup=True,
        reward_scale=10.0,
        reward_shift=-5.0,
        normalize_states=False,
        eval_episodes=100,
    ),
}
ELSEWHERE = dict(
    gap_clip=0.0,
    max_backup=False,
    reward_scale=1.0,
    reward_shift=0.0,
    normalize_states=True,
    eval_episodes=10,
)


def corl_values(dataset):
    """Return the values of a dataset's domain."""
    for names, values in DOMAINS.items():
        if dataset.startswith(names):
            return {**ELSEWHERE, **values}


@pytest.mark.parametrize("dataset", rebrac.TUNED)
def test_each_dataset_gets_corls_values(dataset):
    config = cql.tuned(cql.Config(dataset_name=dataset))
    for key, value in corl_values(dataset).items():
        assert getattr(config, key) == value, key
    assert config.normalize_reward == (dataset == "hopper-medium-v2")
    assert config.actor_layers == 3
    assert config.hidden_dim == 256
    assert config.batch_size == 256
    given = dict(cql_weight=3.0, lagrange_gap=5.0, max_backup=True, critic_layers=2)
    config = cql.tuned(cql.Config(dataset_name=dataset, **given))
    for key, value in given.items():
        assert getattr(config, key) == value, key


def test_strengths_are_the_papers_for_iql_but_the_objectives_noise_is_rebracs():
    assert cql.CHOSEN == {**iql.CHOSEN, "BCN": rebrac.CHOSEN["BCN"]}
    assert list(cql.CHOSEN) == list(iql.CHOSEN)
    assert cql.BEST == {}
