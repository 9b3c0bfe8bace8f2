"""The demo: record, pretrain both models, fine-tune, serve and evaluate, report, once each.

Every stage is the function that its own job calls, and resumes by itself. This module adds what the sequence needs: a
stage runs again when its settings, or those of a stage it reads from, have changed since it finished (the old folder
is kept under another name), and the time of each stage is added up over interruptions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from defi_platform import storage
from defi_platform.cluster import ray_session
from defi_platform.config import DemoConfig
from defi_platform.config.loader import to_mapping
from defi_platform.evaluate.html.report import ReportInputs, write_report
from defi_platform.evaluate.record import record
from defi_platform.evaluate.rollouts import evaluate
from defi_platform.train.driver.finetune import finetune
from defi_platform.train.driver.pretrain import pretrain_both


@dataclass(frozen=True)
class Stage:
    """One step of the demo."""

    name: str
    title: str
    config: Any
    run: Callable[[Any], Any]
    folders: tuple[str, ...]
    """Folders that the stage writes."""
    after: tuple[str, ...] = ()
    """Names of the stages whose results it reads."""


def stages(config: DemoConfig) -> list[Stage]:
    """The demo's stages in order."""
    gfdm, gidm = config.pretrain.gfdm, config.pretrain.gidm
    return [
        Stage("record", "record demonstrations", config.record, record, (config.record.output,)),
        Stage(
            "pretrain",
            "pretrain GFDM and GIDM on video",
            config.pretrain,
            pretrain_both,
            (gfdm.train.output, gidm.train.output),
            after=("record",),
        ),
        Stage(
            "finetune",
            "fine-tune the fused policy",
            config.finetune,
            finetune,
            (config.finetune.train.output,),
            after=("record", "pretrain"),
        ),
        Stage(
            "evaluate",
            "serve it and run closed-loop rollouts",
            config.evaluate,
            evaluate,
            (config.evaluate.output,),
            after=("finetune",),
        ),
    ]


def run_demo(config: DemoConfig) -> str:
    """Runs, resumes or reuses every stage and writes the report.

    Args:
        config: of all stages.

    Returns: the path of the report.
    """
    log = StageLog(storage.join(config.output, "stages.json"))
    sequence = stages(config)
    # One Ray for all stages; starting it takes longer than finding that nothing is left to do.
    with contextlib.nullcontext() if all(map(log.done, sequence)) else ray_session(config.ray):
        for number, stage in enumerate(sequence, start=1):
            log.run_stage(stage, f"[{number}/5] {stage.title}")
    print("[5/5] report", flush=True)
    return write_report(
        ReportInputs(
            gfdm=config.pretrain.gfdm.train.output,
            gidm=config.pretrain.gidm.train.output,
            policy=config.finetune.train.output,
            evaluation=config.evaluate.output,
            stage_seconds=log.seconds(),
        ),
        config.output,
    )


class StageLog:
    """The record of the stages in a JSON file: fingerprint of the settings, seconds, whether it finished."""

    def __init__(self, path: str):
        self._path = path
        self._stages: dict[str, dict[str, Any]] = (
            json.loads(storage.read_text(path)) if storage.exists(path) else {}
        )

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds per stage, interrupted attempts included."""
        return {name: entry["seconds"] for name, entry in self._stages.items()}

    def done(self, stage: Stage) -> bool:
        """True when a stage, and the stages it reads from, finished with their present settings."""
        if not all(name in self._stages for name in (stage.name, *stage.after)):
            return False
        entry = self._stages[stage.name]
        return bool(entry["done"]) and entry["fingerprint"] == self._fingerprint(stage)

    def run_stage(self, stage: Stage, title: str) -> None:
        """Runs a stage, resumes an interrupted one, or leaves a finished one as it is.

        Args:
            stage: what to run.
            title: for the lines on the console.
        """
        fingerprint = self._fingerprint(stage)
        entry = self._stages.get(stage.name)
        if entry and entry["fingerprint"] != fingerprint:
            for folder in stage.folders:
                if storage.exists(folder):
                    kept = storage.set_aside(folder)
                    print(
                        f"{title}: its settings have changed; the earlier result is kept in {kept}",
                        flush=True,
                    )
            entry = None
        if entry and entry["done"]:
            print(f"{title}: done before ({entry['seconds']:.0f} s), reused", flush=True)
            return
        print(f"{title}{': goes on where it was' if entry else ''}", flush=True)
        entry = entry or {"fingerprint": fingerprint, "seconds": 0.0, "done": False}
        self._stages[stage.name] = entry
        self._save()
        start = time.monotonic()
        try:
            stage.run(stage.config)
            entry["done"] = True
        finally:
            entry["seconds"] += time.monotonic() - start
            self._save()

    def _fingerprint(self, stage: Stage) -> str:
        inputs = [self._stages[name]["fingerprint"] for name in stage.after]
        text = json.dumps([_result_settings(to_mapping(stage.config)), inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _save(self) -> None:
        storage.write_text(self._path, json.dumps(self._stages, indent=1))


_EXECUTION_SETTINGS = {"ray", "workers", "host", "port", "threads", "tracking", "decode"}
"""Settings of how a stage is executed, which do not change its result."""


def _result_settings(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: _result_settings(value) for key, value in values.items() if key not in _EXECUTION_SETTINGS}
