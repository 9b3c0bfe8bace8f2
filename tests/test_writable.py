"""Whether an output can be written, asked by several jobs at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from defi_platform.storage import StorageError
from defi_platform.storage.writable import check_writable


def test_jobs_that_ask_for_one_new_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    for number in range(50):
        output = str(tmp_path / str(number) / "below")
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(check_writable, [output] * 4))
    assert not list(tmp_path.iterdir())


def test_a_file_where_a_folder_is_to_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"output=.*below cannot be written: .*Choose another folder"):
        check_writable(str(tmp_path / "file" / "below"))
