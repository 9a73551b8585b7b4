"""Mask edits during a run: put in at each edited attention module's input, then weighed.

`MaskBook` (`interp.edits.masks`) knows what the masks are; here is how they get into a forward
pass, as the `attention_mask` argument of the attention module, the one route that every kernel and
a stock model on a server also have.
"""

from __future__ import annotations

from interp.attention import as_bool
from interp.edits.masks import Effect, MaskBook
from interp.edits.receipts import Receipt, attention_mass
from interp.instrumented import Instrumented
from interp.steps import AFTER, BEFORE, Step


class LayerMask:
    """The mask edits of one layer during a run: put the mask in, then write the receipts."""

    def __init__(
        self, model: Instrumented, book: MaskBook, layer: int, receipts: list[Receipt], mass: bool
    ) -> None:
        self.model, self.book, self.layer, self.receipts = model, book, layer, receipts
        self.mass = mass
        self.attention = model.envoy(model.family.block_path(layer, "attn"))
        self.prefix = f"blocks.{layer}.attn"
        self.effects: list[Effect] = []

    def steps(self) -> list[Step]:
        """In at the attention module's input; receipts where queries and keys are at hand."""
        rank = self.model.hooks.rank
        steps = [Step(rank(f"{self.prefix}.hook_q") + BEFORE, self._put_in)]
        if self.mass:
            steps.append(Step(rank(f"{self.prefix}.hook_rot_q") + AFTER, self._keep_query))
            steps.append(Step(rank(f"{self.prefix}.hook_rot_k") + AFTER, self._weigh))
        return steps

    def _put_in(self) -> None:
        args, kwargs = self.attention.inputs
        base = kwargs.get("attention_mask")
        base = self.book.causal(self.model.device) if base is None else as_bool(base)
        mask, effects = self.book.mask(base, self.layer)
        self.attention.inputs = (args, {**kwargs, "attention_mask": mask})
        if self.mass:
            self.effects = effects
        else:
            for effect in effects:
                self._write(effect, None)

    def _keep_query(self) -> None:
        self.query = self.model.hook(f"{self.prefix}.hook_rot_q").output

    def _weigh(self) -> None:
        key = self.model.hook(f"{self.prefix}.hook_rot_k").output
        for effect in self.effects:
            share = attention_mass(
                self.query,
                key,
                scaling=float(self.attention._module.scaling),
                softcap=getattr(self.attention._module, "attn_logit_softcapping", None),
                mask=effect.after if effect.edit.opens else effect.before,
                edges=effect.edges,
                heads=effect.edit.heads,  # type: ignore[arg-type]
            )
            self._write(effect, share)
        self.effects = []  # they hold masks, and this object lives as long as the run
        del self.query

    def _write(self, effect: Effect, share: float | None) -> None:
        self.receipts.append(
            Receipt(
                edit=repr(effect.edit),
                hook=f"{self.prefix}.hook_mask",
                layer=self.layer,
                asked=len(effect.edit.edges),
                open=int(effect.open_before.sum()),
                changed=effect.changed,
                mass=share,
                empty_rows=effect.empty_rows,
            )
        )
