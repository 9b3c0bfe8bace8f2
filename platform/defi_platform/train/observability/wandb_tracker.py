"""Weights & Biases, and the only module that knows it: offline unless WANDB_API_KEY is set."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from defi_platform import storage
from defi_platform.config import TrackingConfig
from defi_platform.storage.scratch import scratch_folder

log = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"
FOLDER = "wandb"
INIT_TIMEOUT_S, FINISH_TIMEOUT_S = 30.0, 60.0
"""How long a server that does not answer holds up the start and the end of a run."""


class Tracker:
    """Sends a run's metrics to W&B as one run over all its attempts.

    It never makes training fail: an attempt that finds no server is kept offline, for `wandb sync`.

    Args:
        config: of the tracking.
        run: run folder; the W&B run id is kept there, and the offline data (of a remote one: once the run ends).
        kind: of the recipe.
        settings: the resolved config of the job, code version and data fingerprint.
    """

    def __init__(self, config: TrackingConfig, run: str, kind: str, settings: dict[str, Any]):
        self._run: Any = None
        self._scratch: Path | None = None
        """Where the data of a remote run folder lies until the end."""
        self._target = storage.join(run, FOLDER)
        if not config.wandb or os.environ.get("WANDB_MODE") == "disabled":
            return
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        if storage.is_remote(run):
            self._scratch = scratch_folder("wandb")
        options = {
            "project": config.project,
            "name": config.name or f"{kind}-{run.rstrip('/').rsplit('/', 1)[-1]}",
            "id": _run_id(run),
            "config": settings,
            "dir": str(self._scratch or storage.local_path(run)),
        }
        try:
            self._run = _init(mode, options, self._target)
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

    def media(self, name: str, path: str, step: int) -> None:
        """Sends a picture or an mp4.

        Args:
            name: in W&B; one that ends in ".mp4" is a video.
            path: of the file, local or remote.
            step: that it belongs to.
        """
        if self._run is None:
            return
        import wandb

        kind = wandb.Video if name.endswith(".mp4") else wandb.Image
        try:
            with storage.local_copy(path) as local:
                self._guard("log", {name: kind(str(local))}, step=step)
        except (OSError, storage.StorageError) as error:
            log.warning("%s is not sent to W&B: %s", name, error)

    def finish(self) -> None:
        """Ends the attempt; the run can be continued by the next one."""
        offline = self._run is not None and self._run.offline
        self._guard("finish")
        if self._scratch is None:
            return
        try:
            if offline:
                self._upload(self._scratch / FOLDER)
            shutil.rmtree(self._scratch)
        except (OSError, storage.StorageError) as error:
            log.warning("W&B's data of this attempt stays in %s: %s", self._scratch, error)

    def _upload(self, folder: Path) -> None:
        import wandb

        # Only when its service has ended is everything written.
        wandb.teardown()
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                storage.put_file(path, storage.join(self._target, *path.relative_to(folder).parts))

    def _guard(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._run is None:
            return
        try:
            getattr(self._run, method)(*arguments, **options)
        except Exception as error:  # noqa: BLE001 - as above
            log.warning("W&B is off from here on: %s: %s", type(error).__name__, error)
            self._run = None


def _init(mode: str, options: dict[str, Any], offline_folder: str) -> Any:
    """A W&B run; offline where it should be online and the server does not answer.

    Args:
        mode: "online" or "offline".
        options: of `wandb.init`.
        offline_folder: where the data of an offline one ends up.
    """
    import wandb

    settings = wandb.Settings(
        init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S, console="off", silent=True
    )
    try:
        return wandb.init(**options, resume="allow", mode=mode, settings=settings)  # type: ignore[arg-type]  # its own names
    except wandb.Error as error:
        if mode != "online":
            raise
        print(
            f"W&B cannot be reached ({error}); this attempt is kept in {offline_folder}, from where "
            "`wandb sync` brings it to the server",
            flush=True,
        )
        # Its service still holds the run that did not start.
        wandb.teardown()
        return wandb.init(**options, mode="offline", settings=settings)


def _run_id(run: str) -> str:
    path = storage.join(run, RUN_ID_FILE)
    if storage.exists(path):
        return storage.read_text(path).strip()
    name = re.sub(r"[^a-z0-9]", "", run.lower())[-12:]
    identifier = f"{name}-{os.urandom(4).hex()}"
    storage.write_text(path, identifier)
    return identifier
