"""Latent cache: outputs of a frozen encoder, stored once: VAE latents for GFDM, patch features for GIDM.

    <folder>/encoder.json          which encoder, and the shape of what it makes of a frame
    <folder>/shards/<id>.npy       (F, ...) frames of some videos, one after the other; mapped, not read
    <folder>/shards/<id>.parquet   which rows are whose; written last, so a shard counts once it is there

Every frame of a video is kept, at the size of training, so that any rule and any seed find theirs. T frames.
"""

from __future__ import annotations

import io
import json
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.data.manifest.table import Manifest
from defi_platform.errors import UserError

ENCODER = "encoder.json"
SHARDS = "shards"

INDEX_SCHEMA = pa.schema(
    [
        ("corpus", pa.string()),
        ("video_id", pa.string()),
        ("version", pa.string()),
        ("first_frame", pa.int32()),
        ("num_frames", pa.int32()),
        ("first", pa.int64()),
    ]
)
"""`first_frame` and `num_frames`: the video's part of its file, as in the manifest; `first`: index of its first frame in
the shard."""

SAME = ("version", "first_frame", "num_frames")
"""Columns that must agree besides the video's name: other windows of a file have the same names and other frames."""

OPEN_SHARDS = 256
"""Shards kept open per process."""


class CacheError(UserError):
    """A latent cache that is absent, of another encoder or of other videos."""


@dataclass(frozen=True)
class EncoderInfo:
    """The encoder whose output a cache holds, and the form of that output."""

    kind: str
    """gfdm | gidm"""
    column: str
    """Name in the batch: latents | features."""
    fingerprint: str
    """Of the encoder's configuration and weights, the frame size and the stored type."""
    describes: str
    """The same for people."""
    shape: tuple[int, ...]
    """Of one frame."""
    dtype: str

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame in the cache."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class CacheLocation:
    """A cache and the encoder that it must be of: small, to be sent to decode actors."""

    folder: str
    info: EncoderInfo


def create_cache(folder: str, info: EncoderInfo) -> None:
    """Makes `folder` a cache of this encoder, or checks that it is one. Raises: CacheError."""
    path = storage.join(folder, ENCODER)
    if storage.exists(path):
        _check_encoder(folder, info)
    else:
        storage.write_text(path, json.dumps(asdict(info), indent=1))


def stored_dtype(folder: str) -> str:
    """Data type that the cache in `folder` stores; float32 where there is none, which opening it reports."""
    path = storage.join(folder, ENCODER)
    if not storage.exists(path):
        return "float32"
    return str(_read_encoder(folder)["dtype"])


def write_shard(folder: str, frames: np.ndarray, videos: Sequence[dict[str, Any]]) -> None:
    """Adds a shard.

    Args:
        folder: of the cache.
        frames: (F, ...) of all videos, in their order.
        videos: corpus, video_id, version, first_frame and num_frames of each.
    """
    name = storage.join(folder, SHARDS, uuid.uuid4().hex)
    counts = [video["num_frames"] for video in videos]
    assert sum(counts) == len(frames)
    content = io.BytesIO()
    np.lib.format.write_array(content, frames, allow_pickle=False)
    storage.write_bytes(f"{name}.npy", content.getbuffer())
    starts = np.cumsum([0, *counts[:-1]]).tolist()
    rows = [{**video, "first": first} for video, first in zip(videos, starts, strict=True)]
    index = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), index, compression="zstd")
    storage.write_bytes(f"{name}.parquet", index.getbuffer())


class LatentCache:
    """Reader of a cache: encoded frames of the manifest's videos that it holds.

    Args:
        location: folder, and the encoder that the cache must be of.
        manifest: whose rows are asked for.

    Raises: CacheError when the folder is no cache, of another encoder, or holds a video in another version than
        the manifest's and not in that one.
    """

    def __init__(self, location: CacheLocation, manifest: Manifest) -> None:
        self.location = location
        _check_encoder(location.folder, location.info)
        self._shards, index = _read_index(location.folder)
        found = pc.index_in(_keys(manifest, *SAME), value_set=_keys(index, *SAME))
        found = found.fill_null(-1).to_numpy()
        self._reject_other_versions(manifest, index, found)
        there = found >= 0
        self._shard = np.where(there, index["shard"].to_numpy()[found] if len(index) else -1, -1)
        self._first = np.where(there, index["first"].to_numpy()[found] if len(index) else -1, -1)
        self._open: OrderedDict[int, Any] = OrderedDict()

    def holds(self, rows: np.ndarray) -> np.ndarray:
        """Says of each manifest row whether its video is in the cache, bool (N,)."""
        return np.asarray(self._shard[rows] >= 0)

    def read(self, row: int, indices: Sequence[int]) -> np.ndarray:
        """Reads float32 (T, ...) of one video, as the encoder gives it; `indices` count from the video's own start."""
        shard = int(self._shard[row])
        frames = self._open.pop(shard, None)
        if frames is None:
            frames = _opened(storage.join(self.location.folder, SHARDS, self._shards[shard]))
        self._open[shard] = frames
        while len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return np.asarray(frames[self._first[row] + np.asarray(indices)], np.float32)

    def _reject_other_versions(self, manifest: Manifest, index: pa.Table, found: np.ndarray) -> None:
        others = pc.index_in(_keys(manifest), value_set=_keys(index)).fill_null(-1).to_numpy()
        changed = np.flatnonzero((found < 0) & (others >= 0))
        if len(changed):
            video = manifest.row(int(changed[0]))
            cached = {name: index[name][int(others[changed[0]])].as_py() for name in SAME}
            raise CacheError(
                f"{self.location.folder} is stale: {len(changed)} video(s) have changed since they were encoded, first "
                f"{video['uri']} ({_part(cached)} there, {_part(video)} now). Run jobs/encode_latents.py again."
            )


def missing_rows(folder: str, manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """Finds the rows whose video, in its present version, the cache does not hold yet.

    Args:
        folder: of the cache.
        manifest: of the corpora.
        rows: int (N,), rows of the manifest.

    Returns: those of `rows`, in their order.
    """
    _, index = _read_index(folder)
    there = pc.is_in(_keys(manifest, *SAME), value_set=_keys(index, *SAME)).to_numpy(zero_copy_only=False)
    return np.asarray(rows[~there[rows]])


def remove_leftovers(folder: str) -> int:
    """Deletes shards that were never finished; only while nobody writes. Returns: how many."""
    names = storage.names(storage.join(folder, SHARDS))
    finished = {name.removesuffix(".parquet") for name in names if name.endswith(".parquet")}
    leftovers = [n for n in names if n.endswith(".npy") and n.removesuffix(".npy") not in finished]
    for name in leftovers:
        storage.delete(storage.join(folder, SHARDS, name))
    return len(leftovers)


# --------------------------------------------------------------------------- inside


def _read_encoder(folder: str) -> dict[str, Any]:
    path = storage.join(folder, ENCODER)
    try:
        stored: dict[str, Any] = json.loads(storage.read_bytes(path))
        return stored
    except FileNotFoundError as error:
        raise CacheError(
            f"{folder} is no latent cache: it has no {ENCODER}. Run jobs/encode_latents.py with the same model and "
            "data settings, or set data.cache=null."
        ) from error
    except ValueError as error:
        raise CacheError(f"{path} is damaged ({error}). Delete the folder and encode again.") from error


def _check_encoder(folder: str, info: EncoderInfo) -> None:
    there = _read_encoder(folder)
    if there["fingerprint"] != info.fingerprint:
        raise CacheError(
            f"{folder} was made by another encoder: fingerprint {there['fingerprint']} ({there['describes']}) there, "
            f"{info.fingerprint} ({info.describes}) in the configuration. Choose another data.cache, or encode again "
            "into an empty folder."
        )


def _read_index(folder: str) -> tuple[list[str], pa.Table]:
    """Names of the shards, and one row per video with the number of its shard; the newest of a video last."""
    names = [n for n in storage.names(storage.join(folder, SHARDS)) if n.endswith(".parquet")]
    tables = [INDEX_SCHEMA.empty_table().append_column("shard", pa.array([], pa.int32()))]
    for number, name in enumerate(names):
        content = storage.read_bytes(storage.join(folder, SHARDS, name))
        table = pq.read_table(io.BytesIO(content), schema=INDEX_SCHEMA)
        tables.append(table.append_column("shard", pa.array(np.full(len(table), number, np.int32))))
    return [name.replace(".parquet", ".npy") for name in names], pa.concat_tables(tables)


def _keys(source: Manifest | pa.Table, *more: str) -> pa.Array:
    """One text per row that names its video."""
    names = ("corpus", "video_id", *more)
    table = source.columns(*names) if isinstance(source, Manifest) else source
    columns = [table[name].cast(pa.large_string()) for name in names]
    joined = pc.binary_join_element_wise(
        *columns, pa.scalar("\0", pa.large_string()), null_handling="replace"
    )
    return joined.combine_chunks()


def _part(video: Mapping[str, Any]) -> str:
    return f"version {video['version']}, {video['num_frames']} frames from frame {video['first_frame']} on"


def _opened(uri: str) -> Any:
    """The frames of a shard, to be indexed: mapped where the file is local, else read by range."""
    if not storage.is_remote(uri):
        return np.load(storage.local_path(uri), mmap_mode="r", allow_pickle=False)
    return _RemoteFrames(uri)


class _RemoteFrames:
    """A .npy file on another store, of which single frames are read."""

    def __init__(self, uri: str) -> None:
        self._file = storage.open_seekable(uri)
        np.lib.format.read_magic(self._file)
        self._shape, _, self._dtype = np.lib.format.read_array_header_1_0(self._file)
        self._start = self._file.tell()

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([self._frame(int(index)) for index in indices])

    def _frame(self, index: int) -> np.ndarray:
        size = int(np.prod(self._shape[1:])) * self._dtype.itemsize
        self._file.seek(self._start + index * size)
        return np.frombuffer(self._file.read(size), self._dtype).reshape(self._shape[1:])
