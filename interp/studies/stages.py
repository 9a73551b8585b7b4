"""What a stage is called on a figure, and which part of the model it lies in."""

from __future__ import annotations

import re

from interp.probes.reading import NOISE

_BLOCK = re.compile(r"(vision\.)?blocks\.(\d+)\.(.+)")
_NAMED = {
    "vision.hook_embed": "vision embedding",
    "adapter.hook_in": "adapter in",
    "adapter.hook_out": "adapter out",
}


def label(stage: str) -> str:
    """A stage's name for people.

    >>> [label(s) for s in ("adapter.hook_out", "blocks.3.hook_resid_post", "blocks.3.attn.hook_z")]
    ['adapter out', 'LLM 3', 'LLM 3 attn.z']
    """
    if stage in _NAMED:
        return _NAMED[stage]
    if stage.startswith(NOISE):
        return f"noise {stage.removeprefix(NOISE)}"
    found = _BLOCK.fullmatch(stage)
    if found is None:
        return stage
    vision, number, hook = found.groups()
    rest = "" if hook == "hook_resid_post" else f" {hook.replace('hook_', '')}"
    return f"{'vision' if vision else 'LLM'} {number}{rest}"


def kind_of(stage: str) -> str:
    """Where a stage lies: "vision", "adapter", "llm"; "random_features" if it is made of noise."""
    if stage.startswith(NOISE):
        return "random_features"
    if stage.startswith("vision."):
        return "vision"
    return "adapter" if stage.startswith("adapter.") else "llm"
