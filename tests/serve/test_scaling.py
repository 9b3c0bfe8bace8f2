"""How many replicas the load needs, what the live line says, and the digest that names a policy."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest

from defi_models.pretrained.digest import folder_digest
from defi_platform.config.serve import replica_range
from defi_platform.errors import ConfigError
from defi_platform.serve.deployment import autoscaling
from defi_platform.serve.deployment.autoscaling import ObservationScaling
from defi_platform.serve.deployment.command import live_line


def asked(
    in_flight: list[float], wait_ms: float = 0.0, running: int | None = None, target: int | None = None
) -> int:
    """What a policy of 8 in flight per replica and 100 ms answers."""
    running = len(in_flight) if running is None else running
    metrics = {"in_flight": dict(enumerate(in_flight)), "wait_ms": {0: wait_ms}} if in_flight else {}
    context = SimpleNamespace(
        aggregated_metrics=metrics, current_num_replicas=running, target_num_replicas=target or running
    )
    return ObservationScaling(8.0, 100.0)(context)[0]


def test_a_standing_fleet_needs_one_replica_and_a_busy_one_as_many_as_its_observations_fill() -> None:
    assert asked([0.0]) == 1
    assert asked([8.0]) == 1
    assert asked([30.0]) == 4
    assert asked([15.0, 17.0]) == 4


def test_a_long_wait_asks_for_one_more_but_not_while_one_is_starting() -> None:
    assert asked([4.0], wait_ms=250.0) == 2
    assert asked([4.0], wait_ms=250.0, running=1, target=2) == 2


def test_replicas_are_taken_away_only_where_fewer_are_enough_with_room_to_spare() -> None:
    assert asked([4.0, 3.9]) == 2  # one could hold them, barely
    assert asked([2.0, 2.0]) == 1
    assert asked([4.0, 3.9, 0.1, 0.0]) == 2


def test_without_a_target_replicas_are_as_many_as_keep_the_wait_short_and_none_comes_and_goes() -> None:
    # 16 clients in closed loop, a CPU that takes 50 ms for each observation, alone or not.
    one = autoscaling.capacity(2, 100.0, 50.0, max_wait_ms=100.0, most=64)
    assert one == 5.0

    def asked_of(replicas: int, wait_ms: float) -> int:
        metrics = {
            "in_flight": dict.fromkeys(range(replicas), 16.0 / replicas),
            "wait_ms": dict.fromkeys(range(replicas), wait_ms),
            "capacity": dict.fromkeys(range(replicas), one),
        }
        context = SimpleNamespace(
            aggregated_metrics=metrics, current_num_replicas=replicas, target_num_replicas=replicas
        )
        return ObservationScaling(None, 100.0)(context)[0]

    assert asked_of(1, 600.0) == 4
    assert asked_of(4, 50.0) == asked_of(5, 0.0) - 1 == 4


def test_the_capacity_of_a_device_that_gains_from_batches_is_a_full_one() -> None:
    assert autoscaling.capacity(64, 58.4, 0.6, max_wait_ms=100.0, most=64) == 64.0
    assert autoscaling.capacity(1, 1000.0, 980.0, max_wait_ms=100.0, most=64) == pytest.approx(2.1)
    # Nobody queues for a pass of 20, but in it 12 clients wait 330 ms for one another.
    assert autoscaling.capacity(20, 650.0, 30.0, max_wait_ms=100.0, most=64) == pytest.approx(8.67, abs=0.01)
    assert autoscaling.capacity(0, 0.0, 0.0, max_wait_ms=100.0, most=64) == 64.0


def test_without_reports_nothing_changes() -> None:
    assert asked([], running=3) == 3


def test_the_controller_needs_nothing_of_this_package() -> None:
    cloudpickle.register_pickle_by_value(autoscaling)
    try:
        sent = cloudpickle.dumps(ObservationScaling)
    finally:
        cloudpickle.unregister_pickle_by_value(autoscaling)
    assert b"defi_platform.errors" not in sent and b"defi_models" not in sent


@pytest.mark.parametrize(
    ("replicas", "range_"),
    [(1, (1, 1)), ("3", (3, 3)), ({"min": 1, "max": 4}, (1, 4)), ({"min": "2", "max": "4"}, (2, 4))],
)
def test_replicas_are_a_number_or_a_range(replicas: Any, range_: tuple[int, int]) -> None:
    assert replica_range(replicas) == range_


@pytest.mark.parametrize("replicas", [0, True, 1.5, "many", {"min": 3, "max": 2}, {"most": 2}, None])
def test_other_replicas_are_refused_in_words(replicas: Any) -> None:
    with pytest.raises(ConfigError, match=r"replicas is .*write a number from 1 on, or a range"):
        replica_range(replicas)


def test_the_live_line_sums_rates_and_shows_the_slowest_replica() -> None:
    def replica(rate: float, p99: float) -> dict[str, Any]:
        service = {"answers_per_s": rate, "total_ms": (20.0, p99), "batch_size": 4.0, "refusals": {"busy": 1}}
        return {"sockets": 3, "load": {"websockets": 2, "service": service}}

    states = [{"live": 2, "refused": 5, "replicas": [replica(30.0, 40.0), replica(10.0, 90.0)]}]
    assert live_line(states) == (
        "2 replica(s)  40.0 answers/s  p50 20 ms  p99 90 ms  batch 4.0  sessions 4  refused 7"
    )
    assert live_line([]).startswith("0 replica(s)  0.0 answers/s")


def test_a_digest_names_contents_and_not_the_place_or_the_card(policy_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(policy_folder, copy)
    digest = folder_digest(policy_folder)
    (copy / "README.md").write_text("another card")
    assert folder_digest(copy) == digest and len(digest) == 64
    config = copy / "config.json"
    config.write_text(config.read_text() + " ")
    assert folder_digest(copy) != digest
