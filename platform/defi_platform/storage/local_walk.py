"""Walking a local folder: links are followed, but none in circles."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A name in a folder behind which there is no file: a link to nowhere, to itself, or back into its own folder."""

    name: str
    """Path below the folder of the walk, with forward slashes."""
    uri: str
    is_circle: bool
    """False: it leads nowhere."""
    message: str


@dataclass
class LocalWalk:
    """One walk of a folder, names sorted within each sub-folder; those that start with a dot are skipped.

    Args:
        root: of the walk.
    """

    root: Path
    unreadable: list[Unreadable] = field(default_factory=list)
    """Found so far."""
    _linked: set[tuple[int, int]] = field(default_factory=set)
    """Folders that were entered by a link inside of a linked folder."""

    def files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yields (path below the root with forward slashes, status) of every file. Raises: OSError."""
        status = os.stat(self.root)
        yield from self._below(self.root, "", ((status.st_dev, status.st_ino),), links=0)

    def _below(
        self, folder: Path, prefix: str, above: tuple[tuple[int, int], ...], links: int
    ) -> Iterator[tuple[str, os.stat_result]]:
        found = sorted(os.listdir(folder), reverse=True)
        # Names alone, forgotten as they are passed on: what `scandir` keeps of a million files is a gigabyte.
        while found:
            base = found.pop()
            if base.startswith("."):
                continue
            name, path = f"{prefix}{base}", folder / base
            try:
                status = os.stat(path)
            except FileNotFoundError:
                if path.is_symlink():  # else it is gone since
                    self._note(name, path, False, f"a link to {os.readlink(path)}, which is not there")
                continue
            except OSError as error:
                if not path.is_symlink():
                    raise
                self._note(name, path, True, f"a link that leads nowhere: {error.strerror}")
                continue
            if stat.S_ISREG(status.st_mode):
                yield name, status
            elif stat.S_ISDIR(status.st_mode):
                here, is_link = (status.st_dev, status.st_ino), path.is_symlink()
                # Links inside of linked folders could multiply without end, so each leads into a folder once.
                if here in above or (is_link and links and here in self._linked):
                    self._note(
                        name, path, True, f"a link to {os.path.realpath(path)}, which was walked already"
                    )
                    continue
                if is_link and links:
                    self._linked.add(here)
                yield from self._below(path, f"{name}/", (*above, here), links + is_link)

    def _note(self, name: str, path: Path, is_circle: bool, message: str) -> None:
        self.unreadable.append(Unreadable(name, str(path), is_circle, message))
