"""What is drawn: frames, seconds or videos evenly, corpora by their own rules, and each rank the whole mixture."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import manifest_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from defi_platform.config import CorpusConfig, DataConfig, PretrainConfig, SamplingConfig
from defi_platform.config.loader import load_config
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.sampling.mixture import Mixture
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import ChunkRule, ClipRule, PairRule, Rule
from defi_platform.data.sampling.sharding import Shard
from defi_platform.data.sampling.shuffle import SHUFFLED, permuted
from defi_platform.errors import ConfigError, CorpusError


def manifest(corpus: str = "a", *more: tuple[int, float], **others: int) -> Manifest:
    """A corpus of videos of (frames, frames per second) each, and others of so many videos of 30 frames at 10 fps."""
    of = {corpus: more, **{name: [(30, 10.0)] * count for name, count in others.items()}}
    return manifest_of(
        [
            {
                "corpus": name,
                "video_id": f"{number:05d}",
                "uri": "u",
                "camera": ("left", "right")[number % 2],
                "episode_id": f"{number:05d}",
                "text": "",
                "split": "train",
                "num_frames": frames,
                "fps": fps,
                "num_actions": frames,
                "first_frame": 0,
                "source": "plain",
            }
            for name, videos in of.items()
            for number, (frames, fps) in enumerate(videos)
        ]
    )


def plan_of(videos: Manifest, rule: Rule, **sampling: Any) -> Plan:
    """The plan of corpus `a` by the settings that its `sampling` has."""
    corpora = {"a": CorpusConfig(path="p", sampling=SamplingConfig(**sampling))}
    return Plan.of(videos, DataConfig(corpora=corpora, manifest="m"), rule, 0)


lengths = st.lists(
    st.tuples(st.integers(12, 400), st.sampled_from([3.0, 10.0, 29.97])), min_size=1, max_size=150
)
"""(frames, frames per second) of some videos, fewer and more than a group of a stream has"""


@settings(max_examples=30, deadline=None)
@given(videos=lengths, rule=st.sampled_from([PairRule(0.3), ClipRule(4, 0.3), ClipRule(4, None, "f", 3)]))
def test_every_frame_that_a_sample_can_start_at_is_drawn_once_per_epoch(
    videos: list[tuple[int, float]], rule: PairRule | ClipRule
) -> None:
    plan = plan_of(manifest("a", *videos), rule, stride=getattr(rule, "stride", None))
    (size,) = plan.samples_per_epoch.values()
    rows, indices = plan.locate(np.arange(size, 2 * size))
    frames = plan.manifest.numbers_at("num_frames", rows[:, 0])
    assert np.all(indices[:, 0] >= 0) and np.all(indices[:, -1] < frames)
    per_video = [int(rule.starts(np.array([n]), np.array([f], np.float32))[0]) for n, f in videos]
    drawn = sorted(zip(rows[:, 0].tolist(), indices[:, 0].tolist(), strict=True))
    assert drawn == [(row, start) for row, starts in enumerate(per_video) for start in range(starts)]


@settings(max_examples=10, deadline=None)
@given(videos=lengths)
def test_seconds_are_drawn_evenly_whatever_the_rates_of_their_videos(videos: list[tuple[int, float]]) -> None:
    plan = plan_of(manifest("a", *videos), PairRule(0.3), unit="seconds")
    rows, indices = plan.locate(np.arange(10_000))
    seconds = np.array([(n - max(1, round(0.3 * fps))) / fps for n, fps in videos])
    assert plan.samples_per_epoch["a"] == max(1, round(seconds.sum()))
    share = np.bincount(rows[:, 0], minlength=len(videos)) / 10_000
    # An epoch draws each second once: a video is off by less than a second at both of its ends.
    assert np.abs(share - seconds / seconds.sum()).max() < 2 / plan.samples_per_epoch["a"] + 0.01
    frames = plan.manifest.numbers_at("num_frames", rows[:, 0])
    assert indices.min() >= 0 and np.all(indices[:, 1] < frames)


def test_a_plan_of_videos_draws_each_once_per_epoch_at_any_of_its_frames() -> None:
    plan = plan_of(manifest("a", (400, 10.0), (20, 10.0), (12, 10.0)), PairRule(), unit="videos")
    rows, indices = plan.locate(np.arange(3000))
    assert np.all(np.sort(rows.reshape(1000, 3), axis=1) == [0, 1, 2])
    assert len(set(indices[rows[:, 0] == 0][:, 0].tolist())) > 300
    assert plan_of(plan.manifest, ClipRule(4), whole=True).samples_per_epoch == {"a": 3}


def test_frames_of_short_videos_are_drawn_no_more_often_than_those_of_long_ones() -> None:
    rows, _ = plan_of(manifest("a", (110, 10.0), (20, 10.0)), PairRule()).locate(np.arange(11_000))
    assert np.bincount(rows[:, 0]).tolist() == [10_000, 1000]


def test_clips_of_calvin_have_every_second_frame_and_start_at_every_second() -> None:
    plan = plan_of(manifest("a", (64, 30.0), (30, 30.0)), ClipRule(16), stride=2, start_every=2)
    rows, indices = plan.locate(np.arange(17))
    assert plan.excluded == {"a: too short for sampling.stride": 1} and set(rows.ravel().tolist()) == {0}
    assert np.all(np.diff(indices, axis=1) == 2) and sorted(indices[:, 0].tolist()) == list(range(0, 33, 2))
    variable = plan.rules["a"].at_times(np.arange(64.0) ** 1.1, 0.999)
    assert variable.tolist() == list(range(32, 63, 2))


def test_the_papers_configs_sample_each_corpus_as_the_released_code_does() -> None:
    folder = Path(__file__).parents[2] / "configs" / "paper"
    for name in ("pretrain_gfdm.yaml", "pretrain_gfdm_table.yaml"):
        data = load_config(PretrainConfig, folder / name).data
        rules = {corpus: ClipRule.of(data).of_corpus(one.sampling) for corpus, one in data.corpora.items()}
        assert data.corpora["calvin"].cameras == {"static": 0.75, "gripper": 0.25}
        ends, fps = np.array([0.0, 0.5, 0.999]), np.full(3, 30.0)
        clips = rules.pop("calvin").indices(np.full(3, 60), fps, ends)
        assert clips[:, 0].tolist() == [0, 14, 28] and clips[:, -1].tolist() == [30, 44, 58]
        assert clips.shape == (3, 16) and np.all(np.diff(clips, axis=1) == 2)
        assert set(rules) >= {"something", "bridge", "rt1"}
        for rule in rules.values():
            assert rule.is_whole and rule.max_frames == 100 and rule.frames == 16


def test_videos_above_the_most_frames_are_left_out_and_counted() -> None:
    plan = plan_of(
        manifest("a", (100, 5.0), (101, 5.0), (900, 5.0)), ClipRule(16), whole=True, max_frames=100
    )
    assert plan.excluded == {"a: too_long, more than sampling.max_frames=100": 2}
    assert {s.indices[-1] for s in plan.resolve_many(range(20))} == {99}
    with pytest.raises(CorpusError, match=r"too_long, more than sampling\.max_frames=50 \(3\)"):
        plan_of(plan.manifest, ClipRule(16), max_frames=50)


def test_corpora_of_one_plan_are_cut_by_their_own_rules() -> None:
    both = manifest("a", *[(30, 10.0)] * 5, b=5)
    sampling = {"a": SamplingConfig(stride=1), "b": SamplingConfig(whole=True)}
    corpora = {name: CorpusConfig(path="p", sampling=one) for name, one in sampling.items()}
    data = DataConfig(corpora=corpora, manifest="m", clip_span_s=1.0, clip_frames=4)
    plan = Plan.of(both, data, ClipRule.of(data), 0)
    spans = {(s.corpus, s.indices[-1] - s.indices[0]) for s in plan.resolve_many(range(200))}
    assert spans == {("a", 3), ("b", 29)}
    corpora["b"].sampling.whole = False
    other = Plan.of(both, data, ClipRule.of(data), 0)
    assert {s.indices[-1] - s.indices[0] for s in other.resolve_many(range(50)) if s.corpus == "b"} == {10}
    assert other.fingerprint() != plan.fingerprint()
    assert PairRule(1.0).of_corpus(SamplingConfig(pair_interval_s=0.25)).interval_s == 0.25


@pytest.mark.parametrize(
    ("cameras", "expected"),
    [({"right": 0.0}, {"left"}), ({"left": 1.0, "right": 0.0}, {"left"}), ({}, {"left", "right"})],
)
def test_a_camera_of_probability_0_is_left_out(cameras: dict[str, float], expected: set[str]) -> None:
    rules: list[Rule] = [PairRule(), ChunkRule(4)]
    for rule in rules if expected == {"left"} else rules[:1]:
        plan = Plan(manifest("a", *[(30, 10.0)] * 6), {"a": 1.0}, rule, 0, cameras={"a": cameras})
        rows, _ = plan.locate(np.arange(100))
        assert set(plan.manifest.take("camera", rows[:, 0])) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cameras": {"a": {"left": 0.0, "right": 0.0}}}, "leaves out every camera: left, right"),
        ({"cameras": {"a": {"left": math.nan}}}, r"cameras\.left is nan"),
        ({"cameras": {"a": {"left": -1.0}}}, r"cameras\.left is -1"),
        ({"cameras": {"a": {"lefd": 0.0}}}, "Did you mean 'left'"),
        ({"weights": {"a": math.inf}}, r"a\.weight is inf"),
        ({"weights": {"a": math.nan, "b": 1.0}}, r"a\.weight is nan"),
        ({"weights": {"a": 0.0, "b": 0.0}}, r"every weight is 0 \(a, b\)"),
        ({"weights": {"a": 1e-9, "b": 1.0}}, r"corpus a is to be 1e-09 of the mixture.*1 sample in 20,000"),
        ({"weights": {"a": 1.0, "b": 1e300}}, "corpus a is to be 1e-300"),
    ],
)
def test_weights_that_are_no_shares_are_one_clear_error(arguments: dict[str, Any], message: str) -> None:
    videos = manifest("a", *[(30, 10.0)] * 4, b=4)
    with pytest.raises(CorpusError, match=message):
        Plan(videos, **{"weights": {"a": 1.0}, "rule": PairRule(), "seed": 0} | arguments)


def test_weights_near_the_largest_number_are_shares_too() -> None:
    plan = Plan(manifest("a", *[(30, 10.0)] * 4, b=4), {"a": 1e308, "b": 1e308}, PairRule(), seed=0)
    assert [s.corpus for s in plan.resolve_many(range(100))].count("a") == 50


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_spans_and_intervals_that_are_no_length_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.pair_interval_s is .*above 0"):
        PairRule(value)
    with pytest.raises(ConfigError, match=r"data\.clip_span_s is .*above 0"):
        ClipRule(4, value)


@settings(max_examples=25, deadline=None)
@given(
    world_size=st.integers(1, 8),
    micro_batch=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    weights=st.lists(st.sampled_from([1.0, 1.0, 2.0, 3.0, 5.0]), min_size=2, max_size=4),
    start=st.integers(0, 500),
)
def test_every_rank_has_the_mixture(
    world_size: int, micro_batch: int, accumulation: int, weights: list[float], start: int
) -> None:
    names = ["a", "b", "c", "d"][: len(weights)]
    videos = manifest("a", *[(30, 10.0)] * 3, **dict.fromkeys(names[1:], 3))
    plan = Plan(videos, dict(zip(names, weights, strict=True)), PairRule(), seed=0)
    batch = world_size * micro_batch * accumulation
    steps = 100
    for rank in range(world_size):
        shard = Shard(
            start=start * batch, stop=(start + steps) * batch, rank=rank, world_size=world_size,
            global_batch=batch, micro_batch=micro_batch,
        )  # fmt: skip
        ks = np.fromiter(itertools.chain.from_iterable(shard.micro_batches()), np.int64)
        streams, _ = plan._mixture.positions(ks)
        shares = np.bincount(streams, minlength=len(weights)) / len(ks)
        # Of a single sample per step, the first ones may be off by more.
        assert np.abs(shares - np.array(weights) / sum(weights)).max() < 0.05 + 3 / len(ks)


@pytest.mark.parametrize(
    ("world_size", "per_rank", "weights"),
    [
        (11, 1, (2, 1, 1)),
        (11, 1, (1, 3)),
        (15, 1, (2, 1, 1)),
        (100, 1, (1, 1, 1)),
        (100, 2, (1, 1, 1)),
        (64, 1, (1, 1)),
    ],
)
def test_no_number_of_ranks_is_in_step_with_a_mixture(
    world_size: int, per_rank: int, weights: tuple[float, ...]
) -> None:
    mixture = Mixture.of(np.array(weights, np.float64))
    batch, steps = world_size * per_rank, 1000
    taken = []
    for rank in range(0, world_size, max(1, world_size // 8)):
        shard = Shard(
            start=0, stop=steps * batch, rank=rank, world_size=world_size, global_batch=batch, micro_batch=1
        )  # fmt: skip
        ks = np.fromiter(itertools.chain.from_iterable(shard.micro_batches()), np.int64)
        shares = np.bincount(mixture.positions(ks)[0], minlength=len(weights)) / len(ks)
        # Five times what chance does.
        assert np.abs(shares - np.array(weights) / sum(weights)).max() < 2.5 / len(ks) ** 0.5
        taken.append(ks)
    assert len(np.unique(np.concatenate(taken))) == sum(map(len, taken))


def test_two_ranks_of_one_sample_each_see_both_corpora_alike() -> None:
    plan = Plan(manifest("a", *[(30, 10.0)] * 3, b=3), {"a": 1.0, "b": 1.0}, PairRule(), seed=0)
    for rank in range(2):
        shard = Shard(start=0, stop=400, rank=rank, world_size=2, global_batch=2, micro_batch=1)
        corpora = [plan.resolve(samples[0]).corpus for samples in shard.micro_batches()]
        assert all(3 <= corpora[at : at + 10].count("a") <= 7 for at in range(190))
        assert abs(corpora.count("a") - 100) <= 2


def permutations(size: int, number: int, at: list[int]) -> np.ndarray:
    """(number, len(at)): where permutations of successive epochs take the positions `at`."""
    with np.errstate(over="ignore"):
        keys = np.uint64(0x1234567) + np.arange(number, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
    return np.stack([permuted(np.full(number, position), size, keys) for position in at], axis=1)


@pytest.mark.parametrize("size", range(2, 8))
def test_all_permutations_of_a_small_corpus_are_equally_likely(size: int) -> None:
    drawn = permutations(size, 20 * math.factorial(size), list(range(size)))
    codes = {order: code for code, order in enumerate(itertools.permutations(range(size)))}
    counts = np.bincount([codes[tuple(order)] for order in drawn.tolist()], minlength=len(codes))
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("size", [12, 100, SHUFFLED, SHUFFLED + 1, 1000, 5000, 2**22 + 1])
def test_places_of_larger_corpora_and_of_neighbours_are_equally_likely(size: int) -> None:
    first, second = permutations(size, 60_000, [3, 4]).T
    if size <= 5000:
        assert stats.chisquare(np.bincount(first, minlength=size)).pvalue > 1e-3
        assert stats.chisquare(np.bincount((second - first) % size, minlength=size)[1:]).pvalue > 1e-3
    else:
        assert stats.kstest(first / size, "uniform").pvalue > 1e-3
        assert stats.kstest((second - first) % size / size, "uniform").pvalue > 1e-3
        near = int((np.abs(second - first) <= 8).sum())
        assert near <= 16 * len(first) / size + 5 * (16 * len(first) / size) ** 0.5 + 3


@given(size=st.integers(1, 2 * SHUFFLED), keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
@settings(deadline=None)
def test_many_permutations_at_once_are_the_ones_alone(size: int, keys: list[int]) -> None:
    positions = np.tile(np.arange(size), len(keys))
    together = permuted(positions, size, np.repeat(np.array(keys, np.uint64), size))
    alone = [permuted(np.arange(size), size, np.full(size, key, np.uint64)) for key in keys]
    assert together.tolist() == np.concatenate(alone).tolist()
    assert sorted(alone[0].tolist()) == list(range(size))


def test_stand_ins_are_other_videos_one_after_the_other_where_frames_are_drawn() -> None:
    plan = plan_of(manifest("a", (5000, 10.0), *[(20, 10.0)] * 9), PairRule())
    stand_ins = [plan.fallback(7, attempt).row for attempt in range(3, 13)]
    assert sorted(stand_ins) == list(range(10))
