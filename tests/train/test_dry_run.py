"""Dry runs, and the configurations of the paper's runs with them: nothing is started, no file is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpora import write_lerobot

from defi_models import presets
from defi_models.pretrained.folder import make_header
from defi_platform.config import FinetuneConfig, PretrainBothConfig, PretrainConfig
from defi_platform.config.loader import load_config
from defi_platform.errors import CheckpointError, ConfigError, CorpusError
from defi_platform.storage import StorageError
from defi_platform.storage.writable import check_writable
from defi_platform.train.driver.finetune import finetune
from defi_platform.train.driver.pretrain import pretrain, pretrain_both
from defi_platform.train.recipes.registry import PRETRAININGS, RECIPES

SMALL = ["model.preset=nano", "model.init_from=null", "data.height=64", "data.width=64", "data.clip_frames=8"]


@pytest.fixture
def home(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data home in which every corpus and model that the paper's configurations name is there, in little."""
    monkeypatch.setenv("DEFI_HOME", str(tmp_path))
    corpus = write_lerobot(tmp_path / "corpus", [8, 8], cameras=("static", "gripper"))
    (tmp_path / "corpora").mkdir()
    for file in (repository / "configs" / "paper").glob("*.yaml"):
        if file.name == "pretrain.yaml":
            continue
        kind = FinetuneConfig if "finetune" in file.name else PretrainConfig
        for one in load_config(kind, file).data.corpora.values():
            link = Path(one.path)
            if not link.exists():
                link.symlink_to(corpus)
    headers = {
        "backbones/svd_gfdm": make_header("gfdm", presets.gfdm("paper")),
        "backbones/gidm": make_header("gidm", presets.gidm("nano")),
        "paper/gfdm/model": make_header("gfdm", presets.gfdm("nano")),
        "paper/gidm/model": make_header("gidm", presets.gidm("nano")),
    }
    for name, header in headers.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(header))
    return tmp_path


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_the_papers_gfdm_run_is_laid_out_before_anything_starts(home: Path, repository: Path) -> None:
    before = files(home)
    config = load_config(
        PretrainConfig, repository / "configs/paper/pretrain_gfdm.yaml", ["train.peak_tflops=989"]
    )
    config.dry_run = True
    text = pretrain("gfdm", config).text()
    for part in (
        "nothing was started",
        "something: ", "lerobot_v3, not ingested yet, 40.0% of the mixture",
        "8 workers, ZeRO 1", "<- chosen",
        "global batch 48 = workers x micro-batch x accumulation = 8 x 6 x 1",
        "steps: 100,000, samples: 4,800,000",
        "a guess, not a measurement",
    ):  # fmt: skip
        assert part in text, text
    assert files(home) == before


@pytest.mark.parametrize(
    "name", ["pretrain_gfdm", "pretrain_gfdm_table", "pretrain_gidm", "pretrain_gidm_table", "finetune_policy",
             "finetune_policy_table", "one_gpu/pretrain_gfdm", "one_gpu/pretrain_gidm", "one_gpu/finetune_policy"]
)  # fmt: skip
def test_every_configuration_of_the_paper_passes_its_checks(home: Path, repository: Path, name: str) -> None:
    path = repository / "configs" / "paper" / f"{name}.yaml"
    if "finetune" in name:
        policy = load_config(FinetuneConfig, path, [*SMALL, "dry_run=true"])
        text = finetune(policy).text()
        assert "views: static (compared over time); then gripper" in text
    else:
        config = load_config(PretrainConfig, path, [*SMALL, "dry_run=true"])
        text = pretrain("gfdm" if "gfdm" in name else "gidm", config).text()
    assert "<- chosen" in text and "hours: not known" in text


def test_both_of_the_papers_pretrainings_are_laid_out_side_by_side(home: Path, repository: Path) -> None:
    both = load_config(
        PretrainBothConfig,
        repository / "configs/paper/pretrain.yaml",
        ["dry_run=true", "gidm.train.expected_step_s=2.5"]
        + [f"{kind}.{item}" for kind in ("gfdm", "gidm") for item in SMALL],
    )
    dry_runs = pretrain_both(both)
    assert "8 workers" in dry_runs["gfdm"].text()
    assert "hours: 69.44 at 2.500 s per step (train.expected_step_s)" in dry_runs["gidm"].text()


def test_a_dry_run_refuses_what_the_run_would(home: Path, repository: Path, tmp_path: Path) -> None:
    path = repository / "configs/paper/pretrain_gfdm.yaml"

    def refused(*changes: str) -> str:
        config = load_config(PretrainConfig, path, [*SMALL, "dry_run=true", *changes])
        with pytest.raises((ConfigError, CorpusError, StorageError, CheckpointError)) as error:
            pretrain("gfdm", config)
        return str(error.value)

    assert "global_batch=50" in refused("train.global_batch=50")
    assert "does not exist" in refused("data.corpora.bridge.path=/nowhere/at/all")
    assert "/proc/runs" in refused("train.output=/proc/runs")
    assert "/proc/runs" in refused("train.output=/proc/runs", "dry_run=false"), "and so does the run itself"
    assert "does not exist" in refused("model.init_from=/nowhere")


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "new"))
    assert files(tmp_path) == set()


def test_every_recipe_of_the_registry_names_the_job_that_runs_it(repository: Path) -> None:
    assert list(RECIPES) == ["gfdm", "gidm", "policy"] and list(PRETRAININGS) == ["gfdm", "gidm"]
    for recipe in RECIPES.values():
        assert (repository / "jobs" / recipe.job).exists()
        job = (repository / "platform" / "defi_platform" / "jobs" / recipe.job).read_text()
        assert f"parse_arguments({recipe.config_type.__name__}" in job
