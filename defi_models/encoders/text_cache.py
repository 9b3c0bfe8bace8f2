"""Cache of text features, which depend on the string alone: each string is encoded once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from defi_models.encoders.frozen import Frozen
from defi_models.inputs.checks import check_texts

Entry = tuple[Tensor, ...]
"""Features of one text."""

MAX_BYTES = 256 << 20
"""Bytes that a cache holds unless it is set otherwise: about 6,000 texts of CLIP ViT-B/32 in float32."""


class TextStates(NamedTuple):
    """Token features of a batch of texts."""

    states: Tensor
    """(B, S, C) float."""
    mask: Tensor
    """(B, S) bool, True = a token of the text, False = padding."""
    whole: bool = False
    """Whether there is no padding, as the host knows without looking at the mask."""

    @property
    def key_mask(self) -> Tensor | None:
        """`mask`, or None where it would be all True: attention without a mask has faster kernels."""
        return None if self.whole else self.mask


class TextStore(Protocol):
    """Features of texts that were encoded before, outside of memory."""

    dtype: torch.dtype
    """Precision of the encoder that made them; for another one they do not count."""

    def read(self, kind: str, texts: Sequence[str]) -> list[Entry | None]:
        """Features of each text on the CPU, None where they are not stored."""
        ...


class TextCache:
    """Least-recently-used features per string; each value is a tuple of tensors of one text.

    What is in memory comes from there, then what is in `store`, where there is one; the rest is encoded. At least the
    texts of the last call are held, and beyond them no more than the limits allow. Threads may share one.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        """Bytes of the features in memory, of all kinds, devices and precisions together."""
        self.max_texts: int | None = None
        """Entries in memory; None: as many as `max_bytes` allows."""
        self.store: TextStore | None = None
        """Where features that are not in memory are looked for before they are computed."""
        self.encoded = 0
        """Entries that were computed so far."""
        self.held_bytes = 0
        """Bytes of the features in memory."""
        self._held: OrderedDict[tuple[str, str, torch.device, torch.dtype], Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """All but the lock, which no copy shares."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the state of another one."""
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def get(
        self,
        kind: str,
        texts: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        encode: Callable[[list[str]], list[Entry]],
    ) -> list[Entry]:
        """One value per text.

        Args:
            kind: which features of the texts: states | goal.
            texts: list of B strings.
            device: where the features lie, part of the cache's key.
            dtype: precision of the encoder, part of the cache's key.
            encode: called at most once, with the distinct texts that are nowhere.

        Returns:
            B tuples of tensors.

        Raises:
            InputError: When `texts` is no list of strings.
        """
        check_texts("texts", texts)
        distinct = list(dict.fromkeys(texts))
        with self._lock:
            found = {text: self._held.get((kind, text, device, dtype)) for text in distinct}
        missing = [text for text in distinct if found[text] is None]
        if missing and self.store is not None and self.store.dtype == dtype:
            for text, entry in zip(missing, self.store.read(kind, missing), strict=True):
                found[text] = None if entry is None else tuple(part.to(device) for part in entry)
            missing = [text for text in missing if found[text] is None]
        if missing:
            found |= zip(missing, encode(missing), strict=True)
        rows: dict[str, Entry] = {text: entry for text, entry in found.items() if entry is not None}
        with self._lock:
            self.encoded += len(missing)
            for text, entry in rows.items():
                self._hold((kind, text, device, dtype), entry)
            self._forget(keep=len(rows))
        return [rows[text] for text in texts]

    def clear(self) -> None:
        """Forgets every text that is in memory."""
        with self._lock:
            self._held.clear()
            self.held_bytes = 0

    def _hold(self, key: tuple[str, str, torch.device, torch.dtype], entry: Entry) -> None:
        if key not in self._held:
            self._held[key] = entry
            self.held_bytes += _bytes(entry)
        self._held.move_to_end(key)

    def _forget(self, keep: int) -> None:
        """Forgets the entries that were not used for longest, but not the last `keep`."""
        texts = len(self._held) if self.max_texts is None else self.max_texts
        while len(self._held) > keep and (len(self._held) > texts or self.held_bytes > self.max_bytes):
            _, entry = self._held.popitem(last=False)
            self.held_bytes -= _bytes(entry)


class CachedTexts(Frozen):
    """A frozen text encoder, each text of which is encoded once, until its weights are others."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = TextCache()
        """Features by string; its limits may be changed."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.cache.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        if any(name.startswith(prefix) for name in state_dict):
            self.cache.clear()
            self.cache.store = None  # of the weights before
        super()._load_from_state_dict(state_dict, prefix, *more)


def _bytes(entry: Entry) -> int:
    return sum(part.nbytes for part in entry)
