"""One small table a model family: where each hook lives and how its image tokens lie.

`family_of(module)` finds the table for a transformers model. A new family is one file with a
`Family` in it and one entry in `FAMILIES`; `docs/families.md` shows how. Models without a vision
tower, which are taken from servers only, have the table `TEXT_ONLY`.
"""

from __future__ import annotations

from typing import Any

from interp.errors import NotMultimodal
from interp.families.base import Block, Family, Place, Tower
from interp.families.gemma import GEMMA3, PALIGEMMA
from interp.families.idefics import IDEFICS3
from interp.families.internvl import INTERNVL
from interp.families.llava import LLAVA, LLAVA_NEXT, LLAVA_ONEVISION
from interp.families.qwen import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from interp.families.text import TEXT_ONLY
from interp.families.tree import describe

FAMILIES: tuple[Family, ...] = (
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    QWEN2_VL,
    QWEN2_5_VL,
    QWEN3_VL,
    GEMMA3,
    PALIGEMMA,
    INTERNVL,
    IDEFICS3,
)

__all__ = ["FAMILIES", "TEXT_ONLY", "Block", "Family", "Place", "Tower", "family_of"]


def family_of(model: Any, *, hosted: bool = False) -> Family:
    """The table for a model: a transformers module, or its configuration.

    Args:
        model: of which the table is wanted.
        hosted: it is a server's, or runs as on one, and so may be a text-only one.

    Raises:
        NotMultimodal: it has no vision tower, or its family has no table yet; the message then
            shows what its tree looks like, and how to add a table.
    """
    config = getattr(model, "config", model)
    model_type = getattr(config, "model_type", None)
    families = (*FAMILIES, TEXT_ONLY) if hosted else FAMILIES
    for family in families:
        if model_type in family.model_types:
            return family.resolve(config)
    known = ", ".join(t for family in families for t in family.model_types)
    if not hasattr(config, "vision_config"):
        raise NotMultimodal(
            f"{type(model).__name__} (model_type {model_type!r}) is no multimodal LLM: its config "
            f"has no vision_config. Load a model of one of these types: {known}"
            f"{remote_hint(model_type)}"
        )
    raise NotMultimodal(
        f"no family table for model_type {model_type!r} ({type(model).__name__}); there are "
        f"tables for: {known}.\n{describe(model)}"
    )


def remote_hint(model_type: Any) -> str:
    """How a model without a vision tower is had, if there is a way; the end of an error."""
    if model_type not in TEXT_ONLY.model_types:
        return ""
    return '. A text-only model is taken from a server: remote=, or remote="local" to try it here'
