"""Meaning of a corpus's actions, as far as it says it: names, units, kind, gripper rule and rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Final

from defi_models.errors import ConfigurationError
from defi_models.inputs.action_contract import UNKNOWN, ActionContract
from defi_platform.config import ActionConfig
from defi_platform.data.sources.formats import signal_names
from defi_platform.errors import ConfigError

CALVIN: Final = ActionContract(
    names=("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
    units=("0.02 m", "0.02 m", "0.02 m", "0.05 rad", "0.05 rad", "0.05 rad", "-1 or 1"),
    kind="relative",
    gripper="1 (open) where the entry is above 0, else -1 (close)",
)
"""CALVIN's `rel_actions`: changes of the gripper's pose in the world's frame, in steps of its largest change."""


def contract_of(source: str, root: str, fps: float) -> ActionContract:
    """The contract as far as the corpus states it.

    Args:
        source: its format.
        root: its folder.
        fps: its frames per second, one action each; 0: unknown.
    """
    known = CALVIN if source == "calvin" else ActionContract(names=signal_names(source, root).action)
    return replace(known, control_hz=fps or None)


def common(contracts: Sequence[ActionContract]) -> ActionContract:
    """The contract of a policy for several corpora: what they say alike; what they differ in is unknown."""
    blank = asdict(ActionContract())
    said = [asdict(contract) for contract in contracts]
    alike = {key: said[0][key] for key in blank if all(one[key] == said[0][key] for one in said)}
    return ActionContract(**{**blank, **alike})


def configured(known: ActionContract, config: ActionConfig, action_dim: int, chunk: int) -> ActionContract:
    """The contract with what the configuration says in place of what the corpus does.

    Args:
        known: of the corpus.
        config: `actions` of the fine-tuning.
        action_dim: entries of an action.
        chunk: actions of an answer.

    Raises: ConfigError for names or units that are not one per entry, a kind, rate or number of steps that there is not.
    """
    for name in ("names", "units"):
        given = getattr(config, name)
        if given and len(given) != action_dim:
            raise ConfigError(
                f"actions.{name} has {len(given)} entries ({', '.join(given)}), an action of the corpus has "
                f"{action_dim}. Give one for each."
            )
    if config.execute_steps is not None and not 1 <= config.execute_steps <= chunk:
        raise ConfigError(
            f"actions.execute_steps is {config.execute_steps}; a chunk has 1 to {chunk} actions."
        )
    if config.control_hz is not None and not 0 < config.control_hz < float("inf"):
        raise ConfigError(f"actions.control_hz is {config.control_hz}; a rate above 0 is expected.")
    # Names that a corpus gives for another number of entries than it has are worth nothing.
    fit = known if len(known.names) == action_dim else replace(known, names=(), units=())
    try:
        return ActionContract(
            names=tuple(config.names) or fit.names,
            units=tuple(config.units) or fit.units,
            kind=fit.kind if config.kind == UNKNOWN else config.kind,
            gripper=fit.gripper if config.gripper == UNKNOWN else config.gripper,
            control_hz=fit.control_hz if config.control_hz is None else config.control_hz,
            execute_steps=chunk if config.execute_steps is None else config.execute_steps,
        )
    except ConfigurationError as error:
        raise ConfigError(str(error)) from error
