"""The plan as arithmetic: every sample number once whatever the world does, and mixtures that hold everywhere."""

from __future__ import annotations

import hashlib
import pickle
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import manifest_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from defi_platform.data.ingest.probe_results import RESULT_SCHEMA
from defi_platform.data.manifest.quarantine import QUARANTINE_SCHEMA
from defi_platform.data.manifest.table import Manifest, commit_corpus
from defi_platform.data.sampling.mixture import Mixture
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import ChunkRule, ClipRule, PairRule, Rule
from defi_platform.data.sampling.sharding import Shard
from defi_platform.data.sampling.shuffle import permuted
from defi_platform.errors import CorpusError


def manifest(**sizes: int) -> Manifest:
    """A manifest in memory of `sizes[corpus]` videos, of 30 frames at 10 fps and two cameras in turn."""
    return manifest_of(
        [
            {
                "corpus": corpus,
                "video_id": f"{number:05d}",
                "uri": f"{corpus}/{number}.mp4",
                "camera": ("left", "right")[number % 2],
                "episode_id": f"{number // 2:05d}",
                "text": f"{corpus} {number}",
                "split": "train",
                "num_frames": 30,
                "fps": 10.0,
                "num_actions": 30,
                "first_frame": 0,
                "version": "1",
            }
            for corpus, size in sizes.items()
            for number in range(size)
        ]
    )


def consumed(start: int, stop: int, world_size: int, micro_batch: int, per_rank: int) -> list[list[int]]:
    """Sample numbers per rank of a run from `start` to `stop`."""
    shards = [
        Shard(
            start=start,
            stop=stop,
            rank=rank,
            world_size=world_size,
            global_batch=world_size * per_rank,
            micro_batch=micro_batch,
        )
        for rank in range(world_size)
    ]
    return [[k for samples in shard.micro_batches() for k in samples] for shard in shards]


sizes = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
"""(world size, micro-batch, micro-batches per step)"""


@settings(deadline=None)
@given(runs=st.lists(st.tuples(st.integers(0, 200), sizes), min_size=1, max_size=5))
def test_any_worlds_and_stop_points_consume_every_number_exactly_once(
    runs: list[tuple[int, tuple[int, int, int]]],
) -> None:
    position, seen = 0, []
    for length, (world_size, micro_batch, pieces) in runs:
        ranks = consumed(position, position + length, world_size, micro_batch, micro_batch * pieces)
        seen += [k for rank in ranks for k in rank]
        position += length
    assert sorted(seen) == list(range(position))


@settings(deadline=None)
@given(sizes=sizes, step=st.integers(0, 50))
def test_a_run_that_stops_after_any_step_and_goes_on_sees_what_one_run_sees(
    sizes: tuple[int, int, int], step: int
) -> None:
    world_size, micro_batch, pieces = sizes
    batch = world_size * micro_batch * pieces
    stop, end = step * batch, (step + 7) * batch
    whole = consumed(0, end, world_size, micro_batch, micro_batch * pieces)
    before = consumed(0, stop, world_size, micro_batch, micro_batch * pieces)
    after = consumed(stop, end, world_size, micro_batch, micro_batch * pieces)
    assert [a + b for a, b in zip(before, after, strict=True)] == whole


@settings(deadline=None)
@given(sizes=sizes)
def test_the_samples_of_a_step_do_not_depend_on_the_world_size(sizes: tuple[int, int, int]) -> None:
    world_size, micro_batch, pieces = sizes
    batch = world_size * micro_batch * pieces
    split = consumed(0, 3 * batch, world_size, micro_batch, micro_batch * pieces)
    alone = consumed(0, 3 * batch, 1, 1, batch)[0]
    for step in range(3):
        share = batch // world_size
        step_of = [k for rank in split for k in rank[step * share : (step + 1) * share]]
        assert sorted(step_of) == alone[step * batch : (step + 1) * batch]


@settings(deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_keyed_permutation_reaches_every_place_once(size: int, key: int) -> None:
    positions = permuted(np.arange(size), size, np.full(size, key, np.uint64))
    assert sorted(positions.tolist()) == list(range(size))


def test_two_epochs_have_different_orders() -> None:
    plan = Plan(manifest(a=50), {"a": 1.0}, ClipRule(frames=4), seed=0)
    rows = [sample.row for sample in plan.resolve_many(range(100))]
    assert sorted(rows[:50]) == sorted(rows[50:]) == list(range(50))
    assert rows[:50] != rows[50:]


def test_another_seed_is_another_order() -> None:
    first, second = (Plan(manifest(a=50), {"a": 1.0}, ClipRule(frames=4), seed=seed) for seed in (0, 1))
    assert [s.row for s in first.resolve_many(range(50))] != [s.row for s in second.resolve_many(range(50))]


@settings(max_examples=40, deadline=None)
@example(weights=[0.482421875, 0.005859375, 0.005859375, 0.005, 0.005, 0.005], start=0)
@given(weights=st.lists(st.floats(0.005, 1.0), min_size=2, max_size=27), start=st.integers(0, 10**12))
def test_a_mixture_holds_in_every_window_and_to_one_percent_after_10_000(
    weights: list[float], start: int
) -> None:
    shares = np.array(weights) / sum(weights)
    streams, _ = Mixture.of(np.array(weights)).positions(np.arange(start, start + 10_000))
    counts = np.bincount(streams, minlength=len(weights))
    assert np.abs(counts / 10_000 - shares).max() < 0.001
    for first in range(0, 10_000 - 300, 300):
        window = np.bincount(streams[first : first + 300], minlength=len(weights))
        assert np.abs(window - 300 * shares).max() < len(weights)


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8), start=st.integers(0, 10**9))
def test_each_stream_of_a_mixture_counts_up_without_gaps(weights: list[float], start: int) -> None:
    streams, positions = Mixture.of(np.array(weights)).positions(np.arange(start, start + 2000))
    for number in range(len(weights)):
        of_stream = positions[streams == number]
        assert np.all(np.diff(of_stream) == 1)


def test_the_papers_mixture_is_realised_by_the_samples() -> None:
    shares = {"fractal": 30.0, "bridge": 10.0, "calvin": 30.0, "ssv2": 15.0, "ego4d": 15.0}
    plan = Plan(manifest(**dict.fromkeys(shares, 40)), shares, ClipRule(frames=4), seed=3)
    corpora = [sample.corpus for sample in plan.resolve_many(range(10_000))]
    assert {name: corpora.count(name) / 100 for name in shares} == shares


def test_many_resolved_at_once_are_the_ones_resolved_alone() -> None:
    plan = Plan(manifest(a=7, b=11), {"a": 1.0, "b": 2.0}, PairRule(), seed=5)
    ks = [0, 3, 3, 10**9, 17]
    assert plan.resolve_many(ks) == [plan.resolve(k) for k in ks]


def test_a_plan_that_travelled_says_the_same() -> None:
    plan = Plan(manifest(a=7, b=11), {"a": 1.0, "b": 2.0}, PairRule(), seed=5)
    assert pickle.loads(pickle.dumps(plan)).resolve_many(range(50)) == plan.resolve_many(range(50))


def test_a_fallback_is_another_video_of_the_same_corpus() -> None:
    plan = Plan(manifest(a=20, b=20), {"a": 1.0, "b": 1.0}, ClipRule(frames=4), seed=0)
    for k in range(10):
        sample, other = plan.resolve(k), plan.fallback(k, 1)
        assert (other.k, other.corpus) == (k, sample.corpus)
        assert other.row != sample.row


@pytest.mark.parametrize("rate", [3.0, 5.0, 12.0, 29.97, 80.0])
def test_a_pair_is_one_second_apart_at_any_rate(rate: float) -> None:
    rule = PairRule(interval_s=1.0)
    draw = np.linspace(0, 0.999, 50)
    pairs = rule.indices(np.full(50, 200), np.full(50, rate), draw)
    assert set((pairs[:, 1] - pairs[:, 0]).tolist()) == {round(rate)}
    assert pairs.min() >= 0 and pairs.max() < 200


def test_a_clip_without_span_covers_the_whole_video() -> None:
    clip = ClipRule(frames=8).indices(np.array([100]), np.array([30.0]), np.array([0.5]))[0]
    assert (clip[0], clip[-1]) == (0, 99)
    assert max(b - a for a, b in pairwise(clip)) - min(b - a for a, b in pairwise(clip)) <= 1


def test_a_clip_with_span_covers_that_many_seconds() -> None:
    rule = ClipRule(frames=5, span_s=2.0)
    clips = rule.indices(np.full(20, 100), np.full(20, 10.0), np.linspace(0, 0.999, 20))
    assert set((clips[:, -1] - clips[:, 0]).tolist()) == {20}
    assert clips.min() == 0 and clips.max() == 99


def test_camera_probabilities_are_shares_of_the_corpus() -> None:
    plan = Plan(
        manifest(a=40), {"a": 1.0}, ClipRule(frames=4), seed=0, cameras={"a": {"left": 0.75, "right": 0.25}}
    )
    cameras = plan.manifest.take("camera", np.array([s.row for s in plan.resolve_many(range(1000))]))
    assert cameras.count("left") == 750


def test_every_frame_of_an_episode_is_a_chunk_once_per_epoch() -> None:
    plan = Plan(manifest(a=10), {"a": 1.0}, ChunkRule(chunk=10), seed=0)
    samples = plan.resolve_many(range(150))
    assert {len(sample.rows) for sample in samples} == {2}
    assert len({(sample.row, sample.indices) for sample in samples}) == 150


def test_videos_too_short_for_the_rule_are_counted() -> None:
    rows = manifest(a=3).table.to_pylist()
    rows[0]["num_frames"] = 5
    plan = Plan(manifest_of(rows), {"a": 1.0}, PairRule(interval_s=1.0), seed=0)
    assert plan.excluded == {"a: too short for data.pair_interval_s": 1}
    assert 0 not in [sample.row for sample in plan.resolve_many(range(20))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"b": 1.0}}, "no corpus 'b'; there is: a"),
        ({"rule": PairRule(interval_s=60.0)}, r"data\.pair_interval_s \(4\)"),
        ({"cameras": {"a": {"lefd": 1.0}}}, "Did you mean 'left'"),
        ({"weights": {"a": -1.0}}, "must not be negative"),
    ],
)
def test_a_plan_that_cannot_be_is_one_clear_error(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"weights": {"a": 1.0}, "rule": ClipRule(frames=4)} | change
    with pytest.raises(CorpusError, match=message):
        Plan(manifest(a=4), seed=0, **arguments)


def test_a_thousand_samples_resolve_in_milliseconds() -> None:
    plan = Plan(manifest(a=5000, b=5000), {"a": 1.0, "b": 2.0}, PairRule(), seed=5)
    ks = np.random.default_rng(0).integers(0, 10**10, 1024)
    plan.resolve_many(ks)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        plan.resolve_many(ks)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.05, "each of them: one may have collected the garbage of other tests"


def test_corpora_of_different_cameras_and_texts_are_looked_up_in_their_own_tables() -> None:
    rows = manifest(a=6).table.to_pylist()
    rows += [row | {"camera": f"other {row['camera']}"} for row in manifest(b=5).table.to_pylist()]
    both = manifest_of(rows)
    plan = Plan(both, {"b": 1.0, "a": 1.0}, ClipRule(frames=2), seed=0, cameras={"b": {"other left": 1.0}})
    samples = plan.resolve_many(range(40))
    assert {both.row(sample.row)["camera"] for sample in samples if sample.corpus == "b"} == {"other left"}
    assert all(both.row(sample.row)["corpus"] == sample.corpus for sample in samples)
    assert all(both.row(sample.row)["text"] == sample.text for sample in samples)
    chunks = Plan(both, {"b": 1.0}, ChunkRule(chunk=4), seed=0)
    assert {both.row(row)["camera"] for s in chunks.resolve_many(range(60)) for row in s.rows} == {
        "other left",
        "other right",
    }


@pytest.mark.parametrize(
    ("source", "chosen", "order"),
    [
        ("calvin", {}, ("static", "gripper")),
        ("calvin", {"gripper": 1.0, "static": 1.0}, ("gripper", "static")),
        ("rlds", {"static": 1.0, "gripper": 1.0}, ("static", "gripper")),
        ("rlds", {}, ("gripper", "static")),
    ],
)
def test_views_have_the_order_of_the_configuration_and_not_of_the_alphabet(
    source: str, chosen: dict[str, float], order: tuple[str, ...]
) -> None:
    names = {"left": "gripper", "right": "static"}
    rows = manifest(a=8).table.to_pylist()
    both = manifest_of([row | {"camera": names[row["camera"]], "source": source} for row in rows])
    plan = Plan(both, {"a": 1.0}, ChunkRule(chunk=4), seed=0, cameras={"a": chosen})
    assert plan.cameras_of_views == order
    for sample in plan.resolve_many(range(30)):
        assert tuple(both.row(row)["camera"] for row in sample.rows) == order


def test_a_mapped_manifest_reads_as_the_one_it_was_written_from(tmp_path: Path) -> None:
    rows = manifest(a=300).table
    empty = (schema.empty_table().to_reader() for schema in (QUARANTINE_SCHEMA, RESULT_SCHEMA))
    commit_corpus(str(tmp_path), "a", rows.to_reader(), *empty, {})
    mapped = Manifest.open(str(tmp_path))
    assert mapped.table == rows
    positions = np.arange(299, -1, -1)
    assert mapped.take("text", positions) == [f"a {n}" for n in positions.tolist()]
    assert [mapped.row(n)["video_id"] for n in range(300)] == rows.column("video_id").to_pylist()
    assert mapped.fingerprint() == manifest(a=300).fingerprint()


@pytest.mark.parametrize(
    ("rule", "digest"),
    [
        (ClipRule(frames=4), "74bdce362ec6"),
        (ClipRule(frames=4, span_s=0.5), "0e0dd03c41b0"),
        (PairRule(interval_s=1.0), "9402317d6a2f"),
        (ChunkRule(chunk=5), "106a3530ae9f"),
    ],
    ids=["whole clip", "clip", "pair", "chunk"],
)
def test_the_order_is_the_one_that_checkpoints_were_counted_in(rule: Rule, digest: str) -> None:
    """A change of the order under the same fingerprint would make every resumed run see other samples."""
    plan = Plan(manifest(a=58, b=91), {"a": 1.0, "b": 2.0}, rule, seed=3)
    order = [(s.k, s.corpus, s.rows, s.indices) for s in plan.resolve_many(range(2000))]
    assert hashlib.sha256(repr(order).encode()).hexdigest()[:12] == digest


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (ClipRule(frames=4, span_s=60.0), "a clip of 4 frames over 60 s"),
        (ClipRule(frames=4, stride=1000), "a clip of 4 frames, every 1000th"),
        (PairRule(interval_s=60.0), "a pair of frames 60 s apart"),
        (ChunkRule(chunk=10), "a chunk of 10 actions"),
    ],
)
def test_a_corpus_without_a_fitting_video_says_what_was_looked_for(rule: Rule, words: str) -> None:
    rows = [row | {"num_actions": None} for row in manifest(a=3).table.to_pylist()]
    with pytest.raises(CorpusError, match=rf"corpus a has no train video for {words}: a: "):
        Plan(manifest_of(rows), {"a": 1.0}, rule, seed=0)
