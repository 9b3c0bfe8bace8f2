"""Rendering of Meta-World's scene from its cameras."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defi_platform.errors import SimulatorFault, one_line


@dataclass(frozen=True)
class _View:
    """A camera by its target: upright, degrees and metres."""

    look_at: tuple[float, float, float]
    distance: float
    azimuth: float
    elevation: float
    field_of_view: float


# Meta-World's own cameras show the whole robot, so at 64 x 64 pixels a drawer handle is one pixel wide.
# These frame the space the hand can reach, from one side of the object, where the arm does not hide it.
_VIEWS = {
    "workspace": _View((0.0, 0.67, 0.15), 1.1, 150.0, -35.0, 45.0),
}
# Mounted upside down in Meta-World's model files; turned by 180 degrees here.
_UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")
CAMERAS = (*_VIEWS, *_UPSIDE_DOWN, "topview", "behindGripper", "gripperPOV")


class Renderer:
    """Offscreen rendering of one model, as cheaply as software OpenGL allows.

    Nearly all the time goes into the robot's meshes (68,000 triangles). So there are no mirror images in the
    metal walls (they draw everything a second time), no shadows, and a geom whose bounding sphere is
    outside the view is not drawn, which does not change a pixel. What that saves pays for smoothing: pixels
    are means of 2 x 2, since at 64 x 64 the gripper is 3 pixels wide and flickers without.
    """

    _HIDDEN_GROUP = 5
    _FINER = 2  # as `_halved` takes it

    def __init__(self, model: Any, cameras: Sequence[str], height: int, width: int):
        """Makes a rendering context.

        Args:
            model: MuJoCo's, of the scene.
            cameras: some of CAMERAS.
            height: of an image, in pixels.
            width: of an image, in pixels.

        Raises:
            SimulatorFault: there is no context to be had.
        """
        import mujoco

        self._mujoco = mujoco
        self._model = model
        # Read when the rendering context is made, so they must be set before it.
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        fine_width, fine_height = self._FINER * width, self._FINER * height
        model.vis.global_.offwidth = fine_width
        model.vis.global_.offheight = fine_height
        try:
            self._gl = mujoco.GLContext(fine_width, fine_height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        except (RuntimeError, AttributeError, mujoco.FatalError) as error:
            # There was a context when the process started: this is one of many that come and go.
            raise SimulatorFault("render", f"no new rendering context: {one_line(error)}") from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, model.ngeom + model.nsite + 100)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = 0
        self._options = mujoco.MjvOption()
        self._options.geomgroup[self._HIDDEN_GROUP] = 0
        self._groups = model.geom_group.copy()
        self._cameras = {camera: self._mujoco_camera(camera) for camera in cameras}
        self._viewport = mujoco.MjrRect(0, 0, fine_width, fine_height)
        self._pixels = np.zeros((fine_height, fine_width, 3), np.uint8)

    def render(self, data: Any) -> dict[str, NDArray[np.uint8]]:
        """Renders a state of the simulation: uint8 (H, W, 3) by camera, upright."""
        self._gl.make_current()
        return {camera: self._picture(data, camera) for camera in self._cameras}

    def _picture(self, data: Any, camera: str) -> NDArray[np.uint8]:
        mujoco, eye = self._mujoco, self._cameras[camera]
        self._model.geom_group[:] = self._groups
        self._update(data, eye)  # places the camera
        self._model.geom_group[:] = np.where(self._in_view(data), self._groups, self._HIDDEN_GROUP)
        self._update(data, eye)
        self._pixels[:] = (
            0  # reading from a lost context changes nothing: the last picture would be taken for this one
        )
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._viewport, self._context)
        # OpenGL's rows go upwards; a camera mounted upside down has them the right way, but mirrored.
        return _halved(self._pixels[:, ::-1] if camera in _UPSIDE_DOWN else self._pixels[::-1])

    def close(self) -> None:
        """Frees the context."""
        self._gl.make_current()
        self._context.free()
        self._gl.free()

    def _mujoco_camera(self, camera: str) -> Any:
        mujoco = self._mujoco
        eye = mujoco.MjvCamera()
        if camera in _VIEWS:
            view = _VIEWS[camera]
            eye.type = mujoco.mjtCamera.mjCAMERA_FREE
            eye.lookat[:] = view.look_at
            eye.distance, eye.azimuth, eye.elevation = view.distance, view.azimuth, view.elevation
            self._model.vis.global_.fovy = view.field_of_view
        else:
            eye.type = mujoco.mjtCamera.mjCAMERA_FIXED
            eye.fixedcamid = self._model.camera(camera).id
        return eye

    def _update(self, data: Any, eye: Any) -> None:
        mujoco = self._mujoco
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, data, self._options, None, eye, everything, self._scene)

    def _in_view(self, data: Any) -> NDArray[np.bool_]:
        """True for geoms whose bounding sphere touches the view's pyramid: bool (ngeom,)."""
        eye = self._scene.camera[0]
        forward, up = np.array(eye.forward), np.array(eye.up)
        right = np.cross(forward, up)
        # frustum_* are sizes at the near plane; the pyramid's half angles follow from them
        half_up = np.arctan2(eye.frustum_top, eye.frustum_near)
        aspect = self._viewport.width / self._viewport.height
        half_right = np.arctan2(eye.frustum_top * aspect, eye.frustum_near)
        offset = (
            data.geom_xpos - (np.array(self._scene.camera[0].pos) + np.array(self._scene.camera[1].pos)) / 2
        )
        ahead, sideways, upwards = offset @ forward, offset @ right, offset @ up
        radius = (
            self._model.geom_rbound + 0.05
        )  # five centimetres to spare: the eye's two halves differ a little
        inside: NDArray[np.bool_] = ahead > -radius
        for across, half in ((sideways, half_right), (upwards, half_up)):
            inside &= np.abs(across) * np.cos(half) - ahead * np.sin(half) < radius
        inside |= self._model.geom_rbound == 0  # planes are infinite
        return inside


def _halved(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Means of 2 x 2 pixels, rounded: (2H, 2W, 3) -> (H, W, 3)."""
    rows = pixels[::2].astype(np.uint16) + pixels[1::2]
    return ((rows[:, ::2] + rows[:, 1::2] + 2) >> 2).astype(np.uint8)
