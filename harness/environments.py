"""D4RL's environments, and copies of one that are stepped together."""

import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
import warnings
from multiprocessing.connection import Connection

import numpy as np

from harness.errors import UserError

# Packages that D4RL tries to import for tasks that the paper never uses. pybullet prints, and
# dm_control takes seconds. None in sys.modules makes an import fail at once.
UNUSED = ("pybullet", "pybullet_envs", "dm_control", "flow", "carla")


def import_silently():
    """Import gym and D4RL without what they print, and return both."""
    blocked = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(blocked))
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        import_mujoco()
        d4rl = import_d4rl()
        import gym
    for name in blocked:
        del sys.modules[name]
    gym.logger.set_level(gym.logger.ERROR)
    return gym, d4rl


def import_mujoco():
    """Import MuJoCo, also where MUJOCO_GL names what isn't there: training draws nothing."""
    try:
        import mujoco  # noqa: F401
    except Exception:  # of many kinds, from OpenGL
        if "MUJOCO_GL" not in os.environ:
            raise
        os.environ["MUJOCO_GL"] = "disabled"  # here, and in the processes that step environments
        import mujoco  # noqa: F401


def import_d4rl():
    """Import D4RL, which makes its folder for datasets, also where that can't be made."""
    folder = os.environ.get("D4RL_DATASET_DIR", os.path.expanduser("~/.d4rl/datasets"))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:  # no matter unless something is downloaded
        os.environ["D4RL_DATASET_DIR"] = os.sep  # a folder that is there
    import d4rl

    os.environ["D4RL_DATASET_DIR"] = folder
    d4rl.offline_env.DATASET_PATH = folder
    return d4rl


gym, d4rl = import_silently()

# An environment of your own is registered here, since every process that steps it reads this file:
#   gym.register("mine-v2", entry_point="mine:MyEnv", max_episode_steps=1000)
#   d4rl.infos.REF_MIN_SCORE["mine-v2"] = 0.0  # the return whose score is 0
#   d4rl.infos.REF_MAX_SCORE["mine-v2"] = 3000.0  # the return whose score is 100


def registered_names():
    """Return the names of the environments that D4RL can score."""
    return [name for name in gym.envs.registry.env_specs if name in d4rl.infos.REF_MIN_SCORE]


def make_env(name):
    """Make one of D4RL's environments.

    The environment variable EPISODE_STEPS, which the tests set, shortens its episodes.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # AntMaze prints its targets
        env = gym.make(name)
    if "EPISODE_STEPS" in os.environ:
        env._max_episode_steps = int(os.environ["EPISODE_STEPS"])
    return env


def inner(env):
    """Return the environment within the wrappers, which has the seed and the time step."""
    return getattr(env.unwrapped, "_wrapped_env", env.unwrapped)


def reset(env, *numbers):
    """Reset an environment to the start that `numbers` determine; return the first state (S,)."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    inner(env).seed(seed)
    np.random.seed(seed)  # noqa: NPY002, AntMaze draws its start and its target from here
    with contextlib.redirect_stdout(io.StringIO()):
        return env.reset()


def reset_all(envs, numbers):
    """Reset each environment by its row of `numbers`; return the states (E, S) in a tuple."""
    observations = [reset(env, *row) for env, row in zip(envs, numbers)]
    return (np.stack(observations).astype(np.float32),)


def step_all(envs, index, actions):
    """Step the environments `index` (R,); return states (R, S), rewards (R,) and ends (R,)."""
    steps = [envs[i].step(action) for i, action in zip(index, actions)]
    observations, rewards, done, _ = zip(*steps)
    return np.stack(observations).astype(np.float32), np.array(rewards), np.array(done)


class Envs:
    """Copies of an environment that are stepped together.

    This process steps a share of them. Where it has more cores, other processes step the rest.
    They start at the first reset. How many there are changes no result.

    gym's AsyncVectorEnv would reset by itself and use a process for each environment. The
    processes are no children of multiprocessing, which would import the script and JAX in each.
    """

    def __init__(self, name, number, processes=None):
        if processes is None:
            processes = max(1, min(available_cores(), number // 4, 8))
        self.name = name
        self.own = []  # this process's environments
        self.workers = []  # pairs of another process and the connection to it
        self.starts = np.arange(processes) * number // processes  # each process's first environment
        self.sizes = np.diff(self.starts, append=number)

    def start(self):
        """Start the other processes and make this one's environments."""
        for size in self.sizes[1:]:
            connection, end = multiprocessing.Pipe()
            command = [sys.executable, "-m", __spec__.name, self.name, str(size), str(end.fileno())]
            process = subprocess.Popen(
                command,
                pass_fds=[end.fileno()],
                start_new_session=True,  # so that Ctrl-C spares it
            )
            end.close()
            self.workers.append((process, connection))
        self.own = [make_env(self.name) for _ in range(self.sizes[0])]

    def __del__(self):
        for process, connection in self.workers:
            connection.close()
            process.wait()

    def call(self, function, shares):
        """Call `function(envs, *share)` in every process; return its results, concatenated."""
        busy = []
        try:
            for (_, connection), share in zip(self.workers, shares[1:]):
                if len(share[0]):
                    connection.send((function.__name__, share))
                    busy.append(connection)
            results = []
            if len(shares[0][0]):
                results.append(function(self.own, *shares[0]))
            for connection in busy:
                results.append(connection.recv())
        except (EOFError, ConnectionError) as error:
            raise UserError(
                "a process that steps environments has died; the same command resumes the run"
            ) from error
        return [np.concatenate(parts) for parts in zip(*results)]

    def reset(self, numbers):
        """Reset each environment by its row of `numbers`; return the states (E, S)."""
        if not self.own:
            self.start()
        shares = np.split(np.array(numbers), self.starts[1:])
        (observations,) = self.call(reset_all, [(share,) for share in shares])
        return observations

    def step(self, running, actions):
        """Step the environments `running` (R,); return states (R, S), rewards and ends (R,)."""
        cuts = np.searchsorted(running, self.starts[1:])
        shares = []
        for start, index, part in zip(
            self.starts, np.split(running, cuts), np.split(actions, cuts)
        ):
            shares.append((index - start, part))
        return self.call(step_all, shares)


def available_cores():
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def serve(name, number, descriptor):
    """Do as `Envs.call` says in another process, until the connection is closed."""
    envs = [make_env(name) for _ in range(number)]
    connection = Connection(descriptor)
    functions = {"reset_all": reset_all, "step_all": step_all}
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            function, arguments = connection.recv()
            connection.send(functions[function](envs, *arguments))


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
