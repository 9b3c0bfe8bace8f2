"""Texts of a batch go through a frozen encoder together, and none of them changes what another one gives.

A resumed run, or one with other workers, meets the texts in other company. So that it gets the same features bit for
bit, the shape of a pass depends on no text but those of its own length class: rows are padded to a length that follows
from the text alone, and on an accelerator, whose kernels are chosen by the number of rows, to one number of rows too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 32
"""Texts of a pass, at most."""


@dataclass(frozen=True)
class TextBatch:
    """Some texts of one length class, as an encoder takes them."""

    indices: list[int]
    """Which of the given texts they are; rows beyond them only fill the shape."""
    ids: Tensor
    """int64 (R, L), token numbers, R = `ROWS` on an accelerator."""
    mask: Tensor
    """bool (R, L), True = a token of the text."""

    def attention(self, dtype: torch.dtype, causal: bool) -> Tensor:
        """Additive mask of the attention, (R, 1, L, L) of `dtype`.

        Given whole, it spares the encoder the question whether anything is padded, whose answer depends on the other
        texts and waits for the device.
        """
        length = self.mask.shape[1]
        allowed = self.mask[:, None, None, :].expand(-1, 1, length, length)
        if causal:
            allowed = allowed & torch.ones(length, length, dtype=torch.bool, device=allowed.device).tril()
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )


def text_batches(
    tokens: Sequence[Sequence[int]], lengths: Sequence[int], pad: int, device: torch.device
) -> Iterator[TextBatch]:
    """Cuts texts into batches of one length class each.

    Args:
        tokens: token numbers of each text, 1 to max(lengths) of them.
        lengths: the classes; a text belongs to the smallest one that holds it.
        pad: number of the padding token.
        device: of the encoder.

    Yields:
        Batches that hold every text once.
    """
    classes: dict[int, list[int]] = {}
    for index, row in enumerate(tokens):
        classes.setdefault(min(length for length in lengths if length >= len(row)), []).append(index)
    for length in sorted(classes):
        for start in range(0, len(classes[length]), ROWS):
            indices = classes[length][start : start + ROWS]
            fill = 0 if device.type == "cpu" else ROWS - len(indices)
            rows = [list(tokens[index]) for index in [*indices, *[indices[0]] * fill]]
            ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
            mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
            yield TextBatch(indices, ids.to(device), mask.to(device))
