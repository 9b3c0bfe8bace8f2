"""Listing an S3 prefix page by page, several sub-folders side by side."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Page = dict[str, Any]
"""An answer of ListObjectsV2."""

Request = Callable[[dict[str, Any]], Page]
"""Sends one ListObjectsV2 with these arguments besides the bucket; retries transient failures."""

THREADS = 8
MAX_FOLDERS_TO_DESCEND = 8
"""Sub-folders up to which their own sub-folders are listed apart too, so that there is work for every thread."""

PAGES_AHEAD = 8
"""Pages of a folder that wait to be read; a store answers faster than anyone can use what it says."""

STOP_S = 0.2
"""Seconds until a thread whose pages nobody reads any more notices."""


def objects(request: Request, prefix: str) -> Iterator[dict[str, Any]]:
    """Yields every object below `prefix` ("" or ending in "/"), in order of the keys, page by page as they come."""
    parts = sorted(_parts(request, prefix, levels=2), key=_name)
    folders = [part for part in parts if isinstance(part, str)]
    stop = threading.Event()
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="s3-listing")
    try:
        queues: dict[str, queue.Queue[Any]] = {folder: queue.Queue(PAGES_AHEAD) for folder in folders}
        for folder, answers in queues.items():
            pool.submit(_into, answers, request, folder, stop)
        for part in parts:
            if not isinstance(part, str):
                yield part
                continue
            while (item := queues[part].get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield from item
    finally:
        # Whoever only wanted to know what the first files are does not wait for the rest.
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def names(request: Request, prefix: str, only_folders: bool = False) -> Iterator[str]:
    """Yields the names of objects and folders right below `prefix`, page by page; there may be millions.

    Args:
        request: of the bucket.
        prefix: "" or ending in "/".
        only_folders: leaves objects out.
    """
    for page in _pages(request, prefix, threading.Event(), Delimiter="/"):
        keys = [str(found["Prefix"]) for found in page.get("CommonPrefixes") or ()]
        if not only_folders:
            keys += [str(found["Key"]) for found in page.get("Contents") or () if found["Key"] != prefix]
        yield from (key[len(prefix) :].rstrip("/") for key in keys)


def _name(part: dict[str, Any] | str) -> str:
    return part if isinstance(part, str) else str(part["Key"])


def _parts(request: Request, prefix: str, levels: int) -> Iterator[dict[str, Any] | str]:
    """Yields objects right below `prefix`, and folders that hold the others; `prefix` itself where there are many."""
    page = request({"Prefix": prefix, "Delimiter": "/"})
    if page.get("IsTruncated"):
        yield prefix
        return
    yield from page.get("Contents") or ()
    folders = [str(found["Prefix"]) for found in page.get("CommonPrefixes") or ()]
    if levels == 0 or len(folders) > MAX_FOLDERS_TO_DESCEND:
        yield from folders
        return
    for folder in folders:
        yield from _parts(request, folder, levels - 1)


def _pages(request: Request, prefix: str, stop: threading.Event, **more: str) -> Iterator[Page]:
    token: dict[str, Any] = {}
    while not stop.is_set():
        page = request({"Prefix": prefix, **more, **token})
        yield page
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def _into(answers: queue.Queue[Any], request: Request, prefix: str, stop: threading.Event) -> None:
    try:
        for page in _pages(request, prefix, stop):
            _put(answers, list(page.get("Contents") or ()), stop)
        _put(answers, None, stop)
    except BaseException as error:  # noqa: BLE001  raised again by whoever reads the queue
        _put(answers, error, stop)


def _put(answers: queue.Queue[Any], item: Any, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            answers.put(item, timeout=STOP_S)
            return
        except queue.Full:
            continue  # whoever reads is slower than the store
