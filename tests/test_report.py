"""The report: what it reads and leaves out, its numbers, and the files that it writes.

Numbers are held against rliable's, and against those that are worked out by hand.
"""

import dataclasses
import errno
import glob
import itertools
import json
import os
import re
import subprocess
import sys
import types

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import wandb
import yaml
from conftest import ROOT
from rliable import library, metrics
from scipy import stats
from statsmodels.stats.multitest import multipletests
from wandb_server import Server

import cql
import iql
import rebrac
from harness.directory import read_fields, run_directory, saved_fields
from harness.environments import registered_names
from harness.errors import UserError
from harness.scripts import scripts
from harness.tables import Tables
from harness.wandb_log import WandB
from tools import report, report_figures, report_runs, report_shares, report_tables
from tools.report import MOST_DRAWN, Config, Report
from tools.report_tables import Table
from tools.results import write_results

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # such as the mean of nothing

SCRIPTS = {"rebrac": rebrac, "iql": iql}
HOPPER = "hopper-medium-v2"
WALKER = "walker2d-medium-v2"
MAZE = "antmaze-umaze-v2"
PEN = "pen-human-v1"
COLUMNS = ["score", "score/action_noise=0.2", "train/dead_neurons"]
COLUMNS += ["train/action_error", "validation/action_error", "plasticity/loss_left"]


@pytest.fixture
def make_run(tmp_path):
    """Write a run's directory, with a list of scores for each seed; return its path."""

    def make(scores, algorithm="rebrac", finished=True, folder="results", **flags):
        script = SCRIPTS[algorithm]
        length = 1000 * len(scores[0])
        flags = {"dataset_name": HOPPER, "num_updates": length, "eval_every": 1000, **flags}
        flags["results"] = str(tmp_path / folder)
        config = script.tuned(script.Config(**flags, num_seeds=len(scores)))
        path = run_directory(algorithm, config, script.tuned)
        os.makedirs(path)
        with open(os.path.join(path, "config.yaml"), "w") as file:
            yaml.safe_dump(saved_fields(vars(config)), file)
        tables = Tables(path)
        for i in range(len(scores[0])):
            rows = []
            for seed, own in enumerate(scores, config.seed):
                values = dict(zip(COLUMNS, [own[i], own[i] - 1, 0.1, 0.5, 0.6, 0.2], strict=True))
                rows.append({"seed": seed, "update": 1000 * (i + 1), **values})
            tables.append("evaluations.csv", rows)
        tables.files["evaluations.csv"].close()
        if finished:
            with open(os.path.join(path, "finished.json"), "w") as file:
                about = {"updates": config.num_updates, "seconds": {"train": 2.5}}
                about["made_with"] = ["1a2b3c4d; jax 0; cpu", "5e6f7a8b; jax 0; cpu"]
                json.dump(about, file)
        return path

    return make


@pytest.fixture
def make_report(tmp_path, monkeypatch):
    """Make a report of folders in tmp_path, without drawing; return its tables' cells by title."""

    def draw(figure, path, **_):
        open(path, "w").close()

    def make(*folders, **options):
        found = {}
        add_table = Report.add_table

        def keep_table(self, table):
            found[table.title] = table.cells
            add_table(self, table)

        with monkeypatch.context() as patch:
            patch.setattr(Report, "add_table", keep_table)
            patch.setattr("matplotlib.figure.Figure.savefig", draw)
            results = [str(tmp_path / folder) for folder in folders]
            config = Config(results=results, output=str(tmp_path / "report"), reps=50, **options)
            report.main(config)
        return found

    return make


def rows_of(cells):
    """Return a table's cells as lists that begin with the label."""
    return cells.reset_index().to_numpy().tolist()


def bracketed(mean, half):
    return f"{mean:.1f} ({mean - half:.1f} – {mean + half:.1f})"


def make_rows(scores):
    """Return what the tables are made of, from {label: {dataset: {seed: score}}}."""
    rows = []
    for label, datasets in scores.items():
        for dataset, seeds in datasets.items():
            for seed, score in seeds.items():
                rows.append({"label": label, "dataset": dataset, "seed": seed, "final": score})
    rows = pd.DataFrame(rows)
    return rows.assign(label=pd.Categorical(rows["label"], list(scores), ordered=True))


# --- What it reads ---


@pytest.mark.parametrize(
    "algorithm, flags, settings, labels",
    [
        ("rebrac", {}, (), ("baseline",)),
        ("rebrac", dict(actor_ln=True, actor_dropout=0.1), (), ("DO+LN",)),
        ("rebrac", dict(actor_dropout=0.3), (), ("DO(0.3)",)),
        ("rebrac", dict(actor_wd=1e-4, actor_l1_ratio=0.5), (), ("EN",)),
        ("rebrac", dict(regularisers="SAM"), (), ("SAM",)),
        ("cql", dict(actor_sam=0.1, actor_dropout=0.1, actor_rms=True), (), ("DO+RMS+SAM(0.1)",)),
        ("rebrac", dict(actor_wd=1.0), (), ("L2(1)",)),
        ("rebrac", dict(actor_wd=1.0, actor_l1_ratio=1.0), (), ("L1(1)",)),
        ("rebrac", dict(actor_wd=2, actor_l1_ratio=0.3), (), ("actor_wd actor_l1_ratio=0.3(2)",)),
        ("rebrac", dict(actor_wd=0.01), (), ("L2(0.01)", "best-L2")),
        ("rebrac", dict(regularisers="DO+LN+GrN"), (), ("DO+LN+GrN",)),
        (
            "rebrac",
            dict(actor_dropout=0.1, actor_ln=True, actor_grad_noise=0.01),
            (),
            ("DO+LN+GrN(0.01)",),
        ),
        (
            "rebrac",
            dict(preset="as-run"),
            (("clip_targets", "False"),),
            ("DO(0.2)+LN+GrN(0.01)", "best", "as-run"),
        ),
        ("rebrac", dict(preset="as-run-none"), (("clip_targets", "False"),), ("baseline",)),
        (
            "rebrac",
            dict(preset="as-run", dataset_name=PEN),
            (("clip_targets", "False"),),
            ("as-run",),
        ),
        (
            "rebrac",
            dict(preset="batch-1024", dataset_name=PEN),
            (
                ("actor_learning_rate", "0.001"),
                ("batch_size", "1024"),
                ("critic_learning_rate", "0.001"),
            ),
            ("baseline",),
        ),
        (
            "iql",
            dict(preset="as-run"),
            (("normalize_reward", "False"),),
            ("DO(0.2)+L2(0.01)", "as-run"),
        ),
        (
            "rebrac",
            dict(preset="as-run", critic_ln=False),
            (("clip_targets", "False"),),
            ("DO(0.2)+LN+GrN(0.01)+critic_ln=False",),
        ),
        ("rebrac", dict(regularisers="best"), (), ("DO(0.2)+LN+GrN(0.01)", "best")),
        (
            "rebrac",
            dict(regularisers="LN", actor_lr_decay="cosine"),
            (),
            ("LN+actor_lr_decay=cosine",),
        ),
        ("rebrac", dict(critic_ln=False), (), ("critic_ln=False",)),
        ("rebrac", dict(batch_size=32, seed=3, actor_gn=True), (("batch_size", "32"),), ("GN",)),
        ("rebrac", dict(critic_loss="mse"), (("critic_loss", "mse"),), ("baseline",)),
        (
            "iql",
            dict(actor_wd=0.01, actor_l1_ratio=1.0, temperature=2.0),
            (("temperature", "2.0"),),
            ("L1", "best-L1"),
        ),
        ("iql", dict(dataset_name="mine-v2"), (), ("baseline",)),  # which isn't the paper's
        ("iql", dict(dataset_name=PEN), (), ("baseline", "DO")),
        ("iql", dict(dataset_name=PEN, actor_ln=True), (), ("LN", "DO+LN")),
        ("iql", dict(dataset_name=PEN, actor_ln=True, actor_dropout=0.0), (), ("LN (no DO)",)),
        ("rebrac", dict(preset="td3-bc"), (("critic_loss", "mse"),), ("td3-bc",)),
        ("rebrac", dict(dataset_name="mine-v2"), (), ("baseline",)),
        ("bcq", dict(regularisers="GN"), (), ("GN",)),
        (
            "bcq",
            dict(regularisers="GN", regularise="both"),
            (("regularise", "both"),),
            ("GN",),
        ),
        ("bcq", dict(critic_gn=True), (), ("critic_gn=True",)),
        ("bcq", dict(vae_hidden_dim=8), (("vae_hidden_dim", "8"),), ("baseline",)),
        (
            "bcq",
            dict(regularise="decoder", regularisers="DO"),
            (("regularise", "decoder"),),
            ("DO",),
        ),
    ],
)
def test_runs_are_named_after_their_regularisers(algorithm, flags, settings, labels):
    script = scripts()[algorithm]
    config = script.tuned(script.Config(**{"dataset_name": HOPPER, **flags}))
    about = report_runs.describe(algorithm, saved_fields(vars(config)))
    assert about["dataset"] == flags.get("dataset_name", HOPPER)
    assert about["settings"] == settings
    assert about["labels"] == labels


def test_a_regulariser_that_only_iql_has_labels_its_runs(monkeypatch):
    config_class = dataclasses.make_dataclass(
        "Config",
        [("actor_of_a_fork", bool, False), ("weight_noise", float, 0.0)],
        bases=(iql.Config,),
        frozen=True,
    )
    script = types.ModuleType("iql")
    vars(script).update(vars(iql), Config=config_class)
    own = {"OFN": {"actor_of_a_fork": True}, "WN": {"weight_noise": 0.2}}
    script.CHOSEN = {**iql.CHOSEN, **own}
    monkeypatch.setitem(sys.modules, "iql", script)
    for flags, label in (
        (dict(actor_of_a_fork=True), "OFN"),
        (dict(actor_of_a_fork=True, actor_ln=True, weight_noise=0.2), "LN+OFN+WN"),
        (dict(weight_noise=0.5), "WN(0.5)"),
    ):
        config = script.tuned(config_class(dataset_name=HOPPER, **flags))
        about = report_runs.describe("iql", saved_fields(vars(config)))
        assert about["labels"] == (label,)
        assert about["settings"] == ()
    assert report_runs.label_key(script, "LN") < report_runs.label_key(script, "OFN")
    assert report_runs.label_key(script, "OFN") < report_runs.label_key(script, "DO+OFN")


@pytest.mark.parametrize(
    "path, name",
    [("a/hopper_medium-v2.hdf5", HOPPER), ("a/mine.hdf5", f"{HOPPER} (mine.hdf5)")],
)
def test_another_file_is_another_dataset(path, name):
    config = iql.tuned(iql.Config(dataset_name=HOPPER, dataset_path=path))
    assert report_runs.describe("iql", saved_fields(vars(config)))["dataset"] == name


def test_datasets_of_one_name_are_told_apart_by_their_files(make_run, tmp_path):
    same, other = "1" * 64, "2" * 64
    make_run([[1, 40]], dataset_name=HOPPER, dataset_sha256=same)
    make_run([[1, 40]], dataset_name=HOPPER, dataset_sha256=same, dataset_path="m.h5", seed=1)
    make_run([[1, 40]], dataset_name=PEN, dataset_sha256=same)

    def labels():
        seeds, left_out = report_runs.read_results([str(tmp_path / "results")])
        assert left_out == []
        return sorted({seed["dataset"] for seed in seeds})

    assert labels() == [HOPPER, PEN]
    make_run([[1, 60]], dataset_name=HOPPER, dataset_sha256=other)
    make_run([[1, 60]], dataset_name=HOPPER)  # of a version that kept no checksum
    names = ["11111111", "22222222", "unknown file"]
    assert labels() == [*(f"{HOPPER} [{name}]" for name in names), PEN]


def test_runs_are_compared_with_those_of_the_same_settings(make_run, make_report, tmp_path):
    for seed in (0, 1):
        make_run([[1, 40]], seed=seed, batch_size=256, critic_loss="mse")
        make_run([[1, 80]], seed=seed, dataset_name=PEN, critic_loss="mse")  # 256 in the paper
        make_run([[1, 60]], seed=seed, dataset_name=PEN, algorithm="iql")
    folder = str(tmp_path / "results")
    seeds = pd.DataFrame(report_runs.read_results([folder])[0])
    ((settings, group),) = report_runs.by_settings(seeds)
    common = (("critic_loss", "mse"), ("eval_every", "1000"), ("num_updates", "2000"))
    assert settings == (("batch_size", "256"), *common)
    assert len(group) == 6
    cells = make_report("results")["ReBRAC, all domains: aggregates"]
    assert cells["mean"].tolist() == ["60.0 (60.0 – 60.0)"]

    make_run([[1, 50]], critic_loss="mse")  # at the paper's batch size, 1024
    seeds = pd.DataFrame(report_runs.read_results([folder])[0])
    (_, large), (settings, small) = report_runs.by_settings(seeds)
    assert len(large) == 6
    assert settings == common
    assert sorted(scores[-1] for scores in small["scores"]) == [50, 60, 60, 80, 80]


def test_missing_unfinished_and_failed_runs_are_shown_as_such(make_run, make_report, tmp_path):
    for seed, score in enumerate([40, 50, 60]):
        make_run([[1, score]], seed=seed)
    for seed, score in enumerate([70, 71]):
        make_run([[1, score]], seed=seed, actor_ln=True)
    failed = make_run([[1, 99]], seed=2, actor_ln=True, finished=False)
    with open(os.path.join(failed, "failed.txt"), "w") as file:
        file.write("error: q is nan\n")
    unfinished = make_run([[5, 5]], seed=0, dataset_name=WALKER, finished=False)
    with open(os.path.join(unfinished, "train.csv"), "w") as file:
        file.write("seed,update,q\n0,1000,1.0\n0,20")
    found = make_report("results")
    cells = found["ReBRAC, Gym-MuJoCo: scores"]
    assert list(cells) == [HOPPER, WALKER, "mean"]
    assert rows_of(cells) == [
        ["baseline", "50.0 ± 8.2", "1 unfinished", "incomplete"],
        ["LN", "70.5 ± 0.5 (2/3, 1 failed)", "missing", "incomplete"],
    ]
    page = (tmp_path / "report" / "index.html").read_text()
    assert "failed: error: q is nan" in page
    assert "not finished: at update 1,000 of 2,000" in page
    assert "ReBRAC, Gym-MuJoCo: aggregates" not in found  # walker2d has no finished run


def write(text):
    """Return a change of a file's text."""
    return lambda old: text


def replace(old, new):
    def change(text):
        assert old in text
        return text.replace(old, new)

    return change


def cut(text):
    return text[:-10]


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("config.yaml", write(""), "is not the config of a run"),
        ("config.yaml", write("a: ["), "is not the config of a run"),
        ("config.yaml", replace("seed: 0", "seed: 7"), "its last evaluation is missing"),
        ("config.yaml", replace("num_seeds: 1", "num_seeds: x"), "it is damaged: TypeError"),
        ("evaluations.csv", cut, "it is damaged: TypeError"),
        ("evaluations.csv", replace("0,1000,1,", "0,1000,"), "it is damaged: TypeError"),
        ("evaluations.csv", write(""), "its last evaluation is missing"),
        ("evaluations.csv", None, "its last evaluation is missing"),
        ("evaluations.csv", write("\udcff\udc80\x00\x01\n"), "it is damaged: UnicodeDecodeError"),
        ("evaluations.csv", replace("0,2000,40", "0,2000,nan"), "its scores are not finite"),
        ("evaluations.csv", replace("0,2000,40", "0,1000,40"), "its last evaluation is missing"),
        ("evaluations.csv", replace("0,1000,1", "0,3000,1"), "its updates out of order"),
        ("evaluations.csv", replace("0,2000,40", "0,2000,forty"), "it is damaged: ValueError"),
        ("evaluations.csv", replace("score,", "scores,"), "it is damaged: KeyError"),
    ],
)
def test_damaged_runs_are_left_out_with_the_reason(
    make_run, make_report, capsys, name, change, reason
):
    path = make_run([[1, 40]], seed=0)
    make_run([[1, 60]], seed=1)
    file = os.path.join(path, name)
    if change is None:
        os.remove(file)
    else:
        with open(file) as old:
            text = change(old.read())
        with open(file, "w", errors="surrogateescape") as new:
            new.write(text)
    cells = make_report("results")["ReBRAC, Gym-MuJoCo: scores"]
    assert rows_of(cells) == [["baseline", "60.0"]]
    output = capsys.readouterr().out
    assert "1 finished seeds; left out: 1" in output
    assert re.search(f"left out: {re.escape(path)}: .*{reason}", output)


def test_a_folder_that_can_not_be_read_is_left_out_with_the_reason(make_run, tmp_path, monkeypatch):
    path = make_run([[1, 40]], seed=0)
    folder = str(tmp_path / "results" / "secret")
    os.mkdir(folder)
    scandir = os.scandir

    def refuse(path):
        if path == folder:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    seeds, left_out = report_runs.read_results([str(tmp_path / "results")])
    assert [seed["run"] for seed in seeds] == [path]
    assert left_out == [(folder, "it can't be read (Permission denied)")]


def test_a_column_of_text_is_named(make_run, tmp_path):
    make_run([[1, 40]], seed=0)
    seeds, _ = report_runs.read_results([str(tmp_path / "results")])
    path = str(tmp_path / "mine.csv")
    write_results(path, seeds)
    frame = pd.read_csv(path)
    frame.assign(note="try again").to_csv(path, index=False)
    _, left_out = report_runs.read_results([path])
    assert left_out[0][1] == "its column 'note' has 'try again', which is no number"


def test_a_mean_is_of_the_seeds_that_have_all_datasets(make_run, make_report):
    """As the table of differences has it."""
    for seed, score in enumerate([10, 20, 90]):
        make_run([[1, score]], seed=seed)
        make_run([[1, score]], seed=seed, dataset_name=WALKER, finished=seed < 2)
    cells = make_report("results")["ReBRAC, Gym-MuJoCo: scores"]
    assert list(cells["mean"]) == ["15.0"]


def test_validation_seed_is_no_setting_where_nothing_is_held_out(make_run, tmp_path):
    paths = [make_run([[1.0, 50]], seed=0, validation_seed=number) for number in (None, 1)]
    assert paths[0] != paths[1]
    seeds, left_out = report_runs.read_results([str(tmp_path / "results")])
    assert len(seeds) == len(left_out) == 1
    assert seeds[0]["settings"] == (("eval_every", "1000"), ("num_updates", "2000"))
    make_run([[1.0, 50]], seed=0, validation_seed=1, validation_frac=0.5)
    seeds, _ = report_runs.read_results([str(tmp_path / "results")])
    assert ("validation_seed", "1") in seeds[1]["settings"]


def test_the_baseline_is_a_row_even_if_all_its_runs_have_another_label(make_run, tmp_path):
    """IQL's on Adroit is also DO's."""
    make_run([[1.0, 50]], "iql", dataset_name=PEN)
    make_run([[1.0, 50]], "iql", actor_dropout=0.1)
    make_run([[1.0, 50]], "iql", dataset_name=PEN, actor_ln=True)
    seeds, _ = report_runs.read_results([str(tmp_path / "results")])
    rows = report_runs.by_label(pd.DataFrame(seeds))
    assert list(rows["label"].cat.categories) == ["baseline", "DO", "LN"]


def test_a_row_that_is_being_written_does_not_hide_a_run(make_run):
    path = make_run([[1, 40]], finished=False)
    table = os.path.join(path, "evaluations.csv")
    os.truncate(table, os.path.getsize(table) - 10)
    (seed,), reason = report_runs.read_directory(path)
    assert seed["state"] == "unfinished"
    assert reason.startswith("not finished: ")


def test_every_cut_of_a_table_is_survived(make_run):
    path = make_run([[1, 40]])
    table = os.path.join(path, "evaluations.csv")
    with open(table, "rb") as file:
        whole = file.read()
    for size in range(len(whole) - 2):
        with open(table, "wb") as file:
            file.write(whole[:size])
        seeds, left_out = report_runs.read_all({path: path}, report_runs.read_directory)
        assert len(seeds) + len(left_out) == 1
        for seed in seeds:
            assert seed["scores"][-1] == 40  # only the last number of the last row was cut


def test_twice_the_same_run_counts_once(make_run, tmp_path):
    make_run([[1, 40]], folder="a")
    make_run([[1, 40]], folder="b")
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    seeds, ((_, reason),) = report_runs.read_results(folders)
    assert len(seeds) == 1
    assert reason == "another run has its seed 0, too"
    assert len(report_runs.read_results(folders[:1] * 2)[0]) == 1


def test_a_finished_row_takes_the_place_of_one_that_is_not(make_run, make_report, tmp_path):
    """As of a table to which an older one of the same run was added."""
    make_run([[1, 40]])
    make_run([[1, 30]], seed=1)
    table = str(tmp_path / "table.csv")
    make_report("results", csv=table)
    rows = pd.read_csv(table, dtype=str, keep_default_na=False)
    older = rows.assign(state="unfinished", score="10")
    pd.concat([rows, older]).to_csv(table, index=False)
    seeds, left_out = report_runs.read_results([table])
    assert sorted(seed["score"] for seed in seeds) == [30, 40]
    assert [name.split(", ")[-1] for name, _ in left_out] == ["row 4", "row 5"]


def test_a_finished_run_takes_the_place_of_one_that_is_not(make_run, tmp_path):
    make_run([[1, 30]], folder="a", finished=False)
    make_run([[1, 40]], folder="b")
    seeds, left_out = report_runs.read_results([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [seed["state"] for seed in seeds] == ["finished"]
    assert len(left_out) == 1


def test_seeds_that_were_trained_together_count_like_others(make_run, make_report):
    for seed, score in enumerate([40, 50, 60]):
        make_run([[1, score]], seed=seed, folder="apart")
    make_run([[1, 40], [1, 50], [1, 60]], folder="together")
    apart = make_report("apart")
    together = make_report("together")
    assert list(apart) == list(together)
    for title, cells in apart.items():
        pd.testing.assert_frame_equal(cells, together[title])
    assert rows_of(apart["ReBRAC, Gym-MuJoCo: scores"]) == [["baseline", "50.0 ± 8.2"]]


def test_the_best_of_each_dataset_is_one_row(make_run, make_report):
    for name, score in ((HOPPER, 50), (WALKER, 60)):
        for seed in (0, 1):
            make_run([[1, score]], seed=seed, dataset_name=name)
            make_run([[1, score + 5]], seed=seed, dataset_name=name, regularisers="best")
    assert rows_of(make_report("results")["ReBRAC, Gym-MuJoCo: scores"]) == [
        ["baseline", "50.0 ± 0.0", "60.0 ± 0.0", "55.0"],
        ["best", "55.0 ± 0.0", "65.0 ± 0.0", "60.0"],
    ]


def test_a_row_whose_runs_are_all_in_another_is_left_out(make_run, make_report):
    for seed in (0, 1):
        for flags in ({}, dict(actor_ln=True), dict(regularisers="DO+LN+EN")):
            make_run([[1, 50]], seed=seed, algorithm="iql", **flags)
            make_run([[1, 50]], seed=seed, algorithm="iql", dataset_name=PEN, **flags)  # has DO
        make_run([[1, 50]], seed=seed, regularisers="best")
        make_run([[1, 60]], seed=seed, regularisers="best", dataset_name=WALKER)
        make_run([[1, 40]], seed=seed, actor_ln=True)  # is no tuned one
        make_run([[1, 40]], seed=seed, folder="single", regularisers="best")
    found = make_report("results")
    assert list(found["IQL, Adroit: scores"].index) == ["baseline", "LN", "DO+LN+EN"]
    assert list(found["ReBRAC, Gym-MuJoCo: scores"].index) == ["LN", "best"]
    found = make_report("single")
    assert list(found["ReBRAC, Gym-MuJoCo: scores"].index) == ["DO(0.2)+LN+GrN(0.01)"]


def test_what_an_algorithm_does_not_watch_is_not_in_its_table(make_run, make_report):
    for seed in (0, 1):
        make_run([[1, 50]], seed=seed)
        table = os.path.join(make_run([[1, 50]], seed=seed, algorithm="iql"), "evaluations.csv")
        with open(table) as file:
            text = file.read().replace("train/dead_neurons", "train/pca_rank")
        with open(table, "w") as file:
            file.write(text)
    found = make_report("results")
    assert list(found["ReBRAC: inside the actor"])[0] == "dead neurons (share, training data)"
    assert list(found["IQL: inside the actor"])[0] == "PCA rank (training data)"
    assert len(found["IQL: inside the actor"].columns) == 8


def test_the_papers_ratios_stand_beside_what_they_are_made_of(make_run, make_report):
    for seed, score in enumerate((50, 20)):
        make_run([[1, score]], seed=seed)
    cells = make_report("results")["ReBRAC: inside the actor"].loc["baseline"]
    assert cells["action error: held-out / training"] == "1.200 ± 0.000"  # 0.6 / 0.5
    assert cells["plasticity (share of the loss that is left)"] == "0.200 ± 0.000"
    shares = np.array([49 / 50, 19 / 20])
    text = f"{shares.mean():.2f} ± {shares.std():.2f}"
    assert cells["action noise=0.2: share of the score"] == text


def test_other_peoples_scores_stand_in_a_section_of_their_own(make_run, make_report, tmp_path):
    make_run([[1, 50]])
    path = str(tmp_path / "published.csv")
    rows = [("CORL", "IQL", HOPPER, 67.53, 3.78), ("CORL", "IQL", PEN, 78.49, 8.21)]
    columns = ["source", "algorithm", "dataset_name", "mean", "std"]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    cells = make_report("results", beside=path)["Gym-MuJoCo"]
    assert cells.to_dict() == {HOPPER: {"CORL: IQL": "67.5 ± 3.8"}}
    text = (tmp_path / "report" / "tables.md").read_text()
    assert text.index("## Other people's scores") < text.index("67.5 ± 3.8")
    assert "Not trained here." in text


def test_a_score_without_a_std_is_shown_without_one():
    columns = ["source", "algorithm", "dataset_name", "mean", "std"]
    rows = [["A", "IQL", HOPPER, 67.5, np.nan], ["A", "CQL", HOPPER, 59.1, 3.8]]
    table = report_tables.published_table("", pd.DataFrame(rows, columns=columns), [HOPPER])
    assert list(table.cells[HOPPER]) == ["67.5", "59.1 ± 3.8"]


def test_a_wrong_table_of_other_peoples_scores_is_an_error_before_any_work(make_report, tmp_path):
    header = "source,algorithm,dataset_name,mean,std\n"
    row = f"CORL,IQL,{HOPPER},67.5,3.8\n"
    path = tmp_path / "a.csv"
    for text, message in (
        (None, "can't read"),
        ("source,mean\nCORL,1\n", "needs the columns"),
        (header + row.replace("67.5", "many"), "a mean or a std is no number"),
        (header + row + row, "two scores of one algorithm on one dataset"),
        (header + row.replace("67.5", ""), "a mean is missing"),
    ):
        if text is not None:
            path.write_text(text)
        with pytest.raises(UserError, match=message):
            make_report("results", beside=str(path))


def test_the_published_scores_are_corls_and_of_known_datasets():
    published = pd.read_csv(os.path.join(ROOT, "data", "corl.csv"))
    names = published["dataset_name"].unique()
    assert set(published["source"]) == {"CORL"}
    assert set(names) <= set(registered_names())
    assert len(published) == 4 * len(names) == 4 * 30
    score = published.set_index(["algorithm", "dataset_name"])["mean"]
    assert score["IQL", "antmaze-umaze-v2"] == 77.0
    assert score["ReBRAC", HOPPER] == 102.29


def test_nothing_to_report_is_one_clear_line(tmp_path):
    for flags, message in (
        (dict(results=[str(tmp_path / "none")]), "there is no directory"),
        (dict(results=[__file__]), "is neither a directory of runs nor a .csv table"),
        (dict(results=[str(tmp_path)]), "there is no finished run"),
        (dict(final="best"), "final must be last or mean"),
    ):
        with pytest.raises(UserError, match=message):
            report.main(Config(output=str(tmp_path / "report"), **flags))


# --- Numbers ---


@pytest.mark.parametrize("dataset, number", [(HOPPER, 10), (MAZE, 5)])
def test_final_scores(make_run, dataset, number):
    scores = [float(i) for i in range(20)]
    (seed,), _ = report_runs.read_directory(make_run([scores], dataset_name=dataset))
    assert report.final_score(seed, "mean") == np.mean(scores[-number:])
    assert report.final_score(seed, "last") == 19


def rliables_interval(function, scores):
    """Return rliable's own estimate and 95 % interval of one number."""
    np.random.seed(0)  # noqa: NPY002
    points, intervals = library.get_interval_estimates(
        {"": scores}, lambda *scores: np.array([function(*scores)]), reps=300
    )
    return [points[""][0], *intervals[""][:, 0]]


def test_aggregates_and_intervals_are_rliables():
    rng = np.random.default_rng(0)
    scores = rng.normal(0.6, 0.2, (5, 4))
    found = report_tables.estimate({"x": scores}, 300).set_index("measure")
    for measure, function in (
        ("IQM", metrics.aggregate_iqm),
        ("median", metrics.aggregate_median),
        ("mean", metrics.aggregate_mean),
        ("optimality gap", metrics.aggregate_optimality_gap),
    ):
        ours = found.loc[measure, ["point", "low", "high"]].astype(float)
        expected = rliables_interval(function, scores)
        np.testing.assert_allclose(ours, 100 * np.array(expected), rtol=1e-12)


def test_several_labels_are_estimated_at_once():
    rng = np.random.default_rng(0)
    scores = rng.normal(0.6, 0.2, (5, 4, 2))
    found = report_tables.aggregates(scores)
    assert found.shape == (4, 2)
    for i in range(2):
        iqm = metrics.aggregate_iqm(scores[:, :, i])
        np.testing.assert_allclose(found[0, i], 100 * iqm, rtol=1e-12)
        np.testing.assert_allclose(found[:, i], report_tables.aggregates(scores[:, :, [i]])[:, 0])


def test_the_probability_of_improvement_is_rliables():
    rng = np.random.default_rng(0)
    better = rng.normal(0.6, 0.2, (5, 4))
    none = rng.normal(0.5, 0.2, (3, 4))
    none[0] = better[0]  # ties
    found = report_tables.estimate({"baseline": none, "L2": better}, 300)
    ours = found[found["measure"] == report_tables.PROBABILITY]
    assert list(ours["label"]) == ["L2"]
    expected = rliables_interval(metrics.probability_of_improvement, [better, none])
    np.testing.assert_allclose(ours[["point", "low", "high"]].to_numpy()[0], expected, atol=1e-12)


def test_aggregates_by_hand():
    scores = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 1.2]])
    found = report_tables.aggregates(scores[:, :, None])[:, 0]
    np.testing.assert_allclose(found, [45, 50, 50, 100 * (1 - 3.8 / 8)])


def test_expected_online_performance_is_that_of_all_draws_with_replacement():
    scores = np.array([3.0, 1.0, 7.0, 7.0, 2.0])
    expected = []
    for n in range(1, 6):
        expected.append(np.mean([max(some) for some in itertools.product(scores, repeat=n)]))
    np.testing.assert_allclose(report_tables.expected_online_performance(scores), expected)


def test_seeds_that_miss_a_dataset_are_not_aggregated():
    scores = {"a": {0: 10.0, 1: 20.0, 2: 30.0}, "b": {2: 60.0, 0: 40.0}}
    rows = make_rows({"baseline": scores})
    found = report_tables.score_arrays(rows, ["a", "b"])["baseline"]
    np.testing.assert_allclose(found, [[0.1, 0.4], [0.3, 0.6]])
    assert report_tables.score_arrays(rows, ["a", "b", "c"]) == {}
    means, halves = report_tables.mean_and_interval(
        report_tables.by_seed(rows, "final", ["a", "b"])
    )
    assert means["baseline"] == 35
    assert halves["baseline"] == pytest.approx(12.706 * 10, rel=1e-4)  # of 25 and 45, t of 1 degree
    one = report_tables.by_seed(rows[rows["seed"] == 0], "final", ["a", "b"])
    assert report_tables.mean_and_interval(one)[1].isna().all()


def test_curves_need_two_evaluations(make_run):
    def draw(*scores):
        seeds = []
        for seed, own in enumerate(scores):
            seeds += report_runs.read_directory(make_run([own], seed=seed))[0]
        rows = report_runs.by_label(pd.DataFrame(seeds))
        return report_figures.learning_curves(rows, ["baseline"], [HOPPER])

    assert draw([1.0], [2.0]) is None
    axis = draw([1.0, 5.0], [2.0, 8.0]).axes[0]
    (line,) = axis.lines
    np.testing.assert_allclose(line.get_xydata(), [[1, 1.5], [2, 6.5]])
    (band,) = axis.collections
    _, y = band.get_paths()[0].vertices.T
    assert (y.min(), y.max()) == (1.0, 8.0)  # the mean and one standard deviation


def test_improvements_are_in_percent_of_the_baselines_mean():
    none = {"a": {0: 20.0, 1: 40.0}, "b": {0: 80.0, 1: 60.0}}  # 50 and 50
    l2 = {"a": {0: 30.0, 1: 50.0}, "b": {0: 82.0, 1: 66.0}}  # 6 and 8 more
    rows = make_rows({"baseline": none, "L2": l2, "DO": none, "LN": {"a": {0: 1.0}}})
    same = rows["label"].isin(["baseline", "DO"])
    rows.index = np.where(same, rows.groupby("label").cumcount(), 100 + np.arange(len(rows)))
    (found,) = report_tables.improvements(rows, ["a", "b"]).itertuples(index=False)
    half = 12.7062 * 2  # of 12 % and 16 %, t of 1 degree
    assert found.label == "L2"
    np.testing.assert_allclose(
        [found.point, found.low, found.high], [14, 14 - half, 14 + half], 1e-4
    )
    cells = report_tables.difference_table("", rows, {"mean": ["a", "b"]}).cells
    text = f"+14.0 % ({14 - half:+.1f} – {14 + half:+.1f})"
    assert cells["mean, in percent"].to_dict() == {"baseline": "", "L2": text, "DO": "", "LN": ""}


@pytest.mark.parametrize("scores", [(-1.0, 1.0), (50.0, 60.0)])
def test_percents_mean_nothing_where_the_baselines_interval_includes_0(scores):
    none = {"a": dict(enumerate(scores))}
    rows = make_rows({"baseline": none, "L2": {"a": {0: 5.0, 1: 6.0}}})
    assert report_tables.improvements(rows, ["a"]).empty
    assert list(report_tables.difference_table("", rows, {"a": ["a"]}).cells) == ["a", "p, a"]


def test_differences_are_taken_seed_by_seed():
    t = 3.182446  # a table's, of 3 degrees of freedom
    l2 = {"a": {4: 41.0, 3: 39.0, 2: 36.0, 1: 33.0, 0: 30.0}, "b": {0: 56, 1: 58, 2: 62, 3: 60}}
    none = {"a": {0: 28.0, 1: 29.0, 2: 31.0, 3: 30.0}, "b": l2["b"]}
    ln = {"a": {0: 27.0, 1: 28.0, 2: 30.0, 3: 29.0}}
    rows = make_rows({"baseline": none, "L2": l2, "LN": ln})
    shared = rows[(rows["label"] == "L2") & (rows["dataset"] == "b")]
    index = rows.index.to_numpy().copy()
    index[shared.index] = rows.index[(rows["label"] == "baseline") & (rows["dataset"] == "b")]
    rows.index = index  # L2's runs on b are none's
    columns = {"a": ["a"], "b": ["b"], "mean": ["a", "b"]}
    cells = report_tables.difference_table("", rows, columns).cells
    assert list(cells) == ["a", "p, a", "b", "p, b", "mean", "p, mean", "mean, in percent"]
    cells = cells[["a", "b", "mean"]]
    half = t * np.std([2, 4, 5, 9], ddof=1) / 2
    own = t * np.std([28, 29, 31, 30], ddof=1) / 2
    mean = f"**+2.5 (+{2.5 - half / 2:.1f} – +{2.5 + half / 2:.1f})**"
    assert rows_of(cells) == [
        ["baseline", bracketed(29.5, own), bracketed(59, 2 * own), bracketed(44.25, 1.5 * own)],
        ["L2", f"**+5.0 (+{5 - half:.1f} – +{5 + half:.1f})**", "the same runs", mean],
        ["LN", "-1.0 (no spread)", "incomplete", "incomplete"],
    ]
    rows.loc[(rows["label"] == "L2") & (rows["final"] == 30), "final"] = 24.0  # -4, 4, 5, 9
    cells = report_tables.difference_table("", rows, {"a": ["a"]}).cells
    assert cells.loc["L2", "a"].startswith("+3.5 (-")


def test_equal_differences_say_nothing_of_chance():
    """Success on AntMaze is coarse, so that two or three seeds may gain the same."""
    for values in ([[5.0, 5.0]], [[0.1 + 0.2, 0.3, 0.3]]):
        assert report_tables.p_values(pd.DataFrame(values)).isna().all()
    zeros = pd.DataFrame([[0.0, 0.0], [0.0, np.nan]])
    assert report_tables.p_values(zeros)[0] == 1.0
    assert np.isnan(report_tables.p_values(zeros)[1])
    scores = {"baseline": {"a": {0: 1.0, 1: 2.0}}, "LN": {"a": {0: 6.0, 1: 7.0}}}
    table = report_tables.difference_table("", make_rows(scores), {"a": ["a"]})
    assert table.cells.loc["LN", ["a", "p, a"]].tolist() == ["+5.0 (no spread)", ""]
    assert "(no spread): the same in each seed, which says nothing of chance" in table.note


def test_a_mean_over_datasets_needs_each_of_them():
    """Two runs on one are not one on each."""
    rows = make_rows({"baseline": {"a": {0: 1.0}, "b": {0: 5.0, 1: 5.0}}})
    again = rows[rows["dataset"] == "b"].assign(final=7.0)
    scores = report_tables.by_seed(pd.concat([rows, again]), "final", ["a", "b"])
    assert scores.loc["baseline", 0] == (1 + (5 + 7) / 2) / 2
    assert np.isnan(scores.loc["baseline", 1])


def test_equal_scores_are_not_the_same_runs():
    rows = make_rows({label: {"a": {0: 0.0, 1: 0.0}} for label in ("baseline", "DO")})
    cells = report_tables.difference_table("", rows, {"a": ["a"]}).cells
    assert cells["a"].tolist() == ["0.0 (no spread)", "+0.0 (no spread)"]
    assert cells["p, a"].tolist() == ["", "1.000"]


def test_bold_differences_are_those_that_holms_correction_leaves():
    """The means are a family of their own, and so are the single datasets."""
    rng = np.random.default_rng(0)
    names = ["baseline", "A", "B", "C"]
    scores = {}
    for name, gain in zip(names, (0, 3, 6, 40)):
        scores[name] = {}
        for dataset in ("a", "b"):
            scores[name][dataset] = dict(enumerate(50 + gain + rng.normal(0, 2, 5)))
    rows = make_rows(scores)
    columns = {"a": ["a"], "b": ["b"], "mean": ["a", "b"]}
    table = report_tables.difference_table("", rows, columns)
    p = {}
    for column, datasets in columns.items():
        means = [np.mean([list(scores[x][y].values()) for y in datasets], 0) for x in names]
        p[column] = [stats.ttest_rel(own, means[0]).pvalue for own in means[1:]]
    singles = multipletests(p["a"] + p["b"], method="holm")[1]
    expected = {
        "a": singles[:3],
        "b": singles[3:],
        "mean": multipletests(p["mean"], 0.05, "holm")[1],
    }
    bold = 0
    for column, values in expected.items():
        texts = ["<0.001" if value < 0.001 else f"{value:.3f}" for value in values]
        assert table.cells[f"p, {column}"].tolist() == ["", *texts]
        is_bold = table.cells[column].str.startswith("**").tolist()
        assert is_bold == [False, *(value < 0.05 for value in values)]
        bold += sum(is_bold)
    uncorrected = np.concatenate(list(p.values())) < 0.05
    assert 3 < bold < uncorrected.sum()  # so that the correction matters


def test_the_order_of_labels():
    order = ["baseline", "DO", "DO(0.05)", "DO(0.3)", "GN", "L2", "DO+LN", "DO+LN+GrN"]
    order += ["L1(0.001) (no DO)", "LN (no DO)", "best", "critic_ln=False"]
    shuffled = sorted(order)
    assert shuffled != order
    assert sorted(shuffled, key=lambda label: report_runs.label_key(rebrac, label)) == order


def test_pairs_are_drawn_at_the_papers_strengths():
    scores = {"baseline": 10.0, "DO": 12.0, "LN": 9.0, "DO+LN": 15.0, "DO+LN(0.3)": 99.0}
    rows = make_rows({label: {"a": {0: score}} for label, score in scores.items()})
    figure = report_figures.pair_map(rows, ["a"], rebrac.CHOSEN)
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["DO", "LN"]
    assert [text.get_text() for text in axis.texts] == ["2.0", "5.0", "5.0", "-1.0"]
    incomplete = make_rows({"baseline": {"b": {0: 10.0}}})
    incomplete = pd.concat([rows, incomplete])
    incomplete["label"] = pd.Categorical(incomplete["label"], list(scores), ordered=True)
    assert report_figures.pair_map(incomplete, ["a", "b"], rebrac.CHOSEN) is None
    singles = rows[~rows["label"].isin(["DO+LN", "DO+LN(0.3)"])]
    assert report_figures.pair_map(singles, ["a"], rebrac.CHOSEN) is None
    assert report_figures.single_map(singles, ["a"], rebrac.CHOSEN) is not None


def test_the_labels_that_tell_most_are_drawn():
    gains = {"baseline": 0, "DO": 1, "LN": -9, "GN": 3, "L2": 8, "DO+LN+GrN": 0}
    rows = make_rows({label: {"a": {0: 50.0 + gain}} for label, gain in gains.items()})
    drawn, text = report.drawn_labels(rows, ["a"], rebrac, 4)
    assert drawn == ["baseline", "LN", "L2", "DO+LN+GrN"]
    assert text.startswith(" Drawn are 4 of 6: baseline, DO+LN+GrN, and those whose")
    assert report.drawn_labels(rows, ["a"], rebrac, 6) == (list(gains), "")
    drawn, text = report.drawn_labels(rows, ["a"], rebrac, 2)
    assert drawn == ["baseline", "DO+LN+GrN"]
    assert text == " Drawn are 2 of 6: baseline, DO+LN+GrN."
    drawn, text = report.drawn_labels(rows, ["a"], rebrac, 1)
    assert (drawn, text) == (["baseline"], " Drawn are 1 of 6: baseline.")
    drawn, text = report.drawn_labels(rows, ["a"], cql, 3)  # for which the paper has none
    assert drawn == ["baseline", "LN", "L2"]
    assert text.startswith(" Drawn are 3 of 6: baseline, and those whose")
    others = rows[rows["label"] != "baseline"]
    expected = (["DO", "LN"], " Drawn are 2 of 5: the first.")
    assert report.drawn_labels(others, ["a"], rebrac, 2) == expected


def test_what_the_baseline_lacks_is_not_shown():
    """As a measure that is newer than the baseline's runs."""
    rows = make_rows({label: {"a": {0: 1.0, 1: 2.0}} for label in ("baseline", "DO")})
    is_baseline = rows["label"] == "baseline"
    rows["train/pca_rank"] = np.arange(4.0)
    rows["plasticity/loss_left"] = np.where(is_baseline, np.nan, 0.5)
    assert report_tables.inside_keys(rows) == ["train/pca_rank"]
    assert len(report_tables.inside_keys(rows[~is_baseline])) == 2


def test_a_report_tells_what_interacts_and_what_explains(make_run, make_report, tmp_path):
    for seed in range(3):
        for flags, gain in (
            ({}, 0),
            (dict(actor_ln=True), 5),
            (dict(actor_fn=True), 0),
            (dict(actor_ln=True, actor_fn=True), 20),
            (dict(actor_ln=True, actor_gn=True), 0),
        ):
            score = 50 + gain + seed / 10 + (seed % 2) * len(flags) ** 2 / 10
            add_measure(make_run([[1.0, score]], seed=seed, **flags), score / 3)
    found = make_report("results")
    cells = found["ReBRAC: interactions"]
    assert list(cells.index) == ["LN+FN"]
    assert cells.loc["LN+FN", ["sum of the parts", "together", "blocks"]].tolist() == [
        "+5.1",
        "+20.1",
        "3",
    ]
    assert cells.loc["LN+FN", "interaction"].startswith("**+15.1 (+15.0 – ")
    cells = found["ReBRAC: what explains the score"]
    assert list(cells.index) == ["new measure (training data)"]  # the others are constant
    assert cells["share alone (%)"].tolist() == ["100.0 (100.0 – 100.0)"]
    text = (tmp_path / "report" / "tables.md").read_text()
    assert "The strongest synergy is LN+FN: +15.1" in text
    assert "No conflict is significant." in text
    assert "have all parts at the same strengths: LN+GN." in text
    assert "| measure | points per standard deviation |" in text
    for name in ("interactions", "what-explains-the-score"):
        assert os.path.exists(tmp_path / "report" / f"1-rebrac-{name}.png")


def add_measure(path, value):
    """Add a column train/new_measure to a run's evaluations."""
    table = pd.read_csv(os.path.join(path, "evaluations.csv"))
    table["train/new_measure"] = value
    table.to_csv(os.path.join(path, "evaluations.csv"), index=False)


def test_a_combination_alone_has_no_p_between_regularisers(make_run, make_report, tmp_path):
    for seed in range(3):
        for flags, gain in (({}, 0), (dict(actor_ln=True, actor_fn=True), 5 + seed)):
            add_measure(make_run([[1.0, 50 + gain]], seed=seed, **flags), gain)
    cells = make_report("results")["ReBRAC: what explains the score"]
    assert cells["p, between regularisers"].tolist() == ["too few"]
    text = (tmp_path / "report" / "tables.md").read_text()
    assert "There are too few regularisers to test what explains the score between them." in text


def test_some_labels_are_drawn_where_there_are_many(make_run, make_report, tmp_path, monkeypatch):
    for i in range(MOST_DRAWN + 1):
        make_run([[1.0, 50 + i]], seed=0, actor_dropout=i / 100)
    drawn = []
    draw = report_figures.inside_figure

    def keep(rows, datasets):
        drawn.extend(rows["label"].unique())
        return draw(rows, datasets)

    monkeypatch.setattr("tools.report_figures.inside_figure", keep)
    make_report("results")
    assert len(drawn) == MOST_DRAWN
    text = (tmp_path / "report" / "tables.md").read_text()
    caption = f"lines their means. Drawn are {MOST_DRAWN} of {MOST_DRAWN + 1}: "
    assert caption in text


def test_a_pair_without_its_parts_is_told_to_be_missing(make_run, make_report, tmp_path):
    for seed in (0, 1):
        make_run([[1, 50]], seed=seed)
        make_run([[1, 60]], seed=seed, actor_ln=True, actor_fn=True)
    assert "ReBRAC: interactions" not in make_report("results")
    text = (tmp_path / "report" / "tables.md").read_text()
    assert "### ReBRAC: interactions\n\nLeft out, since no two blocks have all parts" in text


def make_runs_on_less_data(make_run):
    """Make 3 seeds on 1/2, 1/4 and 1/16 of the data.

    LN gains 3 for each halving. DO loses 1, and 0.5 for each. DO(0.3) loses 0.3 for each.
    """
    for seed, noise in enumerate([-0.1, 0.0, 0.1]):
        for halvings, validation_frac in ((1, 0.5), (2, 0.75), (4, 0.9375)):
            level = 50 - 5 * halvings + 10 * seed  # which the comparison takes out
            flags = dict(seed=seed, validation_frac=validation_frac)
            for gain, regulariser in (
                (0, {}),
                (3 * halvings + noise, dict(actor_ln=True)),
                (-1 + (noise - 0.5) * halvings, dict(actor_dropout=0.1)),
                ((noise - 0.3) * halvings, dict(actor_dropout=0.3)),
            ):
                make_run([[1.0, level + gain]], **flags, **regulariser)


def test_a_report_tells_whether_a_gain_grows_as_the_data_shrinks(make_run, make_report, tmp_path):
    make_runs_on_less_data(make_run)
    for seed in range(3):  # of another algorithm, on one share: it has no such section
        make_run([[1.0, 50]], "iql", seed=seed, validation_frac=0.5)
        make_run([[1.0, 60]], "iql", seed=seed, validation_frac=0.5, actor_ln=True)
    make_run([[1.0, 50]], seed=0, validation_frac=0.25, finished=False)
    cells = make_report("results", variants=2)["ReBRAC: gain by share of the data"]
    assert list(cells.index) == ["DO", "DO(0.3)", "LN"]
    titles = ["6.25 %", "25 %", "50 %", "for each halving"]
    assert list(cells)[::2] == titles
    assert list(cells)[1::2] == [f"p, {title}" for title in titles]
    p_of_gains = cells[["p, 6.25 %", "p, 25 %", "p, 50 %"]]
    cells = cells[[*titles, "p, for each halving"]]
    half = stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    expected = [f"**{signed(mean, half)}**" for mean in (12, 6, 3)]
    assert cells.loc["LN"].tolist() == [*expected, "+3.0 (no spread)", ""]
    p = [2 * stats.t.sf(mean / 0.1 * np.sqrt(3), 2) for mean in (0.5, 0.3)]
    expected = [f"**{signed(-1 - 0.5 * h, half * h)}**" for h in (4, 2, 1)]
    assert cells.loc["DO"].tolist() == [*expected, f"**{signed(-0.5, half)}**", f"{2 * p[0]:.3f}"]
    expected = [signed(-0.3 * h, half * h) for h in (4, 2, 1)]  # each p is 3 times 0.035
    assert cells.loc["DO(0.3)"].tolist() == [*expected, f"**{signed(-0.3, half)}**", f"{p[1]:.3f}"]
    one = 2 * stats.t.sf(3 * np.sqrt(3), 2)  # of DO(0.3) at each share, the largest of nine
    assert p_of_gains.loc["DO(0.3)"].tolist() == 3 * [f"{3 * one:.3f}"]
    text = (tmp_path / "report" / "tables.md").read_text()
    assert "## ReBRAC, less data. Settings: eval_every=1000, num_updates=2000\n" in text
    assert text.count("gain by share of the data](") == 1
    assert "IQL, less data" not in text


def signed(mean, half):
    return f"{mean:+.1f} ({mean - half:+.1f} – {mean + half:+.1f})"


@pytest.mark.parametrize("of_all, of_less", [(None, None), (0, None), (None, 0), (0, 0), (1, 0)])
def test_a_label_needs_no_share_that_only_others_have(make_run, make_report, of_all, of_less):
    """Where nothing is held out validation_seed means nothing."""
    make_runs_on_less_data(make_run)
    for seed in range(3):
        for validation_frac, gain in ((0.0, 0), (0.5, 2), (0.75, 4)):
            flags = dict(seed=seed, validation_frac=validation_frac)
            flags["validation_seed"] = of_less if validation_frac else of_all
            make_run([[1.0, 45 + gain + seed / 10]], "iql", **flags)
            if validation_frac:
                make_run([[1.0, 45 + 2 * gain + seed / 10]], "iql", **flags, actor_ln=True)
        make_run([[1.0, 40]], "iql", seed=seed, dataset_name=WALKER)  # on all of the data alone
    tables = make_report("results")
    cells = tables["IQL: gain by share of the data"]
    cells = cells[["25 %", "50 %", "100 %", "for each halving"]]
    expected = ["+4.0 (no spread)", "+2.0 (no spread)", "incomplete", "+2.0 (no spread)"]
    assert cells.loc["LN"].tolist() == expected


def test_runs_on_the_same_share_make_no_section_on_less_data(make_run, make_report, tmp_path):
    for seed in (0, 1):
        make_run([[1.0, 50]], seed=seed, validation_frac=0.5)
        make_run([[1.0, 60]], seed=seed, validation_frac=0.5, actor_ln=True)
        make_run([[1.0, 60]], seed=seed, validation_frac=0.75, batch_size=64)
    make_report("results")
    assert "less data" not in (tmp_path / "report" / "tables.md").read_text()


def test_features_are_compared_with_the_baselines_of_the_same_seed_and_dataset(make_run, tmp_path):
    """Also where a run has two seeds."""
    rng = np.random.default_rng(0)
    features = {}  # (dataset, label, seed) -> features
    for dataset in (HOPPER, WALKER):
        for label, flags in (("baseline", {}), ("LN", dict(actor_ln=True))):
            path = make_run([[1.0], [1.0]], dataset_name=dataset, seed=3, **flags)
            own = rng.normal(size=(2, 20, 4))
            np.save(os.path.join(path, "features.npy"), own)
            features |= {(dataset, label, 3 + i): own[i] for i in range(2)}
    seeds, _ = report_runs.read_results([str(tmp_path / "results")])
    assert len(seeds) == len(features) == 8
    for seed in seeds:
        key = (seed["dataset"], "baseline", seed["seed"])
        x = features[seed["dataset"], seed["labels"][0], seed["seed"]]
        x, y = (x - x.mean(0) for x in (x, features[key]))
        products = [np.sum((a.T @ b) ** 2) for a, b in ((x, y), (x, x), (y, y))]
        cka = products[0] / np.sqrt(products[1] * products[2])
        assert seed["cka_to_baseline"] == pytest.approx(cka, rel=1e-4)


def test_a_ratio_of_a_score_that_is_not_positive_is_left_empty():
    rows = pd.DataFrame({"score": [50.0, 0.0, -2.0], "score/action_noise=0.2": [40.0, 1.0, -3.0]})
    ratios = report_tables.with_ratios(rows)["ratio/score/action_noise=0.2"]
    np.testing.assert_array_equal(ratios, [0.8, np.nan, np.nan])


def test_expected_online_performance_tunes_each_dataset_on_its_own(
    make_run, make_report, monkeypatch
):
    """The best of two drawn labels is 40 on average, where they have 10 and 50."""
    drawn = {}
    draw = report_figures.online_performance

    def keep(curves):
        drawn.update(curves)
        return draw(curves)

    monkeypatch.setattr("tools.report_figures.online_performance", keep)
    for dataset, scores in ((HOPPER, (10, 50)), (WALKER, (50, 10))):
        for score, flags in zip(scores, ({}, dict(actor_ln=True))):
            for seed in (0, 1):
                make_run([[score]], seed=seed, dataset_name=dataset, **flags)
    make_report("results")
    np.testing.assert_allclose(drawn["ReBRAC, Gym-MuJoCo"], [30, 40])


def test_a_line_is_drawn_at_the_mean_of_the_seeds():
    rows = pd.DataFrame({"dataset": HOPPER, "place": 0, "x": [0.0, 0.0, 3.0]})
    axis = plt.figure().add_subplot()
    report_figures.draw_seeds(axis, rows, "x", [HOPPER])
    (line,) = axis.collections
    assert [y for _, y in line.get_segments()[0]] == [1, 1]


def test_the_gap_is_drawn_below_the_gain():
    rows = []
    for share, label, seed in itertools.product((0.5, 0.25), ("baseline", "DO"), (0, 1)):
        gain = 3.0 if label == "DO" else 0.0
        row = dict(share=share, label=label, seed=seed, dataset=HOPPER, final=50 + gain + seed)
        rows.append({**row, "gap/action_error": 0.1 / share + gain})
    rows = pd.DataFrame(rows)
    rows["label"] = pd.Categorical(rows["label"], ["baseline", "DO"], ordered=True)
    figure = report_shares.share_figure(rows, [HOPPER])
    upper, lower = figure.axes
    drawn = {line.get_label(): line.get_ydata() for line in lower.lines}
    np.testing.assert_allclose(drawn["baseline"], [0.4, 0.2])
    np.testing.assert_allclose(drawn["DO"], [3.4, 3.2])
    np.testing.assert_allclose(upper.lines[0].get_ydata(), [3, 3])
    np.testing.assert_allclose(upper.lines[0].get_xdata(), [25, 50])


def test_a_figure_of_shares_names_each_label_once_and_the_baselines_style_is_its_own():
    """A label may be the baseline itself on the first dataset. There may be more than styles."""
    labels = ["baseline", *(f"DO({i})" for i in range(1, 11))]
    rows = []
    for dataset, label, share in itertools.product((HOPPER, WALKER), labels, (0.5, 0.25)):
        for seed in (0, 1):
            row = dict(share=share, label=label, seed=seed, dataset=dataset, final=50.0 + seed)
            rows.append({**row, "gap/action_error": 0.1 + seed})
    rows = pd.DataFrame(rows)
    rows["label"] = pd.Categorical(rows["label"], labels, ordered=True)
    is_baseline = (rows["dataset"] == HOPPER) & (rows["label"] == "DO(3)")
    original = rows[(rows["dataset"] == HOPPER) & (rows["label"] == "baseline")]
    rows = pd.concat([rows[~is_baseline], original.assign(label="DO(3)")])
    rows["label"] = pd.Categorical(rows["label"], labels, ordered=True)
    figure = report_shares.share_figure(rows, [HOPPER, WALKER])
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted(labels)
    drawn = {line.get_label(): line for line in figure.axes[-1].lines}
    black = [label for label, line in drawn.items() if line.get_marker() == "x"]
    assert black == ["baseline"]


def test_one_seed_has_neither_intervals_nor_spreads(make_run, make_report):
    make_run([[1, 50]])
    make_run([[1, 60]], actor_ln=True)
    found = make_report("results")
    assert "ReBRAC, Gym-MuJoCo: differences" not in found
    cells = found["ReBRAC: inside the actor"]
    assert cells.loc["LN", "plasticity (share of the loss that is left)"] == "0.200"


def test_a_run_that_is_older_than_a_field_has_its_default(make_run, tmp_path):
    path = make_run([[1, 50]])
    make_run([[1, 60]], seed=1)
    with open(os.path.join(path, "config.yaml")) as file:
        config = yaml.safe_load(file)
    del config["n_classes"], config["eval_noise"]
    with open(os.path.join(path, "config.yaml"), "w") as file:
        yaml.safe_dump(config, file)
    seeds, left_out = report_runs.read_results([str(tmp_path / "results")])
    assert left_out == []
    assert len({seed["settings"] for seed in seeds}) == 1


def test_damaged_features_leave_out_what_they_are_compared_for(make_run, tmp_path):
    baseline = make_run([[1, 50]])
    others = [make_run([[1, 60]], actor_ln=True), make_run([[1, 60]], actor_gn=True)]
    features = np.random.default_rng(0).normal(size=(1, 20, 4))
    for path in (baseline, *others):
        np.save(os.path.join(path, "features.npy"), features)
    with open(os.path.join(others[0], "features.npy"), "w"):
        pass
    seeds, _ = report_runs.read_results([str(tmp_path / "results")])
    found = {seed["labels"]: seed.get("cka_to_baseline") for seed in seeds}
    assert found[("GN",)] == pytest.approx(1)
    assert found[("LN",)] is None
    np.save(os.path.join(others[0], "features.npy"), features[:, :10])  # of fewer states
    seeds, _ = report_runs.read_results([str(tmp_path / "results")])
    assert {seed["labels"]: seed.get("cka_to_baseline") for seed in seeds} == found


def test_tables_in_three_languages(tmp_path):
    cells = pd.DataFrame({"y & z": ["**1 ± 2**", "50 %", ""]}, index=["baseline", "L2", "L1"])
    table = Table("A_b", cells, "note of `y_z` and **a** and **b**")
    markdown = report_tables.to_markdown(table)
    assert markdown == (
        "### A_b\n\n| regularisers | y & z |\n| --- | --- |\n"
        "| baseline | **1 ± 2** |\n| L2 | 50 % |\n| L1 | |\n\n"
        "note of `y_z` and **a** and **b**\n"
    )
    latex = report_tables.to_latex(table)
    assert r"baseline & \textbf{1 $\pm$ 2} \\" in latex
    assert r"L2 & 50 \% \\" in latex
    note = r"note of \texttt{y\_z} and \textbf{a} and \textbf{b}"
    assert rf"\caption{{A\_b. {note}}}" in latex
    assert r"regularisers & y \& z \\" in latex
    assert latex.count("{") == latex.count("}")
    made = Report(str(tmp_path))
    made.add_table(table)
    made.write()
    page = (tmp_path / "index.html").read_text()
    assert "<td><strong>1 ± 2</strong></td>" in page
    assert "<th>y &amp; z</th>" in page
    assert (tmp_path / "tables.md").read_text().startswith(markdown)


# --- The whole ---


KINDS = "performance-profiles aggregates-with-95-intervals inside-the-actor"
KINDS += " robustness gains-of-single-regularisers improvement-over-the-baseline"
KINDS += " expected-online-performance"


@pytest.mark.slow
def test_a_fresh_clone_shows_something_at_once(tmp_path):
    """A part of the study, and the demo."""
    table = pd.read_csv(os.path.join(ROOT, "data", "study.csv"), dtype=str, keep_default_na=False)
    is_part = table["dataset_name"] == "halfcheetah-medium-replay-v2"
    part = table[is_part & (table["algorithm"] == "rebrac")]
    part.to_csv(tmp_path / "part.csv", index=False)
    names = f"{tmp_path}/part.csv, data/demo.csv"
    command = [sys.executable, "-m", "tools.report", "--results", f"[{names}]"]
    command += ["--reps", "50", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{names}: 81 finished seeds; left out: 0\n")
    figures = {os.path.basename(path) for path in glob.glob(str(tmp_path / "*.p*"))}
    for kind in KINDS.split():
        for suffix in ("png", "pdf"):
            assert any(name.endswith(f"{kind}.{suffix}") for name in figures), kind
    assert all(os.path.getsize(tmp_path / name) > 5000 for name in figures)
    page = (tmp_path / "index.html").read_text()
    assert not re.search(r'<link|<script|url\(|src="(?!data:)', page)
    assert page.count("data:image/png") == len(figures) // 2
    text = (tmp_path / "tables.md").read_text()
    other = "Not D4RL's own files, by their checksums: halfcheetah-medium-replay-v2."
    assert other in text
    assert (tmp_path / "tables.tex").read_text().count(r"\begin{table}") == text.count("\n### ")

    flags = [name for name in rebrac.Config.__dataclass_fields__ if name in part]
    is_baseline = (part[[name for name in flags if name.startswith("actor_")]] == "").all(axis=1)
    is_baseline |= part["run"].str.match("seed=.,actor_bc_coef=0.1,validation")
    own = part[is_baseline]
    assert len(own) == 5
    scores = own["score"].astype(float)
    assert f"| baseline | {scores.mean():.1f} ± {scores.std(ddof=0):.1f} |" in text
    cells = []
    for key in ("train/dead_neurons", "evaluation/dead_neurons"):
        values = own[key].astype(float)
        cells.append(f"{values.mean():.3f} ± {values.std(ddof=0):.3f}")
    assert f"| baseline | {cells[0]} | {cells[1]} |" in text


def test_without_results_of_ones_own_the_study_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Config().results == ["data/study.csv"]
    os.makedirs("results/rebrac/hopper-medium-v2/seed=0")
    assert Config().results == ["results"]


def test_a_regulariser_that_only_a_fork_knows_labels_its_runs(make_run, make_report, tmp_path):
    for seed in (0, 1):
        make_run([[1.0, 50]], seed=seed)
        for value, score in ((True, 60), (False, 50)):
            path = make_run([[1.0, score]], seed=seed, folder=f"fork{value}", actor_ln=True)
            with open(os.path.join(path, "config.yaml"), "a") as file:
                file.write(f"actor_of_a_fork: {str(value).lower()}\n")
    whole = make_report("results", "forkTrue", csv=str(tmp_path / "all.csv"))
    table = whole["ReBRAC, Gym-MuJoCo: scores"]
    assert list(table.index) == ["baseline", "LN+actor_of_a_fork=True"]
    again = make_report("all.csv")["ReBRAC, Gym-MuJoCo: scores"]
    pd.testing.assert_frame_equal(again, table)
    table = make_report("results", "forkFalse")["ReBRAC, Gym-MuJoCo: scores"]
    assert list(table.index) == ["baseline", "LN"]


def test_linked_directories_are_followed_once(make_run, make_report, tmp_path):
    for seed in (0, 1):
        make_run([[1.0, 50]], seed=seed, folder="elsewhere")
    os.makedirs(tmp_path / "results")
    os.symlink(tmp_path / "elsewhere", tmp_path / "results" / "linked")
    os.symlink(tmp_path / "results", tmp_path / "elsewhere" / "circle")
    table = make_report("results")["ReBRAC, Gym-MuJoCo: scores"]
    assert rows_of(table) == [["baseline", "50.0 ± 0.0"]]


def test_an_output_that_can_not_be_written_is_an_error_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(report, "read_results", lambda results: pytest.fail("work began"))
    with pytest.raises(UserError, match="can't write to .*file/report"):
        report.main(Config(results=["data/study.csv"], output=str(tmp_path / "file" / "report")))


def test_odd_characters_stand_in_tables_as_they_are():
    cells = pd.DataFrame({"a|b": ["~^{}\\"]}, index=["x_y"])
    markdown = report_tables.to_markdown(Table("title", cells, "note"))
    assert r"| regularisers | a\|b |" in markdown
    assert "a $<$ b" in report_tables.to_latex(Table("a < b", cells, "note"))
    latex = report_tables.to_latex(Table("title", cells, "note"))
    expected = r"x\_y & \textasciitilde \textasciicircum \{\}\textbackslash "
    assert expected in latex


# --- Results as tables ---


def test_a_table_of_results_gives_the_report_of_their_directories(make_run, make_report, tmp_path):
    for seed, score in enumerate([40.0, 50.0, 60.0]):
        make_run([[score - 20, score]], seed=seed)
        make_run([[score, score + 5]], seed=seed, actor_ln=True, actor_dropout=0.3)
    make_run([[30.0, 80.0], [20.0, 70.0]], seed=0, actor_wd=1e-3, batch_size=64)
    make_run([[3.0]], seed=9, finished=False)
    for final in ("last", "mean"):
        whole = make_report("results", csv=str(tmp_path / "results.csv"), final=final)
        again = make_report("results.csv", final=final)
        assert whole.keys() == again.keys()
        assert len(whole) > 3
        for title in whole:
            pd.testing.assert_frame_equal(whole[title], again[title])
    curves = []
    for source in ("results", "results.csv"):
        seeds, _ = report_runs.read_results([str(tmp_path / source)])
        finished = [seed for seed in seeds if seed["state"] == "finished"]
        curves.append(sorted((seed["updates"], seed["scores"]) for seed in finished))
    assert curves[0] == curves[1]
    assert ([1000, 2000], [20.0, 40.0]) in curves[0]
    make_report("results.csv", csv=str(tmp_path / "again.csv"))
    names = [pd.read_csv(tmp_path / file)["run"].tolist() for file in ("results.csv", "again.csv")]
    assert sorted(names[0]) == sorted(names[1])


def test_a_dataset_on_which_all_runs_failed_is_no_column(make_run, make_report, tmp_path):
    for seed in (0, 1):
        make_run([[1, 50]], seed=seed)
    path = make_run([[1, 50]], dataset_name=WALKER, finished=False)
    with open(os.path.join(path, "failed.txt"), "w") as file:
        file.write("error: a wrong file")
    cells = make_report("results")["ReBRAC, Gym-MuJoCo: scores"]
    assert list(cells) == [HOPPER]
    assert "a wrong file" in (tmp_path / "report" / "tables.md").read_text()


def test_figures_whose_titles_differ_by_a_sign_have_files_of_their_own(tmp_path):
    made = Report(str(tmp_path))
    for title in ("IQL: scores", "IQL+: scores"):
        made.add_figure(title, plt.figure(), "")
    assert sorted(os.listdir(tmp_path)) == [
        "0-iql-scores-again.pdf",
        "0-iql-scores-again.png",
        "0-iql-scores.pdf",
        "0-iql-scores.png",
    ]
    assert "![IQL+: scores](0-iql-scores-again.png)" in made.markdown[1]


def test_an_unfinished_run_brings_no_empty_column_of_curves(make_run, make_report, tmp_path):
    make_run([[1.0]], seed=0)
    make_run([[1.0, 2.0]], seed=1, finished=False)
    make_report("results", csv=str(tmp_path / "results.csv"))
    assert "curve" not in pd.read_csv(tmp_path / "results.csv")


def test_a_full_disk_is_one_line(monkeypatch, tmp_path):
    full = Report(str(tmp_path / "report"))
    full.add_text("text " * 10_000)
    monkeypatch.setattr(full, "path", lambda name: "/dev/full")
    with pytest.raises(UserError, match="can't write to .* .No space left on device."):
        full.write()


def test_a_table_has_last_mean_and_best_scores_and_times(make_run, make_report, tmp_path):
    scores = [10.0, 50, 20, 30, 40, 50, 60, 70, 80, 95, 90, 85]
    make_run([scores], seed=4, actor_wd=1e-5)
    make_report("results", csv=str(tmp_path / "results.csv"))
    (row,) = pd.read_csv(tmp_path / "results.csv").to_dict("records")
    assert row["score"] == 85
    assert row["best_score"] == 95
    assert row["mean_score"] == pytest.approx(np.mean(scores[-10:]))
    assert (row["algorithm"], row["seed"], row["actor_wd"]) == ("rebrac", 4, 1e-5)
    assert row["seconds/train"] == 2.5
    assert row["made_with"] == "1a2b3c4d; jax 0; cpu | 5e6f7a8b; jax 0; cpu"
    assert "actor_dropout" not in row  # it has its default
    assert row["curve"].startswith("1000:10 2000:50 3000:20 ")


def test_what_is_no_table_of_results_is_an_error(make_run, make_report, tmp_path):
    with pytest.raises(UserError, match="nowhere.csv is not a table of results"):
        make_report("nowhere.csv")
    (tmp_path / "other.csv").write_text("seed,update\n0,1\n")
    with pytest.raises(UserError, match="it has no column 'algorithm'"):
        make_report("other.csv")
    make_run([[1.0]])
    make_report("results", csv=str(tmp_path / "cut.csv"))
    os.truncate(tmp_path / "cut.csv", os.path.getsize(tmp_path / "cut.csv") - 3)
    with pytest.raises(UserError, match="cut.csv is cut short"):
        make_report("cut.csv")
    with pytest.raises(UserError, match="can't write"):
        make_report("results", csv=str(tmp_path / "nowhere" / "results.csv"))


def test_a_wandb_project_gives_the_same_report(make_run, make_report, tmp_path, monkeypatch):
    for seed, score in enumerate([40, 50]):
        make_run([[1, score]], seed=seed)
        make_run([[1, score + 3]], seed=seed, actor_ln=True)
    make_run([[1, 60], [1, 70]], seed=0, actor_fn=True)  # two seeds in a run
    make_run([[1, 60]], seed=5, finished=False)
    expected = make_report("results")
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", 40 * "k")
        monkeypatch.setenv("WANDB_MODE", "online")
        for path in glob.glob(str(tmp_path / "results" / "*" / "*" / "*")):
            is_finished = os.path.exists(os.path.join(path, "finished.json"))
            run = WandB(path, "rebrac", read_fields(path))
            run.start(Tables(path).updates())
            run.start_finish(0 if is_finished else 1, preempted=False)
            run.wait()
        server.runs["other"] = dict(config={}, history=[], state="crashed", exit=1, started=True)
        wandb.teardown()  # which keeps its server's address
        found = make_report(wandb="team/project")
        wandb.teardown()
    assert list(found) == list(expected)
    for title, cells in found.items():
        pd.testing.assert_frame_equal(cells, expected[title])
    page = (tmp_path / "report" / "index.html").read_text()
    assert "it is no run of this project" in page
    assert "not finished: W&amp;B says it is " in page


def test_a_row_of_wandb_has_the_measures_of_its_seed_alone():
    row = {"_step": 40, "_runtime": 3, "score": 5.0, "train/pca_rank": 7, "critic_loss": 0.1}
    assert report_runs.row_of_seed(row, 2, 1) == {
        "score": 5.0,
        "train/pca_rank": 7,
        "seed": 2,
        "update": 40,
    }
    row = {
        "_step": 40,
        "score": 5.0,
        "seed1/score": 6.0,
        "seed2/score": 4.0,
        "seed2/critic_loss": 1,
    }
    assert report_runs.row_of_seed(row, 2, 2) == {"score": 4.0, "seed": 2, "update": 40}
