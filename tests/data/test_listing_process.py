"""Corpora are listed in a decoder process: what crashes, hangs or eats memory there costs its file, or the corpus."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from corpora import write_video

from defi_platform.config import DecodeConfig
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.decode.worker_jobs import JobHandler
from defi_platform.data.ingest.listing import listed
from defi_platform.data.sources import formats, hdf5, plain
from defi_platform.data.sources.records import RejectedRecord, VideoRecord
from defi_platform.errors import CorpusError

CAMERAS = "observations/images"


class HostileLibraries(JobHandler):
    """A process in which libraries do what the name of a file says."""

    def __init__(self, memory_bytes: int) -> None:
        super().__init__(memory_bytes)
        described = hdf5._described

        def hostile(source: Any) -> Any:
            misbehave(source.name)
            return described(source)

        hdf5._described = hostile
        plain_listing = plain.listing

        def hostile_listing(root: str, fps: float | None = None) -> Any:
            misbehave(root)
            yield from plain_listing(root, fps)

        plain.listing = hostile_listing


def misbehave(path: str) -> None:
    name = os.path.basename(path).split("-")[-1].split(".")[0]
    kept = []
    if name == "crash":
        os.abort()
    if name == "hang":
        ctypes.PyDLL(None).sleep(3600)  # never lets other Python code run
    while name == "memory":
        kept.append(np.ones(32 << 20, np.uint8))


@pytest.fixture
def pool() -> Any:
    limits = DecodeConfig(processes=1, timeout_s=3.0, memory_mb=512)
    with DecoderPool(limits, HostileLibraries) as pool:
        yield pool


def test_a_file_that_ends_its_process_is_rejected_and_the_others_are_listed(
    tmp_path: Path, pool: DecoderPool
) -> None:
    for number, kind in enumerate(["good", "crash", "good", "good", "hang", "memory", "good", "crash"]):
        with h5py.File(tmp_path / f"{number}-{kind}.hdf5", "w") as file:
            for camera in ("left", "right"):
                file[f"{CAMERAS}/{camera}"] = np.zeros((3, 4, 4, 3), np.uint8)
    (tmp_path / "nowhere.hdf5").symlink_to(tmp_path / "absent")
    items = list(listed(pool, "hdf5", str(tmp_path), 5.0))
    good = sorted(item.video_id for item in items if isinstance(item, VideoRecord))
    assert good == [f"{n}-good/{camera}" for n in (0, 2, 3, 6) for camera in ("left", "right")]
    bad = {
        i.video_id: (i.reason, i.message.split("reading it ")[-1])
        for i in items
        if isinstance(i, RejectedRecord)
    }
    killed = ("bad_source", "kills the process that does it")
    assert bad.pop("nowhere.hdf5")[0] == "missing"
    assert bad == {
        "1-crash": killed,
        "4-hang": ("bad_source", "takes longer than decode.timeout_s"),
        "5-memory": ("bad_source", "needs more memory than decode.memory_mb"),
        "7-crash": killed,
    }


@pytest.mark.parametrize(
    ("kind", "why"), [("crash", "kills"), ("hang", "decode.timeout_s"), ("memory", "decode.memory_mb")]
)
def test_a_listing_that_ends_its_process_is_one_error_about_the_corpus(
    tmp_path: Path, pool: DecoderPool, kind: str, why: str
) -> None:
    root = tmp_path / kind
    write_video(root / "a.mp4", range(4))
    with pytest.raises(CorpusError, match=f"{kind} cannot be listed as plain.*{why}"):
        list(listed(pool, "plain", str(root), None))


def test_a_listing_in_another_process_is_the_same_in_pages(tmp_path: Path, pool: DecoderPool) -> None:
    for number in range(2_400):
        (tmp_path / f"{number}.mp4").touch()
    lines = (json.dumps({"id": number, "text": f"text {number}"}) + "\n" for number in range(2_300))
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    assert list(listed(pool, "plain", str(tmp_path), None)) == list(
        formats.listing("plain", str(tmp_path), None)
    )
    with pytest.raises(CorpusError, match=r"data\.corpora\.NAME\.fps"):
        with h5py.File(tmp_path / "a.hdf5", "w"):
            pass
        list(listed(pool, "hdf5", str(tmp_path), None))
