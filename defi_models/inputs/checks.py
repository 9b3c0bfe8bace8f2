"""Checks of what the public model calls are given: a message names the key, what was expected and what was got.

Only shapes, dtypes and Python types are compared, so that nothing waits for a GPU; values are looked at where they
are few and on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from defi_models.errors import InputError

MAX_SHOWN = 40
"""Characters of a string that a message repeats."""


class AtLeast(NamedTuple):
    """A size that is free above a minimum."""

    name: str
    minimum: int


Size: TypeAlias = int | str | AtLeast
"""An exact size, the letter of a free one (at least 1), or one with a minimum."""


def check_tensor(
    key: str, value: object, shape: Sequence[Size], dtype: torch.dtype | None, hint: str = ""
) -> Tensor:
    """A tensor of the expected shape and dtype, unchanged.

    Args:
        key: name of the argument or of the batch's key.
        value: what was given for it.
        shape: expected sizes; letters stand for any size of at least 1.
        dtype: expected dtype; None takes every floating one.
        hint: further sentence of the message, how to mend it.

    Returns:
        `value`.

    Raises:
        InputError: For anything else, naming key, expected and got.
    """
    if isinstance(value, Tensor) and _fits(value, shape, dtype):
        return value
    sizes = ", ".join(map(_size_text, shape))
    expected = f"{'float' if dtype is None else _dtype_text(dtype)} ({sizes}{',' if len(shape) == 1 else ''})"
    raise InputError(f"{key}: got {_text(value)}; expected {expected}.{f' {hint}' if hint else ''}")


def check_texts(key: str, value: object, batch: int | None = None, of: str = "") -> Sequence[str]:
    """A sequence of strings, one per sample, unchanged; a lone string is none.

    Args:
        key: name of the argument or of the batch's key.
        value: what was given for it.
        batch: expected number of strings; None takes any number of at least one.
        of: key whose batch size `batch` is.

    Returns:
        `value`.

    Raises:
        InputError: For anything else, naming key, expected and got.
    """
    expected = "a list of strings, one per sample" if batch is None else f"a list of {batch} string(s)"
    if batch is not None and of:
        expected += f", one per sample of '{of}'"
    if isinstance(value, str) or not isinstance(value, Sequence):
        hint = f" Write [{value[:MAX_SHOWN]!r}] for one sample." if isinstance(value, str) else ""
        got = _text(value).removesuffix(", not a torch.Tensor")
        raise InputError(f"{key}: got {got}; expected {expected}.{hint}")
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise InputError(f"{key}[{index}]: got {_text(text)}; expected a string.")
    if not value or (batch is not None and len(value) != batch):
        raise InputError(f"{key}: got {len(value)} string(s); expected {expected}.")
    return value


def check_finite(key: str, value: Tensor) -> None:
    """Refuses NaN and infinity in a small tensor on the CPU; on other devices the values are not waited for.

    Raises:
        InputError: Naming key, expected and got.
    """
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = int((~value.isfinite()).sum())
    if wrong:
        raise InputError(
            f"{key}: got {wrong} NaN or infinite of {value.numel()} values; expected finite {_text(value)}."
        )


def check_count(key: str, value: object, minimum: int = 1) -> None:
    """Refuses anything but a whole number of at least `minimum`.

    Args:
        key: name of the argument.
        value: what was given for it; NumPy's whole numbers count as such.
        minimum: smallest allowed value.

    Raises:
        InputError: Naming key, expected and got.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise InputError(f"{key}: got {value!r}; expected a whole number of at least {minimum}.")


def check_number(key: str, value: object) -> None:
    """Refuses anything but a finite number.

    Raises:
        InputError: Naming key, expected and got.
    """
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not number or not math.isfinite(float(value)):  # type: ignore[arg-type]
        raise InputError(f"{key}: got {value!r}; expected a finite number.")


def require(batch: object, key: str, expected: str) -> Any:
    """The value of a batch's key.

    Args:
        batch: the mapping that a model call was given.
        key: the key that it must have.
        expected: what belongs there, in words, for the message.

    Returns:
        The value.

    Raises:
        InputError: When `batch` is no mapping or has no such key; it lists the keys that there are.
    """
    if not isinstance(batch, Mapping):
        raise InputError(f"batch: got {_text(batch)}; expected a mapping with '{key}' ({expected}).")
    if key not in batch:
        there = ", ".join(map(str, batch)) or "none"
        raise InputError(f"{key}: got no such key, only {there}; expected {expected}.")
    return batch[key]


def check_shared(name: str, rows: Tensor, samples: int, width: int) -> None:
    """Checks token states that samples can share: as many rows, or one per group of neighbours.

    Args:
        name: of the rows in the message.
        rows: (R, S, width).
        samples: number of samples.
        width: of a token.

    Raises:
        InputError: Saying what was expected and what was got.
    """
    check_tensor(name, rows, ("R", "S", width), None)
    if samples % len(rows):
        raise InputError(
            f"{name}: got {_text(rows)}; expected as many rows as the {samples} samples, or one per group of them."
        )


def _fits(value: Tensor, shape: Sequence[Size], dtype: torch.dtype | None) -> bool:
    if value.ndim != len(shape):
        return False
    if not (value.is_floating_point() if dtype is None else value.dtype == dtype):
        return False
    for size, wanted in zip(value.shape, shape, strict=True):
        if isinstance(wanted, int):
            if size != wanted:
                return False
        elif size < (wanted.minimum if isinstance(wanted, AtLeast) else 1):
            return False
    return True


def _text(value: object) -> str:
    """Type, dtype and shape of what was given."""
    if isinstance(value, Tensor):
        return f"{_dtype_text(value.dtype)} {tuple(value.shape)}"
    name = type(value).__name__
    if isinstance(value, str):
        return f"the {name} {value[:MAX_SHOWN]!r}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{name} {value.dtype} {tuple(value.shape)}, not a torch.Tensor"
    return name


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size_text(size: Size) -> str:
    if isinstance(size, AtLeast):
        return f"{size.name} >= {size.minimum}"
    return str(size)
