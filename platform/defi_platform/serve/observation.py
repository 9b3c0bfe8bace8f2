"""Inputs and outputs of a served policy, and the check of an observation from the wire against them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defi_models.errors import nearest
from defi_models.inputs.state_layout import StateLayout
from defi_platform.data.decode.resize import resize
from defi_platform.serve.refusals import ObservationError

IMAGE_PREFIX = "observation/images/"
STATE_KEY = "observation/state"
PROMPT_KEY = "prompt"
SEED_KEY = "seed"

ANY_CAMERA = "*"
"""The one camera of a policy that does not name its camera: it accepts a single image of any name."""

MAX_PIXELS_PER_SIDE = 4096
MAX_PROMPT_CHARACTERS = 2000


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """The inputs and outputs of a policy."""

    policy: str
    """The folder it was loaded from, as it was configured."""
    preset: str
    cameras: tuple[str, ...]
    """Camera names in the order of the policy's views."""
    image_size: tuple[int, int]
    """Height and width in pixels that images are resized to."""
    state_dim: int
    """Numbers of the raw state; 0: the policy takes no proprioception."""
    state: StateLayout | None = None
    """What the policy reads of the raw state; None: all of it."""
    action_dim: int
    chunk: int
    """Actions per answer."""
    action: Mapping[str, Any] = field(default_factory=dict)
    """Meaning of the actions (`policy_folder.action_terms`): names, units, kind, gripper, control_hz, execute_steps, and
    their range in the training data as min and max; each may be "unknown"."""

    def metadata(self) -> dict[str, Any]:
        """The greeting, as plain values that any wire format can carry."""
        return {
            "preset": self.preset,
            "cameras": list(self.cameras),
            "image_size": list(self.image_size),
            "state_dim": self.state_dim,
            "state": None if self.state is None else self.state.as_mapping()["entries"],
            "action_dim": self.action_dim,
            "chunk": self.chunk,
            "action": dict(self.action),
            "policy": self.policy,
        }


@dataclass(frozen=True)
class Observation:
    """One observation, ready for the policy."""

    images: NDArray[np.uint8]
    """(V, H, W, 3) uint8, at the policy's size."""
    state: NDArray[np.float32] | None
    """(P,) float32, raw as the client sent it; None when the policy takes none."""
    prompt: str
    seed: int
    """Of the noise from which the action is denoised: the same observation and seed give the same action."""
    ignored: tuple[str, ...] = ()
    """Keys the policy has no use for; the answer lists them."""


@dataclass(frozen=True)
class Answer:
    """An observation's actions and what they cost."""

    actions: NDArray[np.float32]
    """(chunk, A) float32 in raw units."""
    queue_ms: float
    """Milliseconds from its arrival at the replica to the start of its forward pass."""
    infer_ms: float
    """Milliseconds of the forward pass of the whole batch."""
    batch_size: int
    """Observations in that forward pass."""


def read_observation(message: Any, spec: PolicySpec) -> Observation:
    """Checks a decoded message against the policy and resizes its images.

    Args:
        message: "observation/images/<camera>" uint8 (h, w, 3) of any size for every camera of the policy;
            "observation/state" (P,) numbers if the policy takes proprioception; "prompt" str; optionally
            "seed" int >= 0, drawn here when absent.
        spec: of the policy.

    Returns:
        The observation, its images at the policy's size.

    Raises:
        ObservationError: something does not fit; names the key, what came and what is expected.
    """
    if not isinstance(message, Mapping):
        raise ObservationError(f"an observation is a map of keys to values, got {_describe(message)}.")
    keys = _image_keys(message, spec)
    images = [_image(message, key, spec.image_size) for key in keys]
    state = _state(message, spec.state_dim) if spec.state_dim else None
    used = {*keys, PROMPT_KEY, SEED_KEY} | ({STATE_KEY} if spec.state_dim else set())
    return Observation(
        images=np.stack(images),
        state=state,
        prompt=_prompt(message),
        seed=_seed(message),
        ignored=tuple(sorted(str(key) for key in message if key not in used)),
    )


def _image_keys(message: Mapping[Any, Any], spec: PolicySpec) -> list[str]:
    if spec.cameras != (ANY_CAMERA,):
        return [f"{IMAGE_PREFIX}{camera}" for camera in spec.cameras]
    sent = sorted(key for key in message if isinstance(key, str) and key.startswith(IMAGE_PREFIX))
    if len(sent) != 1:
        raise ObservationError(
            f"this policy has one camera; expected one key '{IMAGE_PREFIX}<name>', "
            f"got {', '.join(sent) or ', '.join(sorted(map(str, message))) or 'no keys'}."
        )
    return sent


def _image(message: Mapping[Any, Any], key: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    image = _required(message, key)
    expected = "expected a uint8 array of shape (height, width, 3)"
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise ObservationError(f"'{key}' is {_describe(image)}; {expected}.")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ObservationError(f"'{key}' has shape {image.shape}; {expected}.")
    if max(image.shape[:2]) > MAX_PIXELS_PER_SIDE:
        raise ObservationError(
            f"'{key}' has shape {image.shape}; at most {MAX_PIXELS_PER_SIDE} pixels a side are read, "
            f"and the policy sees {size[0]}x{size[1]}."
        )
    return resize(image, size)


def _state(message: Mapping[Any, Any], dim: int) -> NDArray[np.float32]:
    value = _required(message, STATE_KEY)
    expected = f"expected {dim} finite numbers, shape ({dim},)"
    if isinstance(value, list | tuple) and all(isinstance(number, int | float) for number in value):
        value = np.asarray(value, dtype=np.float64)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
        raise ObservationError(f"'{STATE_KEY}' is {_describe(value)}; {expected}.")
    if value.shape != (dim,):
        raise ObservationError(f"'{STATE_KEY}' has shape {value.shape}; {expected}.")
    if not np.isfinite(value).all():
        raise ObservationError(f"'{STATE_KEY}' holds {value[~np.isfinite(value)][0]}; {expected}.")
    return value.astype(np.float32)


def _prompt(message: Mapping[Any, Any]) -> str:
    prompt = _required(message, PROMPT_KEY)
    if not isinstance(prompt, str):
        raise ObservationError(f"'{PROMPT_KEY}' is {_describe(prompt)}; expected a string.")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ObservationError(
            f"'{PROMPT_KEY}' has {len(prompt)} characters; expected at most {MAX_PROMPT_CHARACTERS}."
        )
    return prompt


def _seed(message: Mapping[Any, Any]) -> int:
    seed = message.get(SEED_KEY)
    if seed is None:
        return secrets.randbits(63)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise ObservationError(
            f"'{SEED_KEY}' is {seed!r} ({_describe(seed)}); expected an integer from 0 to 2**63 - 1."
        )
    return int(seed)


def _required(message: Mapping[Any, Any], key: str) -> Any:
    if key in message:
        return message[key]
    present = sorted(str(name) for name in message)
    near = nearest(key, present)
    hint = f" Did you mean it by '{near}'?" if near else ""
    raise ObservationError(f"'{key}' is missing; got {', '.join(present) or 'no keys'}.{hint}")


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {value.shape}"
    if isinstance(value, np.generic):
        return f"a {value.dtype} number"
    return f"of type {type(value).__name__}"
