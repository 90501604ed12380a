"""The README's worked examples of a fork: a regulariser of one's own, and an algorithm."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import OURS, ROOT, lowered_epoch, random_columns

SMALL = {
    "num_updates": 4,
    "log_every": 2,
    "eval_every": 4,
    "eval_episodes": 1,
    "hidden_dim": 16,
    "batch_size": 8,
    "dataset_name": "hopper-medium-v2",
}


def read(*path):
    with open(os.path.join(ROOT, *path)) as file:
        return file.read()


def with_ofn(source):
    """Apply the README's diff to a script. Each hunk must fit in exactly one place."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```", read("README.md"), re.DOTALL | re.MULTILINE)
    hunks = re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]
    assert len(hunks) == 3
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] == " ")
        new = "".join(line[1:] for line in lines)
        assert source.count(old) == 1, hunk
        source = source.replace(old, new)
    return source


def behaviour_cloning():
    """Apply tests/forks/bc.diff to iql.py, as `patch` does: a hunk may fit some lines away.

    To renew it after a change of iql.py: `patch -o bc.py iql.py tests/forks/bc.diff`, mend bc.py,
    and `diff -U1 --label iql.py --label bc.py iql.py bc.py > tests/forks/bc.diff`.
    """
    lines = read("iql.py").splitlines()
    moved = 0  # lines by which the last hunk was away
    for hunk in re.split(r"^(?=@@ )", read("tests", "forks", "bc.diff"), flags=re.MULTILINE)[1:]:
        header, *body = hunk.splitlines()
        old = [line[1:] for line in body if line[0] in " -"]
        new = [line[1:] for line in body if line[0] in " +"]
        expected = int(re.search(r"\+(\d+)", header)[1]) - 1 + moved
        places = [i for i in range(len(lines)) if lines[i : i + len(old)] == old]
        assert places, f"bc.diff doesn't fit iql.py: renew it\n{hunk}"
        place = min(places, key=lambda i: abs(i - expected))
        lines[place : place + len(old)] = new
        moved += place - expected
    return "\n".join(lines) + "\n"


def import_from(path):
    spec = importlib.util.spec_from_file_location("forked", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a fork has beside its scripts."""
    for folder in ("harness", "tools"):
        shutil.copytree(os.path.join(ROOT, folder), tmp_path / folder)
    return tmp_path


@pytest.fixture
def run(checkout, write_dataset):
    """Run a command of the fork on a small dataset, and return what it printed."""
    path = write_dataset("hopper_medium-v2.hdf5", **random_columns(0, states=11, actions=3))

    def run(*words, **flags):
        for key, value in flags.items():
            words += (f"--{key}", str(value))
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def train(script, **flags):
        return run(script, **{**SMALL, "dataset_path": path, **flags})

    run.train = train
    return run


# --- Output feature normalisation ---


@pytest.mark.parametrize("original", OURS.values(), ids=OURS)
def test_ofn_is_exactly_off_or_makes_features_of_unit_length(original, tmp_path):
    path = tmp_path / "forked.py"
    path.write_text(with_ofn(read(os.path.basename(original.__file__))))
    forked = import_from(path)
    off = lowered_epoch(forked)
    assert off == lowered_epoch(original)
    assert off != lowered_epoch(forked, actor_ofn=True)

    config = forked.tuned(forked.Config(hidden_dim=16, actor_layers=2, actor_dropout=0.0))
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    plain = forked.ActorHidden(config)
    ofn = forked.ActorHidden(replace(config, actor_ofn=True))
    variables = forked.init_network(ofn, jax.random.key(0), x)
    y = forked.forward(plain, variables, x)
    expected = y / np.linalg.norm(y, axis=1, keepdims=True)
    np.testing.assert_allclose(forked.forward(ofn, variables, x), expected, rtol=1e-4)


@pytest.mark.slow
def test_ofn_trains_by_its_name_and_is_reported_under_it(checkout, run):
    for script in ("rebrac.py", "iql.py"):
        (checkout / script).write_text(with_ofn(read(script)))
        output = run.train(script, regularisers="DO+OFN")
        assert "actor_dropout=0.1,actor_ofn=true" in output.splitlines()[-1]
    run("-m", "tools.report", reps=50)
    assert (checkout / "report" / "tables.md").read_text().count("| DO+OFN |") >= 2


@pytest.mark.slow
def test_a_fork_keeps_the_tests_of_what_the_scripts_share(checkout):
    """With a regulariser in all scripts, an algorithm of its own, and a copy of a script."""
    for name in ("tests", "sweeps"):
        shutil.copytree(os.path.join(ROOT, name), checkout / name)
    for name in OURS:
        (checkout / f"{name}.py").write_text(with_ofn(read(f"{name}.py")))
    (checkout / "bc.py").write_text(behaviour_cloning())
    copy = with_ofn(read("rebrac.py")).replace('NAME = "ReBRAC"', 'NAME = "Mine"')
    (checkout / "mine.py").write_text(copy)
    here = dict(cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)})
    subprocess.run([sys.executable, "sweeps/generate.py"], cwd=checkout, check=True)
    tests = [
        "tests/test_scripts.py",
        "tests/test_config.py::test_a_regularisers_name_stands_for_the_papers_strength",
        "tests/test_sweeps.py::test_the_files_are_what_the_generator_writes",
        "tests/test_sweeps.py::test_each_grid_is_the_one_listed",
    ]
    command = [sys.executable, "-m", "pytest", "-n", "0", *tests]
    done = subprocess.run(command, capture_output=True, text=True, **here)
    assert done.returncode == 0, done.stdout


# --- Behaviour cloning ---


def test_behaviour_cloning_trains_resumes_and_is_found(checkout, run):
    (checkout / "bc.py").write_text(behaviour_cloning())
    output = run.train("bc.py", regularisers="DO+LN", validation_frac=0.2)
    assert "final score" in output
    assert "actor_dropout=0.1,actor_ln=true" in output.splitlines()[-1]
    assert "finished already" in run.train("bc.py", regularisers="DO+LN", validation_frac=0.2)
    found = run(
        "-c", "import harness.scripts as s; print({k: m.NAME for k, m in s.scripts().items()})"
    )
    assert found.strip() == "{'bc': 'BC'}"


@pytest.mark.slow
def test_behaviour_cloning_is_reported_beside_the_others(checkout, run):
    (checkout / "bc.py").write_text(behaviour_cloning())
    shutil.copy(os.path.join(ROOT, "iql.py"), checkout)
    for script in ("bc.py", "iql.py"):
        for regularisers in ("none", "LN"):
            run.train(script, regularisers=regularisers)
    run("-m", "tools.report", reps=50)
    tables = (checkout / "report" / "tables.md").read_text()
    assert "BC, Gym-MuJoCo: scores" in tables
    assert "IQL, Gym-MuJoCo: scores" in tables


def test_behaviour_cloning_learns_the_actions_that_it_sees(tmp_path):
    """The loss is smallest at the data's mean and standard deviation, which are known here."""
    path = tmp_path / "bc.py"
    path.write_text(behaviour_cloning())
    bc = import_from(path)
    rng = np.random.default_rng(0)
    size = 512
    actions = 0.5 + 0.2 * rng.normal(size=(size, 2)).astype(np.float32)
    data = dict(
        observations=np.zeros((size, 3), np.float32),
        actions=actions.astype(np.float32),
        rewards=np.zeros(size, np.float32),
        terminals=np.zeros(size, bool),
        train=np.arange(size - 1, dtype=np.int32),
    )
    flags = dict(hidden_dim=16, batch_size=256, log_every=500, num_updates=500)
    config = bc.tuned(bc.Config(actor_learning_rate=1e-2, **flags))
    batch = bc.transitions(data, np.arange(1))
    states = jax.tree.map(lambda x: x[None], bc.init_state(config, batch, 0))
    states, infos = bc.epoch(config, states, jax.device_put(data))
    actor = jax.tree.map(lambda x: x[0], states.actor)
    means, log_stds = bc.forward(bc.Actor(config, 2), actor, data["observations"][:1])
    np.testing.assert_allclose(means[0], actions.mean(0), atol=0.03)
    np.testing.assert_allclose(np.exp(log_stds[0]), actions.std(0), atol=0.03)
    assert np.all(np.isfinite(infos["actor_loss"]))
