"""Rules of single config fields, kept in their dataclass metadata."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

RESUME_FREE: Final = {"resume": "free"}
"""A resumed run may have another value than the run had before. A field without this rule is bound: it changes the
order of the data or the loss, so a run with another value could not continue exactly."""
PATH: Final = {"path": True}
"""A file, folder or URL, which `defi_platform.config.paths.absolute_paths` makes absolute."""


def bound_on_resume(schema: Any) -> list[str]:
    """Names of the fields of a config class (or of an instance) that a resumed run must leave as they were."""
    return [f.name for f in dataclasses.fields(schema) if f.metadata.get("resume") != "free"]


def is_path(field: dataclasses.Field[Any]) -> bool:
    """True for a field that holds a path."""
    return bool(field.metadata.get("path"))
