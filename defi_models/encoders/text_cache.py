"""Cache of text features, which depend on the string alone: each string is encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from defi_models.inputs.checks import check_texts


class TextStates(NamedTuple):
    """Token features of a batch of texts."""

    states: Tensor
    """(B, S, C) float."""
    mask: Tensor
    """(B, S) bool, True = a token of the text, False = padding."""


class TextCache:
    """Least-recently-used features per string; each value is a tuple of tensors of one text."""

    def __init__(self, capacity: int = 4096) -> None:
        self.capacity = capacity
        self._held: OrderedDict[tuple[str, torch.device, torch.dtype], tuple[Tensor, ...]] = OrderedDict()

    def get(
        self,
        texts: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        encode: Callable[[list[str]], list[tuple[Tensor, ...]]],
    ) -> list[tuple[Tensor, ...]]:
        """One value per text.

        Args:
            texts: list of B strings.
            device: where the features lie, part of the cache's key.
            dtype: precision of the features, part of the cache's key.
            encode: called once, with the distinct texts that are not in the cache.

        Returns:
            B tuples of tensors.

        Raises:
            InputError: When `texts` is no list of strings.
        """
        check_texts("texts", texts)
        missing = [t for t in dict.fromkeys(texts) if (t, device, dtype) not in self._held]
        fresh = dict(zip(missing, encode(missing), strict=True)) if missing else {}
        found = []
        for text in texts:
            key = (text, device, dtype)
            if text in fresh:
                self._held[key] = fresh[text]
            self._held.move_to_end(key)
            found.append(self._held[key])
        while len(self._held) > self.capacity:
            self._held.popitem(last=False)
        return found

    def clear(self) -> None:
        """Forgets every text."""
        self._held.clear()
