"""Files of a policy folder beside its weights, for readers: the meaning of actions, settings of acting, statistics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar

from defi_models.errors import ModelFolderError
from defi_models.inputs.acting import Acting
from defi_models.inputs.action_contract import ActionContract
from defi_models.inputs.normalization import FieldStatistics, Statistics
from defi_models.pretrained.configuration import from_mapping, override, to_mapping

CONTRACT_FILE: Final = "actions.json"
ACTING_FILE: Final = "acting.json"
STATISTICS_FILE: Final = "statistics.json"

Content = TypeVar("Content")


def as_texts(contract: ActionContract, acting: Acting, statistics: Statistics | None) -> dict[str, str]:
    """Name -> JSON text of each file.

    Args:
        contract: meaning of the actions.
        acting: settings of acting.
        statistics: of the training data; None: no file.
    """
    values: dict[str, Any] = {CONTRACT_FILE: contract.as_mapping(), ACTING_FILE: to_mapping(acting)}
    if statistics is not None:
        values[STATISTICS_FILE] = asdict(statistics)
    return {name: json.dumps(value, indent=2) + "\n" for name, value in values.items()}


def read_contract(folder: Path) -> ActionContract | None:
    """The meaning of a policy's actions; None for a folder without. Raises: ModelFolderError when it is damaged."""
    return _read(folder / CONTRACT_FILE, ActionContract.from_mapping, "the meaning of actions")


def read_acting(folder: Path) -> Acting | None:
    """A policy's settings of acting; None for a folder without. Raises: ModelFolderError when they are damaged."""
    return _read(folder / ACTING_FILE, acting_from_mapping, "settings of acting")


def acting_from_mapping(values: Mapping[str, Any]) -> Acting:
    """Settings of acting from plain values; a field that is not named has its default.

    Raises: ConfigurationError for an unknown field, a wrong type or a value that cannot be.
    """
    return from_mapping(Acting, values, "acting")


def acting_with(acting: Acting, changes: Mapping[str, Any]) -> Acting:
    """Settings of acting with some fields (name -> value) changed; another `clip` than limits drops the limits.

    Raises: ConfigurationError as `acting_from_mapping`.
    """
    none = {"limits_low": (), "limits_high": ()} if changes.get("clip", "limits") != "limits" else {}
    return override(acting, {**none, **changes}, "acting")


def read_statistics(folder: Path) -> Statistics | None:
    """A policy's statistics; None for a folder without. Raises: ModelFolderError when they are damaged."""
    return _read(folder / STATISTICS_FILE, _statistics, "action statistics")


def _read(path: Path, parse: Callable[[Mapping[str, Any]], Content], what: str) -> Content | None:
    if not path.is_file():
        return None
    try:
        return parse(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFolderError(f"{path} does not hold {what}: {error}") from error


def _statistics(values: Mapping[str, Any]) -> Statistics:
    proprio = values.get("proprio")
    return Statistics(
        action=FieldStatistics(**values["action"]), proprio=FieldStatistics(**proprio) if proprio else None
    )
