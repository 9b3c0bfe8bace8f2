"""The README's jobs, each line run as it is written there, but in this process: a dozen starts of Ray and torch would take
minutes. The stages of the demo are in test_demo; jobs as processes of their own there, in test_readme_commands and in the
tests of each job."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from readme import the_one

sys.path.append(str(Path(__file__).parents[1] / "data"))
from corpora import write_lerobot, write_video

pytestmark = pytest.mark.slow

Run = Callable[[str], None]

TINY_RUN = (
    "train.steps=2 train.global_batch=4 train.micro_batch=4 train.validation_batches=1 data.holdout=0.3 "
    "tracking.wandb=false"
)
OWN_VIDEO = {
    "python jobs/pretrain_gfdm.py --config configs/demo/pretrain_gfdm.yaml data.corpora": TINY_RUN,
    "python jobs/ingest_videos.py": "",
    "python jobs/inspect_corpus.py": "samples=100 videos_per_corpus=1",
    "python jobs/encode_latents.py": "",
    "python jobs/pretrain_gfdm.py --config configs/demo/pretrain_gfdm.yaml data.cache": TINY_RUN,
}


@pytest.fixture
def run(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None) -> Run:
    """Runs a line in a folder from which the README's paths lead to the checkout's jobs and configs; what it leaves is
    in `tmp_path`/runs."""
    for name in ("jobs", "configs"):
        (tmp_path / name).symlink_to(repository / name)
    monkeypatch.setenv("DEFI_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", "")  # the jobs add to it
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(repository / "jobs")

    def go(line: str) -> None:
        arguments = shlex.split(line)[1:]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(arguments[0], run_name="__main__")
        assert not ended.value.code, line

    return go


def test_the_jobs_around_ones_own_video(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lerobot(tmp_path / "runs" / "demo" / "corpus" / "video", [12] * 6, actions=False)
    write_video(tmp_path / "mine" / "a.mp4", range(12))
    lines = [f"{the_one('Your own video', start)} {small}" for start, small in OWN_VIDEO.items()]
    for line in [*lines, the_one("Long runs", "python jobs/pretrain.py")]:
        # S3 itself is in tests/data/test_storage.py; the workers of this Ray would not know where it is.
        run(line.replace("/tmp/", f"{tmp_path}/").replace("s3://bucket/videos", str(tmp_path / "mine")))
    assert "mine" in (tmp_path / "gfdm" / "config.yaml").read_text()
    assert (tmp_path / "runs" / "videos-manifest" / "corpora" / "mine" / "committed.json").exists()
    assert json.loads((tmp_path / "cached" / "summary.json").read_text())["cache"]["samples_read"] > 0
    assert "gidm" in capsys.readouterr().out and not (tmp_path / "runs" / "demo" / "gfdm").exists()
