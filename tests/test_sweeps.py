"""The sweeps are the paper's experiments, and run: by W&B's agent, on this machine, and on a cluster."""

import csv
import glob
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import sweeps
import yaml
from conftest import BUNDLED, ROOT, random_columns
from wandb_server import Server

import iql
import rebrac
import runs
import sweep

FILES = sorted(os.path.relpath(path, ROOT) for path in glob.glob(os.path.join(ROOT, "sweeps", "*", "*", "*.yaml")))
STUDIES = ["sweeps/rebrac/study.yaml", "sweeps/iql/study.yaml"]
SCRIPTS = {"rebrac.py": rebrac, "iql.py": iql}
ALL = {"DO", "L2", "L1", "EN", "LN", "FN", "GN", "BN", "SN", "InN", "BCN", "GrN"}
SEEDS, TEN = set(range(5)), set(range(10))
NOISE, DECAY = {0.003, 0.01, 0.03, 0.1, 0.3}, {1e-5, 1e-4, 1e-3, 1e-2, 1e-1}
GRIDS = {  # the paper's, and what else an experiment is
    "baseline": dict(validation_frac={0.05}, seed=SEEDS),
    "dropout": dict(actor_dropout={0.1, 0.2, 0.3, 0.5, 0.75, 0.9}, validation_frac={0.05}, seed=SEEDS),
    "weight_decay": dict(actor_wd=DECAY, actor_l1_ratio={0.0, 0.5, 1.0}, validation_frac={0.05}, seed=SEEDS),
    "normalisation": dict(regularisers={"LN", "FN", "GN", "BN", "SN"}, validation_frac={0.05}, seed=SEEDS),
    "input_noise": dict(actor_input_noise=NOISE, validation_frac={0.05}, seed=SEEDS),
    "objective_noise": dict(actor_bc_noise=NOISE, validation_frac={0.05}, seed=SEEDS),
    "gradient_noise": dict(actor_grad_noise=NOISE, validation_frac={0.05}, seed=SEEDS),
    "robustness": dict(regularisers=ALL | {"none"}, seed=SEEDS),
    "critic": dict(
        critic_ln={False, True}, critic_dropout={0, 0.1}, critic_wd={0, 0.001}, validation_frac={0.05}, seed=SEEDS
    ),
}
GRIDS_OF = {
    "rebrac": {
        "tuning": dict(
            actor_ln={False, True}, actor_dropout={0, 0.1, 0.2}, actor_grad_noise={0, 0.003, 0.01},
            validation_frac={0.05}, seed=SEEDS,
        ),
        "final": dict(regularisers={"none", "best-L2", "best"}, seed=TEN),
        "data_scaling": dict(
            regularisers={"none", "best-L2", "best"}, validation_frac={0.1, 0.25, 0.5, 0.75, 0.9}, seed=SEEDS
        ),
    },
    "iql": {
        "tuning": dict(
            actor_ln={False, True}, actor_dropout={0, 0.1, 0.2}, actor_wd={0, 0.001, 0.01}, actor_l1_ratio={0.5},
            validation_frac={0.05}, seed=SEEDS,
        ),
        "final": dict(regularisers={"none", "best-L1", "best"}, seed=TEN),
        "data_scaling": dict(
            regularisers={"none", "best-L1", "best"}, validation_frac={0.1, 0.25, 0.5, 0.75, 0.9}, seed=SEEDS
        ),
    },
}  # fmt: skip
DOMAINS = {
    "gym": [name for name in rebrac.TUNED if name.split("-")[0] in ("halfcheetah", "hopper", "walker2d")],
    "antmaze": [name for name in rebrac.TUNED if name.startswith("antmaze")],
    "adroit": [name for name in rebrac.TUNED if name.endswith("v1")],
}


def load(path):
    with open(os.path.join(ROOT, path)) as file:
        return yaml.safe_load(file)


def stated(path):
    """The number of runs that a file's first line says."""
    with open(os.path.join(ROOT, path)) as file:
        return int(re.search(r"([\d,]+) runs of [\d,]+ updates", file.readline())[1].replace(",", ""))


# --- The files ---


def test_the_files_are_what_the_generator_writes(tmp_path):
    command = [sys.executable, "sweeps/generate.py", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    written = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.yaml")}
    files = [*FILES, *STUDIES]
    assert written == {os.path.relpath(path, "sweeps"): open(os.path.join(ROOT, path)).read() for path in files}
    assert len(FILES) == 2 * 3 * 14


@pytest.mark.parametrize("path", FILES + STUDIES)
def test_each_file_is_valid_and_each_of_its_runs_is_accepted(path):
    config = load(path)
    assert sweeps.schema_violations_from_proposed_config(config) == []
    expanded = [run for run in sweeps.next_runs(config, [], validate=True, n=10**6) if run]
    assert len(expanded) == stated(path)
    commands = list(sweep.expand(os.path.join(ROOT, path)))
    words = lambda run: {f"--{key}={value['value']}" for key, value in run.config.items()}
    assert [set(command[2:]) for command in commands] == [words(run) for run in expanded]
    script, tuned = SCRIPTS[config["program"]], {}
    for command in commands:  # runs that differ in the seed alone are parsed once
        plain = tuple(word for word in command if not re.fullmatch(r"--seed=\d", word))
        assert len(plain) == len(command) - 1 and command[:2] == [sys.executable, config["program"]]
        if plain not in tuned:
            tuned[plain] = script.tuned(runs.parse(script.Config, command[2:]))
            runs.check(tuned[plain], script.rules(tuned[plain]))
            assert tuned[plain].num_updates == (20_000 if path in STUDIES else 1_000_000)
    for key, values in config["parameters"].items():  # each value reaches its field
        given = values.get("values", [values.get("value")])
        if key not in ("seed", "regularisers", "eval_noise"):
            assert {getattr(one, key) for one in tuned.values()} == set(given), key


@pytest.mark.parametrize("path", FILES)
def test_each_grid_is_the_papers(path):
    _, algorithm, domain, experiment = path.removesuffix(".yaml").split("/")
    grid = {key: set(values["values"]) if "values" in values else values["value"]
            for key, values in load(path)["parameters"].items()}  # fmt: skip
    assert grid.pop("dataset_name") == set(DOMAINS[domain])
    expected = {**GRIDS, **GRIDS_OF[algorithm]}.get(experiment)
    if experiment in ("pairs", "triples"):
        words = [name.split("+") for name in grid["regularisers"]]
        size = 2 if experiment == "pairs" else 3
        assert all(len(set(word)) == size and set(word) <= ALL for word in words)
        assert len({frozenset(word) for word in words}) == len(words) == {2: 12 * 11 // 2 - 3, 3: 5 * 6}[size]
        assert grid["seed"] == SEEDS and grid["validation_frac"] == 0.05
        return
    grid |= {key: {value} for key, value in grid.items() if isinstance(value, float)}
    if "eval_noise" in grid:
        assert grid.pop("eval_noise") == [[0.2, 0], [0, 0.05]]
    assert grid == expected


def test_the_papers_combinations_are_among_the_pairs_and_triples():
    for algorithm in ("rebrac", "iql"):
        values = {
            name: load(f"sweeps/{algorithm}/gym/{name}.yaml")["parameters"]["regularisers"]["values"]
            for name in ("pairs", "triples")
        }
        assert {"DO+LN", "DO+L2", "LN+L2"} <= set(values["pairs"])
        assert {"DO+LN+GrN", "DO+LN+EN"} <= set(values["triples"])


def test_seeds_in_one_run_are_the_same_seeds(tmp_path):
    command = [sys.executable, "sweeps/generate.py", "--directory", str(tmp_path), "--num_seeds", "5"]
    subprocess.run(command, cwd=ROOT, check=True)
    for path in ("rebrac/gym/final.yaml", "iql/antmaze/dropout.yaml"):
        script = SCRIPTS[load(f"sweeps/{path}")["program"]]
        seeds = {}
        for name, file in (("apart", os.path.join(ROOT, "sweeps", path)), ("together", str(tmp_path / path))):
            configs = [script.tuned(runs.parse(script.Config, command[2:])) for command in sweep.expand(file)]
            seeds[name] = {
                (runs.run_directory("a", script.replace(config, seed=0, num_seeds=1), script.tuned), config.seed + i)
                for config in configs
                for i in range(config.num_seeds)
            }
            assert len(configs) == stated(file) and len(seeds[name]) == stated(f"sweeps/{path}")
        assert seeds["apart"] == seeds["together"]


def test_the_readmes_table_counts_the_runs():
    with open(os.path.join(ROOT, "README.md")) as file:
        rows = re.findall(r"^\| `(\w+)\.yaml` \|(.*)\|$", file.read().split("\n## Sweeps\n")[1], re.MULTILINE)
    assert {name for name, _ in rows} == {os.path.basename(f)[:-5] for f in FILES}
    for name, cells in rows:
        numbers = [int(cell.replace(",", "")) for cell in cells.split("|")[:3]]
        for algorithm in ("rebrac", "iql"):
            assert numbers == [stated(f"sweeps/{algorithm}/{domain}/{name}.yaml") for domain in DOMAINS]
        assert cells.split("|")[3].strip() == f"{sum(numbers) / 1000:.2f}"  # 10^9 updates


SHAPES = {"halfcheetah": (17, 6), "hopper": (11, 3), "walker2d": (17, 6), "antmaze": (29, 8)}
SHAPES |= {"pen": (45, 24), "door": (39, 28), "hammer": (46, 26), "relocate": (39, 30)}
SMALL = "--num_updates=4 --log_every=2 --eval_every=4 --eval_episodes=1 --hidden_dim=64 --batch_size=8 --n_classes=11"


@pytest.mark.parametrize("path", [FILES[i] for i in range(7, len(FILES), 14)])
def test_a_sampled_run_trains(path, tmp_path, monkeypatch, write_dataset):
    commands = list(sweep.expand(os.path.join(ROOT, path)))
    command = commands[FILES.index(path) * 7919 % len(commands)]
    config = load(path)
    script = SCRIPTS[config["program"]]
    name = next(word for word in command if word.startswith("--dataset_name=")).split("=")[1]
    states, actions = SHAPES[name.split("-")[0]]
    file = write_dataset(**random_columns(0, size=400, states=states, actions=actions))
    flags = [flag for flag in SMALL.split() if flag.split("=")[0][2:] in script.Config.__dataclass_fields__]
    flags += ["--eval_noise=[]", f"--dataset_path={file}", f"--results={tmp_path}"]
    monkeypatch.setattr(sys, "argv", [*command[1:], *flags])
    script.main()
    (directory,) = glob.glob(str(tmp_path / script.__name__ / name / "*"))
    about = json.load(open(os.path.join(directory, "finished.json")))
    assert about["updates"] == 4


# --- W&B's sweep and agent ---

TINY = dict(
    dataset_path=BUNDLED, hidden_dim=16, batch_size=8, num_updates=20, log_every=10, eval_every=10, eval_episodes=1,
    eval_noise=[], analysis=False,
)  # fmt: skip


@pytest.fixture
def write_sweep(tmp_path):
    """Writes a small sweep of IQL, whose results go to tmp_path/results; returns its path."""

    def write(name="small.yaml", program="iql.py", **values):
        parameters = {key: dict(value=value) for key, value in TINY.items()} | values
        parameters["results"] = dict(value=str(tmp_path / "results"))
        config = load(FILES[0]) | dict(name="small", program=program, parameters=parameters)
        (tmp_path / name).write_text(yaml.safe_dump(config))
        return str(tmp_path / name)

    return write


def tables(tmp_path):
    """The rows of each run's train.csv, by its seed and whether its actor has LayerNorm."""
    found = {}
    for path in glob.glob(str(tmp_path / "results" / "iql" / "*" / "*" / "train.csv")):
        with open(path) as file:
            rows = list(csv.DictReader(file))
        found[int(rows[0]["seed"]), "actor_ln=true" in path] = rows
    return found


def environment(server, tmp_path):
    """Of a program that W&B's server on this machine has an account for, and whose python is this one."""
    scripts = os.path.dirname(sys.executable)
    return {
        **os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "HOME": str(tmp_path), "WANDB_DIR": str(tmp_path),
        "WANDB_BASE_URL": server.url, "WANDB_API_KEY": 40 * "k", "WANDB_AGENT_REPORT_INTERVAL": "1",
    }  # fmt: skip


def start_sweep(server, tmp_path, path):
    """Starts a sweep by W&B's command; returns its name."""
    command = [sys.executable, "-m", "wandb", "sweep", path]
    made = subprocess.run(command, cwd=ROOT, env=environment(server, tmp_path), capture_output=True, text=True)
    return re.search(r"wandb agent (\S+)", made.stderr)[1]


def test_wandbs_sweep_and_agent_run_a_sweep_to_its_end(tmp_path, write_sweep):
    path = write_sweep(regularisers=dict(values=["none", "LN"]), seed=dict(value=0))
    with Server() as server:
        name = start_sweep(server, tmp_path, path)
        assert name == "team/regularised-actors/sweep0"
        command = [sys.executable, "-m", "wandb", "agent", name]
        agent = subprocess.run(command, cwd=ROOT, env=environment(server, tmp_path), capture_output=True, text=True)
        assert agent.returncode == 0, agent.stderr
        assert len(server.runs) == 2 and all(run["exit"] == 0 for run in server.runs.values())
        local = tables(tmp_path)
        assert len(local) == 2
        for run, about in server.runs.items():
            config = {key: value["value"] for key, value in about["config"].items() if key != "_wandb"}
            assert config["actor_ln"] == (config["regularisers"] == "LN") and config["algorithm"] == "iql"
            rows, history = local[config["seed"], config["actor_ln"]], server.history(run)
            assert [row["_step"] for row in history] == [10, 20]
            for row, sent in zip(rows, history):
                assert sent["actor_loss"] == pytest.approx(float(row["actor_loss"])) and "score" in sent


def test_slurms_job_goes_on_after_it_was_stopped(tmp_path, write_sweep):
    """The job's script as SLURM runs it: in the checkout, with SIGTERM before its time is up, then once more."""
    lengths = dict(num_updates=40_000, log_every=1000, eval_every=20_000)
    path = write_sweep(seed=dict(value=0), **{key: dict(value=value) for key, value in lengths.items()})
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={os.path.dirname(sys.executable)}:{tmp_path}:$PATH\n")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n')
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "iql.py").symlink_to(os.path.join(ROOT, "iql.py"))
    table = os.path.join(str(tmp_path / "results"), "iql", "*", "*", "train.csv")
    with Server() as server:
        command = ["bash", os.path.join(ROOT, "sweeps", "slurm.sh"), start_sweep(server, tmp_path, path)]
        env = environment(server, tmp_path) | dict(
            SLURM_SUBMIT_DIR=str(tmp_path), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1"
        )
        with open(tmp_path / "output.txt", "ab") as output:
            job = subprocess.Popen(command, env=env, stdout=output, stderr=output)
            while job.poll() is None and not any(os.path.getsize(found) for found in glob.glob(table)):
                time.sleep(0.2)
            job.send_signal(signal.SIGTERM)
            job.wait(120)
            assert (tmp_path / "scontrol.txt").read_text() == "requeue 7_1\n"
            (run,) = server.runs.values()
            assert run["state"] == "preempting" and run["exit"] != 0
            before = len(run["history"])
            assert 0 < before < 40
            assert subprocess.run(command, env=env, stdout=output, stderr=output, timeout=300).returncode == 0
        assert list(server.runs) == ["sweep0-run0"]
        assert [json.loads(row)["_step"] for row in run["history"]] == [*range(1000, 41_000, 1000)]
        assert run["exit"] == 0
    text = (tmp_path / "output.txt").read_text()
    assert "going on from update" in text and "W&B: off" not in text


def test_slurm_takes_the_jobs_options():
    with open(os.path.join(ROOT, "sweeps", "slurm.sh")) as file:
        lines = file.read().splitlines()
    options = [line for line in lines if line.startswith("#SBATCH")]
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert "#SBATCH --requeue" in options and all(lines.index(line) < first for line in options)


# --- This machine ---


def local(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "sweep.py"), *arguments], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_a_sweep_runs_here_is_stopped_goes_on_and_says_what_failed(tmp_path, write_sweep):
    path = write_sweep(
        num_updates=dict(value=20_000),
        log_every=dict(value=1000),
        eval_every=dict(value=1000),
        dataset_path=dict(values=[BUNDLED, str(tmp_path / "missing.hdf5")]),
        seed=dict(values=[0, 1]),
    )
    process = local(path, "--processes", "2")
    table = str(tmp_path / "results" / "*" / "*" / "*" / "train.csv")
    while process.poll() is None and not any(os.path.getsize(found) for found in glob.glob(table)):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and output.startswith("4 runs, of which 0 are finished\n")
    assert output.endswith("stopped; the same command goes on\n")
    assert not glob.glob(str(tmp_path / "results" / "*" / "*" / "*" / "finished.json"))

    process = local(path, "--processes", "2")
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "2 done, " in output and "error: there is no file" in output and "final score" in output
    failed = [line for line in output.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2 and all("missing.hdf5" in line for line in failed)
    assert errors.splitlines()[-1].startswith("error: 2 runs failed; output.txt in their directories says why")
    texts = [open(file).read() for file in glob.glob(str(tmp_path / "results" / "*" / "*" / "*" / "output.txt"))]
    assert len(texts) == 4 and any("going on from update" in text for text in texts)

    output, _ = local(path).communicate(timeout=600)
    assert output.startswith("4 runs, of which 2 are finished\n") and "0 done, 2 failed, 0 to go" in output


def test_two_at_once_share_a_sweep(tmp_path, write_sweep):
    path = write_sweep(seed=dict(values=[0, 1, 2]))
    processes = [local(path), local(path)]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len(glob.glob(str(tmp_path / "results" / "*" / "*" / "*" / "finished.json"))) == 3
    assert any("another process is training: " in output for output in outputs)


def test_flags_go_to_every_run_and_equal_runs_are_one(write_sweep, monkeypatch, capsys):
    path = write_sweep(actor_ln=dict(values=[False, True]), regularisers=dict(values=["none", "LN"]))
    monkeypatch.setattr(sys, "argv", ["sweep.py", path, "--num_updates", "30"])
    monkeypatch.setattr(sweep.Job, "is_busy", lambda self: True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    sweep.main()
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "2 runs, of which 0 are finished"
    assert len(others) == 2 and all("num_updates=30" in line for line in others)


def test_processes_share_the_cores_and_take_the_gpus_in_turn(write_sweep, monkeypatch):
    started, cores = [], os.sched_getaffinity(0)
    popen = lambda command, env, **_: started.append((env, os.sched_getaffinity(0)))
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    job = sweep.Job(next(sweep.expand(write_sweep(seed=dict(values=[0])))))
    for slot in range(3):
        job.start(slot, 3)
    assert [env["CUDA_VISIBLE_DEVICES"] for env, _ in started] == ["3", "5", "3"]
    assert set.union(*(share for _, share in started)) == cores == os.sched_getaffinity(0)
    assert max(len(share) for _, share in started) - min(len(share) for _, share in started) <= 1
    job.start(0, 1)
    assert started[-1][1] == cores


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "No such file"),
        ("a: [", "while parsing"),
        ("just words", "Sweep config must be parsable"),
        ("method: grid\nprogram: iql.py\nparameters: {seed: {valus: [1]}}", "{'valus': [1]} is not valid"),
        ("method: grid\nprogram: iql.py\nparameters: {}", "{} should be non-empty"),
        ("method: random\nprogram: iql.py\nparameters: {seed: {values: [1]}}", "its method is random"),
        ("method: grid\nparameters: {seed: {values: [1]}}", "its program, None, is no script"),
        ("method: grid\nprogram: a/iql.py\nparameters: {seed: {values: [1]}}", "its program, a/iql.py, is no script"),
        ("method: grid\nprogram: iql.py\ncommand: [a]\nparameters: {seed: {values: [1]}}", "command has no ${program}"),
    ],
)
def test_what_is_no_sweep_gets_one_clear_line(tmp_path, text, message):
    path = str(tmp_path / "a.yaml")
    if text is not None:
        (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit) as error:
        list(sweep.expand(path))
    assert str(error.value).startswith(f"error: {path} is not a sweep: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sweep_without_a_command_has_wandbs(tmp_path):
    (tmp_path / "a.yaml").write_text("method: grid\nprogram: iql.py\nparameters: {seed: {values: [1]}}")
    assert list(sweep.expand(str(tmp_path / "a.yaml"))) == [[sys.executable, "iql.py", "--seed=1"]]


def test_a_flag_that_no_run_takes_is_an_error_before_any_run(tmp_path, write_sweep):
    for flags, message in ((["--actor_wd", "-1"], "error: actor_wd must be 0 or more"), (["--x", "1"], "--x")):
        process = local(write_sweep(seed=dict(values=[0])), *flags)
        output, errors = process.communicate(timeout=120)
        assert process.returncode and message in errors.splitlines()[-1] and not (tmp_path / "results").exists()
