"""Checkpoint format: one shard per rank, committed rank by rank, verified before it is trusted.

A checkpoint is the folder `checkpoints/step_<n>_<attempt>/` of a run. Rank r of w writes
`shard_<r>_of_<w>.safetensors` and, after it, `shard_<r>_of_<w>.json` with its size and SHA-256: that is the
commit marker. A checkpoint is committed when the markers of all w ranks are there. Tensors lie under
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
from defi_platform.train.engine.deepspeed_engine import ParameterFragment

FOLDER = "checkpoints"


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files have changed since it was committed; the one before it may be whole."""


_NAME = re.compile(r"step_(\d{9})_[0-9a-f]{6}")
_MARKER = re.compile(r"shard_(\d{5})_of_(\d{5})\.json")


@dataclass(frozen=True)
class Position:
    """Progress of a run; of its data it holds the sample number alone."""

    step: int
    samples: int
    """The plan's next sample number."""
    model: dict[str, Any]
    """Kind, preset and settings of the model; a checkpoint of another one is rejected."""
    scalars: dict[str, float]
    """State of the optimiser that is the same on every rank."""
    wall_s: float = 0.0
    """Seconds of training so far, over all attempts."""
    clock: dict[str, float] = field(default_factory=dict)
    """`started`: Unix time at which the driver started; `before_s`: seconds of training under earlier drivers."""
    plan: str = ""
    """Fingerprint of the plan that `samples` is counted in."""
    data: dict[str, dict[str, str]] = field(default_factory=dict)
    """Versions of the manifests that the plan is of, see `Recipe.data_version`."""
    validation_loss: float | None = None
    """At this very step; None when it was not validated."""


def new_attempt() -> str:
    """Suffix of a checkpoint's name that differs from that of an earlier, perhaps damaged, one of the same step."""
    return uuid.uuid4().hex[:6]


def folder_name(step: int, attempt: str) -> str:
    """Name of the checkpoint of `step`, the same on all ranks."""
    return f"step_{step:09d}_{attempt}"


def write_shard(
    folder: Path,
    rank: int,
    world_size: int,
    fragments: Iterable[ParameterFragment],
    buffers: dict[str, Tensor],
) -> Path:
    """Writes this rank's shard into a local folder, without the marker that commits it.

    Args:
        folder: local.
        rank: this one.
        world_size: number of ranks.
        fragments: this rank's share of the training state.
        buffers: of the model; only rank 0's are read.

    Returns: the file.
    Raises: OSError, with ENOSPC for a full disk.
    """
    tensors = {f"buffer/0/{name}": value.detach().cpu().contiguous() for name, value in buffers.items()}
    for fragment in fragments:
        for kind, value in fragment.tensors.items():
            # A copy: fragments are views of one flat buffer, which safetensors does not store.
            tensors[f"{kind}/{fragment.start}/{fragment.name}"] = value.cpu().clone()
    shard = folder / f"shard_{rank:05d}_of_{world_size:05d}.safetensors"
    try:
        save_file(tensors, shard)
    except SafetensorError as error:
        # Its message holds the operating system's error in words only.
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(shard)) from error
    return shard


def commit_shard(shard: Path, target: str, position: Position) -> None:
    """Copies a shard to its checkpoint folder, and after it the marker that commits it.

    Args:
        shard: local file that `write_shard` wrote.
        target: checkpoint folder, local or remote.
        position: of the run.
    """
    marker = {
        "file": shard.name,
        "bytes": shard.stat().st_size,
        "sha256": _sha256(shard),
        "position": asdict(position),
    }
    storage.put_file(shard, storage.join(target, shard.name))
    storage.write_text(storage.join(target, f"{shard.stem}.json"), json.dumps(marker, indent=1))


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    uri: str
    step: int
    markers: list[dict[str, Any]]

    @property
    def position(self) -> Position:
        """Progress of the run at this checkpoint."""
        return Position(**self.markers[0]["position"])


def committed(run: str) -> list[Checkpoint]:
    """Committed checkpoints of a run, newest first."""
    folder = storage.join(run, FOLDER)
    found = []
    for name in storage.names(folder):
        match = _NAME.fullmatch(name)
        markers = _markers(storage.join(folder, name)) if match else None
        if match and markers:
            found.append(Checkpoint(storage.join(folder, name), int(match[1]), markers))
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.uri), reverse=True)


def prune(
    run: str, keep: int, unfinished: bool, keep_best: bool = False, pinned_step: int | None = None
) -> None:
    """Deletes all but the newest `keep` checkpoints.

    Args:
        run: run folder.
        keep: number of the newest ones that stay.
        unfinished: also delete uncommitted ones; only before training starts, when no rank can still be writing.
        keep_best: keep the one with the lowest validation loss too.
        pinned_step: step of a checkpoint that is being read, which stays.
    """
    found = committed(run)
    folder = storage.join(run, FOLDER)
    validated = [one for one in found if keep_best and one.position.validation_loss is not None]
    best = min(validated, key=lambda one: one.position.validation_loss or 0.0, default=None)
    for old in found[keep:]:
        if old.step != pinned_step and (best is None or old.uri != best.uri):
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
        # Cut off while it was written, or deleted by the run while another process reads.
        return None


class Reader:
    """Reads the whole tensors of one committed checkpoint from all its shards.

    Raises: DamagedCheckpoint when a shard is not what its marker says.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.position = checkpoint.position
        self._uri = checkpoint.uri
        self._scratch: Path | None = None
        # Of the open file that holds it: opening one reads the names of all its tensors.
        self._pieces: dict[tuple[str, str], list[tuple[int, str, Any]]] = {}
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
        """Closes the files, and removes those that were downloaded."""
        self._pieces.clear()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of one kind: "param", a moment, or "buffer"."""
        return [name for tensor_kind, name in self._pieces if tensor_kind == kind]

    def read(self, kind: str, name: str, shape: torch.Size | None = None) -> Tensor:
        """One whole tensor; flat unless a shape is given.

        Args:
            kind: "param", a moment, "ema" or "buffer".
            name: of the parameter or buffer.
            shape: of the result.

        Raises: CheckpointError when it is not there or has another number of elements.
        """
        pieces = sorted(self._pieces.get((kind, name), ()), key=lambda piece: piece[0])
        parts, end = [], 0
        for start, key, file in pieces:
            if start != end and kind != "buffer":
                raise DamagedCheckpoint(f"{self._uri}: '{name}' has a gap at element {end}.")
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
        name: str = marker["file"]
        uri = storage.join(self._uri, name)
        try:
            if self._scratch:
                path = self._scratch / name
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
            file: Any = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                kind, start, name = key.split("/", 2)
                self._pieces.setdefault((kind, name), []).append((int(start), key, file))
        except SafetensorError as error:
            raise DamagedCheckpoint(f"{path} is no safetensors file: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
