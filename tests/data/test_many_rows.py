"""What lets an ingest hold millions of rows: on disk, by name, chunk by chunk, with the results of a few."""

from __future__ import annotations

import contextlib
import os
import resource
import tempfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from corpora import write_lerobot, write_video
from test_ingest import configured

from defi_platform.config import DataConfig, FilterConfig, WindowConfig
from defi_platform.data.decode.frame_scores import FrameScores
from defi_platform.data.decode.messages import Probe
from defi_platform.data.ingest import store
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.ingest.probe_results import RESULT_SCHEMA, ProbeResult, row_of
from defi_platform.data.ingest.store import VideoStore
from defi_platform.data.manifest.quarantine import read_quarantine
from defi_platform.data.manifest.split import hash_position, held_out
from defi_platform.data.manifest.table import SCHEMA
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sources.file_index import FileIndex
from defi_platform.data.sources.records import Note, RejectedRecord, VideoRecord, files_below
from defi_platform.data.tables import parquet_io
from defi_platform.data.tables.parquet_io import to_table
from defi_platform.data.tables.temp_database import TempDatabase
from defi_platform.errors import CorpusError
from defi_platform.storage import StorageError


@pytest.fixture
def two_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (store, parquet_io):
        monkeypatch.setattr(module, "ROWS_PER_PART", 2)


def test_a_database_without_a_name_leaves_no_file_to_a_killed_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = TempDatabase("CREATE TABLE number (value)")
    rows.execute_many("INSERT INTO number VALUES (?)", ((b"x" * 1000,) for _ in range(60_000)))
    opened = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread has closed it
            opened.append(os.readlink(f"/proc/self/fd/{fd}"))
    assert any(path.startswith(str(tmp_path)) and path.endswith(" (deleted)") for path in opened)
    assert not list(tmp_path.iterdir())
    assert rows.value("SELECT sum(length(value)) FROM number") == 60_000_000


def test_a_full_disk_is_an_error_that_names_the_way_out() -> None:
    rows = TempDatabase("CREATE TABLE number (value)")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(StorageError, match="set TMPDIR"):
            rows.execute_many("INSERT INTO number VALUES (?)", ((b"x" * 1000,) for _ in range(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_are_found_by_name_and_the_last_of_several_counts() -> None:
    rows = FileIndex(values=2)
    for number, name in enumerate(["a", "b", "b\udcff", "a", "c\0d"]):
        rows.add(name, number, f"text {number}")
    found = {name: row[0] for name in ("a", "b", "b\udcff", "c\0d") if (row := rows.find(name))}
    assert found == {"a": 3, "b": 1, "b\udcff": 2, "c\0d": 4} and rows.find("d") is None
    assert rows.find("b\udcff") == (2, "b\udcff", 2, "text 2")
    assert [row[1] for row in rows] == [0, 1, 2, 3, 4]
    rows.add("a", 5, "caf\u00e9")
    assert rows.find("a") == (5, "a", 5, "caf\u00e9")
    assert (len(rows), list(rows.names())[-2:]) == (6, ["c\0d", "a"])


def test_rows_that_alone_have_a_key_are_found_many_at_once() -> None:
    index = FileIndex(0, lower=str.lower)
    for name in ("a", "b", "B", "é", "C d", "a\0b"):
        index.add(name)
    asked = ["b", "c d", "a", "x", "a", "é", "a\0b", ""]
    assert index.find_only("lower", asked) == [None, 4, 0, None, 0, None, None, None]


def test_rows_are_found_by_what_their_names_end_with_whatever_stands_before() -> None:
    rows = FileIndex(values=0, backwards=lambda name: name[::-1] if name != "skipped/a" else None)
    for name in ("x/a", "a", "b/xa", "\u00f6/a", "skipped/a", "\udcff/a", "a/b", "x/\u00f6/a"):
        rows.add(name)
    below_a = {(0, "x/a"), (3, "\u00f6/a"), (5, "\udcff/a"), (7, "x/\u00f6/a")}
    assert set(rows.find_below("backwards", "a", 9)) == below_a and rows.find("a") == (1, "a")
    assert rows.find_below("backwards", "a/\u00f6", 9) == [(7, "x/\u00f6/a")]
    assert len(rows.find_below("backwards", "a", 2)) == 2 and rows.find_below("backwards", "c", 2) == []
    assert rows.find_by("backwards", "a/\u00f6", 2) == [(3, "\u00f6/a")]


def test_files_are_looked_up_by_the_names_they_were_listed_under(tmp_path: Path) -> None:
    for name in ("b", "a/x", "a/y", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    signs = files_below(str(tmp_path))
    link = next(signs)
    assert isinstance(link, RejectedRecord) and (link.video_id, link.reason) == ("gone", "missing")
    with pytest.raises(StopIteration) as ended:
        next(signs)
    files = ended.value.value
    assert list(files) == ["a/x", "a/y", "b"] == [entry.name for entry in files.entries()]
    assert files["a/y"].uri == str(tmp_path / "a" / "y") and files["a/y"].bytes == 3
    assert files.get("a/z") is None and "b" in files


def record(number: int, uri: str = "", version: str = "1", text: str = "", **other: object) -> VideoRecord:
    return VideoRecord(video_id=f"v{number}", uri=uri or f"/{number}", text=text, version=version, **other)  # type: ignore[arg-type]


def bad(uri: str, reason: str, attempts: int = 1, version: str = "1") -> ProbeResult:
    return ProbeResult(uri, version, BadVideo(reason, ""), attempts)


def good(uri: str, version: str = "1", screening: FrameScores | None = None) -> ProbeResult:
    return ProbeResult(uri, version, Probe(20, 10.0, 64, 64, "h264", 9, "pyav", False, (), screening))


def table_of(*results: ProbeResult) -> pa.Table:
    return to_table([row_of(result) for result in results], RESULT_SCHEMA)


def filled(
    *records: VideoRecord | RejectedRecord, committed: Iterable[pa.Table] = (), **options: Any
) -> VideoStore:
    """A store after its listing."""
    videos = VideoStore("c", **options)
    for item in records:
        videos.add(item)
    videos.load_committed(committed)
    return videos


def requested(videos: VideoStore) -> list[tuple[str, str, int]]:
    count, requests = videos.todo()
    found = [(one.uri, one.version, one.attempts) for one in requests]
    assert count == len(found)
    return found


def test_of_several_records_that_no_table_can_hold_each_is_rejected_and_no_other() -> None:
    odd = (1, 2, 5, 9)
    videos = VideoStore("c")
    videos.add(RejectedRecord(video_id="gone", uri="/gone", reason="missing", message=""))
    for number in range(10):
        videos.add(record(number, num_frames=10**30 if number in odd else None))
    videos.load_committed(())
    assert [uri for uri, _, _ in requested(videos)] == [f"/{n}" for n in range(10) if n not in odd]
    rejected = videos.rejected().read_all().column("video_id").to_pylist()
    assert rejected == ["gone", *(f"v{number}" for number in odd)]


def test_of_videos_with_one_id_the_first_counts_and_the_others_are_rejected() -> None:
    videos = filled(record(1, uri="/first"), record(2), record(1, uri="/second"))
    videos.reject_repeated()
    assert [uri for uri, _, _ in requested(videos)] == ["/2", "/first"]
    (row,) = videos.rejected().read_all().to_pylist()
    assert (row["video_id"], row["uri"], row["reason"]) == ("v1", "/second", "bad_source")


def test_the_fingerprint_of_a_listing_is_of_what_is_listed_in_whatever_order() -> None:
    rejected = RejectedRecord(video_id="a", uri="/a", reason="missing", message="m")
    items = [record(1), rejected, Note(kind="unmatched", item="b", uri="/t.csv")]

    def fingerprint(listed: list[VideoRecord | RejectedRecord | Note]) -> str:
        videos = VideoStore("c")
        for item in listed:
            videos.add(item)
        return videos.fingerprint()

    assert fingerprint(items) == fingerprint(items[::-1])
    assert len({fingerprint(items[:n]) for n in range(4)}) == 4


@pytest.mark.parametrize(
    "odd",
    [
        {"uri": "/caf\udce9.mp4"},
        {"num_frames": 10**30},
        {"num_frames": "many"},
        {"num_frames": [3]},
        {"text": ["a", "b"]},
        {"camera": "\udfff"},
    ],
)
def test_a_record_that_no_table_can_hold_is_rejected_alone(odd: dict[str, object]) -> None:
    videos = filled(record(0), record(1, **odd), record(2))  # type: ignore[arg-type]
    assert [uri for uri, _, _ in requested(videos)] == ["/0", "/2"]
    (rejected,) = videos.rejected().read_all().to_pylist()
    assert (rejected["video_id"], rejected["reason"]) == ("v1", "bad_source") and len(videos) == 3


def test_records_that_no_table_can_hold_cost_no_other_its_place() -> None:
    absent = RejectedRecord(video_id="r0", uri="/r0", reason="missing", message="", version="1")
    odd = (record(1, uri="/\udce9"), record(3, uri="/\udcea"), record(4, uri="/\udceb"))
    videos = filled(absent, record(0), odd[0], record(2), *odd[1:], record(5))
    assert [uri for uri, _, _ in requested(videos)] == ["/0", "/2", "/5"]
    rejected = videos.rejected().read_all().column("video_id").to_pylist()
    assert sorted(rejected) == ["r0", "v1", "v3", "v4"]


@pytest.mark.usefixtures("two_at_once")
def test_what_is_known_of_a_file_is_what_was_found_last_in_this_version() -> None:
    committed = [bad("/0", "corrupt", 3), bad("/1", "corrupt"), bad("/2", "storage"), bad("/9", "corrupt")]
    parts = [table_of(*committed), table_of(bad("/3", "short", 2))]
    videos = filled(*(record(n, version="2" if n == 1 else "1") for n in range(6)), committed=parts)
    assert videos.load_partial(table_of(bad("/0", "timeout", 3), bad("/3", "timeout", 3), bad("/5", "crash")))
    # 1 is of another version, 2 was never answered, 4 is new.
    opened = requested(videos)
    assert opened == [("/1", "2", 1), ("/2", "1", 2), ("/4", "1", 1)]
    for uri, version, _ in opened:
        videos.add_result(bad(uri, "empty", version=version))
    found = {one.uri: result.bad.reason for one, result in videos.probed() if result.bad}
    assert found == {
        "/0": "corrupt",
        "/1": "empty",
        "/2": "empty",
        "/3": "timeout",
        "/4": "empty",
        "/5": "crash",
    }
    assert sorted(videos.results().read_all().column("uri").to_pylist()) == sorted(found)


def test_the_rejected_are_opened_again_when_asked_and_their_attempts_counted() -> None:
    videos = filled(
        record(0), record(1), record(2), committed=[table_of(bad("/0", "crash", 2), good("/1"), good("/2"))]
    )
    events = [("/0", "1", 2), ("/1", "1", 4), ("/1", "1", 3), ("/9", "1", 1)]
    videos.invalidate(pa.table(list(zip(*events, strict=True)), names=["uri", "version", "attempts"]))
    unnamed = {"uri": ["/0", "/1", None], "version": [None, "1", "1"], "attempts": [1, None, None]}
    videos.invalidate(pa.table(unnamed))
    # A block of an ingest that was killed before the last commit is not newer than what it rejected.
    assert videos.load_partial(table_of(bad("/0", "crash", 2)))
    assert requested(videos) == [("/0", "1", 3), ("/1", "1", 5)] and videos.num_files() == 3


def test_a_good_file_whose_frames_were_not_scored_is_opened_again_where_scores_are_asked_for() -> None:
    scores = np.arange(2, dtype=np.float32)
    screening = FrameScores(
        np.array([0, 10], np.int32), scores, scores, scores, np.array([1 << 63, 5], np.uint64), b"ab"
    )
    known = [good("/0"), good("/1", screening=screening), bad("/2", "corrupt")]
    videos = filled(*map(record, range(3)), committed=[table_of(*known)], screen=True)
    assert requested(videos) == [("/0", "1", 1)]
    (again,) = (result for one, result in videos.probed() if one.uri == "/1")
    assert isinstance(again.answer, Probe) and again.answer.frame_scores is not None
    assert (
        again.answer.frame_scores.hashes.tolist() == [1 << 63, 5]
        and again.answer.frame_scores.changes == b"ab"
    )
    assert table_of(again) == table_of(known[1])


def test_videos_of_one_id_and_episodes_of_one_file_keep_their_order_and_share_one_opening() -> None:
    episodes = [record(n, uri="/shared", first_frame=10 * n) for n in (1, 0)]
    twice = [record(5, uri="/a"), record(5, uri="/b")]
    videos = filled(*twice, *episodes)
    assert requested(videos) == [("/a", "1", 1), ("/b", "1", 1), ("/shared", "1", 1)]
    for uri in ("/a", "/b", "/shared"):
        videos.add_result(good(uri))
    found = [(one.video_id, one.uri, one.first_frame) for one, _ in videos.probed()]
    assert found == [("v0", "/shared", 0), ("v1", "/shared", 10), ("v5", "/a", 0), ("v5", "/b", 0)]
    assert videos.results().read_all().num_rows == 3


def test_texts_of_any_characters_come_back_as_they_are() -> None:
    videos = filled(one := VideoRecord(video_id="a\0b", uri="/x'\0y", text='\n"\0\U0001f600', version=""))
    videos.add_result(good(one.uri, version=""))
    assert [found for found, _ in videos.probed()] == [one]


def test_listed_videos_take_no_memory_of_python() -> None:
    videos = VideoStore("c")
    tracemalloc.start()
    for number in range(20_000):
        videos.add(record(number, text=f"put the object into container {number}"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_duplicates_are_rejected_and_all_others_stay_in_order() -> None:
    filled().reject_duplicates(most_bits=2)
    videos = filled()
    row = dict.fromkeys(SCHEMA.names) | {
        "corpus": "c",
        "uri": "/x",
        "version": "1",
        "episode_id": "",
        "split": "",
    }
    for name, signature in (("a", (1, 2, 3)), ("b", (1 << 63, 0, 0)), ("z", (1, 2, 2))):
        videos.accept(row | {"video_id": name}, signature)
    videos.reject_duplicates(most_bits=2)
    assert videos.accepted(0.0).read_all().column("video_id").to_pylist() == ["a", "b"]
    (rejected,) = videos.rejected().read_all().to_pylist()
    assert (rejected["video_id"], rejected["reason"], rejected["uri"]) == ("z", "duplicate", "/x")
    assert rejected["message"] == "1 of 192 bits from a, filters.duplicate_bits=2"


def test_what_strict_says_of_a_name_that_is_no_text_can_be_printed() -> None:
    videos = VideoStore("c", strict=True)
    videos.add(record(0, uri="/caf\udce9.mp4"))
    with pytest.raises(CorpusError) as error:
        videos.load_committed(())
    assert "/caf\\udce9.mp4 (corpus c" in str(error.value) and str(error.value).encode()


def test_with_strict_whatever_finds_the_first_bad_video_stops() -> None:
    videos = filled(record(0), record(1, uri="/0"), strict=True)
    with pytest.raises(CorpusError, match=r"/0 \(corpus c, video v0\) is bad: corrupt"):
        videos.add_result(bad("/0", "corrupt"))
    with pytest.raises(CorpusError, match="bad_source"):
        filled(record(0, num_frames=1 << 70), strict=True)


def test_an_empty_store_has_empty_tables() -> None:
    videos = filled()
    assert requested(videos) == [] and not videos.any_probed() and videos.num_files() == 0
    readers = videos.accepted(0.1), videos.rejected(), videos.results()
    assert [reader.read_all().num_rows for reader in readers] == [0, 0, 0]


def test_both_splits_get_an_episode_however_few_there_are() -> None:
    positions = np.array([hash_position(key) for key in ("a", "b", "a")], np.uint64)
    for holdout in (0.001, 0.999):
        held = held_out(positions, holdout)
        assert held[0] == held[2] != held[1]
    assert not held_out(positions, 0.0).any() and held_out(positions, 1.0).all()
    assert held_out(positions[:1], 0.001).tolist() == [False]


def test_an_ingest_in_small_parts_writes_what_one_at_once_does(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    write_lerobot(tmp_path / "robot", [20, 5, 12, 30, 9], cameras=("front", "top"))
    for number in range(7):  # 1, 3 and 5 are the same video
        write_video(tmp_path / "plain" / f"{number}.mp4", range(0 if number % 2 else number, 40))
    (tmp_path / "plain" / "x.mp4").write_bytes(b"")
    tables = []
    for part in ("whole", "parts"):
        if part == "parts":
            request.getfixturevalue("two_at_once")
        config = configured(tmp_path / "robot", tmp_path / part, holdout=0.3)
        plain = configured(tmp_path / "plain", tmp_path / part).corpora["c"]
        plain.windows, plain.filters = WindowConfig("stride", length_s=1.0), FilterConfig(duplicate_bits=2)
        config = DataConfig(config.corpora | {"p": plain}, manifest=config.manifest, holdout=0.3)
        tables.append((ingest(config), read_quarantine(config.manifest)))
    (whole, rejected), (parts, rejected_parts) = tables
    assert whole.table == parts.table and rejected == rejected_parts
    assert whole.fingerprint() == parts.fingerprint()
    assert len(whole) > 20 and {"duplicate", "empty"} <= set(rejected.column("reason").to_pylist())
