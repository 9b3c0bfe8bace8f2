"""WebDataset tars of video: files of one sample share a key, `<key>.mp4` with `<key>.txt` or `<key>.json`.

Source of the layout: docs/formats.md, "WebDataset video". Videos are read in place, by byte range.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from defi_platform import storage
from defi_platform.data.sources.metadata import DAMAGE, first_folders, parsed_json, text_of
from defi_platform.data.sources.plain import is_video
from defi_platform.data.sources.records import Listing, Note, RejectedRecord, VideoRecord, rejected_links
from defi_platform.data.sources.uri import video_uri
from defi_platform.storage.parallel_read import side_by_side

TITLE = "WebDataset"

COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")

LARGEST_TEXT_FILE = 16 << 20
"""Bytes of a member with a text."""

TEXT_SUFFIXES = ("txt", "json")
"""The likelier first: a JSON file beside a text may be about anything."""


def detect(root: str, top: set[str]) -> bool:
    """True when there are tar files at the top or one folder down."""
    return any(map(_is_shard, top)) or any(
        _is_shard(name)
        for folder in first_folders(root)
        for name in storage.names(storage.join(root, folder))
    )


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields one record per video member of every tar; the videos of one sample are cameras of an episode."""
    unreadable: list[storage.Unreadable] = []
    shards = (entry for entry in storage.walk(root, unreadable) if _is_shard(entry.name))
    for _, records in side_by_side(lambda entry: list(_shard(entry, fps)), shards, storage.is_remote(root)):
        yield from records
    yield from rejected_links(unreadable)


def _is_shard(name: str) -> bool:
    return name.endswith((".tar", *COMPRESSED))


@dataclass
class _Members:
    """The members of a tar that count, by their names without a suffix."""

    videos: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """Stem -> suffix -> (offset, bytes)."""
    texts: dict[str, dict[str, str]] = field(default_factory=dict)
    """Stem -> suffix -> text, where there is one."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Stem of a file of texts that cannot be read -> why."""
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    """(kind, name, message)"""


def _shard(entry: storage.Entry, fps: float | None) -> Listing:
    shard = entry.name.removesuffix(".tar")
    members, damage = _Members(), ""
    if entry.name.endswith(COMPRESSED):
        damage = "a compressed tar, in which no video can be read by its place; decompress it"
    else:
        with storage.open_seekable(entry.uri) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    _index(tar, members)
            except (tarfile.TarError, OSError, *DAMAGE) as error:
                damage = f"{type(error).__name__}: {error}; what follows in this tar is lost"
                file.seek(0)
                if file.read(2) == b"\x1f\x8b":
                    damage = "compressed by gzip, so that no video can be read by its place; decompress it"
    if damage:
        yield RejectedRecord(
            video_id=f"{shard}/*", uri=entry.uri, reason="bad_source", message=damage, version=entry.version
        )
    for kind, name, message in members.notes:
        yield Note(kind=kind, item=f"{shard}/{name}", uri=entry.uri, message=message)
    yield from _samples(shard, entry, members, fps)


def _index(tar: tarfile.TarFile, members: _Members) -> None:
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep the headers of all
        name = "/".join(part for part in member.name.split("/") if part not in ("", "."))
        stem, suffix = posixpath.splitext(name)
        suffix = suffix.lower().removeprefix(".")
        if not member.isfile() or not (is_video(name) or suffix in TEXT_SUFFIXES):
            if is_video(name) and not member.isdir():
                members.notes.append(("skipped", name, "a link or a device and no file"))
            continue
        if posixpath.basename(name).startswith("._"):
            members.notes.append(("skipped", name, "what another system notes of a file, and not the file"))
        elif is_video(name):
            if member.issparse():
                members.damaged[stem] = "a sparse file in a tar cannot be read by its place"
            if suffix in members.videos.setdefault(stem, {}):
                members.notes.append(("repeated", name, "the last of that name in its tar counts"))
            members.videos[stem][suffix] = (member.offset_data, member.size)
        else:
            _read_text(tar, member, stem, suffix, members)


def _read_text(
    tar: tarfile.TarFile, member: tarfile.TarInfo, stem: str, suffix: str, members: _Members
) -> None:
    try:
        if member.size > LARGEST_TEXT_FILE:
            raise ValueError(f"{member.size:,} bytes for a text")
        file = tar.extractfile(member)
        content = file.read() if file is not None else b""
        found = content.decode("utf-8", "replace") if suffix == "txt" else parsed_json(content)
        members.texts.setdefault(stem, {})[suffix] = text_of(found)
    except DAMAGE as error:
        members.damaged[stem] = f"{stem}.{suffix}: {type(error).__name__}: {error}"
        members.texts.setdefault(stem, {})


def _samples(shard: str, entry: storage.Entry, members: _Members, fps: float | None) -> Listing:
    keys = dict(_keys(members))
    cameras = Counter(key for stem, key in keys.items() for _ in members.videos[stem])
    for stem, files in members.videos.items():
        key = keys[stem]
        by_suffix = members.texts.get(stem) or members.texts.get(key) or {}
        text = next((by_suffix[suffix] for suffix in TEXT_SUFFIXES if by_suffix.get(suffix)), "")
        damage = members.damaged.get(stem) or members.damaged.get(key)
        for suffix, (offset, size) in files.items():
            video_id = f"{shard}/{stem}" if len(files) == 1 else f"{shard}/{stem}.{suffix}"
            if damage and not text:
                yield RejectedRecord(
                    video_id=video_id,
                    uri=entry.uri,
                    reason="bad_source",
                    message=damage,
                    version=entry.version,
                )
                continue
            yield VideoRecord(
                video_id=video_id,
                uri=video_uri(entry.uri, "range", offset, size, f".{suffix}"),
                text=text,
                camera=stem[len(key) + 1 :] or "main",
                episode_id=f"{shard}/{key}" if cameras[key] > 1 else "",
                bytes=size,
                version=entry.version,
                fps=fps,
            )
    used = {*keys, *keys.values()}
    for stem in members.texts.keys() - used:
        yield Note(
            kind="unmatched", item=f"{shard}/{stem}", uri=entry.uri, message="a text beside which is no video"
        )


def _keys(members: _Members) -> Iterator[tuple[str, str]]:
    """(stem of a video, key of its sample): what a file of texts is named by, or what its cameras share.

    A dot may part the key from a camera (`k.left.mp4` beside `k.json`) or stand in a name (`clip_1.5x.mp4`).
    """
    prefixes = {stem: list(_prefixes(stem)) for stem in members.videos}
    # Names of cameras come again in other samples.
    seconds = Counter(stem[len(shorter[-1]) + 1 :] for stem, shorter in prefixes.items() if shorter)
    shared = Counter(shorter[-1] for shorter in prefixes.values() if shorter)
    for stem, shorter in prefixes.items():
        if stem in members.texts or not shorter:
            yield stem, stem
            continue
        named = next((key for key in shorter if key in members.texts), None)
        first = shorter[-1]
        is_camera = seconds[stem[len(first) + 1 :]] > 1 and shared[first] > 1
        yield stem, named or (first if is_camera else stem)


def _prefixes(stem: str) -> Iterator[str]:
    """The stem up to each of its dots, the longest first."""
    folder, name = posixpath.split(stem)
    while "." in name:
        name = name.rpartition(".")[0]
        if name:
            yield posixpath.join(folder, name)
