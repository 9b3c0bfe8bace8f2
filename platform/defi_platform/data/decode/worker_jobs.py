"""Jobs carried out inside a decoder process, which keeps files open between them."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import posixpath
from collections import OrderedDict
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from defi_platform import storage
from defi_platform.data.decode.frame_scores import FrameScorer
from defi_platform.data.decode.geometry import centre_crop, fitted
from defi_platform.data.decode.messages import DecodeJob, Probe, ProbeJob
from defi_platform.data.decode.probe import probe
from defi_platform.data.decode.video_readers import DecordReader, PyavReader, Reader, check_memory
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sources.uri import VideoUri, parse
from defi_platform.storage.range_file import RangeFile
from defi_platform.storage.scratch import scratch

OPEN_FILES = 8
"""Files kept open: many episodes of a LeRobot dataset share one file, and opening indexes all of it."""

MACHINE_ERRORS = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}
)
"""Errors of a disk, a network mount or this machine, not of the file. Only in Python's own OSErrors,
since codecs mean something else by the same numbers."""

SMALL_FILE_BYTES = 16 << 20
"""Remote files up to this size are fetched whole; larger ones are read by range."""


DECORD_WIDTH = 128
"""Narrower pictures are scaled by PyAV: where decord's padding of a row reaches the width of a picture (measured
at 16, 24, 48 and 72 pixels), it counts the padding as further colour channels and its answer is of no use."""


class JobHandler:
    """Answers decode and probe jobs in one process.

    Args:
        memory_bytes: what the process may use.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._open: OrderedDict[tuple[str, str, tuple[int, int]], Reader] = OrderedDict()
        self.files_opened = 0

    def decode(self, job: DecodeJob, out: np.ndarray) -> None:
        """Writes the frames of `job` to `out` (T, H, W, 3) uint8. Raises: BadVideo."""
        check_memory(job.source_width, job.source_height, self._memory_bytes)
        decoder = "pyav" if self._size(job)[1] < DECORD_WIDTH else job.decoder
        with _store_errors_apart(parse(job.uri).path):
            try:
                frames = self._frames(job, decoder)
            except BadVideo as error:
                if decoder != "decord" or error.reason in ("missing", "storage", "memory"):
                    raise
                frames = self._frames(job, "pyav")
        out[...] = centre_crop(frames, job.height, job.width)

    def probe(self, job: ProbeJob) -> Probe:
        """Checks and describes the video of `job`. Raises: BadVideo."""
        self.files_opened += 1
        where = parse(job.uri)
        with _store_errors_apart(where.path):
            if where.kind == "file":
                with storage.local_copy(where.path) as path:
                    return probe(str(path), job.thorough, self._memory_bytes, job.score_frames)
            if where.kind == "range":
                with scratch("member") as folder:
                    path = folder / f"video{posixpath.splitext(where.where[-1])[1]}"
                    path.write_bytes(_slice(where))
                    return probe(str(path), job.thorough, self._memory_bytes, job.score_frames)
            return _probe_store(where, job, self._memory_bytes)

    def _frames(self, job: DecodeJob, decoder: str) -> np.ndarray:
        size = self._size(job)
        key = (job.uri, decoder, size)
        reader = self._open.pop(key, None)
        if reader is None:
            self.files_opened += 1
            reader = self._opened(job.uri, decoder, size)
        try:
            frames = reader.frames(job.indices)
        except BaseException:
            # Not put back: a reader that failed once is in no known state.
            reader.close()
            raise
        self._open[key] = reader
        while len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return frames

    def _size(self, job: DecodeJob) -> tuple[int, int]:
        if parse(job.uri).kind not in ("file", "range"):
            return job.height, job.width  # frame stores resize by themselves
        return fitted(
            (job.source_height or job.height, job.source_width or job.width), (job.height, job.width)
        )

    def _opened(self, uri: str, decoder: str, size: tuple[int, int]) -> Reader:
        where = parse(uri)
        if where.kind == "range":
            return _video_reader(io.BytesIO(_slice(where)), decoder, size)
        if where.kind != "file":
            opened: Reader = frame_stores().open_store(where, size)
            return opened
        if not storage.is_remote(where.path):
            open(where.path, "rb").close()
            return _video_reader(where.path, decoder, size)
        if storage.entry(where.path).bytes <= SMALL_FILE_BYTES:
            return _video_reader(io.BytesIO(storage.read_bytes(where.path)), decoder, size)
        # decord reads file objects to their end before it opens them; PyAV seeks.
        return PyavReader(storage.open_seekable(where.path), size)


def frame_stores() -> ModuleType:
    """The module, imported at its first use: processes that decode video files alone need no Pillow."""
    from defi_platform.data.decode import frame_stores

    return frame_stores


def _video_reader(source: Any, decoder: str, size: tuple[int, int]) -> Reader:
    return DecordReader(source, size) if decoder == "decord" else PyavReader(source, size)


def _slice(where: VideoUri) -> bytes:
    offset, length = where.span
    with storage.open_seekable(where.path) as file:
        file.seek(offset)
        content = file.read(length)
    if len(content) < length:
        raise BadVideo("short", f"the archive ends {length - len(content)} bytes before the file does")
    return content


def _probe_store(where: VideoUri, job: ProbeJob, memory_bytes: int) -> Probe:
    store = frame_stores().open_store(where, None, verify=True)
    try:
        if store.num_frames < 2:
            raise BadVideo("too_short", f"{store.num_frames} frame")
        width, height = store.picture(0).size
        check_memory(width, height, memory_bytes)
        scorer = (
            FrameScorer(store.num_frames, 0.0, height, width) if job.score_frames and job.thorough else None
        )
        blank = True
        for index in range(store.num_frames) if job.thorough else [0, store.num_frames - 1]:
            picture = store.picture(index)
            if picture.size != (width, height):
                raise BadVideo("corrupt", f"frame {index} is of another size than the first")
            if scorer is not None:
                scorer.add(functools.partial(_grey, picture.convert("L")))
            blank = blank and all(low == high for low, high in picture.getextrema())
        if blank:
            raise BadVideo("black", "every frame is of one colour, as where a camera was absent")
        frame_scores = None if scorer is None else scorer.result()
        return Probe(
            store.num_frames, 0.0, width, height, store.codec, 0, 0, "store", False, frame_scores=frame_scores
        )
    finally:
        store.close()


def _grey(picture: Any, height: int, width: int) -> np.ndarray:
    """(height, width) uint8 of a grey picture; box scaling, as the video's."""
    return np.asarray(picture.resize((width, height), picture.Resampling.BOX))


@contextlib.contextmanager
def _store_errors_apart(uri: str) -> Iterator[None]:
    """Keeps what a store does apart from what is in the file: a video is not corrupt because its store is down."""
    RangeFile.failures.clear()
    try:
        yield
        _raise_failed_range(uri)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise BadVideo("missing", f"{uri} is not there") from error
    except storage.StorageError as error:
        raise BadVideo("storage", str(error)) from error
    except PermissionError as error:
        raise BadVideo("storage", f"{uri}: {error}") from error
    except Exception as error:
        # Codec libraries report a failed read as damage, or as anything else.
        _raise_failed_range(uri)
        if (
            isinstance(error, OSError)
            and type(error).__module__ == "builtins"
            and error.errno in MACHINE_ERRORS
        ):
            raise BadVideo("storage", f"{uri}: {error}") from error
        raise


def _raise_failed_range(uri: str) -> None:
    for failure in RangeFile.failures:
        reason = "missing" if isinstance(failure, FileNotFoundError) else "storage"
        raise BadVideo(reason, f"{uri}: {failure}") from failure
