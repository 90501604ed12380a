"""Several runs that one program trains together. `python -m tools.sweep --together N` starts it:

    python -m harness.group rebrac < flags.json

flags.json has a list of each run's flags. The runs differ in seeds and numbers alone, as
`in_common` in members.py has it. Each has its own directory, as if it had been trained alone. What
it prints is in its output.txt. A run that diverges ends alone, with its error.
"""

import contextlib
import json
import os
import signal
import sys

if __name__ == "__main__":  # the imports take seconds, in which Ctrl-C shows no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from harness.checkpoint import last_checkpoint
from harness.directory import run_directory, status
from harness.errors import BusyError, one_line_errors
from harness.members import check_device, stack_configs
from harness.record import Record
from harness.run import Run
from harness.scripts import load_script, read_config


class FewerRuns(Exception):
    """Some of a group's runs have diverged. The others go on from their checkpoints."""


class Group(Run):
    """Runs that are trained together, but for those that another process trains."""

    def __init__(self, name, configs, tuned):
        check_device()
        self.finished_before = False
        records = []
        for config in configs:
            record = Record(name, config, tuned)
            with self.printing(record):
                try:
                    record.open()
                    records.append(record)
                    print(f"one of {len(configs)} runs that are trained together")
                except BusyError as error:
                    print(error)
        if not records:
            raise BusyError("other processes are training all of these runs")
        self.take(records)

    def take(self, records):
        """Train these."""
        self.begin(records, stack_configs([record.config for record in records]))

    @contextlib.contextmanager
    def printing(self, record):
        """Print to a run's output.txt."""
        with record.disk_errors():
            os.makedirs(record.directory, exist_ok=True)
            output = open(record.path("output.txt"), "a")
        with output, contextlib.redirect_stdout(output):
            yield

    def give_up(self, broken, states, update):
        """Save the others, and end those that have diverged. Raise FewerRuns, or the last error."""
        if self.pending:
            self.end_evaluation()
        parts = list(self.parts())
        self.save([pair for pair in parts if pair[0] not in broken], states, update)
        for record, error in broken.items():
            with self.printing(record):
                record.fail(error)
                record.close(1)
                print(f"error: {error}", flush=True)
        self.bar.close()
        self.records = [record for record, _ in parts if record not in broken]
        if not self.records:
            raise error
        self.take(self.records)
        raise FewerRuns


def train(script, configs):
    """Train runs together that are at the same update."""
    with Group(script.__name__, configs, script.tuned) as group:
        while group.records:
            with contextlib.suppress(FewerRuns):
                script.train(group.config, group)
                return


def main():
    script = load_script(sys.argv[1])
    at = {}  # update of the last checkpoint -> configs
    for words in json.load(sys.stdin):
        config = read_config(script, words)
        directory = run_directory(script.__name__, config, script.tuned)
        if status(directory).state != "finished":
            found = last_checkpoint(directory)
            update = found[2]["update"] if found else 0
            at.setdefault(update, []).append(config)
    for configs in at.values():
        train(script, configs)


if __name__ == "__main__":
    with one_line_errors():
        main()
