"""Stage II: the fused policy on labelled episodes."""

from __future__ import annotations

from defi_platform.config import FinetuneConfig
from defi_platform.train.driver.dry_run import DryRun
from defi_platform.train.driver.run import RunSummary, dry_run_all, train
from defi_platform.train.recipes.policy import PolicyRecipe


def finetune(config: FinetuneConfig) -> RunSummary | DryRun:
    """Fine-tunes the policy fused from two pretrained model folders; resumes an earlier attempt.

    Raises: UserError.
    """
    recipe = PolicyRecipe(config)
    return dry_run_all([recipe])[0] if config.dry_run else train(config.ray, [recipe])[0]
