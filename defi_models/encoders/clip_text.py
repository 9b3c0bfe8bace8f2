"""CLIP's text model: token states for GFDM, projected text for the policy's goal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from defi_models.encoders.frozen import Frozen
from defi_models.encoders.hashed_text import HashedText
from defi_models.encoders.public_folder import known_fields, load_backbone
from defi_models.encoders.text_cache import TextCache, TextStates
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


class ClipText(Frozen):
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
        self.cache = TextCache()
        """Features by string; its capacity may be changed."""
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
        rows = self._encoded(texts)
        return TextStates(torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows]))

    @torch.no_grad()
    def goal(self, texts: Sequence[str]) -> Tensor:
        """Projected end-of-text states (B, projection_dim) of B strings, not normalised."""
        return torch.stack([row[2] for row in self._encoded(texts)])

    def _encoded(self, texts: Sequence[str]) -> list[tuple[Tensor, ...]]:
        return self.cache.get(texts, self.device, self.dtype, self._encode)

    def _encode(self, texts: list[str]) -> list[tuple[Tensor, ...]]:
        tokenizer = require_tokenizer(self.tokenizer, "CLIP text encoder")
        limit = {"truncation": True, "return_tensors": "pt"}
        rows: list[tuple[Tensor, ...]] = []
        for text in texts:  # one by one: a string's features must not depend on its neighbours' length
            short = tokenizer([text], padding="max_length", max_length=self.config.max_tokens, **limit)
            states = self.model(
                input_ids=short.input_ids.to(self.device),
                attention_mask=short.attention_mask.to(self.device),
            ).last_hidden_state
            full = tokenizer([text], max_length=self.config.max_position_embeddings, **limit)
            goal = self.model(input_ids=full.input_ids.to(self.device)).text_embeds
            rows.append((states[0], short.attention_mask[0].bool().to(self.device), goal[0]))
        return rows


def build_text(config: ClipText.Config | HashedText.Config) -> ClipText | HashedText:
    """The text encoder of GFDM, with random weights where it has any."""
    return ClipText(config) if isinstance(config, ClipText.Config) else HashedText(config)
