"""README.md's numbers are those of the files in the repository, and its commands run."""

import csv
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, random_columns

import iql
import rebrac
from harness.datasets import episode_returns, normalized_score, read_dataset
from harness.directory import load_config, run_directory
from harness.environments import make_env
from tools import report

SCRIPTS = {"rebrac": rebrac, "iql": iql}


def readme():
    with open(os.path.join(ROOT, "README.md")) as file:
        return file.read()


def section(start, end):
    """Return the README's text between two strings, on one line."""
    return " ".join(readme().split(start)[1].split(end)[0].split())


def rows_of(text):
    """Return the cells of a Markdown text's table rows, without headers."""
    rows = []
    for line in re.findall(r"^\| .*", text, re.MULTILINE):
        rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return rows


def last_score(directory):
    with open(os.path.join(directory, "evaluations.csv"), newline="") as file:
        return float(list(csv.DictReader(file))[-1]["score"])


def own_config(directory, results):
    """Return the config of a run in the repository, after a look at the run's name."""
    algorithm = directory.split(os.sep)[-3]
    script = SCRIPTS[algorithm]
    config = replace(load_config(script.Config, directory), results=results)
    assert run_directory(algorithm, config, script.tuned) == os.path.relpath(directory, ROOT)
    return config


# --- Its numbers ---


def test_the_scores_of_the_demo_are_those_of_its_runs():
    directories = glob.glob(os.path.join(ROOT, "data", "runs", "rebrac", "*", "*"))
    assert len(directories) == 6
    found = np.zeros((2, 3))  # ReBRAC and behaviour cloning, by seed
    for directory in directories:
        config = own_config(directory, "data/runs")
        assert (config.num_updates, config.batch_size) == (15_000, 256)
        assert (config.critic_loss, config.eval_episodes) == ("mse", 10)
        assert config.validation_frac == 0
        found[int(config.actor_q_coef == 0), config.seed] = last_score(directory)
    told = rows_of(readme().split("### The demo")[1].split("### The study")[0])
    for scores, row in zip(found, told[-2:], strict=True):
        assert row[1:] == [f"{score:.1f}" for score in [*scores, np.mean(scores)]]


def test_the_bundled_datasets_are_as_described():
    pattern = r"^\| (\S+-v\d) \| .*? \| ([\d,.]+) \| ([\d,.]+) \| ([\d.]+) \| ([\d.]+) \|$"
    rows = re.findall(pattern, readme(), re.MULTILINE)
    assert len(rows) == len(glob.glob(os.path.join(ROOT, "data", "*.hdf5"))) == 3
    for name, *told in rows:
        env = make_env(name)
        file = os.path.basename(env.unwrapped.dataset_url)
        raw = read_dataset(os.path.join(ROOT, "data", file), env)
        ends = np.flatnonzero(raw["terminals"] | raw["timeouts"]) + 1
        episodes = np.split(raw["rewards"], ends[:-1])
        scores = [100 * env.get_normalized_score(rewards.sum()) for rewards in episodes]
        found = [f"{len(ends):,}", f"{ends[-1]:,}", f"{np.mean(scores):.1f}", f"{max(scores):.1f}"]
        assert told == found, name
        ours = normalized_score(name, episode_returns(raw))
        np.testing.assert_allclose(ours, scores, rtol=1e-4)


def test_the_scores_of_the_trials_are_those_of_their_runs():
    directories = glob.glob(os.path.join(ROOT, "data", "trials", "*", "*", "*"))
    pattern = "seed=0,actor_bc_coef=0.1,validation*"
    directories += glob.glob(os.path.join(ROOT, "data", "study", "rebrac", "*", pattern))
    assert len(directories) == 8 + 3
    found = [["", "", ""] for _ in range(4)]
    for directory in directories:
        config = load_config(rebrac.Config, directory)
        row = {0.4: 2, 0.1: 3}.get(config.actor_bc_coef, 1)
        if config.critic_loss == "hl_gauss":
            row = 0
        column = ["halfcheetah", "hopper", "pen"].index(config.dataset_name.split("-")[0])
        found[row][column] = f"{last_score(directory):.1f}"
    table = readme().split("| mean of the dataset's")[1].split("\n\n")[0]
    assert [row[1:] for row in rows_of(table)] == found


def tables(text):
    """Return the cells of Markdown's tables, {title: {(row, column): cell}}."""
    found = {}
    pattern = r"^(?:### |\*\*)(.+?)(?:\*\*)?\n\n((?:\|.*\n)+)"
    for title, body in re.findall(pattern, text, re.MULTILINE):
        header, _, *rows = [
            [cell.strip(" *") for cell in line.strip("|").split("|")] for line in body.splitlines()
        ]
        cells = {}
        for name, *values in rows:
            name = re.sub(r" \(\d seeds\)$", "", name)
            cells |= {(name, key): value for key, value in zip(header[1:], values)}
        found[title] = cells
    return found


STUDY = {  # of README's tables of the study the columns, by the report's tables and their columns
    "scores": {
        "score": (": inside the actor", "score"),
        "against none": (": aggregates", "mean against none"),
        "P(better)": (": aggregates", "P(better than none)"),
        "HalfCheetah": (", Gym-MuJoCo: differences", "halfcheetah-medium-replay-v2"),
        "Hopper": (", Gym-MuJoCo: differences", "hopper-medium-v2"),
        "Pen": (", Adroit: differences", "pen-expert-v1"),
    },
    "inside the actor": {
        "dead neurons": (": inside the actor", "dead neurons (share, training data)"),
        "PCA rank": (": inside the actor", "PCA rank (training data)"),
        "gap": (": inside the actor", "gap of the action error"),
        "action noise": (": inside the actor", "action noise=0.2"),
        "state noise": (": inside the actor", "state noise=0.05"),
    },
}


def studys_table(title, found):
    """Return the cells that README's table `title` must have, from the tables of the report."""
    algorithm, kind = title.split(": ")
    aggregates = [
        name for name in found if name.startswith(algorithm) and name.endswith(": aggregates")
    ]
    whole = aggregates[-1]  # of all domains
    cells = {}
    for row in dict.fromkeys(row for row, _ in found[whole]):
        for column, (table, reports_column) in STUDY[kind].items():
            table = whole if table == ": aggregates" else algorithm + table
            if table in found:
                cells[row, column] = found[table][row, reports_column]
    return cells


@pytest.mark.slow
def test_the_studys_tables_are_those_of_its_report(tmp_path, monkeypatch):
    study = readme().split("### The study")[1].split("\n## ")[0]
    pattern = r"^python -m tools\.report --results '\[(.*)\]' --output data/study$"
    (results,) = re.findall(pattern, study, re.MULTILINE)
    monkeypatch.chdir(ROOT)
    report.main(report.Config(results=results.split(", "), output=str(tmp_path)))
    text = (tmp_path / "tables.md").read_text()
    folder = os.path.join("data", "study")
    with open(os.path.join(folder, "tables.md")) as file:
        assert file.read() == text
    names = re.findall(r"!\[.*?\]\((.*?)\)", text)
    figures = {os.path.join(folder, name) for name in names}
    assert figures == set(glob.glob(os.path.join(folder, "*.png")))
    for path in re.findall(r"!\[.*?\]\((.*?)\)", readme()):
        assert path in figures
    found = tables(text)
    told = tables(study)
    assert list(told) == [
        f"{algorithm}: {kind}" for kind in STUDY for algorithm in ("ReBRAC", "IQL")
    ]
    assert told == {title: studys_table(title, found) for title in told}


def test_the_studys_runs_have_the_names_of_their_configs():
    done = glob.glob(os.path.join(ROOT, "data", "study", "*", "*", "*", "finished.json"))
    assert len(done) == 415
    for path in done:
        config = own_config(os.path.dirname(path), "data/study")
        assert (config.num_updates, config.batch_size) == (20_000, 256)
        assert config.eval_episodes == 100


FIGURES = [  # of README's table of speed, by the rows of the benchmark's output
    "1,000,000 transitions", "2,000,000 transitions",
    "rebrac, empty cache", "rebrac, full cache", "iql, empty cache", "iql, full cache",
    "rebrac, 1,000,000 transitions", "iql, 1,000,000 transitions",
    "ReBRAC (mse), batch 1024: 3.43 GFLOP", "ReBRAC (mse), batch 256: 0.86 GFLOP",
    "ReBRAC (hl_gauss), batch 1024: 4.49 GFLOP", "ReBRAC (hl_gauss), batch 256: 1.12 GFLOP",
    "IQL, batch 256: 0.56 GFLOP", "rebrac, 8 seeds", "iql, 8 seeds",
    "halfcheetah-medium-v2", "antmaze-umaze-v2", "pen-human-v1",
]  # fmt: skip


def test_the_figures_of_speed_are_those_of_the_benchmark():
    with open(os.path.join(ROOT, "data", "benchmark.md")) as file:
        measured = [line.strip("| \n").split(" | ") for line in file if line.startswith("| ")]
    measured = {name: " ".join(cells) for name, *cells in measured}
    tables = readme().split("## Speed")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in re.findall(r"^\| .*", tables, re.MULTILINE)]
    figures = [cells for _, *cells in rows if re.fullmatch(r"[\d.]+( s| MB)?", cells[0])]
    assert len(figures) == len(FIGURES) + 2
    for name, cells in zip(FIGURES, figures):
        numbers = re.findall(r"\d+\.?\d*", re.sub(r"\) of.*", "", " ".join(cells)))
        assert len(numbers) in (3, 6)
        assert f" {' '.join(numbers)} " in f" {measured[name].replace(' to ', ' ')} ", name
    variants = next(row for row in rows if row[0] == "DO")
    for algorithm, cells in zip(("rebrac", "iql"), figures[len(FIGURES) :]):
        assert cells == [measured[f"{algorithm} {variant}"].split()[4] for variant in variants]


def test_the_cost_of_a_full_run_follows_from_the_benchmark():
    with open(os.path.join(ROOT, "data", "benchmark.md")) as file:
        text = file.read()
    pattern = r"^\| (.*), batch (\d+): ([\d.]+) GFLOP \| (\d+) "
    cost = {}  # seconds and floating-point operations of an update
    for name, size, work, rate in re.findall(pattern, text, re.MULTILINE):
        cost[name, int(size)] = np.array([1 / float(rate), float(work) * 1e9])
    five_seeds = 5 * 1_000_000
    large = cost["ReBRAC (hl_gauss)", 1024]
    small = cost["ReBRAC (hl_gauss)", 256]
    seconds, flops = five_seeds * (24 * large + 12 * small)
    iql_seconds, iql_flops = five_seeds * 36 * cost["IQL", 256]
    told = section("What it costs", "On this machine")
    for number in (
        f"{seconds / 86400:.0f} days",
        f"{iql_seconds / 86400:.0f} for IQL",
        f"{flops / 1e17:.1f}e17",
        f"{iql_flops / 1e17:.1f}e17",
        f"{flops / 2e12 / 86400:.1f} days",
        f"{iql_flops / 2e12 / 3600:.0f} hours",
    ):
        assert number in told


# --- Its commands: each is run, by a test or by CI ---


def commands():
    """Yield the lines of the README's shell blocks, without comments."""
    for block in re.findall(r"^```bash\n(.*?)^```", readme(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield " ".join(shlex.quote(word) for word in words)


ELSEWHERE = {  # beginnings of commands, and the files of the tests that run them
    "make test": None,  # CI
    "python -m tools.sweep ": "test_sweeps.py",
    "D4RL_DATASET_DIR=data python -m tools.sweep ": "test_sweeps.py",
    "wandb sweep ": "test_sweeps.py",
    "wandb agent ": "test_sweeps.py",
    "sbatch ": "test_sweeps.py",
    "python -m tools.report": "test_readme.py",
    "python -m tools.report --wandb ": "test_report.py",
    "python rebrac.py --evaluate ": "test_policies.py",
    "python -m tools.benchmark": "test_benchmark.py",
    ".venv/bin/python -m tools.collect ": "test_collect.py",
    "patch ": "test_forks.py",
    "python bc.py ": "test_forks.py",
    ".venv/bin/pip install ": None,  # a GPU's packages, and those of tools.collect
    "docker ": None,  # the README says what was tried
}
HERE = [line for line in commands() if not line.startswith(tuple(ELSEWHERE))]
SMALL = [
    *("--num_updates", "4", "--log_every", "2", "--eval_every", "2", "--eval_episodes", "1"),
    *("--hidden_dim", "32", "--batch_size", "8", "--analysis", "false"),
]


def test_the_commands_that_run_elsewhere_have_their_tests():
    for start, file in ELSEWHERE.items():
        assert any(command.startswith(start) for command in commands()), start
        assert file is None or os.path.exists(os.path.join(ROOT, "tests", file))


@pytest.fixture
def here(tmp_path, write_dataset):
    """A function that runs a command in a folder with the scripts and small datasets."""
    for name in ("rebrac.py", "iql.py", "data"):
        os.symlink(os.path.join(ROOT, name), tmp_path / name)
    write_dataset("hopper_medium-v2.hdf5", **random_columns(0, states=11, actions=3))
    write_dataset("pen-human-v1.hdf5", **random_columns(0, states=45, actions=24))
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "hopper.hdf5").symlink_to(tmp_path / "hopper_medium-v2.hdf5")
    folder = os.path.dirname(sys.executable)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    environment |= {"D4RL_DATASET_DIR": str(tmp_path), "EPISODE_STEPS": "20"}

    def run(*words):
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("command", dict.fromkeys(HERE))
def test_a_command_of_the_readme_runs(command, here):
    """As it stands, but for the size of the networks and the lengths of the runs."""
    words = shlex.split(command)
    if words[0] == "make":
        made = here("make", "-C", ROOT, "-n", *words[1:]).stdout.replace("\\\n", " ")
        (line,) = [line for line in made.splitlines() if "rebrac.py" in line]
        words = ["python", *shlex.split(line)[1:]]
    done = here(*words, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout


def plain_reports():
    pattern = r"python -m tools\.report((?! --wandb| --output).)*"
    return [line for line in commands() if re.fullmatch(pattern, line)]


@pytest.mark.slow
@pytest.mark.parametrize("command", plain_reports())
def test_a_report_of_the_readme_is_made(command, tmp_path):
    """As it stands, but of fewer runs."""
    study = os.path.join("data", "study", "iql", "hopper-medium-v2")
    shutil.copytree(os.path.join(ROOT, study), tmp_path / study)
    shutil.copytree(os.path.join(ROOT, "data", "runs"), tmp_path / "results")
    words = [sys.executable, *shlex.split(command)[1:], "--reps", "20"]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "6 finished seeds; left out: 0" in done.stdout
    assert "wrote report/index.html" in done.stdout


@pytest.mark.slow
def test_an_environment_of_ones_own_is_registered_as_the_readme_says(tmp_path, write_dataset):
    snippet = re.findall(r"```python\n(.*?)```", readme(), re.DOTALL)[1]
    shutil.copytree(os.path.join(ROOT, "harness"), tmp_path / "harness")
    path = tmp_path / "harness" / "environments.py"
    marker = "gym, d4rl = import_silently()\n"
    text = path.read_text()
    assert text.count(marker) == 1
    path.write_text(text.replace(marker, marker + snippet))
    file = write_dataset("mine.hdf5", **random_columns(0, states=11, actions=3))
    for script in ("rebrac.py", "iql.py"):
        shutil.copy(os.path.join(ROOT, script), tmp_path)
        command = [sys.executable, script, "--dataset_name", "mine-v2", "--dataset_path", file]
        done = subprocess.run([*command, *SMALL], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "over 1 episodes" in done.stdout


def test_the_snippet_that_loads_a_policy_names_what_there_is():
    snippet = re.search(r"```python\n(.*?)```", readme(), re.DOTALL)[1]
    with pytest.raises(ValueError, match="is not the config of a run"):
        exec(snippet, {})
