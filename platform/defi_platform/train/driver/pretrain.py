"""Stage I: pretraining of GFDM and GIDM, one of them or both in parallel."""

from __future__ import annotations

from defi_platform.config import PretrainBothConfig, PretrainConfig
from defi_platform.errors import ConfigError
from defi_platform.train.driver.dry_run import DryRun
from defi_platform.train.driver.run import RunSummary, dry_run_all, train
from defi_platform.train.recipes.registry import PRETRAININGS


def pretrain(kind: str, config: PretrainConfig) -> RunSummary | DryRun:
    """Pretrains GFDM or GIDM on action-free video; resumes an earlier attempt.

    Args:
        kind: gfdm | gidm.
        config: of the run.

    Raises: UserError.
    """
    if kind not in PRETRAININGS:
        raise ConfigError(f"there is no pretraining '{kind}'; choose {' or '.join(PRETRAININGS)}.")
    recipe = PRETRAININGS[kind](config)
    return dry_run_all([recipe])[0] if config.dry_run else train(config.ray, [recipe])[0]


def pretrain_both(config: PretrainBothConfig) -> dict[str, RunSummary] | dict[str, DryRun]:
    """Pretrains both at the same time on one cluster, each with its own resources.

    A failure of one does not stop the other.

    Returns: results by kind.
    Raises: TrainingFailed at the end, naming the run that failed; UserError before anything starts.
    """
    recipes = [PRETRAININGS["gfdm"](config.gfdm), PRETRAININGS["gidm"](config.gidm)]
    kinds = [recipe.kind for recipe in recipes]
    if config.dry_run:
        return dict(zip(kinds, dry_run_all(recipes), strict=True))
    return dict(zip(kinds, train(config.ray, recipes), strict=True))
