"""Several runs that one program trains together. `python -m tools.sweep --together N` starts it:

    python -m harness.group rebrac < flags.json

flags.json has a list of each run's flags. The runs differ in seeds and numbers alone, as
`in_common` in members.py has it. Each has its own directory, as if it had been trained alone. What
it prints is in its output.txt. A run that diverges ends alone, with its error.
"""

import contextlib
import itertools
import json
import os
import signal
import sys

if __name__ == "__main__":  # the imports take seconds, in which Ctrl-C shows no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from harness.directory import run_directory, status
from harness.errors import BusyError, UserError, one_line_errors
from harness.members import check_device, stack_configs
from harness.record import Record
from harness.run import Run
from harness.scripts import load_script, read_config


class FewerRuns(Exception):
    """Some of a group's runs have ended with an error. The others go on from their checkpoints."""


class Group(Run):
    """Runs that are trained together: those at the same update that no other process trains."""

    def __init__(self, name, configs, tuned):
        check_device()
        self.finished_before = False
        self.later = []  # configs of runs that are at another update
        self.problem = None  # the error of a run that can't begin
        positions = {}  # of records: update and last evaluation
        for config in configs:
            record = Record(name, config, tuned)
            with self.printing(record):
                try:
                    record.open()
                    positions[record] = record.position()
                except BusyError as error:
                    print(error)
                except UserError as error:
                    self.end({record: error})
                    self.problem = error
        if not positions:
            raise self.problem or BusyError("other processes are training all of these runs")
        at = {}  # position -> records
        earliest = min(positions.values())
        for record, position in positions.items():
            # A kill may have come when some of them had saved and others not yet
            if position != earliest and record.go_back(earliest):
                position = earliest
            at.setdefault(position, []).append(record)
        records, *others = at.values()
        for record in itertools.chain(*others):
            record.close()
            self.later.append(record.config)
        for record in records:
            with self.printing(record):
                print(f"one of {len(records)} runs that are trained together")
        self.take(records)

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception):
            for record in self.records:
                with self.printing(record):
                    print(f"error: {error}")
        super().__exit__(kind, error, trace)

    def end(self, broken):
        """End some runs, {record: error}."""
        for record, error in broken.items():
            with self.printing(record):
                print(f"error: {error}")
            record.fail(error)
        self.close(broken, 1)

    def take(self, records):
        """Train these."""
        self.begin(records, stack_configs([record.config for record in records]))

    @contextlib.contextmanager
    def printing(self, record):
        """Print to a run's output.txt, or to the process's own output if that can't be opened."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                os.makedirs(record.directory, exist_ok=True)
                lines = dict(buffering=1, errors="backslashreplace")
                output = stack.enter_context(open(record.path("output.txt"), "a", **lines))
                stack.enter_context(contextlib.redirect_stdout(output))
            yield

    def give_up(self, broken, states=None, update=None):
        """Save the others, if there are `states`, and end the broken ones.

        Raises FewerRuns, or the last error if none is left.
        """
        if self.pending:
            self.end_evaluation()
        parts = [(record, part) for record, part in self.parts() if record not in broken]
        if states is not None:
            self.save(parts, states, update)
        self.end(broken)
        self.bar.close()
        self.records = [record for record, _ in parts]
        if not self.records:
            raise next(iter(broken.values()))
        self.take(self.records)
        raise FewerRuns


def train(script, group):
    """Train a group to its end."""
    with group:
        while True:
            with contextlib.suppress(FewerRuns), group.printing(group.records[0]):
                return script.train(group.config, group)


def main():
    script = load_script(sys.argv[1])
    configs = []
    for words in json.load(sys.stdin):
        config = read_config(script, words)
        if status(run_directory(script.__name__, config, script.tuned)).state != "finished":
            configs.append(config)
    problem = None
    while configs:
        group = Group(script.__name__, configs, script.tuned)
        configs = group.later
        problem = problem or group.problem
        try:
            train(script, group)
        except UserError as error:  # the others are still trained
            problem = error
    if problem:  # which is in the output of its own runs
        sys.exit(problem.exit_code)


if __name__ == "__main__":
    with one_line_errors():
        main()
