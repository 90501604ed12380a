"""The part of mujoco-py that gym and D4RL use, over MuJoCo's official bindings.

The physics is that of MuJoCo 2.1.0: `model.py` undoes what has changed since then.
"""

from mujoco_py.model import load_model_from_path
from mujoco_py.rendering import MjRenderContextOffscreen, MjViewer
from mujoco_py.simulation import MjSim, MjSimState

__all__ = [
    "MjRenderContextOffscreen",
    "MjSim",
    "MjSimState",
    "MjViewer",
    "get_version",
    "load_model_from_path",
]


def get_version():
    """Return the version of MuJoCo whose physics this is."""
    return "2.1.0"
