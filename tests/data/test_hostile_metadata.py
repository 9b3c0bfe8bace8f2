"""Metadata of every format, changed at random: a listing ends with what can be used, or with one error of the corpus.

`DEFI_FUZZ_EXAMPLES` sets the number of changes that are tried per format.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import write_lerobot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tfrecords import bytes_list, example, float_list, int_list, write_tfrecord

from defi_platform.config import CorpusConfig
from defi_platform.data.ingest.store import VideoStore
from defi_platform.data.sources.formats import format_of, listing
from defi_platform.data.sources.records import ListingProgress
from defi_platform.errors import CorpusError

EXAMPLES = int(os.environ.get("DEFI_FUZZ_EXAMPLES", "25"))

ODD_VALUES = [
    "NaN", "null", "-1", "1e400", "9" * 30, '"x"', "[]", "{}", "[null]", '"\\ud83d"', "true", "[" * 20_000,
    '{"a": [1, {"b": null}]}', '"{nothing}"', '"../../x"', '"' + "y" * 200_000 + '"', "0.5", '""',
]  # fmt: skip


def _json(root: Path, name: str, content: object) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(content))


def plain(root: Path) -> None:
    (root / "a.mp4").write_bytes(b"x")
    (root / "t.csv").write_text("video,text\na.mp4,open\n")
    (root / "t.jsonl").write_text('{"video": "a.mp4", "text": "open"}\n')
    _json(root, "t.json", [{"file": "a.mp4", "caption": "open"}])
    pq.write_table(pa.table({"video": ["a.mp4"], "text": ["open"]}), root / "t.parquet")


def webdataset(root: Path) -> None:
    with tarfile.open(root / "0.tar", "w") as tar:
        for name, content in (
            ("k.mp4", b"x" * 600),
            ("k.json", b'{"caption": "do", "n": 3}'),
            ("k.txt", b"do"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def something(root: Path) -> None:
    (root / "1.webm").write_bytes(b"x")
    labels = [{"id": "1", "label": "a", "template": "[x]", "placeholders": ["a"]}, {"id": "2", "label": "b"}]
    _json(root, "labels/train.json", labels)
    _json(root, "labels/validation.json", labels[:1])


def annotated(root: Path) -> None:
    (root / "a.mp4").write_bytes(b"x")
    content = {
        "texts": ["t"],
        "videos": [{"video_path": "a.mp4"}],
        "video_length": 3,
        "actions": [[1, 2], [3, 4]],
    }
    _json(root, "annotation/train/0.json", content)


def lerobot_v3(root: Path) -> None:
    write_lerobot(root, [4, 4])
    (root / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "x"}\n')


def lerobot_v21(root: Path) -> None:
    info = {
        "codebase_version": "v2.1", "fps": 10, "chunks_size": 1000,
        "features": {"observation.images.front": {"dtype": "video"}, "action": {"dtype": "float32", "shape": [2]}},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }  # fmt: skip
    _json(root, "meta/info.json", info)
    (root / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "x"}\n')
    episodes = [{"episode_index": n, "tasks": ["x"], "length": 3} for n in (0, 1, 1)]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(map(json.dumps, episodes)))


def rlds(root: Path) -> None:
    features = {
        "steps/is_first": int_list([1, 0]),
        "steps/observation/image": bytes_list([b"jpeg", b"jpeg"]),
        "steps/language_instruction": bytes_list([b"do", b"do"]),
        "steps/action": float_list([0.0, 1.0]),
    }
    write_tfrecord(root / "m-train.tfrecord-00000-of-00001", [example(features)] * 2)
    images = {"observation": {"featuresDict": {"features": {"image": {"image": {}}}}}}
    steps = {"sequence": {"feature": {"featuresDict": {"features": images}}}}
    _json(root, "features.json", {"featuresDict": {"features": {"steps": steps}}})
    _json(root, "dataset_info.json", {"name": "m", "splits": [{"name": "train", "shardLengths": ["2"]}]})


def calvin(root: Path) -> None:
    folder = root / "training" / "lang_annotations"
    folder.mkdir(parents=True)
    content = {"language": {"ann": ["a", "b"]}, "info": {"indx": [(0, 1), (1, 2)]}}
    np.save(folder / "auto_lang_ann.npy", np.array(content, dtype=object), allow_pickle=True)
    for number in range(3):
        np.savez(
            root / "training" / f"episode_{number:07d}.npz", rel_actions=np.zeros(7), robot_obs=np.zeros(15)
        )


def hdf5(root: Path) -> None:
    with h5py.File(root / "e.hdf5", "w") as file:
        file["observations/images/front"] = np.zeros((3, 8, 8, 3), np.uint8)
        file["action"], file["text"] = np.zeros((3, 2)), "do"


MAKERS = [plain, webdataset, something, annotated, lerobot_v3, lerobot_v21, rlds, calvin, hdf5]


def _ends_well(root: Path, format_name: str) -> None:
    with contextlib.suppress(CorpusError):
        found = format_of("c", CorpusConfig(path=str(root)))
        for name in {found, format_name}:
            store = VideoStore("c")
            try:
                for item in listing(name, str(root), 5.0):
                    if not isinstance(item, ListingProgress):
                        store.add(item)
                store.load_committed(())
                store.rejected().read_all(), store.noted().read_all()
            finally:
                store.close()


@pytest.mark.parametrize("make", MAKERS, ids=[make.__name__ for make in MAKERS])
def test_changed_metadata_ends_in_records_or_in_one_error(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    root = tmp_path / "c"
    root.mkdir()
    make(root)
    videos = (".mp4", ".webm", ".npz")
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.suffix not in videos]
    _ends_well(root, make.__name__)

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(draw=st.data())
    def change(draw: st.DataObject) -> None:
        path = draw.draw(st.sampled_from(files))
        whole = path.read_bytes()
        kind = draw.draw(st.sampled_from(["value", "byte", "cut", "twice", "gone"]))
        place = draw.draw(st.integers(0, max(0, len(whole) - 1)))
        content: bytes | None
        if kind == "value":  # a value of JSON, or whatever stands between two signs
            value = draw.draw(st.sampled_from(ODD_VALUES)).encode()
            starts = [n + 1 for n, byte in enumerate(whole) if byte in b":[,"] or [0]
            start = starts[place % len(starts)]
            stop = min([len(whole), *(n for n in range(start, len(whole)) if whole[n] in b",}]\n")][:2][-1:])
            content = whole[:start] + value + whole[stop:]
        elif kind == "byte":
            content = whole[:place] + bytes([draw.draw(st.integers(0, 255))]) + whole[place + 1 :]
        else:
            content = {"cut": whole[:place], "twice": whole + whole, "gone": None}[kind]
        try:
            path.unlink() if content is None else path.write_bytes(content)
            _ends_well(root, make.__name__)
        finally:
            path.write_bytes(whole)

    change()
