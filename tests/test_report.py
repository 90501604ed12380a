"""The report: what it reads and leaves out, its numbers against rliable's and by hand, and the files that it writes."""

import csv
import dataclasses
import glob
import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import wandb
import yaml
from conftest import ROOT
from rliable import library, metrics
from scipy import stats
from wandb_server import Server

import report
import runs
from report import SCRIPTS, Config, Table

HEADER = "seed,update,score,score/action_noise=0.2,train/dead_neurons,plasticity/before,plasticity/after".split(",")
HOPPER, WALKER, MAZE, PEN = "hopper-medium-v2", "walker2d-medium-v2", "antmaze-umaze-v2", "pen-human-v1"


@pytest.fixture
def make_run(tmp_path):
    """Writes a run's directory, whose evaluations have the scores given, a list for each seed; returns its path."""

    def make(scores, algorithm="rebrac", finished=True, folder="results", **flags):
        script = SCRIPTS[algorithm]
        flags = dict(dataset_name=HOPPER, num_updates=len(scores[0]) * 1000, eval_every=1000) | flags
        config = script.tuned(script.Config(**flags, num_seeds=len(scores), results=str(tmp_path / folder)))
        path = runs.run_directory(algorithm, config, script.tuned)
        os.makedirs(path)
        with open(os.path.join(path, "config.yaml"), "w") as file:
            yaml.safe_dump(runs.identity(vars(config)), file)
        with open(os.path.join(path, "evaluations.csv"), "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(HEADER)
            for i, row in enumerate(zip(*scores)):
                for k, score in enumerate(row):
                    writer.writerow([config.seed + k, 1000 * (i + 1), score, score - 1, 0.1, 0.5, 0.1])
        if finished:
            with open(os.path.join(path, "finished.json"), "w") as file:
                json.dump(dict(updates=config.num_updates), file)
        return path

    return make


def tables(folders, monkeypatch, tmp_path, **options):
    """The tables of a report, by title."""
    found = {}
    monkeypatch.setattr(report, "markdown", lambda table: found.setdefault(table.title, table) and "")
    monkeypatch.setattr(report.matplotlib.figure.Figure, "savefig", lambda self, path, **_: open(path, "w").close())
    report.main(Config(results=folders, output=str(tmp_path / "report"), reps=50, **options))
    return found


# --- What it reads ---


@pytest.mark.parametrize(
    "algorithm, flags, settings, labels",
    [
        ("rebrac", {}, (), ("none",)),
        ("rebrac", dict(actor_ln=True, actor_dropout=0.1), (), ("DO+LN",)),
        ("rebrac", dict(actor_dropout=0.3), (), ("DO(0.3)",)),
        ("rebrac", dict(actor_wd=1e-4, actor_l1_ratio=0.5), (), ("EN",)),
        ("rebrac", dict(actor_wd=1.0), (), ("L2(1)",)),
        ("rebrac", dict(actor_wd=0.01), (), ("L2(0.01)", "best-L2")),
        ("rebrac", dict(regularisers="best"), (), ("DO(0.2)+LN+GrN", "best")),
        ("rebrac", dict(regularisers="LN", actor_lr_decay=True), (), ("LN+actor_lr_decay=True",)),
        ("rebrac", dict(critic_ln=False), (), ("critic_ln=False",)),
        ("rebrac", dict(batch_size=32, seed=3, actor_gn=True), (("batch_size", "32"),), ("GN",)),
        ("rebrac", dict(critic_loss="mse"), (("critic_loss", "mse"),), ("none",)),
        ("iql", dict(actor_wd=0.01, actor_l1_ratio=1.0, temperature=2.0), (("temperature", "2.0"),), ("L1", "best-L1")),
        ("iql", dict(dataset_name=PEN), (), ("none", "DO")),
        ("iql", dict(dataset_name=PEN, actor_ln=True), (), ("LN", "DO+LN")),
        ("iql", dict(dataset_name=PEN, actor_ln=True, actor_dropout=0.0), (), ("LN (no DO)",)),
    ],
)
def test_runs_are_named_after_their_regularisers(algorithm, flags, settings, labels):
    script = SCRIPTS[algorithm]
    config = runs.identity(vars(script.tuned(script.Config(**{"dataset_name": HOPPER, **flags}))))
    assert report.describe(algorithm, config) == (settings, flags.get("dataset_name", HOPPER), labels)


def test_another_file_is_another_dataset():
    name = lambda path: report.describe(
        "iql", runs.identity(vars(report.iql.tuned(report.iql.Config(dataset_name=HOPPER, dataset_path=path))))
    )[1]
    assert name("a/hopper_medium-v2.hdf5") == HOPPER and name("a/mine.hdf5") == f"{HOPPER} (mine.hdf5)"


def test_runs_are_compared_with_those_of_the_same_settings(make_run, tmp_path, monkeypatch):
    for seed in (0, 1):
        make_run([[1, 40]], seed=seed, batch_size=256, critic_loss="mse")
        make_run([[1, 80]], seed=seed, dataset_name=PEN, critic_loss="mse")  # whose batch size is 256 in the paper
        make_run([[1, 60]], seed=seed, dataset_name=PEN, algorithm="iql")
    seeds, _ = report.read_results([str(tmp_path / "results")])
    common = (("critic_loss", "mse"), ("eval_every", "1000"), ("num_updates", "2000"))
    assert [(s, len(group)) for s, group in report.by_settings(seeds)] == [((("batch_size", "256"), *common), 6)]
    found = tables([str(tmp_path / "results")], monkeypatch, tmp_path)
    assert found["ReBRAC, all domains: aggregates"].rows[0][3] == "60.0 (60.0 – 60.0)"
    make_run([[1, 50]], critic_loss="mse")  # at the paper's batch size, 1024
    seeds, _ = report.read_results([str(tmp_path / "results")])
    (_, large), (settings, small) = report.by_settings(seeds)
    assert settings == common and len(large) == 6
    assert sorted(seed.scores[-1] for seed in small) == [50, 60, 60, 80, 80]


def test_missing_unfinished_and_failed_runs_are_shown_as_such(make_run, tmp_path, monkeypatch):
    for seed, scores in enumerate(([1, 40], [2, 50], [3, 60])):
        make_run([scores], seed=seed)
    for seed, scores in enumerate(([1, 70], [2, 71])):
        make_run([scores], seed=seed, actor_ln=True)
    failed = make_run([[1, 99]], seed=2, actor_ln=True, finished=False)
    with open(os.path.join(failed, "failed.txt"), "w") as file:
        file.write("error: q is nan\n")
    make_run([[5, 5]], seed=0, dataset_name=WALKER, finished=False)
    found = tables([str(tmp_path / "results")], monkeypatch, tmp_path)
    table = found["ReBRAC, Gym-MuJoCo: scores"]
    assert table.header == ["regularisers", HOPPER, WALKER, "mean"]
    assert table.rows == [
        ["none", "50.0 ± 8.2", "1 unfinished", "incomplete"],
        ["LN", "*70.5 ± 0.5 (2/3, 1 failed)", "missing", "incomplete"],
    ]
    page = (tmp_path / "report" / "index.html").read_text()
    assert "failed: error: q is nan" in page and "its last evaluation is that of update 2,000 of 2,000" in page
    assert "ReBRAC, Gym-MuJoCo: aggregates" not in found  # walker2d has no finished run


def damage_config(path):
    open(os.path.join(path, "config.yaml"), "w").close()


def damage_yaml(path):
    with open(os.path.join(path, "config.yaml"), "w") as file:
        file.write("a: [")


def cut_table(path):
    os.truncate(os.path.join(path, "evaluations.csv"), os.path.getsize(os.path.join(path, "evaluations.csv")) - 30)


def empty_table(path):
    os.truncate(os.path.join(path, "evaluations.csv"), 0)


def no_table(path):
    os.remove(os.path.join(path, "evaluations.csv"))


def edit(old, new):
    def change(path):
        with open(os.path.join(path, "evaluations.csv")) as file:
            text = file.read()
        assert old in text
        with open(os.path.join(path, "evaluations.csv"), "w") as file:
            file.write(text.replace(old, new))

    return change


def unknown_dataset(path):
    with open(os.path.join(path, "config.yaml"), "r+") as file:
        text = file.read()
        file.seek(0)
        file.write(text.replace(HOPPER, "my-own-v2"))
        file.truncate()


def binary_table(path):
    with open(os.path.join(path, "evaluations.csv"), "wb") as file:
        file.write(bytes(range(256)))


@pytest.mark.parametrize(
    "damage, reason",
    [
        (damage_config, "it is damaged: TypeError"),
        (damage_yaml, "it is damaged: ParserError"),
        (unknown_dataset, "it is damaged: SystemExit error: unknown dataset 'my-own-v2'"),
        (cut_table, "its last evaluation is missing"),
        (edit("0,1000,1,", "0,1000,"), "evaluations.csv is damaged"),
        (empty_table, "its last evaluation is missing"),
        (no_table, "its last evaluation is missing"),
        (binary_table, "it is damaged: UnicodeDecodeError"),
        (edit("0,2000,40", "0,2000,nan"), "its scores are not finite"),
        (edit("0,2000,40", "0,1000,40"), "its last evaluation is missing"),
        (edit("0,2000,40", "0,2000,forty"), "it is damaged: ValueError"),
        (edit("score,", "scores,"), "it is damaged: KeyError"),
    ],
)
def test_damaged_runs_are_left_out_with_the_reason(make_run, tmp_path, monkeypatch, capsys, damage, reason):
    path = make_run([[1, 40]], seed=0)
    make_run([[1, 60]], seed=1)
    damage(path)
    found = tables([str(tmp_path / "results")], monkeypatch, tmp_path)
    assert found["ReBRAC, Gym-MuJoCo: scores"].rows == [["none", "*60.0 ± 0.0"]]
    output = capsys.readouterr().out
    assert "1 finished seeds; left out: 1" in output and re.search(f"left out: {re.escape(path)}: .*{reason}", output)


def test_a_row_that_is_being_written_does_not_hide_a_run(make_run, tmp_path):
    path = make_run([[1, 40]], finished=False)
    cut_table(path)
    (seed,), reason = report.read_directory(path)
    assert list(seed.scores) == [1] and not seed.finished and reason.startswith("not finished: ")


def test_every_cut_of_a_table_is_survived(make_run):
    path = os.path.join(make_run([[1, 40]]), "evaluations.csv")
    whole = open(path, "rb").read()
    for size in range(len(whole) - 2):
        with open(path, "wb") as file:
            file.write(whole[:size])
        try:
            (seed,), _ = report.read_directory(os.path.dirname(path))
            assert seed.scores[-1] == 40  # only the last number of the last row was cut
        except report.Unreadable:
            pass


def test_twice_the_same_run_counts_once(make_run, tmp_path, capsys):
    make_run([[1, 40]], folder="a")
    make_run([[1, 40]], folder="b")
    seeds, left_out = report.read_results([str(tmp_path / "a"), str(tmp_path / "b")])
    assert len(seeds) == 1 and len(left_out) == 1 and "another run has its seed 0, too" in left_out[0][1]
    seeds, left_out = report.read_results([str(tmp_path / "a"), str(tmp_path / "a")])
    assert len(seeds) == 1


def test_seeds_that_were_trained_together_count_like_others(make_run, tmp_path, monkeypatch):
    for seed, score in enumerate((40, 50, 60)):
        make_run([[1, score]], seed=seed, folder="apart")
    make_run([[1, 40], [1, 50], [1, 60]], folder="together")
    apart, together = (tables([str(tmp_path / name)], monkeypatch, tmp_path) for name in ("apart", "together"))
    assert apart == together and apart["ReBRAC, Gym-MuJoCo: scores"].rows == [["none", "*50.0 ± 8.2"]]


def test_the_best_of_each_dataset_is_one_row(make_run, tmp_path, monkeypatch):
    for name, score in ((HOPPER, 50), (WALKER, 60)):
        for seed in (0, 1):
            make_run([[1, score]], seed=seed, dataset_name=name)
            make_run([[1, score + 5]], seed=seed, dataset_name=name, regularisers="best")
    rows = tables([str(tmp_path / "results")], monkeypatch, tmp_path)["ReBRAC, Gym-MuJoCo: scores"].rows
    assert rows == [
        ["none", "50.0 ± 0.0", "60.0 ± 0.0", "55.0"],
        ["best", "*55.0 ± 0.0", "*65.0 ± 0.0", "*60.0"],
    ]


def test_a_row_whose_runs_are_all_in_another_is_left_out(make_run, tmp_path, monkeypatch):
    for seed in (0, 1):
        for flags in ({}, dict(actor_ln=True), dict(regularisers="DO+LN+EN")):
            make_run([[1, 50]], seed=seed, algorithm="iql", **flags)
            make_run([[1, 50]], seed=seed, algorithm="iql", dataset_name=PEN, **flags)  # with dropout anyway
        make_run([[1, 50]], seed=seed, regularisers="best")
        make_run([[1, 60]], seed=seed, regularisers="best", dataset_name=WALKER)
        make_run([[1, 40]], seed=seed, actor_ln=True)  # is no tuned one, though those have its dataset
        make_run([[1, 40]], seed=seed, folder="single", regularisers="best")
    found = tables([str(tmp_path / "results")], monkeypatch, tmp_path)
    names = lambda title: [row[0] for row in found[title].rows]
    assert names("IQL, Adroit: scores") == ["none", "LN", "DO+LN+EN"]
    assert names("ReBRAC, Gym-MuJoCo: scores") == ["LN", "best"]
    found = tables([str(tmp_path / "single")], monkeypatch, tmp_path)
    assert names("ReBRAC, Gym-MuJoCo: scores") == ["DO(0.2)+LN+GrN"]


def test_nothing_to_report_is_one_clear_line(tmp_path, make_run):
    for config, message in (
        (Config(results=[str(tmp_path / "none")]), "error: there is no directory"),
        (Config(results=[str(tmp_path)]), "error: there is no finished run"),
        (Config(final="best"), "error: final must be last or mean"),
    ):
        with pytest.raises(SystemExit, match=message):
            report.main(dataclasses.replace(config, output=str(tmp_path / "report")))


# --- Numbers ---


def test_final_scores(make_run):
    scores = [*map(float, range(20))]
    for name, expected in ((HOPPER, np.mean(scores[-10:])), (MAZE, np.mean(scores[-5:]))):
        (seed,), _ = report.read_directory(make_run([scores], dataset_name=name))
        assert report.final_score(Config(final="mean"), seed) == expected
        assert report.final_score(Config(final="last"), seed) == 19


def test_aggregates_and_intervals_are_rliables():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.6, 0.2, (5, 4)), rng.normal(0.5, 0.2, (3, 4)).round(1)
    y[0], x[0, 0] = x[0].round(1), y[1, 0]  # ties
    for k, name in enumerate(("aggregate_iqm", "aggregate_median", "aggregate_mean", "aggregate_optimality_gap")):
        function = getattr(metrics, name)
        np.random.seed(0)  # noqa: NPY002
        points, intervals = library.get_interval_estimates({"x": x}, lambda s, f=function: np.array([f(s)]), reps=300)
        point, (low, high) = report.interval(x[:, :, None], report.aggregates, 300)
        np.testing.assert_allclose(point[k, 0], points["x"][0], rtol=1e-12)
        np.testing.assert_allclose([low[k, 0], high[k, 0]], intervals["x"][:, 0], rtol=1e-12)
        both = report.aggregates(np.stack([x, x[::-1] / 2], 2))  # several variants at once
        np.testing.assert_allclose(both[k], [function(x), function(x / 2)], rtol=1e-12)
    pair = lambda x, y: report.probability_of_improvement(x[:, :, None], y[:, :, None])[0, 0]
    assert pair(x, y) == pytest.approx(metrics.probability_of_improvement(x, y), abs=1e-12)
    np.random.seed(0)  # noqa: NPY002
    _, intervals = library.get_interval_estimates({"": [x, y]}, lambda *s: np.array([pair(*s)]), reps=300)
    _, ours = report.interval([x[:, :, None], y[:, :, None]], report.probability_of_improvement, 300)
    np.testing.assert_allclose(ours[:, 0, 0], intervals[""][:, 0])
    rectangle = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 1.2]])  # by hand
    np.testing.assert_allclose(report.aggregates(rectangle[:, :, None])[:, 0], [0.45, 0.5, 0.5, 1 - 3.8 / 8])


def test_expected_online_performance_is_that_of_all_subsets():
    scores = np.array([3.0, 1.0, 7.0, 7.0, 2.0])
    expected = [np.mean([max(s) for s in itertools.combinations(scores, n)]) for n in range(1, 6)]
    np.testing.assert_allclose(report.expected_online_performance(scores), expected)


def test_seeds_that_miss_a_dataset_are_not_aggregated():
    by = {"a": [(0, 10.0), (1, 20.0), (2, 30.0)], "b": [(2, 60.0), (0, 40.0)]}
    np.testing.assert_allclose(report.matrix(by, ["a", "b"]), [[0.1, 0.4], [0.3, 0.6]])
    assert report.matrix(by, ["a", "b", "c"]) is None


def test_curves_need_two_evaluations(make_run):
    short, long = (report.read_directory(make_run([scores], seed=i))[0] for i, scores in enumerate(([1], [1, 2])))
    assert report.learning_curves(short, ["none"], [HOPPER]) is None
    assert len(report.learning_curves(short + long, ["none"], [HOPPER]).axes[0].lines) == 1


def test_improvement_is_of_the_mean_over_the_datasets():
    none, better = np.array([[20.0, 80], [40, 60]]), np.array([[30.0, 80], [50, 60]])
    np.testing.assert_allclose(report.improvement(better[:, :, None], none[:, :, None]), [[10]])
    same = np.full((3, 2), 60.0)  # without spread, the interval is the point
    _, _, gains = report.aggregate_table("", {"none": same, "L2": 1.1 * same, "DO": same - 6}, 50)
    np.testing.assert_allclose([gains["L2"], gains["DO"]], [[10] * 3, [-10] * 3])
    table, _, gains = report.aggregate_table("", {"none": -same, "L2": same}, 50)  # percents of that mean nothing
    assert gains == {} and table.rows[1][-2:] == ["1.00 (1.00 – 1.00)", "none's is not positive"]


def test_differences_are_taken_seed_by_seed():
    x, y = np.array([30.0, 33, 36, 39, 41]), np.array([28.0, 29, 31, 30])
    seeds = lambda values: list(enumerate(values))
    none, same = {"a": seeds(y), "b": seeds(2 * y)}, seeds(2 * y)
    by = {"none": none, "L2": {"a": seeds(x)[::-1], "b": same}, "LN": {"a": seeds(y - 1)}}
    table = report.difference_table("", by, {"a": ["a"], "b": ["b"], "mean": ["a", "b"]})
    assert table.header == ["regularisers", "a", "b", "mean"]
    half = 3.182446 * np.std([2, 4, 5, 9], ddof=1) / 2  # a table's t of 3 degrees of freedom
    own = 3.182446 * np.std([28, 29, 31, 30], ddof=1) / 2
    assert table.rows == [
        ["none", f"29.5 ± {own:.1f}", f"59.0 ± {2 * own:.1f}", f"44.2 ± {1.5 * own:.1f}"],
        ["L2", f"*+5.0 (+{5 - half:.1f} – +{5 + half:.1f})", "the same runs",
         f"*+2.5 (+{2.5 - half / 2:.1f} – +{2.5 + half / 2:.1f})"],
        ["LN", "*-1.0 (-1.0 – -1.0)", "incomplete", "incomplete"],
    ]  # fmt: skip
    by["L2"]["a"][-1] = (0, 24.0)  # -4, 4, 5, 9: no longer sure
    assert report.difference_table("", by, {"a": ["a"]}).rows[1][1].startswith("+3.5 (-")


def test_the_order_of_labels():
    names = ["best", "GN", "DO+LN", "DO(0.3)", "none", "DO(0.05)", "L2", "DO", "critic_ln=False", "DO+LN+GrN"]
    assert sorted(names, key=report.rank) == [
        "none", "DO", "DO(0.05)", "DO(0.3)", "GN", "L2", "DO+LN", "DO+LN+GrN", "best", "critic_ln=False",
    ]  # fmt: skip


def test_tables_in_three_languages():
    table = Table("A_b", ["x", "y & z"], [["none", "*1 ± 2"], ["L2", "50 %"], ["L1", ""]], "note")
    assert report.markdown(table) == (
        "### A_b\n\n| x | y & z |\n| --- | --- |\n| none | **1 ± 2** |\n| L2 | 50 % |\n| L1 | |\n\nnote\n"
    )
    text = report.latex(table)
    assert r"none & \textbf{1 $\pm$ 2} \\" in text and r"L2 & 50 \% \\" in text and r"\caption{A\_b. note}" in text
    assert text.count("{") == text.count("}") and "x & y \\& z" in text
    assert "<td class=best>1 ± 2</td>" in report.as_html(table) and "y &amp; z" in report.as_html(table)


# --- The whole ---


def test_a_fresh_clone_shows_something_at_once(tmp_path):
    study = os.path.join("data", "study", "rebrac", "halfcheetah-medium-replay-v2")
    command = [sys.executable, "report.py", "--results", f"[{study}, data/runs]", "--reps", "50"]
    done = subprocess.run([*command, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{study}, data/runs: 76 finished seeds; left out: 0\n")
    figures = {os.path.basename(path) for path in glob.glob(str(tmp_path / "*.p*"))}
    kinds = "performance-profiles aggregates-with-95-intervals learning-curves inside-the-actor robustness".split()
    for kind in [*kinds, "strength-of-a-regulariser", "improvement-over-no-regulariser", "expected-online-performance"]:
        for suffix in ("png", "pdf"):
            assert any(name.endswith(f"{kind}.{suffix}") for name in figures), (kind, figures)
    assert all(os.path.getsize(tmp_path / name) > 5000 for name in figures)
    page = (tmp_path / "index.html").read_text()
    assert (
        not re.search(r'<link|<script|url\(|src="(?!data:)', page) and page.count("data:image/png") == len(figures) // 2
    )
    text = (tmp_path / "tables.md").read_text()
    rows = []
    for path in glob.glob(os.path.join(ROOT, study, "seed=?,actor_bc_coef=0.1,validation*", "evaluations.csv")):
        with open(path, newline="") as file:
            rows.append(list(csv.DictReader(file))[-1])
    values = np.array([[float(row[key]) for key in ("train/dead_neurons", "evaluation/dead_neurons")] for row in rows])
    halves = stats.t.ppf(0.975, 4) * values.std(0, ddof=1) / np.sqrt(5)
    assert "| none | {:.3f} ± {:.3f} | {:.3f} ± {:.3f} |".format(*np.stack([values.mean(0), halves], 1).ravel()) in text
    scores = [float(row["score"]) for row in rows]
    assert f"| none | {np.mean(scores):.1f} ± {np.std(scores):.1f} |" in text and len(scores) == 5
    assert (tmp_path / "tables.tex").read_text().count(r"\begin{table}") == text.count("\n### ")
    assert Config().results in (["results"], ["data/study"])


def test_a_wandb_project_gives_the_same_report(make_run, tmp_path, monkeypatch):
    for seed, score in enumerate((40, 50)):
        make_run([[1, score]], seed=seed)
        make_run([[1, score + 3]], seed=seed, actor_ln=True)
    make_run([[1, 60], [1, 70]], seed=0, actor_fn=True)  # two seeds in a run
    make_run([[1, 60]], seed=5, finished=False)
    expected = tables([str(tmp_path / "results")], monkeypatch, tmp_path)
    with Server() as server:
        for key in ("WANDB_BASE_URL", "WANDB_API_KEY"):
            monkeypatch.setenv(key, {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": 40 * "k"}[key])
        for i, path in enumerate(sorted(glob.glob(str(tmp_path / "results" / "*" / "*" / "*")))):
            config = yaml.safe_load(open(os.path.join(path, "config.yaml"))) | dict(algorithm="rebrac")
            history = []
            with open(os.path.join(path, "evaluations.csv")) as file:  # as runs.WandB sends them
                for update, rows in itertools.groupby(csv.DictReader(file), lambda row: int(row["update"])):
                    rows = [{k: float(v) for k, v in row.items() if k != "update"} for row in rows]
                    row = {k: np.mean([one[k] for one in rows]) for k in rows[0] if k != "seed"}
                    if len(rows) > 1:
                        row |= {f"seed{one['seed']:.0f}/{k}": one[k] for one in rows for k in one if k != "seed"}
                    history += [json.dumps({"_step": update - 500, "q": 1.0}), json.dumps({"_step": update, **row})]
            server.runs[f"run{i}"] = dict(
                config={k: dict(value=v) for k, v in config.items()}, history=history, state="running",
                exit=0 if os.path.exists(os.path.join(path, "finished.json")) else None, started=True,
            )  # fmt: skip
        server.runs["other"] = dict(config={}, history=[], state="crashed", exit=1, started=True)
        wandb.teardown()  # which keeps its server's address
        found = tables([], monkeypatch, tmp_path, wandb="team/project")
        wandb.teardown()
    assert found == expected
    assert "it is no run of this project" in (tmp_path / "report" / "index.html").read_text()
