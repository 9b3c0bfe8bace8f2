"""From sample numbers to a decoded micro-batch: the class that Ray Data's decode actors hold.

A bad video goes to quarantine and the plan's fallback stands in; every such skip is counted in the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from defi_platform.config import DataConfig
from defi_platform.data.decode import DecodeJob
from defi_platform.data.decoder_pool import DecoderPool
from defi_platform.data.episodes import SignalReader
from defi_platform.data.manifest import add_to_quarantine, read_quarantine
from defi_platform.data.plan import Plan, Sample
from defi_platform.data.reasons import BadVideo
from defi_platform.data.rules import ChunkRule
from defi_platform.errors import CorpusError

STAGE = "decode"

MOST_FALLBACKS = 100
"""Bad videos in a row for one sample after which the corpus, and not the video, is taken to be bad."""

PASSING = frozenset({"storage", "timeout", "crash"})
"""Reasons that may lie in the moment rather than in the file: such videos are tried again by the next process."""


@dataclass
class _Skips:
    """What one sample number had to pass over."""

    attempts: int = 0
    reasons: dict[int, str] = field(default_factory=dict)
    """Manifest row -> why it is bad; a stand-in may meet the same row again."""


class SampleDecoder:
    """Decodes the samples it is given by number.

    Args:
        data: frame size, limits, strictness.
    """

    def __init__(self, plan: Plan, data: DataConfig) -> None:
        self._plan = plan
        self._data = data
        limits = type(data.decode)(**{**data.decode.__dict__, "processes": 1})
        self._pool = DecoderPool(limits)
        self._pool.start()
        self._signals = SignalReader()
        self._bad = self._known_bad()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """{"start": (1,), "stop": (1,)}, a range of sample numbers -> columns of its micro-batch; see `dataset.stream`."""
        ks = np.arange(batch["start"][0], batch["stop"][0], dtype=np.int64)
        samples = self._plan.resolve_many(ks)
        frames = np.empty((len(samples), *self._frames_shape(samples[0])), np.uint8)
        skips = [_Skips() for _ in samples]
        todo = list(range(len(samples)))
        while todo:
            for i in todo:
                samples[i] = self._past_known_bad(samples[i], skips[i])
            todo = self._decode(samples, todo, frames)
        rows = np.array([sample.row for sample in samples])
        columns: dict[str, Any] = {
            "text": _texts(sample.text for sample in samples),
            "sample": ks,
            "video_id": _texts(self._plan.manifest.take("video_id", rows)),
            "corpus": _texts(sample.corpus for sample in samples),
            "skipped": _texts(",".join(skip.reasons.values()) for skip in skips),
        }
        if isinstance(self._plan.rule, ChunkRule):
            return columns | {"images": frames} | self._chunks(samples, self._plan.rule.chunk)
        return columns | {"frames": frames}

    # ----------------------------------------------------------------------- inside

    def _frames_shape(self, sample: Sample) -> tuple[int, ...]:
        # Chunks: one frame of every camera; clips and pairs: several frames of one.
        pictures = len(sample.rows) * len(sample.indices)
        return (pictures, self._data.height, self._data.width, 3)

    def _past_known_bad(self, sample: Sample, skips: _Skips) -> Sample:
        """`sample`, or the first of its stand-ins whose videos are not known to be bad."""
        while (bad := next((row for row in sample.rows if row in self._bad), None)) is not None:
            skips.reasons[bad] = self._bad[bad]
            skips.attempts += 1
            if skips.attempts > MOST_FALLBACKS:
                raise CorpusError(
                    f"corpus {sample.corpus}: {MOST_FALLBACKS} bad videos in a row, last for '{self._bad[bad]}'. "
                    f"The quarantine table in {self._plan.manifest.folder} lists them; check the corpus's storage."
                )
            sample = self._plan.fallback(sample.k, skips.attempts)
        return sample

    def _decode(self, samples: list[Sample], todo: list[int], frames: np.ndarray) -> list[int]:
        """Fills `frames` for the samples in `todo`; those with a bad video are returned."""
        jobs, rows, places, out = [], [], [], []
        for i in todo:
            step = len(samples[i].indices)
            for view, row in enumerate(samples[i].rows):
                jobs.append(self._job(row, samples[i].indices))
                rows.append(row)
                places.append(i)
                out.append(frames[i, view * step : (view + 1) * step])
        failed = set()
        for place, row, answer in zip(places, rows, self._pool.run(jobs, out), strict=True):
            if isinstance(answer, BadVideo):
                failed.add(place)
                if row not in self._bad:
                    self._reject(row, answer)
        return sorted(failed)

    def _job(self, row: int, indices: tuple[int, ...]) -> DecodeJob:
        video = self._plan.manifest.row(row)
        return DecodeJob(
            uri=video["uri"],
            indices=tuple(video["first_frame"] + index for index in indices),
            height=self._data.height,
            width=self._data.width,
            decoder=video["decoder"],
            source_height=video["height"],
            source_width=video["width"],
        )

    def _reject(self, row: int, problem: BadVideo) -> None:
        video = self._plan.manifest.row(row)
        if self._data.strict:
            raise CorpusError(
                f"{video['uri']} (corpus {video['corpus']}, video {video['video_id']}) is bad: {problem}. "
                "Repair or remove it, or set data.strict=false to put bad videos into quarantine."
            )
        self._bad[row] = problem.reason
        entry = {key: video[key] for key in ("corpus", "video_id", "uri", "decoder", "version")}
        entry |= {"reason": problem.reason, "message": problem.message, "attempts": 1}
        if self._plan.manifest.folder is not None:
            add_to_quarantine(self._plan.manifest.folder, [entry], STAGE)

    def _known_bad(self) -> dict[int, str]:
        """Manifest row -> reason, from what earlier decoders put into quarantine."""
        folder = self._plan.manifest.folder
        if folder is None:
            return {}
        rejected = {
            (entry["corpus"], entry["video_id"], entry["version"]): entry["reason"]
            for entry in read_quarantine(folder).to_pylist()
            if entry["stage"] == STAGE and entry["reason"] not in PASSING
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


def _texts(values: Iterable[str]) -> np.ndarray:
    return np.array(list(values), dtype=object)
