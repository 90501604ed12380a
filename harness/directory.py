"""A run's directory from outside: its name, its config, and how far the run is."""

import fcntl
import hashlib
import json
import os
import re
from dataclasses import fields, replace
from typing import NamedTuple

from harness.config import decode, read_yaml
from harness.errors import UserError

# Fields that change no result, but for the last bits on a GPU: where a run is written, what is
# shown, and names for other fields
NOT_SAVED = ("results", "evaluate", "video", "preset", "regularisers", "deterministic")


def saved_fields(values):
    """Return the fields on which a run's results depend, as they stand in its config.yaml."""
    kept = {key: value for key, value in values.items() if key not in NOT_SAVED}
    text = json.dumps(kept, ensure_ascii=False)  # tuples become lists, as YAML has them
    # A path may have bytes that the locale can't read. YAML couldn't be read back with these.
    return json.loads(text.encode(errors="surrogateescape").decode(errors="replace"))


def run_directory(algorithm, config, tuned):
    """Return results/<algorithm>/<dataset>/<name>.

    The name has the seed and whatever differs from what `tuned` makes of the defaults. It ends in
    a hash of that, so a new field of the script changes no name. The dataset's checksum stands for
    its path.
    """
    own = saved_fields(vars(config))
    del own["dataset_path"]
    defaults = saved_fields(vars(default_config(config, tuned)))
    changed = [key for key in own if own[key] != defaults[key]]
    changed.sort(key=lambda key: not key.startswith("actor_"))  # first, since names are cut
    words = [f"seed={config.seed}"]
    for key in changed:
        if key not in ("seed", "dataset_name", "dataset_sha256"):
            words.append(f"{key}={str(own[key]).lower()}")
    name = re.sub(r"[^\w.=,+-]+", "_", ",".join(words))
    if len(name) > 150:
        name = name[:150].rpartition(",")[0]
    identity = {key: own[key] for key in changed}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return os.path.join(config.results, algorithm, config.dataset_name, f"{name}-{digest}")


def default_config(config, tuned):
    """Return the default config for the dataset.

    A field whose default is None has what `tuned` makes of it under the config's other fields.
    """
    defaults = {field.name: field.default for field in fields(config)}
    left_open = {name: None for name, value in defaults.items() if value is None}
    filled = tuned(replace(config, **left_open))
    for name in left_open:
        defaults[name] = getattr(filled, name)
    return replace(config, **defaults)


class Status(NamedTuple):
    state: str  # finished, failed or unfinished
    reason: str  # why it failed
    update: int  # the last one in train.csv
    busy: bool  # whether a process is training it, perhaps on another machine with this disk


def status(directory):
    """Return how far a run is."""
    reason = ""
    if is_finished(directory):
        state = "finished"
    else:
        reason = failure(directory)
        state = "unfinished" if reason is None else "failed"
    return Status(state, reason or "", last_update(directory), is_busy(directory))


def is_finished(directory):
    return os.path.exists(os.path.join(directory, "finished.json"))


def failure(directory):
    """Return why a run failed, or None if it has not."""
    path = os.path.join(directory, "failed.txt")
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:  # a process that retries it may just have removed it
        return None
    except OSError as error:
        return f"can't read {path} ({error.strerror})"


def last_update(directory):
    """Return the update of the last whole row in train.csv, 0 without any."""
    try:
        with open(os.path.join(directory, "train.csv"), "rb") as file:
            file.seek(-min(1000, os.path.getsize(file.name)), os.SEEK_END)
            whole_lines = file.read().split(b"\n")[:-1]
        return int(whole_lines[-1].split(b",")[1])
    except (OSError, IndexError, ValueError):
        return 0


def is_busy(directory):
    """Return whether a process holds a run's lock."""
    path = os.path.join(directory, "lock")
    try:
        with open(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock, or its disk has no locks
        return False
    return False


def read_fields(directory):
    """Return the fields in a run's config.yaml."""
    path = os.path.join(directory, "config.yaml")
    try:
        return read_yaml(path)
    except UserError as error:
        raise UserError(f"{path} is not the config of a run ({error})") from error


def check_same_config(directory, config):
    """Raise UserError if a run was begun under another default, which its name doesn't show."""
    if not os.path.exists(os.path.join(directory, "config.yaml")):
        return
    before = read_fields(directory)
    for key, value in saved_fields(vars(config)).items():
        if key != "dataset_path" and before.get(key, value) != value:
            raise UserError(
                f"{directory} was begun when {key} was {before[key]} by default, and now it is "
                f"{value}; resume it with that version, or use another folder for --results"
            )


def load_config(config_class, directory):
    """Return a run's config."""
    saved = read_fields(directory)
    try:
        return config_class(**decode(config_class, {**saved, "results": directory}))
    except UserError as error:
        path = os.path.join(directory, "config.yaml")
        raise UserError(f"{path} is not the config of a run of this script ({error})") from error
