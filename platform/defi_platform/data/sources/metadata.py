"""A corpus's own metadata, which may be damaged or hostile: sizes are checked before memory is taken."""

from __future__ import annotations

import json
import math
from typing import Any, Final

from defi_platform import storage

MAX_FOLDERS = 200
"""Folders that are searched when a format is detected: a corpus of videos may have a million, those of shards and
datasets have few."""

LARGEST_JSON = 256 << 20
"""Bytes of a JSON file; its objects take ten times as much memory."""

LONGEST_TEXT = 100_000
"""Characters of an instruction."""

TEXT_KEYS = (
    "text",
    "caption",
    "label",
    "instruction",
    "task",
    "description",
    "prompt",
    "sentence",
    "texts",
    "captions",
)
"""Names that texts go by in the wild, the likeliest first."""

DAMAGE: Final = (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError)
"""What code that takes metadata apart raises where they are not what they should be."""


def first_folders(root: str) -> list[str]:
    """Names of the folders right below `root`, the first `MAX_FOLDERS` in their order."""
    return storage.folders(root)[:MAX_FOLDERS]


def read_json(uri: str, size: int | None = None) -> Any:
    """Reads a JSON file.

    Args:
        uri: of the file.
        size: its bytes, where they are known.

    Raises: ValueError when it is damaged, too large or too deep; FileNotFoundError, StorageError.
    """
    check_size(uri, storage.entry(uri).bytes if size is None else size)
    return parsed_json(storage.read_bytes(uri))


def check_size(name: str, size: int) -> None:
    """Checks the bytes of a metadata file before it is read. Raises: ValueError."""
    if size > LARGEST_JSON:
        raise ValueError(f"{name} has {size:,} bytes; metadata of more than {LARGEST_JSON:,} are not read")


def parsed_json(content: bytes | str) -> Any:
    """Parses JSON. Raises: ValueError, for values that are nested too deeply too."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def text_of(value: Any) -> str:
    """The instruction in a metadata value: the first that is no blank in a list, the one in a mapping; "" for none.

    Raises: ValueError when it is longer than `LONGEST_TEXT`.
    """
    for _ in range(4):  # lists of mappings of lists; nothing deeper is meant as a text
        if isinstance(value, str):
            break
        if isinstance(value, dict):
            by_name = {str(key).lower(): found for key, found in value.items()}
            value = next((by_name[key] for key in TEXT_KEYS if _is_text(by_name.get(key))), None)
        elif isinstance(value, list | tuple):
            value = next((found for found in value if _is_text(found)), None)
        else:
            break
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str):
        return ""
    if len(value) > LONGEST_TEXT:
        raise ValueError(
            f"a text of {len(value):,} characters; the longest that is taken has {LONGEST_TEXT:,}"
        )
    return value.strip()


def _is_text(value: Any) -> bool:
    """Whether a value may hold a text; blanks, and NaN for nothing as tables write it, do not."""
    if isinstance(value, list | tuple):
        return any(isinstance(found, str | dict) and found for found in value)
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, dict | bytes) and bool(value)
