"""The lists environments/NAME.txt: packages of a simulator that needs an interpreter of its own.

They are requirements files of pip. Two kinds of comments say what pip does not know:

    # python: 3.10 3.11
    # clone calvin_env: https://github.com/mees/calvin_env

The first names the Python versions that the packages have wheels for, best first. The second asks for a clone that the
user has made, since the package is on no index; its folder (or one below it: `# clone NAME/FOLDER: URL`) goes onto the
environment's path.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from defi_platform.errors import SimulatorError

FOLDER = Path(__file__).resolve().parents[2] / "environments"
"""The lists, which travel with the package."""

_PYTHON = re.compile(r"#\s*python:\s*(.+)")
_CLONE = re.compile(r"#\s*clone\s+([\w./-]+):\s*(\S+)")


@dataclass(frozen=True)
class Clone:
    """A repository that the user has cloned."""

    name: str
    below: str
    """Folder in it that goes onto the path; "" for the clone itself."""
    url: str


@dataclass(frozen=True)
class PackageList:
    """One list."""

    file: Path
    pythons: tuple[str, ...]
    """Versions such as "3.11", best first; empty: any."""
    clones: tuple[Clone, ...]
    digest: str
    """SHA-256 of the file."""


def package_list(name: str, folder: Path = FOLDER) -> PackageList:
    """The list of an environment.

    Args:
        name: of the environment.
        folder: of the lists.

    Raises:
        SimulatorError: there is none.
    """
    file = folder / f"{name}.txt"
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise SimulatorError(f"{file}, the list of the packages of '{name}', is not there.") from error
    pythons: tuple[str, ...] = ()
    clones = []
    for line in content.decode().splitlines():
        if found := _PYTHON.fullmatch(line.strip()):
            pythons = tuple(found[1].replace(",", " ").split())
        elif found := _CLONE.fullmatch(line.strip()):
            clone, _, below = found[1].partition("/")
            clones.append(Clone(clone, below, found[2]))
    return PackageList(file, pythons, tuple(clones), hashlib.sha256(content).hexdigest())
