"""Each regulariser does what its formula says, and nothing at all when it's off."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import init_states
from test_rebrac import ACTIONS, SMALL, same_bits, small_data, small_state, update, update_critics

import iql
import rebrac

ONE = replace(SMALL, actor_layers=1, hidden_dim=64)
BATCH = jax.tree.map(jnp.asarray, rebrac.transitions(small_data(), np.arange(32)))
KEYS = list(jax.random.split(jax.random.key(7), 3))
ON = dict(
    actor_dropout=0.3, actor_wd=0.1, actor_ln=True, actor_fn=True, actor_gn=True, actor_bn=True, actor_sn=True,
    actor_input_noise=0.1, actor_bc_noise=0.1, actor_grad_noise=0.1, actor_lr_decay=True,
)  # fmt: skip
CRITIC_ON = {f"critic_{key}": True for key in ("fn", "gn", "bn", "sn", "lr_decay")} | dict(
    critic_dropout=0.3, critic_wd=0.1, critic_grad_noise=0.1
)


def hidden(config, train=False, key=KEYS[0], network="actor", shake=True):
    """Output of the hidden layers on 32 states, that of the plain layer before any regulariser, and the variables."""
    module, x = rebrac.Hidden(config, network), BATCH.observations
    variables = rebrac.init_network(module, jax.random.key(0), x)
    if shake:
        variables = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), variables)
    dense = variables["params"]["Dense_0"]
    plain = np.maximum(np.asarray(x) @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"]), 0)
    if train:
        output, variables = rebrac.train_forward(module, variables, key, x)
    else:
        output = rebrac.infer(module, variables, x)
    return np.asarray(output), plain, jax.tree.map(np.asarray, variables)


def normalised(x, axis):
    return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-6)


@pytest.mark.parametrize("train", [False, True])
def test_layer_norm_and_feature_norm(train):
    output, plain, variables = hidden(replace(ONE, actor_ln=True), train)
    norm = variables["params"]["LayerNorm_0"]
    np.testing.assert_allclose(output, normalised(plain, -1) * norm["scale"] + norm["bias"], atol=1e-4)
    output, plain, variables = hidden(replace(ONE, actor_fn=True), train)
    np.testing.assert_allclose(output, normalised(plain, -1), atol=1e-4)
    assert "LayerNorm_0" not in variables["params"]


def test_group_norm_has_32_groups():
    output, plain, variables = hidden(replace(ONE, hidden_dim=128, actor_gn=True))
    norm, groups = variables["params"]["GroupNorm_0"], plain.reshape(32, 32, 4)
    expected = normalised(groups, -1).reshape(plain.shape) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(output, expected, atol=5e-3, rtol=1e-3)


def test_batch_norm_uses_the_batch_in_training_and_running_statistics_elsewhere():
    config = replace(ONE, actor_bn=True)
    output, plain, after = hidden(config, train=True, shake=False)
    np.testing.assert_allclose(output, (plain - plain.mean(0)) / np.sqrt(plain.var(0) + 1e-5), atol=1e-4)
    running = after["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(running["mean"], 0.01 * plain.mean(0), atol=1e-5)
    np.testing.assert_allclose(running["var"], 0.99 + 0.01 * plain.var(0), atol=1e-5)
    output = rebrac.infer(rebrac.Hidden(config, "actor"), after, BATCH.observations)
    np.testing.assert_allclose(output, (plain - running["mean"]) / np.sqrt(running["var"] + 1e-5), atol=1e-4)


def test_batch_norms_running_statistics_are_kept_by_the_actor_and_averaged_by_the_target():
    config = replace(SMALL, actor_bn=True)
    before = small_state(config)
    after, _ = update(config, before, jax.tree.map(lambda x: x[None], BATCH))
    new, old = after.actor["batch_stats"], before.target_actor["batch_stats"]
    assert not same_bits(new, before.actor["batch_stats"])
    expected = jax.tree.map(lambda a, b: config.tau * a + (1 - config.tau) * b, new, old)
    jax.tree.map(np.testing.assert_allclose, after.target_actor["batch_stats"], expected)
    unchanged, _ = update_critics(config, before, BATCH)
    assert same_bits(unchanged.actor, before.actor)


def test_spectral_norm_divides_the_last_hidden_dense_by_its_largest_singular_value():
    config, x = replace(SMALL, actor_layers=2, actor_sn=True), BATCH.observations
    module = rebrac.Hidden(config, "actor")
    variables = rebrac.init_network(module, jax.random.key(0), x)
    for _ in range(100):  # each forward pass in training is one step of the power iteration
        _, variables = rebrac.train_forward(module, variables, KEYS[0], x)
    first, last = (variables["params"][name] for name in ("Dense_0", "Dense_1"))
    h = jax.nn.relu(x @ first["kernel"] + first["bias"])
    expected = jax.nn.relu(h @ (last["kernel"] / np.linalg.norm(last["kernel"], 2)) + last["bias"])
    np.testing.assert_allclose(rebrac.infer(module, variables, x), expected, atol=1e-5)


def test_dropout_drops_and_scales_in_training_only():
    config = replace(ONE, actor_dropout=0.3)
    output, plain, _ = hidden(config, train=True)
    alive = plain > 0
    kept = output[alive] / plain[alive]
    assert set(np.round(np.unique(kept), 4)) == {0, np.float32(1.4286)}
    assert abs((kept == 0).mean() - 0.3) < 0.05
    assert not np.array_equal(output, hidden(config, train=True, key=KEYS[1])[0])
    np.testing.assert_allclose(hidden(config, train=False)[0], plain, atol=1e-5)


@pytest.mark.parametrize("flag", ["actor_dropout", "critic_dropout"])
def test_dropout_is_off_in_targets_and_in_evaluation(flag):
    state, dropped = small_state(SMALL), replace(SMALL, **{flag: 0.9})
    for function in (
        lambda config: rebrac.critic_target(config, state, BATCH, KEYS[0]),
        lambda config: rebrac.act(config, state.actor, small_data(), BATCH.observations),
    ):
        np.testing.assert_array_equal(function(dropped), function(SMALL))


def decayed(steps, **flags):
    """Parameters before, and after `steps` optimiser steps, with those of the same run without weight decay beside."""
    params = small_state(SMALL).actor["params"]
    results = []
    for config in (replace(SMALL, **flags), SMALL):
        optimizer, variables = rebrac.make_optimizer(config, "actor", 20), {"params": params}
        opt_state = optimizer.init(params)
        optimize = jax.jit(lambda *state, c=config, o=optimizer: rebrac.optimize(c, "actor", o, *state, KEYS[0]))
        for step in range(steps):
            grads = jax.tree.map(lambda p, step=step: jnp.cos(p + step), params)
            variables, opt_state = optimize(variables, opt_state, grads)
        results.append(variables["params"])
    return params, *results


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_weight_decay_is_decoupled_and_elastic(ratio):
    before, with_decay, without = decayed(1, actor_wd=0.1, actor_l1_ratio=ratio)
    for theta, ours, plain in zip(*map(jax.tree.leaves, (before, with_decay, without))):
        shrunk = SMALL.actor_learning_rate * 0.1 * ((1 - ratio) * theta + ratio * np.sign(theta))
        np.testing.assert_allclose(ours, plain - shrunk, atol=1e-7)  # on all parameters, as in the paper


def test_weight_decay_on_kernels_only_spares_the_rest():
    _, with_decay, without = decayed(1, actor_wd=0.1, actor_wd_kernels_only=True)
    for (path, ours), plain in zip(jax.tree.leaves_with_path(with_decay), jax.tree.leaves(without)):
        assert np.array_equal(ours, plain) == (path[-1].key != "kernel")


def test_learning_rates_decay_by_a_cosine_over_each_networks_own_steps():
    optimizers = rebrac.optimizers(replace(SMALL, actor_lr_decay=True, critic_lr_decay=True))
    for optimizer, steps in zip(optimizers, (20, 40)):  # a run of 40 updates of the critic and 20 of the actor
        opt_state = optimizer.init(jnp.ones(1))
        for step in range(steps + 2):  # Adam's direction is 1 as long as the gradient is
            update, opt_state = optimizer.update(jnp.ones(1), opt_state, jnp.ones(1))
            expected = -SMALL.actor_learning_rate * (1 + np.cos(np.pi * min(step / steps, 1))) / 2
            np.testing.assert_allclose(update, expected, atol=1e-8)


@pytest.mark.parametrize("t", [0, 9])
def test_gradient_noise_decays_with_the_actors_steps(t):
    config = replace(SMALL, actor_grad_noise=0.3)
    params = {"kernel": jnp.zeros((100, 100)), "bias": jnp.zeros(10_000)}
    optimizer = rebrac.make_optimizer(config, "actor", 20)
    opt_state = optimizer.init(params)
    opt_state = (opt_state[0]._replace(count=jnp.int32(t)), *opt_state[1:])
    grads = jax.tree.map(lambda p: p + 2.0, params)
    _, opt_state = rebrac.optimize(config, "actor", optimizer, {"params": params}, opt_state, grads, KEYS[0])
    for mu in jax.tree.leaves(opt_state[0].mu):  # Adam's first moment is a tenth of the gradient
        assert 10 * mu.mean() == pytest.approx(2, abs=0.02)
        assert 10 * mu.std() == pytest.approx(0.3 / (1 + t) ** 0.55, rel=0.03)
    assert not np.array_equal(opt_state[0].mu["kernel"].ravel(), opt_state[0].mu["bias"])


def loss_by_hand(config, state, seen, cloned):
    actions = rebrac.infer(rebrac.Actor(config, ACTIONS), state.actor, seen)
    outputs = rebrac.infer(rebrac.Critics(config), state.critic, BATCH.observations, actions)
    values = rebrac.critic_values(config, outputs).min(0)
    return config.actor_bc_coef * ((actions - cloned) ** 2).sum(-1).mean() - values.mean() / jnp.abs(values).mean()


def test_input_noise_reaches_the_actor_only_and_objective_noise_the_cloned_action():
    state = small_state(SMALL)
    loss = lambda config: rebrac.actor_loss(state.actor["params"], config, state, BATCH, KEYS)[0]
    np.testing.assert_allclose(loss(SMALL), loss_by_hand(SMALL, state, BATCH.observations, BATCH.actions), rtol=1e-5)
    seen = BATCH.observations + 0.3 * jax.random.normal(KEYS[1], BATCH.observations.shape)
    noisy = replace(SMALL, actor_input_noise=0.3)
    np.testing.assert_allclose(loss(noisy), loss_by_hand(SMALL, state, seen, BATCH.actions), rtol=1e-5)
    cloned = BATCH.actions - 0.3 * jax.random.normal(KEYS[2], BATCH.actions.shape)
    noisy = replace(SMALL, actor_bc_noise=0.3, actor_bc_coef=1.0)
    by_hand = loss_by_hand(replace(SMALL, actor_bc_coef=1.0), state, BATCH.observations, cloned)
    np.testing.assert_allclose(loss(noisy), by_hand, rtol=1e-5)


def test_critics_stay_as_the_algorithm_has_them_unless_asked():
    """No flag of the actor's matters for the first critic update, but for those that change the target's network."""
    norms = ("actor_ln", "actor_fn", "actor_gn", "actor_bn", "actor_sn")
    config = replace(SMALL, **{flag: value for flag, value in ON.items() if flag not in norms})
    plain, _ = update_critics(SMALL, small_state(SMALL), BATCH)
    regularised, _ = update_critics(config, small_state(SMALL), BATCH)
    assert same_bits(plain.critic, regularised.critic)


# --- Off is off, in both scripts ---

IQL = iql.tuned(
    iql.Config(hidden_dim=16, batch_size=8, log_every=4, num_updates=40, actor_lr_decay=False, actor_dropout=0.0)
)
SCRIPTS = {"rebrac": (rebrac, SMALL), "iql": (iql, IQL)}
both = pytest.mark.parametrize("script", SCRIPTS)


def program(script, **flags):
    module, config = SCRIPTS[script]
    config, data = replace(config, **flags), small_data()
    state = jax.eval_shape(lambda: init_states(module, config, data))
    static, traced = module.split_config(config)
    return module.epoch.lower(static, traced, state, data).as_text()


@pytest.mark.parametrize("train", [False, True])
def test_an_actor_without_regularisers_is_the_plain_network(train):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.relu(nn.Dense(16)(x))
            return nn.tanh(nn.Dense(ACTIONS)(x))

    params, network = small_state(SMALL).actor["params"], rebrac.Actor(SMALL, ACTIONS)

    def ours(params, x):
        variables = {"params": params, "batch_stats": {}}
        return rebrac.train_forward(network, variables, KEYS[0], x)[0] if train else rebrac.infer(network, variables, x)

    def plain(params, x):
        return Plain().apply({"params": {**params["Hidden_0"], "Dense_2": params["Dense_0"]}}, x)

    compiled = [
        jax.jit(jax.grad(lambda p, x, f=f: f(p, x).sum())).lower(params, BATCH.observations).compile().cost_analysis()
        for f in (ours, plain)
    ]
    assert compiled[0] == compiled[1]
    np.testing.assert_array_equal(ours(params, BATCH.observations), plain(params, BATCH.observations))


@both
def test_off_leaves_no_trace_in_the_program(monkeypatch, script):
    """With everything off, none of the regularisers' building blocks is even reached."""
    text = program(script)

    def unreachable(*arguments, **options):
        raise AssertionError("a regulariser that is off was reached")

    for owner, name in [
        (jax.random, "bernoulli"), (optax.tree, "random_like"), (optax, "stateless"), (optax, "cosine_decay_schedule"),
        (nn, "GroupNorm"), (nn, "BatchNorm"), (nn, "SpectralNorm"), (jnp, "sign"),
    ]:  # fmt: skip
        monkeypatch.setattr(owner, name, unreachable)
    normals = []
    monkeypatch.setattr(jax.random, "normal", lambda *a, f=jax.random.normal: [normals.append(a), f(*a)][1])
    off = {key: type(value)(0) for key, value in {**ON, **CRITIC_ON}.items()}
    jax.clear_caches()  # or a program that has been traced before is not traced again
    assert program(script, **off) == text
    assert len(normals) == (1 if script == "rebrac" else 0)  # the noise on the target's actions
    jax.clear_caches()
    with pytest.raises(AssertionError, match="was reached"):
        program(script, actor_dropout=0.1)


@both
@pytest.mark.parametrize("flag", [*ON, *CRITIC_ON])
def test_on_changes_the_program(flag, script):
    assert program(script, hidden_dim=64, **{flag: {**ON, **CRITIC_ON}[flag]}) != program(script, hidden_dim=64)


@both
def test_strengths_share_a_compiled_program(script):
    module, config = SCRIPTS[script]
    strong, weak = dict(actor_dropout=0.5, actor_wd=0.1, gamma=0.9), dict(actor_dropout=0.1, actor_wd=1e-5)
    assert program(script, **strong) == program(script, **weak) != program(script)
    static, others = (module.split_config(replace(config, **flags))[0] for flags in (strong, weak))
    assert static == others != module.split_config(config)[0]


@both
def test_all_regularisers_work_together(script):
    module, config = SCRIPTS[script]
    config = replace(config, hidden_dim=64, critic_layers=1, **ON, **CRITIC_ON, actor_l1_ratio=0.5, critic_l1_ratio=1.0)
    data = jax.device_put(small_data())
    states = init_states(module, config, data)
    static, traced = module.split_config(config)
    for _ in range(3):
        states, infos = module.epoch(static, traced, states, data)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((states._replace(key=None), infos)))
