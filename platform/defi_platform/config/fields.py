"""Rules of single config fields, kept in their dataclass metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final

from omegaconf import MISSING, OmegaConf

PATH: Final = {"path": True}
"""A file, folder or URL, which `defi_platform.config.paths.absolute_paths` makes absolute."""

BOUND, FREE, RESTART, EXTEND, CONTENT, UNTIL_COMPLETE = (
    "bound", "free", "restart", "extend", "content", "until_complete",
)  # fmt: skip
"""What may become of a field in a run that has begun, see RESUME_RULES. A field without a rule has that of the part it is
in, and is bound where no part has one: it changes the order of the data or the loss, so a run with another value could
not continue exactly."""
RESUME_RULES: Final = {
    BOUND: "On resume: fixed.",
    FREE: "On resume: may change.",
    RESTART: "On resume: may change by train.restart_from.",
    EXTEND: "On resume: may change; where the learning rate depends on it by train.extend.",
    CONTENT: "On resume: fixed in content, which another name or place may have.",
    UNTIL_COMPLETE: "On resume: may change until the run is complete.",
}
"""Rule -> its sentence in --help and docs."""
RESUME_FREE: Final = {"resume": FREE}
RESUME_RESTART: Final = {"resume": RESTART}
RESUME_EXTEND: Final = {"resume": EXTEND}
RESUME_CONTENT: Final = {"resume": CONTENT}
RESUME_UNTIL_COMPLETE: Final = {"resume": UNTIL_COMPLETE}


@dataclasses.dataclass(frozen=True)
class Change:
    """A setting that has another value than the run was begun with."""

    key: str
    """Dotted."""
    before: Any
    now: Any
    rule: str
    """One of RESUME_RULES."""


def resume_rule(field: dataclasses.Field[Any], of_part: str | None = None) -> str:
    """The rule of a field; `of_part`: of the part it is in, where that has one."""
    return str(field.metadata.get("resume", of_part or BOUND))


def changes(
    config: Any, now: Mapping[str, Any], before: Mapping[str, Any], prefix: str = "", rule: str | None = None
) -> Iterator[Change]:
    """Yields the settings in which a config differs from the one that a run was begun with, free ones left out.

    A key that was not there yet had its default.

    Args:
        config: the config, for its schema.
        now: the same as plain values.
        before: plain values of the other one.
        prefix: of the keys, with a dot at its end.
        rule: of the part that this is, where it has one.
    """
    for field in dataclasses.fields(config):
        own = field.metadata.get("resume", rule)
        value, key = now[field.name], f"{prefix}{field.name}"
        if own == FREE:
            continue
        part = getattr(config, field.name)
        old = before.get(field.name, MISSING)
        if dataclasses.is_dataclass(part) and isinstance(old, (Mapping, str)):
            yield from changes(part, value, {} if old == MISSING else old, f"{key}.", own)  # type: ignore[arg-type]
            continue
        if old == MISSING:
            old = _default(field)
        if isinstance(part, dict) and any(map(dataclasses.is_dataclass, part.values())):
            for name in sorted({*part, *(old or {})}):
                mine, theirs = part.get(name), (old or {}).get(name)
                if mine is None or theirs is None:
                    yield Change(f"{key}.{name}", _said(theirs), _said(value.get(name)), own or BOUND)
                else:
                    yield from changes(mine, value[name], theirs, f"{key}.{name}.", own)
        elif old not in (value, MISSING):
            yield Change(key, old, value, own or BOUND)


def unknown_keys(config: Any, before: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of plain values that the schema of a config does not have, for entries that both have.

    Args:
        config: the config.
        before: plain values of another one, perhaps written by another version.
        prefix: of the keys, with a dot at its end.
    """
    known = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, value in before.items():
        part = known.get(name)
        if name not in known:
            yield f"{prefix}{name}={value}"
        elif dataclasses.is_dataclass(part) and isinstance(value, Mapping):
            yield from unknown_keys(part, value, f"{prefix}{name}.")
        elif isinstance(part, dict) and isinstance(value, Mapping):
            for entry, item in part.items():
                if dataclasses.is_dataclass(item) and isinstance(value.get(entry), Mapping):
                    yield from unknown_keys(item, value[entry], f"{prefix}{name}.{entry}.")


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default of a field as plain values; MISSING where there is none."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return MISSING
    if dataclasses.is_dataclass(value):
        return OmegaConf.to_container(OmegaConf.structured(value))
    return value


def _said(part: Any) -> Any:
    """An entry that is there or not, in a word for messages: all of its values would fill the screen."""
    return part.get("path", "there") if isinstance(part, Mapping) else part


def is_path(field: dataclasses.Field[Any]) -> bool:
    """True for a field that holds a path."""
    return bool(field.metadata.get("path"))
