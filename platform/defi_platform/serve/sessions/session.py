"""One client's session: its episode, seeds and kept chunk, between the wire protocol and the policy."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import secrets
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from defi_platform.serve.observation import (
    DEADLINE_KEY,
    SEED_BITS,
    SLACK_KEY,
    Observation,
    image_keys,
    read_episode,
    read_milliseconds,
    read_observation,
)
from defi_platform.serve.observation_keys import ObservationKeys, find
from defi_platform.serve.refusals import ObservationError
from defi_platform.serve.sessions.decoding import in_thread, is_work
from defi_platform.serve.sessions.kept_chunks import KeptChunks
from defi_platform.serve.sessions.options import STEP, SessionOptions
from defi_platform.serve.wording import described

if TYPE_CHECKING:
    from defi_platform.serve.inference.service import ActionService


_numbers = itertools.count()
"""Of the sessions of this process: by its number the service knows who comes back."""


@dataclass(frozen=True)
class SessionAnswer:
    """Actions and what they cost, for one observation."""

    actions: NDArray[np.float32]
    """(chunk, A) float32 in raw units; (A,) step by step."""
    seed: int
    """Of the chunk that the actions are from."""
    timing: dict[str, Any]
    """queue_ms, infer_ms, batch_size, total_ms; step by step also open_loop_step, the action's place in its chunk."""
    ignored: tuple[str, ...] = ()
    """Keys of the observation that the policy has no use for."""

    def reply(self, digest: str) -> dict[str, Any]:
        """The answer as a map; its actions are an array.

        Args:
            digest: of the policy.
        """
        answer: dict[str, Any] = {
            "actions": self.actions,
            "seed": self.seed,
            "policy_digest": digest,
            "server_timing": self.timing,
        }
        if self.ignored:
            answer["ignored"] = list(self.ignored)
        return answer


class Session:
    """Answers the observations of one client. One at a time, on the loop of the service."""

    def __init__(
        self,
        service: ActionService,
        options: SessionOptions,
        keys: ObservationKeys,
        *,
        answers: str,
        client: Hashable | None = None,
    ) -> None:
        """Begins without an episode.

        Args:
            service: runs the policy.
            options: of the session.
            keys: where an observation's parts are in a message.
            answers: "chunk" or "step", where the options leave it open.
            client: whose it is, where one client has many short sessions.
        """
        self.service = service
        self.keys = keys
        self._client: Hashable = next(_numbers) if client is None else client
        self.steps = (options.answers or answers) == STEP
        """One action with each answer."""
        said = service.spec.action.get("execute_steps")
        usual = said if isinstance(said, int) and said > 0 else service.spec.chunk
        if options.ensemble is not None and usual >= service.spec.chunk:
            usual = 1  # no two chunks would speak of the same step
        open_loop = options.open_loop or usual
        self._chunks = KeptChunks(open_loop, options.ensemble)
        self._expiry_s = options.expiry_s
        self._seed = secrets.randbits(63) if options.seed is None else options.seed
        self._episode: str | int | None = None
        self._episodes = 0
        self._inferences = 0
        self._chunk_seed = 0
        self._prompt: Any = None
        """Of the kept chunks."""
        self._last = time.monotonic()
        self.observed = False
        """An observation of the present episode has been answered."""

    def start_episode(self) -> None:
        """Starts over: the kept chunk is dropped, and the seeds are another episode's."""
        self._episodes += 1
        self._inferences = 0
        self._chunks.clear()
        self.observed = False

    def end_episode(self) -> None:
        """Forgets the episode; what comes next belongs to another."""
        self._chunks.clear()
        self.observed = False

    def begins_episode(self, message: Any) -> bool:
        """Whether a message names another episode than the one that is running.

        Args:
            message: an observation, as it came.

        Raises:
            ObservationError: its `episode` is not one.
        """
        episode = read_episode(message) if isinstance(message, Mapping) else None
        return episode is not None and episode != self._episode

    async def answer(self, message: Any) -> SessionAnswer:
        """The actions of an observation.

        Args:
            message: the unpacked observation, as `read_observation` takes it.

        Raises:
            Refusal: it does not fit, or gets no action now.
        """
        arrived = time.perf_counter()
        if not isinstance(message, Mapping):
            raise ObservationError(f"an observation is a map of keys to values, got {described(message)}.")
        if self.begins_episode(message):
            self._episode = read_episode(message)
            self.start_episode()
        now = time.monotonic()
        prompt = find(message, self.keys.prompt)
        if now - self._last > self._expiry_s or (isinstance(prompt, str) and prompt != self._prompt):
            self._chunks.clear()  # too old, or of another instruction
        self._last = now
        if self.steps and (action := self._chunks.next()) is not None:
            return SessionAnswer(action, self._chunk_seed, self._timing(arrived))
        seed = self._next_seed()
        observation = await self._read(message, seed)
        answer = await self.service.act(observation, session=self._client, **_limits(message))
        self._inferences += 1
        self.observed = True
        actions, place = answer.actions, {}
        if self.steps:
            self._chunks.add(answer.actions)
            self._chunk_seed = observation.seed
            self._prompt = observation.prompt
            first = self._chunks.next()
            assert first is not None  # a chunk has an action
            actions, place = first, {"open_loop_step": 0}
        timing = {
            "queue_ms": answer.queue_ms,
            "infer_ms": answer.infer_ms,
            "batch_size": answer.batch_size,
            "total_ms": (time.perf_counter() - arrived) * 1e3,
        }
        return SessionAnswer(actions, observation.seed, timing | place, observation.ignored)

    async def answer_batch(self, messages: Sequence[Any]) -> list[SessionAnswer]:
        """The actions of several observations of one client, each on its own as far as the policy knows.

        Args:
            messages: unpacked observations.

        Raises:
            Refusal: one of them does not fit, or gets no action now; names its place. None is answered then.
        """
        arrived = time.perf_counter()
        if self.steps:
            raise ObservationError("a batch is answered in whole chunks; this session answers step by step.")
        observations = []
        for place, message in enumerate(messages):
            try:
                if not isinstance(message, Mapping):
                    raise ObservationError(f"an observation is a map, got {described(message)}.")
                observations.append((await self._read(message, self._next_seed()), _limits(message)))
            except ObservationError as error:
                raise ObservationError(f"batch[{place}]: {error}") from error
            self._inferences += 1
        tasks = [
            asyncio.ensure_future(self.service.act(seen, session=(self._client, place), **limits))
            for place, (seen, limits) in enumerate(observations)
        ]
        try:
            answers = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        self.observed = True
        total = {"total_ms": (time.perf_counter() - arrived) * 1e3}
        return [
            SessionAnswer(
                answer.actions,
                seen.seed,
                {"queue_ms": answer.queue_ms, "infer_ms": answer.infer_ms, "batch_size": answer.batch_size}
                | total,
                seen.ignored,
            )
            for (seen, _), answer in zip(observations, answers, strict=True)
        ]

    def state(self) -> dict[str, Any]:
        """Everything a successor in another process needs to go on, as plain values."""
        return {
            "digest": self.service.digest,
            "seed": self._seed,
            "episode": self._episode,
            "episodes": self._episodes,
            "inferences": self._inferences,
            "chunk_seed": self._chunk_seed,
            "observed": self.observed,
            "steps": self.steps,
            "kept": self._chunks.state(),
            "prompt": self._prompt,
            "age_s": time.monotonic() - self._last,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on where another process stopped; a chunk of another policy is dropped.

        Args:
            state: of `state()`.
        """
        self._seed = state["seed"]
        self._episode = state["episode"]
        self._episodes = state["episodes"]
        self._inferences = state["inferences"]
        self._chunk_seed = state["chunk_seed"]
        self.observed = state["observed"]
        self.steps = state["steps"]  # what its client has been getting, whatever the server says to new ones
        if state["digest"] == self.service.digest:
            self._chunks.resume(state["kept"])
            self._prompt = state["prompt"]
        self._last = time.monotonic() - state["age_s"]

    async def _read(self, message: Mapping[Any, Any], seed: int) -> Observation:
        spec, keys, begun = self.service.spec, self.keys, time.perf_counter()
        if is_work(message, image_keys(message, spec, keys)):
            observation = await in_thread(lambda: read_observation(message, spec, keys, seed))
        else:
            observation = read_observation(message, spec, keys, seed)
        self.service.decoded((time.perf_counter() - begun) * 1e3)
        return observation

    def _next_seed(self) -> int:
        """The seed of an observation that has none: the same for the same session seed, episode and number."""
        text = f"{self._seed}/{self._episodes}/{self._inferences}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> (64 - SEED_BITS)

    def _timing(self, arrived: float) -> dict[str, Any]:
        return {
            "queue_ms": 0.0,
            "infer_ms": 0.0,
            "batch_size": 0,
            "total_ms": (time.perf_counter() - arrived) * 1e3,
            "open_loop_step": self._chunks.open_loop_step - 1,
        }


def _limits(message: Mapping[Any, Any]) -> dict[str, float | None]:
    return {
        SLACK_KEY: read_milliseconds(message, SLACK_KEY),
        DEADLINE_KEY: read_milliseconds(message, DEADLINE_KEY),
    }
