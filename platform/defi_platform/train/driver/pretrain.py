"""Stage I: GFDM and GIDM, one of them or both side by side."""

from __future__ import annotations

from defi_platform.config import PretrainBothConfig, PretrainConfig
from defi_platform.errors import ConfigError
from defi_platform.train.driver.dry_run import DryRun
from defi_platform.train.driver.run import RunSummary, dry_run_all, train
from defi_platform.train.recipe import Recipe
from defi_platform.train.recipes.gfdm import GFDMRecipe
from defi_platform.train.recipes.gidm import GIDMRecipe

RECIPES: dict[str, type[GFDMRecipe] | type[GIDMRecipe]] = {"gfdm": GFDMRecipe, "gidm": GIDMRecipe}


def pretrain(kind: str, config: PretrainConfig) -> RunSummary | DryRun:
    """Pretrains GFDM or GIDM on action-free video; goes on where an earlier attempt was.

    Args:
        kind: gfdm | gidm.
    Raises: UserError.
    """
    if kind not in RECIPES:
        raise ConfigError(f"there is no pretraining '{kind}'; choose {' or '.join(RECIPES)}.")
    recipe = RECIPES[kind](config)
    return dry_run_all([recipe])[0] if config.dry_run else train(config.ray, [recipe])[0]


def pretrain_both(config: PretrainBothConfig) -> dict[str, RunSummary] | dict[str, DryRun]:
    """Pretrains both at the same time on one cluster, each with its own resources.

    One that fails leaves the other alone. Raises: TrainingFailed at the end, naming it.
    """
    recipes: list[Recipe] = [GFDMRecipe(config.gfdm), GIDMRecipe(config.gidm)]
    names = ("gfdm", "gidm")
    if config.dry_run:
        return dict(zip(names, dry_run_all(recipes), strict=True))
    return dict(zip(names, train(config.ray, recipes), strict=True))
