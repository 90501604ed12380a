"""The numbers in README.md are those of the files in the repository."""

import csv
import glob
import os
import re

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

import rebrac
import runs

COLUMNS = {
    "dead neurons, training data": ("train/dead_neurons", 100),
    "dead neurons, evaluation": ("evaluation/dead_neurons", 100),
    "gap of the action error": ("gap/action_error", 1),
    "score": ("score", 1),
    "action noise 0.2": ("score/action_noise=0.2", 1),
    "state noise 0.05": ("score/state_noise=0.05", 1),
}


def last_rows():
    """The last evaluations of the runs in data/runs, by the README's name of their regularisers, then by seed."""
    names = dict(actor_dropout="DO", actor_ln="LN", actor_fn="FN", actor_gn="GN", actor_grad_noise="GrN")
    rows = {}
    for directory in glob.glob(os.path.join(ROOT, "data", "runs", "rebrac", "*", "*")):
        config = runs.load_config(rebrac.Config, directory)
        name = "+".join(word for key, word in names.items() if getattr(config, key)) or "none"
        with open(os.path.join(directory, "evaluations.csv"), newline="") as file:
            rows.setdefault(name, {})[config.seed] = list(csv.DictReader(file))[-1]
    return rows


def interval(values):
    """Mean and half the width of the 95 % interval, by Student's t."""
    return np.mean(values), stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))


def test_the_table_of_what_is_inside_the_actor_is_that_of_the_runs():
    with open(os.path.join(ROOT, "README.md")) as file:
        table = re.search(r"^\| regularisers \|.*?\n\n", file.read(), re.DOTALL | re.MULTILINE)[0].split("\n")[:-2]
    header = [word.strip() for word in table[0].strip("|").split("|")][1:]
    rows = last_rows()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["none", "LN", "FN", "GN", "DO", "DO+LN+GrN"]
    for line in table[2:]:
        name, *cells = [word.strip() for word in line.strip("|").split("|")]
        assert sorted(rows[name]) == [0, 1, 2, 3, 4]
        for title, cell in zip(header, cells):
            column, factor = COLUMNS[title.removesuffix(" (%)")]
            expected = interval([factor * float(row[column]) for row in rows[name].values()])
            digits = len(cell.split()[0].partition(".")[2])
            assert cell == " ± ".join(f"{value:.{digits}f}" for value in expected), (name, title)


def test_the_runs_are_those_of_the_command_in_the_readme():
    for directory in glob.glob(os.path.join(ROOT, "data", "runs", "rebrac", "*", "*")):
        config = runs.load_config(rebrac.Config, directory)
        config = rebrac.replace(config, results="data/runs")
        assert runs.run_directory("rebrac", config, rebrac.tuned) == os.path.relpath(directory, ROOT)
        assert (config.num_updates, config.batch_size, config.critic_loss) == (15_000, 256, "mse")
        assert (config.validation_frac, config.validation_seed, config.eval_episodes) == (0.1, 0, 10)


def test_the_snippet_that_loads_a_policy_names_what_there_is():
    with open(os.path.join(ROOT, "README.md")) as file:
        snippet = re.search(r"```python\n(.*?)```", file.read(), re.DOTALL)[1]
    assert len(snippet.replace("\n\n", "\n").splitlines()) == 3
    with pytest.raises(SystemExit, match="is not the config of a run"):
        exec(snippet, {})
