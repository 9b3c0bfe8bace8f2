"""An observation as a policy's server expects it: under our keys, or under those of another project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defi_platform.config import ObservationKeysConfig
from defi_platform.errors import ConfigError
from defi_platform.serve.observation import SEED_KEY
from defi_platform.serve.observation_keys import OWN, ObservationKeys
from defi_platform.serve.protocols.settings import observation_keys


def client_keys(said: ObservationKeysConfig) -> ObservationKeys:
    """The keys that observations are sent under; ours where the config names none.

    Raises:
        ConfigError: a name is unknown or empty, or the state would have to be divided among several keys.
    """
    for name in ("names", "images", "prompt"):
        if getattr(said, name) == "":
            raise ConfigError(
                f"observation_keys.{name} is empty; name a key, or leave it out for the usual one."
            )
    keys = observation_keys(said) or OWN
    if len(keys.state) != 1:
        raise ConfigError(
            f"observation_keys: the state has the keys {', '.join(keys.state)}, and which numbers belong to which is not "
            "known here. Name one: observation_keys.state=[KEY]."
        )
    return keys


def policy_observation(
    keys: ObservationKeys,
    images: Mapping[str, NDArray[np.uint8]],
    state: NDArray[np.floating] | None,
    *,
    prompt: str,
    seed: int,
) -> dict[str, Any]:
    """The message for a policy's server.

    Args:
        keys: that it reads.
        images: by the names that it knows cameras by; uint8 (H, W, 3).
        state: (S,), or None where there is none.
        prompt: the instruction.
        seed: of the policy's noise.
    """
    message: dict[str, Any] = {keys.camera(camera): image for camera, image in images.items()}
    if state is not None:
        message[keys.state[0]] = state
    return message | {keys.prompt: prompt, SEED_KEY: seed}
