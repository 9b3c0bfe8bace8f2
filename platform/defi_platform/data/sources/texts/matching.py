"""An index from names in tables to videos: an exact name counts first, and what fits several videos fits none."""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from defi_platform.data.sources.file_index import FileIndex

EXACT, STEM, END, END_STEM, SHORTER, NUMBER = range(6)
"""How a name fits: the whole path, without its suffix, its last parts, those without suffix, a path whose last parts
are the video's, a number that only differs in leading zeros."""

MOST_PARTS = 8
"""Folders of a path that are looked at."""


@dataclass(frozen=True, slots=True)
class Match:
    """A video that a name fits, or several."""

    videos: tuple[str, ...]
    """One, or the first two of several."""
    rank: int
    """How it fits, from `EXACT` on; lower is better."""


class VideoNames:
    """An index from the names that tables use to videos, on local disk.

    Args:
        videos: paths below the root of a corpus.
    """

    def __init__(self, videos: Iterable[str]) -> None:
        self._exact, self._others = FileIndex(values=1), FileIndex(values=1)
        for video in videos:
            self._exact.add(_normal(video), video)

    def find(self, names: Sequence[str], folder: str = "") -> Match | None:
        """Finds the video that some of `names` fit.

        Args:
            names: the likeliest first; paths may be absolute.
            folder: of the table, below the root of the corpus; its names may be relative to that.

        Returns: the first that fits one video, else the first that fits several; None where none fits.
        """
        several = None
        for name in names:
            match = self._find(_normal(name), folder)
            if match is not None and len(match.videos) == 1:
                return match
            several = several or match
        return several

    def _find(self, name: str, folder: str) -> Match | None:
        if not name:
            return None
        if folder:
            for rank in (EXACT, STEM):
                if found := self._videos(rank, f"{_normal(folder)}/{name}"):
                    return Match(found, rank)
        for rank in (EXACT, STEM, END, END_STEM):
            if found := self._videos(rank, name):
                return Match(found, rank)
        for shorter in _ends(name):
            for rank in (EXACT, STEM):
                if found := self._videos(rank, shorter):
                    return Match(found, SHORTER)
        if name.isascii() and name.isdigit() and (found := self._videos(NUMBER, str(int(name[:4000])))):
            return Match(found, NUMBER)
        return None

    def _videos(self, rank: int, key: str) -> tuple[str, ...]:
        if rank == EXACT:
            found = self._exact.find_all(key, 2)
        else:
            if not len(self._others):
                # About ten keys per video, which a table of whole paths never asks for.
                for path, video in self._exact:
                    for other in set(_other_keys(path)):
                        self._others.add(other, video)
            found = self._others.find_all(f"{rank}{key}", 2)
        return tuple(str(row[2]) for row in found)


def _other_keys(path: str) -> Iterator[str]:
    """Keys under which a video is found by less than its whole path: the rank of the fit, then the name."""
    yield f"{STEM}{posixpath.splitext(path)[0]}"
    for end in _ends(path):
        yield f"{END}{end}"
        yield f"{END_STEM}{posixpath.splitext(end)[0]}"
    stem = posixpath.splitext(posixpath.basename(path))[0]
    if stem.isascii() and stem.isdigit() and len(stem) < 4000:
        yield f"{NUMBER}{int(stem)}"


def _ends(path: str) -> Iterator[str]:
    """The path without its first folder, without its first two, ..."""
    parts = path.split("/")
    for start in range(max(1, len(parts) - MOST_PARTS), len(parts)):
        yield "/".join(parts[start:])


def _normal(name: str) -> str:
    """A path as tables of different machines would write it: forward slashes, no dots, composed letters."""
    name = unicodedata.normalize("NFC", name.strip()).replace("\\", "/")
    return "/".join(part for part in name.split("/") if part not in ("", "."))
