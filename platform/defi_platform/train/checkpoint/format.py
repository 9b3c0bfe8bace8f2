"""Checkpoints: one shard per rank, committed rank by rank, verified before they are trusted.

A checkpoint is the folder `checkpoints/step_<n>_<attempt>/` of a run. Rank r of w writes
`shard_<r>_of_<w>.safetensors` and, after it, `shard_<r>_of_<w>.json` with its size and SHA-256: that is the
commit marker. A checkpoint counts when the markers of all w ranks are there. Tensors lie under
`<kind>/<start>/<parameter>`: a run of elements of the flattened parameter from `start` on; buffers, which all
ranks share, under `buffer/0/<name>` of shard 0.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from defi_platform import storage
from defi_platform.errors import CheckpointError
from defi_platform.storage.scratch import scratch_folder
from defi_platform.train.engine.deepspeed_engine import Piece

FOLDER = "checkpoints"


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that was committed whole and is not whole any more; the one before it may be."""


_NAME = re.compile(r"step_(\d{9})_[0-9a-f]{6}")
_MARKER = re.compile(r"shard_(\d{5})_of_(\d{5})\.json")


@dataclass(frozen=True)
class Position:
    """Where a run stands; everything about its data is the sample number."""

    step: int
    samples: int
    """The plan's next sample number k."""
    model: dict[str, Any]
    """Kind, preset and settings of the model; a checkpoint of another one is refused."""
    scalars: dict[str, float]
    """Of the optimiser, the same on every rank."""
    wall_s: float = 0.0
    """Seconds of training so far, over all attempts."""
    clock: dict[str, float] = field(default_factory=dict)
    """`started`: when the driver of this attempt did; `before_s`: seconds of the drivers before it."""
    plan: str = ""
    """Fingerprint of the plan that `samples` is counted in."""
    validation_loss: float | None = None
    """At this very step; None when it was not validated."""


def new_attempt() -> str:
    """The part of a checkpoint's name that tells it from an earlier, perhaps damaged, one of the same step."""
    return uuid.uuid4().hex[:6]


def folder_name(step: int, attempt: str) -> str:
    """Name of the checkpoint of `step`, the same on all ranks."""
    return f"step_{step:09d}_{attempt}"


def write_shard(
    folder: Path, rank: int, world_size: int, pieces: Iterable[Piece], buffers: dict[str, Tensor]
) -> Path:
    """Writes this rank's shard into a local folder, without the marker that makes it count.

    Raises: OSError, ENOSPC for a full disk too.
    """
    tensors = {f"buffer/0/{name}": value.detach().cpu().contiguous() for name, value in buffers.items()}
    for piece in pieces:
        for kind, value in piece.tensors.items():
            # A copy: pieces are views of one flat buffer, which safetensors refuses to store.
            tensors[f"{kind}/{piece.start}/{piece.name}"] = value.cpu().clone()
    shard = folder / f"shard_{rank:05d}_of_{world_size:05d}.safetensors"
    try:
        save_file(tensors, shard)
    except SafetensorError as error:
        # It tells of the operating system's errors in words only.
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(shard)) from error
    return shard


def commit_shard(shard: Path, target: str, position: Position) -> None:
    """Copies a shard to its checkpoint folder, and after it the marker that vouches for it."""
    marker = {
        "file": shard.name,
        "bytes": shard.stat().st_size,
        "sha256": _sha256(shard),
        "position": asdict(position),
    }
    storage.put_file(shard, storage.join(target, shard.name))
    storage.write_text(storage.join(target, f"{shard.stem}.json"), json.dumps(marker, indent=1))


@dataclass(frozen=True)
class Found:
    """A checkpoint whose ranks have all committed."""

    uri: str
    step: int
    markers: list[dict[str, Any]]

    @property
    def position(self) -> Position:
        return Position(**self.markers[0]["position"])


def committed(run: str) -> list[Found]:
    """Checkpoints of a run, newest first; partial ones are not among them."""
    folder = storage.join(run, FOLDER)
    found = []
    for name in storage.names(folder):
        match = _NAME.fullmatch(name)
        markers = _markers(storage.join(folder, name)) if match else None
        if match and markers:
            found.append(Found(storage.join(folder, name), int(match[1]), markers))
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.uri), reverse=True)


def prune(run: str, keep: int, unfinished: bool, keep_best: bool = False, spared: int | None = None) -> None:
    """Deletes all but the newest `keep` checkpoints.

    Args:
        keep_best: spare the one with the lowest validation loss too.
        spared: step of a checkpoint that is still wanted.
        unfinished: also delete what was never committed; only before training starts, when no rank can
            still be writing.
    """
    found = committed(run)
    folder = storage.join(run, FOLDER)
    validated = [one for one in found if keep_best and one.position.validation_loss is not None]
    best = min(validated, key=lambda one: one.position.validation_loss or 0.0, default=None)
    for old in found[keep:]:
        if old.step != spared and (best is None or old.uri != best.uri):
            storage.delete(old.uri)
    if unfinished:
        whole = {checkpoint.uri for checkpoint in found}
        for name in storage.names(folder):
            if _NAME.fullmatch(name) and storage.join(folder, name) not in whole:
                storage.delete(storage.join(folder, name))


def _markers(uri: str) -> list[dict[str, Any]] | None:
    names = [match for match in map(_MARKER.fullmatch, storage.names(uri)) if match]
    if not names or len(names) != int(names[0][2]):
        return None
    try:
        return [
            json.loads(storage.read_text(storage.join(uri, match[0]))) for match in sorted(names, key=str)
        ]
    except (json.JSONDecodeError, FileNotFoundError):
        # Cut off while it was written, or deleted by the run while somebody else looks.
        return None


class Reader:
    """The tensors of one committed checkpoint, put together from all shards.

    Raises: DamagedCheckpoint when a shard is not what its marker says.
    """

    def __init__(self, checkpoint: Found):
        self.position = checkpoint.position
        self._uri = checkpoint.uri
        self._scratch: Path | None = None
        self._pieces: dict[tuple[str, str], list[tuple[int, Path, str]]] = {}
        if storage.is_remote(checkpoint.uri):
            self._scratch = scratch_folder("checkpoint")
        try:
            for marker in checkpoint.markers:
                self._index(self._local(marker))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes what was downloaded."""
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of one kind: "param", a moment, or "buffer"."""
        return [name for tensor_kind, name in self._pieces if tensor_kind == kind]

    def read(self, kind: str, name: str, shape: torch.Size | None = None) -> Tensor:
        """One whole tensor; flat unless a shape is given.

        Raises: CheckpointError when it is not there or has another number of elements.
        """
        pieces = sorted(self._pieces.get((kind, name), ()))
        parts, end = [], 0
        for start, path, key in pieces:
            if start != end and kind != "buffer":
                raise DamagedCheckpoint(f"{self._uri}: '{name}' has a gap at element {end}.")
            with safe_open(path, framework="pt") as file:
                parts.append(file.get_tensor(key))
            end = start + parts[-1].numel()
        if not parts:
            raise CheckpointError(f"{self._uri}: holds no '{name}' ({kind}); it is of another model.")
        whole = parts[0] if kind == "buffer" else torch.cat(parts)
        if shape is not None and whole.numel() != shape.numel():
            raise CheckpointError(
                f"{self._uri}: '{name}' has {whole.numel()} elements, the model's has {shape.numel()}."
            )
        return whole if shape is None else whole.reshape(shape)

    def _local(self, marker: dict[str, Any]) -> Path:
        uri = storage.join(self._uri, marker["file"])
        try:
            if self._scratch:
                path = self._scratch / marker["file"]
                storage.get_file(uri, path)
            else:
                path = storage.local_path(uri)
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{uri} is gone.") from error
        if size != marker["bytes"]:
            raise DamagedCheckpoint(f"{uri} has {size} bytes, {marker['bytes']} were written.")
        if _sha256(path) != marker["sha256"]:
            raise DamagedCheckpoint(f"{uri} is damaged: its SHA-256 is not the one that was written.")
        return path

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    kind, start, name = key.split("/", 2)
                    self._pieces.setdefault((kind, name), []).append((int(start), path, key))
        except SafetensorError as error:
            raise DamagedCheckpoint(f"{path} is no safetensors file: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
