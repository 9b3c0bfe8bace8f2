"""The three trainings on real video through the whole data path, each beside a twin whose worker is killed."""

from __future__ import annotations

import json
from pathlib import Path

import killed
import pytest
import tiny
from corpora import write_lerobot

from defi_models.gfdm import ForwardDynamics
from defi_models.gidm import InverseDynamics
from defi_models.policy import DeFIPolicy
from defi_platform.config import (
    CorpusConfig,
    DataConfig,
    EncodeConfig,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    RayConfig,
    TrackingConfig,
    TrainConfig,
)
from defi_platform.errors import CheckpointError, ConfigError
from defi_platform.train.encode_latents import encode_latents
from defi_platform.train.recipes.gfdm import GFDMRecipe
from defi_platform.train.recipes.gidm import GIDMRecipe
from defi_platform.train.recipes.policy import PolicyRecipe
from defi_platform.train.run import train

pytestmark = pytest.mark.slow


def settings(runs: Path, name: str) -> PretrainConfig:
    """Six steps of four samples; the checkpoint before the kill after step 5 is that of step 4."""
    schema = FinetuneConfig if "policy" in name else PretrainConfig
    config = schema(
        data=DataConfig(
            corpora={"toy": CorpusConfig(path=str(runs / "corpus"))},
            manifest=str(runs / "manifest"),
            pair_interval_s=0.3,
            holdout=0.3,
        ),
        train=TrainConfig(
            output=str(runs / name),
            steps=6,
            global_batch=4,
            micro_batch=2,
            resources_per_worker={"CPU": 0.9},
            validation_batches=1,
            validate_every=6,
            checkpoint_every=2,
            log_every=1,
            restart_dead_codes_every=3,
            threads=1,
        ),
        tracking=TrackingConfig(wandb=name == "gidm"),
    )
    if isinstance(config, FinetuneConfig):
        config.gfdm, config.gidm = str(runs / "gfdm" / "model"), str(runs / "gidm" / "model")
        config.model.overrides = {"adapter": {"head": {"proprio_dim": 2, "mlp_dropout": 0.1}}}
    return config


@pytest.fixture(scope="module")
def runs(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All six runs, made in two waves: the policy needs the models of the first."""
    folder = tmp_path_factory.mktemp("recipes")
    write_lerobot(folder / "corpus", [12, 10, 14, 11, 13, 12, 10, 12])
    train(
        RayConfig(),
        [
            GFDMRecipe(settings(folder, "gfdm")),
            killed.KilledGFDM(settings(folder, "killed_gfdm"), 5),
            GIDMRecipe(settings(folder, "gidm")),
            killed.KilledGIDM(settings(folder, "killed_gidm"), 5),
        ],
    )
    cached = settings(folder, "cached_gfdm")
    cached.data.cache = str(folder / "cache")
    encode_latents(EncodeConfig(kind="gfdm", data=cached.data))
    train(
        RayConfig(),
        [
            PolicyRecipe(settings(folder, "policy")),
            killed.KilledPolicy(settings(folder, "killed_policy"), 5),
            GFDMRecipe(cached),
        ],
    )
    return folder


@pytest.mark.parametrize("kind", ["gfdm", "gidm", "policy"])
def test_losses_after_a_kill_are_the_same_bit_for_bit(runs: Path, kind: str) -> None:
    assert (runs / f"killed_{kind}" / "killed").exists()
    assert json.loads((runs / f"killed_{kind}" / "summary.json").read_text())["resumed_from"] == 4
    assert sorted(tiny.losses(runs / kind)) == [1, 2, 3, 4, 5, 6]
    for split in ("train", "validation"):
        assert tiny.losses(runs / f"killed_{kind}", split) == tiny.losses(runs / kind, split)


def test_a_run_from_the_latent_cache_has_the_losses_of_one_from_pictures_and_says_so(runs: Path) -> None:
    for split in ("train", "validation"):
        assert tiny.losses(runs / "cached_gfdm", split) == pytest.approx(
            tiny.losses(runs / "gfdm", split), rel=1e-4
        )
    told = json.loads((runs / "cached_gfdm" / "summary.json").read_text())["cache"]
    assert (told["samples_read"], told["samples_decoded"]) == (24, 0)
    assert told["videos"] == told["of"] > 0


def test_the_exported_models_load(runs: Path) -> None:
    ForwardDynamics.from_pretrained(runs / "gfdm" / "model")
    InverseDynamics.from_pretrained(runs / "gidm" / "model")
    policy = DeFIPolicy.from_pretrained(runs / "policy" / "model")
    assert policy.config.cameras == ("front",)
    assert policy.action_normalizer.scale.max() > 1, (
        "the corpus counts steps, so actions are far from [-1, 1]"
    )


def test_the_summaries_tell_what_the_report_shows(runs: Path) -> None:
    gfdm, gidm = (json.loads((runs / name / "summary.json").read_text()) for name in ("gfdm", "gidm"))
    assert (runs / "gfdm" / gfdm["media"][0]).read_bytes().startswith(b"\x89PNG")
    assert sum(gidm["code_counts"]) == 2 * 4, "two held-out pairs of four tokens"
    assert 0 < gidm["codebook_fraction_used"] <= 1
    assert gfdm["skipped"] == {}


def test_tracking_is_offline_and_keeps_its_run_id(runs: Path) -> None:
    assert (runs / "gidm" / "wandb_run_id").read_text()
    assert list((runs / "gidm" / "wandb").glob("offline-run-*"))


def test_data_cut_otherwise_than_the_model_needs_it_is_refused(runs: Path, tmp_path: Path) -> None:
    config = settings(runs, "gfdm")
    config.data.clip_frames = 16
    with pytest.raises(ConfigError, match=r"data\.clip_frames=16, but the gfdm model 'nano' has frames=8"):
        GFDMRecipe(config).build()


def test_an_unknown_preset_names_the_nearest(runs: Path) -> None:
    config = settings(runs, "gidm")
    config.model = ModelConfig(preset="nono")
    with pytest.raises(ConfigError, match="nano"):
        GIDMRecipe(config).build()


def test_a_model_folder_of_the_wrong_kind_is_refused(runs: Path) -> None:
    config = settings(runs, "policy")
    assert isinstance(config, FinetuneConfig)
    config.gfdm = config.gidm
    with pytest.raises(CheckpointError, match="'gidm' model; 'gfdm' is expected"):
        PolicyRecipe(config).build()
