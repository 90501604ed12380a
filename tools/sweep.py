"""Runs sweeps on this machine, without an account or a network.

    python sweep.py sweeps/rebrac/adroit/dropout.yaml                # one run after the other
    python sweep.py sweeps/*/gym/final.yaml --processes 8            # eight at once, which share the cores
    python sweep.py sweeps/iql/gym/pairs.yaml --num_updates 20000    # every run with this flag, too

W&B's own engine expands the grids. Finished runs are skipped. Ctrl-C and SIGTERM stop with checkpoints, and the same
command goes on from there, beside others like it on machines that share the disk. Each run's output is in the
output.txt of its directory. With CUDA_VISIBLE_DEVICES=0,1 the processes take the GPUs in turn.
"""

import argparse
import fcntl
import importlib
import os
import signal
import subprocess
import sys
import time
import warnings

import yaml
from tqdm import tqdm

import runs

warnings.filterwarnings("ignore", module="pydantic")  # which an engine of an older pydantic's annoys
import sweeps  # noqa: E402


def expand(path):
    """The command lines of the runs in a sweep's YAML, as W&B's agent would start them; an error if it isn't valid."""
    try:
        with open(path) as file:
            config = yaml.safe_load(file)
        if problems := sweeps.schema_violations_from_proposed_config(config):
            raise ValueError(problems[0])
        if config["method"] != "grid":
            raise ValueError(f"its method is {config['method']}, which has no end; only grid runs here")
        if config.get("program") not in os.listdir(os.path.dirname(os.path.abspath(__file__))):
            raise ValueError(f"its program, {config.get('program')}, is no script beside sweep.py")
        command = config.get("command", ["${interpreter}", "${program}", "${args}"])
        if "${program}" not in command:
            raise ValueError("its command has no ${program}")
        found = sweeps.next_runs(config, [], n=sys.maxsize)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        sys.exit(f"error: {path} is not a sweep: {' '.join(str(error).split())}")
    macros = {"${env}": [], "${interpreter}": [sys.executable], "${program}": [config["program"]]}
    for run in filter(None, found):
        macros["${args}"] = [f"--{key}={value['value']}" for key, value in run.config.items()]
        yield [word for part in command for word in macros.get(part, [part])]


class Job:
    """A run of a sweep: its command, its script's config, and its directory."""

    def __init__(self, command):
        index = next(i for i, word in enumerate(command) if word.endswith(".py"))
        script = importlib.import_module(command[index].removesuffix(".py"))
        config = script.tuned(runs.parse(script.Config, command[index + 1 :]))
        runs.check(config, script.rules(config))
        self.command, self.config, self.told = command, config, 0  # the signals it was sent
        self.directory = runs.run_directory(script.__name__, config, script.tuned)
        self.name = os.path.relpath(self.directory, config.results)

    def path(self, name):
        return os.path.join(self.directory, name)

    def update(self):
        """The update to which the run has come, from the end of its first table."""
        if os.path.exists(self.path("finished.json")):
            return self.config.num_updates
        try:
            with open(self.path("train.csv"), "rb") as file:
                file.seek(-min(1000, os.path.getsize(file.name)), os.SEEK_END)
                return int(file.read().split(b"\n")[-2].split(b",")[1])
        except (OSError, IndexError, ValueError):
            return 0

    def is_busy(self):
        """Whether another process is training the run, perhaps on another machine that shares the disk."""
        try:
            with open(self.path("lock"), "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True

    def start(self, slot, slots):
        """Starts the run with its share of the cores and GPUs."""
        cores, gpus = sorted(os.sched_getaffinity(0)), os.getenv("CUDA_VISIBLE_DEVICES", "").split(",")
        share = cores[slot::slots] or [cores[slot % len(cores)]]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus[0] else {**os.environ}
        os.makedirs(self.directory, exist_ok=True)
        with open(self.path("output.txt"), "ab") as output:
            os.sched_setaffinity(0, share)  # which the child inherits
            try:  # in a session of its own, so that Ctrl-C comes through this program alone
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    env=env,
                )
            finally:
                os.sched_setaffinity(0, cores)

    def last_words(self):
        with open(self.path("output.txt"), errors="replace") as file:
            return ([line.strip() for line in file if line.strip()] or ["no output"])[-1].removesuffix(
                f"; {self.directory}"
            )


def main():
    parser = argparse.ArgumentParser(usage="python sweep.py FILE.yaml ... [--processes N] [any flag of the scripts]")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--processes", type=int, default=1)
    given, flags = parser.parse_known_args()
    if given.processes < 1:
        sys.exit("error: processes must be 1 or more")
    commands = [command + flags for path in given.files for command in expand(path)]
    jobs = [Job(command) for command in tqdm(commands, "reading", disable=not sys.stderr.isatty(), leave=False)]
    jobs = {job.directory: job for job in jobs}.values()
    waiting = [job for job in jobs if not os.path.exists(job.path("finished.json"))]
    waiting.sort(key=lambda job: job.config.seed)  # so that all variants with the first seed come first
    print(f"{len(jobs)} runs, of which {len(jobs) - len(waiting)} are finished", flush=True)
    updates = {job: job.update() for job in jobs}
    total, initial = sum(job.config.num_updates for job in jobs), sum(updates.values())
    bar = tqdm(total=total, initial=initial, unit=" updates", unit_scale=True, disable=not sys.stderr.isatty())
    running, done, failed, busy, signals = {}, [], [], [], []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    while running or (waiting and not signals):
        for slot in set(range(given.processes)) - set(running):
            while waiting and not signals and slot not in running:
                job = waiting.pop(0)
                if job.is_busy():
                    busy.append(job)
                else:
                    job.start(slot, given.processes)
                    running[slot] = job
        for slot, job in list(running.items()):
            while job.told < min(len(signals), 2):  # the first ends the runs with checkpoints, the second kills them
                job.process.send_signal((signal.SIGTERM, signal.SIGKILL)[job.told])
                job.told += 1
            if (code := job.process.poll()) is None:
                continue
            del running[slot]
            if code == os.EX_TEMPFAIL:  # another process was faster
                busy.append(job)
            elif code == 0 or not signals:
                (failed if code else done).append(job)
                counts = f"{len(done)} done, {len(failed)} failed, {len(running) + len(waiting)} to go"
                bar.write(f"{counts}: {job.name}\n    {job.last_words()}", sys.stdout)
                sys.stdout.flush()
        updates |= {job: job.update() for job in (*running.values(), *done)}
        bar.update(sum(updates.values()) - bar.n)
        time.sleep(0.5)
    bar.close()
    for words, some in (("failed", failed), ("another process is training", busy)):
        for job in some:
            print(f"{words}: {job.directory}")
    if signals:
        print("stopped; the same command goes on")
        sys.exit(128 + signals[0])
    if failed:
        sys.exit(
            f"error: {len(failed)} runs failed; output.txt in their directories says why, and the same command retries"
        )


if __name__ == "__main__":
    main()
