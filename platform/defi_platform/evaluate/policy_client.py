"""The robot's side of a served policy: openpi's websocket protocol, with reconnection."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import ClientConnection, connect

from defi_platform.errors import ConfigError, ServeError, one_line
from defi_platform.retry import RetryPolicy, retry
from defi_platform.serve.protocols import openpi

ANSWER_TIMEOUT_S = 120.0
"""Seconds: a first request may wait for a model to be compiled or a replica to be started."""
RECONNECT_S = 30.0
"""Seconds of attempts to reach a lost server: about the time a replica takes to come back."""


class ServeUnreachableError(ServeError):
    """Nobody answers at the address; trying again later may help."""


CONNECTION_LOST = (ConnectionClosed, TimeoutError, ServeUnreachableError)
"""Errors after which an observation is sent again over a new connection."""


class PolicyClient:
    """One connection to a policy server; a context manager.

    Observations are answered in turn. When the connection is lost, the observation is sent again over a new
    one: an answer depends on the observation and its seed alone, so asking twice changes nothing.
    """

    def __init__(self, url: str, reconnect_s: float = RECONNECT_S):
        """Connects and reads the greeting.

        Args:
            url: ws://host:port.
            reconnect_s: seconds of reconnection attempts after a connection is lost.

        Raises:
            ConfigError: the url is malformed.
            ServeError: nobody answers there.
        """
        self.url = url
        self._reconnect_s = reconnect_s
        self._socket: ClientConnection | None = None
        self._open = contextlib.ExitStack()
        self.metadata = self._connect()
        """The server's greeting."""

    def infer(self, observation: dict[str, Any]) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Asks for the actions of one observation.

        Args:
            observation: as `serve.observation.read_observation` takes it.

        Returns:
            The actions, (chunk, A) in raw units, and the whole answer.

        Raises:
            ServeError: the server rejects the observation, gives no usable actions or stays unreachable.
        """
        message = openpi.pack(observation)

        def ask() -> tuple[NDArray[np.float32], dict[str, Any]]:
            try:
                if self._socket is None:
                    self._connect()
                return self._ask(message)
            except CONNECTION_LOST:
                self.close()
                raise

        policy = RetryPolicy(timeout_s=self._reconnect_s, first_pause_s=0.5, max_pause_s=0.5)
        try:
            return retry(ask, policy, is_transient=lambda error: isinstance(error, CONNECTION_LOST))
        except CONNECTION_LOST as error:
            raise ServeError(
                f"the policy server at {self.url} stopped answering: {one_line(error)}. "
                "Start it again, then run the same command: finished episodes are kept."
            ) from error

    def close(self) -> None:
        """Closes the connection."""
        self._socket = None
        self._open.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, message: bytes) -> tuple[NDArray[np.float32], dict[str, Any]]:
        assert self._socket is not None
        self._socket.send(message)
        reply = self._socket.recv(timeout=ANSWER_TIMEOUT_S)
        if isinstance(reply, str):
            raise ServeError(f"the policy server at {self.url} refused an observation: {reply}")
        answer = self._decoded(reply)
        actions = answer.get("actions")
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or not np.isfinite(actions).all():
            shape = getattr(actions, "shape", type(actions).__name__)
            raise ServeError(
                f"the policy server at {self.url} answered without usable actions "
                f"(a finite array (chunk, action dims) is expected, got {shape})."
            )
        return actions, answer

    def _connect(self) -> dict[str, Any]:
        try:
            # No proxy: it would be in the way of servers on this machine and in the robot's network.
            # No pings: a server busy with one forward pass for long is not a lost one.
            self._socket = self._open.enter_context(
                connect(
                    self.url, compression=None, max_size=None, proxy=None, ping_interval=None, open_timeout=10
                )
            )
            return self._decoded(self._socket.recv(timeout=ANSWER_TIMEOUT_S))
        except (InvalidURI, ValueError) as error:
            raise ConfigError(
                f"url '{self.url}' is not a websocket address; write it as ws://host:port."
            ) from error
        except (OSError, InvalidHandshake, ConnectionClosed, TimeoutError) as error:
            self.close()
            raise ServeUnreachableError(
                f"no policy server answers at {self.url}: {one_line(error)}. "
                "Start one with `python jobs/serve_policy.py policy=FOLDER`, or leave out url to have it started."
            ) from error

    def _decoded(self, data: str | bytes) -> dict[str, Any]:
        try:
            message = openpi.unpack(data) if isinstance(data, bytes) else None
        except openpi.ProtocolError as error:
            raise ServeError(
                f"what answers at {self.url} does not speak openpi's protocol: {error}"
            ) from error
        if not isinstance(message, dict):
            raise ServeError(f"what answers at {self.url} does not speak openpi's protocol: {data!r:.100}")
        return message


def check_metadata(
    metadata: dict[str, Any],
    *,
    source: str,
    benchmark: str,
    camera: str,
    state_dim: int,
    action_dim: int,
    execute_steps: int | None,
) -> None:
    """Checks that a policy can drive a benchmark.

    Args:
        metadata: the server's greeting.
        source: url or folder of the policy, for the message.
        benchmark: its name, for the message.
        camera: whose images the policy will get.
        state_dim: of the benchmark's state.
        action_dim: of the benchmark's actions.
        execute_steps: actions executed of each chunk; None for all.

    Raises:
        ConfigError: it cannot; names everything that does not fit.
    """
    wrong = []
    if metadata.get("action_dim", action_dim) != action_dim:
        wrong.append(f"it gives {metadata['action_dim']} action dims, {benchmark} takes {action_dim}")
    if metadata.get("state_dim", state_dim) not in (0, state_dim):
        wrong.append(f"it takes {metadata['state_dim']} state dims, {benchmark} gives {state_dim}")
    cameras = list(metadata.get("cameras", [camera]))
    if cameras not in ([camera], ["*"]):
        wrong.append(f"it looks through {', '.join(map(str, cameras))}, the evaluation through '{camera}'")
    chunk = metadata.get("chunk")
    if execute_steps is not None and chunk is not None and execute_steps > chunk:
        wrong.append(f"it gives chunks of {chunk} actions, execute_steps is {execute_steps}")
    if wrong:
        raise ConfigError(
            f"the policy at {source} (preset {metadata.get('preset', 'unknown')}) does not fit: "
            f"{'; '.join(wrong)}. Serve a policy fine-tuned for this benchmark, or set camera and "
            "execute_steps to what it has."
        )
