"""Files that only one of several writers creates, on disks and in object stores that write conditionally."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid

from defi_platform.storage.filesystem import is_remote, local_path
from defi_platform.storage.remote import attempt, filesystem, protocols

EXISTS = ("PreconditionFailed", "ConditionalRequestConflict")
"""Codes with which S3 refuses to write over an object, or while another writer is at it."""

NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems without hard links, such as mounted buckets."""


def is_exclusive(folder: str) -> bool:
    """True where of two writers that create one file at the same moment only one succeeds: disks and S3."""
    return not is_remote(folder) or "s3" in protocols(filesystem(folder)[0])


def create_bytes(uri: str, content: bytes) -> bool:
    """Writes a whole file unless there is one.

    Stores other than disks and S3 cannot refuse: there it is looked for first, and of two writers at the same moment
    both may succeed (see `is_exclusive`).

    Args:
        uri: of the file, local or remote.
        content: all of it.

    Returns: whether this call has written it; after a lost answer it may have, and say False.

    Raises: StorageError.
    """
    if not is_remote(uri):
        return _link(uri, content)
    fs, path = filesystem(uri)
    if "s3" not in protocols(fs):
        if attempt(uri, lambda: bool(fs.exists(path))):
            return False
        attempt(uri, lambda: fs.pipe_file(path, content))
        return True
    bucket, _, key = path.partition("/")

    def put() -> bool:
        try:
            fs.call_s3("put_object", Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
        except Exception as error:  # s3fs makes an OSError of its own from botocore's
            if _code(error) in EXISTS:
                return False
            raise
        fs.invalidate_cache(path)
        return True

    return attempt(uri, put)


def _code(error: BaseException) -> str:
    """S3's code of an error that s3fs has translated; "" for others."""
    for found in (error, error.__cause__, error.__context__):
        response = getattr(found, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _link(uri: str, content: bytes) -> bool:
    target = local_path(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.parent / f".{target.name[:100]}.{uuid.uuid4().hex[:8]}"
    try:
        with staged.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # A link fails where the name is taken, which a rename would replace; network disks keep to it too.
        try:
            os.link(staged, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            # Exclusive too, but for a moment a reader finds it empty.
            with contextlib.suppress(FileExistsError), target.open("xb") as file:
                file.write(content)
                return True
            return False
        return True
    finally:
        staged.unlink(missing_ok=True)
