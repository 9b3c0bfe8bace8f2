"""Inputs and outputs of a served policy, and the check of an observation from the wire against them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defi_models.errors import nearest
from defi_models.inputs.state_layout import StateLayout
from defi_platform.data.decode.resize import resize
from defi_platform.serve import encoded_image
from defi_platform.serve.observation_keys import ABSENT, OWN, ObservationKeys, find, unused
from defi_platform.serve.refusals import ObservationError
from defi_platform.serve.wording import described, listed, short_names, shown

IMAGE_PREFIX = "observation/images/"
STATE_KEY = "observation/state"
PROMPT_KEY = "prompt"
SEED_KEY = "seed"
SLACK_KEY = "slack_ms"
DEADLINE_KEY = "deadline_ms"
EPISODE_KEY = "episode"
OPTIONAL_KEYS = (SEED_KEY, SLACK_KEY, DEADLINE_KEY, EPISODE_KEY)
"""Keys of any observation, in every protocol."""

ANY_CAMERA = "*"
"""The one camera of a policy that does not name its camera: it accepts a single image of any name."""

SEED_BITS = 53
"""Of seeds that are drawn here: what every reader of JSON holds exactly, so that an answer's seed can be sent again."""
MAX_PROMPT_CHARACTERS = 2000
MAX_EPISODE_CHARACTERS = 200
MAX_MS = 3_600_000.0
"""An hour: nothing waits longer."""


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

    acting: Mapping[str, Any] = field(default_factory=dict)
    """Settings of acting, `defi_models.inputs.acting.Acting` as plain values."""
    action_scale: tuple[float, ...] | None = None
    """Raw units of each action per unit of the policy's head, as the normaliser gives them; None: not known."""

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
            "acting": dict(self.acting),
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


def camera_names(named: Sequence[str], views: int) -> tuple[str, ...]:
    """Names of a policy's cameras for its clients.

    Args:
        named: by the policy; may be empty.
        views: number of them.
    """
    return tuple(named) or ((ANY_CAMERA,) if views == 1 else tuple(str(view) for view in range(views)))


def read_observation(
    message: Any, spec: PolicySpec, keys: ObservationKeys = OWN, default_seed: int | None = None
) -> Observation:
    """Checks a decoded message against the policy and resizes its images.

    Args:
        message: for every camera of the policy an image of any size, uint8 (h, w, 3) or a PNG or JPEG file as bytes;
            the state's (P,) numbers if the policy takes proprioception; the prompt, a string; optionally
            "seed" int >= 0.
        spec: of the policy.
        keys: where they are in the message.
        default_seed: of an observation without a seed; drawn here when None.

    Returns:
        The observation, its images at the policy's size.

    Raises:
        ObservationError: something does not fit; names the key, what came and what is expected.
    """
    if not isinstance(message, Mapping):
        raise ObservationError(f"an observation is a map of keys to values, got {described(message)}.")
    images = image_keys(message, spec, keys)
    used = {*images, keys.prompt, *OPTIONAL_KEYS, *(keys.state if spec.state_dim else ())}
    # Cheap checks come first: nothing is decoded for an observation that is refused anyway.
    prompt = _prompt(message, keys.prompt, used)
    seed = read_seed(message)
    state = _state(message, keys.state, spec.state_dim, used) if spec.state_dim else None
    return Observation(
        images=np.stack([_image(message, key, spec.image_size, used) for key in images]),
        state=state,
        prompt=prompt,
        seed=seed
        if seed is not None
        else default_seed
        if default_seed is not None
        else secrets.randbits(SEED_BITS),
        ignored=short_names(unused(message, used)),
    )


def image_keys(message: Mapping[Any, Any], spec: PolicySpec, keys: ObservationKeys) -> list[str]:
    """Keys of the images that the policy reads from a message.

    Args:
        message: from a client.
        spec: of the policy.
        keys: where an observation's parts are.

    Raises:
        ObservationError: the policy has one unnamed camera, and the message not one image.
    """
    if spec.cameras != (ANY_CAMERA,):
        return [keys.camera(camera) for camera in spec.cameras]
    if ANY_CAMERA in keys.cameras:
        return [keys.cameras[ANY_CAMERA]]
    sent = keys.images_in(message)
    if len(sent) != 1:
        raise ObservationError(
            f"this policy has one camera; expected one key '{keys.camera('<name>')}', got {listed(sent or message)}."
        )
    return sent


def read_seed(message: Mapping[Any, Any]) -> int | None:
    """The seed of a message; None where it has none.

    Raises:
        ObservationError: it is not an integer from 0 to 2**63 - 1.
    """
    seed = message.get(SEED_KEY)
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise ObservationError(
            f"'{SEED_KEY}' is {shown(seed)} ({described(seed)}); expected an integer from 0 to 2**63 - 1."
        )
    return int(seed)


def read_milliseconds(message: Mapping[Any, Any], key: str) -> float | None:
    """A duration that a client may set, in milliseconds; None where it sets none.

    Args:
        message: from a client.
        key: "slack_ms" or "deadline_ms".

    Raises:
        ObservationError: not a number from 0 to an hour.
    """
    value = message.get(key)
    if value is None:
        return None
    if not _is_number(value) or not 0 <= value <= MAX_MS:
        raise ObservationError(f"'{key}' is {shown(value)}; expected milliseconds from 0 to {MAX_MS:.0f}.")
    return float(value)


def read_episode(message: Mapping[Any, Any]) -> str | int | None:
    """The name that a client gives to its episode; None where it gives none.

    Raises:
        ObservationError: neither a short string nor an integer of 64 bits.
    """
    value = message.get(EPISODE_KEY)
    if isinstance(value, np.integer):
        value = int(value)
    if value is None or (isinstance(value, str) and len(value) <= MAX_EPISODE_CHARACTERS):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return value
    raise ObservationError(
        f"'{EPISODE_KEY}' is {shown(value)}; expected an integer or at most {MAX_EPISODE_CHARACTERS} characters."
    )


def _image(message: Mapping[Any, Any], key: str, size: tuple[int, int], used: set[str]) -> NDArray[np.uint8]:
    image = _required(message, key, used, "image")
    expected = "expected a uint8 array of shape (height, width, 3), or a PNG or JPEG file as bytes"
    if isinstance(image, np.ndarray) and image.ndim == 1 and image.dtype == np.uint8:
        image = image.tobytes()  # a file, as OpenCV encodes it
    if isinstance(image, bytes):
        return resize(encoded_image.decode(image, key), size)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise ObservationError(f"'{key}' is {described(image)}; {expected}.")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ObservationError(f"'{key}' has shape {image.shape}; {expected}.")
    encoded_image.check_size(image.shape[:2], key)
    return resize(image, size)


def _state(
    message: Mapping[Any, Any], keys: tuple[str, ...], dim: int, used: set[str]
) -> NDArray[np.float32]:
    expected = f"expected {dim} finite numbers, shape ({dim},)"
    parts = [
        _numbers(_required(message, key, used, f"state: {expected}"), key, dim, expected) for key in keys
    ]
    name = "', '".join(keys)
    state = parts[0] if len(parts) == 1 else np.concatenate([part.reshape(-1) for part in parts])
    if state.shape != (dim,):
        raise ObservationError(f"'{name}' has shape {state.shape}; {expected}.")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused with what is not finite
        cast = state.astype(np.float32)
    if not np.isfinite(cast).all():
        bad = state[~np.isfinite(cast)][0]
        raise ObservationError(f"'{name}' holds {bad}, which is not finite in float32; {expected}.")
    return cast


def _numbers(value: Any, key: str, dim: int, expected: str) -> NDArray[Any]:
    if isinstance(value, np.generic | int | float) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, list | tuple) and len(value) > dim:
        raise ObservationError(f"'{key}' has {len(value)} entries; {expected}.")
    if isinstance(value, list | tuple) and all(map(_is_number, value)):
        value = np.asarray([_float(number) for number in value])
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
        raise ObservationError(f"'{key}' is {described(value)}; {expected}.")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _float(number: Any) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer of thousands of bits, from JSON
        return math.inf


def _prompt(message: Mapping[Any, Any], key: str, used: set[str]) -> str:
    prompt = _required(message, key, used, "prompt, a string")
    if not isinstance(prompt, str):
        raise ObservationError(f"'{key}' is {described(prompt)}; expected a string.")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ObservationError(
            f"'{key}' has {len(prompt)} characters; expected at most {MAX_PROMPT_CHARACTERS}."
        )
    return prompt


def _required(message: Mapping[Any, Any], key: str, used: set[str], what: str) -> Any:
    value = find(message, key)
    if value is not ABSENT:
        return value
    # Of a hostile message with thousands of names, only a few are compared: comparing costs by their product.
    others = [name for name in short_names(message, limit=50) if name not in used]
    near = nearest(key[:100], others)
    hint = f" Did you mean it by '{near}'?" if near else ""
    raise ObservationError(f"'{key}' is missing; got {listed(message)}.{hint} It is the {what}.")
