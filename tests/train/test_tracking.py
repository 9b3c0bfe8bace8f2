"""Weights & Biases, the real client without its server."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from defi_platform import storage
from defi_platform.config import TrackingConfig
from defi_platform.train.observability import wandb_tracker as tracking
from defi_platform.train.observability.wandb_tracker import Tracker


def tracked(run: str, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    tracker = Tracker(TrackingConfig(), run, "gidm", {"seed": 0})
    tracker.log({"split": "train", "step": 1, "loss": 0.5})
    tracker.finish()


def test_a_server_that_cannot_be_reached_costs_a_message_and_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 3.0)
    tracked(str(tmp_path), monkeypatch, "online")
    assert "W&B cannot be reached" in capsys.readouterr().out
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert run.name == f"run-{(tmp_path / 'wandb_run_id').read_text()}.wandb"
    deadline = time.monotonic() + 60
    while b"loss" not in run.read_bytes():
        assert time.monotonic() < deadline, "W&B's own process writes the row soon after"
        time.sleep(0.2)


def test_what_is_tracked_offline_lands_in_a_remote_run_folder_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracked("memory://tracked/run", monkeypatch, "offline")
    (name,) = storage.names("memory://tracked/run/wandb")
    assert name.startswith("offline-run-")
    assert any(one.endswith(".wandb") for one in storage.names(f"memory://tracked/run/wandb/{name}"))


def test_a_remote_run_without_tracking_ends_like_any_other() -> None:
    tracker = Tracker(TrackingConfig(wandb=False), "memory://untracked/run", "gidm", {})
    tracker.log({"split": "train", "step": 1, "loss": 0.5})
    tracker.finish()
    assert storage.names("memory://untracked/run") == []
