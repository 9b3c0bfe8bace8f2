"""The robots of benchmarks/serving_soak.py: a thread each, four kinds of real clients, every answer checked.

    python benchmarks/load/soak_clients.py SETTINGS.json

Prints one JSON list a line for each observation: [seconds, client, kind, outcome, digest or words]. Outcomes:
answered, refused (in words, the client goes on), closed (with a code and a reason), lost (no word at all), wrong
(actions that are not those of this client's observation under the policy that the answer names), unanswered (no end
of it, PATIENCE_S after the run).
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from vla_eval.connection import Connection
from websockets.exceptions import ConnectionClosed

from defi_platform.evaluate.policy_client import PolicyClient

EPISODE_STEPS = 20
PATIENCE_S = 60.0
TOLERANCE = 5e-3
"""Of actions, relative to their range: memory lies differently in another batch and another process."""


@dataclass
class Settings:
    """Of one run."""

    port: int
    seconds: float
    clients: int
    hz: float
    """Observations per second of each client."""
    burst: tuple[float, float, float]
    """From this second to that one, each client sends so many per second instead."""
    observations: str
    """npz with images, state (one row per client) and, per policy digest, the actions expected."""


class Refused(Exception):
    """The server said in words why there is no action."""


Ask = Callable[[dict[str, Any]], tuple[np.ndarray, str]]
"""observation -> (actions, digest)"""


def openpi_client(settings: Settings) -> tuple[Ask, Callable[[], None]]:
    """openpi's own client; a new one after each closed socket, as its users do."""
    client = WebsocketClientPolicy(f"ws://127.0.0.1:{settings.port}")

    def ask(observation: dict[str, Any]) -> tuple[np.ndarray, str]:
        try:
            answer = client.infer(observation)
        except RuntimeError as error:
            raise Refused(str(error)) from error
        return answer["actions"], answer["policy_digest"]

    return ask, client._ws.close


def our_client(settings: Settings) -> tuple[Ask, Callable[[], None]]:
    """The client of our own evaluations, which connects again by itself."""
    client = PolicyClient(f"ws://127.0.0.1:{settings.port}")

    def ask(observation: dict[str, Any]) -> tuple[np.ndarray, str]:
        actions, answer = client.infer(observation)
        return actions, answer["policy_digest"]

    return ask, client.close


def vla_eval_client(settings: Settings) -> tuple[Ask, Callable[[], None]]:
    """vla-eval's client, with an episode of EPISODE_STEPS observations after the other."""
    loop = asyncio.new_event_loop()
    client = Connection(f"ws://127.0.0.1:{settings.port}/vla-eval?answers=chunk", timeout=60)
    loop.run_until_complete(client.connect())
    steps = 0

    def ask(observation: dict[str, Any]) -> tuple[np.ndarray, str]:
        nonlocal steps
        sent = {
            "images": {"front": observation["observation/images/front"]},
            "states": observation["observation/state"],
            "task_description": observation["prompt"],
            "seed": observation["seed"],
        }
        if steps % EPISODE_STEPS == 0:
            if steps:
                loop.run_until_complete(client.end_episode({}))
            loop.run_until_complete(client.start_episode({"task": {"name": "soak"}}))
        steps += 1
        try:
            answer = loop.run_until_complete(client.act(sent))
        except RuntimeError as error:
            raise Refused(str(error)) from error
        return np.asarray(answer["actions"]), answer["policy_digest"]

    def close() -> None:
        loop.run_until_complete(client.close())
        loop.close()

    return ask, close


def http_client(settings: Settings) -> tuple[Ask, Callable[[], None]]:
    """POST /v1/act with JSON and PNG over a connection that stays open."""
    connection = http.client.HTTPConnection("127.0.0.1", settings.port, timeout=60)

    def ask(observation: dict[str, Any]) -> tuple[np.ndarray, str]:
        from PIL import Image

        png = io.BytesIO()
        Image.fromarray(observation["observation/images/front"]).save(png, format="PNG")
        body = {
            "observation/images/front": base64.b64encode(png.getvalue()).decode(),
            "observation/state": observation["observation/state"].tolist(),
            "prompt": observation["prompt"],
            "seed": observation["seed"],
        }
        connection.request("POST", "/v1/act", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise Refused(f"{response.status} {answer[:200].decode(errors='replace')}")
        found = json.loads(answer)
        return np.asarray(found["actions"], np.float32), found["policy_digest"]

    return ask, connection.close


KINDS = {"openpi": openpi_client, "ours": our_client, "vla-eval": vla_eval_client, "http": http_client}


class Robot:
    """One client in its thread."""

    def __init__(self, number: int, settings: Settings, expected: dict[str, np.ndarray]) -> None:
        self._number, self._settings = number, settings
        self._begun = time.time()
        self.kind = list(KINDS)[number % len(KINDS)]
        self._expected = {
            name[8:]: rows[number] for name, rows in expected.items() if name.startswith("actions/")
        }
        self._observation = {
            "observation/images/front": expected["images"][number],
            "observation/state": expected["state"][number],
            "prompt": f"open drawer {number % 3}",
            "seed": number,
        }

    def run(self, end: float) -> None:
        """Asks until `end`, and connects again whenever the socket has gone."""
        while time.time() < end:
            try:
                ask, close = KINDS[self.kind](self._settings)
            except Exception as error:  # noqa: BLE001 - whatever keeps a client out is an outcome
                self._report("not connected", f"{type(error).__name__}: {error}")
                time.sleep(0.2)
                continue
            try:
                while time.time() < end:
                    begun = time.time()
                    self._ask(ask)
                    time.sleep(max(0.0, begun + 1 / self._hz() - time.time()))
            except ConnectionClosed as error:
                close_frame = error.rcvd
                if close_frame is None:
                    self._report("lost", "no close frame")
                else:
                    self._report("closed", f"{close_frame.code} {close_frame.reason}")
            except Exception as error:  # noqa: BLE001 - as above
                self._report("lost", f"{type(error).__name__}: {error}")
            finally:
                try:
                    close()
                except Exception as error:  # noqa: BLE001 - of a socket that is gone
                    print(f"closing: {error}", file=sys.stderr)

    def _hz(self) -> float:
        first, last, hz = self._settings.burst
        return hz if first <= time.time() - self._begun < last else self._settings.hz

    def _ask(self, ask: Ask) -> None:
        try:
            actions, digest = ask(dict(self._observation))
        except Refused as error:
            self._report("refused", str(error))
            return
        expected = self._expected.get(digest)
        if expected is None:
            self._report("wrong", f"digest {digest} is of no policy of this run")
            return
        shape = expected[: len(actions)] if actions.ndim == 2 else expected[0]
        off = float(np.abs(actions - shape).max() / np.ptp(expected))
        self._report(
            "answered" if off < TOLERANCE else "wrong", digest if off < TOLERANCE else f"off by {off:.2g}"
        )

    def report_unanswered(self) -> None:
        """For a robot that still waits when all is over."""
        self._report("unanswered", f"no end of an observation {PATIENCE_S:g} s after the run")

    def _report(self, outcome: str, words: str) -> None:
        line = json.dumps([time.time(), self._number, self.kind, outcome, words[:300]])
        with PRINTING:
            print(line, flush=True)


PRINTING = threading.Lock()


def main() -> None:
    """Runs all robots."""
    with open(sys.argv[1], encoding="utf-8") as file:
        settings = Settings(**json.load(file))
    expected = dict(np.load(settings.observations))
    end = time.time() + settings.seconds
    robots = [Robot(number, settings, expected) for number in range(settings.clients)]
    threads = [threading.Thread(target=robot.run, args=(end,), daemon=True) for robot in robots]
    for thread in threads:
        thread.start()
    for robot, thread in zip(robots, threads, strict=True):
        thread.join(max(0.0, end + PATIENCE_S - time.time()))
        if thread.is_alive():
            robot.report_unanswered()


if __name__ == "__main__":
    main()
