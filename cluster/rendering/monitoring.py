"""Monitoring of a cluster: Grafana's dashboard and the configuration of Prometheus, from the catalogue of metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import yaml

from defi_platform.metrics.catalogue import CATALOGUE, TRAIN_STEP
from defi_platform.metrics.metric import Metric
from rendering.alerts import rule_groups
from rendering.panels import Panel, panels

DISCOVERY_FILE = "/tmp/ray/prom_metrics_service_discovery.json"
"""Written by the head node: the addresses at which its nodes, its autoscaler and its dashboard give their metrics."""

POD_PORTS = ("metrics", "as-metrics", "dash-metrics")
"""Names of the metrics' ports of a Ray pod: of its node, and on the head of the autoscaler and the dashboard."""

SCRAPE_EVERY = "15s"
"""Ray's processes report every ten seconds."""

GENERATED = "Made by cluster/render.py from the catalogue of metrics; do not edit."

_COLUMNS, _PANEL_WIDTH, _PANEL_HEIGHT = 24, 8, 8
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def grafana() -> dict[str, str]:
    """File name -> text: the dashboard, to be imported in Grafana (Dashboards, New, Import)."""
    dashboard = {
        "uid": "defi-platform",
        "title": "DeFI platform",
        "description": f"Data, training, serving and evaluation on Ray. {GENERATED}",
        "tags": ["ray", "defi"],
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "schemaVersion": 39,
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": list(_variables())},
        "panels": list(_placed(panels())),
    }
    return {"dashboard.json": json.dumps(dashboard, indent=1) + "\n"}


def prometheus() -> dict[str, str]:
    """File name -> text: what Prometheus scrapes, and its alerts."""
    return {
        "prometheus.yml": _yaml(
            {
                "global": {"scrape_interval": SCRAPE_EVERY, "evaluation_interval": SCRAPE_EVERY},
                "rule_files": ["alerts.yml"],
                "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [DISCOVERY_FILE]}]}],
            },
            "For a Prometheus on the machine of the head node; loopback only: --web.listen-address=127.0.0.1:9090",
        ),
        "alerts.yml": _yaml({"groups": rule_groups()}),
        "kubernetes.yaml": _yaml(_pod_monitor(), "For the Prometheus operator (monitoring.coreos.com)")
        + "---\n"
        + yaml.safe_dump(_prometheus_rule(), sort_keys=False, width=110),
    }


def table() -> str:
    """All metrics as a Markdown table, for docs/monitoring.md."""
    lines = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for metric in CATALOGUE:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.series}` | {_kind(metric)} | {labels} | {metric.help} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------- Grafana


def _variables() -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    for name, label, query in (
        # KubeRay labels its pods; elsewhere the label is absent, which the regular expression .* also matches.
        ("cluster", "Cluster", "label_values(up, ray_io_cluster)"),
        ("run", "Run", f"label_values({TRAIN_STEP.series}, run)"),
    ):
        yield {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": _DATASOURCE,
            "query": {"query": query, "refId": name},
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        }


def _placed(every: list[Panel]) -> Iterator[dict[str, Any]]:
    """Panels of a row beside and below each other, each row with its header."""
    number, top = 0, 0
    for row, members in groupby(every, key=lambda panel: panel.row):
        number += 1
        header = {"h": 1, "w": _COLUMNS, "x": 0, "y": top}
        yield {"id": number, "type": "row", "title": row, "collapsed": False, "gridPos": header, "panels": []}
        top, left = top + 1, 0
        for panel in members:
            if left + _PANEL_WIDTH > _COLUMNS:
                top, left = top + _PANEL_HEIGHT, 0
            number += 1
            place = {"h": _PANEL_HEIGHT, "w": _PANEL_WIDTH, "x": left, "y": top}
            yield _time_series(panel, number, place)
            left += _PANEL_WIDTH
        top += _PANEL_HEIGHT


def _time_series(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": _DATASOURCE,
            "expr": query.expression,
            "legendFormat": query.legend,
        }
        for index, query in enumerate(panel.queries)
    ]
    defaults = {
        "unit": panel.unit,
        "min": 0,
        "custom": {"lineWidth": 1, "fillOpacity": 5, "showPoints": "never"},
    }
    if panel.title == "Loss":
        del defaults["min"]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": targets,
    }


# --------------------------------------------------------------------------- Prometheus


def _pod_monitor() -> dict[str, Any]:
    # KubeRay's own label of its pods.
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "defi-ray", "labels": {"app.kubernetes.io/part-of": "defi"}},
        "spec": {
            "podTargetLabels": ["ray.io/cluster", "ray.io/group", "ray.io/node-type"],
            "selector": {"matchExpressions": [{"key": "ray.io/cluster", "operator": "Exists"}]},
            "podMetricsEndpoints": [{"port": port, "interval": SCRAPE_EVERY} for port in POD_PORTS],
        },
    }


def _prometheus_rule() -> dict[str, Any]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "defi", "labels": {"app.kubernetes.io/part-of": "defi"}},
        "spec": {"groups": rule_groups()},
    }


def _yaml(content: dict[str, Any], note: str = "") -> str:
    lines = [f"# {line}\n" for line in (GENERATED, note) if line]
    return "".join(lines) + yaml.safe_dump(content, sort_keys=False, width=110)


def _kind(metric: Metric) -> str:
    return type(metric).__name__.lower()
