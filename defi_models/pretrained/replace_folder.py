"""Replacement of a local folder: readers see the old one or the new one, never a part.

Standard library only: storage of the platform uses it in processes that never import torch.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yields a fresh folder to fill, which takes the place of `target` when the block ends without error.

    After an error `target` is as it was, and the fresh folder is gone.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}.writing-{uuid.uuid4().hex}"
    fresh.mkdir()
    try:
        yield fresh
        if target.exists():
            old = target.parent / f".{target.name}.old-{uuid.uuid4().hex}"
            # A folder that is not empty cannot be renamed over: between the two renames there is none for a moment.
            target.rename(old)
            fresh.rename(target)
            shutil.rmtree(old)
        else:
            fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
