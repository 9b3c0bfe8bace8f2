"""Which sample numbers fall to which rank: arithmetic, so that stopping and world size can change at will."""

from __future__ import annotations

from collections.abc import Iterator


def micro_batches(
    start: int, stop: int, rank: int, world_size: int, global_batch: int, micro_batch: int
) -> Iterator[range]:
    """The micro-batches of `rank`, each a range of sample numbers, in order.

    Args:
        start, stop: samples start .. stop - 1; a last step that is not full is cut the same way, so that some
            ranks may get less of it or nothing.

    Raises: ValueError when global_batch is not world_size * micro_batch * a whole number, or rank is not one.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of a world of {world_size}")
    if micro_batch < 1 or global_batch < 1 or global_batch % (world_size * micro_batch):
        raise ValueError(
            f"global_batch={global_batch} is not world_size={world_size} x micro_batch={micro_batch} x a whole number"
        )
    return _pieces(start, stop, rank, global_batch // world_size, global_batch, micro_batch)


def _pieces(
    start: int, stop: int, rank: int, share: int, global_batch: int, micro_batch: int
) -> Iterator[range]:
    for step in range(start, stop, global_batch):
        first = step + rank * share
        for low in range(first, first + share, micro_batch):
            piece = range(low, min(low + micro_batch, first + share, stop))
            if len(piece):
                yield piece
