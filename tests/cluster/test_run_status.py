"""The state of runs, read from the folders that jobs leave: local trees and S3, without listing their data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from defi_platform import storage
from defi_platform.errors import ConfigError
from defi_platform.status.cluster_view import Job, job_lines, nodes_line
from defi_platform.status.command import outermost, show_status
from defi_platform.status.find import find_runs
from defi_platform.status.prices import Prices, read_prices
from defi_platform.status.run_status import RunStatus, duration, silent_for
from defi_platform.status.table import common_folder, table
from defi_platform.status.training import resource_hours, training_status

NOW = 1_800_000_000.0
CONFIG = """
train: {steps: 100, num_workers: 2, use_gpu: true, resources_per_worker: {CPU: 4.0}}
data: {decode: {processes: 3}}
"""
STATUS = {
    "kind": "gfdm", "steps": 100, "phase": "training", "step": 40, "samples": 320, "loss": 0.5, "samples_per_s": 24.06,
    "eta_s": 600.0, "data_wait": 0.031, "checkpoint_step": 30, "time": NOW - 5,
}  # fmt: skip
ROWS = [
    {"step": 0, "split": "attempt", "workers": 2, "time": NOW - 4000},
    {"step": 20, "split": "train", "data_s": 1.0, "forward_s": 3.0, "validation_s": 9.0, "wall_s": 1800.0},
    {"step": 20, "split": "attempt", "workers": 1, "time": NOW - 2000},
    {"step": 21, "split": "skipped", "samples": [160, 167]},
    {"step": 40, "split": "train", "data_s": 1.0, "forward_s": 3.0, "validation_s": 0.0, "wall_s": 3600.0},
]


def write_training(
    run: str, status: dict[str, Any] | None = STATUS, summary: dict[str, Any] | None = None
) -> str:
    storage.write_text(storage.join(run, "config.yaml"), CONFIG)
    storage.write_text(storage.join(run, "metrics.jsonl"), "".join(json.dumps(row) + "\n" for row in ROWS))
    if status is not None:
        storage.write_text(storage.join(run, "status.json"), json.dumps(status))
    if summary is not None:
        storage.write_text(storage.join(run, "summary.json"), json.dumps(summary))
    return run


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What jobs leave in a folder tree: two trainings, an ingest, a cache, an evaluation, a recording, and data."""
    write_training(str(tmp_path / "runs" / "gfdm"))
    summary = {"kind": "gidm", "steps": 100, "samples_per_s": 30.0, "skipped": {"timeout": 2}}
    write_training(str(tmp_path / "runs" / "gidm"), {**STATUS, "kind": "gidm", "phase": "complete"}, summary)
    for name, content in {
        "manifest/corpora/a/committed.json": json.dumps({"counts": {"videos": 1200, "timeout": 3}}),
        "manifest/corpora/b/probed/1.parquet": "",
        "latents/encoder.json": json.dumps({"describes": "VAE"}),
        "latents/shards/1.parquet": "",
        "eval/episodes/0123456789abcdef0123456789abcdef.json": "{}",
        "eval/summary.json": json.dumps({"arms": {"policy": {"pooled": {"successes": 1, "episodes": 2}}}}),
        "demos/.attempts/door_1_40.npz": "",
        "demos/.attempts/settings.json": "{}",
    }.items():
        storage.write_text(str(tmp_path / "runs" / name), content)
    return tmp_path / "runs"


def test_a_training_shows_progress_rate_wait_end_checkpoint_and_restarts(tmp_path: Path) -> None:
    run = training_status(write_training(str(tmp_path / "run")), NOW)
    assert (run.kind, run.state, run.progress) == ("gfdm", "training", "step 40/100 (40%)")
    assert (run.rate, run.data_wait, run.eta_s) == ("24.1 samples/s", 0.031, 600.0)
    assert (run.checkpoint, run.failures, run.remarks) == ("step 30", 1, ("1 updates skipped",))
    # 0.5 h with two workers, then 0.5 h with one.
    assert run.hours == {"CPU": 6.0, "GPU": 1.5, "decode CPU": 4.5}


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({**STATUS, "time": NOW - 3600}, "silent for 60 min"),
        ({**STATUS, "phase": "stopped at step 40"}, "stopped at step 40"),
        ({**STATUS, "phase": "building the model"}, "building the model"),
        (None, "not started"),
    ],
)
def test_a_training_that_does_not_train_says_so_and_promises_no_end(
    tmp_path: Path, status: dict[str, Any] | None, state: str
) -> None:
    run = training_status(write_training(str(tmp_path), status), NOW)
    assert run.state == state and run.eta_s is None and not run.is_complete


def test_a_complete_training_has_the_wait_of_all_its_steps(tmp_path: Path) -> None:
    summary = {"kind": "gfdm", "steps": 100, "samples_per_s": 30.0, "skipped": {"timeout": 2}}
    run = training_status(write_training(str(tmp_path), summary=summary), NOW)
    assert run.is_complete and run.progress == "step 100/100 (100%)"
    assert run.data_wait == 0.25 and run.rate == "30.0 samples/s" and "2 videos skipped" in run.remarks


def test_a_run_that_was_extended_is_not_complete(tmp_path: Path) -> None:
    assert not training_status(write_training(str(tmp_path), summary={"steps": 60}), NOW).is_complete


def test_every_kind_of_run_in_a_tree_is_found_and_data_is_not_searched(tree: Path) -> None:
    for number in range(1001):
        (tree / "videos_flat").mkdir(exist_ok=True)
        (tree / "videos_flat" / f"{number}.mp4").touch()
    found = find_runs([str(tree)], NOW)
    assert {(Path(run.folder).name, run.kind, run.state, run.progress) for run in found.runs} == {
        ("gfdm", "gfdm", "training", "step 40/100 (40%)"),
        ("gidm", "gidm", "complete", "step 100/100 (100%)"),
        ("a", "ingest", "complete", "1,200 videos"),
        ("b", "ingest", "ingesting, or cut short", "1 blocks of files opened"),
        ("latents", "latents", "filled as far as asked for, or being filled", "1 shards"),
        ("eval", "evaluation", "complete", "1 episodes"),
        ("demos", "recording", "recording, or cut short", "1 attempts"),
    }
    assert [
        line for line in found.skipped if "videos_flat has more than 1,000 entries" in line
    ] == found.skipped


def test_a_root_in_a_storage_that_refuses_us_hides_no_run(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_folder(uri: str) -> bool:
        if uri == "s3://runs/a":
            raise storage.StorageError("s3://runs/a: no credentials. Set AWS_PROFILE.")
        return Path(uri).is_dir()

    monkeypatch.setattr(storage, "is_folder", is_folder)
    found = find_runs(["s3://runs/a", str(tree)], NOW)
    assert len(found.runs) == 7
    assert found.skipped == ["s3://runs/a cannot be read: s3://runs/a: no credentials. Set AWS_PROFILE."]


def test_a_run_that_cannot_be_read_hides_no_other(tree: Path) -> None:
    (tree / "gfdm" / "config.yaml").write_text("train: [")
    (tree / "gidm" / "metrics.jsonl").write_text('{"broken\n{"step": 1}\n')
    found = find_runs([str(tree), str(tree / "absent")], NOW)
    assert len(found.runs) == 5
    assert sorted(line.split(" ")[0] for line in found.skipped) == [
        str(tree / "absent"), str(tree / "gfdm"), str(tree / "gidm"),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["[1]", '{"steps": null}', '{"arms": {"policy": {}}}'])
def test_a_run_whose_files_have_another_form_hides_no_other(tree: Path, text: str) -> None:
    whole = find_runs([str(tree)], NOW)
    for folder, name in {"a/episodes": "../summary.json", "b/checkpoints": "../summary.json"}.items():
        (tree / "odd" / folder).mkdir(parents=True)
        (tree / "odd" / folder / name).write_text(text)
    (tree / "odd" / "b" / "config.yaml").write_text("train: {steps: 3}")
    found = find_runs([str(tree)], NOW)
    assert [run for run in found.runs if "/odd/" not in run.folder] == whole.runs
    assert any("another form than a run's" in line for line in found.skipped)


def test_runs_in_memory_stores_are_found_as_on_s3() -> None:
    write_training("memory://status/deep/er/gfdm")
    (run,) = find_runs(["memory://status"], NOW).runs
    assert run.folder == "memory://status/deep/er/gfdm" and run.checkpoint == "step 30"
    deep = find_runs(["memory://status"], NOW, depth=1)
    assert not deep.runs and "1 folders more than 1 levels down" in deep.skipped[0]


def test_the_table_has_a_line_per_run_and_only_columns_with_content(tree: Path) -> None:
    runs = find_runs([str(tree)], NOW).runs
    text = table(runs, Prices(gpu=2.0, decode_cpu=0.1))
    assert text.splitlines()[0] == f"in {tree}"
    line = next(one for one in text.splitlines() if one.startswith("gfdm "))
    for part in ("training", "step 40/100 (40%)", "24.1 samples/s", "3%", "10 min", "step 30", "$3.45"):
        assert part in line
    assert "cost" not in table(runs, None)
    assert "3 timeout" in text and "policy 1/2" in text


def test_cost_counts_the_node_of_a_gpu_once_and_is_unknown_without_a_price() -> None:
    hours = {"GPU": 10.0, "CPU": 80.0, "decode CPU": 40.0}
    assert Prices(gpu=3.0, decode_cpu=0.05).cost(hours) == pytest.approx(32.0)
    assert Prices(gpu=3.0).cost(hours) == pytest.approx(30.0), "they decode on the nodes of the GPUs"
    assert Prices(train_cpu=1.0).cost(hours) is None
    assert Prices(train_cpu=1.0).cost({"CPU": 2.0, "decode CPU": 1.0}) is None
    assert resource_hours([], {}, {}) == {}


def test_a_price_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text("nodes: {cpu: {role: decode, cpus: 32, price: cheap}}")
    with pytest.raises(ConfigError, match=r"are numbers.*cheap"):
        read_prices(str(path))


def test_prices_are_the_dearest_node_of_each_kind(tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(
        "nodes:\n  gpu: {role: train, cpus: 96, gpus: 8, price: 40}\n  spot: {role: train, cpus: 96, gpus: 8, price: 16}\n"
        "  cpu: {role: decode, cpus: 32, price: 1.6}\n  free: {role: decode, cpus: 1}\n"
    )
    assert read_prices(str(path)) == Prices(gpu=5.0, train_cpu=None, decode_cpu=0.05)
    (tmp_path / "other.yaml").write_text("extends: values.yaml\nnodes: {gpu: {price: 48}}")
    assert read_prices(str(tmp_path / "other.yaml")).gpu == 6.0
    path.write_text("nodes: {a: {cpus: 2}}")
    with pytest.raises(ConfigError, match=r"no node of .* has a price"):
        read_prices(str(path))
    with pytest.raises(ConfigError, match="does not exist"):
        read_prices(str(tmp_path / "absent.yaml"))
    path.write_text("prices: 1")
    with pytest.raises(ConfigError, match="is no values file"):
        read_prices(str(path))


@pytest.fixture
def nobodys_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield


def test_the_command_prints_a_table_or_json(
    tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, nobodys_cluster: None
) -> None:
    monkeypatch.setenv("DEFI_HOME", str(tree))
    assert show_status([]) == 0
    assert "step 40/100" in capsys.readouterr().out
    assert show_status([str(tree / "gfdm"), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["failures"] == 1
    assert show_status([str(tree / "latents" / "shards")]) == 0
    assert "no runs in" in capsys.readouterr().out


def test_words_for_times() -> None:
    assert [duration(s) for s in (5, 119, 600, 7300, 90_000, 200_000)] == [
        "5 s", "119 s", "10 min", "2 h 01 min", "25 h 00 min", "2 d 7 h",
    ]  # fmt: skip
    assert silent_for(NOW - 10, NOW) == "" and silent_for(None) == ""


def test_folders_inside_others_are_searched_once() -> None:
    assert outermost(["/a/b", "/a", "/ab", "/a"]) == ["/a", "/ab"]
    assert common_folder(["/x/runs/a", "/x/runs/b/c"]) == "/x/runs"
    assert common_folder(["s3://one/a", "s3://two/a"]) == "" and common_folder([]) == ""


# --- the cluster


def node(alive: bool = True, role: str = "", **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Labels": {"defi.role": role} if role else {}, "Resources": resources}


def test_nodes_are_counted_by_role_and_dead_ones_too() -> None:
    nodes = [
        node(**{"node:__internal_head__": 1.0}),
        node(role="decode", CPU=8),
        node(role="decode", CPU=8),
        node(role="train", CPU=16, GPU=4),
        node(alive=False),
    ]
    assert nodes_line(nodes) == "1 head, 2 decode (16 CPU), 1 train (16 CPU, 4 GPU); 1 have left"


def test_jobs_that_run_come_first_and_old_ones_are_counted() -> None:
    ended = [Job(f"old{n}", "x", "SUCCEEDED", "", NOW - 90, NOW - n) for n in range(25)]
    running = Job("now", "python jobs/pretrain.py", "RUNNING", "", NOW - 60, None)
    failed = Job("bad", "x", "FAILED", "last logs:\nValueError: no such corpus\nsee the log", NOW - 30, NOW)
    lines = job_lines([*ended, running, failed], NOW)
    assert lines[0] == "now  running  60 s  python jobs/pretrain.py"
    assert "bad  failed  30 s  x: ValueError: no such corpus" in lines
    assert lines[-1] == "and 6 older ones" and len(lines) == 22


def test_a_run_without_anything_known_has_a_line_too() -> None:
    assert "ingest" in table([RunStatus(kind="ingest", folder="/a/b", state="complete")], None)


def test_the_values_for_clouds_have_prices(repository: Path) -> None:
    for name in ("aws", "gke"):  # the second extends the first
        prices = read_prices(str(repository / "cluster" / "values" / f"{name}.yaml"))
        assert prices.cost({"GPU": 1.0, "decode CPU": 1.0}), name
