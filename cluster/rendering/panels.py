"""Panels of the dashboard: one for each group of metrics in the catalogue, and those that set several in relation."""

from __future__ import annotations

from dataclasses import dataclass, field

from defi_platform.metrics import catalogue
from defi_platform.metrics.catalogue import CATALOGUE, PARTS
from defi_platform.metrics.metric import Counter, Gauge, Histogram, Metric

CLUSTER = "Cluster"
"""Row of the panels that show Ray's own metrics."""

RATE = "[$__rate_interval]"
"""Range of rates; Grafana puts in one that holds a few scrapes."""

UNITS = {"seconds": "s", "bytes": "bytes", "ratio": "percentunit"}
"""Unit of a metric -> Grafana's name of it; all others are plain numbers."""


@dataclass(frozen=True)
class Query:
    """One line of a panel, or several that differ by the labels in its legend."""

    expression: str
    legend: str


@dataclass
class Panel:
    """A panel of time series."""

    row: str
    title: str
    unit: str
    """Grafana's name of it."""
    description: str = ""
    queries: list[Query] = field(default_factory=list)


def panels() -> list[Panel]:
    """All panels, row by row."""
    found: dict[tuple[str, str], Panel] = {}
    for metric in CATALOGUE:
        row = PARTS[metric.part]
        panel = found.setdefault((row, metric.panel), Panel(row, metric.panel, _unit(metric)))
        panel.description = f"{panel.description} {metric.help}".strip()
        panel.queries += _queries(metric)
    every = [*found.values(), *_RELATIONS]
    rows = [*PARTS.values(), CLUSTER]
    return sorted(every, key=lambda panel: rows.index(panel.row))


def series(metric: Metric, ending: str = "", **labels: str) -> str:
    """The series of a metric on the dashboard's chosen clusters and runs.

    Args:
        metric: from the catalogue.
        ending: `_bucket` and such, of a histogram's parts.
        labels: further labels with the regular expressions that they must match.
    """
    chosen = {"ray_io_cluster": "$cluster"} | ({"run": "$run"} if "run" in metric.labels else {}) | labels
    selector = ", ".join(f'{label}=~"{values}"' for label, values in chosen.items())
    return f"{metric.series}{ending}{{{selector}}}"


def _unit(metric: Metric) -> str:
    if isinstance(metric, Counter):
        # Seconds per second: the share of the time.
        return "percentunit" if metric.unit == "seconds" else "cps"
    return UNITS.get(metric.unit, "short")


def _queries(metric: Metric) -> list[Query]:
    by, legend = ", ".join(metric.labels), " ".join(f"{{{{{label}}}}}" for label in metric.labels)
    what = metric.name.removeprefix(f"defi_{metric.part}_").removesuffix("_total").replace("_", " ")
    if isinstance(metric, Histogram):
        inner = f"sum by (le, {by}) (rate({series(metric, '_bucket')}{RATE}))"
        return [
            Query(f"histogram_quantile({quantile}, {inner})", f"{name} {legend}")
            for quantile, name in ((0.5, "median"), (0.99, "99 %"))
        ]
    if isinstance(metric, Gauge):
        return [Query(f"{metric.over} by ({by}) ({series(metric)})", f"{what} {legend}")]
    return [Query(f"sum by ({by}) (rate({series(metric)}{RATE}))", f"{what} {legend}".strip())]


def waiting_for_data(selected: bool = True) -> str:
    """The share of a run's time that it waits for data, validations left out.

    Args:
        selected: True: of the dashboard's chosen runs; False: of all, with a range of ten minutes.
    """
    seconds = catalogue.TRAIN_PHASE_SECONDS
    if selected:
        waiting, all_of_it = series(seconds, phase="data"), series(seconds, phase="[^v].*")
        return f"sum by (run) (rate({waiting}{RATE})) / sum by (run) (rate({all_of_it}{RATE}))"
    name = seconds.series
    return (
        f'sum by (run) (rate({name}{{phase="data"}}[10m])) '
        f'/ sum by (run) (rate({name}{{phase!="validation"}}[10m]))'
    )


def _ray(name: str, labels: str = "") -> str:
    return f'{name}{{ray_io_cluster=~"$cluster"{labels}}}'


_EPISODES = catalogue.EVALUATE_EPISODES

_RELATIONS = (
    Panel(
        PARTS["train"],
        "Share of the time that waits for data",
        "percentunit",
        "Time of rank 0 in phase data over all phases but validation. Above a few percent, more decoders help.",
        [Query(waiting_for_data(), "{{run}}")],
    ),
    Panel(
        PARTS["train"],
        "Steps that a lost node would cost",
        "short",
        "Updates since the newest checkpoint in the run folder.",
        [
            Query(
                f"max by (run, kind) ({series(catalogue.TRAIN_STEP)}) "
                f"- max by (run, kind) ({series(catalogue.TRAIN_CHECKPOINT_STEP)})",
                "{{run}} {{kind}}",
            )
        ],
    ),
    Panel(
        PARTS["evaluate"],
        "Success rate so far",
        "percentunit",
        "Successful episodes of all that have finished since the evaluation was started.",
        [
            Query(
                f"sum by (run, arm) ({series(_EPISODES, outcome='success')}) "
                f"/ sum by (run, arm) ({series(_EPISODES)})",
                "{{run}} {{arm}}",
            )
        ],
    ),
    Panel(
        CLUSTER,
        "Nodes",
        "short",
        "Ray's autoscaler: nodes that work, that are being started, and that failed lately.",
        [
            Query(f"sum by (NodeType) ({_ray('autoscaler_active_nodes')})", "active {{NodeType}}"),
            Query(f"sum by (NodeType) ({_ray('autoscaler_pending_nodes')})", "pending {{NodeType}}"),
            Query(f"sum by (NodeType) ({_ray('autoscaler_recently_failed_nodes')})", "failed {{NodeType}}"),
        ],
    ),
    Panel(
        CLUSTER,
        "CPU in use",
        "percent",
        "Of each machine.",
        [Query(f"max by (instance) ({_ray('ray_node_cpu_utilization')})", "{{instance}}")],
    ),
    Panel(
        CLUSTER,
        "GPU in use",
        "percent",
        "Of each GPU.",
        [
            Query(
                f"max by (instance, GpuIndex) ({_ray('ray_node_gpus_utilization')})",
                "{{instance}} GPU {{GpuIndex}}",
            )
        ],
    ),
    Panel(
        CLUSTER,
        "Memory in use",
        "percentunit",
        "Of each machine, shared memory included. Ray kills workers near 95 %.",
        [
            Query(
                f"max by (instance) ({_ray('ray_node_mem_used')}) / max by (instance) ({_ray('ray_node_mem_total')})",
                "{{instance}}",
            )
        ],
    ),
    Panel(
        CLUSTER,
        "Object store",
        "bytes",
        "Decoded samples on their way, by node and place; those in SPILLED went to disk for want of memory.",
        [
            Query(
                f"sum by (instance, Location) ({_ray('ray_object_store_memory')})",
                "{{instance}} {{Location}}",
            )
        ],
    ),
    Panel(
        CLUSTER,
        "Workers killed for memory",
        "cps",
        "Tasks and actors that Ray ended because a machine ran out of memory.",
        [
            Query(
                f"sum by (instance, Name) (rate({_ray('ray_memory_manager_worker_eviction_total')}{RATE}))",
                "{{instance}} {{Name}}",
            )
        ],
    ),
)
