"""Lists a corpus in a decoder process: metadata of strangers is read by libraries that may crash, hang or eat memory."""

from __future__ import annotations

from collections.abc import Iterator

from defi_platform.data.decode.messages import ListingJob
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sources.listing_steps import Item, ListingPage
from defi_platform.data.sources.records import Place, Reading, Refusal
from defi_platform.errors import CorpusError

STOPS = {
    "timeout": "takes longer than decode.timeout_s",
    "memory": "needs more memory than decode.memory_mb",
    "crash": "kills the process that does it",
}
"""Reasons for which a decoder process ends."""


def listed(pool: DecoderPool, source: str, root: str, fps: float | None) -> Iterator[Item]:
    """Yields what a corpus lists; a file that ends the process that reads it is rejected.

    Args:
        pool: of one process.
        source: key of `formats.FORMATS`.
        root: of the corpus.
        fps: see `formats.listing`.

    Raises: what the listing raises; CorpusError where it ends its process and no single file is to blame.
    """
    place, refusal, reading = Place(), None, False
    while True:
        (page,) = pool.run([ListingJob(source, root, fps, place, refusal)])
        if isinstance(page, BadVideo):
            why = STOPS.get(page.reason, page.message)
            if not reading or refusal is not None:
                detail = f" ({page.message})" if page.reason == "crash" else ""
                raise CorpusError(
                    f"{root} cannot be listed as {source}: reading its metadata {why}{detail}. "
                    "Check the corpus's own metadata, or raise decode.timeout_s or decode.memory_mb."
                )
            refusal = Refusal(f"reading it {why}")
            continue
        assert isinstance(page, ListingPage)
        for item in page.items:
            place = place.after(item)
            reading = isinstance(item, Reading)
            if isinstance(item, Reading):
                refusal = None
            else:
                yield item
        if page.error is not None:
            raise page.error
        if page.ended:
            return
