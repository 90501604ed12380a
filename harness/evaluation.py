"""Episodes of a policy in lock-step, with and without noise."""

from typing import NamedTuple

import imageio
import numpy as np

from harness.datasets import normalized_score
from harness.environments import inner, reset
from harness.errors import UserError
from harness.lockstep import Envs
from harness.members import seeds

NUM_VISITED = 10_000  # states of an evaluation, on which the actor is measured


class Episodes(NamedTuple):
    """The E episodes of an evaluation, of each seed. C of them are without noise.

    T is the longest episode's number of steps, rounded up to thousands.
    """

    returns: np.ndarray  # (seeds, E), of all episodes
    visited: np.ndarray  # (seeds, NUM_VISITED, S), drawn uniformly from the states without noise
    starts: np.ndarray  # (seeds, C, S), the first states of episodes without noise
    rewards: np.ndarray  # (seeds, C, T), of their steps, 0 after their ends
    lengths: np.ndarray  # (seeds, C), their numbers of steps


def evaluation_episodes(config):
    """List one seed's episodes in an evaluation as rows (episode, action_noise, state_noise).

    First come `eval_episodes` without noise. Each pair of `eval_noise` follows with as many, or
    in training with half as many.
    """
    num_noisy = config.eval_episodes
    if not config.evaluate:
        num_noisy = (config.eval_episodes + 1) // 2
    rows = [(episode, 0.0, 0.0) for episode in range(config.eval_episodes)]
    for action_noise, state_noise in config.eval_noise:
        rows += [(episode, action_noise, state_noise) for episode in range(num_noisy)]
    return rows


def score_columns(config):
    """Return the names of an evaluation's scores and the rows of `evaluation_episodes` of each.

    >>> score_columns(config)
    {"score": [0, 1], "score/action_noise=0.2": [2], "score/state_noise=0.05": [3]}
    """
    columns = {}
    for i, (_, action_noise, state_noise) in enumerate(evaluation_episodes(config)):
        name = "score"
        if action_noise:
            name += f"/action_noise={action_noise:g}"
        if state_noise:
            name += f"/state_noise={state_noise:g}"
        columns.setdefault(name, []).append(i)
    return columns


def make_envs(config):
    """Return the environments for an evaluation, one for each episode of each seed."""
    return Envs(config.dataset_name, config.num_seeds * len(evaluation_episodes(config)))


def evaluate(config, policy, envs, update):
    """Run the E episodes of `evaluation_episodes` for each seed, all of them in lock-step.

    `policy` maps states (seeds, E, S) to actions (seeds, E, A) and is called once a step. Noise
    is Gaussian. Action noise is added to the actions, which are then clipped to [-1, 1]. State
    noise is added to the states that the policy sees, in the environment's units.

    An episode's start and its noise depend only on the training seed, the update and the
    episode's number. So an episode with noise starts as the one without.

    Returns Episodes.
    """
    rows = evaluation_episodes(config)
    num_seeds, num_episodes = config.num_seeds, len(rows)
    numbers = []
    for seed in seeds(config).tolist():
        numbers += [(seed, update, row[0]) for row in rows]
    noise = np.tile(np.array(rows, np.float32)[:, 1:], (num_seeds, 1))
    action_noise, state_noise = noise.T
    has_noise = (noise > 0).any(1)

    observations = envs.reset(numbers)
    starts = observations.copy()
    state_dim = observations.shape[1]
    action_dim = envs.own[0].action_space.shape[0]
    noisy = np.flatnonzero(has_noise)
    draws = normal_draws([numbers[i] for i in noisy], state_dim + action_dim)
    running = np.arange(len(numbers))
    visited = []  # pairs of episodes and their states
    step_rewards = []  # of all episodes, 0 for those that have ended
    while len(running):
        visited.append((running, observations[running]))
        seen = observations.copy()  # by the policy
        draw = next(draws)
        seen[noisy] += state_noise[noisy, None] * draw[:, :state_dim]
        actions = np.array(policy(seen.reshape(num_seeds, num_episodes, -1)))
        actions = actions.reshape(len(numbers), -1)
        actions[noisy] += action_noise[noisy, None] * draw[:, state_dim:]
        actions[noisy] = actions[noisy].clip(-1, 1)  # D4RL's environments clip, too
        rewards = np.zeros(len(numbers))
        observations[running], rewards[running], done = envs.step(running, actions[running])
        step_rewards.append(rewards)
        running = running[~done]

    shape = (num_seeds, num_episodes)
    samples = sample_visited(visited, ~has_noise.reshape(shape), update)
    padding = -len(step_rewards) % 1000
    rewards = np.pad(np.transpose(step_rewards), [(0, 0), (0, padding)])
    # An episode ran at each of its steps
    lengths = np.bincount(np.concatenate([running for running, _ in visited]))
    without_noise = slice(0, config.eval_episodes)
    return Episodes(
        returns=sum(step_rewards).reshape(shape),
        visited=samples,
        starts=starts.reshape(*shape, -1)[:, without_noise],
        rewards=rewards.reshape(*shape, -1)[:, without_noise].astype(np.float32),
        lengths=lengths.reshape(shape)[:, without_noise],
    )


def sample_visited(visited, is_clean, update):
    """Draw NUM_VISITED of the states of each seed's clean episodes, (seeds, NUM_VISITED, S).

    `visited` has pairs of the episodes that ran in a step and their states. `is_clean` (seeds, E)
    says which episodes are without noise. A seed's draws are those of a seed that is trained alone.
    """
    episodes = np.concatenate([running for running, _ in visited])
    states = np.concatenate([states for _, states in visited])
    num_seeds, num_episodes = is_clean.shape
    samples = []
    for seed in range(num_seeds):
        is_own = episodes // num_episodes == seed
        own = states[is_own & is_clean.ravel()[episodes]]
        samples.append(np.random.default_rng(update).choice(own, NUM_VISITED))
    return np.stack(samples)


def normal_draws(numbers, size):
    """Yield the standard normal draws (len(numbers), size) of each step.

    Those of an episode depend on its row of `numbers` alone. They are drawn for 50 steps at once,
    which is quicker and gives the same.
    """
    rngs = [np.random.default_rng(row) for row in numbers]
    draws = np.empty((len(rngs), 50, size), np.float32)
    while True:
        for rng, own in zip(rngs, draws):
            rng.standard_normal(dtype=np.float32, out=own)
        yield from draws.swapaxes(0, 1)


def summary(scores):
    """Say the mean and standard deviation of scores (seeds, episodes).

    The standard deviation is over the seeds' means, or of a single seed over its episodes.
    """
    if len(scores) > 1:
        return f"{scores.mean():.1f} +- {scores.mean(1).std():.1f} over {len(scores)} seeds"
    return f"{scores.mean():.1f} +- {scores.std():.1f} over {scores.size} episodes"


def print_scores(config, policy, envs, update):
    """Evaluate a policy and print a line for each kind of noise."""
    episodes = evaluate(config, policy, envs, update)
    scores = normalized_score(config.dataset_name, episodes.returns)
    for name, index in score_columns(config).items():
        print(f"{name} {summary(scores[:, index])}")


def write_video(path, policy, env, *numbers):
    """Write a video, .mp4 or .gif, of an episode of a policy from states (S,) to actions (A,).

    It needs OpenGL. The episode's start depends on `numbers`.
    """
    observation = reset(env, *numbers)
    seconds = inner(env).dt  # of a step
    stride = max(1, round(0.04 / seconds))  # for about 25 frames a second
    steps = 0
    done = False
    try:
        env.render(mode="rgb_array")  # where OpenGL is missing this fails before a file is there
        with imageio.get_writer(path, fps=1 / (stride * seconds)) as video:
            while not done:
                if steps % stride == 0:
                    frame = env.render(mode="rgb_array")
                    video.append_data(frame[2:-2, 2:-2])  # sides that 16 divides
                observation, _, done, _ = env.step(policy(observation))
                steps += 1
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"can't write {path}: {error}") from error
