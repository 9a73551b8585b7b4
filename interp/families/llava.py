"""LLaVA, LLaVA-NeXT and LLaVA-OneVision: CLIP or SigLIP, a two-layer projector, a language model.

LLaVA resizes and crops a picture to a square and gives one token a patch. LLaVA-NeXT and OneVision
add tiles of the picture at a finer resolution, laid out row by row with a newline token at the end
of each. The tower is read at `vision_feature_layer`, often -2: blocks past it are off the path.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from interp.families.base import Family, Tower
from interp.families.blocks import TEXT, VIT
from interp.families.layouts import anyres, square


def _adapter_reads(config: Any) -> tuple[int, ...]:
    layer = config.vision_feature_layer
    return (layer,) if isinstance(layer, int) else tuple(layer)


LLAVA = Family(
    name="LLaVA",
    model_types=("llava",),
    language=Tower(
        blocks="model.language_model.layers",
        embed="model.language_model.embed_tokens",
        block=TEXT,
        config="text_config",
        rotary=True,
        final_norm="model.language_model.norm",
    ),
    vision=Tower(
        blocks="model.vision_tower.encoder.layers",
        embed="model.vision_tower.embeddings",
        block=VIT,
        config="vision_config",
    ),
    adapter="model.multi_modal_projector",
    layout=square,
    adapter_reads=_adapter_reads,
)
LLAVA_NEXT = replace(
    LLAVA,
    name="LLaVA-NeXT",
    model_types=("llava_next",),
    layout=anyres,
    inputs=("image_sizes",),
    needs=("image_sizes",),
)
LLAVA_ONEVISION = replace(
    LLAVA_NEXT,
    name="LLaVA-OneVision",
    model_types=("llava_onevision",),
    inputs=("image_sizes", "batch_num_images"),
)
