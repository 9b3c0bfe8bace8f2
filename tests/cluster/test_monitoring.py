"""The dashboard and Prometheus's configuration: made from the catalogue, and read by a real Prometheus off a real Ray."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "cluster"))

from rendering.alerts import ALERTS  # noqa: E402
from rendering.monitoring import DISCOVERY_FILE, grafana, prometheus, table  # noqa: E402
from rendering.panels import CLUSTER, panels  # noqa: E402

from defi_platform.metrics.catalogue import CATALOGUE, PARTS  # noqa: E402
from defi_platform.metrics.metric import Counter, Gauge, Histogram  # noqa: E402

needs_prometheus = pytest.mark.skipif(
    not shutil.which("promtool"), reason="needs Debian's package prometheus, which is not installed"
)


# --------------------------------------------------------------------------- what is made


@pytest.mark.parametrize(("folder", "made"), [("grafana", grafana), ("prometheus", prometheus)])
def test_the_files_in_the_repository_are_those_of_the_catalogue(
    folder: str, made: Callable[[], dict[str, str]]
) -> None:
    present = {file.name: file.read_text() for file in (REPOSITORY / "cluster" / folder).iterdir()}
    assert present == made(), f"run: python cluster/render.py {folder} output=cluster/{folder}"


def test_the_table_of_the_docs_is_that_of_the_catalogue() -> None:
    assert table() in (REPOSITORY / "docs" / "monitoring.md").read_text(), (
        "run: python cluster/render.py table"
    )


def test_every_metric_is_in_a_panel_of_its_part_and_every_row_has_panels() -> None:
    shown = {panel.row: "" for panel in panels()}
    for panel in panels():
        shown[panel.row] += " ".join(query.expression for query in panel.queries)
    assert list(shown) == [*PARTS.values(), CLUSTER]
    assert [metric.name for metric in CATALOGUE if metric.series not in shown[PARTS[metric.part]]] == []


def test_panels_and_alerts_name_only_metrics_of_the_catalogue_or_of_ray_itself() -> None:
    from ray.dashboard.modules.metrics.dashboards import default_dashboard_panels

    rays_own = inspect.getsource(default_dashboard_panels)
    ours = {metric.series + end for metric in CATALOGUE for end in ("", "_bucket", "_count", "_sum")}
    expressions = [query.expression for panel in panels() for query in panel.queries]
    expressions += [alert.expression for alert in ALERTS]
    named = set(re.findall(r"\b(?:ray|autoscaler)_[a-z_]*[a-z](?=[{\[)])", " ".join(expressions)))
    assert len(named) > len(CATALOGUE)
    assert {name for name in named if name not in ours and name not in rays_own} == set()


def test_panels_lie_beside_each_other_and_differ_in_number() -> None:
    made = json.loads(grafana()["dashboard.json"])["panels"]
    assert [panel["id"] for panel in made] == list(range(1, len(made) + 1))
    places = [panel["gridPos"] for panel in made]
    cells = [
        (x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) == 23


def test_grafanas_own_library_reads_the_dashboard_and_nothing_gets_lost() -> None:
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    made = json.loads(grafana()["dashboard.json"])
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(made)))
    assert list(_absent(made, read, "dashboard")) == []


def _absent(written: Any, read: Any, path: str) -> Iterator[str]:
    """What is in the one and not, or otherwise, in the other, which may have more."""
    if isinstance(written, dict):
        for key, value in written.items():
            yield from _absent(value, read[key], f"{path}.{key}") if key in read else [f"{path}.{key}"]
    elif isinstance(written, list):
        for number, (one, other) in enumerate(zip(written, read, strict=True)):
            yield from _absent(one, other, f"{path}[{number}]")
    elif written != read:
        yield f"{path}: {written!r}, read as {read!r}"


def test_the_operators_objects_are_of_its_kinds_and_hold_the_same_alerts() -> None:
    monitor, rule = yaml.safe_load_all(prometheus()["kubernetes.yaml"])
    assert (monitor["kind"], rule["kind"]) == ("PodMonitor", "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(prometheus()["alerts.yml"])


# --------------------------------------------------------------------------- a real Prometheus


ALERT_TESTS = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 'ray_defi_train_step{{run="stuck"}}', values: '0+10x10 100x60'}}
      - {{series: 'ray_defi_train_step{{run="fine"}}', values: '0+10x70'}}
      - {{series: 'ray_defi_train_phase_seconds_total{{run="stuck", phase="data"}}', values: '0+40x70'}}
      - {{series: 'ray_defi_train_phase_seconds_total{{run="stuck", phase="forward"}}', values: '0+20x70'}}
      - {{series: 'ray_defi_train_phase_seconds_total{{run="stuck", phase="validation"}}', values: '0+90x70'}}
      - {{series: 'ray_defi_train_phase_seconds_total{{run="fine", phase="data"}}', values: '0+1x70'}}
      - {{series: 'ray_defi_train_phase_seconds_total{{run="fine", phase="forward"}}', values: '0+59x70'}}
      - {{series: 'ray_defi_serve_refusals_total{{policy_digest="d", reason="busy"}}', values: '0+1x70'}}
      - {{series: 'ray_defi_serve_answers_total{{policy_digest="d"}}', values: '0+9x70'}}
      - {{series: 'autoscaler_pending_nodes{{NodeType="train"}}', values: '1x70'}}
      - {{series: 'ray_defi_train_step{{run="begins"}}', values: '_x50 0x20'}}
      - {{series: 'ray_defi_train_events_total{{run="stuck", event="skipped"}}', values: '_x55 1x15'}}
      - {{series: 'ray_defi_train_events_total{{run="fine", event="skipped"}}', values: '1x70'}}
      - {{series: 'ray_defi_evaluate_repeated_episodes_total', values: '_x50 4x20'}}
    alert_rule_test:
      - {{eval_time: 60m, alertname: DefiTrainingStandsStill, exp_alerts: [{stuck}]}}
      - {{eval_time: 60m, alertname: DefiTrainingWaitsForData, exp_alerts: [{waits}]}}
      - {{eval_time: 60m, alertname: DefiPolicyOverloaded, exp_alerts: [{overloaded}]}}
      - {{eval_time: 60m, alertname: DefiNodesDoNotCome, exp_alerts: [{pending}]}}
      - {{eval_time: 60m, alertname: DefiStoreDoesNotAnswer, exp_alerts: []}}
      - {{eval_time: 30m, alertname: DefiTrainingStandsStill, exp_alerts: []}}
      - {{eval_time: 58m, alertname: DefiUpdatesSkipped, exp_alerts: [{skipped}]}}
      - {{eval_time: 70m, alertname: DefiUpdatesSkipped, exp_alerts: []}}
      - {{eval_time: 58m, alertname: DefiSimulatorsDie, exp_alerts: [{die}]}}
      - {{eval_time: 70m, alertname: DefiSimulatorsDie, exp_alerts: []}}
"""


@needs_prometheus
def test_alerts_fire_for_what_they_name_and_for_nothing_else(tmp_path: Path) -> None:
    for name, text in prometheus().items():
        (tmp_path / name).write_text(text)
    subprocess.run(
        ["promtool", "check", "config", "prometheus.yml"], cwd=tmp_path, check=True, capture_output=True
    )

    def expected(name: str, **labels: str) -> str:
        alert = next(alert for alert in ALERTS if alert.name == name)
        summary = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda match: labels[match[1]], alert.summary)
        wanted = {
            "exp_labels": {"severity": alert.severity, **labels},
            "exp_annotations": {"summary": summary},
        }
        return json.dumps(wanted)

    cases = ALERT_TESTS.format(
        rules="alerts.yml",
        stuck=expected("DefiTrainingStandsStill", run="stuck"),
        waits=expected("DefiTrainingWaitsForData", run="stuck"),
        overloaded=expected("DefiPolicyOverloaded", policy_digest="d"),
        skipped=expected("DefiUpdatesSkipped", run="stuck"),
        die=expected("DefiSimulatorsDie"),
        pending=expected("DefiNodesDoNotCome", NodeType="train"),
    )
    (tmp_path / "cases.yml").write_text(cases)
    done = subprocess.run(
        ["promtool", "test", "rules", "cases.yml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def metrics_address(ray_cluster: None) -> str:
    """Where this Ray gives its metrics, after this process has emitted a value of each."""
    import ray

    for metric in CATALOGUE:
        labels = {label: {"phase": "data", "outcome": "success"}.get(label, "x") for label in metric.labels}
        if isinstance(metric, Counter):
            metric.add(3, **labels)
        elif isinstance(metric, Gauge):
            metric.set(2, **labels)
        elif isinstance(metric, Histogram):
            metric.observe(metric.buckets[3], **labels)
    node = ray.nodes()[0]
    address = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    deadline = time.monotonic() + 240
    # Processes report every ten seconds.
    while not all(f"\n{m.series}" in _get(f"http://{address}/metrics") for m in CATALOGUE):
        assert time.monotonic() < deadline, "a metric does not reach Ray's endpoint"
        time.sleep(0.5)
    return address


@needs_prometheus
@pytest.mark.slow
def test_a_real_prometheus_reads_every_metric_and_answers_every_panel(
    metrics_address: str, tmp_path: Path
) -> None:
    targets = tmp_path / "targets.json"
    # As Ray writes it; the tests' Ray has no dashboard, which would.
    targets.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": [metrics_address]}]))
    for name, text in prometheus().items():
        quick = text.replace("15s", "1s").replace(DISCOVERY_FILE, str(targets))
        assert quick != text or name == "alerts.yml"
        (tmp_path / name).write_text(quick)
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    server = subprocess.Popen(
        [*command, f"--web.listen-address={address}"], cwd=tmp_path, stderr=(tmp_path / "log").open("w")
    )
    try:

        def ask(expression: str) -> list[Any]:
            query = re.sub(r"\$__\w+", "1m", expression).replace("$cluster", ".*").replace("$run", ".*")
            answer = json.loads(
                _get(f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
            )
            assert answer["status"] == "success"
            return list(answer["data"]["result"])

        deadline = time.monotonic() + 240
        # Rates need two scrapes.
        while not _answers(lambda: ask(f"count_over_time({CATALOGUE[0].series}[1m]) >= 2")):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        every = {panel.title: [ask(query.expression) for query in panel.queries] for panel in panels()}
        ours = {panel.title for panel in panels() if panel.row != CLUSTER}
        assert [title for title in ours if not all(every[title])] == []
        assert every["Object store"][0]
        assert every["Success rate so far"][0][0]["value"][1] == "1"
        assert every["Share of the time that waits for data"][0]
        rules = json.loads(_get(f"http://{address}/api/v1/rules"))["data"]["groups"][0]["rules"]
        assert [rule["name"] for rule in rules] == [alert.name for alert in ALERTS]
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
    finally:
        server.terminate()
        server.wait(240)


def _answers(question: Callable[[], list[Any]]) -> bool:
    try:
        return bool(question())
    except OSError:
        return False


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())
