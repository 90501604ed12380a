"""D4RL's tasks: their environments, their dataset files, and episodes of a policy in them."""

import contextlib
import functools
import http.client
import io
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from multiprocessing.connection import Connection

import h5py
import imageio
import numpy as np

from mujoco210 import d4rl, gym

NUM_STATES = 10_000  # at most, in each batch in which the actor is watched


def make_env(name):
    """One of D4RL's environments."""
    with contextlib.redirect_stdout(io.StringIO()):  # AntMaze prints its targets
        return gym.make(name)


def make_envs(config):
    """The environments for an evaluation, one for each episode of each seed."""
    return Envs(config.dataset_name, config.num_seeds * len(conditions(config)))


# --- Datasets ---


def dataset_file(config, env):
    """Path of the dataset's file, after a download to D4RL's own cache if it isn't there yet."""
    if config.dataset_path is not None:
        return config.dataset_path
    url, path = env.unwrapped.dataset_url, env.unwrapped.dataset_filepath
    if not os.path.exists(path):
        print(f"downloading {url} to {path}", flush=True)
        socket.setdefaulttimeout(60)
        try:  # under a name of this process's own first, so that a file cut off is never taken for a whole one
            with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
                urllib.request.urlretrieve(url, os.path.join(folder, "dataset"))
                os.replace(os.path.join(folder, "dataset"), path)
        except (OSError, http.client.HTTPException) as error:
            sys.exit(
                f"error: can't download {url} ({error}); get it by hand and put it at {path}, or use --dataset_path"
            )
        finally:
            socket.setdefaulttimeout(None)
    return path


def read_dataset(path, env):
    """The arrays of a file in D4RL's HDF5 format, checked against the environment.

    Returns observations (N, S), actions (N, A), rewards (N,) as float32, and terminals, timeouts (N,) as bool. Without
    timeouts in the file, as in D4RL's oldest, an episode ends at a terminal or at the environment's time limit.
    """
    if not os.path.isfile(path):
        sys.exit(f"error: there is no file {path}")
    shapes = dict(
        observations=env.observation_space.shape,
        actions=env.action_space.shape,
        rewards=(),
        terminals=(),
        timeouts=(),
    )
    try:
        with h5py.File(path, "r") as file:
            raw = {key: np.asarray(file[key][()]) for key in shapes if key in file}
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"error: {path} is not a whole HDF5 file of D4RL's ({error}); remove it and get it again")
    for key, shape in shapes.items():
        if key not in raw and key != "timeouts":
            sys.exit(f"error: {path} has no {key!r}; D4RL's files have {', '.join(shapes)}")
        if key not in raw:
            continue
        if raw[key].dtype.kind not in "fiub":
            sys.exit(f"error: {key} in {path} are not numbers but {raw[key].dtype}")
        if shape == () and raw[key].shape[1:] == (1,):
            raw[key] = raw[key][:, 0]
        if raw[key].ndim == 0 or raw[key].shape[1:] != shape:
            sys.exit(f"error: {key} in {path} have shape {raw[key].shape}, but (N, *{shape}) in {env.spec.id}")
        if len(raw[key]) != len(raw["observations"]):
            sys.exit(f"error: {path} has {len(raw['observations'])} observations but {len(raw[key])} {key}")
        with np.errstate(over="ignore"):
            raw[key] = raw[key].astype(np.float32, copy=False)
        if not np.isfinite(raw[key]).all():
            row = np.argwhere(~np.isfinite(raw[key]))[0][0]
            sys.exit(f"error: {key} in {path} are NaN or infinite in row {row}")
        if key in ("terminals", "timeouts"):
            raw[key] = raw[key].astype(bool)
    if "timeouts" not in raw:
        steps, limit = np.arange(len(raw["terminals"])), env._max_episode_steps
        starts = np.maximum.accumulate(np.where(np.append(True, raw["terminals"][:-1]), steps, 0))
        raw["timeouts"] = (steps - starts) % limit == limit - 1
    if not (raw["terminals"] | raw["timeouts"]).any():
        sys.exit(f"error: {path} has no whole episode: none of its steps is a terminal or a timeout")
    if (largest := np.abs(raw["actions"]).max()) > 1 + 1e-4:
        sys.exit(f"error: actions in {path} reach {largest:.3g} in absolute value; D4RL's stay within [-1, 1]")
    return raw


def episode_returns(raw):
    """Undiscounted returns of the whole episodes in a file."""
    ends = np.flatnonzero(raw["terminals"] | raw["timeouts"])
    return np.diff(np.cumsum(raw["rewards"], dtype=np.float64)[ends], prepend=0.0)


def load_dataset(config):
    """The arrays of the config's dataset, of which it prints a line."""
    env = make_env(config.dataset_name)
    raw = read_dataset(dataset_file(config, env), env)
    scores = normalized_score(config, episode_returns(raw))
    print(
        f"{config.dataset_name}: {len(raw['rewards'])} steps, {len(scores)} whole episodes, whose score is "
        f"{scores.mean():.1f} on average and {scores.max():.1f} at best"
    )
    return raw


def make_samples(data):
    """In what the actor is watched, the same in each evaluation: the indices of at most NUM_STATES steps, `train` and
    `validation`, and `random` states (NUM_STATES, S), uniform in the range of the normalised states for training."""
    rng, columns = np.random.default_rng(0), (column[data["train"]] for column in data["observations"].T)
    low, high = np.array([(column.min(), column.max()) for column in columns]).T  # by column, to spare memory
    parts = [part for part in ("train", "validation") if len(data[part])]
    samples = {part: rng.choice(data[part], min(len(data[part]), NUM_STATES), replace=False) for part in parts}
    random = rng.uniform(low, high, (NUM_STATES, len(low)))
    return samples | {"random": random.astype(np.float32)}


def fingerprint(data):
    """A checksum of a dictionary of arrays."""
    return functools.reduce(lambda value, key: zlib.crc32(np.ascontiguousarray(data[key]), value), sorted(data), 0)


# --- Episodes of a policy ---


def conditions(config):
    """What one seed's episodes in an evaluation are: rows of number, action noise, state noise. Those without noise
    come first, `eval_episodes` of them; then as many for each pair of `eval_noise`, in training half as many."""
    rows = [(i, 0.0, 0.0) for i in range(config.eval_episodes)]
    noisy = config.eval_episodes if config.evaluate else -(-config.eval_episodes // 2)
    return rows + [(i, *pair) for pair in config.eval_noise for i in range(noisy)]


def reset(env, *numbers):
    """Resets an environment to the start state that `numbers` determine; returns the first observation (S,)."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    getattr(env.unwrapped, "_wrapped_env", env.unwrapped).seed(seed)
    np.random.seed(seed)  # noqa: NPY002, AntMaze draws its start and its target from here
    with contextlib.redirect_stdout(io.StringIO()):
        return env.reset()


def reset_all(envs, numbers):
    return [np.stack([reset(env, *row) for env, row in zip(envs, numbers)]).astype(np.float32)]


def step_all(envs, index, actions):
    observations, rewards, done, _ = zip(*[envs[i].step(action) for i, action in zip(index, actions)])
    return np.stack(observations).astype(np.float32), np.array(rewards), np.array(done)


class Envs:
    """Copies of an environment that are stepped together: by this process, and where it has more cores also by others,
    which start at the first reset. How many they are changes no result."""

    def __init__(self, name, number, processes=None):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        processes = processes or max(1, min(cores, number // 4, 8))
        self.name, self.own, self.others = name, [], []
        self.starts = np.arange(processes) * number // processes  # of the processes' shares; the first is this one's
        self.sizes = np.diff(self.starts, append=number)

    def start(self):
        for size in self.sizes[1:]:
            connection, end = multiprocessing.Pipe()
            command = [sys.executable, __file__, self.name, str(size), str(end.fileno())]
            process = subprocess.Popen(command, pass_fds=[end.fileno()], start_new_session=True)  # which Ctrl-C spares
            end.close()
            self.others.append((process, connection))
        self.own = [make_env(self.name) for _ in range(self.sizes[0])]

    def __del__(self):
        for process, connection in self.others:
            connection.close()
            process.wait()

    def each(self, function, shares):
        """The results of a function of environments and more, for each process's share of the latter."""
        others = [(other, share) for (_, other), share in zip(self.others, shares[1:]) if len(share[0])]
        try:
            for other, share in others:
                other.send((function.__name__, share))
            results = [function(self.own, *shares[0])] if len(shares[0][0]) else []
            results += [other.recv() for other, _ in others]
        except (EOFError, ConnectionError):
            sys.exit("error: a process that steps environments has died; the same command goes on")
        return [np.concatenate(part) for part in zip(*results)]

    def reset(self, numbers):
        """Resets each environment by its row of `numbers`; returns the observations (E, S)."""
        if not self.own:
            self.start()
        return self.each(reset_all, [(share,) for share in np.split(np.array(numbers), self.starts[1:])])[0]

    def step(self, running, actions):
        """Steps the environments `running` (R,); returns their observations (R, S), rewards and ends (R,)."""
        cuts = np.searchsorted(running, self.starts[1:])
        parts = zip(self.starts, np.split(running, cuts), np.split(actions, cuts))
        return self.each(step_all, [(index - start, part) for start, index, part in parts])


def serve(name, number, descriptor):
    """What another process of `Envs` does, until that is gone."""
    envs, connection = [make_env(name) for _ in range(number)], Connection(descriptor)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            function, arguments = connection.recv()
            connection.send(globals()[function](envs, *arguments))


def evaluate(config, policy, envs, update):
    """Episodes of a policy that maps states (seeds, E, S) to actions (seeds, E, A), for the E rows of `conditions`.

    All are stepped together, with one call of the policy a step. An episode's start state and its noises depend on the
    training seed, the update and the episode's number alone, so that an episode with noise is the one without noise
    but for it. Noise is Gaussian, on actions (clipped to [-1, 1] after it) and on the states that the policy sees, in
    the environment's units; a pair of noises is their standard deviations.

    Returns the returns (seeds, E), and states (seeds, NUM_STATES, S) drawn uniformly from those met in the episodes
    without noise.
    """
    rows = conditions(config)
    shape = config.num_seeds, len(rows)
    numbers = [(config.seed + seed, update, row[0]) for seed in range(shape[0]) for row in rows]
    observations = envs.reset(numbers)
    seen, dims = observations.copy(), (observations.shape[1], *envs.own[0].action_space.shape)
    action_noise, state_noise = np.tile(np.array(rows, np.float32)[:, 1:], (shape[0], 1)).T
    noisy = (action_noise > 0) | (state_noise > 0)
    rngs = [np.random.default_rng(key) if noise else None for key, noise in zip(numbers, noisy)]
    returns, running, visited = np.zeros(len(numbers)), np.arange(len(numbers)), []
    while len(running):
        visited.append((running, observations[running]))
        seen[running] = observations[running]
        shaken = running[noisy[running]]
        if len(shaken):
            draws = np.stack([rngs[i].standard_normal(sum(dims), np.float32) for i in shaken])
            seen[shaken] += state_noise[shaken, None] * draws[:, : dims[0]]
        actions = np.array(policy(seen.reshape(*shape, -1))).reshape(len(numbers), -1)
        if len(shaken):
            actions[shaken] += action_noise[shaken, None] * draws[:, dims[0] :]
            actions[shaken] = actions[shaken].clip(-1, 1)
        observations[running], rewards, done = envs.step(running, actions[running])
        returns[running] += rewards
        running = running[~done]
    index, states = (np.concatenate(part) for part in zip(*visited))
    states = [states[~noisy[index] & (index // shape[1] == seed)] for seed in range(shape[0])]
    drawn = [np.random.default_rng(update).choice(met, NUM_STATES) for met in states]  # as each seed's would be alone
    return returns.reshape(shape), np.stack(drawn)


def normalized_score(config, returns):
    """D4RL's normalised scores of returns, x 100."""
    return 100 * d4rl.get_normalized_score(config.dataset_name, returns)


def record(path, policy, env, *numbers):
    """Writes a video, .mp4 or .gif, of an episode of a policy from states (S,) to actions (A,). It needs OpenGL."""
    observation, done, steps = reset(env, *numbers), False, 0
    dt = getattr(env.unwrapped, "_wrapped_env", env.unwrapped).dt
    stride = max(1, round(0.04 / dt))  # about 25 frames a second
    try:
        env.render(mode="rgb_array")  # before a file is there
        with imageio.get_writer(path, fps=1 / (stride * dt)) as video:
            while not done:
                if steps % stride == 0:
                    video.append_data(env.render(mode="rgb_array")[2:-2, 2:-2])  # sides that 16 divides
                observation, _, done, _ = env.step(policy(observation))
                steps += 1
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: can't write {path}: {error}")


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
