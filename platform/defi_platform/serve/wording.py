"""Words of clients, repeated in answers and errors: always short, whatever was sent."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np


def shown(value: Any, limit: int = 60) -> str:
    """A value for an error message: a text of at most some `limit` characters, made without making a long one first.

    Args:
        value: anything that a message can hold.
        limit: characters, about.
    """
    match value:
        case str() | bytes():
            text = repr(value[:limit])
        case bool() | float() | None:
            text = repr(value)
        case int():
            text = (
                repr(value) if value.bit_length() <= 4 * limit else f"an integer of {value.bit_length()} bits"
            )
        case list() | tuple():
            text = (
                f"[{', '.join(shown(entry, 20) for entry in value[:8])}{', ...' if len(value) > 8 else ''}]"
            )
        case _:
            return described(value)
    return text if len(text) <= limit + 4 else f"{text[:limit]} ..."


def described(value: Any) -> str:
    """The kind of a value, without the value."""
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {value.shape}"
    if isinstance(value, np.generic):
        return f"a {value.dtype} number"
    return f"of type {type(value).__name__}"


def listed(names: Iterable[Any], limit: int = 20, length: int = 60) -> str:
    """Names for an error message, sorted and joined by commas; "no keys" where there are none.

    Args:
        names: of any number.
        limit: names that are listed.
        length: characters of one.
    """
    some = [_short(name, length) for name in islice(names, limit + 1)]
    more = ", ..." if len(some) > limit else ""
    return ", ".join(sorted(some[:limit])) + more if some else "no keys"


def short_names(names: Iterable[Any], limit: int = 20, length: int = 60) -> tuple[str, ...]:
    """The first names, sorted and cut: for an answer that repeats them.

    Args:
        names: of any number.
        limit: names kept; what is over is counted in one more entry.
        length: characters of one.
    """
    every = list(names)
    kept = sorted(_short(name, length) for name in every[:limit])
    over = len(every) - len(kept)
    return (*kept, f"and {over} more") if over else tuple(kept)


def _short(name: Any, length: int) -> str:
    text = name if isinstance(name, str) else shown(name, length)
    return text if len(text) <= length else f"{text[:length]}..."
