"""Something-Something v2: `<id>.webm` files and JSON lists of labels.

Source of the layout: docs/formats.md, "Something-Something v2". The test split has no labels, so its
videos are rejected for want of a text.
"""

from __future__ import annotations

import json
import posixpath
from typing import Any

from defi_platform import storage
from defi_platform.data.sources.plain import is_video
from defi_platform.data.sources.records import Listing, RejectedRecord, VideoRecord, files_below
from defi_platform.errors import CorpusError

TITLE = "Something-Something"


def detect(root: str, top: set[str]) -> bool:
    """True when a JSON list of labels lies at the top or one folder down."""
    return any(_is_labels(storage.read_bytes(uri)) for uri in _candidates(root, top))


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields one record per labelled video; labels without a video are missing, videos without a label have no text."""
    files = yield from files_below(root)
    videos = {posixpath.splitext(posixpath.basename(name))[0]: name for name in files if is_video(name)}
    texts: dict[str, str] = {}
    for uri in _candidates(root, set(storage.names(root))):
        content = storage.read_bytes(uri)
        if not _is_labels(content):
            continue
        for entry in json.loads(content):
            texts[str(entry["id"])] = str(entry.get("label") or "")
    for key in sorted(texts.keys() | videos.keys()):
        name = videos.get(key)
        if name is None:
            yield RejectedRecord(
                video_id=key, uri=root, reason="missing", message=f"no video of the label {key}"
            )
        elif not texts.get(key):
            found = files[name]
            yield RejectedRecord(
                video_id=key, uri=found.uri, reason="no_text", message="no label", version=found.version
            )
        else:
            found = files[name]
            yield VideoRecord(
                video_id=key,
                uri=found.uri,
                text=texts[key],
                bytes=found.bytes,
                version=found.version,
                fps=fps,
            )


def _candidates(root: str, top: set[str]) -> list[str]:
    uris = [storage.join(root, name) for name in sorted(top) if name.endswith(".json")]
    for name in sorted(top):
        if "label" in name.lower() and not name.endswith(".json"):
            inside = storage.names(storage.join(root, name))
            uris += [storage.join(root, name, n) for n in inside if n.endswith(".json")]
    return uris


def _is_labels(content: bytes) -> bool:
    if not content.lstrip().startswith(b"["):
        return False
    try:
        entries: Any = json.loads(content)
    except ValueError as error:
        raise CorpusError(
            f"a label file is damaged: {error}. Restore it from the dataset's source."
        ) from error
    return bool(entries) and isinstance(entries[0], dict) and "id" in entries[0]
