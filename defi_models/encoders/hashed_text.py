"""Text features without weights: hashed character n-grams, the same on every machine and in every process."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from defi_models.encoders.text_cache import Entry, TextCache, TextStates
from defi_models.precision import Float32Constants

_WORD = re.compile(r"[^\W_]+")
_SIGNS_PER_NGRAM = 8


class HashedText(Float32Constants):
    """Tokens are words; a word's vector is the signed sum of its hashed character n-grams.

    Related words ("open", "opened") share n-grams and so get similar vectors. The goal vector hashes words
    and pairs of neighbouring words of the whole text, so that word order shows.
    """

    @dataclass(kw_only=True, frozen=True)
    class Config:
        """Widths and length of the features."""

        kind: ClassVar[str] = "hashed"
        dim: int = 32
        """Width of a token's vector."""
        max_tokens: int = 12
        """Texts are cut or padded to this many words."""
        goal_dim: int = 64
        """Width of the goal vector."""

    anchor: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.cache = TextCache()
        """Features by string; its limits may be changed."""
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # carries the device

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> TextStates:
        """Token states (B, max_tokens, dim) of B strings, of unit variance, zero where padded, and their mask."""
        rows = self.entries("states", texts)
        return TextStates(torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows]))

    @torch.no_grad()
    def goal(self, texts: Sequence[str]) -> Tensor:
        """Goal vectors (B, goal_dim) of B strings, of unit variance."""
        return torch.stack([row[0] for row in self.entries("goal", texts)])

    def entries(self, kind: str, texts: Sequence[str]) -> list[Entry]:
        """Features of each text as the cache and a store hold them; `kind` is one of states | goal."""
        encode = self._encode_states if kind == "states" else self._encode_goals
        return self.cache.get(kind, texts, self.device, self.dtype, encode)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the features, whatever the model's is."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the features."""
        return self.anchor.device

    def _encode_states(self, texts: list[str]) -> list[Entry]:
        config = self.config
        rows: list[Entry] = []
        for text in texts:
            states = torch.zeros(config.max_tokens, config.dim)
            mask = torch.zeros(config.max_tokens, dtype=torch.bool)
            for index, word in enumerate(_words(text)[: config.max_tokens]):
                states[index] = _hashed(_ngrams(word), config.dim)
                mask[index] = True
            rows.append((states.to(self.device), mask.to(self.device)))
        return rows

    def _encode_goals(self, texts: list[str]) -> list[Entry]:
        rows: list[Entry] = []
        for text in texts:
            words = _words(text)
            pairs = [f"{left} {right}" for left, right in itertools.pairwise(words)]
            rows.append((_hashed([*words, *pairs], self.config.goal_dim).to(self.device),))
        return rows


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(word: str) -> Iterator[str]:
    """The word itself and its character n-grams of 3 and 4, with marks at both ends."""
    marked = f"<{word}>"
    yield marked
    for size in (3, 4):
        for start in range(len(marked) - size + 1):
            yield marked[start : start + size]


def _hashed(features: Iterator[str] | Sequence[str], dim: int) -> Tensor:
    """Signed feature hashing to a (dim,) vector of norm sqrt(dim); zero when there is no feature."""
    values = [0.0] * dim
    for feature in features:
        digest = hashlib.blake2b(feature.encode(), digest_size=4 * _SIGNS_PER_NGRAM).digest()
        for start in range(0, len(digest), 4):
            number = int.from_bytes(digest[start : start + 4], "little")
            values[(number >> 1) % dim] += 1.0 if number & 1 else -1.0
    norm = math.sqrt(sum(value * value for value in values))
    return torch.tensor([value * math.sqrt(dim) / norm for value in values] if norm else values)
