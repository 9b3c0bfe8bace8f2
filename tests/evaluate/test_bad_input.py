"""Mistakes on the command lines of evaluation and its jobs: exit code 2 and one message, before Ray starts."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_evaluations import episode, evaluated

from defi_platform.errors import exit_code

COUNTER = "benchmark=faulty_benchmark:Counter tasks=[chain] arms=[random] output=OUT"
NO_SERVER = "url=ws://127.0.0.1:9"


def foreign(folder: Path) -> None:
    """Folders that are no evaluation of ours, each in another way."""
    for name, summary in (("text", "{]"), ("table", '{"protocol": {}}'), ("other", "[1]")):
        (folder / name).mkdir()
        (folder / name / "summary.json").write_text(summary)
        (folder / name / "episodes.parquet").write_bytes(b"no table")
    (folder / "empty").mkdir()
    table = folder / "empty" / "episodes.parquet"
    pq.write_table(pa.table({"arm": pa.array([], pa.string())}), table)
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    content = {"arms": {}, "protocol": {"policy": {}}, "episodes_sha256": digest}
    (folder / "empty" / "summary.json").write_text(json.dumps(content))
    (folder / "file").touch()


@pytest.mark.parametrize(
    ("job", "line", "says"),
    [
        ("evaluate_policy", f"{COUNTER} tasks=chain", "tasks is a list; write tasks=[chain]."),
        ("evaluate_policy", f"{COUNTER} arms=random", "arms is a list; write arms=[random]."),
        ("evaluate_policy", f"{COUNTER} output=", "output is empty; write output=VALUE."),
        ("evaluate_policy", f"{COUNTER} workers=", "workers is empty; write workers=VALUE, or leave it out"),
        ("evaluate_policy", f"{COUNTER} observation_keys=libero", "e.g. observation_keys.names=libero."),
        ("evaluate_policy", f"{COUNTER} simulator=fast", "simulator is a group of settings (python, "),
        (
            "evaluate_policy",
            f"{COUNTER} observation_keys.prompt=''",
            "observation_keys.prompt is empty; name a key",
        ),
        (
            "evaluate_policy",
            f"{COUNTER} stop_rule.alpha=0.01",
            "stop_rule.alpha is 0.01, and there is no test",
        ),
        ("evaluate_policy", f"{COUNTER} stop_rule.beta=0.2", "set stop_rule.p0 and stop_rule.p1 too"),
        ("evaluate_policy", f"{COUNTER} simulator.reset_timeout_s=inf", "reset_timeout_s is inf; it must be"),
        ("evaluate_policy", f"{COUNTER} simulator.memory_gb=.nan", "memory_gb is nan; it must be"),
        (
            "evaluate_policy",
            f"{COUNTER} simulator.python=/nowhere",
            "simulator.python is /nowhere, which is no program",
        ),
        ("evaluate_policy", f"{COUNTER} episodes_per_task=null", "no fixed number of them: say how many"),
        (
            "record_demos",
            "tasks=[drawer-close-v3] output=OUT simulator.python=/nowhere",
            "is /nowhere, which is no",
        ),
        (
            "record_demos",
            "tasks=[drawer-close-v3] output=OUT simulator.retries=-1",
            "simulator.retries is -1",
        ),
        ("record_demos", "tasks=[drawer-close-v3] output=OUT noise=nan", "noise is nan"),
        (
            "record_demos",
            "taskz=[drawer-close-v3] output=OUT",
            "there is no key 'taskz'. Did you mean 'tasks'?",
        ),
        (
            "evaluate_offline",
            f"{NO_SERVER} dataset=/nowhere output=OUT",
            "/nowhere (data.corpora.dataset.path) does",
        ),
        (
            "evaluate_offline",
            f"{NO_SERVER} dataset=HERE/text output=OUT",
            "has no annotation/ and no meta/info.json",
        ),
        ("evaluate_offline", f"{NO_SERVER} output=OUT", "'dataset' has no value"),
        ("compare_evaluations", "HERE/text HERE/text", "summary.json is damaged, or another program's"),
        ("compare_evaluations", "HERE/table HERE/table", "episodes.parquet is damaged, or another program's"),
        ("compare_evaluations", "HERE/other HERE/text", "holds no evaluation but other results"),
        ("compare_evaluations", "HERE/empty HERE/empty", "has no episodes: its table is empty"),
        ("compare_evaluations", "HERE/file HERE/text", "holds no finished evaluation"),
        ("compare_evaluations", "", "'outputs' has no value"),
        ("export_evaluation", "evaluation=/nowhere output=OUT", "/nowhere holds no finished evaluation"),
        ("export_evaluation", "evaluation=HERE/empty output=OUT", "has no episodes: its table is empty"),
        ("export_evaluation", "evaluation=HERE/made output=HERE", "cannot be written: [Errno 21]"),
        ("export_evaluation", "evaluation=HERE/made output=OUT layout=rerun episodes=0", "episodes is 0"),
        ("tune_evaluation", f"{COUNTER} clients=[]", "clients is []; name at least one number"),
        ("tune_evaluation", f"{COUNTER} measure_s=inf", "measure_s is inf"),
        (
            "tune_evaluation",
            f"{COUNTER} simulator.python=/nowhere",
            "which is no program that can be run here",
        ),
        (
            "tune_evaluation",
            f"{COUNTER} arms=[policy] serve.policy=/nowhere",
            "model folder /nowhere does not exist",
        ),
        ("install_benchmark", "nope", "there is none of the name 'nope'"),
        ("install_benchmark", "nowhere:Class", "benchmark nowhere:Class: No module named 'nowhere'"),
        (
            "install_benchmark",
            "calvin clones.calvin=/nowhere clones.calvin_env=/nowhere",
            "/nowhere is no folder",
        ),
        ("install_benchmark", "simplerenv clones.x=/nowhere", "needs no such clone, but ManiSkill2_real2sim"),
    ],
)
def test_a_mistake_is_one_message(
    job: str,
    line: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_ray(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started")

    foreign(tmp_path)
    if "HERE/made" in line:
        evaluated(tmp_path / "made", [episode("cube", 0, True)])
    words = line.replace("OUT", str(tmp_path / "out")).replace("HERE", str(tmp_path)).split()
    monkeypatch.setattr("ray.init", no_ray)
    monkeypatch.setattr(sys, "argv", [f"{job}.py", *words])
    assert exit_code(importlib.import_module(f"defi_platform.jobs.{job}").main) == 2
    said = capsys.readouterr().err
    assert says in " ".join(said.split()) and "Traceback" not in said
    assert not any((tmp_path / "out").glob("*")), "a job that was refused leaves nothing"


def test_a_name_on_the_leaderboard_needs_no_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, Any] = {}
    module = importlib.import_module("defi_platform.evaluate.results.vla_eval")
    monkeypatch.setattr(module, "leaderboard_entry", lambda _, **given: written.update(given) or {})
    evaluated(tmp_path / "made", [episode("cube", 0, True)])
    line = f"evaluation={tmp_path}/made output={tmp_path}/o.json layout=leaderboard model=key curated_by=me"
    monkeypatch.setattr(sys, "argv", ["export_evaluation.py", *line.split()])
    assert importlib.import_module("defi_platform.jobs.export_evaluation").main() == 0
    assert written["curated_by"] == "@me"
