"""Gemma3 and PaliGemma: a SigLIP tower, read behind its final norm, and a Gemma language model.

Their image tokens see each other both ways: in Gemma3 within one picture, in PaliGemma the whole
prompt is one such block. Both are told which tokens those are by `token_type_ids`; without them
they compute something else, and the kernels do not even agree on what.
"""

from __future__ import annotations

from interp.families.base import Family, Tower
from interp.families.blocks import TEXT, VIT
from interp.families.layouts import crops, square

LANGUAGE = Tower(
    blocks="model.language_model.layers",
    embed="model.language_model.embed_tokens",
    block=TEXT,
    config="text_config",
    rotary=True,
    final_norm="model.language_model.norm",
)
VISION = Tower(
    blocks="model.vision_tower.encoder.layers",
    embed="model.vision_tower.embeddings",
    block=VIT,
    config="vision_config",
    final_norm="model.vision_tower.post_layernorm",
)

GEMMA3 = Family(
    name="Gemma3",
    model_types=("gemma3",),
    language=LANGUAGE,
    vision=VISION,
    adapter="model.multi_modal_projector",
    layout=crops,
    merges_in_adapter=True,
    inputs=("token_type_ids",),
    needs=("token_type_ids",),
)
PALIGEMMA = Family(
    name="PaliGemma",
    model_types=("paligemma",),
    language=LANGUAGE,
    vision=VISION,
    adapter="model.multi_modal_projector",
    layout=square,
    inputs=("token_type_ids",),
    needs=("token_type_ids",),
    prefix=True,
)
