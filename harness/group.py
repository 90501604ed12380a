"""Several runs that one program trains together. `python -m tools.sweep --together N` starts it:

    python -m harness.group rebrac < flags.json
    python -m harness.group rebrac fit < flags.json  # at once as many as the memory has room for

flags.json has a list of each run's flags. The runs differ in seeds and numbers alone, as
`in_common` in members.py has it. Each has its own directory, as if it had been trained alone, and
its own output.txt. Lines about the data are in the first run's alone. A run that diverges ends
alone, with its error. When the device's memory runs out, half of the runs go on, and the others
follow.
"""

import contextlib
import gc
import io
import json
import math
import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C shows no traceback in the imports, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import jax

from harness.config import configure_jax
from harness.datasets import load_dataset
from harness.devices import forget_copies
from harness.directory import run_directory, status
from harness.errors import BusyError, DeviceError, Output, UserError, one_line, one_line_errors
from harness.members import check_device, stack_configs
from harness.memory import is_out_of_memory, needed_memory, num_fitting
from harness.record import Record
from harness.run import Run
from harness.scripts import load_script, read_config


class FewerRuns(Exception):
    """Some of a group's runs have ended with an error. The others go on from their checkpoints."""


class Group(Run):
    """Runs that are trained together: those at the same update that no other process trains."""

    def __init__(self, name, configs, tuned):
        self.finished_before = False
        self.later = []  # configs of runs that are trained after these
        self.at_once = len(configs)  # as many as the memory has had room for
        self.problem = None  # the error of a run that can't begin
        positions = {}  # record -> update of its checkpoint, and of the last evaluation before
        for config in configs:
            record = Record(name, config, tuned)
            with self.printing(record):
                try:
                    record.open()
                    if status(record.directory).state == "finished":  # by another process
                        record.close()
                        continue
                    positions[record] = record.position()
                except BusyError as error:
                    print(error)
                except UserError as error:
                    self.fail({record: error})
                    self.close([record], 1)
                    self.problem = error
        if not positions:
            raise self.problem or BusyError("other processes are training all of these runs")
        records_at = {}  # position -> records
        earliest = min(positions.values())
        for record, position in positions.items():
            # A kill may have come when some of them had saved and others not yet
            if position != earliest and record.go_back(earliest):
                position = earliest
            records_at.setdefault(position, []).append(record)
        records, *others = records_at.values()
        for group in others:
            for record in group:
                record.close()
                self.later.append(record.config)
        for record in records:
            with self.printing(record):
                print(f"one of {len(records)} runs that are trained together")
        self.take(records)

    def print_error(self, error):
        for record in self.records:
            with self.printing(record):
                print(f"error: {error}")

    def fail(self, broken):
        """Note that runs have failed, {record: error}. `close` ends them."""
        for record, error in broken.items():
            with self.printing(record):
                print(f"error: {error}")
            record.fail(error)

    def take(self, records):
        """Make these the group's, with one config for all their members."""
        self.begin(records, stack_configs([record.config for record in records]))

    def printing(self, record):
        return printing_to(record.directory)

    def give_up(self, broken, states=None, update=None):
        """Save the others, if there are `states`, and end the broken ones.

        Raises FewerRuns, or an error of theirs if no run is left.
        """
        self.send_last(broken)
        parts = [(record, part) for record, part in self.parts() if record not in broken]
        self.fail(broken)
        self.records = [record for record, _ in parts]
        try:
            if states is not None and parts:
                self.save(parts, states, update)
        finally:
            self.close(broken, 1)
        self.bar.close()
        if not self.records:
            raise next(iter(broken.values()))
        self.take(self.records)
        raise FewerRuns

    def halve(self):
        """Put off half of the runs. The others go on from their last checkpoints."""
        if self.pending:  # it may have run out of memory, too
            self.pending.ended.wait()
        self.at_once = (len(self.records) + 1) // 2
        kept, others = self.records[: self.at_once], self.records[self.at_once :]
        for record in self.records:
            record.held = None
            when = "now" if record in kept else "after the others"
            with self.printing(record):
                print(
                    f"memory ran out with {len(self.records)} runs together; now {self.at_once} at "
                    f"once. This one goes on {when}, from {record.checkpoint_text()}"
                )
        self.later += [record.config for record in others]
        self.close(others, 1, preempted=True)
        self.bar.close()
        self.take(kept)


@contextlib.contextmanager
def printing_to(directory):
    """Print to a run's output.txt, or to the process's own output if that can't be opened."""
    file = None
    with contextlib.suppress(OSError):
        os.makedirs(directory, exist_ok=True)
        file = open(os.path.join(directory, "output.txt"), "a", buffering=1)
    if file is None:
        yield
        return
    try:
        with contextlib.redirect_stdout(Output(file)):
            yield
    finally:
        with contextlib.suppress(OSError):  # of a full disk
            file.close()


def train(script, group):
    """Train a group to its end."""
    with group:
        while True:
            try:
                with group.printing(group.records[0]):
                    return script.train(group.config, group)
            except FewerRuns:
                pass
            except (jax.errors.JaxRuntimeError, MemoryError) as error:
                if len(group.records) == 1 or not is_out_of_memory(error):
                    raise
                group.halve()
            # The arrays of before must be gone
            forget_copies()
            gc.collect()


def num_at_once(script, configs):
    """Return how many runs to train at once.

    They are as many as memory has room for, or fewer, so that all parts are about equally large.
    """
    config = stack_configs(configs)
    with contextlib.redirect_stdout(io.StringIO()):
        data = script.make_dataset(config, load_dataset(config))
    if hasattr(script, "with_value_range"):  # ReBRAC's program needs these numbers
        config = script.with_value_range(config, data)
    members = num_fitting(needed_memory(script, config, data))
    num_parts = math.ceil(len(configs) / max(1, members // configs[0].num_seeds))
    return math.ceil(len(configs) / num_parts)


def main():
    script = load_script(sys.argv[1])

    def directory_of(config):
        return run_directory(script.__name__, config, script.tuned)

    given = [read_config(script, words) for words in json.load(sys.stdin)]
    configure_jax(any(config.deterministic for config in given))
    failed_before = [one for one in given if status(directory_of(one)).state == "failed"]
    configs = [one for one in given if status(directory_of(one)).state != "finished"]
    try:
        check_device()
    except UserError as error:
        for config in configs:
            with printing_to(directory_of(config)):
                print(f"error: {error}")
        raise
    at_once = len(configs)
    if "fit" in sys.argv[2:] and len(configs) > 1:
        try:
            at_once = num_at_once(script, configs)
        except Exception as error:  # most come again in training, which tells them run by run
            print(f"how many runs fit isn't known ({one_line(error)}); trying all", file=sys.stderr)
    problem = None
    while configs:
        later = configs[at_once:]
        try:
            group = Group(script.__name__, configs[:at_once], script.tuned)
        except UserError as error:  # none of these can be trained here
            print(f"error: {error}", file=sys.stderr)
            problem = error
            configs = later
            continue
        problem = problem or group.problem
        try:
            train(script, group)
        except DeviceError:
            raise
        except UserError as error:  # the others are still trained
            problem = error
        forget_copies()  # of this group's data
        at_once = min(at_once, group.at_once)
        configs = []
        for config in group.later + later:
            if is_left(directory_of(config), config in failed_before):
                configs.append(config)
    if problem:  # which is in the output of its own runs
        sys.exit(problem.exit_code)


def is_left(directory, had_failed):
    """Return whether a run is left to do: other processes may have trained it meanwhile."""
    now = status(directory)
    if now.busy or now.state == "finished":
        return False
    return had_failed or now.state != "failed"


if __name__ == "__main__":
    with one_line_errors():
        main()
