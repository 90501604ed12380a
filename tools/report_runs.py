"""The report's runs: read from their directories or from W&B, and labelled by their regularisers.

A run is a dictionary for each training seed:

    algorithm, dataset, domain, seed
    run       its directory, or its row's name in a table
    settings  fields that differ from the dataset's defaults, without the regularisers: pairs
    labels    the names under which it counts, such as ("DO+LN", "best")
    config    its fields
    state     finished, failed or unfinished
    updates   of the evaluations of a finished run
    scores    of its evaluations

and the columns of its last evaluation.
"""

import collections
import contextlib
import functools
import json
import os
import re
from dataclasses import fields, replace

import numpy as np
import pandas as pd

from harness.datasets import domain
from harness.directory import default_config, read_fields, saved_fields, status
from harness.errors import UserError, one_line
from harness.inside import linear_cka
from harness.scripts import scripts
from harness.tables import Tables
from tools.results import parse_row, read_table

# --- Labels ---

BASELINE = "baseline"  # the label of a run without regularisers

# Endings of the fields actor_... and critic_... that are no regularisers
NO_REGULARISER = ("learning_rate", "coef", "layers", "loss")
DATA = ("dataset_name", "dataset_path", "dataset_sha256")
# Fields by which a report makes no sections
NO_SETTING = ("seed", "num_seeds", *DATA, "log_every", "analysis")


def named_fields(script):
    return set().union(*script.CHOSEN.values())


def unnamed_fields(script):
    """Return a script's regularisers that have no abbreviation in CHOSEN."""
    names = [field.name for field in fields(script.Config)]
    names = [name for name in names if name.startswith(("actor_", "critic_"))]
    return {name for name in names if not name.endswith(NO_REGULARISER)} - named_fields(script)


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
    """Return {"DO": 0.3, "LN": True} as "DO(0.3)+LN".

    A strength is shown unless it is the paper's: that in COMBINED for a combination there, or else
    that in CHOSEN.
    """
    flags = {}
    for combination, others in getattr(script, "COMBINED", {}).items():
        if set(combination.split("+")) == set(found):
            flags = others
    words = []
    for name, value in found.items():
        chosen = {**script.CHOSEN.get(name, {}), **flags}
        strength = next(iter(script.CHOSEN.get(name, {})), None)
        is_papers = value == chosen.get(strength)
        words.append(name if is_papers else f"{name}({value:g})")
    return "+".join(words) or BASELINE


def published_name(script, config, default, presets):
    """Return the preset of a run, and the settings that come with it: ("as-run", ["batch_size"]).

    Both are empty if a run has none of `presets`, or one that is the baseline. A run with a further
    regulariser, or a fork's, has none.
    """
    if unknown_fields(config, default):
        return "", []
    regularisers = named_fields(script)
    others = unnamed_fields(script)
    usual = changed_fields(presets.get("as-run-none", default), default)
    for name, variant in presets.items():
        changed = changed_fields(variant, default)
        is_same = all(config[key] == variant[key] for key in {*changed, *others})
        is_baseline = strengths(script, variant) == strengths(script, default)
        is_baseline = is_baseline and others.isdisjoint(changed)
        if is_same and not is_baseline and strengths(script, config) == strengths(script, variant):
            return name, [key for key in changed if key not in regularisers and key not in usual]
    return "", []


def run_labels(script, config, default, tuned):
    """Return the labels of a run, from its fields and the defaults for its dataset.

    "DO+LN"               dropout and LayerNorm, at the paper's strengths
    "LN", "DO+LN"         both names, if the paper has dropout anyway on this dataset
    "LN (no DO)"          LayerNorm, without that dropout
    "LN+critic_ln=False"  a regulariser without an abbreviation, or one that only a fork knows
    "DO+LN+GrN", "best"   what is `tuned` for the dataset
    """
    found = strengths(script, config)
    usual = strengths(script, default)
    added = {name: value for name, value in found.items() if usual.get(name) != value}
    missing = [name for name in usual if name not in found]
    labels = [label(script, added), label(script, found)]
    if missing:
        labels = [f"{label(script, found)} (no {'+'.join(missing)})"]

    others = unnamed_fields(script)
    words = [f"{key}={config[key]}" for key in changed_fields(config, default) if key in others]
    words += [f"{key}={value}" for key, value in unknown_fields(config, default).items()]
    if words:
        return ("+".join(words if labels[0] == BASELINE else [labels[0], *words]),)
    labels += [name for name, variant in tuned.items() if variant == found]
    return tuple(dict.fromkeys(labels))


def unknown_fields(config, default):
    """Return fields that this checkout's script doesn't have, such as a fork's, if they are on."""
    return {key: value for key, value in config.items() if key not in default and value}


def changed_fields(config, default):
    return [key for key in config if key in default and config[key] != default[key]]


def run_settings(script, config):
    """Return what else differs from the defaults: (("batch_size", "256"), ...).

    What `tuned` makes of the regularisers is left out, such as BCQ's widths with GroupNorm. So is
    validation_seed if nothing is held out.
    """
    own = {key: config[key] for key in config if key in vars(script.Config())}
    default = saved_fields(vars(default_config(script.Config(**own), script.tuned)))
    skipped = named_fields(script) | unnamed_fields(script) | set(NO_SETTING)
    if config["validation_frac"] == 0:
        skipped.add("validation_seed")
    changed = [key for key in changed_fields(config, default) if key not in skipped]
    return tuple((key, str(config[key])) for key in sorted(changed))


@functools.cache
def paper(script, dataset, **loss):
    """Return the defaults for a dataset, and what the paper tuned and published.

    That is {"best": {"DO": 0.2, ...}, ...} and {"as-run": all fields, ...}. The defaults are those
    under the run's own loss. A preset is left out if the dataset can't have it.
    """
    plain = script.Config(dataset_name=dataset, **loss)
    tuned = {}
    for name in script.BEST:
        variant = script.tuned(replace(plain, regularisers=name))
        tuned[name] = strengths(script, vars(variant))
    presets = {}
    for name in getattr(script, "PRESETS", {}):
        with contextlib.suppress(UserError):
            presets[name] = saved_fields(vars(script.tuned(replace(plain, preset=name))))
    return saved_fields(vars(script.tuned(plain))), tuned, presets


def describe(algorithm, config):
    """Return what the report says of a run, from its fields."""
    script = scripts()[algorithm]
    dataset = config["dataset_name"]
    loss = {key: config[key] for key in ("critic_loss",) if key in config}
    default, tuned, presets = paper(script, dataset, **loss)
    settings = run_settings(script, config)
    labels = run_labels(script, config, default, tuned)
    name, own_settings = published_name(script, config, default, presets)
    if own_settings:  # then the combination alone is not all that it differs in
        labels = ()
        settings = tuple(pair for pair in settings if pair[0] not in own_settings)
    if name:
        labels = (*labels, name)
    file = os.path.basename(config.get("dataset_path") or "")
    is_own = file.replace("_", "-") not in ("", f"{dataset}.hdf5")
    return {
        "algorithm": algorithm,
        "dataset": f"{dataset} ({file})" if is_own else dataset,
        "domain": domain(dataset),
        "settings": settings,
        "labels": labels,
        "config": config,
    }


# --- Reading ---


def split_seeds(algorithm, config, rows, state):
    """Return a run's seeds. `rows` are all its evaluations, none if it isn't finished.

    Raises UserError if the evaluations make no sense.
    """
    script = scripts()[algorithm]
    usual = script.tuned(script.Config(dataset_name=config["dataset_name"]))
    config = {**saved_fields(vars(usual)), **config}  # older runs lack newer fields
    about = {**describe(algorithm, config), "state": state}
    seeds = []
    for number in range(config["seed"], config["seed"] + config["num_seeds"]):
        own = [row for row in rows if row["seed"] == number]
        last = own[-1] if own else {}
        seed = {**last, **about, "seed": number}
        seed["updates"] = [row["update"] for row in own]
        seed["scores"] = [row["score"] for row in own]
        if state == "finished":
            check_evaluations(seed)
        seeds.append(seed)
    return seeds


def check_evaluations(seed):
    updates = seed["updates"]
    if updates[-1:] != [seed["config"]["num_updates"]]:
        raise UserError("it is said to be finished, but its last evaluation is missing")
    if not np.isfinite(seed["scores"]).all() or updates != sorted(set(updates)):
        raise UserError("its scores are not finite, or its updates out of order")


def read_directory(path):
    """Return the seeds of a run's directory, and why they have no final score, if so."""
    algorithm = os.path.basename(os.path.dirname(os.path.dirname(os.path.abspath(path))))
    if algorithm not in scripts():
        raise UserError(f"{algorithm} is no algorithm of this project")
    run = status(path)
    config = read_fields(path)
    rows = []
    reason = None
    if run.state == "finished":
        rows = list(Tables(path).read("evaluations.csv"))
        end = read_end(path)
        rows = [{**row, **end} for row in rows]
    elif run.state == "failed":
        reason = f"failed: {one_line(run.reason)[:150]}"
    else:
        reason = f"not finished: at update {run.update:,} of {config['num_updates']:,}"
    return split_seeds(algorithm, config, rows, run.state), reason


def read_end(path):
    """Return the seconds of a finished run, and what trained it: {"seconds/train": 120.0, ...}."""
    with open(os.path.join(path, "finished.json")) as file:
        about = json.load(file)
    end = {f"seconds/{phase}": value for phase, value in about["seconds"].items()}
    if "made_with" in about:  # older runs lack it
        end["made_with"] = " | ".join(about["made_with"])
    return end


def read_row(row):
    """Return the seed of a table's row, and why it has no final score, if so."""
    algorithm, config, evaluations, state = parse_row(row)
    if state != "finished":
        return split_seeds(algorithm, config, [], state), f"{state}: so says the table"
    return split_seeds(algorithm, config, evaluations, state), None


def read_wandb_run(run):
    """Return the seeds of a W&B run, and why they have no final score, if so."""
    config = {key: value for key, value in run.config.items() if not key.startswith("_")}
    algorithm = config.pop("algorithm", None)
    if algorithm not in scripts():
        raise UserError("it is no run of this project")
    if run.state != "finished":
        state = "failed" if run.state in ("failed", "crashed") else "unfinished"
        seeds = split_seeds(algorithm, config, [], state)
        return seeds, f"not finished: W&B says it is {run.state}"
    rows = []
    for row in run.history(samples=1_000_000, pandas=False):
        if row.get("score") is not None:
            for seed in range(config["seed"], config["seed"] + config["num_seeds"]):
                rows.append(row_of_seed(row, seed, config["num_seeds"]))
    return split_seeds(algorithm, config, rows, "finished"), None


def row_of_seed(row, seed, num_seeds):
    """Return one seed's part of a row of W&B, which of several has `score` and `seed0/score`.

    The last epoch's losses and W&B's own columns, which stand beside it, are left out.
    """
    prefix = f"seed{seed}/" if num_seeds > 1 else ""
    values = {}
    for key in row:
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and (name == "score" or "/" in name):
            values[name] = row[key]
    return {**values, "seed": seed, "update": row["_step"]}


def read_all(runs, read):
    """Return the seeds of runs by their names, and what was left out: names and reasons.

    `read(run)` returns a run's seeds and a reason or None.
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
    return seeds, left_out


def content(seed):
    """Return what tells a seed's dataset from others: its name, and its file's checksum."""
    return seed["config"]["dataset_name"], seed["config"]["dataset_sha256"]


def name_datasets(seeds):
    """Give each file one label: the same under any path, and another for each other file."""
    labels = {}
    for seed in seeds:
        known = labels.get(content(seed), seed["dataset"])
        labels[content(seed)] = min(known, seed["dataset"], key=len)  # the plain name, if any
    times = collections.Counter(labels.values())
    for (name, checksum), label in labels.items():
        if times[label] > 1:
            labels[name, checksum] = f"{label} [{checksum[:8] if checksum else 'unknown file'}]"
    return [{**seed, "dataset": labels[content(seed)]} for seed in seeds]


def count_once(seeds, left_out):
    """Return the seeds without those that another run has, too, which are left out."""
    seeds = name_datasets(seeds)
    left_out = list(left_out)
    kept = {}
    for seed in sorted(seeds, key=lambda seed: seed["state"] != "finished"):
        key = tuple(seed[name] for name in ("algorithm", "settings", "dataset", "labels", "seed"))
        if key not in kept:
            kept[key] = seed
        elif seed["state"] == "finished":
            left_out.append((seed["run"], f"another run has its seed {seed['seed']}, too"))
    return list(kept.values()), left_out


def read_results(paths):
    """Return the seeds of tables (.csv) and of all runs below folders, and what was left out."""
    rows = {}
    directories = {}
    unreadable = []  # folders and reasons
    for path in paths:
        if path.endswith(".csv"):
            for number, row in enumerate(read_table(path), 2):  # as a spreadsheet numbers them
                name = "/".join([row["algorithm"], row["dataset_name"], row["run"]])
                name = f"{path}/{name}, seed {row['seed']}"
                if name in rows:
                    name += f", row {number}"
                rows[name] = row
        else:
            directories |= find_runs(path, unreadable)
    seeds, left_out = read_all(rows, read_row)
    more_seeds, more_left_out = read_all(directories, read_directory)
    seeds, left_out = count_once(seeds + more_seeds, unreadable + left_out + more_left_out)
    return with_cka(seeds), left_out


def with_cka(seeds):
    """Add how similar each seed's features are to the baseline's of that seed: cka_to_baseline.

    Both must be there as directories. A table keeps what was found before.
    """
    baselines = {}
    for seed in seeds:
        if BASELINE in seed["labels"]:
            baselines[features_key(seed)] = seed
    for seed in seeds:
        own = read_features(seed)
        others = read_features(baselines.get(features_key(seed)))
        if own is not None and others is not None and len(own) == len(others):
            seed["cka_to_baseline"] = float(linear_cka(own, others))
    return seeds


def features_key(seed):
    """Return in what two seeds agree whose features are comparable."""
    return tuple(seed[name] for name in ("algorithm", "settings", "dataset", "seed"))


def read_features(seed):
    """Return a finished seed's features (B, F), or None if they can't be read."""
    if seed is None or seed["state"] != "finished":
        return None
    path = os.path.join(seed["run"], "features.npy")
    try:
        return np.load(path)[seed["seed"] - seed["config"]["seed"]]
    except (OSError, EOFError, ValueError, IndexError):  # also a damaged file
        return None


def find_runs(folder, unreadable):
    """Return the directories of the runs below a folder, by their names, which they are.

    Folders that can't be read are added to the list `unreadable`, with the reason.
    """
    if not os.path.isdir(folder):
        if os.path.exists(folder):
            raise UserError(f"{folder} is neither a directory of runs nor a .csv table")
        raise UserError(f"there is no directory {folder}")
    found = {}
    seen = set()  # by their real paths, since links may lead in circles

    def note(error):
        unreadable.append((error.filename, f"it can't be read ({error.strerror})"))

    for path, inside, files in os.walk(folder, onerror=note, followlinks=True):
        inside.sort()
        if os.path.realpath(path) in seen:
            inside.clear()
        elif "config.yaml" in files:
            found[path] = path
            inside.clear()
        seen.add(os.path.realpath(path))
    return found


def read_wandb(project):
    """Return the seeds of a W&B project's runs, and what was left out."""
    import wandb

    try:
        found = list(wandb.Api(timeout=60).runs(project, per_page=500, lazy=False))
    except Exception as error:
        raise UserError(f"can't read {project} from W&B: {one_line(error)[:200]}") from error
    runs = {f"{project}/{run.id}": run for run in found}
    return count_once(*read_all(runs, read_wandb_run))


# --- Sections ---


def by_settings(seeds):
    """Yield settings and the seeds (a DataFrame) that have them, the most first.

    A seed has settings if two things hold. Its config has these values, or lacks the field. And it
    differs from its dataset's defaults in nothing else. So a seed may have several settings:
    batch_size=256 also has the datasets whose default is 256, and critic_loss=mse has IQL, which
    lacks that field. Settings are left out if others have all their seeds and more.
    """
    members = {}
    pairs = list(zip(seeds["settings"], seeds["config"]))
    for settings in set(seeds["settings"]):
        fits = [has_settings(own, config, settings) for own, config in pairs]
        members[settings] = frozenset(seeds.index[fits])
    for settings in sorted(members, key=lambda settings: (-len(members[settings]), settings)):
        own = members[settings]
        if not any(own < others for others in members.values()):
            yield settings, seeds.loc[sorted(own)]


def has_settings(own, config, settings):
    """Return whether a run with settings of its `own`, and this config, has just these settings."""
    has_all = all(str(config.get(key, value)) == value for key, value in settings)
    return has_all and set(own) <= set(settings)


def label_key(script, label):
    """Return a sort key: baseline, DO, DO(0.3), LN, ..., DO+LN, ..., then best and the others."""
    order = [BASELINE, *script.CHOSEN]
    places = []
    for word in label.split("+"):
        found = re.fullmatch(r"([^()]+)(?:\(([\d.e+-]+)\))?", word)
        if not found or found[1] not in order:
            return np.inf, [], label
        places.append((order.index(found[1]), float(found[2] or 0)))
    return len(places), places, label


def by_label(seeds):
    """Return the seeds of one algorithm, one row for each of their labels, in the labels' order.

    The column `label` is categorical. A label is left out if all its runs have another, too, but
    never the baseline.
    """
    script = scripts()[seeds["algorithm"].iloc[0]]
    rows = seeds.explode("labels").rename(columns={"labels": "label"})
    runs = {name: set(own) for name, own in rows.groupby("label").groups.items()}
    kept = []
    for name in sorted(runs, key=lambda name: label_key(script, name)):
        within = any(runs[name] < others for others in runs.values())
        is_new = not within and runs[name] not in [runs[other] for other in kept]
        if is_new or name == BASELINE:
            kept.append(name)
    rows = rows[rows["label"].isin(kept)]
    return rows.assign(label=pd.Categorical(rows["label"], kept, ordered=True))
