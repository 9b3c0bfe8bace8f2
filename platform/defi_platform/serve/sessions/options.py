"""Options of a session: whole chunks, or one action at a time from a chunk that the server keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import parse_qsl

from defi_platform.serve.refusals import Refusal
from defi_platform.serve.wording import shown

CHUNK: Final = "chunk"
STEP: Final = "step"
MAX_QUERY: Final = 500
"""Characters of a query."""


class OptionError(Refusal):
    """An option in the address of a websocket that does not exist or has no usable value."""

    reason = "option"


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """Answers of the sessions of a server; each may be set for one session in the query of its address."""

    answers: str | None = None
    """"chunk": all actions of a chunk with each answer. "step": one action with each answer; the policy runs when
    `open_loop` actions of its chunk are used up. None: what the clients of the protocol expect."""
    open_loop: int | None = None
    """Actions of a chunk that are carried out before the policy runs again, step by step; None: what the policy's
    contract says (`execute_steps`), and 1 where `ensemble` would have nothing to average with it."""
    ensemble: float | None = None
    """Temporal ensembling, step by step: the action is the mean of what all kept chunks say of this moment, with
    weights exp(-ensemble * i) from the oldest (i = 0). None: the newest chunk alone. Source: ACT, arXiv 2304.13705."""
    seed: int | None = None
    """From which the seeds of observations without a seed are drawn, by episode and number; None: drawn at random."""
    expiry_s: float = 60.0
    """Seconds without a message after which what is kept of a chunk is too old to be carried out."""

    def with_query(self, query: str, answers: str = CHUNK) -> SessionOptions:
        """These options, changed by the query of a websocket's address ("answers=step&open_loop=8").

        Args:
            query: of the handshake, without the question mark. Other names than the options' are left to others.
            answers: "chunk" or "step", where the options leave it open.

        Raises:
            OptionError: an option has no usable value, or would do nothing.
        """
        if len(query) > MAX_QUERY:
            raise OptionError(f"the query of the address has {len(query)} characters; at most {MAX_QUERY}.")
        options, by_step = self, ""
        for name, text in parse_qsl(query, keep_blank_values=True):
            if name == "answers":
                if text not in (CHUNK, STEP):
                    raise OptionError(f"answers={shown(text)}; there is answers=chunk and answers=step.")
                options = replace(options, answers=text)
            elif name == "open_loop":
                options, by_step = replace(options, open_loop=_whole(name, text, 1, 10_000)), name
            elif name == "seed":
                options = replace(options, seed=_whole(name, text, 0, 2**63 - 1))
            elif name == "ensemble":
                options, by_step = replace(options, ensemble=_weight(text)), name
        if by_step and (options.answers or answers) != STEP:
            raise OptionError(f"{by_step} is of sessions that answer step by step; add answers=step.")
        return options


def _whole(name: str, text: str, low: int, high: int) -> int:
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= 19 else -1
    if not low <= value <= high:
        raise OptionError(f"{name}={shown(text)}; expected a whole number from {low} to {high}.")
    return value


def _weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise OptionError(f"ensemble={shown(text)}; expected a number from 0 to 100.")
    return value
