"""Settings of the forward pass and its queue, and the metrics that come out of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import msgpack
import pytest

from defi_platform.config import ServeConfig
from defi_platform.config.loader import from_mapping
from defi_platform.errors import ConfigError
from defi_platform.serve.inference import metrics
from defi_platform.serve.inference.checks import check_inference
from defi_platform.serve.inference.load import WINDOW_S, LoadMeter, ServiceLoad
from defi_platform.serve.inference.service import ServiceSettings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": {"dtype": "float16"}}, "model.dtype is 'float16'; it is one of float32, bfloat16"),
        ({"model": {"compile": "fast"}}, "model.compile is 'fast'; it is one of none, graphs, default"),
        ({"model": {"compile": "default", "deterministic": True}}, "do not go together"),
        ({"model": {"compile": "graphs"}}, "graphs replays CUDA graphs, but replica_gpus is 0"),
        ({"model": {"compile": "default", "package": "a.pt2"}}, "model.package is compiled already"),
        ({"model": {"prompt_cache": 0}}, "model.prompt_cache is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"limits": {"action_margin": -1.0}}, "limits.action_margin is -1.0; it must be 0 or more"),
        ({"limits": {"action_margin": float("nan")}}, "limits.action_margin is nan"),
        ({"scaling": {"target_in_flight": 0.0}}, "scaling.target_in_flight is 0.0; it must be above 0"),
        ({"scaling": {"downscale_delay_s": -1.0}}, "scaling.downscale_delay_s is -1.0"),
        ({"max_batch_size": 0}, "max_batch_size is 0; it is a number from 1 to 1024"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_inference(from_mapping(ServeConfig, {"policy": "p", **settings}, "test"))


def test_the_settings_of_a_service_are_those_of_the_configuration() -> None:
    given = {
        "max_batch_size": 3,
        "limits": {"queue_size": 4, "queue_wait_s": 5.0, "action_margin": None},
    }
    config = from_mapping(ServeConfig, {"policy": "p", **given}, "test")
    check_inference(config)
    assert ServiceSettings.of(config) == ServiceSettings(
        max_batch_size=3,
        queue_size=4,
        queue_wait_s=5.0,
        action_margin=None,
        inference={"dtype": "float32", "compile": "none", "deterministic": False},
    )


def test_rates_and_percentiles_are_those_of_the_last_seconds() -> None:
    now = [100.0]
    meter = LoadMeter(clock=lambda: now[0])
    meter.answer(queue_ms=9000, infer_ms=9000, total_ms=9000, batch_size=8)
    now[0] += WINDOW_S + 1
    for number in range(100):
        meter.answer(queue_ms=number, infer_ms=20, total_ms=number + 20, batch_size=4)
    load = meter.snapshot(in_flight=2, queued=1, oldest_wait_ms=3.0, running_for_s=0.5)
    assert (load.answered, load.answers_per_s, load.batch_size) == (101, 100 / WINDOW_S, 4.0)
    assert (load.queue_ms, load.infer_ms, load.total_ms) == ((50, 99), (20, 20), (70, 119))
    assert (load.in_flight, load.queued, load.oldest_wait_ms, load.running_for_s) == (2, 1, 3.0, 0.5)


def test_a_load_is_plain_values_even_of_more_answers_than_are_remembered() -> None:
    meter = LoadMeter()
    for _ in range(5000):
        meter.answer(queue_ms=1.0, infer_ms=2.0, total_ms=3.0, batch_size=1)
    load = meter.snapshot(in_flight=0, queued=0, oldest_wait_ms=0.0, running_for_s=0.0)
    assert msgpack.unpackb(msgpack.packb(asdict(load)), strict_map_key=False)["answered"] == 5000


def test_metrics_say_what_the_load_says_and_count_nothing_twice(
    recorded_metrics: dict[tuple[str, ...], float],
) -> None:
    published = metrics.ServiceMetrics("d1")
    meter = LoadMeter()
    meter.observer = published.answer
    meter.answer(queue_ms=1, infer_ms=20, total_ms=22, batch_size=4)
    load = ServiceLoad(answered=5, refusals={"busy": 2}, queued=3, in_flight=4, oldest_wait_ms=7.0)
    published.publish(load, sessions=6, sockets={"moved": 1})
    published.publish(load, sessions=7, gpu_bytes=8, sockets={"moved": 3})
    assert recorded_metrics == {
        ("defi_serve_latency_seconds", "d1", "queue"): 0.001,
        ("defi_serve_latency_seconds", "d1", "infer"): 0.02,
        ("defi_serve_latency_seconds", "d1", "total"): 0.022,
        ("defi_serve_batch_observations", "d1"): 4,
        ("defi_serve_answers_total", "d1"): 5,
        ("defi_serve_refusals_total", "d1", "busy"): 2,
        ("defi_serve_socket_events_total", "d1", "moved"): 3,
        ("defi_serve_queued_observations", "d1"): 3,
        ("defi_serve_in_flight_observations", "d1"): 4,
        ("defi_serve_oldest_wait_seconds", "d1"): 0.007,
        ("defi_serve_open_sockets", "d1"): 7,
        ("defi_serve_gpu_memory_bytes", "d1"): 8,
    }
