"""D4RL's environments, and copies of one that are stepped together."""

import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
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

import mujoco  # noqa: E402, since it must have been imported as above
import mujoco_py  # noqa: E402

# AntMaze prints its targets. sys.stdout stays as it is, since evaluation may have its own thread.
d4rl.locomotion.maze_env.print = lambda *words: None

# An environment of your own is registered here, since every process that steps it reads this file:
#   gym.register("mine-v2", entry_point="mine:MyEnv", max_episode_steps=1000)
#   d4rl.infos.REF_MIN_SCORE["mine-v2"] = 0.0  # the return whose score is 0
#   d4rl.infos.REF_MAX_SCORE["mine-v2"] = 3000.0  # the return whose score is 100


def registered_names():
    """Return the names of the environments that D4RL can score."""
    return [name for name in gym.envs.registry.env_specs if name in d4rl.infos.REF_MIN_SCORE]


def make_env(name, drawn=True):
    """Make one of D4RL's environments. Unless it is drawn, it takes less memory.

    The environment variable EPISODE_STEPS, which the tests set, shortens its episodes.
    """
    mujoco_py.model.VISUALS = drawn
    try:
        env = gym.make(name)
    finally:
        mujoco_py.model.VISUALS = True
    if "EPISODE_STEPS" in os.environ:
        env._max_episode_steps = int(os.environ["EPISODE_STEPS"])
    return env


def simulate(env, control, num_frames):
    """Do as gym's `MujocoEnv.do_simulation`, with one call of MuJoCo for all frames of a step."""
    if np.shape(control) != env.action_space.shape:
        raise ValueError(f"actions have shape {env.action_space.shape}, not {np.shape(control)}")
    env.sim.data.ctrl[:] = control
    mujoco.mj_step(env.sim.model, env.sim.data, num_frames)


gym.envs.mujoco.MujocoEnv.do_simulation = simulate


def inner(env):
    """Return the environment within the wrappers, which has the seed and the time step."""
    return getattr(env.unwrapped, "_wrapped_env", env.unwrapped)


def reset(env, *numbers):
    """Reset an environment to the start that `numbers` determine; return the first state (S,)."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    inner(env).seed(seed)
    np.random.seed(seed)  # noqa: NPY002, AntMaze draws its start and its target from here
    return env.reset()


# --- Steps without the wrappers ---

BOXES = (d4rl.utils.wrappers.NormalizedBoxEnv, d4rl.locomotion.wrappers.NormalizedBoxEnv)


def has_usual_wrappers(env):
    """Return whether an environment has only those wrappers whose work `step_running` does.

    They are gym's TimeLimit and OrderEnforcing and, in Gym-MuJoCo and AntMaze, a NormalizedBoxEnv
    of D4RL's that changes nothing but the actions.
    """
    if type(env) is not gym.wrappers.TimeLimit:
        return False
    if type(env.env) is not gym.wrappers.OrderEnforcing or env.env.env is not env.unwrapped:
        return False
    box = env.unwrapped
    if type(box) in BOXES:
        return box._reward_scale == 1 and not box._should_normalize
    return box is inner(env)


def scale_actions(env, actions):
    """Scale actions (..., A) as the environment's NormalizedBoxEnv does, if it has one."""
    if type(env.unwrapped) not in BOXES:
        return actions
    space = inner(env).action_space
    scaled = space.low + (actions + 1.0) * 0.5 * (space.high - space.low)
    return np.clip(scaled, space.low, space.high)


# --- Copies that are stepped together ---

AWAKE = 0.001  # seconds that a process waits for another with its core awake


def make_table(file, mode, number, env):
    """Return a table with a row for each environment. The processes share it, by a file."""
    row = [
        ("numbers", np.int64, 3),  # which determine the start
        ("running", bool),  # whether to step it
        ("action", np.float32, env.action_space.shape),
        ("observation", np.float32, env.observation_space.shape),
        ("reward", np.float64),
        ("done", bool),
    ]
    return np.memmap(file, np.dtype(row, align=True), mode, shape=number).view(np.ndarray)


def reset_all(envs, rows):
    """Reset each environment to the start that its row determines."""
    for env, numbers, observation in zip(envs, rows["numbers"], rows["observation"]):
        observation[:] = reset(env, *numbers)


def step_running(envs, rows):
    """Step the environments that are running by the actions in their rows.

    The usual wrappers are passed by, since their Python takes a sixth of HalfCheetah's step. Their
    work is done here: actions are scaled, for all environments at once, and steps are counted.
    """
    running = np.flatnonzero(rows["running"]).tolist()
    actions, observations = rows["action"], rows["observation"]
    rewards, done = rows["reward"], rows["done"]
    if not has_usual_wrappers(envs[0]):
        for i in running:
            observations[i], rewards[i], done[i], _ = envs[i].step(actions[i])
        return
    actions = scale_actions(envs[0], actions)
    for i in running:
        env = envs[i]
        observations[i], rewards[i], ended, _ = inner(env).step(actions[i])
        env._elapsed_steps += 1
        done[i] = ended or env._elapsed_steps >= env._max_episode_steps


class Envs:
    """Copies of an environment that are stepped together.

    This process steps a share of them. Where it has more cores, other processes step the rest.
    They start at the first reset. How many there are changes no result.

    The processes share a table of actions, states, rewards and ends, and tell each other when
    its rows are ready.

    gym's AsyncVectorEnv would reset by itself and use a process for each environment. The
    processes are no children of multiprocessing, which would import the script and JAX in each.
    """

    def __init__(self, name, number, processes=None):
        if processes is None:
            processes = max(1, min(available_cores(), number // 4))
        self.name = name
        self.number = number
        self.processes = processes
        self.own = []  # this process's environments
        self.workers = []  # pairs of another process and the connection to it

    def start(self):
        """Make this process's environments and start the other processes."""
        first = make_env(self.name)  # the only one that can be drawn
        file = tempfile.TemporaryFile()
        self.table = make_table(file, "w+", self.number, first)
        for i in range(1, self.processes):
            connection, end = multiprocessing.Pipe()
            numbers = (i, self.processes, self.number, end.fileno(), file.fileno())
            command = [sys.executable, "-m", __spec__.name, self.name, *map(str, numbers)]
            process = subprocess.Popen(
                command,
                pass_fds=[end.fileno(), file.fileno()],
                start_new_session=True,  # so that Ctrl-C spares it
            )
            end.close()
            self.workers.append((process, connection))
        self.own = [first]
        for _ in self.rows(0)[1:]:
            self.own.append(make_env(self.name, drawn=False))

    def rows(self, process):
        """Return the rows of a process's environments: one in `processes`, from its number on."""
        return self.table[process :: self.processes]

    def __del__(self):
        for process, connection in self.workers:
            connection.close()
            process.wait()

    def call(self, function):
        """Call `function(envs, rows)` in each process that has an environment running."""
        busy = []
        try:
            for i, (_, connection) in enumerate(self.workers, start=1):
                if self.rows(i)["running"].any():
                    connection.send_bytes(function.__name__.encode())
                    busy.append(connection)
            function(self.own, self.rows(0))
            for connection in busy:
                receive(connection)
        except (EOFError, ConnectionError) as error:
            raise UserError(
                "a process that steps environments has died; the same command resumes the run"
            ) from error

    def reset(self, numbers):
        """Reset each environment by its row of `numbers`; return the states (E, S)."""
        if not self.own:
            self.start()
        self.table["numbers"] = numbers
        self.table["running"] = True
        self.call(reset_all)
        return self.table["observation"].copy()

    def step(self, running, actions):
        """Step the environments `running` (R,); return states (R, S), rewards and ends (R,)."""
        self.table["running"] = False
        self.table["running"][running] = True
        self.table["action"][running] = actions
        self.call(step_running)
        rows = self.table[running]
        return rows["observation"], rows["reward"], rows["done"]


def receive(connection):
    """Wait for a message of another process and return it.

    A core that sleeps takes as long as several steps to wake. So this one stays awake at first,
    but other processes may have it in the meantime.
    """
    end = time.perf_counter() + AWAKE
    while not connection.poll() and time.perf_counter() < end:
        os.sched_yield()
    return connection.recv_bytes()


def available_cores():
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def serve(name, first, processes, number, connection, file):
    """Do as `Envs.call` says in another process, until the connection is closed."""
    envs = [make_env(name, drawn=False) for _ in range(first, number, processes)]
    rows = make_table(os.fdopen(file, "r+b"), "r+", number, envs[0])[first::processes]
    connection = Connection(connection)
    functions = {b"reset_all": reset_all, b"step_running": step_running}
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            functions[receive(connection)](envs, rows)
            connection.send_bytes(b"done")


if __name__ == "__main__":
    serve(sys.argv[1], *map(int, sys.argv[2:]))
