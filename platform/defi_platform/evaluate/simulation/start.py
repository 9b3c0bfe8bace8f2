"""First code of a simulator's process, run as a script by whichever Python has the simulator's packages.

It makes this project's packages importable, and nothing that lies beside them: that folder may be the
site-packages of another Python.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec

MISFIT = 66
"""Exit code of an interpreter that cannot run this project's side; its last line of output says why."""
_OLDEST = (3, 11)


class _Given:
    """Finds top-level packages and modules by the places in a mapping."""

    def __init__(self, places: Mapping[str, str]):
        self._places = places

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        place = self._places.get(name)
        if place is None:
            return None
        if not os.path.isdir(place):
            return importlib.util.spec_from_file_location(name, place)
        first = os.path.join(place, "__init__.py")
        if os.path.exists(first):
            return importlib.util.spec_from_file_location(name, first, submodule_search_locations=[place])
        namespace = ModuleSpec(name, None, is_package=True)
        namespace.submodule_search_locations = [place]
        return namespace


def _main() -> None:
    sys.path.pop(0)  # this folder, whose modules are nobody's top level
    given = json.loads(sys.argv[1])
    sys.path[:0] = [entry for entry in given["path"] if entry not in sys.path]
    sys.meta_path.insert(0, _Given(given["packages"]))
    version = tuple(sys.version_info[:2])
    if version < _OLDEST:
        print(f"its version is {version[0]}.{version[1]}, the oldest that will do {_OLDEST[0]}.{_OLDEST[1]}")
        sys.exit(MISFIT)
    try:
        from defi_platform.evaluate.simulation.child import serve
    except ImportError as error:
        print(f"it has no package '{error.name or error}'")
        sys.exit(MISFIT)
    serve(given["socket"], given["lifeline"], given["memory"])


if __name__ == "__main__":
    _main()
