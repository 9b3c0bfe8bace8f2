"""What a submission sends to a cluster, and its size before it does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from defi_platform.cluster.shipped_code import (
    ShippedCodeError,
    check_shipped_code,
    excludes_of,
    main,
    measure,
)

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder of code that also holds 1 GB of runs (without that many bytes on the disk), data and more."""
    for name, size in {
        "jobs/train.py": 10,
        "platform/defi_platform/a.py": 20,
        "configs/demo/run.yaml": 30,
        "runs/gfdm/model.safetensors": 2**30,
        "elsewhere/model.safetensors": 2**30,
        "data/video.mp4": 2**30,
        ".git/objects/pack": 2**30,
        ".venv/lib/torch.so": 2**30,
        "cluster/runtime_env.yaml": 0,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
    (tmp_path / "cluster" / "runtime_env.yaml").write_bytes(
        (REPOSITORY / "cluster/runtime_env.yaml").read_bytes()
    )
    return tmp_path


def test_neither_runs_nor_data_nor_git_travel(checkout: Path) -> None:
    code = measure(checkout, excludes_of(checkout / "cluster" / "runtime_env.yaml"))
    assert set(code.bytes_by_folder) == {"jobs", "platform/defi_platform", "configs/demo", "cluster"}
    assert code.files == 4


def test_this_repository_is_far_below_the_limit_and_holds_what_jobs_need() -> None:
    code = measure(REPOSITORY, excludes_of(REPOSITORY / "cluster/runtime_env.yaml"))
    assert code.bytes < 10 * 2**20
    assert {"jobs", "platform/defi_platform", "defi_models", "defi_client", "configs/demo"} <= set(
        code.bytes_by_folder
    )


def test_too_much_is_refused_before_it_is_sent_and_the_largest_folders_named(checkout: Path) -> None:
    with pytest.raises(ShippedCodeError, match=r"elsewhere 1,024\.0 MiB.*limit is 100\.0 MiB.*excludes"):
        check_shipped_code(checkout)


def test_the_command_shows_files_and_size(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkout)]) == 0
    assert capsys.readouterr().out.startswith("4 files, 0.0 MiB (")
