"""jobs/serve_policy.py: serves a policy until Ctrl-C and shows how it goes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from defi_models.inputs.action_contract import UNKNOWN
from defi_models.pretrained.side_files import acting_from_mapping
from defi_platform.cluster import ray_session
from defi_platform.config import ServeConfig
from defi_platform.config.serve import replica_range
from defi_platform.serve.deployment.server import PolicyServer, deploy
from defi_platform.serve.deployment.startup_checks import check_before_start, resolve_port, warn_if_public
from defi_platform.serve.observation import ANY_CAMERA, IMAGE_PREFIX, PROMPT_KEY, SEED_KEY, STATE_KEY

LINE_PERIOD_S = 1.0


def serve_policy(config: ServeConfig) -> int:
    """Serves a policy until Ctrl-C or SIGTERM, then drains.

    Returns:
        The job's exit code.

    Raises:
        UserError: as `deploy`; a bad folder and a taken port are found before Ray is started.
    """
    check_before_start(config)
    if not (config.ray.address or os.environ.get("RAY_ADDRESS") or ray.is_initialized()):
        resolve_port(config.host, config.port)
    with ray_session(config.ray), deploy(config) as server:
        print(_how_to_call(server, config), flush=True)
        warn_if_public(config)
        with _stop_signals() as stop:
            _show_until(stop, server)
        print("shutting down: answering what is in flight, closing the sockets", flush=True)
    print("stopped", flush=True)
    return 0


def live_line(states: Sequence[dict[str, Any]]) -> str:
    """Requests per second, latency, batch, sessions and refusals of all replicas together.

    Args:
        states: `Listener.state` of every node.

    Returns: one line without its end. Latencies are the slowest replica's: percentiles do not add up.
    """
    replicas = [replica for state in states for replica in state["replicas"]]
    loads = [replica["load"].get("service") or {} for replica in replicas]
    rate = sum(load.get("answers_per_s", 0.0) for load in loads)
    totals = [load["total_ms"] for load in loads if load.get("answers_per_s")]
    median = max((total[0] for total in totals), default=0.0)
    slowest = max((total[1] for total in totals), default=0.0)
    batch = sum(load.get("batch_size", 0.0) * load.get("answers_per_s", 0.0) for load in loads)
    sessions = sum(replica["load"].get("websockets", 0) for replica in replicas)
    refused = sum(sum(load.get("refusals", {}).values()) for load in loads)
    refused += sum(state["refused"] for state in states)
    live = sum(state["live"] for state in states)
    return (
        f"{live} replica(s)  {rate:.1f} answers/s  p50 {median:.0f} ms  p99 {slowest:.0f} ms  "
        f"batch {batch / rate if rate else 0.0:.1f}  sessions {sessions}  refused {refused}"
    )


def _show_until(stop: threading.Event, server: PolicyServer) -> None:
    terminal = sys.stdout.isatty()
    # A wait without end would not let the handlers run.
    while not stop.wait(LINE_PERIOD_S):
        if terminal:
            print(f"\r\033[K{live_line(server.states())}", end="", flush=True)
    if terminal:
        print(flush=True)


def _how_to_call(server: PolicyServer, config: ServeConfig) -> str:
    about = server.metadata
    height, width = about["image_size"]
    cameras = ["<name>" if camera == ANY_CAMERA else camera for camera in about["cameras"]]
    keys = [f'"{IMAGE_PREFIX}{camera}": uint8 (h, w, 3)' for camera in cameras]
    if about["state_dim"]:
        keys.append(f'"{STATE_KEY}": float32 ({about["state_dim"]},)')
    keys += [f'"{PROMPT_KEY}": str', f'"{SEED_KEY}": int, optional']
    low, high = replica_range(config.replicas)
    return (
        f"{about['preset']} policy {config.policy} ({server.deployment.digest[:8]}) is served at {server.url}\n"
        f"  {low if low == high else f'{low} to {high}'} replica(s), up to {config.max_batch_size} observations per "
        f"forward pass; images are resized to {height}x{width}\n"
        "  from openpi_client.websocket_client_policy import WebsocketClientPolicy\n"
        f'  WebsocketClientPolicy("{server.url}").infer(observation)["actions"]'
        f"  # float32 ({about['chunk']}, {about['action_dim']})\n"
        f"  observation: {{{', '.join(keys)}}}\n"
        f"  actions: {_action_line(about['action'])}\n"
        f"  acts with {acting_from_mapping(about['acting']).text()}\n"
        f"  {server.http_url}/healthz  {server.http_url}/metadata\n"
        "Ctrl-C stops."
    )


def _action_line(action: Mapping[str, Any]) -> str:
    """The meaning of the actions in one line."""
    names, units = ([] if action[key] == UNKNOWN else action[key] for key in ("names", "units"))
    entries = (
        [f"{name} ({unit})" for name, unit in zip(names, units, strict=True)] if units and names else names
    )
    return (
        f"{', '.join(entries) or 'entries without names'}; kind {action['kind']}; gripper: {action['gripper']}; "
        f"at {action['control_hz']} Hz; carry out {action['execute_steps']} of a chunk"
    )


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM, the normal end of a server, set the event."""
    stop = threading.Event()
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
