"""Model configs as plain mappings and back: frozen dataclasses, nested, with `kind` choosing among classes."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from defi_models.errors import ConfigurationError, did_you_mean

Schema = TypeVar("Schema")


def to_mapping(config: Any) -> dict[str, Any]:
    """The config as dicts, lists and plain values, ready for JSON."""
    return cast(dict[str, Any], _plain(config))


def from_mapping(schema: type[Schema], values: Mapping[str, Any], key_path: str = "config") -> Schema:
    """Builds `schema` from a mapping; a field that is not named keeps its default.

    Args:
        schema: the dataclass to build.
        values: field -> value, nested parts as nested mappings.
        key_path: start of the keys in messages.

    Returns:
        An instance of `schema`.

    Raises:
        ConfigurationError: For an unknown field (naming the nearest), an unknown kind or a wrong type.
    """
    return cast(Schema, _value(schema, values, key_path, None))


def override(config: Schema, changes: Mapping[str, Any], key_path: str = "config") -> Schema:
    """A copy of `config` with `changes` (field -> value, nested parts as nested mappings) laid over it.

    A part whose `kind` changes starts from that kind's defaults.

    Args:
        config: the dataclass to start from.
        changes: field -> value.
        key_path: start of the keys in messages.

    Returns:
        The changed copy.

    Raises:
        ConfigurationError: For an unknown field, an unknown kind or a wrong type.
    """
    return cast(Schema, _value(type(config), changes, key_path, config))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        kind = {"kind": value.kind} if hasattr(value, "kind") else {}
        return kind | {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _value(annotation: Any, value: Any, key_path: str, base: Any) -> Any:
    """Checks `value` against a field's annotation; `base` is the value it replaces, for nested parts."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        choices = get_args(annotation)
        if value is None:
            if type(None) in choices:
                return None
            raise ConfigurationError(f"{key_path} cannot be null.")
        choices = tuple(choice for choice in choices if choice is not type(None))
        if any(dataclasses.is_dataclass(choice) for choice in choices):
            return _part(choices, value, key_path, base)
        return _value(choices[0], value, key_path, base)
    if dataclasses.is_dataclass(annotation):
        return _part((annotation,), value, key_path, base)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigurationError(f"{key_path}: a list is expected, {value!r} was given.")
        element, *rest = get_args(annotation)
        if rest and rest != [Ellipsis] and len(value) != 1 + len(rest):
            raise ConfigurationError(
                f"{key_path}: {1 + len(rest)} values are expected, {list(value)} was given."
            )
        return tuple(_value(element, item, key_path, None) for item in value)
    return _scalar(annotation, value, key_path)


def _scalar(annotation: Any, value: Any, key_path: str) -> Any:
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(annotation, type) and (
        not isinstance(value, annotation) or (annotation is not bool and isinstance(value, bool))
    ):
        raise ConfigurationError(f"{key_path}: {annotation.__name__} is expected, {value!r} was given.")
    return value


def _part(choices: tuple[Any, ...], value: Any, key_path: str, base: Any) -> Any:
    if any(type(value) is choice for choice in choices):
        return value
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{key_path}: a mapping of fields is expected, {value!r} was given.")
    schema = choices[0]
    kinds = {choice.kind: choice for choice in choices if hasattr(choice, "kind")}
    if kinds:
        kind = value.get("kind", getattr(base, "kind", None))
        if kind not in kinds:
            known = did_you_mean(str(kind), sorted(kinds))
            raise ConfigurationError(f"{key_path}.kind: there is no '{kind}'.{known}")
        schema = kinds[kind]
    if type(base) is not schema:
        base = None
    hints = get_type_hints(schema)
    fields = {item.name: item for item in dataclasses.fields(schema)}
    given = {}
    for name, item in value.items():
        if name == "kind" and hasattr(schema, "kind"):
            continue
        if name not in fields:
            raise ConfigurationError(f"{key_path} has no field '{name}'.{did_you_mean(name, sorted(fields))}")
        before = getattr(base, name, None) if base is not None else None
        given[name] = _value(hints[name], item, f"{key_path}.{name}", before)
    if base is not None:
        return dataclasses.replace(base, **given)
    for name, item in fields.items():
        no_default = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if no_default and name not in given:
            raise ConfigurationError(f"{key_path}.{name} has no value.")
    return schema(**given)
