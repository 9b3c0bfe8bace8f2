"""The manifest and quarantine tables of one corpus, put together chunk by chunk: as Python rows millions of videos
would take ten times the memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from defi_platform.data.claimed_rows import Rows
from defi_platform.data.duplicates import BITS, WORDS, near_duplicates
from defi_platform.data.manifest import SCHEMA
from defi_platform.data.quarantine import QUARANTINE_SCHEMA
from defi_platform.data.split import assign


class CorpusTables:
    """Collects the rows of a corpus."""

    def __init__(self) -> None:
        self._videos: list[pa.Table] = [SCHEMA.empty_table()]
        self._rejected: list[pa.Table] = [QUARANTINE_SCHEMA.empty_table()]
        self._signatures: list[np.ndarray] = []

    def add(self, rows: Rows) -> None:
        """Takes some rows, which the caller can forget then."""
        self._videos.append(pa.Table.from_pylist(rows.videos, schema=SCHEMA))
        self._reject(rows.rejected)
        if any(rows.signatures):
            self._signatures.append(np.array(rows.signatures, np.uint64).reshape(-1, WORDS))

    def finished(self, holdout: float, duplicate_bits: int | None) -> tuple[pa.Table, pa.Table]:
        """(manifest, quarantine), in order of the ids, near-duplicates sorted out, every video with its split."""
        # Dictionaries of the chunks differ; one for all is what the columns are joined by.
        videos = pa.concat_tables(self._videos).unify_dictionaries().combine_chunks()
        if duplicate_bits is not None and videos.num_rows:
            videos = self._without_duplicates(videos, duplicate_bits)
        videos = _by_id(videos)
        splits = pc.coalesce(
            _or_null(videos.column("split").cast(pa.string())),
            pa.array(_splits(videos, holdout), pa.string()),
        )
        place = SCHEMA.get_field_index("split")
        videos = videos.set_column(place, SCHEMA.field(place), splits.cast(SCHEMA.field(place).type))
        return videos, _by_id(pa.concat_tables(self._rejected))

    def _reject(self, rows: list[dict[str, Any]]) -> None:
        self._rejected.append(pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA))

    def _without_duplicates(self, videos: pa.Table, most_bits: int) -> pa.Table:
        repeats = near_duplicates(np.concatenate(self._signatures), most_bits)
        rejected = []
        for late, (early, bits) in repeats.items():
            video = videos.slice(late, 1).select(["corpus", "video_id", "uri", "version"]).to_pylist()[0]
            same = videos.column("video_id")[early].as_py()
            rejected.append(
                video
                | {
                    "reason": "duplicate",
                    "message": f"{bits} of {BITS} bits from {same}, filters.duplicate_bits={most_bits}",
                    "stage": "ingest",
                    "attempts": 1,
                    "decoder": "",
                }
            )
        self._reject(rejected)
        kept = np.ones(videos.num_rows, bool)
        kept[list(repeats)] = False
        return videos.filter(pa.array(kept))


def _by_id(table: pa.Table) -> pa.Table:
    return table.take(pc.sort_indices(table.column("video_id")))


def _or_null(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.equal(texts, ""), None, texts)


def _splits(videos: pa.Table, holdout: float) -> list[str]:
    """By the hash of the episode; of the video itself where it stands alone."""
    keys = pc.coalesce(_or_null(videos.column("episode_id")), videos.column("video_id"))
    return assign(keys.to_pylist(), holdout)
