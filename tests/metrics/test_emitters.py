"""What training, evaluation and progress displays put into the metrics."""

from __future__ import annotations

import pytest

from defi_platform.evaluate.fleet.run import count
from defi_platform.metrics import catalogue
from defi_platform.progress import Progress
from defi_platform.storage.outage import retry_storage
from defi_platform.train.observability.run_metrics import RunMetrics

Values = dict[tuple[str, ...], float]


def test_updates_of_a_run_are_counted_since_the_last_row(recorded_metrics: Values) -> None:
    metrics = RunMetrics("runs/a", "gfdm", steps=40)
    metrics.attempt(4)
    metrics.event("attempt")
    metrics.updates(10, 80, {"loss": 0.5, "mfu": 0.3}, {"data": 1.0, "forward": 3.0})
    metrics.checkpoint(None)
    metrics.updates(
        20, 80, {"loss": 0.4, "gpu_peak_bytes": 7}, {"data": 0.5, "forward": 3.0, "checkpoint": 0.0}
    )
    metrics.checkpoint(15)
    metrics.loss("validation", 0.6)
    assert recorded_metrics == {
        ("defi_train_workers", "runs/a", "gfdm"): 4,
        ("defi_train_events_total", "runs/a", "gfdm", "attempt"): 1,
        ("defi_train_samples_total", "runs/a", "gfdm"): 160,
        ("defi_train_phase_seconds_total", "runs/a", "gfdm", "data"): 1.5,
        ("defi_train_phase_seconds_total", "runs/a", "gfdm", "forward"): 6.0,
        ("defi_train_step", "runs/a", "gfdm"): 20,
        ("defi_train_progress_ratio", "runs/a", "gfdm"): 0.5,
        ("defi_train_loss", "runs/a", "gfdm", "train"): 0.4,
        ("defi_train_loss", "runs/a", "gfdm", "validation"): 0.6,
        ("defi_train_mfu_ratio", "runs/a", "gfdm"): 0.3,
        ("defi_train_gpu_peak_bytes", "runs/a", "gfdm"): 7,
        ("defi_train_checkpoint_step", "runs/a", "gfdm"): 15,
    }


def test_episodes_are_counted_by_outcome_and_requests_by_their_time(recorded_metrics: Values) -> None:
    row = {"arm": "policy", "success": True, "steps": 90, "wall_s": 4.0, "latency_ms": [20.0, 30.0]}
    count("runs/e", row)
    count("runs/e", {**row, "arm": "expert", "success": False, "latency_ms": []})
    assert recorded_metrics == {
        ("defi_evaluate_episodes_total", "runs/e", "policy", "success"): 1,
        ("defi_evaluate_episodes_total", "runs/e", "expert", "failure"): 1,
        ("defi_evaluate_steps_total", "runs/e", "policy"): 90,
        ("defi_evaluate_steps_total", "runs/e", "expert"): 90,
        ("defi_evaluate_episode_seconds", "runs/e", "policy"): 4.0,
        ("defi_evaluate_episode_seconds", "runs/e", "expert"): 4.0,
        ("defi_evaluate_request_seconds", "runs/e"): 0.05,
    }


def test_a_progress_display_publishes_what_is_new_and_all_of_it_by_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("defi_platform.progress.FIRST_S", 0.01)
    published: list[int] = []
    with Progress("ingest", "files", initial=5, publish=published.append) as progress:
        progress.step(3)
        while not published:
            pass
        progress.step(4)
    assert published[0] == 3 and sum(published) == 7
    assert "ingest 8 files" in capsys.readouterr().out


def test_a_request_to_a_store_that_is_made_again_is_counted(recorded_metrics: Values) -> None:
    answers = [OSError("away"), OSError("away"), None]

    class Clock:
        def monotonic(self) -> float:
            return 0.0

        def sleep(self, seconds: float, /) -> None:
            return

    def request() -> None:
        if error := answers.pop(0):
            raise error

    retry_storage(request, "s3://b", name="gfdm", timeout_s=9.0, timeout_key="k", clock=Clock())
    assert recorded_metrics == {(catalogue.STORAGE_RETRIES.name, "gfdm"): 2}
