"""Videos go in, a policy that robots can call comes out: the jobs of the DeFI platform, on Ray.

Each function does what the script of its name in jobs/ does, with a config as `load_config` reads it:

    from defi_platform import load_config, pretrain
    from defi_platform.config import PretrainConfig

    config = load_config(PretrainConfig, "configs/demo/pretrain_gfdm.yaml", ["train.steps=100"])
    print(pretrain("gfdm", config).text())

A config that does not fit, data that is absent and the like raise `UserError`, whose message names the fix.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from defi_models import __version__

if TYPE_CHECKING:
    from defi_platform.config.loader import load_config
    from defi_platform.data.ingest.pipeline import run_ingest as ingest_videos
    from defi_platform.demo import run_demo
    from defi_platform.errors import UserError
    from defi_platform.evaluate.html.corpus_page import inspect_corpora
    from defi_platform.evaluate.record import record as record_demos
    from defi_platform.evaluate.rollouts import evaluate as evaluate_policy
    from defi_platform.serve.deployment.command import serve_policy
    from defi_platform.train.driver.export_run import export_run as export_model
    from defi_platform.train.driver.finetune import finetune as finetune_policy
    from defi_platform.train.driver.pretrain import pretrain, pretrain_both

__all__ = [
    "UserError",
    "__version__",
    "evaluate_policy",
    "export_model",
    "finetune_policy",
    "ingest_videos",
    "inspect_corpora",
    "load_config",
    "pretrain",
    "pretrain_both",
    "record_demos",
    "run_demo",
    "serve_policy",
]

# None is called as a module here is: Python would replace it by the module at that module's import.
_DEFINED_AS = {
    "UserError": "errors:UserError",
    "evaluate_policy": "evaluate.rollouts:evaluate",
    "export_model": "train.driver.export_run:export_run",
    "finetune_policy": "train.driver.finetune:finetune",
    "ingest_videos": "data.ingest.pipeline:run_ingest",
    "inspect_corpora": "evaluate.html.corpus_page:inspect_corpora",
    "load_config": "config.loader:load_config",
    "pretrain": "train.driver.pretrain:pretrain",
    "pretrain_both": "train.driver.pretrain:pretrain_both",
    "record_demos": "evaluate.record:record",
    "run_demo": "demo:run_demo",
    "serve_policy": "serve.deployment.command:serve_policy",
}


def __getattr__(name: str) -> Any:
    # On first use (PEP 562), because torch and Ray take seconds to import.
    if name not in _DEFINED_AS:
        raise AttributeError(f"module 'defi_platform' has no attribute '{name}'")
    module, _, attribute = _DEFINED_AS[name].partition(":")
    return getattr(import_module(f"defi_platform.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
