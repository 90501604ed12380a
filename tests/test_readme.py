"""The READMEs: their tables are those of the data, and each command in them is run."""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, random_columns
from matplotlib.testing.compare import compare_images

import iql
from harness.config import parse
from harness.datasets import episode_returns, normalized_score, read_dataset
from harness.directory import run_directory
from harness.environments import make_env
from harness.scripts import scripts
from tools import readme, readme_results, report


def read(path):
    with open(path) as file:
        return file.read()


# --- Numbers ---


@pytest.mark.parametrize("path", readme.readmes(), ids=lambda path: os.path.relpath(path, ROOT))
def test_the_tables_in_a_readme_are_those_of_the_data(path):
    """If not: `python -m tools.readme` writes them anew."""
    assert readme.renew(read(path)) == read(path)


def test_the_critics_look_as_far_ahead_as_the_data_readme_says():
    config = iql.Config(gamma=0.99, tau=0.005)
    target = 0.0  # of a state whose reward is always 1
    chain = np.zeros(101)  # of states before one reward, the nearest first
    for _ in range(10_000):
        target += config.tau * (1 + config.gamma * target - target)
        chain += config.tau * (np.append(1, chain[:-1]) - chain)
    steps, share = re.findall(r"\d+", readme_results.reach_text(config, 10_000))
    assert int(share) == round(100 * (1 - config.gamma) * target) == 39
    assert int(steps) == 50
    assert chain[49 - 3] > 0.5 > chain[49 + 3]  # half of a reward has come so far


def test_a_stale_table_is_noticed_and_an_unknown_one_is_an_error():
    text = "before\n<!-- begin demo -->\nstale\n<!-- end demo -->\nafter"
    new = readme.renew(text)
    assert new.startswith("before\n<!-- begin demo -->\n| ")
    assert new.endswith(" |\n<!-- end demo -->\nafter")
    with pytest.raises(ValueError, match="no block 'nothing'"):
        readme.renew(text.replace("demo", "nothing"))


def test_each_generated_block_stands_in_one_readme():
    texts = "".join(read(path) for path in readme.readmes())
    assert sorted(re.findall(r"<!-- begin (\S+) -->", texts)) == sorted(readme.BLOCKS)


def assert_same_picture(expected, drawn):
    """Processors may differ in a pixel. One run that scores 2 points higher is an error above 1."""
    assert compare_images(expected, str(drawn), tol=0.5) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", readme.FIGURES)
def test_a_figure_of_the_readmes_is_that_of_the_data(name, tmp_path):
    """If not: `python -m tools.readme` draws it anew."""
    expected = readme.path_of("data", f"{name}.png")
    drawn = tmp_path / "drawn.png"
    readme.draw_figure(name, drawn)
    assert_same_picture(expected, drawn)


def test_the_front_page_is_short():
    assert len(read(os.path.join(ROOT, "README.md")).splitlines()) <= 150


def test_links_between_the_readmes_lead_somewhere():
    for path in readme.readmes():
        for link in re.findall(r"\]\(([^)]+)\)", read(path)):
            if link.startswith("http"):
                continue
            file, _, anchor = link.partition("#")
            target = os.path.join(os.path.dirname(path), file) if file else path
            assert os.path.exists(target), (path, link)
            if anchor:
                headings = re.findall(r"^#+ (.*)$", read(target), re.MULTILINE)
                words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
                assert anchor in [heading.replace(" ", "-") for heading in words]


def test_the_bundled_datasets_are_as_described():
    rows = [line.strip("| ").split(" | ") for line in readme.datasets().splitlines()[2:]]
    assert len(rows) == len(glob.glob(os.path.join(ROOT, "data", "*.hdf5"))) == 4
    for name, _, *told in rows:
        env = make_env(name)
        file = os.path.basename(env.unwrapped.dataset_url)
        raw = read_dataset(os.path.join(ROOT, "data", file), env)
        ends = np.flatnonzero(raw["timeouts"]) + 1
        if name != "antmaze-umaze-v2":  # whose trajectories go on at the goal
            ends = np.flatnonzero(raw["terminals"] | raw["timeouts"]) + 1
        episodes = np.split(raw["rewards"], ends[:-1])
        returns = [rewards.sum() for rewards in episodes]
        if name == "antmaze-umaze-v2":
            returns = [rewards.max() for rewards in episodes]
        scores = [100 * env.get_normalized_score(value) for value in returns]
        found = [f"{len(ends):,}", f"{ends[-1]:,}", f"{np.mean(scores):.1f}", f"{max(scores):.1f}"]
        assert told == found, name
        ours = normalized_score(name, episode_returns(name, raw))
        np.testing.assert_allclose(ours, scores, rtol=1e-4)


@pytest.mark.parametrize(
    "table, number",
    [
        ("study", 430),
        ("trials", 8),
        ("demo", 6),
        ("antmaze", 18),
        ("batch", 20),
        ("curves", 73),
        ("coefficients", 96),
        ("second", 1283),
        ("repeat", 112),
        ("start", 3),
        ("temperature", 12),
        ("longer", 25),
        ("antmaze_tau", 2),
    ],
)
def test_the_runs_in_a_table_have_the_names_of_their_configs(table, number):
    """So the names of runs are still what they were when these were trained."""
    rows = pd.read_csv(os.path.join(ROOT, "data", f"{table}.csv"), dtype=str, keep_default_na=False)
    assert len(rows) == number
    for row in rows.to_dict("records"):
        script = scripts()[row["algorithm"]]
        fields = vars(script.Config())
        words = [f"--{key}={text}" for key, text in row.items() if key in fields and text]
        config = script.tuned(parse(script.Config, words))
        directory = run_directory(row["algorithm"], config, script.tuned)
        assert os.path.basename(directory) == row["run"]


@pytest.mark.slow
def test_the_studys_report_is_that_of_its_table(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    report.main(report.Config(results=["data/study.csv"], output=str(tmp_path)))
    text = (tmp_path / "tables.md").read_text()
    assert text == read(os.path.join("data", "study", "tables.md"))
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(figures) == sorted(os.path.basename(p) for p in glob.glob("data/study/*.png"))
    for name in figures:
        assert_same_picture(os.path.join("data", "study", name), tmp_path / name)


# --- Commands: each is run, by a test or by CI ---


def commands():
    """Yield the lines of the READMEs' shell blocks, without comments."""
    for path in readme.readmes():
        for block in re.findall(r"^```bash\n(.*?)^```", read(path), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield " ".join(shlex.quote(word) for word in words)


ELSEWHERE = {  # beginnings of commands, and the files of the tests that run them
    "make test": None,  # CI
    "source ": None,  # of what make has made
    "python rebrac.py --help": "test_config.py",
    "python -m tools.sweep ": "test_sweeps.py",
    "D4RL_DATASET_DIR=data python -m tools.sweep ": "test_sweeps.py",
    "D4RL_DATASET_DIR=datasets python -m tools.sweep ": "test_download.py",
    "D4RL_DATASET_DIR=antmaze python ": None,  # a full file, which takes minutes to make
    "wandb sweep ": "test_sweeps.py",
    "wandb agent ": "test_sweeps.py",
    "wandb login": None,  # asks for a key
    "CUDA_VISIBLE_DEVICES=1 wandb agent ": None,  # needs two GPUs
    "sbatch ": "test_sweeps.py",
    "python -m tools.report": "test_readme.py",
    "python -m tools.report --wandb ": "test_report.py",
    "python rebrac.py --evaluate ": "test_policies.py",
    "python -m tools.benchmark": "test_benchmark.py",
    ".venv/bin/python -m tools.collect ": "test_collect.py",
    ".venv/bin/python -m tools.collect_antmaze ": "test_collect_antmaze.py",
    "python -m tools.collect_antmaze ": "test_collect_antmaze.py",
    "patch ": "test_forks.py",
    "python bc.py ": "test_forks.py",
    ".venv/bin/pip install ": None,  # a GPU's packages, and those of tools.collect
    "pip ": None,  # harness/mujoco210 in an environment of its own
    "docker ": None,  # the README says what was tried
}
HERE = [line for line in commands() if not line.startswith(tuple(ELSEWHERE))]
SMALL = [
    *("--num_updates", "4", "--log_every", "2", "--eval_every", "2", "--eval_episodes", "1"),
    *("--hidden_dim", "32", "--analysis", "false", "--batch_size", "8"),
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
def test_a_command_of_the_readmes_runs(command, here):
    """As it stands, but for the size of the networks and the lengths of the runs."""
    words = shlex.split(command)
    if words[0] == "make":
        made = here("make", "-C", ROOT, "-n", *words[1:]).stdout.replace("\\\n", " ")
        (line,) = [line for line in made.splitlines() if "rebrac.py" in line]
        words = ["python", *shlex.split(line)[1:]]
    small = SMALL[: SMALL.index("--batch_size")] if "--preset" in words else SMALL
    done = here(*words, *small)
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout


def report_commands():
    pattern = r"python -m tools\.report((?! --wandb).)*"
    return dict.fromkeys(line for line in commands() if re.fullmatch(pattern, line))


@pytest.mark.slow
@pytest.mark.parametrize("command", report_commands())
def test_a_report_of_the_readmes_is_made(command, tmp_path, start):
    """As it stands, but of fewer runs."""
    start(results="results/study", seed=0)
    os.symlink("study", tmp_path / "results" / "ofn")
    os.makedirs(tmp_path / "data")
    shutil.copy(os.path.join(ROOT, "data", "corl.csv"), tmp_path / "data")
    for name, algorithm in (("study", "iql"), ("curves", "bcq")):
        table = pd.read_csv(os.path.join(ROOT, "data", f"{name}.csv"), dtype=str)
        is_in = (table["dataset_name"] == "hopper-medium-v2") & (table["algorithm"] == algorithm)
        table[is_in].to_csv(tmp_path / "data" / f"{name}.csv", index=False)
    words = [sys.executable, *shlex.split(command)[1:], "--reps", "20"]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "left out: 0" in done.stdout
    assert "/index.html, tables.md" in done.stdout


# --- Python ---


def snippets(path):
    return re.findall(r"```python\n(.*?)```", read(os.path.join(ROOT, path)), re.DOTALL)


@pytest.mark.slow
def test_an_environment_of_your_own_is_registered_as_told(tmp_path, write_dataset):
    (snippet,) = snippets("data/README.md")
    shutil.copytree(os.path.join(ROOT, "harness"), tmp_path / "harness")
    path = tmp_path / "harness" / "environments.py"
    marker = "gym, d4rl = import_silently()\n"
    text = path.read_text()
    assert text.count(marker) == 1
    snippet = snippet.replace("mine:MyEnv", "d4rl.gym_mujoco.gym_envs:OfflineHopperEnv")
    path.write_text(text.replace(marker, marker + snippet))
    file = write_dataset("mine.hdf5", **random_columns(0, states=11, actions=3))
    for script in ("rebrac.py", "iql.py"):
        shutil.copy(os.path.join(ROOT, script), tmp_path)
        command = [sys.executable, script, "--dataset_name", "mine-v2", "--dataset_path", file]
        done = subprocess.run([*command, *SMALL], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "over 1 episodes" in done.stdout


def test_the_snippet_that_loads_a_policy_names_what_there_is():
    (snippet,) = snippets("harness/README.md")
    with pytest.raises(ValueError, match="is not the config of a run"):
        exec(snippet, {})
