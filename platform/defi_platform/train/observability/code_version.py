"""Version of the code that a run was made by."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import defi_client
import defi_models
import defi_platform


def code_version() -> dict[str, Any]:
    """Version of this code.

    Returns: `version` of the package; `source`, the digest of all packages' code, which is known also where
        `ray job submit` does not bring .git along; `commit` and `changed` (uncommitted edits), None outside of a checkout.
    """
    packages = [Path(package.__path__[0]).resolve() for package in (defi_platform, defi_models, defi_client)]
    root = packages[0].parents[1]
    found: dict[str, Any] = {
        "version": defi_platform.__version__,
        "source": source_digest(packages),
        "commit": None,
        "changed": None,
    }
    if not (root / ".git").exists():
        return found
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return found | {"commit": commit, "changed": bool(_git(root, "status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        # No git here, or a checkout of another user: the version and the digest have to do.
        return found


def source_digest(packages: Iterable[Path]) -> str:
    """SHA-256 of the Python files of packages, by their names and bytes; the same wherever the packages lie."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            content = path.read_bytes()
            name = path.relative_to(package.parent).as_posix()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def installed_version(package: str) -> str | None:
    """Version of an installed package, else None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
