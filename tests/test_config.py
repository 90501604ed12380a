"""The command line: what can't be meant gets one clear line before any work."""

import dataclasses
import os
import re
import subprocess
import sys
from typing import List, Optional

import pytest
import yaml
from conftest import ROOT, both_scripts, paper_rows

import cql
import iql
import rebrac
from harness.config import (
    HOLDS,
    check,
    given_values,
    parse,
    read_flags,
    read_table,
    with_regularisers,
)
from harness.directory import run_directory, saved_fields
from harness.errors import BusyError, UserError, one_line_errors
from harness.values import read_value

papers_scripts = pytest.mark.parametrize("script", [rebrac, iql], ids=["rebrac", "iql"])

# --- Wrong words ---

BAD = {
    "--actor_dropout abc": "actor_dropout can't be 'abc'; it must be a number",
    "--gamma x": "gamma can't be 'x'; it must be a number",
    "--gamma null --tau null": "gamma can't be 'null'; it must be a number",
    "--actor_wd None": "actor_wd can't be 'None'; it must be a number",
    "--seed true": "seed can't be 'true'; it must be a whole number",
    "--gamma [1": "gamma can't be '[1'; it must be a number",
    "--actor_ln maybe": "actor_ln can't be 'maybe'; it must be true or false",
    "--actor_ln 2": "actor_ln can't be '2'; it must be true or false",
    "--normalize_reward perhaps": "normalize_reward can't be 'perhaps'; it must be true or false",
    "--batch_size 2.5": "batch_size can't be '2.5'; it must be a whole number",
    "--batch_size inf": "batch_size can't be 'inf'; it must be a whole number",
    "--batch_size 0": "batch_size must be 1 or more",
    "--num_seeds 0": "num_seeds must be 1 or more",
    "--seed -1": "seed must be 0 or more",
    "--seed 2147483648": "seed + num_seeds must be at most 2^31",
    "--eval_episodes 0": "eval_episodes must be 1 or more",
    "--log_every 0": "log_every must be 1 or more",
    "--actor_dropout 1.0": "actor_dropout must be at least 0 and below 1",
    "--critic_dropout -0.1": "critic_dropout must be at least 0 and below 1",
    "--validation_frac 1.0": "validation_frac must be at least 0 and below 1",
    "--actor_wd -0.001": "actor_wd must be 0 or more",
    "--actor_wd nan": "actor_wd can't be 'nan'; it must be a number",
    "--actor_wd=-1e-3": "actor_wd must be 0 or more",
    "--actor_wd -1e-3": "actor_wd must be 0 or more",
    "--actor_l1_ratio 1.5": "actor_l1_ratio must be between 0 and 1",
    "--actor_learning_rate -1.0": "actor_learning_rate must be 0 or more",
    "--actor_gn true --hidden_dim 48": "actor_gn and critic_gn need a hidden_dim of 64, 96, ...",
    "--critic_gn true --hidden_dim 32": "actor_gn and critic_gn need a hidden_dim of 64, 96, ...",
    "--num_updates 1500": "num_updates must be a multiple of log_every, 1000",
    "--eval_every 1500": "eval_every must be a multiple of log_every, 1000",
    "--eval_noise [[0.2]]": "eval_noise can't be '[[0.2]]'; it must be a list of pairs such as",
    "--eval_noise [[1,2,3]]": "eval_noise can't be '[[1,2,3]]'; it must be a list of pairs such as",
    "--eval_noise 0.2": "eval_noise can't be '0.2'; it must be a list of pairs such as [[0.2,",
    "--eval_noise [[0.2,-1]]": "eval_noise must be pairs of 0 or more",
    "--eval_noise [[0,0]]": "eval_noise must be pairs of 0 or more, not both 0",
    "--video a.mp4": "video needs --evaluate RUN",
    "--video a.avi": "video must end in .mp4 or .gif",
    "--video nowhere/a.mp4": "video: there is no directory nowhere",
    "--evaluate nowhere": "nowhere/config.yaml is not the config of a run (can't be read",
    "--evaluate=": "evaluate can't be ''; it must be a text that isn't empty",
    "--results=": "results can't be ''; it must be a text that isn't empty",
    "--evaluate nowhere --seed 0": "--evaluate takes no --seed: the run's own config.yaml says it",
    "--dataset_nam x": "there is no flag --dataset_nam; the nearest are --dataset_name,",
    "--xyzzy 3": "there is no flag --xyzzy; --help lists them",
    "--seed": "argument --seed: expected one argument",
    "--config_path nowhere.yaml": "config_path 'nowhere.yaml': can't be read ([Errno 2] No such",
    "--config_path=": "config_path '': can't be read ([Errno 2] No such file",
    "--regularisers DO+XN": "unknown regulariser 'XN'; known: none, or DO, LN, FN, GN, BN, SN, L2,",
    "--preset as-ran": "unknown preset 'as-ran'; known: none, as-run, as-run-L",
    "--actor_lr_decay true": "actor_lr_decay and critic_lr_decay must be none, cosine, linear or",
    "--dataset_name pen-human-v1 --preset as-run --actor_dropout 0": "preset as-run has actor_",
    "--dataset_name antmaze-medium-diverse-v2 --preset as-run --regularisers best": (
        "preset as-run and regularisers best contradict each other about actor_"
    ),
    "--regularisers DO+none": "unknown regulariser 'none'",
    "--regularisers L2+EN": "regularisers L2+EN contradict each other about actor_wd",
    "--regularisers DO --actor_dropout 0.2": (
        "regularisers DO has actor_dropout 0.1, but 0.2 is asked for, too"
    ),
    "--regularisers DO --actor_dropout 0": ("regularisers DO has actor_dropout 0.1, but "),
    "--dataset_name hopper-medium-v3": (
        "unknown dataset 'hopper-medium-v3'; the nearest names are hopper-medium-v2"
    ),
    "--dataset_name minigrid-fourrooms-v0": "unknown dataset 'minigrid-fourrooms-v0'",  # discrete
    "--dataset_name door-expert": (
        "unknown dataset 'door-expert'; the nearest names are door-expert-v1"
    ),
}
BAD_REBRAC = {
    "--critic_loss huber": "critic_loss must be hl_gauss or mse",
    "--policy_freq 0": "policy_freq must be 1 or more",
    "--policy_freq 3": "log_every must be a multiple of policy_freq",
    "--n_classes 1": "n_classes must be 2 or more",
    "--v_expand=-1": "v_expand must be above -1",
    "--v_min 3 --v_max 2": "v_min must be below v_max",
    "--sigma_frac 0.0": "sigma_frac must be above 0",
}
BAD_IQL = {
    "--expectile 2.0": "expectile must be between 0 and 1",
    "--log_std_min 3": "log_std_min must be below",
}
BAD_CQL = {
    "--n_actions 0": "n_actions must be 1 or more",
    "--bc_steps -1": "bc_steps must be 0 or more",
    "--lagrange_gap -1": "lagrange_gap must be 0 or more",
    "--gap_clip -200": "gap_clip must be 0 or more",
    "--log_std_min 3": "log_std_min must be below",
}
BAD_CASES = (
    [(script, *case) for script in (rebrac, iql) for case in BAD.items()]
    + [(rebrac, *case) for case in BAD_REBRAC.items()]
    + [(iql, *case) for case in BAD_IQL.items()]
    + [(cql, *case) for case in BAD_CQL.items()]
)


@pytest.fixture
def main(monkeypatch, tmp_path):
    """Call a script's main with words, in an empty folder, without a dataset or any training."""
    monkeypatch.chdir(tmp_path)

    def main(script, words, train=None):
        monkeypatch.setattr(sys, "argv", [script.__file__, *words.split()])
        monkeypatch.setattr(script, "with_checksum", lambda config: config)
        monkeypatch.setattr(script, "train", train or (lambda config, run: None))
        with one_line_errors():
            script.main()

    return main


@pytest.mark.parametrize("script, words, message", BAD_CASES)
def test_wrong_values_get_one_clear_line(main, capsys, tmp_path, script, words, message):
    def train(config, run):
        pytest.fail("training began")

    with pytest.raises(SystemExit) as end:
        main(script, words, train)
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_an_unknown_flag_is_an_error_with_the_nearest_names():
    message = "there is no flag --actor_droput; the nearest are --actor_dropout, "
    with pytest.raises(UserError, match=message):
        parse(rebrac.Config, ["--actor_droput", "0.1"])


def test_reading_flags_sets_nothing_for_programs_that_are_started_later(monkeypatch):
    """A sweep reads the configs of all its runs. One may ask for deterministic operations."""
    monkeypatch.setenv("XLA_FLAGS", "")
    assert read_flags(rebrac.Config, ["--deterministic", "true"]).deterministic
    assert os.environ["XLA_FLAGS"] == ""
    assert parse(rebrac.Config, ["--deterministic", "true"]).deterministic
    assert "deterministic" in os.environ["XLA_FLAGS"]


@both_scripts
def test_a_program_ends_with_the_line_and_exit_code_1(script):
    command = [sys.executable, script.__file__, "--gamma", "2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr == "error: gamma must be between 0 and 1\n"


def test_a_busy_run_has_an_exit_code_of_its_own(capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise BusyError("another process is at work")
    assert end.value.code == 75
    assert capsys.readouterr().err == "error: another process is at work\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), one_line_errors():
        raise ZeroDivisionError


# --- Right words ---


def test_values_are_read_as_they_are_meant(tmp_path):
    words = (
        "--actor_ln True --actor_bn false --num_updates 1e5 --actor_wd 1e-4 "
        "--validation_seed 3 --dataset_path a.hdf5 --tau 1 --eval_noise [[1,0]]"
    )
    expected = dict(
        actor_ln=True,
        actor_bn=False,
        num_updates=100_000,
        actor_wd=1e-4,
        validation_seed=3,
        dataset_path="a.hdf5",
        tau=1.0,
        eval_noise=((1.0, 0.0),),
    )
    config = parse(rebrac.Config, words.split())
    assert config == rebrac.Config(**expected)
    for name, value in expected.items():
        assert type(getattr(config, name)) is type(value), name


def test_an_agent_of_wandb_hands_out_a_whole_config(monkeypatch):
    """W&B resumes a preempted run with all that was logged of its config."""
    config = iql.tuned(iql.Config(dataset_name="pen-human-v1", actor_ln=True, seed=3))
    logged = {"algorithm": "iql", "_wandb": {}, **saved_fields(vars(config))}
    words = [f"--{key}={value}" for key, value in logged.items()]
    with pytest.raises(UserError):
        parse(iql.Config, words)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    again = iql.tuned(parse(iql.Config, words))
    assert again == config
    assert run_directory("iql", again, iql.tuned) == run_directory("iql", config, iql.tuned)


def test_a_word_is_never_read_as_yaml():
    """YAML 1.1 reads 010 as 8, 1:30 as 90, 2024_11_26 as a number, yes as true, ~ as none."""
    assert parse(rebrac.Config, ["--seed", "010"]).seed == 10
    for word in ("2024_11_26", "1:30", "yes", "None", "null", "[a]", "010"):
        config = parse(rebrac.Config, ["--results", word, "--dataset_path", word])
        assert (config.results, config.dataset_path) == (word, word)
    config = parse(rebrac.Config, ["--results", "~/runs"])
    assert config.results == os.path.expanduser("~/runs")
    for word in ("1:30", "0x10", "yes", "1_0.5"):
        with pytest.raises(UserError, match="seed can't be"):
            parse(rebrac.Config, ["--seed", word])


@pytest.mark.parametrize(
    "content, message",
    [
        (b"actor_droput: 0.1\n", "there is no field 'actor_droput'"),
        (b"project: CORL\ngroup: g\n", "there is no field 'project'"),
        (b"", "it holds no fields"),
        (b"- a\n", "it holds no fields"),
        (b"1: 2\n", "there is no field '1'"),
        (b"seed: one\n", "seed can't be 'one'; it must be a whole number"),
        (b"seed: true\n", "seed can't be 'true'; it must be a whole number"),
        (b"seed: 1:30\n", "seed can't be '1:30'; it must be a whole number"),
        (b"actor_ln: yes\n", "actor_ln can't be 'yes'; it must be true or false"),
        (b"seed: null\n", "seed can't be None; it must be a whole number"),
        (b"tau: 1" + b"0" * 400 + b"\n", "tau can't be '1000"),
        (b"seed: [1\n", "can't be read"),
        ("seed: 1\n".encode("utf-16"), "can't be read"),
        (bytes(range(256)), "can't be read"),
    ],
)
def test_a_wrong_config_file_is_named_with_what_is_wrong(content, message, tmp_path):
    path = tmp_path / "fields.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path}': {message}")) as error:
        parse(rebrac.Config, ["--config_path", str(path)])
    assert "\n" not in str(error.value)


def test_null_is_none_in_a_config_file(tmp_path):
    path = tmp_path / "fields.yaml"
    path.write_text("gamma: null\nvalidation_seed: ~\ndataset_path: 'null'\nresults: None\n")
    config = parse(rebrac.Config, ["--config_path", str(path)])
    assert (config.gamma, config.validation_seed) == (None, None)
    assert (config.dataset_path, config.results) == ("null", "None")


def test_the_words_of_a_config_file_mean_what_they_mean_as_flags(tmp_path):
    path = tmp_path / "fields.yaml"
    path.write_text("seed: 010\nactor_wd: 1e-4\nresults: 2024_11_26\neval_noise: [[0.1, 0]]\n")
    config = parse(rebrac.Config, ["--config_path", str(path)])
    assert (config.seed, config.actor_wd, config.results) == (10, 1e-4, "2024_11_26")
    assert config.eval_noise == ((0.1, 0.0),)


def test_a_file_of_fields_is_read_and_the_command_line_wins(tmp_path):
    path = tmp_path / "fields.yaml"
    path.write_text("actor_ln: true\nactor_wd: 1e-4\nseed: 3\n")
    config = parse(iql.Config, ["--config_path", str(path), "--seed", "5"])
    assert config == iql.Config(actor_ln=True, actor_wd=1e-4, seed=5)
    path.write_text("actor_ln: !!python/object/apply:os.abort []\n")
    with pytest.raises(UserError):
        parse(iql.Config, ["--config_path", str(path)])
    path.write_text("actor_lnn: true\n")
    with pytest.raises(UserError, match="there is no field 'actor_lnn'"):
        parse(iql.Config, ["--config_path", str(path)])


def test_a_list_may_hold_commas_in_quotes_and_one_item_needs_no_brackets():
    for word, items in {
        "[]": [],
        "[a, b]": ["a", "b"],
        "[a,'b,c=1']": ["a", "b,c=1"],
        "b,c=1": ["b,c=1"],
    }.items():
        assert read_value(List[str], word) == items
    with pytest.raises(ValueError):
        read_value(List[str], "[a\nb]")


def test_a_runs_config_and_a_name_for_regularisers_can_be_combined(tmp_path):
    """The file spells out all fields, also those that are off: it doesn't ask for that."""
    path = tmp_path / "config.yaml"
    path.write_text("actor_ln: true\nactor_dropout: 0.0\n")
    words = ["--config_path", str(path), "--regularisers", "DO"]
    config = rebrac.tuned(parse(rebrac.Config, words))
    check(config, rebrac.constraints, rebrac.BOUNDS, given_values(rebrac.Config, words))
    assert (config.actor_ln, config.actor_dropout) == (True, 0.1)


def test_a_name_can_be_added_to_a_runs_config(tmp_path):
    """On the command line or in the file. IQL's dropout is off there and not at its default."""
    path = tmp_path / "config.yaml"
    fields = saved_fields(vars(iql.tuned(iql.Config())))
    expected = iql.tuned(iql.Config(regularisers="DO+LN"))
    flag = ["--regularisers", "DO+LN"]
    for extra, words in ({}, flag), ({"regularisers": "DO+LN"}, []):
        path.write_text(yaml.safe_dump({**fields, **extra}))
        words = ["--config_path", str(path), *words]
        config = iql.tuned(read_flags(iql.Config, words))
        check(config, iql.constraints, iql.BOUNDS, given_values(iql.Config, words))
        assert config == expected


@pytest.mark.parametrize("text", ["actor_dropout: 0.3", "regularisers: DO\nactor_dropout: 0.3"])
def test_a_name_does_not_win_over_a_strength_in_a_file(text, tmp_path):
    path = tmp_path / "fields.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="regularisers DO has actor_dropout 0.1, but 0.3 is asked"):
        iql.tuned(read_flags(iql.Config, ["--config_path", str(path), "--regularisers", "DO"]))


def test_null_in_a_file_is_not_asked_for(tmp_path):
    path = tmp_path / "fields.yaml"
    path.write_text("regularisers: DO\nbatch_size: null\n")
    words = ["--config_path", str(path)]
    config = rebrac.tuned(read_flags(rebrac.Config, words))
    check(config, rebrac.constraints, rebrac.BOUNDS, given_values(rebrac.Config, words))


def test_a_file_with_a_preset_asks_for_its_other_fields_too(tmp_path):
    path = tmp_path / "fields.yaml"
    path.write_text("dataset_name: hopper-medium-v2\npreset: td3-bc\ncritic_ln: true\n")
    words = ["--config_path", str(path)]
    config = rebrac.tuned(parse(rebrac.Config, words))
    with pytest.raises(UserError, match="preset td3-bc has critic_ln False, but True is asked"):
        check(config, rebrac.constraints, rebrac.BOUNDS, given_values(rebrac.Config, words))


def test_a_type_that_pyrallis_does_not_read_is_named():
    @dataclasses.dataclass
    class Config:
        actor_other: int | None = None

    with pytest.raises(UserError, match=r"actor_other: write Optional\[X\] in place of X \| None"):
        parse(Config, ["--actor_other", "3"])


def test_a_table_in_a_string_has_a_dictionary_for_each_row():
    table = read_table("""
    name    x    y
    first   0.5  True
    second  1    None
    """)
    assert table == {"first": {"x": 0.5, "y": True}, "second": {"x": 1, "y": None}}


# --- Help ---


def comments_in_source(script):
    """Return the comment beside each field of a script's Config, and the headings above them."""
    with open(script.__file__) as file:
        source = file.read()
    source = source[source.index("class Config:") : source.index("BOUNDS =")]
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    headings = re.findall(r"^    # (.*)$", source, re.MULTILINE)
    return comments, headings


def without_spaces(text):
    """Return a text as it is whatever the lines, which are broken at hyphens, too."""
    return "".join(text.split())


@both_scripts
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_each_field_with_its_own_comment(script, flag):
    command = [sys.executable, script.__file__, flag]
    text = subprocess.check_output(command, cwd=ROOT, text=True)
    text = text[text.index("\nConfig:") :]
    shown = re.split(r"^  --(\w+)", text, flags=re.MULTILINE)[1:]
    help_of = dict(zip(shown[::2], shown[1::2]))

    comments, headings = comments_in_source(script)
    names = [field.name for field in dataclasses.fields(script.Config)]
    assert list(comments) == names
    assert list(help_of) == names
    for name in names:
        comment = re.escape(without_spaces(comments[name]))
        help = without_spaces(help_of[name])
        assert re.fullmatch(rf"\S*?{comment}\(default:.*\)", help), name
    assert len(headings) >= 5
    for heading in headings:
        assert without_spaces(heading) not in without_spaces(text)


# --- Names for fields ---

# The paper's chosen strengths, ReBRAC's and IQL's
STRENGTHS = {
    "DO": (dict(actor_dropout=0.1), dict(actor_dropout=0.1)),
    "LN": (dict(actor_ln=True), dict(actor_ln=True)),
    "FN": (dict(actor_fn=True), dict(actor_fn=True)),
    "GN": (dict(actor_gn=True), dict(actor_gn=True)),
    "BN": (dict(actor_bn=True), dict(actor_bn=True)),
    "SN": (dict(actor_sn=True), dict(actor_sn=True)),
    "L2": (dict(actor_wd=1e-3), dict(actor_wd=0.1)),
    "L1": (
        dict(actor_wd=1e-5, actor_l1_ratio=1.0),
        dict(actor_wd=0.01, actor_l1_ratio=1.0),
    ),
    "EN": (
        dict(actor_wd=1e-4, actor_l1_ratio=0.5),
        dict(actor_wd=0.01, actor_l1_ratio=0.5),
    ),
    "InN": (dict(actor_input_noise=0.003), dict(actor_input_noise=0.01)),
    "BCN": (dict(actor_bc_noise=0.01), dict(actor_bc_noise=0.3)),
    "GrN": (dict(actor_grad_noise=0.01), dict(actor_grad_noise=0.01)),
    "RMS": (dict(actor_rms=True), dict(actor_rms=True)),  # these two are beyond the paper
    "SAM": (dict(actor_sam=0.05), dict(actor_sam=0.05)),
}


@papers_scripts
@pytest.mark.parametrize("name", STRENGTHS)
def test_a_regularisers_name_stands_for_the_papers_strength(script, name):
    assert list(script.CHOSEN)[: len(STRENGTHS)] == list(STRENGTHS)  # a fork's own come last
    flags = STRENGTHS[name][1 if script is iql else 0]
    expected = script.tuned(script.Config(dataset_name="pen-human-v1", **flags))
    config = script.Config(dataset_name="pen-human-v1", regularisers=name)
    assert script.tuned(config) == expected
    assert script.tuned(dataclasses.replace(config, **flags)) == expected


@both_scripts
def test_a_forks_whole_number_names_the_same_run(script):
    flags = with_regularisers(script.Config(regularisers="DO"), {"DO": dict(actor_wd=1)})
    assert flags == script.Config(actor_wd=1.0)
    assert type(flags.actor_wd) is float


COMBINATIONS = {  # the paper's strengths in combinations where they are others than alone
    "rebrac": {
        "DO+LN+GrN": dict(actor_grad_noise=0.003),
        "DO+LN+InN": dict(actor_input_noise=0.01),
        "DO+LN+BCN": dict(actor_bc_noise=0.01),
        "DO+LN+L2": dict(actor_wd=1e-4),
        "DO+LN+L1": dict(actor_wd=1e-5),
        "DO+LN+EN": dict(actor_wd=1e-5),
        "EN+DO+GrN": dict(actor_wd=1e-4, actor_grad_noise=0.01),
        "EN+DO+BCN": dict(actor_wd=1e-4, actor_bc_noise=0.1),
        "DO+LN+GrN+L2": dict(actor_grad_noise=0.003, actor_wd=1e-4),
        "DO+LN+GrN+L1": dict(actor_grad_noise=0.003, actor_wd=1e-5),
        "DO+LN+GrN+EN": dict(actor_grad_noise=0.003, actor_wd=1e-5),
        "DO+LN+BCN+L2": dict(actor_bc_noise=0.01, actor_wd=1e-5),
        "LN+GrN": dict(actor_grad_noise=0.01),
    },
    "iql": {
        "DO+LN+GrN": dict(actor_grad_noise=0.1),
        "DO+LN+L2": dict(actor_wd=0.1),
        "DO+LN+L1": dict(actor_wd=0.01),
        "DO+LN+EN": dict(actor_wd=0.01),
        "LN+GrN": dict(actor_grad_noise=0.01),
    },
}


@papers_scripts
def test_combinations_have_the_strengths_that_the_paper_chose_for_them(script):
    for names, strengths in COMBINATIONS[script.__name__].items():
        for order in (names, "+".join(reversed(names.split("+")))):
            config = script.tuned(script.Config(regularisers=order))
            for key, value in strengths.items():
                assert getattr(config, key) == value, (order, key)
            if "DO" in names:
                assert config.actor_dropout == 0.1


@both_scripts
def test_names_can_be_joined_and_a_run_is_named_by_their_flags(script):
    config = script.Config(dataset_name="pen-human-v1", regularisers="LN+DO")
    flags = dict(actor_dropout=0.1, actor_ln=True)
    expected = script.tuned(script.Config(dataset_name="pen-human-v1", **flags))
    assert script.tuned(config) == expected
    path = run_directory("a", expected, script.tuned)
    assert os.path.basename(path).startswith("seed=0,actor_")


# --- Bounds ---


@both_scripts
def test_every_dataset_gets_a_valid_config(script):
    for name in rebrac.TUNED:  # the paper's
        config = script.tuned(script.Config(dataset_name=name))
        check(config, script.constraints, script.BOUNDS)


UNBOUNDED = {
    "rebrac": {"v_min", "v_max"},
    "iql": {"reward_shift", "log_std_min", "log_std_max"},
    "bcq": {"log_std_min", "log_std_max"},
    "cql": {"reward_shift", "log_std_min", "log_std_max"},
}


def test_a_forks_float_may_be_written_as_a_whole_number():
    @dataclasses.dataclass(frozen=True)
    class Config(rebrac.Config):
        actor_new: float = 0
        actor_other: Optional[float] = 0
        layers: int = 0

    config = rebrac.tuned(Config(dataset_name="pen-human-v1", layers=1))
    check(config, rebrac.constraints, rebrac.BOUNDS)
    with pytest.raises(UserError, match="layers must be 1 or more"):
        check(dataclasses.replace(config, layers=0), rebrac.constraints, rebrac.BOUNDS)
    with pytest.raises(UserError, match="actor_new must be 0 or more"):
        check(dataclasses.replace(config, actor_new=-1), rebrac.constraints, rebrac.BOUNDS)


@both_scripts
def test_only_numbers_that_may_be_anything_have_no_bound(script):
    assert set(script.BOUNDS) <= set(vars(script.Config()))
    assert set(script.BOUNDS.values()) <= set(HOLDS)
    unbounded = {name for name, words in script.BOUNDS.items() if words == "any number"}
    assert unbounded == UNBOUNDED[script.__name__]


# --- Datasets that the paper doesn't have ---

OTHERS = {
    "ant-medium-v2": ("halfcheetah", "hopper", "walker2d"),
    "halfcheetah-medium-v0": ("halfcheetah", "hopper", "walker2d"),
    "maze2d-umaze-v1": ("halfcheetah", "hopper", "walker2d"),
    "antmaze-umaze-v0": ("antmaze",),
    "pen-human-v0": ("pen", "door", "hammer", "relocate"),
}
PAPER_FILES = [
    (rebrac, "rebrac_hl_gauss.csv", {}),
    (rebrac, "rebrac_mse.csv", {"critic_loss": "mse"}),
    (rebrac, "rebrac_hl_gauss_best_l2.csv", {"regularisers": "best-L2"}),
    (rebrac, "rebrac_hl_gauss_best_combination.csv", {"regularisers": "best"}),
    (iql, "iql.csv", {}),
    (iql, "iql_best_l1.csv", {"regularisers": "best-L1"}),
    (iql, "iql_best_combination.csv", {"regularisers": "best"}),
]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("script, file, fields", PAPER_FILES, ids=[row[1] for row in PAPER_FILES])
def test_another_dataset_takes_its_domains_lower_medians(name, script, file, fields):
    assert name not in script.TUNED
    config = script.tuned(script.Config(dataset_name=name, **fields))
    check(config, script.constraints, script.BOUNDS)
    rows = [row for other, row in paper_rows(file) if other.startswith(OTHERS[name])]
    for column in rows[0]:
        values = [row[column] for row in rows]
        if None in values:
            continue  # filled in where the data are read, or by a rule of the domain
        ordered = sorted(values)
        assert getattr(config, column) == ordered[(len(ordered) - 1) // 2], column


@both_scripts
@pytest.mark.parametrize("name", OTHERS)
def test_a_line_says_that_the_defaults_are_the_domains(main, capsys, script, name):
    """CQL and BCQ have none of their own for any dataset."""
    configs = []
    main(script, f"--dataset_name {name}", lambda config, run: configs.append(config))
    line = f"{name} has no tuned values: taking the median of its domain's"
    assert (line in capsys.readouterr().out.splitlines()) == hasattr(script, "TUNED")
    assert configs == [script.tuned(script.Config(dataset_name=name))]


def test_a_dataset_of_the_paper_needs_no_such_line(main, capsys):
    main(rebrac, "--dataset_name hopper-medium-v2")
    assert "has no tuned values" not in capsys.readouterr().out
