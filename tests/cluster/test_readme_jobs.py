"""The README's jobs, each line run as it is written there, but in this process, where their trainings run too: a dozen
starts of Ray, its workers and torch would take minutes. The stages of the demo are in test_demo; jobs as processes of
their own, and trainings on Ray, there, in test_readme_commands and in the tests of each job."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from policy_server import policy_server
from readme import commands, the_one

from defi_models import presets
from defi_models.pretrained.folder import make_header
from defi_platform.config import ServeConfig
from defi_platform.config.loader import load_config

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("data", "train", "evaluate")]
from corpora import write_lerobot, write_video
from in_process import fit_here
from made_evaluations import episode, evaluated

pytestmark = pytest.mark.slow

Run = Callable[[str], None]

TINY = {
    "train.steps": "2",
    "train.global_batch": "4",
    "train.micro_batch": "4",
    "train.validation_samples": "2",
    "data.holdout": "0.3",
    "tracking.wandb": "false",
}
TINY_RUN = " ".join(f"{key}={value}" for key, value in TINY.items())
TINY_RUNS = " ".join(f"{kind}.{key}={value}" for kind in ("gfdm", "gidm") for key, value in TINY.items())
CORPORA = {
    "python jobs/ingest_videos.py": "",
    "python jobs/encode_latents.py": "",
    "python jobs/pretrain_gfdm.py --config configs/demo/pretrain_gfdm.yaml data.cache": TINY_RUN,
}
VIDEOS = {
    "python jobs/ingest_videos.py": "data.holdout=0.3",
    "python jobs/inspect_corpus.py": "samples=100 videos_per_corpus=1 data.holdout=0.3",
    "python jobs/pretrain.py": TINY_RUNS,
    "python jobs/finetune_policy.py": TINY_RUN,
}
"""Served, that policy answers in serve/test_commands.py's way, and in train/test_dataset_configs.py."""


@pytest.fixture
def run(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None, process_group: None
) -> Run:
    """Runs a line in a folder from which the README's paths lead to the checkout's jobs and configs; what it leaves is
    in `tmp_path`/runs."""
    for name in ("jobs", "configs"):
        (tmp_path / name).symlink_to(repository / name)
    monkeypatch.setenv("DEFI_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", "")  # the jobs add to it
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(repository / "jobs")
    monkeypatch.setattr("defi_platform.train.driver.run._fit", fit_here)

    def go(line: str) -> None:
        arguments = shlex.split(line)[1:]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(arguments[0], run_name="__main__")
        assert not ended.value.code, line

    return go


def test_the_jobs_around_corpora(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lerobot(tmp_path / "runs" / "demo" / "corpus" / "video", [12] * 6, actions=False)
    write_video(tmp_path / "mine" / "a.mp4", range(12))
    lines = [f"{the_one('Corpora', start)} {small}" for start, small in CORPORA.items()]
    for line in [*lines, the_one("Long runs", "python jobs/pretrain.py")]:
        # S3 itself is in tests/data/test_storage.py; the workers of this Ray would not know where it is.
        run(line.replace("/tmp/", f"{tmp_path}/").replace("s3://bucket/videos", str(tmp_path / "mine")))
    assert (tmp_path / "runs" / "videos" / "manifest" / "corpora" / "videos" / "committed.json").exists()
    assert json.loads((tmp_path / "cached" / "summary.json").read_text())["cache"]["samples_read"] > 0
    assert "gidm" in capsys.readouterr().out and not (tmp_path / "runs" / "demo" / "gfdm").exists()


def test_evaluations_are_compared_as_written(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, success in (("demo", False), ("other", True)):
        evaluated(tmp_path / "runs" / name / "evaluation", [episode("cube", n, success) for n in range(6)])
    run(the_one("Step by step", "python jobs/compare_evaluations.py"))
    assert "+100 (" in capsys.readouterr().out


def test_an_evaluation_is_tuned_as_written(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "measure_s=0.3 turns=1 clients=[1] most_workers=1 check_episodes=0 max_steps=10 video_every=0"
    with policy_server(lambda observation, socket: {"actions": np.zeros((8, 4))}) as server:
        run(f"{the_one('Step by step', 'python jobs/tune_evaluation.py')} {small} url={server.url}")
    assert re.search(r"workers=1, serve.replicas=1.*: at most 0\.\d+ h", capsys.readouterr().out)


def test_the_way_from_ones_own_videos_to_a_policy(run: Run, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for number in range(6):
        write_video(runs / "corpora" / "videos" / f"{number}.mp4", range(number, number + 30))
    write_lerobot(runs / "corpora" / "robot", [12] * 6)
    for start, small in VIDEOS.items():
        run(f"{the_one('I have videos', start)} {small}")
    page = (runs / "videos" / "inspect" / "corpora.html").read_text()
    assert "Corpus videos" in page and "metaworld" not in page, "nothing but what was asked for"
    model = runs / "videos" / "nano" / "policy" / "model"
    assert json.loads((model / "actions.json").read_text())["control_hz"] == 10.0
    assert the_one("I have videos", "python jobs/serve_policy.py").endswith("videos/nano/serve_policy.yaml")
    assert load_config(ServeConfig, "configs/datasets/videos/nano/serve_policy.yaml").policy == str(model)


@pytest.mark.parametrize(
    ("section", "kind", "data"),
    [
        ("I have a LeRobot dataset", "lerobot", "lerobot_v21/g1"),
        ("I have CALVIN", "calvin", "calvin"),
        ("I have Bridge, or another RLDS dataset", "bridge", "rlds"),
    ],
)
def test_the_lines_for_a_dataset_are_of_that_dataset_and_pass_their_dry_runs(
    run: Run, tmp_path: Path, shared_data: Path, section: str, kind: str, data: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """train/test_dataset_configs.py takes every stage of them."""
    (tmp_path / "runs" / "corpora").mkdir(parents=True)
    (tmp_path / "runs" / "corpora" / kind).symlink_to(shared_data / data)
    written = commands(section)
    assert [re.search(r"jobs/(\w+)\.py", line)[1] for line in written] == [  # type: ignore[index]
        "ingest_videos", "pretrain", "finetune_policy", "serve_policy"
    ]  # fmt: skip
    assert all(f"configs/datasets/{kind}/" in line for line in written)
    run(f"{written[1]} --dry-run")
    for name, config in (("gfdm", presets.gfdm("nano")), ("gidm", presets.gidm("nano"))):
        model = tmp_path / "runs" / kind / "nano" / name / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(make_header(name, config)))
    run(f"{written[2]} --dry-run")
    assert "policy: dry run" in capsys.readouterr().out
