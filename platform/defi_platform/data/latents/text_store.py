"""Features of texts on disk, as a frozen text encoder gives them: each text of the corpora is encoded once for all runs.

    <folder>/<fingerprint>/encoder.json            which encoder, for people
    <folder>/<fingerprint>/shards/<name>.bin       tensors of some texts, one after the other; mapped, not read
    <folder>/<fingerprint>/shards/<name>.parquet   which bytes are whose, and their checksums; written last

A shard counts once both of its files are there; what is in a damaged one is an error, never a feature.

A text that several shards hold is read from the oldest one, so that a run goes on with the features it began with.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import time
import uuid
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from defi_models.pretrained.configuration import to_mapping
from defi_platform import storage
from defi_platform.storage import StorageError
from defi_platform.storage.parallel_read import side_by_side

if TYPE_CHECKING:
    from torch import Tensor, nn

    from defi_models.encoders.text_cache import Entry

ENCODER, SHARDS = "encoder.json", "shards"
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("first", pa.int64()),
        ("dtypes", pa.list_(pa.string())),
        ("shapes", pa.list_(pa.list_(pa.int32()))),
        ("checksum", pa.uint32()),
    ]
)
"""`key`: see `_key`; `first`: offset of the text's first tensor in the shard, in bytes;
`checksum`: CRC-32 of its tensors' bytes."""

LEFTOVER_S = 24 * 3600.0
"""Age from which a file without its other half is of a writer that was killed."""
_WRITTEN = re.compile(r"\.?(\d{20})-")
"""The beginning of a name: nanoseconds since 1970. A file that is not whole yet has a dot before it."""
BLOCK_BYTES = 1 << 16
"""Bytes of a range that is read from another store: a text or two of CLIP."""


class TextStore:
    """Features of texts that one encoder, in one precision, gave before; satisfies `encoders.text_cache.TextStore`.

    Args:
        folder: shared by all encoders.
        encoder: frozen text encoder, on any device, its weights in the precision in which they are stored.
        dtype: precision in which it encodes.
    """

    def __init__(self, folder: str, encoder: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.fingerprint = _fingerprint(encoder, dtype)
        self.folder = storage.join(folder, self.fingerprint)
        self._describes = f"{type(encoder).__name__} in {str(dtype).removeprefix('torch.')}"
        self._files: dict[int, Any] = {}
        self.refresh()

    def refresh(self) -> None:
        """Takes in what was written since, by this process and by others.

        Raises: StorageError when the store cannot be read, or a shard's table is damaged.
        """
        folder = storage.join(self.folder, SHARDS)
        there = set(storage.names(folder))
        stems = sorted(name.removesuffix(".parquet") for name in there if name.endswith(".parquet"))
        self._shards = [storage.join(folder, f"{stem}.bin") for stem in stems if f"{stem}.bin" in there]
        paths = [_table_of(shard) for shard in self._shards]
        tables = [INDEX_SCHEMA.empty_table()]
        counts = []
        for path, content in side_by_side(storage.read_bytes, paths, storage.is_remote(folder)):
            try:
                tables.append(pq.read_table(io.BytesIO(content), schema=INDEX_SCHEMA))
            except (pa.ArrowException, OSError) as error:
                raise _damaged(path, str(error)) from error
            counts.append(len(tables[-1]))
        self._files.clear()
        self._index = pa.concat_tables(tables).combine_chunks()
        self._shard_of = np.repeat(np.arange(len(counts)), counts)
        keys = np.frombuffer(b"".join(self._index["key"].to_pylist()), np.uint64)[::2]
        # Of several rows of one text the first: shards are named after the time at which they were written.
        self._keys, self._rows = np.unique(keys, return_index=True)

    def __len__(self) -> int:
        """Number of texts' features, each kind counted."""
        return len(self._keys)

    def missing(self, kind: str, texts: Sequence[str]) -> list[str]:
        """Those of `texts` that are not stored, in their order."""
        rows = self._find(kind, texts)
        return [text for text, row in zip(texts, rows, strict=True) if row is None]

    def read(self, kind: str, texts: Sequence[str]) -> list[Entry | None]:
        """Features of each text on the CPU, None where they are not stored.

        Raises: StorageError when the store cannot be read, or what it holds of a text is damaged.
        """
        rows = self._find(kind, texts)
        found: list[Entry | None] = [None] * len(texts)
        by_shard: dict[int, list[int]] = {}
        for position, row in enumerate(rows):
            if row is not None:
                by_shard.setdefault(int(self._shard_of[row]), []).append(position)

        def of_shard(shard: int) -> list[Entry]:
            # Each shard's file is read by one thread at a time.
            return [
                self._entry(shard, row) for row in (rows[at] for at in by_shard[shard]) if row is not None
            ]

        for shard, entries in side_by_side(of_shard, by_shard, storage.is_remote(self.folder)):
            for position, entry in zip(by_shard[shard], entries, strict=True):
                found[position] = entry
        return found

    def write(self, kind: str, texts: Sequence[str], entries: Sequence[Entry]) -> None:
        """Adds a shard; it is read from the next `refresh` on.

        Args:
            kind: states | goal.
            texts: at least one.
            entries: features of each, on any device.
        """
        path = storage.join(self.folder, ENCODER)
        if not storage.exists(path):
            text = json.dumps({"encoder": self._describes, "fingerprint": self.fingerprint}, indent=1)
            storage.write_text(path, text)
        content, rows = io.BytesIO(), []
        for text, entry in zip(texts, entries, strict=True):
            parts = [part.detach().cpu().contiguous() for part in entry]
            first, checksum = content.tell(), 0
            for part in parts:
                data = part.flatten().view(torch.uint8).numpy().data
                content.write(data)
                checksum = zlib.crc32(data, checksum)
            rows.append(
                {
                    "key": _key(kind, text),
                    "first": first,
                    "dtypes": [str(part.dtype).removeprefix("torch.") for part in parts],
                    "shapes": [list(part.shape) for part in parts],
                    "checksum": checksum,
                }
            )
        name = storage.join(self.folder, SHARDS, f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}")
        storage.write_bytes(f"{name}.bin", content.getbuffer())
        index = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), index, compression="zstd")
        storage.write_bytes(f"{name}.parquet", index.getbuffer())

    def remove_leftovers(self) -> None:
        """Deletes what killed writers left a day ago or earlier."""
        folder = storage.join(self.folder, SHARDS)
        there = set(storage.names(folder))
        whole = {name.rpartition(".")[0] for name in there if name.endswith(".parquet")}
        whole &= {name.rpartition(".")[0] for name in there if name.endswith(".bin")}
        latest = time.time() - LEFTOVER_S
        for name in there:
            written = _WRITTEN.match(name)
            if written and name.rpartition(".")[0] not in whole and int(written[1]) / 1e9 < latest:
                storage.delete(storage.join(folder, name))

    def _find(self, kind: str, texts: Sequence[str]) -> list[int | None]:
        """Row of the index for each text."""
        keys = [_key(kind, text) for text in texts]
        if not len(self._keys):
            return [None] * len(keys)
        places = np.searchsorted(self._keys, np.frombuffer(b"".join(keys), np.uint64)[::2])
        rows = self._rows[np.minimum(places, len(self._rows) - 1)]
        there = self._index["key"].take(pa.array(rows)).to_pylist()
        return [
            row if other == key else None for key, other, row in zip(keys, there, rows.tolist(), strict=True)
        ]

    def _entry(self, shard: int, row: int) -> Entry:
        first = self._index["first"][row].as_py()
        dtypes = [getattr(torch, name) for name in self._index["dtypes"][row].as_py()]
        shapes: list[list[int]] = self._index["shapes"][row].as_py()
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        content = self._bytes(shard, first, first + sum(sizes))
        if zlib.crc32(content) != self._index["checksum"][row].as_py():
            raise _damaged(
                self._shards[shard], f"bytes {first} to {first + sum(sizes)} are not as they were written"
            )
        parts: list[Tensor] = []
        start = 0
        for dtype, shape, size in zip(dtypes, shapes, sizes, strict=True):
            parts.append(torch.frombuffer(content[start : start + size], dtype=dtype).reshape(shape))
            start += size
        return tuple(parts)

    def _bytes(self, shard: int, first: int, stop: int) -> bytearray:
        path = self._shards[shard]
        if not storage.is_remote(path):
            if shard not in self._files:
                try:
                    self._files[shard] = np.memmap(storage.local_path(path), np.uint8, mode="r")
                except (FileNotFoundError, ValueError) as error:  # a ValueError for an empty one
                    raise _damaged(path, str(error)) from error
            return bytearray(self._files[shard][first:stop])
        if shard not in self._files:
            try:
                self._files[shard] = storage.open_seekable(path, BLOCK_BYTES)
            except FileNotFoundError as error:
                raise _damaged(path, "it is gone") from error
        self._files[shard].seek(first)
        return bytearray(self._files[shard].read(stop - first))


def _table_of(shard: str) -> str:
    return shard.removesuffix(".bin") + ".parquet"


def _damaged(path: str, why: str) -> StorageError:
    shard = path.removesuffix(".bin").removesuffix(".parquet")
    return StorageError(
        f"stored text features (data.text_cache) are damaged: {path}: {why}. Delete {shard}.bin and {shard}.parquet: "
        "the next start encodes their texts again."
    )


def _key(kind: str, text: str) -> bytes:
    return hashlib.blake2b(f"{kind}\0{text}".encode(), digest_size=16).digest()


def _fingerprint(encoder: Any, dtype: torch.dtype) -> str:
    """Of all that decides the features: class, configuration, tokenizer, weights and precision."""
    settings = [type(encoder).__name__, to_mapping(encoder.config), str(dtype)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(_tokenizer(getattr(encoder, "tokenizer", None)).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _tokenizer(tokenizer: Any) -> str:
    """Everything that a tokenizer does, but not how the last call cut and padded."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(tokenizer.get_vocab(), sort_keys=True)
    content = json.loads(backend.to_str())
    return json.dumps(
        {k: v for k, v in content.items() if k not in ("truncation", "padding")}, sort_keys=True
    )
