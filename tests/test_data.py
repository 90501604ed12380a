"""What is learnt from: D4RL's files, their transitions and episodes, and files that are wrong."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    BUNDLED,
    ROOT,
    both_scripts,
    init_states,
    random_columns,
    same_bits,
    small_config,
    small_data,
    to_numpy,
)

import rebrac
from harness.datasets import episode_ends, episode_returns, read_dataset
from harness.environments import d4rl, make_env
from harness.errors import UserError

CONFIG = rebrac.tuned(rebrac.Config())


@pytest.fixture
def read(cheetah, write_dataset):
    """Write columns to a file, and return what is read of it."""

    def read(columns):
        return read_dataset(write_dataset(**columns), cheetah)

    return read


def training_transitions(data):
    """Return the transitions to train on, as NumPy arrays."""
    arrays = {key: np.asarray(value) for key, value in data.items()}
    return rebrac.transitions(arrays, arrays["train"])


def assert_are_d4rls(transitions, theirs):
    """Hold transitions against those of D4RL's qlearning_dataset."""
    assert len(theirs) == 5
    for key, column in theirs.items():
        np.testing.assert_array_equal(getattr(transitions, key), column)


# --- Transitions ---


def slow_transitions(columns):
    """Return, row by row, the transitions of the steps that qlearning_dataset keeps."""
    rows = []
    for i in range(len(columns["rewards"]) - 1):
        if columns["timeouts"][i]:
            continue
        done = columns["terminals"][i]
        rows.append(
            rebrac.Transitions(
                observations=columns["observations"][i],
                actions=columns["actions"][i],
                rewards=columns["rewards"][i],
                next_observations=columns["observations"][i + 1],
                next_actions=columns["actions"][i if done else i + 1],
                terminals=float(done),
            )
        )
    return [np.array(column) for column in zip(*rows)]


@pytest.mark.parametrize("seed", range(5))
def test_transitions_are_d4rls_and_those_of_a_loop_over_rows(cheetah, read, seed):
    columns = random_columns(seed, ends=0.02 if seed == 4 else 0.3)
    ours = training_transitions(rebrac.make_dataset(CONFIG, read(columns)))
    for array, expected in zip(ours, slow_transitions(columns), strict=True):
        np.testing.assert_array_equal(array, expected)
    assert_are_d4rls(ours, d4rl.qlearning_dataset(cheetah, dataset=columns))


def test_transitions_of_the_bundled_file_are_d4rls(cheetah):
    raw = read_dataset(BUNDLED, cheetah)
    theirs = cheetah.get_dataset(h5path=BUNDLED)
    for key in raw:
        np.testing.assert_array_equal(raw[key], theirs[key])
    ours = training_transitions(rebrac.make_dataset(CONFIG, raw))
    assert_are_d4rls(ours, d4rl.qlearning_dataset(cheetah, dataset=theirs))


@pytest.mark.parametrize("name", ["hopper-medium-replay-v2", "door-expert-v1", "door-human-v1"])
def test_transitions_of_files_in_d4rls_cache_are_d4rls(name):
    env = make_env(name)
    path = env.unwrapped.dataset_filepath
    if not os.path.exists(path):
        pytest.skip("no such file in D4RL_DATASET_DIR")
    config = rebrac.tuned(rebrac.Config(dataset_name=name))
    ours = training_transitions(rebrac.make_dataset(config, read_dataset(path, env)))
    assert_are_d4rls(ours, d4rl.qlearning_dataset(env))


def test_transitions_on_the_device_are_those_in_numpy(read):
    data = rebrac.make_dataset(CONFIG, read(random_columns(0)))
    on_device = {key: jnp.asarray(value) for key, value in data.items()}
    ours = rebrac.transitions(on_device, data["train"])
    for column, expected in zip(ours, training_transitions(data)):
        np.testing.assert_array_equal(column, expected)


def test_next_action_never_crosses_an_episode(read):
    columns = random_columns(0, ends=0.3)
    ends = columns["terminals"] | columns["timeouts"]
    episode = np.cumsum(ends) - ends
    columns["actions"][:] = (episode / 1000)[:, None]  # an action says which episode it's of
    batch = training_transitions(rebrac.make_dataset(CONFIG, read(columns)))
    np.testing.assert_array_equal(batch.next_actions, batch.actions)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_files_last_step_makes_no_transition(read, terminal):
    columns = random_columns(0)
    columns["terminals"][-1] = terminal
    columns["timeouts"][-1] = False
    data = rebrac.make_dataset(CONFIG, read(columns))
    assert data["train"].max() == 198


def test_without_timeouts_an_episode_ends_at_the_time_limit(cheetah, read):
    columns = random_columns(0, size=4500, ends=0)
    del columns["timeouts"]
    columns["terminals"][[700, 2200, 2201]] = True  # of 701, 1000 + 500, 1, 2 x 1000 + 298 steps
    raw = read(columns)
    np.testing.assert_array_equal(np.flatnonzero(raw["timeouts"]), [1700, 3201, 4201])

    columns["terminals"][:] = False  # since D4RL's own count is a step short after a terminal
    ours = training_transitions(rebrac.make_dataset(CONFIG, read(columns)))
    assert_are_d4rls(ours, d4rl.qlearning_dataset(cheetah, dataset=columns))


# --- Training and held-out episodes ---


@pytest.mark.parametrize("frac", [0.05, 0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("seed", [None, 0])
def test_validation_holds_out_whole_episodes(read, frac, seed):
    columns = random_columns(1)
    config = replace(CONFIG, validation_frac=frac, validation_seed=seed)
    data = rebrac.make_dataset(config, read(columns))
    ends = columns["terminals"] | columns["timeouts"]
    episode = np.cumsum(ends) - ends
    train = set(episode[data["train"]])
    held_out = set(episode[data["validation"]])
    assert not train & held_out
    assert 0 < len(held_out) <= round(frac * (episode[-1] + 1))
    if seed is None:  # in the file's order
        assert max(train) < min(held_out)
    everything = rebrac.make_dataset(CONFIG, read(columns))
    assert sorted([*data["train"], *data["validation"]]) == list(everything["train"])
    assert len(everything["validation"]) == 0


@both_scripts
@pytest.mark.parametrize("seed", [None, 7])
def test_d4rls_smallest_files_can_be_split_at_0_9(read, script, seed, capsys):
    columns = random_columns(0, size=250, ends=0)
    columns["timeouts"][9::10] = True  # 25 episodes, as in the four human datasets
    config = script.tuned(script.Config(validation_frac=0.9, validation_seed=seed))
    data = script.make_dataset(config, read(columns))
    assert len(data["train"]) == 3 * 9
    assert len(data["validation"]) == 22 * 9
    assert capsys.readouterr().out.splitlines() == [
        "training on 3 episodes, 27 transitions",
        "held out: 22 episodes, 198 transitions",
    ]


def test_validation_seed_shuffles(read):
    raw = read(random_columns(1))
    parts = []
    for seed in (None, 0, 0, 1):
        config = replace(CONFIG, validation_frac=0.5, validation_seed=seed)
        parts.append(tuple(rebrac.make_dataset(config, raw)["validation"]))
    assert parts[1] == parts[2]
    assert len(set(parts)) == 3


# --- States, rewards, values ---


def test_states_are_normalised_by_the_training_data(read):
    columns = random_columns(2)
    columns["observations"][:, 3] = 7.0  # a constant state does no harm
    config = replace(CONFIG, normalize_states=True, validation_frac=0.3)
    data = rebrac.make_dataset(config, read(columns))
    seen = columns["observations"][data["train"]].astype(np.float64)
    expected = (columns["observations"] - seen.mean(0)) / (seen.std(0) + 1e-3)
    np.testing.assert_allclose(data["observations"], expected, atol=1e-5)
    # By these the policy normalises what it sees in an evaluation
    np.testing.assert_allclose(data["mean"], seen.mean(0), rtol=1e-6)
    np.testing.assert_allclose(data["std"], seen.std(0) + 1e-3, rtol=1e-6)
    plain = rebrac.make_dataset(replace(config, normalize_states=False), read(columns))
    assert (plain["mean"], plain["std"]) == (0, 1)
    np.testing.assert_array_equal(plain["observations"], columns["observations"])


def test_a_million_states_have_their_mean_to_the_last_digit(cheetah):
    """A sum of single precision would be 0.1 % of a standard deviation off."""
    states = 9 + 0.3 * np.random.default_rng(0).normal(size=(1_000_000, 2)).astype(np.float32)
    ends = np.zeros(len(states), bool)
    raw = dict(
        observations=states,
        actions=np.zeros((len(states), 1), np.float32),
        rewards=np.zeros(len(states), np.float32),
        terminals=ends,
        timeouts=ends,
    )
    data = rebrac.make_dataset(replace(CONFIG, normalize_states=True), raw)
    seen = states[:-1].astype(np.float64)
    np.testing.assert_allclose(data["mean"], seen.mean(0), rtol=2e-7)
    np.testing.assert_allclose(data["std"], seen.std(0) + 1e-3, rtol=1e-6)


def test_the_last_of_many_returns_is_as_exact_as_the_first():
    rewards = np.full(3_000_000, 7.3, np.float32)
    timeouts = np.arange(1, len(rewards) + 1) % 1000 == 0
    raw = dict(rewards=rewards, timeouts=timeouts, terminals=np.zeros(len(rewards), bool))
    returns = episode_returns(CONFIG.dataset_name, raw)
    np.testing.assert_allclose(returns, np.full(3000, 1000 * float(rewards[0])), rtol=1e-9)


def returns_of_episodes(columns):
    """Return the returns of the whole episodes, in a loop."""
    returns = []
    total = 0.0
    for reward, end in zip(columns["rewards"], columns["terminals"] | columns["timeouts"]):
        total += reward
        if end:
            returns.append(total)
            total = 0.0
    return returns


def test_rewards_are_scaled_as_the_paper_does(read):
    columns = random_columns(3)
    raw = read(columns)
    rewards = columns["rewards"]
    returns = returns_of_episodes(columns)
    np.testing.assert_allclose(episode_returns(CONFIG.dataset_name, raw), returns, atol=1e-4)
    antmaze = rebrac.tuned(rebrac.Config(dataset_name="antmaze-umaze-v2"))
    scaled = replace(CONFIG, normalize_reward=True)
    for config, scale in ((CONFIG, 1), (antmaze, 100), (scaled, 1000 / np.ptp(returns))):
        data = rebrac.make_dataset(config, raw)
        np.testing.assert_allclose(data["rewards"], scale * rewards, rtol=1e-4)
        np.testing.assert_allclose(data["reward_scale"], scale, rtol=1e-4)


@both_scripts
def test_held_out_steps_are_never_trained_on(script):
    config = small_config(script)
    index = np.arange(50, dtype=np.int32)
    data = {**small_data(), "train": index[:20], "validation": index[20:]}
    other = small_data(seed=1)
    for key in ("observations", "actions", "rewards", "terminals"):
        # Those after a step for training, of which the next state and action are also seen
        other[key][:22] = data[key][:22]
    states = init_states(script, config, data)
    found = []
    for own in (data, {**data, **{key: other[key] for key in other if key != "train"}}):
        trained, _ = script.epoch(config, jax.tree.map(jnp.copy, states), own)
        found.append(to_numpy(trained))
    assert same_bits(*found)


def maze_columns(length=101, count=20, near=40):
    """Return columns as D4RL's AntMaze files have them: half of the trajectories reach the goal.

    There they stay for their last `near` steps, each of them a terminal with a reward of 1.
    """
    rng = np.random.default_rng(0)
    size = length * count
    step = np.arange(size) % length
    trajectory = np.arange(size) // length
    observations = rng.normal(size=(size, 29)).astype(np.float32)
    observations[:, :2] = 0.01 * step[:, None] + 5 * (trajectory % 3)[:, None]
    at_goal = (trajectory % 2 == 0) & (step >= length - near)
    return dict(
        observations=observations,
        actions=rng.uniform(-1, 1, (size, 8)).astype(np.float32),
        rewards=at_goal.astype(np.float32),
        terminals=at_goal,
        timeouts=step == length - 1,
    )


@both_scripts
@pytest.mark.parametrize("seed", [None, 0])
def test_antmazes_trajectories_go_on_at_the_goal(script, seed, capsys):
    raw = maze_columns()
    fields = dict(dataset_name="antmaze-umaze-v2", validation_frac=0.1, validation_seed=seed)
    data = script.make_dataset(script.tuned(script.Config(**fields)), raw)
    assert "training on 18 episodes, 1800 transitions" in capsys.readouterr().out
    trajectory = np.arange(len(raw["rewards"])) // 101
    train = set(trajectory[data["train"]])
    held_out = set(trajectory[data["validation"]])
    assert (len(train), len(held_out), len(train & held_out)) == (18, 2, 0)
    np.testing.assert_array_equal(np.flatnonzero(data["ends"]), 101 * np.arange(1, 21) - 1)
    # The bootstrap ends at each terminal all the same
    batch = script.transitions(data, np.flatnonzero(raw["terminals"] & ~raw["timeouts"]))
    assert np.all(batch.terminals == 1)


def test_antmazes_returns_count_the_first_success():
    raw = maze_columns()
    returns = episode_returns("antmaze-umaze-v2", raw)
    np.testing.assert_array_equal(returns, [1.0, 0.0] * 10)


def test_an_antmaze_file_may_also_begin_anew_after_the_goal():
    """As files do that were made by evaluation: a terminal, and then the start again."""
    raw = maze_columns(near=1)
    raw["timeouts"] &= ~raw["terminals"]
    ends = episode_ends("antmaze-umaze-v2", raw)
    np.testing.assert_array_equal(np.flatnonzero(ends), 101 * np.arange(1, 21) - 1)


def test_value_range_of_antmaze_ends_at_each_terminal():
    raw = maze_columns()
    config = rebrac.tuned(rebrac.Config(dataset_name="antmaze-umaze-v2"))
    data = rebrac.make_dataset(config, raw)
    config = rebrac.with_value_range(replace(config, v_min=None, v_max=None), data)
    assert (config.v_min, config.v_max) == (0, 100)  # and not 100 for each step at the goal


def test_value_range_is_that_of_the_discounted_returns(read):
    columns = random_columns(4)
    data = rebrac.make_dataset(CONFIG, read(columns))
    ends = columns["terminals"] | columns["timeouts"]
    returns = []
    following = 0.0
    for reward, end in zip(columns["rewards"][::-1], ends[::-1]):
        following = reward + 0.9 * following * (not end)
        returns.append(following)
    config = rebrac.with_value_range(replace(CONFIG, gamma=0.9), data)
    assert config.v_min == pytest.approx(min(returns), rel=1e-5)
    assert config.v_max == pytest.approx(max(returns), rel=1e-5)
    config = rebrac.with_value_range(replace(CONFIG, gamma=0.9, v_min=-7.0), data)
    assert config.v_min == -7.0
    assert config.v_max == pytest.approx(max(returns), rel=1e-5)


# --- Files that can't be learnt from ---


def change(key, function):
    """Return what replaces a column by a function of it."""

    def apply(columns):
        columns[key] = function(columns[key])

    return apply


def with_value(value, row=5):
    """Return what puts a value into a row of a column."""

    def put(column):
        column = column.astype(np.float64)
        column[row] = value
        return column

    return put


def without_ends(columns):
    columns["terminals"][:] = False
    columns["timeouts"][:] = False


BAD_COLUMNS = {
    "has no 'rewards'": lambda columns: columns.pop("rewards"),
    "200 observations but 150 actions": change("actions", lambda column: column[:150]),
    r"observations .* shape \(200, 11\), but \(N, 17\)": change(
        "observations", lambda column: column[:, :11]
    ),
    r"actions .* shape \(200, 3\), but \(N, 6\)": change("actions", lambda column: column[:, :3]),
    r"rewards .* shape \(200, 2\), but": change(
        "rewards", lambda column: np.stack([column, column], 1)
    ),
    "observations .* NaN or infinite in row 5": change("observations", with_value(np.nan)),
    "rewards .* NaN or infinite in row 5": change("rewards", with_value(np.inf)),
    "rewards .* NaN or infinite in row 6": change("rewards", with_value(1e300, row=6)),
    r"terminals .* shape \(\), but": change("terminals", lambda column: True),
    "actions .* not numbers but complex": change("actions", lambda column: column + 1j),
    "actions .* reach 1.5": change("actions", with_value(1.5)),
    "actions .* reach 1.001 in": change("actions", with_value(1.001)),
    "no whole episode": without_ends,
    "rewards .* not numbers": change("rewards", lambda column: np.array([b"x"] * len(column))),
}


@pytest.mark.parametrize("message", BAD_COLUMNS)
def test_a_bad_column_gets_one_clear_line(read, message):
    columns = random_columns(0)
    BAD_COLUMNS[message](columns)
    with pytest.raises(UserError, match=message) as error:
        read(columns)
    assert "\n" not in str(error.value)


def test_data_without_anything_to_learn_get_one_clear_line(read):
    columns = random_columns(0)
    raw = read({**columns, "timeouts": np.ones(200, bool)})
    with pytest.raises(UserError, match="no transition to train on"):
        rebrac.make_dataset(CONFIG, raw)
    raw = read({**columns, "rewards": np.zeros(200)})
    with pytest.raises(UserError, match="all episodes have the same return"):
        rebrac.make_dataset(replace(CONFIG, normalize_reward=True), raw)
    data = rebrac.make_dataset(CONFIG, raw)
    with pytest.raises(UserError, match="no value is between 0 and 0; set v_min and v_max"):
        rebrac.with_value_range(CONFIG, data)


def test_an_empty_support_gets_one_clear_line(read):
    data = rebrac.make_dataset(CONFIG, read(random_columns(0)))
    config = replace(CONFIG, v_min=1e6)
    with pytest.raises(UserError, match="no value is between 1e\\+06 and"):
        rebrac.with_value_range(config, data)
    rebrac.with_value_range(replace(config, critic_loss="mse"), data)  # which has none


@pytest.mark.parametrize(
    "words, message",
    [
        ("--dataset_name hoper-medium-v2", "nearest names are hopper-medium-v2"),
        ("--dataset_path nowhere.hdf5", "there is no file nowhere.hdf5"),
        (
            f"--dataset_path {BUNDLED} --validation_frac 0.001",
            "validation_frac 0.001 holds out 0 of 80",
        ),
    ],
    ids=["dataset_name", "dataset_path", "validation_frac"],
)
def test_errors_reach_the_screen_as_one_line_before_any_work(tmp_path, words, message):
    command = [sys.executable, "rebrac.py", "--results", str(tmp_path), *words.split()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert message in run.stderr
