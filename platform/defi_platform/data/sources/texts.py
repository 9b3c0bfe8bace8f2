"""Tables of texts beside plain videos: CSV, JSON lines or Parquet with a column that names the video."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.errors import CorpusError

VIDEO_COLUMNS = ("video", "file", "file_name", "filename", "path", "video_path", "id", "video_id", "key")
TEXT_COLUMNS = ("text", "caption", "label", "instruction", "task", "description")


def read_texts(root: str, names: Sequence[str]) -> dict[str, str]:
    """Video name or key -> text, from every table among `names` that has both columns.

    Raises: CorpusError for a table that cannot be read.
    """
    texts: dict[str, str] = {}
    for name in sorted(names):
        place = storage.join(root, name)
        try:
            if name.endswith(".csv"):
                texts |= _pairs(csv.DictReader(io.StringIO(storage.read_text(place))))
            elif name.endswith(".jsonl"):
                texts |= _pairs(
                    json.loads(line) for line in storage.read_text(place).splitlines() if line.strip()
                )
            elif name.endswith(".parquet"):
                texts |= _pairs(pq.read_table(io.BytesIO(storage.read_bytes(place))).to_pylist())
        except (ValueError, TypeError, AttributeError, csv.Error, OSError) as error:
            raise CorpusError(
                f"{place} cannot be read as a table of texts: {error}. Repair or remove it."
            ) from error
    return texts


def _pairs(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    found = {}
    for row in rows:
        video = next((row[c] for c in VIDEO_COLUMNS if row.get(c)), None)
        text = next((row[c] for c in TEXT_COLUMNS if row.get(c)), None)
        if video is not None and text is not None:
            found[str(video)] = str(text)
    return found
