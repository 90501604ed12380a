"""Copies of an environment that are stepped together, for evaluation."""

import contextlib
import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection

import numpy as np

from harness.environments import d4rl, gym, inner, make_env, mujoco, mujoco_py, reset
from harness.errors import UserError

# --- One process's copies ---

# D4RL's wrappers of Gym-MuJoCo and AntMaze, which scale the actions
SCALERS = (d4rl.utils.wrappers.NormalizedBoxEnv, d4rl.locomotion.wrappers.NormalizedBoxEnv)


def make_copy(name, drawn=False):
    """Make an environment. If it uses gym's `do_simulation`, a step calls MuJoCo once."""
    env = make_env(name, drawn)
    task = inner(env)
    steps_of_gym = gym.envs.mujoco.MujocoEnv.do_simulation
    if getattr(type(task), "do_simulation", None) is steps_of_gym:
        if type(task.sim) is mujoco_py.MjSim:
            task.do_simulation = functools.partial(simulate, task)
    return env


def simulate(task, ctrl, n_frames):
    """Do as gym's `do_simulation`, but call MuJoCo once for all frames of a step."""
    if np.shape(ctrl) != task.action_space.shape:
        raise ValueError(f"an action has shape {task.action_space.shape}, not {np.shape(ctrl)}")
    task.sim.data.ctrl[:] = ctrl
    mujoco.mj_step(task.sim.model, task.sim.data, n_frames)


def has_usual_wrappers(env):
    """Return whether an environment's only wrappers are D4RL's usual ones.

    They are TimeLimit, OrderEnforcing and, in Gym-MuJoCo and AntMaze, a scaler of actions.
    """
    if type(env) is not gym.wrappers.TimeLimit:
        return False
    if type(env.env) is not gym.wrappers.OrderEnforcing or env.env.env is not env.unwrapped:
        return False
    last = env.unwrapped  # the scaler, if there is one, since it isn't a gym.Wrapper
    if type(last) in SCALERS:
        return last._reward_scale == 1 and not last._should_normalize
    return last is inner(env)


def scale_actions(env, actions):
    """Return actions (..., A) as the environment's scaler scales them, if it has one."""
    if type(env.unwrapped) not in SCALERS:
        return actions
    space = inner(env).action_space
    scaled = space.low + (actions + 1.0) * 0.5 * (space.high - space.low)
    return np.clip(scaled, space.low, space.high)


def reset_all(envs, rows):
    """Reset each environment to the start that its row determines."""
    for env, numbers, observation in zip(envs, rows["numbers"], rows["observation"]):
        observation[:] = reset(env, *numbers)


def step_running(envs, rows):
    """Step the environments that are running by the actions in their rows.

    The usual wrappers take a sixth of HalfCheetah's step. Their work is done here instead: actions
    are scaled, for all environments at once, and steps are counted.
    """
    running = np.flatnonzero(rows["running"]).tolist()
    actions = rows["action"].copy()  # an environment may keep its own
    observations = rows["observation"]
    rewards = rows["reward"]
    done = rows["done"]
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


# --- Processes ---

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
        first = make_copy(self.name, drawn=True)  # the only one that can be drawn
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
            self.own.append(make_copy(self.name))

    def rows(self, process):
        """Return the rows of a process's environments: each `processes`-th, from its number on."""
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

    A core that sleeps takes as long as several steps to wake. So this one stays awake for AWAKE
    seconds at first. sched_yield gives it to another process that needs it.
    """
    end = time.perf_counter() + AWAKE
    while not connection.poll() and time.perf_counter() < end:
        os.sched_yield()
    return connection.recv_bytes()


def available_cores():
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def serve(name, first, processes, number, connection, file):
    """Do as `Envs.call` says in another process, until the connection is closed."""
    envs = [make_copy(name) for _ in range(first, number, processes)]
    rows = make_table(os.fdopen(file, "r+b"), "r+", number, envs[0])[first::processes]
    connection = Connection(connection)
    functions = {b"reset_all": reset_all, b"step_running": step_running}
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            functions[receive(connection)](envs, rows)
            connection.send_bytes(b"done")


if __name__ == "__main__":
    serve(sys.argv[1], *map(int, sys.argv[2:]))
