"""What one does with a run's checkpoint: load its policy, evaluate it, film it."""

import dataclasses
import functools

import jax
import numpy as np

from harness.checkpoint import last_checkpoint, unflatten
from harness.config import check, given_words
from harness.devices import host
from harness.directory import load_config
from harness.errors import UserError
from harness.evaluation import make_envs, print_scores, write_video
from harness.members import check_device, seeds

EVALUATION_FLAGS = ("evaluate", "video", "eval_episodes", "eval_noise")


def host_policy(policy, config, actor, data):
    """Return a script's `policy` as a function from states (members, E, S) to actions.

    It runs on JAX's CPU backend, also where training has a GPU. So scores don't depend on where
    one trains, and playing doesn't wait for training. `actor` may be longer than the members, as
    devices.py has it.
    """
    members = len(seeds(config))
    actor = jax.tree.map(lambda x: x[:members], actor)
    needed = dict(mean=data["mean"], std=data["std"], actions=data["actions"][:1])
    actor, needed = jax.device_put((actor, needed), host())
    return functools.partial(policy, config, actor, needed)


def load(config_class, policy, directory):
    """Load a run.

    Returns its config, the update of its checkpoint, and its policies as a function from states
    (seeds, E, S) to actions (seeds, E, A). `config_class` and `policy` are its script's.
    """
    config = load_config(config_class, directory)
    found = last_checkpoint(directory)
    if found is None:
        raise UserError(f"{directory} has no checkpoint")
    check_device()
    _, arrays, about = found
    actors = unflatten(arrays, "states/actor")
    data = unflatten(arrays, "data")
    return config, about["update"], host_policy(policy, config, actors, data)


def load_policy(script, directory, seed=None):
    """Return the policy of a run of `script`, the algorithm's module.

    It is a function from states (..., S), as the environment gives them, to actions (..., A).
    `seed` is one of the run's, by default its first.
    """
    config, _, policies = load(script.Config, script.policy, directory)
    return one_policy(config, policies, config.seed if seed is None else seed)


def one_policy(config, policies, seed):
    """Return the policy of one seed, given those of all as `load` returns them."""
    last = config.seed + config.num_seeds - 1
    if not config.seed <= seed <= last:
        raise UserError(f"the run has the seeds {config.seed} to {last}, not {seed}")

    def policy(observations):
        observations = np.asarray(observations, np.float32)
        rows = observations.reshape(-1, observations.shape[-1])
        actions = policies(np.broadcast_to(rows, (config.num_seeds, *rows.shape)))
        own = np.asarray(actions[seed - config.seed])
        return own.reshape(*observations.shape[:-1], -1)

    return policy


def evaluate_run(given, policy, constraints, bounds):
    """Do as `--evaluate RUN` says: print the scores of its policies, and film an episode."""
    fields = dict(evaluate=given.evaluate, video=given.video)
    for name in given_words(type(given)):
        if name not in EVALUATION_FLAGS:
            raise UserError(f"--evaluate takes no --{name}: the run's own config.yaml says it")
        fields[name] = getattr(given, name)
    config, update, policies = load(type(given), policy, given.evaluate)
    config = dataclasses.replace(config, **fields)
    check(config, constraints, bounds)
    envs = make_envs(config)
    print_scores(config, policies, envs, update)
    if config.video:
        first = one_policy(config, policies, config.seed)
        write_video(config.video, first, envs.own[0], config.seed, update, 0)
