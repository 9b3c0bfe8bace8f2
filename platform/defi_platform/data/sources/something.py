"""Something-Something v2: `<id>.webm` files and JSON lists of labels.

Source of the layout: docs/formats.md, "Something-Something v2". The test split has no labels, so its
videos are rejected for want of a text.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from defi_platform import storage
from defi_platform.data.sources.metadata import DAMAGE, read_json, text_of
from defi_platform.data.sources.plain import is_video
from defi_platform.data.sources.records import Listing, Note, RejectedRecord, VideoRecord, files_below
from defi_platform.data.sources.splits import named_split, own_splits
from defi_platform.data.sources.uri import file_uri

TITLE = "Something-Something"


def detect(root: str, top: set[str]) -> bool:
    """True when a JSON list of labels lies at the top or one folder down."""
    for uri in _candidates(root, top):
        try:
            entries = read_json(uri)
        except ValueError:
            continue  # not a sign of this format; whoever reads the folder says that it is damaged
        if _is_labels(entries) and any(_label(entry) for entry in entries if isinstance(entry, dict)):
            return True
    return False


@dataclass(slots=True)
class _Label:
    text: str
    split: str
    place: str


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields one record per labelled video; labels without a video are missing, videos without a label have no text."""
    files = yield from files_below(root)
    videos: dict[str, list[str]] = {}
    for name in files:
        if is_video(name):
            videos.setdefault(posixpath.splitext(posixpath.basename(name))[0], []).append(name)
    labels: dict[str, _Label] = {}
    for uri in _candidates(root, set(storage.names(root))):
        yield from _read_labels(uri, labels)
    has_own = own_splits(label.split for label in labels.values())
    for key in sorted(labels.keys() | videos.keys()):
        label = labels.get(key)
        found = videos.get(key, [])
        if not found:
            yield RejectedRecord(
                video_id=key, uri=root, reason="missing", message=f"no video of the label {key}"
            )
            continue
        problem = "" if label is not None and label.text else "no label"
        if label is not None and len(found) > 1:
            problem = f"its label {key} may be of {found[0]} or of {found[1]}"
            yield Note(kind="ambiguous", item=label.place, uri=root, message=problem)
        for name in found:
            entry = files[name]
            video_id = key if len(found) == 1 else posixpath.splitext(name)[0]
            if problem or label is None:
                yield RejectedRecord(
                    video_id=video_id, uri=entry.uri, reason="no_text", message=problem, version=entry.version
                )
                continue
            yield VideoRecord(
                video_id=video_id,
                uri=file_uri(entry.uri),
                text=label.text,
                bytes=entry.bytes,
                version=entry.version,
                fps=fps,
                split=label.split if has_own else "",
            )


def _read_labels(uri: str, labels: dict[str, _Label]) -> Iterator[RejectedRecord | Note]:
    """Reads a file of labels, if it is one, into `labels`."""
    file = posixpath.basename(uri)
    try:
        entries = read_json(uri)
    except ValueError as error:
        yield RejectedRecord(video_id=file, uri=uri, reason="bad_source", message=str(error))
        return
    if not _is_labels(entries):
        return
    split = named_split(re.split(r"[^a-z]+", posixpath.splitext(file)[0].lower()))
    for number, entry in enumerate(entries):
        place = f"{file}:{number + 1}"
        try:
            key, text = _key(entry), _label(entry)
            text.encode()
        except DAMAGE as error:
            message = f"{type(error).__name__}: {error}"
            yield RejectedRecord(video_id=place, uri=uri, reason="bad_source", message=message)
            continue
        known = labels.get(key)
        if known is None:
            labels[key] = _Label(text, split, place)
            continue
        if text and known.text and text != known.text:
            message = f"{known.place} labels it too, with another text; the last counts"
            yield Note(kind="repeated", item=place, uri=uri, message=message)
        # Of a video in several lists none is for training.
        known.text, known.split, known.place = text or known.text, max(known.split, split), place


def _key(entry: Any) -> str:
    value = entry["id"]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        raise ValueError(f"an id that is {value!r:.60}")
    key = str(value).strip()
    key.encode()
    return posixpath.splitext(key)[0] if is_video(key) else key


def _label(entry: dict[str, Any]) -> str:
    """The label, or what its template gives with the things that it is about in its gaps."""
    text = text_of(entry.get("label"))
    if text or not isinstance(entry.get("template"), str):
        return text
    things = entry.get("placeholders")
    rest = iter(things if isinstance(things, list) else ())
    template = text_of(entry["template"])
    return re.sub(r"\[([^\]]*)\]", lambda gap: text_of(next(rest, gap[1])) or gap[1], template)


def _candidates(root: str, top: set[str]) -> list[str]:
    uris = [storage.join(root, name) for name in sorted(top) if name.endswith(".json")]
    for name in sorted(top):
        if "label" in name.lower() and not name.endswith(".json"):
            inside = storage.names(storage.join(root, name))
            uris += [storage.join(root, name, n) for n in inside if n.endswith(".json")]
    return uris


def _is_labels(entries: Any) -> bool:
    return isinstance(entries, list) and any(isinstance(entry, dict) and "id" in entry for entry in entries)
