"""The folders in which a supervisor looks for progress are those that the jobs fill."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from defi_platform import storage
from defi_platform.config import JOB_CONFIGS, EvaluateConfig, IngestConfig, PretrainConfig
from defi_platform.config.loader import load_config
from defi_platform.supervise.work import JOBS, Place, WorkSeen


def test_checkpoints_of_one_step_count_once(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    config = load_config(PretrainConfig, None, [f"train.output={run}", f"data.manifest={tmp_path}/manifest"])
    work = WorkSeen(JOBS["pretrain_gfdm"].places(config), print)
    assert not work.advanced()
    storage.write_text(f"{run}/checkpoints/step_000000010_aaaaaa/shard", "")
    assert work.advanced()
    storage.write_text(f"{run}/checkpoints/step_000000010_bbbbbb/shard", "")
    assert not work.advanced()
    storage.write_text(f"{run}/checkpoints/step_000000020_cccccc/shard", "")
    assert work.advanced()


def test_episodes_and_probed_blocks_count(tmp_path: Path) -> None:
    evaluation = load_config(
        EvaluateConfig, None, [f"output={tmp_path}/e", "tasks=[drawer-close-v3]", "serve.policy=/p"]
    )
    ingest = load_config(IngestConfig, None, [f"data.manifest={tmp_path}/m", "data.corpora.videos.path=/v"])
    work = WorkSeen(
        iter([*JOBS["evaluate_policy"].places(evaluation), *JOBS["ingest_videos"].places(ingest)]), print
    )
    assert not work.advanced()
    for file in ("e/episodes/policy_drawer-close-v3_1.json", "m/corpora/videos/probed/0a.parquet"):
        storage.write_text(str(tmp_path / file), "")
        assert work.advanced(), file
        assert not work.advanced()


def test_the_names_are_those_of_the_product() -> None:
    from defi_platform.data.ingest.probe_results import ResultBlocks
    from defi_platform.data.latents.cache import SHARDS
    from defi_platform.data.manifest.commit_marker import corpus_folder
    from defi_platform.evaluate import record
    from defi_platform.evaluate.store import episodes
    from defi_platform.train.checkpoint import format as checkpoints

    assert (SHARDS, record._ATTEMPTS, episodes.EPISODES) == ("shards", ".attempts", "episodes")
    assert corpus_folder("m", "videos") == "m/corpora/videos"
    assert ResultBlocks("f")._folder == "f/probed"
    assert checkpoints.FOLDER == "checkpoints"
    assert re.fullmatch(r"(step_\d+)_.*", "step_000000010_aaaaaa")
    assert checkpoints._NAME.fullmatch("step_000000010_aaaaaa")


def test_a_folder_that_cannot_be_listed_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: str) -> list[str]:
        raise storage.StorageError("access is denied")

    monkeypatch.setattr(storage, "names", refuse)
    said: list[str] = []
    work = WorkSeen(iter([Place("s3://bucket/run")]), said.append)
    assert not work.advanced() and not work.advanced()
    assert len(said) == 1 and "access is denied" in said[0]


@pytest.mark.parametrize("name", sorted(JOBS))
def test_each_supervised_job_is_parsed_as_its_own_command_line_is(name: str, repository: Path) -> None:
    """The table repeats the class and the flags of each job, since importing all jobs would be slow."""
    sources = [repository / "jobs" / f"{name}.py", repository / f"platform/defi_platform/jobs/{name}.py"]
    text = "".join(source.read_text() for source in sources if source.is_file())
    assert f"parse_arguments({JOB_CONFIGS[name].__name__}" in text
    for flag, override in JOBS[name].flags.items():
        assert f'"{flag}": "{override}"' in text
