"""The part of mjrl that D4RL's Adroit environments use: `mjrl.envs.mujoco_env.MujocoEnv`."""
