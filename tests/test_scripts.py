"""What the scripts have in common: sections to the letter, fields, and how flags are used."""

import difflib
import inspect
import re

from conftest import both_scripts

import iql
import rebrac
from harness.scripts import scripts


def source(script):
    with open(script.__file__) as file:
        return file.read()


def sections(script):
    """Return the text of each section, by its heading."""
    parts = re.split(r"^# --- (.*) ---$", source(script), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


SHARED = ["Data", "Regularised layers", "Optimiser", "Appendix: inside the actor", "Main"]

# In the section "Training" these lines are ReBRAC's (-) or IQL's (+) alone
TRAINING = '''
- index = jax.random.choice(batch_key, data["train"], (config.policy_freq, config.batch_size))
+ index = jax.random.choice(batch_key, data["train"], (config.batch_size,))
- return jax.lax.scan(step, state, length=config.log_every // config.policy_freq)
+ return jax.lax.scan(step, state, length=config.log_every)
- """Return the actions (B, A) in evaluation, for normalised states (B, S)."""
+ """Return the actions (B, A) in evaluation, the means, for normalised states (B, S)."""
- return forward(nets.actor, actor, observations)
+ means, _ = forward(nets.actor, actor, observations)
+ return means
- config = with_value_range(config, data)
'''


def test_what_both_scripts_share_is_the_same_to_the_letter():
    ours = sections(rebrac)
    theirs = sections(iql)
    for name in SHARED:
        assert ours[name] == theirs[name], name
    in_both = [name for name in ours if name in theirs]
    assert in_both == [name for name in theirs if name in ours]


def test_training_differs_in_the_algorithms_own_lines_alone():
    ours = sections(rebrac)["Training"].splitlines()
    theirs = sections(iql)["Training"].splitlines()
    lines = difflib.unified_diff(ours, theirs, n=0, lineterm="")
    differing = []
    for line in lines:
        if not line.startswith(("---", "+++", "@@")):
            differing.append(f"{line[0]} {line[1:].strip()}")
    assert differing == TRAINING.strip().splitlines()


def test_imports_are_the_same():
    texts = []
    for script in (rebrac, iql):
        code = source(script).removeprefix(f'"""{script.__doc__}"""')
        texts.append(code[: code.index("NAME = ")])
    assert texts[0] == texts[1]


# --- Config ---


def fields(script, heading):
    """Return the lines of a heading's fields, by name: type and default, and the comment."""
    text = inspect.getsource(script.Config)
    part = text.split(f"    # {heading}\n")[1].split("\n    # ")[0]
    return {
        name: (value, comment)
        for name, value, comment in re.findall(r"^    (\w+): (.*?)  # (.*)$", part, re.MULTILINE)
    }


def test_fields_of_the_data_are_the_same_but_for_a_default():
    ours = fields(rebrac, "Data")
    theirs = fields(iql, "Data")
    assert list(ours) == list(theirs)
    assert len(ours) == 7
    for name in ours:
        value, comment = ours[name]
        if name == "normalize_states":
            assert theirs[name] == ("bool = True", comment)
        else:
            assert theirs[name] == (value, comment)


def test_fields_of_the_run_are_the_same_but_for_a_comment():
    ours = fields(rebrac, "Run")
    theirs = fields(iql, "Run")
    assert list(ours) == list(theirs)
    assert len(ours) >= 12
    for name in ours:
        value, comment = ours[name]
        if name == "num_updates":
            comment = comment.replace("updates of the critics", "updates")
        assert theirs[name] == (value, comment), name


def test_both_scripts_have_the_same_regularisers():
    def flags(script):
        names = set(vars(script.Config()))
        return {name for name in names if name.startswith(("actor_", "critic_"))}

    own = {"critic_loss", "actor_bc_coef", "critic_bc_coef", "actor_q_coef"}
    assert flags(rebrac) - flags(iql) == own
    assert flags(iql) - flags(rebrac) == set()
    assert list(rebrac.CHOSEN) == list(iql.CHOSEN)
    assert list(rebrac.TUNED) == list(iql.TUNED)


@both_scripts
def test_every_flag_is_used_by_its_name(script):
    """So that a search for a flag finds all of its uses."""
    code = source(script)
    for name in vars(script.Config()):
        if name.startswith(("actor_", "critic_")):
            assert re.search(rf"\bconfig\.{name}\b", code), name
    assert not re.search(r"getattr\([^)]*f[\"']", code)
    assert not re.search(r"f[\"'](actor|critic)_", code)
    assert "_{" not in code.replace("Hidden_{k}", "")


def test_scripts_are_found_with_rebrac_first():
    found = scripts()
    assert list(found)[0] == "rebrac"
    assert found["rebrac"] is rebrac
    assert found["iql"] is iql
    assert [script.NAME for script in found.values()][:2] == ["ReBRAC", "IQL"]
