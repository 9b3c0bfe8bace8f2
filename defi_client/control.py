"""The control loop: one episode of a policy on a robot, at a fixed rate.

Every step executes the next action of the chunks at hand, or holds. Answers are waited for by another thread, so a
server that is slow, gone or wrong costs no step its time.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from defi_client.asker import Asked, Asker
from defi_client.chunks import Chunks
from defi_client.connection import Connection
from defi_client.errors import (
    AddressError,
    BusyError,
    ClientError,
    LostError,
    RecordError,
    StoppedError,
    UnreachableError,
    UnsafeActionError,
    one_line,
)
from defi_client.limits import Limits
from defi_client.pacing import Pacer
from defi_client.robot import MakeObservation, Robot, check_fits, openpi_observation

if TYPE_CHECKING:
    from defi_client.recording.recorder import Recorder

OUR_PROTOCOL = "openpi-websocket"
"""Named in the greeting of this project's server, which reads `deadline_ms` and `episode` too."""
RECENT = 20
"""Answers by whose slowest the next is asked for in time."""

_TOO_LATE = re.compile(r"no answer within")


@dataclass(frozen=True)
class Execution:
    """Rate of the control loop, and its use of chunks."""

    rate_hz: float = 10.0
    """Control steps per second: that of the training data."""
    execute_steps: int | None = None
    """Actions of a chunk that are executed before the next one takes over; None: as many as the policy says, or all."""
    overlap: bool = True
    """Ask for the next chunk while the last is carried out, so early that it comes in time. False: the robot holds
    while the policy thinks."""
    ensemble: float | None = None
    """m of temporal ensembling (`Chunks`); asks as often as it can, or every `execute_steps`."""
    answer_within_s: float | None = None
    """Seconds from an observation to its answer after which the answer is dropped, and a new observation sent; None:
    as long as the chunk's actions last."""
    give_up_s: float = 30.0
    """Seconds without an action, which the robot holds its position, after which the episode ends with an error."""
    max_refused: int = 3
    """Answers in a row that cannot be used, after which the episode ends with an error."""

    def __post_init__(self) -> None:
        if self.execute_steps is not None and self.execute_steps < 1:
            raise ValueError(f"execute_steps is {self.execute_steps}; it must be 1 or more.")
        if self.ensemble is not None and not self.overlap:
            raise ValueError("ensemble averages chunks that overlap; set overlap too.")
        for name in ("rate_hz", "answer_within_s", "give_up_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be more than 0.")
        if not math.isfinite(self.rate_hz):
            raise ValueError(f"rate_hz is {self.rate_hz}; it must be finite.")
        if self.max_refused < 1:
            raise ValueError(f"max_refused is {self.max_refused}; it must be 1 or more.")


@dataclass
class EpisodeResult:
    """Summary of an episode."""

    ended: str = ""
    """"done", "max_steps" or "stopped"."""
    steps: int = 0
    """Actions executed."""
    held: int = 0
    """Control steps at which the robot held its position for want of an action."""
    asked: int = 0
    late: int = 0
    """Answers that came too late and were dropped."""
    refused: int = 0
    """Answers that could not be used, and actions that were refused."""
    lost: int = 0
    """Requests that were lost with their connection, or met no server."""
    limited: Counter[str] = field(default_factory=Counter)
    """Actions that a limit changed: "range", "box", "speed"."""
    latency_ms: list[float] = field(default_factory=list)
    """From each observation to its answer."""
    jitter_ms: dict[str, float] = field(default_factory=dict)
    """How late control steps began."""
    overruns: int = 0
    """Control steps whose own work took longer than a period."""
    policies: list[str] = field(default_factory=list)
    """Digests of the policies that answered; more than one: it was changed meanwhile."""
    wall_s: float = 0.0


def run_episode(
    robot: Robot,
    connection: Connection,
    instruction: str,
    *,
    max_steps: int,
    execution: Execution | None = None,
    limits: Limits | None = None,
    done: Callable[[], bool] = lambda: False,
    recorder: Recorder | None = None,
    observation: MakeObservation = openpi_observation,
) -> EpisodeResult:
    """Lets a policy drive a robot until it is done; the robot holds its position afterwards, whatever happens.

    Args:
        robot: to be driven.
        connection: to the policy's server.
        instruction: what to do.
        max_steps: actions after which the episode ends.
        execution: rate and use of chunks.
        limits: of the actions; None: only NaN, infinity and another width are refused.
        done: asked before every control step.
        recorder: gets what is executed; an episode that ends with an error is recorded as far as it went.
        observation: makes the map that the server reads.

    Raises:
        FitError: the policy gives other actions or needs other cameras or states, or the limits are for another robot;
            nothing has moved.
        StoppedError: no usable answer for `give_up_s`, or `max_refused` in a row.
        AddressError: the server asks for another token now.
        RecordError: the recorder has other cameras or another rate; nothing has moved.
    """
    check_fits(connection.metadata, robot, connection.url)
    execution, limits = execution or Execution(), limits or Limits()
    limits.check_fits(robot.action_dim, robot.state_dim)
    rate_hz = execution.rate_hz
    if recorder is not None and recorder.fps != rate_hz:
        raise RecordError(
            f"the recording has {recorder.fps} frames a second, the control loop {rate_hz} steps."
        )
    loop = _Loop(robot, connection, instruction, execution, limits, observation)
    result, begun = loop.result, time.monotonic()
    # All of it happens whatever else fails, the last first: a robot that is lost cannot hold either.
    with contextlib.ExitStack() as afterwards:
        afterwards.callback(loop.asker.close)
        if recorder is not None:
            recorder.begin(instruction, robot.images())
            afterwards.callback(recorder.end)
        afterwards.callback(robot.hold)
        try:
            loop.run(max_steps, done, recorder)
        except StoppedError as error:
            result.ended = "stopped"
            error.result = result
            raise
        finally:
            result.wall_s = time.monotonic() - begun
            result.jitter_ms = loop.pacer.jitter_ms()
            result.overruns = loop.pacer.overruns
    return result


class _Loop:
    """An episode as it stands."""

    def __init__(
        self,
        robot: Robot,
        connection: Connection,
        instruction: str,
        execution: Execution,
        limits: Limits,
        observation: MakeObservation,
    ) -> None:
        self.result = EpisodeResult()
        self.pacer = Pacer(execution.rate_hz)
        self._robot, self._instruction, self._observation = robot, instruction, observation
        self._execution, self._limits, self._url = execution, limits, connection.url
        self._ours = connection.metadata.get("protocol") == OUR_PROTOCOL
        self._episode = f"{time.time_ns():x}"
        terms = connection.metadata.get("action")
        said = terms.get("execute_steps") if isinstance(terms, dict) else None
        self._said = said if isinstance(said, int) and said > 0 else None
        self._chunks = Chunks(execution.ensemble)
        self.asker = Asker(connection)
        self._chunk = 0
        """Actions of the newest chunk."""
        self._last: np.ndarray[Any, Any] | None = None
        self._refused = 0
        self._problem = "the server has not answered yet"
        self._ask_at = 0.0
        self._holding: float | None = None

    def run(self, max_steps: int, done: Callable[[], bool], recorder: Recorder | None) -> None:
        result = self.result
        while True:
            self.pacer.wait()
            if done():
                result.ended = "done"
                return
            if result.steps >= max_steps:
                result.ended = "max_steps"
                return
            # Copies: drivers fill the same arrays again, and a question is sent, a frame encoded, in another thread.
            state = np.array(self._robot.state(), np.float64)
            answer = self.asker.taken()
            if answer is not None:
                self._receive(answer)
            asks = self._should_ask()
            images = (
                {name: np.array(image) for name, image in self._robot.images().items()}
                if asks or recorder is not None
                else {}
            )
            if asks:
                self._ask(images, state)
            action = self._next(state)
            if action is None:
                self._hold()
                continue
            self._robot.execute(action.copy())
            result.steps += 1
            self._last, self._holding, self._refused = action, None, 0
            if recorder is not None:
                recorder.add(images, state, action)

    # ------------------------------------------------------------------ asking

    def _should_ask(self) -> bool:
        if self.asker.waiting or time.monotonic() < self._ask_at:
            return False
        newest = self._chunks.newest
        if newest is None:
            return True
        return self.result.steps - newest >= max(1, self._per_chunk() - self._lead())

    def _per_chunk(self) -> int:
        """Actions of the newest chunk that are executed before the next takes over."""
        usual = 1 if self._execution.ensemble is not None else self._said
        return min(self._execution.execute_steps or usual or self._chunk, self._chunk)

    def _lead(self) -> int:
        """Steps before it is needed at which a chunk is asked for."""
        latency = self.result.latency_ms[-RECENT:]
        if not self._execution.overlap or not latency:
            return 0
        return math.ceil(max(latency) / 1e3 / self.pacer.period_s) + 1

    def _ask(self, images: dict[str, Any], state: np.ndarray[Any, Any]) -> None:
        observation = self._observation(images, state, self._instruction)
        if self._ours:
            observation["episode"] = self._episode
            within_s = self._execution.answer_within_s
            if within_s is not None:
                observation["deadline_ms"] = 1e3 * within_s
        self.result.asked += 1
        self.asker.ask(self.result.steps, observation)

    # ------------------------------------------------------------------ answers

    def _receive(self, asked: Asked) -> None:
        if asked.error is not None:
            self._without_actions(asked.error)
            return
        assert asked.actions is not None and asked.answer is not None
        digest = asked.answer.get("policy_digest")
        if isinstance(digest, str) and digest not in self.result.policies:
            self.result.policies.append(digest)
        within_s = self._execution.answer_within_s
        if within_s is None:
            within_s = len(asked.actions) * self.pacer.period_s
            # The first answer finds a robot that waits for it: nothing has moved meanwhile.
            within_s = math.inf if asked.number == self.result.steps else within_s
        # A step that stalled lets an answer that was quick grow old; the period until it is taken is no delay.
        age_s = max(asked.latency_s, time.monotonic() - asked.asked_at - self.pacer.period_s)
        if age_s > within_s:
            self.result.late += 1
            self._problem = f"its answer took {age_s:.3f} s, {within_s:.3f} s are allowed"
            return
        if asked.actions.shape[1] != self._robot.action_dim:
            words = f"it gives {asked.actions.shape[1]} action dims, the robot takes {self._robot.action_dim}"
            self._refuse(words)
            return
        self.result.latency_ms.append(1e3 * asked.latency_s)
        self._chunk = len(asked.actions)
        self._chunks.add(asked.number, asked.actions)

    def _without_actions(self, error: ClientError) -> None:
        if isinstance(error, AddressError):
            raise error
        if isinstance(error, BusyError):
            self._ask_at = time.monotonic() + error.retry_after_s
        elif _TOO_LATE.search(str(error)):
            self.result.late += 1
        elif isinstance(error, (LostError, UnreachableError)):
            self.result.lost += 1
        else:
            self._refuse(one_line(error))
            return
        self._problem = one_line(error)

    def _refuse(self, words: str) -> None:
        self.result.refused += 1
        self._refused += 1
        self._problem = words
        if self._refused >= self._execution.max_refused:
            raise self._stopped(f"gave nothing that can be used, {self._refused} times in a row")

    # ------------------------------------------------------------------ actions

    def _next(self, state: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        number, newest = self.result.steps, self._chunks.newest
        if newest is None:
            return None
        if not self._execution.overlap and number - newest >= self._per_chunk():
            return None  # the next chunk is waited for
        action = self._chunks.action(number)
        if action is None:
            return None
        try:
            safe, changed = self._limits.applied(action, state, self._last, self.pacer.period_s)
        except UnsafeActionError as error:
            self._chunks.clear()
            self._refuse(one_line(error))
            return None
        self.result.limited.update(changed)
        return safe

    def _hold(self) -> None:
        self._robot.hold()
        self.result.held += 1
        self._last = None if self._last is None else self._limits.after_hold(self._last)
        now = time.monotonic()
        self._holding = now if self._holding is None else self._holding
        if now - self._holding >= self._execution.give_up_s:
            raise self._stopped(f"gave no action for {now - self._holding:.1f} s")

    def _stopped(self, words: str) -> StoppedError:
        return StoppedError(
            f"the policy server at {self._url} {words}: {self._problem.rstrip('.')}. The robot holds its position after "
            f"{self.result.steps} actions."
        )
