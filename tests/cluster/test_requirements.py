"""Requirements of a job: what no cluster of this kind can ever meet is refused, what it will meet is waited for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from defi_platform.cluster import ClusterError, ClusterUnavailable
from defi_platform.cluster.requirements import Demand, NodeResources, Supply, check_demands, waits_for
from defi_platform.errors import MEND

WORKERS = Demand(
    name="gfdm: workers",
    resources={"GPU": 1.0, "CPU": 4.0},
    count=4,
    role="train",
    fix="Set train.num_workers lower.",
)


def node(role: str | None = None, free: float = 1.0, **total: float) -> NodeResources:
    return NodeResources(role, total, {name: amount * free for name, amount in total.items()})


def test_gpus_on_an_autoscaling_cluster_without_a_group_of_them_are_refused_in_one_line() -> None:
    supply = Supply([node(CPU=0)], {"train": {"CPU": 64.0, "GPU": 0.0}})
    with pytest.raises(ClusterError) as refused:
        check_demands([WORKERS], supply)
    text = str(refused.value)
    assert "\n" not in text
    for part in (
        "4 GPU",
        "gfdm: workers: 4 x (1 GPU, 4 CPU)",
        "role train",
        "have 0",
        "Set train.num_workers lower",
    ):
        assert part in text


def test_more_than_the_autoscaler_may_add_is_refused_with_its_maximum() -> None:
    supply = Supply([node("train", GPU=1, CPU=8)], {"train": {"CPU": 24.0, "GPU": 3.0}})
    with pytest.raises(
        ClusterError, match=r"asks for 4 GPU .* have 3 at most, with all that its autoscaler may add"
    ):
        check_demands([WORKERS], supply)


def test_what_the_autoscaler_will_add_is_waited_for_and_said() -> None:
    supply = Supply([node("train", GPU=1, CPU=8)], {"train": {"CPU": 32.0, "GPU": 4.0}})
    check_demands([WORKERS], supply)
    waiting = waits_for([WORKERS], supply)
    assert (
        waiting == "gfdm: workers, 3 of 4 x (1 GPU, 4 CPU): 1 node(s) of role train run and more can be added"
    )


def test_what_others_use_is_waited_for_and_said() -> None:
    supply = Supply([node(free=0.25, GPU=4, CPU=16)])
    check_demands([WORKERS], supply)
    assert waits_for([WORKERS], supply) == "gfdm: workers, 3 of 4 x (1 GPU, 4 CPU): others use what there is"


def test_a_piece_that_fits_on_no_node_is_refused_although_the_cluster_has_enough_in_all() -> None:
    large = Demand(name="policy: workers", resources={"GPU": 8.0})
    with pytest.raises(
        ClusterError, match=r"each on one node, and the nodes have room for 0 .*nodes of 4 GPU"
    ):
        check_demands([large], Supply([node(GPU=4), node(GPU=4)]))


def test_demands_of_all_runs_together_count() -> None:
    supply = Supply([node(CPU=4)])
    one = Demand(name="a", resources={"CPU": 3.0})
    check_demands([one], supply)
    with pytest.raises(
        ClusterError, match=r"6 CPU \(a: 1 x \(3 CPU\); b: 1 x \(3 CPU\)\), the cluster has 4"
    ):
        check_demands([one, Demand(name="b", resources={"CPU": 3.0})], supply)


def test_nodes_of_another_role_do_not_count() -> None:
    supply = Supply([node("decode", CPU=64), node("train", CPU=2)], {"train": {"CPU": 2.0}})
    with pytest.raises(ClusterError, match="nodes of role train have 2"):
        check_demands([Demand(name="a", resources={"CPU": 3.0}, role="train")], supply)


NODES = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), max_size=4)
PIECES = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=3)


def _fits(nodes: list[list[int]], pieces: list[tuple[int, int]]) -> bool:
    if not pieces:
        return True
    (cpus, gpus), *rest = pieces
    for one in nodes:
        if one[0] >= cpus and one[1] >= gpus:
            one[0], one[1] = one[0] - cpus, one[1] - gpus
            if _fits(nodes, rest):
                return True
            one[0], one[1] = one[0] + cpus, one[1] + gpus
    return False


@given(NODES, PIECES)
def test_nothing_is_refused_that_fits_in_some_way(
    sizes: list[tuple[int, int]], wanted: list[tuple[int, int, int]]
) -> None:
    pieces = [(cpus, gpus) for cpus, gpus, count in wanted for _ in range(count)]
    demands = [
        Demand(name=f"d{n}", resources={"CPU": cpus, "GPU": gpus}, count=count)
        for n, (cpus, gpus, count) in enumerate(wanted)
    ]
    supply = Supply([node(CPU=cpus, GPU=gpus) for cpus, gpus in sizes])
    if _fits([list(size) for size in sizes], pieces):
        check_demands(demands, supply)


def test_a_cluster_without_an_autoscaler_whose_nodes_may_come_back_is_worth_another_try() -> None:
    demand = Demand(name="a", resources={"CPU": 3.0}, role="train")
    short = Supply([node(CPU=2)], absent="1 node(s) have left, and may come back")
    with pytest.raises(ClusterUnavailable, match="may come back"):
        check_demands([demand], short)
    known = Supply([node("train", CPU=2)], {"train": {"CPU": 2.0}}, short.absent)
    with pytest.raises(ClusterError) as refused:
        check_demands([demand], known)
    assert refused.value.exit_code == MEND
