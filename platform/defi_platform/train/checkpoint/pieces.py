"""Index of a checkpoint: which bytes of which shard are which elements of which parameter, and their SHA-256.

Beside each shard lies `shard_<r>_of_<w>.pieces.json`: key -> [first byte, end, dtype, shape, SHA-256] of every tensor
in the file. So a reader needs neither the shard's header nor bytes that are not its own, and can trust what it reads.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from defi_platform import storage
from defi_platform.errors import CheckpointError
from defi_platform.storage.parallel_read import side_by_side

HEADER_LENGTH = 8
"""Bytes at the start of a safetensors file that hold the length of its header."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files have changed since it was committed; the one before it may be whole."""


class Piece(NamedTuple):
    """One tensor of a shard: consecutive elements of a flattened parameter, or a whole buffer."""

    start: int
    """First element, of the whole parameter."""
    shape: tuple[int, ...]
    dtype: str
    """By its name in safetensors."""
    shard: str
    begin: int
    """First byte in the file; `end` is the one behind the last."""
    end: int
    sha256: str | None
    """None in checkpoints of before, where the whole file has one."""

    @property
    def stop(self) -> int:
        """The element behind the last."""
        return self.start + torch.Size(self.shape).numel()


@dataclass(frozen=True)
class PieceIndex:
    """The pieces of all shards of one checkpoint."""

    uri: str
    pieces: dict[tuple[str, str], list[Piece]]
    """(kind, name) -> pieces by first element; kind is "param", a moment, "ema" or "buffer"."""
    whole_files: dict[str, str]
    """Shard -> SHA-256, of those whose pieces have none."""

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of one kind."""
        return [name for tensor_kind, name in self.pieces if tensor_kind == kind]

    def of(self, kind: str, name: str) -> list[Piece]:
        """The pieces of one tensor. Raises: CheckpointError when there are none."""
        found = self.pieces.get((kind, name))
        if not found:
            raise CheckpointError(f"{self.uri}: holds no '{name}' ({kind}); it is of another model.")
        return found

    def shape(self, kind: str, name: str) -> torch.Size:
        """Shape of a buffer; (elements,) of any other tensor. Raises: CheckpointError."""
        found = self.of(kind, name)
        return torch.Size(found[0].shape if kind == "buffer" else (found[-1].stop,))

    def check(self, kind: str, shapes: dict[str, torch.Size]) -> None:
        """Makes sure that tensors of one kind are there in whole.

        Args:
            kind: of the tensors.
            shapes: name -> shape.

        Raises: CheckpointError for one that is absent or has another number of elements, DamagedCheckpoint for a gap.
        """
        for name, shape in shapes.items():
            end = 0
            for piece in self.of(kind, name):
                if piece.start != end:
                    raise DamagedCheckpoint(f"{self.uri}: '{name}' has a gap at element {end}.")
                end = piece.stop
            if end != shape.numel():
                raise CheckpointError(
                    f"{self.uri}: '{name}' has {end} elements, the model's has {shape.numel()}."
                )


def describe(shard: Path) -> str:
    """Content of the index file of a local shard."""
    pieces = {}
    with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        data = HEADER_LENGTH + int.from_bytes(content[:HEADER_LENGTH], "little")
        for key, entry in _tensors(content[HEADER_LENGTH:data]).items():
            begin, end = (data + offset for offset in entry["data_offsets"])
            with memoryview(content) as view, view[begin:end] as part:
                pieces[key] = [begin, end, entry["dtype"], entry["shape"], hashlib.sha256(part).hexdigest()]
    return json.dumps(pieces)


def read_index(uri: str, markers: list[dict[str, Any]]) -> PieceIndex:
    """Reads the index of a committed checkpoint, all shards at once.

    Args:
        uri: of the checkpoint.
        markers: of its shards.

    Raises: DamagedCheckpoint when a shard is gone, has another length or an index that is not the one that was written.
    """
    pieces: dict[tuple[str, str], list[Piece]] = {}
    whole_files = {}

    def read(marker: dict[str, Any]) -> dict[str, list[Any]]:
        return _entries(uri, marker)

    for marker, entries in side_by_side(read, markers, storage.is_remote(uri)):
        shard = marker["file"]
        if "pieces" not in marker:
            whole_files[shard] = marker["sha256"]
        for key, (begin, end, dtype, shape, sha256) in entries.items():
            kind, start, name = key.split("/", 2)
            piece = Piece(int(start), tuple(shape), dtype, shard, begin, end, sha256)
            pieces.setdefault((kind, name), []).append(piece)
    for found in pieces.values():
        found.sort(key=lambda piece: piece.start)
    return PieceIndex(uri, pieces, whole_files)


def _entries(uri: str, marker: dict[str, Any]) -> dict[str, list[Any]]:
    """The index of one shard, as `describe` makes it; of shards without one, from their header."""
    shard = storage.join(uri, marker["file"])
    try:
        size = storage.entry(shard).bytes
        if size != marker["bytes"]:
            raise DamagedCheckpoint(f"{shard} has {size} bytes, {marker['bytes']} were written.")
        if "pieces" not in marker:
            return _entries_of_header(shard, size)
        index = storage.join(uri, marker["pieces"])
        content = storage.read_bytes(index)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{shard} or its index is gone.") from error
    if hashlib.sha256(content).hexdigest() != marker["pieces_sha256"]:
        raise DamagedCheckpoint(f"{index} is damaged: its SHA-256 is not the one that was written.")
    entries: dict[str, list[Any]] = json.loads(content)
    return entries


def _entries_of_header(shard: str, size: int) -> dict[str, list[Any]]:
    length = bytearray(HEADER_LENGTH)
    try:
        storage.read_into(shard, 0, memoryview(length))
        header = bytearray(min(int.from_bytes(length, "little"), size))
        storage.read_into(shard, HEADER_LENGTH, memoryview(header))
        tensors = _tensors(header)
    except (EOFError, ValueError) as error:
        raise DamagedCheckpoint(f"{shard} is no safetensors file: {error}.") from error
    data = HEADER_LENGTH + len(header)
    return {
        key: [*(data + offset for offset in entry["data_offsets"]), entry["dtype"], entry["shape"], None]
        for key, entry in tensors.items()
    }


def _tensors(header: bytes | bytearray) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads(header)
    entries.pop("__metadata__", None)
    return entries
