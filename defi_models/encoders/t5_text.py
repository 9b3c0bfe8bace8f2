"""T5's encoder: the instruction as GIDM reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from defi_models.encoders.public_folder import known_fields, load_backbone
from defi_models.encoders.text_batches import text_batches
from defi_models.encoders.text_cache import CachedTexts, Entry, TextStates
from defi_models.encoders.tokenizer import load_tokenizer, require_tokenizer

_LENGTH_STEP = 8
"""Texts are padded to multiples of it while they are encoded."""
_SHARED_FIELDS = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "feed_forward_proj",
)


class T5Text(CachedTexts):
    """T5-base's encoder, frozen; each distinct string is encoded once and held without padding.

    Padded positions of a batch are zero states with a False mask.
    """

    @dataclass(kw_only=True, frozen=True)
    class Config:
        """Sizes of the encoder, under the names of transformers' `T5Config`; the defaults are T5-base's."""

        kind: ClassVar[str] = "t5"
        max_tokens: int = 77
        """Longer texts are truncated."""
        vocab_size: int = 32128
        d_model: int = 768
        d_kv: int = 64
        d_ff: int = 3072
        num_layers: int = 12
        num_heads: int = 12
        relative_attention_num_buckets: int = 32
        relative_attention_max_distance: int = 128
        feed_forward_proj: str = "relu"

        @property
        def dim(self) -> int:
            """Width of a token state."""
            return self.d_model

    def __init__(self, config: Config, tokenizer: Any = None, model: Any = None) -> None:
        from transformers import T5Config, T5EncoderModel

        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.pad_to_max = False
        """Whether states have `max_tokens` positions, whatever the texts; else as many as the longest of the batch."""
        if model is None:
            t5 = T5Config(**{name: getattr(config, name) for name in _SHARED_FIELDS}, use_cache=False)
            t5._attn_implementation = "sdpa"
            model = T5EncoderModel(t5)
        self.model = model
        self.freeze()

    @classmethod
    def from_folder(cls, folder: str | Path, max_tokens: int = 77) -> Self:
        """The encoder of a transformers T5 folder (whole, or the encoder alone) with a tokenizer.

        Raises:
            ModelFolderError: Naming the file and what was expected.
        """
        from transformers import T5EncoderModel

        model = load_backbone(T5EncoderModel, folder, attn_implementation="sdpa")
        fields = known_fields(model.config.to_dict(), {name: name for name in _SHARED_FIELDS})
        return cls(cls.Config(max_tokens=max_tokens, **fields), load_tokenizer(Path(folder)), model)

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> TextStates:
        """Last hidden states (B, S, d_model) of B strings and their mask; S: see `pad_to_max`."""
        rows = self.entries("states", texts)
        states = pad_sequence([row[0] for row in rows], batch_first=True)
        mask = pad_sequence([row[1] for row in rows], batch_first=True)
        whole = all(len(row[0]) == states.shape[1] for row in rows)
        if self.pad_to_max:
            missing = self.config.max_tokens - states.shape[1]
            whole = whole and not missing
            states, mask = pad(states, (0, 0, 0, missing)), pad(mask, (0, missing))
        return TextStates(states, mask, whole)

    def entries(self, kind: str, texts: Sequence[str]) -> list[Entry]:
        """Features of each text as the cache and a store hold them; `kind` is states."""
        with torch.no_grad():
            return self.cache.get(kind, texts, self.device, self.dtype, self._encode)

    def _encode(self, texts: list[str]) -> list[Entry]:
        tokenizer = require_tokenizer(self.tokenizer, "T5 text encoder")
        limit = self.config.max_tokens
        tokens: list[list[int]] = tokenizer(texts, truncation=True, max_length=limit).input_ids
        rows: list[Entry] = [()] * len(texts)
        lengths = [*range(_LENGTH_STEP, limit, _LENGTH_STEP), limit]
        for batch in text_batches(tokens, lengths, tokenizer.pad_token_id, self.device):
            mask = batch.attention(self.dtype, causal=False)
            states = self.model(input_ids=batch.ids, attention_mask=mask).last_hidden_state
            for row, index in enumerate(batch.indices):
                length = len(tokens[index])
                # copies: a view would keep the whole batch in memory
                rows[index] = (states[row, :length].clone(), batch.mask[row, :length].clone())
        return rows
