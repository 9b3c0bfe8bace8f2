"""Keys of an observation's parts in a client's message: the names of simulators, data formats and protocols.

A key is looked up as it is written, then, where it holds slashes, as a path through maps within maps. `{camera}` in the
key of images stands for the name of a camera of the policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

CAMERA: Final = "{camera}"
ABSENT: Final = object()


@dataclass(frozen=True, kw_only=True)
class ObservationKeys:
    """Keys of images, state and prompt."""

    images: str = "observation/images/{camera}"
    """Key of a camera's image."""
    cameras: Mapping[str, str] = field(default_factory=dict)
    """Keys of single cameras, in place of `images`; "*" is the one camera of a policy that does not name it."""
    state: tuple[str, ...] = ("observation/state",)
    """Keys whose numbers, one after another, are the state."""
    prompt: str = "prompt"

    def camera(self, name: str) -> str:
        """The key of a camera's image."""
        return self.cameras.get(name) or self.images.replace(CAMERA, name)

    def described(self, cameras: Sequence[str]) -> dict[str, Any]:
        """The keys that a client fills, as plain values: images by camera, state, prompt.

        Args:
            cameras: of the policy; its one unnamed camera may be sent under any name and is shown as "image".
        """
        images = {camera: self.camera("image" if camera == "*" else camera) for camera in cameras}
        return {"images": images | dict(self.cameras), "state": list(self.state), "prompt": self.prompt}

    def images_in(self, message: Mapping[Any, Any]) -> list[str]:
        """Keys of the images that a message holds, sorted; values that cannot be images only where nothing else fits.

        Args:
            message: from a client.
        """
        found = sorted(self._matching(message))
        for kinds in ((bytes, np.ndarray), str):  # JSON has an image as text
            likely = [key for key in found if _may_be_image(find(message, key), kinds)]
            if likely:
                return likely
        return found

    def _matching(self, message: Mapping[Any, Any]) -> Iterator[str]:
        before, camera, after = self.images.partition(CAMERA)
        others = {*self.state, self.prompt}
        if not camera:
            if find(message, before) is not ABSENT:
                yield before
            return
        shortest = len(before) + len(after) + 1
        for key in message:
            if (
                isinstance(key, str)
                and len(key) >= shortest
                and key.startswith(before)
                and key.endswith(after)
                and key not in others
            ):
                yield key
        within = find(message, before.removesuffix("/")) if before.endswith("/") else ABSENT
        if isinstance(within, Mapping):
            for name in within:
                key = f"{before}{name}{after}"
                if key not in message and key not in others and find(message, key) is not ABSENT:
                    yield key


OWN: Final = ObservationKeys()

NAMES: Final[dict[str, ObservationKeys]] = {
    "defi": OWN,
    "calvin": ObservationKeys(images="rgb_obs/{camera}", state=("robot_obs",), prompt="language"),
    "metaworld": ObservationKeys(images="pixels", state=("agent_pos",), prompt="task"),
    "libero": ObservationKeys(images="observation/{camera}"),
    "simpler_env": ObservationKeys(images="image/{camera}/rgb", state=("agent/qpos",), prompt="instruction"),
    "lerobot": ObservationKeys(
        images="observation.images.{camera}", state=("observation.state",), prompt="task"
    ),
    "droid": ObservationKeys(
        images="observation/{camera}",
        state=("observation/joint_position", "observation/gripper_position"),
    ),
    "vla_eval": ObservationKeys(images="images/{camera}", state=("states",), prompt="task_description"),
    "xpolicylab": ObservationKeys(
        images="vision/{camera}/color",
        state=("state/arm_joint_state", "state/ee_joint_state"),
        prompt="instruction",
    ),
}
"""What clients of these call an observation's parts. LIBERO and DROID as openpi's examples send them; LeRobot as its
datasets and environments name features; Meta-World as LeRobot's environment; CALVIN, SimplerEnv as the simulators."""


def find(message: Any, key: str) -> Any:
    """The value at a key or path; `ABSENT` where there is none.

    Args:
        message: from a client.
        key: as it stands in the message, or a path of keys joined by slashes.
    """
    if not isinstance(message, Mapping):
        return ABSENT
    if key in message:
        return message[key]
    name, slash, rest = key.partition("/")
    return find(message.get(name), rest) if slash else ABSENT


def unused(message: Mapping[Any, Any], used: set[str]) -> Iterator[Any]:
    """Keys and paths of a message that nothing has read.

    Args:
        message: from a client.
        used: keys and paths that were read.
    """
    for key, value in message.items():
        if key in used:
            continue
        inner = f"{key}/" if isinstance(key, str) and isinstance(value, Mapping) else None
        if inner and any(path.startswith(inner) for path in used):
            for path in unused(value, {path.removeprefix(inner) for path in used if path.startswith(inner)}):
                yield f"{inner}{path}"
        else:
            yield key


def _may_be_image(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not (isinstance(value, np.ndarray) and value.ndim != 3)
