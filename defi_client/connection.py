"""One connection to a policy server that speaks openpi's websocket protocol, with reconnection.

The server greets with a map of metadata; then each observation, a map, is answered by one map of actions. A text
message is an error. docs/serving.md says what our own server promises beyond that: close codes, "retry after N s".
"""

from __future__ import annotations

import contextlib
import inspect
import re
import socket
import ssl
import threading
import time
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from defi_client import wire
from defi_client.errors import (
    AddressError,
    AnswerError,
    BusyError,
    LostError,
    ProtocolError,
    RefusedError,
    UnreachableError,
    one_line,
)

ANSWER_TIMEOUT_S = 120.0
"""Seconds: a first request may wait for a model to be compiled or a replica to be started."""
RECONNECT_S = 30.0
"""Seconds of attempts to reach a lost server: about the time a replica takes to come back."""
OPEN_TIMEOUT_S = 10.0
"""Seconds for one attempt to connect."""
CLOSE_TIMEOUT_S = 2.0
"""Seconds for a server to agree to a close."""
SEND_TIMEOUT_S = 30
"""Seconds in which a server must take what is sent: one that reads nothing, or has lost its network, is a lost one."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 0.5
"""Between attempts; the first one is made at once."""
LONGEST_WAIT_S = 5.0
"""Seconds that a busy server may ask a client to wait."""
FINAL_CLOSE_CODES = (1002, 1003, 1007, 1008, 1009)
"""The server has closed because of the message: it would close again. Other codes (1001 and 1006 a server that ends,
1011 its failure, 1012 a replica that leaves, 1013 no room) pass."""

_RETRY_AFTER = re.compile(r"retry after (\d+(?:\.\d+)?) s")
_TRANSIENT = (ConnectionClosed, TimeoutError, UnreachableError, BusyError)
_OPTIONAL = {
    # No proxy: it would be in the way of servers on this machine and in the robot's network.
    "proxy": None,
    # No pings: a server busy with one forward pass for long is not a lost one.
    "ping_interval": None,
}
"""Arguments of `connect` that the websockets of Python 3.8 does not have; it has neither proxies nor pings."""


class Connection:
    """One connection to a policy server; a context manager.

    Observations are answered in turn. When the connection is lost, the observation is sent again over a new
    one: an answer depends on the observation and its seed alone, so asking twice changes nothing.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        reconnect_s: float = RECONNECT_S,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Connects and reads the greeting.

        Args:
            url: ws://host:port, or wss:// for TLS. What follows a "?" are options of the session.
            token: that the server asks for.
            reconnect_s: seconds of reconnection attempts, from the moment at which a connection is lost.
            answer_timeout_s: seconds without an answer after which a connection counts as lost.
            ssl_context: for wss://, e.g. `ssl.create_default_context(cafile=...)`; None trusts this machine's
                authorities.

        Raises:
            AddressError: the url is malformed, or the server asks for another token.
            UnreachableError: nobody answers there.
            ProtocolError: what answers does not speak openpi's protocol.
        """
        self.url = url
        self.reconnect_s = reconnect_s
        self.answer_timeout_s = answer_timeout_s
        self._options: dict[str, Any] = {
            "compression": None,
            "max_size": None,
            "open_timeout": OPEN_TIMEOUT_S,
            "close_timeout": CLOSE_TIMEOUT_S,
        }
        if token:
            self._options["additional_headers"] = {"Authorization": f"Api-Key {token}"}
        if ssl_context is not None:
            self._options["ssl"] = ssl_context
        known = inspect.signature(connect).parameters
        self._options.update({name: value for name, value in _OPTIONAL.items() if name in known})
        self._socket: ClientConnection | None = None
        self._open = contextlib.ExitStack()
        self._asking = threading.Lock()
        self._abandoned = threading.Event()
        self.reconnections = 0
        """Connections after the first."""
        self.metadata: dict[str, Any] = self._connect()
        """The server's greeting, of the last connection."""

    def infer(
        self, observation: dict[str, Any], reconnect_s: float | None = None
    ) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
        """Asks for the actions of one observation.

        Args:
            observation: keys to arrays, texts and numbers, as the server reads them.
            reconnect_s: seconds of attempts after a loss; None: those of the connection; 0: the loss is an error at
                once, and the next call connects again.

        Returns:
            The actions, (chunk, A) in the robot's units, finite; and the whole answer.

        Raises:
            RefusedError: the server rejects the observation.
            AnswerError: it gives no usable actions.
            BusyError: it has no time for it, however often it is asked.
            LostError: it stays unreachable.
            AddressError: it asks for another token meanwhile.
        """
        message = wire.pack(observation)
        within_s = self.reconnect_s if reconnect_s is None else reconnect_s
        with self._asking:
            self._abandoned.clear()
            return self._until_answered(message, within_s)

    def abandon(self) -> None:
        """Gives up the answer that another thread waits for: its `infer` raises LostError; the next one connects again."""
        self._abandoned.set()
        self._drop()

    def close(self) -> None:
        """Closes the connection."""
        self.abandon()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _until_answered(self, message: bytes, within_s: float) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
        lost_at: float | None = None
        pause_s = 0.0
        while True:
            try:
                return self._ask(message)
            except _TRANSIENT as error:
                if not isinstance(error, BusyError):
                    self._drop()
                # The time counts from here: an answer may have been waited for longer than that before it was lost.
                now = time.monotonic()
                lost_at = now if lost_at is None else lost_at
                over = self._abandoned.is_set() or within_s <= 0 or now - lost_at >= within_s
                if over or not _may_pass(error):
                    raise self._final(error) from error
                wait_s = pause_s
                if isinstance(error, BusyError):
                    wait_s = min(max(error.retry_after_s, FIRST_PAUSE_S), LONGEST_WAIT_S)
            self._pause(wait_s)
            pause_s = min(max(2 * pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)

    def _pause(self, seconds: float) -> None:
        self._abandoned.wait(seconds)

    def _final(self, error: Exception) -> Exception:
        if isinstance(error, BusyError):
            return error
        if not _may_pass(error):
            return RefusedError(f"the policy server at {self.url} refused an observation: {one_line(error)}.")
        return LostError(f"the policy server at {self.url} stopped answering: {one_line(error)}.")

    def _ask(self, message: bytes) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
        connection = self._socket
        if connection is None:
            self.metadata = self._connect()
            self.reconnections += 1
            connection = self._socket
            if connection is None:  # abandoned meanwhile
                raise UnreachableError("the connection was given up")
        connection.send(message)
        reply = connection.recv(timeout=self.answer_timeout_s)
        if isinstance(reply, str):
            retry_after = _RETRY_AFTER.search(reply)
            if retry_after:
                words = f"the policy server at {self.url} is busy: {reply}"
                raise BusyError(words, float(retry_after[1]))
            raise RefusedError(f"the policy server at {self.url} refused an observation: {reply}")
        answer = self._decoded(reply)
        return usable_actions(answer, self.url), answer

    def _connect(self) -> dict[str, Any]:
        try:
            opened: ClientConnection = self._open.enter_context(connect(self.url, **self._options))
            self._socket = opened
            if self._abandoned.is_set():
                self._drop()
            elif hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
                timeout_ms = int(1000 * SEND_TIMEOUT_S)
                opened.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
            return self._decoded(opened.recv(timeout=self.answer_timeout_s))
        except InvalidURI as error:
            raise self._malformed() from error
        except (OSError, InvalidHandshake, ConnectionClosed, TimeoutError) as error:
            self._drop()
            words = one_line(error)
            if isinstance(error, InvalidStatus):
                words += f" ({(error.response.body or b'').decode(errors='replace').strip()[:200]})"
                if error.response.status_code == 401:
                    raise AddressError(
                        f"the policy server at {self.url} asks for a token that it knows: {words}."
                    ) from error
            raise UnreachableError(f"no policy server answers at {self.url}: {words}.") from error
        except ProtocolError:
            self._drop()
            raise
        except ValueError as error:
            raise self._malformed() from error

    def _malformed(self) -> AddressError:
        return AddressError(f"url '{self.url}' is not a websocket address; write it as ws://host:port.")

    def _drop(self) -> None:
        opened, self._open, self._socket = self._open, contextlib.ExitStack(), None
        opened.close()

    def _decoded(self, data: str | bytes) -> dict[str, Any]:
        try:
            message = wire.unpack(data) if isinstance(data, bytes) else None
        except ProtocolError as error:
            raise ProtocolError(
                f"what answers at {self.url} does not speak openpi's protocol: {error}"
            ) from error
        if not isinstance(message, dict):
            raise ProtocolError(f"what answers at {self.url} does not speak openpi's protocol: {data!r:.100}")
        return message


def usable_actions(answer: dict[str, Any], url: str) -> np.ndarray[Any, Any]:
    """The actions of an answer, (chunk, A); one action alone, (A,), is a chunk of one.

    Args:
        answer: of the server.
        url: of the server, for the message.

    Raises:
        AnswerError: there are none, or some are not finite numbers.
    """
    actions = answer.get("actions")
    if isinstance(actions, np.ndarray) and actions.ndim == 1:
        actions = actions[None]
    if isinstance(actions, np.ndarray) and actions.ndim == 2 and actions.size and np.isfinite(actions).all():
        return actions
    shape = getattr(actions, "shape", type(actions).__name__)
    raise AnswerError(
        f"the policy server at {url} answered without usable actions "
        f"(a finite array (chunk, action dims) is expected, got {shape})."
    )


def _may_pass(error: Exception) -> bool:
    if isinstance(error, ConnectionClosed):
        return error.rcvd is None or error.rcvd.code not in FINAL_CLOSE_CODES
    return isinstance(error, _TRANSIENT)
