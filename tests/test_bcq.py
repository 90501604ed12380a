"""BCQ: updates against a NumPy re-derivation, and what its parts must hold to."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import (
    ACTION_DIM,
    STATE_DIM,
    assert_close,
    init_states,
    of_seed,
    run_epochs,
    same_bits,
    small_batch,
    small_config,
    small_data,
    small_state,
    widen,
)
from runs_helpers import fails

import bcq
import rebrac
from harness.config import check

SMALL = small_config(bcq)
BATCH = small_batch()
update = jax.jit(bcq.update, static_argnums=0)

each_choice = pytest.mark.parametrize("regularise", ["decoder", "perturbation", "both"])


# --- One update ---


def draw_noises(config, state, batch):
    """Return the standard noise of an update, as the state's key gives it."""
    key, *_, vae_key = jax.random.split(state.key, 6)
    key, target_key, _, _ = jax.random.split(key, 4)
    *_, actor_key = jax.random.split(key, 6)
    size, action_dim = batch.actions.shape
    shapes = {
        "vae": (vae_key, (size, 2 * action_dim)),
        "actor": (actor_key, (size, 2 * action_dim)),
        "target": (target_key, (size, config.n_candidates, 2 * action_dim)),
    }
    return {name: np.asarray(jax.random.normal(*given)) for name, given in shapes.items()}


@pytest.mark.parametrize(
    "regularise, fields",
    [
        ("decoder", {}),
        ("perturbation", {}),
        ("both", {}),
        ("both", dict(actor_sam=0.3, actor_rms=True)),
    ],
)
def test_updates_are_those_of_a_numpy_rederivation(regularise, fields):
    """Of each choice. Without regularisers it changes the layers' names and the first weights."""
    config = replace(
        SMALL,
        regularise=regularise,
        kl_coef=0.7,
        log_std_min=-0.5,
        log_std_max=0.5,
        latent_clip=0.4,
        phi=0.3,
        min_weight=0.6,
        n_candidates=3,
        actor_learning_rate=2e-3,
        **fields,
    )
    with jax.enable_x64(True):  # so that float32's rounding hides no difference
        state = widen(small_state(bcq, config, spread=0.5))
        data = widen(small_data())
        expected = reference.bcq_state(state)
        for i in range(4):
            batch = bcq.transitions(data, np.arange(8 * i, 8 * i + 8))
            noises = draw_noises(config, state, batch)
            expected, losses = reference.bcq_update(config, expected, batch, noises)
            state, info = update(config, state, batch)
            for key, value in losses.items():
                np.testing.assert_allclose(info[key], value, rtol=1e-9, err_msg=key)
        for name in ("encoder", "critic", "target_critic"):
            assert_close(getattr(state, name)["params"], expected[name])
        for name in ("decoder", "perturbation"):
            assert_close(bcq.own_params(state.actor, name), expected[name])
        assert_close(state.target_actor["params"], expected["target_perturbation"])
        assert same_bits(state.actor["critic"], state.critic)


def test_a_terminal_step_ignores_what_follows():
    batch = BATCH._replace(terminals=jnp.ones(32))
    target = bcq.critic_target(SMALL, small_state(bcq, SMALL), batch, jax.random.key(0))
    np.testing.assert_array_equal(target, batch.rewards)


def test_q_learning_starts_after_the_given_updates():
    config = replace(SMALL, rl_start=2)
    start = small_state(bcq, config)
    state = start
    for _ in range(2):
        before = state
        state, info = update(config, state, BATCH)
        assert not same_bits(state.encoder, before.encoder)
        decoders = [bcq.own_params(s.actor, "decoder") for s in (state, before)]
        assert not same_bits(*decoders)
        assert np.isfinite(list(info.values())).all()
    perturbations = [bcq.own_params(s.actor, "perturbation") for s in (state, start)]
    assert same_bits(*perturbations)
    for name in ("critic", "critic_opt", "target_critic", "target_actor", "actor_opt"):
        assert same_bits(getattr(state, name), getattr(start, name)), name
    after, _ = update(config, state, BATCH)
    now, _ = update(SMALL, state, BATCH)
    assert after.critic_opt[0].count == 1
    assert after.actor_opt[0].count == 1
    assert_close(after._replace(key=None), now._replace(key=None), rtol=1e-3, atol=1e-5)


def test_schedules_end_at_the_last_update_though_q_learning_starts_later():
    config = replace(SMALL, rl_start=10, actor_lr_decay="linear", critic_lr_decay="linear")
    optimizers = {  # own steps in all
        "perturbation": (bcq.actor_optimizer(bcq.network_config(config, "perturbation")), 30),
        "critic": (bcq.critic_optimizer(config), 30),
        "decoder": (
            bcq.actor_optimizer(bcq.network_config(replace(config, regularise="both"), "decoder")),
            40,
        ),
    }
    for name, (optimizer, num_steps) in optimizers.items():
        adam, decay, schedule = optimizer.init(jnp.ones(1))
        for share, expected in ((0.5, 0.55), (1, 0.1)):
            count = jnp.int32(share * num_steps)
            opt_state = (adam, decay, schedule._replace(count=count))
            change, _ = optimizer.update(jnp.ones(1), opt_state, jnp.ones(1))
            np.testing.assert_allclose(change, [-1e-3 * expected], rtol=1e-4, err_msg=name)


# --- The actions ---


def draw_latents(size, number, config=SMALL):
    return bcq.sample_latents(config, jax.random.key(1), (size, number, 2 * ACTION_DIM))


def test_latents_are_gaussian_and_clipped():
    latents = np.asarray(draw_latents(100, 100))
    assert latents.min() == -0.5
    assert latents.max() == 0.5
    assert (np.abs(latents) == 0.5).mean() == pytest.approx(0.6171, abs=0.01)  # 2 Phi(-0.5)
    assert latents[np.abs(latents) < 0.5].std() == pytest.approx(0.2856, abs=0.01)


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_candidates_stay_within_phi_of_the_decoders_actions_and_in_bounds(spread):
    state = small_state(bcq, SMALL, spread=spread)
    latents = draw_latents(32, 5)
    rows, actions = bcq.candidates(
        SMALL, ACTION_DIM, state.actor, state.actor, BATCH.observations, latents
    )
    np.testing.assert_array_equal(rows, np.repeat(BATCH.observations, 5, 0))
    flat = latents.reshape(len(rows), -1)
    decoder = bcq.own_params(state.actor, "decoder")
    decoded = reference.bcq_decode(decoder, np.asarray(rows), np.asarray(flat))
    changes = np.abs(actions - decoded)
    assert changes.max() <= 0.05 + 1e-6
    assert changes.max() > 0.02
    assert np.abs(actions).max() <= 1
    if spread == 3.0:  # both bounds are reached
        assert changes.max() > 0.0499
        assert np.abs(actions).max() == 1


def test_a_decoder_that_has_learnt_gives_the_datas_actions_back():
    """Whatever the latent: the data have one action for each state."""
    data = small_data(size=512)
    weights = np.random.default_rng(1).normal(size=(STATE_DIM, ACTION_DIM))
    data["actions"] = np.tanh(0.5 * data["observations"] @ weights).astype(np.float32)
    config = replace(
        SMALL,
        hidden_dim=32,
        last_hidden_dim=32,
        vae_hidden_dim=32,
        actor_learning_rate=1e-2,
        batch_size=64,
        log_every=500,
        num_updates=500,
    )
    states = init_states(bcq, config, data)
    states, infos = bcq.epoch(config, states, jax.device_put(data))
    actor = of_seed(states, 0).actor
    latents = draw_latents(511, 3)
    plain = replace(config, phi=0.0)
    rows = data["observations"][:511]
    _, actions = bcq.candidates(plain, ACTION_DIM, actor, actor, rows, latents)
    errors = np.asarray(actions).reshape(511, 3, -1) - data["actions"][:511, None]
    assert (errors**2).mean() < 0.01
    assert data["actions"].var() > 0.2
    assert infos["bc_loss"][0, -1] < 0.02


# --- Evaluation ---


def evaluated(config, state, observations):
    """Return the policy's actions (E, A) for states (E, S) as the environment gives them."""
    actors = jax.tree.map(lambda x: x[None], state.actor)
    data = small_data() | {"mean": np.float32(0.5), "std": np.float32(2.0)}
    return np.asarray(bcq.policy(config, actors, data, observations[None]))[0]


def states_to_evaluate(number=6):
    return np.random.default_rng(2).normal(size=(number, STATE_DIM)).astype(np.float32)


def test_evaluation_takes_the_first_critics_best_candidate():
    config = replace(SMALL, n_eval_candidates=20)
    state = small_state(bcq, config, spread=0.5)
    state = state._replace(actor={**state.actor, "critic": state.critic})
    observations = states_to_evaluate()
    chosen = evaluated(config, state, observations)
    params = reference.bcq_state(state)
    for raw, action in zip(observations, chosen):
        key = jax.random.key(0)
        for bits in raw.view(np.uint32):
            key = jax.random.fold_in(key, bits)
        latents = np.clip(jax.random.normal(key, (20, 2 * ACTION_DIM)), -0.5, 0.5)
        rows = np.tile((raw - 0.5) / 2, (20, 1))
        actions = reference.bcq_decode(params["decoder"], rows, latents)
        actions = reference.bcq_perturb(config, params["perturbation"], rows, actions)
        values = reference.values_of(params["critic"], 0, reference.pairs(rows, actions))
        others = reference.values_of(params["critic"], 1, reference.pairs(rows, actions))
        assert values.argmax() != others.argmax()  # so that the critic matters
        np.testing.assert_allclose(action, actions[values.argmax()], atol=1e-5)


def test_evaluation_repeats_whatever_else_is_evaluated():
    state = small_state(bcq, SMALL)
    observations = states_to_evaluate()
    actions = evaluated(SMALL, state, observations)
    np.testing.assert_array_equal(evaluated(SMALL, state, observations), actions)
    backwards = evaluated(SMALL, state, observations[::-1])
    np.testing.assert_allclose(backwards, actions[::-1], atol=1e-6)
    alone = evaluated(SMALL, state, observations[2:3])
    np.testing.assert_allclose(alone, actions[2:3], atol=1e-6)


def test_each_state_has_draws_of_its_own():
    """Of two states that differ by a rounding, and in each entry."""
    state = states_to_evaluate(1)[0]
    keys = [jax.random.key_data(bcq.state_key(state))]
    for i in range(STATE_DIM):
        other = state.copy()
        other[i] = np.nextafter(state[i], np.float32(9))
        keys.append(jax.random.key_data(bcq.state_key(other)))
    keys.append(jax.random.key_data(bcq.state_key(state[::-1])))
    assert len(np.unique(keys, axis=0)) == STATE_DIM + 2


def test_an_epochs_actor_has_the_newest_critic():
    states = run_epochs(bcq, SMALL)
    assert same_bits(states.actor["critic"], states.critic)


# --- Where the regularisers act ---

LOSSES = ("actor_dropout", "actor_input_noise", "actor_bc_noise", "actor_sam")
STEPS = ("actor_wd", "actor_grad_noise")


def updated_networks(config):
    """Return each network's parameters after an update of it alone, by its name."""
    state = small_state(bcq, config)
    vae, _ = bcq.update_vae(config, state, BATCH)
    actor, _ = bcq.update_actor(config, state, BATCH)
    critics, _ = bcq.update_critics(config, state, BATCH)
    return {
        "encoder": vae.encoder["params"],
        "decoder": bcq.own_params(vae.actor, "decoder"),
        "perturbation": bcq.own_params(actor.actor, "perturbation"),
        "critic": critics.critic["params"],
        "decoder untouched": bcq.own_params(actor.actor, "decoder"),
        "perturbation untouched": bcq.own_params(vae.actor, "perturbation"),
    }


def numpy_losses(state, seen, cloned, noise_on_judged, keys):
    """Return the VAE's and the perturbation network's losses, for the states that they see."""
    config = replace(SMALL, regularise="both")
    params = reference.bcq_state(state)
    latent_noise = np.asarray(jax.random.normal(keys[3], (32, 2 * ACTION_DIM)))
    means, log_stds, _ = reference.bcq_encode(
        config, params["encoder"], BATCH.observations, BATCH.actions
    )
    latents = means + np.exp(log_stds) * latent_noise
    kl = (means**2 + np.exp(2 * log_stds) - 1) / 2 - log_stds
    errors = reference.bcq_decode(params["decoder"], seen, latents) - cloned
    vae_loss = (errors**2).mean() + 0.5 * kl.mean()

    latents = np.clip(latent_noise, -0.5, 0.5)
    decoded = reference.bcq_decode(params["decoder"], BATCH.observations, latents)
    actions = reference.bcq_perturb(config, params["perturbation"], seen, decoded)
    judged = np.clip(actions + noise_on_judged, -1, 1)
    x = reference.pairs(BATCH.observations, judged)
    return vae_loss, -reference.values_of(params["critic"], 0, x).mean()


def test_each_noise_of_both_losses_has_its_own_place():
    """Input noise reaches the regularised network alone; the objective's, what it is judged by."""
    keys = list(jax.random.split(jax.random.key(7), 4))
    plain = replace(SMALL, regularise="both")
    state = small_state(bcq, plain)

    def losses(**flags):
        config = replace(plain, **flags)
        params = {"encoder": state.encoder["params"]}
        params["decoder"] = bcq.own_params(state.actor, "decoder")
        vae, _ = bcq.vae_loss(params, config, state, BATCH, keys)
        params = bcq.own_params(state.actor, "perturbation")
        actor, _ = bcq.actor_loss(params, config, state, BATCH, keys)
        return vae, actor

    states, actions = np.asarray(BATCH.observations), np.asarray(BATCH.actions)
    clean = numpy_losses(state, states, actions, 0, keys)
    np.testing.assert_allclose(losses(), clean, rtol=1e-4)
    seen = states + 0.3 * np.asarray(jax.random.normal(keys[1], states.shape))
    expected = numpy_losses(state, seen, actions, 0, keys)
    np.testing.assert_allclose(losses(actor_input_noise=0.3), expected, rtol=1e-4)
    noise = 0.3 * np.asarray(jax.random.normal(keys[2], actions.shape))
    expected = numpy_losses(state, states, actions - noise, noise, keys)
    np.testing.assert_allclose(losses(actor_bc_noise=0.3), expected, rtol=1e-4)


@functools.cache
def plain_networks(regularise):
    return updated_networks(replace(SMALL, regularise=regularise))


def chosen(regularise):
    """Return the networks that are regularised."""
    return {"decoder", "perturbation"} if regularise == "both" else {regularise}


@each_choice
@pytest.mark.parametrize("flag", [*LOSSES, *STEPS])
def test_a_regulariser_reaches_the_chosen_networks_only(flag, regularise):
    """One in the decoder's loss reaches the encoder, too, which is trained by the same loss."""
    before = plain_networks(regularise)
    after = updated_networks(replace(SMALL, regularise=regularise, **{flag: 0.3}))
    changed = {name for name in before if not same_bits(before[name], after[name])}
    expected = chosen(regularise)
    if flag in LOSSES and "decoder" in expected:
        expected.add("encoder")
    assert changed == expected


@each_choice
def test_learning_rates_decay_of_the_chosen_networks_only(regularise):
    config = replace(SMALL, regularise=regularise, actor_lr_decay="linear")
    decayed = set()
    for network in ("encoder", "decoder", "perturbation"):
        optimizer = bcq.actor_optimizer(bcq.network_config(config, network))
        adam, wd, schedule = optimizer.init(jnp.ones(1))
        if schedule:  # it has no state without decay
            schedule = schedule._replace(count=jnp.int32(config.num_updates))
        change, _ = optimizer.update(jnp.ones(1), (adam, wd, schedule), jnp.ones(1))
        if change > -0.9e-3:
            decayed.add(network)
    assert decayed == chosen(regularise)


LAYERS = {
    "actor_ln": ("params", "LayerNorm_0"),
    "actor_bn": ("params", "BatchNorm_0"),
    "actor_sn": ("batch_stats", "SpectralNorm_0"),
    "actor_rms": ("params", "RMSNorm_0"),
}


@each_choice
@pytest.mark.parametrize("flag", LAYERS)
def test_a_normalisation_is_in_the_chosen_networks_only(flag, regularise):
    config = replace(SMALL, regularise=regularise, **{flag: True})
    state = bcq.init_state(config, small_batch(1), 0)
    collection, layer = LAYERS[flag]
    found = set()
    for network in ("decoder", "perturbation"):
        hidden, _ = bcq.LAYERS[network]
        if layer in state.actor[collection].get(hidden, {}):
            found.add(network)
    assert found == chosen(regularise)
    for variables in (state.encoder, state.critic):
        for layers in variables[collection].values():
            assert layer not in layers
    assert variables["batch_stats"] == {}
    after, _ = update(config, state, BATCH)
    if flag in ("actor_bn", "actor_sn"):  # whose running statistics move
        for network in found:
            hidden, _ = bcq.LAYERS[network]
            stats = [s.actor["batch_stats"][hidden] for s in (state, after)]
            assert not same_bits(*stats)


@each_choice
def test_a_seeds_first_weights_are_the_baselines(regularise):
    """So that runs which differ in `regularise` are compared from the same start."""
    states = []
    for choice in (regularise, "perturbation"):
        config = replace(SMALL, regularise=choice, actor_dropout=0.1)
        states.append(bcq.init_state(config, small_batch(1), 0)._replace(key=None))
    assert same_bits(*states)


@dataclass(frozen=True)
class ForkedConfig(bcq.Config):
    """A fork's, with a regulariser that CHOSEN doesn't name."""

    actor_ofn: bool = False


@each_choice
def test_a_regulariser_is_off_in_the_other_networks(regularise):
    fields = vars(SMALL) | dict(regularise=regularise, actor_ofn=True, actor_lr_decay="linear")
    fields |= dict(actor_wd_kernels_only=True, actor_learning_rate=0.5)
    for flags in bcq.CHOSEN.values():
        fields |= flags
    config = ForkedConfig(**fields)
    names = [name for name in fields if name.startswith("actor_")]
    for network in ("encoder", "decoder", "perturbation"):
        own = bcq.network_config(config, network)
        assert own.actor_learning_rate == 0.5
        assert own.actor_layers == SMALL.actor_layers
        for name in set(names) - {"actor_learning_rate", "actor_layers"}:
            source = config if network in chosen(regularise) else ForkedConfig
            assert getattr(own, name) == getattr(source, name), name


@each_choice
def test_the_analysis_looks_inside_the_chosen_network(regularise):
    config = replace(SMALL, regularise=regularise)
    state = small_state(bcq, config)
    params = reference.bcq_state(state)
    observations = np.asarray(BATCH.observations)
    _, seen = bcq.Actor(config, ACTION_DIM).apply(
        state.actor, observations, train=False, mutable="intermediates"
    )
    zeros = np.zeros((len(observations), 2 * ACTION_DIM))
    if regularise == "decoder":
        x = reference.pairs(observations, zeros)
    else:
        x = reference.pairs(
            observations, reference.bcq_decode(params["decoder"], observations, zeros)
        )
    hidden = "Hidden_1" if regularise == "decoder" else "Hidden_0"
    layers = params["decoder" if regularise == "decoder" else "perturbation"][hidden]
    expected = reference.dense(layers["Dense_1"], reference.layer(layers, 0, x))
    values = seen["intermediates"][bcq.analysed_hidden(config)]["preactivations"][0]
    np.testing.assert_allclose(values, expected, atol=1e-4)


def test_the_decoders_loss_in_the_analysis_is_at_the_encoders_means():
    config = replace(SMALL, regularise="decoder")
    state = small_state(bcq, config)
    params = reference.bcq_state(state)
    batch = jax.tree.map(np.asarray, BATCH)
    no_noise = np.zeros((len(batch.actions), 2 * ACTION_DIM))
    expected = reference.bcq_vae_loss(config, params, batch, no_noise)
    np.testing.assert_allclose(bcq.eval_actor_loss(config, state, BATCH), expected, rtol=1e-4)


# --- The loop ---


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first = run_epochs(bcq, SMALL)
    assert same_bits(first, run_epochs(bcq, SMALL))
    assert not same_bits(first.actor, run_epochs(bcq, replace(SMALL, seed=1)).actor)
    for opt in (first.actor_opt, first.critic_opt, first.encoder_opt, first.decoder_opt):
        assert opt[0].count == 8


def test_seeds_trained_together_are_those_trained_alone():
    config = replace(SMALL, actor_dropout=0.1, regularise="both", rl_start=3)
    together = run_epochs(bcq, replace(config, num_seeds=2), epochs=1)
    for seed in range(2):
        alone = run_epochs(bcq, replace(config, seed=seed), epochs=1)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a[seed], b[0], rtol=1e-3, atol=1e-5)


def check_dense(params):
    bound = 1 / np.sqrt(params["kernel"].shape[0])
    assert 0.9 * bound < np.abs(params["kernel"]).max() <= bound
    assert not params["bias"].any()


def test_parameters_start_uniform_and_targets_as_their_networks():
    state = bcq.init_state(replace(SMALL, hidden_dim=64, last_hidden_dim=48), small_batch(1), 0)
    for params in (state.actor["params"], state.encoder["params"], state.critic["params"]):
        for name, layers in params.items():
            if name.startswith("Dense"):
                check_dense(layers)
            else:
                check_dense(layers["Dense_0"])
                check_dense(layers["Dense_1"])
    assert same_bits(state.target_critic, state.critic)
    assert same_bits(state.actor["critic"], state.critic)
    perturbation = bcq.own_params(state.actor, "perturbation")
    assert same_bits(state.target_actor["params"], perturbation)


# --- The original's values ---


@pytest.mark.parametrize(
    "flags, widths",
    [
        ({}, (400, 300, 750)),
        (dict(hidden_dim=32), (32, 32, 32)),
        (dict(hidden_dim=32, vae_hidden_dim=8), (32, 32, 8)),
        (dict(last_hidden_dim=8), (400, 8, 750)),
        (dict(critic_gn=True), (384, 288, 750)),
        (dict(regularisers="GN"), (384, 288, 750)),
        (dict(regularisers="GN", regularise="decoder"), (400, 300, 736)),
        (dict(regularisers="GN", regularise="both"), (384, 288, 736)),
        (dict(regularisers="GN", regularise="decoder", critic_gn=True), (384, 288, 736)),
    ],
)
def test_networks_have_the_originals_widths_unless_asked(flags, widths):
    config = bcq.tuned(bcq.Config(**flags))
    first, last, vae = widths
    batch = small_batch(1)
    state = jax.eval_shape(lambda: bcq.init_state(config, batch, 0))
    assert hidden_widths(state.encoder["params"]["Hidden_0"]) == [vae, vae]
    for network, widths in (("decoder", [vae, vae]), ("perturbation", [first, last])):
        params = bcq.own_params(state.actor, network)
        hidden, _ = bcq.LAYERS[network]
        assert hidden_widths(params[hidden]) == widths
    for k in range(2):
        assert hidden_widths(state.critic["params"][f"Hidden_{k}"]) == [first, last]
    latents = state.encoder["params"]["Dense_0"]["kernel"].shape[1]
    assert latents == 2 * ACTION_DIM


def hidden_widths(layers):
    return [layers[f"Dense_{i}"]["kernel"].shape[1] for i in range(2)]


def test_every_dataset_has_the_originals_values():
    """Of sfujim/BCQ's continuous_BCQ/BCQ.py and main.py."""
    original = dict(
        gamma=0.99,
        tau=0.005,
        batch_size=100,
        actor_learning_rate=1e-3,
        critic_learning_rate=1e-3,
        kl_coef=0.5,
        log_std_min=-4.0,
        log_std_max=15.0,
        latent_clip=0.5,
        phi=0.05,
        min_weight=0.75,
        n_candidates=10,
        n_eval_candidates=100,
        normalize_states=False,
        normalize_reward=False,
        rl_start=0,
    )
    for name in rebrac.TUNED:
        config = bcq.tuned(bcq.Config(dataset_name=name))
        for key, value in original.items():
            assert getattr(config, key) == value, (name, key)


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(regularise="encoder"), "regularise must be decoder, perturbation or both"),
        (dict(rl_start=1_000_000), "rl_start must be below num_updates"),
        (dict(actor_gn=True, last_hidden_dim=48), "with GroupNorm need widths of 64, 96, ..."),
        (
            dict(actor_gn=True, regularise="decoder", vae_hidden_dim=48),
            "with GroupNorm need widths of 64, 96, ...",
        ),
        (dict(min_weight=1.5), "min_weight must be between 0 and 1"),
    ],
)
def test_wrong_values_are_errors(flags, message):
    config = bcq.tuned(bcq.Config(**flags))
    fails(message, check, config, bcq.constraints, bcq.BOUNDS)
