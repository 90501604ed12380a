"""D4RL and gym, unmodified, on today's MuJoCo: `from mujoco210 import d4rl, gym`.

D4RL 1.1 and gym 0.23.1 import `mujoco_py`, which needs a compiler and a hand-installed MuJoCo 2.1.0, and `mjrl`, which
is not on PyPI. This file provides the parts of both that the Gym-MuJoCo, AntMaze and Adroit tasks use, written over the
official `mujoco` bindings, and registers them under those names before it imports gym and D4RL. The physics is that of
MuJoCo 2.1.0 (tests/test_mujoco210.py replays recorded episodes): `load_model_from_path` undoes what has changed since.
"""

import collections
import contextlib
import copy
import functools
import io
import os
import re
import sys
import types
import warnings
import xml.etree.ElementTree as ET

import mujoco
import numpy as np

# --- The model: MuJoCo 2.1.0's reading of an XML file ---


def load_model_from_path(path):
    """Compiles the XML file at `path` into an `mujoco.MjModel` that moves as it did in MuJoCo 2.1.0."""
    path = os.path.abspath(path)
    root = _inline(ET.parse(path).getroot(), os.path.dirname(path))
    for option in root.iter("option"):
        option.attrib.pop("apirate", None)  # gone, and never had a meaning for the simulation
    for compiler in root.iter("compiler"):
        if compiler.attrib.pop("coordinate", "local") == "global":
            for body in root.findall("worldbody/body"):
                _to_local(body, np.zeros(3))
        for key in {"meshdir", "texturedir"} & set(compiler.attrib):
            compiler.set(key, os.path.join(os.path.dirname(path), compiler.get(key)))
    return copy.copy(_compile(ET.tostring(root, encoding="unicode")))


@functools.lru_cache(maxsize=8)
def _compile(xml):
    model = mujoco.MjModel.from_xml_string(xml)
    # 2.1.0 gave a capsule the inertia of a cylinder of its radius r, whose half-length is the capsule's plus r / 2.
    spec = mujoco.MjSpec.from_string(xml)
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE:
            geom.type, radius = mujoco.mjtGeom.mjGEOM_CYLINDER, geom.size[0]
            if np.isnan(geom.fromto[0]):
                geom.size[1] += radius / 2
            else:
                start, end = geom.fromto[:3].copy(), geom.fromto[3:].copy()
                extra = radius / 2 * (end - start) / np.linalg.norm(end - start)
                geom.fromto = np.concatenate([start - extra, end + extra])
    cylinders = spec.compile()
    for field in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(model, field)[:] = getattr(cylinders, field)
    mujoco.mj_setConst(model, mujoco.MjData(model))
    return model


def _inline(element, folder):
    """Replaces every <include> below `element` by the contents of the file that it names."""
    children = []
    for child in element:
        if child.tag == "include":
            children += _inline(ET.parse(os.path.join(folder, child.get("file"))).getroot(), folder)
        else:
            children.append(_inline(child, folder))
    element[:] = children
    return element


def _to_local(body, parent):
    """Rewrites the positions of `body`, in a body at `parent`, from world coordinates (no body is rotated here)."""
    here = _numbers(body.get("pos"))
    body.set("pos", _text(here - parent))
    for child in body:
        if child.tag == "body":
            _to_local(child, here)
        elif "fromto" in child.attrib:
            child.set("fromto", _text(_numbers(child.get("fromto")) - np.tile(here, 2)))
        elif "pos" in child.attrib:
            child.set("pos", _text(_numbers(child.get("pos")) - here))


def _text(numbers):
    return " ".join(map(repr, numbers.tolist()))


def _numbers(text):
    """Numbers as the old parser read them: up to the first odd character, then 0 (hopper.xml has "0.13/2 0 0.1")."""
    values = np.zeros(len(text.split()))
    for i, token in enumerate(text.split()):
        number = re.match(r"[-+]?[\d.]+(e[-+]?\d+)?", token, re.IGNORECASE)[0]
        values[i] = float(number)
        if number != token:
            break
    return values


# Where the simulation diverges: not to the standard error and a file in the working directory, as by default.
mujoco.set_mju_user_warning(lambda text: warnings.warn(f"MuJoCo: {text}", RuntimeWarning, stacklevel=2))

# --- mujoco_py: its names for the official bindings' objects ---


def _name2id(kind):
    def name2id(model, name):
        index = mujoco.mj_name2id(model, kind, name)
        if index < 0:
            raise ValueError(f"the model has no {kind.name[6:].lower()} named {name!r}")
        return index

    return name2id


for _kind in ("body", "joint", "geom", "site", "camera", "actuator", "sensor", "tendon"):
    setattr(mujoco.MjModel, f"{_kind}_name2id", _name2id(getattr(mujoco.mjtObj, f"mjOBJ_{_kind.upper()}")))
mujoco.MjModel._camera_name2id = property(lambda model: {model.camera(i).name: i for i in range(model.ncam)})
mujoco.MjData.body_xpos = property(lambda data: data.xpos)
mujoco.MjData.body_xquat = property(lambda data: data.xquat)
mujoco.MjData.get_body_xpos = lambda data, name: data.body(name).xpos

MjSimState = collections.namedtuple("MjSimState", "time qpos qvel act udd_state")


class MjSim:
    """A model and its state; `model` and `data` are the bindings' own `mujoco.MjModel` and `mujoco.MjData`."""

    def __init__(self, model):
        self.model, self.data = model, mujoco.MjData(model)

    def reset(self):
        mujoco.mj_resetData(self.model, self.data)

    def forward(self):
        mujoco.mj_forward(self.model, self.data)

    def step(self):
        mujoco.mj_step(self.model, self.data)

    def get_state(self):
        data = self.data
        return MjSimState(data.time, data.qpos.copy(), data.qvel.copy(), data.act.copy(), {})

    def set_state(self, state):
        self.data.time = state.time
        self.data.qpos[:], self.data.qvel[:], self.data.act[:] = state.qpos, state.qvel, state.act


class MjRenderContextOffscreen:
    """Images of a simulation through `mujoco.Renderer`; `cam` is the free camera, for environments to place."""

    def __init__(self, sim, device_id=-1):
        self.sim, self.cam, self._renderer = sim, mujoco.MjvCamera(), None
        mujoco.mjv_defaultFreeCamera(sim.model, self.cam)

    def render(self, width, height, camera_id=None):
        size = self.sim.model.vis.global_
        size.offwidth, size.offheight = max(size.offwidth, width), max(size.offheight, height)
        if self._renderer is None or (self._renderer.width, self._renderer.height) != (width, height):
            try:
                self._renderer = mujoco.Renderer(self.sim.model, height, width)
            except Exception as error:
                raise RuntimeError(
                    "rendering needs OpenGL: install libegl1 or libosmesa6 and set MUJOCO_GL to egl or osmesa"
                ) from error
        self._renderer.update_scene(self.sim.data, self.cam if camera_id is None else camera_id)

    def read_pixels(self, width, height, depth=False):
        """The image (height, width, 3), bottom row first, and with `depth` the distances (height, width) beside it."""
        image = self._renderer.render()[::-1]
        if not depth:
            return image
        self._renderer.enable_depth_rendering()
        distances = self._renderer.render()[::-1]
        self._renderer.disable_depth_rendering()
        return image, distances


class MjViewer:
    """A window on a simulation through `mujoco.viewer`."""

    def __init__(self, sim):
        import mujoco.viewer

        self._handle = mujoco.viewer.launch_passive(sim.model, sim.data)
        self.cam = self._handle.cam

    def render(self):
        self._handle.sync()


# --- The imports ---


def _register(name, **contents):
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(contents)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


_register(
    "mujoco_py",
    load_model_from_path=load_model_from_path,
    MjSim=MjSim,
    MjSimState=MjSimState,
    MjRenderContextOffscreen=MjRenderContextOffscreen,
    MjViewer=MjViewer,
    get_version=lambda: "2.1.0",
)

# Packages that D4RL tries to import for tasks that the paper never uses; pybullet prints, dm_control takes seconds.
_UNUSED = [name for name in ("pybullet", "pybullet_envs", "dm_control", "flow", "carla") if name not in sys.modules]
sys.modules.update(dict.fromkeys(_UNUSED))  # None makes an import fail at once
with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
    warnings.simplefilter("ignore")
    import gym
    import gym.envs.mujoco

    class MujocoEnv(gym.envs.mujoco.MujocoEnv):
        """mjrl's base of the Adroit environments: gym's, but the step at construction, which finds the size of an
        observation, takes no random action (pen measures the pen after it, so its last bit would vary)."""

        def _set_action_space(self):
            space = super()._set_action_space()
            space.sample = lambda: np.zeros(space.shape, space.dtype)
            return space

    _register("mjrl")
    _register("mjrl.envs")
    _register("mjrl.envs.mujoco_env", MujocoEnv=MujocoEnv)
    import d4rl
for _name in _UNUSED:
    del sys.modules[_name]
gym.logger.set_level(gym.logger.ERROR)

__all__ = ["d4rl", "gym"]
