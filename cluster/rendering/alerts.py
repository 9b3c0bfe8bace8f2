"""Alerts: what somebody should look at, as rules of Prometheus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from defi_platform.metrics import catalogue
from rendering.panels import waiting_for_data


@dataclass(frozen=True)
class Alert:
    """A condition that lasts, and what to do then."""

    name: str
    expression: str
    lasts: str
    """For so long before anybody is called."""
    severity: str
    """warning: some time today; critical: now."""
    summary: str
    """What has happened and what helps; {{ $labels.NAME }} stands for a label."""


def _increase(series: str, minutes: int, labels: str, more_than: int = 0) -> str:
    # A count begins with its first event, in which `increase` sees none: there the count itself is what has happened.
    begun = f"({series} unless {series} offset {minutes}m)"
    return f"sum by ({labels}) ({begun} or increase({series}[{minutes}m])) > {more_than}"


_STEP = catalogue.TRAIN_STEP.series
_EVENTS = catalogue.TRAIN_EVENTS.series
_REFUSED, _ANSWERED = catalogue.SERVE_REFUSALS.series, catalogue.SERVE_ANSWERS.series
_SKIPPED, _SAMPLES = catalogue.DATA_SKIPPED_VIDEOS.series, catalogue.DATA_SAMPLES.series

ALERTS = (
    Alert(
        "DefiTrainingStandsStill",
        # Not of a run that began meanwhile: its first update may take a while.
        f"max by (run) (changes({_STEP}[30m])) == 0 and on (run) {_STEP} offset 30m",
        "5m",
        "critical",
        "{{ $labels.run }} has made no update for half an hour. `jobs/status.py` shows its phase; the logs of its "
        "workers say what they wait for.",
    ),
    Alert(
        "DefiTrainingWaitsForData",
        f"{waiting_for_data(selected=False)} > 0.5",
        "15m",
        "warning",
        "{{ $labels.run }} waits for data more than half of its time: raise data.decode.processes, add decode nodes, "
        "or fill a latent cache.",
    ),
    Alert(
        "DefiUpdatesSkipped",
        _increase(f'{_EVENTS}{{event=~"skipped|diverged"}}', 10, "run"),
        "0m",
        "warning",
        "{{ $labels.run }} has left out updates whose gradient was not finite; its metrics.jsonl names the samples.",
    ),
    Alert(
        "DefiCheckpointsLeftOut",
        _increase(f'{_EVENTS}{{event="checkpoint_left_out"}}', 30, "run"),
        "0m",
        "warning",
        "{{ $labels.run }} could not write a checkpoint that was due: the store is slow, or the local disk full.",
    ),
    Alert(
        "DefiStoreDoesNotAnswer",
        f"sum by (user) (rate({catalogue.STORAGE_RETRIES.series}[5m])) > 0",
        "5m",
        "critical",
        "Requests of {{ $labels.user }} to its store or disk fail and are made again; after storage_patience_s the "
        "run stops at its last checkpoint.",
    ),
    Alert(
        "DefiManyBadVideos",
        f"sum by (run, corpus) (rate({_SKIPPED}[10m])) / sum by (run, corpus) (rate({_SAMPLES}[10m])) > 0.05",
        "10m",
        "warning",
        "More than one sample in twenty of {{ $labels.corpus }} stands in for a bad video: see the quarantine table.",
    ),
    Alert(
        "DefiPolicyOverloaded",
        f'sum by (policy_digest) (rate({_REFUSED}{{reason=~"busy|deadline"}}[5m])) '
        f"/ sum by (policy_digest) (rate({_ANSWERED}[5m])) > 0.05",
        "5m",
        "critical",
        "The policy refuses more than one observation in twenty for want of time: raise replicas.max, or the nodes "
        "that the autoscaler may add.",
    ),
    Alert(
        "DefiSimulatorsDie",
        _increase(catalogue.EVALUATE_REPEATED.series, 15, "", more_than=3),
        "0m",
        "warning",
        "Simulators die and their episodes are begun again: look at the memory of their nodes.",
    ),
    Alert(
        "DefiNodesDoNotCome",
        "sum by (NodeType) (autoscaler_pending_nodes) > 0",
        "20m",
        "warning",
        "Nodes of type {{ $labels.NodeType }} have been asked for and do not start: quota, capacity, or an image "
        "that cannot be pulled.",
    ),
    Alert(
        "DefiMetricsMissing",
        'up{job=~"(.+/defi-)?ray"} == 0',
        "5m",
        "warning",
        "{{ $labels.instance }} does not give its metrics; is the node gone?",
    ),
)


def rule_groups() -> list[dict[str, Any]]:
    """The alerts as `groups` of a rules file."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.expression,
            "for": alert.lasts,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary},
        }
        for alert in ALERTS
    ]
    return [{"name": "defi", "rules": rules}]
