"""Collected files are D4RL's in format and meaning. Needs tools/requirements-collect.txt."""

import h5py
import numpy as np
import pytest

from harness.datasets import read_dataset
from harness.environments import make_env
from harness.errors import UserError

pytest.importorskip("sbx", reason="tools/requirements-collect.txt is not installed")

from tools import collect


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Collect all kinds; return their paths, and their arrays as the scripts read them."""
    directory = str(tmp_path_factory.mktemp("data"))
    collect.collect(
        collect.Config(
            env="hopper",
            kinds=list(collect.KINDS),
            medium_steps=300,
            expert_steps=500,
            transitions=200,
            directory=directory,
        )
    )
    paths = {}
    arrays = {}
    for kind in collect.KINDS:
        env = make_env(f"hopper-{kind}-v2")
        paths[kind] = f"{directory}/{env.unwrapped.dataset_url.split('/')[-1]}"
        arrays[kind] = read_dataset(paths[kind], env)
    return paths, arrays


@pytest.mark.parametrize("kind", collect.KINDS)
def test_a_file_says_what_is_in_it(collected, kind):
    paths, arrays = collected
    raw = arrays[kind]
    ends = np.flatnonzero(raw["terminals"] | raw["timeouts"])
    returns = [part.sum() for part in np.split(raw["rewards"], ends + 1)[: len(ends)]]
    env = make_env(f"hopper-{kind}-v2")
    scores = [100 * env.get_normalized_score(value) for value in returns]
    with h5py.File(paths[kind]) as file:
        assert file.attrs["episodes"] == len(ends)
        assert file.attrs["transitions"] == len(raw["rewards"])
        np.testing.assert_allclose(file.attrs["mean_score"], np.mean(scores), rtol=1e-4)
        np.testing.assert_allclose(file.attrs["best_score"], np.max(scores), rtol=1e-4)


def test_rollouts_are_whole_episodes(collected):
    _, arrays = collected
    for kind in ("random", "medium", "expert", "medium-expert"):
        assert arrays[kind]["terminals"][-1] or arrays[kind]["timeouts"][-1]
        assert len(arrays[kind]["rewards"]) >= 200


def test_replays_are_all_that_sac_saw(collected):
    _, arrays = collected
    assert len(arrays["medium-replay"]["rewards"]) == 300
    assert len(arrays["full-replay"]["rewards"]) == 500
    for key, column in arrays["medium-replay"].items():
        np.testing.assert_array_equal(arrays["full-replay"][key][:300], column)


def test_medium_expert_is_one_after_the_other(collected):
    _, arrays = collected
    for key, column in arrays["medium-expert"].items():
        both = np.concatenate([arrays["medium"][key], arrays["expert"][key]])
        np.testing.assert_array_equal(column, both)


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(env="ant"), "unknown ant; there are halfcheetah, hopper"),
        (dict(kinds=["rndom"]), "unknown rndom; there are random, medium-replay"),
        (dict(kinds=[]), "kinds names no dataset; there are random, medium-replay"),
        (dict(seed=-1), "seed must be 0 or more"),
        (dict(transitions=0), "medium_steps and transitions must be 1 or more"),
        (
            dict(kinds=["expert"], expert_steps=50_000),
            "expert_steps must be above medium_steps, 80000",
        ),
    ],
)
def test_a_senseless_flag_is_an_error_before_any_work(flags, message):
    with pytest.raises(UserError, match=f"^{message}"):
        collect.check(collect.Config(**flags))
