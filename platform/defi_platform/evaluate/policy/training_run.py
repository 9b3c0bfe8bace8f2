"""The settings of the training that a model folder lies in: they say which corpora it has seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from defi_platform import storage
from defi_platform.config.loader import read_yaml
from defi_platform.errors import UserError

_RUN_CONFIG = "config.yaml"


def run_folder(model: str) -> str:
    """The folder that a training's model folder lies in."""
    return storage.absolute(model).rstrip("/").rpartition("/")[0]


def training_config(model: str) -> Mapping[str, Any]:
    """The configuration of a model folder's training; {} where it lies in no run folder, so that nobody knows.

    Args:
        model: its folder.
    """
    path = storage.join(run_folder(model), _RUN_CONFIG)
    if not storage.exists(path):
        return {}
    try:
        with storage.local_copy(path) as local:
            return {str(name): value for name, value in read_yaml(local).items()}
    except UserError:
        return {}  # of something else than a training


def part_of(values: Any, name: str) -> Mapping[str, Any]:
    """A nested part of a configuration; {} where it has none."""
    part = values.get(name) if isinstance(values, Mapping) else None
    return part if isinstance(part, Mapping) else {}
