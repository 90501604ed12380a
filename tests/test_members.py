"""What the decorator of epoch, analyse and policy makes of a function for one member."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    OURS,
    both_scripts,
    lowered_epoch,
    of_seed,
    random_columns,
    same_bits,
    small_batch,
    small_config,
    small_data,
    small_state,
    to_numpy,
    widen,
)
from conftest import init_states as init_all

import cql
import iql
import rebrac
from harness.checkpoint import flatten
from harness.members import (
    NOT_COMPILED,
    in_common,
    init_states,
    is_on,
    over_members,
    seeds,
    split_config,
    stack_configs,
)

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


def test_members_in_turn_need_no_more_memory_than_one():
    """Each has a matrix of 4 MB."""

    def middle(config, x):
        return jnp.sort(jnp.outer(x, jnp.cos(x)).ravel())[500_000] * config.tau

    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 1000)), jnp.float32)
    in_turn = over_members("x", in_turn=True)(middle)
    at_once = over_members("x")(middle)
    np.testing.assert_allclose(in_turn(CONFIG, x), at_once(CONFIG, x), rtol=1e-6)

    def memory(function, x):
        program = function.program.lower(*split_config(CONFIG), x).compile()
        return program.memory_analysis().temp_size_in_bytes

    alone = memory(at_once, x[:1])
    assert alone >= 4_000_000
    assert memory(in_turn, x) < 1.1 * alone
    assert memory(at_once, x) > 4 * alone


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


# --- Which runs one program can train ---


def may_be_together(some, others, script=cql):
    return in_common(some, script.HOST_FLOATS) == in_common(others, script.HOST_FLOATS)


def numbers(script, config):
    """Return the names of the floats in which members may differ."""
    names = [name for name, value in vars(config).items() if isinstance(value, float)]
    return [name for name in names if name not in script.HOST_FLOATS]


@both_scripts
def test_runs_that_differ_in_seeds_and_numbers_may_be_together(script):
    config = small_config(script)
    changed = {name: getattr(config, name) * 0.9 for name in numbers(script, config)}
    for name, value in changed.items():
        if name.startswith(("actor_", "critic_")):
            changed[name] = 0.0 if value else 0.1
    assert len(changed) > 15
    assert may_be_together(config, replace(config, seed=7, **changed), script)


@both_scripts
def test_runs_that_differ_in_anything_else_may_not(script):
    config = small_config(script, validation_frac=0.1)
    others = dict(
        dataset_sha256="another",
        validation_frac=0.2,
        hidden_dim=32,
        actor_ln=True,
        actor_lr_decay="cosine",
        num_seeds=2,
        num_updates=80,
        eval_noise=(),
        results="elsewhere",
        deterministic=True,
    )
    for name, value in others.items():
        assert getattr(config, name) != value
        assert not may_be_together(config, replace(config, **{name: value}), script), name


def test_a_0_that_means_something_else_keeps_runs_apart():
    config = small_config(cql, lagrange_gap=5.0)
    assert may_be_together(config, replace(config, lagrange_gap=4.0))
    assert not may_be_together(config, replace(config, lagrange_gap=0.0))
    assert not may_be_together(config, replace(config, gap_clip=0.0 if config.gap_clip else 1.0))
    assert not may_be_together(config, replace(config, tau=None))
    assert not may_be_together(config, replace(config, actor_wd=None))
    config = small_config(rebrac)
    assert not may_be_together(config, replace(config, v_min=None), rebrac)
    assert not may_be_together(config, replace(config, gamma=0.5), rebrac)


def test_a_group_has_each_runs_seeds_and_numbers_in_order():
    runs = [replace(CONFIG, seed=4, num_seeds=2, actor_wd=0.0, tau=0.5)]
    runs.append(replace(CONFIG, seed=0, num_seeds=2, actor_wd=0.1, tau=0.5))
    assert stack_configs(runs[:1]) == runs[0]
    both = stack_configs(runs)
    assert both.num_seeds == 4
    assert both.tau == 0.5
    np.testing.assert_array_equal(seeds(both), [4, 5, 0, 1])
    np.testing.assert_array_equal(both.actor_wd, [0.0, 0.0, 0.1, 0.1])
    others = dict(num_seeds=2, seed=0, actor_wd=0.0)
    assert replace(both, **others) == replace(runs[0], **others)
    static, traced = split_config(both)
    assert static.actor_wd is None
    assert set(traced) - set(split_config(runs[0])[1]) == {"actor_wd"}


@both_scripts
def test_making_the_dataset_reads_no_number_in_which_members_differ(script):
    one = small_config(script)
    changed = {name: getattr(one, name) * 0.9 + 0.01 for name in numbers(script, one)}
    both = stack_configs([one, replace(one, **changed)])
    assert np.ndim(both.actor_wd) == 1
    raw = random_columns(0)
    expected = script.make_dataset(one, raw)
    assert same_bits(script.make_dataset(both, raw), expected)
    if script is rebrac:
        for config in (one, both):
            open_range = replace(config, v_min=None, v_max=None)
            found = script.with_value_range(open_range, expected)
            assert found.v_min == expected_range(expected, config.gamma)


def expected_range(data, gamma):
    """Return the smallest return to go."""
    lowest = np.inf
    ends = data["ends"] | data["terminals"]
    total = 0.0
    for reward, end in zip(data["rewards"][::-1].tolist(), ends[::-1]):
        total = reward + (0.0 if end else gamma * total)
        lowest = min(lowest, total)
    return lowest


# --- A member ends where it would alone ---


@both_scripts
def test_a_traced_0_is_exactly_off(script):
    """It is in the program of a group that mixes 0 and other strengths."""
    config = small_config(script, actor_layers=1, critic_layers=1)
    named = [name for name in numbers(script, config) if name.startswith(("actor_", "critic_"))]
    strengths = [name for name in named if getattr(config, name) == 0]
    assert len(strengths) >= 10
    assert_off(script, config, strengths)
    ratios = ["actor_l1_ratio", "critic_l1_ratio"]
    assert_off(script, replace(config, actor_wd=0.1, critic_wd=0.1), ratios)
    coefs = [name for name in named if name.endswith("_coef")]
    if coefs:  # such as actor_q_coef
        assert_off(script, replace(config, **dict.fromkeys(coefs, 0.0)), coefs)


def assert_off(script, config, names):
    """Hold updates with some traced numbers against those where they are a static 0.

    They aren't compiled, since a compiled program's other operations would be rounded otherwise.
    """
    traced = replace(config, **dict.fromkeys(names, jnp.float32(0)))
    batch = small_batch(8)
    if hasattr(config, "policy_freq"):
        batch = jax.tree.map(lambda x: jnp.stack([x] * config.policy_freq), batch)
    expected = found = small_state(script, config)
    for _ in range(2):
        expected, expected_infos = script.update(config, expected, batch)
        found, infos = script.update(traced, found, batch)
    assert same_bits(to_numpy(found), to_numpy(expected))
    assert same_bits(infos, expected_infos)


STRONG = dict(
    dropout=0.2,
    wd=0.1,
    l1_ratio=0.5,
    input_noise=0.1,
    bc_noise=0.1,
    grad_noise=0.1,
    sam=0.05,
)


def mixed_members(script):
    """Return members that differ in the seed and in each number; the second has no regulariser.

    The numbers are those that float32 has. In float64 a Python float times float32, such as gamma
    times the terminals, would else be rounded, and times an array of NumPy's not.
    """
    config = small_config(script, num_updates=200, log_every=200, actor_layers=1, critic_layers=1)
    members = []
    for i in range(3):
        changed = {}
        for name in numbers(script, config):
            value = getattr(config, name) * (1 - 0.05 * i)
            if name.startswith(("actor_", "critic_")) and value == 0:
                strong = STRONG[name.split("_", 1)[1]] * (1 + 0.5 * i)
                value = 0.0 if i == 1 else strong
            changed[name] = float(np.float32(value))
        members.append(replace(config, seed=5 + 3 * i, **changed))
    return members


def networks(state):
    """Return each network's variables as one vector: {"critic/params": ..., ...}.

    A layer alone may be so small, by its weight decay, that 1e-5 of it is less than rounding.
    """
    found = {}
    for path, array in flatten(state).items():
        name, collection, *_ = [*path.split("/"), ""]
        if collection in ("params", "batch_stats"):
            found.setdefault(f"{name}/{collection}", []).append(array.ravel())
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def check_networks(state, expected_state, bound):
    """Check that each network is the expected one, to a bound relative to its size."""
    found = networks(state)
    for name, expected in networks(expected_state).items():
        assert found[name].dtype == expected.dtype
        distance = np.linalg.norm(found[name] - expected)
        assert distance <= bound * np.linalg.norm(expected), name


def train_members(script, config, bits):
    """Train an epoch in numbers of 32 or 64 bits; return the members' states, and infos."""
    with jax.enable_x64(bits == 64):
        data = small_data()
        states = init_all(script, config, data)
        if bits == 64:
            data = widen(data)
            states = widen(states)
        states, infos = script.epoch(config, states, data)
        return to_numpy(states), infos


SLOW_CASES = [pytest.param(name, 32, 1e-4, marks=pytest.mark.slow) for name in ("rebrac", "bcq")]


@pytest.mark.parametrize("name, bits, bound", [*((name, 64, 1e-12) for name in OURS), *SLOW_CASES])
def test_a_member_ends_where_it_would_alone(name, bits, bound):
    """With 64 bits rounding hides nothing. Real runs have 32, and processors round differently."""
    script = OURS[name]
    members = mixed_members(script)
    states, infos = train_members(script, stack_configs(members), bits)
    assert jax.tree.leaves(states.actor)[0].dtype == f"float{bits}"
    for i, member in enumerate(members):
        alone, infos_alone = train_members(script, member, bits)
        np.testing.assert_array_equal(states.key[i], alone.key[0])
        check_networks(of_seed(states, i), of_seed(alone, 0), bound)
        for key, values in infos.items():
            # The batches are those of the same random numbers
            np.testing.assert_allclose(values[i][:2], infos_alone[key][0][:2], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("actors, critics", [("gn", "fn"), ("sn", "bn"), ("bn", "rms")])
def test_a_member_with_norms_ends_where_it_would_alone(actors, critics):
    """In 64 bits, since in 32 BatchNorm makes much of how a processor rounds."""
    hidden_dim = 64 if actors == "gn" else 16  # 32 groups of two units or more
    flags = {"hidden_dim": hidden_dim, f"actor_{actors}": True, f"critic_{critics}": True}
    config = small_config(iql, num_updates=200, log_every=200, actor_layers=1, **flags)
    members = [config, replace(config, seed=config.seed + 3, actor_dropout=0.5)]
    states, _ = train_members(iql, stack_configs(members), 64)
    for i, member in enumerate(members):
        alone, _ = train_members(iql, member, 64)
        check_networks(of_seed(states, i), of_seed(alone, 0), 1e-10)
