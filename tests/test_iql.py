"""IQL: updates against a NumPy re-derivation, and what its parts must hold to."""

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
    assert_close,
    of_seed,
    paper_rows,
    run_epochs,
    same_bits,
    small_batch,
    small_config,
    small_data,
    small_state,
    widen,
)
from scipy import stats

import iql
import rebrac

SMALL = small_config(iql)
BATCH = small_batch()
update = jax.jit(iql.update, static_argnums=0)


# --- One update ---


@pytest.mark.parametrize("fields", [{}, dict(actor_sam=0.3, actor_rms=True)])
def test_updates_are_those_of_a_numpy_rederivation(fields):
    config = replace(
        SMALL,
        expectile=0.8,
        temperature=3.0,
        max_weight=5.0,
        reward_shift=-1.0,
        log_std_min=-0.5,
        log_std_max=0.5,
        actor_learning_rate=2e-3,
        **fields,
    )
    with jax.enable_x64(True):  # so that float32's rounding hides no difference
        state = widen(small_state(iql, config, spread=0.5))
        data = widen(small_data())
        expected = reference.numpy_state(state)
        for i in range(4):
            batch = iql.transitions(data, np.arange(8 * i, 8 * i + 8))
            expected, losses = reference.iql_update(config, expected, batch)
            state, info = update(config, state, batch)
            for key, value in losses.items():
                np.testing.assert_allclose(info[key], value, rtol=1e-9)
        for name in ("actor", "critic", "target_critic", "value"):
            assert_close(getattr(state, name)["params"], expected[name])


def test_v_is_the_expectile_of_the_critics_values():
    """With V a constant the loss is smallest at the expectile: E[|tau - 1(q < v)| (q - v)] = 0."""
    config = replace(SMALL, expectile=0.9)
    state = small_state(iql, config)
    target = jax.random.normal(jax.random.key(0), (32,))
    params = jax.tree.map(jnp.zeros_like, state.value["params"])

    @jax.jit
    @jax.grad
    def slope(v):
        constant = {**params, "Dense_0": {**params["Dense_0"], "bias": v[None]}}
        loss, _ = iql.value_loss(constant, config, state, BATCH, target, KEYS[0])
        return loss

    v = jnp.float32(0)
    for _ in range(200):
        v -= 0.5 * slope(v)
    weights = np.abs(0.9 - (target < v))
    assert abs((weights * (target - v)).mean()) < 1e-5
    assert v > target.mean()


def test_the_policy_keeps_its_bounds():
    config = replace(SMALL, log_std_min=-1.0, log_std_max=0.5)
    state = small_state(iql, config, spread=3.0)
    actor = iql.Actor(config, ACTION_DIM)
    means, log_stds = iql.forward(actor, state.actor, BATCH.observations)
    assert np.abs(means).max() <= 1
    assert log_stds.min() == -1.0
    assert log_stds.max() == 0.5
    actions = iql.act(config, state.actor, small_data(), BATCH.observations)
    np.testing.assert_array_equal(actions, means)


def test_the_originals_std_does_not_depend_on_the_state():
    config = replace(SMALL, state_dependent_std=False, log_std_min=-5.0)
    state = small_state(iql, config)
    actor = iql.Actor(config, ACTION_DIM)
    _, log_stds = iql.forward(actor, state.actor, BATCH.observations)
    assert log_stds.shape == BATCH.actions.shape
    assert len(np.unique(log_stds, axis=0)) == 1
    after, _ = update(config, state, BATCH)
    before = state.actor["params"]["log_stds"]
    assert not np.array_equal(after.actor["params"]["log_stds"], before)


def target_and_advantages(state):
    """Return the critics' smaller values for BATCH, and the advantages, in float64."""
    critics = iql.Critics(SMALL)
    values = iql.forward(critics, state.target_critic, BATCH.observations, BATCH.actions)
    target = values.min(0)
    advantages = target - iql.forward(iql.Value(SMALL), state.value, BATCH.observations)
    return target, np.asarray(advantages, np.float64)


@pytest.mark.parametrize("temperature", [0.1, 10.0])
def test_weights_are_exponentiated_advantages_up_to_100(temperature):
    config = replace(SMALL, temperature=temperature)
    state = small_state(iql, config, spread=1.0)
    target, advantage = target_and_advantages(state)
    _, (_, info) = iql.actor_loss(state.actor["params"], config, state, BATCH, target, KEYS)
    expected = np.minimum(np.exp(temperature * advantage), 100)
    np.testing.assert_allclose(info["weight"], expected.mean(), rtol=1e-4)
    assert (expected.max() == 100) == (temperature == 10.0)


def test_each_noise_of_the_actors_loss_has_its_own_place():
    """Input noise reaches the actor alone, the objective's noise the weights, one draw a sample."""
    state = small_state(iql, SMALL)
    target, advantage = target_and_advantages(state)

    def loss(**flags):
        config = replace(SMALL, **flags)
        return iql.actor_loss(state.actor["params"], config, state, BATCH, target, KEYS)[0]

    def loss_by_hand(seen, exponents):
        actor = iql.Actor(SMALL, ACTION_DIM)
        means, log_stds = iql.forward(actor, state.actor, seen)
        log_probs = stats.norm.logpdf(BATCH.actions, means, np.exp(log_stds)).sum(-1)
        return -(np.minimum(np.exp(exponents), 100) * log_probs).mean()

    clean = SMALL.temperature * advantage
    np.testing.assert_allclose(loss(), loss_by_hand(BATCH.observations, clean), rtol=1e-5)
    seen = BATCH.observations + 0.3 * jax.random.normal(KEYS[1], BATCH.observations.shape)
    noisy = loss(actor_input_noise=0.3)
    np.testing.assert_allclose(noisy, loss_by_hand(seen, clean), rtol=1e-5)
    exponents = clean + 0.3 * jax.random.normal(KEYS[2], clean.shape)
    noisy = loss(actor_bc_noise=0.3)
    np.testing.assert_allclose(noisy, loss_by_hand(BATCH.observations, exponents), rtol=1e-5)


def test_the_actors_flags_leave_v_and_q_alone():
    flags = {name: value for name, value in ACTOR_FLAGS.items() if name not in NORMS}
    config = replace(SMALL, **flags)
    plain, _ = update(SMALL, small_state(iql, SMALL), BATCH)
    regularised, _ = update(config, small_state(iql, config), BATCH)
    assert same_bits(plain.critic, regularised.critic)
    assert same_bits(plain.value, regularised.value)
    assert not same_bits(plain.actor, regularised.actor)
    actions = iql.act(SMALL, plain.actor, small_data(), BATCH.observations)
    same_actions = iql.act(config, plain.actor, small_data(), BATCH.observations)
    np.testing.assert_array_equal(same_actions, actions)


# --- The loop ---


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first = run_epochs(iql, SMALL)
    assert same_bits(first, run_epochs(iql, SMALL))
    assert not same_bits(first.actor, run_epochs(iql, replace(SMALL, seed=1)).actor)
    for opt in (first.actor_opt, first.critic_opt, first.value_opt):
        assert opt[0].count == 8


def test_seeds_trained_together_are_those_trained_alone():
    """Without BatchNorm: a bias before it has no gradient but rounding, which Adam makes large."""
    config = replace(SMALL, **{**REGULARISED, "actor_bn": False, "critic_bn": False})
    together = run_epochs(iql, replace(config, num_seeds=2))
    for seed in range(2):
        alone = run_epochs(iql, replace(config, seed=seed))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a[seed], b[0], rtol=1e-3, atol=1e-5)


def test_the_actors_learning_rate_decays_over_the_run():
    assert iql.Config().actor_lr_decay == "cosine"
    config = replace(SMALL, actor_lr_decay="cosine", num_updates=4)
    states = run_epochs(iql, config, epochs=1)
    end = of_seed(states, 0)._replace(key=jax.random.key(0))
    after, _ = update(config, end, BATCH)
    assert same_bits(after.actor["params"], end.actor["params"])  # the rate is 0 by now
    assert not same_bits(after.critic["params"], end.critic["params"])


def test_parameters_start_orthogonal():
    state = iql.init_state(replace(SMALL, hidden_dim=32), small_batch(1), 0)
    for network in (state.actor, state.critic, state.value):
        kernel = np.asarray(network["params"]["Hidden_0"]["Dense_1"]["kernel"])
        np.testing.assert_allclose(kernel.T @ kernel, 2 * np.eye(32), atol=1e-5)


def test_the_last_weights_start_at_their_scales():
    """The means at sqrt(2), as in IQL, and the log standard deviations at 1, as in the paper's."""
    actor = iql.init_state(replace(SMALL, hidden_dim=32), small_batch(1), 0).actor["params"]
    for layer, scale in (("Dense_0", np.sqrt(2)), ("Dense_1", 1.0)):
        kernel = np.asarray(actor[layer]["kernel"])
        expected = scale**2 * np.eye(kernel.shape[1])
        np.testing.assert_allclose(kernel.T @ kernel, expected, atol=1e-5)


# --- The paper's hyperparameters ---


def test_each_dataset_gets_the_papers_values():
    rows = paper_rows("iql.csv")
    assert [name for name, _ in rows] == sorted(iql.TUNED)
    assert list(iql.TUNED) == list(rebrac.TUNED)
    for name, row in rows:
        config = iql.tuned(iql.Config(dataset_name=name))
        for key, value in row.items():
            expected = 0 if value is None else value  # the paper has no dropout there
            assert getattr(config, key) == expected, (name, key)
        assert config.normalize_states
        assert config.batch_size == 256
        assert config.actor_learning_rate == 3e-4


BEST_FILES = {"best-L1": ("iql_best_l1.csv", 1.0), "best": ("iql_best_combination.csv", 0.5)}


@pytest.mark.parametrize("name", BEST_FILES)
def test_the_best_regularisers_of_each_dataset_are_the_papers(name):
    assert set(BEST_FILES) == set(iql.BEST)
    file, l1_ratio = BEST_FILES[name]
    rows = paper_rows(file)
    assert [dataset for dataset, _ in rows] == sorted(iql.TUNED)
    for dataset, flags in rows:
        plain = iql.Config(dataset_name=dataset)
        expected = iql.tuned(replace(plain, actor_l1_ratio=l1_ratio, **flags))
        assert iql.tuned(replace(plain, regularisers=name)) == expected


@pytest.mark.parametrize("name", BEST_FILES)
def test_a_preset_is_the_published_configuration_to_the_last_value(name):
    """The paper's code scales rewards on AntMaze alone, and its best's decay is L2 but for one."""
    file, l1_ratio = BEST_FILES[name]
    for dataset, flags in paper_rows(file):
        plain = iql.Config(dataset_name=dataset, normalize_reward=dataset.startswith("antmaze"))
        assert iql.tuned(replace(plain, preset="as-run-none")) == iql.tuned(plain)
        own = l1_ratio
        if name == "best" and dataset != "antmaze-large-diverse-v2":
            own = 0.0
        expected = iql.tuned(replace(plain, actor_l1_ratio=own, **flags))
        preset = name.replace("best", "as-run")
        assert iql.tuned(iql.Config(dataset_name=dataset, preset=preset)) == expected
