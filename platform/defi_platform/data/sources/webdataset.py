"""WebDataset tars of video: files of one sample share a key, `<key>.mp4` with `<key>.txt` or `<key>.json`.

Source of the layout: docs/formats.md, "WebDataset video". Videos are read in place, by byte range.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from typing import IO

from defi_platform import storage
from defi_platform.data.sources.detection import first_folders
from defi_platform.data.sources.plain import is_video
from defi_platform.data.sources.records import Listing, RejectedRecord, VideoRecord
from defi_platform.data.sources.texts import TEXT_KEYS
from defi_platform.data.sources.uri import video_uri
from defi_platform.storage.parallel_read import side_by_side

TITLE = "WebDataset"


def detect(root: str, top: set[str]) -> bool:
    """True when there are tar files at the top or one folder down."""
    return any(name.endswith(".tar") for name in top) or any(
        name.endswith(".tar")
        for folder in first_folders(root)
        for name in storage.names(storage.join(root, folder))
    )


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields one record per video member of every tar."""
    shards = (entry for entry in storage.walk(root) if entry.name.endswith(".tar"))
    for _, records in side_by_side(lambda entry: list(_shard(entry, fps)), shards, storage.is_remote(root)):
        yield from records


def _shard(entry: storage.Entry, fps: float | None) -> Listing:
    shard = entry.name.removesuffix(".tar")
    videos: dict[str, tarfile.TarInfo] = {}
    texts: dict[str, str] = {}
    damage = ""
    with storage.open_seekable(entry.uri) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    _index_member(tar, member, videos, texts)
        except (tarfile.TarError, OSError, ValueError) as error:
            damage = f"{type(error).__name__}: {error}"
    if damage:
        yield RejectedRecord(
            video_id=f"{shard}/*", uri=entry.uri, reason="bad_source",
            message=f"{damage}; what follows in this tar is lost", version=entry.version,
        )  # fmt: skip
    for key, member in videos.items():
        yield VideoRecord(
            video_id=f"{shard}/{key}",
            uri=video_uri(
                entry.uri, "range", member.offset_data, member.size, posixpath.splitext(member.name)[1]
            ),
            text=texts.get(key, ""),
            bytes=member.size,
            version=entry.version,
            fps=fps,
        )


def _index_member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, videos: dict[str, tarfile.TarInfo], texts: dict[str, str]
) -> None:
    if not member.isfile():
        return
    folder, name = posixpath.split(member.name)
    key, _, suffix = name.partition(".")
    key = posixpath.join(folder, key).lstrip("./")
    if is_video(name):
        videos[key] = member
    elif suffix in ("txt", "json"):
        file: IO[bytes] | None = tar.extractfile(member)
        content = file.read() if file is not None else b""
        texts[key] = _text(content.decode("utf-8", "replace"), suffix)


def _text(content: str, suffix: str) -> str:
    if suffix == "txt":
        return content.strip()
    found = json.loads(content)
    if isinstance(found, dict):
        return next((str(found[key]) for key in TEXT_KEYS if found.get(key)), "")
    return str(found) if isinstance(found, str) else ""
