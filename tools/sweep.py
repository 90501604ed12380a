"""Runs sweeps on this machine, without an account or a network.

    python -m tools.sweep sweeps/rebrac/adroit/dropout.yaml  # one run after the other
    python -m tools.sweep sweeps/*/gym/final.yaml --processes 8  # eight at once share the cores
    python -m tools.sweep sweeps/iql/gym/pairs.yaml --num_updates 20000  # this flag for every run
    python -m tools.sweep sweeps/iql/gym/pairs.yaml --together 64  # on a GPU: 64 in one program

W&B's own engine expands the grids. Finished runs are skipped. Ctrl-C and SIGTERM stop with
checkpoints, and the same command resumes. Several commands may share a sweep, also on machines
that share the disk. Each run's output is in the output.txt of its directory. With
CUDA_VISIBLE_DEVICES=0,1 the processes share the GPUs.

With --together N a program trains up to N runs, which differ in seeds and numbers alone. Each has
its own directory, as if it had been trained alone, and may go on alone or in other company. They
are spread over all GPUs that the program sees.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

if __name__ == "__main__":  # the imports take seconds, in which Ctrl-C shows no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from tqdm import tqdm

from harness.directory import status
from harness.errors import UserError, one_line_errors
from tools.jobs import make_groups, read_jobs


class Program:
    """A process that trains a job, or several together."""

    def __init__(self, jobs):
        self.jobs = jobs
        self.signals_sent = 0

    def start(self, slot, slots):
        """Start it with the share of the cores and GPUs that its slot has."""
        environment = dict(os.environ)
        gpus = os.getenv("CUDA_VISIBLE_DEVICES")
        if gpus:
            gpus = gpus.split(",")
            own = gpus[slot::slots] or [gpus[slot % len(gpus)]]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        first = self.jobs[0]
        command = first.command
        flags = ""
        if len(self.jobs) > 1:
            command = [sys.executable, "-u", "-m", "harness.group", first.script.__name__]
            flags = json.dumps([job.flags for job in self.jobs])
        os.makedirs(first.directory, exist_ok=True)
        with open(first.output_path(), "ab") as output, on_cores(slot, slots):
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,  # so that Ctrl-C comes through this program alone
                env=environment,
                text=True,
            )
        with contextlib.suppress(BrokenPipeError), self.process.stdin as stdin:
            stdin.write(flags)


@contextlib.contextmanager
def on_cores(slot, slots):
    """Keep to a slot's share of the cores, which a process that is started inherits."""
    cores = os.sched_getaffinity(0)
    share = sorted(cores)[slot::slots]
    if not share:  # more slots than cores
        share = [sorted(cores)[slot % len(cores)]]
    os.sched_setaffinity(0, share)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


class Pool:
    """Runs the programs of the jobs that aren't finished, several at once."""

    def __init__(self, jobs, slots, together):
        self.slots = slots
        self.running = {}  # programs by their slots
        self.done = []
        self.failed = []
        self.busy = []  # those that other processes train
        self.signals = []  # that have come
        self.updates = {}  # of all jobs, how far they are
        self.unfinished = []
        for job in jobs:
            now = status(job.directory)
            self.updates[job] = now.update
            if now.state != "finished":
                self.unfinished.append(job)
        self.waiting = [Program(own) for own in make_groups(self.unfinished, together)]

    def run(self):
        """Run all programs. After a signal start none, and wait for those that run."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.receive)
        self.bar = tqdm(
            total=sum(job.config.num_updates for job in self.updates),
            initial=sum(self.updates.values()),
            unit=" updates",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        )
        while self.running or (self.waiting and not self.signals):
            for slot in range(self.slots):
                self.fill(slot)
            for slot, program in list(self.running.items()):
                self.look_after(slot, program)
            self.bar.update(sum(self.updates.values()) - self.bar.n)
            time.sleep(0.5)
        self.bar.close()

    def receive(self, number, _):
        self.signals.append(number)

    def fill(self, slot):
        """Start a program in a slot if that is free, without jobs that other processes train."""
        while self.waiting and not self.signals and slot not in self.running:
            program = self.waiting.pop(0)
            free = []
            for job in program.jobs:
                (self.busy if status(job.directory).busy else free).append(job)
            program.jobs = free
            if not free:
                continue
            try:
                program.start(slot, self.slots)
                self.running[slot] = program
            except OSError as error:  # the others go on
                self.failed += free
                directory = free[0].directory
                self.bar.write(f"can't write to {directory} ({error.strerror})", sys.stdout)

    def look_after(self, slot, program):
        """Pass signals on to a program, see how far it is, and note its end.

        The first signal ends the runs with checkpoints. The second kills them.
        """
        for number in (signal.SIGTERM, signal.SIGKILL)[program.signals_sent : len(self.signals)]:
            program.process.send_signal(number)
            program.signals_sent += 1
        code = program.process.poll()
        for job in program.jobs:
            self.updates[job] = status(job.directory).update
        if code is not None:
            del self.running[slot]
            for job in program.jobs:
                self.note_end(job, code, len(program.jobs) > 1)

    def note_end(self, job, code, in_group):
        """Note how a job has ended, and print it unless it was stopped."""
        now = status(job.directory)
        is_left_out = code == os.EX_TEMPFAIL or (in_group and code == 0)
        if now.busy or (now.state == "unfinished" and is_left_out):  # another process was faster
            self.busy.append(job)
            return
        is_finished = now.state == "finished"
        if not is_finished and self.signals:
            return
        (self.done if is_finished else self.failed).append(job)
        to_go = len(self.unfinished) - len(self.done) - len(self.failed) - len(self.busy)
        counts = f"{len(self.done)} done, {len(self.failed)} failed, {to_go} to go"
        self.bar.write(f"{counts}: {job.name}\n    {job.last_words()}", sys.stdout)
        sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(
        usage="python -m tools.sweep FILE.yaml ... [--processes N] [--together N] "
        "[any flag of the scripts]",
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+")
    parser.add_argument("--processes", type=int, default=1, help="programs at once")
    parser.add_argument("--together", type=int, default=1, help="runs in one program, for a GPU")
    given, flags = parser.parse_known_args()
    words = ["", *sys.argv[1:]]
    before = words[words.index(given.files[0]) - 1]
    if re.fullmatch(r"--\w+", before):  # then what was taken for a file is this flag's value
        raise UserError(f"name the files first, then {before} and other flags of the scripts")
    for name in ("processes", "together"):
        if getattr(given, name) < 1:
            raise UserError(f"{name} must be 1 or more")
    jobs = read_jobs(given.files, flags)
    pool = Pool(jobs, given.processes, given.together)
    num_finished = len(jobs) - len(pool.unfinished)
    in_programs = f"; {len(pool.waiting)} programs train the others" if given.together > 1 else ""
    print(f"{len(jobs)} runs, of which {num_finished} are finished{in_programs}", flush=True)
    pool.run()
    for job in pool.failed:
        print(f"failed: {job.directory}")
    for job in pool.busy:
        print(f"another process is training: {job.directory}")
    if pool.signals:
        print("stopped; the same command resumes")
        sys.exit(128 + pool.signals[0])
    if pool.failed:
        raise UserError(
            f"{len(pool.failed)} runs failed; output.txt in their directories says why, and the "
            "same command retries"
        )


if __name__ == "__main__":
    with one_line_errors():
        main()
