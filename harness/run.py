"""A run while it is trained: its end, its time, when it is saved, and what it shows."""

import contextlib
import os
import signal
import sys
import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from harness.checkpoint import flatten, restore_tree, without_keys
from harness.devices import devices_work, host
from harness.errors import DeviceError, UserError, one_line
from harness.finite import find_divergence
from harness.members import check_device, has_accelerator
from harness.memory import is_out_of_memory
from harness.record import Record

# What is shown of the analysis on the screen
SHOWN = ("train/action_error", "validation/action_error", "evaluation/dead_neurons")

SAME_SIGNAL = 3  # seconds within which two SIGTERMs are one


class Task(threading.Thread):
    """A call in a thread of its own. Its error is raised where it is waited for."""

    def __init__(self, function):
        super().__init__(daemon=True)  # so that it never keeps the process from its end
        self.function = function
        self.error = None
        # Not `join`: once a signal has interrupted it, it says that the thread has ended
        self.ended = threading.Event()
        self.start()

    def run(self):
        try:
            self.result = self.function()
        except BaseException as error:
            self.error = error
        self.ended.set()

    def wait(self):
        self.ended.wait()
        if self.error is not None:
            raise self.error
        return self.result


@jax.jit
def copied(tree):
    return jax.tree.map(jnp.copy, tree)


class Run:
    """A run that is being trained. A `Group` is several runs in one program.

    In a `with` statement it handles SIGTERM, Ctrl-C and SIGHUP, see `stop`. Under nohup SIGHUP
    stays ignored.
    """

    stopping = 0  # the signal that asked for the end

    def __init__(self, script, config, tuned):
        record = Record(os.path.basename(script).removesuffix(".py"), config, tuned)
        self.directory = record.directory
        self.finished_before = record.is_finished
        if self.finished_before:
            record.say_finished()
        else:
            check_device()
            record.open()
        self.begin([record], config)

    def begin(self, records, config):
        """Begin with some records. `config` is that of all their members."""
        self.records = records
        self.config = config
        self.phase = "starting"
        self.update = 0  # of the checkpoint from which it has resumed
        self.evaluated = 0  # the last evaluation's update
        self.timed_until = (0, 0.0)  # update and seconds of training at the last evaluation
        self.saved_at = -np.inf  # when the last checkpoint was made
        self.save_seconds = 0.0  # how long that took
        self.seconds = dict(train=0.0, evaluation=0.0, analysis=0.0)  # of this process
        self.pending = None  # the evaluation that is played while training goes on
        self.bar = tqdm(
            total=config.num_updates,
            unit=" updates",
            disable=self.finished_before or not sys.stderr.isatty(),
            smoothing=0.1,
            leave=False,
        )

    def parts(self):
        """Return pairs of a record and its members' slice."""
        pairs = []
        start = 0
        for record in self.records:
            stop = start + record.config.num_seeds
            pairs.append((record, slice(start, stop)))
            start = stop
        return pairs

    def printing(self, record):
        """Return a context in which what is printed goes where a record's lines belong."""
        return contextlib.nullcontext()

    # Its beginning and its end

    def __enter__(self):
        if self.finished_before:
            self.records[0].send_again()
            return self
        self.handlers = {}
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self.handlers[number] = signal.signal(number, self.stop)
        return self

    def __exit__(self, kind, cause, _):
        if self.finished_before:
            return
        self.bar.close()
        error = self.explain(cause)
        if isinstance(error, Exception):
            self.print_error(error)
        # A run that has lost its device goes on elsewhere. After a signal an error may come from
        # other processes that end. One of the run itself comes again when it resumes.
        is_stopped = bool(self.stopping) or isinstance(error, DeviceError)
        if error is not None and not is_stopped:
            for record in self.records:
                record.fail(error)
        try:
            self.close(self.records, 0 if error is None else 1, preempted=is_stopped)
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            # A normal exit would crash in an evaluation's thread. Where wandb.init was cut short,
            # it would also hang: Python waits for wandb's process, and that process for Python.
            # A second signal has cut short the end of a W&B run, whose thread Python waits for.
            if self.stopping and (self.is_evaluating() or self.is_wandb_busy()):
                sys.stdout.flush()
                os._exit(128 + self.stopping)
        if self.is_evaluating():
            self.pending.ended.wait()
        if error is not cause:
            raise error from cause

    def print_error(self, error):
        """Print the error that ends the run where nobody else does. A script's `main` prints it."""

    def is_wandb_busy(self):
        """Return whether the start or the end of a W&B run was cut short."""
        return any(record.wandb and record.wandb.is_busy() for record in self.records)

    def explain(self, error):
        """Return an error as it is, or one that says what to do if JAX or memory has failed."""
        if not isinstance(error, (jax.errors.JaxRuntimeError, MemoryError)):
            return error
        kind = UserError
        what = "JAX has failed"
        if is_out_of_memory(error):
            what = "memory ran out; end other programs that use it, or give this one less to do"
        elif not devices_work():
            kind = DeviceError
            what = "JAX's device has failed"
        checkpoint = self.records[0].checkpoint_text()
        words = one_line(error)[:300]
        return kind(f"{what}; the same command resumes from {checkpoint} ({words})")

    def close(self, records, exit_code, preempted=False):
        """Close some records. Their W&B runs end at the same time, since each may take long."""
        for record in records:
            record.end_wandb(exit_code, preempted)
        for record in records:
            with self.printing(record):
                record.close()

    def stop(self, number, _):
        """End the run on a signal.

        While it trains it stops at its next checkpoint. While it starts or evaluates it stops at
        once. On a GPU this loses the updates made during the evaluation. A second signal always
        stops it at once. Two SIGTERMs within SAME_SIGNAL seconds are one: a machine that
        shuts down sends it to tools.sweep, which passes it on, and to this process, too.
        """
        is_second = self.stopping
        if is_second:
            is_soon = time.monotonic() - self.stopping_since < SAME_SIGNAL
            if is_soon and self.stopping == number == signal.SIGTERM:
                return
        else:
            self.stopping_since = time.monotonic()
        self.stopping = number
        if is_second or self.is_evaluating() or self.phase in ("starting", "evaluation"):
            for record in self.records:
                with self.printing(record):
                    where = record.checkpoint_text()
                    print(f"stopped; the same command goes on from {where}", flush=True)
            sys.exit(128 + number)

    def finish(self):
        """Mark the run as finished."""
        for record in self.records:
            with self.printing(record):
                record.finish()

    @contextlib.contextmanager
    def timed(self, phase):
        """Add the time of the body to the phase's. Each record has an equal share of it."""
        self.phase = phase
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self.seconds[phase] += seconds
        for record in self.records:
            record.seconds[phase] += seconds / len(self.records)
        self.phase = "between"

    # Checkpoints

    def restore(self, states, data):
        """Start or resume the run. `data` is a script's dataset.

        Returns the states and the number of updates of the last whole checkpoint; a new run has
        `states` and 0. The tables are cut to their sizes at that checkpoint. W&B begins here, too.
        """
        # What the policy needs beside the actor: how states were normalised, the actions' shape
        self.policy_data = dict(mean=data["mean"], std=data["std"], actions=data["actions"][:1])
        initial = self.arrays(states)
        parts = []  # of the arrays, a record's each
        broken = {}  # records that can't go on, and their errors
        is_new = False
        for record, part in self.parts():
            own = {key: array[part] for key, array in initial.items()}
            with self.printing(record):
                try:
                    arrays, about = record.restore(own)
                except UserError as error:
                    broken[record] = error
                    continue
                parts.append(arrays)
                if about is None:
                    is_new = True
                    continue
                print(f"resuming from update {about['update']}")
                self.update = about["update"]
                self.evaluated = about["evaluated"]
                self.timed_until = (self.update, 0.0)
        if broken:
            self.give_up(broken)
        arrays = {key: np.concatenate([part[key] for part in parts]) for key in initial}
        with jax.default_device(host()):  # the first epoch takes them to its devices
            states = restore_tree(states, arrays, "states")
        if is_new:
            self.checkpoint(states, 0, now=True)
        self.saved_at = time.monotonic()
        self.bar.update(self.update)
        return states, self.update

    def arrays(self, states):
        """Return the states' arrays (members, ...) by their paths, on the host."""
        return jax.device_get(flatten(without_keys({"states": states})))

    def checkpoint(self, states, update, now=False):
        """Save everything if `now`, after an evaluation, after a signal, or once a minute.

        A save of more than 3 s is made less often, so that it takes at most 5 % of the time.

        After a signal, exit. While an evaluation is played beside training nothing is saved, unless
        `now`: then its end is waited for.
        """
        if self.pending and (now or not self.is_evaluating()):
            self.end_evaluation()
        if self.pending:
            return
        interval = max(60, 20 * self.save_seconds)
        is_due = time.monotonic() - self.saved_at > interval
        if not (now or self.stopping or is_due):
            return
        self.save(self.parts(), states, update)
        if self.stopping:
            for record in self.records:
                with self.printing(record):
                    line = f"stopped at update {update}; the same command resumes there"
                    print(line, flush=True)
            sys.exit(128 + self.stopping)

    def save(self, parts, states, update):
        """Save some of the `parts`."""
        started = time.monotonic()
        arrays = self.arrays(states)
        about = dict(update=update, evaluated=self.evaluated)
        for record, part in parts:
            own = {key: array[part] for key, array in arrays.items()}
            record.save({**own, "data": self.policy_data}, about)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - started

    # Logs

    def evaluate(self, evaluation, states, update):
        """Log what `evaluation(states, update)` returns: returns (members, E), and measurements.

        On a GPU the episodes are played while training goes on, and `checkpoint` waits for them.
        """
        self.evaluated = update
        self.speed = {}  # to show, once this process has trained
        start, seconds = self.timed_until
        self.timed_until = (update, self.seconds["train"])
        if update > start:
            pace = (update - start) / (self.seconds["train"] - seconds)
            self.speed = {"updates/s": f"{pace:.0f}"}
        self.losses = [record.losses for record in self.records]  # to show
        if not has_accelerator():
            self.log_evaluation(*evaluation(states, update))
            return
        for record in self.records:
            record.held = []
        states = copied(states)  # since training uses up its own
        self.pending = Task(partial(evaluation, states, update))

    def is_evaluating(self):
        """Return whether an evaluation is played beside training."""
        return self.pending is not None and not self.pending.ended.is_set()

    def end_evaluation(self):
        """Wait for the evaluation that is played beside training, and log it."""
        result = self.pending.wait()
        self.pending = None
        self.log_evaluation(*result)

    def log_evaluation(self, returns, measured):
        """Log the last evaluation: returns (members, E), and measurements by their names.

        These are (members,), and "features" (members, NUM_COMPARED, F).
        """
        for (record, part), losses in zip(self.parts(), self.losses):
            own = {key: values[part] for key, values in measured.items()}
            with self.printing(record):
                record.log_evaluation(self.evaluated, returns[part], own)
                inside = {key: f"{own[key].mean():.4g}" for key in SHOWN if key in own}
                words = [f"{self.evaluated:>9,} updates"]
                for key, value in {**record.score, **losses, **inside, **self.speed}.items():
                    words.append(f"{key} {value}")
                self.bar.write("  ".join(words), sys.stdout)
                sys.stdout.flush()  # for those who read it through a pipe
        self.saved_at = -np.inf  # so that the next checkpoint is due

    def log_epoch(self, update, infos, states):
        """Log the scalars (members, steps) of the epoch that ends with `update`.

        Raises UserError if anything isn't finite.
        """
        infos = {key: np.asarray(values) for key, values in infos.items()}
        problems = find_divergence(self.config, update, infos, states)
        broken = {}  # records and their errors
        for record, part in self.parts():
            own = [text for i, text in problems.items() if part.start <= i < part.stop]
            if own:
                path = record.path("checkpoint.npz")
                end = f"the last good checkpoint is {path}, of update {record.saved}"
                broken[record] = UserError(f"{own[0]}; {end}")
                continue
            with self.printing(record):
                record.log_epoch(update, {key: values[part] for key, values in infos.items()})
        if broken:
            self.give_up(broken, states, update)
        self.bar.update(self.config.log_every)
        self.bar.set_postfix({**self.records[0].score, **self.records[0].losses})

    def give_up(self, broken, states=None, update=None):
        """End the run, which has failed: `broken` are records and their errors."""
        self.send_last(broken)
        raise next(iter(broken.values()))

    def send_last(self, broken):
        """Log an evaluation that is still played, and send W&B the last step of broken runs."""
        if self.pending:
            self.end_evaluation()
        for record in broken:
            record.wandb.send_last()
