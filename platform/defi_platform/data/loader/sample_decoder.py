"""Decoder of samples: a range of sample numbers becomes a micro-batch. Ray Data's decode actors hold one each.

A bad video goes to quarantine and the plan's fallback stands in; every such skip is counted in the batch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from defi_platform import logs
from defi_platform.config import DataConfig
from defi_platform.data.decode.messages import DecodeJob
from defi_platform.data.decode.pool import Answer, DecoderPool
from defi_platform.data.latents.cache import CacheLocation, LatentCache
from defi_platform.data.loader.robot_signals import SignalReader
from defi_platform.data.manifest.quarantine import add_to_quarantine, read_quarantine, strict_error
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.rejection import TRANSIENT_REASON, BadVideo
from defi_platform.data.sampling.plan import Plan, Sample
from defi_platform.data.sampling.samplers import ChunkRule
from defi_platform.errors import CorpusError
from defi_platform.metrics import catalogue
from defi_platform.retry import RetryPolicy
from defi_platform.storage.outage import retry_storage

STAGE = "decode"
TIMEOUT_KEY = "data.decode.storage_patience_s"
"""Config key of the time to wait for a store, for messages."""

Result = TypeVar("Result")

MAX_FALLBACKS = 100
"""Bad videos in a row for one sample after which the corpus, and not the video, is taken to be bad."""

MAX_UNREADABLE_VIDEOS = 3
"""Videos that cannot be read from the store, and none read meanwhile, after which the store counts as unavailable and
is waited for as long as the config says: to continue would fill the quarantine and train on whatever is left."""

SINGLE_VIDEO_TIMEOUT_S = 120.0
"""Time to wait for fewer, where the files may be to blame; after it stand-ins replace them."""

RETRIED_REASONS = frozenset({TRANSIENT_REASON, "timeout", "memory", "crash", "changed"})
"""Reasons that need not lie in the file, or that another limit or the file itself, put back, may mend: such videos are
tried again by the next process."""


@dataclass
class _Skips:
    """Bad videos that stand-ins replaced, for one sample number."""

    attempts: int = 0
    reasons: dict[int, str] = field(default_factory=dict)
    """Manifest row -> why it is bad; a stand-in may meet the same row again."""


class SampleDecoder:
    """Decodes the samples it is given by number.

    Args:
        plan: of the samples.
        data: frame size, limits, strictness; it starts `decode.processes` decoder processes.
        cache: where encoded frames are; a micro-batch whose videos are all there is read instead of decoded.
        run: folder of the run that the samples are counted for in metrics; None: they are not.
    """

    def __init__(
        self, plan: Plan, data: DataConfig, cache: CacheLocation | None = None, run: str | None = None
    ) -> None:
        self._plan = plan
        self._data = data
        self._run = run
        self._pool = DecoderPool(data.decode)
        self._cache = LatentCache(cache, plan.manifest) if cache else None
        if self._cache is None:
            self._pool.start()
        self._signals = SignalReader(plan.states)
        self._bad = self._known_bad()
        self._unreadable: set[int] = set()
        """Manifest rows that could not be read from the store since one last could."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Decodes the micro-batch of a range of sample numbers.

        Args:
            batch: {"start": (1,), "stop": (1,)}, the range.

        Returns: the columns that `stream.stream` describes, as numpy arrays.
        """
        began = time.perf_counter()
        columns = self._micro_batch(batch)
        if self._run is not None:
            catalogue.DATA_BATCH_SECONDS.observe(time.perf_counter() - began, run=self._run)
            _count(columns, self._run)
        return columns

    def _micro_batch(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        ks = np.arange(batch["start"][0], batch["stop"][0], dtype=np.int64)
        samples = self._plan.resolve_many(ks)
        skips = [_Skips() for _ in samples]
        todo = list(range(len(samples)))
        if self._cache is not None:
            samples = [self._past_known_bad(s, skip) for s, skip in zip(samples, skips, strict=True)]
            if self._cache.holds(np.array([sample.row for sample in samples])).all():
                cache = self._cache
                encoded = self._retry(
                    lambda: np.stack([cache.read(s.row, s.indices) for s in samples]), "the latent cache"
                )
                return self._columns(ks, samples, skips) | {cache.location.info.column: encoded}
        frames = np.empty((len(samples), *self._frames_shape(samples[0])), np.uint8)
        while todo:
            for i in todo:
                samples[i] = self._past_known_bad(samples[i], skips[i])
            todo = self._decode(samples, todo, frames)
        columns = self._columns(ks, samples, skips)
        if isinstance(self._plan.rule, ChunkRule):
            chunk = self._plan.rule.chunk
            chunks = self._retry(lambda: self._chunks(samples, chunk), "the table of actions")
            return columns | {"images": frames} | chunks
        return columns | {"frames": frames}

    def close(self) -> None:
        """Ends the decoder processes."""
        self._pool.close()

    # ----------------------------------------------------------------------- inside

    def _retry(self, request: Callable[[], Result], path: str) -> Result:
        timeout_s = self._data.decode.storage_patience_s
        return retry_storage(request, path, name="data", timeout_s=timeout_s, timeout_key=TIMEOUT_KEY)

    def _columns(self, ks: np.ndarray, samples: list[Sample], skips: list[_Skips]) -> dict[str, Any]:
        """Columns of a micro-batch that are not its frames."""
        rows = np.array([sample.row for sample in samples])
        return {
            "text": _texts(sample.text for sample in samples),
            "sample": ks,
            "video_id": _texts(self._plan.manifest.take("video_id", rows)),
            "corpus": _texts(sample.corpus for sample in samples),
            "skipped": _texts(",".join(skip.reasons.values()) for skip in skips),
        }

    def _frames_shape(self, sample: Sample) -> tuple[int, ...]:
        # Chunks: one frame of every camera; clips and pairs: several frames of one.
        pictures = len(sample.rows) * len(sample.indices)
        return (pictures, self._data.height, self._data.width, 3)

    def _past_known_bad(self, sample: Sample, skips: _Skips) -> Sample:
        """`sample`, or the first of its stand-ins whose videos are not known to be bad."""
        while (bad := next((row for row in sample.rows if row in self._bad), None)) is not None:
            skips.reasons[bad] = self._bad[bad]
            skips.attempts += 1
            if skips.attempts > MAX_FALLBACKS:
                raise CorpusError(
                    f"corpus {sample.corpus}: {MAX_FALLBACKS} bad videos in a row, last for '{self._bad[bad]}'. "
                    f"The quarantine table in {self._plan.manifest.folder} lists them; check the corpus's storage."
                )
            sample = self._plan.fallback(sample.k, skips.attempts)
        return sample

    def _decode(self, samples: list[Sample], todo: list[int], frames: np.ndarray) -> list[int]:
        """Fills `frames` for the samples in `todo`; those with a bad video are returned."""
        jobs, rows, sample_of_job, out = [], [], [], []
        for i in todo:
            step = len(samples[i].indices)
            for view, row in enumerate(samples[i].rows):
                jobs.append(decode_job(self._plan.manifest, self._data, row, samples[i].indices))
                rows.append(row)
                sample_of_job.append(i)
                out.append(frames[i, view * step : (view + 1) * step])
        failed = set()
        for index, row, answer in zip(sample_of_job, rows, self._answers(jobs, rows, out), strict=True):
            if isinstance(answer, BadVideo):
                failed.add(index)
                self._log_bad(samples[index], row, answer)
                if row not in self._bad:
                    self._reject(row, answer)
        return sorted(failed)

    def _answers(self, jobs: list[DecodeJob], rows: list[int], out: list[np.ndarray]) -> list[Answer]:
        """Answers of the jobs; an unavailable store is waited for, so that no sample changes by it.

        Raises: CorpusError when it stays unavailable.
        """
        answers: list[Answer] = [BadVideo(TRANSIENT_REASON, "not asked yet")] * len(jobs)
        pending = list(range(len(jobs)))
        failures, outage_began = 0, 0.0
        while True:
            asked = len(pending)
            retried = self._pool.run([jobs[i] for i in pending], [out[i] for i in pending])
            for i, answer in zip(pending, retried, strict=True):
                answers[i] = answer
            pending = [i for i in pending if _is_unreadable(answers[i])]
            if len(pending) < asked:
                self._unreadable.clear()
            if not pending:
                return answers
            self._unreadable.update(rows[i] for i in pending)
            store_unavailable = len(self._unreadable) >= MAX_UNREADABLE_VIDEOS
            timeout_s = self._data.decode.storage_patience_s
            if not store_unavailable:
                timeout_s = min(timeout_s, SINGLE_VIDEO_TIMEOUT_S)
            row, problem = self._plan.manifest.row(rows[pending[0]]), answers[pending[0]]
            assert isinstance(problem, BadVideo)
            message = f"corpus {row['corpus']}: the store does not give {row['uri']}: {problem.message}"
            if not failures:
                outage_began = time.monotonic()
                logs.say(
                    f"{message}. It is tried again for {timeout_s:g} s.",
                    run=self._run,
                    corpus=row["corpus"],
                    video_id=row["video_id"],
                )
            failures += 1
            policy = RetryPolicy(timeout_s=timeout_s, first_pause_s=0.5)
            pause_s = policy.pause_s(failures, time.monotonic() - outage_began)
            if pause_s is None:
                if not store_unavailable:
                    return answers
                raise CorpusError(
                    f"{message}. It gave none of {len(self._unreadable)} videos in {timeout_s:g} s ({TIMEOUT_KEY}); "
                    "when it answers again, the same command goes on from the last checkpoint."
                )
            time.sleep(pause_s)
            if self._run is not None:
                catalogue.DATA_STORE_WAIT.add(pause_s, run=self._run)

    def _log_bad(self, sample: Sample, row: int, problem: BadVideo) -> None:
        video_id = self._plan.manifest.row(row)["video_id"]
        logs.detail(
            f"sample {sample.k}: {video_id} is bad, another video stands in: {problem}",
            run=self._run,
            corpus=sample.corpus,
            sample=sample.k,
            video_id=video_id,
            reason=problem.reason,
        )

    def _reject(self, row: int, problem: BadVideo) -> None:
        video = self._plan.manifest.row(row)
        entry = quarantine_entry(video, problem)
        if self._data.strict:
            raise strict_error(entry)
        self._bad[row] = problem.reason
        folder = self._plan.manifest.folder
        if folder is not None:
            self._retry(lambda: add_to_quarantine(folder, [entry], STAGE), "the quarantine table")

    def _known_bad(self) -> dict[int, str]:
        """Manifest row -> reason, from what earlier decoders put into quarantine."""
        folder = self._plan.manifest.folder
        if folder is None:
            return {}
        rejected = {
            (entry["corpus"], entry["video_id"], entry["version"]): entry["reason"]
            for entry in read_quarantine(folder).to_pylist()
            if entry["stage"] == STAGE and entry["reason"] not in RETRIED_REASONS
        }
        return self._plan.manifest.find(rejected) if rejected else {}

    def _chunks(self, samples: list[Sample], chunk: int) -> dict[str, np.ndarray]:
        """Actions (B, chunk, A), their mask (B, chunk) and the proprioception at frame t (B, P)."""
        actions, masks, proprio = [], [], []
        for sample in samples:
            signals = self._signals.of_row(self._plan.manifest, sample.row)
            start = sample.indices[0]
            taken = signals.actions[start : start + chunk]
            # The last action is held past the end; the mask keeps it out of the loss.
            missing = chunk - len(taken)
            actions.append(np.concatenate([taken, np.repeat(taken[-1:], missing, axis=0)]))
            masks.append(np.arange(chunk) < len(taken))
            if signals.proprio is not None:
                proprio.append(signals.proprio[start])
        columns = {"actions": np.stack(actions), "action_mask": np.stack(masks)}
        return columns | ({"proprio": np.stack(proprio)} if proprio else {})


def _count(columns: dict[str, Any], run: str) -> None:
    """Counts the samples of a micro-batch in the metrics of a run."""
    for corpus, number in Counter(columns["corpus"]).items():
        catalogue.DATA_SAMPLES.add(number, run=run, corpus=corpus)
    if not columns.keys() & {"frames", "images"}:
        catalogue.DATA_CACHED_SAMPLES.add(len(columns["sample"]), run=run)
    for corpus, reasons in zip(columns["corpus"], columns["skipped"], strict=True):
        for reason in filter(None, reasons.split(",")):
            catalogue.DATA_SKIPPED_VIDEOS.add(run=run, corpus=corpus, reason=reason)


def decode_job(manifest: Manifest, data: DataConfig, row: int, indices: Iterable[int]) -> DecodeJob:
    """Builds the decode job for frames of a manifest row.

    Args:
        manifest: of the corpora.
        data: height and width of the frames.
        row: of the manifest.
        indices: frame numbers, counted from the video's own start.
    """
    video = manifest.row(row)
    return DecodeJob(
        uri=video["uri"],
        indices=tuple(video["first_frame"] + index for index in indices),
        height=data.height,
        width=data.width,
        source_height=video["height"],
        source_width=video["width"],
        seek_index=video["seek_index"],
        version=video["version"],
    )


def quarantine_entry(video: dict[str, Any], problem: BadVideo) -> dict[str, Any]:
    """Builds the quarantine row of a manifest row that turned out bad."""
    entry = {key: video[key] for key in ("corpus", "video_id", "uri", "decoder", "version")}
    return entry | {"reason": problem.reason, "message": problem.message, "attempts": 1}


def _is_unreadable(answer: Answer) -> bool:
    return isinstance(answer, BadVideo) and answer.reason == TRANSIENT_REASON


def _texts(values: Iterable[str]) -> np.ndarray:
    return np.array(list(values), dtype=object)
