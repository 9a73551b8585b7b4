"""The first block that mask edits reach, computed only at the positions they change.

Where a mask edit first acts, everything that enters attention is still that of the clean run, and
what leaves it differs only for the queries whose mask changed. All else in a block (projections,
norms, MLP) works on each position by itself, so the block's output differs at those positions only.
`Onset` keeps what a clean run had in one block, and gives the block's output for many variants:

1. each variant's mask is made from the clean one, and its receipts are weighed on clean queries
   and keys;
2. z of the changed queries, in the changed heads, is computed anew; the rest of z is clean;
3. the block itself, attention skipped, runs on the changed positions of all variants;
4. its output goes into a copy of the clean one.

That works while nobody reads or edits anything else inside the block, and where attention is this
library's function, which has hooks for its queries, keys and z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp.attention import NAME, as_bool, attend, kernel
from interp.hooked import Hooked
from interp.rows import GivenCall, Rows
from interp.steps import BEFORE, Step

#: what a clean run keeps of the block
KEPT = (
    "hook_resid_pre",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_z",
    "hook_resid_post",
)


class Onset:
    """One language block of a clean run, and where variants leave it.

    Args:
        model: a loaded model.
        layer: of the block.
    """

    def __init__(self, model: Hooked, layer: int) -> None:
        self.model, self.layer = model, layer
        self.prefix = f"blocks.{layer}"
        self.block = model.family.block_path(layer)
        self.attention = model.family.block_path(layer, "attn")
        self.project: Any = model.module.get_submodule(model.family.block_path(layer, "o"))
        self.attn: Any = model.module.get_submodule(self.attention)
        self.values: dict[str, Tensor] = {}
        self.call: tuple[tuple[Any, ...], dict[str, Any]]

    @staticmethod
    def possible(model: Hooked, layer: int) -> bool:
        """Whether the block's attention has hooks for its queries, keys and z."""
        path = model.family.block_path(layer, "attn")
        return model.stock or kernel(model.module.get_submodule(path)) == NAME

    @property
    def leaving(self) -> Tensor:
        """What the block puts out in the clean run."""
        return self.values[f"{self.prefix}.hook_resid_post"]

    def steps(self) -> list[Step]:
        """What the clean run has to keep."""
        rank = self.model.hooks.rank

        def keep(name: str) -> Step:
            def act() -> None:
                self.values[name] = self.model.hook(name).output.detach()

            return Step(rank(name), act)

        def keep_call() -> None:
            self.call = self.model.envoy(self.attention).inputs

        names = [f"{self.prefix}.{suffix}" for suffix in KEPT]
        self.model.require(names)
        first = rank(f"{self.prefix}.attn.hook_q") + BEFORE
        return [Step(first, keep_call), *map(keep, names)]

    # -- the variants ------------------------------------------------------------------------------

    def depart(self, variants: Sequence[tuple[Rows, Sequence[Step]]]) -> list[Step]:
        """Steps that take this block's place in a pass of many variants.

        Args:
            variants: the model as each of them sees it, and the steps of its mask edits here.
        """
        masks = [self._mask(rows, steps) for rows, steps in variants]
        changed = torch.stack([rows.flatten(0, 1).any(0) for _, rows in masks])
        at = changed.any(0).nonzero()[:, 0]  # positions that some variant changes
        z = torch.cat([self._z(mask, rows, at) for mask, rows in masks])
        with torch.no_grad():
            out = self.project(z.flatten(-2))
        entering = self.values[f"{self.prefix}.hook_resid_pre"]
        n, rank = len(variants), self.model.hooks.rank

        def enter() -> None:
            block = self.model.envoy(self.block)
            (_, *rest), kwargs = block.inputs
            block.inputs = ((torch.cat([entering[:, at]] * n), *rest), kwargs)

        def skip() -> None:
            self.model.envoy(self.attention).skip((out, None))

        def leave() -> None:
            block = self.model.envoy(self.block)
            whole = torch.cat([self.leaving] * n)
            whole[:, at] = block.output
            block.output = whole

        return [
            Step(rank(f"{self.prefix}.hook_resid_pre"), enter),
            Step(rank(f"{self.prefix}.attn.hook_q") + BEFORE, skip),
            Step(rank(f"{self.prefix}.hook_resid_post") + BEFORE, leave),
        ]

    def _mask(self, rows: Rows, steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
        """A variant's mask, `[batch, 1 or head, query, key]` bool, and the rows that differ,
        `[batch, 1 or head, query]` bool."""
        given = GivenCall(self.call)
        rows.values, rows.calls = self.values, {self.attention: given}
        for step in sorted(steps, key=lambda step: step.rank):
            step.act()
        rows.values, rows.calls = {}, {}
        mask, base = as_bool(given.inputs[1]["attention_mask"]), self.call[1].get("attention_mask")
        if base is None:
            base = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
        differs = (mask != as_bool(base)).view(torch.uint8)  # whose maximum is faster than any()
        return mask, differs.amax(-1).bool()

    def _z(self, mask: Tensor, changed: Tensor, at: Tensor) -> Tensor:
        """A variant's z at the positions `at`, `[batch, n, head, d_head]`."""
        query, key, value, clean = (
            self.values[f"{self.prefix}.attn.hook_{part}"] for part in ("rot_q", "rot_k", "v", "z")
        )
        n_heads = query.shape[2]
        z = clean[:, at].clone()
        heads = changed.any(-1).any(0).expand(n_heads).nonzero()[:, 0]
        if len(heads):
            of_keys = heads // (n_heads // key.shape[2])
            rows = mask.expand(-1, n_heads, -1, -1)[:, heads][:, :, at]
            new = attend(
                query[:, at][:, :, heads].transpose(1, 2),
                key[:, :, of_keys].transpose(1, 2),
                value[:, :, of_keys].transpose(1, 2),
                rows,
                float(self.attn.scaling),
                getattr(self.attn, "attn_logit_softcapping", None),
            )
            z[:, :, heads] = new.transpose(1, 2).to(z.dtype)
        return z
