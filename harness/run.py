"""A run: its directory, its end, its checkpoints, and what it logs."""

import contextlib
import fcntl
import json
import os
import signal
import sys
import time

import numpy as np
import yaml
from tqdm import tqdm

from harness.checkpoint import (
    flatten,
    last_checkpoint,
    restore_tree,
    without_keys,
    write_checkpoint,
    write_file,
)
from harness.datasets import normalized_score
from harness.directory import check_same_config, run_directory, saved_fields
from harness.errors import BusyError, UserError
from harness.evaluation import score_columns, summary
from harness.finite import find_divergence
from harness.seeds import check_device
from harness.tables import Tables, episode_rows, seed_rows
from harness.wandb_log import WandB, is_whole_there

# What is shown of the analysis on the screen
SHOWN = ("train/action_error", "validation/action_error", "evaluation/dead_neurons")


class Run:
    """A run's directory, which belongs to one process at a time:

    config.yaml      the fields on which its results depend
    train.csv        a row for each epoch and seed: the losses' means over the epoch
    evaluations.csv  a row for each evaluation and seed: the scores, what is inside the actor
    episodes.csv     a row for each episode of an evaluation
    checkpoint.npz   everything from which the run resumes; previous.npz, the one before it
    finished.json    once the run is finished: how long it took
    failed.txt       once an error has stopped it: the error

    In a `with` statement it handles SIGTERM, Ctrl-C, and SIGHUP unless nohup has it ignored: they
    save a checkpoint and exit.
    """

    def __init__(self, script, config, tuned):
        self.algorithm = os.path.basename(script).removesuffix(".py")
        self.config = config
        self.directory = run_directory(self.algorithm, config, tuned)
        check_same_config(self.directory, config)
        self.tables = Tables(self.directory)
        self.finished_before = os.path.exists(self.path("finished.json"))
        self.score = {}  # to show
        self.losses = {}  # to show
        self.phase = "starting"
        self.stopping = 0  # the signal that asked for the end
        self.saved = 0  # the last checkpoint's update
        self.saved_at = -np.inf  # and when it was made
        self.seconds = dict(train=0.0, evaluation=0.0, analysis=0.0)
        if self.finished_before:
            with open(self.path("finished.json")) as file:
                score = json.load(file)["score"]
            print(f"finished already: {self.directory}; final score {score}")
            return
        check_device()
        with self.disk_errors():
            os.makedirs(self.directory, exist_ok=True)
            self.take_lock()
            text = yaml.safe_dump(saved_fields(vars(config)), sort_keys=False)
            write_file(self.path("config.yaml"), lambda file: file.write(text.encode()))
            self.remove("failed.txt")
            self.wandb = WandB(self.directory, self.algorithm, saved_fields(vars(config)))
        self.bar = tqdm(
            total=config.num_updates,
            unit=" updates",
            disable=not sys.stderr.isatty(),
            smoothing=0.1,
            leave=False,
        )

    def path(self, name):
        return os.path.join(self.directory, name)

    def remove(self, name):
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.path(name))

    def take_lock(self):
        """Take the run's lock, or raise BusyError. `is_busy` elsewhere holds it for an instant."""
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

    @contextlib.contextmanager
    def disk_errors(self):
        """Say what to do when the disk is full or can't be written to."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"can't write to {self.directory} ({error.strerror}); once that is mended, the "
                f"same command resumes from the last checkpoint, of update {self.saved}"
            ) from error

    # Its beginning and its end

    def __enter__(self):
        if self.finished_before:
            self.send_again()
            return self
        self.handlers = {}
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self.handlers[number] = signal.signal(number, self.stop)
        return self

    def __exit__(self, kind, error, _):
        if self.finished_before:
            return
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.close()
        if error is not None and not self.stopping:
            name = "error" if isinstance(error, UserError) else type(error).__name__
            text = f"{name}: {error}\n".encode(errors="backslashreplace")
            with contextlib.suppress(OSError), open(self.path("failed.txt"), "wb") as file:
                file.write(text)
        self.wandb.close(0 if error is None else 1, preempted=bool(self.stopping))
        self.lock.close()

    def send_again(self):
        """Send a finished run to W&B if that hasn't all of it.

        A sweep has made a run for it, which would stay empty.
        """
        whole = is_whole_there(self.directory, self.config.num_updates)
        if os.getenv("WANDB_SWEEP_ID") or not whole:
            wandb = WandB(self.directory, self.algorithm, saved_fields(vars(self.config)))
            wandb.start(self.tables.updates())
            wandb.close(0, preempted=False)

    def stop(self, number, _):
        """End the run on a signal.

        While it trains it stops at its next checkpoint. While it starts or evaluates it stops at
        once: then nothing is lost. A second signal always stops it at once.
        """
        is_second = self.stopping
        self.stopping = number
        if is_second or self.phase in ("starting", "evaluation"):
            print(f"stopped; the same command goes on from update {self.saved}", flush=True)
            sys.exit(128 + number)

    def finish(self):
        """Mark the run as finished."""
        about = dict(updates=self.config.num_updates, seconds=self.seconds, **self.score)
        with self.disk_errors():
            text = json.dumps(about)
            write_file(self.path("finished.json"), lambda file: file.write(text.encode()))
            self.remove("previous.npz")
        times = [f"{phase} {seconds:.0f} s" for phase, seconds in self.seconds.items()]
        print(f"final score {self.score['score']}; {', '.join(times)}; {self.directory}")

    @contextlib.contextmanager
    def timed(self, phase):
        """Add the time of the body to the phase's."""
        self.phase = phase
        started = time.monotonic()
        yield
        self.seconds[phase] += time.monotonic() - started
        self.phase = "between"

    # Checkpoints

    def restore(self, states, data):
        """Start or resume the run. `data` is a script's dataset.

        Returns the states, the number of updates made, and the update of the last evaluation. They
        are those of the last whole checkpoint; a new run has `states`, 0 and 0. The tables are cut
        to what they were then. W&B begins here, too.
        """
        # What the policy needs beside the actor: how states were normalised, the actions' shape
        self.policy_data = dict(mean=data["mean"], std=data["std"], actions=data["actions"][:1])
        with self.disk_errors():
            self.tables.create()
        found = last_checkpoint(self.directory)
        if found is None:
            if not self.tables.are_empty():
                raise UserError(
                    f"{self.directory} has lost its checkpoints; remove it to start anew"
                )
            self.wandb.start([])
            self.checkpoint(states, 0, 0, now=True)
            return states, 0, 0
        path, arrays, about = found
        self.check_checkpoint(path, arrays, states)
        with self.disk_errors():
            # The newer one may be damaged. It must not become the previous one.
            os.replace(path, self.path("checkpoint.npz"))
            self.tables.cut(about["tables"])
        self.wandb.start(self.tables.updates())
        self.seconds = about["seconds"]
        self.score = about["score"]
        self.saved = about["update"]
        self.saved_at = time.monotonic()
        self.bar.update(about["update"])
        print(f"resuming from update {about['update']}")
        return restore_tree(states, arrays, "states"), about["update"], about["evaluated"]

    def check_checkpoint(self, path, arrays, states):
        """Raise UserError if a checkpoint is of another version of the script."""
        leaves = flatten(without_keys(states))
        expected = {f"states/{key}": leaf.shape for key, leaf in leaves.items()}
        found = {key: x.shape for key, x in arrays.items() if key.startswith("states/")}
        for key in {**expected, **found}:
            if expected.get(key) != found.get(key):
                raise UserError(
                    f"{path} is of another version of the script: {key} has shape "
                    f"{found.get(key)} there and {expected.get(key)} here; resume with that "
                    f"version, or remove {self.directory} to start anew"
                )

    def checkpoint(self, states, update, evaluated, now=False):
        """Save everything if `now`, after a signal, or a minute after the last time.

        After a signal, exit.
        """
        is_due = time.monotonic() - self.saved_at > 60
        if not (now or self.stopping or is_due):
            return
        with self.disk_errors():
            about = dict(
                update=update,
                evaluated=evaluated,
                seconds=self.seconds,
                score=self.score,
                tables=self.tables.save(),
            )
            tree = {"states": states, "data": self.policy_data}
            path = self.path("checkpoint.npz")
            write_checkpoint(path, tree, about, keep=self.path("previous.npz"))
        self.saved = update
        self.saved_at = time.monotonic()
        if self.stopping:
            print(f"stopped at update {update}; the same command resumes there", flush=True)
            sys.exit(128 + self.stopping)

    # Logs

    def log_epoch(self, update, infos, states):
        """Log the scalars (seeds, steps) of the epoch that ends with `update`.

        Raises UserError if anything isn't finite.
        """
        infos = {key: np.asarray(values) for key, values in infos.items()}
        problem = find_divergence(self.config, update, infos, states)
        if problem:
            raise UserError(
                f"{problem}; the last good checkpoint is {self.path('checkpoint.npz')}, "
                f"of update {self.saved}"
            )
        means = {key: values.mean(1) for key, values in infos.items()}
        self.write("train.csv", seed_rows(self.config, update, means))
        self.losses = {key: f"{values.mean():.4g}" for key, values in means.items()}
        self.bar.update(self.config.log_every)
        self.bar.set_postfix({**self.score, **self.losses})

    def log_evaluation(self, update, returns, measured):
        """Log the returns (seeds, E) of an evaluation, and what was measured with it, (seeds,)."""
        scores = normalized_score(self.config.dataset_name, returns)
        self.write("episodes.csv", episode_rows(self.config, update, returns, scores))
        means = {}
        for name, index in score_columns(self.config).items():
            means[name] = scores[:, index].mean(1)
        self.write("evaluations.csv", seed_rows(self.config, update, {**means, **measured}))

        without_noise = score_columns(self.config)["score"]
        self.score = {"score": summary(scores[:, without_noise])}
        shown = {key: f"{measured[key].mean():.4g}" for key in SHOWN if key in measured}
        speed = {"updates/s": f"{update / self.seconds['train']:.0f}"}
        words = [f"{update:>9,} updates"]
        for key, value in {**self.score, **self.losses, **shown, **speed}.items():
            words.append(f"{key} {value}")
        self.bar.write("  ".join(words), sys.stdout)

    def write(self, table, rows):
        """Append rows to a table, and send them to W&B unless they are of episodes."""
        with self.disk_errors():
            self.tables.append(table, rows)
        if table != "episodes.csv":
            self.wandb.send(rows)
