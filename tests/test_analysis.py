"""What is measured inside the actor, against matrices with known answers and NumPy."""

import functools
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
    assert_in_full_precision,
    both_scripts,
    init_states,
    of_seed,
    same_bits,
    small_batch,
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
from harness.evaluation import Episodes
from harness.inside import (
    action_distance,
    feature_statistics,
    jacobian_norm,
    linear_cka,
    make_samples,
    with_ranks,
)
from tools.report_runs import read_results
from tools.results import write_results


def episodes_of_noise(num_seeds):
    """Return an evaluation's episodes, of states and rewards that are noise."""
    rng = np.random.default_rng(1)
    return Episodes(
        returns=np.zeros((num_seeds, 3)),
        visited=rng.normal(size=(num_seeds, 30, STATE_DIM)).astype(np.float32),
        starts=rng.normal(size=(num_seeds, 2, STATE_DIM)).astype(np.float32),
        rewards=rng.normal(size=(num_seeds, 2, 1000)).astype(np.float32),
        lengths=rng.integers(1, 1000, (num_seeds, 2)),
    )


# --- Matrices with known answers ---


def measure(rows):
    """Return what the analysis says of the rows of a matrix."""
    info = feature_statistics(jnp.array(rows, jnp.float32))
    of_one_seed = {f"x/{key}": value[None] for key, value in info.items()}
    ranked = with_ranks(of_one_seed)
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


@pytest.mark.parametrize(
    "singular, srank, effective_rank",
    [
        ([1, 1, 1, 1], 4, 4),
        ([7, 0, 0, 0], 1, 1),
        ([97, 1.5, 1, 0.5], 3, 1.18),
        ([2, 2, 0, 0], 2, 2),
    ],
)
def test_ranks_of_the_singular_values_themselves(singular, srank, effective_rank):
    info = measure(np.diag(singular))
    assert info["srank"] == srank
    assert info["effective_rank"] == pytest.approx(effective_rank, rel=5e-3)
    assert measure(np.diag(singular) * 1e3)["srank"] == srank


def test_a_linear_policys_jacobian_is_its_matrix():
    matrix = np.array([[3.0, 0.0], [0.0, 4.0], [0.0, 12.0]])
    states = jnp.ones((5, 2))
    assert jacobian_norm(lambda x: x @ matrix.T, states) == pytest.approx(13)


def test_the_jacobian_of_a_policy_that_bends_is_a_mean_over_states():
    states = jnp.array([[0.0], [1.0], [2.0]])
    slopes = 1 - np.tanh([0, 1, 2]) ** 2
    assert jacobian_norm(jnp.tanh, states) == pytest.approx(slopes.mean(), rel=1e-5)


def test_an_action_is_held_against_the_data_in_the_nearest_states():
    rng = np.random.default_rng(0)
    batch = small_batch(60)._replace(
        observations=rng.normal(size=(60, STATE_DIM)).astype(np.float32),
        actions=rng.uniform(-1, 1, (60, ACTION_DIM)).astype(np.float32),
    )
    states = rng.normal(size=(7, STATE_DIM)).astype(np.float32)
    actions = rng.uniform(-1, 1, (7, ACTION_DIM)).astype(np.float32)
    gaps = []
    for state, action in zip(states, actions):
        nearest = np.argsort(np.linalg.norm(batch.observations - state, axis=1))[:10]
        gaps.append(np.linalg.norm(batch.actions[nearest] - action, axis=1).min())
    assert action_distance(states, actions, batch) == pytest.approx(np.mean(gaps), rel=1e-5)
    same = action_distance(batch.observations, batch.actions, batch)
    assert same == pytest.approx(0, abs=1e-6)


def test_neighbours_and_ranks_are_not_those_of_states_in_ten_bits():
    batch = small_batch(60)
    states = batch.observations[:7]
    assert_in_full_precision(action_distance, states, batch.actions[:7], batch)
    assert_in_full_precision(feature_statistics, states)


def test_cka_sees_neither_rotation_nor_scale_nor_shift():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4)) * [1, 2, 3, 4]
    rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    assert linear_cka(x, x * [1, 0, 0, 0]) < 0.5
    x = np.eye(4)[:, :1]  # and y are not correlated, once both are centred
    y = np.array([[0.0], [1.0], [-1.0], [0.0]])
    assert linear_cka(x, y) == pytest.approx(0)
    same = np.full((7, 3), 0.1, np.float32)
    assert np.isnan(linear_cka(same, same))


# --- A whole analysis ---


def split_data():
    """Return data with held-out steps and normalised states."""
    data = small_data()
    data["validation"] = data["train"][40:]
    data["train"] = data["train"][:40]
    data["mean"] = np.float32(0.5)
    data["std"] = np.float32(2.0)
    data["reward_scale"] = np.float32(3.0)
    return data


def analyse(script, data, num_seeds=1, **fields):
    """Return the analysis of states far from their initial ones, and these states."""
    config = replace(small_config(script), num_seeds=num_seeds, **fields)
    alone = replace(config, num_seeds=1)
    states = [small_state(script, alone, seed) for seed in range(num_seeds)]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    samples = make_samples(data)
    episodes = episodes_of_noise(num_seeds)
    info = script.analyse(config, states, jax.device_put(data), samples, episodes)
    return with_ranks(info), states


@functools.cache
def analysed(script):
    """Return a config of two seeds, its analysis on `split_data`, and the states."""
    fields = dict(gamma=0.9)
    if script is rebrac:
        fields["critic_loss"] = "mse"
    if script in (iql, cql):
        fields["reward_shift"] = -1.0
    if script is cql:
        fields["reward_scale"] = 10.0
    info, states = analyse(script, split_data(), num_seeds=2, **fields)
    return small_config(script, **fields), info, states


def numpy_features(layers, x):
    """Return the last hidden Dense's outputs before the ReLU."""
    return reference.dense(layers["Dense_1"], np.maximum(reference.dense(layers["Dense_0"], x), 0))


def bcq_decoded(actor, observations):
    """Return the actions of BCQ's decoder at the latent 0, which its perturbation network sees."""
    latents = np.zeros((len(observations), 2 * ACTION_DIM))
    return reference.bcq_decode(reference.bcq_network(actor, 1), observations, latents)


@both_scripts
def test_each_batch_is_measured_as_numpy_does(script):
    data = split_data()
    _, info, states = analysed(script)
    samples = make_samples(data)
    for seed in range(2):
        params = reference.numpy_state(of_seed(states, seed))["actor"]
        batches = {
            "train": data["observations"][samples["train"]],
            "validation": data["observations"][samples["validation"]],
            "evaluation": (episodes_of_noise(2).visited[seed] - 0.5) / 2,
            "random": samples["random"],
        }
        for part, x in batches.items():
            if script is bcq:
                x = reference.pairs(x, bcq_decoded(params, x))
            values = numpy_features(params["Hidden_0"], x)
            singular = np.linalg.svd(values, compute_uv=False)
            shares = singular / singular.sum()
            squares = singular**2
            expected = dict(
                dead_neurons=(values <= 0).all(0).mean(),
                feature_norm=np.sqrt((values**2).sum(1)).mean(),
                feature_mean=values.mean(),
                feature_std=values.std(),
                pca_rank=np.argmax(np.cumsum(squares) >= 0.99 * squares.sum()) + 1,
                srank=np.argmax(np.cumsum(shares) >= 0.99) + 1,
                effective_rank=np.prod(shares**-shares),
            )
            for key, value in expected.items():
                ours = info[f"{part}/{key}"][seed]
                np.testing.assert_allclose(ours, value, rtol=1e-3, atol=1e-4, err_msg=key)
    for value in info.values():
        assert value.shape[0] == 2


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
    config, info, states = analysed(script)
    state = reference.numpy_state(of_seed(states, 0))
    samples = make_samples(data)
    errors = {}
    losses = {}
    for part in ("train", "validation"):
        batch = script.transitions(data, samples[part])
        errors[part], losses[part] = numpy_errors(script, config, state, batch)
        np.testing.assert_allclose(info[f"{part}/action_error"][0], errors[part], rtol=1e-4)
        np.testing.assert_allclose(info[f"{part}/actor_loss"][0], losses[part], rtol=1e-3)
    gap = errors["validation"] - errors["train"]
    np.testing.assert_allclose(info["gap/action_error"][0], gap, atol=1e-5)
    gap = info["validation/actor_loss"][0] - info["train/actor_loss"][0]
    np.testing.assert_allclose(info["gap/actor_loss"][0], gap, rtol=1e-5)


def numpy_actions_and_values(script, config, state, observations):
    """Return the policy's actions in NumPy, and a function from actions to min_k Q_k."""
    if script is rebrac:
        actions = reference.policy(state["actor"], observations)
    elif script is bcq:
        actions = bcq_decoded(state["actor"], observations)
        perturbation = reference.bcq_network(state["actor"], 0)
        actions = reference.bcq_perturb(config, perturbation, observations, actions)
    elif script is cql:
        means, _, _ = reference.cql_policy(config, state["actor"], observations)
        actions = np.tanh(means)
    else:
        actions, _, _ = reference.gaussian_policy(config, state["actor"], observations)

    def values(actions):
        x = reference.pairs(observations, actions)
        return np.minimum(*(reference.values_of(state["critic"], k, x) for k in range(2)))

    return actions, values


@both_scripts
def test_what_the_critics_say_of_the_policy_is_numpys(script):
    data = split_data()
    config, info, states = analysed(script)
    state = reference.numpy_state(of_seed(states, 1))
    for part in ("train", "validation"):
        batch = script.transitions(data, make_samples(data)[part])
        actions, values = numpy_actions_and_values(script, config, state, batch.observations)
        gain = np.mean(values(actions) - values(batch.actions))
        np.testing.assert_allclose(info[f"{part}/q_gain"][1], gain, rtol=1e-3, atol=1e-5)

    episodes = episodes_of_noise(2)
    starts = (episodes.starts[1] - 0.5) / 2
    actions, values = numpy_actions_and_values(script, config, state, starts)
    if script is bcq:  # its policy plays the best of many candidates, which test_bcq.py checks
        actor = of_seed(states, 1).actor
        actions = bcq.best_candidates(config, actor, data, jnp.asarray(episodes.starts[1]))
        assert not np.allclose(values(actions), values(actions * 0), rtol=0.1)
    achieved = []
    for rewards, length in zip(episodes.rewards[1], episodes.lengths[1]):
        rewards = 3 * rewards[:length] * getattr(config, "reward_scale", 1)
        rewards = rewards + getattr(config, "reward_shift", 0)
        achieved.append(rewards @ 0.9 ** np.arange(length))
    expected = np.mean(values(actions) - achieved)
    np.testing.assert_allclose(info["evaluation/overestimation"][1], expected, rtol=1e-3)


def weight_norms_of(params, path=()):
    """Return the norm of each layer's kernel, by the layer's path."""
    norms = {}
    for name, value in params.items():
        if isinstance(value, dict):
            norms.update(weight_norms_of(value, (*path, name)))
        elif name == "kernel":
            norms[".".join(path)] = np.sqrt((value**2).sum())
    return norms


@both_scripts
def test_weights_jacobians_and_distances_are_numpys(script):
    data = split_data()
    config, info, states = analysed(script)
    state = reference.numpy_state(of_seed(states, 0))
    measured = {}
    for key, value in info.items():
        if key.startswith("weight_norm/"):
            measured[key.removeprefix("weight_norm/")] = value[0]
    expected = weight_norms_of(state["actor"])
    assert measured.keys() == expected.keys()
    for layer, norm in expected.items():
        np.testing.assert_allclose(measured[layer], norm, rtol=1e-5)

    def actions_in(observations):
        return numpy_actions_and_values(script, config, state, observations)[0]

    seen = (episodes_of_noise(2).visited[0].astype(float) - 0.5) / 2
    squares = 0
    for step in 1e-6 * np.eye(STATE_DIM):
        slopes = (actions_in(seen + step) - actions_in(seen - step)) / 2e-6
        squares = squares + (slopes**2).sum(1)
    norm = np.sqrt(squares).mean()
    np.testing.assert_allclose(info["evaluation/jacobian_norm"][0], norm, rtol=1e-3)
    train = make_samples(data)["train"]
    distances = np.linalg.norm(seen[:, None] - data["observations"][train], axis=2)
    nearest = np.argsort(distances, 1)[:, :10]
    gaps = np.linalg.norm(actions_in(seen)[:, None] - data["actions"][train][nearest], axis=2)
    distance = gaps.min(1).mean()
    np.testing.assert_allclose(info["evaluation/action_distance"][0], distance, rtol=1e-3)


@both_scripts
def test_the_analysis_sees_neither_dropout_nor_noise(script):
    flags = ("actor_dropout", "actor_input_noise", "actor_bc_noise", "actor_grad_noise")
    weak, _ = analyse(script, split_data(), **dict.fromkeys(flags, 0.1))
    strong, _ = analyse(script, split_data(), **dict.fromkeys(flags, 0.9))
    for key in weak:
        np.testing.assert_array_equal(weak[key], strong[key], key)


def test_plasticity_is_100_steps_of_adam_on_the_held_out_batch():
    config = small_config(rebrac)
    data = widen(split_data())
    with jax.enable_x64(True):
        batch = rebrac.transitions(data, data["validation"])
        state = widen(small_state(rebrac, config))
        actor = rebrac.plasticity_probe(config, data, state, batch)
    params = reference.numpy_state(state)["actor"]
    opt = reference.init_adam(params)
    for _ in range(100):
        difference = reference.policy(params, batch.observations) - batch.actions
        grad = 2 * difference / difference.size
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
    info = script.analyse(config, states, data, make_samples(data), episodes_of_noise(1))
    assert info["plasticity/loss_left"] < 0.98
    assert same_bits(before, to_numpy(states))


@both_scripts
def test_plasticity_is_the_share_of_the_error_that_is_left_on_the_probe(script, monkeypatch):
    monkeypatch.setattr(script, "NUM_PROBED", 10)  # of the 23 held-out steps
    data = split_data()
    gamma = {"gamma": 0.91}  # a config of its own, since JAX keeps what it has compiled
    info, states = analyse(script, data, **gamma)
    config = small_config(script, **gamma)
    with jax.enable_x64(False):
        state = of_seed(states, 0)
        index = make_samples(data)["validation"][:10]
        batch = script.transitions(data, index)
        cloned = script.plasticity_probe(config, data, state, batch)
    left = []
    for actor in (cloned, state.actor):
        errors = np.asarray(script.act(config, actor, data, batch.observations)) - batch.actions
        left.append((errors**2).mean())
    np.testing.assert_allclose(info["plasticity/loss_left"][0], left[0] / left[1], rtol=1e-4)


@both_scripts
def test_plasticity_does_not_depend_on_the_losss_unit_or_the_past(script, monkeypatch):
    """None of these changes its steps: Adam's first moments, noise and decay, the loss's scale."""
    config = replace(small_config(script), actor_grad_noise=0.0)
    data = split_data()
    states = init_states(script, config, data)
    states, _ = script.epoch(config, states, data)
    state = jax.tree.map(lambda x: x[0], states)
    batch = script.transitions(data, data["validation"][:100])

    def cloned(config, state):
        return script.plasticity_probe(config, data, state, batch)["params"]

    usual = cloned(config, state)
    fresh = script.actor_optimizer(config).init(state.actor["params"])
    assert same_bits(cloned(config, state._replace(actor_opt=fresh)), usual)
    assert same_bits(cloned(replace(config, actor_grad_noise=0.3), state), usual)
    assert same_bits(cloned(replace(config, actor_wd=0.3), state), usual)
    error = script.action_error
    left = error(config, data, {**state.actor, "params": usual}, batch)
    monkeypatch.setattr(script, "action_error", lambda *args: 100 * error(*args))
    scaled = error(config, data, {**state.actor, "params": cloned(config, state)}, batch)
    np.testing.assert_allclose(scaled, left, rtol=1e-3)


@pytest.mark.parametrize("script", [iql, bcq])
def test_every_regulariser_at_once_can_be_measured(script):
    config = small_config(script, hidden_dim=64, **ACTOR_FLAGS)
    data = split_data()
    states = init_states(script, config, data)
    info = script.analyse(config, states, data, make_samples(data), episodes_of_noise(1))
    for value in info.values():
        assert np.isfinite(value).all()


def test_a_run_without_held_out_data_is_measured_too():
    data = split_data() | {"validation": np.arange(0)}
    info, _ = analyse(iql, data)
    parts = {key.split("/")[0] for key in info}
    assert parts == {"train", "evaluation", "random", "features", "weight_norm"}


def test_features_are_kept_and_compared_with_the_baselines(start, tmp_path):
    kept = []
    for flags in ({}, dict(actor_ln=True)):
        directory = start(iql, num_updates=20, normalize_states=False, **flags)
        (features,) = np.load(f"{directory}/features.npy")
        kept.append(features)
        assert features.shape == (172, 64)
    centring = np.eye(172) - 1 / 172
    grams = [centring @ x @ x.T @ centring for x in kept]
    products = [[np.sum(a * b) for a in grams] for b in grams]
    cka = products[0][1] / np.sqrt(products[0][0] * products[1][1])
    seeds, _ = read_results([str(tmp_path / "results")])
    found = {seed["labels"][0]: seed["cka_to_baseline"] for seed in seeds}
    assert found == {"baseline": pytest.approx(1), "LN": pytest.approx(cka, rel=1e-4)}
    write_results(str(tmp_path / "table.csv"), seeds)
    again, _ = read_results([str(tmp_path / "table.csv")])
    assert again[1]["cka_to_baseline"] == pytest.approx(seeds[1]["cka_to_baseline"])


# --- Samples ---


def test_samples_are_of_their_part():
    data = dict(
        observations=np.zeros((30_000, 2)),
        train=np.arange(20_000),
        validation=np.arange(20_000, 30_000),
    )
    samples = make_samples(data)
    for part in ("train", "validation"):
        assert len(np.unique(samples[part])) == 10_000
        assert np.isin(samples[part], data[part]).all()
    assert same_bits(samples, make_samples(data))
    data["validation"] = np.arange(0)
    assert "validation" not in make_samples(data)


def test_random_states_fill_the_range_of_the_training_data():
    observations = np.random.default_rng(0).normal(size=(30_000, 2))
    observations[20_000:] *= 100
    data = dict(
        observations=observations,
        train=np.arange(20_000),
        validation=np.arange(20_000, 30_000),
    )
    states = make_samples(data)["random"]
    assert states.dtype == np.float32
    low = observations[:20_000].min(0)
    high = observations[:20_000].max(0)
    position = (states - low) / (high - low)
    assert position.min() >= 0
    assert position.max() <= 1
    quantiles = np.quantile(position, [0.1, 0.5, 0.9], 0)
    np.testing.assert_allclose(quantiles, [[0.1] * 2, [0.5] * 2, [0.9] * 2], atol=0.02)
