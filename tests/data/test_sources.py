"""Corpus formats: real datasets where there are some, small ones in the exact layout where not."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import numbers_of, picture, write_lerobot, write_video
from PIL import Image
from tfrecords import bytes_list, example, float_list, int_list, write_tfrecord

from defi_platform import storage
from defi_platform.config import CorpusConfig, DecodeConfig
from defi_platform.data.decode.messages import DecodeJob, Probe, ProbeJob
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sources.formats import format_of, listing, read_signals
from defi_platform.data.sources.records import Note, RejectedRecord, VideoRecord
from defi_platform.data.sources.rlds.tfrecord import parse_example, read_features, record_spans
from defi_platform.errors import CorpusError
from defi_platform.storage.range_file import RangeFile


def list_corpus(root: Path, fps: float | None = None) -> tuple[str, dict[str, VideoRecord], dict[str, str]]:
    """(detected format, records by id, reason of rejection by id)."""
    found = format_of("c", CorpusConfig(path=str(root)))
    items = list(listing(found, str(root), fps))
    records = {item.video_id: item for item in items if isinstance(item, VideoRecord)}
    rejected = {item.video_id: item.reason for item in items if isinstance(item, RejectedRecord)}
    assert len(records) + len(rejected) == sum(not isinstance(item, Note) for item in items)
    return found, records, rejected


def probed(uri: str) -> Probe | BadVideo:
    with DecoderPool(DecodeConfig()) as pool:
        (answer,) = pool.run([ProbeJob(uri)])
    assert not isinstance(answer, np.ndarray)
    return answer


def frames_of(uri: str, indices: tuple[int, ...]) -> np.ndarray:
    with DecoderPool(DecodeConfig()) as pool:
        (answer,) = pool.run([DecodeJob(uri, indices, 64, 64, 64, 64)])
    assert isinstance(answer, np.ndarray), answer
    return answer


# --------------------------------------------------------------------------- real datasets


def test_lerobot_v21_lists_every_episode_of_its_meta_and_the_absent_as_missing(shared_data: Path) -> None:
    found, records, rejected = list_corpus(shared_data / "lerobot_v21" / "g1")
    assert found == "lerobot_v21"
    assert set(records) == {f"episode_00000{n}/observation.images.cam_high" for n in (1, 2)}
    assert len(rejected) == 98 and set(rejected.values()) == {"missing"}
    first = records["episode_000001/observation.images.cam_high"]
    assert (first.num_frames, first.fps, first.camera) == (393, 30.0, "cam_high")
    assert first.text == "Pick up the yellow bottle on the table."
    signals = read_signals(found, first.signals_uri, first.episode_id)
    assert signals.actions.shape == (393, 26)
    assert signals.proprio is not None and signals.proprio.shape == (393, 26)


def test_rlds_episodes_are_read_without_tensorflow(shared_data: Path) -> None:
    found, records, rejected = list_corpus(shared_data / "rlds")
    assert found == "rlds"
    assert len(records) == 25 * 4 and list(rejected.values()) == ["missing"]
    record = next(record for record in records.values() if record.camera == "image_0")
    assert (record.num_frames, record.fps, record.text) == (
        10,
        5.0,
        "put cup from counter or drying rack into sink",
    )
    probe = probed(record.uri)
    assert isinstance(probe, Probe)
    assert (probe.num_frames, probe.codec, probe.decoder) == (10, "jpeg", "store")
    signals = read_signals(found, record.signals_uri, record.episode_id)
    assert signals.actions.shape == (10, 7) and signals.proprio is not None
    frames = frames_of(record.uri, (0, 9, 3))
    assert frames.shape == (3, 64, 64, 3) and frames.std() > 20


def test_calvin_segments_carry_their_text_and_relative_actions(shared_data: Path) -> None:
    found, records, rejected = list_corpus(shared_data / "calvin")
    assert found == "calvin" and not rejected
    assert {c.split for c in records.values() if c.video_id.startswith("validation")} == {"validation"}
    record = records["training/0001000-0001035/static"]
    assert (record.text, record.num_frames, record.fps) == (
        "push down the button to turn on the led",
        36,
        30.0,
    )
    signals = read_signals(found, record.signals_uri, record.episode_id)
    assert signals.actions.shape == (36, 7) and np.abs(signals.actions).max() <= 1
    assert signals.proprio is not None and signals.proprio.shape == (36, 15)
    with np.load(shared_data / "calvin" / "training" / "episode_0001005.npz") as frame:
        true = np.asarray(Image.fromarray(frame["rgb_static"]).resize((64, 64), Image.Resampling.BILINEAR))
    assert (frames_of(record.uri, (5,))[0] == true).all()


def test_annotated_actions_are_one_fewer_than_states(shared_data: Path) -> None:
    found, records, _ = list_corpus(shared_data / "videos" / "bridge")
    record = records["val/10/0"]
    signals = read_signals(found, record.signals_uri, record.episode_id)
    assert found == "annotated" and record.num_actions == 23
    assert signals.proprio is not None and len(signals.actions) == len(signals.proprio) == 23


# --------------------------------------------------------------------------- damage


def test_a_calvin_segment_with_a_frame_gone_is_missing(shared_data: Path, tmp_path: Path) -> None:
    shutil.copytree(shared_data / "calvin" / "validation", tmp_path / "c" / "validation")
    for folder in (tmp_path / "c" / "validation", tmp_path / "c"):
        folder.chmod(0o755)
    next((tmp_path / "c" / "validation").glob("*.npz")).unlink()
    _, records, rejected = list_corpus(tmp_path / "c")
    assert (len(records), list(rejected.values())) == (4, ["missing"])


class Exploit:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch /tmp/defi-exploited",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c" / "training" / "lang_annotations" / "auto_lang_ann.npy"
    path.parent.mkdir(parents=True)
    np.save(path, np.array({"info": Exploit()}, dtype=object), allow_pickle=True)
    with pytest.raises(CorpusError, match="is not allowed in annotations"):
        list_corpus(tmp_path / "c")


@pytest.mark.parametrize(
    ("damage", "reason", "left"),
    [
        ("cut", "corrupt", 24 * 4),
        ("header", "corrupt", 0),
        ("middle", "corrupt", 12 * 4),
        ("data", "corrupt", 25 * 4),
    ],
)
def test_damage_to_a_tfrecord_costs_the_episodes_it_hits(
    shared_data: Path, tmp_path: Path, damage: str, reason: str, left: int
) -> None:
    source = shared_data / "rlds" / "bridge_dataset" / "1.0.0"
    for name in ("features.json", "bridge_dataset-train.tfrecord-00000-of-00001"):
        shutil.copyfile(source / name, tmp_path / name)
    (tmp_path / "dataset_info.json").write_text('{"name": "bridge_dataset", "splits": []}')
    path = tmp_path / "bridge_dataset-train.tfrecord-00000-of-00001"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-100]
    starts = (
        [start for start, _ in record_spans(io.BytesIO(content), len(content))] if damage == "middle" else [0]
    )
    place_of = {"cut": 0, "header": 3, "middle": starts[len(starts) // 2] - 8, "data": 100_000}
    content[place_of[damage]] ^= 0 if damage == "cut" else 0xFF
    path.write_bytes(content)
    _, records, rejected = list_corpus(tmp_path)
    assert len(records) == left
    if damage == "data":  # listing reads no checksums of data; the probe of the episode does
        first = next(c for c in records.values())
        answer = probed(first.uri)
        assert isinstance(answer, BadVideo) and answer.reason == reason
    else:
        assert list(rejected.values()) == [reason]


def test_listing_rlds_steps_over_the_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps of 100 kB each, whose frames stand between what a listing reads."""
    features = {
        "steps/is_first": int_list([1] + [0] * 9),
        "steps/observation/image": bytes_list([os.urandom(100_000) for _ in range(10)]),
        "steps/language_instruction": bytes_list([b"fold the towel"] * 10),
        "steps/action": float_list([0.5] * 70),
    }
    record = example(features)
    write_tfrecord(tmp_path / "mine-train.tfrecord-00000-of-00001", [record] * 3)
    (tmp_path / "features.json").write_text(json.dumps(RLDS_FEATURES))
    opened: list[Counted] = []

    def open_counted(uri: str) -> Counted:
        opened.append(Counted(uri))
        return opened[-1]

    monkeypatch.setattr(storage, "open_seekable", open_counted)
    _, records, rejected = list_corpus(tmp_path, fps=5.0)
    assert not rejected and len(records) == 3
    assert {(c.text, c.num_frames, c.num_actions) for c in records.values()} == {("fold the towel", 10, 10)}
    assert sum(file.count for file in opened) < 3 * 20_000
    wanted = frozenset(features) - {"steps/observation/image"}
    sparse = read_features(io.BytesIO(record), 0, len(record), wanted)
    whole = parse_example(record)
    assert sparse.keys() == wanted and all(np.array_equal(sparse[n], whole[n]) for n in wanted)


class Counted(io.BufferedReader):
    """Counts the bytes that are asked for."""

    def __init__(self, uri: str) -> None:
        super().__init__(io.FileIO(uri))
        self.count = 0

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        self.count += len(found)
        return found


RLDS_FEATURES = {
    "featuresDict": {
        "features": {
            "steps": {
                "sequence": {
                    "feature": {
                        "featuresDict": {
                            "features": {
                                "observation": {"featuresDict": {"features": {"image": {"image": {}}}}}
                            }
                        }
                    }
                }
            }
        }
    }
}


def test_lerobot_metadata_of_zero_bytes_is_one_clear_error(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "c", [10, 10])
    (root / "meta" / "info.json").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"meta/info\.json cannot be used"):
        list_corpus(root)


@pytest.mark.parametrize("tasks", [["pick it"], "pick it", {"task_index": 0, "task": "pick it"}, [0], 0])
def test_lerobot_tasks_are_understood_in_every_shape_seen(tmp_path: Path, tasks: object) -> None:
    (tmp_path / "meta").mkdir()
    info = {
        "codebase_version": "v2.1",
        "fps": 10,
        "chunks_size": 1000,
        "features": {"observation.images.front": {"dtype": "video"}},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (tmp_path / "meta" / "info.json").write_text(json.dumps(info))
    (tmp_path / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "pick it"}\n')
    (tmp_path / "meta" / "episodes.jsonl").write_text(
        json.dumps({"episode_index": 0, "tasks": tasks, "length": 10})
    )
    write_video(tmp_path / "videos/chunk-000/observation.images.front/episode_000000.mp4", range(10))
    _, records, _ = list_corpus(tmp_path)
    assert records["episode_000000/observation.images.front"].text == "pick it"


# --------------------------------------------------------------------------- small datasets


def test_plain_videos_take_their_texts_from_a_table(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_video(tmp_path / f"{name}.mp4", range(5))
    (tmp_path / "one.csv").write_text("video,text\na.mp4,open the door\ngone.mp4,x\n")
    (tmp_path / "two.jsonl").write_text('{"file_name": "b", "caption": "close it"}\n')
    found, records, rejected = list_corpus(tmp_path)
    assert found == "plain" and rejected == {"gone.mp4": "missing"}
    assert {key: record.text for key, record in records.items()} == {
        "a.mp4": "open the door",
        "b.mp4": "close it",
        "c.mp4": "",
    }


def test_a_parquet_table_of_texts_works_too(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", range(5))
    pq.write_table(pa.table({"path": ["a.mp4"], "label": ["wave"]}), tmp_path / "texts.parquet")
    assert list_corpus(tmp_path)[1]["a.mp4"].text == "wave"


def test_something_something_labels_name_the_videos_and_unlabelled_ones_are_counted(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_video(tmp_path / "videos" / f"{number}.webm", range(5), codec="libvpx-vp9")
    (tmp_path / "labels").mkdir()
    labels = [
        {"id": "1", "label": "pushing a cup", "template": "Pushing [something]", "placeholders": ["a cup"]},
        {"id": "9", "label": "gone", "template": "", "placeholders": []},
    ]
    (tmp_path / "labels" / "train.json").write_text(json.dumps(labels))
    (tmp_path / "labels" / "test.json").write_text(json.dumps([{"id": "2"}]))
    found, records, rejected = list_corpus(tmp_path)
    assert found == "something"
    assert {key: record.text for key, record in records.items()} == {"1": "pushing a cup"}
    assert rejected == {"2": "no_text", "3": "no_text", "9": "missing"}


def test_webdataset_videos_are_read_inside_their_tar(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "000.tar", "w") as tar:
        for number in range(3):
            write_video(tmp_path / "v.mp4", range(number * 20, number * 20 + 20))
            text = json.dumps({"caption": f"do {number}"}).encode()
            for name, content in (
                (f"k{number}.mp4", (tmp_path / "v.mp4").read_bytes()),
                (f"k{number}.json", text),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (tmp_path / "v.mp4").unlink()
    found, records, rejected = list_corpus(tmp_path)
    assert found == "webdataset" and not rejected
    record = records["shards/000/k2"]
    assert record.text == "do 2"
    probe = probed(record.uri)
    assert isinstance(probe, Probe) and probe.num_frames == 20
    assert numbers_of(frames_of(record.uri, (0, 19, 7))) == [40, 59, 47]


def test_a_tar_cut_short_loses_its_last_video_by_name(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", range(20))
    content = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "v.mp4").unlink()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("k0.mp4", "k1.mp4"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: 512 + len(content) + 1500])
    _, records, rejected = list_corpus(tmp_path)
    outcomes = {key: probed(record.uri) for key, record in records.items()}
    assert isinstance(outcomes["a/k0"], Probe)
    bad = [key for key, outcome in outcomes.items() if isinstance(outcome, BadVideo)]
    assert bad or rejected


@pytest.mark.parametrize("compressed", [True, False])
def test_hdf5_episodes_give_frames_actions_and_text(tmp_path: Path, compressed: bool) -> None:
    with h5py.File(tmp_path / "episode_0.hdf5", "w") as file:
        file.attrs["compress"] = compressed
        if compressed:
            encoded = []
            for number in range(12):
                buffer = io.BytesIO()
                Image.fromarray(picture(number)).save(buffer, "JPEG", quality=95)
                encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
            data = file.create_dataset("observations/images/front", (12,), h5py.vlen_dtype(np.uint8))
            for number, content in enumerate(encoded):
                data[number] = content
        else:
            file["observations/images/front"] = np.stack([picture(number) for number in range(12)])
        file["action"] = np.arange(24, dtype=np.float64).reshape(12, 2)
        file["observations/qpos"] = np.ones((12, 5))
        file["text"] = "fold the towel"
    found, records, _ = list_corpus(tmp_path, fps=20.0)
    record = records["episode_0/front"]
    assert (found, record.text, record.num_actions, record.fps) == ("hdf5", "fold the towel", 12, 20.0)
    assert isinstance(probed(record.uri), Probe)
    assert numbers_of(frames_of(record.uri, (0, 11, 6))) == [0, 11, 6]
    signals = read_signals(found, record.signals_uri, record.episode_id)
    assert (
        signals.actions.shape == (12, 2) and signals.proprio is not None and signals.proprio.shape == (12, 5)
    )


def test_a_store_that_fails_while_hdf5_is_listed_is_an_error_and_no_file_is_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with h5py.File(tmp_path / "episode_0.hdf5", "w") as file:
        file["observations/images/front"] = np.zeros((2, 8, 8, 3), np.uint8)

    def refuse(start: int, stop: int) -> bytes:
        raise storage.StorageError("the store is down")

    monkeypatch.setattr(storage, "open_seekable", lambda uri: RangeFile(refuse, 5000, 100))
    with pytest.raises(storage.StorageError, match="the store is down"):
        list_corpus(tmp_path, fps=10.0)


def test_hdf5_without_a_rate_asks_for_one(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "episode_0.hdf5", "w") as file:
        file["observations/images/front"] = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(CorpusError, match=r"data\.corpora\.NAME\.fps"):
        list_corpus(tmp_path)
