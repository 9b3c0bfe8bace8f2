"""Roles of nodes, from what a cluster's nodes say of themselves. tests/cluster has a cluster whose work obeys them."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from defi_platform import roles


def node(name: str, labels: dict[str, str], alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": name, "Labels": labels, "Resources": resources, "Alive": alive}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The nodes of the connected cluster, to be filled by a test."""
    present: list[dict[str, Any]] = []
    monkeypatch.delenv(roles.VARIABLE, raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: present)
    return present


def test_without_labels_work_runs_anywhere_and_a_decoder_asks_for_a_share(
    nodes: list[dict[str, Any]],
) -> None:
    nodes += [node("a", {}, CPU=4), node("b", {}, CPU=2)]
    assert roles.options(roles.TRAIN) == {}
    assert roles.options(roles.DECODE, share=0.1) == {"num_cpus": 0.1}
    assert roles.capacity(roles.DECODE, "CPU") == 6
    assert roles.node_ids(roles.TRAIN) is None


def test_work_goes_to_the_nodes_of_its_role_by_whole_cpus(nodes: list[dict[str, Any]]) -> None:
    nodes += [node("head", {}), node("d", {"defi.role": "decode"}, CPU=4), node("t", {}, CPU=8)]
    assert roles.options(roles.DECODE, share=0.1) == {
        "num_cpus": 1.0,
        "label_selector": {"defi.role": "decode"},
    }
    assert roles.options(roles.TRAIN) == {}
    assert roles.capacity(roles.DECODE, "CPU") == 4
    assert roles.node_ids(roles.DECODE) == {"d"}


def test_nodes_that_an_autoscaler_is_to_add_are_known_from_the_head(nodes: list[dict[str, Any]]) -> None:
    nodes += [node("head", {"defi.max.train.GPU": "8", "defi.max.train.CPU": "16"})]
    assert roles.options(roles.TRAIN) == {"label_selector": {"defi.role": "train"}}
    assert roles.options(roles.DECODE) == {}
    assert roles.capacity(roles.TRAIN, "GPU") == 8
    assert roles.node_ids(roles.TRAIN) == frozenset()


def test_a_dead_node_has_no_role(nodes: list[dict[str, Any]]) -> None:
    nodes += [node("d", {"defi.role": "decode"}, alive=False, CPU=4), node("b", {}, CPU=2)]
    assert roles.label_selector(roles.DECODE) == {}
    assert roles.capacity(roles.DECODE, "CPU") == 2


def test_roles_can_be_switched_off(nodes: list[dict[str, Any]]) -> None:
    nodes += [node("d", {"defi.role": "decode"}, CPU=4), node("b", {}, CPU=2)]
    with roles.switched(False):
        assert roles.options(roles.DECODE, share=0.1) == {"num_cpus": 0.1}
        assert roles.capacity(roles.DECODE, "CPU") == 6
    assert roles.label_selector(roles.DECODE)


def test_a_maximum_that_is_no_number_is_an_error_that_names_it(nodes: list[dict[str, Any]]) -> None:
    nodes += [node("head", {"defi.max.train.GPU": "many"})]
    with pytest.raises(roles.RoleError, match=r"defi\.max\.train\.GPU=many"):
        roles.options(roles.TRAIN)


def test_work_has_no_role_where_no_cluster_is_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert roles.options(roles.TRAIN) == {}
