"""Runs sweeps on this machine, without an account or a network.

    python -m tools.sweep sweeps/rebrac/adroit/dropout.yaml  # one run after the other
    python -m tools.sweep sweeps/*/gym/final.yaml --processes 8  # eight at once share the cores
    python -m tools.sweep sweeps/iql/gym/pairs.yaml --num_updates 20000  # this flag for every run
    python -m tools.sweep sweeps/iql/gym/pairs.yaml --together 64  # on a GPU: 64 in one program
    python -m tools.sweep sweeps/iql/gym/pairs.yaml --together  # on a GPU: as many as fit
    python -m tools.sweep sweeps/iql/gym/pairs.yaml --plan  # only what it takes here (plan.py)
    python -m tools.sweep sweeps/iql/gym/pairs.yaml --download  # only its datasets

W&B's own engine expands the grids. Finished runs are skipped. Ctrl-C and SIGTERM stop with
checkpoints, and the same command resumes. Each run's output is in the output.txt of its directory.
With CUDA_VISIBLE_DEVICES=0,1 the processes share the GPUs.

With --together N a program trains up to N runs, which differ in seeds and numbers alone. Without a
number it trains all that can be trained together, as many at once as the GPU has memory for. Each
has its own directory, as if it had been trained alone, and may go on alone or in other company.
They are spread over all GPUs that the program sees.

Several commands may share a sweep, also on machines that share the disk. Each group is trained by
one of them. At its end a command waits for the others, and takes up runs whose machine has died.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time

if __name__ == "__main__":  # Ctrl-C shows no traceback in the imports, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # So that `python path/to/tools/sweep.py` finds the other tools
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tqdm import tqdm

from harness.datasets import dataset_file
from harness.directory import is_finished, status
from harness.errors import DeviceError, UserError, one_line, one_line_errors
from tools.jobs import AS_MANY_AS_FIT, make_groups, read_jobs, share_of
from tools.plan import print_plan, with_known_checksum

LOOK_EVERY = 30  # seconds between looks at what other processes train
PROGRESS_EVERY = 5  # seconds between looks at how far a program is, once it has its locks
LOCK_SECONDS = 10  # after so long without a new lock a process has all locks that it will take


class Program:
    """A process that trains a job, or several together."""

    def __init__(self, jobs, as_many_as_fit):
        self.jobs = jobs
        self.as_many_as_fit = as_many_as_fit
        self.signals_sent = 0
        self.claims = []  # locked files
        self.num_locks = 0  # how many of its runs its process has locked
        self.locked_at = 0.0  # when it took the last of them
        self.next_look = 0.0  # at how far they are

    def claim(self):
        """Keep the runs from other pools until `release`. Return whether none is starting them.

        A process takes its runs' locks one by one, seconds after it was started. If two pools
        started a group meanwhile, their processes would split it. So each claims all its runs
        before it looks whether they are free, until its process has the locks. If the pool dies
        the claims are gone.
        """
        for job in self.jobs:
            try:
                os.makedirs(job.directory, exist_ok=True)
                self.claims.append(open_and_lock(job.output_path()))
            except BlockingIOError:
                self.release()
                return False
            except OSError:  # nothing can be written or locked, which `start` and `own_share` say
                continue
        return True

    def release(self):
        for file in self.claims:
            file.close()
        self.claims = []

    def note_locks(self, number):
        """Note how many runs are locked, and release the claims once its process has its own."""
        if number > self.num_locks:
            self.num_locks = number
            self.locked_at = time.monotonic()
        is_over = self.num_locks > 0 and time.monotonic() - self.locked_at > LOCK_SECONDS
        if number == len(self.jobs) or is_over:
            self.release()

    def start(self, slot, slots):
        """Start it with the share of the cores and GPUs that its slot has."""
        environment = dict(os.environ)
        gpus = os.getenv("CUDA_VISIBLE_DEVICES")
        if gpus:
            own = share_of(gpus.split(","), slot, slots)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        first = self.jobs[0]
        command = first.command
        flags = ""
        if len(self.jobs) > 1:
            command = [*first.prefix, "-u", "-m", "harness.group", first.script.__name__]
            if self.as_many_as_fit:
                command.append("fit")
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


def open_and_lock(path):
    """Open a file to append to it, and lock it.

    Raises BlockingIOError if another process has it locked, and OSError on a disk without locks.
    """
    file = open(path, "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


@contextlib.contextmanager
def on_cores(slot, slots):
    """Keep to a slot's share of the cores, which a process that is started inherits."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, share_of(sorted(cores), slot, slots))
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


class Pool:
    """Runs the programs of the jobs that aren't finished, several at once."""

    def __init__(self, jobs, slots, together):
        self.slots = slots
        self.lost = set()  # slots whose device has failed
        self.together = together
        # Whether to wait for others. In a SLURM job that would hold a GPU.
        self.waits = "SLURM_JOB_ID" not in os.environ
        self.says_that_it_waits = False
        self.next_look = 0.0  # at what other processes train
        self.running = {}  # programs by their slots
        self.done = []
        self.failed = []
        self.busy = []  # those that other processes train
        self.signals = []  # that have come
        self.updates = {}  # of all jobs, how far they are
        self.failed_before = {}  # of the unfinished ones: when they failed, or None
        for job in jobs:
            now = status(job.directory)
            self.updates[job] = now.update
            if now.state != "finished":
                self.failed_before[job] = failed_at(job)
        self.unfinished = list(self.failed_before)
        self.waiting = self.programs(self.unfinished)

    def programs(self, jobs):
        """Return the programs of some jobs."""
        as_many_as_fit = self.together == AS_MANY_AS_FIT
        return [Program(own, as_many_as_fit) for own in make_groups(jobs, self.together)]

    def run(self):
        """Run all programs. After a signal start none, and wait for those that run."""
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
            numbers.append(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, self.receive)
        self.bar = tqdm(
            total=sum(job.config.num_updates for job in self.updates),
            initial=sum(self.updates.values()),
            unit=" updates",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        )
        while not self.is_over():
            for slot, program in list(self.running.items()):
                self.look_after(slot, program)
            self.look_at_others()
            for slot in set(range(self.slots)) - self.lost:
                self.fill(slot)
            self.bar.update(sum(self.updates.values()) - self.bar.n)
            time.sleep(0.5)
        self.bar.close()

    def receive(self, number, _):
        self.signals.append(number)

    def say(self, text):
        """Print a text. The pool goes on where that can't be written, as on a full disk."""
        with contextlib.suppress(OSError):
            self.bar.write(text, sys.stdout)
            sys.stdout.flush()

    def is_over(self):
        """Return whether nothing runs, and nothing is left to start or to wait for."""
        if self.running:
            return False
        if self.signals or len(self.lost) == self.slots:
            return True
        if self.waiting:
            return False
        if not self.busy or not self.waits:
            return True
        if not self.says_that_it_waits:
            self.says_that_it_waits = True
            self.say(f"waiting for {len(self.busy)} runs that other processes train")
        return False

    def look_at_others(self):
        """Take up the runs that another process has left unfinished, if a slot is free for them.

        Its machine may have died, which frees the locks.
        """
        if self.waiting or len(self.running) == self.slots or time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + LOOK_EVERY
        others = self.busy
        self.busy = []
        self.waiting = self.programs([job for job in others if self.is_free(job)])

    def is_free(self, job):
        """Return whether a job is left to do. Otherwise note what other processes do with it."""
        now = status(job.directory)
        self.updates[job] = now.update
        if now.busy:
            self.busy.append(job)
        elif self.has_ended(job, now):
            ended = self.done if now.state == "finished" else self.failed
            self.note(job, ended, "in another process")
        else:
            return True
        return False

    def has_ended(self, job, now):
        """Return whether a job has finished, or failed since this command began."""
        is_failed_anew = now.state == "failed" and failed_at(job) != self.failed_before[job]
        return now.state == "finished" or is_failed_anew

    def fill(self, slot):
        """Start a waiting program in a slot that is free.

        Jobs that other processes train are left out.
        """
        for program in list(self.waiting):
            if self.signals or slot in self.running:
                return
            if not program.claim():  # another pool is starting it, so come back later
                continue
            self.waiting.remove(program)
            program.jobs = [job for job in program.jobs if self.is_free(job)]
            if not program.jobs:
                program.release()
                continue
            try:
                program.start(slot, self.slots)
                self.running[slot] = program
                self.says_that_it_waits = False
            except OSError as error:  # the others go on
                program.release()
                self.failed += program.jobs
                self.say(f"can't start {program.jobs[0].directory} ({one_line(error)})")

    def look_after(self, slot, program):
        """Pass signals on to a program, see how far it is, and note its end.

        The first signal ends the runs with checkpoints. The second kills them.
        """
        if program.signals_sent < len(self.signals):
            number = signal.SIGTERM if program.signals_sent == 0 else signal.SIGKILL
            program.process.send_signal(number)
            program.signals_sent += 1
        code = program.process.poll()
        if code is None and not program.claims and time.monotonic() < program.next_look:
            return
        program.next_look = time.monotonic() + PROGRESS_EVERY
        found = {job: status(job.directory) for job in program.jobs}
        program.note_locks(sum(now.busy for now in found.values()))
        for job, now in found.items():
            self.updates[job] = now.update
        if code is None:
            return
        del self.running[slot]
        program.release()
        has_lost_device = code == DeviceError.exit_code
        left = []
        for job, now in found.items():
            if has_lost_device and not self.has_ended(job, now):
                left.append(job)
            else:
                self.note_end(job, now, code, program.jobs)
        if has_lost_device:
            self.say(f"a device has failed: {program.jobs[0].last_words() or 'no output'}")
            self.lose(slot, left)

    def lose(self, slot, jobs):
        """Start nothing more on a slot whose device has failed. Others may take up its jobs."""
        self.lost.add(slot)
        self.waiting += self.programs([job for job in jobs if self.is_free(job)])

    def note_end(self, job, now, code, group):
        """Note how a job of a group has ended, and print it unless it was stopped."""
        is_left_out = code == os.EX_TEMPFAIL or (len(group) > 1 and code == 0)
        if now.busy or (now.state == "unfinished" and is_left_out):  # another process was faster
            self.busy.append(job)
        elif now.state == "finished":
            self.note(job, self.done, job.last_words())
        elif not self.signals:
            reason = now.reason if self.has_ended(job, now) else ""
            self.note(job, self.failed, why_it_failed(job, reason, code, group))

    def note(self, job, ended, words):
        """Note that a job has ended, and print it."""
        ended.append(job)
        counts = f"{len(self.done)} done, {len(self.failed)} failed, {self.to_go()} to go"
        self.say(f"{counts}: {job.name}\n    {words or 'no output'}")

    def to_go(self):
        """Return how many jobs have neither finished nor failed."""
        return len(self.unfinished) - len(self.done) - len(self.failed)


def failed_at(job):
    """Return the time of a job's failed.txt, None without one."""
    with contextlib.suppress(OSError):
        return os.stat(os.path.join(job.directory, "failed.txt")).st_mtime_ns
    return None


def why_it_failed(job, reason, code, group):
    """Return why a job of a group has failed: the `reason` in its failed.txt, if it has a new one.

    Its process may have been killed, or unable to write. What it prints beside its runs, such as a
    traceback, is in the first job's output.
    """
    if reason:
        return one_line(reason)
    if code < 0:
        why = signal.strsignal(-code)
        if code == -signal.SIGKILL:
            why = "killed, perhaps since memory had run out"
        return f"{why}; the same command resumes from the last checkpoint"
    try:
        with open(job.output_path(), "ab") as output:
            output.write(b"\n")  # on a full disk an empty file could still be made
    except OSError as error:
        return (
            f"can't write to {job.directory} ({error.strerror}); once that is fixed, the same "
            "command resumes from the last checkpoint"
        )
    words = job.last_words()
    if not words and not is_finished(group[0].directory):
        words = group[0].last_words()
    return words or "no output; is the disk full?"


# --- Disks without locks ---


def own_share(jobs, together):
    """Return the jobs that this command may train: all, if other commands see its locks.

    Without locks a task of a SLURM array has its share of the groups. They are groups of all jobs,
    finished or not, so that the share is the same when a task is queued again.
    """
    if all(has_locks(folder) for folder in {job.config.results for job in jobs}):
        return jobs
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        print("warning: no locks on this disk, so only one such command may run at a time")
        return jobs
    position, number = place_in_array()
    own = []
    for group in make_groups(jobs, together)[position::number]:
        own += group
    print(
        f"no locks on this disk, so task {position + 1} of {number} of this SLURM array takes "
        f"{len(own)} of {len(jobs)} runs; only one such array may run at a time"
    )
    return own


def has_locks(folder):
    """Return whether files can be locked in a folder, which is made if need be."""
    try:
        os.makedirs(folder, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)
    except OSError:  # each run will say it
        return True
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def place_in_array():
    """Return a task's place in its SLURM array, from 0, and the number of tasks."""
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    values = [int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", 0)) for name in names]
    index, first, last, step, number = values
    if step == 0 or last - first != step * (number - 1) or (index - first) % step:
        raise UserError(
            "no locks on this disk, so the tasks share the runs by the array's indices, which "
            "must have equal steps, as in --array=1-8"
        )
    return (index - first) // step, number


FILES_FIRST = "name all files first, then the flags"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message):
        if "invalid int value" in message and ".yaml" in message:
            raise UserError(FILES_FIRST)
        raise UserError(message)


def check_order(words, files, flags):
    """Raise UserError if a flag's value was taken for a file, or a file for a flag's value.

    `files` and `flags` are what argparse has made of the command line's words.
    """
    place = words.index(files[0])
    before = words[place - 1] if place > 0 else ""
    if re.fullmatch(r"--\w+", before) and before not in ("--plan", "--download"):
        raise UserError(f"{FILES_FIRST}, as {before}")
    for before, word in zip(["", *flags], flags):
        is_value = before.startswith("--") and "=" not in before
        if word.endswith(".yaml") and not (is_value or word.startswith("--")):
            raise UserError(f"{FILES_FIRST}; {word} comes after a flag")


def main():
    parser = Parser(
        usage="python -m tools.sweep FILE.yaml ... [--processes N] [--together [N]] "
        "[--plan | --download] [any flag of the scripts]",
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+")
    parser.add_argument("--processes", type=int, default=1, help="programs at once")
    parser.add_argument(
        "--together",
        type=int,
        nargs="?",
        default=1,
        const=AS_MANY_AS_FIT,
        help="runs in one program, for a GPU; without a number as many as fit",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--plan", action="store_true", help="only print what it takes here")
    only.add_argument("--download", action="store_true", help="only download the datasets")
    given, flags = parser.parse_known_args()
    check_order(sys.argv[1:], given.files, flags)
    for name in ("processes", "together"):
        number = getattr(given, name)
        if number != AS_MANY_AS_FIT and number < 1:
            raise UserError(f"{name} must be 1 or more")
    if given.plan:
        jobs = read_jobs(given.files, flags, add_checksum=with_known_checksum)
        return print_plan(jobs, given.processes, given.together)
    jobs = read_jobs(given.files, flags)  # which downloads their datasets
    if given.download:
        paths = {dataset_file(job.config) for job in jobs}
        return print(*sorted(paths), sep="\n")
    jobs = own_share(jobs, given.together)
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # a lock of each run of a group
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    pool = Pool(jobs, given.processes, given.together)
    num_finished = len(jobs) - len(pool.unfinished)
    in_programs = f"; {len(pool.waiting)} programs train the others" if given.together != 1 else ""
    print(f"{len(jobs)} runs, of which {num_finished} are finished{in_programs}", flush=True)
    pool.run()
    for job in pool.failed:
        print(f"failed: {job.directory}")
    for job in pool.busy:
        print(f"another process is training: {job.directory}")
    if pool.busy and not pool.signals and not pool.waits:
        print("no waiting for them, which would hold a GPU: SLURM queues a job again that died")
    if pool.signals:
        print("stopped; the same command resumes")
        sys.exit(128 + pool.signals[0])
    if len(pool.lost) == pool.slots:
        raise UserError(
            f"JAX's devices have failed, with {pool.to_go()} runs to go; "
            "once they are fixed, or on another machine, the same command resumes"
        )
    if pool.failed:
        raise UserError(
            f"{len(pool.failed)} runs failed; output.txt in their directories says why, and the "
            "same command retries"
        )


if __name__ == "__main__":
    with one_line_errors():
        main()
