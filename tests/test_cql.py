"""CQL: updates against a NumPy re-derivation, and what its parts must hold to."""

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


# --- One update ---


def draw_numbers(state, shape, num):
    """Return the random numbers of an update, as the state's key gives them."""
    _, sample_key, _, _, _, *actor_keys = jax.random.split(state.key, 9)
    sample_key, uniform_key = jax.random.split(sample_key)
    sample_key, now_key = jax.random.split(sample_key)
    _, next_key = jax.random.split(sample_key)
    draws = {
        "uniform": jax.random.uniform(uniform_key, (num, *shape), minval=-1, maxval=1),
        "now": jax.random.normal(now_key, (num, *shape)),
        "next": jax.random.normal(next_key, (num, *shape)),
        "actor": jax.random.normal(actor_keys[3], (1, *shape))[0],
    }
    return {name: np.asarray(draw) for name, draw in draws.items()}


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
            batch = cql.transitions(data, np.arange(8 * i, 8 * i + 8))
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

    def gap(config):
        _, (_, info) = cql.critic_loss(
            state.critic["params"], config, state, BATCH, target, samples, KEYS[0]
        )
        return info["gap"]

    assert gap(config) > gap(replace(config, gap_clip=0.0))
    _, log_stds = cql.forward(cql.Actor(config, ACTION_DIM), state.actor, BATCH.observations)
    assert log_stds.min() == -1.5
    assert log_stds.max() == -0.5
    assert len(np.unique(log_stds)) > 2


# --- The policy's density ---


def test_the_log_density_is_that_of_a_squashed_gaussian():
    """Against SciPy: that of atanh(a), divided by the slope of tanh; its integral is 1."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(50, 2))
    log_stds = rng.uniform(-2, 1, (50, 2))
    actions = rng.uniform(-0.99, 0.99, (50, 2))
    gaussian = stats.norm.logpdf(np.arctanh(actions), means, np.exp(log_stds))
    expected = (gaussian - np.log(1 - actions**2)).sum(-1)
    ours = cql.log_density_of_data(actions, means, log_stds)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)

    edges = np.linspace(-1, 1, 200_001)
    centres = ((edges[1:] + edges[:-1]) / 2)[:, None]
    density = np.exp(cql.log_density_of_data(centres, jnp.full((1, 1), 0.3), jnp.zeros((1, 1))))
    assert density.sum() * 1e-5 == pytest.approx(1, abs=1e-3)


def test_the_density_of_drawn_actions_is_that_of_the_same_actions():
    means = jnp.linspace(-1, 1, 32).reshape(16, 2)
    log_stds = jnp.linspace(-1, 0, 32).reshape(16, 2)
    actions, log_probs = cql.draw_actions(KEYS[0], means, log_stds, 5)
    assert actions.shape == (5, 16, 2)
    expected = cql.log_density_of_data(actions, means, log_stds)
    np.testing.assert_allclose(log_probs, expected, rtol=1e-3, atol=1e-3)
    assert len(np.unique(actions)) == actions.size


@pytest.mark.parametrize("action", [-1.0, 1.0])
def test_the_density_of_the_datas_outermost_actions_is_finite(action):
    means = jnp.zeros((1, 1))

    def log_density(means):
        return cql.log_density_of_data(jnp.full((1, 1), action), means, jnp.zeros((1, 1)))[0]

    u = np.arctanh(1 - 1e-5)
    expected = stats.norm.logpdf(u) - np.log(1 - np.tanh(u) ** 2)
    np.testing.assert_allclose(log_density(means), expected, rtol=1e-3)
    np.testing.assert_allclose(jax.grad(log_density)(means), action * u, rtol=1e-3)


def test_the_density_far_out_is_finite():
    """Where tanh is 1 in float32, log(1 - tanh(u)^2) is about log 4 - 2 |u|."""
    for u in (-50.0, 50.0):
        outside = jnp.full((1, 1), u)
        ours = cql.log_density(outside, outside, jnp.zeros((1, 1)))
        np.testing.assert_allclose(ours, stats.norm.logpdf(0) - np.log(4) + 100, rtol=1e-5)


def test_evaluation_takes_tanh_of_the_mean():
    state = small_state(cql, SMALL)
    means, _ = cql.forward(cql.Actor(SMALL, ACTION_DIM), state.actor, BATCH.observations)
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
    params = state.actor["params"]
    wide = {**params, "Dense_1": {**params["Dense_1"], "bias": jnp.ones(ACTION_DIM)}}  # std 1
    state = state._replace(actor={**state.actor, "params": wide})
    samples = cql.draw_samples(config, state, batch, KEYS[0])
    assert samples.actions.shape == (3, 20_000, 4, ACTION_DIM)
    q = samples.actions @ slopes
    expected = np.log(2 * np.sinh(slopes) / slopes).sum()
    data_q = batch.actions @ slopes
    uniform = np.log(np.exp(q[0] - samples.log_densities[0]).mean(0))  # of these alone
    np.testing.assert_allclose(uniform, expected, atol=0.05)
    flat = q.reshape(1, -1, 4)
    log_densities = samples.log_densities.reshape(-1, 4)
    gap = cql.conservative_gap(config, flat, log_densities, data_q[None])
    np.testing.assert_allclose(gap[0] + data_q - np.log(60_000), expected, atol=0.15)


def test_samples_are_of_the_policy_at_their_own_states_without_dropout():
    state = small_state(cql, SMALL)
    config = replace(SMALL, n_actions=4000)
    samples = cql.draw_samples(config, state, BATCH, KEYS[0])
    assert np.abs(samples.actions[0]).max() <= 1
    assert np.abs(samples.actions[0].mean()) < 0.01
    np.testing.assert_allclose(samples.log_densities[0], ACTION_DIM * np.log(0.5), rtol=1e-6)
    actor = cql.Actor(SMALL, ACTION_DIM)
    for i, observations in ((1, BATCH.observations), (2, BATCH.next_observations)):
        means, log_stds = cql.forward(actor, state.actor, observations)
        unbounded = np.arctanh(
            np.asarray(samples.actions[i], np.float64).clip(-0.9999999, 0.9999999)
        )
        is_inside = np.abs(samples.actions[i]).max(0) < 0.999
        assert is_inside.sum() > 10
        np.testing.assert_allclose(unbounded.mean(0)[is_inside], means[is_inside], atol=0.1)
        expected = cql.log_density_of_data(samples.actions[i], means, log_stds)
        is_inside = np.abs(samples.actions[i]).max(-1) < 0.99
        np.testing.assert_allclose(
            samples.log_densities[i][is_inside], expected[is_inside], atol=0.01
        )
    dropped = replace(config, actor_dropout=0.9)
    assert same_bits(cql.draw_samples(dropped, state, BATCH, KEYS[0]), samples)


def blind_state(config):
    """Return a state whose critics don't see the action."""
    state = small_state(cql, config)
    params = jax.tree.map(lambda x: x, state.critic["params"])
    for k in range(2):
        dense = params[f"Hidden_{k}"]["Dense_0"]
        dense["kernel"] = dense["kernel"].at[STATE_DIM:].set(0)
    return state._replace(critic={**state.critic, "params": params})


def test_a_q_that_is_constant_in_the_action_has_no_gap():
    """But for a constant that doesn't depend on Q, and so without a gradient."""
    state = blind_state(SMALL)
    samples = cql.draw_samples(SMALL, state, BATCH, KEYS[0])
    target = jnp.zeros(len(BATCH.rewards))

    @jax.jit
    def loss_and_grads(weight):
        config = replace(SMALL, cql_weight=weight)
        loss = jax.value_and_grad(cql.critic_loss, has_aux=True)
        (_, (_, info)), grads = loss(
            state.critic["params"], config, state, BATCH, target, samples, KEYS[0]
        )
        return info, grads

    info, grads = loss_and_grads(10.0)
    densities = np.asarray(samples.log_densities, np.float64).reshape(9, -1)
    constant = np.log(np.exp(-densities).sum(0)).mean()
    np.testing.assert_allclose(info["gap"] - constant, 0, atol=1e-4)
    assert info["q"].std() == 0 and abs(info["q"]) > 0.1
    _, plain = loss_and_grads(1e-6)
    for k in range(2):
        for layer in grads[f"Hidden_{k}"]:
            own = grads[f"Hidden_{k}"][layer]
            rest = plain[f"Hidden_{k}"][layer]
            for name in own:
                rows = slice(STATE_DIM) if layer == "Dense_0" else slice(None)
                rows = slice(None) if name == "bias" else rows
                np.testing.assert_allclose(own[name][rows], rest[name][rows], atol=1e-4)
        action_rows = grads[f"Hidden_{k}"]["Dense_0"]["kernel"][STATE_DIM:]
        assert np.abs(action_rows).max() > 0.1  # by which it would come to see the action


def test_alpha_prime_rises_while_the_gap_is_too_large_and_stops_at_1e6():
    config = replace(SMALL, lagrange_gap=2.0, cql_weight=5.0)
    state = small_state(cql, config)
    for gap, sign in ((3.0, 1), (1.0, -1)):
        after, _ = cql.update_multiplier(config, state, jnp.float32(gap))
        change = (
            after.multiplier["params"]["log_alpha_prime"]
            - state.multiplier["params"]["log_alpha_prime"]
        )
        np.testing.assert_allclose(change, sign * config.critic_learning_rate, rtol=1e-3)
    grad = jax.grad(cql.multiplier_loss)
    low = grad({"log_alpha_prime": jnp.float32(1)}, config, jnp.float32(3))["log_alpha_prime"]
    np.testing.assert_allclose(low, -np.e * 5 * (3 - 2), rtol=1e-5)
    high = grad({"log_alpha_prime": jnp.float32(20)}, config, jnp.float32(3))["log_alpha_prime"]
    assert high == 0
    assert cql.multiplier({"log_alpha_prime": jnp.float32(20)}) == 1e6


def test_alpha_rises_while_the_entropy_is_below_its_target():
    """The target is -|A|: log pi, whose mean is minus the entropy, is to be |A|."""
    state = small_state(cql, SMALL)
    samples = cql.draw_samples(SMALL, state, BATCH, KEYS[0])
    for log_pi, sign in ((ACTION_DIM + 0.5, 1), (ACTION_DIM - 0.5, -1)):
        told = jnp.full_like(samples.log_densities, 99.0).at[1].set(log_pi)
        after, _ = cql.update_temperature(SMALL, state, samples._replace(log_densities=told))
        change = after.temperature["params"]["log_alpha"]
        change = change - state.temperature["params"]["log_alpha"]
        np.testing.assert_allclose(change, sign * SMALL.actor_learning_rate, rtol=2e-3)


# --- The actor's loss ---


def test_each_noise_of_the_actors_loss_has_its_own_place():
    """Input noise reaches the actor alone, and the objective's noise what the critics judge."""
    state = small_state(cql, SMALL)
    keys = jax.random.split(KEYS[0], 4)

    def loss(**flags):
        config = replace(SMALL, **flags)
        return cql.actor_loss(state.actor["params"], config, state, BATCH, keys)[0]

    def loss_by_hand(seen, noise):
        actor, critics = cql.networks(SMALL, BATCH.actions)
        policy = cql.forward(actor, state.actor, seen)
        (actions,), (log_probs,) = cql.draw_actions(keys[3], *policy, 1)
        judged = np.clip(actions + noise, -1, 1)
        values = cql.forward(critics, state.critic, BATCH.observations, judged).min(0)
        return (np.exp(state.temperature["params"]["log_alpha"]) * log_probs - values).mean()

    np.testing.assert_allclose(loss(), loss_by_hand(BATCH.observations, 0), rtol=1e-5)
    seen = BATCH.observations + 0.3 * jax.random.normal(keys[1], BATCH.observations.shape)
    noisy = loss(actor_input_noise=0.3)
    np.testing.assert_allclose(noisy, loss_by_hand(seen, 0), rtol=1e-5)
    noise = 0.3 * jax.random.normal(keys[2], BATCH.actions.shape)
    noisy = loss(actor_bc_noise=0.3)
    np.testing.assert_allclose(noisy, loss_by_hand(BATCH.observations, noise), rtol=1e-5)


def test_the_objectives_noise_changes_the_gradient():
    state = small_state(cql, SMALL)
    keys = jax.random.split(KEYS[0], 4)

    def grads(**flags):
        grad = jax.grad(cql.actor_loss, has_aux=True)
        return grad(state.actor["params"], replace(SMALL, **flags), state, BATCH, keys)[0]

    assert not same_bits(grads(actor_bc_noise=0.3), grads())


@pytest.mark.parametrize("flag", [name for name in ACTOR_FLAGS if name not in NORMS])
def test_a_regulariser_reaches_the_actor_only(flag):
    small = replace(SMALL, lagrange_gap=1.0)
    config = replace(small, **{flag: ACTOR_FLAGS[flag]})
    states = []
    for own in (small, config):
        state, _ = update(own, small_state(cql, own), BATCH)
        states.append(state)
    plain, regularised = states
    for name in ("critic", "target_critic", "temperature", "multiplier"):
        assert same_bits(getattr(plain, name), getattr(regularised, name)), name
    # A decay begins with the rate itself
    assert same_bits(plain.actor, regularised.actor) == (flag == "actor_lr_decay")
    actions = cql.act(small, plain.actor, small_data(), BATCH.observations)
    same_actions = cql.act(config, plain.actor, small_data(), BATCH.observations)
    np.testing.assert_array_equal(same_actions, actions)


@pytest.mark.parametrize("flag", ["actor_ln", "actor_bn", "actor_sn"])
def test_a_normalisation_of_the_actor_reaches_the_critics_through_samples_only(flag):
    config = replace(SMALL, **{flag: True})
    plain = small_state(cql, SMALL)
    normalised = small_state(cql, config)
    normalised = normalised._replace(critic=plain.critic, target_critic=plain.target_critic)
    keys = jax.random.split(jax.random.key(0), 3)
    samples = cql.draw_samples(SMALL, plain, BATCH, keys[0])
    own_samples = cql.draw_samples(config, normalised, BATCH, keys[0])
    assert not same_bits(samples.actions[1:], own_samples.actions[1:])
    one, _ = cql.update_critics(SMALL, plain, BATCH, samples, *keys[1:])
    other, _ = cql.update_critics(config, normalised, BATCH, samples, *keys[1:])
    assert same_bits(one.critic, other.critic)


# --- The loop ---


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first = run_epochs(cql, SMALL)
    assert same_bits(first, run_epochs(cql, SMALL))
    assert not same_bits(first.actor, run_epochs(cql, replace(SMALL, seed=1)).actor)
    for opt in (first.actor_opt, first.critic_opt, first.temperature_opt):
        assert opt[0].count == 8
    assert first.multiplier_opt[0].count == 0  # without a lagrange_gap


def test_seeds_trained_together_are_those_trained_alone():
    """Without BatchNorm: a bias before it has no gradient but rounding, which Adam makes large."""
    config = replace(SMALL, **{**REGULARISED, "actor_bn": False, "critic_bn": False})
    together = run_epochs(cql, replace(config, num_seeds=2))
    for seed in range(2):
        alone = run_epochs(cql, replace(config, seed=seed))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a[seed], b[0], rtol=1e-3, atol=1e-5)


def test_critics_and_deviations_start_as_corls():
    """And both critics have as many layers."""
    config = replace(SMALL, hidden_dim=32, critic_layers=5)
    state = cql.init_state(config, small_batch(1), 0)
    for network in (state.actor, state.critic):
        kernel = np.asarray(network["params"]["Hidden_0"]["Dense_1"]["kernel"])
        np.testing.assert_allclose(kernel.T @ kernel, 2 * np.eye(32), atol=1e-5)
    for k in range(2):
        assert len(state.critic["params"][f"Hidden_{k}"]) == 5
        last = np.asarray(state.critic["params"][f"Dense_{k}"]["kernel"])
        np.testing.assert_allclose(np.linalg.norm(last), 1e-2, rtol=1e-5)
    means, log_stds = cql.forward(cql.Actor(config, ACTION_DIM), state.actor, BATCH.observations)
    assert np.abs(means).max() < 0.1
    assert np.abs(log_stds + 1).max() < 0.1
    assert cql.temperature(state.temperature["params"]) == 1
    np.testing.assert_allclose(cql.multiplier(state.multiplier["params"]), np.e, rtol=1e-6)
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


@pytest.mark.parametrize("dataset", rebrac.TUNED)
def test_each_dataset_gets_corls_values(dataset):
    (expected,) = [values for names, values in DOMAINS.items() if dataset.startswith(names)]
    config = cql.tuned(cql.Config(dataset_name=dataset))
    for key, value in {**ELSEWHERE, **expected}.items():
        assert getattr(config, key) == value, key
    assert config.normalize_reward == (dataset == "hopper-medium-v2")
    assert (config.actor_layers, config.hidden_dim, config.batch_size) == (3, 256, 256)
    given = dict(cql_weight=3.0, lagrange_gap=5.0, max_backup=True, critic_layers=2)
    config = cql.tuned(cql.Config(dataset_name=dataset, **given))
    for key, value in given.items():
        assert getattr(config, key) == value, key


def test_strengths_are_the_papers_for_iql_but_the_objectives_noise_is_rebracs():
    for name, flags in cql.CHOSEN.items():
        assert flags == (rebrac if name == "BCN" else iql).CHOSEN[name]
    assert list(cql.CHOSEN) == list(iql.CHOSEN)
    assert cql.BEST == {}
