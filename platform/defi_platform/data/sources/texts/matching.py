"""An index from names in tables to videos: an exact name counts first, and what fits several videos fits none."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from posixpath import splitext

from defi_platform.data.sources.file_index import FileIndex, Key

EXACT, STEM, END, END_STEM, SHORTER, NUMBER = range(6)
"""How a name fits: the whole path, without its suffix, its last parts, those without suffix, a path whose last parts
are the video's, a number that only differs in leading zeros."""

MOST_PARTS = 8
"""Folders of a path that are looked at."""

NORMAL = re.compile(r"(?:\w[\w .-]*/)*\w(?:[\w .-]*[\w.-])?", re.ASCII).fullmatch
"""Fits most paths that are normal: a shorter way for millions of them."""


@dataclass(frozen=True, slots=True)
class Match:
    """A video that a name fits, or several."""

    videos: tuple[tuple[int, str], ...]
    """Number among the files, and name: of one, or of two of several."""
    rank: int
    """How it fits, from `EXACT` on; lower is better."""


class VideoNames:
    """Finds the videos that tables mean by their names.

    Args:
        files: an index of names with `video_keys`.
    """

    def __init__(self, files: FileIndex) -> None:
        self._files = files

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

    def find_exact(self, names: Sequence[str], folder: str = "") -> list[int | None]:
        """Finds the videos of many rows at once whose likeliest name is the whole path of one video, as most are.

        Args:
            names: the likeliest of each row.
            folder: see `find`.

        Returns: the number of each video, which `find` would find too; None where that has to be asked.
        """
        below = f"{_normal(folder)}/" if folder else ""
        return self._files.find_only(RANK_KEYS[EXACT], [f"{below}{_normal(name)}" for name in names])

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

    def _videos(self, rank: int, name: str) -> tuple[tuple[int, str], ...]:
        if rank not in (END, END_STEM):
            value = _reversed(name) if rank == STEM else name
            return tuple(self._files.find_by(RANK_KEYS[rank], value, 2))
        if name.count("/") >= MOST_PARTS:
            return ()
        stem = splitext(name)[0]
        if rank == END and not self._files.find_below(RANK_KEYS[END_STEM], _reversed(stem), 1):
            return ()  # nor is the index by ends needed
        return tuple(self._files.find_below(RANK_KEYS[rank], _reversed(name), 2))


RANK_KEYS = {
    EXACT: "path",
    STEM: "reversed_stem",
    END: "reversed_path",
    END_STEM: "reversed_stem",
    NUMBER: "number",
}


def video_keys(is_video: Callable[[str], bool]) -> dict[str, Key]:
    """Keys by which `VideoNames` finds videos in an index of files.

    The last parts of a path are the first of the path that is written backwards.

    Args:
        is_video: by the name of a file.
    """

    def of_videos(key: Key) -> Key:
        return lambda name: key(_normal(name)) if is_video(name) else None

    return {
        "path": of_videos(str),
        "reversed_path": of_videos(_reversed),
        "reversed_stem": of_videos(lambda path: _reversed(splitext(path)[0])),
        "number": of_videos(_number),
    }


def _reversed(path: str) -> str:
    return path[::-1]


def _number(path: str) -> str | None:
    stem = splitext(posixpath.basename(path))[0]
    return str(int(stem)) if stem.isascii() and stem.isdigit() and len(stem) < 4000 else None


def _ends(path: str) -> Iterator[str]:
    """The path without its first folder, without its first two, ..."""
    parts = path.split("/")
    for start in range(max(1, len(parts) - MOST_PARTS), len(parts)):
        yield "/".join(parts[start:])


def _normal(name: str) -> str:
    """A path as tables of different machines would write it: forward slashes, no dots, composed letters."""
    if NORMAL(name):
        return name
    name = unicodedata.normalize("NFC", name.strip()).replace("\\", "/")
    return "/".join(part for part in name.split("/") if part not in ("", "."))
