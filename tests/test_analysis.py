"""What is measured inside the actor, against matrices with known answers and NumPy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_iql
import test_rebrac
from conftest import init_states
from test_iql import head
from test_rebrac import mlp, numpy_actor, numpy_actor_back, numpy_adam, same_bits, small_data
from test_regularisers import ON, SCRIPTS, SMALL

import rebrac
import runs
import tasks

both = pytest.mark.parametrize("script", SCRIPTS)
SMALL_STATE = {"rebrac": test_rebrac.small_state, "iql": test_iql.small_state}


def measure(rows):
    info = {f"x/{key}": value[None] for key, value in rebrac.measure(jnp.array(rows, jnp.float32)).items()}
    return {key[2:]: value.item() for key, value in runs.with_pca_ranks(info).items()}


def test_a_neuron_is_dead_that_is_positive_nowhere_in_the_batch():
    assert measure([[-1, 0, 1, -2], [-1, 0, -1, 3], [-3, 0, -1, -1]])["dead_neurons"] == 0.5
    assert measure(np.full((3, 4), -1.0))["dead_neurons"] == 1.0
    assert measure(np.eye(4))["dead_neurons"] == 0.0


def test_norm_mean_and_standard_deviation_are_of_the_features_before_the_relu():
    info = measure([[3, -4], [0, 0], [6, 8]])
    assert info["feature_norm"] == pytest.approx(5) and info["feature_mean"] == pytest.approx(13 / 6)
    assert info["feature_std"] == pytest.approx(np.std([3, -4, 0, 0, 6, 8]))


@pytest.mark.parametrize(
    "energies, rank",
    [
        ([98.9, 1.0, 0.1, 0], 2),
        ([99.1, 0.8, 0.1, 0], 1),
        ([40, 30, 29.5, 0.5], 3),
        ([1, 1, 1, 1], 4),
        ([7, 0, 0, 0], 1),
    ],
)
def test_pca_rank_counts_the_components_that_hold_99_percent_of_the_squared_singular_values(energies, rank):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 4)))[0] for n in (50, 4))
    matrix = left * np.sqrt(energies) @ right.T
    assert measure(matrix)["pca_rank"] == rank
    assert measure(1e3 * matrix)["pca_rank"] == rank


def test_pca_rank_of_many_equal_components_is_99_percent_of_them():
    assert measure(np.eye(200))["pca_rank"] == 198


def numpy_features(params, x, fn):
    """Outputs of the second hidden Dense, with FeatureNorm after the first ReLU or without."""
    x = np.maximum(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], 0)
    if fn:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]


def analysed(script, data, visited, num_seeds=1, **fields):
    """`analyse` on states far from the initial ones, and these states."""
    module, config = SCRIPTS[script]
    config = replace(config, num_seeds=num_seeds, **fields)
    states = [SMALL_STATE[script](replace(config, num_seeds=1), seed=i) for i in range(num_seeds)]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    samples = tasks.make_samples(data)
    info = module.analyse(*module.split_config(config), states, jax.device_put(data), samples, visited)
    return runs.with_pca_ranks(info), states, samples


def split_data():
    data = small_data()
    data |= dict(train=data["train"][:40], validation=data["train"][40:])
    return data | dict(mean=np.float32(0.5), std=np.float32(2.0))


VISITED = np.random.default_rng(1).normal(size=(2, 30, test_rebrac.STATES)).astype(np.float32)


@both
@pytest.mark.parametrize("fn", [False, True])
def test_each_batch_is_measured_as_numpy_does(script, fn):
    data = split_data()
    info, states, samples = analysed(script, data, VISITED, num_seeds=2, actor_fn=fn)
    for seed in range(2):
        params = jax.tree.map(lambda x, seed=seed: np.asarray(x[seed]), states.actor["params"])
        batches = {part: data["observations"][samples[part]] for part in ("train", "validation")}
        batches |= {"evaluation": (VISITED[seed] - 0.5) / 2, "random": samples["random"]}
        for part, x in batches.items():
            features = numpy_features(params["Hidden_0"], x, fn)
            energies = np.linalg.svd(features, compute_uv=False) ** 2
            expected = dict(
                dead_neurons=(features <= 0).all(0).mean(),
                feature_norm=np.sqrt((features**2).sum(1)).mean(),
                feature_mean=features.mean(),
                feature_std=features.std(),
                pca_rank=np.argmax(np.cumsum(energies) >= 0.99 * energies.sum()) + 1,
            )
            for key, value in expected.items():
                np.testing.assert_allclose(info[f"{part}/{key}"][seed], value, rtol=1e-3, atol=1e-4, err_msg=key)
    assert len(info) == 4 * 5 + 2 * 2 + 2 + 2 and all(value.shape == (2,) for value in info.values())


@both
def test_action_error_actor_loss_and_gaps_are_numpys_and_see_no_regulariser(script):
    data = split_data()
    info, states, samples = analysed(script, data, VISITED[:1])
    state = jax.tree.map(lambda x: np.asarray(x[0]), states._replace(key=None))
    module, config = SCRIPTS[script]
    found = {}
    for part in ("train", "validation"):
        batch = module.transitions(data, samples[part])
        x, params = batch.observations, state.actor["params"]
        features, _ = mlp(params["Hidden_0"], x, False)
        actions = np.tanh(features @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
        found[part] = ((actions - batch.actions) ** 2).mean()
        np.testing.assert_allclose(info[f"{part}/action_error"][0], found[part], rtol=1e-4)
        if script == "rebrac":
            pair = [
                test_rebrac.numpy_values(config, test_rebrac.numpy_critic(state.critic["params"], k, x, actions)[0])[0]
                for k in range(2)
            ]
            q = np.minimum(*pair)
            loss = config.actor_bc_coef * ((actions - batch.actions) ** 2).sum(-1).mean() - q.mean() / np.abs(q).mean()
        else:
            pairs = np.concatenate([x, batch.actions], -1)
            target = np.minimum(*[head(state.target_critic["params"], k, pairs)[0] for k in range(2)])
            advantage = target - head(state.value["params"], 0, x)[0]
            log_stds = features @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
            log_stds = np.clip(log_stds, config.log_std_min, config.log_std_max)
            z = (batch.actions - actions) / np.exp(log_stds)
            log_probs = (-0.5 * z**2 - log_stds - 0.5 * np.log(2 * np.pi)).sum(-1)
            loss = -(np.minimum(np.exp(config.temperature * advantage), 100) * log_probs).mean()
        np.testing.assert_allclose(info[f"{part}/actor_loss"][0], loss, rtol=1e-3)
    np.testing.assert_allclose(info["gap/action_error"][0], found["validation"] - found["train"], atol=1e-5)
    np.testing.assert_allclose(
        info["gap/actor_loss"], info["validation/actor_loss"] - info["train/actor_loss"], rtol=1e-5
    )
    noisy, _, _ = analysed(
        script, data, VISITED[:1], actor_dropout=0.5, actor_input_noise=1.0, actor_bc_noise=1.0, actor_grad_noise=1.0
    )
    for key in info:
        assert key.startswith("plasticity") or info[key] == noisy[key], key


def test_plasticity_is_100_steps_of_adam_on_the_held_out_batch():
    data = split_data()
    with jax.enable_x64(True):
        wide = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in data.items()}
        batch = jax.tree.map(jnp.asarray, rebrac.transitions(wide, data["validation"]))
        state = SMALL_STATE["rebrac"](SMALL)
        state = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)
        actor = rebrac.plasticity(SMALL, wide, state, batch)
    params = jax.tree.map(np.asarray, state.actor["params"])
    opt = (jax.tree.map(np.zeros_like, params), jax.tree.map(np.zeros_like, params), 0)
    for _ in range(100):
        actions, cache = numpy_actor(params, np.asarray(batch.observations))
        grads = numpy_actor_back(params, cache, 2 * (actions - np.asarray(batch.actions)) / actions.size)
        opt, params = numpy_adam(opt, params, grads, SMALL.actor_learning_rate)
    for a, b in zip(jax.tree.leaves(actor["params"]), jax.tree.leaves(params)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


@both
def test_plasticitys_steps_move_the_actor_even_when_its_learning_rate_has_decayed_to_0(script):
    module, config = SCRIPTS[script]
    config, data = replace(config, actor_lr_decay=True, num_updates=4), split_data()
    static, traced = module.split_config(config)
    states = init_states(module, config, jax.device_put(data))
    for _ in range(2):
        states, _ = module.epoch(static, traced, states, data)
    before = jax.device_get(states._replace(key=jax.random.key_data(states.key)))
    info = module.analyse(static, traced, states, data, tasks.make_samples(data), VISITED[:1])
    assert info["plasticity/after"] < 0.98 * info["plasticity/before"]
    np.testing.assert_allclose(info["plasticity/before"], info["validation/action_error"], rtol=1e-6)
    assert same_bits(before, jax.device_get(states._replace(key=jax.random.key_data(states.key))))


@both
def test_every_regulariser_at_once_can_be_measured(script):
    module, _ = SCRIPTS[script]
    config = replace(SCRIPTS[script][1], hidden_dim=64, **ON)
    data = split_data()
    states = init_states(module, config, jax.device_put(data))
    info = module.analyse(*module.split_config(config), states, data, tasks.make_samples(data), VISITED[:1])
    assert all(np.isfinite(value).all() for value in info.values())


def test_samples_are_of_their_part_and_random_states_fill_the_range_of_the_training_data():
    rng = np.random.default_rng(0)
    data = dict(
        observations=rng.normal(size=(30_000, 2)), train=np.arange(20_000), validation=np.arange(20_000, 30_000)
    )
    data["observations"][20_000:] *= 100
    samples = tasks.make_samples(data)
    for part, size in (("train", 10_000), ("validation", 10_000)):
        assert np.isin(samples[part], data[part]).all() and len(np.unique(samples[part])) == size
    low, high = data["observations"][:20_000].min(0), data["observations"][:20_000].max(0)
    spread = (samples["random"] - low) / (high - low)
    assert spread.min() >= 0 and spread.max() <= 1 and samples["random"].dtype == np.float32
    np.testing.assert_allclose(np.quantile(spread, [0.1, 0.5, 0.9], 0), [[0.1] * 2, [0.5] * 2, [0.9] * 2], atol=0.02)
    assert same_bits(samples, tasks.make_samples(data))
    assert "validation" not in tasks.make_samples(data | {"validation": np.arange(0)})


def test_iql_is_measured_without_held_out_data():
    data = split_data() | {"validation": np.arange(0)}
    info, _, _ = analysed("iql", data, VISITED[:1])
    assert not [key for key in info if key.startswith(("validation", "gap", "plasticity"))]
