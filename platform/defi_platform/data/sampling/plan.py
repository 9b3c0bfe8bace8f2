"""The plan: video, frames and text of every sample number k. A pure function of (manifest, weights, rule, seed), with no state and no I/O.

Shuffling, mixing, sharding, resume and elastic world size are arithmetic on k. N samples, T frames, V cameras.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from defi_models.errors import did_you_mean
from defi_platform.config import DataConfig
from defi_platform.data.manifest.split import TRAIN, is_split, mask
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.sampling.mixture import Mixture
from defi_platform.data.sampling.samplers import ChunkRule, Rule
from defi_platform.data.sampling.shuffle import key_of, permuted, uniform
from defi_platform.data.sampling.views import view_order
from defi_platform.data.tables.mmap_table import MappedTable
from defi_platform.errors import CorpusError

BLOCK_ROWS = 1 << 20

ATTEMPT_SHIFT = 48
"""Fallback attempts draw from numbers beyond every k."""


@dataclass(frozen=True)
class Sample:
    """Sample number `k`: a video, frames of it and its text."""

    k: int
    corpus: str
    row: int
    """Row of the manifest; with several cameras, that of the first."""
    rows: tuple[int, ...]
    """Rows of all cameras (chunks); else just `row`."""
    indices: tuple[int, ...]
    """Frame numbers within the video."""
    text: str


@dataclass(frozen=True)
class _Stream:
    """Videos of one corpus (or of one camera of it) that are drawn from alike."""

    corpus: str
    weight: float
    rows: np.ndarray
    """int32 (units, V)"""
    ends: np.ndarray | None
    """int64 (units,): cumulated lengths where every frame is one sample (chunks)."""
    key: int

    @property
    def size(self) -> int:
        """Samples per epoch."""
        return len(self.rows) if self.ends is None else int(self.ends[-1])


class Plan:
    """Resolves sample numbers to videos, frames and texts.

    Args:
        manifest: the usable videos.
        weights: corpus -> share of the mixture; corpora that are not named or weigh 0 are not drawn.
        rule: how a sample is cut out of a video.
        seed: of the order.
        split: train | validation.
        cameras: corpus -> camera -> probability; for chunks, which cameras are the views, in this order.

    Raises: CorpusError when a named corpus has no video that the rule can use.
    """

    def __init__(
        self,
        manifest: Manifest,
        weights: Mapping[str, float],
        rule: Rule,
        seed: int,
        *,
        split: str = TRAIN,
        cameras: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        if not is_split(split):
            raise ValueError(f"there is no split '{split}'; it is train or validation")
        self.manifest = manifest
        self.weights = dict(weights)
        self.rule = rule
        self.seed = seed
        self.split = split
        self.cameras = {name: dict(chosen) for name, chosen in (cameras or {}).items()}
        self.excluded: dict[str, int] = {}
        """Why videos of the chosen corpora and split are not drawn -> how many."""
        self._variable = manifest.rows_where("variable_rate")
        self._streams = self._make_streams()
        self._sizes = np.array([s.size for s in self._streams], np.int64)
        self._keys = np.array([s.key for s in self._streams], np.uint64)
        self._draw_key = key_of("draw", seed)
        self._mixture = Mixture.of(np.array([s.weight for s in self._streams]))

    @classmethod
    def of(cls, manifest: Manifest, data: DataConfig, rule: Rule, seed: int, split: str = TRAIN) -> Plan:
        """Builds the plan that a data configuration asks for.

        Args:
            manifest: of the corpora in `data`.
            data: weights and cameras of the corpora.
            rule: how a sample is cut out of a video.
            seed: of the order.
            split: train | validation.
        """
        return cls(
            manifest,
            {name: corpus.weight for name, corpus in data.corpora.items()},
            rule,
            seed,
            split=split,
            cameras={name: corpus.cameras for name, corpus in data.corpora.items()},
        )

    @property
    def views(self) -> int:
        """Cameras per sample."""
        return int(self._streams[0].rows.shape[1])

    @property
    def cameras_of_views(self) -> tuple[str, ...]:
        """Names of the views' cameras in the configured order; of the first corpus that is drawn from."""
        return tuple(self.manifest.take("camera", self._streams[0].rows[0]))

    @property
    def num_videos(self) -> int:
        """Videos (or, for chunks, episodes) that are drawn from."""
        return sum(len(s.rows) for s in self._streams)

    def first_rows(self) -> np.ndarray:
        """int32: manifest row of every video (or, for chunks, of every episode's first camera) drawn from."""
        return np.concatenate([stream.rows[:, 0] for stream in self._streams])

    @property
    def samples_per_epoch(self) -> dict[str, int]:
        """Corpus -> samples until it repeats."""
        sizes: dict[str, int] = {}
        for stream in self._streams:
            sizes[stream.corpus] = sizes.get(stream.corpus, 0) + stream.size
        return sizes

    def fingerprint(self) -> str:
        """Hash that changes when any sample could: a checkpoint's k is only good for the plan it was counted in."""
        drawn = {name: weight for name, weight in sorted(self.weights.items()) if weight > 0}
        cameras = {name: self.cameras[name] for name in drawn if self.cameras.get(name)}
        parts = (self.manifest.fingerprint(drawn), drawn, cameras, self.rule, self.seed, self.split)
        return f"{key_of(*parts):016x}"

    def resolve(self, k: int) -> Sample:
        """Resolves sample number `k` (>= 0)."""
        return self.resolve_many([k])[0]

    def resolve_many(self, ks: Sequence[int] | np.ndarray) -> list[Sample]:
        """`resolve` of many numbers at once."""
        numbers = np.asarray(ks, np.int64)
        return self._samples(numbers, np.zeros(len(numbers), np.int64))

    def fallback(self, k: int, attempt: int) -> Sample:
        """Resolves the stand-in for sample `k` whose video is bad: the next one of the same corpus.

        Args:
            k: the sample number.
            attempt: 1 for the first stand-in, 2 when that is bad too, and so on.
        """
        return self._samples(np.array([k]), np.array([attempt]))[0]

    def locate(self, ks: np.ndarray, attempts: np.ndarray | int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Returns (rows (N, V), frame numbers (N, T)) of samples, both int64, without their texts."""
        ks = np.asarray(ks, np.int64)
        if ks.size and ks.min() < 0:
            raise ValueError(f"sample numbers start at 0; got {ks.min()}")
        attempts = np.broadcast_to(np.asarray(attempts, np.int64), ks.shape)
        stream, drawn = self._mixture.positions(ks)
        epoch, position = np.divmod(drawn + attempts, self._sizes[stream])
        draw = uniform(ks + (attempts << ATTEMPT_SHIFT), self._draw_key)
        rows = np.empty((len(ks), self.views), np.int64)
        for number, source in enumerate(self._streams):
            chosen = np.flatnonzero(stream == number)
            if not len(chosen):
                continue
            with np.errstate(over="ignore"):
                keys = self._keys[number] + epoch[chosen].astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
            unit = permuted(position[chosen], source.size, keys)
            if source.ends is not None:
                frame = unit
                unit = np.searchsorted(source.ends, frame, side="right")
                length = np.diff(source.ends, prepend=0)[unit]
                # Every frame is a sample, so the frame is not drawn but given by the permutation.
                frames = self.manifest.numbers_at("num_frames", source.rows[unit, 0])
                draw[chosen] = (frame - (source.ends[unit] - length) + 0.5) / frames
            rows[chosen] = source.rows[unit]
        first = rows[:, 0]
        num_frames = self.manifest.numbers_at("num_frames", first).astype(np.int64)
        indices = self.rule.indices(num_frames, self.manifest.numbers_at("fps", first), draw)
        if len(self._variable):
            self._follow_times(first, indices, draw)
        return rows, indices

    def __getstate__(self) -> dict[str, object]:
        return {
            "manifest": self.manifest,
            "weights": self.weights,
            "rule": self.rule,
            "seed": self.seed,
            "split": self.split,
            "cameras": self.cameras,
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    # ----------------------------------------------------------------------- inside

    def _follow_times(self, rows: np.ndarray, indices: np.ndarray, draw: np.ndarray) -> None:
        """Sets the frame numbers of videos of variable rate by the times of their frames."""
        nearest = np.minimum(np.searchsorted(self._variable, rows), len(self._variable) - 1)
        chosen = np.flatnonzero(self._variable[nearest] == rows)
        for sample, times in zip(chosen.tolist(), self.manifest.take("times", rows[chosen]), strict=True):
            indices[sample] = self.rule.at_times(np.asarray(times, np.float64), float(draw[sample]))

    def _samples(self, ks: np.ndarray, attempts: np.ndarray) -> list[Sample]:
        rows, indices = self.locate(ks, attempts)
        texts = self.manifest.take("text", rows[:, 0])
        stream, _ = self._mixture.positions(ks)
        corpora = [self._streams[number].corpus for number in stream.tolist()]
        return [
            Sample(k, corpus, views[0], tuple(views), tuple(frames), text)
            for k, corpus, views, frames, text in zip(
                ks.tolist(), corpora, rows.tolist(), indices.tolist(), texts, strict=True
            )
        ]

    def _make_streams(self) -> list[_Stream]:
        streams: list[_Stream] = []
        # By name: the order of a configuration's keys says nothing.
        for name, weight in sorted(self.weights.items()):
            if weight < 0:
                raise CorpusError(f"data.corpora.{name}.weight is {weight}; it must not be negative.")
            if weight == 0:
                continue
            if name not in self.manifest.names:
                raise CorpusError(
                    f"the manifest has no corpus '{name}'; there is: {', '.join(self.manifest.names)}. "
                    "Run the ingest again."
                )
            start, videos = self.manifest.corpus(name)
            usable = self._usable(name, videos)
            camera_codes, cameras = videos.codes("camera")
            chosen = {camera: p for camera, p in self.cameras.get(name, {}).items() if p > 0}
            present = [camera for code, camera in enumerate(cameras) if (camera_codes == code).any()]
            _check_cameras(name, chosen, present)
            if isinstance(self.rule, ChunkRule):
                views = list(chosen) or view_order(next(iter(videos.codes("source")[1]), ""), present)
                by_view = [usable & (camera_codes == cameras.index(view)) for view in views]
                found = [self._episodes(name, weight, start, videos, by_view, views)]
            elif chosen:
                total = sum(chosen.values())
                found = [
                    self._videos(
                        name,
                        weight * p / total,
                        start,
                        usable & (camera_codes == cameras.index(camera)),
                        camera,
                    )
                    for camera, p in chosen.items()
                ]
            else:
                found = [self._videos(name, weight, start, usable, "")]
            empty = [stream for stream in found if not len(stream.rows)]
            if empty and self.split == TRAIN:
                raise CorpusError(self._nothing_usable(name))
            if empty:
                self._exclude(f"{name}: no video of this split fits the rule", len(empty))
            streams += [stream for stream in found if len(stream.rows)]
        if not streams:
            raise CorpusError(self._nothing_usable(", ".join(self.weights)))
        if len({stream.rows.shape[1] for stream in streams}) > 1:
            views_of = ", ".join(f"{s.corpus}: {s.rows.shape[1]}" for s in streams)
            raise CorpusError(
                f"corpora differ in their number of cameras ({views_of}); set data.corpora.NAME.cameras."
            )
        return streams

    def _usable(self, name: str, videos: MappedTable) -> np.ndarray:
        """Marks the rows of a corpus, bool per row: of the split, and with frames (and actions) enough for the rule."""
        split_codes, splits = videos.codes("split")
        usable = mask(split_codes, splits, self.split)
        num_frames, fps = videos.numbers("num_frames"), videos.numbers("fps")
        too_short = 0
        for first in range(0, len(usable), BLOCK_ROWS):
            # In blocks, since temporaries of all rows would outweigh the plan.
            block = slice(first, first + BLOCK_ROWS)
            fits = num_frames[block] >= self.rule.min_frames(fps[block])
            too_short += int((usable[block] & ~fits).sum())
            usable[block] &= fits
        self._exclude(f"{name}: too short for {self.rule.field}", too_short)
        if isinstance(self.rule, ChunkRule):
            has_actions = videos.numbers("num_actions") > 0
            self._exclude(f"{name}: no actions", int((usable & ~has_actions).sum()))
            usable &= has_actions
        return usable

    def _videos(self, name: str, weight: float, start: int, usable: np.ndarray, camera: str) -> _Stream:
        rows = np.flatnonzero(usable).astype(np.int32)[:, None] + np.int32(start)
        return _Stream(name, weight, rows, None, key_of("order", self.seed, name, camera, self.split))

    def _episodes(
        self,
        name: str,
        weight: float,
        start: int,
        videos: MappedTable,
        by_view: Sequence[np.ndarray],
        views: Sequence[str],
    ) -> _Stream:
        """Episodes of which every view is there. `by_view`: bool per row of the corpus."""
        episode_codes, _ = videos.codes("episode_id")
        rows_by_view = []
        for of_view in by_view:
            rows = np.flatnonzero(of_view)
            rows_by_view.append(dict(zip(episode_codes[rows].tolist(), rows.tolist(), strict=True)))
        complete = sorted(set.intersection(*(set(found) for found in rows_by_view)))
        everything = set().union(*rows_by_view)
        self._exclude(f"{name}: episodes without all cameras", len(everything) - len(complete))
        table = np.array([[found[e] for found in rows_by_view] for e in complete], np.int32)
        table = table.reshape(-1, len(views))
        lengths = np.minimum(videos.numbers("num_frames"), videos.numbers("num_actions"))[table].min(axis=1)
        key = key_of("order", self.seed, name, tuple(views), self.split)
        return _Stream(name, weight, table + np.int32(start), np.cumsum(lengths, dtype=np.int64), key)

    def _exclude(self, why: str, count: int) -> None:
        if count:
            self.excluded[why] = self.excluded.get(why, 0) + count

    def _nothing_usable(self, name: str) -> str:
        why = "; ".join(
            f"{reason} ({count})" for reason, count in self.excluded.items() if reason.startswith(name)
        )
        return (
            f"corpus {name} has no {self.split} video for {self.rule}: {why or 'the split is empty'}. "
            f"Change {self.rule.field}, data.holdout or the corpus, or set its weight to 0."
        )


def _check_cameras(name: str, chosen: Mapping[str, float], present: Sequence[str]) -> None:
    for camera in chosen:
        if camera not in present:
            raise CorpusError(
                f"data.corpora.{name}.cameras names '{camera}', which the corpus does not have."
                + did_you_mean(camera, sorted(present))
            )
