"""What a decoder process does with a job: keeps files open between jobs and fills shared memory with frames."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np

from defi_platform.data.decode import (
    DecodeJob,
    DecordReader,
    Probe,
    ProbeJob,
    PyavReader,
    Reader,
    centre_crop,
    fitted,
    probe,
)
from defi_platform.data.reasons import BadVideo

OPEN_FILES = 8
"""Files kept open: many episodes of a LeRobot dataset share one file, and opening indexes all of it."""

SMALL_FILE_BYTES = 16 << 20
"""Remote files up to this size are fetched whole; larger ones are read by range."""


class Jobs:
    """Carries out decode and probe jobs in one process."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[str, str, tuple[int, int]], Reader] = OrderedDict()
        self.files_opened = 0

    def decode(self, job: DecodeJob, out: np.ndarray) -> None:
        """Writes the frames of `job` to `out` (T, H, W, 3) uint8. Raises: BadVideo."""
        try:
            frames = self._frames(job, job.decoder)
        except BadVideo as error:
            if job.decoder != "decord" or error.reason in ("missing", "storage", "memory"):
                raise
            frames = self._frames(job, "pyav")
        out[...] = centre_crop(frames, job.height, job.width)

    def probe(self, job: ProbeJob) -> Probe:
        """Judges the file of `job`. Raises: BadVideo."""
        self.files_opened += 1
        with _local(job.uri) as path:
            return probe(path, job.thorough, job.memory_bytes)

    def _frames(self, job: DecodeJob, decoder: str) -> np.ndarray:
        size = self._size(job)
        key = (job.uri, decoder, size)
        reader = self._open.pop(key, None)
        if reader is None:
            self.files_opened += 1
            reader = self._opened(job.uri, decoder, size)
        # Put back only after success: a reader that failed once is in no known state.
        frames = reader.frames(job.indices)
        self._open[key] = reader
        while len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)
        return frames

    def _size(self, job: DecodeJob) -> tuple[int, int]:
        return fitted(
            (job.source_height or job.height, job.source_width or job.width), (job.height, job.width)
        )

    def _opened(self, uri: str, decoder: str, size: tuple[int, int]) -> Reader:
        with _missing_is_bad(uri):
            if "://" not in uri:
                open(uri, "rb").close()
                return DecordReader(uri, size) if decoder == "decord" else PyavReader(uri, size)
            return _opened_remote(uri, decoder, size)


def _opened_remote(uri: str, decoder: str, size: tuple[int, int]) -> Reader:
    import io

    from defi_platform import storage

    if storage.entry(uri).bytes <= SMALL_FILE_BYTES:
        content = io.BytesIO(storage.read_bytes(uri))
        return DecordReader(content, size) if decoder == "decord" else PyavReader(content, size)
    # decord reads file objects to their end before it opens them; PyAV seeks.
    return PyavReader(storage.open_seekable(uri), size)


@contextlib.contextmanager
def _local(uri: str) -> Iterator[str]:
    with _missing_is_bad(uri):
        if "://" not in uri:
            open(uri, "rb").close()
            yield uri
            return
        from defi_platform import storage

        with storage.local_copy(uri) as path:
            yield str(path)


@contextlib.contextmanager
def _missing_is_bad(uri: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        raise BadVideo("missing", f"{uri} is not there") from error
    except PermissionError as error:
        raise BadVideo("storage", f"{uri}: {error}") from error
