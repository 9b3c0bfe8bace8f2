"""State of a training, read from its run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from defi_platform import storage
from defi_platform.status.run_status import RunStatus, silent_for
from defi_platform.train.observability.metrics_log import read_metrics
from defi_platform.train.observability.status import read_status

CONFIG, SUMMARY, METRICS = "config.yaml", "summary.json", "metrics.jsonl"


def training_status(folder: str, now: float | None = None) -> RunStatus:
    """The state of a training.

    Args:
        folder: of the run.
        now: Unix time; None: of this machine's clock.

    Raises: StorageError, FileNotFoundError when it is deleted meanwhile.
    """
    settings = _settings(folder)
    status = read_status(folder) or {}
    rows = read_metrics(storage.join(folder, METRICS))
    summary = _json(storage.join(folder, SUMMARY))
    train: Mapping[str, Any] = settings.get("train") or {}
    attempts = [row for row in rows if row.get("split") == "attempt"]
    last: dict[str, Any] = next((row for row in reversed(rows) if row.get("split") == "train"), {})
    steps = int(train.get("steps") or status.get("steps") or 0)
    step = int(status.get("step") or last.get("step") or 0)
    complete = bool(summary) and summary.get("steps", 0) >= steps
    if complete:
        state = "complete"
    elif str(status.get("phase", "")).startswith("stopped"):
        state = status["phase"]
    else:
        state = silent_for(status.get("time"), now) or status.get("phase") or "not started"
    done = summary["steps"] if complete else step
    running = state == "training"
    return RunStatus(
        kind=str(summary.get("kind") or status.get("kind") or "training"),
        folder=folder,
        state=state,
        progress=f"step {done:,}/{steps:,}" + (f" ({done / steps:.0%})" if steps else ""),
        rate=_rate(summary.get("samples_per_s") if complete else status.get("samples_per_s")),
        data_wait=_data_wait(rows) if complete else status.get("data_wait"),
        eta_s=status.get("eta_s") if running else None,
        checkpoint=_checkpoint(status),
        failures=max(0, len(attempts) - 1) if attempts else None,
        remarks=_remarks(rows, summary),
        hours=resource_hours(rows, train, settings.get("data") or {}),
        updated=status.get("time"),
    )


def resource_hours(
    rows: Sequence[Mapping[str, Any]], train: Mapping[str, Any], data: Mapping[str, Any]
) -> dict[str, float]:
    """Hours that the workers of a run and their decoders held, by Ray resource.

    Args:
        rows: of metrics.jsonl, all attempts: the number of workers may change from one to the next.
        train: settings of the run.
        data: its settings of data.
    """
    workers, before, worker_hours = int(train.get("num_workers") or 1), 0.0, 0.0
    for row in rows:
        if row.get("split") == "attempt":
            workers = int(row.get("workers") or workers)
        wall = row.get("wall_s")
        if wall is not None:
            worker_hours += max(0.0, wall - before) * workers / 3600
            before = max(before, wall)
    resources = dict(train.get("resources_per_worker") or {"CPU": 1.0})
    if train.get("use_gpu"):
        resources.setdefault("GPU", 1.0)
    hours = {name: worker_hours * float(amount) for name, amount in resources.items()}
    decoders = (data.get("decode") or {}).get("processes") or 0
    if decoders:
        hours["decode CPU"] = worker_hours * float(decoders)
    return {name: amount for name, amount in hours.items() if amount}


def _settings(folder: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(storage.read_text(storage.join(folder, CONFIG)))
    except FileNotFoundError:
        return {}
    except yaml.YAMLError as error:
        raise ValueError(f"{CONFIG} is not readable YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{CONFIG} holds no mapping")
    return found


def _json(uri: str) -> dict[str, Any]:
    try:
        return dict(json.loads(storage.read_text(uri)))
    except FileNotFoundError:
        return {}


def _rate(samples_per_s: float | None) -> str:
    return "" if samples_per_s is None else f"{samples_per_s:,.1f} samples/s"


def _data_wait(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of the time of all logged steps; validation is not part of it."""
    phases = [
        (row["data_s"], sum(v for k, v in row.items() if k.endswith("_s") and k not in ("wall_s", "validation_s")))
        for row in rows
        if row.get("split") == "train" and "data_s" in row
    ]  # fmt: skip
    total = sum(busy for _, busy in phases)
    return sum(waited for waited, _ in phases) / total if total else None


def _checkpoint(status: Mapping[str, Any]) -> str:
    step = status.get("checkpoint_step")
    return "" if step is None else f"step {step:,}"


def _remarks(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> tuple[str, ...]:
    counts = {
        "updates skipped": sum(row.get("split") == "skipped" for row in rows),
        "checkpoints left out": sum(row.get("split") == "checkpoint_left_out" for row in rows),
        "preemptions": sum(row.get("split") == "preemption" for row in rows),
        "videos skipped": sum((summary.get("skipped") or {}).values()),
    }
    return tuple(f"{count:,} {what}" for what, count in counts.items() if count)
