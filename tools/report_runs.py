"""The report's runs: read from their directories or from W&B, and labelled by their regularisers.

A run is a dictionary for each training seed:

    algorithm, dataset, domain, seed
    settings  fields that differ from the paper's values, without the regularisers: pairs
    labels    the names under which it counts, such as ("DO+LN", "best")
    state     finished, failed or unfinished
    config    the run's fields
    curve     the scores of its evaluations, a Series by update

and the columns of its last evaluation.
"""

import functools
import os
from dataclasses import fields, replace

import numpy as np
import pandas as pd

from harness.datasets import domain
from harness.directory import read_fields, saved_fields, status
from harness.errors import UserError, one_line
from harness.scripts import scripts

SCRIPTS = scripts()

# --- Labels ---

# Fields of the networks end in this if they are no regularisers, and these change no result
NO_REGULARISER = ("learning_rate", "coef", "layers", "loss")
NO_SETTING = ("seed", "num_seeds", "dataset_name", "dataset_path", "log_every", "analysis")


def regulariser_fields(script):
    """Return the names of a script's fields that make labels. The others make settings."""
    found = set()
    for flags in script.CHOSEN.values():
        found.update(flags)
    for field in fields(script.Config):
        of_network = field.name.startswith(("actor_", "critic_"))
        if of_network and not field.name.endswith(NO_REGULARISER):
            found.add(field.name)
    return found


def strengths(script, config):
    """Return the named regularisers that are on in a config's fields: {"DO": 0.3, "LN": True}."""
    found = {}
    for flags in script.CHOSEN.values():
        strength, *modes = flags  # modes: actor_l1_ratio, which makes L2, L1 or EN of actor_wd
        if config.get(strength):
            name = abbreviation(script, strength, {mode: config[mode] for mode in modes})
            found[name] = config[strength]
    return found


def abbreviation(script, strength, modes):
    """Return a regulariser's name in CHOSEN: "EN" for actor_wd with an actor_l1_ratio of 0.5."""
    for name, flags in script.CHOSEN.items():
        if strength in flags and modes.items() <= flags.items():
            return name
    words = [f"{mode}={value:g}" for mode, value in modes.items()]
    return " ".join([strength, *words])


def label(script, found):
    """Return {"DO": 0.3, "LN": True} as "DO(0.3)+LN". The paper's strengths are left out."""
    words = []
    for name, value in found.items():
        paper, *_ = script.CHOSEN.get(name, {"": None}).values()
        words.append(name if value == paper else f"{name}({value:g})")
    return "+".join(words) or "none"


def run_labels(script, config, default, tuned):
    """Return the labels of a run, from its fields and the paper's for its dataset.

    "none"             without any regulariser but those that the paper's IQL has on Adroit
    "LN", "DO+LN"      both: LN where DO is on anyway
    "LN (no DO)"       LN where DO would be on
    "best"             what is tuned for the dataset; `tuned` has its strengths by that name
    "LN+critic_ln=..." with a regulariser that has no abbreviation
    """
    found = strengths(script, config)
    usual = strengths(script, default)
    added = {name: value for name, value in found.items() if usual.get(name) != value}
    missing = [name for name in usual if name not in found]
    labels = [label(script, added), label(script, found)]
    if missing:
        labels = [f"{label(script, found)} (no {'+'.join(missing)})"]

    named = set()
    for flags in script.CHOSEN.values():
        named.update(flags)
    unnamed = regulariser_fields(script) - named
    words = [f"{key}={config[key]}" for key in changed_fields(config, default) if key in unnamed]
    if words:
        return ("+".join(words if labels[0] == "none" else [labels[0], *words]),)

    labels += [name for name, variant in tuned.items() if variant == found]
    return tuple(dict.fromkeys(labels))


def changed_fields(config, default):
    return [key for key in config if key in default and config[key] != default[key]]


def run_settings(script, config, default):
    """Return what else differs from the paper's: (("batch_size", "256"), ...)."""
    skipped = regulariser_fields(script).union(NO_SETTING)
    changed = [key for key in changed_fields(config, default) if key not in skipped]
    return tuple((key, str(config[key])) for key in sorted(changed))


@functools.cache
def paper(algorithm, **given):
    """Return the paper's fields, and {"best": {"DO": 0.2, ...}, ...} as tuned for a dataset."""
    script = SCRIPTS[algorithm]
    plain = script.Config(**given)
    tuned = {}
    for name in script.BEST:
        variant = script.tuned(replace(plain, regularisers=name))
        tuned[name] = strengths(script, vars(variant))
    return saved_fields(vars(script.tuned(plain))), tuned


def describe(algorithm, config):
    """Return the dataset, settings and labels of a run, from its fields."""
    script = SCRIPTS[algorithm]
    dataset = config["dataset_name"]
    given = {"dataset_name": dataset}
    if "critic_loss" in config:  # each has tuned values of its own
        given["critic_loss"] = config["critic_loss"]
    default, tuned = paper(algorithm, **given)
    if "critic_loss" in config:
        default = {**default, "critic_loss": script.Config.critic_loss}

    file = os.path.basename(config.get("dataset_path") or "")
    title = dataset if file.replace("_", "-") in ("", f"{dataset}.hdf5") else f"{dataset} ({file})"
    return {
        "algorithm": algorithm,
        "dataset": title,
        "domain": domain(dataset),
        "settings": run_settings(script, config, default),
        "labels": run_labels(script, config, default, tuned),
    }


# --- Reading ---


def split_seeds(algorithm, config, rows, state):
    """Return a run's seeds. `rows` are its evaluations, of all seeds.

    Raises UserError if the evaluations make no sense.
    """
    config = {**saved_fields(vars(SCRIPTS[algorithm].Config())), **config}
    about = describe(algorithm, config)
    seeds = []
    for seed in range(config["seed"], config["seed"] + config["num_seeds"]):
        own = [row for row in rows if row["seed"] == seed]
        updates = [row["update"] for row in own]
        scores = [row["score"] for row in own]
        if state == "finished" and updates[-1:] != [config["num_updates"]]:
            raise UserError("it is said to be finished, but its last evaluation is missing")
        if not np.isfinite(scores).all() or updates != sorted(set(updates)):
            raise UserError("its scores are not finite, or its updates out of order")
        last = dict(own[-1]) if own else {}
        if last.get("plasticity/before"):
            last["plasticity"] = last["plasticity/after"] / last["plasticity/before"]
        last.update(about, seed=seed, state=state, config=config)
        last["curve"] = pd.Series(scores, updates, dtype=float)
        seeds.append(last)
    return seeds


def read_directory(path):
    """Return the seeds of a run's directory, and why they have no final score, if so."""
    algorithm = os.path.basename(os.path.dirname(os.path.dirname(os.path.abspath(path))))
    if algorithm not in SCRIPTS:
        raise UserError(f"{algorithm} is no algorithm of this project")
    run = status(path)
    config = read_fields(path)
    rows = read_evaluations(os.path.join(path, "evaluations.csv"), run.state == "finished")
    seeds = split_seeds(algorithm, config, rows, run.state)
    reasons = {
        "finished": None,
        "failed": f"failed: {one_line(run.reason)[:150]}",
        "unfinished": f"not finished: at update {run.update:,} of {config['num_updates']:,}",
    }
    return seeds, reasons[run.state]


def read_evaluations(path, finished):
    """Return the rows of a run's evaluations.csv."""
    if not os.path.exists(path) or os.path.getsize(path) == 0:
        return []
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not finished:  # its last row may be half written
        table = table[(table != "").all(axis=1)]
    return table.astype(float).to_dict("records")


def read_wandb_run(run):
    """Return the seeds of a W&B run, and why they have no final score, if so."""
    config = {key: value for key, value in run.config.items() if not key.startswith("_")}
    algorithm = config.pop("algorithm", None)
    if algorithm not in SCRIPTS:
        raise UserError("it is no run of this project")
    rows = []
    for row in run.history(samples=1_000_000, pandas=False):
        if row.get("score") is not None:
            for seed in range(config["seed"], config["seed"] + config["num_seeds"]):
                rows.append(row_of_seed(row, seed, config["num_seeds"]))
    states = {"finished": "finished", "failed": "failed", "crashed": "failed"}
    state = states.get(run.state, "unfinished")
    reason = None if state == "finished" else f"not finished: W&B says it is {run.state}"
    return split_seeds(algorithm, config, rows, state), reason


def row_of_seed(row, seed, num_seeds):
    """Return one seed's part of a row of W&B, which of several has `score` and `seed0/score`."""
    prefix = f"seed{seed}/" if num_seeds > 1 else ""
    values = {}
    for key, value in row.items():
        if key.startswith(prefix) and isinstance(value, (int, float)):
            values[key.removeprefix(prefix)] = value
    return {**values, "seed": seed, "update": row["_step"]}


def read_all(runs, read):
    """Return the seeds of runs by their names, and what was left out: names and reasons.

    `read(run)` returns a run's seeds and a reason or None. A seed that several runs have counts
    once.
    """
    seeds = []
    left_out = []
    for name, run in runs.items():
        try:
            found, reason = read(run)
        except UserError as error:
            found = []
            reason = str(error)
        except Exception as error:  # whatever a damaged file brings about
            found = []
            reason = f"it is damaged: {type(error).__name__} {one_line(error)[:150]}"
        if reason:
            left_out.append((name, reason))
        seeds += [{**seed, "run": name} for seed in found]

    kept = {}
    for seed in sorted(seeds, key=lambda seed: seed["state"] != "finished"):
        key = tuple(seed[name] for name in ("algorithm", "settings", "dataset", "labels", "seed"))
        if key not in kept:
            kept[key] = seed
        elif seed["state"] == "finished":
            left_out.append((seed["run"], f"another run has its seed {seed['seed']}, too"))
    return list(kept.values()), left_out


def read_results(folders):
    """Return the seeds of all runs below the folders, and what was left out."""
    runs = {}
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f"there is no directory {folder}")
        for path, inside, files in os.walk(folder):
            inside.sort()
            if "config.yaml" in files:
                runs[path] = path
                inside.clear()
    return read_all(runs, read_directory)


def read_wandb(project):
    """Return the seeds of a W&B project's runs, and what was left out."""
    import wandb

    try:
        found = list(wandb.Api(timeout=60).runs(project, per_page=500, lazy=False))
    except Exception as error:
        raise UserError(f"can't read {project} from W&B: {one_line(error)[:200]}") from error
    return read_all({f"{project}/{run.id}": run for run in found}, read_wandb_run)


# --- Sections ---


def by_settings(seeds):
    """Yield settings and the seeds (a DataFrame) that have them, the most first.

    A seed is wherever all the settings are its own. So a dataset whose batch size is 256 anyway is
    with batch_size=256, too, and IQL with a critic_loss, which it doesn't have. Settings whose
    seeds are all with others, too, are left out.
    """
    members = {}
    for settings in set(seeds["settings"]):
        fits = [has_settings(seed, settings) for seed in seeds.to_dict("records")]
        members[settings] = frozenset(seeds.index[fits])
    for settings in sorted(members, key=lambda settings: (-len(members[settings]), settings)):
        own = members[settings]
        if not any(own < others for others in members.values()):
            yield settings, seeds.loc[sorted(own)]


def has_settings(seed, settings):
    config = seed["config"]
    as_here = all(str(config.get(key, value)) == value for key, value in settings)
    return as_here and set(seed["settings"]) <= set(settings)


def label_key(script, label):
    """Return a sort key: none, DO, DO(0.3), LN, ..., then DO+LN, ..., then best and the others."""
    order = ["none", *script.CHOSEN]
    places = []
    for word in label.split("+"):
        name, _, strength = word.rstrip(")").partition("(")
        if name not in order:
            return np.inf, [], label
        places.append((order.index(name), float(strength or 0)))
    return len(places), places, label


def by_label(seeds):
    """Return the seeds of one algorithm, one row for each of their labels, in the labels' order.

    The column `label` is categorical. A label is left out if all its runs have another, too.
    """
    script = SCRIPTS[seeds["algorithm"].iloc[0]]
    rows = seeds.explode("labels").rename(columns={"labels": "label"})
    runs = {name: set(own) for name, own in rows.groupby("label").groups.items()}
    kept = []
    for name in sorted(runs, key=lambda name: label_key(script, name)):
        within = any(runs[name] < others for others in runs.values())
        if not within and runs[name] not in [runs[other] for other in kept]:
            kept.append(name)
    rows = rows[rows["label"].isin(kept)]
    return rows.assign(label=pd.Categorical(rows["label"], kept, ordered=True))
