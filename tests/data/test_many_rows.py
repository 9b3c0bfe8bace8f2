"""What lets an ingest hold millions of rows: on disk, by name, chunk by chunk, with the results of a few."""

from __future__ import annotations

import resource
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
from corpora import write_lerobot, write_video
from test_ingest import configured

from defi_platform.config import DataConfig, FilterConfig, WindowConfig
from defi_platform.data.ingest import listing as listed
from defi_platform.data.ingest import manifest_rows as claimed_rows
from defi_platform.data.ingest import probe_results as verdicts
from defi_platform.data.ingest import probe_state as judging
from defi_platform.data.ingest.listing import CLAIMS, Listed
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.ingest.probe_results import ProbeResult, table_of
from defi_platform.data.ingest.probe_state import Judged
from defi_platform.data.manifest.quarantine import read_quarantine
from defi_platform.data.manifest.split import held_out, place
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sources.records import VideoRecord, files_below
from defi_platform.data.tables import arrow_spill as spool
from defi_platform.data.tables import file_index as keyed_rows
from defi_platform.data.tables.arrow_spill import Spool
from defi_platform.data.tables.file_index import TEXT, KeyedRows
from defi_platform.storage import StorageError

CHUNKED: list[ModuleType] = [spool, listed, judging, claimed_rows, verdicts]


@pytest.fixture
def two_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in CHUNKED:
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(keyed_rows, "ROWS_PER_CHUNK", 2)


@pytest.mark.usefixtures("two_at_once")
def test_rows_on_disk_come_back_in_any_order() -> None:
    rows = Spool(pa.schema([("name", pa.string()), ("number", pa.int64())]))
    for start in (0, 5):
        numbers = list(range(start, start + 5))
        rows.append(pa.table({"name": [f"n{n}" for n in numbers], "number": numbers}, schema=rows.schema))
    wanted = np.array([9, 0, 4, 4, 5])
    assert rows.take(wanted, "number").column("number").to_pylist() == wanted.tolist()
    assert [row for table in rows.in_order(wanted) for row in table.column("name").to_pylist()] == [
        f"n{n}" for n in wanted
    ]
    assert rows.column("number").to_pylist() == list(range(10)) and len(rows) == 10


def test_a_full_disk_is_an_error_that_names_the_way_out() -> None:
    rows = Spool(pa.schema([("number", pa.int64())]))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(StorageError, match="set TMPDIR"):
            rows.append(pa.table({"number": np.random.default_rng(0).integers(0, 1 << 60, 50_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("two_at_once")
def test_rows_are_found_by_name_and_the_last_of_several_counts() -> None:
    rows = KeyedRows(pa.int64(), TEXT)
    for number, name in enumerate(["a", "b", "b\udcff", "a", "c"]):
        rows.add(name, number, f"text {number}")
    assert [rows.row(name) for name in ("a", "b", "b\udcff", "c", "d")] == [3, 1, 2, 4, -1]
    assert rows[2] == ("b\udcff", 2, "text 2")
    assert [row[1] for row in rows] == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("two_at_once")
def test_files_are_looked_up_by_the_names_they_were_listed_under(tmp_path: Path) -> None:
    for name in ("b", "a/x", "a/y", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    signs = files_below(str(tmp_path))
    with pytest.raises(StopIteration) as ended:
        next(signs)
    files = ended.value.value
    assert list(files) == ["a/x", "a/y", "b"] == [entry.name for entry in files.entries()]
    assert files["a/y"].uri == str(tmp_path / "a" / "y") and files["a/y"].bytes == 3
    assert files.get("a/z") is None and "b" in files


def claim(number: int, uri: str = "", version: str = "1", **other: object) -> VideoRecord:
    return VideoRecord(video_id=f"v{number}", uri=uri or f"/{number}", text="", version=version, **other)  # type: ignore[arg-type]


@pytest.mark.parametrize("odd", [{"uri": "/caf\udce9.mp4"}, {"num_frames": 10**30}])
def test_a_claim_that_no_table_can_hold_is_refused_alone(odd: dict[str, object]) -> None:
    found = Listed()
    for item in (claim(0), claim(1, **odd), claim(2)):  # type: ignore[arg-type]
        found.add(item)
    found.close()
    assert found.claims.column("video_id").to_pylist() == ["v0", "v2"]
    ((refused,),) = found.refused()
    assert (refused.video_id, refused.reason) == ("v1", "bad_source") and len(found) == 3


def bad(uri: str, reason: str, attempts: int = 1, version: str = "1") -> ProbeResult:
    return ProbeResult(uri, version, BadVideo(reason, ""), attempts)


@pytest.mark.usefixtures("two_at_once")
def test_what_is_known_of_a_file_is_what_was_found_last_in_this_version() -> None:
    claims = Spool(CLAIMS)
    for number in range(6):
        one = claim(number, version="2" if number == 1 else "1")
        claims.append(pa.table({n: [getattr(one, n)] for n in CLAIMS.names}, schema=CLAIMS))
    known = Judged(claims, screen=False)
    committed = [bad("/0", "corrupt", 3), bad("/1", "corrupt"), bad("/2", "storage"), bad("/9", "corrupt")]
    known.remember(table_of([*committed, bad("/3", "short", 2)]))
    assert known.go_on(table_of([bad("/0", "timeout", 3), bad("/3", "timeout", 3), bad("/5", "crash")]))
    count, openings = known.openings()
    # 1 is of another version, 2 was never answered, 4 is new.
    opened = [(one.uri, one.version, one.attempts) for one in openings]
    assert opened == [("/1", "2", 1), ("/2", "1", 2), ("/4", "1", 1)] and count == 3
    for uri, version, _ in opened:
        known.add(bad(uri, "empty", version=version))
    known.close()
    found = {one.uri: verdict.bad.reason for one, verdict in known.in_order() if verdict.bad}
    assert found == {
        "/0": "corrupt",
        "/1": "empty",
        "/2": "empty",
        "/3": "timeout",
        "/4": "empty",
        "/5": "crash",
    }
    assert sorted(known.verdicts().read_all().column("uri").to_pylist()) == sorted(found)


def test_both_splits_get_an_episode_however_few_there_are() -> None:
    places = np.array([place(key) for key in ("a", "b", "a")], np.uint64)
    for holdout in (0.001, 0.999):
        held = held_out(places, holdout)
        assert held[0] == held[2] != held[1]
    assert not held_out(places, 0.0).any() and held_out(places, 1.0).all()
    assert held_out(places[:1], 0.001).tolist() == [False]


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
