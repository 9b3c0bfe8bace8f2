"""The states that a policy reads: chosen entries of the robot's raw state, angles in a form without jumps.

One function, `StateLayout.apply`, serves training, statistics and serving.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from defi_models.errors import ConfigurationError, did_you_mean

ANGLES: Final = ("none", "sin_cos", "unwrap")
KEYS: Final = ("name", "index", "angle", "around")


@dataclass(frozen=True, kw_only=True)
class StateEntry:
    """One entry of the raw state.

    Raises:
        ConfigurationError: For an angle that is not one of `ANGLES`, or a centre that is no number.
    """

    index: int
    """Position within the raw state, from 0 on."""
    name: str = ""
    angle: str = "none"
    """none: as it is; sin_cos: an angle in radians, as its sine and cosine; unwrap: an angle in radians, within half a
    turn of `around`."""
    around: float = 0.0
    """Radians, of unwrap: the jump by a whole turn lies opposite."""

    def __post_init__(self) -> None:
        if self.angle not in ANGLES:
            raise ConfigurationError(f"angle is '{self.angle}'; choose {', '.join(ANGLES)}.")
        if not math.isfinite(self.around):
            raise ConfigurationError(f"around is {self.around}; an angle in radians is expected.")


@dataclass(frozen=True, kw_only=True)
class StateLayout:
    """Entries that a policy reads, in order, of a raw state of `raw_dim` numbers."""

    raw_dim: int
    entries: tuple[StateEntry, ...]

    @property
    def width(self) -> int:
        """Numbers that come out."""
        return sum(2 if entry.angle == "sin_cos" else 1 for entry in self.entries)

    def apply(self, states: NDArray[Any]) -> NDArray[np.float32]:
        """The numbers that the policy reads.

        Args:
            states: (..., raw_dim) raw states.

        Returns:
            (..., width) float32.

        Raises:
            ConfigurationError: When the states have another width.
        """
        if states.shape[-1] != self.raw_dim:
            raise ConfigurationError(f"a state has {states.shape[-1]} numbers; {self.raw_dim} are expected.")
        columns = []
        for entry in self.entries:
            values = states[..., entry.index].astype(np.float64)
            if entry.angle == "sin_cos":
                columns += [np.sin(values), np.cos(values)]
            elif entry.angle == "unwrap":
                columns.append(entry.around + (values - entry.around + np.pi) % (2 * np.pi) - np.pi)
            else:
                columns.append(values)
        return np.stack(columns, axis=-1).astype(np.float32)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """The layout from the mapping that `as_mapping` makes of it. Raises: KeyError, TypeError."""
        entries = tuple(StateEntry(**entry) for entry in values["entries"])
        return cls(raw_dim=int(values["raw_dim"]), entries=entries)

    def as_mapping(self) -> dict[str, Any]:
        """Plain values, as a policy folder and a greeting have them."""
        return {"raw_dim": self.raw_dim, "entries": [asdict(entry) for entry in self.entries]}


def check_choice(choice: Sequence[Any], key: str) -> None:
    """Checks a list of entries as a configuration has it, as far as that is possible without data.

    Args:
        choice: see `chosen_layout`.
        key: of the configuration, for messages.

    Raises:
        ConfigurationError: For an entry of another shape.
    """
    for number, item in enumerate(choice):
        _parsed(item, f"{key}[{number}]")


def chosen_layout(
    choice: Sequence[Any], raw_dim: int, names: Sequence[str], centres: Sequence[float], key: str
) -> StateLayout:
    """Finds the entries that a configuration chooses.

    Args:
        choice: entries in order, each a name, an index, or a mapping with `name` or `index` and, for angles, `angle`
            (one of `ANGLES`) and `around`.
        raw_dim: numbers of the raw state.
        names: of its entries; empty where the corpus gives none.
        centres: mean direction of each entry in radians, for `unwrap` without `around`.
        key: of the configuration, for messages.

    Returns:
        The layout.

    Raises:
        ConfigurationError: For an entry of another shape, or one that the raw state does not have.
    """
    entries = []
    for number, item in enumerate(choice):
        where = f"{key}[{number}]"
        wanted, angle, around = _parsed(item, where)
        if isinstance(wanted, str):
            if not names:
                raise ConfigurationError(
                    f"{where} is '{wanted}', but the states of this corpus have no names. "
                    f"Choose by index, 0 to {raw_dim - 1}."
                )
            if wanted not in names:
                raise ConfigurationError(
                    f"{where} is '{wanted}', which the states do not have.{did_you_mean(wanted, names)} "
                    f"There is: {', '.join(names)}."
                )
            index = list(names).index(wanted)
        else:
            index = wanted
            if not 0 <= index < raw_dim:
                raise ConfigurationError(f"{where} is {index}; the states have entries 0 to {raw_dim - 1}.")
        if around is None:
            around = float(centres[index]) if angle == "unwrap" and centres else 0.0
        name = names[index] if names else ""
        entries.append(StateEntry(index=index, name=name, angle=angle, around=around))
    return StateLayout(raw_dim=raw_dim, entries=tuple(entries))


def _parsed(item: Any, where: str) -> tuple[int | str, str, float | None]:
    """(name or index, angle, around) of an entry of a configuration."""
    given = dict(item) if isinstance(item, Mapping) else {"name" if isinstance(item, str) else "index": item}
    unknown = next((name for name in given if name not in KEYS), None)
    if unknown is not None:
        raise ConfigurationError(f"{where}: there is no key '{unknown}'.{did_you_mean(str(unknown), KEYS)}")
    wanted = [given[name] for name in ("name", "index") if given.get(name) is not None]
    if len(wanted) != 1 or isinstance(wanted[0], bool) or not isinstance(wanted[0], int | str):
        raise ConfigurationError(
            f"{where} is {item!r}; a name, an index, or a mapping with one of both is expected."
        )
    angle, around = str(given.get("angle", "none")), given.get("around")
    if around is not None and (isinstance(around, bool) or not isinstance(around, int | float)):
        raise ConfigurationError(f"{where}.around is {around!r}; an angle in radians is expected.")
    try:
        StateEntry(index=0, angle=angle, around=around or 0.0)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}.{error}") from error
    return wanted[0], angle, None if around is None else float(around)
