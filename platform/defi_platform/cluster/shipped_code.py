"""The code that a submission sends to a cluster: its size before it is sent, since Ray refuses more than its limit.

`python -m defi_platform.cluster.shipped_code [FOLDER]` shows it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes

from defi_platform.errors import ConfigError, UserError, exit_code

RUNTIME_ENV = "cluster/runtime_env.yaml"
"""The runtime environment of a checkout, below its folder."""

LIMIT = min(GCS_STORAGE_MAX_SIZE, DASHBOARD_CLIENT_MAX_SIZE)
"""Bytes that a cluster's dashboard, which takes the package, and its store accept."""

NAMED = 5
"""Folders that a message names, the largest."""


class ShippedCodeError(UserError):
    """A folder that is too large to be sent to a cluster."""


@dataclass(frozen=True)
class ShippedCode:
    """Code of a folder that is sent: bytes by the folder that holds them, "." for those at the top."""

    folder: Path
    files: int
    bytes_by_folder: Counter[str]

    @property
    def bytes(self) -> int:
        """Size of the package, which Ray does not compress."""
        return self.bytes_by_folder.total()

    def text(self) -> str:
        """Number of files, size, and the largest folders."""
        largest = self.bytes_by_folder.most_common(NAMED)
        parts = ", ".join(f"{name} {_mib(size)}" for name, size in largest)
        return f"{self.files} files, {_mib(self.bytes)} ({parts})"


def read_runtime_env(path: str | Path) -> dict[str, Any]:
    """The content of a runtime environment's file; what it leaves empty is left out.

    Raises: ConfigError when it cannot be read, or Ray would not take its excludes or variables.
    """
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"the runtime environment {path} cannot be read: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"the runtime environment {path} is not a mapping.")
    found = {name: value for name, value in content.items() if value is not None}
    excludes, variables = found.get("excludes", []), found.get("env_vars", {})
    if not isinstance(excludes, list) or not all(isinstance(pattern, str) for pattern in excludes):
        raise ConfigError(f"`excludes` of the runtime environment {path} is to be a list of patterns.")
    if not isinstance(variables, Mapping) or not all(
        isinstance(text, str) for pair in variables.items() for text in pair
    ):
        raise ConfigError(
            f"`env_vars` of the runtime environment {path} is to be a mapping of names to texts; numbers need quotes."
        )
    return found


def excludes_of(runtime_env: str | Path) -> list[str]:
    """The patterns that a runtime environment's file excludes, as in a .gitignore. Raises: see `read_runtime_env`."""
    return list(read_runtime_env(runtime_env).get("excludes", []))


def measure(folder: str | Path, excludes: Iterable[str] = ()) -> ShippedCode:
    """Finds what Ray would send of a folder, by Ray's own walk through it.

    Args:
        folder: the working directory of a submission.
        excludes: patterns in addition to Ray's own and those of .gitignore and .rayignore files.
    """
    root = Path(folder).absolute()
    sizes: Counter[str] = Counter()
    files = 0

    def count(path: Path) -> None:
        nonlocal files
        if path.is_file():
            files += 1
            sizes[_place(path.relative_to(root))] += path.stat().st_size

    patterns = [*get_runtime_env_default_excludes(), *excludes]
    quiet = logging.getLogger(__name__)  # Ray's own would announce each .gitignore file
    _dir_travel(root, [_get_excludes(root, patterns)], count, include_gitignore=True, logger=quiet)
    return ShippedCode(root, files, sizes)


def check_shipped_code(folder: str | Path, excludes: Iterable[str] = (), limit: int = LIMIT) -> ShippedCode:
    """Measures what would be sent, before anything is.

    Args:
        folder: the working directory of a submission.
        excludes: see `measure`.
        limit: most bytes that the cluster accepts.

    Raises: ShippedCodeError naming the largest folders and the fix.
    """
    code = measure(folder, excludes)
    if code.bytes >= limit:
        raise ShippedCodeError(
            f"{code.folder} is too large to send: {code.text()}, and Ray's limit is {_mib(limit)}. Name what no job "
            f"needs under `excludes` in {RUNTIME_ENV} or in a .rayignore file, or set DEFI_HOME outside of the folder."
        )
    return code


def _place(path: Path) -> str:
    """The folder that a file counts for: two levels at most, so that a message names what can be excluded."""
    return "/".join(path.parts[:-1][:2]) or "."


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what a submission of a folder would send. Returns: 0. Raises: ShippedCodeError for too much."""
    parser = argparse.ArgumentParser(
        description="Show what a submission of a checkout would send to a cluster."
    )
    parser.add_argument("folder", nargs="?", default=".")
    folder = Path(parser.parse_args(argv).folder)
    runtime_env = folder / RUNTIME_ENV
    print(check_shipped_code(folder, excludes_of(runtime_env) if runtime_env.is_file() else ()).text())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
