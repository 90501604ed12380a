"""D4RL's dataset files."""

import dataclasses
import functools
import hashlib
import os
import statistics

import numpy as np

from harness.download import download, known_files
from harness.environments import d4rl, gym, make_env
from harness.errors import UserError
from harness.hdf5 import check_readable, read_columns

DOMAINS = {"gym": "Gym-MuJoCo", "antmaze": "AntMaze", "adroit": "Adroit"}
ADROIT = ("pen", "door", "hammer", "relocate")


def domain(name):
    """Return a dataset's domain, a key of DOMAINS. What is not AntMaze or Adroit is gym."""
    task = name.split("-")[0]
    if task == "antmaze":
        return "antmaze"
    return "adroit" if task in ADROIT else "gym"


def tuned_values(table, name):
    """Return a dataset's row of a table. One that isn't there has its domain's default.

    A default is the lower median over the domain's datasets, column by column.
    """
    if name in table:
        return table[name]
    rows = [row for other, row in table.items() if domain(other) == domain(name)]
    return {key: statistics.median_low(row[key] for row in rows) for key in rows[0]}


def with_checksum(config):
    """Return the config with the checksum of its dataset's file, which is downloaded if need be.

    Raises UserError if the config has another one.
    """
    path = dataset_file(config)
    about = os.stat(path)
    found = checksum(path, about.st_size, about.st_mtime_ns)
    if config.dataset_sha256 not in (None, found):
        raise UserError(
            f"{path} has the SHA-256 {found}, not the config's dataset_sha256 "
            f"{config.dataset_sha256}; get the file that has it, or leave dataset_sha256 out"
        )
    return dataclasses.replace(config, dataset_sha256=found)


@functools.cache  # a sweep has many runs of a file
def checksum(path, size, time):
    """Return a file's SHA-256. `size` and `time` make the cache notice a changed file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_other_file(name, sha256):
    """Return whether a file's checksum is known not to be that of D4RL's file for a dataset."""
    try:
        url = gym.spec(name).kwargs.get("dataset_url") or ""
    except gym.error.Error:  # a run of another checkout, which has this dataset
        return False
    known = known_files().get(os.path.basename(url))
    return bool(known and sha256) and known["sha256"] != sha256


def load_dataset(config):
    """Return the arrays of the config's dataset (see `read_dataset`), and print a line about it.

    Raises UserError if its file isn't there, or has something else.
    """
    env = make_env(config.dataset_name)
    raw = read_dataset(dataset_file(config), env)
    name = config.dataset_name
    scores = normalized_score(name, episode_returns(name, raw))
    other = "; not D4RL's own file" if is_other_file(name, config.dataset_sha256) else ""
    print(
        f"{name}: {len(raw['rewards'])} steps, {len(scores)} whole episodes, whose score is "
        f"{scores.mean():.1f} on average and {scores.max():.1f} at best{other}"
    )
    return raw


def dataset_file(config):
    """Return the path of the dataset's file. Download it to D4RL's own cache if it isn't there."""
    path = config.dataset_path
    if path is None:
        url = gym.spec(config.dataset_name).kwargs.get("dataset_url")
        if url is None:
            raise UserError(f"D4RL has no file for {config.dataset_name}; use --dataset_path")
        path = d4rl.offline_env.filepath_from_url(url)
        if not os.path.exists(path):
            download(url, path)
    check_readable(path)
    return path


def read_dataset(path, env):
    """Read a file in D4RL's HDF5 format, and check it against the environment.

    Returns observations (N, S), actions (N, A) and rewards (N,) as float32, and terminals and
    timeouts (N,) as bool. D4RL's oldest files have no timeouts: there an episode ends at a
    terminal or at the environment's time limit. Raises UserError if the file can't be right.
    """
    shapes = dict(
        observations=env.observation_space.shape,
        actions=env.action_space.shape,
        rewards=(),
        terminals=(),
        timeouts=(),
    )
    raw = read_columns(path, shapes)
    for key in raw:
        raw[key] = checked_column(path, env, key, raw[key], shapes[key])
        if len(raw[key]) != len(raw["observations"]):
            raise UserError(
                f"{path} has {len(raw['observations'])} observations but {len(raw[key])} {key}"
            )
    if "timeouts" not in raw:
        raw["timeouts"] = time_limits(raw["terminals"], env._max_episode_steps)
    if not (raw["terminals"] | raw["timeouts"]).any():
        raise UserError(f"{path} has no whole episode: no step is a terminal or a timeout")
    largest = np.abs(raw["actions"]).max()
    if largest > 1 + 1e-4:
        raise UserError(
            f"actions in {path} reach {largest:.6g} in absolute value; D4RL's stay within [-1, 1]"
        )
    return raw


def checked_column(path, env, key, column, shape):
    """Return a file's array as float32 or bool, or raise UserError if it makes no sense."""
    if column.dtype.kind not in "fiub":
        raise UserError(f"{key} in {path} are not numbers but {column.dtype}")
    if shape == () and column.shape[1:] == (1,):
        column = column[:, 0]
    if column.ndim == 0 or column.shape[1:] != shape:
        expected = ", ".join(["N", *map(str, shape)])
        raise UserError(
            f"{key} in {path} have shape {column.shape}, but ({expected}) in {env.spec.id}"
        )
    with np.errstate(over="ignore"):
        column = column.astype(np.float32, copy=False)
    if not np.isfinite(column).all():
        row = np.argwhere(~np.isfinite(column))[0][0]
        raise UserError(f"{key} in {path} are NaN or infinite in row {row}")
    if key in ("terminals", "timeouts"):
        return column.astype(bool)
    return column


def time_limits(terminals, limit):
    """Return where episodes (N,) end by the time limit, given where they end by a terminal."""
    steps = np.arange(len(terminals))
    is_first = np.append(True, terminals[:-1])
    first_steps = np.maximum.accumulate(np.where(is_first, steps, 0))
    return (steps - first_steps) % limit == limit - 1


def episode_ends(name, raw):
    """Return where a dataset's episodes end, (N,).

    They end at terminals and timeouts. But in AntMaze's files each step near the goal is a
    terminal, while the trajectory goes on until its timeout (D4RL issue 199). There a terminal is
    an end only if the ant is elsewhere in the next step.
    """
    if domain(name) != "antmaze":
        return raw["terminals"] | raw["timeouts"]
    moves = np.diff(raw["observations"][:, :2], axis=0)
    is_elsewhere = np.append(np.linalg.norm(moves, axis=1) > 1, True)  # in metres
    return raw["timeouts"] | (raw["terminals"] & is_elsewhere)


def episode_returns(name, raw):
    """Return each whole episode's undiscounted return, up to its first terminal (AntMaze)."""
    ends = episode_ends(name, raw)
    episode = np.cumsum(ends) - ends  # of each step
    starts = np.append(0, np.flatnonzero(ends) + 1)
    terminals_before = np.cumsum(raw["terminals"]) - raw["terminals"]
    is_over = terminals_before > terminals_before[starts[episode]]
    rewards = np.where(is_over, 0, raw["rewards"])
    return np.diff(np.cumsum(rewards, dtype=np.float64)[ends], prepend=0.0)


def normalized_score(name, returns):
    """Return D4RL's normalised scores of returns, x 100."""
    return 100 * d4rl.get_normalized_score(name, returns)
