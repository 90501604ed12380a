"""The sweeps are those listed here, and run: by W&B's agent, on a cluster and here."""

import contextlib
import csv
import errno
import fcntl
import glob
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import sweeps
import yaml
from conftest import OURS, ROOT, random_columns
from runs_helpers import contents, differences, table
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb_server import Server

import harness.scripts
from harness.config import check, parse
from harness.directory import Status, run_directory
from harness.errors import UserError
from tools import jobs as sweep_jobs
from tools import sweep

SCRIPTS = {f"{name}.py": script for name, script in harness.scripts.scripts().items()}
FOLDER = os.path.join(ROOT, "sweeps")
SECOND_STUDY = sorted(glob.glob("*/second_study/*.yaml", root_dir=FOLDER))
STUDIES = sorted(glob.glob("*/study.yaml", root_dir=FOLDER)) + SECOND_STUDY
FILES = sorted(set(glob.glob("*/*/*.yaml", root_dir=FOLDER)) - set(SECOND_STUDY))

# --- The grids, the paper's and others, listed here by hand ---

KINDS = ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay")
MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
DATASETS = {
    "gym": {
        f"{robot}-{kind}-v2" for robot in ("halfcheetah", "hopper", "walker2d") for kind in KINDS
    },
    "antmaze": {f"antmaze-{maze}-v2" for maze in MAZES},
    "adroit": {
        f"{task}-{kind}-v1"
        for task in ("pen", "door", "hammer", "relocate")
        for kind in ("human", "cloned", "expert")
    },
}
PAPERS = {"DO", "L2", "L1", "EN", "LN", "FN", "GN", "BN", "SN", "InN", "BCN", "GrN"}
FIVE = set(range(5))
HELD_OUT = dict(validation_frac={0.05}, seed=FIVE)
SCALING = {0.1, 0.25, 0.5, 0.75, 0.9}
NOISE = {0.003, 0.01, 0.03, 0.1, 0.3}
DECAY = {1e-5, 1e-4, 1e-3, 1e-2, 1e-1}
LN_AND_DROPOUT = dict(actor_ln={False, True}, actor_dropout={0, 0.1, 0.2})
GRIDS = {
    "baseline": HELD_OUT,
    "dropout": dict(actor_dropout={0.1, 0.2, 0.3, 0.5, 0.75, 0.9}, **HELD_OUT),
    "weight_decay": dict(actor_wd=DECAY, actor_l1_ratio={0.0, 0.5, 1.0}, **HELD_OUT),
    "normalisation": dict(regularisers={"LN", "FN", "GN", "BN", "SN"}, **HELD_OUT),
    "input_noise": dict(actor_input_noise=NOISE, **HELD_OUT),
    "objective_noise": dict(actor_bc_noise=NOISE, **HELD_OUT),
    "gradient_noise": dict(actor_grad_noise=NOISE, **HELD_OUT),
    "robustness": dict(regularisers=PAPERS | {"none"}, seed=FIVE),
    "batch": dict(preset={"none", "batch-1024"}, regularisers={"none", "best"}, seed=FIVE),
    "td3_bc": dict(preset={"td3-bc"}, seed=FIVE),
    "networks": dict(
        regularise={"decoder", "perturbation", "both"}, regularisers=PAPERS | {"none"}, **HELD_OUT
    ),
    "rms_and_sam": dict(actor_rms={False, True}, actor_sam={0, 0.01, 0.05, 0.1}, **HELD_OUT),
    "critic": dict(
        critic_ln={False, True}, critic_dropout={0, 0.1}, critic_wd={0, 0.001}, **HELD_OUT
    ),
}
GRIDS_OF = {
    "rebrac": {
        "tuning": dict(actor_grad_noise={0, 0.003, 0.01}, **LN_AND_DROPOUT, **HELD_OUT),
        "final": dict(regularisers={"none", "best-L2", "best"}, seed=set(range(10))),
        "data_scaling": dict(
            regularisers={"none", "best-L2", "best"}, validation_frac=SCALING, seed=FIVE
        ),
        "as_run": dict(preset={"as-run-none", "as-run-L2", "as-run"}, seed=set(range(10))),
        "lr_decay": dict(
            actor_lr_decay={"cosine", "linear", "exponential"},
            regularisers={"DO", "DO+LN"},
            **HELD_OUT,
        ),
    },
    "iql": {
        "tuning": dict(
            actor_wd={0, 0.001, 0.01}, actor_l1_ratio={0.5}, **LN_AND_DROPOUT, **HELD_OUT
        ),
        "final": dict(regularisers={"none", "best-L1", "best"}, seed=set(range(10))),
        "data_scaling": dict(
            regularisers={"none", "best-L1", "best"}, validation_frac=SCALING, seed=FIVE
        ),
        "as_run": dict(preset={"as-run-none", "as-run-L1", "as-run"}, seed=set(range(10))),
        "lr_decay": dict(
            actor_lr_decay={"none", "linear", "exponential"},
            regularisers={"DO", "DO+LN"},
            **HELD_OUT,
        ),
    },
}
NOT_OF_THE_PAPER = {  # the grids of algorithms for which it has tuned and published nothing
    "data_scaling": dict(regularisers={"none"}, validation_frac=SCALING, seed=FIVE),
    "lr_decay": GRIDS_OF["rebrac"]["lr_decay"],
}


# --- The files ---


def load(path):
    """Return a sweep of the repository."""
    with open(os.path.join(FOLDER, path)) as file:
        return yaml.safe_load(file)


def stated_runs(path):
    """Return the number of runs that a file's first line says."""
    with open(os.path.join(FOLDER, path)) as file:
        found = re.search(r"([\d,]+) runs? of [\d,]+ updates", file.readline())
    return int(found[1].replace(",", ""))


def stated_updates(path):
    """Return the number of updates of a run that a file's first line says."""
    with open(os.path.join(FOLDER, path)) as file:
        found = re.search(r"runs? of ([\d,]+) updates", file.readline())
    return int(found[1].replace(",", ""))


def tuned_config(command):
    """Return the config of a run by its command line: env, an interpreter, a program and flags."""
    script = SCRIPTS[command[2]]
    return script.tuned(parse(script.Config, command[3:]))


def generate(monkeypatch, directory, *words):
    """Call sweeps/generate.py."""
    path = os.path.join(FOLDER, "generate.py")
    monkeypatch.setattr(sys, "argv", [path, "--directory", str(directory), *words])
    runpy.run_path(path)["main"]()


def test_the_files_are_what_the_generator_writes(tmp_path):
    command = [sys.executable, "sweeps/generate.py", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    written = sorted(glob.glob("**/*.yaml", root_dir=tmp_path, recursive=True))
    assert written == sorted(FILES + STUDIES), "run python sweeps/generate.py"
    number = 0
    for script in SCRIPTS.values():
        presets = getattr(script, "PRESETS", {})
        number += 3 * 15  # for each domain
        number += 3 * 3 * bool(script.BEST)  # tuning, as_run, final
        number += 3 * ("td3-bc" in presets)
        number += "batch-1024" in presets  # on Adroit alone
    number += 3  # BCQ's networks
    assert len(FILES) == number
    assert len(SECOND_STUDY) == 16 + 14 + 2 + 4  # ReBRAC, IQL, CQL, BCQ
    for path in written:
        with open(os.path.join(FOLDER, path)) as file:
            is_same = (tmp_path / path).read_text() == file.read()
        assert is_same, f"sweeps/{path} is old: run python sweeps/generate.py"


@pytest.mark.parametrize("path", FILES + STUDIES)
def test_each_file_is_valid_and_each_of_its_runs_is_accepted(path):
    config = load(path)
    assert sweeps.schema_violations_from_proposed_config(config) == []
    runs = [run for run in sweeps.next_runs(config, [], validate=True, n=10**6) if run]
    commands = sweep_jobs.expand(os.path.join(FOLDER, path))
    assert len(runs) == len(commands) == stated_runs(path)
    for run, command in zip(runs, commands):
        flags = {f"--{key}={value['value']}" for key, value in run.config.items()}
        assert set(command[3:]) == flags
        assert command[:3] == ["/usr/bin/env", sys.executable, config["program"]]

    script = SCRIPTS[config["program"]]
    tuned = [tuned_config(command) for command in sample_of_grid(commands)]
    for one in tuned:
        check(one, script.constraints, script.BOUNDS)
        assert one.num_updates == stated_updates(path)
    for key, values in config["parameters"].items():  # each value reaches its field
        given = values.get("values", [values.get("value")])
        if key not in ("seed", "preset", "regularisers", "eval_noise"):
            assert {getattr(one, key) for one in tuned} == set(given), key


def test_rebracs_coefficients_are_chosen_by_seeds_that_no_other_part_has():
    chosen_by = grid_of("rebrac/second_study/coefficients.yaml")["seed"]
    for path in SECOND_STUDY:
        if "coefficients" not in path and "start" not in path:  # which is compared with them
            assert chosen_by.isdisjoint(grid_of(path)["seed"]), path


def sample_of_grid(commands):
    """Return commands in which each dataset and each combination of other flags occurs."""
    datasets = dict.fromkeys(word for line in commands for word in line if "dataset_name" in word)
    others = {}  # as an ordered set
    for line in commands:
        rest = [word for word in line if not re.match("--(seed|dataset_name)=", word)]
        assert len(rest) == len(line) - 2
        others[tuple(rest)] = None
    number = max(len(datasets), len(others))
    pairs = zip(itertools.cycle(others), itertools.cycle(datasets), range(number))
    return [[*rest, dataset] for rest, dataset, _ in pairs]


def grid_of(path):
    """Return a file's grid, with the values of each flag as a set."""
    grid = {}
    for key, values in load(path)["parameters"].items():
        if key != "eval_noise":
            grid[key] = set(values.get("values", [values.get("value")]))
    return grid


WEIGHT_DECAYS = ("L2", "L1", "EN")
COMPARED = {frozenset(("DO", "LN"))}  # combinations, in the paper
for name in WEIGHT_DECAYS:
    COMPARED |= {frozenset(("DO", name)), frozenset(("LN", name)), frozenset(("DO", "LN", name))}
    COMPARED |= {frozenset(("DO", "LN", "GrN", name))}
for name in ("GrN", "InN", "BCN"):
    COMPARED |= {frozenset(("DO", "LN", name))}
COMPARED |= {frozenset(("EN", "DO", "GrN")), frozenset(("EN", "DO", "BCN"))}
COMPARED |= {frozenset(("DO", "LN", "BCN", "L2"))}


@pytest.mark.parametrize("path", [path for path in FILES if path.split("/")[0] in OURS])
def test_each_grid_is_the_one_listed(path):
    algorithm, domain, experiment = path.removesuffix(".yaml").split("/")
    of_a_fork = set(OURS[algorithm].CHOSEN) - PAPERS - {"RMS", "SAM"}
    all_names = PAPERS | of_a_fork
    grid = grid_of(path)
    assert grid.pop("dataset_name") == DATASETS[domain]
    if experiment == "robustness":
        noise = load(path)["parameters"]["eval_noise"]
        assert noise == {"value": [[0.2, 0], [0, 0.05]]}
    if experiment in ("pairs", "triples"):
        number_of_pairs = math.comb(len(all_names), 2) - 3  # without those of weight decays
        number_of_triples = 5 * (len(all_names) - 6)
        sizes = {"pairs": (2, number_of_pairs), "triples": (3, number_of_triples)}
        size, number = sizes[experiment]
        words = [frozenset(name.split("+")) for name in grid.pop("regularisers")]
        assert all(len(word) == size and word <= all_names for word in words)
        assert len(set(words)) == len(words) == number
        assert grid == HELD_OUT
    elif experiment == "combinations":
        names = grid.pop("regularisers")
        assert {frozenset(name.split("+")) for name in names} == COMPARED
        assert grid == HELD_OUT
    else:
        expected = {**GRIDS, **GRIDS_OF.get(algorithm, NOT_OF_THE_PAPER)}[experiment]
        if experiment in ("robustness", "networks"):
            expected = {**expected, "regularisers": all_names | {"none"}}
        assert grid == expected


@pytest.mark.parametrize("algorithm", OURS)
def test_the_papers_combinations_are_among_the_files(algorithm):
    assert {"DO+LN", "DO+L2", "LN+L2"} <= grid_of(f"{algorithm}/gym/pairs.yaml")["regularisers"]
    triples = grid_of(f"{algorithm}/gym/triples.yaml")["regularisers"]
    assert {"DO+LN+GrN", "DO+LN+EN"} <= triples


@pytest.mark.parametrize("path", ["rebrac/gym/final.yaml", "iql/antmaze/dropout.yaml"])
def test_seeds_in_one_run_are_the_same_seeds(path, tmp_path, monkeypatch):
    generate(monkeypatch, tmp_path, "--num_seeds", "5")

    def seeds_by_run(file):
        found = []
        for command in sweep_jobs.expand(file):
            config = tuned_config(command)
            plain = replace(config, seed=0, num_seeds=1)
            directory = run_directory("any", plain, SCRIPTS[command[2]].tuned)
            for i in range(config.num_seeds):
                found.append((directory, config.seed + i))
        return found

    apart = seeds_by_run(os.path.join(FOLDER, path))
    together = seeds_by_run(str(tmp_path / path))
    assert len(apart) == len(set(apart)) == stated_runs(path)
    assert set(together) == set(apart)
    assert len(together) == len(apart)
    assert len(sweep_jobs.expand(str(tmp_path / path))) == stated_runs(path) // 5
    assert stated_runs(str(tmp_path / path)) == stated_runs(path) // 5


def test_the_readmes_table_counts_the_runs():
    with open(os.path.join(FOLDER, "README.md")) as file:
        rows = re.findall(r"^\| `(\w+)\.yaml` \|(.*)\|$", file.read(), re.MULTILINE)
    assert {f"{name}.yaml" for name, _ in rows} == {os.path.basename(path) for path in FILES}
    for name, cells in rows:
        _, _, *numbers, updates = [cell.strip().replace(",", "") for cell in cells.split("|")]
        for algorithm in ("rebrac", "iql"):
            runs = []
            for domain in DATASETS:
                file = f"{algorithm}/{domain}/{name}.yaml"
                runs.append(stated_runs(file) if file in FILES else 0)
            if sum(runs):
                assert [int(number) for number in numbers] == runs
                assert updates == f"{sum(runs) / 1000:.2f}"  # 10^9


def test_the_command_for_the_whole_paper_names_the_papers_files():
    with open(os.path.join(FOLDER, "README.md")) as file:
        text = file.read()
    papers = re.findall(r"^\| `(\w+)\.yaml` \|[^|]*\| yes", text, re.MULTILINE)
    (pattern,) = re.findall(r"^python .* (sweeps/\{rebrac,iql\}\S+\.yaml)", text, re.MULTILINE)
    words = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True)
    expected = itertools.product(("rebrac", "iql"), DATASETS, papers)
    named = {f"sweeps/{algorithm}/{domain}/{name}.yaml" for algorithm, domain, name in expected}
    assert set(words.stdout.split()) == named
    assert all(os.path.exists(os.path.join(ROOT, path)) for path in named)


SHAPES = {
    "halfcheetah": (17, 6),
    "hopper": (11, 3),
    "walker2d": (17, 6),
    "antmaze": (29, 8),
    "pen": (45, 24),
    "door": (39, 28),
    "hammer": (46, 26),
    "relocate": (39, 30),
}
SMALL = dict(
    num_updates=4,
    log_every=2,
    eval_every=4,
    eval_episodes=1,
    eval_noise=[],
    hidden_dim=64,
    batch_size=8,
)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES[3::30])
def test_a_sampled_run_trains(path, tmp_path, monkeypatch, write_dataset):
    commands = sweep_jobs.expand(os.path.join(FOLDER, path))
    command = commands[FILES.index(path) * 7919 % len(commands)]
    name = tuned_config(command).dataset_name
    states, actions = SHAPES[name.split("-")[0]]
    file = write_dataset(**random_columns(0, size=400, states=states, actions=actions))
    small = dict(SMALL)
    if any(word.startswith("--preset") for word in command):  # which may have one of its own
        del small["batch_size"]
    flags = [f"--{key}={value}" for key, value in small.items()]
    flags += [f"--dataset_path={file}", f"--results={tmp_path}"]
    script = SCRIPTS[command[2]]
    monkeypatch.setattr(sys, "argv", [*command[2:], *flags])
    monkeypatch.setenv("EPISODE_STEPS", "15")
    script.main()
    (finished,) = tmp_path.glob(f"{script.__name__}/{name}/*/finished.json")
    assert json.loads(finished.read_text())["updates"] == 4


# --- Expanding a sweep ---


@pytest.fixture
def write_sweep(tmp_path, write_dataset, monkeypatch):
    """Write a small sweep of IQL, whose results go to tmp_path/results; return its path."""
    monkeypatch.setenv("EPISODE_STEPS", "15")
    fixed = dict(
        dataset_path=write_dataset(**random_columns(0)),
        results=str(tmp_path / "results"),
        hidden_dim=16,
        batch_size=8,
        num_updates=20,
        log_every=10,
        eval_every=10,
        eval_episodes=1,
        eval_noise=[],
        analysis=False,
    )

    def write(program="iql.py", command=None, **values):
        parameters = {key: {"value": value} for key, value in fixed.items()}
        for key, value in values.items():
            parameters[key] = {"values": value} if isinstance(value, list) else {"value": value}
        config = load(FILES[0]) | dict(name="small", program=program, parameters=parameters)
        config["command"] = command or config["command"]
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return str(path)

    return write


def test_a_dataset_that_is_not_there_ends_a_sweep_before_its_first_run(write_sweep, tmp_path):
    path = write_sweep(seed=0, dataset_path=[str(tmp_path / "file.hdf5"), "nowhere.hdf5"])
    with pytest.raises(UserError, match="there is no file nowhere.hdf5"):
        sweep_jobs.read_jobs([path], [])


GRID = "method: grid\nprogram: iql.py"
SEED = "parameters: {seed: {values: [1]}}"


def test_a_sweeps_cap_on_its_runs_is_kept(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"{GRID}\nrun_cap: 2\nparameters: {{seed: {{values: [3, 4, 5]}}}}")
    flags = [line[-1] for line in sweep_jobs.expand(str(path))]
    assert flags == ["--seed=3", "--seed=4"]


REFUSED = [  # W&B's agent has these words, too
    "${args_no_boolean_flags}",
    "${args_no_hyphens}",
    "${args_no_equals}",
    "${args_json}",
    "${args_json_file}",
    "--seed=${envvar:lower}",
]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "No such file"),
        ("a: [", "while parsing"),
        ("", "it has no `parameters:` with lines such as"),
        ("just words", "it has no `parameters:` with lines such as"),
        ("method: grid\nprogram: iql.py\nparameters: [1]", "it has no `parameters:`"),
        (f"{GRID}\nparameters: {{seed: 1}}", "seed has no values, as in `seed: {values:"),
        (f"{GRID}\nparameters: {{seed: {{values: []}}}}", "seed has no values"),
        (f"{GRID}\nparameters: {{1: {{values: [1]}}}}", "Sweep config keys must be strings"),
        (
            "method: grid\nprogram: iql.py\nparameters: {seed: {valus: [1]}}",
            "{'valus': [1]} is not",
        ),
        ("method: grid\nprogram: iql.py\nparameters: {}", "{} should be non-empty"),
        (f"method: random\nprogram: iql.py\n{SEED}", "its method is random"),
        (f"method: grid\n{SEED}", "it has no `program:`, which is one of rebrac.py"),
        (f"method: grid\nprogram: a/iql.py\n{SEED}", "its program, a/iql.py, is no script"),
        (f"method: grid\nprogram: iql.py\ncommand: [a]\n{SEED}", "command has no ${program}"),
        (f"{GRID}\ncommand: ['${{program}}', --seed=1]\n{SEED}", "command has no ${args}"),
        *[(f"{GRID}\ncommand: ['${{program}}', '{word}']\n{SEED}", word) for word in REFUSED],
        (f"{GRID}\nparameters: {{seed: {{values: [null, 1]}}}}", "seed can't be None"),
        (
            f"{GRID}\ncommand: ['${{program}}', '${{args}}', '${{envvar:NOWHERE}}']\n{SEED}",
            "its command needs the environment variable NOWHERE, which isn't set",
        ),
    ],
)
def test_what_is_no_sweep_gets_one_clear_line(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        sweep_jobs.expand(str(path))
    words = str(error.value)
    assert words.startswith(f"can't run {path}: ")
    assert message in words
    assert "\n" not in words


def test_a_sweep_without_a_command_has_wandbs(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"method: grid\nprogram: iql.py\n{SEED}")
    assert sweep_jobs.expand(str(path)) == [["/usr/bin/env", sys.executable, "iql.py", "--seed=1"]]


def test_a_command_keeps_its_own_words(tmp_path, write_dataset):
    path = tmp_path / "a.yaml"
    command = 'command: ["${env}", nice, "${interpreter}", -O, "${program}", "${args}", --tau=0.1]'
    path.write_text(f"method: grid\nprogram: iql.py\n{command}\n{SEED}")
    words = ["/usr/bin/env", "nice", sys.executable, "-O", "iql.py", "--seed=1", "--tau=0.1"]
    assert sweep_jobs.expand(str(path)) == [words]
    config = sweep_jobs.Job([*words, f"--dataset_path={write_dataset(**random_columns(0))}"]).config
    assert (config.seed, config.tau) == (1, 0.1)


def test_a_command_is_filled_in_as_wandbs_agent_does(tmp_path, monkeypatch):
    command = ["${env}", "A=${envvar:OUT}", "${interpreter}", "${program}", "${args}"]
    command += ["--results=${envvar:OUT}/${envvar:OUT}", 1]
    values = {"seed": 1, "actor_ln": True, "actor_wd": 1e-05, "eval_noise": [[0.2, 0]]}
    parameters = {key: {"value": value} for key, value in values.items()}
    config = dict(method="grid", program="iql.py", command=command, parameters=parameters)
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("OUT", "some where")

    words = create_sweep_command(list(map(str, command)))
    macros = create_sweep_command_args({"args": parameters})
    macros |= dict(env=["/usr/bin/env"], interpreter=[sys.executable], program=["iql.py"])
    expected = []
    for word in words:
        expected += macros.get(word[2:-1], [word]) if word.startswith("${") else [word]
    (found,) = sweep_jobs.expand(str(path))
    assert sorted(found) == sorted(expected)  # the engine sorts the flags
    assert found[:4] == ["/usr/bin/env", "A=some where", sys.executable, "iql.py"]
    assert found[-2:] == ["--results=some where/some where", "1"]


def test_null_in_a_grid_is_none(write_sweep):
    path = write_sweep(validation_seed=[None, 0], validation_frac=0.5)
    jobs = sweep_jobs.read_jobs([path], [])
    assert [job.config.validation_seed for job in jobs] == [None, 0]
    assert not any("None" in word for job in jobs for word in job.command)


@pytest.mark.slow
def test_a_sweep_runs_from_any_folder(write_sweep, tmp_path):
    path = write_sweep(seed=0)
    command = [sys.executable, os.path.join(ROOT, "tools", "sweep.py"), os.path.basename(path)]
    run = subprocess.run(
        [*command, "--results", "here"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout
    assert "1 done, 0 failed, 0 to go" in run.stdout
    assert len(list(tmp_path.glob("here/iql/*/*/finished.json"))) == 1


def test_an_algorithm_of_your_own_needs_no_list(tmp_path, monkeypatch, write_sweep):
    for name in SCRIPTS:
        shutil.copy(os.path.join(ROOT, name), tmp_path)
    own = (tmp_path / "iql.py").read_text().replace('NAME = "IQL"', 'NAME = "Own"')
    (tmp_path / "own.py").write_text(own)
    (tmp_path / "other.py").write_text("x = 1\n")
    monkeypatch.setattr(harness.scripts, "ROOT", str(tmp_path))
    monkeypatch.setitem(sys.modules, "own", None)  # which takes it out again in the end
    del sys.modules["own"]
    assert list(harness.scripts.scripts()) == ["rebrac", "bcq", "cql", "iql", "own"]
    (job,) = sweep_jobs.read_jobs([write_sweep(program="own.py")], [])
    assert job.directory.startswith(str(tmp_path / "results" / "own" / "halfcheetah"))
    generate(monkeypatch, tmp_path / "sweeps")
    written = (tmp_path / "sweeps" / "own" / "gym" / "final.yaml").read_text()
    assert written.startswith("# Own on Gym-MuJoCo: ")
    assert "program: own.py\n" in written


# --- The order of the runs, and what is said about them ---


def test_all_variants_with_the_first_seed_come_first(write_sweep):
    path = write_sweep(actor_ln=[False, True], seed=[2, 0, 1], actor_bn=[False, True])
    pool = sweep.Pool(sweep_jobs.read_jobs([path], []), 1, 1)
    configs = [job.config for program in pool.waiting for job in program.jobs]
    variants = {seed: [] for seed in range(3)}
    for config in configs:
        variants[config.seed].append((config.actor_ln, config.actor_bn))
    assert [config.seed for config in configs] == 4 * [0] + 4 * [1] + 4 * [2]
    assert len(pool.waiting) == 12
    assert variants[0] == variants[1] == variants[2]
    assert len(set(variants[0])) == 4


def programs_of(path, together, monkeypatch, capsys):
    """Return the configs of each program of a sweep, and the line that it prints first."""
    pools = []
    monkeypatch.setattr(sys, "argv", ["sweep", path, "--together", str(together)])
    monkeypatch.setattr(sweep.Pool, "run", lambda pool: pools.append(pool))
    sweep.main()
    programs = [[job.config for job in program.jobs] for program in pools[0].waiting]
    return programs, capsys.readouterr().out


def test_runs_are_trained_together_by_what_they_differ_in(write_sweep, monkeypatch, capsys):
    path = write_sweep(actor_wd=[0, 0.1, 0.2], actor_ln=[False, True], seed=[1, 0])
    programs, line = programs_of(path, 4, monkeypatch, capsys)
    assert line == "12 runs, of which 0 are finished; 4 programs train the others\n"
    found = []
    for configs in programs:
        assert len({config.actor_ln for config in configs}) == 1
        found.append([(config.seed, config.actor_wd) for config in configs])
    first, rest = [(0, 0.0), (0, 0.1), (0, 0.2), (1, 0.0)], [(1, 0.1), (1, 0.2)]
    assert found == [first, first, rest, rest]


def test_two_datasets_are_never_in_one_program(
    write_sweep, write_dataset, tmp_path, monkeypatch, capsys
):
    other = write_dataset("other.hdf5", **random_columns(1))
    path = write_sweep(dataset_path=[str(tmp_path / "file.hdf5"), other], seed=[0, 1, 2])
    programs, line = programs_of(path, 64, monkeypatch, capsys)
    assert line.endswith("; 2 programs train the others\n")
    assert [[config.seed for config in configs] for configs in programs] == [[0, 1, 2]] * 2


def test_flags_go_to_every_run_and_equal_runs_are_one(write_sweep, monkeypatch, capsys):
    path = write_sweep(regularisers=["none", "LN", "LN+LN"])
    monkeypatch.setattr(sys, "argv", ["sweep", path, "--num_updates", "30"])
    monkeypatch.setattr(sweep, "status", lambda directory: Status("unfinished", "", 0, True))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    sweep.main()
    first, *others, last = capsys.readouterr().out.splitlines()
    assert first == "2 runs, of which 0 are finished"
    assert last.startswith("no waiting for them, which would hold a GPU: SLURM queues a job again")
    assert len(others) == 2
    for line in others:
        assert line.startswith("another process is training: ")
        assert "num_updates=30" in line


def test_a_run_whose_directory_can_not_be_made_fails_alone(
    tmp_path, write_sweep, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    path = write_sweep(seed=[0, 1])
    monkeypatch.setattr(sys, "argv", ["sweep", path, f"--results={tmp_path}/file"])
    with pytest.raises(UserError, match="^2 runs failed"):
        sweep.main()
    printed = capsys.readouterr().out
    assert printed.count("can't start ") == printed.count("Not a directory") == 2


def test_a_flag_that_no_run_takes_is_an_error_before_any_run(tmp_path, write_sweep, monkeypatch):
    path = write_sweep(seed=[0])
    monkeypatch.setattr(sys, "argv", ["sweep", path, "--actor_wd", "-1"])
    with pytest.raises(UserError, match=r"^.*\.yaml: actor_wd must be 0 or more$"):
        sweep.main()
    monkeypatch.setattr(sys, "argv", ["sweep", path, "--nonsense", "1"])
    with pytest.raises(UserError, match=r"^.*\.yaml: there is no flag --nonsense"):
        sweep.main()
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ("FILE --evaluate RUN", "a sweep only trains; give --evaluate and --video to a script"),
        ("FILE --video a.mp4", "a sweep only trains; give --evaluate and --video to a script"),
        ("--plan FILE --process 2", "there is no flag --process"),
        ("--seed 1 FILE", "name all files first, then the flags, as --seed"),
        ("--processes 2 --seed 1 FILE", "name all files first, then the flags, as --seed"),
        ("FILE --processes 2 b.yaml", "name all files first, then the flags; b.yaml comes after"),
        ("FILE --seed 1 b.yaml", "name all files first, then the flags; b.yaml comes after a flag"),
        ("FILE --seed=1 b.yaml", "name all files first, then the flags; b.yaml comes after a flag"),
        ("--together FILE", "name all files first, then the flags"),
        ("FILE --process 2", "there is no flag --process"),
        ("--plan", "the following arguments are required: files"),
        ("FILE --processes two", "argument --processes: invalid int value: 'two'"),
        ("FILE --together 0", "together must be 1 or more"),
        ("FILE --together -1", "together must be 1 or more"),
    ],
)
def test_flags_that_a_sweep_can_not_take_are_an_error(words, message, write_sweep, monkeypatch):
    path = write_sweep(seed=[0])
    monkeypatch.setattr(sys, "argv", ["sweep", *words.replace("FILE", path).split()])
    monkeypatch.setattr(sweep.Pool, "run", lambda pool: pytest.fail("a run began"))
    with pytest.raises(UserError, match=rf"^(.*\.yaml: )?{message}"):
        sweep.main()


@pytest.mark.parametrize(
    "words",
    [
        "--seed=1 FILE",
        "--processes 2 FILE --seed 1",
        "FILE --config_path=one.yaml",
        "FILE --config_path one.yaml",
        "FILE --analysis false --config_path=one.yaml",
    ],
)
def test_flags_may_come_first_where_they_are_clear(words, write_sweep, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text("seed: 1")
    pools = []
    monkeypatch.setattr(sys, "argv", ["sweep", *words.replace("FILE", write_sweep()).split()])
    monkeypatch.setattr(sweep.Pool, "run", lambda pool: pools.append(pool))
    sweep.main()
    assert [program.jobs[0].config.seed for program in pools[0].waiting] == [1]


def test_processes_share_the_cores_and_the_gpus(write_sweep, monkeypatch):
    cores = os.sched_getaffinity(0)
    gpus = []
    shares = []

    def popen(command, env, **_):
        gpus.append(env["CUDA_VISIBLE_DEVICES"])
        shares.append(os.sched_getaffinity(0))
        return SimpleNamespace(stdin=io.StringIO())

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    program = sweep.Program(sweep_jobs.read_jobs([write_sweep()], []), as_many_as_fit=False)
    for slot in range(3):
        program.start(slot, 3)
    assert gpus == ["3", "5", "3"]
    assert set.union(*shares) == cores == os.sched_getaffinity(0)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    program.start(0, 1)
    assert shares[-1] == cores
    assert gpus[-1] == "3,5"


def test_without_a_number_all_that_can_be_trained_together_are_one_group(
    write_sweep, monkeypatch, capsys
):
    commands = []

    def popen(command, **_):
        commands.append(command)
        return SimpleNamespace(stdin=io.StringIO())

    pools = []
    path = write_sweep(regularisers=["none", "LN"], actor_wd=[0, 0.1, 0.2], seed=list(range(40)))
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(sweep.Pool, "run", lambda pool: pools.append(pool))
    for words in (["--together"], ["--seed", "0", "--actor_wd", "0", "--together"]):
        monkeypatch.setattr(sys, "argv", ["sweep", path, *words])
        sweep.main()
    for program in pools[0].waiting + pools[1].waiting:
        program.start(0, 1)
    line = "240 runs, of which 0 are finished; 2 programs train the others\n"
    assert capsys.readouterr().out.startswith(line)
    group = ["/usr/bin/env", sys.executable, "-u", "-m", "harness.group", "iql", "fit"]
    assert commands[:2] == [group, group]
    assert [os.path.basename(command[2]) for command in commands[2:]] == ["iql.py", "iql.py"]


class ShellJob(sweep_jobs.Job):
    """A job whose process is a line of the shell."""

    def __init__(self, directory, line, seed=0):
        self.command = ["sh", "-c", line]
        self.prefix = ["sh"]
        self.script = SimpleNamespace(__name__="shell", HOST_FLOATS=())
        results = os.path.dirname(directory)
        self.config = SimpleNamespace(seed=seed, num_updates=10, results=results)
        self.directory = str(directory)
        self.name = os.path.basename(directory)


@pytest.fixture
def run_jobs(tmp_path, monkeypatch, capsys):
    """Run lines of the shell as a sweep's jobs; return what was printed and how it ended."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(sweep, "LOOK_EVERY", 0)
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        handlers[number] = signal.getsignal(number)

    def run(processes, *lines):
        jobs = [ShellJob(tmp_path / f"job{i}", line) for i, line in enumerate(lines)]
        monkeypatch.setattr(sweep, "read_jobs", lambda paths, flags: jobs)
        monkeypatch.setattr(sys, "argv", ["sweep", "a.yaml", "--processes", str(processes)])
        end = None
        try:
            sweep.main()
        except (SystemExit, UserError) as error:
            end = error
        return capsys.readouterr().out.splitlines(), end

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_nothing_more_is_started_on_a_device_that_has_failed(run_jobs, tmp_path):
    """Another device takes up its run. Without another one the command ends."""
    path = tmp_path / "failed"
    failing = f"mkdir {path} 2> /dev/null && {{ echo gone; exit {os.EX_UNAVAILABLE}; }}"
    lines = [f"{failing}; {ending(tmp_path / f'job{i}', 2)}" for i in range(3)]
    printed, end = run_jobs(1, *lines)
    assert printed[1:] == ["a device has failed: gone"]
    expected = "JAX's devices have failed, with 3 runs to go; once they are fixed, "
    assert str(end).startswith(expected)
    path.rmdir()
    printed, end = run_jobs(2, *lines)
    assert "a device has failed: gone" in printed
    assert end is None
    for i in range(3):
        assert (tmp_path / f"job{i}" / "finished.json").exists()


def test_each_end_of_a_run_is_told(run_jobs, tmp_path):
    """Another process was faster with job1, and leaves it unfinished."""
    faster = f"test -e {tmp_path}/tried || {{ touch {tmp_path}/tried; exit {os.EX_TEMPFAIL}; }}"
    later = f"{faster}; {ending(tmp_path / 'job1', 2)}"
    lines, end = run_jobs(1, "echo why >&2; exit 3", later, ending(tmp_path / "job2", 1), "true")
    assert lines == [
        "4 runs, of which 0 are finished",
        "0 done, 1 failed, 3 to go: job0",
        "    why",
        "1 done, 1 failed, 2 to go: job2",
        "    final score 1",
        "1 done, 2 failed, 1 to go: job3",
        "    no output; is the disk full?",
        "2 done, 2 failed, 0 to go: job1",
        "    final score 2",
        f"failed: {tmp_path / 'job0'}",
        f"failed: {tmp_path / 'job3'}",
    ]
    assert isinstance(end, UserError)
    assert str(end).startswith("2 runs failed; output.txt in their directories says why")


def ending(directory, score):
    """Return a line of the shell that finishes a run."""
    return f"echo; echo 'final score {score}; {directory}'; echo; touch {directory}/finished.json"


def test_a_kill_and_a_full_disk_are_told_where_the_run_could_not_say_it(run_jobs, tmp_path):
    (tmp_path / "job1").mkdir()
    (tmp_path / "job1" / "output.txt").symlink_to("/dev/full")
    lines, _ = run_jobs(1, "echo score 1; kill -9 $$", "echo why; exit 1", "kill -11 $$")
    end = "the same command resumes from the last checkpoint"
    assert lines[2:7:2] == [
        f"    killed, perhaps since memory had run out; {end}",
        f"    can't write to {tmp_path}/job1 (No space left on device); once that is fixed, {end}",
        f"    Segmentation fault; {end}",
    ]


def test_a_pool_goes_on_where_its_own_output_can_not_be_written(tmp_path):
    (job,) = jobs = [ShellJob(tmp_path / "job0", "")]
    pool = sweep.Pool(jobs, 1, 1)

    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    pool.bar = SimpleNamespace(write=write)
    pool.note(job, pool.done, "final score 1")
    assert pool.done == jobs


# --- Several pools ---


def lock(directory):
    """Lock a run as its process does; return the file."""
    os.makedirs(directory, exist_ok=True)
    file = open(os.path.join(directory, "lock"), "a")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def test_a_pool_waits_for_runs_of_others_and_takes_up_what_they_leave(run_jobs, tmp_path):
    """The others leave job0 unfinished, finish job1, and fail again at job2 and job3."""
    directories = [tmp_path / f"job{i}" for i in range(5)]
    locks = [lock(directory) for directory in directories[:4]]
    for directory in (directories[2], directories[4]):
        directory.mkdir(exist_ok=True)
        (directory / "failed.txt").write_text("error: before\n")

    def end():
        (directories[1] / "finished.json").write_text("{}")
        for directory in directories[2:4]:
            (directory / "failed.txt").write_text("error: again\n")
        for file in locks[1:] + locks[:1]:  # whose order is then that of the lines
            file.close()

    threading.Timer(3, end).start()
    lines, error = run_jobs(
        2, ending(directories[0], 1), *3 * ["exit 9"], ending(directories[4], 5)
    )
    assert lines == [
        "5 runs, of which 0 are finished",
        "1 done, 0 failed, 4 to go: job4",
        "    final score 5",
        "waiting for 4 runs that other processes train",
        "2 done, 0 failed, 3 to go: job1",
        "    in another process",
        "2 done, 1 failed, 2 to go: job2",
        "    in another process",
        "2 done, 2 failed, 1 to go: job3",
        "    in another process",
        "3 done, 2 failed, 0 to go: job0",
        "    final score 1",
        f"failed: {directories[2]}",
        f"failed: {directories[3]}",
    ]
    assert str(error).startswith("2 runs failed")


def test_a_signal_ends_the_waiting(run_jobs, tmp_path):
    with lock(tmp_path / "job0"):
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        lines, end = run_jobs(1, "exit 9")
    assert lines[1] == "waiting for 1 runs that other processes train"
    assert lines[-1] == "stopped; the same command resumes"
    assert end.code == 130


@pytest.fixture
def two_pools(tmp_path, monkeypatch):
    """Return two pools of two groups of two runs, whose processes do nothing."""
    jobs = [ShellJob(tmp_path / f"job{i}", "") for i in range(4)]

    def start(program, *_):
        program.process = SimpleNamespace(poll=lambda: None)

    monkeypatch.setattr(sweep.Program, "start", start)
    return jobs, [sweep.Pool(jobs, 2, 2) for _ in range(2)]


def test_pools_that_start_at_once_do_not_split_a_group(two_pools):
    jobs, (first, second) = two_pools
    first.fill(0)
    second.fill(0)
    second.fill(1)
    assert first.running[0].jobs == jobs[:2]
    assert second.running[0].jobs == jobs[2:]  # and none in the other slot
    with lock(jobs[0].directory):
        first.look_after(0, first.running[0])
        second.fill(1)
        assert len(second.waiting) == 1  # until the process has both locks
        with lock(jobs[1].directory):
            first.look_after(0, first.running[0])
            second.fill(1)
    assert list(second.running) == [0]
    assert second.busy == jobs[:2]


@pytest.mark.parametrize("how", ["dies", "ends", "leaves one out"])
def test_a_group_is_free_again_once_nobody_starts_it(two_pools, monkeypatch, how):
    jobs, (first, second) = two_pools
    first.fill(0)
    program = first.running.pop(0)
    if how == "dies":
        for file in program.claims:  # as the system does
            file.close()
    elif how == "ends":
        program.process = SimpleNamespace(poll=lambda: os.EX_TEMPFAIL)
        first.running[0] = program
        first.look_after(0, program)
        assert first.busy == jobs[:2]
    else:
        with lock(jobs[0].directory):
            monkeypatch.setattr(sweep, "LOCK_SECONDS", 60)
            first.look_after(0, program)
            monkeypatch.setattr(sweep, "LOCK_SECONDS", 0)
            second.fill(0)
            assert second.running.pop(0).jobs == jobs[2:]
            first.look_after(0, program)
            second.fill(0)
        assert second.running[0].jobs == jobs[1:2]
        return
    second.fill(0)
    assert second.running[0].jobs == jobs[:2]


@pytest.fixture
def no_locks(monkeypatch):
    """Let the disk be one that has no locks, outside of SLURM."""
    for key in list(os.environ):
        if key.startswith("SLURM"):
            monkeypatch.delenv(key)

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def be_task(monkeypatch, index, indices):
    """Set what SLURM sets in a task of an array."""
    words = dict(ID=index, MIN=indices[0], MAX=indices[-1], COUNT=len(indices))
    words["STEP"] = indices[1] - indices[0]
    for name, value in words.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))


@pytest.mark.parametrize("together", ["2", ""])
def test_without_locks_an_arrays_tasks_have_fixed_shares(
    write_sweep, no_locks, monkeypatch, capsys, together
):
    """Also after some runs are finished, which a task begins by without the others."""
    words = ["--together", together] if together else ["--together"]
    path = write_sweep(actor_ln=[False, True], actor_bn=[False, True], seed=[0, 1, 2])
    everything = {job.directory for job in sweep_jobs.read_jobs([path], [])}
    assert len(everything) == 12
    pools = []
    monkeypatch.setattr(sys, "argv", ["sweep", path, *words])
    monkeypatch.setattr(sweep.Pool, "run", lambda pool: pools.append(pool))
    for index in (3, 5, 7):
        be_task(monkeypatch, index, (3, 5, 7))
        sweep.main()
    shares = [{job.directory for job in pool.updates} for pool in pools]
    assert set.union(*shares) == everything
    assert sum(map(len, shares)) == 12
    line = capsys.readouterr().out.splitlines()[2]
    assert line.startswith(
        f"no locks on this disk, so task 2 of 3 of this SLURM array takes {len(shares[1])} of 12 "
    )
    for directory in list(shares[0]) + list(shares[1])[:1]:
        os.makedirs(directory)
        with open(os.path.join(directory, "finished.json"), "w") as file:
            file.write("{}")
    for index in (5, 3):
        be_task(monkeypatch, index, (3, 5, 7))
        sweep.main()
    assert {job.directory for job in pools[3].updates} == shares[1]
    assert len(pools[3].unfinished) == len(shares[1]) - 1
    assert pools[4].waiting == []


def test_without_locks_and_equal_steps_a_task_takes_nothing(write_sweep, no_locks, monkeypatch):
    path = write_sweep(seed=[0, 1, 2])
    monkeypatch.setattr(sys, "argv", ["sweep", path])
    monkeypatch.setattr(sweep.Pool, "run", lambda pool: pytest.fail("a run began"))
    for index in (1, 2, 5):
        be_task(monkeypatch, index, (1, 2, 5))
        with pytest.raises(UserError, match="^no locks on this disk.* as in --array=1-8$"):
            sweep.main()


def test_without_locks_and_an_array_one_command_is_alone(
    write_sweep, no_locks, monkeypatch, capsys
):
    programs, lines = programs_of(write_sweep(seed=[0, 1]), 1, monkeypatch, capsys)
    assert lines == (
        "warning: no locks on this disk, so only one such command may run at a time\n"
        "2 runs, of which 0 are finished\n"
    )
    assert len(programs) == 2


def test_without_locks_nothing_is_claimed_and_programs_are_seldom_looked_at(
    two_pools, no_locks, monkeypatch
):
    _, (pool, _) = two_pools
    pool.fill(0)
    (program,) = pool.running.values()
    assert program.claims == []
    looks = []

    def look(directory):
        looks.append(directory)
        return Status("unfinished", "", 0, False)

    monkeypatch.setattr(sweep, "status", look)
    for _ in range(5):
        pool.look_after(0, program)
    assert looks == [job.directory for job in program.jobs]  # each once


def test_looking_for_locks_leaves_nothing(write_sweep, monkeypatch, capsys, tmp_path):
    programs_of(write_sweep(seed=0), 1, monkeypatch, capsys)
    assert list((tmp_path / "results").iterdir()) == []


def test_what_ends_a_program_of_several_runs_is_told_of_each(tmp_path):
    """Before its runs have begun a traceback is in the first one's output. Later each has it."""
    jobs = [ShellJob(tmp_path / f"job{i}", "") for i in range(2)]
    for job in jobs:
        os.makedirs(job.directory)
    with open(jobs[0].output_path(), "w") as file:
        file.write("Traceback\nKeyError: 'my_column'\n--------------------\n")
        file.write("For simplicity, JAX has removed its internal frames from the traceback ...\n")
    for job in jobs:
        assert sweep.why_it_failed(job, "", 1, jobs) == "KeyError: 'my_column'"
    with open(jobs[1].output_path(), "w") as file:
        file.write("one of 2 runs that are trained together\nerror: 'my_column'\n")
    reason = "KeyError: 'my_column'\n"
    for job in jobs:
        assert sweep.why_it_failed(job, reason, 1, jobs) == "KeyError: 'my_column'"


def test_a_failed_run_has_its_own_reason_and_not_an_earlier_one(tmp_path):
    """The first has failed before, and now ends before it begins. The second is killed."""
    jobs = [ShellJob(tmp_path / f"job{i}", "") for i in range(2)]

    def fail(job):
        os.makedirs(job.directory)
        with open(os.path.join(job.directory, "failed.txt"), "w") as file:
            file.write("error: actor_loss is nan\n")

    fail(jobs[0])
    pool = sweep.Pool(jobs, 1, 1)
    fail(jobs[1])
    lines = []
    pool.bar = SimpleNamespace(write=lambda line, stream: lines.append(line))
    for program, code in zip(pool.waiting, (1, -signal.SIGKILL)):
        with open(program.jobs[0].output_path(), "a") as file:
            file.write("error: JAX finds no device\n")
        program.process = SimpleNamespace(poll=lambda code=code: code)
        pool.running[0] = program
        pool.look_after(0, program)
    assert [line.splitlines()[1].strip() for line in lines] == [
        "error: JAX finds no device",
        "error: actor_loss is nan",
    ]


@pytest.mark.parametrize("code", [0, os.EX_TEMPFAIL])
def test_each_run_of_a_program_has_its_own_end(tmp_path, code):
    """One that it has left out is another process's. One may have printed nothing."""
    jobs = [ShellJob(tmp_path / f"job{i}", "") for i in range(3)]
    pool = sweep.Pool(jobs, 1, 3)
    lines = []
    pool.bar = SimpleNamespace(write=lambda line, stream: lines.append(line))
    (program,) = pool.waiting
    assert program.jobs == jobs
    for job, name in zip(jobs, ("finished.json", "failed.txt")):
        os.makedirs(job.directory)
        with open(os.path.join(job.directory, name), "w") as file:
            file.write("error: why\n")
    with open(jobs[0].output_path(), "w") as file:
        file.write("final score 1\n")
    program.process = SimpleNamespace(poll=lambda: code)
    pool.running[0] = program
    pool.look_after(0, program)
    assert (pool.done, pool.failed, pool.busy) == (jobs[:1], jobs[1:2], jobs[2:])
    assert lines == [
        "1 done, 0 failed, 2 to go: job0\n    final score 1",
        "1 done, 1 failed, 1 to go: job1\n    error: why",
    ]


def test_runs_that_ended_before_their_device_failed_are_told(tmp_path):
    jobs = [ShellJob(tmp_path / f"job{i}", "") for i in range(3)]
    pool = sweep.Pool(jobs, 2, 3)
    lines = []
    pool.bar = SimpleNamespace(write=lambda line, stream: lines.append(line))
    (program,) = pool.waiting
    pool.waiting = []
    for job, name in zip(jobs, ("finished.json", "failed.txt")):
        os.makedirs(job.directory)
        with open(os.path.join(job.directory, name), "w") as file:
            file.write("error: why\n")
    program.process = SimpleNamespace(poll=lambda: os.EX_UNAVAILABLE)
    pool.running[0] = program
    pool.look_after(0, program)
    assert (pool.done, pool.failed, pool.busy) == (jobs[:1], jobs[1:2], [])
    assert [own.jobs for own in pool.waiting] == [jobs[2:]]
    assert not any("in another process" in line for line in lines)
    assert lines[-1].startswith("a device has failed: ")


def test_words_before_a_sweeps_interpreter_are_also_a_groups(write_sweep, monkeypatch):
    """Runs of sweeps whose commands differ in these are in different groups."""
    commands = []

    def popen(command, **_):
        commands.append(command)
        return SimpleNamespace(stdin=io.StringIO())

    monkeypatch.setattr(subprocess, "Popen", popen)
    words = ["nice", *sweep_jobs.COMMAND[1:]]
    jobs = []
    for command in (words, sweep_jobs.COMMAND):
        jobs += sweep_jobs.read_jobs([write_sweep(seed=[0, 1], command=command)], [])
    groups = sweep_jobs.make_groups(jobs, None)
    assert [len(group) for group in groups] == [2, 2]
    sweep.Program(groups[0], as_many_as_fit=False).start(0, 1)
    assert commands == [["nice", sys.executable, "-u", "-m", "harness.group", "iql"]]


def test_a_pool_goes_on_under_nohup(run_jobs, tmp_path):
    """nohup ignores SIGHUP, which a closed terminal sends."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGHUP)).start()
    lines, end = run_jobs(1, f"sleep 2; {ending(tmp_path / 'job0', 1)}")
    assert end is None
    assert (tmp_path / "job0" / "finished.json").exists()


def test_the_first_signal_stops_and_the_second_kills(run_jobs, tmp_path):
    for delay in (1, 2.5):
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
    saving = "trap 'echo saved; exit 143' TERM; while true; do sleep 0.1; done"
    stubborn = "trap '' TERM; exec sleep 60"
    started = time.monotonic()
    lines, end = run_jobs(2, saving, stubborn, "echo never")
    assert time.monotonic() - started < 30
    assert lines == ["3 runs, of which 0 are finished", "stopped; the same command resumes"]
    assert isinstance(end, SystemExit)
    assert end.code == 130
    assert (tmp_path / "job0" / "output.txt").read_text() == "saved\n"
    assert not (tmp_path / "job2").exists()


def test_finished_runs_are_skipped(run_jobs, tmp_path):
    (tmp_path / "job0").mkdir()
    (tmp_path / "job0" / "finished.json").write_text("{}")
    lines, end = run_jobs(1, "echo again", f"echo once; touch {tmp_path}/job1/finished.json")
    assert lines[:2] == ["2 runs, of which 1 are finished", "1 done, 0 failed, 0 to go: job1"]
    assert end is None
    assert not (tmp_path / "job0" / "output.txt").exists()


# --- Real runs on this machine ---


def start_here(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "tools.sweep", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def found(tmp_path, name):
    """Return the files of a name in the directories of all runs."""
    return list(tmp_path.glob(f"results/*/*/*/{name}"))


def wait_for_rows(tmp_path, process):
    """Wait until the first row of a run's train.csv is there, or the process has ended."""
    end = time.monotonic() + 120
    while process.poll() is None:
        if any(path.stat().st_size for path in found(tmp_path, "train.csv")):
            return
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_sweep_stops_resumes_and_says_what_failed(tmp_path, write_sweep):
    damaged = tmp_path / "damaged.hdf5"
    damaged.write_text("no data")
    path = write_sweep(
        num_updates=20_000,
        log_every=1000,
        eval_every=1000,
        dataset_path=[str(tmp_path / "file.hdf5"), str(damaged)],
        seed=[0, 1],
    )
    process = start_here(path, "--processes", "2")
    wait_for_rows(tmp_path, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert output.startswith("4 runs, of which 0 are finished\n")
    assert output.endswith("stopped; the same command resumes\n")
    assert not found(tmp_path, "finished.json")

    process = start_here(path, "--processes", "2")
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "2 done, " in output
    assert f"error: {damaged} is " in output
    assert "final score" in output
    failed = [line for line in output.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2
    assert errors.startswith("error: 2 runs failed; output.txt in their directories says why")
    assert len(errors.splitlines()) == 1
    texts = [path.read_text() for path in found(tmp_path, "output.txt")]
    assert len(texts) == 4
    assert any("resuming from update" in text for text in texts)

    output, _ = start_here(path).communicate(timeout=600)
    assert output.startswith("4 runs, of which 2 are finished\n")
    assert "0 done, 2 failed, 0 to go" in output


@pytest.mark.slow
def test_two_at_once_share_a_sweep(tmp_path, write_sweep):
    path = write_sweep(seed=[0, 1, 2])
    processes = [start_here(path), start_here(path)]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len(found(tmp_path, "finished.json")) == 3
    for path in found(tmp_path, "output.txt"):
        assert path.read_text().count("final score") == 1
        assert "another process" not in path.read_text()


@pytest.mark.slow
def test_runs_that_are_trained_together_stop_resume_and_fail_one_by_one(tmp_path, write_sweep):
    """Two of the three are in one program, and one of these diverges."""
    path = write_sweep(
        critic_learning_rate=[3e-4, 1e30, 6e-4],
        num_updates=20_000,
        log_every=1000,
        eval_every=20_000,
    )
    process = start_here(path, "--together", "2")
    wait_for_rows(tmp_path, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    first, *_, last = output.splitlines()
    assert first == "3 runs, of which 0 are finished; 2 programs train the others"
    assert last == "stopped; the same command resumes"
    assert not found(tmp_path, "finished.json")

    process = start_here(path, "--together", "2")
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "2 done, 1 failed, 0 to go" in output
    assert errors.startswith("error: 1 runs failed;")
    assert len(found(tmp_path, "finished.json")) == 2
    (failed,) = found(tmp_path, "failed.txt")
    words = failed.read_text().strip()
    assert f"\n    {words}\n" in output
    assert output.endswith(f"failed: {failed.parent}\n")
    assert "1e+30" in failed.parent.name
    texts = [path.read_text() for path in found(tmp_path, "output.txt")]
    assert sum("resuming from update" in text for text in texts) == 2  # of the first program
    ends = [text.splitlines()[-1].split(" ")[0] for text in texts]
    assert sorted(ends) == ["error:", "final", "final"]


POOL = """
from tools import sweep

sweep.LOOK_EVERY = 1
sweep.main()
"""


def own_process(pool):
    """Return the process that a pool has started, None before."""
    with open(f"/proc/{pool.pid}/task/{pool.pid}/children") as file:
        return next(map(int, file.read().split()), None)


def locked_by(process):
    """Return the directories of the runs whose locks a process has open.

    A file that it closes meanwhile isn't among them, and nothing is when the process has ended.
    """
    directories = set()
    for link in glob.glob(f"/proc/{process}/fd/*"):
        with contextlib.suppress(FileNotFoundError):
            file = os.readlink(link)
            if os.path.basename(file) == "lock":
                directories.add(os.path.dirname(file))
    return directories


@pytest.mark.slow
def test_what_a_machine_that_died_had_is_taken_up_by_another(tmp_path, write_sweep, spawn):
    """Three share six runs, in groups of two, and one is killed.

    Its runs end with the same bits as if they had been left in peace in the same group.
    """
    fields = dict(num_updates=6000, log_every=500, eval_every=1000)
    words = ["-c", POOL, write_sweep(seed=list(range(6)), **fields), "--together", "2"]
    pools = [spawn(*words) for _ in range(3)]
    dead, *others = pools
    end = time.monotonic() + 300
    while not has_evaluated(dead):
        assert dead.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process = own_process(dead)
    taken = locked_by(process)
    os.kill(process, signal.SIGKILL)
    dead.kill()
    assert "finished.json" not in {name for directory in taken for name in os.listdir(directory)}
    outputs = [pool.communicate(timeout=300)[0] for pool in others]
    assert [pool.returncode for pool in others] == [0, 0], outputs
    for output in outputs:
        assert "6 done, 0 failed, 0 to go" in output
    assert sum(output.count("    final score ") for output in outputs) == 6

    seeds = []
    for file in found(tmp_path, "output.txt"):
        rows = table(file.parent, "train.csv")
        assert [int(row["update"]) for row in rows] == list(range(500, 6001, 500))
        is_taken = str(file.parent) in taken
        if is_taken:
            seeds.append(int(rows[0]["seed"]))
        text = file.read_text()
        assert text.count("one of 2 runs that are trained together") == 1 + is_taken
        assert text.count("resuming from update") == is_taken
        assert text.count("final score") == 1
    assert len(seeds) == 2
    write_sweep(seed=seeds, **fields)
    spawn(*words, "--results", str(tmp_path / "peace")).communicate(timeout=300)
    for directory in taken:
        in_peace = directory.replace("/results/", "/peace/")
        assert differences(contents(directory), contents(in_peace)) == []


def has_evaluated(pool):
    """Return whether a pool's runs have the checkpoint of their first evaluation."""
    process = own_process(pool)
    directories = locked_by(process) if process else []
    return any(os.path.exists(os.path.join(one, "previous.npz")) for one in directories)


# --- W&B's sweep and agent ---


def rows_by_seed(tmp_path):
    """Return the rows of each run's train.csv, by its seed and whether its actor has LayerNorm."""
    rows = {}
    for path in found(tmp_path, "train.csv"):
        with open(path) as file:
            own = list(csv.DictReader(file))
        rows[int(own[0]["seed"]), "actor_ln=true" in str(path)] = own
    return rows


def agent_environment(server, tmp_path):
    """Return the variables of a program that has an account at a stand-in for W&B's server."""
    programs = os.path.dirname(sys.executable)
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "WANDB_DIR": str(tmp_path),
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": 40 * "k",
        "WANDB_AGENT_REPORT_INTERVAL": "1",
    }


def start_sweep(environment, path):
    """Start a sweep by W&B's command; return its name."""
    command = [sys.executable, "-m", "wandb", "sweep", path]
    options = dict(cwd=ROOT, env=environment, capture_output=True, text=True)
    made = subprocess.run(command, timeout=120, **options)
    return re.search(r"wandb agent (\S+)", made.stderr)[1]


def run_agent(environment, name):
    """Run an agent until its sweep has no more runs."""
    command = [sys.executable, "-m", "wandb", "agent", name]
    options = dict(cwd=ROOT, env=environment, capture_output=True, text=True)
    return subprocess.run(command, timeout=300, **options)


@pytest.mark.slow
def test_wandbs_agent_runs_a_sweep_to_its_end(tmp_path, write_sweep):
    path = write_sweep(regularisers=["none", "LN"], seed=0)
    with Server() as server:
        environment = agent_environment(server, tmp_path)
        name = start_sweep(environment, path)
        assert name == "team/regularised-actors/sweep0"
        agent = run_agent(environment, name)
        assert agent.returncode == 0, agent.stderr
        assert [run["exit"] for run in server.runs.values()] == [0, 0]
        local = rows_by_seed(tmp_path)
        assert len(local) == 2
        for run, about in server.runs.items():
            sent = about["config"]
            config = {key: sent[key]["value"] for key in sent if key != "_wandb"}
            assert config["algorithm"] == "iql"
            assert config["actor_ln"] == (config["regularisers"] == "LN")
            history = server.history(run)
            assert [row["_step"] for row in history] == [10, 20]
            rows = local[config["seed"], config["actor_ln"]]
            for row, sent in zip(rows, history, strict=True):
                assert sent["actor_loss"] == pytest.approx(float(row["actor_loss"]))
                assert "score" in sent


class StoppingServer(Server):
    """A server where somebody stops each run after its first rows."""

    def Heartbeat(self, id, runState, **options):
        for name in json.loads(runState):
            if self.runs[name]["history"]:
                commands = json.dumps([dict(type="stop", run_id=name)])
                return {"agentHeartbeat": dict(agent=dict(id=id), commands=commands)}
        return super().Heartbeat(id, runState, **options)


@pytest.mark.slow
def test_a_run_that_is_stopped_in_wandbs_pages_does_not_come_back(tmp_path, write_sweep):
    path = write_sweep(seed=0, num_updates=10**6, log_every=1000, eval_every=10**6)
    with StoppingServer() as server:
        environment = agent_environment(server, tmp_path)
        environment["WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL"] = "1"  # seconds
        agent = run_agent(environment, start_sweep(environment, path))
        assert agent.returncode == 0, agent.stderr
        orders = re.findall("Agent received command: (.*)", agent.stderr)
        assert (orders[0], set(orders[1:-1]), orders[-1]) == ("run", {"stop"}, "exit")
        (run,) = server.runs.values()
        assert run["state"] != "preempting"
        assert run["exit"] == 1
    assert "stopped at update" in agent.stdout


# --- SLURM ---


@pytest.fixture
def slurm(tmp_path):
    """A checkout as slurm.sh wants it, with this Python, and a scontrol that keeps its words."""
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"PATH={os.path.dirname(sys.executable)}:{tmp_path}:$PATH\n")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n')
    scontrol.chmod(0o755)
    (tmp_path / "iql.py").symlink_to(os.path.join(ROOT, "iql.py"))
    return dict(SLURM_SUBMIT_DIR=str(tmp_path), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1")


@pytest.mark.slow
def test_slurms_job_resumes_after_it_was_stopped(tmp_path, write_sweep, slurm):
    """The job as SLURM runs it: with SIGTERM before its time is up, then once more."""
    path = write_sweep(seed=0, num_updates=40_000, log_every=1000, eval_every=20_000)
    with Server() as server, open(tmp_path / "output.txt", "ab") as output:
        environment = {**agent_environment(server, tmp_path), **slurm}
        script = os.path.join(FOLDER, "slurm.sh")
        command = ["bash", script, start_sweep(environment, path)]
        options = dict(env=environment, stdout=output, stderr=output)
        job = subprocess.Popen(command, **options)
        wait_for_rows(tmp_path, job)
        job.send_signal(signal.SIGTERM)
        job.wait(120)
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 7_1\n"
        (run,) = server.runs.values()
        assert run["state"] == "preempting"
        assert run["exit"] != 0
        assert 0 < len(run["history"]) < 40
        assert subprocess.run(command, timeout=300, **options).returncode == 0
        assert list(server.runs) == ["sweep0-run0"]
        steps = [row["_step"] for row in server.history("sweep0-run0")]
        assert steps == [*range(1000, 41_000, 1000)]
        assert run["exit"] == 0
    text = (tmp_path / "output.txt").read_text()
    assert "resuming from update" in text
    assert "W&B: off" not in text


@pytest.mark.parametrize(
    "task, name",
    [
        (dict(SLURM_JOB_ID="8", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1"), "7_1"),
        (dict(SLURM_JOB_ID="8"), "8"),
    ],
    ids=["array", "one job"],
)
def test_slurm_queues_its_own_job_again(tmp_path, slurm, monkeypatch, task, name):
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={tmp_path}:$PATH\n")
    agent = tmp_path / "wandb"
    agent.write_text("#!/bin/sh\necho started\nexec sleep 60\n")
    agent.chmod(0o755)
    for key in slurm:
        monkeypatch.delenv(key, raising=False)
    job = subprocess.Popen(
        ["bash", os.path.join(FOLDER, "slurm.sh"), "team/project/id"],
        env={**os.environ, "SLURM_SUBMIT_DIR": str(tmp_path), **task},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout.readline() == "started\n"
    job.send_signal(signal.SIGTERM)
    job.wait(30)
    job.stdout.close()
    assert (tmp_path / "scontrol.txt").read_text() == f"requeue {name}\n"


@pytest.mark.parametrize("flags", [["--together"], ["--together", "64", "--seed", "0"]])
def test_slurms_tasks_take_the_groups_of_files(tmp_path, slurm, flags):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PWD $@"\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={tmp_path}:$PATH\n")
    words = ["sweeps/a.yaml", "sweeps/b.yaml", *flags]
    command = ["bash", os.path.join(FOLDER, "slurm.sh"), *words]
    environment = {**os.environ, **slurm}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert run.stdout == f"{tmp_path} -m tools.sweep {' '.join(words)}\n"
    assert run.returncode == 0


def test_slurm_says_that_it_needs_the_sweeps_name():
    command = ["bash", os.path.join(FOLDER, "slurm.sh")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert run.returncode != 0
    assert "1: name the sweep: sbatch --array" in run.stderr


def test_slurm_takes_the_jobs_options():
    with open(os.path.join(FOLDER, "slurm.sh")) as file:
        lines = file.read().splitlines()
    first_command = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in lines
    assert max(options) < first_command
