"""The ingest as a job: all real data at once, killed and started again, retried, and against a store that fails."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import numpy as np
import psutil
import pytest
import yaml
from corpora import spoil, write_video
from s3_server import FlakyProxy, s3_server
from test_ingest import EXPECTED, configured
from test_storage import KEYS

from defi_platform import storage
from defi_platform.config import CorpusConfig, DataConfig, DecodeConfig, IngestConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.data.decode.messages import DecodeJob
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.ingest.probe_actors import OutageDetector
from defi_platform.data.ingest.probe_results import ProbeResult
from defi_platform.data.manifest.quarantine import add_to_quarantine, read_quarantine, skipped
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sampling.samplers import ClipRule, PairRule, Rule
from defi_platform.errors import CorpusError


def job(repository: Path, *arguments: str, **options: object) -> subprocess.Popen[str]:
    """jobs/ingest_videos.py as a user starts it."""
    return subprocess.Popen(
        [sys.executable, str(repository / "jobs" / "ingest_videos.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,  # type: ignore[call-overload]
    )


SHARED_CORPORA = {
    "bridge": "videos/bridge",
    "rt1": "videos/rt1",
    "xhand": "videos/xhand",
    "g1": "lerobot_v21/g1",
    "rlds": "rlds",
    "calvin": "calvin",
    "codecs": "codecs",
    "corrupt": "corrupt",
}


@pytest.mark.slow
def test_all_real_data_in_one_ingest_every_good_file_is_usable_and_every_damaged_one_has_its_reason(
    repository: Path, shared_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "human").mkdir()
    shutil.copy(shared_data / "videos" / "human_demo.mp4", tmp_path / "human")
    corpora = {name: {"path": str(shared_data / place)} for name, place in SHARED_CORPORA.items()}
    corpora["human"] = {"path": str(tmp_path / "human")}
    manifest = str(tmp_path / "manifest")
    (tmp_path / "ingest.yaml").write_text(
        yaml.safe_dump({"data": {"corpora": corpora, "manifest": manifest, "holdout": 0.0}})
    )
    started = job(repository, "--config", str(tmp_path / "ingest.yaml"))
    output, _ = started.communicate(timeout=300)
    assert started.returncode == 0, output
    assert re.search(r"corrupt +plain +3 +\d", output) and re.search(r"98 +missing", output), output
    rejected: dict[str, list[str]] = {}
    for row in read_quarantine(manifest).to_pylist():
        rejected.setdefault(row["corpus"], []).append(row["reason"])
    # RLDS: one shard that dataset_info promises, and the cameras that were not there are blank.
    assert rejected.pop("rlds").count("missing") == 1
    assert {name: sorted(reasons) for name, reasons in rejected.items()} == {
        "corrupt": sorted(EXPECTED.values()),
        "g1": ["missing"] * 98,
    }
    every_good_video_gives_clips_and_pairs(Manifest.open(manifest, list(corpora)))


def every_good_video_gives_clips_and_pairs(manifest: Manifest) -> None:
    rules: list[Rule] = [ClipRule(frames=4), PairRule(interval_s=0.5)]
    num_frames, fps = manifest.numbers("num_frames").astype(np.int64), manifest.numbers("fps")
    jobs = []
    for rule in rules:
        drawn = rule.indices(num_frames, fps, np.full(len(manifest), 0.9))
        for row, frames in enumerate(drawn.tolist()):
            video = manifest.row(row)
            assert video["num_frames"] >= rule.min_frames(fps[row : row + 1])[0], video
            indices = tuple(video["first_frame"] + frame for frame in frames)
            jobs.append(
                DecodeJob(video["uri"], indices, 64, 64, video["height"], video["width"], video["seek_index"])
            )
    with DecoderPool(DecodeConfig()) as pool:
        bad = [(j.uri, a) for j, a in zip(jobs, pool.run(jobs), strict=True) if isinstance(a, BadVideo)]
    assert not bad


# --------------------------------------------------------------------------- killed


def numbered_videos(folder: Path, count: int) -> list[Path]:
    """`count` videos of ten seconds; copies of one but for the bytes behind its end, so that versions differ."""
    write_video(folder / "000.mp4", range(100), size=256)
    content = (folder / "000.mp4").read_bytes()
    places = [folder / f"{number:03d}.mp4" for number in range(count)]
    for number, place in enumerate(places):
        place.write_bytes(content + (8 + number).to_bytes(4, "big") + b"free" + bytes(number))
    return places


def stored(manifest: Path) -> set[str]:
    """Names of the files in the blocks that an unfinished ingest has stored."""
    import pyarrow.parquet as pq

    blocks = (manifest / "corpora" / "videos" / "probed").glob("*.parquet")
    return {Path(uri).name for block in blocks for uri in pq.read_table(block).column("uri").to_pylist()}


@pytest.mark.slow
def test_an_ingest_killed_half_way_goes_on_and_opens_no_stored_file_again(
    repository: Path, tmp_path: Path
) -> None:
    places = numbered_videos(tmp_path / "c", 240)
    arguments = [
        f"--config={repository / 'configs' / 'datasets' / 'videos' / 'ingest_videos.yaml'}",
        f"data.corpora.videos.path={tmp_path / 'c'}",
        f"data.manifest={tmp_path / 'm'}",
    ]
    first = job(repository, *arguments)
    deadline = time.monotonic() + 120
    while not stored(tmp_path / "m"):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = stored(tmp_path / "m")
    corpus = tmp_path / "m" / "corpora" / "videos"
    assert 0 < len(kept) < 240 and not (corpus / "committed.json").exists()
    for place in places:
        if place.name in kept:
            spoil(place)
    second = job(repository, *arguments)
    output, _ = second.communicate(timeout=200)
    assert second.returncode == 0, output
    goes_on = re.search(r"goes on, (\d+) of 240 files left to open", output)
    # A block that was under way may still have reached its end without the driver.
    assert goes_on and 0 < int(goes_on[1]) <= 240 - len(kept), output
    manifest = Manifest.open(str(tmp_path / "m"))
    assert manifest.table.column("video_id").to_pylist() == [place.name for place in places]
    assert not (corpus / "probed").exists()


# --------------------------------------------------------------------------- quarantine


def test_retry_quarantined_opens_the_bad_again_and_counts_the_attempts(
    shared_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "c").mkdir()
    for name in ("vfr.mp4", "no_moov.mp4", "zero_byte.mp4"):
        shutil.copy(shared_data / "corrupt" / name, tmp_path / "c")
    config = configured(tmp_path / "c", tmp_path / "m")
    ingest(config)
    assert ingest(config).reused == ("c",)
    config.retry_quarantined = True
    spoil(tmp_path / "c" / "vfr.mp4")  # good before, so nobody looks
    ingest(config)
    rows = {row["video_id"]: row for row in read_quarantine(str(tmp_path / "m")).to_pylist()}
    assert {name: row["attempts"] for name, row in rows.items()} == {"no_moov.mp4": 2, "zero_byte.mp4": 2}
    assert rows["no_moov.mp4"]["decoder"].startswith("pyav ") and rows["zero_byte.mp4"]["decoder"] == ""
    assert all(row["version"] and row["stage"] == "ingest" for row in rows.values())


def test_a_video_that_failed_while_decoding_is_opened_again_and_gets_another_chance(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / "c" / name, range(20))
    config = configured(tmp_path / "c", tmp_path / "m")
    for row in ingest(config).table.to_pylist():
        event = {key: row[key] for key in ("corpus", "video_id", "uri", "version")}
        add_to_quarantine(config.manifest, [event | {"reason": "crash", "attempts": 1}], "decode")
    spoil(tmp_path / "c" / "b.mp4")
    config.retry_quarantined = True
    assert [row["video_id"] for row in ingest(config).table.to_pylist()] == ["a.mp4"]
    rows = read_quarantine(config.manifest).to_pylist()
    assert [(row["video_id"], row["stage"], row["attempts"]) for row in rows] == [("b.mp4", "ingest", 2)]


def test_the_jobs_flags_stand_for_overrides() -> None:
    flags = {"--strict": "data.strict=true"}
    arguments = ["data.manifest=/m", "data.height=32"]
    assert not parse_arguments(IngestConfig, arguments, flags).data.strict
    config = parse_arguments(IngestConfig, [arguments[0], "--strict", arguments[1]], flags)
    assert config.data.strict and config.data.height == 32


def test_every_corpus_that_cannot_be_read_is_named_before_the_first_is_opened(tmp_path: Path) -> None:
    write_video(tmp_path / "good" / "a.mp4", range(5))
    corpora = {name: CorpusConfig(path=str(tmp_path / name)) for name in ("good", "gone", "lost")}
    with pytest.raises(CorpusError, match=r"2 corpora(.|\n)*gone(.|\n)*lost"):
        ingest(DataConfig(corpora=corpora, manifest=str(tmp_path / "m")))
    assert not (tmp_path / "m").exists()


def test_a_manifest_of_another_layout_is_made_again(tmp_path: Path) -> None:
    write_video(tmp_path / "c" / "a.mp4", range(5))
    config = configured(tmp_path / "c", tmp_path / "m")
    ingest(config)
    place = tmp_path / "m" / "corpora" / "c" / "committed.json"
    place.write_text(re.sub(r'"layout": \d+', '"layout": 1', place.read_text()))
    with pytest.raises(CorpusError, match=r"that this version can read.*Run the ingest"):
        Manifest.open(config.manifest)
    assert ingest(config).reused == ()
    assert len(Manifest.open(config.manifest)) == 1


# --------------------------------------------------------------------------- a store that fails


@pytest.mark.parametrize(
    ("answered", "reasons", "stops_at", "nothing"),
    [
        (False, ["storage"] * 3, None, True),
        (True, ["storage"] * 3, None, False),
        (False, ["corrupt", "storage", "storage"], None, False),
        (True, ["storage"] * 4 + ["corrupt"], 3, False),
        (True, ["storage", "storage", "storage", "corrupt"] * 3, None, False),
    ],
)
def test_the_store_is_to_blame_after_several_failures_in_a_row_or_when_nothing_ever_came(
    answered: bool, reasons: list[str], stops_at: int | None, nothing: bool
) -> None:
    outage = OutageDetector(answered, allowed=4)
    stops = [outage.down(ProbeResult("u", "v", BadVideo(reason, "refused"))) for reason in reasons]
    assert next((number for number, why in enumerate(stops) if why), None) == stops_at
    assert outage.nothing_answered() == nothing


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    return "s3://videos"


@pytest.mark.slow
def test_a_store_that_goes_down_is_one_error_and_a_single_file_that_does_not_come_is_tried_again(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4", range(20))
    with s3_server() as endpoint:
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="videos")
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        storage.forget_connections()
        storage.write_bytes(f"{bucket}/v/0.mp4", (tmp_path / "a.mp4").read_bytes())
        proxy = FlakyProxy(int(endpoint.rsplit(":", 1)[1]), refuse=b"GET /videos/v/")
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage.forget_connections()
        config = DataConfig(
            corpora={"c": CorpusConfig(path=f"{bucket}/v")}, manifest=str(tmp_path / "m"), holdout=0.0
        )
        with pytest.raises(storage.StorageError, match=r"the store fails for every file.*it goes on"):
            ingest(config)
        assert proxy.refused and not skipped(config.manifest)
        proxy.refuse = b""
        assert len(ingest(config)) == 1 and not skipped(config.manifest)
        # One more, that alone does not come: it is listed, and asked for again by every ingest.
        storage.write_bytes(f"{bucket}/v/1.mp4", (tmp_path / "a.mp4").read_bytes())
        proxy.refuse = b"GET /videos/v/1.mp4"
        assert len(ingest(config)) == 1 and skipped(config.manifest) == {"storage": 1}
        proxy.refuse = b""
        assert len(ingest(config)) == 2 and not skipped(config.manifest)
        proxy.close()
    storage.forget_connections()


# --------------------------------------------------------------------------- a probing actor that dies


@pytest.mark.slow
def test_a_probing_actor_killed_at_work_is_replaced_and_nothing_is_lost_or_there_twice(
    tmp_path: Path, ray_cluster: None
) -> None:
    places = numbered_videos(tmp_path / "c", 160)
    config = configured(tmp_path / "c", tmp_path / "m", holdout=0.0)
    killed: list[int] = []
    done = threading.Event()

    def kill_one_at_work() -> None:
        blocks = tmp_path / "m" / "corpora" / "c" / "probed"
        while not killed and not done.wait(0.01):
            if any(blocks.glob("*.parquet")):
                working = [p for p in psutil.Process().children(recursive=True) if "Prober" in title(p)]
                for process in working[:1]:
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)

    killer = threading.Thread(target=kill_one_at_work)
    killer.start()
    manifest = ingest(config)
    done.set()
    killer.join()
    assert killed
    assert manifest.table.column("video_id").to_pylist() == [place.name for place in places]
    assert not skipped(config.manifest)


def title(process: psutil.Process) -> str:
    """What a process calls itself, such as ray::Prober.probe; "" when it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
