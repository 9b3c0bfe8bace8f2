"""Operations of a computation, counted where PyTorch dispatches them: on the CPU or, without allocating, on meta."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
}
"""Operations whose result the host has to know before it goes on."""
_NO_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"),
    *("lift_fresh", "sym_size", "sym_stride", "sym_numel", "_reshape_alias"),
}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "_convolution", "sdpa"}


class Operations(TorchDispatchMode):
    """Counts what runs inside of it: `with Operations() as seen: model(x)`.

    Composite operations count as the kernels they fall apart into; attention counts as one fused kernel, also on the
    meta device, which has none. On meta, numbers that the host reads have no value: the pass ends there, as it would
    end while a CUDA graph is captured.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = 0
        """Operations that launch at least one kernel."""
        self.flops = 0
        """Of matrix products, convolutions and attention; a multiply-add counts two."""
        self.product_bytes = 0
        """Read and written by them, each tensor once per operation."""
        self.other_bytes = 0
        """Read and written by everything else, which a compiler could fuse."""
        self.waits = 0
        """Times the host waits for a value."""
        self.uploads = 0
        """Tensors made from numbers of the host or moved from it."""
        self.records: list[tuple[int, int, bool]] = []
        """Of each kernel: floating-point operations, bytes, and whether it is one of the products."""
        self.by_name: Counter[str] = Counter()
        """Kernels by the name of their operation."""
        self._plain_attention = F.scaled_dot_product_attention
        self._fused = False
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> Self:
        # torch has no types for the methods of modes
        replaced: tuple[tuple[Any, str, Any], ...] = (
            (F, "scaled_dot_product_attention", self._attention),
            # on the meta device they dispatch nothing
            (torch, "tensor", self._uploading(torch.tensor)),
            (torch, "as_tensor", self._uploading(torch.as_tensor)),
        )
        for owner, name, ours in replaced:
            self._restore.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, ours)
        return cast(Self, super().__enter__())  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        self._restore.close()
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        if name in _WAITS or _moves_to_host(name, args, kwargs):
            self.waits += 1
        if _moves_from_host(name, args, kwargs):
            self.uploads += 1
        result = func(*args, **kwargs)
        if self._fused or func.is_view or name in _NO_KERNEL or func._schema.name.startswith("prim::"):
            return result
        flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result) if _known(func) else 0
        self._count(name, int(flops), (args, kwargs), result)
        return result

    def _count(self, name: str, flops: int, given: Any, result: Any) -> None:
        self.kernels += 1
        self.by_name[name] += 1
        self.flops += flops
        moved = _bytes(given) + _bytes(result)
        self.records.append((flops, moved, name in _PRODUCTS))
        if name in _PRODUCTS:
            self.product_bytes += moved
        else:
            self.other_bytes += moved

    def _uploading(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(data: Any, *more: Any, **options: Any) -> Tensor:
            made = make(data, *more, **options)
            if not isinstance(data, Tensor):
                self.uploads += 1
            return made

        return counted

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
        length, width = query.shape[-2], value.shape[-1]
        products = query[..., 0, 0].numel() * length * key.shape[-2] * (query.shape[-1] + width)
        if query.device.type == "meta":
            out = query.new_empty(*query.shape[:-1], width)
        else:
            self._fused = True
            out = self._plain_attention(query, key, value, *more, **options)
            self._fused = False
        self._count("sdpa", 2 * products, (query, key, value), out)
        return out


def _known(func: Any) -> bool:
    return func.overloadpacket in flop_registry


def _bytes(nested: Any) -> int:
    return sum(_size(leaf) for leaf in tree_leaves(nested) if isinstance(leaf, Tensor))


def _size(tensor: Tensor) -> int:
    # what is broadcast is read once
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def _moves_to_host(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    source, target = _ends(name, args, kwargs)
    return source is not None and source != "cpu" and target == "cpu"


def _moves_from_host(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "index":  # by a list of numbers: PyTorch moves it to where the indexed tensor lies
        return any(i is not None and i.device.type != args[0].device.type for i in args[1])
    source, target = _ends(name, args, kwargs)
    return source == "cpu" and target not in (None, "cpu")


def _ends(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, str | None]:
    """Devices between which an operation moves a tensor."""
    if name == "_to_copy" and kwargs.get("device") is not None:
        return args[0].device.type, torch.device(kwargs["device"]).type
    if name == "copy_":
        return args[1].device.type, args[0].device.type
    return None, None
