"""What is measured inside the actor, against matrices with known answers and NumPy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import (
    ACTION_DIM,
    ACTOR_FLAGS,
    STATE_DIM,
    assert_close,
    both_scripts,
    init_states,
    of_seed,
    same_bits,
    small_config,
    small_data,
    small_state,
    to_numpy,
    widen,
)

import bcq
import cql
import iql
import rebrac

VISITED = np.random.default_rng(1).normal(size=(2, 30, STATE_DIM)).astype(np.float32)


# --- Matrices with known answers ---


def measure(rows):
    """Return what the analysis says of the rows of a matrix."""
    info = rebrac.measure(jnp.array(rows, jnp.float32))
    of_one_seed = {f"x/{key}": value[None] for key, value in info.items()}
    ranked = rebrac.with_pca_ranks(of_one_seed)
    return {key.removeprefix("x/"): value.item() for key, value in ranked.items()}


def test_a_dead_neuron_is_positive_nowhere_in_the_batch():
    rows = [
        [-1, 0, 1, -2],
        [-1, 0, -1, 3],
        [-3, 0, -1, -1],
    ]
    assert measure(rows)["dead_neurons"] == 0.5
    assert measure(np.full((3, 4), -1.0))["dead_neurons"] == 1.0
    assert measure(np.eye(4))["dead_neurons"] == 0.0


def test_norm_mean_and_deviation_are_of_values_before_the_relu():
    info = measure([[3, -4], [0, 0], [6, 8]])
    assert info["feature_norm"] == pytest.approx(5)
    assert info["feature_mean"] == pytest.approx(13 / 6)
    assert info["feature_std"] == pytest.approx(np.std([3, -4, 0, 0, 6, 8]))


@pytest.mark.parametrize(
    "squares, rank",
    [
        ([98.9, 1.0, 0.1, 0], 2),
        ([99.1, 0.8, 0.1, 0], 1),
        ([40, 30, 29.5, 0.5], 3),
        ([1, 1, 1, 1], 4),
        ([7, 0, 0, 0], 1),
    ],
)
def test_pca_rank_counts_components_to_99_percent(squares, rank):
    """Of the squared singular values, whatever the matrix is multiplied by."""
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(50, 4)))
    right, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    matrix = left * np.sqrt(squares) @ right.T
    assert measure(matrix)["pca_rank"] == rank
    assert measure(1e3 * matrix)["pca_rank"] == rank


def test_pca_rank_of_equal_components_is_99_percent_of_them():
    assert measure(np.eye(200))["pca_rank"] == 198


# --- A whole analysis ---


def split_data():
    """Return data with held-out steps and normalised states."""
    data = small_data()
    data["validation"] = data["train"][40:]
    data["train"] = data["train"][:40]
    data["mean"] = np.float32(0.5)
    data["std"] = np.float32(2.0)
    return data


def analyse(script, data, visited, num_seeds=1, **fields):
    """Return the analysis of states far from their initial ones, and these states."""
    config = replace(small_config(script), num_seeds=num_seeds, **fields)
    alone = replace(config, num_seeds=1)
    states = [small_state(script, alone, seed) for seed in range(num_seeds)]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    samples = script.make_samples(data)
    info = script.analyse(config, states, jax.device_put(data), samples, visited)
    return script.with_pca_ranks(info), states


def numpy_preactivations(layers, x, feature_norm):
    """Return the last hidden Dense's outputs, with FeatureNorm after the first ReLU or without."""
    x = np.maximum(reference.dense(layers["Dense_0"], x), 0)
    if feature_norm:
        x, _ = reference.standardise(x)
    return reference.dense(layers["Dense_1"], x)


def bcq_decoded(actor, observations):
    """Return the actions of BCQ's decoder at the latent 0, which its perturbation network sees."""
    latents = np.zeros((len(observations), 2 * ACTION_DIM))
    return reference.bcq_decode(reference.bcq_network(actor, 1), observations, latents)


@both_scripts
@pytest.mark.parametrize("feature_norm", [False, True])
def test_each_batch_is_measured_as_numpy_does(script, feature_norm):
    data = split_data()
    info, states = analyse(script, data, VISITED, num_seeds=2, actor_fn=feature_norm)
    samples = script.make_samples(data)
    for seed in range(2):
        params = reference.numpy_state(of_seed(states, seed))["actor"]
        batches = {
            "train": data["observations"][samples["train"]],
            "validation": data["observations"][samples["validation"]],
            "evaluation": (VISITED[seed] - 0.5) / 2,
            "random": samples["random"],
        }
        for part, x in batches.items():
            if script is bcq:
                x = reference.pairs(x, bcq_decoded(params, x))
            values = numpy_preactivations(params["Hidden_0"], x, feature_norm)
            squares = np.linalg.svd(values, compute_uv=False) ** 2
            expected = dict(
                dead_neurons=(values <= 0).all(0).mean(),
                feature_norm=np.sqrt((values**2).sum(1)).mean(),
                feature_mean=values.mean(),
                feature_std=values.std(),
                pca_rank=np.argmax(np.cumsum(squares) >= 0.99 * squares.sum()) + 1,
            )
            for key, value in expected.items():
                ours = info[f"{part}/{key}"][seed]
                np.testing.assert_allclose(ours, value, rtol=1e-3, atol=1e-4, err_msg=key)
    measured = 4 * 5 + 2 * 2  # statistics of each batch, errors and losses of two
    assert len(info) == measured + 2 + 1  # the gaps, and plasticity
    for value in info.values():
        assert value.shape == (2,)


def numpy_errors(script, config, state, batch):
    """Return the action error and the actor's loss in NumPy."""
    if script is rebrac:
        actions = reference.policy(state["actor"], batch.observations)
        loss, _ = reference.rebrac_actor_loss(config, state, batch)
    elif script is bcq:
        actions = bcq_decoded(state["actor"], batch.observations)
        perturbation = reference.bcq_network(state["actor"], 0)
        actions = reference.bcq_perturb(config, perturbation, batch.observations, actions)
        x = reference.pairs(batch.observations, actions)
        loss = -reference.values_of(state["critic"], 0, x).mean()
    elif script is cql:
        means, _, _ = reference.cql_policy(config, state["actor"], batch.observations)
        actions = np.tanh(means)
        noise = jax.random.normal(jax.random.key(0), (1, *actions.shape))[0]
        loss, _, _ = reference.cql_actor_loss(config, state, batch, np.asarray(noise))
    else:
        actions, _, _ = reference.gaussian_policy(config, state["actor"], batch.observations)
        target = reference.iql_target(state, batch)
        loss = reference.iql_actor_loss(config, state, batch, target)
    return ((actions - batch.actions) ** 2).mean(), loss


@both_scripts
def test_action_error_actor_loss_and_gaps_are_numpys(script):
    data = split_data()
    info, states = analyse(script, data, VISITED[:1])
    state = reference.numpy_state(of_seed(states, 0))
    samples = script.make_samples(data)
    errors = {}
    losses = {}
    for part in ("train", "validation"):
        batch = script.transitions(data, samples[part])
        errors[part], losses[part] = numpy_errors(script, small_config(script), state, batch)
        np.testing.assert_allclose(info[f"{part}/action_error"], [errors[part]], rtol=1e-4)
        np.testing.assert_allclose(info[f"{part}/actor_loss"], [losses[part]], rtol=1e-3)
    gap = errors["validation"] - errors["train"]
    np.testing.assert_allclose(info["gap/action_error"], [gap], atol=1e-5)
    gap = info["validation/actor_loss"] - info["train/actor_loss"]
    np.testing.assert_allclose(info["gap/actor_loss"], gap, rtol=1e-5)


@both_scripts
def test_the_analysis_sees_neither_dropout_nor_noise(script):
    flags = ("actor_dropout", "actor_input_noise", "actor_bc_noise", "actor_grad_noise")
    weak, _ = analyse(script, split_data(), VISITED[:1], **dict.fromkeys(flags, 0.1))
    strong, _ = analyse(script, split_data(), VISITED[:1], **dict.fromkeys(flags, 0.9))
    for key in weak:
        assert weak[key] == strong[key], key


def test_plasticity_is_100_steps_of_adam_on_the_held_out_batch():
    config = small_config(rebrac)
    data = widen(split_data())
    with jax.enable_x64(True):
        batch = rebrac.transitions(data, data["validation"])
        state = widen(small_state(rebrac, config))
        actor = rebrac.clone_further(config, data, state, batch)
    params = reference.numpy_state(state)["actor"]
    opt = reference.init_adam(params)
    for _ in range(100):
        difference = reference.policy(params, batch.observations) - batch.actions
        grad = 2 * difference / len(difference)
        grads = reference.policy_back(params, batch.observations, grad)
        opt, params = reference.adam(opt, params, grads, config.actor_learning_rate)
    assert_close(actor["params"], params, rtol=1e-6, atol=1e-9)


@both_scripts
def test_plasticitys_steps_move_the_actor_at_a_runs_end_too(script):
    """There its learning rate has decayed to 0. The run's own state stays as it is."""
    flags = dict(actor_lr_decay="cosine", actor_learning_rate=1e-3, num_updates=4)
    config = replace(small_config(script), **flags)
    data = split_data()
    states = init_states(script, config, data)
    for _ in range(2):
        states, _ = script.epoch(config, states, data)
    before = to_numpy(states)
    info = script.analyse(config, states, data, script.make_samples(data), VISITED[:1])
    assert info["plasticity/loss_left"] < 0.98
    assert same_bits(before, to_numpy(states))


@both_scripts
def test_plasticity_is_the_share_of_the_loss_that_is_left_on_the_probe(script):
    config = small_config(script)
    data = split_data()
    states = init_states(script, config, data)
    info = script.analyse(config, states, data, script.make_samples(data), VISITED[:1])
    with jax.enable_x64(False):
        state = jax.tree.map(lambda x: x[0], states)
        index = script.make_samples(data)["validation"][: script.NUM_PROBED]
        batch = script.transitions(data, index)
        cloned = script.clone_further(config, data, state, batch)
    losses = []
    for actor in (cloned, state.actor):
        errors = np.asarray(script.act(config, actor, data, batch.observations)) - batch.actions
        losses.append((errors**2).sum(1).mean())
    np.testing.assert_allclose(info["plasticity/loss_left"], losses[0] / losses[1], rtol=1e-4)


@both_scripts
def test_plasticity_does_not_depend_on_the_losss_unit_or_the_past(script, monkeypatch):
    """Adam's first moments, the gradient's noise and the loss's scale change none of its steps."""
    config = replace(small_config(script), actor_grad_noise=0.0)
    data = split_data()
    states = init_states(script, config, data)
    states, _ = script.epoch(config, states, data)
    state = jax.tree.map(lambda x: x[0], states)
    batch = script.transitions(data, data["validation"][:100])

    def cloned(config, state):
        return script.clone_further(config, data, state, batch)["params"]

    usual = cloned(config, state)
    fresh = script.actor_optimizer(config).init(state.actor["params"])
    assert same_bits(cloned(config, state._replace(actor_opt=fresh)), usual)
    assert same_bits(cloned(replace(config, actor_grad_noise=0.3), state), usual)
    loss = script.cloning_loss
    left = loss(config, data, {**state.actor, "params": usual}, batch)
    monkeypatch.setattr(script, "cloning_loss", lambda *args: 100 * loss(*args))
    scaled = loss(config, data, {**state.actor, "params": cloned(config, state)}, batch)
    np.testing.assert_allclose(scaled, left, rtol=1e-3)


@both_scripts
def test_every_regulariser_at_once_can_be_measured(script):
    config = small_config(script, hidden_dim=64, **ACTOR_FLAGS)
    data = split_data()
    states = init_states(script, config, data)
    info = script.analyse(config, states, data, script.make_samples(data), VISITED[:1])
    for value in info.values():
        assert np.isfinite(value).all()


def test_a_run_without_held_out_data_is_measured_too():
    data = split_data() | {"validation": np.arange(0)}
    info, _ = analyse(iql, data, VISITED[:1])
    parts = {key.split("/")[0] for key in info}
    assert parts == {"train", "evaluation", "random"}


# --- Samples ---


def test_samples_are_of_their_part():
    data = dict(
        observations=np.zeros((30_000, 2)),
        train=np.arange(20_000),
        validation=np.arange(20_000, 30_000),
    )
    samples = rebrac.make_samples(data)
    for part in ("train", "validation"):
        assert len(np.unique(samples[part])) == 10_000
        assert np.isin(samples[part], data[part]).all()
    assert same_bits(samples, rebrac.make_samples(data))
    data["validation"] = np.arange(0)
    assert "validation" not in rebrac.make_samples(data)


def test_random_states_fill_the_range_of_the_training_data():
    observations = np.random.default_rng(0).normal(size=(30_000, 2))
    observations[20_000:] *= 100
    data = dict(
        observations=observations,
        train=np.arange(20_000),
        validation=np.arange(20_000, 30_000),
    )
    states = rebrac.make_samples(data)["random"]
    assert states.dtype == np.float32
    low = observations[:20_000].min(0)
    high = observations[:20_000].max(0)
    position = (states - low) / (high - low)
    assert position.min() >= 0
    assert position.max() <= 1
    quantiles = np.quantile(position, [0.1, 0.5, 0.9], 0)
    np.testing.assert_allclose(quantiles, [[0.1] * 2, [0.5] * 2, [0.9] * 2], atol=0.02)
