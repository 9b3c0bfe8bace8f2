"""A store of text features in use by a training: every text of its corpora is there before the first step."""

from __future__ import annotations

import copy
import functools
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
EVALUATION_DTYPE = torch.float32
"""Precision of the models that `Recipe.evaluate` gets."""
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

    def fill(
        self,
        encoders: Sequence[TextEncoder],
        texts: Sequence[str],
        communicator: Communicator,
        evaluated: Sequence[str] = (),
    ) -> str:
        """Encodes what is missing, each rank its share, and makes the encoders read the store (collective).

        Args:
            encoders: of the model, on CPU, as the recipe builds it; its parameters are not spread over ranks yet.
            texts: all different.
            communicator: of this rank.
            evaluated: texts that evaluations of checkpoints read, in their precision; all different.

        Returns: a line for people.
        """
        started, self._texts, self._encoded = time.monotonic(), len(texts), 0
        of_evaluations = [(EVALUATION_DTYPE, evaluated)] if evaluated else []
        for dtype, wanted in [*of_evaluations, (self._dtype, texts)]:
            write = functools.partial(self._write_share, encoders, dtype, wanted, communicator)
            stores, encoded = communicator.together(write)
            # It is known of all ranks now that everything is written.
            self._encoded += int(communicator.sum(torch.tensor(encoded)))
            communicator.together(functools.partial(_take_in_all, stores, encoders, wanted))
        for store, (encoder, _) in zip(stores, encoders, strict=True):
            encoder.cache.store = store
        seconds = f"{time.monotonic() - started:.1f} s" if self._encoded else "0 s"
        more = f" and {len(evaluated)} of evaluations" if evaluated else ""
        return f"{len(texts)} texts{more}, features of {self._encoded} encoded in {seconds}, the rest in {self._folder}"

    def summary(self) -> dict[str, Any]:
        """Values for the run's summary: texts of the corpora, and how many features this attempt encoded."""
        return {"folder": self._folder, "texts": self._texts, "encoded": self._encoded}

    def _write_share(
        self,
        encoders: Sequence[TextEncoder],
        dtype: torch.dtype,
        texts: Sequence[str],
        communicator: Communicator,
    ) -> tuple[list[TextStore], int]:
        """Writes what is missing of this rank's share. Returns: the stores of all encoders; the number of features."""
        stores = [_store_of(self._folder, encoder, dtype) for encoder, _ in encoders]
        encoded = 0
        for store, (encoder, kinds) in zip(stores, encoders, strict=True):
            if communicator.is_rank_zero:
                store.remove_leftovers()
            # A share of all texts, not of the missing ones: others may have written some of theirs already.
            share = texts[communicator.rank :: communicator.world_size]
            encoded += self._add(encoder, store, kinds, share, communicator.device)
        return stores, encoded

    def _add(
        self,
        encoder: nn.Module,
        store: TextStore,
        kinds: Sequence[str],
        texts: Sequence[str],
        device: torch.device,
    ) -> int:
        """Writes what is missing of texts. Returns: the number of features."""
        encoded = 0
        # In this order: a goal is made of the states.
        for kind in kinds:
            if missing := store.missing(kind, texts):
                encoded += len(missing)
                self._encode(encoder, store, kind, missing, device)
                store.refresh()  # what this kind gave, the next one reads
        return encoded

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
                _write(store, kind, names, held)
                held, names, size = [], [], 0
        if names:
            _write(store, kind, names, held)


def _write(
    store: TextStore, kind: str, texts: Sequence[str], entries: Sequence[tuple[torch.Tensor, ...]]
) -> None:
    try:
        store.write(kind, texts, entries)
    except OSError as error:
        raise StorageError(
            f"text features cannot be written to {store.folder} on {socket.gethostname()}: {error}. Make room there and see "
            "that it may be written, or set data.text_cache to another folder; what was encoded before is kept."
        ) from error


def read_only(folder: str, encoders: Sequence[TextEncoder]) -> None:
    """Has the text encoders of a model that is evaluated read a store; what is not there they encode, and write nothing.

    Args:
        folder: of the store; it may be absent.
        encoders: of the model, in fp32, on any device.

    Raises: StorageError when the store cannot be read.
    """
    for encoder, _ in encoders:
        encoder.cache.store = _store_of(folder, encoder, EVALUATION_DTYPE)


def _store_of(folder: str, encoder: Any, dtype: torch.dtype) -> TextStore:
    """The part of a store that is of one encoder; encoders without weights keep their precision."""
    own: torch.dtype = encoder.dtype
    return TextStore(folder, encoder, dtype if any(True for _ in encoder.parameters()) else own)


def _take_in_all(stores: Sequence[TextStore], encoders: Sequence[TextEncoder], texts: Sequence[str]) -> None:
    for store, (_, kinds) in zip(stores, encoders, strict=True):
        _take_in(store, kinds, texts)


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


def _parts(texts: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(texts), size):
        yield list(texts[start : start + size])
