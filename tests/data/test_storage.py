"""Storage by URI: local, memory and a real S3 server process, also when it misbehaves."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
from corpora import numbers_of, write_video
from s3_server import FlakyProxy, s3_server

from defi_platform import storage
from defi_platform.config import CorpusConfig, DecodeConfig
from defi_platform.data.decode.messages import DecodeJob, Probe, ProbeJob
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sources.formats import format_of
from defi_platform.serve.policy_folder import load_policy
from defi_platform.storage import remote
from defi_platform.train.recipes.video_base import load_folder

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
MANY = "many-objects"
"""A bucket of ten thousand."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server(filled=(MANY, 10_000)) as endpoint:
        yield endpoint


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh bucket as s3://name; the environment points at the server."""
    yield from bucket(server, monkeypatch)


def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    storage.forget_connections()
    name = f"b-{uuid.uuid4().hex[:8]}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=name)
    yield f"s3://{name}"
    storage.forget_connections()


@pytest.fixture(params=["local", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of each kind of store."""
    if request.param == "local":
        return str(tmp_path)
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return str(request.getfixturevalue("s3"))


def test_what_is_written_is_read_back_and_listed(root: str) -> None:
    storage.write_text(storage.join(root, "a", "x.txt"), "one")
    storage.write_bytes(storage.join(root, "a", "b", "y.bin"), b"\0\1")
    assert storage.read_text(storage.join(root, "a", "x.txt")) == "one"
    walked = [(e.name, e.bytes) for e in storage.walk(storage.join(root, "a"))]
    assert walked == [("b/y.bin", 2), ("x.txt", 3)]
    assert storage.names(storage.join(root, "a")) == ["b", "x.txt"]
    assert storage.exists(storage.join(root, "a", "x.txt")) and storage.is_folder(storage.join(root, "a"))
    nothing = storage.join(root, "nothing")
    assert not storage.exists(nothing) and storage.names(nothing) == []


def test_a_part_of_a_file_is_read_into_a_buffer(root: str) -> None:
    storage.write_bytes(uri := storage.join(root, "part"), bytes(range(200)))
    buffer = bytearray(50)
    storage.read_into(uri, 100, memoryview(buffer)[10:])
    assert buffer == bytes(10) + bytes(range(100, 140))
    storage.read_into(uri, 200, memoryview(b"").cast("B"))
    for start in (160, 300):
        with pytest.raises(EOFError, match=f"ends before byte {start + 50}"):
            storage.read_into(uri, start, memoryview(buffer))
    with pytest.raises(FileNotFoundError):
        storage.read_into(storage.join(root, "absent"), 0, memoryview(buffer))


def test_the_version_of_a_file_changes_with_its_content(root: str) -> None:
    path = storage.join(root, "x")
    storage.write_bytes(path, b"1")
    before = storage.entry(path).version
    assert storage.entry(path).version == before
    storage.write_bytes(path, b"22")
    assert storage.entry(path).version != before


def test_an_absent_file_is_a_file_not_found_error(root: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "nothing"))


def test_a_committed_folder_appears_whole_and_replaces_the_old_one(root: str) -> None:
    path = storage.join(root, "model")
    for number in (1, 2):
        with storage.committed_folder(path) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / f"{number}.txt").write_text(str(number))
            # Until its end the old one stands, whole.
            standing = [e.name for e in storage.walk(path)] if storage.exists(path) else []
            assert standing == (["sub/1.txt"] if number == 2 else [])
            storage.ensure_complete(path)
    storage.ensure_complete(path)
    assert [e.name for e in storage.walk(path)] == ["sub/2.txt"]
    with storage.local_copy(path) as copy:
        assert (copy / "sub" / "2.txt").read_text() == "2"


def test_a_folder_that_fails_half_way_leaves_the_old_one(root: str) -> None:
    path = storage.join(root, "model")
    with storage.committed_folder(path) as folder:
        (folder / "good.txt").write_text("good")
    with pytest.raises(RuntimeError), storage.committed_folder(path) as folder:
        (folder / "bad.txt").write_text("bad")
        raise RuntimeError
    assert [e.name for e in storage.walk(path)] == ["good.txt"]
    storage.ensure_complete(path)


class Killed(BaseException):
    """The end of a process, as far as an upload can see it."""


@pytest.mark.parametrize("root", ["memory", "s3"], indirect=True)
@pytest.mark.parametrize("cut", ["before the first file", "before the second", "before the marker goes"])
def test_a_folder_whose_upload_was_cut_short_is_refused_until_it_is_written_again(
    root: str, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = storage.join(root, "model")
    with storage.committed_folder(folder) as staging:
        (staging / "old.txt").write_text("old")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        fs, _ = remote.filesystem(folder)
        put_file, rm_file = fs.put_file, fs.rm_file

        def put(local: str, target: str) -> None:
            if cut == "before the first file" or (cut == "before the second" and target.endswith("b.txt")):
                raise Killed
            put_file(local, target)

        def remove(target: str) -> None:
            if cut == "before the marker goes":
                raise Killed
            rm_file(target)

        patch.setattr(fs, "put_file", put)
        patch.setattr(fs, "rm_file", remove)
        with storage.committed_folder(folder) as staging:
            for name in ("a.txt", "b.txt"):
                (staging / name).write_text(name)
    # Whatever reads a whole folder: as a copy, as a corpus, as a model to train on, as a policy to serve.
    readers: list[Callable[[], object]] = [
        lambda: storage.local_copy(folder).__enter__(),
        lambda: format_of("c", CorpusConfig(path=folder)),
        lambda: load_folder(lambda local: torch.nn.Identity(), folder),
        lambda: load_policy(folder),
    ]
    half = r"model was not written to its end.*run that job again"
    for read in readers:
        with pytest.raises(storage.StorageError, match=half):
            read()
    with storage.committed_folder(folder) as staging:
        (staging / "new.txt").write_text("new")
    assert [entry.name for entry in storage.walk(folder)] == ["new.txt"]
    with storage.local_copy(folder) as copy:  # which is complete again
        assert [found.name for found in copy.iterdir()] == ["new.txt"]


def test_a_local_copy_of_half_an_upload_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / storage.INCOMPLETE).touch()
    with pytest.raises(storage.StorageError, match="was not written to its end"):
        storage.local_copy(str(tmp_path)).__enter__()


def test_deleting_removes_a_folder_and_forgives_absence(root: str) -> None:
    storage.write_text(storage.join(root, "a", "x"), "")
    storage.delete(storage.join(root, "a"))
    storage.delete(storage.join(root, "a"))
    assert not storage.exists(storage.join(root, "a", "x"))


# --------------------------------------------------------------------------- S3


def test_a_missing_bucket_is_named(s3: str) -> None:
    with pytest.raises(storage.StorageError, match=r"no such bucket|does not exist"):
        list(storage.walk("s3://no-such-bucket-here/x"))
    with pytest.raises(storage.StorageError, match="no such bucket"):
        storage.write_bytes("s3://no-such-bucket-here/x", b"1")


@pytest.mark.slow
def test_wrong_credentials_are_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(INITIAL_NO_AUTH_ACTION_COUNT="1") as endpoint:
        buckets = bucket(endpoint, monkeypatch)  # making the bucket is the one action without a check
        path = next(buckets)
        for request in (
            storage.read_bytes,
            storage.is_folder,
            storage.names,
            lambda uri: list(storage.walk(uri)),
        ):
            with pytest.raises(storage.StorageError, match="AWS_ACCESS_KEY_ID"):
                request(f"{path}/x")


def test_a_server_that_is_not_there_is_one_clear_error(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    storage.forget_connections()
    with pytest.raises(storage.StorageError, match="AWS_ENDPOINT_URL"):
        storage.read_bytes(f"{s3}/x")


def test_ten_thousand_objects_are_listed_page_by_page(s3: str) -> None:
    started = time.monotonic()
    entries = list(storage.walk(f"s3://{MANY}/v"))
    assert [e.name for e in entries] == [f"{n:05d}.mp4" for n in range(10_000)]
    assert time.monotonic() - started < 240


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [{"reset_every": 3}, {"throttle_every": 3}])
def test_resets_and_throttling_end_in_success_and_never_in_a_gap(
    s3: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: dict[str, int]
) -> None:
    for number in range(12):
        storage.write_bytes(f"{s3}/v/{number}.txt", str(number).encode())
    proxy = FlakyProxy(int(server.rsplit(":", 1)[1]), **trouble)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    storage.forget_connections()
    try:
        assert {e.name for e in storage.walk(f"{s3}/v")} == {f"{n}.txt" for n in range(12)}
        for n in range(12):
            assert storage.read_bytes(f"{s3}/v/{n}.txt") == str(n).encode()
        assert proxy.resets + proxy.throttles > 3
    finally:
        proxy.close()


def test_clips_are_decoded_from_s3(s3: str, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", range(30))
    storage.write_bytes(f"{s3}/v/a.mp4", (tmp_path / "a.mp4").read_bytes())
    with DecoderPool(DecodeConfig()) as pool:
        probe, frames, missing = pool.run(
            [
                ProbeJob(f"{s3}/v/a.mp4"),
                DecodeJob(f"{s3}/v/a.mp4", (0, 29, 11), 64, 64, 64, 64),
                ProbeJob(f"{s3}/v/b.mp4"),
            ]
        )
    assert isinstance(probe, Probe) and probe.num_frames == 30
    assert isinstance(frames, np.ndarray) and numbers_of(frames) == [0, 29, 11]
    assert isinstance(missing, BadVideo) and missing.reason == "missing"


@pytest.mark.slow
def test_a_large_file_is_read_by_range(
    s3: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4", range(40))
    content = (tmp_path / "a.mp4").read_bytes()
    # A `free` box of 40 MB behind the video: a player never reads it.
    padding = 40 << 20
    storage.write_bytes(
        f"{s3}/big.mp4", content + (padding + 8).to_bytes(4, "big") + b"free" + bytes(padding)
    )
    proxy = CountingProxy(int(server.rsplit(":", 1)[1]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    try:
        with DecoderPool(DecodeConfig()) as pool:
            (frames,) = pool.run([DecodeJob(f"{s3}/big.mp4", (0, 39), 64, 64, 64, 64)])
        assert isinstance(frames, np.ndarray) and numbers_of(frames) == [0, 39]
        assert proxy.bytes < 8 << 20
    finally:
        proxy.close()


@pytest.mark.slow
def test_a_store_that_fails_while_a_video_is_read_is_to_blame_and_not_the_video(
    s3: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4", range(40))
    content = (tmp_path / "a.mp4").read_bytes()
    padding = 17 << 20
    storage.write_bytes(
        f"{s3}/big.mp4", content + (padding + 8).to_bytes(4, "big") + b"free" + bytes(padding)
    )
    bucket_name = s3.removeprefix("s3://").encode()
    # Its size is still answered, no range of it.
    proxy = FlakyProxy(int(server.rsplit(":", 1)[1]), refuse=b"GET /" + bucket_name + b"/big.mp4")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    job = DecodeJob(f"{s3}/big.mp4", (0, 39), 64, 64, 64, 64)
    try:
        with DecoderPool(DecodeConfig()) as pool:
            answers = [
                *pool.run([job, ProbeJob(f"{s3}/big.mp4"), ProbeJob(f"{s3}/big.mp4#range=0,1000,.mp4")])
            ]
            assert [a.reason for a in answers if isinstance(a, BadVideo)] == ["storage"] * 3, answers
            proxy.refuse = b""
            (frames,) = pool.run([job])
            assert isinstance(frames, np.ndarray) and numbers_of(frames) == [0, 39]
    finally:
        proxy.close()


class CountingProxy(FlakyProxy):
    """Counts the bytes of the answers."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.bytes = 0

    def count(self, part: bytes) -> None:
        self.bytes += len(part)


SCRIPT = """
import sys, ray
from defi_platform.config import CorpusConfig, DataConfig
from defi_platform.data.loader.stream import stream
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import ClipRule
from defi_platform.data.sampling.sharding import Shard
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
root = sys.argv[1]
data = DataConfig(corpora={"c": CorpusConfig(path=root + "/v")}, manifest=root + "/m", holdout=0.0)
plan = Plan.of(ingest(data), data, ClipRule(frames=4), seed=0)
batches = stream(plan, data, Shard.single(0, 12, 4))
seen = [(k, skip) for batch in batches for k, skip in zip(batch["sample"].tolist(), batch["skipped"])]
assert seen == [(k, "") for k in range(12)], seen
print("videos", len(plan.manifest))
"""


@pytest.mark.slow
def test_a_corpus_on_s3_is_ingested_and_streamed_through_resets(
    s3: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        write_video(tmp_path / "a.mp4", range(number, number + 20))
        storage.write_bytes(f"{s3}/v/{number}.mp4", (tmp_path / "a.mp4").read_bytes())
    proxy = FlakyProxy(int(server.rsplit(":", 1)[1]), reset_every=7, throttle_every=5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    try:
        # A process of its own: Ray's workers inherit the credentials from where Ray is started.
        done = subprocess.run([sys.executable, "-c", SCRIPT, s3], capture_output=True, text=True, timeout=240)
    finally:
        proxy.close()
    assert done.returncode == 0, done.stderr[-3000:]
    assert "videos 5" in done.stdout
    assert proxy.resets and proxy.throttles


# --------------------------------------------------------------------------- names


ODD_NAMES = ["Two [dQw4w9WgXcQ].mp4", "a*b?.mp4", "/doubled.mp4", "x//y.mp4", "[ab]/c.mp4", "50% #1, ü.mp4"]


@pytest.mark.parametrize("root", ["memory", "s3"], indirect=True)
def test_files_are_read_and_deleted_by_the_names_they_have(root: str) -> None:
    """Drivers take some names for patterns, and joining paths drops what stands before a slash."""
    folder = storage.join(root, "v [1]*")
    for name in ODD_NAMES:
        storage.write_bytes(storage.join(folder, name), name.encode())
    decoys = ["a1b2.mp4", "v 1x", "a/c.mp4"]
    for name in decoys:
        storage.write_bytes(storage.join(root, name), b"decoy")
    found = {entry.name: entry for entry in storage.walk(folder)}
    assert sorted(found) == sorted(ODD_NAMES)
    for name, entry in found.items():
        assert storage.read_bytes(entry.uri) == name.encode()
        assert storage.entry(entry.uri).bytes == len(name.encode()) and storage.exists(entry.uri)
        with storage.local_copy(entry.uri) as local:
            assert local.read_bytes() == name.encode()
        with storage.open_seekable(entry.uri) as file:
            assert file.read() == name.encode()
    with storage.local_copy(folder) as local:
        assert sum(path.is_file() for path in local.rglob("*")) == len(ODD_NAMES)
    storage.delete(found["a*b?.mp4"].uri)
    assert sorted(entry.name for entry in storage.walk(folder)) == sorted(set(ODD_NAMES) - {"a*b?.mp4"})
    aside = storage.set_aside(folder)
    assert len(list(storage.walk(aside))) == len(ODD_NAMES) - 1 and not list(storage.walk(folder))
    storage.delete(aside)
    assert sorted(entry.name for entry in storage.walk(root)) == sorted(decoys)
