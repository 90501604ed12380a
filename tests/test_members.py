"""What the decorator of epoch, analyse and policy makes of a function for one seed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import both_scripts, lowered_epoch, of_seed, small_config

import rebrac
from harness.members import NOT_COMPILED, init_states, is_on, over_members, split_config

CONFIG = small_config(rebrac, tau=0.5)


def decay(config, state, data, shift):
    """Return a new state, and a sum, of one seed."""
    x = config.tau * state["x"] + data["y"] @ state["w"] + shift
    if is_on(config.actor_input_noise):
        x = x + config.actor_input_noise * jax.random.normal(state["key"], x.shape)
    return {**state, "x": x}, x.sum() * config.actor_layers


over_all_seeds = over_members("state", "shift")(decay)


def make_states(num_seeds):
    rng = np.random.default_rng(0)
    return dict(
        x=jnp.array(rng.normal(size=(num_seeds, 3)), jnp.float32),
        w=jnp.array(rng.normal(size=(num_seeds, 4)), jnp.float32),
        key=jax.random.split(jax.random.key(0), num_seeds),
    )


DATA = {"y": jnp.arange(12.0).reshape(3, 4)}


# --- One seed, several seeds ---


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("num_seeds", [1, 3])
def test_each_seed_has_what_the_plain_function_gives(num_seeds, noise):
    config = replace(CONFIG, actor_input_noise=noise)
    states = make_states(num_seeds)
    shifts = jnp.arange(1.0, num_seeds + 1)
    new_states, sums = over_all_seeds(config, states, DATA, shifts)
    assert sums.shape == (num_seeds,)
    assert new_states["x"].shape == (num_seeds, 3)
    for seed in range(num_seeds):
        state = of_seed(states, seed)
        expected, expected_sum = decay(config, state, DATA, shifts[seed])
        np.testing.assert_allclose(new_states["x"][seed], expected["x"], rtol=1e-5)
        np.testing.assert_allclose(sums[seed], expected_sum, rtol=1e-5)
        np.testing.assert_array_equal(new_states["w"][seed], expected["w"])


def test_the_decorated_function_keeps_its_name_and_docstring():
    assert over_all_seeds.__name__ == "decay"
    assert over_all_seeds.__doc__ == decay.__doc__


def test_a_donated_argument_is_used_up_and_others_are_not():
    states = make_states(2)
    shifts = jnp.ones(2)
    donating = over_members("state", "shift", donate="state")(decay)
    expected, _ = over_all_seeds(CONFIG, states, DATA, shifts)
    assert not states["x"].is_deleted()
    new_states, _ = donating(CONFIG, states, DATA, shifts)
    np.testing.assert_array_equal(new_states["x"], expected["x"])
    assert states["x"].is_deleted()
    assert not shifts.is_deleted()
    assert not DATA["y"].is_deleted()


def test_a_runs_seeds_are_initialised_as_each_alone():
    def init(config, batch, seed):
        return config.tau * jax.random.normal(jax.random.key(seed), batch.shape)

    states = init_states(init, replace(CONFIG, seed=4, num_seeds=3), jnp.zeros((2, 5)))
    assert states.shape == (3, 2, 5)
    for i in range(3):
        expected = 0.5 * jax.random.normal(jax.random.key(4 + i), (2, 5))
        np.testing.assert_allclose(states[i], expected, rtol=1e-6)


# --- What a program depends on ---


@both_scripts
def test_split_config_sets_apart_the_floats_that_are_not_0(script):
    config = small_config(script, actor_dropout=0.1)
    static, traced = split_config(config)
    for name, value in vars(config).items():
        if name in NOT_COMPILED:
            assert getattr(static, name) is None
            assert name not in traced
        elif type(value) is float and value != 0:
            assert getattr(static, name) is None
            assert traced[name] == value
        else:
            assert getattr(static, name) == value
            assert name not in traced
    assert traced["actor_dropout"] == 0.1
    assert static.actor_wd == 0.0
    assert set(NOT_COMPILED) <= set(vars(config))


def test_a_strength_of_0_is_off_and_leaves_no_trace():
    assert not is_on(0)
    assert not is_on(0.0)
    assert is_on(0.1)
    assert is_on(jnp.float32(0.0))  # traced: it isn't known to be 0

    def text(noise):
        static, traced = split_config(replace(CONFIG, actor_input_noise=noise))
        arguments = (make_states(2), DATA, jnp.ones(2))
        return over_all_seeds.program.lower(static, traced, *arguments).as_text()

    assert "threefry" not in text(0.0)
    assert "threefry" in text(0.1)


def test_numbers_that_are_not_0_share_a_compiled_program():
    function = over_members("state", "shift")(decay)

    def programs(**changed):
        """Return how many there are after a call with some fields."""
        function(replace(CONFIG, **changed), make_states(2), DATA, jnp.ones(2))
        return function.program._cache_size()

    assert programs() == 1
    assert programs(tau=0.1) == 1
    assert programs(tau=0.1, seed=7, results="elsewhere") == 1
    assert programs(actor_input_noise=0.2) == 2
    assert programs(actor_input_noise=0.3, tau=0.9) == 2
    assert programs(actor_input_noise=0.3, actor_layers=3) == 3


@both_scripts
def test_strengths_share_an_epochs_program(script):
    strong = dict(actor_dropout=0.5, actor_wd=0.1, gamma=0.9)
    weak = dict(actor_dropout=0.1, actor_wd=1e-5, gamma=0.99)
    assert lowered_epoch(script, **strong) == lowered_epoch(script, **weak)
    assert lowered_epoch(script, **strong) != lowered_epoch(script)
    static, _ = split_config(small_config(script, **strong))
    assert static == split_config(small_config(script, **weak))[0]
    assert static != split_config(small_config(script))[0]
