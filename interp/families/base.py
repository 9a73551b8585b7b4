"""What a model family's table says, and how a hook name becomes a place in a module tree.

Transformers names the same thing differently in every family (`out_proj`, `o_proj`, `proj`; layers
under `language_model.layers` or `text_model.layers`). All of that lives in one `Family` a family,
and nowhere else: paths of modules, whether positions are rotated, which stage the adapter reads
and how the image tokens lie. Adding a family is adding one such table.

A hook name is resolved in two steps. `Family.place` looks its suffix up in `PLACES`, which says
which part of a block carries it and on which side: `hook_resid_post` is the *output* of the block,
`attn.hook_q` the output of its query projection, seen by head. What no module boundary carries
(scores, pattern, mask, the norm's scale, a head's result) is carried by a TransformerLens
`HookPoint` of the same name that `interp.points` hangs into the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn

from interp.errors import NotMultimodal

if TYPE_CHECKING:
    import numpy as np

    from interp.tokens import TokenGrid

Side = Literal["input", "output"]
View = Literal["plain", "first", "heads"]


class Place(NamedTuple):
    """Where a hook lives: a module, one of its sides, and how the tensor there is seen.

    Attributes:
        path: dotted path of the module from the root of the model.
        side: its "input" or its "output".
        view: "plain", "first" (first element of a tuple) or "heads" (last axis split by head).
        d_head: width of a head, for "heads".
    """

    path: str
    side: Side
    view: View = "plain"
    d_head: int = 0


@dataclass(frozen=True)
class Block:
    """Names of the parts of one transformer block, relative to the block."""

    ln1: str
    attn: str
    q: str
    k: str
    v: str
    o: str
    ln2: str
    mlp: str
    mlp_pre: str
    mlp_post: str

    #: hook suffix -> (part, side, view); parts named "attn.x" lie inside the attention module.
    PLACES: ClassVar[dict[str, tuple[str, Side, View]]] = {
        "hook_resid_pre": ("", "input", "plain"),
        "attn.hook_q": ("q", "output", "heads"),
        "attn.hook_k": ("k", "output", "heads"),
        "attn.hook_v": ("v", "output", "heads"),
        "hook_attn_out": ("attn", "output", "first"),
        "mlp.hook_pre": ("mlp_pre", "output", "plain"),
        "mlp.hook_post": ("mlp_post", "input", "plain"),
        "hook_mlp_out": ("mlp", "output", "plain"),
        "hook_resid_post": ("", "output", "first"),
    }

    def part(self, name: str) -> str:
        """Path of a part inside the block: `part("q")` is "self_attn.q_proj"."""
        if name in ("q", "k", "v", "o"):
            return f"{self.attn}.{getattr(self, name)}"
        if name in ("mlp_pre", "mlp_post"):
            return f"{self.mlp}.{getattr(self, name)}"
        return str(getattr(self, name))


@dataclass(frozen=True)
class Tower:
    """A stack of blocks: the language model or the vision tower.

    Attributes:
        blocks: path of the list of blocks, from the root of the model.
        embed: path of the module whose output starts the stack.
        block: names inside a block.
        rotary: whether queries and keys are rotated by position.
        config: name of its sub-configuration.
        final_norm: path of the norm after the last block, if hooks are wanted there.
    """

    blocks: str
    embed: str
    block: Block
    rotary: bool
    config: str
    final_norm: str = ""


@dataclass(frozen=True)
class Family:
    """The table of one model family: the only place that knows its names.

    Attributes:
        name: for messages.
        model_types: the `config.model_type` values it covers.
        language, vision: the two towers.
        adapter: path of the module between them.
        unembed: path of the language model's head.
        grid: makes the `TokenGrid` of a prepared batch from (config, processor, input_ids, sizes).
        vision_tokens: picks the image tokens out of a vision state `[image, pos, d]`.
        adapter_reads: the vision block whose output the adapter reads.
        inputs: names of the model inputs that `prepare` passes on.
    """

    name: str
    model_types: tuple[str, ...]
    language: Tower
    vision: Tower
    adapter: str
    unembed: str
    grid: Callable[[Any, Any, np.ndarray, Sequence[tuple[int, int]]], TokenGrid]
    vision_tokens: Callable[[Any, torch.Tensor], torch.Tensor]
    adapter_reads: Callable[[Any], int]
    inputs: tuple[str, ...] = field(default=("input_ids", "attention_mask", "pixel_values"))

    def check(self, module: nn.Module) -> None:
        """Raise unless the modules that this table names are there.

        Raises:
            NotMultimodal: for instance a model without its language-model head.
        """
        for path in (self.language.blocks, self.vision.blocks, self.adapter, self.unembed):
            try:
                module.get_submodule(path)
            except AttributeError:
                raise NotMultimodal(
                    f"{type(module).__name__} has no {path!r}, where a {self.name} model has it; "
                    "give the whole model, for instance a LlavaForConditionalGeneration"
                ) from None

    def tower(self, name: str) -> tuple[Tower, str]:
        """The tower a hook name speaks of, and the name without the tower's prefix."""
        if name.startswith("vision."):
            return self.vision, name.removeprefix("vision.")
        return self.language, name

    def block_path(self, layer: int, part: str = "", *, vision: bool = False) -> str:
        """Path of a block or of a part of it, from the root of the model."""
        tower = self.vision if vision else self.language
        path = f"{tower.blocks}.{layer}"
        return f"{path}.{tower.block.part(part)}" if part else path

    def place(self, name: str, d_head: int) -> Place:
        """Where the hook `name` (a canonical, known one) lives.

        Args:
            name: for instance "blocks.2.attn.hook_z".
            d_head: width of a head in the hook's tower.
        """
        if name.startswith("adapter."):
            return Place(self.adapter, "input" if name.endswith("hook_in") else "output")
        tower, rest = self.tower(name)
        if rest == "hook_embed":
            return Place(tower.embed, "output")
        if rest.startswith("ln_final."):
            return Place(f"{tower.final_norm}.{rest.removeprefix('ln_final.')}", "output")
        _, layer, suffix = rest.split(".", 2)
        vision = tower is self.vision
        if suffix in Block.PLACES:
            part, side, view = Block.PLACES[suffix]
            path = self.block_path(int(layer), part, vision=vision)
            return Place(path, side, view, d_head)
        part, hook = point_of(suffix)
        return Place(f"{self.block_path(int(layer), part, vision=vision)}.{hook}", "output")


def point_of(suffix: str) -> tuple[str, str]:
    """The part of a block that carries a HookPoint, and the point's name there.

    >>> point_of("attn.hook_pattern"), point_of("attn.hook_result"), point_of("hook_resid_mid")
    (('attn', 'hook_pattern'), ('o', 'hook_result'), ('ln2', 'hook_resid_mid'))
    """
    if suffix == "attn.hook_result":
        return "o", "hook_result"
    if suffix == "hook_resid_mid":
        return "ln2", "hook_resid_mid"
    part, hook = suffix.split(".")
    return part, hook


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path; numbers index lists."""
    return root.get_submodule(path)
