"""Checkpoint format: one shard per rank, committed rank by rank, verified before it is trusted.

A checkpoint is the folder `checkpoints/step_<n>_<attempt>/` of a run. Rank r of w writes
`shard_<r>_of_<w>.safetensors`, then `shard_<r>_of_<w>.pieces.json`, the index of its tensors (pieces.py), and last
`shard_<r>_of_<w>.json` with the size of the one, the SHA-256 of the other and its own: that is the commit marker. A checkpoint
is committed when the markers of all w ranks are there, unless it was passed over (`pass_over`). Tensors lie under
`<kind>/<start>/<parameter>`: a run of elements of the flattened parameter from `start` on; buffers, which all
ranks share, under `buffer/0/<name>` of shard 0.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from defi_platform import storage
from defi_platform.errors import CheckpointError
from defi_platform.storage.parallel_read import side_by_side
from defi_platform.train.checkpoint import pieces
from defi_platform.train.engine.sharded_state import ParameterFragment

FOLDER = "checkpoints"
PASSED_OVER = "passed_over.json"
"""File in a checkpoint that could not be used; it says why. Without it the checkpoint is tried again."""

_NAME = re.compile(r"step_(\d{9})_[0-9a-f]{6}")
_OWN_DIGEST = "marker_sha256"
"""Entry of a marker: SHA-256 of the others."""
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
    segments: list[dict[str, Any]] = field(default_factory=list)
    """Of the run up to here, see `defi_platform.train.segments`; none in older checkpoints."""


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
    """Copies a shard to its checkpoint folder, then its index, and after it the marker that commits both.

    Args:
        shard: local file that `write_shard` wrote.
        target: checkpoint folder, local or remote.
        position: of the run.
    """
    index = pieces.describe(shard).encode()
    marker = {
        "file": shard.name,
        "bytes": shard.stat().st_size,
        "pieces": f"{shard.stem}.pieces.json",
        "pieces_sha256": hashlib.sha256(index).hexdigest(),
        "position": asdict(position),
    }
    storage.put_file(shard, storage.join(target, shard.name))
    storage.write_bytes(storage.join(target, f"{shard.stem}.pieces.json"), index)
    marker[_OWN_DIGEST] = _digest(marker)
    storage.write_text(storage.join(target, f"{shard.stem}.json"), json.dumps(marker, indent=1))


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    uri: str
    step: int
    markers: list[dict[str, Any]]

    @property
    def position(self) -> Position:
        """Progress of the run at this checkpoint. Raises: CheckpointError for one of another version."""
        try:
            return Position(**self.markers[0]["position"])
        except TypeError as error:
            raise CheckpointError(
                f"{self.uri} was written by another version of the platform: {error}. Go on with that version, or choose "
                "another train.output."
            ) from error


@dataclass(frozen=True)
class Unusable:
    """A checkpoint that was committed and is not to be read."""

    uri: str
    step: int
    reason: str | None
    """Why it cannot be read; None: it was passed over, its file says why."""


@dataclass(frozen=True)
class Listing:
    """The checkpoints of a run as they lay there at one time, each kind newest first."""

    committed: list[Checkpoint]
    unusable: list[Unusable]
    """Passed over, or with damaged markers."""
    unfinished: list[str]
    """Folders whose commit markers are not all there."""


def listing(run: str) -> Listing:
    """Lists the checkpoints of a run: one request for all, and one for each of them and for each marker."""
    found = Listing([], [], [])
    for uri, step, names in sorted(_folders(run), key=lambda one: (one[1], one[0]), reverse=True):
        if PASSED_OVER in names:
            found.unusable.append(Unusable(uri, step, None))
            continue
        try:
            markers = _markers(uri, names)
        except ValueError as error:
            # Markers appear whole: one that is not has changed since.
            found.unusable.append(Unusable(uri, step, f"{uri}: {error}"))
            continue
        if markers:
            found.committed.append(Checkpoint(uri, step, markers))
        else:
            found.unfinished.append(uri)
    return found


def committed(run: str) -> list[Checkpoint]:
    """Committed checkpoints of a run, newest first; not those that are unusable."""
    return listing(run).committed


def none_usable(run: str, found: int, unusable: Sequence[Unusable], messages: Sequence[str]) -> str:
    """Message about a run whose checkpoints cannot be used, which must not begin anew by mistake.

    Args:
        run: run folder.
        found: number of those that are committed.
        unusable: the others.
        messages: what is wrong with those that were tried.
    """
    passed = [f"{one.uri} was passed over, see {PASSED_OVER}." for one in unusable if not one.reason]
    return (
        f"{run} has {found + len(unusable)} checkpoints and none can be used: {' '.join([*messages, *passed])} None was "
        "changed. Bring their files back, or move its folder 'checkpoints' away to begin anew."
    )


def pass_over(checkpoint: Checkpoint | Unusable, reason: str) -> None:
    """Makes a checkpoint that cannot be used count no more; its files stay until `prune` has enough whole newer ones.

    Args:
        checkpoint: committed one.
        reason: for who looks at the folder.
    """
    text = json.dumps({"reason": reason, "to_try_again": "delete this file"}, indent=1)
    storage.write_text(storage.join(checkpoint.uri, PASSED_OVER), text)


def prune(
    run: str, keep: int, unfinished: bool, keep_best: bool = False, pinned_step: int | None = None
) -> None:
    """Deletes all but the newest `keep` checkpoints, and those that were passed over and are older than all of these.

    Args:
        run: run folder.
        keep: number of the newest ones that stay.
        unfinished: also delete uncommitted ones; only before training starts, when no rank can still be writing.
        keep_best: keep the one with the lowest validation loss too.
        pinned_step: step of a checkpoint that is being read, which stays.
    """
    there = listing(run)
    found = there.committed
    validated = [one for one in found if keep_best and one.position.validation_loss is not None]
    best = min(validated, key=lambda one: one.position.validation_loss or 0.0, default=None)
    for old in found[keep:]:
        if old.step != pinned_step and (best is None or old.uri != best.uri):
            storage.delete(old.uri)
    oldest = found[keep - 1].step if 0 < keep <= len(found) else 0
    obsolete = [one.uri for one in there.unusable if one.step < oldest]
    for uri in obsolete + (there.unfinished if unfinished else []):
        storage.delete(uri)


def _folders(run: str) -> Iterator[tuple[str, int, list[str]]]:
    """(uri, step, names of its files) of each folder of a checkpoint, committed or not."""
    folder = storage.join(run, FOLDER)
    steps = {
        storage.join(folder, name): match
        for name in storage.names(folder)
        if (match := _NAME.fullmatch(name))
    }
    for uri, names in side_by_side(storage.names, steps, storage.is_remote(run)):
        yield uri, int(steps[uri][1]), names


def _markers(uri: str, names: list[str]) -> list[dict[str, Any]] | None:
    """Content of the markers; None where one is absent. Raises: ValueError for a damaged one."""
    found = [match for match in map(_MARKER.fullmatch, names) if match]
    if not found or len(found) != int(found[0][2]):
        return None
    files = [storage.join(uri, name) for name in sorted(match[0] for match in found)]
    markers = []
    try:
        for file, content in side_by_side(storage.read_bytes, files, storage.is_remote(uri)):
            try:
                marker = json.loads(content)
            except ValueError:  # no JSON, or no text
                marker = None
            if not isinstance(marker, dict) or not isinstance(marker.get("position"), dict):
                raise ValueError(f"its marker {file.rsplit('/', 1)[-1]} is damaged.")
            if marker.pop(_OWN_DIGEST, None) not in (None, _digest(marker)):
                raise ValueError(f"its marker {file.rsplit('/', 1)[-1]} is not the one that was written.")
            markers.append(marker)
    except FileNotFoundError:
        # Deleted by the run while another process reads.
        return None
    return markers


def _digest(marker: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(marker, sort_keys=True).encode()).hexdigest()
