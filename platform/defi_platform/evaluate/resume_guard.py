"""A folder of work in progress belongs to one set of settings; another set must not go on with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from defi_platform import storage
from defi_platform.errors import ConfigError

FILE = "settings.json"


def claim(folder: str, settings: Mapping[str, Any], what: str, output: str) -> None:
    """Marks `folder` as belonging to `settings`, or checks that it does.

    Args:
        what: the kind of work, for the message; output: the folder the user knows.
    Raises: ConfigError naming each setting that differs.
    """
    marker = storage.join(folder, FILE)
    if storage.exists(marker):
        check_same(settings, json.loads(storage.read_text(marker)), what, output)
    else:
        storage.write_text(marker, json.dumps(settings, indent=1))


def check_same(settings: Mapping[str, Any], found: Mapping[str, Any], what: str, output: str) -> None:
    """Raises: ConfigError naming each setting that differs."""
    # Through JSON, as the found ones went: tuples are lists there.
    changed = list(_differences(json.loads(json.dumps(settings)), found))
    if changed:
        raise ConfigError(
            f"{output} holds {what} with other settings ({'; '.join(changed)}). "
            "Choose another output, or delete that folder."
        )


def _differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            yield f"{key}: {found.get(key)} there, {wanted.get(key)} here"
