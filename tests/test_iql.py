"""IQL: updates against a NumPy re-derivation, what its parts must hold to, and what it shares with rebrac.py."""

import csv
import os
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from conftest import ROOT, init_states
from scipy import stats
from test_rebrac import ACTIONS, REGULARISED, mlp, mlp_back, numpy_adam, same_bits, small_data
from test_regularisers import BATCH, IQL, KEYS, ON

import iql
import rebrac

update = jax.jit(iql.update, static_argnums=0)


def small_state(config, seed=0, spread=0.3):
    """A state whose parameters, the target's included, are all different and far from their initial values."""
    state = jax.tree.map(lambda x: x[0], init_states(iql, replace(config, seed=seed), small_data()))
    keys = iter(jax.random.split(jax.random.key(seed + 100), 1000))
    shaken = {}
    for name in ("actor", "critic", "target_critic", "value"):
        params = jax.tree.map(
            lambda x: x + spread * jax.random.normal(next(keys), x.shape), getattr(state, name)["params"]
        )
        shaken[name] = {**getattr(state, name), "params": params}
    return state._replace(**shaken)


# --- NumPy's IQL: every gradient by hand ---


def head(params, k, inputs):
    """A network with one output, (B,), and what `head_back` needs."""
    features, cache = mlp(params[f"Hidden_{k}"], inputs, False)
    return (features @ params[f"Dense_{k}"]["kernel"] + params[f"Dense_{k}"]["bias"])[:, 0], (features, cache)


def head_back(params, k, cache, grad):
    features, cache = cache
    grad = grad[:, None]
    hidden, _ = mlp_back(params[f"Hidden_{k}"], cache, grad @ params[f"Dense_{k}"]["kernel"].T)
    return {f"Hidden_{k}": hidden, f"Dense_{k}": {"kernel": features.T @ grad, "bias": grad.sum(0)}}


def numpy_update(config, s, batch):
    """The paper's formulas; `s` maps actor, critic, target_critic, value and their optimisers' states to NumPy."""
    s, size = dict(s), len(batch.rewards)
    pairs = np.concatenate([batch.observations, batch.actions], -1)
    target = np.minimum(*[head(s["target_critic"], k, pairs)[0] for k in range(2)])
    values, cache = head(s["value"], 0, batch.observations)
    u = target - values
    weights = np.abs(config.expectile - (u < 0))
    info = {"value_loss": (weights * u**2).mean()}
    grads = head_back(s["value"], 0, cache, -2 * weights * u / size)
    s["value_opt"], s["value"] = numpy_adam(s["value_opt"], s["value"], grads, config.critic_learning_rate)

    advantage = target - head(s["value"], 0, batch.observations)[0]
    w = np.minimum(np.exp(config.temperature * advantage), 100)
    params = s["actor"]
    features, cache = mlp(params["Hidden_0"], batch.observations, False)
    means = np.tanh(features @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    raw = features @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    log_stds = np.clip(raw, config.log_std_min, config.log_std_max)
    z = (batch.actions - means) / np.exp(log_stds)
    log_probs = stats.norm.logpdf(batch.actions, means, np.exp(log_stds)).sum(-1)
    info["actor_loss"] = -(w * log_probs).mean()
    by_mean = -(w[:, None] * z / np.exp(log_stds)) / size * (1 - means**2)
    by_std = -(w[:, None] * (z**2 - 1)) / size * ((raw > config.log_std_min) & (raw < config.log_std_max))
    into = by_mean @ params["Dense_0"]["kernel"].T + by_std @ params["Dense_1"]["kernel"].T
    grads = {
        "Hidden_0": mlp_back(params["Hidden_0"], cache, into)[0],
        "Dense_0": {"kernel": features.T @ by_mean, "bias": by_mean.sum(0)},
        "Dense_1": {"kernel": features.T @ by_std, "bias": by_std.sum(0)},
    }
    s["actor_opt"], s["actor"] = numpy_adam(s["actor_opt"], params, grads, config.actor_learning_rate)

    next_values = head(s["value"], 0, batch.next_observations)[0]
    y = batch.rewards + config.reward_shift + config.gamma * (1 - batch.terminals) * next_values
    grads, losses = {}, []
    for k in range(2):
        q, cache = head(s["critic"], k, pairs)
        losses.append(((q - y) ** 2).mean())
        grads |= head_back(s["critic"], k, cache, 2 * (q - y) / size)
    info["critic_loss"] = np.mean(losses)
    s["critic_opt"], s["critic"] = numpy_adam(s["critic_opt"], s["critic"], grads, config.critic_learning_rate)
    s["target_critic"] = jax.tree.map(
        lambda new, old: config.tau * new + (1 - config.tau) * old, s["critic"], s["target_critic"]
    )
    return s, info


def test_updates_are_those_of_a_numpy_rederivation():
    config = replace(IQL, expectile=0.8, temperature=3.0, reward_shift=-1.0, log_std_min=-0.5, log_std_max=0.5)
    with jax.enable_x64(True):  # so that float32's rounding hides no difference
        state = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, small_state(config, spread=0.5)
        )
        names = ("actor", "critic", "target_critic", "value")
        ours = {name: jax.tree.map(np.asarray, getattr(state, name)["params"]) for name in names}
        for name in ("actor", "critic", "value"):
            zeros = jax.tree.map(np.zeros_like, ours[name])
            ours[f"{name}_opt"] = (zeros, zeros, 0)
        data = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in small_data().items()}
        for i in range(4):
            batch = iql.transitions(data, np.arange(8 * i, 8 * i + 8))
            ours, expected = numpy_update(config, ours, batch)
            state, info = update(config, state, jax.tree.map(jnp.asarray, batch))
            for key, value in expected.items():
                np.testing.assert_allclose(info[key], value, rtol=1e-9)
        for name in names:
            for a, b in zip(jax.tree.leaves(getattr(state, name)["params"]), jax.tree.leaves(ours[name])):
                np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10)


# --- Its parts ---


def test_v_is_the_expectile_of_the_critics_values():
    """With V a constant, the loss is smallest at the expectile, whose definition is E[|tau - 1(q < v)| (q - v)] = 0."""
    config, target = replace(IQL, expectile=0.9), jax.random.normal(jax.random.key(0), (32,))
    params = jax.tree.map(jnp.zeros_like, small_state(config).value["params"])

    @jax.jit
    @jax.grad
    def slope(v):
        constant = {**params, "Dense_0": {**params["Dense_0"], "bias": v[None]}}
        return iql.value_loss(constant, config, small_state(config), BATCH, target, KEYS[0])[0]

    v = jnp.float32(0)
    for _ in range(200):
        v -= 0.5 * slope(v)
    weights = np.abs(0.9 - (target < v))
    assert abs((weights * (target - v)).mean()) < 1e-5 and v > target.mean()


def test_the_policys_bounds():
    config = replace(IQL, log_std_min=-1.0, log_std_max=0.5)
    state = small_state(config, spread=3.0)
    means, log_stds = iql.infer(iql.Actor(config, ACTIONS), state.actor, BATCH.observations)
    assert np.abs(means).max() <= 1 and log_stds.min() == -1.0 and log_stds.max() == 0.5
    np.testing.assert_array_equal(iql.act(config, state.actor, small_data(), BATCH.observations), means)


def test_the_originals_std_does_not_depend_on_the_state():
    config = replace(IQL, state_dependent_std=False, log_std_min=-5.0)
    state = small_state(config)
    _, log_stds = iql.infer(iql.Actor(config, ACTIONS), state.actor, BATCH.observations)
    assert log_stds.shape == BATCH.actions.shape and len(np.unique(log_stds, axis=0)) == 1
    after, _ = update(config, state, BATCH)
    assert not np.array_equal(after.actor["params"]["log_stds"], state.actor["params"]["log_stds"])


def test_weights_are_exponentiated_advantages_up_to_100():
    state = small_state(IQL, spread=1.0)
    target = iql.infer(iql.Critics(IQL), state.target_critic, BATCH.observations, BATCH.actions).min(0)
    advantage = np.asarray(target - iql.infer(iql.Value(IQL), state.value, BATCH.observations))
    for temperature in (0.5, 10.0):
        config = replace(IQL, temperature=temperature)
        _, (_, info) = iql.actor_loss(state.actor["params"], config, state, BATCH, target, KEYS)
        expected = np.minimum(np.exp(temperature * advantage.astype(np.float64)), 100)
        np.testing.assert_allclose(info["weight"], expected.mean(), rtol=1e-4)
    assert expected.max() == 100


def loss_by_hand(config, state, seen, exponents):
    means, log_stds = iql.infer(iql.Actor(config, ACTIONS), state.actor, seen)
    log_probs = stats.norm.logpdf(BATCH.actions, means, np.exp(log_stds)).sum(-1)
    return -(np.minimum(np.exp(exponents), 100) * log_probs).mean()


def test_input_noise_reaches_the_actor_only_and_objective_noise_the_weights():
    state = small_state(IQL)
    target = iql.infer(iql.Critics(IQL), state.target_critic, BATCH.observations, BATCH.actions).min(0)
    clean = IQL.temperature * (target - iql.infer(iql.Value(IQL), state.value, BATCH.observations))
    loss = lambda config: iql.actor_loss(state.actor["params"], config, state, BATCH, target, KEYS)[0]
    np.testing.assert_allclose(loss(IQL), loss_by_hand(IQL, state, BATCH.observations, clean), rtol=1e-5)
    seen = BATCH.observations + 0.3 * jax.random.normal(KEYS[1], BATCH.observations.shape)
    np.testing.assert_allclose(
        loss(replace(IQL, actor_input_noise=0.3)), loss_by_hand(IQL, state, seen, clean), rtol=1e-5
    )
    noisy = clean + 0.3 * jax.random.normal(KEYS[2], clean.shape)  # one draw a sample
    np.testing.assert_allclose(
        loss(replace(IQL, actor_bc_noise=0.3)), loss_by_hand(IQL, state, BATCH.observations, noisy), rtol=1e-5
    )


def test_the_actors_flags_leave_v_and_q_alone():
    plain, _ = update(IQL, small_state(IQL), BATCH)
    norms = ("actor_ln", "actor_fn", "actor_gn", "actor_bn", "actor_sn")
    config = replace(IQL, **{flag: value for flag, value in ON.items() if flag not in norms})
    regularised, _ = update(config, small_state(config), BATCH)
    assert same_bits((plain.critic, plain.value), (regularised.critic, regularised.value))
    assert not same_bits(plain.actor, regularised.actor)
    np.testing.assert_array_equal(
        iql.act(config, plain.actor, small_data(), BATCH.observations),
        iql.act(IQL, plain.actor, small_data(), BATCH.observations),
    )


def run(config, epochs=2):
    data = jax.device_put(small_data())
    static, traced = iql.split_config(config)
    states = init_states(iql, config, data)
    for _ in range(epochs):
        states, _ = iql.epoch(static, traced, states, data)
    return jax.device_get(states._replace(key=jax.random.key_data(states.key)))


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first = run(IQL)
    assert same_bits(first, run(IQL)) and not same_bits(first.actor, run(replace(IQL, seed=1)).actor)
    assert first.actor_opt[0].count == first.critic_opt[0].count == first.value_opt[0].count == 8


def test_seeds_trained_together_are_those_trained_alone():
    config = replace(IQL, **REGULARISED)
    together = run(replace(config, num_seeds=2))
    for seed in range(2):
        alone = run(replace(config, seed=seed))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a[seed], b[0], rtol=1e-3, atol=1e-5)


def test_the_actors_learning_rate_decays_over_the_run():
    assert iql.Config().actor_lr_decay
    config = replace(IQL, actor_lr_decay=True, num_updates=4)
    states = run(config, epochs=1)
    again = jax.tree.map(lambda x: x[0], states)._replace(key=jax.random.key(0))
    after, _ = update(config, again, BATCH)
    assert same_bits(after.actor["params"], again.actor["params"])  # after the last step the rate is 0
    assert not same_bits(after.critic["params"], again.critic["params"])


def test_parameters_start_orthogonal():
    state = iql.init_state(replace(IQL, hidden_dim=32), small_data(), 0)
    for params in (state.actor["params"], state.critic["params"], state.value["params"]):
        kernel = np.asarray(params["Hidden_0"]["Dense_1"]["kernel"])
        np.testing.assert_allclose(kernel.T @ kernel, 2 * np.eye(32), atol=1e-5)


# --- The paper's hyperparameters, and what the two scripts share ---


def test_each_dataset_gets_the_papers_values():
    with open(os.path.join(ROOT, "tests", "paper", "iql.csv")) as lines:
        rows = list(csv.DictReader(lines))
    assert [row["dataset"] for row in rows] == sorted(iql.TUNED) and list(iql.TUNED) == list(rebrac.TUNED)
    for row in rows:
        config = iql.tuned(iql.Config(dataset_name=row.pop("dataset")))
        for key, text in row.items():
            value = getattr(config, key)
            assert value == 0 if text == "" else str(value).lower() == text or value == float(text), (key, value)
        assert config.normalize_states and (config.batch_size, config.actor_learning_rate) == (256, 3e-4)


def test_the_best_regularisers_of_each_dataset_are_the_papers():
    for name, file, rho in (("best-L1", "iql_best_l1.csv", 1.0), ("best", "iql_best_combination.csv", 0.5)):
        with open(os.path.join(ROOT, "tests", "paper", file)) as lines:
            rows = list(csv.DictReader(lines))
        assert [row["dataset"] for row in rows] == sorted(iql.TUNED)
        for row in rows:
            plain = iql.Config(dataset_name=row.pop("dataset"))
            flags = {key: text == "true" if text.isalpha() else float(text) for key, text in row.items()}
            expected = iql.tuned(replace(plain, actor_l1_ratio=rho, **flags))
            assert iql.tuned(replace(plain, regularisers=name)) == expected


def sections(script):
    with open(os.path.join(ROOT, script)) as file:
        parts = re.split(r"^# --- (.*) ---$", file.read(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def test_what_both_scripts_share_is_the_same_to_the_letter():
    ours, theirs = sections("iql.py"), sections("rebrac.py")
    assert [name for name in ours if name in theirs] == [name for name in theirs if name in ours]
    theirs["Training"] = theirs["Training"].replace("    config = with_value_range(config, data)\n", "")
    shared = ["Data", "Networks: the regularised hidden layers", "Optimiser", "Seeds and compilation", "Evaluation"]
    for name in (*shared, "Training"):
        assert ours[name] == theirs[name], name


def test_both_scripts_have_the_same_flags_and_stay_short():
    flags = lambda module: {
        name for name in vars(module.Config()) if name.startswith(("actor_", "critic_")) and "coef" not in name
    }
    assert flags(rebrac) - flags(iql) == {"critic_loss"} and not flags(iql) - flags(rebrac)
    lines = [len(open(os.path.join(ROOT, script)).readlines()) for script in ("rebrac.py", "iql.py")]
    assert sum(lines) < 1400
