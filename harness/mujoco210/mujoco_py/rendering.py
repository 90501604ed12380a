"""Rendering: images through `mujoco.Renderer`, a window through `mujoco.viewer`."""

import mujoco


class MjRenderContextOffscreen:
    """Images of a simulation. `cam` is the free camera, which environments place."""

    def __init__(self, sim, device_id=-1):
        self.sim = sim
        self.cam = mujoco.MjvCamera()
        self._renderer = None
        mujoco.mjv_defaultFreeCamera(sim.model, self.cam)

    def render(self, width, height, camera_id=None):
        """Draw the simulation's present state, for `read_pixels`."""
        if self._renderer is None or self._size() != (width, height):
            self._renderer = self._make_renderer(width, height)
        camera = self.cam if camera_id is None else camera_id
        self._renderer.update_scene(self.sim.data, camera)

    def read_pixels(self, width, height, depth=False):
        """Return the image (height, width, 3), bottom row first.

        With `depth`, return the image and the distances (height, width).
        """
        image = self._renderer.render()[::-1]
        if not depth:
            return image
        self._renderer.enable_depth_rendering()
        distances = self._renderer.render()[::-1]
        self._renderer.disable_depth_rendering()
        return image, distances

    def _size(self):
        return self._renderer.width, self._renderer.height

    def _make_renderer(self, width, height):
        largest = self.sim.model.vis.global_  # the largest image that a renderer may draw
        largest.offwidth = max(largest.offwidth, width)
        largest.offheight = max(largest.offheight, height)
        try:
            # A bare context first: without OpenGL a Renderer's failure prints more
            mujoco.gl_context.GLContext(width, height).free()
            return mujoco.Renderer(self.sim.model, height, width)
        except Exception as error:
            raise RuntimeError(
                "rendering needs OpenGL: "
                "install libegl1 or libosmesa6 and set MUJOCO_GL to egl or osmesa"
            ) from error


class MjViewer:
    """A window on a simulation."""

    def __init__(self, sim):
        import mujoco.viewer  # needs a display

        self._handle = mujoco.viewer.launch_passive(sim.model, sim.data)
        self.cam = self._handle.cam

    def render(self):
        self._handle.sync()
