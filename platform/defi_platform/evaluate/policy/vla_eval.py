"""A connection to a model server of vla-eval, which gives one action for each observation of an episode.

Its servers keep what they need between the observations of an episode (chunks, histories), so an episode that loses its
connection cannot go on: it is an error, and the same command runs it again from its start.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import ClientConnection, connect

from defi_client.connection import ANSWER_TIMEOUT_S
from defi_platform.errors import ConfigError, ServeError, one_line
from defi_platform.evaluate.policy_client import PolicyClient, read_token
from defi_platform.serve.observation import IMAGE_PREFIX, PROMPT_KEY, STATE_KEY
from defi_platform.serve.protocols import vla_eval
from defi_platform.serve.protocols.messages import ProtocolError

SCHEME = "vla-eval+"
"""Before ws:// or wss:// in a url: the server speaks vla-eval's protocol."""


def connect_policy(url: str, token_file: str | None = None, reconnect_s: float | None = None) -> PolicyClient:
    """A connection to a policy's server, in the protocol that its url names.

    Args:
        url: ws://host:port or wss://; vla-eval+ws://host:port for a server of vla-eval.
        token_file: with the token that the server asks for; None: none.
        reconnect_s: seconds of reconnection attempts; None: the client's own.

    Raises:
        ConfigError: the url is malformed, or the server asks for another token.
        ServeError: nobody answers there.
    """
    if url.startswith(SCHEME):
        if token_file is not None:
            raise ConfigError("token_file: vla-eval's protocol knows no tokens; leave it out.")
        return VlaEvalClient(url)
    token = read_token(token_file)
    return PolicyClient(url, token=token) if reconnect_s is None else PolicyClient(url, reconnect_s, token)


class VlaEvalClient(PolicyClient):
    """One session with a model server; takes observations under our own keys."""

    def __init__(self, url: str):
        """Connects and exchanges greetings.

        Args:
            url: vla-eval+ws://host:port.

        Raises:
            ConfigError: the url is malformed.
            ServeError: nobody answers there in vla-eval's protocol.
        """
        self.url = url
        self._seq = 0
        self._link: ClientConnection | None = None
        try:
            self._link = connect(
                url.removeprefix(SCHEME), compression=None, max_size=None, proxy=None, ping_interval=None
            )
            kind, payload = self._asked(vla_eval.HELLO, {"protocol_version": vla_eval.VERSION})
        except (InvalidURI, ValueError) as error:
            raise ConfigError(f"url '{url}' is no address; write it as {SCHEME}ws://host:port.") from error
        except (OSError, InvalidHandshake, ConnectionClosed, TimeoutError) as error:
            raise ServeError(f"no model server answers at {url}: {one_line(error)}.") from error
        if kind != vla_eval.HELLO:
            raise ServeError(f"what answers at {url} does not speak vla-eval's protocol: {payload!r:.200}.")
        self.metadata = payload

    def begin_episode(self, task: str) -> None:
        """Tells the server that what comes belongs together; it answers nothing.

        Args:
            task: name.
        """
        self._send(vla_eval.EPISODE_START, {"task": {"name": task}})

    def infer(
        self, observation: dict[str, Any], reconnect_s: float | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Asks for the action of one observation.

        Args:
            observation: under our own keys; its seed means nothing to the server.
            reconnect_s: of no use here.

        Returns:
            The action as a chunk of one, (1, A), and the whole answer.

        Raises:
            ServeError: the server refuses the observation, gives no usable action or is lost.
        """
        images = {
            name.removeprefix(IMAGE_PREFIX): image
            for name, image in observation.items()
            if name.startswith(IMAGE_PREFIX)
        }
        sent = {"images": images, "task_description": observation[PROMPT_KEY]}
        if STATE_KEY in observation:
            sent["states"] = observation[STATE_KEY]
        try:
            kind, payload = self._asked(vla_eval.OBSERVATION, sent)
        except (OSError, ConnectionClosed, TimeoutError) as error:
            raise ServeError(
                f"the model server at {self.url} stopped answering: {one_line(error)}. Start it again, then run the same "
                "command: finished episodes are kept."
            ) from error
        if kind != vla_eval.ACTION:
            raise ServeError(f"the model server at {self.url} refused an observation: {payload!r:.500}")
        try:
            action = np.asarray(payload.get("actions"), np.float32)
        except (TypeError, ValueError):
            action = np.zeros(0, np.float32)
        action = action.reshape(1, -1) if action.ndim == 1 else action
        if action.ndim != 2 or not action.size or not np.isfinite(action).all():
            raise ServeError(
                f"the model server at {self.url} answered without usable actions (a finite array (action dims,) is "
                f"expected, got {payload.get('actions')!r:.200})."
            )
        return action[:1], payload

    def close(self) -> None:
        """Closes the connection."""
        if self._link is not None:
            self._link.close()

    def _send(self, kind: str, payload: dict[str, Any]) -> None:
        assert self._link is not None
        self._seq += 1
        self._link.send(vla_eval.pack(kind, payload, self._seq))

    def _asked(self, kind: str, payload: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Type and payload of the answer to a message."""
        assert self._link is not None
        self._send(kind, payload)
        reply = self._link.recv(timeout=ANSWER_TIMEOUT_S)
        if isinstance(reply, str):
            return vla_eval.ERROR, {"error": reply}
        try:
            message = vla_eval.unpack(reply)
            return str(message["type"]), dict(message["payload"])
        except (ProtocolError, KeyError, TypeError, ValueError) as error:
            raise ServeError(f"{self.url} does not speak vla-eval's protocol: {one_line(error)}") from error
