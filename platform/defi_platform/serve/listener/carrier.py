"""The clients that a machine carries for others: sent there, taken in from there, and brought back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

from defi_platform.serve.listener.peers import Peer, Peers
from defi_platform.serve.listener.relay import (
    PASSED,
    RETURNED,
    STATE_PATIENCE_S,
    Carriage,
    connect,
    introduced,
    receive_message,
    rest_of,
    send_message,
)

log = logging.getLogger(__name__)

_RESTART = b"the policy server restarts; connect again"
RESTART_FRAME = bytes([0x88, 2 + len(_RESTART)]) + (1012).to_bytes(2, "big") + _RESTART
"""A close frame with code 1012 (service restart)."""


class Carrier:
    """Connections between this machine's listener and those of other machines; lives on the listener's loop."""

    def __init__(
        self,
        secret: bytes,
        public_port: int,
        counts: Counter[str],
        take: Callable[[socket.socket, dict[str, Any] | None, int | None], None],
    ) -> None:
        """Prepares for other machines.

        Args:
            secret: that all listeners of a deployment know.
            public_port: that clients connect to.
            counts: of the listener; relayed and returned are counted there.
            take: finds somebody to serve a connection, with the state of its session (None: a new one) and the
                generation that it should go on with, if any.
        """
        self.peers = Peers()
        self._secret, self._public_port, self._counts, self._take = secret, public_port, counts, take
        self._carriages: dict[tuple[Any, ...], Carriage] = {}

    @property
    def carried(self) -> int:
        """Clients of this machine that are served on others."""
        return len(self._carriages)

    def is_relayed(self, connection: socket.socket) -> bool:
        """Whether a connection comes from another machine's listener and not from a client."""
        return bool(connection.getsockname()[1] != self._public_port)

    async def carry(
        self, client: socket.socket, peer: Peer, state: dict[str, Any] | None, generation: int | None
    ) -> bool:
        """Copies bytes between a client and another machine until one of them ends, or the client is brought back.

        Args:
            client: nothing read from it that is not in `state`; no longer the caller's if True is returned.
            peer: whither; has an address.
            state: of its session; None: it is new.
            generation: that it should go on with.

        Returns: False where the peer cannot be reached.
        """
        assert peer.address is not None
        message = {"kind": PASSED, "state": state, "generation": generation}
        remote = await connect(peer.address, self._secret, message)
        if remote is None:
            self.peers.avoid(peer)
            return False
        self._counts["relayed"] += 1
        carriage = Carriage(client, remote)
        self._carriages[carriage.address] = carriage
        try:
            returned = await carriage.run()
        finally:
            del self._carriages[carriage.address]
        if returned:
            try:
                session = await asyncio.wait_for(carriage.state, STATE_PATIENCE_S)
            except (TimeoutError, ValueError):
                # Between two messages, with nothing left to send.
                with contextlib.suppress(OSError):
                    client.send(RESTART_FRAME)
                client.close()
            except BaseException:
                client.close()
                raise
            else:
                self._take(client, session, None)
        return True

    async def receive(self, connection: socket.socket) -> None:
        """Does what another machine's listener asks for.

        Args:
            connection: accepted on the relay port.
        """
        message = await introduced(connection, self._secret)
        kind = None if message is None else message.get("kind")
        if message is not None and kind == PASSED:
            self._take(connection, message["state"], message["generation"])
            return
        try:
            if message is not None and kind == RETURNED:
                await self._take_back(connection, tuple(message["socket"]))
        finally:
            connection.close()

    async def give_back(self, connection: socket.socket, state: dict[str, Any]) -> bool:
        """Brings a client back to the listener that sent it here.

        Args:
            connection: `is_relayed`; between two messages.
            state: of its session.

        Returns: False where that listener does not know it (any more); the connection is still the caller's.
        """
        try:
            host, port = connection.getpeername()[:2]
        except OSError:  # the client, or the other machine, has gone
            connection.close()
            return True
        for peer in self.peers.at(host):
            assert peer.address is not None
            asked = await connect(peer.address, self._secret, {"kind": RETURNED, "socket": [host, port]})
            if asked is None:
                continue
            with asked:
                try:
                    await receive_message(asked)  # it is known there, and no more of the client is read
                except (OSError, ValueError, TimeoutError):
                    continue
                with connection:
                    try:
                        if rest := await rest_of(connection):
                            state["unread"] = state.get("unread", b"") + rest
                        await send_message(asked, state)
                        self._counts["returned"] += 1
                    except (OSError, TimeoutError) as error:
                        log.warning("a client of %s was lost on its way back: %r", host, error)
                return True
        return False

    async def _take_back(self, connection: socket.socket, address: tuple[Any, ...]) -> None:
        carriage = self._carriages.get(address)
        if carriage is None:
            return
        try:
            await send_message(connection, {})
            carriage.take_back()
            state = await receive_message(connection)
        except (OSError, ValueError, TimeoutError) as error:
            log.warning("a client was not brought back: %r", error)
            if not carriage.state.done():
                carriage.state.set_exception(ValueError("no state has come"))
        else:
            if not carriage.state.done():
                carriage.state.set_result(state)
