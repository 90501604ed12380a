"""Results as a table: a CSV file with a row for each training seed of each run.

algorithm, dataset_name, run   `run` is the name of the run's directory
fields of the config           where they differ from the defaults for the dataset
config/...                     fields that this checkout's script doesn't have
seed, state
score, mean_score, best_score  the last, the mean of the last 10 (AntMaze 5), the best
curve                          the scores of all evaluations, if several: 1000:2.5 2000:17.1
seconds/train, ...             of a finished run
made_with                      the commit, JAX's version and the processor that trained it
...                            what else the last evaluation has measured
"""

import json
import os

import numpy as np
import pandas as pd

from harness.config import decode
from harness.directory import default_config, saved_fields
from harness.errors import UserError, disk_errors, one_line
from harness.scripts import scripts

FIRST = ["algorithm", "dataset_name", "run"]
SCORES = ["seed", "state", "score", "mean_score", "best_score", "curve"]
UNKNOWN = "config/"  # before the name of a field that only a fork's script has


def mean_of_last(scores, domain):
    """Return the mean of the last 10 scores, on AntMaze 5, by which the paper compares."""
    number = 5 if domain == "antmaze" else 10
    return np.mean(scores[-number:])


def write_results(path, seeds):
    """Write the seeds of `tools.report_runs` as a table."""
    rows = []
    fields = {}  # as an ordered set
    for seed in seeds:
        differences = config_differences(seed["algorithm"], seed["config"])
        fields.update(dict.fromkeys(differences))
        rows.append({**row_of(seed), **differences})
    table = pd.DataFrame(rows)
    others = [name for name in table if name not in (*FIRST, *fields, *SCORES)]
    has_curve = "curve" in table and table["curve"].fillna("").any()
    scores = [name for name in SCORES if name != "curve" or has_curve]
    order = [*FIRST, *fields, *scores, *others]
    with disk_errors(path):
        table.reindex(columns=order).to_csv(path, index=False, float_format="%.9g")


def row_of(seed):
    """Return a seed's row without its config."""
    row = {
        "algorithm": seed["algorithm"],
        "dataset_name": seed["config"]["dataset_name"],
        "run": os.path.basename(seed["run"]).partition(", seed ")[0],  # from a table it has one
        "seed": seed["seed"],
        "state": seed["state"],
    }
    if seed["state"] == "finished":
        row["mean_score"] = mean_of_last(seed["scores"], seed["domain"])
        row["best_score"] = max(seed["scores"])
        row["curve"] = curve_text(seed["updates"], seed["scores"])
    skipped = ("update", "updates", "scores", "final")
    for name, value in seed.items():
        if name not in skipped and isinstance(value, (int, float)):
            row[name] = value
    if "made_with" in seed:
        row["made_with"] = seed["made_with"]
    return row


def curve_text(updates, scores):
    """Return "1000:2.5 2000:17.1", or nothing for a single evaluation."""
    pairs = [f"{update}:{score:.9g}" for update, score in zip(updates, scores)]
    return " ".join(pairs) if len(pairs) > 1 else ""


def config_differences(algorithm, config):
    """Return the fields in which a run differs from the defaults for its dataset, as text."""
    script = scripts()[algorithm]
    known = vars(script.Config())
    own = script.Config(**{name: value for name, value in config.items() if name in known})
    default = saved_fields(vars(default_config(own, script.tuned)))
    differences = {}
    for name, value in config.items():
        if name not in known:
            differences[f"{UNKNOWN}{name}"] = json.dumps(value)
        elif name not in ("dataset_name", "seed", "num_seeds") and value != default.get(name):
            differences[name] = value if isinstance(value, str) else json.dumps(value)
    return differences


def read_table(path):
    """Return the rows of a table as dictionaries of texts."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        with open(path, "rb") as file:
            is_whole = file.read().endswith(b"\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a table of results ({one_line(error)})") from error
    for name in (*FIRST, "seed", "state", "score"):
        if name not in table:
            raise UserError(f"{path} is not a table of results: it has no column {name!r}")
    if not is_whole:
        raise UserError(f"{path} is cut short: its last row has no end")
    return table.to_dict("records")


def to_number(name, text):
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"its column {name!r} has {text!r}, which is no number") from error


def parse_row(row):
    """Return a row's algorithm, config, evaluations and state.

    The last evaluation has all columns. Of earlier ones only the score is known.
    """
    algorithm = row["algorithm"]
    if algorithm not in scripts():
        raise UserError(f"{algorithm} is no algorithm of this project")
    script = scripts()[algorithm]
    fields = vars(script.Config())
    texts = {}
    unknown = {}
    evaluation = {}
    for name, text in row.items():
        if text == "" or name in ("algorithm", "run", "state", "curve"):
            continue
        if name.startswith(UNKNOWN):
            unknown[name.removeprefix(UNKNOWN)] = json.loads(text)
        elif name in fields:
            texts[name] = text
        elif name == "made_with":
            evaluation[name] = text
        else:
            evaluation[name] = to_number(name, text)
    config = script.tuned(script.Config(**decode(script.Config, texts)))
    config = {**saved_fields(vars(config)), **unknown}
    evaluation["seed"] = config["seed"]
    evaluation["update"] = config["num_updates"]
    evaluations = []
    for pair in row.get("curve", "").split()[:-1]:
        update, score = pair.split(":")
        evaluations.append(dict(seed=config["seed"], update=int(update), score=float(score)))
    return algorithm, config, [*evaluations, evaluation], row["state"]
