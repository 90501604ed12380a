"""D4RL's environments."""

import contextlib
import io
import os
import sys
import tempfile
import types
import warnings

import numpy as np

import harness.errors  # noqa: F401, which opens closed streams before D4RL prints

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

import mujoco  # noqa: E402 F401, which import_mujoco has made sure of; lockstep.py uses it
import mujoco_py  # noqa: E402

# AntMaze prints its targets. sys.stdout stays as it is, since evaluation may have its own thread.
d4rl.locomotion.maze_env.print = lambda *words: None

maze_files = []  # that AntMaze has written


def make_maze_file(**options):
    """Do what tempfile.mkstemp does for AntMaze, without leaving the file open."""
    file, path = tempfile.mkstemp(**options)
    os.close(file)
    maze_files.append(path)
    return file, path


d4rl.locomotion.maze_env.tempfile = types.SimpleNamespace(mkstemp=make_maze_file)


@contextlib.contextmanager
def removing_maze_files():
    """Remove the files of the mazes that are made within. D4RL leaves them behind."""
    try:
        yield
    finally:
        while maze_files:
            os.remove(maze_files.pop())


# An environment of your own is registered here, since every process that steps it reads this file:
#   gym.register("mine-v2", entry_point="mine:MyEnv", max_episode_steps=1000)
#   d4rl.infos.REF_MIN_SCORE["mine-v2"] = 0.0  # the return whose score is 0
#   d4rl.infos.REF_MAX_SCORE["mine-v2"] = 3000.0  # the return whose score is 100


def registered_names():
    """Return the names of the environments that D4RL can score, and whose actions are vectors."""
    names = [name for name in gym.envs.registry.env_specs if name in d4rl.infos.REF_MIN_SCORE]
    return [name for name in names if not name.startswith("minigrid-")]


def make_env(name, drawn=True):
    """Make one of D4RL's environments. Unless it is drawn, it takes less memory.

    The environment variable EPISODE_STEPS, which the tests set, shortens its episodes.
    """
    mujoco_py.model.VISUALS = drawn
    try:
        with removing_maze_files():
            env = gym.make(name)
    finally:
        mujoco_py.model.VISUALS = True
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
    return env.reset()
