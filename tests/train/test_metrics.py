from __future__ import annotations

from pathlib import Path

from defi_platform.train.observability.metrics_log import MetricsLog, read_metrics


def test_a_resumed_log_drops_what_will_be_done_again(tmp_path: Path) -> None:
    path = str(tmp_path / "metrics.jsonl")
    first = MetricsLog(path, 0)
    for step in range(1, 8):
        first.append({"step": step, "split": "train", "loss": float(step)})
    second = MetricsLog(path, 5)
    second.append({"step": 6, "split": "train", "loss": 60.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 60.0),
    ]  # fmt: skip
    assert second.rows() == read_metrics(path)


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train"}\n{"step": 2, "spl')
    assert read_metrics(str(path)) == [{"step": 1, "split": "train"}]


def test_a_run_that_starts_anew_starts_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train"}\n')
    assert MetricsLog(str(path), 0).rows() == []
    assert read_metrics(str(path)) == []
