"""A run folder that is not whole, or that an attempt which reached nothing has touched: never begun anew in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from begun_runs import reached

from defi_models import presets
from defi_models.gidm import GIDM
from defi_platform import storage
from defi_platform.config import ExportConfig, ModelConfig, PretrainConfig
from defi_platform.errors import CheckpointError, ConfigError
from defi_platform.train.checkpoint import export
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint.pieces import DamagedCheckpoint
from defi_platform.train.driver.export_run import export_run
from defi_platform.train.driver.run import check_resumable, complete_run, prepare_folder, take_up
from defi_platform.train.recipes.gidm import GIDMRecipe
from defi_platform.train.segments import rate_of

Make = Callable[..., PretrainConfig]


def marker(run: Path) -> Path:
    return next((run / "checkpoints").rglob("shard_*.json"))


def attempt(config: PretrainConfig) -> tiny.TinyRecipe:
    """What the driver does before workers start; then it ends."""
    recipe = tiny.TinyRecipe(config)
    take_up(recipe, check_resumable(recipe))
    prepare_folder(recipe)
    return recipe


def test_an_older_run_keeps_its_settings_when_an_attempt_ends_before_a_checkpoint(
    run_config: Make, tmp_path: Path
) -> None:
    falling = {"schedule": "cosine"}
    reached(tiny.TinyRecipe(run_config(tmp_path, **falling)), 6, older=True)
    longer = run_config(tmp_path, **falling, steps=24, extend="rewarm")
    first, second = (rate_of(attempt(longer).segments, 8) for _ in range(2))
    assert first == second
    with pytest.raises(ConfigError, match="its learning rate would jump"):
        attempt(run_config(tmp_path, **falling, steps=24))
    with pytest.raises(ConfigError, match=r"train\.clip_grad_norm=1\.0, now it is 0\.1"):
        attempt(run_config(tmp_path, **falling, clip_grad_norm=0.1))


def test_a_complete_run_without_checkpoints_does_not_begin_anew_for_more_steps(
    run_config: Make, tmp_path: Path
) -> None:
    reached(tiny.TinyRecipe(run_config(tmp_path)), 12, complete=True)
    storage.delete(str(tmp_path / "checkpoints"))
    with pytest.raises(CheckpointError, match=r"complete at step 12 .* Set train\.steps=12"):
        complete_run(tiny.TinyRecipe(run_config(tmp_path, steps=24)))


def test_a_complete_run_is_asked_for_other_clips_and_not_called_complete(
    run_config: Make, tmp_path: Path
) -> None:
    reached(tiny.TinyRecipe(run_config(tmp_path)), 12, complete=True)
    with pytest.raises(ConfigError, match=r"train\.sampled_clips=32, now it is 64"):
        complete_run(tiny.TinyRecipe(run_config(tmp_path, sampled_clips=64)))


@pytest.mark.parametrize("content", [b'{"file": "x", "posi', b"{}", b"[]", b"\xff\xfe\x00", None])
def test_a_run_whose_markers_are_damaged_does_not_begin_anew(
    content: bytes | None, run_config: Make, tmp_path: Path
) -> None:
    file = marker(reached(tiny.TinyRecipe(run_config(tmp_path)), 6))
    if content is None:
        (file.parent / checkpoints.PASSED_OVER).write_text("{}")
    else:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"1 checkpoints and none can be used: .*(damaged|passed over)"):
        check_resumable(tiny.TinyRecipe(run_config(tmp_path)))
    checkpoints.prune(str(tmp_path), 2, unfinished=True)
    assert file.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "a: [1", r"config\.yaml is damaged"),
        ("config.yaml", "", r"config\.yaml is damaged"),
        ("summary.json", "{", r"summary\.json is damaged\. Delete it"),
    ],
)
def test_files_of_a_run_that_are_damaged_are_named(
    name: str, content: str, message: str, run_config: Make, tmp_path: Path
) -> None:
    reached(tiny.TinyRecipe(run_config(tmp_path)), 12, complete=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        complete_run(tiny.TinyRecipe(run_config(tmp_path)))


def test_a_checkpoint_of_a_later_version_is_named(run_config: Make, tmp_path: Path) -> None:
    file = marker(reached(tiny.TinyRecipe(run_config(tmp_path)), 6))
    values = json.loads(file.read_text())
    values["position"]["later"] = 1
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"another version of the platform: .*'later'"):
        check_resumable(tiny.TinyRecipe(run_config(tmp_path)))


def test_what_was_passed_over_is_set_aside_with_the_rest(run_config: Make, tmp_path: Path) -> None:
    run = reached(tiny.TinyRecipe(run_config(tmp_path)), 3, 6, 9)
    (run / "checkpoints" / checkpoints.folder_name(9, "abcdef") / checkpoints.PASSED_OVER).write_text("{}")
    attempt(run_config(tmp_path, restart_from=3))
    left = [path.name for path in (run / "checkpoints").iterdir()]
    assert left == [checkpoints.folder_name(3, "abcdef")]
    assert len(list((run / "set_aside").rglob("shard_*.json"))) == 2


# --------------------------------------------------------------------------- what models are built from


def test_workers_and_exports_build_from_nothing_else_than_the_run_was_begun_with(tmp_path: Path) -> None:
    folder = tmp_path / "gidm"
    sizes: dict[str, Any] = {
        "encoder": {"dim": 32, "blocks": 1, "heads": 2},
        "decoder": {"blocks": 1, "heads": 2},
    }
    GIDM(presets.gidm("nano", **sizes)).save_pretrained(folder)
    config = PretrainConfig(model=ModelConfig(init_from=str(folder)))
    config.data.manifest, config.train.output = str(tmp_path / "manifest"), str(tmp_path / "run")
    recipe = GIDMRecipe(config)
    check_resumable(recipe)
    recipe.build()
    reached(recipe, 5)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"has changed since the run was begun with it"):
        recipe.build()
    with pytest.raises(CheckpointError, match=r"has changed since the run was begun with it"):
        export_run(ExportConfig(run=config.train.output))


def test_an_export_takes_the_newest_checkpoint_when_the_run_deletes_the_one_it_reads(
    run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.TinyRecipe(run_config(tmp_path))
    run, asked = reached(recipe, 5), []

    def load_model(_: object, checkpoint: checkpoints.Checkpoint) -> tiny.TinyModel:
        asked.append(checkpoint.step)
        if checkpoint.step == 5:
            storage.delete(checkpoint.uri)
            reached(recipe, 10)
            raise DamagedCheckpoint(f"{checkpoint.uri} is gone.")
        if len(asked) > 2:
            raise DamagedCheckpoint(f"{checkpoint.uri} is damaged.")
        return tiny.TinyModel(0.0)

    monkeypatch.setattr(export, "load_model", load_model)
    export.export_model(recipe, str(tmp_path / "model"))
    assert asked == [5, 10] and (tmp_path / "model").is_dir()
    with pytest.raises(DamagedCheckpoint, match=r"To export the one before, .*passed_over\.json"):
        export.export_model(recipe, str(tmp_path / "model"))
    assert run.is_dir()
