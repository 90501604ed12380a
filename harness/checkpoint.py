"""Checkpoints: trees of arrays in an .npz, written so that a kill at any time loses nothing.

An .npz is one file with checksums, so that damage is noticed. (Orbax writes many files, and
mostly doesn't notice a flipped byte.)
"""

import io
import json
import os
import shutil

import flax
import jax
import jax.numpy as jnp
import numpy as np

from harness.directory import is_finished
from harness.errors import UserError, one_line

FORMAT = 2  # of checkpoint files; raise it when they change


def write_file(path, write, keep=None):
    """Write a file by `write(file)` so that a kill leaves a whole one: the new one or the old.

    With `keep`, also keep a copy of the old one under that name.
    """
    with open(path + ".partial", "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    if keep and os.path.exists(path):
        shutil.copyfile(path, keep + ".partial")
        os.replace(keep + ".partial", keep)
    os.replace(path + ".partial", path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def without_keys(tree):
    """Return a tree with its random keys as plain numbers."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


def flatten(tree):
    """Return a tree's arrays by their paths, such as actor/params/Dense_0/kernel."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(arrays, prefix):
    """Return the arrays whose paths begin with `prefix`/ as nested dictionaries."""
    found = {}
    for path, array in arrays.items():
        if path.startswith(prefix + "/"):
            found[split_path(path.removeprefix(prefix + "/"))] = array
    return flax.traverse_util.unflatten_dict(found)


def split_path(path):
    """Return a path's keys. SpectralNorm's variables have names such as Dense_0/kernel/u."""
    keys = path.split("/")
    for i, key in enumerate(keys):
        if key.startswith("SpectralNorm"):
            return *keys[: i + 1], "/".join(keys[i + 1 :])
    return tuple(keys)


def restore_tree(like, arrays, prefix):
    """Return a tree like `like`, with the arrays whose paths begin with `prefix`/."""
    leaves = []
    for path, leaf in flatten(like).items():
        array = jnp.asarray(arrays[f"{prefix}/{path}"])
        leaves.append(jax.random.wrap_key_data(array) if is_key(leaf) else array)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def write_checkpoint(path, tree, about, keep=None):
    """Write a tree of arrays and a dictionary `about` it."""
    arrays = jax.device_get(flatten(without_keys(tree)))
    text = json.dumps({"format": FORMAT, "arrays": list(arrays), **about})
    encoded = np.frombuffer(text.encode(), np.uint8)
    write_file(path, lambda file: np.savez(file, about=encoded, **arrays), keep)


def read_checkpoint(path):
    """Return a checkpoint's arrays by their paths, and what was written about them.

    Raises ValueError if it isn't whole, which the file's checksums show, and OSError if it can't be
    read. Nothing in it is ever executed.
    """
    with open(path, "rb") as file:
        content = io.BytesIO(file.read())
    try:
        with np.load(content, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        about = json.loads(arrays.pop("about").tobytes())
        if list(arrays) != about.pop("arrays"):
            raise ValueError("arrays are missing")
    except MemoryError:  # which says nothing about the file
        raise
    except Exception as error:  # zipfile, zlib and json have many
        raise ValueError(f"{path} is cut short or damaged") from error
    if about["format"] != FORMAT:
        raise UserError(
            f"{path} is of format {about['format']}, but this version writes {FORMAT}; "
            "resume with that one"
        )
    return arrays, about


def last_checkpoint(directory):
    """Return path, arrays and `about` of a run's last whole checkpoint; None before the first."""
    problems = []
    for name in ("checkpoint.npz", "previous.npz"):
        path = os.path.join(directory, name)
        try:
            arrays, about = read_checkpoint(path)
        except FileNotFoundError:
            continue
        except UserError:  # of another format
            raise
        except OSError as error:  # the file may be whole, so it must stay the last one
            raise UserError(f"can't read {path} ({error.strerror or one_line(error)})") from error
        except ValueError as error:
            problems.append(str(error))
            continue
        if problems:
            update = about["update"]
            print(f"warning: {problems[0]}; taking the one before it, of update {update}")
        return path, arrays, about
    if problems and is_finished(directory):
        raise UserError(f"{problems[0]}, so the policy is lost; the run's tables are whole")
    if problems:
        raise UserError(f"{problems[0]}, and there is no other; remove {directory} to start anew")
    return None
