"""Files in and out, which is not the algorithm: D4RL's datasets."""

import os
import socket
import sys
import tempfile
import urllib.request

import h5py
import numpy as np

# --- Datasets ---


def dataset_file(config, env):
    """Path of the dataset's file, after a download to D4RL's own cache if it isn't there yet."""
    if config.dataset_path is not None:
        return config.dataset_path
    url, path = env.unwrapped.dataset_url, env.unwrapped.dataset_filepath
    if not os.path.exists(path):
        print(f"downloading {url} to {path}", flush=True)
        socket.setdefaulttimeout(60)
        try:  # under a name of this process's own first, so that a file cut off is never taken for a whole one
            with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
                urllib.request.urlretrieve(url, os.path.join(folder, "dataset"))
                os.replace(os.path.join(folder, "dataset"), path)
        except OSError as error:
            sys.exit(
                f"error: can't download {url} ({error}); get it by hand and put it at {path}, or use --dataset_path"
            )
        finally:
            socket.setdefaulttimeout(None)
    return path


def read_dataset(path, env):
    """The arrays of a file in D4RL's HDF5 format, checked against the environment.

    Returns observations (N, S), actions (N, A), rewards (N,) as float32, and terminals, timeouts (N,) as bool. Without
    timeouts in the file, as in D4RL's oldest, an episode ends at a terminal or at the environment's time limit.
    """
    if not os.path.isfile(path):
        sys.exit(f"error: there is no file {path}")
    shapes = dict(
        observations=env.observation_space.shape,
        actions=env.action_space.shape,
        rewards=(),
        terminals=(),
        timeouts=(),
    )
    try:
        with h5py.File(path, "r") as file:
            raw = {key: np.asarray(file[key][()]) for key in shapes if key in file}
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"error: {path} is not a whole HDF5 file of D4RL's ({error}); remove it and get it again")
    for key, shape in shapes.items():
        if key not in raw and key != "timeouts":
            sys.exit(f"error: {path} has no {key!r}; D4RL's files have {', '.join(shapes)}")
        if key not in raw:
            continue
        if not (np.issubdtype(raw[key].dtype, np.number) or raw[key].dtype == bool):
            sys.exit(f"error: {key} in {path} are not numbers but {raw[key].dtype}")
        if shape == () and raw[key].shape[1:] == (1,):
            raw[key] = raw[key][:, 0]
        if raw[key].ndim == 0 or raw[key].shape[1:] != shape:
            sys.exit(f"error: a row of {key} in {path} has shape {raw[key].shape[1:]}, but {shape} in {env.spec.id}")
        if len(raw[key]) != len(raw["observations"]):
            sys.exit(f"error: {path} has {len(raw['observations'])} observations but {len(raw[key])} {key}")
        if not np.isfinite(raw[key]).all():
            row = np.argwhere(~np.isfinite(raw[key]))[0][0]
            sys.exit(f"error: {key} in {path} are NaN or infinite in row {row}")
        raw[key] = raw[key].astype(bool if key in ("terminals", "timeouts") else np.float32, copy=False)
    if "timeouts" not in raw:
        steps, limit = np.arange(len(raw["terminals"])), env._max_episode_steps
        starts = np.maximum.accumulate(np.where(np.append(True, raw["terminals"][:-1]), steps, 0))
        raw["timeouts"] = (steps - starts) % limit == limit - 1
    if not (raw["terminals"] | raw["timeouts"]).any():
        sys.exit(f"error: {path} has no whole episode: none of its steps is a terminal or a timeout")
    if (largest := np.abs(raw["actions"]).max()) > 1 + 1e-4:
        sys.exit(f"error: actions in {path} reach {largest:.3g} in absolute value; D4RL's stay within [-1, 1]")
    return raw
