"""What the scripts have in common: sections to the letter, fields, and how flags are used."""

import difflib
import inspect
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OURS, both_scripts, small_config, small_data
from runs_helpers import contents, differences, stopped

import bcq
import iql
import rebrac
from harness.checkpoint import flatten
from harness.scripts import scripts


def source(script):
    with open(script.__file__) as file:
        return file.read()


def sections(script):
    """Return the text of each section, by its heading."""
    parts = re.split(r"^# --- (.*) ---$", source(script), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


SHARED = ["Data", "Regularised layers", "Optimiser", "Appendix: inside the actor", "Main"]

# In the section "Training" these lines are ReBRAC's (-) or another algorithm's (+) alone
TRAINING = {
    "iql": '''
- index = jax.random.choice(batch_key, data["train"], (config.policy_freq, config.batch_size))
+ index = jax.random.choice(batch_key, data["train"], (config.batch_size,))
- return jax.lax.scan(step, state, length=config.log_every // config.policy_freq)
+ return jax.lax.scan(step, state, length=config.log_every)
- """Return the actions (B, A) in evaluation, for normalised states (B, S)."""
+ """Return the actions (B, A) in evaluation, the means, for normalised states (B, S)."""
- return forward(network, actor, observations)
+ means, _ = forward(network, actor, observations)
+ return means
- config = with_value_range(config, data)
''',
    "cql": '''
- index = jax.random.choice(batch_key, data["train"], (config.policy_freq, config.batch_size))
+ index = jax.random.choice(batch_key, data["train"], (config.batch_size,))
- return jax.lax.scan(step, state, length=config.log_every // config.policy_freq)
+ return jax.lax.scan(step, state, length=config.log_every)
- """Return the actions (B, A) in evaluation, for normalised states (B, S)."""
+ """Return the actions (B, A) in evaluation, tanh of the means, for normalised states (B, S)."""
- return forward(network, actor, observations)
+ means, _ = forward(network, actor, observations)
+ return jnp.tanh(means)
- config = with_value_range(config, data)
''',
    "bcq": '''
- index = jax.random.choice(batch_key, data["train"], (config.policy_freq, config.batch_size))
+ index = jax.random.choice(batch_key, data["train"], (config.batch_size,))
- return jax.lax.scan(step, state, length=config.log_every // config.policy_freq)
+ return jax.lax.scan(step, state, length=config.log_every)
- """Return the actions (B, A) in evaluation, for normalised states (B, S)."""
+ """Return the actions (B, A) at the latent 0, for normalised states (B, S), for the analysis."""
- return act(config, actor, data, (observations - data["mean"]) / data["std"])
+ return best_candidates(config, actor, data, observations)
- config = with_value_range(config, data)
''',
}


@both_scripts
def test_what_the_scripts_share_is_the_same_to_the_letter(script):
    ours = sections(rebrac)
    theirs = sections(script)
    if script is bcq:  # its last hidden layer has a width of its own
        layers = "Regularised layers"
        own = "hidden_dense(config, is_last)"
        theirs[layers] = theirs[layers].replace(own, "hidden_dense(config)")
    if not hasattr(script, "TUNED"):
        lines = re.findall(r"    if given.dataset_name not in TUNED:\n.*\n", ours["Main"])
        ours["Main"] = ours["Main"].replace(*lines, "")
    for name in SHARED:
        message = f'the section "{name}" of {script.NAME} differs from that of ReBRAC'
        assert ours[name] == theirs[name], message
    in_both = [name for name in ours if name in theirs]
    assert in_both == [name for name in theirs if name in ours]


@pytest.mark.parametrize("name", TRAINING)
def test_training_differs_in_the_algorithms_own_lines_alone(name):
    ours = sections(rebrac)["Training"].splitlines()
    theirs = sections(OURS[name])["Training"].splitlines()
    lines = difflib.unified_diff(ours, theirs, n=0, lineterm="")
    differing = []
    for line in lines:
        if not line.startswith(("---", "+++", "@@")):
            differing.append(f"{line[0]} {line[1:].strip()}")
    message = f'the section "Training" of {name}.py differs otherwise than TRAINING lists above'
    assert differing == TRAINING[name].strip().splitlines(), message


def imports(script):
    """Return a script's lines between its docstring and its name."""
    code = source(script).removeprefix(f'"""{script.__doc__}"""')
    return code[: code.index("NAME = ")].splitlines()


@both_scripts
def test_imports_are_the_same_but_for_those_that_an_algorithm_has_no_use_for(script):
    theirs = imports(script)
    assert [line for line in imports(rebrac) if line in theirs] == theirs
    assert len(theirs) > 30


# --- Config ---


def fields(script, heading):
    """Return the lines of a heading's fields, by name: type and default, and the comment."""
    text = inspect.getsource(script.Config)
    part = text.split(f"    # {heading}\n")[1].split("\n    # ")[0]
    return {
        name: (value, comment)
        for name, value, comment in re.findall(r"^    (\w+): (.*?)  # (.*)$", part, re.MULTILINE)
    }


@both_scripts
def test_fields_of_the_data_are_the_same_but_for_a_default(script):
    ours = fields(rebrac, "Data")
    theirs = fields(script, "Data")
    assert list(ours) == list(theirs)
    assert len(ours) == 7
    for name in ours:
        value, comment = ours[name]
        if name == "normalize_states":
            value = theirs[name][0]
        assert theirs[name] == (value, comment)


@both_scripts
def test_fields_of_the_run_are_the_same_but_for_a_comment(script):
    ours = fields(rebrac, "Run")
    theirs = fields(script, "Run")
    assert list(ours) == list(theirs)
    assert len(ours) >= 12
    for name in ours:
        value, comment = ours[name]
        if name == "num_updates" and script is not rebrac:
            comment = comment.replace("updates of the critics", "updates")
        assert theirs[name] == (value, comment), name


@both_scripts
def test_all_scripts_have_the_same_regularisers(script):
    def flags(script):
        names = set(vars(script.Config()))
        return {name for name in names if name.startswith(("actor_", "critic_"))}

    own = {"critic_loss", "actor_bc_coef", "critic_bc_coef", "actor_q_coef"}
    if script is not rebrac:
        assert own.isdisjoint(flags(script))
        for one, other in ((rebrac, script), (script, rebrac)):
            missing = sorted(flags(one) - flags(other) - own)
            assert not missing, (
                f"{other.NAME} lacks {', '.join(missing)} of {one.NAME}: add them, or keep the "
                "scripts as they are, and put your change into a copy with a NAME of its own"
            )
    message = f"the names in CHOSEN of {script.NAME} and ReBRAC differ"
    assert list(script.CHOSEN) == list(rebrac.CHOSEN), message
    if hasattr(script, "TUNED"):
        assert list(script.TUNED) == list(rebrac.TUNED)


@both_scripts
def test_every_flag_is_used_by_its_name(script):
    """So that a search for a flag finds all of its uses."""
    code = source(script)
    for name in vars(script.Config()):
        if name.startswith(("actor_", "critic_")):
            assert re.search(rf"\b(config|own)\.{name}\b", code), name
    assert not re.search(r"getattr\([^)]*f[\"']", code)
    assert not re.search(r"f[\"'](actor|critic)_", code)
    assert "_{" not in code.replace("Hidden_{k}", "")


# --- Any script, also a fork's ---

any_script = pytest.mark.parametrize("script", scripts().values(), ids=scripts())

NEEDED = """
NAME Config BOUNDS HOST_FLOATS constraints tuned CHOSEN BEST make_dataset transitions init_state
epoch policy train main
""".split()


@any_script
def test_a_script_provides_what_the_tools_need(script):
    advice = 'see "What a script provides" in harness/README.md'
    missing = [name for name in NEEDED if not hasattr(script, name)]
    assert not missing, f"{script.NAME} lacks {', '.join(missing)}: {advice}"
    needed = [*fields(rebrac, "Data"), *fields(rebrac, "Run")]
    needed += ["batch_size", "hidden_dim", "actor_lr_decay"]
    missing = [name for name in needed if name not in vars(script.Config())]
    assert not missing, f"the Config of {script.NAME} lacks {', '.join(missing)}: {advice}"


@any_script
def test_a_states_arrays_do_not_depend_on_strengths(script):
    """A run of strength 0 may go on in a group, where the 0 is traced, or alone again."""
    batch = script.transitions(small_data(), np.arange(2))

    def shapes(config):
        state = jax.eval_shape(lambda: script.init_state(config, batch, 0))
        return {path: array.shape for path, array in flatten(state).items()}

    config = small_config(script)
    expected = shapes(config)
    strengths = [
        name
        for name, value in vars(config).items()
        if type(value) is float
        and name.startswith(("actor_", "critic_"))
        and not name.endswith(("coef", "learning_rate"))
    ]
    assert len(strengths) >= 5
    for name in strengths:
        found = shapes(replace(config, **{name: jnp.float32(0.1)}))
        message = f"init_state of {script.NAME} must make the same arrays whether {name} is on"
        assert found == expected, message


FORKS = {name: script for name, script in scripts().items() if name not in OURS}


@pytest.mark.slow
@pytest.mark.parametrize("script", FORKS.values() or [iql], ids=lambda script: script.NAME)
def test_a_forks_script_trains_and_resumes(script, start, monkeypatch):
    """Where there is no fork, one of ours does."""
    whole = contents(start(script, results="whole"))
    directory = stopped(start, monkeypatch, script=script)
    assert start(script) == directory
    assert differences(whole, contents(directory)) == []


def test_scripts_are_found_with_rebrac_first():
    found = scripts()
    assert list(found)[0] == "rebrac"
    assert found["rebrac"] is rebrac
    assert found["iql"] is iql
    assert {"ReBRAC", "IQL", "CQL"} <= {script.NAME for script in found.values()}
