"""Requirements of a job: refused in one line when no node can ever meet them, announced when they have to be waited for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import ray

from defi_platform import roles
from defi_platform.cluster.connection_errors import ClusterError, ClusterUnavailable
from defi_platform.roles import Role

ROUNDING = 1e-4
"""Ray counts resources in ten thousandths."""
LOOKS, LOOK_PAUSE_S = 3, 0.4


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Pieces of work that run at the same time, each on one node."""

    name: str
    """As in `gfdm: 2 workers`, the number in front of the noun left out: see `text`."""
    resources: Mapping[str, float]
    """Of one piece, by Ray's names."""
    count: int = 1
    role: Role | None = None
    """Of the nodes that they run on, where the cluster has such nodes."""
    fix: str = ""
    """Settings by which the job asks for less; a sentence."""

    def text(self) -> str:
        """The demand in words, as in `gfdm: workers: 2 x (1 GPU, 4 CPU)`."""
        return f"{self.name}: {self.count} x ({_amounts(self.resources)})"


@dataclass(frozen=True)
class NodeResources:
    """A living node."""

    role: str | None
    total: Mapping[str, float]
    free: Mapping[str, float]


@dataclass(frozen=True)
class Supply:
    """Resources of a cluster: its living nodes, and the most that an autoscaler makes of them."""

    nodes: Sequence[NodeResources]
    most: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Role -> resource -> how much there can ever be on nodes of the role; a role that is not here has no nodes of its
    own, and its work runs anywhere."""
    absent: str = ""
    """Words for nodes that may still come (back) by themselves; "" where none may."""

    def nodes_of(self, role: Role | None) -> list[NodeResources]:
        """The living nodes that work of a role can run on."""
        return [node for node in self.nodes if role not in self.most or node.role == role]

    def capacity(self, role: Role | None, resource: str) -> float:
        """The most of a resource that work of a role can ever get."""
        present = sum(node.total.get(resource, 0.0) for node in self.nodes_of(role))
        return max(present, self.most.get(role or "", {}).get(resource, 0.0))

    def grows(self, role: Role | None, resources: Iterable[str]) -> bool:
        """Whether nodes can still be added for work of a role that asks for these resources."""
        nodes = self.nodes_of(role)
        return any(
            self.capacity(role, resource) > sum(node.total.get(resource, 0.0) for node in nodes) + ROUNDING
            for resource in resources
        )


def connected_supply(demands: Sequence[Demand]) -> Supply:
    """The supply of the connected cluster, as far as demands ask for it."""
    free = ray._private.state.available_resources_per_node()
    nodes = [
        NodeResources(
            (node.get("Labels") or {}).get(roles.LABEL), node["Resources"], free.get(node["NodeID"], {})
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    left = sum(not node["Alive"] for node in ray.nodes())
    absent = f"{left} node(s) have left, and may come back" if left else ""
    if len(nodes) == 1 and not nodes[0].total.get("CPU"):
        absent = "there is a head alone, which no other node has joined yet"
    most: dict[str, dict[str, float]] = {}
    for demand in demands:
        if demand.role is not None and roles.label_selector(demand.role):
            capacities = most.setdefault(demand.role, {})
            capacities |= {resource: roles.capacity(demand.role, resource) for resource in demand.resources}
    return Supply(nodes, most, absent)


def check_demands(demands: Sequence[Demand], supply: Supply | None = None) -> Supply:
    """Checks that a cluster can ever meet demands, for which Ray would otherwise wait without end.

    Only what is certain is refused: how an autoscaler's nodes will be cut is not known before they run.

    Args:
        demands: all at the same time.
        supply: of the cluster; None: of the connected one.

    Returns: the supply.
    Raises: ClusterError naming what is asked for, what there is, and the fix.
    """
    supply = supply or connected_supply(demands)
    pools: dict[str | None, list[Demand]] = {}
    for demand in demands:
        pools.setdefault(demand.role if demand.role in supply.most else None, []).append(demand)
    for pool, members in pools.items():
        wanted: dict[str, float] = {}
        for demand in members:
            for resource, amount in demand.resources.items():
                wanted[resource] = wanted.get(resource, 0.0) + amount * demand.count
        for resource, amount in wanted.items():
            present = supply.capacity(members[0].role, resource)
            if amount > present + ROUNDING:
                askers = [demand for demand in members if demand.resources.get(resource)]
                raise _refusal(
                    supply,
                    pool,
                    f"the job asks for {amount:g} {resource} ({'; '.join(d.text() for d in askers)}), "
                    f"{_where(pool)} {_has(supply, members[0].role, resource, present)}. {_fixes(askers)}",
                )
    for demand in demands:
        if supply.grows(demand.role, demand.resources):
            continue
        fits = sum(_pieces(node.total, demand.resources) for node in supply.nodes_of(demand.role))
        if fits < demand.count:
            sizes = {_amounts({r: node.total.get(r, 0.0) for r in demand.resources}): None
                     for node in supply.nodes_of(demand.role)}  # fmt: skip
            raise _refusal(
                supply,
                demand.role if demand.role in supply.most else None,
                f"the job asks for {demand.text()}, each on one node, and the nodes have room for {fits} of them "
                f"(nodes of {' and of '.join(list(sizes)[:4])}). {_fixes([demand])}",
            )
    return supply


def waits_for(demands: Sequence[Demand], supply: Supply) -> str:
    """Says what a job has to wait for before it can start, nodes to be added or others to end; "" for nothing.

    Args:
        demands: all at the same time.
        supply: that can meet them at some time.
    """
    free = {id(node): dict(node.free) for node in supply.nodes}
    missing = []
    # The largest first, as the rest fits around them.
    for demand in sorted(demands, key=lambda one: -max(one.resources.values(), default=0.0)):
        left = demand.count
        nodes = supply.nodes_of(demand.role)
        for node in nodes:
            here = min(left, _pieces(free[id(node)], demand.resources))
            left -= here
            for resource, amount in demand.resources.items():
                free[id(node)][resource] = free[id(node)].get(resource, 0.0) - here * amount
        if left:
            reason = (
                f"{len(nodes)} node(s) of role {demand.role} run and more can be added"
                if demand.role in supply.most and supply.grows(demand.role, demand.resources)
                else "others use what there is"
            )
            missing.append(
                f"{demand.name}, {left} of {demand.count} x ({_amounts(demand.resources)}): {reason}"
            )
    return "; ".join(missing)


def announce(demands: Sequence[Demand]) -> None:
    """Checks demands against the connected cluster and prints what has to be waited for, if anything.

    Raises: ClusterError, see `check_demands`.
    """
    for _ in range(LOOKS):
        waiting = waits_for(demands, check_demands(demands))
        if not waiting:
            return
        # What a new node has, and what an ended job held, is known half a second later.
        time.sleep(LOOK_PAUSE_S)
    print(f"waiting for the cluster: {waiting}", flush=True)


def _refusal(supply: Supply, pool: str | None, text: str) -> ClusterError:
    """The error of a demand that cannot be met now; it is worth another try while nodes may still come."""
    if pool is None and supply.absent:
        return ClusterUnavailable(f"{text} Now {supply.absent}.")
    return ClusterError(text)


def _pieces(present: Mapping[str, float], piece: Mapping[str, float]) -> int:
    """Number of pieces that a node has room for."""
    counts = [
        int((present.get(resource, 0.0) + ROUNDING) / amount) for resource, amount in piece.items() if amount
    ]
    return min(counts, default=1 << 30)


def _amounts(resources: Mapping[str, float]) -> str:
    return (
        ", ".join(f"{amount:g} {resource}" for resource, amount in resources.items() if amount) or "nothing"
    )


def _where(pool: str | None) -> str:
    return "the cluster" if pool is None else f"nodes of role {pool}"


def _has(supply: Supply, role: Role | None, resource: str, present: float) -> str:
    has = "has" if role not in supply.most else "have"
    if role in supply.most and present:
        return f"{has} {present:g} at most, with all that its autoscaler may add"
    if not present:
        return f"{has} 0, and its autoscaler has no nodes with any" if supply.most else f"{has} 0"
    return f"{has} {present:g}"


def _fixes(demands: Sequence[Demand]) -> str:
    fixes = list(dict.fromkeys(demand.fix for demand in demands if demand.fix))
    add = "Or add nodes" if fixes else "Add nodes"
    return " ".join([*fixes, f"{add} (on an autoscaling cluster: a larger group of them)."])
