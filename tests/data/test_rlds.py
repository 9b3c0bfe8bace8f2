"""RLDS datasets as different builders write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tfrecords import bytes_list, example, float_list, int_list, message, write_tfrecord

from defi_platform.data.sources.formats import listing, read_signals
from defi_platform.data.sources.records import Note, VideoRecord
from defi_platform.errors import CorpusError

STEPS = 4


def features_of(*images: str) -> dict[str, Any]:
    """features.json of image features below steps/."""
    node: dict[str, Any] = {}
    for image in images:
        here = node
        for part in image.split("/")[:-1]:
            here = here.setdefault(part, {"featuresDict": {"features": {}}})["featuresDict"]["features"]
        here[image.rpartition("/")[2]] = {"image": {}}
    steps = {"sequence": {"feature": {"featuresDict": {"features": node}}}}
    return {"featuresDict": {"features": {"steps": steps}}}


def dataset(root: Path, *episodes: dict[str, bytes], image: str = "observation/image") -> Path:
    root.mkdir(parents=True)
    base = {
        "steps/is_first": int_list([1] + [0] * (STEPS - 1)),
        f"steps/{image}": bytes_list([b"jpeg"] * STEPS),
    }
    write_tfrecord(root / "mine-train.tfrecord-00000-of-00001", [example(base | more) for more in episodes])
    (root / "features.json").write_text(json.dumps(features_of(image)))
    return root


def listed(root: Path) -> tuple[list[VideoRecord], list[Note]]:
    items = list(listing("rlds", str(root), 5.0))
    assert all(isinstance(item, VideoRecord | Note) for item in items if not hasattr(item, "files"))
    return [i for i in items if isinstance(i, VideoRecord)], [i for i in items if isinstance(i, Note)]


def per_step(*texts: str) -> bytes:
    return bytes_list([text.encode() for text in texts])


@pytest.mark.parametrize(
    "more",
    [
        {"episode_metadata/language_instruction": per_step("do it")},
        {"language_instruction": per_step("do it")},
        {"steps/language_instruction": per_step("", " ", "do it", "do it")},
        {
            "steps/language_instruction": per_step(*[""] * 4),
            "steps/language_instruction_2": per_step(*["do it"] * 4),
        },
        {"steps/observation/natural_language_instruction": per_step(*["do it"] * 4)},
        {
            "steps/task": bytes_list([b"\xff\xd8\xff"] * 4),
            "episode_metadata/task_description": per_step("do it"),
        },
        {"steps/language_text": per_step(*["do it"] * 4), "episode_metadata/file_path": per_step("/x")},
    ],
)
def test_a_text_is_found_wherever_builders_put_it(tmp_path: Path, more: dict[str, bytes]) -> None:
    (record,), notes = listed(dataset(tmp_path / "d", more))
    assert record.text == "do it" and not notes


def test_a_text_that_changes_is_said(tmp_path: Path) -> None:
    more = {"steps/language_instruction": per_step("first", "first", "then", "then")}
    (record,), (note,) = listed(dataset(tmp_path / "d", more))
    assert record.text == "first" and note.kind == "changing_text" and "step 2" in note.message


def test_of_several_versions_the_newest_is_read_and_the_others_are_said(tmp_path: Path) -> None:
    dataset(tmp_path / "mine" / "1.9.0", {})
    for version in ("1.10.0", "0.1.0"):
        shutil.copytree(tmp_path / "mine" / "1.9.0", tmp_path / "mine" / version)
    (tmp_path / "mine" / "2.0.0").mkdir()  # a download that has only begun
    dataset(tmp_path / "other" / "config" / "1.0.0", {})
    records, notes = listed(tmp_path)
    assert {record.video_id.split("/mine-")[0] for record in records} == {"mine/1.10.0", "other/config/1.0.0"}
    assert [(note.kind, note.item) for note in notes] == [
        ("skipped", "mine/0.1.0"),
        ("skipped", "mine/1.9.0"),
    ]


@pytest.mark.parametrize(("name", "split"), [("val", "validation"), ("test", "validation"), ("train2", "")])
def test_the_splits_of_a_dataset_that_has_both_are_kept(tmp_path: Path, name: str, split: str) -> None:
    root = dataset(tmp_path / "d", {}, {})
    shutil.copy(root / "mine-train.tfrecord-00000-of-00001", root / f"mine-{name}.tfrecord-00000-of-00001")
    records, _ = listed(root)
    splits = {record.video_id.split("-")[1].partition(".")[0]: record.split for record in records}
    assert splits == {"train": "train" if split else "", name: split}


def test_actions_of_integers_and_of_parts_are_actions_and_unusable_ones_are_said(tmp_path: Path) -> None:
    arm, nan, inf = [float(n) for n in range(STEPS * 2)], float("nan"), float("inf")
    packed = [message(3, message(1, bytes(range(STEPS * 3))))]
    root = dataset(
        tmp_path / "d",
        {"steps/action": packed[0]},
        {"steps/action/arm": float_list(arm), "steps/action/gripper": float_list([9.0] * STEPS)},
        {"steps/action": float_list([nan, *arm, *arm][: STEPS * 3])},
        {"steps/action": float_list([inf] * 5)},
        {"steps/actions": float_list(arm)},
        {},
    )
    records, notes = listed(root)
    assert not notes and [record.num_actions for record in records] == [4, 4, 4, 4, 4, 0]
    assert read_signals("rlds", records[0].signals_uri, "").actions.tolist()[1] == [3, 4, 5]
    assert read_signals("rlds", records[1].signals_uri, "").actions.tolist()[1] == [2, 3, 9]
    for number, why in ((2, "no finite number"), (3, "5 values in 4 steps")):
        with pytest.raises(CorpusError, match=why):
            read_signals("rlds", records[number].signals_uri, "")


def test_steps_are_counted_by_the_frames_where_nothing_else_says_how_many(tmp_path: Path) -> None:
    root = dataset(tmp_path / "d", {})
    episode = {
        "steps/observation/image": bytes_list([b"jpeg"] * STEPS),
        "steps/action": float_list([0.0, 1.0] * STEPS),
    }
    write_tfrecord(root / "mine-train.tfrecord-00000-of-00001", [example(episode)])
    (record,), _ = listed(root)
    assert record.num_actions == STEPS
    assert read_signals("rlds", record.signals_uri, "").actions.tolist() == [[0, 1]] * STEPS


def test_images_beside_the_observation_are_cameras(tmp_path: Path) -> None:
    (record,), _ = listed(dataset(tmp_path / "d", {}, image="image"))
    assert record.camera == "image" and record.uri.endswith(",steps/image")
