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
import warnings

if __name__ == "__main__":  # the imports take seconds, in which Ctrl-C shows no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import yaml
from tqdm import tqdm

from harness.config import decode
from harness.directory import run_directory, status
from harness.errors import UserError, one_line, one_line_errors
from harness.members import in_common
from harness.scripts import read_config, scripts

with warnings.catch_warnings():  # of pydantic, which it uses by old names
    warnings.simplefilter("ignore")
    import sweeps  # pip's package, which is W&B's engine, and not the folder beside tools/

# --- Sweeps ---

COMMAND = ["${env}", "${interpreter}", "${program}", "${args}"]  # of a sweep that has none


def programs():
    """Return the scripts by the names of their files."""
    return {f"{name}.py": script for name, script in scripts().items()}


def expand(path):
    """Return the command lines of a sweep's runs, as W&B's agent would start them."""
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
        check_sweep(config)
        runs = sweeps.next_runs(config, [], n=sys.maxsize)
        return [command_line(config, run.config) for run in runs if run is not None]
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not a sweep: {one_line(error)}") from error


def check_sweep(config):
    """Raise UserError if a sweep is not valid or can't be run here."""
    violations = sweeps.schema_violations_from_proposed_config(config)
    if violations:
        raise UserError(violations[0])
    method = config["method"]
    if method != "grid":
        raise UserError(f"its method is {method}, which has no end; only grid runs here")
    program = config.get("program")
    if program not in programs():
        raise UserError(f"its program, {program}, is no script here: {', '.join(programs())}")
    words = command_words(config)
    for word in words:
        if "${" in word and word not in COMMAND:
            raise UserError(f"its command has {word}; the scripts take ${{args}} alone")
    for macro in ("${program}", "${args}"):
        if macro not in words:
            raise UserError(f"its command has no {macro}")


def command_words(config):
    """Return the words of a sweep's command, with the environment variables that it names."""
    words = []
    for word in config.get("command") or COMMAND:
        words.append(re.sub(r"\$\{envvar:([A-Z0-9_]*)\}", environment_variable, str(word)))
    return words


def environment_variable(found):
    """Return the variable's value. W&B's agent would put its name where it isn't set."""
    if found[1] not in os.environ:
        raise UserError(f"its command needs the environment variable {found[1]}, which isn't set")
    return os.environ[found[1]]


def command_line(config, parameters):
    """Return the command line of one run of a sweep, a list of words.

    A null is left out, so that the field stays None. W&B's agent passes None, which the script
    leaves out.
    """
    values = {key: parameter["value"] for key, parameter in parameters.items()}
    nulls = {key: value for key, value in values.items() if value is None}
    decode(programs()[config["program"]].Config, nulls)  # an error if a field can't be None
    macros = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [sys.executable],
        "${program}": [config["program"]],
        "${args}": [f"--{key}={value}" for key, value in values.items() if value is not None],
    }
    words = []
    for word in command_words(config):
        words += macros.get(word, [word])
    return words


# --- Runs ---


class Job:
    """A run of a sweep: its command line, its config and its directory."""

    def __init__(self, command):
        known = programs()
        program = next(word for word in command if word in known)
        self.script = known[program]
        self.flags = command[command.index(program) + 1 :]
        config = read_config(self.script, self.flags)
        # By its path, so that a sweep runs from any folder
        self.command = [self.script.__file__ if word == program else word for word in command]
        self.config = config
        self.directory = run_directory(self.script.__name__, config, self.script.tuned)
        self.name = os.path.relpath(self.directory, config.results)

    def output_path(self):
        return os.path.join(self.directory, "output.txt")

    def last_words(self):
        """Return the last line of its output, without the directory."""
        lines = []
        with contextlib.suppress(OSError), open(self.output_path(), errors="replace") as file:
            lines = [line.strip() for line in file if line.strip()]
        if not lines:
            return "no output; is the disk full?"
        return lines[-1].removesuffix(f"; {self.directory}")


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


def read_jobs(paths, flags):
    """Return the sweeps' runs, with `flags` added to each. A run in several sweeps comes once."""
    commands = []
    for path in paths:
        commands += [command + flags for command in expand(path)]
    jobs = {}
    for command in tqdm(commands, "reading", disable=not sys.stderr.isatty(), leave=False):
        job = Job(command)
        jobs[job.directory] = job
    return list(jobs.values())


def make_programs(jobs, together):
    """Return programs of up to `together` jobs, in the order of their seeds."""
    groups = {}
    for job in sorted(jobs, key=lambda job: job.config.seed):
        in_all = in_common(job.config, job.script.HOST_FLOATS)
        groups.setdefault((job.script.__name__, *in_all.items()), []).append(job)
    chunks = []
    for own in groups.values():
        chunks += [own[i : i + together] for i in range(0, len(own), together)]
    chunks.sort(key=lambda own: own[0].config.seed)
    return [Program(own) for own in chunks]


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
        self.waiting = make_programs(self.unfinished, together)

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
