"""README.md's numbers are those of the files in the repository, its commands run, and its example of a fork works."""

import csv
import glob
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from conftest import ROOT, random_columns
from test_speed import epoch_for

import iql
import rebrac
import report
import runs
import tasks


def test_the_scores_of_the_demo_are_those_of_its_runs():
    rows = re.findall(r"^\| (?:ReBRAC \(mse\)|behaviour cloning).*", readme(), re.MULTILINE)[:2]
    found, files = [["", "", ""], ["", "", ""]], glob.glob(os.path.join(ROOT, "data", "runs", "rebrac", "*", "*"))
    for directory in files:
        config = replace(runs.load_config(rebrac.Config, directory), results="data/runs")
        assert runs.run_directory("rebrac", config, rebrac.tuned) == os.path.relpath(directory, ROOT)
        assert (config.num_updates, config.batch_size, config.critic_loss) == (15_000, 256, "mse")
        assert (config.validation_frac, config.eval_episodes) == (0, 10)
        with open(os.path.join(directory, "evaluations.csv"), newline="") as file:
            found[not config.actor_q_coef][config.seed] = float(list(csv.DictReader(file))[-1]["score"])
    assert len(files) == 6
    for scores, line in zip(found, rows):
        assert line.strip("| ").split(" | ")[1:] == [f"{score:.1f}" for score in [*scores, np.mean(scores)]]
    minutes = set()
    for path in glob.glob(os.path.join(ROOT, "data", "runs", "rebrac", "*", "seed=?,dataset_path=*,eval_every=*")):
        with open(os.path.join(path, "finished.json")) as file:
            minutes.add(round(json.load(file)["seconds"]["train"] / 60))
    assert minutes == {3} and "demo trains for about three minutes" in readme()


def test_the_bundled_datasets_are_as_described():
    rows = re.findall(
        r"^\| (\S+-v\d) \| .*? \| ([\d,.]+) \| ([\d,.]+) \| ([\d.]+) \| ([\d.]+) \|$", readme(), re.MULTILINE
    )
    assert len(rows) == len(glob.glob(os.path.join(ROOT, "data", "*.hdf5"))) == 3
    for name, *told in rows:
        env = tasks.make_env(name)
        raw = tasks.read_dataset(os.path.join(ROOT, "data", os.path.basename(env.unwrapped.dataset_url)), env)
        ends = np.flatnonzero(raw["terminals"] | raw["timeouts"]) + 1
        assert ends[-1] == len(raw["rewards"])
        scores = [100 * env.get_normalized_score(part.sum()) for part in np.split(raw["rewards"], ends[:-1])]
        found = [f"{len(ends):,}", f"{ends[-1]:,}", f"{np.mean(scores):.1f}", f"{max(scores):.1f}"]
        assert told == found, name


def test_the_scores_of_the_trials_are_those_of_their_runs():
    table = re.search(r"^\| mean of the dataset's.*?\n\n", readme(), re.DOTALL | re.MULTILINE)[0].splitlines()[1:]
    found, files = [["", "", ""] for _ in range(4)], glob.glob(os.path.join(ROOT, "data", "trials", "*", "*", "*"))
    files += glob.glob(os.path.join(ROOT, "data", "study", "rebrac", "*", "seed=0,actor_bc_coef=0.1,validation*"))
    for directory in files:
        config = runs.load_config(rebrac.Config, directory)
        with open(os.path.join(directory, "evaluations.csv"), newline="") as file:
            score = float(list(csv.DictReader(file))[-1]["score"])
        row = 0 if config.critic_loss == "hl_gauss" else {0.4: 2, 0.1: 3}.get(config.actor_bc_coef, 1)
        found[row][["halfcheetah", "hopper", "pen"].index(config.dataset_name.split("-")[0])] = f"{score:.1f}"
    assert len(files) == 8 + 3
    assert [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in table if line] == found


def tables(text):
    """The cells of Markdown's tables: a dictionary by row and column for each, under its title."""
    for title, body in re.findall(r"^(?:### |\*\*)(.+?)(?:\*\*)?\n\n((?:\|.*\n)+)", text, re.MULTILINE):
        header, _, *rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in body.splitlines()]
        names = [re.sub(r" \(\d seeds\)$", "", row[0]) for row in rows]
        yield title, {(n, key): cell for n, row in zip(names, rows) for key, cell in zip(header[1:], row[1:])}


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
    """README's table of the study, by its title, as the report's tables have it: cells by row and column."""
    algorithm, kind = title.split(": ")
    whole = [name for name in found if name.startswith(algorithm) and name.endswith("aggregates")][-1]
    names = dict.fromkeys(name for name, _ in found[whole])
    columns = {key: (whole if k == ": aggregates" else algorithm + k, c) for key, (k, c) in STUDY[kind].items()}
    columns = {key: (table, column) for key, (table, column) in columns.items() if table in found}
    return {(name, key): found[table][name, column] for name in names for key, (table, column) in columns.items()}


def test_the_studys_report_is_that_of_its_runs_and_readmes_tables_are_that_reports(tmp_path, monkeypatch):
    study, folder = readme().split("### The study")[1].split("\n## ")[0], os.path.join("data", "study")
    (results,) = re.findall(r"^python report\.py --results '\[(.*)\]' --output data/study$", study, re.MULTILINE)
    monkeypatch.chdir(ROOT)
    report.main(report.Config(results=results.split(", "), output=str(tmp_path)))
    text = (tmp_path / "tables.md").read_text()
    with open(os.path.join(folder, "tables.md")) as file:
        assert file.read() == text
    figures = {os.path.join(folder, name) for name in re.findall(r"!\[.*?\]\((.*?)\)", text)}
    assert figures == set(glob.glob(os.path.join(folder, "*.png")))
    for path in re.findall(r"!\[.*?\]\((.*?)\)", readme()):
        assert path in figures
    found, told = dict(tables(text)), dict(tables(study))
    assert list(told) == [f"{algorithm}: {kind}" for kind in STUDY for algorithm in ("ReBRAC", "IQL")]
    assert told == {title: studys_table(title, found) for title in told}
    differences = re.findall(r"(\**)[+-][\d.]+ \([+-][\d.]+ – [+-][\d.]+\)", study)
    assert f"Of the {len(differences)} differences {differences.count('**')} " in " ".join(study.split())


def test_the_studys_runs_are_those_of_the_readme():
    done, seconds = glob.glob(os.path.join(ROOT, "data", "study", "*", "*", "*", "finished.json")), 0.0
    assert len(done) == 415 and "the 420 commands are 415 runs" in " ".join(readme().split())
    for path in done:
        directory = os.path.dirname(path)
        script = {"rebrac": rebrac, "iql": iql}[directory.split(os.sep)[-3]]
        config = replace(runs.load_config(script.Config, directory), results="data/study")
        assert runs.run_directory(script.__name__, config, script.tuned) == os.path.relpath(directory, ROOT)
        assert (config.num_updates, config.batch_size, config.eval_episodes) == (20_000, 256, 100)
        with open(path) as file:
            seconds += sum(json.load(file)["seconds"].values())
    assert f"The runs' times add up to {seconds / 3600:.0f} hours" in " ".join(readme().split())


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
        found = re.findall(r"^\| (.*), batch (\d+): ([\d.]+) GFLOP \| (\d+) ", file.read(), re.MULTILINE)
    cost = {(name, int(size)): np.array([1 / float(rate), float(work) * 1e9]) for name, size, work, rate in found}
    adroit = len([name for name in rebrac.TUNED if name.endswith("-v1")])
    large = {name: rebrac.tuned(rebrac.Config(dataset_name=name)).batch_size == 1024 for name in rebrac.TUNED}
    assert sum(large.values()) == 36 - adroit == 24
    seconds, flops = 5e6 * (24 * cost["ReBRAC (hl_gauss)", 1024] + adroit * cost["ReBRAC (hl_gauss)", 256])
    of_iql, iqls = 5e6 * 36 * cost["IQL", 256]
    text = " ".join(readme().split())
    assert f"{seconds / 86400:.0f} days of these two cores for ReBRAC" in text
    assert f"and {of_iql / 86400:.0f} for IQL" in text
    assert f"{flops / 1e17:.1f}e17 and {iqls / 1e17:.1f}e17 floating-point operations" in text
    assert f": {flops / 2e12 / 86400:.1f} days and {iqls / 2e12 / 3600:.0f} hours of a GPU, if it makes 2e12 a" in text
    rows = re.findall(r"^\| `\w+\.yaml` \|.*\| ([\d.]+) \|", readme(), re.MULTILINE)
    updates = sum(map(float, rows))
    assert f"are {updates:.1f} x 10⁹ updates for each algorithm, {updates / 0.18:.0f} times as much" in text


def test_an_environment_of_ones_own_is_registered_as_the_readme_says(tmp_path, write_dataset):
    snippet = re.findall(r"```python\n(.*?)```", readme(), re.DOTALL)[1]
    for file in ("rebrac.py", "iql.py", "runs.py", "tasks.py", "mujoco210.py"):
        with open(os.path.join(ROOT, file)) as original:
            text = original.read().replace('    "hopper-medium-v2": ', '    "mine-v2": ')  # the row of another
        (tmp_path / file).write_text(text + snippet * (file == "mujoco210.py"))
    path = write_dataset("mine.hdf5", **random_columns(0, states=11, actions=3))
    flags = "--num_updates 2 --log_every 2 --hidden_dim 16 --batch_size 8 --eval_every 2 --analysis false".split()
    for script in ("rebrac.py", "iql.py"):
        command = [sys.executable, script, "--dataset_name", "mine-v2", "--dataset_path", path, *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "over 10 episodes" in done.stdout, done.stderr


def test_the_snippet_that_loads_a_policy_names_what_there_is():
    with open(os.path.join(ROOT, "README.md")) as file:
        snippet = re.search(r"```python\n(.*?)```", file.read(), re.DOTALL)[1]
    assert len(snippet.replace("\n\n", "\n").splitlines()) == 3
    with pytest.raises(SystemExit, match="is not the config of a run"):
        exec(snippet, {})


# --- Each command is run, by a test or by CI ---


def readme():
    with open(os.path.join(ROOT, "README.md")) as file:
        return file.read()


def commands():
    """The lines of the README's shell blocks, without comments."""
    for block in re.findall(r"^```bash\n(.*?)^```", readme(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield " ".join(shlex.quote(word) for word in words)


RUNNER = "test_sweeps.test_a_sweep_runs_here_is_stopped_goes_on_and_says_what_failed"
ELSEWHERE = {  # commands by the tests that run them
    "make test": ".ci/run",
    "python sweep.py ": RUNNER,
    "D4RL_DATASET_DIR=data python sweep.py ": RUNNER,
    "wandb sweep ": "test_sweeps.test_wandbs_sweep_and_agent_run_a_sweep_to_its_end",
    "wandb agent ": "test_sweeps.test_wandbs_sweep_and_agent_run_a_sweep_to_its_end",
    "sbatch ": "test_sweeps.test_slurms_job_goes_on_after_it_was_stopped",
    "python report.py": "test_readme.test_a_report_of_the_readme_is_made",
    "python report.py --wandb ": "test_report.test_a_wandb_project_gives_the_same_report",
    "python rebrac.py --evaluate ": "test_runs.test_evaluate_prints_the_scores_of_the_runs_last_evaluation_and_others",
    "python benchmark.py": "test_benchmark.test_the_other_parts_print_their_tables",
    ".venv/bin/python collect.py ": "test_collect.test_collected_files_can_be_learnt_from",
    ".venv/bin/pip install ": None,  # a GPU's packages, and collect.py's
    "docker ": None,  # the README says what was tried
}
HERE = [command for command in commands() if not command.startswith(tuple(ELSEWHERE))]


def test_the_commands_that_run_elsewhere_do():
    for name in filter(None, ELSEWHERE.values()):
        path, _, function = name.partition(".test_")
        if name != ".ci/run":
            with open(os.path.join(ROOT, "tests", f"{path}.py")) as file:
                assert f"\ndef test_{function}(" in file.read()
    assert [start for start in ELSEWHERE if not any(command.startswith(start) for command in commands())] == []


@pytest.mark.parametrize("command", dict.fromkeys(HERE))
def test_a_command_of_the_readme_runs(command, tmp_path, write_dataset):
    """As it stands, but for the size of the networks and the lengths of the runs."""
    small = "--num_updates 4 --log_every 2 --hidden_dim 32 --batch_size 8 --eval_every 2 --eval_episodes 1".split()
    small += ["--analysis", "false"]
    short = dict(PATH=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", D4RL_DATASET_DIR=str(tmp_path))
    run = partial(subprocess.run, cwd=tmp_path, env=os.environ | short, capture_output=True, text=True)
    for name in ("rebrac.py", "iql.py", "runs.py", "tasks.py", "mujoco210.py", "data"):
        os.symlink(os.path.join(ROOT, name), tmp_path / name)
    write_dataset("hopper_medium-v2.hdf5", **random_columns(0, states=11, actions=3))
    write_dataset("pen-human-v1.hdf5", **random_columns(0, states=45, actions=24))
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "hopper.hdf5").symlink_to(tmp_path / "hopper_medium-v2.hdf5")
    words = shlex.split(command)
    if words[0] == "make":
        made = run(["make", "-C", ROOT, "-n", *words[1:]]).stdout.replace("\\\n", " ").splitlines()
        words = ["python", *shlex.split(next(line for line in made if "rebrac.py" in line))[1:]]
    done = run([*words, *small])
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout


REPORTS = [line for line in commands() if re.fullmatch(r"python report\.py((?! --wandb| --output).)*", line)]


@pytest.mark.parametrize("command", REPORTS)
def test_a_report_of_the_readme_is_made(command, tmp_path):
    """As it stands, but of fewer runs."""
    study = os.path.join("data", "study", "iql", "hopper-medium-v2")
    shutil.copytree(os.path.join(ROOT, study), tmp_path / study)
    shutil.copytree(os.path.join(ROOT, "data", "runs"), tmp_path / "results")
    words = [sys.executable, os.path.join(ROOT, "report.py"), *shlex.split(command)[2:], "--reps", "20"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "6 finished seeds; left out: 0" in done.stdout and "wrote report/index.html" in done.stdout


# --- The worked example of a fork ---


def fork(path):
    """A script's source after the README's diff, each of whose hunks must fit in one place."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```", readme(), re.DOTALL | re.MULTILINE)
    with open(path) as file:
        source = file.read()
    added = 0
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert source.count(old) == 1, hunk
        source, added = source.replace(old, new), added + sum(line[0] != " " for line in lines)
    assert added <= 10
    return source


@pytest.mark.parametrize("original", [rebrac, iql])
def test_the_worked_example_is_exactly_off_or_divides_by_the_root_mean_square(original, tmp_path):
    path = tmp_path / "forked.py"
    path.write_text(fork(original.__file__))
    spec = importlib.util.spec_from_file_location("forked", path)
    forked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(forked)
    off, _ = epoch_for(forked, "cpu")
    assert off == epoch_for(original, "cpu")[0] != epoch_for(forked, "cpu", actor_rms=True)[0]
    config = forked.Config(hidden_dim=16, actor_layers=1)
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    plain, rms = (forked.Hidden(replace(config, actor_rms=on), "actor") for on in (False, True))
    variables = forked.init_network(rms, jax.random.key(0), x)
    y = forked.infer(plain, variables, x)
    expected = y / np.sqrt((y**2).mean(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(forked.infer(rms, variables, x), expected, rtol=1e-5)


def test_the_worked_example_trains_by_its_name_and_is_reported_under_it(tmp_path, write_dataset):
    for file in ("runs.py", "tasks.py", "mujoco210.py", "report.py"):
        shutil.copy(os.path.join(ROOT, file), tmp_path)
    for script in ("rebrac.py", "iql.py"):
        (tmp_path / script).write_text(fork(os.path.join(ROOT, script)))
    path = write_dataset("hopper_medium-v2.hdf5", **random_columns(0, states=11, actions=3))
    flags = "--num_updates 4 --log_every 2 --hidden_dim 16 --batch_size 8 --eval_every 4 --eval_episodes 1".split()
    flags += ["--dataset_name", "hopper-medium-v2", "--dataset_path", path, "--regularisers", "DO+RMS"]
    for command in (["rebrac.py", *flags], ["iql.py", *flags], ["report.py", "--reps", "50"]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for directory in glob.glob(str(tmp_path / "results" / "*" / "*" / "*")):
        assert "actor_dropout=0.1,actor_rms=true" in directory
    assert (tmp_path / "report" / "tables.md").read_text().count("| DO+RMS |") >= 2
