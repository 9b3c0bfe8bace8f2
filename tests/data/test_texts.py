"""Texts of videos as people write them: each video gets its own, and what fits none or several is said."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import write_video

from defi_platform.config import CorpusConfig, DataConfig
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.loader.robot_signals import SignalReader
from defi_platform.data.sources import plain
from defi_platform.data.sources.formats import format_of, listing, read_signals
from defi_platform.data.sources.records import Note, RejectedRecord, VideoRecord
from defi_platform.errors import CorpusError

Listed = tuple[dict[str, str], dict[str, str], list[tuple[str, str]]]


def listed(root: Path, expected_format: str = "plain") -> Listed:
    """(texts by id, reasons of rejection by id, notes as (kind, item)); the files need not be videos."""
    found = format_of("c", CorpusConfig(path=str(root)))
    assert found == expected_format
    items = list(listing(found, str(root), None))
    texts = {item.video_id: item.text for item in items if isinstance(item, VideoRecord)}
    rejected = {item.video_id: item.reason for item in items if isinstance(item, RejectedRecord)}
    return texts, rejected, [(item.kind, item.item) for item in items if isinstance(item, Note)]


def write(root: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)


def videos(root: Path, *names: str) -> Path:
    write(root, dict.fromkeys(names, b"video"))
    return root


OPEN_CLOSE = {"a.mp4": "open", "b.mp4": "close"}

TABLES = {
    "byte order mark": ("t.csv", "\ufeffvideo,text\na.mp4,open\nb.mp4,close\n"),
    "utf-16": ("t.csv", "video\ttext\na.mp4\topen\nb.mp4\tclose\n".encode("utf-16")),
    "semicolons": ("t.csv", "video;text\na.mp4;open\nb.mp4;close\n"),
    "tabs": ("t.tsv", "video\ttext\r\na.mp4\topen\r\nb.mp4\tclose\r\n"),
    "capital letters": ("T.CSV", "Video , Text\na.mp4,open\nb.mp4,close\n"),
    "filepath after an id": ("t.csv", "id,filepath,text\n17,a.mp4,open\n18,b.mp4,close\n"),
    "paths of another machine": ("t.csv", "path,text\n/data/x/a.mp4,open\n.\\b.mp4,close\n"),
    "stems": ("t.jsonl", '{"id": "a", "caption": "open"}\n\n{"id": "b", "caption": ["close", "shut"]}'),
    "a list": ("captions.json", '[{"id": "a", "caption": "open"}, {"id": "b", "caption": "close"}]'),
    "a list in a mapping": (
        "t.json",
        '{"x": 1, "s": [{"video_id": "a", "caption": "open"}, {"key": "b", "text": "close"}]}',
    ),
    "a mapping": ("t.json", '{"a": "open", "b.mp4": {"text": "close"}, "notes": 3}'),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_are_read_as_people_write_them(tmp_path: Path, kind: str) -> None:
    name, content = TABLES[kind]
    write(videos(tmp_path, *OPEN_CLOSE), {name: content})
    assert listed(tmp_path) == (OPEN_CLOSE, {}, [])


@pytest.mark.parametrize(("rows", "characters"), [(1, 1 << 20), (3, 1 << 20), (1_000, 1)])
def test_rows_are_looked_up_at_once_whatever_kinds_of_names_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, characters: int
) -> None:
    monkeypatch.setattr(plain, "LOOKED_UP_ROWS", rows)
    monkeypatch.setattr(plain, "LOOKED_UP_CHARACTERS", characters)
    videos(
        tmp_path,
        "s/a.mp4",
        "a.mp4",
        "s/\u00e9.mp4",
        "s/x/b.mp4",
        "s/c'\"%.mp4",
        "d\t.mp4",
        "s/e.mp4",
        "p/f.mp4",
        "q/f.mp4",
    )
    table = 'video,text\na.mp4,1\ns/\u00e9.mp4,2\nb,3\n"c\'""%.mp4",4\n"d\t.mp4",5\n1,2,3\nf.mp4,6\nnone,7\n,8\n./e.mp4,9\n'
    write(tmp_path, {"s/captions.csv": table})
    texts, rejected, notes = listed(tmp_path)
    assert texts == {
        "s/a.mp4": "1", "a.mp4": "", "s/\u00e9.mp4": "2", "s/x/b.mp4": "3", "s/c'\"%.mp4": "4", "d\t.mp4": "5",
        "s/e.mp4": "9", "p/f.mp4": "", "q/f.mp4": "",
    }  # fmt: skip
    assert set(rejected) == {"s/captions.csv:6", "s/captions.csv:9", "none"}
    assert notes == [("ambiguous", "s/captions.csv:7"), ("unmatched", "s/captions.csv:8")]


def test_ids_are_numbers_as_tables_write_them(tmp_path: Path) -> None:
    videos(tmp_path, "0.mp4", "1.mp4", "002.mp4", "3.mp4")
    pq.write_table(
        pa.table({"id": [0.0, 1.0, float("nan")], "text": ["zero", "one", "x"]}), tmp_path / "t.parquet"
    )
    write(tmp_path, {"t.jsonl": '{"id": 2, "text": "two"}\n', "u.csv": "id,text\n3.0,three\n"})
    texts, rejected, notes = listed(tmp_path)
    assert texts == {"0.mp4": "zero", "1.mp4": "one", "002.mp4": "two", "3.mp4": "three"}
    assert (rejected, notes) == ({"t.parquet:3": "bad_source"}, [])  # a text of nothing


def test_a_name_that_fits_several_videos_is_said_and_not_guessed(tmp_path: Path) -> None:
    videos(tmp_path, "p/a.mp4", "q/a.mp4", "q/b.mp4", "b.mp4", "r/1/c.mp4", "r/2/c.mp4", "d.mp4")
    rows = [
        "a.mp4,which",
        "b.mp4,top",
        "q/b.mp4,q",
        "1/c.mp4,one",
        "x/d.mp4,x",
        "y/d.mp4,y",
        "gone.mp4,x",
        "z/b,?",
    ]
    write(tmp_path, {"t.csv": "file,text\n" + "\n".join(rows)})
    texts, rejected, notes = listed(tmp_path)
    assert {name: text for name, text in texts.items() if text} == {
        "b.mp4": "top",
        "q/b.mp4": "q",
        "r/1/c.mp4": "one",
    }
    assert rejected == {"gone.mp4": "missing"}
    assert notes == [("ambiguous", "t.csv:1"), ("unmatched", "t.csv:7"), ("ambiguous", "d.mp4")]


def test_tables_of_sub_folders_are_about_their_folder(tmp_path: Path) -> None:
    videos(tmp_path, "train/a.mp4", "test/a.mp4")
    for folder in ("train", "test"):
        write(tmp_path, {f"{folder}/metadata.csv": f"file_name,text\na.mp4,{folder} text\n"})
    assert listed(tmp_path) == ({"train/a.mp4": "train text", "test/a.mp4": "test text"}, {}, [])


def test_a_damaged_row_costs_itself_only(tmp_path: Path) -> None:
    videos(tmp_path, "a.mp4", "b.mp4", "c.mp4", "d.mp4")
    separator = "\u2028"
    lines = [
        f'{{"video": "a.mp4", "text": "one{separator}two"}}',
        '{"video": "b.mp4", "te',
        '{"video": "c.mp4", "text": "half \\ud83d"}',
        "[" * 100_000,
        '{"video": null, "text": "of nothing"}',
        '{"video": "d.mp4", "text": NaN}',
    ]
    write(
        tmp_path,
        {"t.jsonl": "\n".join(lines), "u.csv": 'video,text\nd.mp4,"open, then close"\nc.mp4,open, then\n'},
    )
    write(tmp_path, {"damaged.json": '[{"id": ', "long.csv": "video,text\nb.mp4," + "x" * 200_000})
    write(tmp_path, {"cut.parquet": b"PAR1", "latin.csv": "video,text\nb.mp4,\xf6ffnen\n".encode("latin-1")})
    texts, rejected, _ = listed(tmp_path)
    assert texts == {"a.mp4": f"one{separator}two", "b.mp4": "", "c.mp4": "", "d.mp4": "open, then close"}
    assert set(rejected) == {
        *(f"t.jsonl:{number}" for number in (2, 3, 4, 5)),
        *("u.csv:2", "damaged.json:1", "long.csv:1", "cut.parquet:1", "latin.csv:1"),
    }
    assert set(rejected.values()) == {"bad_source"}


def test_of_several_texts_of_one_video_the_last_counts_and_it_is_said(tmp_path: Path) -> None:
    write(
        videos(tmp_path, "a.mp4"), {"t.csv": "video,text\na.mp4,one\na.mp4,two\n", "log.csv": "time,x\n1,2\n"}
    )
    assert listed(tmp_path) == ({"a.mp4": "two"}, {}, [("skipped", "log.csv"), ("repeated", "a.mp4")])


# --------------------------------------------------------------------------- WebDataset


def shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_videos_of_one_sample_are_its_cameras(tmp_path: Path) -> None:
    for name, ending in (("json", ".json"), ("none", ".log")):
        members = {
            f"k{n}{end}": content
            for n in range(2)
            for end, content in ((".base.mp4", b"0"), (".pose.mp4", b"1"), (ending, b'{"caption": "do"}'))
        }
        shard(tmp_path / f"{name}.tar", members)
    found = [i for i in listing("webdataset", str(tmp_path), None) if isinstance(i, VideoRecord)]
    assert {(r.video_id, r.camera, r.episode_id, r.text) for r in found} == {
        (f"{tar}/k{n}.{camera}", camera, f"{tar}/k{n}", text)
        for tar, text in (("json", "do"), ("none", ""))
        for n in range(2)
        for camera in ("base", "pose")
    }


def test_dots_in_names_part_no_samples_and_texts_are_found_wherever_they_are(tmp_path: Path) -> None:
    shard(
        tmp_path / "0.tar",
        {
            "clip_1.5x.mp4": b"0", "clip_1.5x.txt": b"slow", "./clip_1.75x.MP4": b"1", "clip_1.75x.TXT": b"fast",
            "t.txt": b"pick it up", "t.json": b'{"url": "x"}', "t.mp4": b"2", "l.mp4": b"3", "l.json": b'["lift"]',
            "._t.mp4": b"apple", "two.mp4": b"4", "two.webm": b"5", "lost.txt": b"of nothing",
            "bad.mp4": b"6", "bad.json": b'{"caption": bro', "last.mp4": b"7", "last.json": b'{"captions": ["x"]}',
        },
    )  # fmt: skip
    texts, rejected, notes = listed(tmp_path, "webdataset")
    assert texts == {
        "0/clip_1.5x": "slow", "0/clip_1.75x": "fast", "0/t": "pick it up", "0/l": "lift", "0/two.mp4": "",
        "0/two.webm": "", "0/last": "x",
    }  # fmt: skip
    assert rejected == {"0/bad": "bad_source"}
    assert sorted(notes) == [("skipped", "0/._t.mp4"), ("unmatched", "0/lost")]


# --------------------------------------------------------------------------- Something-Something, annotations


def test_equal_names_in_two_folders_are_said_and_own_splits_kept(tmp_path: Path) -> None:
    videos(tmp_path, "v/1.webm", "v/2.webm", "w/2.webm", "v/3.webm", "v/4.webm")
    labels = [
        {"id": 1, "label": "a"},
        {"id": "2", "label": "b"},
        {"label": "no id"},
        {"id": None, "label": "x"},
    ]
    template = {
        "id": "3",
        "template": "Pushing [something] to [somewhere]",
        "placeholders": ["a cup", "the left"],
    }
    write(
        tmp_path,
        {
            "labels/train.json": json.dumps([*labels, {"id": "4", "label": "d"}]),
            "labels/validation.json": json.dumps([template]),
            "labels/unlabelled.json": json.dumps([{"id": "1"}]),
            "labels/damaged.json": "[{",
        },
    )
    items = list(listing("something", str(tmp_path), None))
    records = {i.video_id: (i.text, i.split) for i in items if isinstance(i, VideoRecord)}
    assert records == {
        "1": ("a", "train"), "3": ("Pushing a cup to the left", "validation"), "4": ("d", "train"),
    }  # fmt: skip
    _, rejected, notes = listed(tmp_path, "something")
    assert rejected == {
        "v/2": "no_text", "w/2": "no_text", "train.json:3": "bad_source", "train.json:4": "bad_source",
        "damaged.json": "bad_source",
    }  # fmt: skip
    assert notes == [("ambiguous", "train.json:2")]


def test_annotations_give_their_texts_splits_and_usable_actions(tmp_path: Path) -> None:
    videos(tmp_path, *(f"v/{n}.mp4" for n in range(6)))
    kinds = {
        "train/0": {"texts": "one"},
        "train/1": {"texts": [None, "two"], "actions": [[1, 2], [3, 4]]},
        "train/2": {"texts": [None], "actions": [[1, 2], [3, float("nan")]]},
        "val/3": {"texts": ["three"], "action": [[1], [2, 3]]},
        "val/4": {"texts": ["four"], "actions": [[1, 2, 3]]},
    }
    for name, more in kinds.items():
        write(
            tmp_path,
            {
                f"annotation/{name}.json": json.dumps(
                    {"videos": [{"video_path": f"./v/{name[-1]}.mp4"}]} | more
                )
            },
        )
    write(tmp_path, {"annotation/val/9.json": "[" * 100_000})
    items = list(listing("annotated", str(tmp_path), None))
    assert {i.video_id: (i.text, i.split, i.num_actions) for i in items if isinstance(i, VideoRecord)} == {
        "train/0/0": ("one", "train", 0),
        "train/1/0": ("two", "train", 2),
        "train/2/0": ("", "train", 2),
        "val/3/0": ("three", "validation", 2),
        "val/4/0": ("four", "validation", 1),
    }
    _, rejected, notes = listed(tmp_path, "annotated")
    assert rejected == {"val/9": "bad_source"}
    assert notes == [("skipped", "v/5.mp4")]
    for episode in ("train/2", "val/3"):
        with pytest.raises(CorpusError, match="action: "):
            read_signals("annotated", str(tmp_path / "annotation" / f"{episode}.json"), episode)


def test_actions_that_are_edited_in_an_annotation_are_read_again(tmp_path: Path) -> None:
    write_video(tmp_path / "c" / "v.mp4", range(4))
    config = DataConfig(
        corpora={"c": CorpusConfig(path=str(tmp_path / "c"))}, manifest=str(tmp_path / "m"), holdout=0.0
    )
    for value in (1.0, 7.0):
        content = json.dumps({"videos": [{"video_path": "v.mp4"}], "action": [[value, 0.5]] * 4})
        write(tmp_path / "c", {"annotation/train/0.json": content})
        assert SignalReader().of_row(ingest(config), 0).actions.tolist() == [[value, 0.5]] * 4
