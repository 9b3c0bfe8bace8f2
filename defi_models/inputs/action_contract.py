"""The meaning of a policy's actions and states, for whoever sends and receives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from defi_models.errors import ConfigurationError
from defi_models.inputs.state_layout import StateLayout

UNKNOWN: Final = "unknown"
KINDS: Final = ("absolute", "relative", "mixed", UNKNOWN)


@dataclass(frozen=True, kw_only=True)
class ActionContract:
    """Names, units and use of the entries of an action; what nobody has said is `unknown`.

    Raises:
        ConfigurationError: For a kind that is not one of `KINDS`, or as many units as there are no names for.
    """

    names: tuple[str, ...] = ()
    """Of the entries, in order; empty: unknown."""
    units: tuple[str, ...] = ()
    """Of the entries, in order, such as "m" or "0.02 m" where 1 stands for 2 cm; empty: unknown."""
    kind: str = UNKNOWN
    """absolute: targets; relative: changes; mixed: as the units say."""
    gripper: str = UNKNOWN
    """How the gripper's entry is turned into a command."""
    control_hz: float | None = None
    """Actions per second; None: unknown."""
    execute_steps: int | None = None
    """Actions of a chunk to carry out before the next observation is sent; None: all of them."""
    state: StateLayout | None = None
    """The raw state that an observation carries, and what the policy reads of it; None: all of it, as it is."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigurationError(f"actions.kind is '{self.kind}'; choose {', '.join(KINDS)}.")
        if self.names and self.units and len(self.names) != len(self.units):
            raise ConfigurationError(
                f"actions.units has {len(self.units)} entries, actions.names has {len(self.names)}; "
                "each entry of an action has one of both."
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """The contract from the mapping that `as_mapping` makes of it. Raises: KeyError, TypeError."""
        lists = {key: tuple(values[key]) for key in ("names", "units")}
        state = StateLayout.from_mapping(values["state"]) if values.get("state") else None
        return cls(**{**values, **lists, "state": state})

    def as_mapping(self) -> dict[str, Any]:
        """Plain values, as a policy folder keeps them."""
        values = asdict(self)
        lists = {key: list(values[key]) for key in ("names", "units")}
        return values | lists | {"state": None if self.state is None else self.state.as_mapping()}
