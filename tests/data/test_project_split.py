"""One split for all trainings of a project: what one of them holds out, no other one learns from."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import boto3
import numpy as np
import pytest
from corpora import write_lerobot, write_video
from s3_server import s3_server

from defi_platform import storage
from defi_platform.config import CorpusConfig, DataConfig
from defi_platform.data.ingest import probe_actors
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.manifest.project_split import ProjectSplit
from defi_platform.data.manifest.split import hash_position
from defi_platform.data.manifest.table import Manifest


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_actors, "FEW_FILES", 1000)


def configured(tmp_path: Path, corpus: str, holdout: float, name: str = "robot") -> DataConfig:
    return DataConfig(
        corpora={name: CorpusConfig(path=str(tmp_path / corpus))},
        manifest=str(tmp_path / f"manifest of {corpus} by {name}"),
        holdout=holdout,
        split=str(tmp_path / "split"),
    )


def sides(manifest: Manifest) -> dict[str, str]:
    rows = map(manifest.row, range(len(manifest)))
    return {row["episode_id"] or row["video_id"]: row["split"] for row in rows}


def recorded(root: Path, seeds: list[int]) -> Path:
    """Episodes of a recording, which are numbered anew in each of its datasets."""
    write_lerobot(root, [6] * len(seeds))
    episodes = [{"task": "reach", "seed": seed, "length": 6} for seed in seeds]
    (root / "meta" / "recording.json").write_text(
        json.dumps({"benchmark": "metaworld", "episodes": episodes})
    )
    return root


def test_the_labelled_part_of_a_recording_holds_out_what_its_whole_does(tmp_path: Path) -> None:
    recorded(tmp_path / "video", list(range(40)))
    part = [seed for seed in range(40) if seed % 3]
    recorded(tmp_path / "labelled", part)
    whole = sides(ingest(configured(tmp_path, "video", 0.3)))
    labelled = sides(ingest(configured(tmp_path, "labelled", 0.05)))
    assert len(labelled) == len(part)
    for number, seed in enumerate(part):
        assert labelled[f"episode_{number:06d}"] == whole[f"episode_{seed:06d}"]
    assert list(labelled.values()).count("validation") > 0.05 * len(part), (
        "the share of the first training counts"
    )
    assert sides(ingest(configured(tmp_path, "video", 0.3))) == whole, "and later ones change nothing of it"


def test_copies_in_a_corpus_of_another_name_are_known_by_their_pictures(tmp_path: Path) -> None:
    for number in range(10):
        write_video(tmp_path / "first" / f"{number}.mp4", range(number, number + 5))
        (tmp_path / "second").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "first" / f"{number}.mp4", tmp_path / "second" / f"clip {number}.mp4")
    first = sides(ingest(configured(tmp_path, "first", 0.4, "a")))
    second = sides(ingest(configured(tmp_path, "second", 0.0, "b")))
    assert second == {f"clip {name}": side for name, side in first.items()}
    assert set(second.values()) == {"train", "validation"}


def test_rows_follow_a_split_that_begins_later_and_without_opening_a_file_again(tmp_path: Path) -> None:
    recorded(tmp_path / "video", list(range(12)))
    config = configured(tmp_path, "video", 0.25)
    before = sides(ingest(DataConfig(config.corpora, manifest=config.manifest, holdout=0.25)))
    every = np.array([hash_position(f"metaworld reach seed {seed}") for seed in range(12)], np.uint64)
    held = np.arange(12) == 7
    ProjectSplit(str(tmp_path / "split")).decide("robot", every, np.zeros(12, np.uint64), 0.0, held)
    after = sides(ingest(config))
    assert [name for name, side in after.items() if side == "validation"] == [
        "episode_000007"
    ] and before != after
    manifest = ingest(config)
    assert manifest.reused == ("robot",)


def decided(
    split: ProjectSplit, ids: list[str], contents: list[int], holdout: float, corpus: str = "c"
) -> list[bool]:
    positions = np.array([hash_position(one) for one in ids], np.uint64)
    return split.decide(corpus, positions, np.array(contents, np.uint64), holdout).tolist()


def test_new_episodes_are_decided_by_the_hash_alone_and_known_ones_never_again(tmp_path: Path) -> None:
    split = ProjectSplit(str(tmp_path / "split"))
    ids = [f"e{number}" for number in range(200)]
    first = decided(split, ids[:100], [0] * 100, 0.2)
    assert split.identity() and 5 < sum(first) < 40
    both = decided(split, ids, [0] * 200, 0.5)
    assert both[:100] == first and 30 < sum(both[100:]) < 70
    assert decided(split, ids[::-1], [0] * 200, 0.0) == both[::-1]
    assert len(list((tmp_path / "split").iterdir())) == 2, "what is known is not written again"
    # One new episode beside known ones is not held out for being the only one.
    lonely = [f"x{number}" for number in range(20)]
    assert not any(decided(split, [*ids, one], [0] * 201, 0.0)[-1] for one in lonely)
    # The same ids in another corpus are other episodes.
    assert not any(decided(split, ids, [0] * 200, 0.0, corpus="other"))


def test_what_any_training_has_trained_on_trains(tmp_path: Path) -> None:
    split = ProjectSplit(str(tmp_path / "split"))
    zeros = np.zeros(1, np.uint64)
    split.decide("a", np.array([1], np.uint64), np.array([11], np.uint64), 0.0, np.array([True]))
    split.decide("b", np.array([2], np.uint64), np.array([22], np.uint64), 0.0, np.array([False]))
    # One episode with a camera that is a copy of either.
    held = split.decide("c", np.array([3, 3], np.uint64), np.array([11, 22], np.uint64), 1.0)
    assert not held.any()
    assert split.decide("c", np.array([3], np.uint64), zeros, 1.0).tolist() == [False]
    assert split.decide("a", np.array([1], np.uint64), zeros, 1.0).tolist() == [True], "by its own id"
    # The pictures of either were trained on by now.
    assert split.decide("d", np.array([4], np.uint64), np.array([11], np.uint64), 0.0).tolist() == [False]


def test_of_two_ingests_at_once_the_second_goes_by_the_first(tmp_path: Path) -> None:
    first, second = (ProjectSplit(str(tmp_path / "split")) for _ in range(2))
    read, calls = second._read, []

    def read_before_the_first_writes() -> object:
        known = read()
        if not calls:
            calls.append(decided(first, ["e0", "e1", "e2"], [0] * 3, 0.9))
        return known

    second._read = read_before_the_first_writes  # type: ignore[method-assign, assignment]
    assert decided(second, ["e0", "e1", "e2"], [0] * 3, 0.1) == calls[0]


@pytest.mark.parametrize("store", ["local", "memory", "s3"])
def test_a_split_is_one_for_all_who_name_its_folder(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        root = {"local": str(tmp_path), "memory": f"memory://{tmp_path.name}", "s3": "s3://videos"}[store]
        if store == "s3":
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                monkeypatch.setenv(name, "testing")
            monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            endpoint = stack.enter_context(s3_server())
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            stack.callback(storage.forget_connections)
            storage.forget_connections()
            boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="videos")
        first, second = (ProjectSplit(storage.join(root, "split")) for _ in range(2))
        assert first.identity() == ""
        episodes, none = np.arange(40, dtype=np.uint64) * np.uint64(2**58), np.zeros(40, np.uint64)
        held = first.decide("c", episodes[:20], none[:20], 0.25)
        both = second.decide("c", episodes, none, 1.0)
        assert 0 < held.sum() < 20 and both[:20].tolist() == held.tolist() and both[20:].all()
        assert (
            first.decide("c", episodes, none, 0.0).tolist()
            == both.tolist()
            == first.held("c", episodes).tolist()
        )
        assert first.identity() == second.identity() != ""
