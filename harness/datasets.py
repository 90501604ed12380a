"""D4RL's dataset files."""

import http.client
import os
import socket
import statistics
import tempfile
import urllib.request
import zlib

import h5py
import numpy as np

from harness.environments import d4rl, make_env
from harness.errors import UserError

DOMAINS = {"gym": "Gym-MuJoCo", "antmaze": "AntMaze", "adroit": "Adroit"}
ADROIT = ("pen", "door", "hammer", "relocate")


def domain(name):
    """Return a dataset's domain, a key of DOMAINS. What is not AntMaze or Adroit is gym."""
    task = name.split("-")[0]
    if task == "antmaze":
        return "antmaze"
    return "adroit" if task in ADROIT else "gym"


def tuned_values(table, name):
    """Return a dataset's row of a table, or for one that isn't in it its domain's default.

    A default is the lower median over the domain's datasets, column by column.
    """
    if name in table:
        return table[name]
    rows = [row for other, row in table.items() if domain(other) == domain(name)]
    return {key: statistics.median_low(row[key] for row in rows) for key in rows[0]}


def load_dataset(config):
    """Return the arrays of the config's dataset, and print a line about it."""
    env = make_env(config.dataset_name)
    raw = read_dataset(dataset_file(config, env), env)
    name = config.dataset_name
    scores = normalized_score(name, episode_returns(name, raw))
    print(
        f"{config.dataset_name}: {len(raw['rewards'])} steps, {len(scores)} whole episodes, "
        f"whose score is {scores.mean():.1f} on average and {scores.max():.1f} at best"
    )
    return raw


def dataset_file(config, env):
    """Return the path of the dataset's file. Download it to D4RL's own cache if it isn't there."""
    if config.dataset_path is not None:
        return config.dataset_path
    url = env.unwrapped.dataset_url
    path = env.unwrapped.dataset_filepath
    if not os.path.exists(path):
        print(f"downloading {url} to {path}", flush=True)
        try:
            download(url, path)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"can't download {url} ({error}); get it by hand and put it at {path}, "
                "or use --dataset_path"
            ) from error
    return path


def download(url, path):
    """Download a file, under another name first: one that is cut off never counts as whole."""
    socket.setdefaulttimeout(60)
    try:
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
            partial = os.path.join(folder, "dataset")
            urllib.request.urlretrieve(url, partial)
            os.replace(partial, path)
    finally:
        socket.setdefaulttimeout(None)


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
            f"actions in {path} reach {largest:.3g} in absolute value; D4RL's stay within [-1, 1]"
        )
    return raw


def read_columns(path, keys):
    """Read those of a file's arrays that `keys` names; only timeouts may be missing."""
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}")
    try:
        with h5py.File(path, "r") as file:
            raw = {key: np.asarray(file[key][()]) for key in keys if key in file}
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a whole HDF5 file of D4RL's ({error}); remove it and get it again"
        ) from error
    for key in keys:
        if key not in raw and key != "timeouts":
            raise UserError(f"{path} has no {key!r}; D4RL's files have {', '.join(keys)}")
    return raw


def checked_column(path, env, key, column, shape):
    """Return a file's array as float32 or bool, or raise UserError if it makes no sense."""
    if column.dtype.kind not in "fiub":
        raise UserError(f"{key} in {path} are not numbers but {column.dtype}")
    if shape == () and column.shape[1:] == (1,):
        column = column[:, 0]
    if column.ndim == 0 or column.shape[1:] != shape:
        raise UserError(
            f"{key} in {path} have shape {column.shape}, but (N, *{shape}) in {env.spec.id}"
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
    """Return the undiscounted returns of the whole episodes in a dataset, up to a terminal."""
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


def fingerprint(data):
    """Return a checksum of a dictionary of arrays."""
    checksum = 0
    for key in sorted(data):
        checksum = zlib.crc32(np.ascontiguousarray(data[key]), checksum)
    return checksum
