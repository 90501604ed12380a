"""The runs of sweeps, which `sweep` trains and `plan` counts. W&B's engine expands the grids."""

import contextlib
import os
import re
import sys
import warnings

import yaml
from tqdm import tqdm

from harness.config import decode
from harness.datasets import with_checksum
from harness.directory import run_directory
from harness.errors import UserError, one_line
from harness.members import in_common
from harness.scripts import read_config, scripts

with warnings.catch_warnings():  # of pydantic, which it uses by old names
    warnings.simplefilter("ignore")
    import sweeps  # pip's package, which is W&B's engine, and not the folder beside tools/

# --- Sweeps ---

# Errors that YAML and W&B's engine raise for a wrong file
ERRORS = (OSError, ValueError, TypeError, AttributeError, AssertionError, LookupError)
ERRORS += (RecursionError, yaml.YAMLError)
COMMAND = ["${env}", "${interpreter}", "${program}", "${args}"]  # of a sweep that has none


def scripts_by_file():
    """Return the scripts by the names of their files."""
    return {f"{name}.py": script for name, script in scripts().items()}


def expand(path):
    """Return the command lines of a sweep's runs, as W&B's agent would start them."""
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
        check_sweep(config)
        runs = sweeps.next_runs(config, [], n=sys.maxsize)
        lines = [command_line(config, run.config) for run in runs if run is not None]
        return lines[: config.get("run_cap")]
    except ERRORS as error:
        raise UserError(f"can't run {path}: {one_line(error)}") from error


def check_sweep(config):
    """Raise UserError if a sweep is not valid or can't be run here."""
    parameters = config.get("parameters") if isinstance(config, dict) else None
    if not isinstance(parameters, dict):
        raise UserError("it has no `parameters:` with lines such as `seed: {values: [0, 1]}`")
    for name, about in parameters.items():
        if not isinstance(about, dict) or not about.get("values", True):
            raise UserError(f"{name} has no values, as in `{name}: {{values: [0, 1]}}`")
    violations = sweeps.schema_violations_from_proposed_config(config)
    if violations:
        raise UserError(violations[0])
    method = config["method"]
    if method != "grid":
        raise UserError(f"its method is {method}, which has no end; only grid runs here")
    program = config.get("program")
    known = ", ".join(scripts_by_file())
    if program is None:
        raise UserError(f"it has no `program:`, which is one of {known}")
    if program not in scripts_by_file():
        raise UserError(f"its program, {program}, is no script here: {known}")
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
    decode(scripts_by_file()[config["program"]].Config, nulls)  # an error if a field can't be None
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

AS_MANY_AS_FIT = None  # of --together without a number


class Job:
    """A run of a sweep: its command line, its config and its directory."""

    def __init__(self, command, add_checksum=with_checksum):
        known = scripts_by_file()
        program = next(word for word in command if word in known)
        self.script = known[program]
        place = command.index(program)
        self.prefix = command[:place]  # such as /usr/bin/env and the interpreter
        self.flags = command[place + 1 :]
        config = read_config(self.script, self.flags, add_checksum)
        # By its path, so that a sweep runs from any folder
        self.command = [self.script.__file__ if word == program else word for word in command]
        self.config = config
        self.directory = run_directory(self.script.__name__, config, self.script.tuned)
        self.name = os.path.relpath(self.directory, config.results)

    def output_path(self):
        return os.path.join(self.directory, "output.txt")

    def last_words(self):
        """Return the last line of its output, without the directory. Return "" if it has none."""
        lines = []
        with contextlib.suppress(OSError), open(self.output_path(), errors="replace") as file:
            lines = [line.strip() for line in file if line.strip().strip("-")]
        if lines and lines[-1].startswith("For simplicity, JAX has removed"):  # after an error
            lines.pop()
        return lines[-1].removesuffix(f"; {self.directory}") if lines else ""


def read_jobs(paths, flags, add_checksum=with_checksum):
    """Return the sweeps' runs, with `flags` added to each. A run in several sweeps comes once."""
    commands = []
    for path in paths:
        commands += [(path, command + flags) for command in expand(path)]
    jobs = {}
    for path, command in tqdm(commands, "reading", disable=not sys.stderr.isatty(), leave=False):
        try:
            job = Job(command, add_checksum)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        jobs[job.directory] = job
    return list(jobs.values())


def make_groups(jobs, together):
    """Return groups of up to `together` jobs that can be trained together, by their seeds.

    They have one command. With AS_MANY_AS_FIT a group has all that can be trained together.
    """
    groups = {}
    for job in sorted(jobs, key=lambda job: job.config.seed):
        in_all = in_common(job.config, job.script.HOST_FLOATS)
        key = (job.script.__name__, *job.prefix, *in_all.items())
        groups.setdefault(key, []).append(job)
    chunks = []
    for own in groups.values():
        size = len(own) if together == AS_MANY_AS_FIT else together
        chunks += [own[i : i + size] for i in range(0, len(own), size)]
    return sorted(chunks, key=lambda own: own[0].config.seed)


def share_of(items, slot, slots):
    """Return a slot's share of a list of cores or GPUs, at least one."""
    return items[slot::slots] or [items[slot % len(items)]]
