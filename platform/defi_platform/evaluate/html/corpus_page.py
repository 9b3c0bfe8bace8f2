"""The corpus page of jobs/inspect_corpus.py: mixture, pictures, statistics and rejected videos, in one HTML file.

Pictures are decoded in processes that can be killed, as in training: a damaged video costs its picture and no more.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from defi_platform import storage
from defi_platform.cluster import ray_session
from defi_platform.config import DataConfig, InspectConfig
from defi_platform.data.decode.messages import DecodeJob
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.loader.robot_signals import SignalReader
from defi_platform.data.manifest.commit_marker import corpus_file
from defi_platform.data.manifest.quarantine import read_quarantine
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.rejection import REASONS
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import ClipRule, PairRule, Rule
from defi_platform.data.tables.signal_file import SignalFile
from defi_platform.errors import CorpusError
from defi_platform.evaluate.html import corpus_figures as figures
from defi_platform.evaluate.html.corpus_bytes import bytes_once
from defi_platform.evaluate.html.corpus_signals import SignalSection, signal_section, spread
from defi_platform.evaluate.html.page import Picture, Table, data_url, render

FILE = "corpora.html"
THUMBNAIL_HEIGHT = 84
GAP = 2
NO_PICTURE = frozenset(
    {"missing", "changed", "empty", "not_video", "lfs_pointer", "memory", "timeout", "crash", "storage"}
)
"""Reasons for which nobody tries to decode a thumbnail: there is nothing, or it would take the decoder down."""
EXAMPLES = 4
"""Quarantined videos shown per reason."""
MOST_KINDS = 8
"""Rows of a breakdown before the rest is summed up."""


Columns = Mapping[str, Sequence[Any]]
"""A manifest by column; each has one value per video."""


@dataclass(frozen=True)
class Mixture:
    """Configured and realised shares of the corpora under one sampling rule, or why there are none."""

    title: str
    error: str = ""
    bars: Markup | None = None
    shares: Table | None = None
    excluded: Table | None = None


@dataclass(frozen=True)
class CorpusSection:
    """One corpus: some of its videos and the statistics of all."""

    title: str
    videos: list[Picture]
    histograms: Markup
    breakdowns: list[Table]
    signals: list[SignalSection] = field(default_factory=list)
    """Actions and states, where it has any."""


@dataclass(frozen=True)
class Rejection:
    """The quarantined videos of one reason, the first few of them in detail."""

    reason: str
    videos: Table
    more: int
    pictures: list[Picture]


def inspect_corpora(config: InspectConfig) -> str:
    """Ingests what is new and writes the page.

    Returns:
        The page's path.

    Raises:
        UserError: the configuration or a corpus is not usable.
    """
    with ray_session(config.ray):
        manifest = ingest(config.data)
    path = storage.join(config.output, FILE)
    storage.write_text(path, _page(config, manifest))
    return path


def _page(config: InspectConfig, manifest: Manifest) -> str:
    columns = manifest.table.to_pydict()
    rows_of = {
        name: np.flatnonzero(np.array(columns["corpus"], dtype=object) == name) for name in manifest.names
    }
    rules: dict[str, Rule] = {
        "Clips (GFDM)": ClipRule.of(config.data),
        "Pairs (GIDM)": PairRule.of(config.data),
    }
    mixtures = [_mixture(title, config, manifest, rule) for title, rule in rules.items()]
    with DecoderPool(config.data.decode) as pool:
        corpora = [
            _corpus(
                name,
                columns,
                rows,
                _contact_sheet(config, manifest, pool, rows),
                _signals(manifest, columns, rows),
            )
            for name, rows in rows_of.items()
        ]
        rejected = _rejected_entries(config.data)
        rejections = [_rejection(reason, entries, pool) for reason, entries in rejected.items()]
    return render(
        "corpora.html.j2",
        lead=f"{len(manifest):,} usable videos in {len(manifest.names)} corpora; manifest in {config.data.manifest}.",
        overview=_overview(columns, rows_of),
        samples=config.samples,
        mixtures=mixtures,
        corpora=corpora,
        reasons=Table(
            ["reason", "videos", "what it means"],
            [[reason, f"{len(entries):,}", REASONS[reason]] for reason, entries in rejected.items()],
        ),
        rejections=rejections,
    )


# --------------------------------------------------------------------------- numbers


def _overview(columns: Columns, rows_of: Mapping[str, NDArray[np.intp]]) -> Table:
    head = [
        "corpus",
        "format",
        "videos",
        "train",
        "validation",
        "hours",
        "frames",
        "size",
        "with text",
        "with actions",
    ]
    rows = []
    for name, rows_here in rows_of.items():
        of = {key: [values[row] for row in rows_here] for key, values in columns.items()}
        splits, frames = Counter(of["split"]), sum(of["num_frames"])
        rows.append(
            [
                name,
                ", ".join(sorted(set(of["source"]))),
                f"{len(rows_here):,}",
                f"{splits['train']:,}",
                f"{splits['validation']:,}",
                f"{_seconds(columns, rows_here).sum() / 3600:.2f}",
                f"{frames:,}",
                f"{bytes_once(of['uri'], of['bytes']) / 1e6:,.1f} MB",
                f"{100 * np.mean([bool(text) for text in of['text']]):.0f} %",
                f"{100 * np.mean([count > 0 for count in of['num_actions']]):.0f} %",
            ]
        )
    return Table(head, rows)


def _corpus(
    name: str, columns: Columns, rows: NDArray[np.intp], videos: list[Picture], signals: list[SignalSection]
) -> CorpusSection:
    texts = [columns["text"][row] or "" for row in rows]
    spread = {
        "length in seconds": _seconds(columns, rows),
        "frames per second": np.array([columns["fps"][row] for row in rows]),
        "words of the text": np.array([len(text.split()) for text in texts]),
    }
    kinds = {
        "codec": [columns["codec"][row] for row in rows],
        "resolution": [f"{columns['width'][row]} x {columns['height'][row]}" for row in rows],
        "camera": [columns["camera"][row] or "(one)" for row in rows],
        "text": [text or "(none)" for text in texts],
    }
    return CorpusSection(
        title=f"Corpus {name}",
        videos=videos,
        histograms=figures.histograms(spread),
        breakdowns=[_breakdown(kind, values) for kind, values in kinds.items()],
        signals=signals,
    )


def _signals(manifest: Manifest, columns: Columns, rows: NDArray[np.intp]) -> list[SignalSection]:
    """Actions and states of a corpus, of each episode once."""
    episodes = {columns["episode_id"][row]: int(row) for row in rows if columns["num_actions"][row] > 0}
    if not episodes:
        return []
    row_of = list(episodes.values())
    reader = SignalReader()
    looked = [reader.of_row(manifest, row_of[i]) for i in spread([columns["num_actions"][r] for r in row_of])]
    first = manifest.row(row_of[0])
    assert manifest.folder is not None
    names = SignalFile(corpus_file(manifest.folder, first["corpus"], first["signals"])).layout
    sections = [signal_section("Actions", [one.actions for one in looked], names.action_names, len(row_of))]
    states = [one.proprio for one in looked if one.proprio is not None]
    if states:
        sections.append(signal_section("States", states, names.state_names, len(row_of)))
    return sections


def _breakdown(name: str, values: Sequence[str]) -> Table:
    counts = Counter(values)
    rows = [[value, f"{count:,}"] for value, count in counts.most_common(MOST_KINDS)]
    rest = len(counts) - len(rows)
    if rest:
        shown = sum(count for _, count in counts.most_common(MOST_KINDS))
        rows.append([f"{rest:,} others", f"{len(values) - shown:,}"])
    return Table([name, "videos"], rows)


def _seconds(columns: Columns, rows: NDArray[np.intp]) -> NDArray[np.float64]:
    frames = np.array([columns["num_frames"][row] for row in rows], np.float64)
    fps = np.array([columns["fps"][row] for row in rows], np.float64)
    seconds: NDArray[np.float64] = np.divide(frames, fps, out=np.zeros_like(frames), where=fps > 0)
    return seconds


# --------------------------------------------------------------------------- mixture


def _mixture(title: str, config: InspectConfig, manifest: Manifest, rule: Rule) -> Mixture:
    try:
        plan = Plan.of(manifest, config.data, rule, config.seed)
    except CorpusError as error:
        return Mixture(title, error=str(error))
    rows, _ = plan.locate(np.arange(config.samples))
    drawn = Counter(manifest.take("corpus", rows[:, 0]))
    different = Counter(manifest.take("corpus", np.unique(rows[:, 0])))
    total = sum(plan.weights.values())
    names = [name for name, weight in plan.weights.items() if weight > 0]
    wanted = [plan.weights[name] / total for name in names]
    realised = [drawn[name] / config.samples for name in names]
    return Mixture(
        title,
        bars=figures.mixture_bars(names, wanted, realised),
        shares=Table(
            ["corpus", "asked for", "realised", "videos drawn", "times each"],
            [
                [
                    name,
                    f"{100 * w:.2f} %",
                    f"{100 * r:.2f} %",
                    f"{different[name]:,}",
                    f"{drawn[name] / max(1, different[name]):.1f}",
                ]
                for name, w, r in zip(names, wanted, realised, strict=True)
            ],
        ),
        excluded=Table(["left out", "videos"], [[why, f"{count:,}"] for why, count in plan.excluded.items()])
        if plan.excluded
        else None,
    )


# --------------------------------------------------------------------------- pictures


def _contact_sheet(
    config: InspectConfig, manifest: Manifest, pool: DecoderPool, rows: NDArray[np.intp]
) -> list[Picture]:
    """Some videos, evenly spread over the corpus, each as a strip of frames."""
    count = min(config.videos_per_corpus, len(rows))
    chosen = [int(rows[i]) for i in np.linspace(0, len(rows) - 1, count).round().astype(int)]
    videos = [manifest.row(row) for row in chosen]
    decoded = pool.run([_strip_job(video, config.frames_per_video) for video in videos])
    strips = []
    for video, frames in zip(videos, decoded, strict=True):
        size = f"{video['width']} x {video['height']}, {video['fps']:.4g} fps, {video['codec']}"
        caption = (
            f"{video['text'] or '(no text)'} · {video['video_id']} · {video['num_frames']} frames, {size}"
        )
        if isinstance(frames, np.ndarray):
            alt = f"{len(frames)} frames of video {video['video_id']}: {video['text'] or 'no text'}"
            strips.append(Picture(caption, alt, _jpeg_url(_side_by_side(frames))))
        else:
            strips.append(Picture(caption, f"No picture: {frames}"))
    return strips


def _strip_job(video: Mapping[str, Any], frames: int) -> DecodeJob:
    width = max(8, round(THUMBNAIL_HEIGHT * video["width"] / max(1, video["height"])))
    offsets = np.linspace(0, video["num_frames"] - 1, frames).round().astype(int)
    indices = tuple(int(video["first_frame"] + offset) for offset in offsets)
    return DecodeJob(
        video["uri"],
        indices,
        THUMBNAIL_HEIGHT,
        width,
        video["height"],
        video["width"],
        video["seek_index"],
        video["version"],
    )


def _rejected_entries(data: DataConfig) -> dict[str, list[dict[str, Any]]]:
    """The quarantine of the configured corpora: reason -> videos, the most frequent reason first."""
    entries = [
        entry for entry in read_quarantine(data.manifest).to_pylist() if entry["corpus"] in data.corpora
    ]
    different = {(e["corpus"], e["video_id"], e["reason"]): e for e in entries}
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for entry in different.values():
        by_reason.setdefault(entry["reason"], []).append(entry)
    return dict(sorted(by_reason.items(), key=lambda item: -len(item[1])))


def _rejection(reason: str, entries: Sequence[Mapping[str, Any]], pool: DecoderPool) -> Rejection:
    shown = entries[:EXAMPLES]
    return Rejection(
        reason,
        videos=Table(
            ["corpus", "video", "stage", "message"],
            [[e["corpus"], e["video_id"], e["stage"], e["message"]] for e in shown],
        ),
        more=len(entries) - len(shown),
        pictures=[] if reason in NO_PICTURE else list(_thumbnails(shown, pool)),
    )


def _thumbnails(entries: Sequence[Mapping[str, Any]], pool: DecoderPool) -> Iterable[Picture]:
    """The first frame of each entry where it decodes."""
    jobs = [DecodeJob(entry["uri"], (0,), 2 * THUMBNAIL_HEIGHT, 3 * THUMBNAIL_HEIGHT) for entry in entries]
    for entry, frames in zip(entries, pool.run(jobs), strict=True):
        if isinstance(frames, np.ndarray):
            alt = f"first frame of the rejected video {entry['video_id']}"
            yield Picture(entry["video_id"], alt, _jpeg_url(frames[0]))


def _side_by_side(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(T, H, W, 3) -> (H, T * (W + GAP) - GAP, 3), white between the frames."""
    gap = np.full((frames.shape[1], GAP, 3), 255, np.uint8)
    parts = [part for frame in frames for part in (frame, gap)]
    return np.concatenate(parts[:-1], axis=1)


def _jpeg_url(image: NDArray[np.uint8]) -> str:
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="JPEG", quality=85)
    return data_url(content.getvalue(), "image/jpeg")
