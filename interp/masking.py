"""Mask edits during a run: put in at each edited attention module's input, then weighed.

`MaskBook` (`interp.edits.book`) knows what the masks are; here is how they get into a forward pass,
as an argument of the attention module, the one route that every kernel and a stock model on a
server also have. The argument is `attention_mask`; modules of packed towers take none, and get
`interp_mask`, which they hand on to `interp.attention.packed_attention`.

What receipts weigh is computed from the layer's own queries, keys and values, read at their hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.attention import KERNELS, NAME, attend, kernel
from interp.edits.book import Effect, MaskBook
from interp.edits.masks import MaskEdit
from interp.edits.receipts import Receipt, attention_mass, relative_change
from interp.errors import EditHadNoEffect
from interp.hooked import Hooked
from interp.inputs import Inputs
from interp.steps import AFTER, BEFORE, Step


class LayerMask:
    """The mask edits of one layer of one tower during a run."""

    def __init__(
        self,
        model: Hooked,
        book: MaskBook,
        layer: int,
        receipts: list[Receipt],
        mass: bool = True,
        change: bool = False,
    ) -> None:
        self.model, self.book, self.layer, self.receipts = model, book, layer, receipts
        self.vision = book.edits[0].tower == "vision"
        self.prefix = f"{book.edits[0].prefix}blocks.{layer}"
        self.path = model.family.block_path(layer, "attn", vision=self.vision)
        self.module: Any = model.module.get_submodule(self.path)
        self.packed = self.vision and model.family.vision.packed
        attn = kernel(self.module)
        if attn not in KERNELS or (self.packed and attn != NAME):
            why = (
                "its attention is called once a picture or window, without a mask"
                if attn in KERNELS
                else "that kernel takes no edited mask"
            )
            raise NotImplementedError(
                f"mask edits in {self.prefix} while it attends through {attn!r}: {why}; load the "
                f"model with attn={NAME!r}"
            )
        # a stock kernel in this process does not say what its queries and keys were
        told = attn == NAME or model.stock
        self.mass, self.change = (mass, change) if told else (False, False)
        tower = model.family.vision if self.vision else model.family.language
        self.rot = "rot_" if tower.rotary else ""
        self.effects: list[Effect] = []
        self.kept: dict[str, Tensor] = {}

    def steps(self) -> list[Step]:
        """In at the attention module's input; receipts where queries and keys are at hand."""
        rank = self.model.hooks.rank
        steps = [Step(rank(f"{self.prefix}.attn.hook_q") + BEFORE, self._put_in)]
        if self.mass or self.change:
            reads = {"q": f"hook_{self.rot}q", "k": f"hook_{self.rot}k"}
            if self.change:
                reads["v"] = "hook_v"
            self.model.require(f"{self.prefix}.attn.{hook}" for hook in reads.values())
            for part, hook in reads.items():
                name = f"{self.prefix}.attn.{hook}"
                steps.append(Step(rank(name) + AFTER, partial(self._keep, part, name)))
            last = max(rank(f"{self.prefix}.attn.{hook}") for hook in reads.values())
            steps.append(Step(last + 1.5 * AFTER, self._weigh))
        return steps

    def _put_in(self) -> None:
        attention = self.model.envoy(self.path)
        args, kwargs = attention.inputs
        kwargs, effects = self.edited(args, kwargs)
        attention.inputs = (args, kwargs)
        if self.mass or self.change:
            self.effects = effects
        else:
            for effect in effects:
                self.receipts.append(self.receipt(effect))

    def _keep(self, part: str, name: str) -> None:
        value = self.model.hook(name).output
        norm = getattr(self.module, f"{part}_norm", None)
        if norm is not None and not self.rot:  # InternViT, behind the projection, over all heads
            # only the class's forward: hooks must not see this call
            value = type(norm).forward(norm, value.flatten(-2)).view_as(value)
        self.kept[part] = value.transpose(1, 2)

    def edited(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], list[Effect]]:
        """The keyword arguments of the attention module with this layer's edits in its mask.

        Args:
            args, kwargs: what the block calls it with.

        Returns:
            The new keyword arguments, and what each edit did.
        """
        if self.packed:
            blocks = self.book.blocks(kwargs["cu_seqlens"])
            mask, effects = self.book.mask(blocks, self.layer)
            return {**kwargs, "interp_mask": mask}, effects
        states: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        n = n_keys = states.shape[1]
        query0 = key0 = 0
        if (cache := kwargs.get("past_key_values")) is not None:
            query0 = int(cache.get_seq_length(self.layer))
            n_keys, key0 = cache.get_mask_sizes(n, self.layer)
        raw = kwargs.get("attention_mask")
        if raw is None:
            ahead = None if self.vision else query0 - key0
            raw = self.book.between(n, n_keys, ahead, states.device, self.mask_type(states.dtype))
        mask, effects = self.book.mask(raw, self.layer, query0=query0, key0=key0)
        return {**kwargs, "attention_mask": mask}, effects

    def mask_type(self, dtype: torch.dtype) -> torch.dtype:
        """Of the mask that the layer's kernel takes, which is given states of `dtype`."""
        return dtype if kernel(self.module) == "eager" else torch.bool

    def _weigh(self) -> None:
        query, key = self.kept["q"], self.kept["k"]
        module = self.module
        scaling = float(module.scaling if hasattr(module, "scaling") else module.scale)
        softcap = getattr(module, "attn_logit_softcapping", None)
        for effect in self.effects:
            mass = size = None
            if self.mass:
                mass = attention_mass(
                    query,
                    key,
                    scaling=scaling,
                    softcap=softcap,
                    before=effect.before,
                    after=effect.after,
                    queries=effect.queries,
                    heads=effect.heads,
                )
            if self.change:
                value = self.kept["v"]
                size = relative_change(
                    attend(query, key, value, effect.before, scaling, softcap),
                    attend(query, key, value, effect.after, scaling, softcap),
                )
            self.receipts.append(self.receipt(effect, mass, size))
        self.effects, self.kept = [], {}  # large, and this object lives as long as the run

    def receipt(
        self, effect: Effect, mass: float | None = None, size: float | None = None
    ) -> Receipt:
        """What one edit did in this layer."""
        return Receipt(
            edit=repr(effect.edit),
            hook=f"{self.prefix}.attn.hook_mask",
            layer=self.layer,
            asked=effect.asked,
            open=effect.open,
            changed=effect.changed,
            mass=mass,
            empty_rows=effect.empty_rows,
            size=size,
        )


class RunMasks:
    """All mask edits of one run, in both towers.

    Args:
        model: to be run.
        x: its inputs.
        edits: mask edits, in the order given.
        receipts: to which the layers add theirs.
        strict, allow_empty_rows: see `MaskBook`.
        mass: weigh the attention on edited edges.
        change: measure what each edit does to the layer's `hook_z`.
        n_new: how many positions are to be generated.

    Raises:
        HeadError, EdgeError: a layer, head or position that is not there.
        EditHadNoEffect: an edit in a vision layer that the adapter does not read.
        NotImplementedError: a kernel that takes no edited mask.
    """

    def __init__(
        self,
        model: Hooked,
        x: Inputs,
        edits: Sequence[MaskEdit],
        receipts: list[Receipt],
        *,
        strict: bool = True,
        allow_empty_rows: bool = False,
        mass: bool = False,
        change: bool = False,
        n_new: int = 0,
    ) -> None:
        self.books: list[MaskBook] = []
        self.layers: list[LayerMask] = []
        for tower in ("vision", "language"):
            own = [edit for edit in edits if edit.tower == tower]
            if not own:
                continue
            vision = tower == "vision"
            cfg = model.cfg
            book = MaskBook(
                own,
                cfg.n_vision_layers if vision else cfg.n_layers,
                cfg.n_vision_heads if vision else cfg.n_heads,
                _attended(x, vision=vision),
                strict=strict,
                allow_empty_rows=allow_empty_rows,
                n_new=0 if vision else n_new,
            )
            self.books.append(book)
            for layer in range(book.n_layers):
                if book.at(layer) and _on_path(model, book, layer):
                    one = LayerMask(model, book, layer, receipts, mass=mass, change=change)
                    self.layers.append(one)

    def steps(self) -> list[Step]:
        """What the run has to do for them, in no order."""
        return [step for layer in self.layers for step in layer.steps()]

    def require_effects(self) -> None:
        """Raise for an edit that no layer has felt; once the run is over."""
        for book in self.books:
            book.require_effects()


def _attended(x: Inputs, *, vision: bool) -> np.ndarray:
    """`[batch, pos]` bool, False on padding; in the vision tower only a mask can tell."""
    if vision:
        return np.ones((x.patches.n_batch, x.patches.n_pos), dtype=bool)
    return x.tensors["attention_mask"].cpu().numpy().astype(bool)


def _on_path(model: Hooked, book: MaskBook, layer: int) -> bool:
    """Whether the adapter reads this layer; "all layers" means those, others are refused."""
    name = f"{book.edits[0].prefix}blocks.{layer}.attn.hook_mask"
    if not model.off_path(name):
        return True
    for number in book.at(layer):
        if book.edits[number].layers is not None:
            raise EditHadNoEffect(
                f"{book.edits[number]!r} at {name.removesuffix('.attn.hook_mask')} cannot reach "
                f"the logits: the adapter reads {model.adapter_reads!r}, and this lies behind it"
            )
    return False
