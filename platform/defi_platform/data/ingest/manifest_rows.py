"""Rows of the manifest and of the quarantine, from what a source lists and what its files were found to be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from defi_platform.config import CorpusConfig
from defi_platform.data.decode.messages import Probe
from defi_platform.data.decode.seek_index import SeekIndex
from defi_platform.data.ingest.alignment import place
from defi_platform.data.ingest.probe_actors import opened_with
from defi_platform.data.ingest.probe_results import ProbeResult
from defi_platform.data.ingest.quality_filters import rejected_by_filters, scores_of
from defi_platform.data.ingest.segmentation import seconds_of, spans
from defi_platform.data.ingest.signal_stage import SignalStage
from defi_platform.data.manifest.split import hash_position
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sources.records import RejectedRecord, VideoRecord

NO_TIMES = np.zeros(0)


def rows_of(
    name: str,
    corpus: CorpusConfig,
    format_name: str,
    record: VideoRecord,
    result: ProbeResult,
    signals: SignalStage | None = None,
) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    """Makes the rows of one video: one, or one per window.

    Args:
        name: of the corpus.
        corpus: its windows and filters.
        format_name: of its source.
        record: the video as its source lists it.
        result: of the file it lies in.
        signals: of the corpus; None where it has none.

    Yields: a row by `manifest.SCHEMA` with the `group` of its record and the `content` of its frames (see `split`), and
        its signature if frames were scored; or one by `QUARANTINE_SCHEMA` and ().
    """
    probe = result.answer
    if isinstance(probe, BadVideo):
        yield rejection(name, record, probe, result.attempts), ()
        return
    placed = place(record, probe)
    if isinstance(placed, BadVideo):
        yield rejection(name, record, placed, result.attempts), ()
        return
    start, count, fps = placed.first, placed.count, placed.fps or probe.fps
    whole = corpus.windows.mode == "none"
    variable = probe.variable_rate and record.fps is None
    times = NO_TIMES
    if variable:
        times = np.asarray(probe.times[start : start + count], np.float64)
    elif not whole:
        times = np.arange(count) / fps if fps > 0 else np.zeros(count)
    content = hash_position(f"{probe.content} {start} {count}") if probe.content else 0
    screening = probe.frame_scores
    changes = b"" if screening is None else screening.changes[start : start + count]
    rows = signals.place(record, count) if signals is not None and record.num_actions else None
    for number, (first, stop) in enumerate([(0, count)] if whole else spans(corpus.windows, times, changes)):
        video_id = record.video_id if whole else f"{record.video_id}#w{number:04d}"
        scores = None if screening is None else scores_of(screening, start + first, start + stop)
        seconds = (stop - first) / fps if fps > 0 and stop - first > 1 else 0.0
        if variable:
            seconds = seconds_of(times, (first, stop))
        problem = rejected_by_filters(corpus.filters, scores, seconds)
        if not whole and (seconds < corpus.windows.shortest_s or stop - first < 2):
            problem = BadVideo(
                "too_short", f"a window of {seconds:.2f} s, windows.shortest_s={corpus.windows.shortest_s:g}"
            )
        if problem is not None:
            yield rejection(name, record, problem, result.attempts) | {"video_id": video_id}, ()
            continue
        # Seconds from the window's first frame on.
        own_times = times[first:stop] - times[first] if variable else NO_TIMES
        duration = float(own_times[-1]) if variable else 0.0
        yield (
            {
                "corpus": name,
                "video_id": video_id,
                "uri": record.uri,
                "camera": record.camera,
                "text": record.text,
                "split": record.split,
                "group": record.group,
                "content": content,
                "num_frames": stop - first,
                "fps": (stop - first - 1) / duration if duration > 0 else fps,
                "width": probe.width,
                "height": probe.height,
                "codec": probe.codec,
                "bytes": record.bytes or probe.bytes,
                "source": format_name,
                # The windows of a video share its split.
                "episode_id": record.episode_id or ("" if whole else record.video_id),
                # Those beyond a window may belong to another scene.
                "num_actions": min(max(0, rows[1] - first), stop - first) if rows else 0,
                "first_action": None if whole else first,
                "first_frame": start + first,
                "decoder": probe.decoder,
                "seek_index": _seek_index(probe, start + first, stop - first),
                "variable_rate": variable,
                "signals": signals.table if signals is not None and rows else None,
                "signals_row": rows[0] + first if rows else None,
                "bad_actions": record.num_actions > 0 and not rows,
                "version": record.version,
                "times": own_times.astype(np.float32) if variable else None,
                "luma": scores and scores.luma,
                "motion": scores and scores.motion,
                "sharpness": scores and scores.sharpness,
            },
            scores.signature if scores else (),
        )


def _seek_index(probe: Probe, first: int, count: int) -> bytes | None:
    if not probe.seek_index:
        return None
    return SeekIndex.from_bytes(probe.seek_index).part(first, count).to_bytes()


def rejection(
    name: str, item: VideoRecord | RejectedRecord, problem: BadVideo, attempts: int
) -> dict[str, Any]:
    """Makes the quarantine row of a video that ingest rejects.

    Args:
        name: of the corpus.
        item: the video as its source lists it.
        problem: the reason and its message.
        attempts: number of ingests that opened it.
    """
    return {
        "corpus": name,
        "video_id": item.video_id,
        "uri": item.uri,
        "reason": problem.reason,
        "message": problem.message,
        "stage": "ingest",
        "attempts": attempts,
        "decoder": opened_with(item.uri, problem),
        "version": item.version,
    }
