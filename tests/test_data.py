"""What is learnt from: D4RL's files, their transitions, their episodes, and every way in which a file can be wrong."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace

import h5py
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BUNDLED, ROOT, random_columns

import iql
import rebrac
import tasks
from mujoco210 import d4rl

CONFIG = rebrac.tuned(rebrac.Config())


def all_transitions(data, part="train"):
    arrays = {key: np.asarray(value) for key, value in data.items()}
    return rebrac.transitions(arrays, arrays[part])


def raw_from(columns, env, write_dataset):
    return tasks.read_dataset(write_dataset(**columns), env)


def slow_transitions(columns):
    """Row by row: (s, a, r, s', a', d) of the steps that D4RL's qlearning_dataset keeps."""
    rows = []
    for i in range(len(columns["rewards"]) - 1):
        if columns["timeouts"][i]:
            continue
        done = bool(columns["terminals"][i])
        next_action = columns["actions"][i if done else i + 1]
        rows.append(
            (columns["observations"][i], columns["actions"][i], columns["rewards"][i], columns["observations"][i + 1])
            + (next_action, float(done))
        )
    return [np.array(column) for column in zip(*rows)]


@pytest.mark.parametrize("seed", range(5))
def test_transitions_are_d4rls_and_those_of_a_loop_over_rows(cheetah, write_dataset, seed):
    columns = random_columns(seed, ends=0.02 if seed == 4 else 0.3)
    raw = raw_from(columns, cheetah, write_dataset)
    ours = all_transitions(rebrac.make_dataset(CONFIG, raw))
    for array, expected in zip(ours, slow_transitions(columns)):
        np.testing.assert_array_equal(array, expected)
    theirs = d4rl.qlearning_dataset(cheetah, dataset=columns)
    for key in theirs:
        np.testing.assert_array_equal(getattr(ours, key), theirs[key])


def test_transitions_of_the_bundled_file_are_d4rls(cheetah):
    theirs = cheetah.get_dataset(h5path=BUNDLED)
    raw = tasks.read_dataset(BUNDLED, cheetah)
    for key in raw:
        np.testing.assert_array_equal(raw[key], theirs[key])
    ours = all_transitions(rebrac.make_dataset(CONFIG, raw))
    theirs = d4rl.qlearning_dataset(cheetah, dataset=theirs)
    for key in theirs:
        np.testing.assert_array_equal(getattr(ours, key), theirs[key])


@pytest.mark.parametrize("name", ["hopper-medium-replay-v2", "door-expert-v1", "door-human-v1"])
def test_transitions_of_files_in_d4rls_cache_are_d4rls(name):
    env = tasks.make_env(name)
    if not os.path.exists(env.unwrapped.dataset_filepath):
        pytest.skip("no such file in D4RL_DATASET_DIR")
    raw = tasks.read_dataset(env.unwrapped.dataset_filepath, env)
    ours = all_transitions(rebrac.make_dataset(rebrac.tuned(rebrac.Config(dataset_name=name)), raw))
    theirs = d4rl.qlearning_dataset(env)
    for key in theirs:
        np.testing.assert_array_equal(getattr(ours, key), theirs[key])


def test_next_action_never_crosses_an_episode(cheetah, write_dataset):
    columns = random_columns(0, ends=0.3)
    episode = np.concatenate([[0], np.cumsum(columns["terminals"] | columns["timeouts"])[:-1]])
    columns["actions"][:] = (episode / 1000)[:, None]  # an action says which episode it's of
    batch = all_transitions(rebrac.make_dataset(CONFIG, raw_from(columns, cheetah, write_dataset)))
    np.testing.assert_array_equal(batch.next_actions, batch.actions)


def test_the_files_last_step_has_no_successor_and_makes_no_transition(cheetah, write_dataset):
    for terminal in (False, True):
        columns = random_columns(0)
        columns["terminals"][-1], columns["timeouts"][-1] = terminal, False
        data = rebrac.make_dataset(CONFIG, raw_from(columns, cheetah, write_dataset))
        assert data["train"].max() == 198


def test_two_million_transitions_need_no_loop_over_rows(cheetah):
    columns = random_columns(0, size=2_000_000, ends=0.002)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        all_transitions(rebrac.make_dataset(CONFIG, columns))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2


def test_without_timeouts_an_episode_ends_at_the_time_limit(cheetah, write_dataset):
    columns = random_columns(0, size=4500, ends=0)
    columns["terminals"][[700, 2200, 2201]] = True  # episodes: 701, 1000, 500, 1, 1000, 1000, 298 steps
    del columns["timeouts"]
    raw = raw_from(columns, cheetah, write_dataset)
    np.testing.assert_array_equal(np.flatnonzero(raw["timeouts"]), [1700, 3201, 4201])

    columns["terminals"][:] = False  # D4RL's own count is one step short after a terminal, so it's compared without
    ours = all_transitions(rebrac.make_dataset(CONFIG, raw_from(columns, cheetah, write_dataset)))
    theirs = d4rl.qlearning_dataset(cheetah, dataset=columns)
    for key in theirs:
        np.testing.assert_array_equal(getattr(ours, key), theirs[key])


@pytest.mark.parametrize("frac", [0.05, 0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("seed", [None, 0])
def test_validation_holds_out_whole_episodes(cheetah, write_dataset, frac, seed):
    columns = random_columns(1)
    config = rebrac.replace(CONFIG, validation_frac=frac, validation_seed=seed)
    data = rebrac.make_dataset(config, raw_from(columns, cheetah, write_dataset))
    ends = columns["terminals"] | columns["timeouts"]
    episode = np.cumsum(ends) - ends
    train, held_out = set(episode[data["train"]]), set(episode[data["validation"]])
    assert not train & held_out
    assert len(held_out) <= round(frac * (episode[-1] + 1)) and len(held_out) > 0
    if seed is None:  # in the file's order
        assert max(train) < min(held_out)
    everything = rebrac.make_dataset(CONFIG, raw_from(columns, cheetah, write_dataset))
    assert sorted([*data["train"], *data["validation"]]) == list(everything["train"])
    assert len(everything["validation"]) == 0


@pytest.mark.parametrize("script", [rebrac, iql])
def test_as_few_episodes_as_d4rls_smallest_files_have_can_be_split_at_0_9(cheetah, write_dataset, script, capsys):
    columns = random_columns(0, size=250, ends=0)
    columns["timeouts"][9::10] = True  # 25 episodes, as in the four human datasets
    config = replace(script.tuned(script.Config()), validation_frac=0.9)
    data = script.make_dataset(config, raw_from(columns, cheetah, write_dataset))
    assert (len(data["train"]), len(data["validation"])) == (3 * 9, 22 * 9)
    assert capsys.readouterr().out == "training on 3 episodes, 27 transitions; held out: the last 22, 198 transitions\n"
    script.make_dataset(replace(config, validation_seed=7), raw_from(columns, cheetah, write_dataset))
    assert "held out: by validation_seed 7, 22, 198 transitions" in capsys.readouterr().out


def test_validation_seed_shuffles(cheetah, write_dataset):
    raw = raw_from(random_columns(1), cheetah, write_dataset)
    parts = [
        tuple(rebrac.make_dataset(rebrac.replace(CONFIG, validation_frac=0.5, validation_seed=s), raw)["validation"])
        for s in (None, 0, 0, 1)
    ]
    assert parts[1] == parts[2] and len(set(parts)) == 3


def test_states_are_normalised_by_the_training_data(cheetah, write_dataset):
    columns = random_columns(2)
    columns["observations"][:, 3] = 7.0  # a constant state does no harm
    config = rebrac.replace(CONFIG, normalize_states=True, validation_frac=0.3)
    data = rebrac.make_dataset(config, raw_from(columns, cheetah, write_dataset))
    seen = columns["observations"][data["train"]].astype(np.float64)
    expected = (columns["observations"] - seen.mean(0)) / (seen.std(0) + 1e-3)
    np.testing.assert_allclose(data["observations"], expected, atol=1e-5)


def test_rewards_are_scaled_as_the_paper_does(cheetah, write_dataset):
    columns = random_columns(3)
    raw = raw_from(columns, cheetah, write_dataset)
    antmaze = rebrac.tuned(rebrac.Config(dataset_name="antmaze-umaze-v2"))
    np.testing.assert_allclose(rebrac.make_dataset(antmaze, raw)["rewards"], 100 * columns["rewards"], rtol=1e-6)
    np.testing.assert_array_equal(rebrac.make_dataset(CONFIG, raw)["rewards"], columns["rewards"])
    returns, total = [], 0.0
    for reward, end in zip(columns["rewards"], columns["terminals"] | columns["timeouts"]):
        total += reward
        if end:
            returns, total = returns + [total], 0.0
    np.testing.assert_allclose(tasks.episode_returns(raw), returns, atol=1e-4)
    scaled = rebrac.make_dataset(rebrac.replace(CONFIG, normalize_reward=True), raw)["rewards"]
    np.testing.assert_allclose(scaled, columns["rewards"] * 1000 / (max(returns) - min(returns)), rtol=1e-4)


def test_value_range_is_that_of_the_discounted_returns(cheetah, write_dataset):
    columns = random_columns(4)
    data = rebrac.make_dataset(CONFIG, raw_from(columns, cheetah, write_dataset))
    returns, following = [], 0.0
    for reward, end in zip(columns["rewards"][::-1], (columns["terminals"] | columns["timeouts"])[::-1]):
        following = reward + 0.9 * following * (not end)
        returns.append(following)
    config = rebrac.with_value_range(rebrac.replace(CONFIG, gamma=0.9), data)
    np.testing.assert_allclose((config.v_min, config.v_max), (min(returns), max(returns)), rtol=1e-5)
    assert rebrac.with_value_range(rebrac.replace(CONFIG, v_min=-7.0), data).v_min == -7.0


# --- Files that can't be learnt from ---


def change(key, value):
    def apply(columns):
        columns[key] = value(columns[key])

    return apply


def with_value(value, row=5):
    def apply(column):
        column = column.copy()
        column[row] = value
        return column

    return apply


BAD_COLUMNS = {
    "has no 'rewards'": lambda columns: columns.pop("rewards"),
    "200 observations but 150 actions": change("actions", lambda column: column[:150]),
    r"observations .* shape \(200, 11\), but \(N, \*\(17,\)\)": change("observations", lambda column: column[:, :11]),
    r"actions .* shape \(200, 3\), but \(N, \*\(6,\)\)": change("actions", lambda column: column[:, :3]),
    r"rewards .* shape \(200, 2\), but": change("rewards", lambda column: np.stack([column, column], 1)),
    "observations .* NaN or infinite in row 5": change("observations", with_value(np.nan)),
    "rewards .* NaN or infinite in row 5": change("rewards", with_value(np.inf)),
    "rewards .* NaN or infinite in row 6": change("rewards", lambda c: with_value(1e300, 6)(c.astype(np.float64))),
    r"terminals .* shape \(\), but": change("terminals", lambda column: True),
    "actions .* not numbers but complex": change("actions", lambda column: column + 1j),
    "actions .* reach 1.5": change("actions", with_value(1.5)),
    "no whole episode": lambda columns: [columns[key].fill(False) for key in ("terminals", "timeouts")],
    "not numbers": change("rewards", lambda column: np.array([b"x"] * len(column))),
}


@pytest.mark.parametrize("message", BAD_COLUMNS)
def test_a_bad_column_gets_one_clear_line(cheetah, write_dataset, message):
    columns = random_columns(0)
    BAD_COLUMNS[message](columns)
    with pytest.raises(SystemExit, match=message) as error:
        tasks.read_dataset(write_dataset(**columns), cheetah)
    assert "\n" not in str(error.value)


def test_data_that_nothing_can_be_learnt_from_get_one_clear_line(cheetah, write_dataset):
    columns = random_columns(0)
    all_timeouts = {**columns, "timeouts": np.ones(200, bool)}
    with pytest.raises(SystemExit, match="no transition to train on"):
        rebrac.make_dataset(CONFIG, raw_from(all_timeouts, cheetah, write_dataset))
    equal_returns = {**columns, "rewards": np.zeros(200)}
    with pytest.raises(SystemExit, match="all episodes have the same return"):
        rebrac.make_dataset(
            rebrac.replace(CONFIG, normalize_reward=True), raw_from(equal_returns, cheetah, write_dataset)
        )
    data = rebrac.make_dataset(CONFIG, raw_from(equal_returns, cheetah, write_dataset))
    with pytest.raises(SystemExit, match="the values' support, 0 to 0, is empty"):
        rebrac.with_value_range(CONFIG, data)
    with pytest.raises(SystemExit, match="is empty"):
        rebrac.with_value_range(rebrac.replace(CONFIG, v_min=1e6), dict(data, rewards=columns["rewards"]))
    with pytest.raises(SystemExit, match="is empty"):
        rebrac.with_value_range(rebrac.replace(CONFIG, v_expand=-1.0), dict(data, rewards=columns["rewards"]))


def test_a_bad_file_gets_one_clear_line(cheetah, write_dataset, tmp_path):
    with pytest.raises(SystemExit, match="no file"):
        tasks.read_dataset(str(tmp_path / "nowhere.hdf5"), cheetah)
    whole = write_dataset(**random_columns(0))
    for size in (0, 100, os.path.getsize(whole) // 2, os.path.getsize(whole) - 1):
        cut = str(tmp_path / "cut.hdf5")
        shutil.copy(whole, cut)
        os.truncate(cut, size)
        with pytest.raises(SystemExit, match="not a whole HDF5 file"):
            tasks.read_dataset(cut, cheetah)
    (tmp_path / "foreign.hdf5").write_text("not HDF5 at all")
    with pytest.raises(SystemExit, match="not a whole HDF5 file"):
        tasks.read_dataset(str(tmp_path / "foreign.hdf5"), cheetah)
    with h5py.File(tmp_path / "groups.hdf5", "w") as file:
        file.create_group("observations")
    with pytest.raises(SystemExit, match="not a whole HDF5 file"):
        tasks.read_dataset(str(tmp_path / "groups.hdf5"), cheetah)


@pytest.mark.parametrize("name, nearest", [("hopper-medum-v2", "hopper-medium-v2"), ("door-expert", "door-expert-v1")])
def test_an_unknown_dataset_names_the_nearest(name, nearest):
    with pytest.raises(SystemExit, match=f"unknown dataset.*{nearest}"):
        rebrac.tuned(rebrac.Config(dataset_name=name))


def test_errors_reach_the_screen_as_one_line_before_any_work(tmp_path):
    for arguments, message in [
        (["--dataset_name", "hoper-medium-v2"], "nearest names are hopper-medium-v2"),
        (["--dataset_path", str(tmp_path / "none.hdf5")], "there is no file"),
        (["--dataset_path", BUNDLED, "--validation_frac", "0.001"], "validation_frac 0.001 of 80 episodes"),
    ]:
        command = [sys.executable, "rebrac.py", "--results", str(tmp_path), *arguments]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 1 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
        assert message in run.stderr


# --- Downloads ---


@pytest.fixture
def server():
    """A web server on loopback that serves `whole`, `cut` only in part, and `chunked` without saying how much."""
    content = open(BUNDLED, "rb").read()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.close_connection = True
            if "missing" in self.path:
                return self.send_error(404)
            self.send_response(200)
            if "chunked" in self.path:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                return self.wfile.write(b"%x\r\n" % len(content) + content[: len(content) // 2])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2 if "cut" in self.path else None])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def download(monkeypatch, tmp_path):
    """Asks for the dataset of a D4RL environment whose URL is another one."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(d4rl.offline_env, "DATASET_PATH", str(cache))

    def download(url):
        env = tasks.make_env("halfcheetah-medium-replay-v2")
        env.unwrapped._wrapped_env.dataset_url = url
        return tasks.dataset_file(CONFIG, env)

    download.cache = cache
    return download


@pytest.mark.parametrize("name", ["cut.hdf5", "chunked.hdf5", "missing.hdf5"])
def test_a_failed_download_names_the_url_and_leaves_nothing(server, download, name):
    with pytest.raises(SystemExit, match=f"{server}/{name}.*put it at {download.cache}/{name}"):
        download(f"{server}/{name}")
    assert os.listdir(download.cache) == []


def test_no_server_names_the_url(download):
    with pytest.raises(SystemExit, match="can't download http://127.0.0.1:9/file.hdf5"):
        download("http://127.0.0.1:9/file.hdf5")


def test_two_processes_that_download_at_once_leave_one_whole_file(server, tmp_path):
    code = (
        "import rebrac, tasks; env = tasks.make_env('halfcheetah-medium-replay-v2')\n"
        f"env.unwrapped._wrapped_env.dataset_url = '{server}/whole.hdf5'\n"
        "tasks.dataset_file(rebrac.Config(), env)"
    )
    environment = {**os.environ, "D4RL_DATASET_DIR": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert os.listdir(tmp_path) == ["whole.hdf5"]
    assert (tmp_path / "whole.hdf5").read_bytes() == open(BUNDLED, "rb").read()


def test_a_file_put_by_hand_is_not_downloaded(download):
    (download.cache / "file.hdf5").write_bytes(b"")
    assert download("http://127.0.0.1:9/file.hdf5") == str(download.cache / "file.hdf5")


def test_transitions_on_the_device_are_those_in_numpy(cheetah, write_dataset):
    data = rebrac.make_dataset(CONFIG, raw_from(random_columns(0), cheetah, write_dataset))
    on_device = rebrac.transitions({key: jnp.asarray(value) for key, value in data.items()}, data["train"])
    for ours, expected in zip(on_device, all_transitions(data)):
        np.testing.assert_array_equal(ours, expected)
