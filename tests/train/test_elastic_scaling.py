"""Numbers of workers that fit beside others, with amounts in place of Ray's nodes."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ScalingConfig

from defi_platform import roles
from defi_platform.train.driver import elastic_scaling
from defi_platform.train.driver.elastic_scaling import FittingPolicy

Nodes = Mapping[str, float]
"""CPUs by node."""


class Cluster:
    """What Ray has set aside for the run, and what is free."""

    def __init__(self, policy: FittingPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.policy = policy
        self.reserved: Nodes = {}
        self.free: Nodes = {}
        state = SimpleNamespace(available_resources_per_node=lambda: self._amounts(self.free))
        monkeypatch.setattr(elastic_scaling, "ray", SimpleNamespace(_private=SimpleNamespace(state=state)))
        monkeypatch.setattr(roles, "node_ids", lambda _: None)
        monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
        monkeypatch.setattr(policy, "_get_reserved_resources", lambda: self._amounts(self.reserved))

    def _amounts(self, nodes: Nodes) -> dict[str, dict[str, float]]:
        return {node: {"CPU": amount} for node, amount in nodes.items()}

    def start(self) -> int | None:
        decision = self.policy.make_decision_for_non_running_worker_group()
        return getattr(decision, "num_workers", None)

    def resize(self, *nodes: str) -> int | None:
        """Another number of workers than those on the nodes."""
        workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=node)) for node in nodes]
        state: Any = SimpleNamespace(workers=workers, num_workers=len(workers), start_time=float("-inf"))
        self.policy._latest_monitor_time = float("-inf")
        decision = self.policy.make_decision_for_running_worker_group(state, None)
        return getattr(decision, "num_workers", None)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    scaling = ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 1})
    return Cluster(FittingPolicy("gfdm", scaling, [1, 2, 4]), monkeypatch)


def test_a_start_that_found_no_room_is_followed_by_one_that_fits(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Serve replica holds a CPU, of which Ray's count knows nothing."""
    cluster.reserved, cluster.free = {"head": 4.0}, {"head": 3.0}
    assert cluster.start() == 4, "what the lost workers held may come back yet"
    assert cluster.start() == 2
    assert "gfdm: starts with 2 of 4 workers: others use the rest" in capsys.readouterr().out
    cluster.free = {"head": 0.0}
    assert cluster.start() is None, "it waits"
    cluster.free = {"head": 4.0}
    assert cluster.start() == 4


def test_a_running_group_grows_by_what_is_free_wherever_that_is(cluster: Cluster) -> None:
    cluster.reserved, cluster.free = {"head": 4.0}, {"head": 0.95}
    assert cluster.resize("head", "head") is None
    cluster.free = {"head": 1.0, "new": 1.0}
    assert cluster.resize("head", "head") == 4
    cluster.free = {"head": 0.0, "new": 0.0}
    assert cluster.resize("head", "head", "new", "new") is None, "it holds what it has"
    cluster.free = {"head": 1.9999}
    assert cluster.resize("head", "head") == 4
    cluster.reserved = {"head": 4.0, "new": 4.0}
    cluster.free = {"head": 0.0, "new": 3.0}
    assert cluster.resize("head", "head") == 4, "never more than is asked for"


def test_the_first_start_after_a_running_group_goes_by_rays_count(cluster: Cluster) -> None:
    cluster.reserved, cluster.free = {"head": 4.0}, {"head": 2.0}
    assert [cluster.start(), cluster.start()] == [4, 2]
    cluster.resize("head", "head")
    assert cluster.start() == 4
