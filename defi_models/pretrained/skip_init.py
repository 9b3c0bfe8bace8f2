"""Construction of a model without its random initialisation, for weights that are about to be loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_INITIALISERS = frozenset(name for name in vars(torch.nn.init) if name.endswith("_") and name[0] != "_")
"""`kaiming_uniform_` and its like; the draws they end in, `normal_` and so on, have the same names on tensors."""


class skip_init(TorchFunctionMode):
    """Context in which parameters are allocated but not initialised; every one has to be loaded afterwards.

    Seconds per billion parameters are saved; `load_exactly` refuses a file that leaves one of them out.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(target, torch.nn.Parameter) and getattr(func, "__name__", "") in _INITIALISERS:
            return target
        return func(*args, **kwargs)
