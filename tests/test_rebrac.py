"""ReBRAC: updates against a NumPy re-derivation, and what its parts must hold to."""

import csv
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, init_states
from scipy import stats

import rebrac

SMALL = rebrac.tuned(
    rebrac.Config(
        hidden_dim=16, actor_layers=2, critic_layers=2, batch_size=8,
        log_every=4, num_updates=40, v_min=-10.0, v_max=10.0, n_classes=21,
    )
)  # fmt: skip
STATES, ACTIONS = 5, 3
REGULARISED = dict(actor_dropout=0.1, actor_wd=0.1, actor_ln=True, actor_bn=True, actor_sn=True, actor_grad_noise=0.01)
update, update_critics = (jax.jit(function, static_argnums=0) for function in (rebrac.update, rebrac.update_critics))


def small_data(size=64, seed=0):
    rng = np.random.default_rng(seed)
    return dict(
        observations=rng.normal(size=(size, STATES)).astype(np.float32),
        actions=rng.uniform(-1, 1, (size, ACTIONS)).astype(np.float32),
        rewards=rng.normal(size=size).astype(np.float32),
        terminals=rng.random(size) < 0.2,
        train=np.arange(size - 1, dtype=np.int32),
        mean=np.float32(0),
        std=np.float32(1),
    )


def small_state(config, seed=0, spread=0.3):
    """A state whose parameters, targets included, are all different and far from their small initial values."""
    state = jax.tree.map(lambda x: x[0], init_states(rebrac, replace(config, seed=seed), small_data()))
    keys = iter(jax.random.split(jax.random.key(seed + 100), 1000))

    def shake(tree):
        return jax.tree.map(lambda x: x + spread * jax.random.normal(next(keys), x.shape), tree)

    return state._replace(
        **{
            name: {**getattr(state, name), "params": shake(getattr(state, name)["params"])}
            for name in ("actor", "target_actor", "critic", "target_critic")
        }
    )


# --- NumPy's ReBRAC: every gradient by hand ---


def mlp(params, x, layer_norm):
    """Output of two hidden layers and the cache that `mlp_back` needs."""
    cache = []
    for i in range(2):
        dense = params[f"Dense_{i}"]
        before = x @ dense["kernel"] + dense["bias"]
        after, norm = np.maximum(before, 0), None
        if layer_norm:
            mean, var = after.mean(-1, keepdims=True), after.var(-1, keepdims=True)
            norm = (after - mean) / np.sqrt(var + 1e-6)
            after = norm * params[f"LayerNorm_{i}"]["scale"] + params[f"LayerNorm_{i}"]["bias"]
            cache.append((x, before, norm, np.sqrt(var + 1e-6)))
        else:
            cache.append((x, before, None, None))
        x = after
    return x, cache


def mlp_back(params, cache, grad):
    """Gradients of the hidden layers' parameters, and of their input."""
    grads = {}
    for i, (x, before, norm, std) in reversed(list(enumerate(cache))):
        if norm is not None:
            grads[f"LayerNorm_{i}"] = {"scale": (grad * norm).sum(0), "bias": grad.sum(0)}
            grad = grad * params[f"LayerNorm_{i}"]["scale"]
            grad = (grad - grad.mean(-1, keepdims=True) - norm * (grad * norm).mean(-1, keepdims=True)) / std
        grad = grad * (before > 0)
        grads[f"Dense_{i}"] = {"kernel": x.T @ grad, "bias": grad.sum(0)}
        grad = grad @ params[f"Dense_{i}"]["kernel"].T
    return grads, grad


def numpy_actor(params, observations):
    features, cache = mlp(params["Hidden_0"], observations, False)
    actions = np.tanh(features @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    return actions, (features, cache, actions)


def numpy_actor_back(params, cache, grad):
    features, cache, actions = cache
    grad = grad * (1 - actions**2)
    hidden, _ = mlp_back(params["Hidden_0"], cache, grad @ params["Dense_0"]["kernel"].T)
    return {"Hidden_0": hidden, "Dense_0": {"kernel": features.T @ grad, "bias": grad.sum(0)}}


def numpy_critic(params, k, observations, actions):
    features, cache = mlp(params[f"Hidden_{k}"], np.concatenate([observations, actions], -1), True)
    return features @ params[f"Dense_{k}"]["kernel"] + params[f"Dense_{k}"]["bias"], (features, cache)


def numpy_critic_back(params, k, cache, grad):
    features, cache = cache
    hidden, grad_input = mlp_back(params[f"Hidden_{k}"], cache, grad @ params[f"Dense_{k}"]["kernel"].T)
    last = {"kernel": features.T @ grad, "bias": grad.sum(0)}
    return {f"Hidden_{k}": hidden, f"Dense_{k}": last}, grad_input[:, STATES:]


def numpy_bins(config):
    margin = config.v_expand * (config.v_max - config.v_min) / 2
    edges = np.linspace(config.v_min - margin, config.v_max + margin, config.n_classes + 1)
    return edges, (edges[:-1] + edges[1:]) / 2


def numpy_values(config, outputs):
    """Values (B,), and their gradient by the outputs (B, n)."""
    if config.critic_loss == "mse":
        return outputs[:, 0], np.ones_like(outputs)
    _, centres = numpy_bins(config)
    p = np.exp(outputs - outputs.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    values = p @ centres
    return values, p * (centres - values[:, None])


def numpy_adam(opt, params, grads, lr):
    mu, nu, count = opt
    count += 1
    mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, grads)
    nu = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, nu, grads)
    step = lambda p, m, v: p - lr * (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
    return (mu, nu, count), jax.tree.map(step, params, mu, nu)


def numpy_update_critics(config, s, batch, noise):
    """The paper's formulas; `s` maps actor, target_actor, critic, target_critic, actor_opt, critic_opt to NumPy."""
    noise = np.clip(config.target_noise * noise, -config.noise_clip, config.noise_clip)
    next_actions = np.clip(numpy_actor(s["target_actor"], batch.next_observations)[0] + noise, -1, 1)
    next_values = np.min(
        [
            numpy_values(config, numpy_critic(s["target_critic"], k, batch.next_observations, next_actions)[0])[0]
            for k in range(2)
        ],
        axis=0,
    ) - config.critic_bc_coef * ((next_actions - batch.next_actions) ** 2).sum(-1)
    target = batch.rewards + config.gamma * (1 - batch.terminals) * next_values
    size, grads, losses = len(target), {}, []
    for k in range(2):
        outputs, cache = numpy_critic(s["critic"], k, batch.observations, batch.actions)
        if config.critic_loss == "mse":
            error = outputs - target[:, None]
            losses.append((error**2).mean())
            grad = 2 * error / size
        else:
            edges, _ = numpy_bins(config)
            sigma = 0.75 * (edges[1] - edges[0])
            clipped = np.clip(target, edges[0], edges[-1])
            cdf = stats.norm.cdf(edges[None], clipped[:, None], sigma)
            wanted = np.diff(cdf, axis=-1) / (cdf[:, -1:] - cdf[:, :1])
            log_p = outputs - np.log(np.exp(outputs).sum(-1, keepdims=True))
            losses.append(-(wanted * log_p).sum(-1).mean())
            grad = (np.exp(log_p) - wanted) / size
        grads |= numpy_critic_back(s["critic"], k, cache, grad)[0]
    s = dict(s)
    s["critic_opt"], s["critic"] = numpy_adam(s["critic_opt"], s["critic"], grads, config.critic_learning_rate)
    info = {"critic_loss": np.mean(losses)}
    return s, info


def numpy_update(config, s, batches, noises):
    for batch, noise in zip(batches, noises):
        s, info = numpy_update_critics(config, s, batch, noise)
    size = len(batch.rewards)
    actions, actor_cache = numpy_actor(s["actor"], batch.observations)
    values, slopes = [], []
    for k in range(2):
        outputs, cache = numpy_critic(s["critic"], k, batch.observations, actions)
        value, by_outputs = numpy_values(config, outputs)
        values.append(value)
        slopes.append(numpy_critic_back(s["critic"], k, cache, by_outputs)[1])
    smaller = np.argmin(values, axis=0)
    value, slope = np.min(values, axis=0), np.array(slopes)[smaller, np.arange(size)]
    bc = ((actions - batch.actions) ** 2).sum(-1).mean()
    info["actor_loss"] = config.actor_bc_coef * bc - value.mean() / np.abs(value).mean()
    grad = (config.actor_bc_coef * 2 * (actions - batch.actions) - slope / np.abs(value).mean()) / size
    grads = numpy_actor_back(s["actor"], actor_cache, grad)
    s["actor_opt"], s["actor"] = numpy_adam(s["actor_opt"], s["actor"], grads, config.actor_learning_rate)
    for name in ("actor", "critic"):
        s[f"target_{name}"] = jax.tree.map(
            lambda new, old: config.tau * new + (1 - config.tau) * old, s[name], s[f"target_{name}"]
        )
    return s, info


@pytest.mark.parametrize("critic_loss", ["hl_gauss", "mse"])
def test_updates_are_those_of_a_numpy_rederivation(critic_loss):
    config = replace(SMALL, critic_loss=critic_loss, critic_bc_coef=0.5, actor_bc_coef=0.3)
    with jax.enable_x64(True):  # so that float32's rounding hides no difference
        state = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, small_state(config, spread=0.5)
        )
        to_numpy = lambda tree: jax.tree.map(np.asarray, tree)
        ours = {n: to_numpy(getattr(state, n)["params"]) for n in ("actor", "target_actor", "critic", "target_critic")}
        for name in ("actor", "critic"):
            zeros = jax.tree.map(np.zeros_like, ours[name])
            ours[f"{name}_opt"] = (zeros, zeros, 0)
        data = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in small_data().items()}
        for i in range(2):
            rows = np.arange(16 * i, 16 * i + 16).reshape(2, 8)
            batches, each = rebrac.transitions(data, rows), [rebrac.transitions(data, row) for row in rows]
            key, noise_key, *_ = jax.random.split(state.key, 4)
            keys = [noise_key, jax.random.split(key, 4)[1]]
            noises = [np.asarray(jax.random.normal(key, each[0].actions.shape)) for key in keys]
            ours, expected = numpy_update(config, ours, each, noises)
            state, info = update(config, state, jax.tree.map(jnp.asarray, batches))
            for key, value in expected.items():
                np.testing.assert_allclose(info[key], value, rtol=1e-9)
        for name in ("actor", "target_actor", "critic", "target_critic"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10),
                to_numpy(getattr(state, name)["params"]),
                ours[name],
            )


# --- HL-Gauss ---


def test_hl_gauss_targets_sum_to_one_and_recover_their_mean():
    edges = np.asarray(rebrac.support(SMALL))
    width = edges[1] - edges[0]
    assert edges[-1] - edges[0] == pytest.approx(20 * (1 + SMALL.v_expand))  # widened in all by v_expand
    values = np.concatenate([np.linspace(edges[0] - 30, edges[-1] + 30, 1001), edges])
    p = rebrac.hl_gauss(SMALL, values)
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)
    means = rebrac.critic_values(SMALL, jnp.log(p + 1e-30))
    inside = (values > edges[0] + 4 * width) & (values < edges[-1] - 4 * width)
    np.testing.assert_allclose(means[inside], values[inside], atol=2e-3 * width)
    # At and beyond the ends half of the Gaussian is cut off, which moves its mean inwards by less than a bin
    clipped = np.clip(values, edges[0], edges[-1])
    assert np.abs(means - clipped).max() < width
    assert np.array_equal(p[0], rebrac.hl_gauss(SMALL, edges[0])) and np.isfinite(p).all()


def test_hl_gauss_shrinks_the_support_with_a_negative_v_expand():
    edges = np.asarray(rebrac.support(replace(SMALL, v_expand=-0.05)))
    np.testing.assert_allclose([edges[0], edges[-1], len(edges)], [-9.5, 9.5, SMALL.n_classes + 1])


# --- The loop ---


def run(config, epochs=2):
    static, traced = rebrac.split_config(config)
    data = jax.device_put(small_data())
    states = init_states(rebrac, config, data)
    for _ in range(epochs):
        states, _ = rebrac.epoch(static, traced, states, data)
    return jax.device_get(states._replace(key=jax.random.key_data(states.key)))


def same_bits(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first = run(SMALL)
    assert same_bits(first, run(SMALL))
    other = run(replace(SMALL, seed=1))
    assert not any(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first.actor), jax.tree.leaves(other.actor)))


def test_seeds_trained_together_are_those_trained_alone():
    config = replace(SMALL, **REGULARISED)
    together = run(replace(config, num_seeds=3))
    for seed in range(3):
        alone = run(replace(config, seed=seed))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a[seed], b[0], rtol=1e-3, atol=1e-5)


def test_the_actor_and_the_targets_move_every_second_critic_update():
    batch = jax.tree.map(jnp.asarray, rebrac.transitions(small_data(), np.arange(8)))
    before = small_state(SMALL)
    after, info = update_critics(SMALL, before, batch)
    for name in ("actor", "target_actor", "target_critic", "actor_opt"):
        assert same_bits(getattr(after, name), getattr(before, name))
    assert not same_bits(after.critic, before.critic) and "actor_loss" not in info
    end = run(SMALL, epochs=3)  # of 4 critic updates each
    assert end.critic_opt[0].count == 12 and end.actor_opt[0].count == 6


def test_a_terminal_step_ignores_what_follows():
    batch = jax.tree.map(jnp.asarray, rebrac.transitions(small_data(), np.arange(8)))
    batch = batch._replace(terminals=jnp.ones(8))
    target = rebrac.critic_target(SMALL, small_state(SMALL), batch, jax.random.key(0))
    np.testing.assert_array_equal(target, batch.rewards)


def test_behaviour_cloning_has_no_q_term():
    config = replace(SMALL, actor_q_coef=0.0, actor_bc_coef=1.0)
    batch = jax.tree.map(jnp.asarray, rebrac.transitions(small_data(), np.arange(8)))
    state = small_state(config)
    loss, (_, info) = rebrac.actor_loss(
        state.actor["params"], config, state, batch, list(jax.random.split(jax.random.key(0), 3))
    )
    actions = rebrac.infer(rebrac.Actor(config, ACTIONS), state.actor, batch.observations)
    np.testing.assert_allclose(loss, ((actions - batch.actions) ** 2).sum(-1).mean(), rtol=1e-6)


def test_parameters_start_as_the_paper_says():
    config = replace(SMALL, hidden_dim=64)
    state = rebrac.init_state(config, small_data(), 0)
    for params, last in ((state.actor["params"], 1e-3), (state.critic["params"], 3e-3)):
        for name, layer in params.items():
            if name.startswith("Dense"):
                for leaf in layer.values():
                    assert 0.5 * last < np.abs(leaf).max() <= last and leaf.min() < 0 < leaf.max()
                continue
            for dense in (layer[key] for key in layer if key.startswith("Dense")):
                bound = 1 / np.sqrt(dense["kernel"].shape[0])
                assert 0.9 * bound < np.abs(dense["kernel"]).max() <= bound
                np.testing.assert_array_equal(dense["bias"], np.float32(0.1))
    assert same_bits(state.actor, state.target_actor) and same_bits(state.critic, state.target_critic)


# --- The paper's hyperparameters ---


def paper_rows(file):
    with open(os.path.join(ROOT, "tests", "paper", file)) as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize("critic_loss", ["hl_gauss", "mse"])
def test_each_dataset_gets_the_papers_values(critic_loss):
    rows = paper_rows(f"rebrac_{critic_loss}.csv")
    assert [row["dataset"] for row in rows] == sorted(rebrac.TUNED)
    for row in rows:
        config = rebrac.tuned(rebrac.Config(dataset_name=row.pop("dataset"), critic_loss=critic_loss))
        for key, text in row.items():
            value = getattr(config, key)
            assert value is None if text == "" else str(value).lower() == text or value == float(text), (key, value)


def test_the_best_regularisers_of_each_dataset_are_the_papers():
    for name, file in (("best-L2", "rebrac_hl_gauss_best_l2.csv"), ("best", "rebrac_hl_gauss_best_combination.csv")):
        rows = paper_rows(file)
        assert [row["dataset"] for row in rows] == sorted(rebrac.TUNED)
        for row in rows:
            plain = rebrac.Config(dataset_name=row.pop("dataset"))
            flags = {key: text == "true" if text.isalpha() else float(text) for key, text in row.items()}
            assert rebrac.tuned(replace(plain, regularisers=name)) == rebrac.tuned(replace(plain, **flags))


def test_what_the_user_sets_wins():
    chosen = dict(actor_bc_coef=0.0, batch_size=7, normalize_reward=False, v_min=-1.0, eval_episodes=3, gamma=0.5)
    config = rebrac.tuned(rebrac.Config(dataset_name="antmaze-umaze-v2", **chosen))
    assert {key: getattr(config, key) for key in chosen} == chosen
    assert (config.v_max, config.eval_every, config.critic_bc_coef) == (100.0, 50_000, 0.001)
