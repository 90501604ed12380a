"""What is not the algorithm: checks of a config, and reading D4RL's datasets."""

import dataclasses
import functools
import http.client
import inspect
import os
import re
import socket
import sys
import tempfile
import urllib.request
from unittest import mock

import h5py
import numpy as np
import pyrallis
import yaml

# --- Configs ---


def _strict_bool(value):
    if value not in (False, True):
        raise ValueError("neither true nor false")
    return bool(value)


def _strict_int(value):
    if float(value) % 1:
        raise ValueError("not a whole number")
    return int(float(value))


pyrallis.decode.register(bool, _strict_bool)  # pyrallis itself takes any word for true,
pyrallis.decode.register(int, _strict_int)  # and cuts 0.5 to 0


def parse(config_class):
    """The config that the command line gives; ends the program with one line if a value can't be read."""
    try:  # pyrallis reads the class's source anew for each field, which would take a second
        with mock.patch("inspect.getsource", functools.cache(inspect.getsource)):
            return pyrallis.parse(config_class=config_class)
    except pyrallis.utils.ParsingError as error:
        found = re.search(r"value='(.*)' into field .*\.(\w+)\" of type", str(error))
        if not found:
            sys.exit(f"error: {str(error).splitlines()[0]}")
        kind = next(str(field.type) for field in dataclasses.fields(config_class) if field.name == found[2])
        sys.exit(f"error: {found[2]} can't be {found[1]!r}; it is of type {re.search('float|int|bool|str', kind)[0]}")
    except (OSError, yaml.YAMLError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


BOUNDS = {  # of the fields that either script has
    "1 or more": "num_seeds num_updates log_every eval_every eval_episodes batch_size policy_freq hidden_dim "
    "actor_layers critic_layers n_classes",
    "0 or more": "seed validation_seed actor_wd critic_wd actor_learning_rate critic_learning_rate actor_input_noise "
    "actor_bc_noise actor_grad_noise critic_grad_noise target_noise noise_clip sigma_frac actor_bc_coef critic_bc_coef "
    "actor_q_coef temperature max_weight",
    "at least 0 and below 1": "actor_dropout critic_dropout validation_frac",
    "between 0 and 1": "actor_l1_ratio critic_l1_ratio gamma tau expectile",
}
HOLDS = dict(zip(BOUNDS, [lambda x: x >= 1, lambda x: x >= 0, lambda x: 0 <= x < 1, lambda x: 0 <= x <= 1]))


def check(config, rules):
    """Ends the program with one line if a field of the config makes no sense; `rules` maps more messages to bools."""
    fields, rules = {key: value for key, value in vars(config).items() if value is not None}, dict(rules)
    for words, keys in BOUNDS.items():
        rules |= {f"{key} must be {words}": HOLDS[words](fields[key]) for key in keys.split() if key in fields}
    for network in ("actor", "critic"):
        rules[f"{network}_gn needs a hidden_dim of 64, 96, ...: 32 groups of two units or more"] = not (
            fields[f"{network}_gn"] and (config.hidden_dim % 32 or config.hidden_dim == 32)
        )
    for key in ("num_updates", "eval_every"):
        rules[f"{key} must be a multiple of log_every, {config.log_every}"] = (
            fields[key] % max(config.log_every, 1) == 0
        )
    for message, holds in rules.items():
        if not holds:
            sys.exit(f"error: {message}")


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
        except (OSError, http.client.HTTPException) as error:
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
        if raw[key].dtype.kind not in "fiub":
            sys.exit(f"error: {key} in {path} are not numbers but {raw[key].dtype}")
        if shape == () and raw[key].shape[1:] == (1,):
            raw[key] = raw[key][:, 0]
        if raw[key].ndim == 0 or raw[key].shape[1:] != shape:
            sys.exit(f"error: {key} in {path} have shape {raw[key].shape}, but (N, *{shape}) in {env.spec.id}")
        if len(raw[key]) != len(raw["observations"]):
            sys.exit(f"error: {path} has {len(raw['observations'])} observations but {len(raw[key])} {key}")
        with np.errstate(over="ignore"):
            raw[key] = raw[key].astype(np.float32, copy=False)
        if not np.isfinite(raw[key]).all():
            row = np.argwhere(~np.isfinite(raw[key]))[0][0]
            sys.exit(f"error: {key} in {path} are NaN or infinite in row {row}")
        if key in ("terminals", "timeouts"):
            raw[key] = raw[key].astype(bool)
    if "timeouts" not in raw:
        steps, limit = np.arange(len(raw["terminals"])), env._max_episode_steps
        starts = np.maximum.accumulate(np.where(np.append(True, raw["terminals"][:-1]), steps, 0))
        raw["timeouts"] = (steps - starts) % limit == limit - 1
    if not (raw["terminals"] | raw["timeouts"]).any():
        sys.exit(f"error: {path} has no whole episode: none of its steps is a terminal or a timeout")
    if (largest := np.abs(raw["actions"]).max()) > 1 + 1e-4:
        sys.exit(f"error: actions in {path} reach {largest:.3g} in absolute value; D4RL's stay within [-1, 1]")
    return raw
