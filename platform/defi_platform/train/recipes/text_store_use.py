"""A store of text features in use by a training: every text of its corpora is there before the first step."""

from __future__ import annotations

import copy
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from defi_platform.config import TrainConfig
from defi_platform.data.latents.text_store import TextStore
from defi_platform.storage import StorageError
from defi_platform.train.engine.collectives import Communicator

TEXTS_AT_ONCE = 256
SHARD_BYTES = 64 << 20
SEEN_WITHIN_S = 60.0
"""Network disks show what another machine has written after up to half a minute."""
_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


TextEncoder = tuple[Any, tuple[str, ...]]
"""A frozen text encoder, and which features of a text training reads from it: states | goal."""


class TextStoreUse:
    """The store `data.text_cache`, filled with the texts of a run for the encoders of its model.

    Args:
        folder: of the store.
        train: whose precision the encoders have in training.
    """

    def __init__(self, folder: str, train: TrainConfig) -> None:
        self._folder, self._dtype = folder, _PRECISIONS[train.precision]
        self._texts = self._encoded = 0

    def fill(self, encoders: Sequence[TextEncoder], texts: Sequence[str], communicator: Communicator) -> str:
        """Encodes what is missing, each rank its share, and makes the encoders read the store (collective).

        Args:
            encoders: of the model, on CPU, as the recipe builds it; its parameters are not spread over ranks yet.
            texts: all different.
            communicator: of this rank.

        Returns: a line for people.
        """
        started, self._texts, encoded = time.monotonic(), len(texts), 0
        stores = []
        for encoder, kinds in encoders:
            store = TextStore(self._folder, encoder, _precision(encoder, self._dtype))
            stores.append(store)
            # In this order: a goal is made of the states.
            for kind in kinds:
                # A share of all texts, not of the missing ones: other ranks may have written some of theirs already.
                missing = store.missing(kind, texts[communicator.rank :: communicator.world_size])
                encoded += len(missing)
                if missing:
                    self._encode(encoder, store, kind, missing, communicator.device)
                    store.refresh()  # what this kind gave, the next one reads
        # Once it is known of all ranks, everything is written.
        self._encoded = int(communicator.sum(torch.tensor(encoded)))
        for store, (encoder, kinds) in zip(stores, encoders, strict=True):
            _take_in(store, kinds, texts)
            encoder.cache.store = store
        seconds = f"{time.monotonic() - started:.1f} s" if self._encoded else "0 s"
        return f"{len(texts)} texts, features of {self._encoded} encoded in {seconds}, the rest in {self._folder}"

    def summary(self) -> dict[str, Any]:
        """Values for the run's summary: texts of the corpora, and how many features this attempt encoded for them."""
        return {"folder": self._folder, "texts": self._texts, "encoded": self._encoded}

    def _encode(
        self, encoder: nn.Module, store: TextStore, kind: str, texts: Sequence[str], device: torch.device
    ) -> None:
        # A copy: the model itself goes to its device, and into its precision, with the engine.
        copied: Any = copy.deepcopy(encoder).to(device, store.dtype).eval()
        copied.cache.store = store
        held: list[tuple[torch.Tensor, ...]] = []
        names: list[str] = []
        size = 0
        for part in _parts(texts, TEXTS_AT_ONCE):
            entries = copied.entries(kind, part)
            held += [tuple(tensor.cpu() for tensor in entry) for entry in entries]
            names += part
            size += sum(tensor.nbytes for entry in entries for tensor in entry)
            if size >= SHARD_BYTES:
                store.write(kind, names, held)
                held, names, size = [], [], 0
        if names:
            store.write(kind, names, held)


def _take_in(store: TextStore, kinds: Sequence[str], texts: Sequence[str]) -> None:
    """Reads what all ranks have written. A step that ran an encoder on one rank alone would never end under ZeRO 3.

    Raises: StorageError when this rank does not see all of it.
    """
    deadline = time.monotonic() + SEEN_WITHIN_S
    while True:
        store.refresh()
        missing = sum(len(store.missing(kind, texts)) for kind in kinds)
        if not missing:
            return
        if time.monotonic() > deadline:
            raise StorageError(
                f"{missing} text features that the workers have just written are not to be seen in {store.folder} on "
                f"{socket.gethostname()}. Set data.text_cache to a folder that all machines share, or to s3://, and see that "
                "nothing deletes from it."
            )
        time.sleep(1)


def _precision(encoder: Any, dtype: torch.dtype) -> torch.dtype:
    """Precision of the features in training; encoders without weights keep theirs."""
    own: torch.dtype = encoder.dtype
    return dtype if any(True for _ in encoder.parameters()) else own


def _parts(texts: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(texts), size):
        yield list(texts[start : start + size])
