"""The start of a Ray cluster for a job where none is running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from defi_platform.cluster import STARTS, ClusterError, ray_session, source_roots
from defi_platform.config import RayConfig

TOO_SLOW = "The current node timed out during startup. This could happen because of many things."


class SlowMachine:
    """On which Ray starts in time only after so many failures."""

    def __init__(self, failures: int, message: str = TOO_SLOW):
        self.failures, self.message, self.starts = failures, message, 0

    def init(self, **settings: Any) -> None:
        self.starts += 1
        if self.starts <= self.failures:
            raise Exception(self.message)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> SlowMachine:
    slow = SlowMachine(*request.param)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", slow.init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return slow


@pytest.mark.parametrize("machine", [(STARTS - 1,)], indirect=True)
def test_a_ray_that_does_not_start_in_time_is_started_again(
    machine: SlowMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    with ray_session(RayConfig()):
        assert machine.starts == STARTS
    assert capsys.readouterr().err.count("trying again") == STARTS - 1


@pytest.mark.parametrize("machine", [(STARTS,)], indirect=True)
def test_one_that_never_does_is_an_error_that_names_the_way_out(machine: SlowMachine) -> None:
    with pytest.raises(ClusterError, match=r"did not start.*ray start --head"), ray_session(RayConfig()):
        pass


@pytest.mark.parametrize("machine", [(1, "no space left")], indirect=True)
def test_what_else_goes_wrong_is_not_tried_again(machine: SlowMachine) -> None:
    with pytest.raises(Exception, match="no space left"), ray_session(RayConfig()):
        pass
    assert machine.starts == 1


def test_the_folders_that_workers_import_from_hold_the_two_packages() -> None:
    roots = source_roots()
    assert not roots or [
        (Path(root) / name).is_dir()
        for root, name in zip(roots, ("defi_platform", "defi_models"), strict=True)
    ] == [True, True]
