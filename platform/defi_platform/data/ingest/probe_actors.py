"""Opens every file once on Ray, in processes that can be killed, and stores the results block by block."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import PIL
import ray

from defi_platform import roles
from defi_platform.cluster import ray_session
from defi_platform.cluster.actors import kill_all
from defi_platform.config import DecodeConfig, RayConfig
from defi_platform.data.decode.messages import Probe, ProbeJob
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.decode.video_readers import pyav_release
from defi_platform.data.ingest.probe_results import ProbeResult, ResultBlocks, limit_of
from defi_platform.data.rejection import TRANSIENT_REASON, BadVideo
from defi_platform.data.sources.uri import parse
from defi_platform.errors import TRY_AGAIN, UserError
from defi_platform.storage.remote import StorageUnavailable

LARGEST_BLOCK = 256
"""Most files that one task opens: what a killed actor has to do again."""

BLOCKS_PER_ACTOR = 8
"""At least so many blocks each, so that all actors end at about the same time."""

FEW_FILES = 16
"""Up to so many are opened from this process: actors would start for longer than that takes."""

PROBER_CPUS = 0.1
"""Logical CPUs of a probing actor: small, so that ingest never waits for trainers that hold the rest."""

STORAGE_FAILURES = 16
"""Files in a row whose store fails after which the store, and not the files, is taken to be down."""

UNOPENED = frozenset(
    {"missing", "empty", "not_video", "lfs_pointer", "storage", "bad_source", "no_text", "duplicate"}
)
"""Reasons that are found before any decoder sees the file."""


class ProbersLost(UserError):
    """Probing actors that died more often than they are started again: of memory, of lost nodes, of a node's disk."""

    exit_code = TRY_AGAIN


@dataclass(frozen=True)
class ProbeRequest:
    """A file to open."""

    uri: str
    version: str
    attempts: int
    """Counts this one."""
    screen: bool
    """Whether to score its frames."""


class OutageDetector:
    """Detects that a store is down: its failures are no longer about single files.

    Args:
        answered: whether the store has given files of this corpus before.
        allowed: failures in a row that may still be the files' own, such as a few that are forbidden.
    """

    def __init__(self, answered: bool, allowed: int = STORAGE_FAILURES) -> None:
        self._allowed = allowed
        self._row = 0
        self._answered = answered

    def down(self, result: ProbeResult) -> str | None:
        """Takes note of a result. Returns: why to stop, or None to go on."""
        if result.bad is None or result.bad.reason != TRANSIENT_REASON:
            self._row, self._answered = 0, True
            return None
        self._row += 1
        return result.bad.message if self._row >= self._allowed else None

    def nothing_answered(self) -> bool:
        """Returns whether no file of the corpus ever came."""
        return self._row > 0 and not self._answered


def probe_files(
    todo: Iterable[ProbeRequest],
    count: int,
    limits: DecodeConfig,
    folder: str,
    answered: bool,
    pool: DecoderPool | None = None,
) -> Iterator[ProbeResult]:
    """Opens files on Ray; yields results as they come, each stored below `folder` before.

    Args:
        todo: the files.
        limits: of the decoder processes.
        count: how many files there are to open.
        folder: of the corpus within the manifest.
        answered: whether files of this corpus have been opened before.
        pool: that opens few files; None: one of its own.

    Raises: StorageUnavailable when the store is down or refuses everything: then no file is to blame. ProbersLost
        when the probing processes die again and again.
    """
    if not count:
        return
    outage = OutageDetector(answered)
    last = ""
    results = (
        _here(todo, limits, folder, pool)
        if count <= FEW_FILES
        else on_actors(Prober, (limits, folder), todo, count)
    )
    for result in results:
        last = outage.down(result) or last
        if last:
            raise StorageUnavailable(_store_is_down(last))
        yield result
        failed = result.bad
    if outage.nothing_answered() and failed is not None:
        raise StorageUnavailable(_store_is_down(failed.message))


def _store_is_down(message: str) -> str:
    return (
        f"the store fails for every file that is asked for, last: {message} "
        "Nothing was put into quarantine; start the ingest again when it answers, and it goes on from here."
    )


def on_actors(actor: Any, arguments: tuple[Any, ...], todo: Iterable[Any], count: int) -> Iterator[Any]:
    """Yields what actors on Ray make of requests, as it comes.

    Args:
        actor: class whose `probe` takes a list of requests and returns a list of results.
        arguments: of its constructor.
        todo: the requests.
        count: how many there are.

    Raises: ProbersLost when the actors die again and again; what `probe` raises, if it is a UserError.
    """
    with ray_session(RayConfig()):
        cpus = max(1, int(roles.capacity(roles.DECODE, "CPU")))
        probers = min(cpus, -(-count // FEW_FILES))
        # Spread: Ray would otherwise fill one machine with actors that ask for so little.
        remote = ray.remote(
            max_restarts=3,
            max_task_retries=3,
            scheduling_strategy="SPREAD",
            **roles.options(roles.DECODE, share=PROBER_CPUS),
        )(actor)
        actors = [remote.remote(*arguments) for _ in range(probers)]
        pool = ray.util.ActorPool(actors)
        try:
            # Not `map_unordered`, which takes all blocks at once: millions of files would wait in this process.
            for block in _blocks(todo, min(LARGEST_BLOCK, max(1, count // (probers * BLOCKS_PER_ACTOR)))):
                results = [] if pool.has_free() else pool.get_next_unordered()
                pool.submit(lambda actor, some: actor.probe.remote(some), block)
                yield from results
            while pool.has_next():
                yield from pool.get_next_unordered()
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            # Without its ids and the places in Ray's code.
            why = " ".join(line for line in str(error).splitlines() if not line[:1].isspace())
            raise ProbersLost(
                f"a probing actor died again and again: {why} "
                "Start the ingest again (what was opened is kept), with more memory or fewer CPUs for it."
            ) from error
        finally:
            kill_all(actors)


def _here(
    todo: Iterable[ProbeRequest], limits: DecodeConfig, folder: str, pool: DecoderPool | None
) -> Iterator[ProbeResult]:
    prober = Prober(limits, folder, pool)
    try:
        for request in todo:
            yield from prober.probe([request])
    finally:
        if pool is None:
            prober.close()


def _blocks(todo: Iterable[ProbeRequest], size: int) -> Iterator[list[ProbeRequest]]:
    files = iter(todo)
    while block := list(itertools.islice(files, size)):
        yield block


class Prober:
    """Probes blocks of files in its own decoder process, and stores the results.

    Args:
        limits: of the decoder process.
        folder: of the corpus within the manifest.
        pool: in place of a process of its own.
    """

    def __init__(self, limits: DecodeConfig, folder: str, pool: DecoderPool | None = None) -> None:
        self._limits = limits
        self._pool = pool or one_process(limits)
        self._blocks = ResultBlocks(folder)

    def close(self) -> None:
        """Ends the decoder process."""
        self._pool.close()

    def probe(self, block: list[ProbeRequest]) -> list[ProbeResult]:
        """Opens the files of a block."""
        answers = self._pool.run([ProbeJob(request.uri, score_frames=request.screen) for request in block])
        results = [
            self._result(request, answer)  # type: ignore[arg-type]
            for request, answer in zip(block, answers, strict=True)
        ]
        name = hashlib.sha256("\n".join(f"{r.uri}\t{r.version}" for r in block).encode()).hexdigest()[:16]
        self._blocks.write(name, (r for r in results if r.bad is None or r.bad.reason != TRANSIENT_REASON))
        return results

    def _result(self, request: ProbeRequest, answer: Probe | BadVideo) -> ProbeResult:
        limit = limit_of(answer.reason, self._limits) if isinstance(answer, BadVideo) else None
        return ProbeResult(request.uri, request.version, answer, request.attempts, limit)


def one_process(limits: DecodeConfig) -> DecoderPool:
    """A pool of one process, started by its first job: how many there are is decided by the CPUs of the cluster."""
    return DecoderPool(dataclasses.replace(limits, processes=1))


def opened_with(uri: str, problem: BadVideo) -> str:
    """Names the decoder, with its release, that found `problem`; "" where the file was not decoded."""
    if problem.reason in UNOPENED:
        return ""
    stored = parse(uri).kind not in ("file", "range")
    return f"pillow {PIL.__version__}" if stored else pyav_release()
