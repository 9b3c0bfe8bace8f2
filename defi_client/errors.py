"""Errors of a robot's client; each message names the thing, the place and what to do."""

from __future__ import annotations

from typing import Any


class ClientError(Exception):
    """Base of all errors of this package."""


class AddressError(ClientError):
    """The address is malformed, or the server asks for another token: trying again does not help."""


class UnreachableError(ClientError):
    """Nobody answers at the address; trying again later may help."""


class LostError(ClientError):
    """The connection was lost, and could not be had again in the given time."""


class BusyError(ClientError):
    """The server has no time for an observation now, and says when it may have."""

    def __init__(self, words: str, retry_after_s: float) -> None:
        super().__init__(words)
        self.retry_after_s = retry_after_s


class RefusedError(ClientError):
    """The server does not take the observation, and says why."""


class ProtocolError(ClientError):
    """A message that is not openpi's protocol, or cannot be sent by it."""


class AnswerError(ClientError):
    """An answer without usable actions: none, another shape, NaN or infinity."""


class FitError(ClientError):
    """The policy and the robot do not fit: other cameras, or another width of states or actions."""


class UnsafeActionError(ClientError):
    """An action that the robot must not carry out."""


class RecordError(ClientError):
    """A recording that cannot be written."""


class StoppedError(ClientError):
    """An episode was ended because no usable answer came; the robot holds its position."""

    def __init__(self, words: str, result: Any | None = None) -> None:
        super().__init__(words)
        self.result = result
        """`control.EpisodeResult` up to the end."""


def one_line(error: BaseException) -> str:
    """The error's message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
