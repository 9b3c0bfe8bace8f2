from __future__ import annotations

import time
from pathlib import Path

import pytest

from defi_platform.train.stop_request import StopRequest, request_stop


@pytest.mark.parametrize("remote", [False, True])
def test_a_request_to_stop_reaches_a_run_wherever_its_folder_lies(tmp_path: Path, remote: bool) -> None:
    run = "memory://runs/stopped" if remote else str(tmp_path)
    request = StopRequest(run, interval_s=0.05)
    assert not request.made()
    request_stop(run)
    deadline = time.monotonic() + 10
    while not request.made():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    request.close()
