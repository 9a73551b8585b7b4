"""Answers in words, also under mask edits: an edge that is cut stays cut at every decode step.

`module.generate` runs the prompt once (the prefill) and then one token at a time, with the keys and
values of all earlier tokens in a cache. Mask edits go in where `interp.masking` puts them in a run,
at the attention modules' inputs, by a plain torch hook there; at a decode step the mask has one
query, and `MaskBook` picks the edges that end in it.

Positions go on counting behind the prompt: the first token that is generated stands at position
`x.n_pos`. Edges made for the prompt alone act in the prefill, and the keys and values that the
cache holds are those of the edited run. Edges made for more positions (`n_pos` up to `x.n_pos +
max_new_tokens`) act at decode steps too; `answer_edges` makes those of an answer that is blind to
some positions. The position that *answers* first is the prompt's last, and the last token that is
generated is never a query.

The result is that of running the model again from the start for every token, under the same edits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.edges import EdgeSet
from interp.edits.base import Edit
from interp.edits.book import Effect
from interp.edits.masks import EdgeEdit, MaskEdit
from interp.edits.receipts import Receipt, Receipts
from interp.errors import EdgeError
from interp.inputs import Inputs
from interp.instrumented import Instrumented
from interp.masking import LayerMask, RunMasks

#: settings of `module.generate` under which rows or steps are not what edges say
REFUSED = {
    "num_beams": "beams change places between steps",
    "num_return_sequences": "rows are repeated",
    "assistant_model": "tokens are guessed by another model",
    "prompt_lookup_num_tokens": "tokens are guessed ahead",
    "guidance_scale": "a second prompt runs beside the first",
}


@dataclass(repr=False)
class Generation:
    """What was generated.

    Attributes:
        texts: one answer a row, without the prompt; None on a model without a processor.
        ids: `[batch, new]`, the tokens behind the prompt.
        logits: `[batch, new, d_vocab]`, from which each token was chosen, before any sampling
            setting; None unless asked for.
        receipts: what the edits did, over all steps.
    """

    texts: list[str] | None
    ids: Tensor
    logits: Tensor | None
    receipts: Receipts

    def __repr__(self) -> str:
        return f"Generation({list(self.ids.shape)} tokens, {len(self.receipts)} receipts)"


def answer_edges(src: np.ndarray, max_new_tokens: int) -> EdgeSet:
    """Every edge from some positions to those that answer.

    These are the prompt's last position, from which the first token is predicted, and all tokens
    generated after it. `Knockout(answer_edges(x.grid.is_placeholder, 20))` answers without looking
    at the picture again.

    Args:
        src: `[batch, n_pos]` bool, the positions that are no longer seen; no padding, and not the
            last position.
        max_new_tokens: as in `generate`.

    Raises:
        EdgeError: not such an array.
    """
    src = np.asarray(src)
    if src.dtype != np.bool_ or src.ndim != 2 or max_new_tokens < 1:
        raise EdgeError(
            f"answer_edges takes bool [batch, n_pos] and at least one new token, not {src.dtype} "
            f"{list(src.shape)} and {max_new_tokens}"
        )
    n_batch, n_pos = src.shape
    row, at = np.nonzero(src)
    dst = np.arange(n_pos - 1, n_pos - 1 + max_new_tokens)
    table = [np.repeat(row, len(dst)), np.tile(dst, len(row)), np.repeat(at, len(dst))]
    return EdgeSet(np.stack(table, 1), n_batch, n_pos + max_new_tokens)


def generate(
    model: Instrumented,
    x: Inputs,
    edits: Sequence[Edit] = (),
    *,
    max_new_tokens: int = 64,
    seed: int | None = None,
    logits: bool = False,
    strict: bool = True,
    allow_empty_rows: bool = False,
    **settings: Any,
) -> Generation:
    """Generate, greedily unless `do_sample=True`.

    Args:
        model: a loaded model.
        x: a prepared batch.
        edits: `Knockout` and `Unmask`, in either tower, in the order in which they apply.
        max_new_tokens: at most so many a row.
        seed: of the draw, with `do_sample=True`; the global random state is left as it was.
        logits: keep the logits of every step.
        strict, allow_empty_rows: as in `model.run`.
        settings: passed on to transformers' `generate`.

    Raises:
        TypeError: edits of values, or of masks by a function: they do not say what to do at
            positions that are yet to come.
        ValueError: with edits, beams and other settings that move rows about; a seed without
            sampling.
        EdgeError, HeadError, EditHadNoEffect, EmptyRow: see `interp.errors`.
    """
    settings = {"do_sample": False, **settings, "max_new_tokens": max_new_tokens}
    if seed is not None and not settings["do_sample"]:
        raise ValueError(f"seed={seed} without do_sample=True draws nothing; greedy has no seed")
    masks = _mask_edits(model, edits, settings)
    found = RunMasks(
        model,
        x,
        masks,
        [],
        strict=strict,
        allow_empty_rows=allow_empty_rows,
        n_new=max_new_tokens,
    )
    settings |= {"return_dict_in_generate": True, "output_logits": logits}
    with torch.no_grad(), _seeded(seed, model.device), ExitStack() as stack:
        tallies = [stack.enter_context(_edited(layer)) for layer in found.layers]
        out = model.module.generate(**model.to_device(x), **settings)  # type: ignore[operator]
    found.require_effects()
    ids = out.sequences[:, x.n_pos :]
    texts = None
    if model.processor is not None:
        texts = list(model.processor.batch_decode(ids, skip_special_tokens=True))
    receipts = [receipt for tally in tallies for receipt in tally.receipts()]
    return Generation(
        texts, ids, torch.stack(out.logits, 1) if logits else None, Receipts(receipts)
    )


def _mask_edits(
    model: Instrumented, edits: Sequence[Edit], settings: dict[str, Any]
) -> list[MaskEdit]:
    masks: list[MaskEdit] = []
    for edit in edits:
        if not isinstance(edit, EdgeEdit):
            raise TypeError(
                f"{edit!r} cannot act while a model generates: it does not say what to do at "
                "positions that are yet to come; Knockout and Unmask do"
            )
        masks.append(edit)
    if masks:
        defaults = settings.get("generation_config") or getattr(
            model.module, "generation_config", None
        )
        for name, why in REFUSED.items():
            value = settings.get(name, getattr(defaults, name, None))
            if value not in (None, 1, 1.0):
                raise ValueError(f"{name}={value!r} with edits: {why}, so edges would be of others")
        if settings.get("use_cache", True) is False:
            raise ValueError("use_cache=False with edits: leave it out, the answer is the same")
    return masks


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _edited(layer: LayerMask) -> Iterator[Tally]:
    """A layer's edits in every forward pass of its attention module, while this is open."""
    tally = Tally(layer)

    def put_in(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        edited, effects = layer.edited(args, kwargs)
        tally.add(effects)
        return args, edited

    handle = layer.module.register_forward_pre_hook(put_in, with_kwargs=True)
    try:
        yield tally
    finally:
        handle.remove()


class Tally:
    """What a layer's edits did over all steps; each edge counts once."""

    def __init__(self, layer: LayerMask) -> None:
        self.layer = layer
        self.counts: dict[int, dict[str, Any]] = {}  # by number: two edits may print alike

    def add(self, effects: Sequence[Effect]) -> None:
        """One step's."""
        for number, effect in enumerate(effects):
            edit = repr(effect.edit)
            start = {"edit": edit, "asked": effect.asked, "open": False, "changed": False}
            count = self.counts.setdefault(number, {**start, "empty": 0})
            count["open"] = effect.open_before | count["open"]
            count["changed"] = effect.flips | count["changed"]
            count["empty"] += effect.empty_rows

    def receipts(self) -> list[Receipt]:
        """One an edit."""
        return [
            Receipt(
                edit=count["edit"],
                hook=f"{self.layer.prefix}.attn.hook_mask",
                layer=self.layer.layer,
                asked=count["asked"],
                open=int(count["open"].sum()),
                changed=int(count["changed"].sum()),
                empty_rows=count["empty"],
            )
            for count in self.counts.values()
        ]
