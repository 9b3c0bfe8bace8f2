"""A listing taken page by page, which another process may go on with: where it is, is all that has to be known of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from defi_platform.data.sources.formats import steps
from defi_platform.data.sources.records import (
    ListingProgress,
    Note,
    Place,
    Reading,
    Refusal,
    RejectedRecord,
    Steps,
    VideoRecord,
)
from defi_platform.errors import CorpusError, UserError

PAGE_ITEMS = 1_000
PAGE_S = 1.0

LISTED = Refusal("", listed=True)

Item = VideoRecord | RejectedRecord | Note | ListingProgress


@dataclass(frozen=True)
class ListingPage:
    """The next items of a listing."""

    items: tuple[Item | Reading, ...]
    """A `Reading` is the last of its page; what comes of its file starts the next one."""
    ended: bool
    error: UserError | None = None
    """What ended it."""


class ListingReader:
    """Takes pages from one listing at a time; one that another process began is gone through again.

    Files that were read there are passed over.
    """

    def __init__(self) -> None:
        self._steps: Steps | None = None
        self._where: tuple[str, str, float | None, Place] | None = None

    def page(
        self, source: str, root: str, fps: float | None, place: Place, refusal: Refusal | None
    ) -> ListingPage:
        """The items after `place`; only the first one where that is right before a file is read.

        A `MemoryError` is not caught: it ends the process.

        Args:
            source: key of `formats.FORMATS`.
            root: of the corpus.
            fps: see `formats.listing`.
            place: that the caller has come to.
            refusal: of the last file that was said to be read next; None: read it.
        """
        if self._steps is None or self._where != (source, root, fps, place):
            self._steps = steps(source, root, fps)
            _go_to(self._steps, place, refusal, root)
        before_file = place.files > 0 and not place.items
        answer = refusal if before_file else None
        items: list[Item | Reading] = []
        stop = time.monotonic() + PAGE_S
        error = None
        self._where = None
        try:
            while len(items) < (1 if before_file else PAGE_ITEMS) and not (items and time.monotonic() > stop):
                item = self._steps.send(answer)
                items.append(item)
                answer, place = None, place.after(item)
                if isinstance(item, Reading):
                    break
        except StopIteration:
            self._steps = None
        except UserError as problem:
            self._steps, error = None, problem
        self._where = (source, root, fps, place)
        return ListingPage(tuple(items), self._steps is None, error)


def _go_to(listing: Steps, place: Place, refusal: Refusal | None, root: str) -> None:
    """Goes through a new listing up to `place`. Raises: CorpusError where it has become shorter."""
    here, answer = Place(), None
    try:
        while here != place:
            item = listing.send(answer)
            here = here.after(item)
            answer = (LISTED if here.files < place.files else refusal) if isinstance(item, Reading) else None
    except StopIteration:
        raise CorpusError(f"{root} has changed while it was listed. Start the ingest again.") from None
