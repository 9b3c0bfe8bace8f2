"""The demo's record of its stages: reuse, resuming after an interruption, running again what has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from defi_platform.config import RecordConfig
from defi_platform.demo import Stage, StageLog


def recording(folder: Path, work: Callable[[RecordConfig], None], **settings) -> Stage:
    config = RecordConfig(output=str(folder), **{"tasks": ["reach-v3"], **settings})
    return Stage("record", "record", config, work, (str(folder),))


def write_result(config: RecordConfig) -> None:
    Path(config.output).mkdir(parents=True, exist_ok=True)
    (Path(config.output) / "result").write_text(f"{config.episodes_per_task}")


def test_a_finished_stage_is_reused_by_the_next_demo_and_says_so(tmp_path: Path, capsys) -> None:
    runs = []
    for _ in range(2):
        StageLog(str(tmp_path / "stages.json")).run_stage(
            recording(tmp_path / "c", runs.append), "[1/5] record"
        )
    assert len(runs) == 1
    assert "reused" in capsys.readouterr().out


def test_a_stage_is_done_until_it_or_one_that_it_reads_has_other_settings(tmp_path: Path) -> None:
    def stages(**settings: int) -> list[Stage]:
        first = recording(tmp_path / "c", write_result, **settings)
        return [first, replace(first, name="pretrain", folders=(), after=("record",))]

    log = StageLog(str(tmp_path / "stages.json"))
    assert not any(map(log.done, stages()))
    for stage in stages():
        log.run_stage(stage, stage.name)
    again = StageLog(str(tmp_path / "stages.json"))
    assert all(map(again.done, stages()))
    assert not again.done(stages(episodes_per_task=4)[0])
    again.run_stage(stages(episodes_per_task=4)[0], "record")
    assert not again.done(stages()[1])


def test_an_interrupted_stage_goes_on_and_its_time_is_added_up(tmp_path: Path, capsys) -> None:
    def interrupt(config: RecordConfig) -> None:
        write_result(config)
        raise KeyboardInterrupt

    path = tmp_path / "stages.json"
    with pytest.raises(KeyboardInterrupt):
        StageLog(str(path)).run_stage(recording(tmp_path / "c", interrupt), "record")
    before = json.loads(path.read_text())["record"]
    assert not before["done"]
    StageLog(str(path)).run_stage(recording(tmp_path / "c", lambda _: None), "record")
    after = json.loads(path.read_text())["record"]
    assert after["done"] and after["seconds"] > before["seconds"]
    assert (tmp_path / "c" / "result").exists(), "what the first attempt wrote is still there"
    assert "goes on where it was" in capsys.readouterr().out


def test_a_stage_with_other_settings_is_done_again_and_the_old_result_kept(tmp_path: Path) -> None:
    log = StageLog(str(tmp_path / "stages.json"))
    log.run_stage(recording(tmp_path / "c", write_result, episodes_per_task=3), "record")
    log.run_stage(recording(tmp_path / "c", write_result, episodes_per_task=4), "record")
    assert (tmp_path / "c" / "result").read_text() == "4"
    assert (tmp_path / "c.old-1" / "result").read_text() == "3"


def test_another_number_of_workers_does_not_make_another_result(tmp_path: Path) -> None:
    runs: list[RecordConfig] = []
    log = StageLog(str(tmp_path / "stages.json"))
    log.run_stage(recording(tmp_path / "c", runs.append, workers=1), "record")
    log.run_stage(recording(tmp_path / "c", runs.append, workers=2), "record")
    assert len(runs) == 1


def test_a_stage_is_done_again_when_what_it_reads_was_made_anew(tmp_path: Path) -> None:
    def training(runs: list) -> Stage:
        config = RecordConfig(output=str(tmp_path / "t"), tasks=[])
        return Stage("train", "train", config, runs.append, (str(tmp_path / "t"),), after=("record",))

    runs: list[RecordConfig] = []
    log = StageLog(str(tmp_path / "stages.json"))
    for episodes in (3, 3, 4):
        log.run_stage(recording(tmp_path / "c", write_result, episodes_per_task=episodes), "record")
        log.run_stage(training(runs), "train")
    assert len(runs) == 2
