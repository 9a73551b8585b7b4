"""What a model family's table says, and how a hook name becomes a place in a module tree.

Transformers names the same thing differently in every family (`out_proj`, `o_proj`, `proj`; layers
under `language_model.layers` or `text_model.layers`). All of that lives in one `Family` a family,
and nowhere else: paths of modules, which towers rotate positions, which stage the adapter reads
and how the image tokens lie. Adding a family is adding one such table; `interp.families.blocks`
has the blocks that most of them are made of.

A hook name is resolved in two steps. `Family.place` looks its suffix up in `Block.PLACES`, which
says which part of a block carries it and on which side: `hook_resid_post` is the *output* of the
block, `attn.hook_q` the output of its query projection, seen by head. What no module boundary
carries (scores, pattern, mask, the norm's scale, a head's result) is carried by a TransformerLens
`HookPoint` of the same name that `interp.points` hangs into the tree (`Block.point`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from interp.errors import NO_VISION, NotMultimodal

if TYPE_CHECKING:
    from interp.families.layouts import Layout

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Place:
    """Where a hook lives: a module, one of its sides, and how the tensor there is seen.

    Attributes:
        path: dotted path of the module from the root of the model.
        side: its "input" or its "output".
        part: which third of a fused query-key-value projection, or None.
        d_head: width of a head if the last axis is split by head, or 0.
        packed: whether the tensor lacks the batch axis, since all pictures lie in one row.
    """

    path: str
    side: Side
    part: int | None = None
    d_head: int = 0
    packed: bool = False

    @property
    def viewed(self) -> bool:
        """Whether the hook's tensor is another view of what the module holds."""
        return bool(self.part is not None or self.d_head or self.packed)


@dataclass(frozen=True)
class Block:
    """Names of the parts of one transformer block.

    Paths are relative to the block; those of `q` ... `o` to its attention, `mlp_*` to its MLP.
    What a block lacks is empty.

    Attributes:
        ln1, attn, ln2, mlp: the two norms and what follows each of them.
        q, k, v, o: the projections.
        qkv: the fused one, where queries, keys and values come out of one matrix, in this order.
        mlp_pre, mlp_post: modules whose output is `hook_pre` and whose input is `hook_post`.
        mlp_gated: the module whose output is the factor `hook_pre_linear`.
        ln1_post, ln2_post: norms *behind* attention and MLP (Gemma 2 and 3), before the sum.
        attn_scale, mlp_scale: parameters that scale what is added to the stream (InternViT).
        norm_offset: what the norms add to their weight (Gemma: 1).
    """

    ln1: str
    attn: str
    o: str
    ln2: str
    mlp: str
    mlp_pre: str
    mlp_post: str
    q: str = ""
    k: str = ""
    v: str = ""
    qkv: str = ""
    mlp_gated: str = ""
    ln1_post: str = ""
    ln2_post: str = ""
    attn_scale: str = ""
    mlp_scale: str = ""
    norm_offset: float = 0.0

    #: hook suffix -> (part, side, whether seen by head), where a module boundary carries the hook
    PLACES: ClassVar[dict[str, tuple[str, Side, bool]]] = {
        "hook_resid_pre": ("", "input", False),
        "attn.hook_q": ("q", "output", True),
        "attn.hook_k": ("k", "output", True),
        "attn.hook_v": ("v", "output", True),
        "hook_attn_out": ("attn", "output", False),
        "mlp.hook_pre": ("mlp_pre", "output", False),
        "mlp.hook_pre_linear": ("mlp_gated", "output", False),
        "mlp.hook_post": ("mlp_post", "input", False),
        "hook_mlp_out": ("mlp", "output", False),
        "hook_resid_post": ("", "output", False),
    }

    def part(self, name: str) -> str:
        """Path of a part inside the block: `part("q")` is "self_attn.q_proj"."""
        if name in ("q", "k", "v"):
            return f"{self.attn}.{self.qkv or getattr(self, name)}"
        if name in ("o", "qkv"):
            return f"{self.attn}.{getattr(self, name)}"
        if name.startswith("mlp_"):
            return f"{self.mlp}.{getattr(self, name)}"
        return str(getattr(self, name))

    @property
    def paths(self) -> list[str]:
        """Paths of all the modules that this block names."""
        no_module = ("norm_offset", "attn_scale", "mlp_scale")
        names = [f.name for f in fields(self) if f.name not in no_module]
        return [self.part(name) for name in names if getattr(self, name)]

    @property
    def gated(self) -> bool:
        """Whether the MLP has a second factor."""
        return bool(self.mlp_gated)

    @property
    def post_norms(self) -> bool:
        """Whether attention's and the MLP's outputs are normalised before they are added."""
        return bool(self.ln1_post)

    def point(self, suffix: str) -> tuple[str, str] | None:
        """The part that carries a HookPoint for `suffix`, and the point's name there.

        None where a module boundary carries the hook: see `PLACES`.

        >>> from interp.families.blocks import LLAMA
        >>> LLAMA.point("attn.hook_pattern"), LLAMA.point("attn.hook_result")
        (('attn', 'hook_pattern'), ('o', 'hook_result'))
        """
        if suffix == "attn.hook_result":
            return "o", "hook_result"
        if suffix == "hook_resid_mid":
            return "ln2", "hook_resid_mid"
        if suffix in ("hook_attn_out", "hook_mlp_out"):
            part, norm = ("attn", "ln1_post") if "attn" in suffix else ("mlp", "ln2_post")
            if getattr(self, norm):
                return norm, suffix
            return (part, suffix) if getattr(self, f"{part}_scale") else None
        if suffix in self.PLACES:
            return None
        part, hook = suffix.split(".")
        return part, hook


@dataclass(frozen=True)
class Tower:
    """A stack of blocks: the language model or the vision tower.

    Attributes:
        blocks: path of the list of blocks, from the root of the model.
        embed: path of the module whose output starts the stack.
        block: names inside a block; where the family takes several kinds of tower, one a
            `model_type` of its sub-configuration.
        config: name of that sub-configuration; empty where the whole is the tower's.
        rotary: whether queries and keys are rotated by position.
        final_norm: path of the norm behind the last block, where what follows reads it.
        packed: whether all pictures lie in one row, without a batch axis.
        reordered: whether the tower reorders its patches between `embed` and its first block.
    """

    blocks: str
    embed: str
    block: Block | Mapping[str, Block]
    config: str
    rotary: bool = False
    final_norm: str = ""
    packed: bool = False
    reordered: bool = False

    @property
    def names(self) -> Block:
        """The block, once `Family.resolve` has chosen it."""
        assert isinstance(self.block, Block), "Family.resolve chooses the block"
        return self.block

    @property
    def parts(self) -> list[str]:
        """Which of `interp.hooks.OPTIONAL_HOOKS` the blocks have."""
        has = {
            "rotary": self.rotary,
            "gated": self.names.gated,
            "post_norms": self.names.post_norms,
        }
        return [part for part, there in has.items() if there]

    def resolve(self, config: Any, family: str) -> Tower:
        """This tower with the block that the configuration asks for."""
        if isinstance(self.block, Block):
            return self
        kind = (getattr(config, self.config) if self.config else config).model_type
        if kind not in self.block:
            raise NotMultimodal(
                f"a {family} model whose {self.config} is of type {kind!r}: there are tables for "
                f"{', '.join(self.block)}; add its Block to interp/families/blocks.py"
            )
        return replace(self, block=self.block[kind])


def last_state(config: Any) -> tuple[int, ...]:
    """`adapter_reads` of a family whose adapter reads the end of the vision tower."""
    return (-1,)


@dataclass(frozen=True)
class Family:
    """The table of one model family: the only place that knows its names.

    Attributes:
        name: for messages.
        model_types: the `config.model_type` values it covers.
        language, vision: the two towers.
        adapter: path of the module between them.
        layout: how the image tokens of each picture lie (`interp.families.layouts`), from
            (config, processor, tensors, sizes, tiles).
        unembed: path of the language model's head.
        merges_in_adapter: whether the adapter takes patches and merges several into one token;
            otherwise its input has a vector a token already.
        adapter_reads: which of the vision tower's `hidden_states` the adapter reads, as
            transformers numbers them: 0 is what enters block 0, -1 what leaves the last.
        deepstack: path of the list of mergers that read earlier vision blocks, if there is one.
        deepstack_reads: the vision blocks that they read, in their order.
        inputs: names of the model inputs that `prepare` passes on, in addition to the common ones.
        needs: those of them without which the family computes something else.
        prefix: whether a picture sees the words behind it, the prompt being one block.
        task: transformers' word for what such a model does, by which servers load it.
    """

    name: str
    model_types: tuple[str, ...]
    language: Tower
    vision: Tower
    adapter: str
    layout: Callable[..., list[Layout]]
    unembed: str = "lm_head"
    merges_in_adapter: bool = False
    adapter_reads: Callable[[Any], tuple[int, ...]] = last_state
    deepstack: str = ""
    deepstack_reads: Callable[[Any], tuple[int, ...]] = lambda config: ()
    inputs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    prefix: bool = False
    task: str = "image-text-to-text"

    @property
    def has_vision(self) -> bool:
        """Whether there is a vision tower; if not, `vision`, `adapter` and `layout` are empty."""
        return bool(self.vision.blocks)

    def require_vision(self) -> None:
        """Raise for what only a model with a vision tower can do.

        Raises:
            NotMultimodal: this is a text-only one.
        """
        if not self.has_vision:
            raise NotMultimodal(NO_VISION)

    @property
    def takes(self) -> tuple[str, ...]:
        """Names of the model's inputs, in order."""
        pictures = ("pixel_values",) if self.has_vision else ()
        return ("input_ids", "attention_mask", *pictures, *self.inputs)

    def resolve(self, config: Any) -> Family:
        """The table for one configuration: which blocks its two towers have."""
        language = self.language.resolve(config, self.name)
        return replace(self, language=language, vision=self.vision.resolve(config, self.name))

    def check(self, module: nn.Module) -> None:
        """Raise unless the modules that this table names are there.

        Raises:
            NotMultimodal: for instance a model without its language-model head.
        """
        paths = [self.adapter, self.unembed]  # an empty one is the model itself, which is there
        for tower in (self.language, self.vision):
            paths += [tower.blocks, tower.embed, *filter(None, [tower.final_norm])]
            paths += [f"{tower.blocks}.0.{path}" for path in tower.names.paths]
        for path in paths:
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
        return f"{path}.{tower.names.part(part)}" if part else path

    def place(self, name: str, d_head: int, *, stock: bool = False) -> Place:
        """Where the hook `name` (a canonical, known one) lives.

        Args:
            name: for instance "blocks.2.attn.hook_z".
            d_head: width of a head in the hook's tower.
            stock: on a model without HookPoints; only hooks that have a place there.
        """
        packed = self.vision.packed
        if name.startswith("adapter."):
            side: Side = "input" if name.endswith("hook_in") else "output"
            return Place(self.adapter, side, packed=packed)
        if name.startswith("deepstack."):
            return Place(f"{self.deepstack}.{name.split('.')[1]}", "output", packed=packed)
        tower, rest = self.tower(name)
        if rest == "hook_embed":
            return Place(tower.embed, "output", packed=tower.packed)
        if rest.startswith("ln_final."):
            return Place(f"{tower.final_norm}.{rest.removeprefix('ln_final.')}", "output")
        _, number, suffix = rest.split(".", 2)
        block, layer, vision = tower.names, int(number), tower is self.vision
        if stock and suffix == "attn.hook_z":
            path = self.block_path(layer, "o", vision=vision)
            return Place(path, "input", d_head=d_head, packed=tower.packed)
        if point := block.point(suffix):
            part, hook = point
            if stock:  # behind a norm, whose output it is
                path = self.block_path(layer, part, vision=vision)
                return Place(path, "output", packed=tower.packed)
            return Place(f"{self.block_path(layer, part, vision=vision)}.{hook}", "output")
        part, side, by_head = Block.PLACES[suffix]
        return Place(
            self.block_path(layer, part, vision=vision),
            side,
            part="qkv".index(part) if block.qkv and by_head else None,
            d_head=d_head if by_head else 0,
            packed=tower.packed,
        )


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path; numbers index lists."""
    return root.get_submodule(path)


def weight_of(module: nn.Module, name: str = "weight") -> Any:
    """A parameter of a module; fetched for the moment where a `device_map` offloaded it."""
    value = getattr(module, name)
    if value is not None and value.is_meta:
        from accelerate.utils import align_module_device

        with align_module_device(module):
            value = getattr(module, name).detach()
    return value
