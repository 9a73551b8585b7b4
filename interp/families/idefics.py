"""Idefics3 and SmolVLM: a SigLIP tower over tiles of the picture, then the whole picture, small.

Between the tiles stand words that tell row and column; 2x2 patches (or more) are shuffled into one
image token. The language model lives under `text_model`.
"""

from __future__ import annotations

from interp.families.base import Family, Tower
from interp.families.blocks import TEXT, VIT
from interp.families.layouts import tiled_global

IDEFICS3 = Family(
    name="Idefics3",
    model_types=("idefics3", "smolvlm"),
    language=Tower(
        blocks="model.text_model.layers",
        embed="model.text_model.embed_tokens",
        block=TEXT,
        config="text_config",
        rotary=True,
        final_norm="model.text_model.norm",
    ),
    vision=Tower(
        blocks="model.vision_model.encoder.layers",
        embed="model.vision_model.embeddings",
        block=VIT,
        config="vision_config",
        final_norm="model.vision_model.post_layernorm",
    ),
    adapter="model.connector",
    layout=tiled_global,
    merges_in_adapter=True,
    inputs=("pixel_attention_mask",),
)
