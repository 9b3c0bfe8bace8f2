"""Listing and reading of remote corpora: several folders at once, in order, with signs of life."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from defi_platform import storage
from defi_platform.data.sources import records as rows
from defi_platform.progress import Progress
from defi_platform.storage import s3_listing
from defi_platform.storage.parallel_read import side_by_side
from defi_platform.storage.range_file import RangeFile


class Bucket:
    """Answers ListObjectsV2 over `keys` as S3 does, `page` keys at a time."""

    def __init__(self, keys: list[str], page: int = 10, at_once: int = 0) -> None:
        self.keys, self.page, self.at_once = sorted(keys), page, at_once
        """No answer is given before so many requests have been under way at the same time."""
        self.requests = self.under_way = self.most_at_once = 0
        self.lock = threading.Condition()

    def __call__(self, arguments: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            self.requests += 1
            self.under_way += 1
            self.most_at_once = max(self.most_at_once, self.under_way)
            self.lock.notify_all()
            if "Delimiter" not in arguments:  # those find the folders, one after the other
                assert self.lock.wait_for(lambda: self.most_at_once >= self.at_once, timeout=60)
            self.under_way -= 1
        return self.answer(**arguments)

    def answer(self, Prefix: str, Delimiter: str = "", ContinuationToken: str = "") -> dict[str, Any]:
        found: list[str] = []
        for key in (k for k in self.keys if k.startswith(Prefix)):
            rest = key[len(Prefix) :]
            cut = Delimiter and "/" in rest
            name = Prefix + rest.split("/")[0] + "/" if cut else key
            if name > ContinuationToken and name not in found[-1:]:
                found.append(name)
        page = found[: self.page]
        folders = [name for name in page if Delimiter and name.endswith("/")]
        return {
            "Contents": [{"Key": name} for name in page if name not in folders],
            "CommonPrefixes": [{"Prefix": name} for name in folders],
            "IsTruncated": len(found) > self.page,
            "NextContinuationToken": page[-1] if page else "",
        }


def listed(bucket: Bucket, prefix: str = "") -> list[str]:
    return [found["Key"] for found in s3_listing.objects(bucket, prefix)]


@pytest.mark.parametrize(
    "keys",
    [
        [],
        [f"v/{n:03d}.mp4" for n in range(95)],
        [f"v/{folder}/{n:03d}.mp4" for folder in "abc" for n in range(25)] + ["v/top.json"],
        [f"v/{folder:03d}/rgb.mp4" for folder in range(60)],
        [f"v/videos/train/{folder:02d}/{n}.mp4" for folder in range(9) for n in range(3)],
    ],
    ids=["nothing", "flat", "folders", "a folder per video", "deep"],
)
def test_every_object_is_listed_once_whatever_the_folders(keys: list[str]) -> None:
    found = listed(Bucket(keys), "v/")
    assert found == sorted(keys)


def test_a_folder_per_video_costs_no_request_per_folder() -> None:
    bucket = Bucket([f"{folder:03d}/rgb.mp4" for folder in range(300)])
    listed(bucket)
    assert bucket.requests <= 2 + 300 / bucket.page


def test_folders_are_listed_at_the_same_time_and_given_in_order() -> None:
    bucket = Bucket([f"{folder}/{n:03d}" for folder in "abcdef" for n in range(40)], at_once=4)
    assert listed(bucket) == bucket.keys


def test_who_stops_early_does_not_wait_for_the_rest() -> None:
    bucket = Bucket([f"{folder}/{n:04d}" for folder in "ab" for n in range(2000)])
    assert next(iter(s3_listing.objects(bucket, "")))["Key"] == "a/0000"
    time.sleep(0.05)
    assert bucket.requests < 60


def test_who_reads_slowly_is_not_overrun_by_pages() -> None:
    bucket = Bucket([f"{folder}/{n:04d}" for folder in "ab" for n in range(2000)])
    found = s3_listing.objects(bucket, "")
    next(found)
    time.sleep(0.3)
    assert bucket.requests <= 3 + 2 * (s3_listing.PAGES_AHEAD + 2)
    assert 1 + sum(1 for _ in found) == len(bucket.keys)


def test_names_right_below_a_prefix_are_listed_page_by_page() -> None:
    bucket = Bucket([f"v/{n:03d}.mp4" for n in range(45)] + [f"v/{f}/{n}" for f in "xy" for n in range(30)])
    found = list(s3_listing.names(bucket, "v/"))
    assert sorted(found) == sorted([f"{n:03d}.mp4" for n in range(45)] + ["x", "y"])
    assert bucket.requests == 5


def test_an_error_in_any_folder_is_raised() -> None:
    bucket = Bucket([f"{folder}/{n:03d}" for folder in "abc" for n in range(40)])

    def request(arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments["Prefix"] == "b/" and "ContinuationToken" in arguments:
            raise storage.StorageError("down")
        return bucket(arguments)

    with pytest.raises(storage.StorageError, match="down"):
        list(s3_listing.objects(request, ""))


def test_a_whole_object_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs.core import S3FileSystem

    asked: list[str] = []

    class Body:
        async def read(self) -> bytes:
            return b"123"

        def close(self) -> None: ...

    async def answer(fs: S3FileSystem, method: str, *arguments: object, **options: object) -> Any:
        asked.append(method)
        return {"Body": Body(), "ContentLength": 3}

    monkeypatch.setattr(S3FileSystem, "_call_s3", answer)
    assert storage.read_bytes("s3://bucket/small") == b"123" and asked == ["get_object"]


def test_remote_reads_wait_side_by_side_and_answer_in_order() -> None:
    begun: set[int] = set()
    eight_at_once = threading.Event()

    def read(number: int) -> int:
        begun.add(number)
        if len(begun) >= 8:  # none of them has ended
            eight_at_once.set()
        assert eight_at_once.wait(60)
        return number * 2

    assert list(side_by_side(read, range(100), remote=True)) == [(n, 2 * n) for n in range(100)]
    assert list(side_by_side(abs, [-1, 2], remote=False)) == [(-1, 1), (2, 2)]


def test_what_is_read_ahead_has_no_more_bytes_than_allowed() -> None:
    sizes = [3, 4, 3, 9, 1, 10, 2, 20, *[1] * 60, 7, 4]
    held: set[int] = set()
    seen: list[tuple[int, int]] = []

    def read(number: int) -> int:
        held.add(number)
        now = held.copy()
        seen.append((len(now), sum(sizes[one] for one in now)))
        return number

    order = []
    for number, _ in side_by_side(read, range(len(sizes)), True, sizes.__getitem__, 10):
        time.sleep(0.001)
        order.append(number)
        held.remove(number)
    assert order == list(range(len(sizes)))
    assert all(count == 1 or total <= 10 for count, total in seen)
    assert max(count for count, _ in seen) > 3, "several at once where they are small"


def test_a_listing_reports_progress_before_its_first_record(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [storage.Entry(str(n), str(n), 1, "1") for n in range(2500)]
    monkeypatch.setattr(storage, "walk", lambda root, unreadable: iter(found))
    signs = rows.files_below("x")
    assert [next(signs), next(signs)] == [rows.ListingProgress(1000), rows.ListingProgress(2000)]
    with pytest.raises(StopIteration) as ended:
        next(signs)
    assert len(ended.value.value) == 2500


def test_progress_is_told_after_one_second_also_where_nothing_comes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress("ingest: c: opened", "files", 100) as progress:
        progress.step(25, "2 bad")
        line, deadline = "", time.monotonic() + 60
        while "opened" not in line and time.monotonic() < deadline:
            time.sleep(0.1)
            line += capsys.readouterr().out
    assert "ingest: c: opened 25 of 100 files" in line
    assert "/s, about" in line and "2 bad" in line and "MB" in line


def test_a_range_file_fetches_what_is_read_and_reads_like_any_file() -> None:
    content = bytes(range(256)) * 40
    fetched: list[tuple[int, int]] = []

    def fetch(start: int, stop: int) -> bytes:
        fetched.append((start, stop))
        return content[start:stop]

    file, plain = RangeFile(fetch, len(content), 100), io.BytesIO(content)
    for place, count in ((0, 10), (5, 250), (9000, 130), (10_239, 50), (40, 0), (90, 20)):
        assert (file.seek(place), plain.seek(place)) == (place, place)
        assert file.read(count) == plain.read(count) and file.tell() == plain.tell()
    assert file.seek(-5, io.SEEK_END) == len(content) - 5 and file.read() == content[-5:]
    assert fetched == [(0, 100), (100, 300), (9000, 9200), (10_200, 10_240)]


@pytest.mark.parametrize("answer", [OSError("reset"), b"too little"])
def test_a_range_that_fails_is_remembered(answer: Any) -> None:
    def fetch(start: int, stop: int) -> bytes:
        if isinstance(answer, OSError):
            raise answer
        return bytes(answer)

    RangeFile.failures.clear()
    with pytest.raises(OSError, match=r"reset|10 bytes of the 100"):
        RangeFile(fetch, 1000, 100).read(10)
    assert len(RangeFile.failures) == 1
    RangeFile.failures.clear()


def test_links_are_followed_but_none_in_circles(tmp_path: Path) -> None:
    root, other = tmp_path / "r", tmp_path / "other"
    for folder in (root, other):
        folder.mkdir()
    (other / "a.mp4").write_bytes(b"1")
    (root / "own.mp4").write_bytes(b"2")
    for name, target in {
        "folder": other, "file.mp4": other / "a.mp4", "loop": root, "self.mp4": root / "self.mp4", "gone": "no",
    }.items():  # fmt: skip
        (root / name).symlink_to(target)
    for number in range(6):  # each leads to all of them again
        (other / f"back{number}").symlink_to(other)
    unreadable: list[storage.Unreadable] = []
    names = [entry.name for entry in storage.walk(str(root), unreadable)]
    assert names == ["file.mp4", "folder/a.mp4", "own.mp4"]
    assert storage.folders(str(root)) == ["folder", "loop"]
    assert {u.name: u.is_circle for u in unreadable} == {
        "gone": False,
        "loop": True,
        "self.mp4": True,
        **{f"folder/back{number}": True for number in range(6)},
    }
