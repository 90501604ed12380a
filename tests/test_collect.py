"""Collected files are D4RL's in format and meaning. Runs where requirements-collect.txt is installed."""

import h5py
import numpy as np
import pytest

import tasks

pytest.importorskip("sbx")


def test_collected_files_can_be_learnt_from(tmp_path):
    import collect

    config = collect.Config(
        env="hopper", kinds=list(collect.KINDS), medium_steps=300, expert_steps=500, transitions=200,
        directory=str(tmp_path),
    )  # fmt: skip
    collect.main(config)
    raws = {}
    for kind in collect.KINDS:
        env = tasks.make_env(f"hopper-{kind}-v2")
        path = str(tmp_path / env.unwrapped.dataset_url.split("/")[-1])
        raw = raws[kind] = tasks.read_dataset(path, env)
        with h5py.File(path) as file:
            ends = np.flatnonzero(raw["terminals"] | raw["timeouts"])
            assert file.attrs["episodes"] == len(ends) and file.attrs["transitions"] == len(raw["rewards"])
            returns = [part.sum() for part in np.split(raw["rewards"], ends + 1)[: len(ends)]]
            scores = [100 * env.get_normalized_score(value) for value in returns]
            np.testing.assert_allclose(file.attrs["mean_score"], np.mean(scores), rtol=1e-4)
            np.testing.assert_allclose(file.attrs["best_score"], np.max(scores), rtol=1e-4)
        if "replay" not in kind:  # whole episodes, whose every step leads to the next row's state
            assert raw["terminals"][-1] or raw["timeouts"][-1]
    assert [len(raws[f"{kind}-replay"]["rewards"]) for kind in ("medium", "full")] == [300, 500]
    for key in raws["medium"]:
        both = np.concatenate([raws["medium"][key], raws["expert"][key]])
        np.testing.assert_array_equal(raws["medium-expert"][key], both)
        np.testing.assert_array_equal(raws["full-replay"][key][:300], raws["medium-replay"][key])


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(kinds=["rndom"]), "unknown rndom; there are random, medium-replay"),
        (dict(transitions=0), "medium_steps and transitions must be 1 or more"),
        (dict(kinds=["expert"], expert_steps=50_000), "expert_steps must be above medium_steps, 80000"),
    ],
)
def test_what_cannot_be_meant_gets_one_clear_line(flags, message):
    import collect

    with pytest.raises(SystemExit, match=f"error: {message}"):
        collect.main(collect.Config(**flags))
