"""Paths of a config, made independent of the working directory once: workers and actors have other ones."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from omegaconf import MISSING

from defi_platform import storage
from defi_platform.config.fields import is_path
from defi_platform.errors import ConfigError

Config = TypeVar("Config")


def absolute_paths(config: Config) -> Config:
    """A copy of a config in which every field marked as `PATH` is absolute, nested configs included.

    An empty text in an optional field counts as null: as a path it would be the working directory.

    Raises:
        ConfigError: a field that is not optional is empty.
    """
    copy: Config = _absolute(config)
    return copy


def _absolute(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _absolute(item) for key, item in value.items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if is_path(field):
            if item == "" and field.default is None:
                item = None
            elif item == "":
                raise ConfigError(f"{field.name} is empty; name a file, folder or URL.")
            changed[field.name] = item if item in (None, MISSING) else storage.absolute(item)
        else:
            changed[field.name] = _absolute(item)
    return dataclasses.replace(value, **changed)
