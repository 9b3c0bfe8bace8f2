"""The three trainings on real video through the whole data path, each beside a twin whose worker is killed and that
then goes on with other numbers of workers and another ZeRO stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import killed
import pytest
import tiny
from corpora import write_lerobot

from defi_models import presets
from defi_models.gfdm import ForwardDynamics
from defi_models.gidm import InverseDynamics
from defi_models.policy import DeFIPolicy
from defi_platform.config import (
    CorpusConfig,
    DataConfig,
    EncodeConfig,
    ExportConfig,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    ProbeConfig,
    RayConfig,
    TrackingConfig,
    TrainConfig,
)
from defi_platform.config_file import load_config, to_mapping
from defi_platform.errors import CheckpointError, ConfigError
from defi_platform.train.encode_latents import encode_latents
from defi_platform.train.export_run import export_run
from defi_platform.train.recipe import Recipe
from defi_platform.train.recipes.gfdm import GFDMRecipe
from defi_platform.train.recipes.gidm import GIDMRecipe
from defi_platform.train.recipes.policy import PolicyRecipe
from defi_platform.train.run import train

pytestmark = pytest.mark.slow


STEPS = 8
"""Of a whole run; a twin is killed after step 5 and goes on from the checkpoint of step 3, to step 6 with one worker, to
the end with two and ZeRO 3, activations computed twice and the optimiser on the host."""


def settings(runs: Path, name: str, **changes: int) -> PretrainConfig:
    """Four samples per step."""
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
            steps=STEPS,
            global_batch=4,
            micro_batch=2,
            zero_stage=2,
            ema_decay=0.9,
            # Room for the two workers of three runs on four logical CPUs.
            resources_per_worker={"CPU": 0.5},
            validation_batches=1,
            validate_every=6,
            checkpoint_every=3,
            log_every=1,
            restart_dead_codes_every=3,
            threads=1,
        ),
        tracking=TrackingConfig(wandb=name == "gidm"),
    )
    if isinstance(config, FinetuneConfig):
        config.gfdm, config.gidm = str(runs / "pretrained" / "gfdm"), str(runs / "pretrained" / "gidm")
        config.model.overrides = {"adapter": {"head": {"proprio_dim": 2, "mlp_dropout": 0.1}}}
    if name == "gidm":
        probe = ProbeConfig(config.data.corpora, str(runs / "manifest_probe"), pairs=16, holdout=0.4)
        config.train.probe = probe
    config.train = replace(config.train, **changes)
    return config


def twins(folder: Path, **changes: int) -> list[Recipe]:
    return [
        killed.KilledGFDM(settings(folder, "killed_gfdm", **changes), 5),
        killed.KilledGIDM(settings(folder, "killed_gidm", **changes), 5),
        killed.KilledPolicy(settings(folder, "killed_policy", **changes), 5),
    ]


@pytest.fixture(scope="module")
def runs(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs to their ends, or of the twins to step 6."""
    folder = tmp_path_factory.mktemp("recipes")
    write_lerobot(folder / "corpus", [12, 10, 14, 11, 13, 12, 10, 12])
    ForwardDynamics(presets.gfdm("nano")).save_pretrained(folder / "pretrained" / "gfdm")
    InverseDynamics(presets.gidm("nano")).save_pretrained(folder / "pretrained" / "gidm")
    whole = [
        GFDMRecipe(settings(folder, "gfdm")),
        GIDMRecipe(settings(folder, "gidm")),
        PolicyRecipe(settings(folder, "policy")),
    ]
    cached = settings(folder, "cached_gfdm")
    cached.data.cache = str(folder / "cache")
    encode_latents(EncodeConfig(kind="gfdm", data=cached.data))
    train(RayConfig(), [*whole, *twins(folder, steps=6), GFDMRecipe(cached)])
    return folder


@pytest.fixture(scope="module")
def resized(runs: Path) -> Path:
    """The twins at their ends too."""
    train(RayConfig(), twins(runs, num_workers=2, zero_stage=3, recompute=True, offload_optimizer=True))
    return runs


@pytest.mark.parametrize("kind", ["gfdm", "gidm", "policy"])
def test_losses_after_a_kill_are_the_same_bit_for_bit(runs: Path, kind: str) -> None:
    assert (runs / f"killed_{kind}" / "killed").exists()
    assert json.loads((runs / f"killed_{kind}" / "summary.json").read_text())["resumed_from"] == 3
    whole, twin = tiny.losses(runs / kind), tiny.losses(runs / f"killed_{kind}")
    assert twin == {step: whole[step] for step in range(1, 7)}
    whole, twin = (tiny.losses(runs / name, "validation") for name in (kind, f"killed_{kind}"))
    assert twin == {step: whole[step] for step in (0, 6)}


@pytest.mark.parametrize("kind", ["gfdm", "gidm", "policy"])
def test_a_run_goes_on_with_two_workers_and_zero_3(resized: Path, kind: str) -> None:
    twin = resized / f"killed_{kind}"
    assert [row["workers"] for row in tiny.rows(twin, "attempt")] == [1, 1, 2]
    whole, resumed = tiny.losses(resized / kind), tiny.losses(twin)
    assert sorted(resumed) == list(range(1, STEPS + 1))
    assert [row["samples"] for row in tiny.rows(twin, "train")] == [4 * step for step in sorted(resumed)]
    assert resumed == pytest.approx(whole, rel=1e-5)


def test_a_run_from_the_latent_cache_has_the_losses_of_one_from_pictures_and_says_so(runs: Path) -> None:
    for split in ("train", "validation"):
        assert tiny.losses(runs / "cached_gfdm", split) == pytest.approx(
            tiny.losses(runs / "gfdm", split), rel=1e-4
        )
    told = json.loads((runs / "cached_gfdm" / "summary.json").read_text())["cache"]
    assert (told["samples_read"], told["samples_decoded"]) == (4 * STEPS, 0)
    assert told["videos"] == told["of"] > 0


def test_the_exported_models_load(runs: Path) -> None:
    ForwardDynamics.from_pretrained(runs / "gfdm" / "model")
    InverseDynamics.from_pretrained(runs / "gidm" / "model")
    policy = DeFIPolicy.from_pretrained(runs / "policy" / "model")
    assert policy.config.cameras == ("front",)
    assert policy.action_normalizer.scale.max() > 1, (
        "the corpus counts steps, so actions are far from [-1, 1]"
    )


def test_a_run_folder_alone_is_enough_to_export_its_newest_checkpoint(runs: Path, tmp_path: Path) -> None:
    for kind in ("gidm", "policy"):
        target = export_run(ExportConfig(str(runs / kind), str(tmp_path / kind)))
        exported, own = (Path(folder) / "model.safetensors" for folder in (target, runs / kind / "model"))
        assert exported.read_bytes() == own.read_bytes()
    with pytest.raises(CheckpointError, match="Is it a run folder"):
        export_run(ExportConfig(str(tmp_path)))


def test_the_summaries_tell_what_the_report_shows(runs: Path) -> None:
    gfdm, gidm = (json.loads((runs / name / "summary.json").read_text()) for name in ("gfdm", "gidm"))
    assert (runs / "gfdm" / gfdm["media"][0]).read_bytes().startswith(b"\x89PNG")
    assert sum(gidm["code_counts"]) == 2 * 4, "two held-out pairs of four tokens"
    assert 0 < gidm["codebook_fraction_used"] <= 1
    assert gfdm["skipped"] == {}
    assert {"psnr_still", "psnr_1_step", "ssim_10_steps"} <= set(gfdm["sampled_clips"])
    quarters = [value for key, value in gfdm["validation"]["last"].items() if "noise_quarter" in key]
    assert len(quarters) >= 1 and all(value > 0 for value in quarters)
    assert set(gidm["probe_r2"]) == {"latent_action", "random_encoder"}
    assert all(value <= 1 for value in gidm["probe_r2"].values())


def test_the_run_card_tells_how_to_repeat_the_run(runs: Path) -> None:
    card = json.loads((runs / "killed_gidm" / "run_card.json").read_text())
    assert [row["step"] for row in card["attempts"]][:2] == [0, 3]
    assert card["phase_s"]["forward"] > 0 and card["phase_s"]["backward"] > 0
    assert card["speed"]["model_tflops_per_worker"] > 0 and card["speed"]["mfu"] is None
    assert card["packages"]["ray"] and card["data_fingerprint"]
    assert card["config"]["train"]["zero_stage"] in (2, 3), "3 once the twin has gone on"
    text = (runs / "gidm" / "run_card.md").read_text()
    assert "python jobs/pretrain_gidm.py --config run.yaml" in text
    config = text.split("```yaml\n")[1].split("```")[0]
    (runs / "again.yaml").write_text(config)
    again = load_config(PretrainConfig, runs / "again.yaml")
    assert to_mapping(again) == to_mapping(settings(runs, "gidm"))


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
