"""LLaVA: CLIP tower, two-layer projector, Llama-like language model.

The picture is resized (shortest edge) and cropped to a square, cut into patches, encoded with a
leading CLS token, read after `vision_feature_layer` (often -2: blocks past it are off the path),
projected one patch to one token, and laid out in raster order in one run of `<image>`
placeholders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from interp.families.base import Block, Family, Tower
from interp.families.geometry import Geometry
from interp.tokens import TokenGrid, raster


def _grid(
    config: Any, processor: Any, input_ids: np.ndarray, sizes: Sequence[tuple[int, int]]
) -> TokenGrid:
    if config.vision_feature_select_strategy != "default":
        raise NotImplementedError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} makes an "
            "image token of CLS too, which no grid cell has; only 'default' is supported"
        )
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    image_processor = getattr(processor, "image_processor", None)
    boxes = [
        Geometry.of(image_processor, size, (vision.image_size, vision.image_size)).boxes(side, side)
        for size in sizes
    ]
    return raster(
        input_ids,
        config.image_token_id,
        shapes=[(side, side)] * len(sizes),
        boxes=boxes,
        sizes=sizes,
    )


def _vision_tokens(config: Any, state: torch.Tensor) -> torch.Tensor:
    drop_cls = config.vision_feature_select_strategy == "default"
    return state[:, 1:] if drop_cls else state


def _adapter_reads(config: Any) -> int:
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise NotImplementedError(
            f"this LLaVA reads several vision layers ({layer}); only one is supported so far"
        )
    # hidden_states[0] is the embedding and hidden_states[i] the output of block i - 1
    return (layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer) - 1


LLAVA = Family(
    name="LLaVA",
    model_types=("llava",),
    language=Tower(
        blocks="model.language_model.layers",
        embed="model.language_model.embed_tokens",
        block=Block(
            ln1="input_layernorm",
            attn="self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="o_proj",
            ln2="post_attention_layernorm",
            mlp="mlp",
            mlp_pre="gate_proj",
            mlp_post="down_proj",
        ),
        rotary=True,
        config="text_config",
        final_norm="model.language_model.norm",
    ),
    vision=Tower(
        blocks="model.vision_tower.encoder.layers",
        embed="model.vision_tower.embeddings",
        block=Block(
            ln1="layer_norm1",
            attn="self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="out_proj",
            ln2="layer_norm2",
            mlp="mlp",
            mlp_pre="fc1",
            mlp_post="fc2",
        ),
        rotary=False,
        config="vision_config",
    ),
    adapter="model.multi_modal_projector",
    unembed="lm_head",
    grid=_grid,
    vision_tokens=_vision_tokens,
    adapter_reads=_adapter_reads,
)
