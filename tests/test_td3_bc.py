"""TD3+BC, which is ReBRAC with a preset: an update against TD3+BC in NumPy, and its values."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import reference
from conftest import assert_close, small_data, small_state, widen
from runs_helpers import fails

import rebrac
from harness.environments import make_env

PRESET = rebrac.Config(dataset_name="hopper-medium-v2", preset="td3-bc")


# --- One update ---


def actor_gradient(params, critic, batch):
    """Return the loss -lambda Q(s, pi(s)) + mean (pi(s) - a)^2, and its gradients.

    lambda is 2.5 / mean |Q|, taken for a constant. TD3+BC's Q is the first critic's; here it is
    the smaller one's, as the preset says.
    """
    actions = reference.policy(params, batch.observations)
    x = reference.pairs(batch.observations, actions)
    values = []
    slopes = []  # dQ/da
    for k in range(2):
        values.append(reference.values_of(critic, k, x))
        _, by_inputs = reference.network_back(critic, k, x, np.ones((len(x), 1)))
        slopes.append(by_inputs[:, batch.observations.shape[1] :])
    q = np.minimum(*values)
    slope = np.where((values[0] < values[1])[:, None], *slopes)
    weight = 2.5 / np.abs(q).mean()
    difference = actions - batch.actions
    loss = -weight * q.mean() + (difference**2).mean()
    grad = -weight * slope / len(q) + 2 * difference / difference.size
    return loss, reference.policy_back(params, batch.observations, grad)


def td3_target(state, batch, noise):
    """Return r + 0.99 (1 - d) min_k Q'_k(s', a'), where a' = pi'(s') + clipped noise."""
    noise = np.clip(0.2 * noise, -0.5, 0.5)
    actions = reference.policy(state["target_actor"], batch.next_observations) + noise
    x = reference.pairs(batch.next_observations, np.clip(actions, -1, 1))
    values = [reference.values_of(state["target_critic"], k, x) for k in range(2)]
    return batch.rewards + 0.99 * (1 - batch.terminals) * np.minimum(*values)


def td3_bc_update(state, batches, noises):
    """Update the critics on both batches, then the actor and the targets on the second one."""
    for batch, noise in zip(batches, noises):
        target = td3_target(state, batch, noise)
        x = reference.pairs(batch.observations, batch.actions)
        grads = {}
        for k in range(2):
            error = reference.values_of(state["critic"], k, x) - target
            grad = 2 * error[:, None] / len(error)
            own, _ = reference.network_back(state["critic"], k, x, grad)
            grads.update(own)
        state = reference.take_step(state, "critic", grads, 3e-4)
    loss, grads = actor_gradient(state["actor"], state["critic"], batches[-1])
    state = reference.take_step(state, "actor", grads, 3e-4)
    state = reference.move_target(state, "actor", 0.005)
    return reference.move_target(state, "critic", 0.005), loss


def test_an_update_is_that_of_td3_bc():
    config = replace(rebrac.tuned(PRESET), hidden_dim=16, batch_size=8)
    with jax.enable_x64(True):
        state = widen(small_state(rebrac, config, spread=0.5))  # whose actions have 3 entries
        data = widen(small_data())
        rows = np.arange(16).reshape(2, 8)
        batches = [rebrac.transitions(data, row) for row in rows]
        key, first, _, _ = jax.random.split(state.key, 4)
        _, second, _, _ = jax.random.split(key, 4)
        shape = batches[0].actions.shape
        noises = [np.asarray(jax.random.normal(key, shape)) for key in (first, second)]
        expected, loss = td3_bc_update(reference.numpy_state(state), batches, noises)
        update = jax.jit(rebrac.update, static_argnums=0)
        state, info = update(config, state, rebrac.transitions(data, rows))
        np.testing.assert_allclose(2.5 * info["actor_loss"], loss, rtol=1e-9)
        # Up to the factor 2.5, which Adam sees in its epsilon alone, the gradient is TD3+BC's
        moments, _, _ = expected["actor_opt"]
        assert_close(jax.tree.map(lambda m: 2.5 * m, state.actor_opt[0].mu), moments)
    for name in ("critic", "target_critic"):
        assert_close(getattr(state, name)["params"], expected[name])
    for name in ("actor", "target_actor"):
        assert_close(getattr(state, name)["params"], expected[name], rtol=0, atol=1e-4)


# --- Its values ---

COEFFICIENTS = {  # 0.4 / entries of an action, which ReBRAC sums and TD3+BC averages
    "hopper-medium-v2": 0.4 / 3,
    "halfcheetah-medium-v2": 0.4 / 6,
    "walker2d-medium-v2": 0.4 / 6,
    "ant-medium-v2": 0.4 / 8,
    "antmaze-umaze-v2": 0.4 / 8,
    "pen-human-v1": 0.4 / 24,
    "door-human-v1": 0.4 / 28,
    "hammer-human-v1": 0.4 / 26,
    "relocate-human-v1": 0.4 / 30,
}


@pytest.mark.parametrize("dataset", COEFFICIENTS)
def test_each_task_has_the_coefficient_of_its_actions(dataset):
    config = rebrac.tuned(replace(PRESET, dataset_name=dataset))
    assert config.actor_bc_coef == pytest.approx(COEFFICIENTS[dataset])
    (action_dim,) = make_env(dataset).action_space.shape
    assert rebrac.ACTION_DIMS[dataset.split("-")[0]] == action_dim


@pytest.mark.parametrize("dataset", rebrac.TUNED)
def test_the_values_are_td3_bcs(dataset):
    config = rebrac.tuned(replace(PRESET, dataset_name=dataset))
    expected = dict(
        critic_loss="mse",
        gamma=0.99,
        tau=0.005,
        batch_size=256,
        actor_learning_rate=3e-4,
        critic_learning_rate=3e-4,
        critic_bc_coef=0.0,
        actor_q_coef=1.0,
        policy_freq=2,
        target_noise=0.2,
        noise_clip=0.5,
        hidden_dim=256,
        actor_layers=2,
        critic_layers=2,
        critic_ln=False,
        normalize_states=not dataset.startswith("antmaze"),
    )
    for key, value in expected.items():
        assert getattr(config, key) == value, key


def test_another_task_needs_the_coefficient():
    config = replace(PRESET, dataset_name="maze2d-umaze-v1")
    fails("td3-bc on maze2d-umaze-v1 needs --actor_bc_coef: 1 / ", rebrac.tuned, config)
    assert rebrac.tuned(replace(config, actor_bc_coef=0.2)).actor_bc_coef == 0.2
    assert rebrac.tuned(replace(config, preset="as-run")).preset == "none"


def test_regularisers_go_with_the_preset():
    config = rebrac.tuned(replace(PRESET, regularisers="DO"))
    assert config == replace(rebrac.tuned(PRESET), actor_dropout=0.1)
