"""Reads of a checkpoint: the elements that somebody asks for, each byte once, in parallel, checked before they are given."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from defi_platform import storage
from defi_platform.errors import CheckpointError
from defi_platform.storage.parallel_read import side_by_side
from defi_platform.train.checkpoint.format import Checkpoint
from defi_platform.train.checkpoint.pieces import DamagedCheckpoint, Piece, PieceIndex, read_index
from defi_platform.train.engine.sharded_state import Span

REQUEST_BYTES = 8 << 20
"""Neighbouring pieces are read in one request until it has so many bytes; a larger piece is one request of its own."""
IN_FLIGHT_BYTES = 512 << 20
"""Bytes of the requests that are being read or wait to be taken in, in one process; a larger piece is read alone."""
GAP_BYTES = 256 << 10
"""Bytes between two pieces that are read along: cheaper than another request."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of elements by their names in safetensors; masters and moments are F32, buffers may be others."""


@dataclass
class Request:
    """Consecutive bytes of one shard, and what is wanted of them."""

    shard: str
    begin: int
    end: int
    parts: list[tuple[Piece, list[Span]]] = field(default_factory=list)

    def size(self) -> int:
        """In bytes."""
        return self.end - self.begin


class Reader:
    """The tensors of one committed checkpoint, whatever number of ranks has written it.

    Args:
        checkpoint: committed one.
        index: of it; None: is read.
        rank: of this process among those that read the checkpoint.
        world_size: their number.

    Raises: DamagedCheckpoint when a shard is not what its marker says, here or when what has changed is read.
    """

    def __init__(
        self, checkpoint: Checkpoint, index: PieceIndex | None = None, rank: int = 0, world_size: int = 1
    ):
        self.position = checkpoint.position
        self.index = index or read_index(checkpoint.uri, checkpoint.markers)
        # Of checkpoints from before there was an index: their pieces have no SHA-256 of their own.
        for shard in sorted(self.index.whole_files)[rank::world_size]:
            self._check_whole_file(shard)

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of one kind: "param", a moment, "ema" or "buffer"."""
        return self.index.names(kind)

    def read(self, kind: str, name: str, shape: torch.Size | None = None) -> Tensor:
        """One whole tensor; flat unless it is a buffer or a shape is given.

        Args:
            kind: "param", a moment, "ema" or "buffer".
            name: of the parameter or buffer.
            shape: of the result.

        Raises: CheckpointError when it is not there or has another number of elements, DamagedCheckpoint.
        """
        shape = shape if shape is not None else self.index.shape(kind, name)
        ((_, whole),) = self.whole(kind, {name: shape})
        return whole

    def whole(self, kind: str, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) of all that are asked for, in the order in which they are complete.

        Args:
            kind: of the tensors.
            shapes: name -> shape.

        Raises: as `read`.
        """
        self.index.check(kind, shapes)
        wanted = [Span(kind, name, 0, shape.numel()) for name, shape in shapes.items()]
        for name, shape in shapes.items():
            if not shape.numel():
                yield name, torch.empty(shape, dtype=DTYPES[self.index.of(kind, name)[0].dtype])
        found: dict[str, tuple[Tensor, int]] = {}
        for span, values in self.spans(wanted):
            shape = shapes[span.name]
            if len(values) == shape.numel():
                yield span.name, values.clone().view(shape)
                continue
            whole, count = found.pop(span.name, (torch.empty(shape.numel(), dtype=values.dtype), 0))
            whole[span.start : span.stop] = values
            count += len(values)
            if count == len(whole):
                yield span.name, whole.view(shape)
            else:
                found[span.name] = whole, count

    def spans(self, wanted: Iterable[Span]) -> Iterator[tuple[Span, Tensor]]:
        """Yields (span, values) of parts that make up what is wanted, in the order in which they lie in the shards.

        A piece is read whole, since its SHA-256 is of the whole. The values are views of a read buffer.

        Args:
            wanted: whatever this process needs; nothing else is read but small gaps.

        Raises: CheckpointError for a span that the checkpoint has not, DamagedCheckpoint, StorageError, OSError.
        """
        found = requests(self.index, wanted)
        for _, parts in side_by_side(self._read, found, True, Request.size, IN_FLIGHT_BYTES):
            yield from parts
            del parts  # Not to be held until the next ones are there.

    def _check_whole_file(self, shard: str) -> None:
        uri = storage.join(self.index.uri, shard)
        with storage.open_seekable(uri, REQUEST_BYTES) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        if found != self.index.whole_files[shard]:
            raise DamagedCheckpoint(f"{uri} is damaged: its SHA-256 is not the one that was written.")

    def _read(self, request: Request) -> list[tuple[Span, Tensor]]:
        uri = storage.join(self.index.uri, request.shard)
        # Elements must not begin at odd places of the buffer, and in the file they do not.
        shift = request.begin % 8
        # Mapped, since what is freed goes back at once: the allocator keeps tens of megabytes for each thread.
        mapped = mmap.mmap(-1, max(1, shift + request.size()))
        content = torch.frombuffer(mapped, dtype=torch.uint8)
        view = memoryview(mapped)[shift:]
        _read_into(uri, request.begin, view)
        found = []
        for piece, spans in request.parts:
            at = slice(piece.begin - request.begin, piece.end - request.begin)
            if not _is_whole(piece, view[at]):
                # Once more: a bit may also turn over on its way.
                _read_into(uri, piece.begin, view[at])
                if not _is_whole(piece, view[at]):
                    raise DamagedCheckpoint(
                        f"{uri} is damaged: the SHA-256 of bytes {piece.begin} to {piece.end} is not the one that was "
                        "written."
                    )
            values = content[shift + at.start : shift + at.stop].view(DTYPES[piece.dtype])
            found += [(span, values[span.start - piece.start : span.stop - piece.start]) for span in spans]
        return found


def read_buffers(reader: Reader, model: nn.Module) -> None:
    """Sets those buffers of a model that the checkpoint has. Raises: as `Reader.read`."""
    saved = set(reader.names("buffer"))
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    for name, value in reader.whole("buffer", {name: buffer.shape for name, buffer in buffers.items()}):
        buffers[name].copy_(value)


def requests(index: PieceIndex, wanted: Iterable[Span]) -> list[Request]:
    """Requests that read the pieces of what is wanted, each once, neighbours together.

    Args:
        index: of the checkpoint.
        wanted: spans of its tensors.

    Raises: CheckpointError for a span that it has not.
    """
    parts: dict[Piece, list[Span]] = {}
    for span in wanted:
        covered = 0
        for piece in index.of(span.kind, span.name):
            start, stop = max(span.start, piece.start), min(span.stop, piece.stop)
            if start < stop:
                parts.setdefault(piece, []).append(span._replace(start=start, stop=stop))
                covered += stop - start
        if covered != span.stop - span.start:
            raise CheckpointError(
                f"{index.uri}: '{span.name}' ({span.kind}) has not all of the elements {span.start} to {span.stop}."
            )
    found: list[Request] = []
    for piece in sorted(parts, key=lambda one: (one.shard, one.begin)):
        last = found[-1] if found else None
        if (
            last is None
            or last.shard != piece.shard
            or piece.begin - last.end > GAP_BYTES
            or last.end - last.begin >= REQUEST_BYTES
        ):
            last = Request(piece.shard, piece.begin, piece.end)
            found.append(last)
        last.end = max(last.end, piece.end)
        last.parts.append((piece, parts[piece]))
    return found


def _read_into(uri: str, start: int, buffer: memoryview) -> None:
    try:
        storage.read_into(uri, start, buffer)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{uri} is gone.") from error
    except EOFError as error:
        raise DamagedCheckpoint(f"{error}.") from error


def _is_whole(piece: Piece, content: memoryview) -> bool:
    return piece.sha256 is None or hashlib.sha256(content).hexdigest() == piece.sha256
