"""Weights & Biases, and the only module that knows it: offline unless WANDB_API_KEY is set."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

from defi_platform import storage
from defi_platform.config import TrackingConfig

log = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"


class Tracker:
    """Sends a run's metrics to W&B as one run over all its attempts. It never makes training fail.

    Args:
        run: run folder; the W&B run id is kept there, and offline data too when it is local.
        settings: the resolved config of the job.
    """

    def __init__(self, config: TrackingConfig, run: str, kind: str, settings: dict[str, Any]):
        self._run: Any = None
        if not config.wandb or os.environ.get("WANDB_MODE") == "disabled":
            return
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        try:
            import wandb

            self._run = wandb.init(
                project=config.project,
                name=config.name or f"{kind}-{run.rstrip('/').rsplit('/', 1)[-1]}",
                id=_run_id(run),
                resume="allow",
                mode=mode,  # type: ignore[arg-type]  # W&B names what it does not know
                config=settings,
                dir=None if storage.is_remote(run) else str(storage.local_path(run)),
                settings=wandb.Settings(init_timeout=30, console="off", silent=True),
            )
        except Exception as error:  # noqa: BLE001 - whatever W&B raises, training goes on without it
            log.warning("W&B is off for this run: %s: %s", type(error).__name__, error)

    def log(self, row: dict[str, Any]) -> None:
        """Sends one row of metrics.jsonl, its keys under its split."""
        prefix = row["split"]
        self._guard(
            "log",
            {f"{prefix}/{k}": v for k, v in row.items() if k not in ("split", "step")},
            step=row["step"],
        )

    def image(self, name: str, path: str, step: int) -> None:
        """Sends a local picture."""
        if self._run is not None and not storage.is_remote(path):
            import wandb

            self._guard("log", {name: wandb.Image(str(storage.local_path(path)))}, step=step)

    def finish(self) -> None:
        """Ends the attempt; the run can be continued by the next one."""
        self._guard("finish")

    def _guard(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._run is None:
            return
        try:
            getattr(self._run, method)(*arguments, **options)
        except Exception as error:  # noqa: BLE001 - as above
            log.warning("W&B is off from here on: %s: %s", type(error).__name__, error)
            self._run = None


def _run_id(run: str) -> str:
    path = storage.join(run, RUN_ID_FILE)
    if storage.exists(path):
        return storage.read_text(path).strip()
    name = re.sub(r"[^a-z0-9]", "", run.lower())[-12:]
    identifier = f"{name}-{os.urandom(4).hex()}"
    storage.write_text(path, identifier)
    return identifier
