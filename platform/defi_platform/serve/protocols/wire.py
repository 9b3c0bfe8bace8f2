"""The dialogue of one websocket, without the socket: bytes in, bytes out.

A `Wire` knows one protocol and one client. Whoever holds the socket sends its greeting, gives it one message at a time
and sends what it replies; so every protocol can be tested, moved between processes and fuzzed without a network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from defi_platform.serve.observation_keys import OWN, ObservationKeys
from defi_platform.serve.refusals import BusyError, DeadlineError, PolicyFailure, Refusal
from defi_platform.serve.sessions.options import CHUNK, SessionOptions
from defi_platform.serve.sessions.session import Session

if TYPE_CHECKING:
    from defi_platform.serve.inference.service import ActionService

POLICY_VIOLATION, TOO_BIG, SERVICE_RESTART, TRY_AGAIN_LATER = 1008, 1009, 1012, 1013
"""Close codes (RFC 6455 and its registry): a client that breaks the protocol or may not come in; a message over the
limit; come back, somebody else answers; come back later."""


SPEND = "defi.spend"
"""Key of an HTTP request's scope: `Wire.spend` of its client, where it has a rate."""


@dataclass(frozen=True)
class ClientInfo:
    """The other end of a socket."""

    address: str = ""
    """Host and port as the operating system names them."""
    name: str | None = None
    """Of the token it came in with; None without tokens."""
    path: str = "/"
    """The path of its handshake, without the query."""
    query: str = ""
    """The query of its handshake: options of the session (`SessionOptions.with_query`)."""


@dataclass(frozen=True)
class Reply:
    """The server's reaction to a message."""

    data: bytes | str | None = None
    """One websocket message: binary, text, or none."""
    close: tuple[int, str] | None = None
    """Close the socket after `data`, with this code and reason (at most 123 bytes of UTF-8)."""
    hand_over: bool = False
    """The message was not answered: it begins an episode that belongs to the successor (`Wire.leaving`). The socket
    moves together with the message, which is answered there first; where it cannot move, it is closed with 1012."""


@dataclass(frozen=True, kw_only=True)
class WireSettings:
    """Settings of a server's dialogues."""

    session: SessionOptions = field(default_factory=SessionOptions)
    """How sessions answer; a client may change it in the query of its address."""
    keys: ObservationKeys | None = None
    """Where an observation's parts are in a message; None: where the protocol says."""
    actions: Mapping[str, int] = field(default_factory=dict)
    """Names of an action's parts and their sizes, in order, for XPolicyLab; empty: an action is one array."""


class Wire(ABC):
    """One client's dialogue in one protocol. Messages come one at a time, on the loop of the service."""

    answers: ClassVar[str] = CHUNK
    """What clients of the protocol expect where nothing else is said: "chunk" or "step"."""
    default_keys: ClassVar[ObservationKeys] = OWN
    """Where the protocol itself puts an observation's parts."""

    def __init__(
        self, service: ActionService, client: ClientInfo, settings: WireSettings | None = None
    ) -> None:
        """Prepares a dialogue.

        Args:
            service: answers observations.
            client: at the other end.
            settings: of the server; the defaults when None.

        Raises:
            OptionError: the query of the client's address holds an option without a usable value.
        """
        self.service = service
        self.client = client
        self.settings = settings or WireSettings()
        self.keys = self.settings.keys or self.default_keys
        """Where an observation's parts are in this server's messages."""
        options = self.settings.session.with_query(client.query, self.answers)
        self.session = Session(service, options, self.keys, answers=self.answers)
        self.spend: Callable[[int], None] = lambda number: None
        """Counts the observations of a message beside its first against the rate of the client."""
        self.leaving = False
        """Set by the holder of the socket while the socket waits for the end of its episode to move to a successor."""

    def greeting(self) -> bytes | None:
        """The message that the server sends first; None where the client speaks first."""
        return None

    @abstractmethod
    async def answer(self, message: bytes | str) -> Reply:
        """Answers one message. Never raises for bad input: what is wrong is said in the protocol's own words.

        Args:
            message: binary or text, as it came.
        """

    async def turn_away(self, message: bytes | str, refusal: Refusal) -> Reply:
        """Refuses a message of which nothing is read but what its answer must name.

        Args:
            message: binary or text, as it came.
            refusal: why it gets no answer.
        """
        return self.refused(refusal)

    def refused(self, refusal: Refusal) -> Reply:
        """`refuse`, counted where the service has not counted it.

        Args:
            refusal: why.
        """
        if not isinstance(refusal, BusyError | DeadlineError | PolicyFailure):
            self.service.count(refusal)
        return self.refuse(refusal)

    def refuse(self, refusal: Refusal) -> Reply:
        """The words for a message that gets no actions; a text message unless a protocol has a form of its own.

        Args:
            refusal: why.
        """
        return Reply(str(refusal))

    @property
    @abstractmethod
    def between_episodes(self) -> bool:
        """No episode is running: the next message may be answered by another policy."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything a successor in another process needs to go on, as values that msgpack knows."""

    @abstractmethod
    def resume(self, state: dict[str, Any]) -> None:
        """Goes on where another process stopped.

        Args:
            state: of `state()`.
        """
