"""Files that are replaced after the ingest: their frames never go with the texts and actions of the ones before."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import h5py
import numpy as np
import pytest
from corpora import numbers_of, picture, write_video
from s3_server import s3_server

from defi_platform import storage
from defi_platform.config import CorpusConfig, DataConfig
from defi_platform.data.decode.messages import DecodeJob
from defi_platform.data.decode.worker_jobs import JobHandler
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.loader.stream import local_batches
from defi_platform.data.manifest.quarantine import skipped
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import ClipRule
from defi_platform.data.sampling.sharding import Shard
from defi_platform.data.sources.uri import video_uri

BEFORE, AFTER = range(10), range(50, 60)


def in_file(folder: Path, numbers: range) -> str:
    write_video(folder / "a.mp4", numbers)
    return str(folder / "a.mp4")


def in_tar(folder: Path, numbers: range) -> str:
    video = Path(in_file(folder / "videos", numbers))
    with tarfile.open(folder / "shard.tar", "w") as shard:
        shard.add(video, "a.mp4")
    with tarfile.open(folder / "shard.tar") as shard:
        member = shard.getmember("a.mp4")
    return video_uri(str(folder / "shard.tar"), "range", member.offset_data, member.size, ".mp4")


def in_hdf5(folder: Path, numbers: range) -> str:
    # As large as before, and written over where it stands: only its time tells them apart.
    with h5py.File(folder / "e.hdf5", "w") as file:
        file["observations/images/front"] = np.stack([picture(number) for number in numbers])
    return video_uri(str(folder / "e.hdf5"), "hdf5", "front")


def decoded(handler: JobHandler, uri: str, version: str) -> Any:
    """Numbers of frames 3 and 4, or the reason for which there are none."""
    out = np.zeros((2, 64, 64, 3), np.uint8)
    try:
        handler.decode(DecodeJob(uri, (3, 4), 64, 64, version=version), out)
    except BadVideo as error:
        return error.reason
    return numbers_of(out)


@pytest.mark.parametrize("store", [in_file, in_tar, in_hdf5])
def test_a_file_that_was_replaced_is_refused_whether_it_is_open_or_not(
    store: Callable[[Path, range], str], tmp_path: Path
) -> None:
    uri = store(tmp_path, BEFORE)
    path = uri.partition("#")[0]
    version = storage.entry(path).version
    handler = JobHandler(1 << 30)
    assert decoded(handler, uri, version) == [3, 4]
    os.utime(path, ns=(0, 0))
    assert decoded(handler, uri, version) == "changed"
    store(tmp_path, AFTER)
    for one in (handler, JobHandler(1 << 30)):
        assert decoded(one, uri, version) == "changed"
        assert decoded(one, uri, storage.entry(path).version) == [53, 54]


def test_a_training_takes_stand_ins_for_a_replaced_video_and_its_frames_again_once_it_is_back(
    tmp_path: Path,
) -> None:
    for number in range(4):
        write_video(tmp_path / "c" / f"{number}.mp4", range(10 * number, 10 * number + 10))
    data = DataConfig(
        corpora={"c": CorpusConfig(path=str(tmp_path / "c"))}, manifest=str(tmp_path / "m"), holdout=0.0
    )
    plan = Plan.of(ingest(data), data, ClipRule(2), seed=0)
    place, kept = tmp_path / "c" / "2.mp4", tmp_path / "kept.mp4"
    place.rename(kept)
    write_video(place, range(90, 100))

    def first_frames() -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for batch in local_batches(plan, data, Shard.single(0, 16, 4)):
            for video, frames in zip(batch["video_id"], batch["frames"].numpy(), strict=True):
                found.setdefault(video, set()).add(numbers_of(frames)[0])
        return found

    others = {f"{number}.mp4": {10 * number} for number in (0, 1, 3)}
    assert first_frames() == others and skipped(str(tmp_path / "m")) == {"changed": 1}
    kept.replace(place)
    assert first_frames() == others | {"2.mp4": {20}}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with s3_server() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        storage.forget_connections()
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="changing")
        yield "s3://changing"
    storage.forget_connections()


def test_an_object_that_was_replaced_is_refused_when_it_is_opened(s3: str, tmp_path: Path) -> None:
    uris = []
    for numbers in (BEFORE, AFTER):
        uris = [in_file(tmp_path, numbers), in_tar(tmp_path, numbers), in_hdf5(tmp_path, numbers)]
        for uri in uris:
            path = Path(uri.partition("#")[0])
            storage.write_bytes(f"{s3}/c/{path.name}", path.read_bytes())
        if numbers == BEFORE:
            versions = {entry.name: entry.version for entry in storage.walk(f"{s3}/c")}
            before = [uri.replace(str(tmp_path), f"{s3}/c") for uri in uris]
            at_first = [decoded(JobHandler(1 << 30), u, versions[_name(u)]) for u in before]
            assert at_first == [[3, 4]] * 3
    now = {entry.name: entry.version for entry in storage.walk(f"{s3}/c")}
    after = [uri.replace(str(tmp_path), f"{s3}/c") for uri in uris]
    assert [decoded(JobHandler(1 << 30), u, versions[_name(u)]) for u in after] == ["changed"] * 3
    assert [decoded(JobHandler(1 << 30), u, now[_name(u)]) for u in after] == [[53, 54]] * 3


def _name(uri: str) -> str:
    return uri.partition("#")[0].rpartition("/")[2]
