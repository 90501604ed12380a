"""Machines as they are: folders, drivers, terminals and locales that are not the author's."""

import contextlib
import errno
import glob
import io
import os
import signal
import subprocess
import sys

import jax
import pytest
import yaml
from conftest import ROOT, both_scripts
from runs_helpers import command_line, fails, read_until

import harness.scripts
import iql
import rebrac
from harness.config import parse
from harness.directory import saved_fields
from harness.errors import Output, one_line_errors
from tools import benchmark
from tools.report import Report


def run_python(*words, **environment):
    """Run Python in the root; return what it did."""
    environment = {**os.environ, **{key: str(value) for key, value in environment.items()}}
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


# --- Folders that can't be made ---

PRINT_FOLDER = """
from harness.environments import make_env
print(make_env("hopper-medium-v2").unwrapped.dataset_filepath)
"""


def test_d4rl_is_imported_where_its_folder_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    home = tmp_path / "file" / "home"  # below a file, so that not even root can make it
    run = run_python("-c", PRINT_FOLDER, HOME=home, D4RL_DATASET_DIR=home / "data")
    assert run.stderr == ""
    assert run.stdout == f"{home}/data/hopper_medium-v2.hdf5\n"

    with_home = f"import os; os.environ.pop('D4RL_DATASET_DIR', None)\n{PRINT_FOLDER}"
    run = run_python("-c", with_home, HOME=home)
    assert run.stderr == ""
    assert run.stdout == f"{home}/.d4rl/datasets/hopper_medium-v2.hdf5\n"


def test_d4rls_folder_is_made_where_it_can_be(tmp_path):
    run = run_python("-c", PRINT_FOLDER, D4RL_DATASET_DIR=tmp_path / "data")
    assert run.stdout == f"{tmp_path}/data/hopper_medium-v2.hdf5\n"
    assert (tmp_path / "data").is_dir()


def test_compiled_programs_are_not_kept_in_a_home_that_can_not_be_written_to(tmp_path, monkeypatch):
    caches = []
    monkeypatch.setattr(jax.config, "update", lambda *words: caches.append(words))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    parse(iql.Config, [])
    assert ("jax_compilation_cache_dir", str(tmp_path / ".cache" / "jax")) in caches

    caches.clear()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    parse(iql.Config, [])
    names = [name for name, _ in caches]
    assert "jax_persistent_cache_min_compile_time_secs" in names
    assert "jax_compilation_cache_dir" not in names


# --- Drivers that aren't there ---

DRAW = """
import sys
sys.modules.update(OpenGL=None, glfw=None)  # as if their libraries were not there
from harness.environments import make_env
from harness.errors import one_line_errors
from harness.evaluation import write_video
env = make_env("hopper-medium-v2")
print(env.reset().shape, flush=True)
with one_line_errors():
    write_video(sys.argv[1], None, env, 0)
"""


@pytest.mark.parametrize("backend", ["nonsense", "osmesa", "egl", "glfw"])
def test_training_starts_with_any_mujoco_gl(backend, tmp_path):
    path = tmp_path / "a.gif"
    run = run_python("-c", DRAW, str(path), MUJOCO_GL=backend)
    assert run.stdout == "(11,)\n"
    assert run.returncode == 1
    advice = (
        "rendering needs OpenGL: install libegl1 or libosmesa6 and set MUJOCO_GL to egl or osmesa"
    )
    assert run.stderr == f"error: can't write {path}: {advice}\n"
    assert not path.exists()


def no_devices():
    raise AssertionError  # as JAX does where JAX_PLATFORMS=cuda is not there


MESSAGE = "^JAX finds no device for JAX_PLATFORMS=cuda; unset it, or install"


@both_scripts
def test_a_run_without_its_device_ends_before_it_begins(script, start, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", no_devices)
    fails(MESSAGE, start, script)
    assert not os.path.exists(start.directory)


def test_an_evaluation_without_its_device_gets_the_same_line(start, monkeypatch):
    directory = start(num_updates=20, analysis="false")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", no_devices)
    monkeypatch.setattr(sys, "argv", ["rebrac.py", "--evaluate", directory])
    fails(MESSAGE, rebrac.main)


def test_the_benchmark_without_its_device_gets_the_same_line(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", no_devices)
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    fails(MESSAGE, benchmark.main)


def test_jaxs_own_words_about_a_device_are_in_the_line():
    run = run_python("-m", "tools.benchmark", JAX_PLATFORMS="nonsense")
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("error: JAX finds no device for JAX_PLATFORMS=nonsense; unset it")
    assert "Unable to initialize backend 'nonsense'" in run.stderr
    assert run.stderr.count("\n") == 1


# --- Standard streams ---


def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path, quick):
    flags = command_line({**quick, "results": tmp_path, "analysis": "false"})
    process = subprocess.Popen(
        [sys.executable, "rebrac.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("W&B: off")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(120) == 0
    assert len(list(tmp_path.glob("rebrac/*/*/finished.json"))) == 1


HELP = [["iql.py"], ["-m", "tools.sweep"], ["-m", "tools.report"], ["sweeps/generate.py"]]


@pytest.mark.parametrize("words", HELP)
@pytest.mark.parametrize("redirection", ["| true", ">&- 2>&- <&-"])
def test_help_ends_well_without_standard_streams(words, redirection):
    command = f'set -o pipefail; "$@" --help {redirection}'
    run = subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.returncode == 0
    assert run.stderr == ""


CLOSED = """
import subprocess, sys
import harness.errors
with open(sys.argv[1], "w") as file:
    file.write(str(file.fileno()))
    sys.stdout.write("lost")
    sys.stderr.write("lost")
    child = "import os; [os.fstat(number) for number in range(3)]"
    sys.exit(subprocess.run([sys.executable, "-c", child]).returncode)
"""


def test_closed_streams_lead_to_nowhere_and_no_file_gets_their_numbers(tmp_path):
    path = tmp_path / "file"
    command = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-c", CLOSED, str(path)]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert path.read_text() == "3"


def test_output_is_lost_once_its_reader_is_gone_or_while_its_disk_is_full():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        output = Output(stream)
        output.write(100_000 * "a")
        output.flush()
        output.write("b")
        output.flush()
    assert output.lost is None
    stream = open("/dev/full", "w")
    output = Output(stream)
    output.write("a")
    output.flush()
    assert output.lost.errno == errno.ENOSPC
    with contextlib.suppress(OSError):
        stream.close()


def test_a_full_disk_behind_the_output_ends_no_run_but_is_told(quick, tmp_path):
    """The run's own directory is on another disk."""
    words = command_line(dict(quick, results=tmp_path))
    command = [sys.executable, "rebrac.py", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    message = "error: what was printed is lost in part (No space left on device)"
    assert done.stderr.splitlines()[-1] == message
    assert done.returncode == 1
    assert glob.glob(f"{tmp_path}/*/*/*/finished.json")


def test_letters_that_a_stream_can_not_write_are_escaped():
    memory = io.BytesIO()
    output = Output(io.TextIOWrapper(memory, "ascii", write_through=True))
    print("a ü→\udce9 b", file=output)
    assert memory.getvalue() == rb"a \xfc\u2192\udce9 b" + b"\n"


# --- Ctrl-C ---

PROGRAMS = {  # each program -> the first package that it imports
    "rebrac.py": "flax",
    "iql.py": "flax",
    "harness.group": "jax",
    "sweeps/generate.py": "yaml",
    "tools.sweep": "tqdm",
    "tools.measure": "jax",
    "tools.report": "matplotlib",
    "tools.benchmark": "h5py",
    "tools.collect": "h5py",
    "tools.readme": "h5py",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_during_the_imports_shows_no_traceback(program, spawn, tmp_path, monkeypatch):
    slow = "import time\nprint('importing')\ntime.sleep(60)\n"
    (tmp_path / f"{PROGRAMS[program]}.py").write_text(slow)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = spawn(*([program] if program.endswith(".py") else ["-m", program]))
    read_until("importing", process.stdout)
    process.send_signal(signal.SIGINT)
    assert process.stdout.read() == ""
    assert process.wait(30) == -signal.SIGINT  # which shells call 130


def test_ctrl_c_later_ends_a_program_with_130_and_cleans_up(capsys):
    cleaned = []
    with pytest.raises(SystemExit) as end, one_line_errors():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            cleaned.append(True)
    assert end.value.code == 130
    assert cleaned == [True]
    assert capsys.readouterr().err == ""


# --- Letters that are not ASCII ---


def test_a_path_that_the_locale_can_not_read_stays_readable_in_a_config():
    def saved(path):
        fields = saved_fields({"dataset_path": path, "eval_noise": ((0.2, 0.0),)})
        return yaml.safe_load(yaml.safe_dump(fields))

    assert saved("ü ñ.hdf5") == {"dataset_path": "ü ñ.hdf5", "eval_noise": [[0.2, 0.0]]}
    as_ascii = "ü ñ.hdf5".encode().decode("ascii", "surrogateescape")  # as Python in LC_ALL=C
    assert saved(as_ascii)["dataset_path"] == "ü ñ.hdf5"
    latin = b"\xfc.hdf5".decode(errors="surrogateescape")  # which is no UTF-8
    assert saved(latin)["dataset_path"] == "\ufffd.hdf5"


def test_a_report_has_the_name_of_any_path(tmp_path):
    report = Report(str(tmp_path))
    report.add_text("results in caf\udce9")
    report.write()
    assert (tmp_path / "tables.md").read_text() == "results in caf?\n"


def test_a_run_in_the_c_locale_with_other_letters_in_its_paths(tmp_path, quick):
    folder = tmp_path / "ü ñ"
    folder.mkdir()
    path = folder / "ö.hdf5"
    os.link(quick["dataset_path"], path)
    small = {"dataset_path": path, "results": folder, "num_updates": 20, "analysis": "false"}
    flags = command_line({**quick, **small})
    plain = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", TERM="dumb", COLUMNS="1")
    run = run_python("rebrac.py", *flags, **plain)
    assert run.returncode == 0, run.stderr
    (directory,) = folder.glob("rebrac/*/*")
    assert yaml.safe_load((directory / "config.yaml").read_text())["dataset_path"] == str(path)
    for environment in ({}, plain):
        run = run_python("rebrac.py", "--evaluate", str(directory), **environment)
        assert run.stdout.startswith("score ")


# --- Scripts that are found ---

SCRIPT = "NAME = 'Own'\nclass Config: pass\ndef tuned(config): pass\ndef main(): pass\n"


def test_a_file_that_only_has_a_name_is_not_executed(tmp_path):
    (tmp_path / "notes.py").write_text("NAME = 'any'\nraise SystemExit('executed')\n")
    (tmp_path / "latin.py").write_bytes(b"# \xfc\n")
    (tmp_path / "own_script.py").write_text(SCRIPT)
    assert harness.scripts.names_in(str(tmp_path)) == ["own_script"]


def test_two_scripts_of_one_name_get_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(harness.scripts, "ROOT", str(tmp_path))
    for name in ("one_script", "two_script"):
        (tmp_path / f"{name}.py").write_text(SCRIPT)
        monkeypatch.setitem(sys.modules, name, None)  # which takes it out again in the end
        del sys.modules[name]
    fails('two_script.py has the NAME "Own" of one_script.py; give it', harness.scripts.scripts)


def test_a_script_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(harness.scripts, "ROOT", str(tmp_path))
    path = tmp_path / "own_script.py"
    path.write_text(f"{SCRIPT}raise ZeroDivisionError\n")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            harness.scripts.load_script("own_script")
    path.write_text(SCRIPT)
    assert harness.scripts.load_script("own_script").NAME == "Own"
    del sys.modules["own_script"]
