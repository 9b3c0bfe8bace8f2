"""CLIP's text model: token states for GFDM, projected text for the policy's goal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from defi_models.encoders.hashed_text import HashedText
from defi_models.encoders.public_folder import known_fields, load_backbone
from defi_models.encoders.text_batches import TextBatch, text_batches
from defi_models.encoders.text_cache import CachedTexts, Entry, TextStates
from defi_models.encoders.tokenizer import load_tokenizer, require_tokenizer

_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "projection_dim",
    "hidden_act",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
)


class ClipText(CachedTexts):
    """CLIP ViT-B/32's text model, frozen; each distinct string is encoded once and held.

    Source: arXiv 2604.16391, released CALVIN configuration (20 tokens, 512 wide).
    """

    @dataclass(kw_only=True, frozen=True)
    class Config:
        """Sizes of the text model, under the names of transformers' `CLIPTextConfig`; the defaults are ViT-B/32's."""

        kind: ClassVar[str] = "clip"
        max_tokens: int = 20
        """Tokens of `states`; texts are padded or truncated to them. The goal uses CLIP's full context."""
        vocab_size: int = 49408
        hidden_size: int = 512
        intermediate_size: int = 2048
        num_hidden_layers: int = 12
        num_attention_heads: int = 8
        max_position_embeddings: int = 77
        projection_dim: int = 512
        hidden_act: str = "quick_gelu"
        eos_token_id: int = 2
        """2, as in the published config, makes transformers pool at the highest token id."""
        pad_token_id: int = 1
        bos_token_id: int = 0

        @property
        def dim(self) -> int:
            """Width of a token state."""
            return self.hidden_size

        @property
        def goal_dim(self) -> int:
            """Width of the goal vector."""
            return self.projection_dim

    def __init__(self, config: Config, tokenizer: Any = None, model: Any = None) -> None:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        if model is None:
            clip = CLIPTextConfig(**{name: getattr(config, name) for name in _SHARED_FIELDS})
            clip._attn_implementation = "sdpa"
            model = CLIPTextModelWithProjection(clip)
        self.model = model
        self.freeze()

    @classmethod
    def from_folder(cls, folder: str | Path, max_tokens: int = 20) -> Self:
        """The text model of a transformers CLIP folder (whole, or the text model with projection) with a tokenizer.

        Raises:
            ModelFolderError: Naming the file and what was expected.
        """
        from transformers import CLIPTextModelWithProjection

        model = load_backbone(CLIPTextModelWithProjection, folder, attn_implementation="sdpa")
        fields = known_fields(model.config.to_dict(), {name: name for name in _SHARED_FIELDS})
        return cls(cls.Config(max_tokens=max_tokens, **fields), load_tokenizer(Path(folder)), model)

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> TextStates:
        """Last hidden states (B, max_tokens, dim) of B strings, padded positions included, and their mask."""
        rows = self._cached("states", texts, self._encode_states)
        return TextStates(torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows]))

    @torch.no_grad()
    def goal(self, texts: Sequence[str]) -> Tensor:
        """Projected end-of-text states (B, projection_dim) of B strings, not normalised."""
        return torch.stack([row[0] for row in self._cached("goal", texts, self._encode_goals)])

    def entries(self, kind: str, texts: Sequence[str]) -> list[Entry]:
        """Features of each text as the cache and a store hold them; `kind` is one of states | goal."""
        with torch.no_grad():
            return self._cached(kind, texts, self._encode_states if kind == "states" else self._encode_goals)

    def _cached(
        self, kind: str, texts: Sequence[str], encode: Callable[[list[str]], list[Entry]]
    ) -> list[Entry]:
        return self.cache.get(kind, texts, self.device, self.dtype, encode)

    def _encode_states(self, texts: list[str]) -> list[Entry]:
        """States, mask and the end-of-text state of the text as it is cut."""
        tokens = self._tokens(texts, self.config.max_tokens)
        rows: list[Entry] = [()] * len(texts)
        for batch, states, ends in self._passes(tokens, self.config.max_tokens):
            for row, index in enumerate(batch.indices):
                # copies: a view would keep the whole batch in memory
                rows[index] = (states[row].clone(), batch.mask[row].clone(), ends[row].clone())
        return rows

    def _encode_goals(self, texts: list[str]) -> list[Entry]:
        """A text that `max_tokens` does not cut has the same end-of-text state in both; a longer one needs its own."""
        tokens = dict(zip(texts, self._tokens(texts, self.config.max_position_embeddings), strict=True))
        whole = [text for text in texts if len(tokens[text]) <= self.config.max_tokens]
        rows = self.entries("states", whole) if whole else []
        ends = dict(zip(whole, (row[2] for row in rows), strict=True))
        cut = [text for text in texts if text not in ends]
        for batch, _, found in self._passes(
            [tokens[text] for text in cut], self.config.max_position_embeddings
        ):
            ends |= {cut[index]: found[row] for row, index in enumerate(batch.indices)}
        projection = self.model.text_projection
        # one by one: a matrix of one row is not always computed as one of several is
        return [(projection(ends[text][None])[0],) for text in texts]

    def _tokens(self, texts: list[str], limit: int) -> list[list[int]]:
        tokenizer = require_tokenizer(self.tokenizer, "CLIP text encoder")
        found: list[list[int]] = tokenizer(texts, truncation=True, max_length=limit).input_ids
        return found

    def _passes(self, tokens: list[list[int]], length: int) -> Iterator[tuple[TextBatch, Tensor, Tensor]]:
        """Each batch with its states (R, length, dim) and end-of-text states (R, dim)."""
        pad = require_tokenizer(self.tokenizer, "CLIP text encoder").pad_token_id
        for batch in text_batches(tokens, [length], pad, self.device):
            mask = batch.attention(self.dtype, causal=True)
            found = self.model.text_model(input_ids=batch.ids, attention_mask=mask)
            yield batch, found.last_hidden_state, found.pooler_output


def build_text(config: ClipText.Config | HashedText.Config) -> ClipText | HashedText:
    """The text encoder of GFDM, with random weights where it has any."""
    return ClipText(config) if isinstance(config, ClipText.Config) else HashedText(config)
