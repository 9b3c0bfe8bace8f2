"""A progress bar for people, a line now and then for log files."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(total: int, done: int, name: str) -> Any:
    """A tqdm bar over episodes, `done` of them finished before; a context manager."""
    watched = sys.stderr.isatty()
    return tqdm(total=total, initial=done, desc=name, unit="episode", mininterval=0.2 if watched else 10.0)
