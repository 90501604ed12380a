"""What is not the algorithm: the command line, and a run's directory, from which it resumes."""

import concurrent.futures
import contextlib
import csv
import dataclasses
import fcntl
import functools
import hashlib
import inspect
import itertools
import json
import netrc
import os
import queue
import re
import shutil
import signal
import sys
import threading
import time
import urllib.parse
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pyrallis
import yaml
from tqdm import tqdm

from tasks import conditions, evaluate, fingerprint, make_envs, normalized_score, record

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


@functools.cache
def parser(config_class):
    with mock.patch("inspect.getsource", functools.cache(inspect.getsource)):  # which pyrallis reads for each field
        return pyrallis.argparsing.ArgumentParser(config_class)


def parse(config_class, arguments=None):
    """The config that the command line, or these arguments, give; ends the program with one line if a value can't be
    read."""
    try:
        with mock.patch("yaml.full_load", yaml.safe_load):
            config = parser(config_class).parse_args(arguments)
    except pyrallis.utils.ParsingError as error:
        found = re.search(r"value='(.*)' into field .*\.(\w+)\" of type", str(error))
        if not found:
            sys.exit(f"error: {str(error).splitlines()[0]}")
        kind = next(str(field.type) for field in dataclasses.fields(config_class) if field.name == found[2])
        kind = re.search("List|Tuple|float|int|bool|str", kind)[0]
        kind = {"List": "list: [a, b]", "Tuple": "pairs of floats"}.get(kind, kind)
        sys.exit(f"error: {found[2]} can't be {found[1]!r}; it is of type {kind}")
    except (OSError, yaml.YAMLError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    configure_jax(getattr(config, "deterministic", False))
    return config


def configure_jax(deterministic):
    """What JAX must know before it uses a device: compiled programs are kept on disk; a GPU's memory is taken as it
    is needed, and its operations are deterministic if so asked, as a CPU's always are."""
    cache = os.getenv("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jax"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if deterministic:
        os.environ["XLA_FLAGS"] = os.getenv("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"


BOUNDS = {  # of the fields that either script has
    "1 or more": "num_seeds num_updates log_every eval_every eval_episodes batch_size policy_freq hidden_dim "
    "actor_layers critic_layers n_classes",
    "0 or more": "seed validation_seed actor_wd critic_wd actor_learning_rate critic_learning_rate actor_input_noise "
    "actor_bc_noise actor_grad_noise critic_grad_noise target_noise noise_clip actor_bc_coef critic_bc_coef "
    "actor_q_coef temperature max_weight",
    "above 0": "sigma_frac",
    "at least 0 and below 1": "actor_dropout critic_dropout validation_frac",
    "between 0 and 1": "actor_l1_ratio critic_l1_ratio gamma tau expectile",
}
HOLDS = {
    "1 or more": lambda x: x >= 1,
    "0 or more": lambda x: x >= 0,
    "above 0": lambda x: x > 0,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "between 0 and 1": lambda x: 0 <= x <= 1,
}


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
    rules["eval_noise must be pairs of 0 or more, not both 0: [[0.2, 0], [0, 0.05]]"] = all(
        len(pair) == 2 and min(pair) >= 0 and max(pair) > 0 for pair in config.eval_noise
    )
    rules["seed + num_seeds must be at most 2^31"] = config.seed + config.num_seeds <= 2**31
    rules["video must end in .mp4 or .gif"] = not config.video or config.video.endswith((".mp4", ".gif"))
    folder = os.path.dirname(config.video or "") or "."
    rules[f"video: there is no directory {folder}"] = os.path.isdir(folder)
    rules["video needs --evaluate RUN, whose policy it shows"] = not config.video or bool(config.evaluate)
    for message, holds in rules.items():
        if not holds:
            sys.exit(f"error: {message}")


def named_regularisers(DO, L2, L1, EN, InN, BCN, GrN):
    """The flags of each of the paper's regularisers of the actor by its abbreviation, at the strengths given."""
    return dict(
        DO=dict(actor_dropout=DO),
        **{
            name: dict(actor_wd=wd, actor_l1_ratio=rho)
            for name, wd, rho in (("L2", L2, 0.0), ("L1", L1, 1.0), ("EN", EN, 0.5))
        },
        **{name: {f"actor_{name.lower()}": True} for name in ("LN", "FN", "GN", "BN", "SN")},
        InN=dict(actor_input_noise=InN),
        BCN=dict(actor_bc_noise=BCN),
        GrN=dict(actor_grad_noise=GrN),
    )


def with_regularisers(config, known):
    """The config with the flags that its `regularisers` stand for, names of `known` joined by +; an error if a name is
    unknown, or if two of them, or one and a flag, contradict each other."""
    names, flags = config.regularisers.split("+"), {}
    if config.regularisers == "none":
        return config
    if unknown := [name for name in names if name not in known]:
        sys.exit(
            f"error: unknown regulariser {unknown[0]!r}; there are none, {', '.join(known)}, and DO+LN and the like"
        )
    for key, value in [flag for name in names for flag in known[name].items()]:
        if getattr(config, key) not in (getattr(type(config), key), value) or flags.setdefault(key, value) != value:
            sys.exit(
                f"error: regularisers {config.regularisers} has {key} {value}, but another value is asked for, too"
            )
    return dataclasses.replace(config, regularisers="none", **flags)


@contextlib.contextmanager
def compiling(function, *arguments):
    """Compiles a jitted function for arguments, of which shapes are enough, in a thread while the body runs."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(lambda: function.lower(*arguments).compile())
        yield
        compiled.result()


# --- Names of runs ---

# The fields that say where and how, or what other fields say
NOT_IN_NAME = ("results", "evaluate", "video", "regularisers", "deterministic")


def identity(fields):
    """The fields on which a run's results depend, as they stand in its config.yaml."""
    return json.loads(json.dumps({key: value for key, value in fields.items() if key not in NOT_IN_NAME}))


def run_directory(algorithm, config, tuned):
    """results/<algorithm>/<dataset>/<name>, where the name has the seed and what differs from what `tuned` makes of the
    defaults, and ends in a hash of the whole config."""
    fields = identity(vars(config))
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    left_open = {key: None for key, value in defaults.items() if value is None}
    filled = vars(tuned(dataclasses.replace(config, **left_open)))
    defaults = identity(defaults | {key: filled[key] for key in left_open})
    changed = [key for key, value in fields.items() if value != defaults[key]]
    changed.sort(key=lambda key: not key.startswith("actor_"))
    words = [f"seed={config.seed}"]
    for key in changed:
        if key not in ("seed", "dataset_name"):
            words.append(f"{key}={os.path.basename(str(fields[key])).lower()}")
    name = re.sub(r"[^\w.=,+-]+", "_", ",".join(words))
    name = name if len(name) <= 150 else name[:150].rpartition(",")[0]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]
    return os.path.join(config.results, algorithm, config.dataset_name, f"{name}-{digest}")


def load_config(config_class, directory):
    """The config of a run, from its config.yaml."""
    path = os.path.join(directory, "config.yaml")
    try:
        with open(path) as file:
            fields = yaml.safe_load(file)
        return pyrallis.decode(config_class, {**fields, "results": directory})
    except Exception as error:  # pyrallis raises just that
        sys.exit(f"error: {path} is not the config of a run ({' '.join(str(error).split())})")


# --- Checkpoints ---

FORMAT = 2  # of checkpoints


def write_file(path, write, keep=None):
    """Writes a file so that a kill at any time leaves a whole one under its name: the new, or the old, of which a copy
    is kept under the name `keep`."""
    with open(path + ".partial", "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    if keep and os.path.exists(path):
        shutil.copyfile(path, keep + ".partial")
        os.replace(keep + ".partial", keep)
    os.replace(path + ".partial", path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def without_keys(tree):
    """A tree with the random keys as plain numbers."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


def flatten(tree):
    """The arrays of a tree of dictionaries and tuples, by their paths, such as actor/params/Dense_0/kernel."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(arrays, prefix):
    """The dictionaries of the arrays whose paths begin with `prefix`/."""
    tree = {}
    for path, array in arrays.items():
        if path.startswith(prefix + "/"):
            *folders, name = path[len(prefix) + 1 :].split("/")
            functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)[name] = array
    return tree


def write_checkpoint(path, tree, about, keep=None):
    """A tree of arrays and what there is to say about them as an .npz, under the arrays' paths."""
    arrays = jax.device_get(flatten(without_keys(tree)))
    about = {"format": FORMAT, "arrays": list(arrays), **about}
    about = np.frombuffer(json.dumps(about).encode(), np.uint8)
    write_file(path, lambda file: np.savez(file, about=about, **arrays), keep)


def read_checkpoint(path):
    """The arrays of a checkpoint by their paths, and what was written about them. ValueError if it isn't whole, which
    the checksums in the file show; nothing in it is ever executed."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        about = json.loads(arrays.pop("about").tobytes())
        if list(arrays) != about.pop("arrays"):
            raise ValueError("arrays are missing")
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # zipfile, zlib and json have many
        raise ValueError(f"{path} is cut short or damaged") from error
    if about["format"] != FORMAT:
        sys.exit(
            f"error: {path} is of format {about['format']}, but this version writes {FORMAT}; resume with that one"
        )
    return arrays, about


def last_checkpoint(directory):
    """Path, arrays and what was written about them, of a run's last checkpoint that is whole; None before the first."""
    problems = []
    for name in ("checkpoint.npz", "previous.npz"):
        path = os.path.join(directory, name)
        try:
            arrays, about = read_checkpoint(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        if problems:
            print(f"warning: {problems[0]}; taking the one before it, of update {about['update']}")
        return path, arrays, about
    if problems:
        sys.exit(f"error: {problems[0]}, and there is no other; remove {directory} to start anew")
    return None


# --- Runs ---


TABLES = "train.csv", "evaluations.csv", "episodes.csv"
SHOWN = "train/action_error", "validation/action_error", "evaluation/dead_neurons"  # of the analysis, on the screen


@jax.jit
def finite(tree):
    """Whether all floats in a tree of arrays (seeds, ...) are finite, (seeds,)."""
    floats = [x.reshape(len(x), -1) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.isfinite(jnp.concatenate(floats, 1)).all(1)


def with_pca_ranks(measured):
    """What `analyse` has measured, as NumPy's scalars (seeds,), with the PCA rank of features for their Gram matrices
    (seeds, F, F): the number of components that hold 99 % of the squared singular values; the features are not centred.

    In NumPy, since JAX's batched eigenvalues can hang on a CPU.
    """
    measured = jax.device_get(measured)
    for key in [key for key in measured if key.endswith("/gram")]:
        energies = np.linalg.eigvalsh(measured.pop(key).astype(np.float64))[:, ::-1]
        rank = (np.cumsum(energies, 1) < 0.99 * energies.sum(1, keepdims=True)).sum(1) + 1
        measured[key.replace("gram", "pca_rank")] = rank
    return measured


def summary(scores):
    """Mean and standard deviation of scores (seeds, episodes): over the episodes of one seed, or over several seeds."""
    if len(scores) > 1:
        return f"{scores.mean():.1f} +- {scores.mean(1).std():.1f} over {len(scores)} seeds"
    return f"{scores.mean():.1f} +- {scores.std():.1f} over {scores.size} episodes"


def noises(config):
    """Where in `conditions` the episodes with each pair of noises are, by the name of their score: score,
    score/action_noise=0.2, ..."""
    index = {}
    for i, (_, *pair) in enumerate(conditions(config)):
        words = [f"{key}={value:g}" for key, value in zip(("action_noise", "state_noise"), pair) if value]
        index.setdefault("/".join(["score", *words]), []).append(i)
    return index


class Run:
    """A run's directory, which belongs to one process at a time:

    config.yaml      the whole config
    train.csv        a row for each epoch and seed: the losses' means over the epoch
    evaluations.csv  a row for each evaluation and seed: the score, those under noise, what is inside the actor
    episodes.csv     a row for each episode of an evaluation
    checkpoint.npz   everything from which the run goes on, with the tables' lengths; previous.npz, the one before it
    finished.json    when it is: how long it took
    failed.txt       when an error has stopped it: the error

    Within it as a context manager, SIGTERM and Ctrl-C end the run with a checkpoint.
    """

    def __init__(self, script, config, tuned):
        algorithm = os.path.basename(script).removesuffix(".py")
        self.config, self.directory = config, run_directory(algorithm, config, tuned)
        if os.path.exists(self.path("finished.json")):
            print(f"finished already: {self.directory}")
            if os.getenv("WANDB_SWEEP_ID"):  # whose own run would stay empty
                self.wandb = WandB(self, algorithm)
                self.send_tables()
                self.wandb.close(0, False)
            sys.exit(0)
        self.tables, self.score, self.losses = {}, {}, {}
        self.phase, self.stopping, self.saved, self.saved_at = "", 0, 0, 0.0
        self.seconds = dict(train=0.0, evaluation=0.0, analysis=0.0)
        with self.disk_errors():
            os.makedirs(self.directory, exist_ok=True)
            self.lock = open(self.path("lock"), "w")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"error: another process is training {self.directory}", file=sys.stderr)
                sys.exit(os.EX_TEMPFAIL)
            text = yaml.safe_dump(identity(vars(config)), sort_keys=False)
            write_file(self.path("config.yaml"), lambda file: file.write(text.encode()))
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path("failed.txt"))
        self.bar = tqdm(
            total=config.num_updates, unit=" updates", disable=not sys.stderr.isatty(), smoothing=0.1, leave=False
        )
        self.wandb = WandB(self, algorithm)

    def path(self, name):
        return os.path.join(self.directory, name)

    @contextlib.contextmanager
    def disk_errors(self):
        try:
            yield
        except OSError as error:
            sys.exit(
                f"error: can't write to {self.directory} ({error.strerror}); once that is mended, the same command "
                f"goes on from the last checkpoint, of update {self.saved}"
            )

    # Ends of a run

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind, error, _):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.close()
        if error is not None and not self.stopping:
            with contextlib.suppress(OSError), open(self.path("failed.txt"), "w") as file:
                file.write(f"{error}\n")
        self.wandb.close(0 if error is None else 1, self.stopping)
        self.lock.close()

    def stop(self, number, _):
        """On a signal: the next checkpoint is the end; an evaluation, which begins with one, ends at once."""
        again, self.stopping = self.stopping, number
        if again or self.phase in ("", "evaluation"):
            sys.exit(128 + number)

    def finish(self):
        about = dict(updates=self.config.num_updates, seconds=self.seconds, **self.score)
        with self.disk_errors():
            write_file(self.path("finished.json"), lambda file: file.write(json.dumps(about).encode()))
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path("previous.npz"))
        minutes = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in self.seconds.items())
        print(f"final score {self.score['score']}; {minutes}; {self.directory}")

    @contextlib.contextmanager
    def timed(self, phase):
        self.phase, started = phase, time.monotonic()
        yield
        self.seconds[phase] += time.monotonic() - started
        self.phase = "between"

    # Checkpoints

    def checkpoint(self, states, update, evaluated, now=False):
        """Saves everything if `now`, after a signal, or a minute after the last time; after a signal, exits."""
        if not (now or self.stopping or time.monotonic() - self.saved_at > 60):
            return
        with self.disk_errors():
            for file in self.tables.values():
                file.flush()
                os.fsync(file.fileno())
            about = dict(
                update=update, evaluated=evaluated, dataset=self.dataset, seconds=self.seconds, score=self.score,
                tables={table: os.path.getsize(self.path(table)) for table in TABLES},
            )  # fmt: skip
            tree = {"states": states, "data": self.policy_data}
            write_checkpoint(self.path("checkpoint.npz"), tree, about, keep=self.path("previous.npz"))
        self.saved, self.saved_at = update, time.monotonic()
        if self.stopping:
            print(f"stopped at update {update}; the same command goes on from there", flush=True)
            sys.exit(128 + self.stopping)

    def restore(self, init, seeds, data):
        """The states, the update and the last evaluation's update to go on from: those of the last checkpoint that is
        whole, or at first init(seeds). The tables are cut to what they were then."""
        self.dataset = fingerprint(data)
        self.policy_data = {"mean": data["mean"], "std": data["std"], "actions": data["actions"][:1]}
        for table in TABLES:
            with self.disk_errors(), open(self.path(table), "ab"):
                pass
        found = last_checkpoint(self.directory)
        self.wandb.begin()
        if not found:
            if any(os.path.getsize(self.path(table)) for table in TABLES):
                sys.exit(f"error: {self.directory} has lost its checkpoints; remove it to start anew")
            init = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})  # since it runs once
            states = init(seeds)
            self.checkpoint(states, 0, 0, now=True)
            return states, 0, 0
        path, arrays, about = found
        like = jax.eval_shape(init, seeds)
        shapes = {f"states/{key}": leaf.shape for key, leaf in flatten(jax.eval_shape(without_keys, like)).items()}
        stored = {key: array.shape for key, array in arrays.items() if key.startswith("states/")}
        for key in {**shapes, **stored}:
            if shapes.get(key) != stored.get(key):
                sys.exit(
                    f"error: {path} is of another version of the script: {key} has shape {stored.get(key)} there and "
                    f"{shapes.get(key)} here; go on with that version, or remove {self.directory} to start anew"
                )
        with self.disk_errors():
            os.replace(path, self.path("checkpoint.npz"))  # if that was damaged, it must not become the one before
        if about["dataset"] != self.dataset:
            sys.exit(f"error: this is not the dataset with which {self.directory} began; get that, or remove this")
        for table, size in about["tables"].items():
            if os.path.getsize(self.path(table)) < size:
                sys.exit(f"error: {self.path(table)} has lost rows; remove {self.directory} to start anew")
            with self.disk_errors():
                os.truncate(self.path(table), size)
        self.send_tables()
        self.seconds, self.score = about["seconds"], about["score"]
        self.saved, self.saved_at = about["update"], time.monotonic()
        self.bar.update(about["update"])
        print(f"going on from update {about['update']}")
        leaves = [
            jax.random.wrap_key_data(arrays[f"states/{key}"]) if is_key(leaf) else jnp.asarray(arrays[f"states/{key}"])
            for key, leaf in flatten(like).items()
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), about["update"], about["evaluated"]

    # Tables

    def write(self, table, rows):
        """Appends rows, which are dictionaries with the same keys, to a table."""
        with self.disk_errors():
            if table not in self.tables:
                self.tables[table] = open(self.path(table), "a", newline="")
            writer = csv.DictWriter(self.tables[table], rows[0])
            if not self.tables[table].tell():
                writer.writeheader()
            writer.writerows(
                {key: f"{value:.9g}" if isinstance(value, float) else value for key, value in row.items()}
                for row in rows
            )
        if table != "episodes.csv":
            self.wandb.send(rows)

    def read(self, table):
        """The rows of a table; only what is a number in full."""
        with contextlib.suppress(FileNotFoundError), open(self.path(table), newline="") as file:
            for row in csv.DictReader(file):
                yield {key: float(value) if key not in ("seed", "update") else int(value) for key, value in row.items()}

    def send_tables(self):
        groups = [
            (u, [*rows])
            for table in TABLES[:2]
            for u, rows in itertools.groupby(self.read(table), lambda row: row["update"])
        ]
        for _, rows in sorted(groups, key=lambda group: group[0]):
            self.wandb.send(rows)

    def diverged(self, quantity, value, seed, update):
        sys.exit(
            f"error: {quantity} is {value} after update {update} (seed {self.config.seed + seed}); the last good "
            f"checkpoint is {self.path('checkpoint.npz')}, of update {self.saved}"
        )

    def log_epoch(self, update, infos, states):
        """Logs the scalars (seeds, steps) of the epoch that ends with `update`; an error if anything isn't finite."""
        infos, epoch = {key: np.asarray(value) for key, value in infos.items()}, self.config.log_every
        for key, values in infos.items():
            for seed, step in np.argwhere(~np.isfinite(values)):
                self.diverged(key, values[seed, step], seed, update - epoch + (step + 1) * epoch // values.shape[1])
        for seed in np.flatnonzero(~np.asarray(finite(states))):
            arrays = flatten(without_keys(states)).items()
            key = next(key for key, array in arrays if not np.isfinite(np.asarray(array[seed])).all())
            self.diverged(key, "NaN or infinite", seed, update)
        means = {key: values.mean(1) for key, values in infos.items()}
        self.write("train.csv", self.rows(update, means))
        self.losses = {key: f"{value.mean():.4g}" for key, value in means.items()}
        self.bar.update(epoch)
        self.bar.set_postfix({**self.score, **self.losses})

    def log_evaluation(self, update, returns, measured):
        """Logs the returns (seeds, E) of an evaluation's episodes and what was measured with them, (seeds,) each."""
        rows, scores = conditions(self.config), normalized_score(self.config, returns)
        self.write("episodes.csv", [
            dict(
                seed=self.config.seed + seed, update=update, episode=row[0], action_noise=row[1], state_noise=row[2],
                **{"return": float(returns[seed, i]), "score": float(scores[seed, i])},
            )
            for seed in range(len(returns)) for i, row in enumerate(rows)
        ])  # fmt: skip
        means = {name: scores[:, index].mean(1) for name, index in noises(self.config).items()}
        self.write("evaluations.csv", self.rows(update, means | measured))
        self.score = {"score": summary(scores[:, noises(self.config)["score"]])}
        shown = {key: f"{value.mean():.4g}" for key, value in measured.items() if key in SHOWN}
        shown = {**self.score, **self.losses, **shown, "updates/s": f"{update / self.seconds['train']:.0f}"}
        self.bar.write(
            f"{update:>9,} updates  " + "  ".join(f"{key} {value}" for key, value in shown.items()), sys.stdout
        )

    def rows(self, update, values):
        values = {key: np.asarray(value) for key, value in values.items()}
        return [
            dict(seed=self.config.seed + i, update=update, **{key: float(value[i]) for key, value in values.items()})
            for i in range(self.config.num_seeds)
        ]


# --- Use of runs ---


def load(script, directory):
    """Of a run of `script`, which is rebrac or iql: the config, the update of its checkpoint, and its policies, from
    states (seeds, E, S) to actions (seeds, E, A)."""
    config = load_config(script.Config, directory)
    _, arrays, about = last_checkpoint(directory) or sys.exit(f"error: {directory} has no checkpoint")
    actors, data = unflatten(arrays, "states/actor"), unflatten(arrays, "data")
    return config, about["update"], functools.partial(script.act_all, *script.split_config(config), actors, data)


def load_policy(script, directory, seed=None):
    """The policy of a run of `script`, which is rebrac or iql: a function from states (..., S), as the environment
    gives them, to actions (..., A). `seed` is one of the run's, by default its first; ValueError if it isn't."""
    config, _, policies = load(script, directory)
    index = 0 if seed is None else seed - config.seed
    if not 0 <= index < config.num_seeds:
        raise ValueError(f"{directory} has the seeds {config.seed} to {config.seed + config.num_seeds - 1}, not {seed}")

    def policy(observations):
        observations = np.asarray(observations, np.float32)
        rows = observations.reshape(-1, observations.shape[-1])
        actions = policies(np.broadcast_to(rows, (config.num_seeds, *rows.shape)))
        return np.asarray(actions[index]).reshape(*observations.shape[:-1], -1)

    return policy


def evaluate_run(script, given):
    """`--evaluate RUN`: prints the scores of a run's policies, and with `--video FILE` writes an episode."""
    config, update, policies = load(script, given.evaluate)
    fields = dict(evaluate=given.evaluate, video=given.video)
    if given.eval_episodes is not None:
        fields["eval_episodes"] = given.eval_episodes
    if given.eval_noise != script.Config.eval_noise:
        fields["eval_noise"] = given.eval_noise
    config = dataclasses.replace(config, **fields)
    check(config, script.rules(config))
    envs = make_envs(config)
    scores = normalized_score(config, evaluate(config, policies, envs, update)[0])
    for name, index in noises(config).items():
        print(f"{name} {summary(scores[:, index])}")
    if given.video:
        record(given.video, load_policy(script, given.evaluate), envs.own[0], config.seed, update, 0)


# --- Weights & Biases ---


WANDB_SECONDS = 30  # to reach it, and to send the rest at the end


def wandb_mode():
    """The mode for W&B, and why: what WANDB_MODE says; online with an account or under a sweep's agent; or off."""
    if mode := os.getenv("WANDB_MODE"):
        return {"dryrun": "offline", "run": "online"}.get(mode, mode), f"WANDB_MODE={mode}"
    if os.getenv("WANDB_SWEEP_ID"):
        return "online", "a run of a sweep"
    host = urllib.parse.urlparse(os.getenv("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(os.getenv("NETRC")).authenticators(host):
            return "online", f"an account at {host}"
    if os.getenv("WANDB_API_KEY"):
        return "online", f"an account at {host}"
    return "disabled", "no account; WANDB_MODE=offline keeps what `wandb sync` can send later"


class WandB(threading.Thread):
    """Sends the rows of a run's tables to Weights & Biases, from a thread that training never waits for.

    The first time all rows are sent, later those that W&B does not have yet: a resumed run goes on in the same W&B run.
    """

    def __init__(self, run, algorithm):
        super().__init__(daemon=True)
        self.mode, why = wandb_mode()
        print(f"W&B: {'off' if self.mode == 'disabled' else self.mode} ({why})")
        self.rows, self.id = queue.SimpleQueue(), os.getenv("WANDB_RUN_ID")
        self.later = f"later, `wandb sync {run.directory}/wandb/*run*` sends it"
        if self.mode == "disabled":
            return
        if not self.id:  # an agent of a sweep gives one
            with run.disk_errors(), open(run.path("wandb_id"), "a+") as file:
                file.seek(0)
                self.id = file.read() or os.urandom(4).hex()
                file.truncate(0)
                file.write(self.id)
        self.settings = dict(
            id=self.id, dir=run.directory, name=os.path.basename(run.directory), resume="allow",
            config=dict(algorithm=algorithm, **identity(vars(run.config))),
            group=f"{algorithm}-{run.config.dataset_name}",
        )  # fmt: skip
        if not os.getenv("WANDB_SWEEP_ID"):
            self.settings["project"] = os.getenv("WANDB_PROJECT", "regularised-actors")

    def begin(self):
        """Starts the thread. Not before a checkpoint is read: wandb's import and NumPy's reading of arrays both use
        Python's `ast`, which can fail if two threads do."""
        if self.mode != "disabled" and self.ident is None:
            self.start()

    def send(self, rows):
        if self.mode != "disabled":
            self.rows.put(rows)

    def close(self, exit_code, preempted):
        """Waits at most WANDB_SECONDS for what was not sent yet."""
        if self.mode == "disabled":
            return
        self.begin()
        self.rows.put((exit_code, preempted))
        self.join(WANDB_SECONDS)
        if self.is_alive():
            print(f"W&B has not taken everything in {WANDB_SECONDS} s; {self.later}")

    def run(self):
        try:
            self.log()
        except Exception as error:
            print(f"W&B: off after all ({' '.join(str(error).split())[:200]})")

    def log(self):
        import wandb

        settings = wandb.Settings(init_timeout=WANDB_SECONDS, finish_timeout=WANDB_SECONDS, console="off", silent=True)
        try:
            run = wandb.init(mode=self.mode, settings=settings, **self.settings)
        except Exception as error:
            print(f"W&B: offline after all ({' '.join(str(error).split())[:200]}); {self.later}")
            wandb.teardown()
            run = wandb.init(mode="offline", settings=settings, **self.settings)
        step, values = 0, {}  # kept back: an update's losses and its evaluation are one step, which can't be added to
        while isinstance(rows := self.rows.get(), list):
            update = rows[0]["update"]
            if update < run.step:  # W&B has it from before the run was resumed
                continue
            if values and update > step:
                run.log(values, step=step)
                values = {}
            step, keys = update, [key for key in rows[0] if key not in ("seed", "update")]
            values |= {key: np.mean([row[key] for row in rows]) for key in keys}
            if len(rows) > 1:
                values |= {f"seed{row['seed']}/{key}": row[key] for row in rows for key in keys}
        exit_code, preempted = rows
        if values and exit_code == 0:  # else the run sends them when it goes on
            run.log(values, step=step)
        if preempted:
            run.mark_preempting()  # so that a sweep gives it to another agent
        run.finish(exit_code=exit_code)
