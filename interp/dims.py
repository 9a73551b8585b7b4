"""Sizes of a model, read off its modules: how many layers, heads, how wide.

Configurations name the same size in a different way in every family (`depth`, `num_heads`,
`embed_dim`); the shapes of the projections do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from interp.families.base import Family, Tower, module_at


@dataclass(frozen=True)
class Dims:
    """Sizes of a model, by TransformerLens's names; `*_vision_*` are the vision tower's, 0 where
    there is none.

    `device` is where the first weights were when the model was loaded.
    """

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
    d_vision_mlp: int
    device: str

    @classmethod
    def of(cls, module: nn.Module, family: Family) -> Dims:
        """The sizes of a transformers model."""
        text, vision = _sizes(module, family.language), _sizes(module, family.vision)
        return cls(
            n_layers=text["layers"],
            n_heads=text["heads"],
            n_key_value_heads=text["kv_heads"],
            d_model=text["model"],
            d_head=text["head"],
            d_mlp=text["mlp"],
            d_vocab=int(module_at(module, family.unembed).out_features),  # type: ignore[arg-type]
            n_vision_layers=vision["layers"],
            n_vision_heads=vision["heads"],
            d_vision=vision["model"],
            d_vision_head=vision["head"],
            d_vision_mlp=vision["mlp"],
            device=str(next(module.parameters()).device),
        )


def _sizes(module: nn.Module, tower: Tower) -> dict[str, int]:
    if not tower.blocks:
        return dict.fromkeys(("layers", "heads", "kv_heads", "model", "head", "mlp"), 0)
    blocks: Any = module_at(module, tower.blocks)
    names, block = tower.names, blocks[0]

    def part(name: str) -> Any:
        return module_at(block, names.part(name))

    d_head = int(part("attn").head_dim)
    width = part("k").out_features // (3 if names.qkv else 1)
    return {
        "layers": len(blocks),
        "heads": part("o").in_features // d_head,
        "kv_heads": width // d_head,
        "model": part("o").out_features,
        "head": d_head,
        "mlp": part("mlp_post").in_features,
    }
