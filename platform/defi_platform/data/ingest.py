"""From corpora to manifest: list what there is, open each file once in an isolated process, write the tables."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from tqdm import tqdm

from defi_platform import storage
from defi_platform.cluster import ray_session
from defi_platform.config import CorpusConfig, DataConfig, DecodeConfig, RayConfig
from defi_platform.data.decode import Probe, ProbeJob
from defi_platform.data.decoder_pool import DecoderPool
from defi_platform.data.manifest import QUARANTINE_SCHEMA, SCHEMA, Manifest, commit_corpus, read_corpus
from defi_platform.data.reasons import BadVideo
from defi_platform.data.sources import formats
from defi_platform.data.sources.rows import Claim, Refused
from defi_platform.data.split import assign
from defi_platform.errors import CorpusError

BLOCK_FILES = 16
"""Files that one probe task opens."""

PROBER_CPUS = 0.1
"""Logical CPUs of a probing actor: small, so that ingest never waits for trainers that hold the rest."""

Verdict = Probe | BadVideo


def ingest(config: DataConfig) -> Manifest:
    """Brings the manifest up to date with the corpora and opens it.

    Corpora whose files and settings are what they were at the last ingest are reused, unopened.

    Raises: CorpusError when a corpus is absent, empty, of no known format or without a usable video, and with
    `strict` at the first bad video.
    """
    if not config.corpora:
        raise CorpusError("data.corpora is empty. Name at least one corpus: data.corpora.NAME.path=FOLDER")
    reused = []
    for name, corpus in config.corpora.items():
        started = time.monotonic()
        fresh, counts = _ingest_corpus(name, corpus, config)
        if not fresh:
            reused.append(name)
        rejected = {k: n for k, n in counts.items() if k != "videos"}
        print(
            f"ingest: {name}: {counts['videos']} videos"
            + (f", rejected {rejected}" if rejected else "")
            + (f" in {time.monotonic() - started:.1f} s" if fresh else "; unchanged, manifest reused"),
            flush=True,
        )
        if not counts["videos"]:
            why = ", ".join(f"{n} {reason}" for reason, n in rejected.items())
            raise CorpusError(
                f"{corpus.path} (data.corpora.{name}) holds no usable video: {why}. "
                f"The quarantine table in {config.manifest} says why for each."
            )
    manifest = Manifest.open(config.manifest, list(config.corpora))
    manifest.reused = tuple(reused)
    return manifest


def _ingest_corpus(name: str, corpus: CorpusConfig, config: DataConfig) -> tuple[bool, dict[str, int]]:
    """Returns: whether anything had to be written, and the counts of the corpus."""
    format_name = formats.format_of(name, corpus)
    root = storage.absolute(corpus.path)
    claims: list[Claim] = []
    refused: list[Refused] = []
    for item in tqdm(
        formats.listing(format_name, root, corpus.fps), f"{name}: listing", unit=" videos", disable=None
    ):
        (claims if isinstance(item, Claim) else refused).append(item)
    if not claims and not refused:
        raise CorpusError(
            f"{corpus.path} (data.corpora.{name}.path) lists no video, read as {format_name}. "
            "Check the path, or set the format of this corpus."
        )
    settings = {
        "path": root,
        "format": format_name,
        "holdout": config.holdout,
        "fps": corpus.fps,
        "listing": _fingerprint(claims, refused),
    }
    before = read_corpus(config.manifest, name)
    if before is not None and before[2].settings == settings:
        _stop_if_strict(config, name, before[1].to_pylist())
        return False, before[2].counts
    known = _known_verdicts(before)
    verdicts = _verdicts(name, claims, known, config)
    rows, rejections = _rows(name, format_name, claims, verdicts)
    rejections += [_rejection(name, r, BadVideo(r.reason, r.message)) for r in refused]
    rejections.sort(key=lambda row: str(row["video_id"]))
    _stop_if_strict(config, name, rejections)
    rows.sort(key=lambda row: str(row["video_id"]))
    splits = assign([row["episode_id"] or row["video_id"] for row in rows], config.holdout)
    for row, split in zip(rows, splits, strict=True):
        row["split"] = row["split"] or split
    videos = pa.Table.from_pylist(rows, schema=SCHEMA)
    rejected = pa.Table.from_pylist(rejections, schema=QUARANTINE_SCHEMA)
    return True, commit_corpus(config.manifest, name, videos, rejected, settings).counts


def _fingerprint(claims: Sequence[Claim], refused: Sequence[Refused]) -> str:
    digest = hashlib.sha256()
    for item in sorted([repr(c) for c in claims] + [repr(r) for r in refused]):
        digest.update(item.encode())
    return digest.hexdigest()


def _stop_if_strict(config: DataConfig, name: str, rejections: list[dict[str, Any]]) -> None:
    if config.strict and rejections:
        first = rejections[0]
        raise CorpusError(
            f"{first['uri']} (corpus {name}, video {first['video_id']}) is bad: {first['reason']}, {first['message']}. "
            "Repair or remove it, or set data.strict=false to put bad videos into quarantine."
        )


# --------------------------------------------------------------------------- probing


def _known_verdicts(before: tuple[pa.Table, pa.Table, Any] | None) -> dict[tuple[str, str], Verdict]:
    """Verdicts of an earlier ingest by (uri, version), where one file is one video."""
    if before is None:
        return {}
    known: dict[tuple[str, str], Verdict] = {}
    for row in before[0].to_pylist():
        # A file that several episodes share has more frames than any row says, so it is opened again.
        if row["first_frame"] == 0 and row["source"] not in SHARED_FILES:
            known[row["uri"], row["version"]] = Probe(
                row["num_frames"], row["fps"], row["width"], row["height"], row["codec"], row["bytes"], 0,
                row["decoder"], row["variable_rate"],
            )  # fmt: skip
    for row in before[1].to_pylist():
        if row["version"] and row["reason"] not in ("storage", "timeout", "crash"):
            known[row["uri"], row["version"]] = BadVideo(row["reason"], row["message"])
    return known


SHARED_FILES = frozenset({"lerobot_v3"})
"""Formats in which one file holds several videos."""


def _verdicts(
    name: str, claims: Sequence[Claim], known: dict[tuple[str, str], Verdict], config: DataConfig
) -> dict[str, Verdict]:
    """Uri -> what its file is; files that were judged before in this version are not opened again."""
    versions = {claim.uri: claim.version for claim in claims}
    verdicts = {uri: known[uri, v] for uri, v in versions.items() if (uri, v) in known}
    todo = sorted(uri for uri in versions if uri not in verdicts)
    with tqdm(total=len(todo), desc=f"{name}: probing", unit=" files", disable=None) as progress:
        for uri, verdict in probe_files(todo, config.decode):
            verdicts[uri] = verdict
            progress.update()
    return verdicts


def probe_files(uris: Sequence[str], limits: DecodeConfig) -> Iterator[tuple[str, Verdict]]:
    """Opens files on Ray, in processes that can be killed; yields verdicts as they come."""
    if not uris:
        return
    blocks = [list(uris[i : i + BLOCK_FILES]) for i in range(0, len(uris), BLOCK_FILES)]
    with ray_session(RayConfig()):
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        actors = [_Prober.remote(limits) for _ in range(min(len(blocks), cpus))]  # type: ignore[attr-defined]
        pool = ray.util.ActorPool(actors)
        try:
            for verdicts in pool.map_unordered(lambda actor, block: actor.probe.remote(block), blocks):
                yield from verdicts
        finally:
            for actor in actors:
                ray.kill(actor)


@ray.remote(num_cpus=PROBER_CPUS, max_restarts=3, max_task_retries=3)
class _Prober:
    """Probes blocks of files in decoder processes of its own."""

    def __init__(self, limits: DecodeConfig) -> None:
        self._pool = DecoderPool(limits)

    def probe(self, uris: list[str]) -> list[tuple[str, Verdict]]:
        jobs = [ProbeJob(uri) for uri in uris]
        return list(zip(uris, self._pool.run(jobs), strict=True))  # type: ignore[arg-type]


# --------------------------------------------------------------------------- rows


def _rows(
    name: str, format_name: str, claims: Sequence[Claim], verdicts: dict[str, Verdict]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Manifest rows of the good videos and quarantine rows of the others."""
    rows, rejections = [], []
    for claim in claims:
        verdict = verdicts[claim.uri]
        problem = verdict if isinstance(verdict, BadVideo) else _broken_promise(claim, verdict)
        if problem is not None:
            rejections.append(_rejection(name, claim, problem))
            continue
        assert isinstance(verdict, Probe)
        rows.append(
            {
                "corpus": name,
                "video_id": claim.video_id,
                "uri": claim.uri,
                "camera": claim.camera,
                "text": claim.text,
                "split": claim.split,
                "num_frames": claim.num_frames or verdict.num_frames - claim.first_frame,
                "fps": claim.fps or verdict.fps,
                "width": verdict.width,
                "height": verdict.height,
                "codec": verdict.codec,
                "bytes": claim.bytes or verdict.bytes,
                "source": format_name,
                "episode_id": claim.episode_id,
                "num_actions": claim.num_actions,
                "first_frame": claim.first_frame,
                "decoder": verdict.decoder,
                "variable_rate": verdict.variable_rate and claim.fps is None,
                "signals_uri": claim.signals_uri,
                "version": claim.version,
            }
        )
    return rows, rejections


def _broken_promise(claim: Claim, probe: Probe) -> BadVideo | None:
    """What the source says against what the file holds: the guard against silent shortening."""
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


def _rejection(name: str, item: Claim | Refused, problem: BadVideo) -> dict[str, Any]:
    return {
        "corpus": name,
        "video_id": item.video_id,
        "uri": item.uri,
        "reason": problem.reason,
        "message": problem.message,
        "stage": "ingest",
        "attempts": 1,
        "decoder": "",
        "version": item.version,
    }
