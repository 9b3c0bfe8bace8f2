"""Errors that a user of the models can cause; each message names the thing, where it is and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ModelFolderError(ValueError):
    """A model folder or weight file that is absent, partial, damaged or of another model."""


class ConfigurationError(ValueError):
    """A preset, field or value that does not exist or does not fit the others."""


class InputError(ValueError):
    """An argument of a model call, or a key of its batch, of a wrong type, shape, dtype, length or value."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The end of an error message about an unknown name.

    Args:
        name: as given.
        choices: the names that exist.

    Returns: " Did you mean 'X'?" for the nearest choice; " There is: X, Y." where none is near; "" without choices.
    """
    existing = list(choices)
    near = nearest(name, existing)
    if near:
        return f" Did you mean '{near}'?"
    return f" There is: {', '.join(existing)}." if existing else ""


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The most similar choice to a name; None where none is similar."""
    return next(iter(difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)), None)
