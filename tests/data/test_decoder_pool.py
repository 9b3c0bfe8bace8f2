"""Survival of real decoder processes: whatever a video does to its decoder, the others come out right."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from corpora import numbers_of, write_video
from hostile_jobs import HostileJobHandler

from defi_platform.config import DecodeConfig
from defi_platform.data.decode.messages import DecodeJob, Probe, ProbeJob
from defi_platform.data.decode.pool import Answer, DecoderPool
from defi_platform.data.rejection import BadVideo

_earlier: set[psutil.Process] = set()


@pytest.fixture(autouse=True)
def of_this_test() -> None:
    """What a training of another test may have left is none of `decoder_processes`."""
    _earlier.clear()
    _earlier.update(decoder_processes())


def decoder_processes() -> list[psutil.Process]:
    """Decoder processes of this one that a test has started, as the operating system lists them."""
    found = []
    for child in {*psutil.Process().children()} - _earlier:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "decode.worker_process" in " ".join(child.cmdline()):
                found.append(child)
    return found


class Watch(threading.Thread):
    """Follows the resident memory of this process's decoder processes."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.02):
            for child in decoder_processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.peak_bytes = max(self.peak_bytes, child.memory_info().rss)

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()


def job(uri: str) -> DecodeJob:
    return DecodeJob(uri, (0, 1), 4, 4)


def outcome(answer: Answer) -> str:
    if isinstance(answer, BadVideo):
        return answer.reason
    assert isinstance(answer, np.ndarray)
    return "fine" if (answer == 7).all() else "wrong"


@pytest.mark.parametrize(
    ("deed", "reason"), [("hang", "timeout"), ("abort", "crash"), ("exit", "crash"), ("allocate", "memory")]
)
def test_one_hostile_video_costs_itself_and_nothing_else(deed: str, reason: str) -> None:
    limits = DecodeConfig(processes=2, timeout_s=2.0 if deed == "hang" else 30.0, memory_mb=256)
    names = ["fine0", "fine1", deed, "fine2", "fine3", deed, "fine4"]
    with DecoderPool(limits, HostileJobHandler) as pool:
        # Both processes are up before it starts, so that a hang costs timeout_s only.
        list(pool.run([job("fine"), job("fine")]))
        answers = [outcome(a) for a in pool.run(map(job, names))]
    assert answers == ["fine", "fine", reason, "fine", "fine", reason, "fine"]


def test_a_process_killed_from_outside_loses_no_sample(tmp_path: Path) -> None:
    names = ["fine", str(tmp_path / "once"), "fine"]
    with DecoderPool(DecodeConfig(processes=1), HostileJobHandler) as pool:
        assert [outcome(a) for a in pool.run(map(job, names))] == ["fine", "fine", "fine"]


def test_a_process_killed_between_two_runs_is_replaced() -> None:
    with DecoderPool(DecodeConfig(processes=1), HostileJobHandler) as pool:
        assert [outcome(a) for a in pool.run([job("fine")])] == ["fine"]
        (child,) = decoder_processes()
        os.kill(child.pid, signal.SIGKILL)
        assert [outcome(a) for a in pool.run([job("fine")])] == ["fine"]


def test_processes_are_recycled_after_the_configured_number_of_files() -> None:
    with DecoderPool(DecodeConfig(processes=1, recycle_after=3), HostileJobHandler) as pool:
        answers = list(pool.run([DecodeJob("pid", (0,), 4, 1)] * 9))
    pids = [int(np.asarray(a)[0, :, 0, 0].copy().view(np.uint32)[0]) for a in answers]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 3]


def test_no_process_is_left_when_a_pool_is_closed_in_the_middle() -> None:
    pool = DecoderPool(DecodeConfig(processes=2), HostileJobHandler)
    run = pool.run(map(job, ["fine", "hang", "hang", "fine"]))
    next(run)
    children = decoder_processes()
    run.close()
    pool.close()
    assert children and not any(child.is_running() for child in children)


def test_answers_come_in_order_whoever_is_first(tmp_path: Path) -> None:
    for number in range(4):
        write_video(tmp_path / f"{number}.mp4", range(number * 10, number * 10 + 10 + 40 * (number == 0)))
    jobs = [DecodeJob(str(tmp_path / f"{n % 4}.mp4"), (0, 5, 9), 64, 64) for n in range(20)]
    with DecoderPool(DecodeConfig(processes=2)) as pool:
        for n, frames in enumerate(pool.run(jobs)):
            assert isinstance(frames, np.ndarray)
            assert numbers_of(frames) == [n % 4 * 10, n % 4 * 10 + 5, n % 4 * 10 + 9]


def test_frames_larger_than_the_shared_memory_get_more_of_it(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", range(10))
    sizes = [64, 512, 64]
    with DecoderPool(DecodeConfig(processes=1)) as pool:
        for size, frames in zip(
            sizes,
            pool.run([DecodeJob(str(tmp_path / "a.mp4"), tuple(range(10)), s, s, 64, 64) for s in sizes]),
            strict=True,
        ):
            assert isinstance(frames, np.ndarray) and frames.shape == (10, size, size, 3)
            assert numbers_of(frames) == list(range(10))


@pytest.mark.slow
def test_a_frame_of_16000_by_16000_never_exceeds_the_memory_limit(shared_data: Path) -> None:
    uri = str(shared_data / "corrupt" / "huge_real_16000x16000.mp4")
    jobs = [
        ProbeJob(uri),
        DecodeJob(uri, (0, 1, 2), 64, 64, 16000, 16000),
        # Its size is not known, so the decoder tries and is stopped.
        DecodeJob(uri, (0, 1, 2), 64, 64),
    ]
    with DecoderPool(DecodeConfig(processes=1, memory_mb=1024, timeout_s=60)) as pool:
        pool.start()
        with Watch() as watch:
            answers = [outcome(answer) for answer in pool.run(jobs)]
    assert answers[:2] == ["memory", "memory"]
    assert answers[2] in ("memory", "crash", "corrupt")
    assert 0 < watch.peak_bytes < (1024 + 200) << 20


def test_a_process_filled_by_earlier_files_is_replaced_before_a_video_is_blamed() -> None:
    names = ["leak"] * 12 + ["fine"]
    with DecoderPool(DecodeConfig(processes=1, memory_mb=256), HostileJobHandler) as pool:
        assert [outcome(a) for a in pool.run(map(job, names))] == ["fine"] * 13


def test_the_probe_refuses_what_cannot_fit_without_trying(shared_data: Path) -> None:
    uri = str(shared_data / "corrupt" / "huge_real_16000x16000.mp4")
    with DecoderPool(DecodeConfig(memory_mb=2048)) as pool:
        (answer,) = pool.run([ProbeJob(uri)])
    assert isinstance(answer, BadVideo)
    assert answer.reason == "memory" and "16000x16000" in answer.message


def test_a_rotated_video_is_upright(shared_data: Path) -> None:
    uri = str(shared_data / "corrupt" / "rotated90.mp4")
    with DecoderPool(DecodeConfig()) as pool:
        (probe,) = pool.run([ProbeJob(uri)])
        assert isinstance(probe, Probe)
        assert (probe.height, probe.width) == (340, 256)


def test_a_probe_may_take_as_long_as_its_video_is_declared_to_be_while_it_goes_on() -> None:
    limits = DecodeConfig(processes=1, timeout_s=2.0)
    with DecoderPool(limits, HostileJobHandler) as pool:
        list(pool.run([job("fine")]))
        slow, stuck = pool.run([ProbeJob("slow"), ProbeJob("stuck")])
    assert isinstance(slow, Probe)
    assert isinstance(stuck, BadVideo) and stuck.reason == "timeout" and "3600 s" in stuck.message


OWNER = """
import sys, threading
from hostile_jobs import HostileJobHandler
from defi_platform.config import DecodeConfig
from defi_platform.data.decode.messages import DecodeJob
from defi_platform.data.decode.pool import DecoderPool

# Started by a thread that ends at once: decoders belong to the process.
pool = DecoderPool(DecodeConfig(processes=2), HostileJobHandler)
thread = threading.Thread(target=lambda: list(pool.run([DecodeJob("fine", (0, 1), 4, 4)] * 2)))
thread.start()
thread.join()
print("ready", flush=True)
list(pool.run([DecodeJob("locked", (0, 1), 4, 4), DecodeJob("hang", (0, 1), 4, 4)]))
"""


def test_decoders_whose_owner_is_killed_end_whatever_they_do() -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
    ) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"ready\n"
        time.sleep(0.5)
        children = psutil.Process(owner.pid).children()
        assert len(children) == 2 and all(child.is_running() for child in children)
        owner.kill()
    assert psutil.wait_procs(children, timeout=60)[1] == []
