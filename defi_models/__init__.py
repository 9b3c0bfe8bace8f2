"""GFDM, GIDM and the fused policy: frames and text go in; predicted video, latent actions or robot actions come out.

    from defi_models import DeFIPolicy, presets

    policy = DeFIPolicy.from_pretrained(FOLDER)
    config = presets.gfdm("nano", frames=4)

Method: Disentangled Robot Learning via Separate Forward and Inverse Dynamics Pretraining, arXiv 2604.16391.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from defi_models import presets
    from defi_models.gfdm import GFDM
    from defi_models.gidm import GIDM
    from defi_models.policy import DeFIPolicy

__version__ = "0.1.0"

__all__ = ["GFDM", "GIDM", "DeFIPolicy", "__version__", "presets"]

_DEFINED_IN = {"GFDM": "gfdm", "GIDM": "gidm", "DeFIPolicy": "policy"}


def __getattr__(name: str) -> Any:
    # On first use (PEP 562): who asks for the version, or where the package lies, does not wait for torch.
    if name == "presets":
        return import_module("defi_models.presets")
    if name in _DEFINED_IN:
        value = getattr(import_module(f"defi_models.{_DEFINED_IN[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'defi_models' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
