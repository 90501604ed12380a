"""What a run keeps in its directory: its config, tables, checkpoints, end, and what W&B gets."""

import contextlib
import fcntl
import json
import os
import time

import numpy as np
import yaml

from harness.checkpoint import last_checkpoint, read_checkpoint, write_checkpoint, write_file
from harness.datasets import normalized_score
from harness.directory import check_same_config, is_finished, run_directory, saved_fields
from harness.errors import BusyError, UserError, disk_errors
from harness.evaluation import score_columns, summary
from harness.tables import Tables, episode_rows, seed_rows
from harness.versions import made_with
from harness.wandb_log import WandB, is_whole_there


class Record:
    """A run's directory, which belongs to one process at a time:

    config.yaml      the fields on which its results depend
    train.csv        a row for each epoch and seed: the losses' means over the epoch
    evaluations.csv  a row for each evaluation and seed: the scores, what is inside the actor
    episodes.csv     a row for each episode of an evaluation
    features.npy     the actor's features on some states, in the last evaluation
    checkpoint.npz   everything from which the run resumes; previous.npz, the one before it
    finished.json    once the run is finished: how long it took, and what trained it
    failed.txt       once an error has stopped it: the error
    lock             held by the process that trains it
    output.txt       what it printed, where a sweep has started it
    wandb/           W&B's own files; wandb_id and wandb_sent: its W&B run, and what that has
    """

    def __init__(self, algorithm, config, tuned):
        self.algorithm = algorithm
        self.config = config
        self.directory = run_directory(algorithm, config, tuned)
        self.tables = Tables(self.directory)
        self.is_finished = is_finished(self.directory)
        self.score = {}  # to show
        self.losses = {}  # to show
        self.saved = 0  # update of the last checkpoint; None if that hasn't been read yet
        if os.path.exists(self.path("checkpoint.npz")):
            self.saved = None
        self.lock = None  # the file, once the directory is this process's
        self.wandb = None
        self.held = None  # rows that W&B gets after an evaluation that is still played
        self.seconds = dict(train=0.0, evaluation=0.0, analysis=0.0)  # its share of the time
        self.made_with = []  # of the processes that trained it: see versions.py

    def path(self, name):
        return os.path.join(self.directory, name)

    def remove(self, name):
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.path(name))

    def disk_errors(self):
        """Return a context that says what to do when the disk is full or can't be written to."""
        start = self.checkpoint_text()
        advice = f"once that is fixed, the same command resumes from {start}"
        return disk_errors(self.directory, advice)

    def checkpoint_text(self):
        """Return words for the last checkpoint."""
        if self.saved is None:
            return "the last checkpoint"
        return f"the last checkpoint, of update {self.saved}"

    # Its beginning

    def open(self):
        """Make the directory this process's, or raise BusyError."""
        with self.disk_errors():
            os.makedirs(self.directory, exist_ok=True)
            self.take_lock()
            try:
                check_same_config(self.directory, self.config)
            except UserError:
                self.lock.close()  # its caller may keep the error, and so this object
                raise
            text = yaml.safe_dump(saved_fields(vars(self.config)), sort_keys=False)
            write_file(self.path("config.yaml"), lambda file: file.write(text.encode()))
            self.remove("failed.txt")
            self.wandb = WandB(self.directory, self.algorithm, saved_fields(vars(self.config)))

    def take_lock(self):
        """Take the run's lock, or raise BusyError.

        Three tries are made, since `is_busy` of another process holds it for an instant.
        """
        try:
            self.lock = open(self.path("lock"), "a")  # NFS locks what can be written
        except PermissionError:  # another user's file
            self.lock = open(self.path("lock"))
        for _ in range(3):
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.1)
            except OSError as error:
                print(
                    f"warning: no locks on this disk ({error.strerror}), so nothing keeps a "
                    "second process from training this run, too"
                )
                return
        raise BusyError(f"another process is training {self.directory}")

    def say_finished(self):
        """Print the score of a run that was finished before."""
        check_same_config(self.directory, self.config)
        with open(self.path("finished.json")) as file:
            score = json.load(file)["score"]
        print(f"finished already: {self.directory}; final score {score}")

    def send_again(self):
        """Send a finished run to W&B if that hasn't all of it.

        A sweep has made a run for it, which would stay empty.
        """
        whole = is_whole_there(self.directory, self.config.num_updates)
        if os.getenv("WANDB_SWEEP_ID") or not whole:
            wandb = WandB(self.directory, self.algorithm, saved_fields(vars(self.config)))
            wandb.start(self.tables.updates())
            wandb.start_finish(0, preempted=False)
            wandb.wait()

    def position(self):
        """Return the updates of the last checkpoint, and of the last evaluation that it has."""
        found = last_checkpoint(self.directory)
        return (found[2]["update"], found[2]["evaluated"]) if found else (0, 0)

    def go_back(self, position):
        """Make previous.npz the last checkpoint, if it has this position. Return whether it has."""
        try:
            about = read_checkpoint(self.path("previous.npz"))[1]
        except (OSError, ValueError):
            return False
        if (about["update"], about["evaluated"]) != position:
            return False
        os.replace(self.path("previous.npz"), self.path("checkpoint.npz"))
        return True

    # Its end

    def finish(self):
        """Mark the run as finished."""
        about = dict(updates=self.config.num_updates, seconds=self.seconds, **self.score)
        about["made_with"] = self.made_with
        with self.disk_errors():
            text = json.dumps(about)
            write_file(self.path("finished.json"), lambda file: file.write(text.encode()))
            self.remove("previous.npz")
        times = [f"{phase} {value:.0f} s" for phase, value in self.seconds.items()]
        print(f"final score {self.score['score']}; {', '.join(times)}; {self.directory}")

    def fail(self, error):
        """Keep the error that has stopped the run."""
        name = "error" if isinstance(error, UserError) else type(error).__name__
        text = f"{name}: {error}\n".encode(errors="backslashreplace")
        with contextlib.suppress(OSError), open(self.path("failed.txt"), "wb") as file:
            file.write(text)

    def end_wandb(self, exit_code, preempted):
        """Begin to end the W&B run. `close` waits for that."""
        if self.wandb:
            self.wandb.start_finish(exit_code, preempted)

    def close(self):
        """Wait for the end of the W&B run, and release the directory."""
        if self.wandb:
            self.wandb.wait()
        self.tables.close()
        if self.lock:
            self.lock.close()

    # Its checkpoints

    def restore(self, initial):
        """Return the arrays of the last whole checkpoint, and what was written about it.

        A new run has the `initial` ones, by their paths, and None. The tables are cut to their
        sizes at that checkpoint. W&B begins here, too.
        """
        with self.disk_errors():
            self.tables.create()
        found = last_checkpoint(self.directory)
        if found is None:
            if not self.tables.are_empty():
                raise UserError(
                    f"{self.directory} has lost its checkpoints; remove it to start anew"
                )
            self.wandb.start([])
            self.made_with = [made_with()]
            return initial, None
        path, arrays, about = found
        self.check_checkpoint(path, arrays, initial)
        with self.disk_errors():
            # The newer one may be damaged. It must not become the previous one.
            os.replace(path, self.path("checkpoint.npz"))
            self.tables.cut(about["tables"])
        self.wandb.start(self.tables.updates())
        self.score = about["score"]
        self.seconds = about["seconds"]
        self.saved = about["update"]
        before = about.get("made_with", ["unknown version"])  # older runs lack it
        self.made_with = list(dict.fromkeys([*before, made_with()]))
        return arrays, about

    def check_checkpoint(self, path, arrays, initial):
        """Raise UserError if a checkpoint doesn't fit the script, as one of another version."""
        expected = {key: array.shape for key, array in initial.items()}
        found = {key: x.shape for key, x in arrays.items() if key.startswith("states/")}
        for key in {**expected, **found}:
            if expected.get(key) != found.get(key):
                raise UserError(
                    f"{path} is of another version of the script: of {key} the shape is "
                    f"{found.get(key, 'missing')} there and {expected.get(key, 'missing')} here; "
                    "resume with that version, or remove its directory to start anew"
                )

    def save(self, tree, about):
        """Save a tree of arrays, the tables' sizes, and the dictionary `about`."""
        with self.disk_errors():
            own = dict(seconds=self.seconds, score=self.score, made_with=self.made_with)
            about = {**about, **own, "tables": self.tables.save()}
            path = self.path("checkpoint.npz")
            write_checkpoint(path, tree, about, keep=self.path("previous.npz"))
        self.saved = about["update"]

    # Its tables

    def log_epoch(self, update, infos):
        """Log the means of scalars (seeds, steps) over the epoch that ends with `update`."""
        means = {key: values.mean(1) for key, values in infos.items()}
        self.write("train.csv", seed_rows(self.config, update, means))
        self.losses = {key: f"{values.mean():.4g}" for key, values in means.items()}

    def log_evaluation(self, update, returns, measured):
        """Log the returns (seeds, E) of an evaluation, and what was measured with it, (seeds,).

        `features` (seeds, B, F) among it go to a file, for the report.
        """
        scores = normalized_score(self.config.dataset_name, returns)
        self.write("episodes.csv", episode_rows(self.config, update, returns, scores))
        means = {}
        for name, index in score_columns(self.config).items():
            means[name] = scores[:, index].mean(1)
        held = self.held
        self.held = None
        numbers = {key: values for key, values in measured.items() if key != "features"}
        self.write("evaluations.csv", seed_rows(self.config, update, {**means, **numbers}))
        if "features" in measured:
            with self.disk_errors():
                features = measured["features"]
                write_file(self.path("features.npy"), lambda file: np.save(file, features))
        for rows in held or []:
            self.wandb.send(rows)
        without_noise = score_columns(self.config)["score"]
        self.score = {"score": summary(scores[:, without_noise])}

    def write(self, table, rows):
        """Append rows to a table, and send them to W&B unless they are of episodes."""
        with self.disk_errors():
            self.tables.append(table, rows)
        if table == "episodes.csv":
            return
        if self.held is None:
            self.wandb.send(rows)
        else:
            self.held.append(rows)
