"""Batches in the exact order of the plan: a stream decoded on Ray Data, or local batches without it.

B samples of a micro-batch, T frames, V cameras, H x W pixels, A actions, P proprioception. Pixels stay uint8.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import ray.data
import torch

from defi_platform import roles
from defi_platform.config import DataConfig
from defi_platform.data.latents.cache import CacheLocation
from defi_platform.data.loader.sample_decoder import SampleDecoder
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.sharding import Shard

ACTOR_CPUS = 0.05
"""Logical CPUs of a decode actor. Train workers hold whole ones; a decoder that needed a whole CPU
besides would wait for ever on a small machine."""

MAX_BATCHES_PER_EXECUTION = 2048
"""Micro-batches per Ray Data execution. Its input blocks are made up front, so an endless run is cut."""

STATS_EVERY_S = 60.0

TEXT_COLUMNS = ("text", "video_id", "corpus", "skipped")


def stream(
    plan: Plan,
    data: DataConfig,
    shard: Shard,
    *,
    cache: CacheLocation | None = None,
    keep_stats: Callable[[str], None] | None = None,
    run: str | None = None,
) -> Iterable[dict[str, Any]]:
    """Micro-batches of a shard, in order.

    The decode actors start with the first batch, which takes seconds; see `local_batches`.

    Args:
        plan: what each sample number is.
        data: frame size, decoder settings and strictness.
        shard: sample numbers of this rank.
        cache: a micro-batch whose videos are all in it comes without `frames`, with `latents` float (B, T, C, h, w)
            or `features` float (B, T, L, D) in their place.
        keep_stats: is called with the samples per second and Ray Data's statistics (time, memory, rows of its
            operators), every STATS_EVERY_S seconds and when the stream ends.
        run: folder of the run that the samples are counted for in metrics; None: they are not.

    Yields: dicts of
        frames: uint8 (B, T, H, W, 3) for clips and pairs, or for chunks
        images: uint8 (B, V, H, W, 3), actions: float32 (B, chunk, A), action_mask: bool (B, chunk), False past
            the episode's end, proprio: float32 (B, P) where the corpus has it;
        text, video_id, corpus: list[str]; sample: int64 (B,), the numbers k;
        skipped: list[str], per sample the reasons of the bad videos it stands in for, "" where there were none.

    Raises: CorpusError, inside Ray's own error, when `data.strict` meets a bad video or a corpus has run out of good
        ones.
    """
    return _executions(plan, data, cache, run, keep_stats, shard.micro_batches())


def local_batches(
    plan: Plan, data: DataConfig, shard: Shard, *, cache: CacheLocation | None = None
) -> Iterator[dict[str, Any]]:
    """Micro-batches of a shard as `stream` gives them, decoded in subprocesses and without Ray.

    For a few batches that are waited for, such as those of a validation: it starts in a tenth of a second.

    Args:
        plan: what each sample number is.
        data: frame size, decoder settings and strictness.
        shard: sample numbers to decode.
        cache: as for `stream`.

    Raises: CorpusError as `stream`, but not wrapped.
    """
    with contextlib.closing(SampleDecoder(plan, data, cache)) as decoder:
        for piece in shard.micro_batches():
            yield _torch(decoder({name: np.array([getattr(piece, name)]) for name in ("start", "stop")}))


def _executions(
    plan: Plan,
    data: DataConfig,
    cache: CacheLocation | None,
    run: str | None,
    keep_stats: Callable[[str], None] | None,
    pieces: Iterator[range],
) -> Iterator[dict[str, Any]]:
    while execution := [piece for _, piece in zip(range(MAX_BATCHES_PER_EXECUTION), pieces, strict=False)]:
        dataset = _decoded(plan, data, cache, run, execution)
        batches = dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)
        yield from map(_torch, _observed(batches, dataset, keep_stats) if keep_stats else batches)


def _observed(
    batches: Iterable[dict[str, Any]], dataset: ray.data.Dataset, keep_stats: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The same batches; statistics are handed to `keep_stats` now and then, and at the end."""
    reported = started = time.monotonic()
    seen = 0

    def report() -> None:
        seconds = time.monotonic() - started
        keep_stats(
            f"{seen} samples in {seconds:.1f} s, {seen / seconds:.2f} per second\n\n{dataset.stats()}\n"
        )

    try:
        for batch in batches:
            seen += len(batch["sample"])
            yield batch
            if time.monotonic() - reported > STATS_EVERY_S:
                reported = time.monotonic()
                report()
    finally:
        report()


def _decoded(
    plan: Plan, data: DataConfig, cache: CacheLocation | None, run: str | None, pieces: list[range]
) -> ray.data.Dataset:
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # One block per micro-batch, made here: other constructors send a task of a whole CPU to inspect each block.
    items = [{"start": piece.start, "stop": piece.stop} for piece in pieces]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    context = dataset.context
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # One block in, one block out: a micro-batch reaches the trainer as soon as it is decoded.
    context.target_max_block_size = None
    return dataset.map_batches(
        SampleDecoder,
        fn_constructor_args=(plan, replace(data, decode=replace(data.decode, processes=1)), cache, run),
        batch_size=None,
        batch_format="numpy",
        zero_copy_batch=True,
        # Two calls at a time, of which one decodes while the other's frames go to the object store.
        compute=ray.data.ActorPoolStrategy(
            size=min(data.decode.processes, len(pieces)), max_concurrent_calls_per_actor=2
        ),
        **roles.options(roles.DECODE, share=ACTOR_CPUS),
    )


def _torch(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Numpy columns as tensors and lists; copied, because Ray's memory is read-only."""
    return {
        name: [str(value) for value in column] if name in TEXT_COLUMNS else torch.from_numpy(np.array(column))
        for name, column in batch.items()
    }
