"""Requests to remote stores: one connection per process, retries, and errors that name the fix."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

from defi_platform.errors import TRY_AGAIN, UserError
from defi_platform.retry import RetryPolicy, retry

ATTEMPTS = 5
"""Tries of a remote request before its error is passed on; botocore tries each twice."""
POLICY = RetryPolicy(max_attempts=ATTEMPTS, first_pause_s=0.1, jitter=True)
NO_CREDENTIALS = ("NoCredentialsError", "ProfileNotFound", "PartialCredentialsError")
"""Names of botocore's errors, which is imported by its file system alone."""

Answer = TypeVar("Answer")


class StorageError(UserError):
    """A path that cannot be read or written: absent, forbidden, or its store does not answer."""


class StorageUnavailable(StorageError):
    """A store that did not answer, also when asked again; it may come back."""

    exit_code = TRY_AGAIN


@functools.lru_cache(maxsize=16)
def _remote(protocol: str, process: int) -> Any:
    # A file system holds sockets and an event loop, which do not survive a fork: hence one per process.
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            options["endpoint_url"] = endpoint
        options["config_kwargs"] = {
            "retries": {"total_max_attempts": 2, "mode": "standard"},
            "connect_timeout": 10,
            "read_timeout": 60,
        }
    # Imported here: decoder processes of local corpora start a third of a second sooner without it.
    import fsspec

    try:
        filesystem = fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError) as error:
        raise StorageError(
            f"{protocol}:// paths cannot be read here: {error}. Install the fsspec driver of {protocol}."
        ) from error
    if protocol in ("s3", "s3a"):
        # Its own five would multiply with ours: a store that swallows requests would block for hours.
        filesystem.retries = 3
    return filesystem


def forget_connections() -> None:
    """Makes the next remote request read the environment (endpoint, credentials) again."""
    _remote.cache_clear()
    if "fsspec" in sys.modules:
        # fsspec keeps file systems by their arguments, which do not name the credentials.
        sys.modules["fsspec"].AbstractFileSystem.clear_instance_cache()


def filesystem(uri: str) -> tuple[Any, str]:
    """Returns the file system of a URL, and the path in it. Raises: StorageError when its driver is not installed."""
    fs = _remote(uri.split("://", 1)[0], os.getpid())
    return fs, cast(str, fs._strip_protocol(uri))


def attempt(uri: str, request: Callable[[], Answer]) -> Answer:
    """Runs a remote request, and again after failures that may be transient.

    Raises: FileNotFoundError; StorageUnavailable after the last attempt; StorageError that names the fix for others.
    """
    try:
        return retry(request, POLICY, is_transient=_is_transient)
    except FileNotFoundError as error:
        if _bucket_is_missing(error):
            raise StorageError(f"{uri}: there is no such bucket. Check the name and the region.") from error
        raise
    except PermissionError as error:
        raise StorageError(
            f"{uri}: access is denied ({error}). Check the credentials (AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY or AWS_PROFILE) and what they may do."
        ) from error
    except Exception as error:  # drivers raise their own families: botocore, aiohttp, OSError
        if type(error).__name__ in NO_CREDENTIALS:
            raise StorageError(
                f"{uri}: no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
            ) from error
        raise StorageUnavailable(
            f"{uri}: the store failed {ATTEMPTS} times, last with {type(error).__name__}: {error}. "
            "Check the network and the endpoint (AWS_ENDPOINT_URL)."
        ) from error


def _is_transient(error: Exception) -> bool:
    permanent = isinstance(error, (FileNotFoundError, PermissionError))
    return not permanent and type(error).__name__ not in NO_CREDENTIALS


def read_range(uri: str, start: int, stop: int) -> bytes:
    """The bytes of a remote file, as far as there are any.

    Args:
        uri: of the file.
        start: offset of the first byte.
        stop: offset of the byte behind the last.

    Raises: FileNotFoundError, StorageError.
    """
    fs, path = filesystem(uri)

    def request() -> bytes:
        try:
            return cast(bytes, fs.cat_file(path, start=start, end=stop))
        except OSError as error:
            if _code(error) in ("InvalidRange", "416"):
                return b""  # S3 has an error for a range behind the end.
            raise

    return attempt(uri, request)


def _code(error: Exception) -> str | None:
    """S3's name of an error, or its HTTP status; None where the driver does not pass it on."""
    response = getattr(error.__cause__ or error.__context__, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _bucket_is_missing(error: FileNotFoundError) -> bool:
    return _code(error) == "NoSuchBucket" or "bucket does not exist" in str(error).lower()


def protocols(fs: Any) -> tuple[str, ...]:
    """Protocols that URLs of a file system can begin with."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
