"""Reading of the store's JSON files, which are written whole; one that is not was damaged by something else."""

from __future__ import annotations

import json
from typing import Any

from defi_platform import storage
from defi_platform.errors import ConfigError


def read_json(path: str) -> dict[str, Any]:
    """The content of a file.

    Raises:
        ConfigError: it is no JSON mapping.
        FileNotFoundError: there is none.
    """
    try:
        found = json.loads(storage.read_text(path))
        if isinstance(found, dict):
            return found
        error = "no mapping"
    except ValueError as caught:  # JSON's and UTF-8's
        error = str(caught)
    raise ConfigError(
        f"{path} is damaged ({error}), which an evaluation that is killed does not do, but a copy that ended early or a "
        "full disk. Delete the file and run the same command: what it held is done again."
    )
