"""Jobs carried out inside a decoder process, which keeps files open between them."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import posixpath
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from defi_platform import storage
from defi_platform.data.decode.frame_scores import FrameScorer
from defi_platform.data.decode.messages import (
    DecodeJob,
    EpisodeSignals,
    ListingJob,
    Probe,
    ProbeJob,
    SignalsJob,
)
from defi_platform.data.decode.probe import Report, probe
from defi_platform.data.decode.resize import resize
from defi_platform.data.decode.seek_index import UNINDEXED, SeekIndex
from defi_platform.data.decode.video_readers import Reader, VideoReader, check_memory, content_hash
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sources.uri import VideoUri, parse
from defi_platform.errors import CorpusError
from defi_platform.storage.range_file import RangeFile
from defi_platform.storage.scratch import scratch

if TYPE_CHECKING:
    from defi_platform.data.sources.listing_steps import ListingPage, ListingReader

OPEN_FILES = 8
"""Files kept open: many episodes of a LeRobot dataset share one file, and opening indexes all of it."""

COPIED_AT_ONCE = 8 << 20
"""Bytes of a remote file that are fetched in one request for its probe."""

SLOWEST_BYTES_PER_S = 100_000
"""Bytes of a file that count as one second of video while it is fetched and its length is not known yet."""

STORED_PER_S = 10
"""Pictures that count as one second of video where they are stored one by one."""

LONGEST_FILE_S, LONGEST_STEP_S = 600.0, 24 * 3600.0
"""Seconds of video as which one metadata file, and one step of a listing, count: many `timeout_s`, as long as no library hangs."""

BEAT_S = 0.5
"""Seconds between two words that a listing goes on."""

MACHINE_ERRORS = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}
)
"""Errors of a disk, a network mount or this machine, not of the file. Only in Python's own OSErrors,
since codecs mean something else by the same numbers."""


class JobHandler:
    """Answers decode and probe jobs in one process.

    Args:
        memory_bytes: what the process may use.
    """

    def __init__(self, memory_bytes: int) -> None:
        # Loaded ahead of the limit, which is for what videos need.
        import av  # noqa: F401

        self._memory_bytes = memory_bytes
        self._open: OrderedDict[tuple[str, str], Reader] = OrderedDict()
        """By URI and version."""
        self._listing: ListingReader | None = None
        self.files_opened = 0

    def decode(self, job: DecodeJob, out: np.ndarray) -> None:
        """Writes the frames of `job` to `out` (T, H, W, 3) uint8. Raises: BadVideo."""
        check_memory(job.source_width, job.source_height, self._memory_bytes)
        where, key = parse(job.uri), (job.uri, job.version)
        with _store_errors_apart(where.path):
            reader = self._open.pop(key, None)
            index = SeekIndex.from_bytes(job.seek_index) if job.seek_index else UNINDEXED
            if reader is None:
                self.files_opened += 1
                reader = _opened(where, index, job.version)
            elif isinstance(reader, VideoReader):
                reader.use(index)
            try:
                # In order, each decoded once, and only one in its full size at a time.
                for number in sorted(set(job.indices)):
                    picture = resize(reader.picture(number), (job.height, job.width))
                    out[[i for i, index in enumerate(job.indices) if index == number]] = picture
                if not storage.is_remote(where.path):
                    # Afterwards, and for files that are kept open too: it may be written over where it stands.
                    with contextlib.suppress(FileNotFoundError):
                        storage.check_version(where.path, job.version)
            except BaseException:
                # Not put back: a reader that failed once is in no known state.
                reader.close()
                raise
            self._open[key] = reader
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1].close()

    def probe(self, job: ProbeJob, report: Report) -> Probe:
        """Checks and describes the video of `job`.

        Args:
            job: what to probe.
            report: takes the declared length in seconds, again and again while it goes on.

        Raises: BadVideo.
        """
        self.files_opened += 1
        where = parse(job.uri)
        with _store_errors_apart(where.path):
            if where.kind == "file" and not storage.is_remote(where.path):
                path = str(storage.local_path(where.path))
                return probe(path, self._memory_bytes, job.score_frames, report)
            if where.kind in ("file", "range"):
                with scratch("video") as folder:
                    path = str(folder / f"video{posixpath.splitext((where.path, *where.where)[-1])[1]}")
                    _copy(where, path, report)
                    return probe(path, self._memory_bytes, job.score_frames, report)
            return _probe_store(where, job, self._memory_bytes, report)

    def list_page(self, job: ListingJob, report: Report) -> ListingPage:
        """The next page of a listing.

        Args:
            job: the place that the listing has come to.
            report: takes word again and again that Python code still runs, which a library that hangs stops.
        """
        from defi_platform.data.sources.listing_steps import ListingReader

        if self._listing is None:
            self._listing = ListingReader()
        with _alive(report, LONGEST_FILE_S if job.place.files and not job.place.items else LONGEST_STEP_S):
            page = self._listing.page(job.source, job.root, job.fps, job.place, job.refusal)
        self.files_opened += page.ended  # what it leaves behind in memory is not the fault of the next file
        return page

    def read_signals(self, job: SignalsJob) -> EpisodeSignals:
        """Reads and checks the actions and states of `job`. Raises: BadVideo, whose message says what is wrong."""
        # Only here: processes that decode video files alone need none of the formats.
        from defi_platform.data.sources.formats import read_signals

        with _store_errors_apart(parse(job.uri).path):
            try:
                signals = read_signals(job.source, job.uri, job.episode_id)
            except CorpusError as error:
                raise BadVideo("bad_source", str(error)) from error
        actions = np.asarray(signals.actions, np.float32)
        states = np.empty((len(actions), 0), np.float32) if signals.proprio is None else signals.proprio
        states = np.asarray(states, np.float32)
        for name, values in (("actions", actions), ("states", states)):
            if values.ndim != 2 or len(values) != len(actions):
                raise BadVideo("bad_source", f"{name} have shape {values.shape}, actions {actions.shape}")
            unusable = np.argwhere(~np.isfinite(values))
            if len(unusable):
                row, column = unusable[0].tolist()
                raise BadVideo(
                    "bad_source",
                    f"{name} hold {values[row, column]} in row {row}, entry {column}, and {len(unusable) - 1} more "
                    "values that are not finite",
                )
        if not actions.size:
            raise BadVideo("bad_source", f"it has {len(actions)} actions of {actions.shape[1]} numbers")
        return EpisodeSignals(actions, states)


@contextlib.contextmanager
def _alive(report: Report, longest_s: float) -> Iterator[None]:
    """Reports from a thread of its own, as long as other threads are let in: waiting for a store is no hanging."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            report(longest_s)

    report(longest_s)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _opened(where: VideoUri, index: SeekIndex, version: str) -> Reader:
    if where.kind == "range":
        return VideoReader(io.BytesIO(_slice(where, version)), index)
    if where.kind != "file":
        if storage.is_remote(where.path):
            storage.check_version(where.path, version)
        opened: Reader = frame_stores().open_store(where)
        return opened
    if storage.is_remote(where.path):
        return VideoReader(storage.open_seekable(where.path, version=version), index)
    open(where.path, "rb").close()
    return VideoReader(where.path, index)


def frame_stores() -> ModuleType:
    """The module, imported at its first use: processes that decode video files alone need no Pillow."""
    from defi_platform.data.decode import frame_stores

    return frame_stores


def _slice(where: VideoUri, version: str) -> bytes:
    offset, length = where.span
    with storage.open_seekable(where.path, version=version) as file:
        file.seek(offset)
        content = file.read(length)
    if len(content) < length:
        raise _cut_short(length - len(content))
    return content


def _copy(where: VideoUri, target: str, report: Report) -> None:
    """Writes a file, or one inside an archive, to `target`, and reports that it goes on."""
    with storage.open_seekable(where.path, COPIED_AT_ONCE) as file, open(target, "wb") as copy:
        offset, left = where.span if where.kind == "range" else (0, file.seek(0, io.SEEK_END))
        file.seek(offset)
        declared_s = left / SLOWEST_BYTES_PER_S
        while left:
            report(declared_s)
            content = file.read(min(left, COPIED_AT_ONCE))
            if not content:
                raise _cut_short(left)
            copy.write(content)
            left -= len(content)


def _cut_short(missing: int) -> BadVideo:
    return BadVideo("short", f"the archive ends {missing} bytes before the file does")


def _probe_store(where: VideoUri, job: ProbeJob, memory_bytes: int, report: Report) -> Probe:
    store = frame_stores().open_store(where, verify=True)
    try:
        if store.num_frames < 2:
            raise BadVideo("too_short", f"{store.num_frames} frame")
        width, height = store.picture(0).size
        check_memory(width, height, memory_bytes)
        scorer = FrameScorer(store.num_frames, 0.0, height, width) if job.score_frames else None
        blank, checksums = True, list[int]()
        for index in range(store.num_frames):
            report(store.num_frames / STORED_PER_S)
            picture = store.picture(index)
            if picture.size != (width, height):
                raise BadVideo("corrupt", f"frame {index} is of another size than the first")
            if scorer is not None:
                scorer.add(functools.partial(_grey, picture.convert("L")))
            checksums.append(zlib.crc32(picture.tobytes()))
            blank = blank and all(low == high for low, high in picture.getextrema())
        if blank:
            raise BadVideo("black", "every frame is of one colour, as where a camera was absent")
        frame_scores = None if scorer is None else scorer.result()
        return Probe(
            store.num_frames, 0.0, width, height, store.codec, 0, "store", False, frame_scores=frame_scores,
            content=content_hash(checksums),
        )  # fmt: skip
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
    except storage.FileChanged as error:
        raise BadVideo("changed", str(error)) from error
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
