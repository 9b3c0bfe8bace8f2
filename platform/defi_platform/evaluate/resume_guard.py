"""A guard against resuming work with other settings than those it was started with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from defi_platform import storage
from defi_platform.errors import ConfigError

FILE = "settings.json"


def bind_settings(folder: str, settings: Mapping[str, Any], what: str, output: str) -> None:
    """Writes `settings` into a new work folder, or checks that an existing one has the same.

    Args:
        folder: of the unfinished work, local or remote.
        settings: JSON values that decide the result.
        what: the kind of work with its article ("a recording"), for the message.
        output: the folder as the user configured it, for the message.

    Raises:
        ConfigError: the folder was started with other settings; names each that differs.
    """
    marker = storage.join(folder, FILE)
    if storage.exists(marker):
        ensure_same_settings(settings, json.loads(storage.read_text(marker)), what, output)
    else:
        storage.write_text(marker, json.dumps(settings, indent=1))


def ensure_same_settings(
    settings: Mapping[str, Any], found: Mapping[str, Any], what: str, output: str
) -> None:
    """Compares the settings of this run with those that were stored.

    Args:
        settings: of this run.
        found: as read back from JSON.
        what: the kind of work with its article ("a recording"), for the message.
        output: the folder as the user configured it, for the message.

    Raises:
        ConfigError: they differ; names each setting that does.
    """
    # Through JSON, as the stored ones went: tuples are lists there.
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
