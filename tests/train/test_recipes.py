"""The three trainings on real video: killed, one of them on Ray and through the whole data path, and without Ray,
undisturbed or with other numbers of workers and another ZeRO stage on the way."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import killed
import numpy as np
import pytest
import tiny
from corpora import write_lerobot
from in_process import die_there, prepare, train_here, work_in_turn
from ranks import Ranks
from torch._inductor import config as inductor

from defi_models import presets
from defi_models.gfdm import GFDM
from defi_models.gidm import GIDM
from defi_models.inputs.acting import Acting
from defi_models.policy import DeFIPolicy
from defi_platform.config import (
    ActingConfig,
    CorpusConfig,
    DataConfig,
    EncodeConfig,
    ExportConfig,
    FinetuneConfig,
    InferenceConfig,
    ModelConfig,
    PackageConfig,
    PretrainConfig,
    ProbeConfig,
    RayConfig,
    TrackingConfig,
    TrainConfig,
)
from defi_platform.config.loader import load_config, to_mapping
from defi_platform.encode_latents import encode_latents
from defi_platform.errors import CheckpointError, ConfigError
from defi_platform.serve.inference.forward import PolicyForward
from defi_platform.storage import StorageError
from defi_platform.train.driver.export_run import export_run
from defi_platform.train.driver.run import train
from defi_platform.train.recipe import Recipe
from defi_platform.train.recipes.gfdm import GFDMRecipe
from defi_platform.train.recipes.gidm import GIDMRecipe
from defi_platform.train.recipes.policy import PolicyRecipe

pytestmark = pytest.mark.slow


STEPS = 12
KILLED_AT = 7
"""By SIGKILL, two steps past a checkpoint."""
CACHED_STEPS = 5
SAMPLES = [4 * step for step in range(1, STEPS + 1)]
"""Seen by the end of each step: none is left out, none is there twice."""
SIZE = 32
"""Pixels; the corpus has twice as many."""
MODELS: dict[str, dict[str, Any]] = {
    "gfdm": {
        "height": SIZE,
        "width": SIZE,
        "frames": 4,
        "unet": {
            "block_out_channels": [32],
            "num_attention_heads": [2],
            "attention_down_blocks": [True],
            "sample_size": 4,
        },
        "feature_blocks": [0],
    },
    "gidm": {
        "encoder": {"dim": 32, "blocks": 1, "heads": 2},
        "decoder": {"blocks": 1, "heads": 2},
    },
    "policy": {
        "adapter": {
            "video_former": {"dim": 32, "depth": 1, "heads": 2, "head_dim": 16, "frames": 4, "queries_per_frame": 2},
            "head": {
                "proprio_dim": 2,
                "mlp_dropout": 0.1,
                "dim": 32,
                "heads": 2,
                "context_blocks": 1,
                "action_blocks": 1,
            },
        }
    },
}  # fmt: skip
"""Nano and smaller: most of the time goes into steps."""
KINDS = list(MODELS)


def settings(runs: Path, name: str, **changes: int) -> PretrainConfig:
    """Four samples per step. The name of a run ends in its kind."""
    kind = name.rsplit("_", 1)[-1]
    schema = FinetuneConfig if kind == "policy" else PretrainConfig
    config = schema(
        model=ModelConfig(preset="nano", overrides=copy.deepcopy(MODELS[kind])),
        data=DataConfig(
            corpora={"toy": CorpusConfig(path=str(runs / "corpus"))},
            manifest=str(runs / "manifest"),
            height=SIZE,
            width=SIZE,
            clip_frames=4,
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
            export_weights="average",
            # Room for all workers at once, and for decoders, on four logical CPUs.
            resources_per_worker={"CPU": 0.5},
            validation_samples=2,
            sampled_clips=3,
            validate_every=STEPS // 2,
            checkpoint_every=5,
            log_every=1,
            restart_dead_codes_every=5,
            threads=1,
        ),
        tracking=TrackingConfig(wandb=name == "gidm"),
    )
    if isinstance(config, FinetuneConfig):
        config.gfdm, config.gidm = str(runs / "pretrained" / "gfdm"), str(runs / "pretrained" / "gidm")
    if name == "gidm":
        probe = ProbeConfig(config.data.corpora, str(runs / "manifest_probe"), pairs=16, holdout=0.4)
        config.train.probe = probe
    config.train = replace(config.train, **changes)
    return config


def recipes(folder: Path, prefix: str = "", **changes: int) -> list[Recipe]:
    """The three trainings, their run folders and kinds with the same prefix."""
    classes = (GFDMRecipe, GIDMRecipe, PolicyRecipe)
    return [cls(settings(folder, prefix + cls.kind, **changes)) for cls in classes]


def resize(folder: Path, two_ranks: Ranks) -> None:
    """From two workers to one and back, then under ZeRO 3, activations computed twice, the optimiser on the host."""
    together = recipes(folder, "resized_", steps=STEPS // 3, num_workers=2)
    alone = recipes(folder, "resized_", steps=2 * STEPS // 3)
    last = recipes(folder, "resized_", num_workers=2, zero_stage=3, recompute=True, offload_optimizer=True)
    for part in (together, last):
        for recipe in part:
            prepare(recipe)
        two_ranks.run(functools.partial(work_in_turn, part))
        if part is together:
            for recipe in alone:
                train_here(recipe)


@pytest.fixture(scope="module")
def runs(
    ray_cluster: None, process_group: None, two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """All runs to their ends: those that are killed, on Ray and by themselves, and what they are compared with."""
    folder = tmp_path_factory.mktemp("recipes")
    write_lerobot(folder / "corpus", [12, 10, 14, 11, 13, 12, 10, 12])
    gfdm, gidm = presets.gfdm("nano", **MODELS["gfdm"]), presets.gidm("nano", **MODELS["gidm"])
    GFDM(gfdm).save_pretrained(folder / "pretrained" / "gfdm")
    GIDM(gidm).save_pretrained(folder / "pretrained" / "gidm")
    cached = settings(folder, "cached_gfdm", steps=CACHED_STEPS)
    cached.data.cache, cached.data.text_cache = str(folder / "cache"), str(folder / "texts")
    encode_latents(EncodeConfig(kind="gfdm", model=cached.model, data=cached.data))
    on_ray = killed.KilledGIDM(settings(folder, "killed_gidm"), KILLED_AT)
    alone = Ranks(tmp_path_factory.mktemp("alone"), count=1)
    with ThreadPoolExecutor(1) as thread:
        trained = thread.submit(train, RayConfig(), [on_ray])
        for recipe in [*recipes(folder), GFDMRecipe(cached)]:
            train_here(recipe)
        for recipe in (
            killed.KilledGFDM(settings(folder, "killed_gfdm"), KILLED_AT),
            killed.KilledPolicy(settings(folder, "killed_policy"), KILLED_AT),
        ):
            die_there(recipe, alone)
            train_here(recipe)
        resize(folder, two_ranks)
        trained.result()
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_losses_after_a_kill_are_the_same_bit_for_bit(runs: Path, kind: str) -> None:
    assert (runs / f"killed_{kind}" / "killed").exists()
    assert json.loads((runs / f"killed_{kind}" / "summary.json").read_text())["resumed_from"] == 5
    whole, twin = tiny.losses(runs / kind), tiny.losses(runs / f"killed_{kind}")
    assert sorted(twin) == list(range(1, STEPS + 1)) and twin == whole
    assert [row["samples"] for row in tiny.rows(runs / f"killed_{kind}", "train")] == SAMPLES
    whole, twin = (tiny.losses(runs / name, "validation") for name in (kind, f"killed_{kind}"))
    assert sorted(twin) == [0, STEPS // 2, STEPS] and twin == whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_two_workers_to_one_and_back_and_under_zero_3(runs: Path, kind: str) -> None:
    run = runs / f"resized_{kind}"
    attempts = [(row["step"], row["workers"], row["zero_stage"]) for row in tiny.rows(run, "attempt")]
    assert attempts == [(0, 2, 2), (STEPS // 3, 1, 2), (2 * STEPS // 3, 2, 3)]
    whole, twin = tiny.losses(runs / kind), tiny.losses(run)
    assert sorted(twin) == list(range(1, STEPS + 1))
    assert [row["samples"] for row in tiny.rows(run, "train")] == SAMPLES
    assert twin == pytest.approx(whole, rel=1e-5)


def test_a_run_from_the_latent_cache_has_the_losses_of_one_from_pictures_and_says_so(runs: Path) -> None:
    cached, whole = tiny.losses(runs / "cached_gfdm"), tiny.losses(runs / "gfdm")
    assert len(cached) == CACHED_STEPS
    assert cached == pytest.approx({step: whole[step] for step in cached}, rel=1e-4)
    validated = (tiny.losses(runs / name, "validation")[0] for name in ("cached_gfdm", "gfdm"))
    assert next(validated) == pytest.approx(next(validated), rel=1e-4)
    summary = json.loads((runs / "cached_gfdm" / "summary.json").read_text())
    cache, texts = summary["cache"], summary["text_cache"]
    assert texts["texts"] == texts["encoded"] > 0
    assert (cache["samples_read"], cache["samples_decoded"]) == (4 * CACHED_STEPS, 0)
    assert cache["videos"] == cache["of"] > 0


def test_the_exported_models_load(runs: Path) -> None:
    GFDM.from_pretrained(runs / "gfdm" / "model")
    GIDM.from_pretrained(runs / "gidm" / "model")
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
    acting = ActingConfig(sigma_min=1.0, gripper="binary")
    raw = export_run(ExportConfig(str(runs / "policy"), str(tmp_path / "raw"), weights="raw", acting=acting))
    assert (Path(raw) / "model.safetensors").read_bytes() != exported.read_bytes(), (
        "the run exports its average"
    )
    assert DeFIPolicy.from_pretrained(raw).acting == Acting(sigma_min=1.0, gripper="binary")
    assert DeFIPolicy.from_pretrained(target).acting == Acting()
    with pytest.raises(ConfigError, match=r"acting\.sigma_min is of a policy.*'gidm' run"):
        export_run(ExportConfig(str(runs / "gidm"), str(tmp_path / "gidm"), acting=acting))
    with pytest.raises(ConfigError, match="weights is 'mean'; choose raw, average"):
        export_run(ExportConfig(str(runs / "gidm"), weights="mean"))
    with pytest.raises(CheckpointError, match="Is it a run folder"):
        export_run(ExportConfig(str(tmp_path)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler (g++)")
def test_a_policy_is_served_from_its_acting_compiled_ahead(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Less to compile, and that faster; the sums are the same.
    monkeypatch.setattr(inductor.aot_inductor, "compile_wrapper_opt_level", "O0")
    acting = ActingConfig(steps=1)
    package = PackageConfig(path=str(tmp_path / "act.pt2"), batch=2)
    folder = export_run(
        ExportConfig(str(runs / "policy"), str(tmp_path / "policy"), acting=acting, package=package)
    )
    plain = PolicyForward(folder, threads=1)
    compiled = PolicyForward(folder, threads=1, settings=InferenceConfig(package=package.path))
    assert compiled.sizes == (2,) and set(compiled.warm_up().seconds) == {2}
    seen = [replace(plain.probe, seed=seed) for seed in (3, 4)]
    for batch in (seen, seen[:1]):
        np.testing.assert_allclose(compiled(batch), plain(batch), atol=1e-4)
    for settings, error in (
        ({"dtype": "bfloat16"}, "precision: torch.float32 there, torch.bfloat16 here"),
        ({"package": str(tmp_path / "none.pt2")}, r"none\.pt2 cannot be read \(No such file"),
    ):
        with pytest.raises(ConfigError, match=error):
            PolicyForward(
                folder, threads=1, settings=replace(InferenceConfig(package=package.path), **settings)
            )


@pytest.mark.parametrize(
    ("kind", "settings", "error"),
    [
        (
            "gidm",
            {"path": "act.pt2"},
            "act.pt2: only a policy acts; the run holds a 'gidm' model",
        ),
        ("policy", {"path": "act.bin"}, "must end in .pt2"),
        ("policy", {"path": "act.pt2", "batch": 0}, "package.batch is 0; it must be 1 or more"),
        (
            "policy",
            {"path": "act.pt2", "dtype": "half"},
            "package.dtype is 'half'; choose float32 or bfloat16",
        ),
        ("policy", {"path": "act.pt2", "device": "tpu"}, "package.device is 'tpu'; choose cpu or cuda"),
        ("policy", {"path": "/proc/none/act.pt2"}, "package.path=/proc/none cannot be written"),
    ],
)
def test_a_package_that_cannot_be_made_is_refused_before_the_export(
    runs: Path, tmp_path: Path, kind: str, settings: dict[str, Any], error: str
) -> None:
    target = tmp_path / "model"
    with pytest.raises((ConfigError, StorageError), match=re.escape(error)):
        export_run(ExportConfig(str(runs / kind), str(target), package=PackageConfig(**settings)))
    assert not target.exists()


def test_the_summaries_tell_what_the_report_shows(runs: Path) -> None:
    gfdm, gidm = (json.loads((runs / name / "summary.json").read_text()) for name in ("gfdm", "gidm"))
    assert (runs / "gfdm" / gfdm["media"][0]).read_bytes().startswith(b"\x89PNG")
    assert sum(gidm["code_counts"]) == 2 * 4, "two held-out pairs of four tokens"
    assert 0 < gidm["codebook_fraction_used"] <= 1
    assert gfdm["skipped"] == {}
    clips = gfdm["sampled_clips"]
    assert clips["clips"] == 3 and {"psnr_still", "psnr_1_step", "ssim_10_steps"} <= set(clips)
    low, high = clips["intervals"]["psnr_1_step"]
    assert clips["episodes"] == 1 or low <= clips["psnr_1_step"] <= high
    card = (runs / "gfdm" / "run_card.md").read_text()
    assert (
        f"sampled clips: 3 of {clips['episodes']} episodes, in 1 step | PSNR {clips['psnr_1_step']:.3g}"
        in card
    )
    quarters = [value for key, value in gfdm["validation"]["last"].items() if "noise_quarter" in key]
    assert len(quarters) >= 1 and all(value > 0 for value in quarters)
    probe = gidm["probe"]
    assert probe["pairs"] == {"train": 16, "validation": 16} and probe["skipped_pairs"] == 0
    assert sum(probe["episodes"].values()) <= 8, "of the corpus"
    for kind in ("latents", "tokens"):
        assert probe[kind]["latent_action"]["r2"] <= 1 and probe[kind]["random_encoder"]["r2"] <= 1
    assert set(probe["distractors"]) == {"background", "lighting", "object"}


def test_the_run_card_tells_how_to_repeat_the_run(runs: Path) -> None:
    card = json.loads((runs / "killed_gidm" / "run_card.json").read_text())
    assert [row["step"] for row in card["attempts"]] == [0, 5]
    assert card["phase_s"]["forward"] > 0 and card["phase_s"]["backward"] > 0
    assert card["speed"]["model_tflops_per_worker"] > 0 and card["speed"]["mfu"] is None
    assert card["packages"]["ray"] and card["data_fingerprint"]
    assert {row["source"] for row in card["attempts"]} == {card["code"]["source"]}
    assert card["config"]["train"]["zero_stage"] == 2
    text = (runs / "gidm" / "run_card.md").read_text()
    assert "python jobs/pretrain_gidm.py --config run.yaml" in text
    config = text.split("```yaml\n")[1].split("```")[0]
    (runs / "again.yaml").write_text(config)
    again = load_config(PretrainConfig, runs / "again.yaml")
    assert to_mapping(again) == to_mapping(settings(runs, "gidm"))


def test_tracking_is_offline_and_keeps_its_run_id(runs: Path) -> None:
    assert (runs / "gidm" / "wandb_run_id").read_text()
    (kept,) = (runs / "gidm" / "wandb").glob("offline-run-*/run-*.wandb")
    card = json.loads((runs / "gidm" / "run_card.json").read_text())
    for origin in (card["code"]["source"], card["data_fingerprint"]):
        assert origin.encode() in kept.read_bytes()


def test_data_cut_otherwise_than_the_model_needs_it_is_refused(runs: Path, tmp_path: Path) -> None:
    config = settings(runs, "gfdm")
    config.data.clip_frames = 16
    with pytest.raises(ConfigError, match=r"data\.clip_frames=16, but the gfdm model 'nano' has frames=4"):
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
