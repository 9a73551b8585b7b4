"""InternVL: an InternViT tower whose blocks scale what they add, 2x2 patches shuffled into a token.

A picture is cut into square tiles, with a small version of the whole as the last one.
"""

from __future__ import annotations

from interp.families.base import Family, Tower
from interp.families.blocks import INTERN_VIT, TEXT
from interp.families.layouts import tiled_thumbnail

INTERNVL = Family(
    name="InternVL",
    model_types=("internvl",),
    language=Tower(
        blocks="model.language_model.layers",
        embed="model.language_model.embed_tokens",
        block=TEXT,
        config="text_config",
        rotary=True,
        final_norm="model.language_model.norm",
    ),
    vision=Tower(
        blocks="model.vision_tower.encoder.layer",
        embed="model.vision_tower.embeddings",
        block=INTERN_VIT,
        config="vision_config",
    ),
    adapter="model.multi_modal_projector",
    layout=tiled_thumbnail,
)
