"""The base class of D4RL's Adroit environments."""

import gym.envs.mujoco
import numpy as np


class MujocoEnv(gym.envs.mujoco.MujocoEnv):
    """gym's base class, but for the step at construction that finds an observation's size.

    gym takes a random action there, mjrl zeros. pen measures its pen after that step, so with a
    random action its last bit would vary.
    """

    def _set_action_space(self):
        space = super()._set_action_space()
        space.sample = lambda: np.zeros(space.shape, space.dtype)
        return space
