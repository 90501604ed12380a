"""ReBRAC: updates against a NumPy re-derivation, and what its parts must hold to."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import (
    ACTION_DIM,
    KEYS,
    REGULARISED,
    assert_close,
    assert_in_full_precision,
    paper_rows,
    run_epochs,
    same_bits,
    small_batch,
    small_config,
    small_data,
    small_state,
    widen,
)

import rebrac

SMALL = small_config(rebrac)
update = jax.jit(rebrac.update, static_argnums=0)
update_critics = jax.jit(rebrac.update_critics, static_argnums=0)


# --- One update ---


def draw_target_noises(state, shape):
    """Return the standard noise of both critic updates, as the state's key gives it."""
    key, first, _, _ = jax.random.split(state.key, 4)
    _, second, _, _ = jax.random.split(key, 4)
    return [np.asarray(jax.random.normal(key, shape)) for key in (first, second)]


NARROW = dict(v_min=-1.0, v_max=1.0)  # so that targets lie outside


@pytest.mark.parametrize(
    "fields",
    [
        dict(critic_loss="hl_gauss"),
        dict(critic_loss="hl_gauss", **NARROW),
        dict(critic_loss="hl_gauss", clip_targets=False, **NARROW),
        dict(critic_loss="mse"),
        dict(critic_loss="mse", actor_q_coef=1.0),
        dict(critic_loss="mse", actor_sam=0.3, actor_rms=True),
    ],
)
def test_updates_are_those_of_a_numpy_rederivation(fields):
    usual = dict(actor_q_coef=0.5)
    config = replace(
        SMALL,
        critic_bc_coef=0.5,
        actor_bc_coef=0.3,
        **{**usual, **fields},
        actor_learning_rate=2e-3,
        target_noise=0.5,
        sigma_frac=0.6,
    )
    with jax.enable_x64(True):  # so that float32's rounding hides no difference
        state = widen(small_state(rebrac, config, spread=0.5))
        data = widen(small_data())
        expected = reference.numpy_state(state)
        for i in range(2):
            rows = np.arange(16 * i, 16 * i + 16).reshape(2, 8)
            batches = [rebrac.transitions(data, row) for row in rows]
            noises = draw_target_noises(state, batches[0].actions.shape)
            expected, losses = reference.rebrac_update(config, expected, batches, noises)
            state, info = update(config, state, rebrac.transitions(data, rows))
            for key, value in losses.items():
                np.testing.assert_allclose(info[key], value, rtol=1e-9)
        for name in ("actor", "target_actor", "critic", "target_critic"):
            assert_close(getattr(state, name)["params"], expected[name])


def test_actor_and_targets_move_every_second_critic_update():
    before = small_state(rebrac, SMALL)
    after, info = update_critics(SMALL, before, small_batch(8))
    for name in ("actor", "target_actor", "target_critic", "actor_opt"):
        assert same_bits(getattr(after, name), getattr(before, name))
    assert not same_bits(after.critic, before.critic)
    assert "actor_loss" not in info
    end = run_epochs(rebrac, SMALL, epochs=3)  # of 4 critic updates each
    assert end.critic_opt[0].count == 12
    assert end.actor_opt[0].count == 6


def test_a_terminal_step_ignores_what_follows():
    batch = small_batch(8)._replace(terminals=jnp.ones(8))
    target = rebrac.critic_target(SMALL, small_state(rebrac, SMALL), batch, KEYS[0])
    np.testing.assert_array_equal(target, batch.rewards)


def test_behaviour_cloning_has_no_q_term():
    config = replace(SMALL, actor_q_coef=0.0, actor_bc_coef=1.0)
    batch = small_batch(8)
    state = small_state(rebrac, config)
    loss, _ = rebrac.actor_loss(state.actor["params"], config, state, batch, KEYS)
    actor = rebrac.Actor(config, ACTION_DIM)
    actions = rebrac.forward(actor, state.actor, batch.observations)
    expected = ((actions - batch.actions) ** 2).sum(-1).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


# --- HL-Gauss ---


def test_hl_gauss_targets_sum_to_one_and_recover_their_mean():
    edges = np.asarray(rebrac.support(SMALL))
    width = edges[1] - edges[0]
    values = np.concatenate([np.linspace(edges[0] - 30, edges[-1] + 30, 1001), edges])
    p = rebrac.hl_gauss(SMALL, values)
    assert np.isfinite(p).all()
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)
    means = rebrac.critic_values(SMALL, jnp.log(p + 1e-30))
    inside = (values > edges[0] + 4 * width) & (values < edges[-1] - 4 * width)
    np.testing.assert_allclose(means[inside], values[inside], atol=2e-3 * width)
    # At and beyond the ends half of the Gaussian is cut off. That moves its mean by less than a bin
    clipped = np.clip(values, edges[0], edges[-1])
    assert np.abs(means - clipped).max() < width
    np.testing.assert_array_equal(p[0], rebrac.hl_gauss(SMALL, edges[0]))


def test_a_value_is_not_rounded_to_ten_bits_on_a_gpu():
    outputs = jnp.zeros((2, 4, SMALL.n_classes))
    assert_in_full_precision(lambda outputs: rebrac.critic_values(SMALL, outputs), outputs)


def test_a_target_well_outside_gives_no_loss_unless_it_is_clipped():
    """As in the paper's code, where the normal distribution is 0 in all bins then."""
    edges = np.asarray(rebrac.support(SMALL))
    values = jnp.array([0.0, edges[-1] + 30, edges[0] - 30])
    config = replace(SMALL, clip_targets=False)
    p = rebrac.hl_gauss(config, values)
    np.testing.assert_allclose(p.sum(-1), [1, 0, 0], atol=1e-5)
    np.testing.assert_allclose(p[0], rebrac.hl_gauss(SMALL, values)[0], atol=1e-5)


@pytest.mark.parametrize("v_expand", [0.1, -0.05])
def test_the_support_is_widened_in_all_by_v_expand(v_expand):
    edges = np.asarray(rebrac.support(replace(SMALL, v_expand=v_expand)))
    end = 10 * (1 + v_expand)
    np.testing.assert_allclose(edges, np.linspace(-end, end, SMALL.n_classes + 1), atol=1e-5)


# --- The loop ---


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first = run_epochs(rebrac, SMALL)
    assert same_bits(first, run_epochs(rebrac, SMALL))
    other = run_epochs(rebrac, replace(SMALL, seed=1))
    for a, b in zip(jax.tree.leaves(first.actor), jax.tree.leaves(other.actor)):
        assert not np.array_equal(a, b)


def test_seeds_trained_together_are_those_trained_alone():
    """Without BatchNorm: a bias before it has no gradient but rounding, which Adam makes large."""
    config = replace(SMALL, **{**REGULARISED, "actor_bn": False, "critic_bn": False})
    together = run_epochs(rebrac, replace(config, num_seeds=3))
    for seed in range(3):
        alone = run_epochs(rebrac, replace(config, seed=seed))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a[seed], b[0], rtol=1e-3, atol=1e-5)


def check_last_dense(params, bound):
    for leaf in params.values():
        assert 0.5 * bound < np.abs(leaf).max() <= bound
        assert leaf.min() < 0 < leaf.max()


def check_hidden_dense(params):
    bound = 1 / np.sqrt(params["kernel"].shape[0])
    assert 0.9 * bound < np.abs(params["kernel"]).max() <= bound
    np.testing.assert_array_equal(params["bias"], np.float32(0.1))


def test_parameters_start_as_the_paper_says():
    state = rebrac.init_state(replace(SMALL, hidden_dim=64), small_batch(1), 0)
    actor = state.actor["params"]
    critic = state.critic["params"]
    check_last_dense(actor["Dense_0"], 1e-3)
    check_last_dense(critic["Dense_0"], 3e-3)
    check_last_dense(critic["Dense_1"], 3e-3)
    for layers in (actor["Hidden_0"], critic["Hidden_0"], critic["Hidden_1"]):
        check_hidden_dense(layers["Dense_0"])
        check_hidden_dense(layers["Dense_1"])
    assert not same_bits(critic["Hidden_0"], critic["Hidden_1"])
    assert same_bits(state.actor, state.target_actor)
    assert same_bits(state.critic, state.target_critic)


# --- The paper's hyperparameters ---


@pytest.mark.parametrize("critic_loss", ["hl_gauss", "mse"])
def test_each_dataset_gets_the_papers_values(critic_loss):
    rows = paper_rows(f"rebrac_{critic_loss}.csv")
    assert [name for name, _ in rows] == sorted(rebrac.TUNED)
    for name, row in rows:
        config = rebrac.tuned(rebrac.Config(dataset_name=name, critic_loss=critic_loss))
        for key, value in row.items():
            assert getattr(config, key) == value, (name, key)


BEST_FILES = {
    "best-L2": "rebrac_hl_gauss_best_l2.csv",
    "best": "rebrac_hl_gauss_best_combination.csv",
}


@pytest.mark.parametrize("name", BEST_FILES)
def test_the_best_regularisers_of_each_dataset_are_the_papers(name):
    rows = paper_rows(BEST_FILES[name])
    assert [dataset for dataset, _ in rows] == sorted(rebrac.TUNED)
    for dataset, flags in rows:
        plain = rebrac.Config(dataset_name=dataset)
        expected = rebrac.tuned(replace(plain, **flags))
        assert rebrac.tuned(replace(plain, regularisers=name)) == expected


def published(dataset, file):
    """Return a configuration that the paper published, as flags (facts beside this test)."""
    flags = dict(clip_targets=False, **dict(paper_rows(file))[dataset])
    if dataset.startswith(("pen", "door", "hammer", "relocate")):
        flags |= dict(batch_size=1024, actor_learning_rate=1e-3, critic_learning_rate=1e-3)
    newer = dict(paper_rows("rebrac_as_run_antmaze.csv"))
    if file == BEST_FILES["best"] and dataset in newer:
        flags |= newer[dataset]
    return flags


@pytest.mark.parametrize("dataset", rebrac.TUNED)
def test_a_preset_is_the_published_configuration_to_the_last_value(dataset):
    plain = rebrac.Config(dataset_name=dataset)
    for preset, file in {"as-run": BEST_FILES["best"], "as-run-L2": BEST_FILES["best-L2"]}.items():
        expected = rebrac.tuned(replace(plain, **published(dataset, file)))
        assert rebrac.tuned(replace(plain, preset=preset)) == expected
    expected = rebrac.tuned(replace(plain, clip_targets=False))
    assert rebrac.tuned(replace(plain, preset="as-run-none")) == expected


@pytest.mark.parametrize("dataset", rebrac.TUNED)
@pytest.mark.parametrize("name", BEST_FILES)
def test_best_changes_the_regularisers_alone(dataset, name):
    baseline = vars(rebrac.tuned(rebrac.Config(dataset_name=dataset)))
    best = vars(rebrac.tuned(rebrac.Config(dataset_name=dataset, regularisers=name)))
    changed = {key for key in best if best[key] != baseline[key]}
    assert changed <= {"actor_ln", "actor_dropout", "actor_wd", "actor_grad_noise"}


def test_all_presets_are_named():
    known = rebrac.presets(rebrac.Config(), {}, {})
    assert list(known) == list(rebrac.PRESETS)


def test_antmazes_range_of_values_is_that_of_its_scaled_rewards():
    ranges = {}
    for scaled in (None, True, False):
        given = rebrac.Config(dataset_name="antmaze-umaze-v2", normalize_reward=scaled)
        config = rebrac.tuned(given)
        ranges[scaled] = (config.v_min, config.v_max)
    # None is the data's
    assert ranges == {None: (0, 100), True: (0, 100), False: (None, None)}


def test_what_the_user_sets_wins():
    chosen = dict(
        actor_bc_coef=0.0,
        batch_size=7,
        normalize_reward=False,
        v_min=-1.0,
        eval_episodes=3,
        gamma=0.5,
    )
    config = rebrac.tuned(rebrac.Config(dataset_name="antmaze-umaze-v2", **chosen))
    for key, value in chosen.items():
        assert getattr(config, key) == value
    assert config.v_max is None  # the data's, since its rewards stay as they are
    assert config.eval_every == 50_000
    assert config.critic_bc_coef == 0.001
