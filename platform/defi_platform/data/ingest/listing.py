"""What a corpus says it has, of any size: claims and refusals as they are listed, kept on disk."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from defi_platform.data.sources.records import RejectedRecord, VideoRecord
from defi_platform.data.tables.arrow_spill import ROWS_AT_ONCE, Spool

CLAIMS = pa.schema(
    [
        ("video_id", pa.string()),
        ("uri", pa.string()),
        ("text", pa.string()),
        ("camera", pa.string()),
        ("episode_id", pa.string()),
        ("bytes", pa.int64()),
        ("version", pa.string()),
        ("first_frame", pa.int64()),
        ("num_frames", pa.int64()),
        ("min_frames", pa.int64()),
        ("fps", pa.float64()),
        ("num_actions", pa.int64()),
        ("signals_uri", pa.string()),
        ("split", pa.string()),
    ]
)
"""The fields of `VideoRecord`."""

REFUSED = pa.schema([(field.name, pa.string()) for field in dataclasses.fields(RejectedRecord)])


class Listed:
    """What one corpus has listed so far."""

    def __init__(self) -> None:
        self.claims = Spool(CLAIMS)
        self._refused = Spool(REFUSED)
        self._waiting: list[VideoRecord] = []
        self._waiting_refused: list[RejectedRecord] = []
        self._sum = 0

    def add(self, item: VideoRecord | RejectedRecord) -> None:
        """Takes one item of a listing."""
        self._sum += int.from_bytes(hashlib.sha256(repr(item).encode()).digest()[:16], "big")
        if isinstance(item, VideoRecord):
            self._waiting.append(item)
            if len(self._waiting) >= ROWS_AT_ONCE:
                self._put_claims()
        else:
            self._waiting_refused.append(item)
            if len(self._waiting_refused) >= ROWS_AT_ONCE:
                self._put_refused()

    def close(self) -> None:
        """The listing has reached its end."""
        self._put_claims()
        self._put_refused()

    def __len__(self) -> int:
        return len(self.claims) + len(self._refused)

    def fingerprint(self) -> str:
        """Of what is listed, in whatever order: a sum of hashes, since millions of texts need not be sorted."""
        return f"{self._sum % (1 << 128):032x}"

    def refused(self) -> Iterator[list[RejectedRecord]]:
        """Refusals as they came, some at a time."""
        for batch in self._refused.batches():
            yield [RejectedRecord(**row) for row in batch.to_pylist()]

    def _put_claims(self) -> None:
        try:
            table = _columns(self._waiting, CLAIMS)
        except (UnicodeEncodeError, OverflowError, pa.ArrowInvalid):
            table = _columns([claim for claim in self._waiting if not self._refuse(claim)], CLAIMS)
        self.claims.append(table)
        self._waiting = []

    def _refuse(self, claim: VideoRecord) -> bool:
        """Refuses a claim that no table can hold: a file name that is no text, a count beyond all numbers."""
        try:
            _columns([claim], CLAIMS)
        except (UnicodeEncodeError, OverflowError, pa.ArrowInvalid) as error:
            problem = f"{type(error).__name__}: {error}"
            self._waiting_refused.append(
                RejectedRecord(
                    video_id=claim.video_id,
                    uri=claim.uri,
                    reason="bad_source",
                    message=problem,
                    version=claim.version,
                )
            )
            return True
        return False

    def _put_refused(self) -> None:
        # Names that are no text are written as Python would print them.
        rows = [
            {
                name: value.encode("utf-8", "backslashreplace").decode()
                for name, value in dataclasses.asdict(item).items()
            }
            for item in self._waiting_refused
        ]
        self._refused.append(pa.Table.from_pylist(rows, schema=REFUSED))
        self._waiting_refused = []


def claims_of(table: pa.Table) -> list[VideoRecord]:
    """Rows of `CLAIMS` as claims."""
    return [VideoRecord(**row) for row in table.to_pylist()]


def _columns(items: Sequence[Any], schema: pa.Schema) -> pa.Table:
    return pa.table({name: [getattr(item, name) for item in items] for name in schema.names}, schema=schema)
