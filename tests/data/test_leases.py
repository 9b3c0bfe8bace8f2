"""Leases: of units of work among drivers, and of a folder that one job writes to. On S3: test_evaluation_store.py."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from defi_platform.storage import exclusive, leases
from defi_platform.storage.leases import FOLDER, FolderInUse, FolderLease, Leases


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float, /) -> None:
        self.now += seconds


def test_of_many_drivers_at_the_same_moment_one_gets_the_unit(tmp_path: Path) -> None:
    drivers = [Leases(str(tmp_path)) for _ in range(8)]
    for driver in drivers:
        driver._beat()
    for unit in "abcde":
        got: list[str] = []
        start = threading.Barrier(len(drivers))

        def race(driver: Leases, unit: str = unit, got: list[str] = got, start: Any = start) -> None:
            start.wait()
            if driver.take(unit):
                got.append(driver.owner)

        threads = [threading.Thread(target=race, args=(driver,)) for driver in drivers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1


def test_the_units_of_a_killed_driver_of_this_machine_are_free_at_once(tmp_path: Path) -> None:
    code = (
        "import os,signal,sys; from defi_platform.storage.leases import Leases\n"
        "leases = Leases(sys.argv[1]); leases.__enter__(); assert leases.take('a')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, env=os.environ)
    with Leases(str(tmp_path)) as leases:
        assert leases.take("a") and (tmp_path / "leases/a-1.json").exists()


def test_a_driver_of_another_machine_is_gone_when_its_sign_of_life_stands_still(tmp_path: Path) -> None:
    clock = Clock()
    here, far, third = (Leases(str(tmp_path), dead_after_s=60, clock=clock) for _ in range(3))
    for driver in (here, far, third):
        driver._beat()
    sign = Path(far._driver(far.owner))

    def beat(number: int) -> None:
        content = json.loads(sign.read_text())
        content.update(beat=number, process={"machine": "elsewhere", "pid": 1, "started": "1"})
        sign.write_text(json.dumps(content))

    assert far.take("a")
    beat(1)
    assert not here.take("a")
    clock.now = 59
    assert not here.take("a")
    beat(2)
    clock.now = 61
    assert not here.take("a"), "it has moved"
    clock.now = 120
    assert not here.take("a")
    clock.now = 122
    assert here.take("a")
    assert not third.take("a"), "one successor"


# --------------------------------------------------------------------------- of a folder


def far_away(lease: FolderLease, beat: int = 0) -> None:
    """Makes the holder of a lease one of another machine."""
    sign = Path(lease._leases._driver(lease._leases.owner))
    content = json.loads(sign.read_text())
    content.update(host="node-7", process={"machine": "elsewhere", "pid": 5, "started": "1"}, beat=beat)
    sign.write_text(json.dumps(content))


class Beats(Clock):
    """Lets a far holder give a sign of life after some seconds; never: it is dead."""

    def __init__(self, holder: FolderLease, after_s: float):
        super().__init__()
        self.holder, self.after_s = holder, after_s

    def sleep(self, seconds: float, /) -> None:
        super().sleep(seconds)
        if self.now >= self.after_s:
            far_away(self.holder, beat=int(self.now))


def test_a_job_whose_holder_is_far_waits_to_see_whether_it_lives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FolderLease(str(tmp_path), "gfdm") as far:
        far_away(far)
        clock = Beats(far, after_s=8)
        with (
            pytest.raises(FolderInUse, match="process 5 on node-7"),
            FolderLease(str(tmp_path), "gfdm", clock=clock),
        ):
            pass
        assert clock.now == 8
    assert "at most 60 s" in capsys.readouterr().out


def test_a_dead_job_is_followed_by_one_and_finds_out_if_it_was_only_held_up(tmp_path: Path) -> None:
    with FolderLease(str(tmp_path), "gfdm") as held_up:
        far_away(held_up)
        clock = Beats(held_up, after_s=1e9)
        with FolderLease(str(tmp_path), "gfdm", clock=clock) as successor:
            assert 60 <= clock.now < 62
            assert Path(held_up.successor).exists() and not Path(successor.successor).exists()
            # What its thread does once it runs again.
            held_up._leases._beat()
            held_up._look()
            successor._look()
            assert held_up.is_lost() and not successor.is_lost()
    with FolderLease(str(tmp_path), "gfdm") as third:
        assert third.successor.endswith(f"{FOLDER}-3.json")


def test_a_killed_job_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    code = (
        "import os,signal,sys; from defi_platform.storage.leases import FolderLease\n"
        "FolderLease(sys.argv[1], 'gfdm').__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, env=os.environ)
    assert len(list((tmp_path / "in_use/drivers").iterdir())) == 1
    clock = Clock()
    with FolderLease(str(tmp_path), "gfdm", clock=clock):
        assert clock.now == 0


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"\xff"])
def test_a_damaged_sign_of_life_is_one_that_stands_still(tmp_path: Path, content: bytes) -> None:
    with FolderLease(str(tmp_path), "gfdm") as damaged:
        Path(damaged._leases._driver(damaged._leases.owner)).write_bytes(content)
        clock = Clock()
        with FolderLease(str(tmp_path), "gfdm", clock=clock):
            assert 60 <= clock.now < 62


def test_a_copy_of_a_folder_is_free_while_a_job_of_this_machine_writes_to_the_original(
    tmp_path: Path,
) -> None:
    with FolderLease(str(tmp_path / "run"), "gfdm") as original:
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        clock = Clock()
        with FolderLease(str(tmp_path / "copy"), "gfdm", clock=clock):
            assert 60 <= clock.now < 62
        original._look()
        assert not original.is_lost()


def test_a_process_that_another_user_may_not_see_is_not_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where /proc is mounted with hidepid."""

    def not_permitted(pid: int, number: int) -> None:
        raise PermissionError

    with Leases(str(tmp_path)) as theirs, Leases(str(tmp_path)) as ours:
        assert theirs.take("a")
        monkeypatch.setattr(leases, "_stat", lambda pid: None)
        monkeypatch.setattr(os, "kill", not_permitted)
        assert not ours.take("a")


def test_a_disk_without_hard_links_still_lets_one_of_two_create_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "lease"
    assert exclusive.create_bytes(str(path), b"one") and not exclusive.create_bytes(str(path), b"two")
    assert path.read_bytes() == b"one" and len(list(tmp_path.iterdir())) == 1
