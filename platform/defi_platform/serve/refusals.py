"""The reasons for which a client gets words instead of actions.

Every protocol turns a `Refusal` into its own kind of error; nothing else that a client causes leaves the server.
"""

from __future__ import annotations

from typing import ClassVar

LONGEST_WORDS = 2000
"""Characters of a refusal that a client is sent; a name or value that it sent itself may be repeated in it."""


class Refusal(Exception):
    """An observation that gets no action; its text is for the client and names the fix."""

    reason: ClassVar[str] = "refused"
    """One word for metrics."""

    def __init__(self, words: str) -> None:
        """Cuts the words to `LONGEST_WORDS` characters."""
        super().__init__(words if len(words) <= LONGEST_WORDS else f"{words[: LONGEST_WORDS - 4]} ...")


class ObservationError(Refusal):
    """An observation that does not fit the policy: names the key, what came and what is expected."""

    reason = "observation"


class BusyError(Refusal):
    """The queue is full, or the wait would be longer than the server allows."""

    reason = "busy"

    def __init__(self, words: str, retry_after_s: float) -> None:
        """Says when to try again.

        Args:
            words: what is full.
            retry_after_s: seconds after which there will be room.
        """
        super().__init__(f"busy, retry after {retry_after_s:.1f} s: {words}")
        self.retry_after_s = retry_after_s


class DeadlineError(Refusal):
    """No answer could be given within the deadline that the client set."""

    reason = "deadline"


class PolicyFailure(Refusal):
    """The policy raised an error or gave actions that no robot should carry out."""

    reason = "policy"


class RateError(Refusal):
    """A client sends more messages per second than it may (`security.rate`)."""

    reason = "rate"

    def __init__(self, retry_after_s: float) -> None:
        """Says when the next one is due.

        Args:
            retry_after_s: seconds until then.
        """
        super().__init__(f"too many messages, retry after {retry_after_s:.2f} s (security.rate).")
        self.retry_after_s = retry_after_s
