"""Sizes of a model, read off its configuration: how many layers, heads, how wide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interp.families import Family


@dataclass(frozen=True)
class Dims:
    """Sizes of a model, by TransformerLens's names; `vision_*` are the vision tower's."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_vision_layers: int
    n_vision_heads: int
    d_vision: int
    d_vision_head: int

    @classmethod
    def of(cls, config: Any, family: Family) -> Dims:
        """The sizes that a transformers configuration names."""
        text = getattr(config, family.language.config)
        vision = getattr(config, family.vision.config)
        n_heads, n_vision_heads = text.num_attention_heads, vision.num_attention_heads
        return cls(
            n_layers=text.num_hidden_layers,
            n_heads=n_heads,
            n_key_value_heads=getattr(text, "num_key_value_heads", None) or n_heads,
            d_model=text.hidden_size,
            d_head=getattr(text, "head_dim", None) or text.hidden_size // n_heads,
            d_mlp=text.intermediate_size,
            d_vocab=text.vocab_size,
            n_vision_layers=vision.num_hidden_layers,
            n_vision_heads=n_vision_heads,
            d_vision=vision.hidden_size,
            d_vision_head=vision.hidden_size // n_vision_heads,
        )
