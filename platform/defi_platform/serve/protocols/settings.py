"""Settings of dialogues, from the configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from defi_models.errors import did_you_mean
from defi_platform.config import ObservationKeysConfig, ServeConfig
from defi_platform.errors import ConfigError
from defi_platform.serve.observation import OPTIONAL_KEYS
from defi_platform.serve.observation_keys import CAMERA, NAMES, OWN, ObservationKeys
from defi_platform.serve.protocols.wire import WireSettings
from defi_platform.serve.sessions.options import CHUNK, STEP, SessionOptions


def wire_settings(config: ServeConfig) -> WireSettings:
    """The settings of all dialogues of a server.

    Args:
        config: its `session` and `observation_keys` are read.

    Raises:
        ConfigError: a value is out of its range, or a name is unknown.
    """
    return WireSettings(
        session=_session(config), keys=observation_keys(config.observation_keys), actions=_actions(config)
    )


def check_against_policy(settings: WireSettings, cameras: Sequence[str], action_dim: int) -> None:
    """Checks what only the policy can say of a configuration's names.

    Args:
        settings: of the server.
        cameras: of the policy, as `camera_names` says them.
        action_dim: numbers of one of its actions.

    Raises:
        ConfigError: a camera that the policy does not have, two cameras with one key, or parts of an action that are not
            all of it.
    """
    keys = settings.keys or OWN
    for name in keys.cameras:
        if name not in cameras:
            raise ConfigError(
                f"observation_keys.cameras names '{name}', but the policy has {', '.join(cameras)} (*: a camera without a "
                f"name).{did_you_mean(name, cameras)}"
            )
    read_by: dict[str, str] = {}
    for camera in cameras:
        other = read_by.setdefault(keys.camera(camera), camera)
        if other != camera:
            raise ConfigError(
                f"observation_keys: the policy's cameras {other} and {camera} would both be read from "
                f"'{keys.camera(camera)}'. Put {CAMERA} into observation_keys.images, or write their keys as "
                f"observation_keys.cameras={{{other}: KEY, {camera}: KEY}}."
            )
    parts = sum(settings.actions.values())
    if parts not in (0, action_dim):
        raise ConfigError(
            f"observation_keys.actions names {parts} numbers in all; an action of the policy has {action_dim}."
        )


def _session(config: ServeConfig) -> SessionOptions:
    session = config.session
    if session.answers not in (None, CHUNK, STEP):
        raise ConfigError(f"session.answers is '{session.answers}'; write chunk, step or null.")
    if session.open_loop is not None and session.open_loop < 1:
        raise ConfigError(f"session.open_loop is {session.open_loop}; write 1 or more actions, or null.")
    if session.ensemble is not None and not 0 <= session.ensemble <= 100:
        raise ConfigError(f"session.ensemble is {session.ensemble}; write a number from 0 to 100, or null.")
    if session.seed is not None and not 0 <= session.seed < 2**63:
        raise ConfigError(f"session.seed is {session.seed}; write an integer from 0 to 2**63 - 1, or null.")
    if not 0 < session.expiry_s < math.inf:
        raise ConfigError(f"session.expiry_s is {session.expiry_s}; write seconds above 0.")
    return SessionOptions(
        answers=session.answers,
        open_loop=session.open_loop,
        ensemble=session.ensemble,
        seed=session.seed,
        expiry_s=session.expiry_s,
    )


def observation_keys(said: ObservationKeysConfig) -> ObservationKeys | None:
    """The keys that a config names; None where it leaves them to the protocol.

    Raises:
        ConfigError: a name is unknown, or keys get in each other's way.
    """
    if said.names is not None and said.names not in NAMES:
        raise ConfigError(
            f"observation_keys.names is '{said.names}', which is not known.{did_you_mean(said.names, NAMES)}"
        )
    if said.names is None and not (said.images or said.cameras or said.state or said.prompt):
        return None
    keys = NAMES[said.names] if said.names else OWN
    keys = replace(
        keys,
        images=said.images or keys.images,
        cameras=dict(said.cameras) or keys.cameras,
        state=tuple(said.state) or keys.state,
        prompt=said.prompt or keys.prompt,
    )
    if keys.images.count(CAMERA) > 1:
        raise ConfigError(f"observation_keys.images is '{keys.images}'; {CAMERA} may stand in it once.")
    taken = {keys.prompt, *keys.state, *keys.cameras.values()} & set(OPTIONAL_KEYS)
    if taken:
        raise ConfigError(
            f"observation_keys: '{sorted(taken)[0]}' has a meaning of its own in every observation."
        )
    return keys


def _actions(config: ServeConfig) -> dict[str, int]:
    actions = dict(config.observation_keys.actions)
    for name, size in actions.items():
        if size < 1:
            raise ConfigError(f"observation_keys.actions.{name} is {size}; write 1 or more numbers.")
    return actions
