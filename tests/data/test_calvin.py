"""CALVIN: segments that share frames, recordings that end, and signals without pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from corpora import picture

from defi_platform.config import CorpusConfig, DataConfig
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.sources.calvin import segments as calvin
from defi_platform.data.sources.records import RejectedRecord, VideoRecord
from defi_platform.errors import CorpusError


def write_calvin(
    folder: Path,
    segments: Sequence[tuple[int, int]],
    recordings: Sequence[tuple[int, int]] | None = None,
    absent: Sequence[int] = (),
) -> None:
    """One of CALVIN's folders. Frame n shows `picture(n)`, its action is n / 1000 seven times, its state 0 to 14 plus n."""
    (folder / "lang_annotations").mkdir(parents=True)
    for number in {n for first, last in segments for n in range(first, last + 1)} - set(absent):
        np.savez_compressed(
            folder / f"episode_{number:07d}.npz",
            actions=np.zeros(7),
            rel_actions=np.full(7, number / 1000),
            robot_obs=np.arange(15) + float(number),
            scene_obs=np.zeros(24),
            rgb_static=picture(number % 256, 32),
            rgb_gripper=picture(number % 256, 16),
        )
    found = {
        "language": {"ann": [f"text {n}" for n in range(len(segments))]},
        "info": {"indx": list(segments)},
    }
    np.save(
        folder / "lang_annotations" / "auto_lang_ann.npy", np.array(found, dtype=object), allow_pickle=True
    )
    if recordings is not None:
        np.save(folder / "ep_start_end_ids.npy", np.array(recordings))


def records(root: Path) -> dict[str, VideoRecord]:
    return {r.episode_id: r for r in calvin.listing(str(root)) if isinstance(r, VideoRecord)}


def test_no_frame_is_in_training_and_validation_at_once(tmp_path: Path) -> None:
    spans = [(n, n + 5) for n in (100, 104, 110, 130, 134, 160, 190, 193)]
    write_calvin(tmp_path / "c" / "training", spans)
    config = DataConfig(
        corpora={"c": CorpusConfig(path=str(tmp_path / "c"))}, manifest=str(tmp_path / "m"), holdout=0.4
    )
    sides: dict[str, set[int]] = {"train": set(), "validation": set()}
    for row in ingest(config).table.to_pylist():
        first, last = map(int, row["episode_id"].rsplit("/", 1)[-1].split("-"))
        sides[row["split"]] |= set(range(first, last + 1))
    assert all(sides.values()) and not sides["train"] & sides["validation"]


def test_segments_that_touch_belong_together_unless_a_recording_ends_between_them(tmp_path: Path) -> None:
    spans = [(10, 14), (15, 19), (20, 24), (12, 13), (40, 44)]
    write_calvin(tmp_path / "training", spans, recordings=[(0, 19), (20, 50)])
    groups = {r.episode_id.rsplit("/", 1)[-1]: r.group for r in records(tmp_path).values()}
    first = {"0000010-0000014", "0000015-0000019", "0000012-0000013"}
    assert {groups[name] for name in first} == {"training/0000010"}
    assert groups["0000020-0000024"] == "training/0000020" and groups["0000040-0000044"] == "training/0000040"


def test_a_segment_that_crosses_into_the_next_recording_is_refused(tmp_path: Path) -> None:
    write_calvin(tmp_path / "training", [(10, 14), (18, 23)], recordings=[(0, 19), (20, 50)])
    (problem,) = (r for r in calvin.listing(str(tmp_path)) if isinstance(r, RejectedRecord))
    assert (problem.video_id, problem.reason) == ("training/0000018-0000023", "bad_source")
    assert "recording that starts at 20" in problem.message
    assert list(records(tmp_path)) == ["training/0000010-0000014"]


def test_a_segment_beyond_the_corpus_or_without_sense_costs_itself_alone(tmp_path: Path) -> None:
    spans = [(10, 14), (14, 10), (0, 10**12), (20, 24), (10, 14)]
    write_calvin(tmp_path / "training", [spans[0], spans[3]], absent=[22])
    found = {"language": {"ann": [f"text {n % 4}" for n in range(5)]}, "info": {"indx": spans}}
    annotations = tmp_path / "training" / "lang_annotations" / "auto_lang_ann.npy"
    np.save(annotations, np.array(found, dtype=object), allow_pickle=True)
    problems = {
        r.video_id: (r.reason, r.message)
        for r in calvin.listing(str(tmp_path))
        if isinstance(r, RejectedRecord)
    }
    assert list(records(tmp_path)) == ["training/0000010-0000014"]
    assert problems["training/0000020-0000024"] == ("missing", "1 of the 5 frames 20 to 24 are not there")
    assert problems["training/0000000-1000000000000"][0] == "missing"
    assert [problems[f"training/lang_annotations/auto_lang_ann.npy[{n}]"][0] for n in (1, 4)] == [
        "bad_source"
    ] * 2


def test_both_folders_keep_the_splits_that_they_are(tmp_path: Path) -> None:
    write_calvin(tmp_path / "training", [(10, 14), (30, 34)])
    write_calvin(tmp_path / "validation", [(50, 54)])
    assert {e.split("/")[0]: r.split for e, r in records(tmp_path).items()} == {
        "training": "train",
        "validation": "validation",
    }


def test_signals_are_read_past_damaged_pictures(tmp_path: Path) -> None:
    write_calvin(tmp_path / "training", [(10, 14)])
    for frame in (tmp_path / "training").glob("*.npz"):
        content = bytearray(frame.read_bytes())
        at = content.index(b"rgb_static.npy") + 60
        content[at : at + 40] = b"\xff" * 40
        frame.write_bytes(content)
    signals = calvin.read_signals(records(tmp_path)["training/0000010-0000014"].signals_uri, "")
    assert signals.actions[:, 0].tolist() == pytest.approx([0.01, 0.011, 0.012, 0.013, 0.014])
    assert signals.proprio is not None
    assert (signals.proprio == np.arange(15) + np.arange(10, 15)[:, None]).all()


@pytest.mark.parametrize("compressed", [True, False])
def test_signals_behind_the_pictures_are_found_and_their_damage_is(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "episode_0000003.npz"
    save = np.savez_compressed if compressed else np.savez
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    save(path, rgb_static=noise, rel_actions=np.arange(7.0), robot_obs=np.arange(15, dtype=np.float32))
    uri = f"{tmp_path}#calvin=3,3"
    assert calvin.read_signals(uri, "").actions.tolist() == [list(range(7))]
    content = bytearray(path.read_bytes())
    content[content.index(b"rel_actions.npy") + 50] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"episode_0000003\.npz"):
        calvin.read_signals(uri, "")


def test_the_same_frames_under_another_text_are_an_episode_of_their_own(tmp_path: Path) -> None:
    write_calvin(tmp_path / "c" / "training", [(10, 14), (10, 14), (20, 24)])
    manifest = ingest(
        DataConfig(corpora={"c": CorpusConfig(path=str(tmp_path / "c"))}, manifest=str(tmp_path / "m"))
    )
    found = {
        (row["episode_id"], row["text"], row["num_frames"])
        for row in manifest.table.to_pylist()
        if row["camera"] == "static"
    }
    again = "training/0000010-0000014.2"
    first, last = "training/0000010-0000014", "training/0000020-0000024"
    assert found == {(first, "text 0", 5), (again, "text 1", 5), (last, "text 2", 5)}
