"""LeRobot datasets as they are found: timestamps that drift or contradict, texts in every place, wrong pointers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from defi_platform.data.decode.messages import Probe
from defi_platform.data.ingest.alignment import Placed, place
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sources.formats import listing, read_signals
from defi_platform.data.sources.records import RejectedRecord, VideoRecord
from defi_platform.errors import CorpusError

FPS = 10
KEY = "observation.images.front"

Row = dict[str, Any]


def write_dataset(
    root: Path,
    lengths: Sequence[int],
    change: Callable[[int, Row], None] = lambda episode, row: None,
    cameras: Sequence[str] = (KEY,),
    data_files: Callable[[int], int] = lambda episode: 0,
) -> Path:
    """A LeRobot v3.0 dataset whose videos are empty files; `change` edits the row of an episode.

    Action of step t in episode e is (e, t), its state (t, e).
    """
    for folder in (
        "meta/episodes/chunk-000",
        "data/chunk-000",
        *(f"videos/{key}/chunk-000" for key in cameras),
    ):
        (root / folder).mkdir(parents=True)
    for key in cameras:
        (root / f"videos/{key}/chunk-000/file-000.mp4").touch()
    rows, start, tables = [], 0, dict[int, list[Row]]()
    for episode, length in enumerate(lengths):
        row: Row = {"episode_index": episode, "length": length, "tasks": [f"text {episode}"]}
        row |= {"data/chunk_index": 0, "data/file_index": data_files(episode)}
        for key in cameras:
            row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": 0}
            row |= {f"videos/{key}/from_timestamp": start / FPS}
            row |= {f"videos/{key}/to_timestamp": (start + length) / FPS}
        change(episode, row)
        rows.append(row)
        start += length
        tables.setdefault(data_files(episode), []).extend(
            {
                "action": [float(episode), float(t)],
                "observation.state": [float(t), float(episode)],
                "episode_index": episode,
                "frame_index": t,
                "task_index": episode,
            }
            for t in range(length)
        )
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    for number, steps in tables.items():
        pq.write_table(pa.Table.from_pylist(steps), root / f"data/chunk-000/file-{number:03d}.parquet")
    tasks = {
        "task_index": list(range(len(lengths))),
        "__index_level_0__": [f"text {e}" for e in range(len(lengths))],
    }
    pq.write_table(pa.table(tasks), root / "meta/tasks.parquet")
    vector = {"dtype": "float32", "shape": [2], "names": ["x", "y"]}
    features = {key: {"dtype": "video"} for key in cameras} | {"action": vector, "observation.state": vector}
    info = {"codebase_version": "v3.0", "fps": FPS, "features": features}
    info |= {"data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"}
    info |= {"video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"}
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def listed(root: Path, format_name: str = "lerobot_v3") -> tuple[list[VideoRecord], dict[str, str]]:
    """(records, message of each rejection by id)."""
    items = list(listing(format_name, str(root), None))
    rejected = {
        i.video_id: i.message for i in items if isinstance(i, RejectedRecord) and i.reason == "bad_source"
    }
    return [item for item in items if isinstance(item, VideoRecord)], rejected


def probe_of(times: Sequence[float] | int, fps: float = FPS) -> Probe:
    """Of a file with frames at `times`, or of so many frames at `fps`."""
    known = dict.fromkeys(Probe.__dataclass_fields__, 0) | {
        "num_frames": times,
        "fps": fps,
        "variable_rate": False,
    }
    known |= {"times": (), "frame_scores": None, "codec": "h264", "decoder": "pyav"}
    if not isinstance(times, int):
        known |= {"num_frames": len(times), "fps": (len(times) - 1) / times[-1], "variable_rate": True}
        known |= {"times": tuple(times)}
    return Probe(**known)


def firsts(root: Path, probe: Probe) -> list[int | str]:
    """First frame of each record, or the reason why there is none."""
    found = [place(record, probe) for record in listed(root)[0]]
    return [one.first if isinstance(one, Placed) else one.reason for one in found]


def shifted(seconds: Callable[[int], float]) -> Callable[[int, Row], None]:
    def change(episode: int, row: Row) -> None:
        for name in ("from_timestamp", "to_timestamp"):
            row[f"videos/{KEY}/{name}"] += seconds(episode)

    return change


LENGTHS = [7, 12, 5, 30, 2, 9, 14, 21, 3, 8, 11, 6]
STARTS = np.cumsum([0, *LENGTHS[:-1]]).tolist()
FRAMES = sum(LENGTHS)


@pytest.mark.parametrize("drift", [0.0, 0.012, -0.004, 1e-7, 0.049])
def test_timestamps_that_drift_lead_to_the_right_frames(tmp_path: Path, drift: float) -> None:
    root = write_dataset(tmp_path / "d", LENGTHS, shifted(lambda episode: drift * episode))
    assert firsts(root, probe_of(FRAMES)) == STARTS


def test_timestamps_that_drift_are_not_trusted_where_the_file_has_more_frames(tmp_path: Path) -> None:
    steady = write_dataset(tmp_path / "steady", LENGTHS)
    assert firsts(steady, probe_of(FRAMES + 9)) == STARTS
    drifting = write_dataset(tmp_path / "drift", LENGTHS, shifted(lambda episode: 0.012 * episode))
    assert firsts(drifting, probe_of(FRAMES + 9)) == ["bad_source"] * len(LENGTHS)


@pytest.mark.parametrize("known", [True, False])
def test_pauses_in_the_file_do_not_give_the_neighbours_frames(tmp_path: Path, known: bool) -> None:
    # Each episode starts 0.3 s later in the file than the frames before it last; the source may know it or not.
    times = [
        (start + t) / FPS + 0.3 * e
        for e, (start, n) in enumerate(zip(STARTS, LENGTHS, strict=True))
        for t in range(n)
    ]
    root = write_dataset(tmp_path / "d", LENGTHS, shifted(lambda episode: 0.3 * episode * known))
    assert firsts(root, probe_of(times)) == STARTS
    # With frames at the end that belong to no episode, only the file's own times say where each one starts.
    longer = probe_of([*times, times[-1] + 0.1, times[-1] + 0.2])
    assert firsts(root, longer) == (STARTS if known else [0, *["bad_source"] * 11])


def test_spans_that_overlap_are_refused_with_both(tmp_path: Path) -> None:
    # Two merged datasets, the second with the timestamps it had alone.
    root = write_dataset(tmp_path / "d", [12, 12, 12, 12, 8], shifted(lambda e: -2.4 if e in (2, 3) else 0.0))
    records, rejected = listed(root)
    assert [record.episode_id for record in records] == ["episode_000004"]
    assert set(rejected) == {f"episode_{e:06d}/{KEY}" for e in range(4)}
    assert "from_timestamp 1.2 to to_timestamp 2.4" in rejected[f"episode_000001/{KEY}"]
    assert [place(r, probe_of(56)) for r in records] == [Placed(48, 8, 10.0)]


def test_a_length_that_is_not_the_spans_is_refused_with_both_values(tmp_path: Path) -> None:
    def change(episode: int, row: Row) -> None:
        row["length"] += {0: 2, 1: -2}.get(episode, 0)

    root = write_dataset(tmp_path / "d", [12, 12, 12], change)
    answers = [place(record, probe_of(36)) for record in listed(root)[0]]
    assert [isinstance(one, BadVideo) for one in answers] == [True, True, False]
    assert isinstance(answers[0], BadVideo) and answers[0].reason == "bad_source"
    assert "14 frames" in answers[0].message and "has 12" in answers[0].message
    assert answers[2] == Placed(24, 12, 10.0)


def test_one_bad_value_costs_one_episode(tmp_path: Path) -> None:
    values: dict[int, tuple[str, Any]] = {
        1: (f"videos/{KEY}/from_timestamp", float("nan")),
        2: (f"videos/{KEY}/from_timestamp", -0.2),  # it reaches into others, which are not to blame
        3: ("length", None),
        4: (f"videos/{KEY}/to_timestamp", float("inf")),
        5: ("episode_index", 0),
        6: (f"videos/{KEY}/file_index", None),
    }

    def change(episode: int, row: Row) -> None:
        if episode in values:
            row.update([values[episode]])

    records, rejected = listed(write_dataset(tmp_path / "d", [12] * 8, change))
    assert [record.episode_id for record in records] == ["episode_000000", "episode_000007"]
    assert len(rejected) == 6
    assert [place(record, probe_of(96)) for record in records] == [Placed(0, 12, 10.0), Placed(84, 12, 10.0)]


def test_a_rate_that_the_file_has_not_is_refused_and_one_that_the_spans_prove_is_taken(
    tmp_path: Path,
) -> None:
    root = write_dataset(tmp_path / "d", [12, 12])
    answer = place(listed(root)[0][1], probe_of(24, fps=30.0))
    assert isinstance(answer, BadVideo) and "10 frames per second, the file has 30" in answer.message

    def spans_at_30(episode: int, row: Row) -> None:
        for name in ("from_timestamp", "to_timestamp"):
            row[f"videos/{KEY}/{name}"] /= 3

    other = write_dataset(tmp_path / "e", [12, 12], spans_at_30)
    assert place(listed(other)[0][1], probe_of(24, fps=30.0)) == Placed(12, 12, pytest.approx(30.0))


@pytest.mark.parametrize("where", ["tasks", "text", "index", "column", "statistics", "rows", "empty"])
def test_texts_are_found_wherever_they_are(tmp_path: Path, where: str) -> None:
    def change(episode: int, row: Row) -> None:
        tasks = row.pop("tasks")
        added: dict[str, Row] = {
            "tasks": {"tasks": tasks},
            "text": {"tasks": tasks[0]},
            "index": {"tasks": [episode]},
            "column": {"task_index": episode},
            "statistics": {"stats/task_index/min": [episode], "stats/task_index/max": [episode]},
            "empty": {"tasks": []},
        }
        row.update(added.get(where, {}))

    records, rejected = listed(write_dataset(tmp_path / "d", [4, 5, 6], change))
    assert [record.text for record in records] == ["text 0", "text 1", "text 2"] and not rejected


@pytest.mark.parametrize("pointer", ["wrong", "absent"])
def test_the_rows_of_an_episode_are_found_whatever_the_index_says(tmp_path: Path, pointer: str) -> None:
    def change(episode: int, row: Row) -> None:
        row["data/file_index"] = 0 if pointer == "wrong" else None

    records, _ = listed(write_dataset(tmp_path / "d", [4, 5, 6], change, data_files=lambda episode: episode))
    found = [read_signals("lerobot_v3", r.signals_uri, r.episode_id).actions[:, 0].tolist() for r in records]
    assert found == [[0.0] * 4, [1.0] * 5, [2.0] * 6]


def test_rows_are_taken_in_the_order_of_their_frames(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", [4])
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(pa.array([2, 0, 3, 1])), path)
    read = lambda: read_signals("lerobot_v3", str(path), "episode_000000")  # noqa: E731
    assert read().actions[:, 1].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_cameras_of_one_last_name_stay_apart(tmp_path: Path) -> None:
    keys = ("observation.images.base.left", "observation.images.wrist.left", "observation.images.top")
    records, _ = listed(write_dataset(tmp_path / "d", [4], cameras=keys))
    assert sorted(record.camera for record in records) == ["base.left", "top", "wrist.left"]


@pytest.mark.parametrize(
    "path", ["data/{0}", "data/{episode_index:9999999999d}", "{a.__class__}", "{episode_index!r}"]
)
def test_path_templates_are_checked(tmp_path: Path, path: str) -> None:
    root = write_dataset(tmp_path / "d", [4])
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"data_path": path}))
    with pytest.raises(CorpusError, match="no path template"):
        listed(root)


def test_a_v21_line_without_tasks_gets_the_text_of_its_rows(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", [4, 5])
    (root / "meta/episodes/chunk-000/file-000.parquet").unlink()
    (root / "meta/episodes/chunk-000").rmdir()
    (root / "meta/episodes").rmdir()
    (root / "meta/tasks.parquet").unlink()
    lines = [{"episode_index": 0, "length": 4}, {"episode_index": 1, "length": 5, "tasks": "a\u2028b"}]
    text = "\n".join(
        [
            *(json.dumps(line, ensure_ascii=False) for line in lines),
            '{"episode_index": 1, "length": 5}',
            "[[",
            "",
        ]
    )
    (root / "meta/episodes.jsonl").write_text("\ufeff" + text)
    (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "fold"}\n')
    info = json.loads((root / "meta/info.json").read_text())
    info |= {"codebase_version": "v2.1", "data_path": "data/chunk-000/file-000.parquet"}
    info |= {"video_path": "videos/{video_key}/chunk-000/file-000.mp4"}
    (root / "meta/info.json").write_text(json.dumps(info))
    records, rejected = listed(root, "lerobot_v21")
    assert [record.text for record in records] == ["fold", "a\u2028b"]
    assert list(rejected) == ["meta/episodes.jsonl line 3", "meta/episodes.jsonl line 4"]


def test_an_episode_without_timestamps_has_as_many_frames_as_its_uneven_file() -> None:
    record = VideoRecord(video_id="v", uri="u", text="", num_frames=5, fps=10.0, declared_fps=10.0)
    uneven = [0.0, 0.1, 0.2, 0.7, 0.8]
    assert place(record, probe_of(uneven)) == Placed(0, 5, 10.0)
    answer = place(record, probe_of([*uneven, 0.9]))
    assert isinstance(answer, BadVideo) and answer.message.startswith(
        "its length is 5 frames, its file has 6"
    )
    assert place(record, probe_of(6)) == Placed(0, 5, 10.0)
