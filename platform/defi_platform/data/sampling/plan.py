"""The plan: video, frames and text of every sample number k. A pure function of (manifest, weights, rule, seed), with no state and no I/O.

Shuffling, mixing, sharding, resume and elastic world size are arithmetic on k. N samples, T frames, V cameras.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from defi_models.errors import did_you_mean
from defi_platform.config import DataConfig
from defi_platform.data.manifest.split import TRAIN, is_split, mask
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.sampling.mixture import PERIOD, Mixture
from defi_platform.data.sampling.samplers import ChunkRule, Rule
from defi_platform.data.sampling.shuffle import key_of, uniform
from defi_platform.data.sampling.streams import BLOCK_ROWS, Located, Stream
from defi_platform.data.sampling.views import view_order
from defi_platform.data.tables.mmap_table import MappedTable
from defi_platform.errors import CorpusError

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


class Plan:
    """Resolves sample numbers to videos, frames and texts.

    Args:
        manifest: the usable videos.
        weights: corpus -> share of the mixture; corpora that are not named or weigh 0 are not drawn.
        rule: how a sample is cut out of a video.
        seed: of the order.
        split: train | validation.
        cameras: corpus -> camera -> probability; for chunks, which cameras are the views, in this order. A corpus
            whose probabilities are all 0 is drawn from the cameras that are not named.
        rules: corpus -> its own rule, with as many frames per sample as `rule`.
        states: corpus -> entries of its raw states that chunks carry, as configured; see `CorpusConfig.state`.

    Raises: CorpusError when a named corpus has no video that the rule can use, or a weight is no share.
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
        rules: Mapping[str, Rule] | None = None,
        states: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        if not is_split(split):
            raise ValueError(f"there is no split '{split}'; it is train or validation")
        self.manifest = manifest
        self.weights = dict(weights)
        self.rule = rule
        self.seed = seed
        self.split = split
        self.cameras = {name: dict(chosen) for name, chosen in (cameras or {}).items()}
        self.rules = dict(rules or {})
        self.states = {name: list(chosen) for name, chosen in (states or {}).items() if chosen}
        self.excluded: dict[str, int] = {}
        """Why videos of the chosen corpora and split are not drawn -> how many."""
        self._variable = manifest.rows_where("variable_rate")
        self._streams = self._make_streams()
        self._draw_key = key_of("draw", seed)
        self._mixture = Mixture.of(np.array([s.weight for s in self._streams]))

    @classmethod
    def of(cls, manifest: Manifest, data: DataConfig, rule: Rule, seed: int, split: str = TRAIN) -> Plan:
        """Builds the plan that a data configuration asks for.

        Args:
            manifest: of the corpora in `data`.
            data: weights, cameras and sampling of the corpora.
            rule: how a sample is cut out of a video where a corpus does not say otherwise.
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
            rules={name: rule.of_corpus(corpus.sampling) for name, corpus in data.corpora.items()},
            states={name: corpus.state for name, corpus in data.corpora.items()},
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

    def one_row_per_corpus(self) -> list[int]:
        """A manifest row of each corpus that is drawn from."""
        return list({stream.corpus: int(stream.rows[0, 0]) for stream in self._streams}.values())

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
        rules = {name: self.rules.get(name, self.rule) for name in drawn}
        states = {name: self.states[name] for name in drawn if name in self.states}
        parts = (self.manifest.fingerprint(drawn), drawn, cameras, rules, self.seed, self.split)
        carried = (states,) if states and isinstance(self.rule, ChunkRule) else ()
        return f"{key_of(*parts, *carried):016x}"

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
        jitter = uniform(ks + (attempts << ATTEMPT_SHIFT), self._draw_key)
        rows = np.empty((len(ks), self.views), np.int64)
        indices: np.ndarray | None = None
        for number in np.unique(stream).tolist():
            chosen = np.flatnonzero(stream == number)
            found = self._streams[number].locate(drawn[chosen], attempts[chosen], jitter[chosen])
            if len(self._variable):
                self._follow_times(self._streams[number].rule, found)
            if indices is None:
                indices = np.empty((len(ks), found.indices.shape[1]), np.int64)
            rows[chosen], indices[chosen] = found.rows, found.indices
        return rows, np.empty((0, 0), np.int64) if indices is None else indices

    def __getstate__(self) -> dict[str, object]:
        return {
            "manifest": self.manifest,
            "weights": self.weights,
            "rule": self.rule,
            "seed": self.seed,
            "split": self.split,
            "cameras": self.cameras,
            "rules": self.rules,
            "states": self.states,
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    # ----------------------------------------------------------------------- inside

    def _follow_times(self, rule: Rule, found: Located) -> None:
        """Sets the frame numbers of videos of variable rate by the times of their frames."""
        rows = found.rows[:, 0]
        nearest = np.minimum(np.searchsorted(self._variable, rows), len(self._variable) - 1)
        chosen = np.flatnonzero(self._variable[nearest] == rows)
        for sample, times in zip(chosen.tolist(), self.manifest.take("times", rows[chosen]), strict=True):
            usable = np.asarray(times[: found.num_frames[sample]], np.float64)
            found.indices[sample] = rule.at_times(usable, float(found.draw[sample]))

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

    def _make_streams(self) -> list[Stream]:
        streams: list[Stream] = []
        # By name: the order of a configuration's keys says nothing.
        for name, weight in sorted(self.weights.items()):
            if not 0 <= weight < math.inf:
                raise CorpusError(
                    f"data.corpora.{name}.weight is {weight}; it must not be negative and must be finite."
                )
            if weight == 0:
                continue
            if name not in self.manifest.names:
                raise CorpusError(
                    f"the manifest has no corpus '{name}'; there is: {', '.join(self.manifest.names)}. "
                    "Run the ingest again."
                )
            found = self._streams_of(name, weight)
            empty = [stream for stream in found if not len(stream.rows)]
            if empty and self.split == TRAIN:
                raise CorpusError(self._nothing_usable(name))
            if empty:
                self._exclude(f"{name}: no video of this split fits the rule", len(empty))
            streams += [stream for stream in found if len(stream.rows)]
        if not any(self.weights.values()):
            raise CorpusError(f"data.corpora: every weight is 0 ({', '.join(self.weights) or 'no corpus'}).")
        if not streams:
            raise CorpusError(self._nothing_usable(", ".join(self.weights)))
        if len({stream.rows.shape[1] for stream in streams}) > 1:
            views_of = ", ".join(f"{s.corpus}: {s.rows.shape[1]}" for s in streams)
            raise CorpusError(
                f"corpora differ in their number of cameras ({views_of}); set data.corpora.NAME.cameras."
            )
        _check_shares(streams)
        return streams

    def _streams_of(self, name: str, weight: float) -> list[Stream]:
        """The streams of one corpus: of all cameras, or one per camera that has a probability."""
        rule = self.rules.get(name, self.rule)
        start, videos = self.manifest.corpus(name)
        usable = self._usable(name, rule, videos)
        camera_codes, cameras = videos.codes("camera")
        present = [camera for code, camera in enumerate(cameras) if (camera_codes == code).any()]
        named = self.cameras.get(name, {})
        _check_cameras(name, named, present)
        chosen = {camera: p for camera, p in named.items() if p > 0}
        left = [camera for camera in present if camera not in named]
        if named and not chosen and not left:
            raise CorpusError(f"data.corpora.{name}.cameras leaves out every camera: {', '.join(present)}.")

        def of_camera(camera: str) -> np.ndarray:
            return np.asarray(usable & (camera_codes == cameras.index(camera)))

        if isinstance(rule, ChunkRule):
            views = list(chosen) or view_order(next(iter(videos.codes("source")[1]), ""), left)
            table = self._episodes(name, videos, [of_camera(view) for view in views])
            drawn: dict[str | tuple[str, ...], tuple[float, np.ndarray]] = {tuple(views): (weight, table)}
        elif chosen:
            total = math.fsum(chosen.values())
            drawn = {
                camera: (weight * (p / total), np.flatnonzero(of_camera(camera))[:, None])
                for camera, p in chosen.items()
            }
        else:
            for camera in named:
                usable &= camera_codes != cameras.index(camera)
            drawn = {"": (weight, np.flatnonzero(usable)[:, None])}
        return [
            Stream(
                name,
                share,
                rule,
                key_of("order", self.seed, name, camera, self.split),
                rows.astype(np.int32),
                start,
                videos,
            )
            for camera, (share, rows) in drawn.items()
        ]

    def _usable(self, name: str, rule: Rule, videos: MappedTable) -> np.ndarray:
        """Marks the rows of a corpus, bool per row: of the split, of a length for the rule, with actions for chunks."""
        split_codes, splits = videos.codes("split")
        usable = mask(split_codes, splits, self.split)
        num_frames, fps = videos.numbers("num_frames"), videos.numbers("fps")
        longest = np.iinfo(np.int32).max if rule.max_frames is None else rule.max_frames
        too_short = too_long = 0
        for first in range(0, len(usable), BLOCK_ROWS):
            block = slice(first, first + BLOCK_ROWS)
            fits = num_frames[block] <= longest
            too_long += int((usable[block] & ~fits).sum())
            usable[block] &= fits
            fits = num_frames[block] >= rule.min_frames(fps[block])
            too_short += int((usable[block] & ~fits).sum())
            usable[block] &= fits
        self._exclude(f"{name}: too_long, more than sampling.max_frames={rule.max_frames}", too_long)
        self._exclude(f"{name}: too short for {rule.field}", too_short)
        if isinstance(rule, ChunkRule):
            has_actions = videos.numbers("num_actions") > 0
            unusable = int(usable[videos.where("bad_actions")].sum())
            self._exclude(f"{name}: bad_actions, listed by the ingest", unusable)
            self._exclude(f"{name}: no actions", int((usable & ~has_actions).sum()) - unusable)
            usable &= has_actions
        return usable

    def _episodes(self, name: str, videos: MappedTable, by_view: Sequence[np.ndarray]) -> np.ndarray:
        """Rows of episodes of which every view is there, int (episodes, V). `by_view`: bool per row of the corpus."""
        episode_codes, _ = videos.codes("episode_id")
        # The windows of an episode are apart, by where their actions begin.
        keys = episode_codes.astype(np.int64) << 32 | videos.numbers("first_action")
        rows_by_view = []
        for of_view in by_view:
            rows = np.flatnonzero(of_view)
            rows_by_view.append(dict(zip(keys[rows].tolist(), rows.tolist(), strict=True)))
        complete = sorted(set.intersection(*(set(found) for found in rows_by_view)))
        everything = set().union(*rows_by_view)
        self._exclude(f"{name}: episodes without all cameras", len(everything) - len(complete))
        table = np.array([[found[e] for found in rows_by_view] for e in complete], np.int32)
        return table.reshape(-1, len(by_view))

    def _exclude(self, why: str, count: int) -> None:
        if count:
            self.excluded[why] = self.excluded.get(why, 0) + count

    def _nothing_usable(self, name: str) -> str:
        rule = self.rules.get(name, self.rule)
        why = "; ".join(
            f"{reason} ({count})" for reason, count in self.excluded.items() if reason.startswith(name)
        )
        return (
            f"corpus {name} has no {self.split} video for {rule}: {why or 'the split is empty'}. "
            f"Change {rule.field}, data.holdout, data.split or the corpus, or set its weight to 0."
        )


def _check_cameras(name: str, named: Mapping[str, float], present: Sequence[str]) -> None:
    for camera, probability in named.items():
        key = f"data.corpora.{name}.cameras"
        if camera not in present:
            raise CorpusError(
                f"{key} names '{camera}', which the corpus does not have."
                + did_you_mean(camera, sorted(present))
            )
        if not 0 <= probability < math.inf:
            raise CorpusError(
                f"{key}.{camera} is {probability}; a probability, or a weight of 0 or more, is needed."
            )


def _check_shares(streams: Sequence[Stream]) -> None:
    largest = max(stream.weight for stream in streams)
    total = math.fsum(stream.weight / largest for stream in streams)
    for stream in streams:
        share = stream.weight / largest / total
        if share < 0.5 / PERIOD:
            raise CorpusError(
                f"corpus {stream.corpus} is to be {share:.2g} of the mixture; less than 1 sample in {2 * PERIOD:,} "
                f"cannot be drawn. Raise data.corpora.{stream.corpus}.weight or its cameras, or set it to 0."
            )
