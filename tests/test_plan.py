"""A plan of a sweep: its counts, and what it reckons from known rates and from a real run."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import ROOT, random_columns, small_config, small_data
from runs_helpers import fails

import iql
import rebrac
from harness.directory import load_config
from harness.environments import d4rl
from harness.memory import Memory
from tools import measure as measuring
from tools import plan
from tools.jobs import make_groups, read_jobs
from tools.timing import num_operations, products_of_two_updates, random_data

ROW = dict(steps=1.0, shared=1e9, each=5e8, host=2e8, fitting=4, about="it")
RUNS = dict(  # 12 of 1,000,000 updates, with two evaluations of 8 episodes of 1000 steps
    dataset_name="hopper-medium-v2",
    actor_dropout=[0.0, 0.1],
    batch_size=[64, 128],
    seed=[0, 1, 2],
    num_updates=1_000_000,
    eval_every=500_000,
    eval_episodes=4,
)
FOUND = dict(
    speeds={"IQL": dict(operations=1e9, updates=1, members=1, start=2000.0, about="it")},
    rows={"IQL, Gym-MuJoCo": ROW},
    machine="it",
    cores=1,
    accelerator=False,
    devices=1,
    free=8e9,
    free_host=3e9,
    seconds=60,
)
COSTS = dict(bytes=4e8, arrays=0, columns=5)


@pytest.fixture
def jobs(tmp_path, write_dataset):
    """The jobs of RUNS. The first of batch 64 is finished, the second is at update 600,000."""
    plan.task.cache_clear()  # other tests have shorter episodes
    file = write_dataset(**random_columns(0, states=11, actions=3))
    parameters = {**RUNS, "dataset_path": file, "results": str(tmp_path / "results")}
    grid = {}
    for key, value in parameters.items():
        grid[key] = dict(values=value) if isinstance(value, list) else dict(value=value)
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(dict(program="iql.py", method="grid", parameters=grid)))
    jobs = read_jobs([str(path)], [])
    finished, half = [job for job in jobs if job.config.batch_size == 64][:2]
    os.makedirs(finished.directory)
    os.makedirs(half.directory)
    with open(os.path.join(finished.directory, "finished.json"), "w") as file:
        file.write("{}")
    with open(os.path.join(half.directory, "train.csv"), "w") as file:
        file.write("seed,update\n0,600000\n")
    return jobs


def rows(capsys):
    """Return the cells of the table's rows after their names, and the other lines."""
    _, head, *lines = capsys.readouterr().out.splitlines()
    end = lines.index("")
    return [line.replace("up to ", "").split()[-8:] for line in lines[:end]], lines[end:]


def measure(questions, processes, **changes):
    """Know the machine: an operation takes a nanosecond, an update 1e6 for each transition."""
    kinds = []
    for question in questions:
        kinds.append(dict(COSTS, operations=1e6 * question["configs"][0]["batch_size"]))
    return {**FOUND, "kinds": kinds, **changes}


def test_what_is_to_be_done_and_how_long_it_takes(jobs, capsys, monkeypatch):
    """The hours by hand. 4 + 1 runs of batch 64 and 4 + 2 of batch 128 are unfinished.

    The former have 4.4e6 updates, which take 0.064 s each, the latter 6e6 of 0.128 s. Each of four
    programs takes 2000 s to start. There are 10 x 2 + 1 evaluations of 8000 steps of 1 s.
    """
    monkeypatch.setattr(plan, "available_cores", lambda: 8)
    training = 4.4e6 * 0.064 + 6e6 * 0.128 + 4 * 2000
    evaluation = 21 * 8000
    plan.print_plan(jobs, 1, 4, measure)
    (row, in_all), lines = rows(capsys)
    assert row == in_all
    assert row[:5] == ["12", "1", "4", "4", "10.40"]
    assert row[7] == f"{(training + evaluation) / 3600:.1f}" == "340.4"
    share = f"at most {evaluation / (training + evaluation):.1%} of the hours"
    assert any(share in line and "every 500,000 updates 4 + 4 episodes" in line for line in lines)

    plan.print_plan(jobs, 2, 4, measure)
    assert rows(capsys)[0][0][7] == "170.2"
    plan.print_plan(jobs, 8, 4, measure)  # the longest: four runs of batch 128
    longest = 4e6 * 0.128 + 2000 + 4 * 2 * 8000
    assert rows(capsys)[0][0][7] == f"{longest / 3600:.1f}"

    monkeypatch.setattr(plan, "available_cores", lambda: 2)  # which eight programs share
    plan.print_plan(jobs, 8, 4, measure)
    row, lines = rows(capsys)
    assert row[0][7] == "170.2"
    assert "  the share of a program, with --processes 8: cores: 1" in lines


def test_it_measures_the_largest_program_of_each_kind(jobs, capsys, monkeypatch):
    """Whatever dataset that has. Room is needed for the kind's largest dataset."""
    sizes = iter(range(1000, 2000))  # so that later and smaller programs have larger datasets
    monkeypatch.setattr(plan, "num_transitions", lambda *_: next(sizes))
    seen = []

    def watched(questions, processes):
        seen.extend((len(own["configs"]), own["shapes"][0]) for own in questions)
        return measure(questions, processes)

    plan.print_plan(jobs, 1, 4, watched)
    programs = [len(own) for own in make_groups(jobs[1:], 4)]
    assert sorted(programs) == [1, 2, 4, 4]
    assert [members for members, _ in seen] == [4, 4]
    assert max(size for _, size in seen) == 1003


@pytest.mark.parametrize("update, left", [(0, 3), (3, 3), (4, 3), (5, 2), (8, 2), (9, 1), (10, 1)])
def test_an_evaluation_that_may_have_been_cut_off_is_left(update, left):
    """Of evaluations after 4, 8 and 10 updates."""
    assert plan.num_evaluations(small_config(iql, num_updates=10, eval_every=4), update) == left


def test_a_gpu_trains_while_the_cpu_plays(jobs, capsys, monkeypatch):
    training = 4.4e6 * 0.064 + 6e6 * 0.128 + 4 * 2000

    def on_gpu(questions, processes):
        return measure(questions, processes, accelerator=True)

    plan.print_plan(jobs, 2, 4, on_gpu)  # two programs share it
    (row, _), lines = rows(capsys)
    assert row[7] == f"{training / 3600:.1f}"
    share = f"at most {21 * 8000 / training:.1%} of the hours, beside training"
    assert any(share in line for line in lines)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    plan.print_plan(jobs, 2, 4, on_gpu)
    assert rows(capsys)[0][0][7] == f"{training / 2 / 3600:.1f}"
    slow = {"IQL, Gym-MuJoCo": dict(ROW, steps=0.1)}
    plan.print_plan(jobs, 1, 4, lambda *about: {**on_gpu(*about), "rows": slow})
    assert rows(capsys)[0][0][7] == f"{21 * 8000 / 0.1 / 3600:,.1f}"


def test_memory_and_disk(jobs, capsys, monkeypatch):
    def on_two(questions, processes):
        assert all(one["as_many_as_fit"] for one in questions)
        return measure(questions, processes, devices=2)

    small_disk = SimpleNamespace(free=6e9)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: small_disk)
    plan.print_plan(jobs, 1, None, on_two)
    (row, _), lines = rows(capsys)
    assert row[2:4] == ["2", "4"]  # all of a batch size are one program, of which four fit
    assert row[5] == "2.00"  # 1 for the data, and 0.5 for each of two on a device
    assert float(row[6]) == pytest.approx(11 * 0.4, rel=0.01)
    host = "a program's evaluation: up to 0.80 GB on the host, where 3.0 GB are free"
    assert host in lines  # 0.2 for each of four
    assert any(line.startswith("disk: 6.8") for line in lines)  # six have two checkpoints
    assert lines[-1].startswith("the disk has too little room")


def test_a_folder_that_can_not_be_written_to(jobs, capsys):
    jobs[1].config = replace(jobs[1].config, results=f"{ROOT}/README.md/results")
    plan.print_plan(jobs[1:2], 1, 1, measure)
    end = f"can't write to {ROOT}/README.md (Not a directory): --results names another"
    assert rows(capsys)[1][-1].endswith(end)


def test_a_broken_dataset_is_one_line(tmp_path):
    path = tmp_path / "broken.hdf5"
    path.write_text("<html>")
    fails("broken.hdf5 is a web page, not an HDF5 file$", plan.num_transitions, "", str(path))


def test_a_dataset_that_is_not_here_is_not_downloaded(tmp_path, capsys, monkeypatch):
    """Its run is known by the checksum that D4RL's file has."""
    monkeypatch.setattr(d4rl.offline_env, "DATASET_PATH", str(tmp_path))
    plan.task.cache_clear()
    plan.num_transitions.cache_clear()
    path = tmp_path / "sweep.yaml"
    parameters = dict(dataset_name=dict(value="hopper-medium-v2"))
    path.write_text(yaml.safe_dump(dict(program="iql.py", method="grid", parameters=parameters)))
    (job,) = read_jobs([str(path)], [], add_checksum=plan.with_known_checksum)
    with open(os.path.join(ROOT, "harness", "d4rl_files.csv")) as file:
        (line,) = [line for line in file if line.startswith("hopper_medium-v2.hdf5,")]
    assert job.config.dataset_sha256 == line.strip().split(",")[2]
    plan.print_plan([job], 1, 1, measure)
    lines = rows(capsys)[1]
    assert "taken as 1,000,000 steps, since not here: hopper-medium-v2" in lines
    assert not any("checksum" in line for line in lines)
    job.config = replace(job.config, dataset_sha256=None)  # as of a file that nobody has here
    plan.print_plan([job], 1, 1, measure)
    line = "finished runs aren't counted, since their names need a file's checksum: "
    assert line + "hopper-medium-v2" in rows(capsys)[1]
    assert os.listdir(tmp_path) == ["sweep.yaml"]


def test_nothing_is_measured_for_a_finished_sweep(jobs, capsys):
    finished = [job for job in jobs if os.path.exists(f"{job.directory}/finished.json")]
    plan.print_plan(finished, 1, 1, measure=None)
    assert capsys.readouterr().out == "all 1 runs are finished\n"


# --- What is measured ---


@pytest.mark.slow
def test_the_disk_that_a_run_takes(start, write_dataset):
    file = write_dataset(**random_columns(0, size=600))
    directory = start(iql, dataset_path=file, num_seeds=2, num_updates=400, eval_every=100)
    config = load_config(iql.Config, directory)
    checkpoint, others = plan.run_bytes(
        config, measuring.member_costs(iql, config, random_data(2, 17, 6))
    )
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(directory)}
    of_checkpoint = sizes.pop("checkpoint.npz")
    assert checkpoint == pytest.approx(of_checkpoint, rel=0.05)
    assert others == pytest.approx(sum(sizes.values()), rel=0.2)


@pytest.mark.parametrize("policy_freq", [1, 2])
def test_the_operations_of_an_update_are_those_of_the_benchmark(policy_freq):
    config = small_config(rebrac, policy_freq=policy_freq, num_seeds=3)
    one = small_config(rebrac, policy_freq=policy_freq)
    products = products_of_two_updates(rebrac, one, small_data())
    operations = sum(num_operations(*product) for product in products) / 2
    assert measuring.member_costs(rebrac, config, small_data())["operations"] == operations


def test_the_rates(monkeypatch):
    """Of an epoch of two members that takes 0.5 s, 2 s more at first, and of steps of 0.1 s."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    durations = iter([2.5])

    def epoch():
        clock.now += next(durations, 0.5)

    monkeypatch.setattr(measuring, "trainer", lambda *about: epoch)
    speed = measuring.updates_per_second(rebrac, small_config(rebrac, num_seeds=5), None)
    assert speed == dict(updates=2 * 20 / 0.5, members=2, start=2.0)

    class SlowEnvs:
        def __init__(self, name, number):
            assert number == 20
            self.states = np.zeros((number, 5), np.float32)

        def reset(self, numbers):
            return self.states

        def step(self, running, actions):
            assert len(running) == len(actions) == 20
            clock.now += 0.1
            return self.states, None, None

    monkeypatch.setattr(measuring, "Envs", SlowEnvs)
    config = small_config(rebrac, num_seeds=1, eval_episodes=10)
    data = small_data()
    kind = SimpleNamespace(script=rebrac, config=config, data=lambda size: data)
    rate = measuring.steps_per_second(kind)
    assert rate == pytest.approx(20 / 0.1)


def test_memory_is_that_of_the_largest_kind_with_all_that_its_members_have(monkeypatch):
    """Of two kinds the second is larger. Its second run alone has dropout."""
    seen = []

    def needed_memory(script, config, data):
        seen.append((config, len(data["rewards"])))
        return Memory(shared=1, each=2, host=6)

    monkeypatch.setattr(measuring, "needed_memory", needed_memory)
    monkeypatch.setattr(measuring, "num_fitting", lambda memory: 3)
    monkeypatch.setattr(measuring, "steps_per_second", lambda kind: 5.0)
    monkeypatch.setattr(measuring, "SECONDS", 0)
    questions = []
    for batch_size in (8, 16):
        configs = [small_config(iql, batch_size=batch_size, num_seeds=3)]
        configs.append(replace(configs[0], actor_dropout=0.1))
        fields = [vars(config) for config in configs]
        about = dict(script="iql", configs=fields, row="row", as_many_as_fit=True)
        questions.append(dict(about, shapes=(batch_size + 32, 5, 2)))
    found = measuring.measurements(questions)
    ((config, size),) = seen
    assert (config.batch_size, size) == (16, 48)
    assert list(config.actor_dropout) == [0, 0, 0, 0.1, 0.1, 0.1]
    about = f"{config.dataset_name}, batch 16"
    assert found["rows"] == {
        "row": dict(shared=1, each=2, host=6, fitting=3, about=about, steps=5.0)
    }
    assert found["speeds"]["IQL"]["about"] == f"{config.dataset_name}, batch 8"
    small, large = found["kinds"]
    assert large["operations"] == 2 * small["operations"]


@pytest.mark.slow
def test_a_plan_measures_and_starts_nothing(jobs, tmp_path):
    words = ["--plan", "--together", "--hidden_dim", "64", "--processes", "2"]
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "tools.sweep", str(tmp_path / "sweep.yaml"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    lines = done.stdout.splitlines()
    assert lines[2].split()[:7] == ["IQL,", "Gym-MuJoCo", "12", "0", "2", "6", "12.00"]
    assert re.search(
        r"^  IQL, hopper-medium-v2, batch (64|128), members: 2: [\d,]+ updates/s", done.stdout, re.M
    )
    assert re.search(r"^  IQL, Gym-MuJoCo: [\d,]+ steps/s of evaluation$", done.stdout, re.M)


def test_an_error_in_measuring_is_one_line(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    fails("^can't measure: JAX finds no device for JAX_PLATFORMS=cuda", plan.ask, [], 1)


def test_a_program_measures_with_its_share_of_the_machine(monkeypatch):
    cores = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {4, 1, 7, 9, 3})
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, own: cores.append(own))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    measuring.take_share(2)
    assert cores == [[1, 4, 9]]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,5"
