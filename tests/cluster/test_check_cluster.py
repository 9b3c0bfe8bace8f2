"""The checks of a cluster and the state of its runs, on a real one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ray

from defi_platform.cluster import ClusterError
from defi_platform.cluster.requirements import announce
from defi_platform.cluster.run_registry import register_run, registered_runs
from defi_platform.config import TrainConfig
from defi_platform.preflight.all_reduce import Rank
from defi_platform.preflight.command import check_cluster
from defi_platform.status.command import show_status
from defi_platform.train.config_checks import training_demands


def test_all_checks_run_on_every_node_and_leave_nothing(
    ray_cluster: None, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("DEFI_HOME", str(tmp_path))
    config = repository / "configs" / "demo" / "pretrain.yaml"
    code = check_cluster(["--config", str(config), "--mib", "1", "gidm.train.use_gpu=true"])
    lines = [re.split(r"\s+", line, maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    found = {(level, check): text for level, check, text in lines}
    assert code == 1
    assert "1 GPU (gidm: workers: 1 x (1 CPU, 1 GPU)), the cluster has 0" in found["FAIL", "resources"]
    assert {check for _, check in found} >= {
        "resources", "versions", "token", "memory", "disk", "files", "decoders", "gpus", "clock", "storage", "ports",
        "network",
    }  # fmt: skip
    assert (
        f"Ray {ray.__version__}" in found["ok", "versions"]
        and "1 node and this client" in found["ok", "versions"]
    )
    assert list(tmp_path.iterdir()) == [], "the test files are gone"


def test_an_all_reduce_between_processes_is_measured(ray_cluster: None) -> None:
    actor = ray.remote(num_cpus=0)(Rank)
    ranks = [actor.remote(rank, 2, "gloo") for rank in range(2)]
    address = ray.get(ranks[0].address.remote())
    results = ray.get([rank.measure.remote(address, 1) for rank in ranks])
    for rank in ranks:
        ray.kill(rank)
    assert all(result.gb_s > 0 and not result.error for result in results)


def test_a_training_on_gpus_is_refused_by_a_cluster_that_never_has_one(ray_cluster: None) -> None:
    with pytest.raises(ClusterError, match=r"1 GPU .* the cluster has 0"):
        announce(training_demands({"gfdm": TrainConfig(output="a", use_gpu=True)}, {"gfdm": 1}))


def test_what_others_hold_is_waited_for(ray_cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    @ray.remote(num_cpus=4)
    class Holder:
        def ready(self) -> None:
            pass

    holder = Holder.remote()
    ray.get(holder.ready.remote())
    announce(training_demands({"gfdm": TrainConfig(output="a")}, {"gfdm": 1}))
    ray.kill(holder)
    assert (
        "waiting for the cluster: gfdm: workers, 1 of 1 x (1 CPU): others use what there is"
        in capsys.readouterr().out
    )


def test_runs_that_a_cluster_has_begun_are_shown_wherever_they_lie(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "elsewhere" / "eval"
    (run / "episodes").mkdir(parents=True)
    (run / "episodes" / "policy_door_1.json").write_text("{}")
    monkeypatch.setenv("DEFI_HOME", str(tmp_path / "home"))
    register_run(str(run))
    assert str(run) in registered_runs()
    assert show_status(["--address", "auto"]) == 0
    shown = capsys.readouterr().out
    assert "nodes: 1 head (4 CPU)" in shown and "1 episodes" in shown
