"""A plan of a sweep on this machine: `python -m tools.sweep FILES --plan` prints it.

No run is started, and no run's directory made. measure.py measures updates a second, once for each
script, on its kind of program that has the most to do. It measures an evaluation's steps a second,
once for each domain. The rest is reckoned. All kinds are taken to make as many floating-point
operations a second in their matrix products, whose number follows from the shapes.
"""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace

from harness.datasets import DOMAINS, domain, with_checksum
from harness.directory import status
from harness.download import known_files
from harness.environments import d4rl, gym, make_env
from harness.errors import UserError
from harness.evaluation import evaluation_episodes
from harness.hdf5 import read_columns
from harness.inside import NUM_COMPARED
from harness.lockstep import available_cores
from harness.members import NOT_COMPILED
from harness.scripts import ROOT
from tools.jobs import AS_MANY_AS_FIT, make_groups

TRANSITIONS = 1_000_000  # of a dataset whose file isn't here

# Fields that don't set the cost of an update
NO_SIZES = (*NOT_COMPILED, "dataset_name", "num_seeds", "num_updates", "log_every")

# In a run's files, as finished runs have them
BYTES_OF_NUMBER = 10  # in train.csv
BYTES_OF_ANALYSIS = 450  # a row of evaluations.csv with the analysis
BYTES_OF_EPISODE = 35  # a row of episodes.csv
BYTES_OF_ARRAY = 350  # what a checkpoint has about each array

# --- What is to be done ---


@functools.cache
def task(name):
    """Return the entries of a state and of an action, and the steps of the longest episode."""
    env = make_env(name, drawn=False)
    return env.observation_space.shape[0], env.action_space.shape[0], env._max_episode_steps


def file_of_d4rl(name):
    """Return where D4RL's own file of a dataset is or would be, None if it has none."""
    url = gym.spec(name).kwargs.get("dataset_url")
    return url and d4rl.offline_env.filepath_from_url(url)


def with_known_checksum(config):
    """Return the config with its dataset's checksum, for which nothing is downloaded.

    Of D4RL's file that isn't here it is the known one, or None if that isn't known. A run's name
    depends on it.
    """
    path = file_of_d4rl(config.dataset_name)
    if config.dataset_path or not path or os.path.exists(path):
        return with_checksum(config)
    known = known_files().get(os.path.basename(path), {})
    return replace(config, dataset_sha256=config.dataset_sha256 or known.get("sha256"))


@functools.cache
def num_transitions(name, path):
    """Return the steps in a dataset's file, None if it isn't here."""
    path = path or file_of_d4rl(name)
    if not os.path.exists(path):
        return None
    return len(read_columns(path, ["rewards"])["rewards"])


def row_of(job):
    """Return the job's algorithm and domain, which are a row of the plan."""
    return f"{job.script.NAME}, {DOMAINS[domain(job.config.dataset_name)]}"


def num_evaluations(config, update=0):
    """Return how many evaluations of a run come at an update or later.

    That at the update counts, since the run may have stopped within it.
    """
    before = max(0, update - 1) // config.eval_every
    return math.ceil(config.num_updates / config.eval_every) - before


class Estimate:
    """Jobs that one program trains, what they still have to do, and what that takes."""

    def __init__(self, jobs):
        self.jobs = jobs
        self.script = jobs[0].script
        self.config = jobs[0].config
        self.row = row_of(jobs[0])
        self.state_dim, self.action_dim, longest = task(self.config.dataset_name)
        self.transitions = num_transitions(self.config.dataset_name, self.config.dataset_path)
        self.members = sum(job.config.num_seeds for job in jobs)
        self.updates = 0  # of all members
        self.steps = 0  # of environments
        for job in jobs:
            config = job.config
            update = status(job.directory).update
            episodes = num_evaluations(config, update) * len(evaluation_episodes(config))
            self.updates += config.num_seeds * (config.num_updates - update)
            self.steps += config.num_seeds * episodes * longest

    def kind(self):
        """Return what sets the cost of an update: the row's script, and all sizes."""
        sizes = [self.state_dim, self.action_dim]
        for name, value in vars(self.config).items():
            if type(value) in (int, str) and name not in NO_SIZES and "lr_decay" not in name:
                sizes.append(value)
        return self.row, *sizes

    def question(self, transitions, as_many_as_fit):
        """Return what `measurements` needs to know of the program's kind.

        `transitions` are those of the kind's largest dataset, for which a device needs memory.
        """
        return dict(
            script=self.script.__name__,
            configs=[vars(job.config) for job in self.jobs],
            row=self.row,
            as_many_as_fit=as_many_as_fit,
            shapes=(transitions, self.state_dim, self.action_dim),
        )

    def reckon(self, found, costs, as_many_as_fit):
        """Reckon seconds and bytes from the measurements `found`, and from a member's `costs`."""
        speed = found["speeds"][self.script.NAME]
        row = found["rows"][self.row]
        training = self.updates * costs["operations"] / speed["operations"] + speed["start"]
        self.evaluation = self.steps / row["steps"]
        if found["accelerator"]:  # the CPU plays while the GPU trains
            self.seconds = max(training, self.evaluation)
        else:
            self.seconds = training + self.evaluation
        self.members_at_once = self.members
        if as_many_as_fit:
            self.members_at_once = min(self.members, row["fitting"])
        on_one_device = math.ceil(self.members_at_once / found["devices"])
        self.memory = row["shared"] + row["each"] * on_one_device
        self.host = row["host"] * self.members_at_once
        sizes = [run_bytes(job.config, costs) for job in self.jobs]
        self.checkpoints = sum(checkpoint for checkpoint, _ in sizes)
        self.disk = sum(checkpoint + others for checkpoint, others in sizes)


def run_bytes(config, costs):
    """Return the bytes of a run's checkpoint, and of its other files once it is finished."""
    checkpoint = config.num_seeds * costs["bytes"] + costs["arrays"] * BYTES_OF_ARRAY
    evaluation = len(evaluation_episodes(config)) * BYTES_OF_EPISODE
    features = 0
    if config.analysis:
        evaluation += BYTES_OF_ANALYSIS
        features = 4 * NUM_COMPARED * config.hidden_dim
    rows = config.num_updates // config.log_every
    tables = rows * costs["columns"] * BYTES_OF_NUMBER + num_evaluations(config) * evaluation
    return checkpoint, config.num_seeds * (tables + features)


# --- The plan ---


def ask(questions, processes):
    """Return the `measurements`, made in another process.

    JAX would keep a GPU's memory in this one. The other process has as many cores and GPUs as one
    program has, when `processes` programs share the machine.
    """
    command = [sys.executable, "-m", "tools.measure", str(processes)]
    text = json.dumps(questions)
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["its process was killed"]
        raise UserError(f"can't measure: {lines[-1].removeprefix('error: ')}")
    return json.loads(done.stdout.splitlines()[-1])


def print_plan(jobs, processes, together, measure=ask):
    """Print the plan of some jobs, before any of them is started."""
    unfinished = [job for job in jobs if status(job.directory).state != "finished"]
    if not unfinished:
        print(f"all {len(jobs)} runs are finished")
        return
    programs = [Estimate(own) for own in make_groups(unfinished, together)]
    by_kind = grouped(programs, Estimate.kind)
    kinds = sorted(by_kind, key=lambda kind: -sum(own.updates for own in by_kind[kind]))
    print("measuring, about a minute for each algorithm; no run is started", flush=True)
    fit = together == AS_MANY_AS_FIT
    questions = []
    for kind in kinds:
        example = max(by_kind[kind], key=lambda program: program.members)
        transitions = max(program.transitions or TRANSITIONS for program in by_kind[kind])
        questions.append(example.question(transitions, fit))
    found = measure(questions, processes)
    for kind, costs in zip(kinds, found["kinds"]):
        for program in by_kind[kind]:
            program.reckon(found, costs, fit)
    print(aligned(table(jobs, programs, num_at_once(processes, found))))
    print(*about_measured(found, processes), *about_evaluation(programs, found), sep="\n")
    print(*about_room(programs, processes, found), sep="\n")


def grouped(items, key):
    """Return lists of items by their keys."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def num_at_once(processes, found):
    """Return how many programs run at once at the measured rate.

    Those on the same core or GPU share it.
    """
    if not found["accelerator"]:
        return min(processes, available_cores())
    return min(processes, len(os.getenv("CUDA_VISIBLE_DEVICES", "").split(",")))


def table(jobs, programs, at_once):
    """Return the lines of the plan's table: a row for each algorithm and domain, and for all."""
    header = ["", "runs", "finished", "programs", "members"]
    lines = [header + ["10^6 updates", "GB of memory", "GB of disk", "hours"]]
    by_row = grouped(programs, lambda program: program.row)
    for row, own_jobs in grouped(jobs, row_of).items():
        lines.append(table_line(row, own_jobs, by_row.get(row, []), at_once))
    lines.append(table_line("all", jobs, programs, at_once))
    return lines


def table_line(name, jobs, programs, at_once):
    """Return the cells of some jobs, and of the programs that train those still unfinished."""
    num_finished = len(jobs) - sum(len(program.jobs) for program in programs)
    cells = [name, f"{len(jobs):,}", f"{num_finished:,}", f"{len(programs):,}"]
    if not programs:
        return [*cells, "", "", "", "", ""]
    all_seconds = sum(program.seconds for program in programs)
    longest = max(program.seconds for program in programs)
    hours = max(all_seconds / at_once, longest) / 3600
    cells.append(f"{max(program.members_at_once for program in programs)}")
    cells.append(f"{sum(program.updates for program in programs) / 1e6:,.2f}")
    cells.append(f"{max(program.memory for program in programs) / 1e9:.2f}")
    cells.append(f"{sum(program.disk for program in programs) / 1e9:,.2f}")
    cells.append(f"{hours:,.1f}")
    return cells


def aligned(lines):
    """Return a table of texts, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = []
    for name, *cells in lines:
        words = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        texts.append("  ".join([name.ljust(widths[0]), *words]))
    return "\n".join(texts)


def about_measured(found, processes):
    """Yield lines about what was measured, and what is reckoned from it."""
    own = f"cores: {found['cores']}"
    if found["accelerator"]:
        own += f", devices: {found['devices']}"
    yield f"\nmeasured in {found['seconds']:.0f} s, on {found['machine']}:"
    yield f"  the share of a program, with --processes {processes}: {own}"
    for name, speed in found["speeds"].items():
        rate = f"{speed['updates']:,.0f} updates/s; {speed['start']:.0f} s to compile"
        yield f"  {name}, {speed['about']}, members: {speed['members']}: {rate}"
    for name, row in found["rows"].items():
        yield f"  {name}: {row['steps']:,.0f} steps/s of evaluation"
        yield f"  {name}, {row['about']}: {row['each'] / 1e6:,.1f} MB for each member"
    yield "reckoned from that: other updates, by operations; other regularisers count as free"
    yield "each row's memory: that of its kind of program with the most operations an update"
    yield "not counted: reading the datasets, and measuring inside the actors"


def about_evaluation(programs, found):
    """Yield a line about the time that evaluation takes."""
    settings = []
    for program in programs:
        config = program.config
        noisy = len(evaluation_episodes(config)) - config.eval_episodes
        episodes = f"{config.eval_episodes} + {noisy} episodes"
        settings.append(f"every {config.eval_every:,} updates {episodes}")
    seconds = sum(program.seconds for program in programs)
    share = sum(program.evaluation for program in programs) / max(seconds, 1)
    beside = ", beside training" if found["accelerator"] else ""
    yield (
        f"evaluation: at most {share:.1%} of the hours{beside} "
        f"({', or '.join(dict.fromkeys(settings))}); --eval_every and --eval_episodes change it"
    )


def about_room(programs, processes, found):
    """Yield lines about memory and disk."""
    absent = {own.config.dataset_name for own in programs if own.transitions is None}
    if absent:
        yield f"taken as {TRANSITIONS:,} steps, since not here: {', '.join(sorted(absent))}"
    unknown = {own.config.dataset_name for own in programs if own.config.dataset_sha256 is None}
    if unknown:
        names = ", ".join(sorted(unknown))
        yield f"finished runs aren't counted, since their names need a file's checksum: {names}"
    on_top = "" if found["accelerator"] else "; the process itself takes 0.5 GB more"
    free = f"{found['free'] / 1e9:.1f} GB are free"
    yield f"memory: of a program on each device, where {free}{on_top}"
    host = max(program.host for program in programs) / 1e9
    free = found["free_host"] / 1e9
    yield f"a program's evaluation: up to {host:.2f} GB on the host, where {free:.1f} GB are free"
    checkpoints = sorted(program.checkpoints for program in programs)[-processes:]
    most = sum(program.disk for program in programs) + sum(checkpoints)
    folder = os.path.abspath(programs[0].config.results)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    needed = f"disk: {most / 1e9:,.2f} GB before the end"
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        yield f"{needed}; can't write to {folder} ({error.strerror}): --results names another"
        return
    free = shutil.disk_usage(folder).free
    yield f"{needed}; {free / 1e9:,.1f} GB are free in {folder}"
    if most > free:
        yield "the disk has too little room: --results names another folder"
