"""jobs/inspect_corpus.py: what the corpora look like, on one self-contained HTML page.

Pictures are decoded in processes that can be killed, as in training: a damaged video costs its picture and no more.
"""

from __future__ import annotations

import html
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from defi_platform import storage
from defi_platform.cluster import ray_session
from defi_platform.config import DataConfig, InspectConfig
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.decode.video_readers import DecodeJob
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.manifest.quarantine import read_quarantine
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.rejection import REASONS
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import ClipRule, PairRule, Rule
from defi_platform.errors import CorpusError
from defi_platform.evaluate.html import corpus_figures as figures
from defi_platform.evaluate.html.page import document, figure, picture, section, table

FILE = "corpora.html"
THUMBNAIL_HEIGHT = 84
GAP = 2
NO_PICTURE = frozenset(
    {"missing", "empty", "not_video", "lfs_pointer", "memory", "timeout", "crash", "storage"}
)
"""Reasons for which nobody tries to decode a thumbnail: there is nothing, or it would take the decoder down."""
EXAMPLES = 4
"""Quarantined videos shown per reason."""
MOST_KINDS = 8
"""Rows of a breakdown before the rest is summed up."""


def inspect_corpora(config: InspectConfig) -> str:
    """Ingests what is new and writes the page. Returns: its path. Raises: UserError."""
    with ray_session(config.ray):
        manifest = ingest(config.data)
    parts = list(_sections(config, manifest))
    lead = f"{len(manifest):,} usable videos in {len(manifest.names)} corpora; manifest in {config.data.manifest}."
    path = storage.join(config.output, FILE)
    storage.write_text(path, document("Corpora", "What the corpora hold", parts, lead, contents=True))
    return path


def _sections(config: InspectConfig, manifest: Manifest) -> Iterator[str]:
    columns = manifest.table.to_pydict()
    rows_of = {
        name: np.flatnonzero(np.array(columns["corpus"], dtype=object) == name) for name in manifest.names
    }
    yield section("Overview", _overview(columns, rows_of))
    yield section(
        "Mixture",
        _mixture(config, manifest),
        f"What the first {config.samples:,} samples of a training would be, counted from the plan itself.",
    )
    with DecoderPool(config.data.decode) as pool:
        for name, rows in rows_of.items():
            sheet = _contact_sheet(config, manifest, pool, rows)
            yield section(f"Corpus {name}", sheet + _statistics(columns, rows))
        yield section(
            "Quarantine", _quarantine(config.data, pool), "Videos that no training reads, by the reason why."
        )


# --------------------------------------------------------------------------- numbers


def _overview(columns: dict[str, list[Any]], rows_of: dict[str, np.ndarray]) -> str:
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
                f"{sum(of['bytes']) / 1e6:,.1f} MB",
                f"{100 * np.mean([bool(text) for text in of['text']]):.0f} %",
                f"{100 * np.mean([count > 0 for count in of['num_actions']]):.0f} %",
            ]
        )
    return table(head, rows)


def _statistics(columns: dict[str, list[Any]], rows: np.ndarray) -> str:
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
    breakdown = "".join(f"<div>{_counts(name, values)}</div>" for name, values in kinds.items())
    return (
        "<h3>Statistics</h3>"
        + figures.histograms(spread)
        + f'<div class="grid" style="grid-template-columns: repeat(auto-fit, minmax(210px, 1fr))">{breakdown}</div>'
    )


def _counts(name: str, values: Sequence[str]) -> str:
    counts = Counter(values)
    rows = [[value, f"{count:,}"] for value, count in counts.most_common(MOST_KINDS)]
    rest = len(counts) - len(rows)
    if rest:
        rows.append(
            [f"{rest:,} others", f"{len(values) - sum(c for _, c in counts.most_common(MOST_KINDS)):,}"]
        )
    return table([name, "videos"], rows)


def _seconds(columns: dict[str, list[Any]], rows: np.ndarray) -> np.ndarray:
    frames = np.array([columns["num_frames"][row] for row in rows], float)
    fps = np.array([columns["fps"][row] for row in rows], float)
    return np.divide(frames, fps, out=np.zeros_like(frames), where=fps > 0)


# --------------------------------------------------------------------------- mixture


def _mixture(config: InspectConfig, manifest: Manifest) -> str:
    data = config.data
    rules: dict[str, Rule] = {
        "Clips (GFDM)": ClipRule(data.clip_frames, data.clip_span_s),
        "Pairs (GIDM)": PairRule(data.pair_interval_s),
    }
    return "".join(f"<h3>{title}</h3>{_mixture_of(config, manifest, rule)}" for title, rule in rules.items())


def _mixture_of(config: InspectConfig, manifest: Manifest, rule: Rule) -> str:
    try:
        plan = Plan.of(manifest, config.data, rule, config.seed)
    except CorpusError as error:
        return f"<p>No plan: {html.escape(str(error))}</p>"
    rows, _ = plan.locate(np.arange(config.samples))
    drawn = manifest.take("corpus", rows[:, 0])
    counts, different = Counter(drawn), Counter(manifest.take("corpus", np.unique(rows[:, 0])))
    total = sum(plan.weights.values())
    names = [name for name, weight in plan.weights.items() if weight > 0]
    wanted = [plan.weights[name] / total for name in names]
    realised = [counts[name] / config.samples for name in names]
    body = figures.mixture_bars(names, wanted, realised) + table(
        ["corpus", "asked for", "realised", "videos drawn", "times each"],
        [
            [
                name,
                f"{100 * w:.2f} %",
                f"{100 * r:.2f} %",
                f"{different[name]:,}",
                f"{counts[name] / max(1, different[name]):.1f}",
            ]
            for name, w, r in zip(names, wanted, realised, strict=True)
        ],
    )
    if plan.excluded:
        body += table(["left out", "videos"], [[why, f"{count:,}"] for why, count in plan.excluded.items()])
    return body


# --------------------------------------------------------------------------- pictures


def _contact_sheet(config: InspectConfig, manifest: Manifest, pool: DecoderPool, rows: np.ndarray) -> str:
    """Some videos, evenly spread over the corpus, in a strip of frames each."""
    count = min(config.videos_per_corpus, len(rows))
    chosen = [int(rows[i]) for i in np.linspace(0, len(rows) - 1, count).round().astype(int)]
    videos = [manifest.row(row) for row in chosen]
    strips = []
    for video, frames in zip(
        videos, pool.run([_strip_job(v, config.frames_per_video) for v in videos]), strict=True
    ):
        size = f"{video['width']} x {video['height']}, {video['fps']:.4g} fps, {video['codec']}"
        caption = (
            f"{video['text'] or '(no text)'} · {video['video_id']} · {video['num_frames']} frames, {size}"
        )
        if isinstance(frames, np.ndarray):
            alt = f"{len(frames)} frames of video {video['video_id']}: {video['text'] or 'no text'}"
            strips.append(figure(picture(_jpeg(_side_by_side(frames)), alt), caption))
        else:
            strips.append(figure(f"<p>No picture: {html.escape(str(frames))}</p>", caption))
    return f'<div class="sheet">{"".join(strips)}</div>'


def _strip_job(video: dict[str, Any], frames: int) -> DecodeJob:
    width = max(8, round(THUMBNAIL_HEIGHT * video["width"] / max(1, video["height"])))
    places = np.linspace(0, video["num_frames"] - 1, frames).round().astype(int)
    indices = tuple(int(video["first_frame"] + place) for place in places)
    return DecodeJob(
        video["uri"], indices, THUMBNAIL_HEIGHT, width, video["decoder"], video["height"], video["width"]
    )


def _quarantine(data: DataConfig, pool: DecoderPool) -> str:
    entries = [
        entry for entry in read_quarantine(data.manifest).to_pylist() if entry["corpus"] in data.corpora
    ]
    if not entries:
        return "<p>Nothing was rejected.</p>"
    different = {(e["corpus"], e["video_id"], e["reason"]): e for e in entries}
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for entry in different.values():
        by_reason.setdefault(entry["reason"], []).append(entry)
    ordered = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    body = table(
        ["reason", "videos", "what it means"],
        [[reason, f"{len(found):,}", REASONS[reason]] for reason, found in ordered],
    )
    for reason, found in ordered:
        shown = found[:EXAMPLES]
        thumbnails = _thumbnails(shown, pool) if reason not in NO_PICTURE else [""] * len(shown)
        rows = [[e["corpus"], e["video_id"], e["stage"], e["message"]] for e in shown]
        more = f", {len(found) - len(shown)} more" if len(found) > len(shown) else ""
        pictures = "".join(
            figure(image, entry["video_id"]) for image, entry in zip(thumbnails, shown, strict=True) if image
        )
        body += f"<h3>{html.escape(reason)} ({len(shown)} shown{more})</h3>"
        body += table(["corpus", "video", "stage", "message"], rows)
        body += f'<div class="thumbs">{pictures}</div>' if pictures else ""
    return body


def _thumbnails(entries: Sequence[dict[str, Any]], pool: DecoderPool) -> list[str]:
    """An image per entry, "" where its first frame does not decode."""
    jobs = [
        DecodeJob(entry["uri"], (0,), 2 * THUMBNAIL_HEIGHT, 3 * THUMBNAIL_HEIGHT, "pyav") for entry in entries
    ]
    return [
        picture(_jpeg(answer[0]), f"first frame of the rejected video {entry['video_id']}")
        if isinstance(answer, np.ndarray)
        else ""
        for entry, answer in zip(entries, pool.run(jobs), strict=True)
    ]


def _side_by_side(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) -> (H, T * (W + GAP) - GAP, 3), white between the frames."""
    gap = np.full((frames.shape[1], GAP, 3), 255, np.uint8)
    parts = [part for frame in frames for part in (frame, gap)]
    return np.concatenate(parts[:-1], axis=1)


def _jpeg(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="JPEG", quality=85)
    return content.getvalue()
