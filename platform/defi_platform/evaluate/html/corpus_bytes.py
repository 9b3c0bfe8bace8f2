"""Size of a corpus: bytes that several videos share count once."""

from __future__ import annotations

from collections.abc import Sequence

from defi_platform.data.sources.uri import parse


def bytes_once(uris: Sequence[str], sizes: Sequence[int]) -> int:
    """Bytes of the files, archive members, records and frames that videos lie in, each counted once.

    Args:
        uris: of the videos, as the manifest has them.
        sizes: bytes of what each URI lies in.
    """
    parts: dict[tuple[str, ...], int] = {}
    runs: dict[str, list[tuple[int, int, int]]] = {}
    for uri, size in zip(uris, sizes, strict=True):
        where = parse(uri)
        if where.kind == "calvin":
            runs.setdefault(where.path, []).append((*where.span, size))
            continue
        # Episodes of one mp4, windows of a video, and cameras of one record or HDF5 file share its bytes.
        span = where.where[:2] if where.kind in ("range", "rlds") else ()
        parts[(where.path, *span)] = size
    return sum(parts.values()) + sum(_frames(found) for found in runs.values())


def _frames(runs: list[tuple[int, int, int]]) -> int:
    """Bytes of runs (first frame, last frame, bytes) of one folder, which may overlap; frames are about equal in size."""
    total, end = 0.0, -1
    for first, last, size in sorted(runs):
        new = max(0, last - max(end, first - 1))
        total += size * new / (last - first + 1)
        end = max(end, last)
    return round(total)
