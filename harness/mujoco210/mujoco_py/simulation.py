"""Simulation: mujoco-py's names for the objects of the official bindings."""

import collections
import warnings

import mujoco

MjSimState = collections.namedtuple("MjSimState", "time qpos qvel act udd_state")


class MjSim:
    """A model and its state, a `mujoco.MjModel` and a `mujoco.MjData`."""

    def __init__(self, model):
        self.model = model
        self.data = mujoco.MjData(model)

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
        self.data.qpos[:] = state.qpos
        self.data.qvel[:] = state.qvel
        self.data.act[:] = state.act


def _name2id(kind):
    """Return the method that looks up the index of an object of this `mujoco.mjtObj`."""

    def name2id(model, name):
        index = mujoco.mj_name2id(model, kind, name)
        if index < 0:
            raise ValueError(f"the model has no {kind.name[6:].lower()} named {name!r}")
        return index

    return name2id


def _camera_name2id(model):
    return {model.camera(i).name: i for i in range(model.ncam)}


def _get_body_xpos(data, name):
    return data.body(name).xpos


def _warn(text):
    warnings.warn(f"MuJoCo: {text}", RuntimeWarning, stacklevel=2)


for _kind in ("body", "joint", "geom", "site", "camera", "actuator", "sensor", "tendon"):
    _method = _name2id(getattr(mujoco.mjtObj, f"mjOBJ_{_kind.upper()}"))
    setattr(mujoco.MjModel, f"{_kind}_name2id", _method)
mujoco.MjModel._camera_name2id = property(_camera_name2id)
mujoco.MjData.body_xpos = property(lambda data: data.xpos)
mujoco.MjData.body_xquat = property(lambda data: data.xquat)
mujoco.MjData.get_body_xpos = _get_body_xpos

# By default a simulation that diverges writes to the standard error and to ./MUJOCO_LOG.TXT.
mujoco.set_mju_user_warning(_warn)
