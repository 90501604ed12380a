"""The command line: what can't be meant gets one clear line before any work."""

import dataclasses
import sys

import pytest

import iql
import rebrac
import runs

BAD = {
    "--actor_dropout abc": "actor_dropout can't be 'abc'; it is of type float",
    "--gamma x": "gamma can't be 'x'",
    "--actor_ln maybe": "actor_ln can't be 'maybe'; it is of type bool",
    "--normalize_reward perhaps": "normalize_reward can't be 'perhaps'",
    "--batch_size 2.5": "batch_size can't be '2.5'; it is of type int",
    "--batch_size 0": "batch_size must be 1 or more",
    "--num_seeds 0": "num_seeds must be 1 or more",
    "--seed -1": "seed must be 0 or more",
    "--eval_episodes 0": "eval_episodes must be 1 or more",
    "--log_every 0": "log_every must be 1 or more",
    "--actor_dropout 1.0": "actor_dropout must be at least 0 and below 1",
    "--critic_dropout -0.1": "critic_dropout must be at least 0 and below 1",
    "--validation_frac 1.0": "validation_frac must be at least 0 and below 1",
    "--actor_wd -0.001": "actor_wd must be 0 or more",
    "--actor_l1_ratio 1.5": "actor_l1_ratio must be between 0 and 1",
    "--actor_learning_rate -1.0": "actor_learning_rate must be 0 or more",
    "--actor_gn true --hidden_dim 48": "actor_gn needs a hidden_dim of 64, 96, ...",
    "--critic_gn true --hidden_dim 32": "critic_gn needs a hidden_dim of 64, 96, ...",
    "--num_updates 1500": "num_updates must be a multiple of log_every, 1000",
    "--eval_every 1500": "eval_every must be a multiple of log_every, 1000",
    "--gamma [1": "while parsing",
    "--eval_noise [[0.2]]": "eval_noise can't be '[[0.2]]'; it is of type pairs of floats",
    "--eval_noise [[0.2,-1]]": "eval_noise must be pairs of 0 or more",
    "--eval_noise [[0,0]]": "eval_noise must be pairs of 0 or more, not both 0",
    "--seed 2147483648": "seed + num_seeds must be at most 2^31",
    "--eval_noise 0.2": "eval_noise can't be '0.2'; it is of type pairs of floats",
    "--video a.mp4": "video needs --evaluate RUN",
    "--video nowhere/a.mp4": "video: there is no directory nowhere",
    "--evaluate nowhere": "nowhere/config.yaml is not the config of a run ([Errno 2] No such file",
    "--config_path nowhere.yaml": "[Errno 2] No such file",
    "--regularisers DO+XN": "unknown regulariser 'XN'; there are none, DO, L2, L1, EN, LN, FN, GN,",
    "--regularisers DO+none": "unknown regulariser 'none'",
    "--regularisers L2+EN": "regularisers L2+EN has actor_",
    "--regularisers DO --actor_dropout 0.2": "regularisers DO has actor_dropout 0.1, but another value is asked for",
    "--dataset_name hopper-medium-v3": "unknown dataset 'hopper-medium-v3'; the nearest names are hopper-medium-v2",
}
BAD_REBRAC = {
    "--critic_loss huber": "critic_loss must be hl_gauss or mse",
    "--policy_freq 0": "policy_freq must be 1 or more",
    "--policy_freq 3": "log_every must be a multiple of policy_freq",
    "--v_min 3 --v_max 2": "v_min must be below v_max",
    "--sigma_frac 0.0": "sigma_frac must be above 0",
}
BAD_IQL = {"--expectile 2.0": "expectile must be between 0 and 1", "--log_std_min 3": "log_std_min must be below"}


@pytest.mark.parametrize(
    "script, arguments, message",
    [(script, *case) for script in (rebrac, iql) for case in BAD.items()]
    + [(rebrac, *case) for case in BAD_REBRAC.items()]
    + [(iql, *case) for case in BAD_IQL.items()],
)
def test_bad_values_get_one_clear_line(monkeypatch, script, arguments, message):
    monkeypatch.setattr(sys, "argv", ["script", *arguments.split()])
    monkeypatch.setattr(script, "train", lambda config, run: pytest.fail("training began"))
    with pytest.raises(SystemExit) as error:
        script.main()
    assert str(error.value).startswith(f"error: {message}") and "\n" not in str(error.value)


def test_an_unknown_flag_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rebrac.py", "--actor_droput", "0.1"])
    with pytest.raises(SystemExit):
        runs.parse(rebrac.Config)
    assert "unrecognized arguments: --actor_droput" in capsys.readouterr().err


def test_values_are_read_as_they_are_meant(monkeypatch):
    text = (
        "--actor_ln True --actor_bn false --num_updates 1e5 --actor_wd 1e-4 --validation_seed 3 --dataset_path a.hdf5"
    )
    monkeypatch.setattr(sys, "argv", ["rebrac.py", *text.split()])
    config = runs.parse(rebrac.Config)
    assert (config.actor_ln, config.actor_bn, config.num_updates, config.actor_wd) == (True, False, 100_000, 1e-4)
    assert (config.validation_seed, config.dataset_path, config.gamma) == (3, "a.hdf5", None)


# The paper's chosen strengths, ReBRAC's and IQL's
STRENGTHS = {
    "DO": ({"actor_dropout": 0.1}, {"actor_dropout": 0.1}),
    "L2": ({"actor_wd": 1e-3}, {"actor_wd": 0.1}),
    "L1": ({"actor_wd": 1e-5, "actor_l1_ratio": 1.0}, {"actor_wd": 0.01, "actor_l1_ratio": 1.0}),
    "EN": ({"actor_wd": 1e-4, "actor_l1_ratio": 0.5}, {"actor_wd": 0.01, "actor_l1_ratio": 0.5}),
    "InN": ({"actor_input_noise": 0.003}, {"actor_input_noise": 0.01}),
    "BCN": ({"actor_bc_noise": 0.01}, {"actor_bc_noise": 0.3}),
    "GrN": ({"actor_grad_noise": 0.01}, {"actor_grad_noise": 0.01}),
    **{name: 2 * ({f"actor_{name.lower()}": True},) for name in ("LN", "FN", "GN", "BN", "SN")},
}


@pytest.mark.parametrize("script", [rebrac, iql])
def test_a_regularisers_name_stands_for_its_flags_at_the_papers_strength(script):
    assert set(script.CHOSEN) == set(STRENGTHS)
    plain = script.Config(dataset_name="pen-human-v1")
    for name, flags in STRENGTHS.items():
        expected = script.tuned(dataclasses.replace(plain, **flags[script is iql]))
        assert script.tuned(dataclasses.replace(plain, regularisers=name)) == expected
        assert script.tuned(dataclasses.replace(plain, regularisers=name, **flags[script is iql])) == expected
    named = script.tuned(dataclasses.replace(plain, regularisers="LN+DO"))
    assert named == script.tuned(dataclasses.replace(plain, actor_dropout=0.1, actor_ln=True))
    assert runs.run_directory("a", named, script.tuned).rsplit("/", 1)[1].startswith("seed=0,actor_")


@pytest.mark.parametrize("script", [rebrac, iql])
def test_every_dataset_gets_a_valid_config(script):
    for name in script.TUNED:
        runs.check(script.tuned(script.Config(dataset_name=name)), {})


def test_every_number_of_a_config_has_a_bound_or_none_on_purpose():
    unbounded = {"eval_noise", "v_min", "v_max", "v_expand", "reward_shift", "log_std_min", "log_std_max"}
    bounded = set(" ".join(runs.BOUNDS.values()).split())
    for script in (rebrac, iql):
        numbers = {f.name for f in dataclasses.fields(script.Config) if "int" in str(f.type) or "float" in str(f.type)}
        assert numbers - bounded <= unbounded
