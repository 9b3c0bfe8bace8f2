"""The cluster's list of the runs that its jobs have begun: kept with its head, so that their state can be looked up."""

from __future__ import annotations

import json
import time

from ray.experimental import internal_kv

from defi_platform import storage

_SPACE = b"defi_runs"


def register_run(folder: str) -> None:
    """Notes that a run of this folder was begun, or continued, on the connected cluster."""
    value = json.dumps({"time": time.time()}).encode()
    key = storage.absolute(folder).encode()
    internal_kv._internal_kv_put(key, value, overwrite=True, namespace=_SPACE)


def registered_runs() -> dict[str, float]:
    """Folder of each run on the connected cluster -> Unix time at which its last job began."""
    found = {}
    for key in internal_kv._internal_kv_list(b"", namespace=_SPACE):
        value = internal_kv._internal_kv_get(key, namespace=_SPACE)
        if value is not None:
            found[key.decode()] = float(json.loads(value)["time"])
    return found
