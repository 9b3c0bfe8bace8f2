"""What the sources claim against what the files are: rows of the manifest and of the quarantine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from defi_platform.config import CorpusConfig
from defi_platform.data.decode.messages import Probe
from defi_platform.data.ingest.probe_actors import opened_with
from defi_platform.data.ingest.probe_results import ProbeResult
from defi_platform.data.ingest.quality_filters import Scores, left_out, scores_of
from defi_platform.data.ingest.segmentation import seconds_of, spans
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sources.records import RejectedRecord, VideoRecord
from defi_platform.data.tables.arrow_spill import ROWS_AT_ONCE


@dataclass
class Rows:
    """Some rows of one corpus."""

    videos: list[dict[str, Any]] = field(default_factory=list)
    """By the columns of `manifest.SCHEMA`."""
    rejected: list[dict[str, Any]] = field(default_factory=list)
    """By the columns of `quarantine.QUARANTINE_SCHEMA`."""
    signatures: list[tuple[int, ...]] = field(default_factory=list)
    """Per video what it is compared with others by; empty where nobody asked for scores."""


@dataclass(frozen=True)
class _Window:
    """A part of a claimed video, or all of it."""

    video_id: str
    first: int
    """Frame within the video."""
    num_frames: int
    problem: BadVideo | None
    scores: Scores | None
    times: np.ndarray | None
    """Seconds of its frames from its first on, where the rate is variable."""


def rows_of(
    name: str,
    corpus: CorpusConfig,
    format_name: str,
    judged: Iterable[tuple[VideoRecord, ProbeResult]],
) -> Iterator[Rows]:
    """Yields manifest rows of the good videos and windows, and quarantine rows of the others, some at a time.

    Args:
        name: of the corpus.
        judged: claims with what their files are, in order of their ids: the first of near-duplicates stays.
    """
    rows = Rows()
    for claim, verdict in judged:
        problem = verdict.bad or _broken_promise(claim, verdict.answer)
        if problem is not None:
            rows.rejected.append(rejection(name, claim, problem, verdict.attempts))
            continue
        assert isinstance(verdict.answer, Probe)
        for window in _windows(corpus, claim, verdict.answer):
            if window.problem is not None:
                rows.rejected.append(
                    rejection(name, claim, window.problem, verdict.attempts) | {"video_id": window.video_id}
                )
                continue
            rows.videos.append(_video(name, format_name, claim, verdict.answer, window))
            rows.signatures.append(window.scores.signature if window.scores else ())
        if len(rows.videos) + len(rows.rejected) >= ROWS_AT_ONCE:
            yield rows
            rows = Rows()
    yield rows


def rejection(
    name: str, item: VideoRecord | RejectedRecord, problem: BadVideo, attempts: int
) -> dict[str, Any]:
    """The quarantine row of a video that ingest rejects."""
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


def _windows(corpus: CorpusConfig, claim: VideoRecord, probe: Probe) -> Iterator[_Window]:
    count = claim.num_frames or probe.num_frames - claim.first_frame
    fps = claim.fps or probe.fps
    times = np.arange(count) / fps if fps > 0 else np.zeros(count)
    variable = probe.variable_rate and claim.fps is None
    if variable:
        times = np.asarray(probe.times[claim.first_frame : claim.first_frame + count], np.float64)
    screening = probe.frame_scores
    changes = b"" if screening is None else screening.changes[claim.first_frame : claim.first_frame + count]
    # Actions are numbered from the episode's start, so an episode is not cut.
    whole = corpus.windows.mode == "none" or claim.num_actions > 0
    parts = [(0, count)] if whole else spans(corpus.windows, times, changes)
    for number, (first, stop) in enumerate(parts):
        scores = None
        if screening is not None:
            scores = scores_of(screening, claim.first_frame + first, claim.first_frame + stop)
        seconds = seconds_of(times, (first, stop))
        problem = left_out(corpus.filters, scores, seconds)
        if not whole and (seconds < corpus.windows.shortest_s or stop - first < 2):
            problem = BadVideo(
                "too_short", f"a window of {seconds:.2f} s, windows.shortest_s={corpus.windows.shortest_s:g}"
            )
        yield _Window(
            video_id=claim.video_id if whole else f"{claim.video_id}#w{number:04d}",
            first=first,
            num_frames=stop - first,
            problem=problem,
            scores=scores,
            times=times[first:stop] - times[first] if variable else None,
        )


def _video(name: str, format_name: str, claim: VideoRecord, probe: Probe, window: _Window) -> dict[str, Any]:
    scores = window.scores
    fps = claim.fps or probe.fps
    if window.times is not None and window.times[-1] > 0:
        fps = (window.num_frames - 1) / float(window.times[-1])
    return {
        "corpus": name,
        "video_id": window.video_id,
        "uri": claim.uri,
        "camera": claim.camera,
        "text": claim.text,
        "split": claim.split,
        "num_frames": window.num_frames,
        "fps": fps,
        "width": probe.width,
        "height": probe.height,
        "codec": probe.codec,
        "bytes": claim.bytes or probe.bytes,
        "source": format_name,
        # The windows of a video share its split.
        "episode_id": claim.episode_id or (claim.video_id if window.video_id != claim.video_id else ""),
        "num_actions": claim.num_actions,
        "first_frame": claim.first_frame + window.first,
        "decoder": probe.decoder,
        "variable_rate": window.times is not None,
        "signals_uri": claim.signals_uri,
        "version": claim.version,
        "times": None if window.times is None else window.times.astype(np.float32),
        "luma": scores.luma if scores else None,
        "motion": scores.motion if scores else None,
        "sharpness": scores.sharpness if scores else None,
    }


def _broken_promise(claim: VideoRecord, probe: Probe | BadVideo) -> BadVideo | None:
    """What the source says against what the file holds: the guard against silent shortening."""
    assert isinstance(probe, Probe)
    if claim.num_frames is not None:
        if claim.first_frame + claim.num_frames > probe.num_frames:
            return BadVideo(
                "short",
                f"the source puts frames {claim.first_frame} to {claim.first_frame + claim.num_frames - 1} "
                f"into a file of {probe.num_frames}",
            )
        if claim.num_frames < 2:
            return BadVideo("too_short", f"{claim.num_frames} frame")
    if claim.min_frames is not None and probe.num_frames < claim.min_frames:
        return BadVideo(
            "short", f"the annotation has {claim.min_frames} entries, the file {probe.num_frames} frames"
        )
    return None
