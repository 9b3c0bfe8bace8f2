"""Export of a run's newest checkpoint."""

from __future__ import annotations

import posixpath
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from defi_platform import storage
from defi_platform.config import ExportConfig, FinetuneConfig, PackageConfig
from defi_platform.config.loader import from_mapping
from defi_platform.config.paths import absolute_paths
from defi_platform.errors import CheckpointError, ConfigError
from defi_platform.storage.scratch import native_scratch, scratch
from defi_platform.storage.writable import check_writable
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint.export import export_model
from defi_platform.train.config_checks import EXPORTED
from defi_platform.train.driver.older_runs import with_meaning
from defi_platform.train.driver.resume import CONFIG
from defi_platform.train.recipes.registry import RECIPES
from defi_platform.train.recipes.video_base import model_errors
from defi_platform.train.worker.run_results import MODEL


def export_run(config: ExportConfig) -> str:
    """Exports the newest checkpoint of a run, complete or not, from the run folder alone.

    Returns: the model folder.
    Raises: CheckpointError when the folder is no run folder, or has no checkpoint or not the weights that are asked for,
        or when its acting cannot be compiled. ConfigError.
    """
    if config.weights not in (None, *EXPORTED):
        raise ConfigError(f"weights is '{config.weights}'; choose {', '.join(EXPORTED)} or null.")
    config = absolute_paths(config)
    settings = storage.join(config.run, CONFIG)
    found = checkpoints.committed(config.run)
    if not found or not storage.exists(settings):
        raise CheckpointError(
            f"{config.run} has no {'checkpoint' if not found else 'config.yaml'}. Is it a run folder (train.output)?"
        )
    kind = found[0].position.model["kind"]
    if kind not in RECIPES:
        raise CheckpointError(f"{config.run} holds a run of kind '{kind}'; there is: {', '.join(RECIPES)}.")
    values = _of_run(settings, config.weights)
    recipe = RECIPES[kind](from_mapping(RECIPES[kind].config_type, values, settings))
    changes = {name: value for name, value in asdict(config.acting).items() if value is not None}
    if changes:
        if not isinstance(recipe.config, FinetuneConfig):
            raise ConfigError(
                f"acting.{next(iter(changes))} is of a policy; {config.run} holds a '{kind}' run."
            )
        recipe.config.acting = replace(recipe.config.acting, **changes)
    recipe.begun_with = found[0].position.model.get("built_from", {})
    # The run folder may have been moved since.
    recipe.config.train.output = config.run
    target = config.output or storage.join(config.run, MODEL)
    if config.package:
        _check_package(config.package, kind)
    model = export_model(recipe, target)
    if config.package:
        _write_package(model, config.package)
    return target


def _check_package(package: PackageConfig, kind: str) -> None:
    if kind != "policy":
        raise ConfigError(f"package.path={package.path}: only a policy acts; the run holds a '{kind}' model.")
    if not package.path.endswith(".pt2"):
        raise ConfigError(f"package.path={package.path} must end in .pt2.")
    if package.batch < 1:
        raise ConfigError(f"package.batch is {package.batch}; it must be 1 or more.")
    if package.dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"package.dtype is '{package.dtype}'; choose float32 or bfloat16.")
    if package.device not in ("cpu", "cuda"):
        raise ConfigError(f"package.device is '{package.device}'; choose cpu or cuda.")
    if package.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("package.device=cuda, but this machine has no GPU. Run the export on one that has.")
    if storage.is_folder(package.path):
        raise ConfigError(f"package.path={package.path} is a folder; name a file in it.")
    check_writable(posixpath.dirname(package.path), "package.path")


def _write_package(model: Any, package: PackageConfig) -> None:
    # Imported here: the compiler takes seconds to load.
    from defi_models.act.package import write_package

    policy = model.to(package.device, getattr(torch, package.dtype)).eval()
    policy.adapter.latent_actions.mask_each_text()  # as it is served
    with scratch("package") as folder, native_scratch("package"), model_errors():
        difference = write_package(policy, folder / "act.pt2", package.batch)
        storage.put_file(folder / "act.pt2", package.path)
    print(f"{package.path}: acts as the policy, to {difference:.1g} of its largest action", flush=True)


def _of_run(settings: str, weights: str | None) -> dict[str, Any]:
    """The configuration of a run, exporting other weights where some are asked for."""
    values = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(storage.read_text(settings))))
    values = with_meaning(values)
    return values if weights is None else values | {"train": values["train"] | {"export_weights": weights}}
