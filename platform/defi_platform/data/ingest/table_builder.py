"""The manifest and quarantine tables of one corpus, put together chunk by chunk on disk: in memory they are only once
they are in order, as columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from defi_platform.data.ingest.manifest_rows import Rows
from defi_platform.data.ingest.near_duplicates import BITS, WORDS, near_duplicates
from defi_platform.data.manifest.quarantine import QUARANTINE_SCHEMA
from defi_platform.data.manifest.split import TRAIN, VALIDATION, held_out, place
from defi_platform.data.manifest.table import NAMES, SCHEMA
from defi_platform.data.tables.arrow_spill import Spool
from defi_platform.data.tables.mmap_table import to_numpy

FEW = [field.name for field in SCHEMA if field.type == NAMES]
"""Columns of few texts, which are kept by number."""

KEPT = pa.schema([field.with_type(NAMES.index_type) if field.name in FEW else field for field in SCHEMA])


class CorpusTables:
    """Collects the rows of a corpus."""

    def __init__(self) -> None:
        self._videos = Spool(KEPT)
        self._rejected = Spool(QUARANTINE_SCHEMA)
        self._names: dict[str, dict[str, int]] = {column: {} for column in FEW}
        self._signatures: list[np.ndarray] = []
        self._places: list[np.ndarray] = []

    def add(self, rows: Rows) -> None:
        """Takes some rows, which the caller can forget then."""
        for row in rows.videos:
            for column, numbers in self._names.items():
                row[column] = numbers.setdefault(row[column], len(numbers))
        self._videos.append(pa.Table.from_pylist(rows.videos, schema=KEPT))
        self.reject(rows.rejected)
        places = [place(row["episode_id"] or row["video_id"]) for row in rows.videos]
        self._places.append(np.array(places, np.uint64))
        if any(rows.signatures):
            self._signatures.append(np.array(rows.signatures, np.uint64).reshape(-1, WORDS))

    def reject(self, rows: list[dict[str, Any]]) -> None:
        """Takes rows of the quarantine."""
        self._rejected.append(pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA))

    def finished(self, holdout: float, duplicate_bits: int | None) -> tuple[pa.Table, pa.Table]:
        """(manifest, quarantine), in order of the ids, near-duplicates sorted out, every video with its split."""
        kept = np.ones(len(self._videos), bool)
        if duplicate_bits is not None and len(self._videos):
            kept[self._duplicates(duplicate_bits)] = False
        places = np.concatenate([np.empty(0, np.uint64), *self._places])
        held = np.zeros(len(kept), bool)
        held[kept] = held_out(places[kept], holdout)
        order = _by_id(self._videos)
        order = order[kept[order]]
        columns = [self._column(field, order, held) for field in SCHEMA]
        rejected = self._rejected.in_order(_by_id(self._rejected))
        return (
            pa.table(
                columns, schema=pa.schema([f.with_type(c.type) for f, c in zip(SCHEMA, columns, strict=True)])
            ),
            pa.concat_tables([QUARANTINE_SCHEMA.empty_table(), *rejected]),
        )

    def _column(self, field: pa.Field, order: np.ndarray, held: np.ndarray) -> pa.Array:
        """One column of the manifest, laid out as `mapped_table.mappable` would."""
        # 64 bits for the places of texts: one chunk holds any corpus.
        kind = pa.large_string() if field.type == pa.string() else KEPT.field(field.name).type
        found = self._videos.in_order(order, field.name)
        chunks = [c for table in found for c in table.column(field.name).cast(kind).chunks]
        values = pa.chunked_array(chunks, kind).combine_chunks()
        if field.name == "split":
            return self._splits(to_numpy(values), held[order])
        if field.name in FEW:
            return pa.DictionaryArray.from_arrays(values, pa.array(self._names[field.name], pa.string()))
        return values

    def _splits(self, fixed: np.ndarray, held: np.ndarray) -> pa.DictionaryArray:
        """What a source fixes by design stays; elsewhere the hash of the episode decides."""
        names = self._names["split"]
        number = {name: names.setdefault(name, len(names)) for name in ("", TRAIN, VALIDATION)}
        drawn = np.where(held, number[VALIDATION], number[TRAIN]).astype(fixed.dtype)
        codes = np.where(fixed == number[""], drawn, fixed)
        # Numbered by their first use, as Arrow numbers texts.
        present = [code for code in names.values() if (codes == code).any()]
        used = sorted(present, key=lambda code: int(np.argmax(codes == code)))
        rank = np.zeros(len(names), fixed.dtype)
        rank[used] = np.arange(len(used))
        texts = list(names)
        return pa.DictionaryArray.from_arrays(
            pa.array(rank[codes]), pa.array([texts[code] for code in used], pa.string())
        )

    def _duplicates(self, most_bits: int) -> list[int]:
        """Rows that repeat an earlier one; each is rejected."""
        repeats = near_duplicates(np.concatenate(self._signatures), most_bits)
        columns = ("corpus", "video_id", "uri", "version")
        late = self._videos.take(np.array(list(repeats), np.int64), *columns).to_pylist()
        early = self._videos.take(np.array([row for row, _ in repeats.values()], np.int64), "video_id")
        names = list(self._names["corpus"])
        self.reject(
            [
                video
                | {
                    "corpus": names[video["corpus"]],
                    "reason": "duplicate",
                    "message": f"{bits} of {BITS} bits from {same}, filters.duplicate_bits={most_bits}",
                    "stage": "ingest",
                    "attempts": 1,
                    "decoder": "",
                }
                for video, same, (_, bits) in zip(
                    late, early.column("video_id").to_pylist(), repeats.values(), strict=True
                )
            ]
        )
        return list(repeats)


def _by_id(rows: Spool) -> np.ndarray:
    return to_numpy(pc.sort_indices(rows.column("video_id"))).astype(np.int64)
