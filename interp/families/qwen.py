"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: pictures at their own resolution, packed into one row.

All pictures of a batch are cut into patches and laid one after the other, without a batch axis;
each patch attends to its own picture, in most layers of Qwen2.5-VL only to its own window. Two by
two patches are merged into one image token. Qwen3-VL merges earlier vision blocks as well and adds
them to the image tokens behind the first language blocks (deepstack).
"""

from __future__ import annotations

from dataclasses import replace

from interp.families.base import Family, Tower
from interp.families.blocks import QWEN_VIT, TEXT
from interp.families.layouts import packed

QWEN2_VL = Family(
    name="Qwen2-VL",
    model_types=("qwen2_vl",),
    language=Tower(
        blocks="model.language_model.layers",
        embed="model.language_model.embed_tokens",
        block=TEXT,
        config="text_config",
        rotary=True,
        final_norm="model.language_model.norm",
    ),
    vision=Tower(
        blocks="model.visual.blocks",
        embed="model.visual.patch_embed",
        block=QWEN_VIT,
        config="vision_config",
        rotary=True,
        packed=True,
    ),
    adapter="model.visual.merger",
    layout=packed,
    merges_in_adapter=True,
    inputs=("image_grid_thw", "mm_token_type_ids"),
    needs=("image_grid_thw", "mm_token_type_ids"),
)
QWEN2_5_VL = replace(
    QWEN2_VL,
    name="Qwen2.5-VL",
    model_types=("qwen2_5_vl",),
    vision=replace(
        QWEN2_VL.vision,
        block=replace(QWEN_VIT, mlp_pre="gate_proj", mlp_gated="up_proj", mlp_post="down_proj"),
        reordered=True,
    ),
)
QWEN3_VL = replace(
    QWEN2_VL,
    name="Qwen3-VL",
    model_types=("qwen3_vl",),
    vision=replace(
        QWEN2_VL.vision, block=replace(QWEN_VIT, mlp_pre="linear_fc1", mlp_post="linear_fc2")
    ),
    deepstack="model.visual.deepstack_merger_list",
    deepstack_reads=lambda config: tuple(config.vision_config.deepstack_visual_indexes),
)
