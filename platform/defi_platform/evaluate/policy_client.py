"""The robot's side of a served policy: openpi's websocket protocol, with reconnection."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from defi_platform.errors import ConfigError, ServeError, one_line
from defi_platform.retry import RetryPolicy, retry
from defi_platform.serve.protocols import openpi

ANSWER_TIMEOUT_S = 120.0
"""Seconds: a first request may wait for a model to be compiled or a replica to be started."""
RECONNECT_S = 30.0
"""Seconds of attempts to reach a lost server: about the time a replica takes to come back."""
SEND_TIMEOUT_S = 30
"""Seconds in which a server must take what is sent: one that reads nothing, or has lost its network, is a lost one."""

LONGEST_WAIT_S = 5.0
"""Seconds that a busy server may ask a client to wait."""
FINAL_CLOSE_CODES = (1002, 1003, 1007, 1008, 1009)
"""The server has closed because of the message: it would close again. Other codes (1001 and 1006 a server that ends,
1011 its failure, 1012 a replica that leaves, 1013 no room) pass."""

_RETRY_AFTER = re.compile(r"retry after (\d+(?:\.\d+)?) s")


class ServeUnreachableError(ServeError):
    """Nobody answers at the address; trying again later may help."""


class ServeBusyError(ServeError):
    """The server has no time for an observation now, and says when it may have."""

    def __init__(self, words: str, retry_after_s: float) -> None:
        super().__init__(words)
        self.retry_after_s = retry_after_s


TRANSIENT = (ConnectionClosed, TimeoutError, ServeUnreachableError, ServeBusyError)
"""Errors after which an observation may be sent again."""


def read_token(path: str | None) -> str | None:
    """The token in a file; None without a file.

    Raises:
        ConfigError: the file is absent or holds something else than one token.
    """
    if path is None:
        return None
    try:
        words = Path(path).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token_file {path}: {getattr(error, 'strerror', None) or error}.") from error
    if len(words) != 1:
        raise ConfigError(f"token_file {path} holds {len(words)} words; write the token and nothing else.")
    return words[0]


class PolicyClient:
    """One connection to a policy server; a context manager.

    Observations are answered in turn. When the connection is lost, the observation is sent again over a new
    one: an answer depends on the observation and its seed alone, so asking twice changes nothing.
    """

    def __init__(self, url: str, reconnect_s: float = RECONNECT_S, token: str | None = None):
        """Connects and reads the greeting.

        Args:
            url: ws://host:port, or wss:// for TLS.
            reconnect_s: seconds of reconnection attempts after a connection is lost.
            token: that the server asks for (`security.tokens`).

        Raises:
            ConfigError: the url is malformed, or the server asks for another token.
            ServeError: nobody answers there.
        """
        self.url = url
        self._reconnect_s = reconnect_s
        self._headers = {"Authorization": f"Api-Key {token}"} if token else None
        self._socket: ClientConnection | None = None
        self._open = contextlib.ExitStack()
        self.reconnections = 0
        """Connections after the first."""
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

        def attempt() -> tuple[NDArray[np.float32], dict[str, Any]]:
            try:
                return self._ask(message)
            except TRANSIENT as error:
                if not isinstance(error, ServeBusyError):
                    self.close()
                raise

        def wait_if_busy(error: Exception) -> None:
            if isinstance(error, ServeBusyError):
                time.sleep(min(error.retry_after_s, LONGEST_WAIT_S))

        policy = RetryPolicy(timeout_s=self._reconnect_s, first_pause_s=0.05, max_pause_s=0.5)
        try:
            try:
                return attempt()
            except TRANSIENT as error:
                if not self._reconnect_s or not _may_pass(error):
                    raise
                wait_if_busy(error)
            # The time counts from here: an answer may have been waited for longer than that before it was lost.
            return retry(attempt, policy, is_transient=_may_pass, before_retry=wait_if_busy)
        except ServeBusyError:
            raise
        except TRANSIENT as error:
            if not _may_pass(error):
                raise ServeError(
                    f"the policy server at {self.url} refused an observation: {one_line(error)}."
                ) from error
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
        if self._socket is None:
            self._connect()
            self.reconnections += 1
        assert self._socket is not None
        self._socket.send(message)
        reply = self._socket.recv(timeout=ANSWER_TIMEOUT_S)
        if isinstance(reply, str):
            if retry_after := _RETRY_AFTER.search(reply):
                words = f"the policy server at {self.url} is busy: {reply}"
                raise ServeBusyError(words, float(retry_after[1]))
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
                    self.url,
                    compression=None,
                    max_size=None,
                    proxy=None,
                    ping_interval=None,
                    open_timeout=10,
                    additional_headers=self._headers,
                )
            )
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
                timeout_ms = 1000 * SEND_TIMEOUT_S
                self._socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
            return self._decoded(self._socket.recv(timeout=ANSWER_TIMEOUT_S))
        except (InvalidURI, ValueError) as error:
            raise ConfigError(
                f"url '{self.url}' is not a websocket address; write it as ws://host:port."
            ) from error
        except (OSError, InvalidHandshake, ConnectionClosed, TimeoutError) as error:
            self.close()
            words = one_line(error)
            if isinstance(error, InvalidStatus):
                words += f" ({error.response.body.decode(errors='replace').strip()[:200]})"
                if error.response.status_code == 401:
                    raise ConfigError(
                        f"the policy server at {self.url} asks for a token that it knows: {words}. Write it into a file and "
                        "set token_file."
                    ) from error
            raise ServeUnreachableError(
                f"no policy server answers at {self.url}: {words}. "
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


def _may_pass(error: Exception) -> bool:
    if isinstance(error, ConnectionClosed):
        return error.rcvd is None or error.rcvd.code not in FINAL_CLOSE_CODES
    return isinstance(error, TRANSIENT)


def check_same_policy(expected: str | None, digest: str | None, url: str) -> None:
    """Checks that an evaluation is of one policy: a server may get another one while it runs.

    Args:
        expected: `policy_digest` of the policy that is evaluated; None where its server names none.
        digest: of an answer, or of an episode that is there already.
        url: of the server, for the message.

    Raises:
        ServeError: they are two policies.
    """
    if expected is not None and digest is not None and digest != expected:
        raise ServeError(
            f"the policy server at {url} has two policies: {digest} answered where {expected} is evaluated. Serve the "
            "policy of the finished episodes again, or evaluate the other one with another output."
        )


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
