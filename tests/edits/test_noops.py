"""Planted no-ops: what one types by mistake, and what one is told instead of a quiet clean run.

The commonest failure of an intervention is that it does nothing and nobody notices. Each case here
is such a slip, as a user would type it, with the error and the words that must come. Those of value
edits (`Ablate`, `Patch`, ...) are in `test_noops_values.py`.

`rand` has 3 vision layers, of which the adapter reads number 1, and 3 language layers with 6 query
heads in 2 groups; a row is 2 words, 4 x 4 image tokens (positions 2..17) and 3 words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from interp import MLLM, EdgeSet, Knockout, Unmask
from interp.errors import EdgeError, EditHadNoEffect, EmptyRow, HeadError, UnknownHook
from tests.zoo import build, inputs

MASK = "blocks.1.attn.hook_mask"
PADDED = 3  # positions on the left of the second row of a batch of two


@dataclass
class Slip:
    """What the user typed, and what must come of it."""

    name: str
    typed: Callable  # of the model, one row, and two rows
    error: type[Exception]
    says: str


def edges(x):
    return x.grid.edges(src=[0, 1], dst=[9, 12])


def hooked(m, x, name, function, **options):
    return m.run_with_hooks(x, fwd_hooks=[(name, function)], **options)


def writes(value, *index):
    """A function that writes a value into its tensor in place."""

    def function(tensor, hook):
        tensor[index] = value

    return function


SLIPS = [
    # -- bool, float, int: what is a mask made of? -----------------------------------------------
    Slip(
        "edges from a float mask",
        lambda m, x, x2: EdgeSet.from_mask(torch.ones(1, x.n_pos, x.n_pos).tril()),
        EdgeError,
        r"edges come from a bool mask \[batch, dst, src\], not from float32",
    ),
    Slip(
        "edges between tokens from a float mask",
        lambda m, x, x2: x.grid.edges_where(np.ones((1, 16, 16))),
        EdgeError,
        "bool mask, not from float64; compare first",
    ),
    Slip(
        "a float mask where bools are due: False in it blocks nothing (0 is added to a score)",
        lambda m, x, x2: hooked(m, x, MASK, lambda mask, hook: mask.float()),
        ValueError,
        r"was given torch\.float32 .*, but the tensor there is torch\.bool",
    ),
    Slip(
        "an additive mask (0 and -inf) where bools are due: it reads as the opposite",
        lambda m, x, x2: hooked(
            m, x, MASK, lambda k, hook: torch.zeros(k.shape).masked_fill(~k, -torch.inf)
        ),
        ValueError,
        r"was given torch\.float32 .*, but the tensor there is torch\.bool",
    ),
    Slip(
        "layers as a mask over layers",
        lambda m, x, x2: Knockout(edges(x), layers=[False, True, True]),
        HeadError,
        "layers are whole numbers from 0, not False",
    ),
    Slip(
        "heads as a bool tensor",
        lambda m, x, x2: Knockout(edges(x), heads=torch.arange(6) == 5),
        HeadError,
        "heads are whole numbers from 0, not",
    ),
    Slip(
        "a mask over positions where one over tokens is due",
        lambda m, x, x2: x.grid.edges(src=x.grid.is_image[0], dst=9),
        EdgeError,
        "16 bools, not bool",
    ),
    # -- axes --------------------------------------------------------------------------------------
    Slip(
        "[batch, src, dst] for [batch, dst, src]",
        lambda m, x, x2: m.run(x, Knockout(EdgeSet.from_mask(edges(x).to_mask().transpose(1, 2)))),
        EdgeError,
        "4 of these edges are closed already.*src comes after dst",
    ),
    Slip(
        "(row, dst, src) for (row, src, dst)",
        lambda m, x, x2: m.run(x, Knockout(EdgeSet.of([(0, 12, 3)], 1, x.n_pos))),
        EdgeError,
        "the first is src=12 -> dst=3 in row 0: src comes after dst",
    ),
    Slip(
        "(src, dst, row) for (row, src, dst)",
        lambda m, x, x2: EdgeSet.of([(3, 12, 0)], 1, x.n_pos),
        EdgeError,
        "row 3 is out of range: this batch has rows 0..0",
    ),
    Slip(
        "[dst, src, image] for [image, dst, src]",
        lambda m, x, x2: x.grid.edges_where(np.ones((16, 16, 1), dtype=bool)),
        EdgeError,
        r"\[n_images, dst, src\] would do",
    ),
    Slip(
        "heads before positions at hook_z",
        lambda m, x, x2: hooked(m, x, "blocks.1.attn.hook_z", lambda z, hook: z.transpose(1, 2)),
        ValueError,
        r"\[1, 6, 21, 8\], but the tensor there is torch\.float32 \[1, 21, 6, 8\]",
    ),
    Slip(
        "one head's pattern for all heads",
        lambda m, x, x2: hooked(m, x, "blocks.1.attn.hook_pattern", lambda p, hook: p[:, :1]),
        ValueError,
        r"\[1, 1, 21, 21\], but the tensor there is torch\.float32 \[1, 6, 21, 21\]",
    ),
    # -- heads, layers, hooks that are not there ---------------------------------------------------
    Slip(
        "a query head's number at the keys, which have one a group",
        lambda m, x, x2: hooked(m, x, "blocks.1.attn.hook_k", writes(0, ..., 5, slice(None))),
        IndexError,
        r"index 5 is out of bounds .* with size 2",
    ),
    Slip(
        "a head that does not exist",
        lambda m, x, x2: m.run(x, Knockout(edges(x), heads=6)),
        HeadError,
        r"no head 6; its 6 heads are 0\.\.5",
    ),
    Slip(
        "a layer that does not exist",
        lambda m, x, x2: m.run(x, Knockout(edges(x), layers=range(2, 4))),
        HeadError,
        r"no layer 3; its 3 layers are 0\.\.2",
    ),
    Slip(
        "an empty range of layers",
        lambda m, x, x2: Knockout(edges(x), layers=range(3, 1)),
        HeadError,
        r"layers=\[\] edits nothing",
    ),
    Slip(
        "a pattern that matches nothing",
        lambda m, x, x2: hooked(m, x, "blocks.*.attn.hook_patern", lambda p, hook: p * 0),
        UnknownHook,
        "matches no hook of this model; did you mean",
    ),
    Slip(
        "a range of layers that ends too late",
        lambda m, x, x2: hooked(m, x, "blocks.[1-3].attn.hook_z", lambda z, hook: z * 0),
        UnknownHook,
        "no hook 'blocks.3.attn.hook_z' on this model",
    ),
    # -- edges that carry nothing ------------------------------------------------------------------
    Slip(
        "an edge the causal mask closes",
        lambda m, x, x2: m.run(x, Knockout(x.grid.edges(src=9, dst=3))),
        EdgeError,
        r"closed already.*src comes after dst, and edges\.causal\(\) drops",
    ),
    Slip(
        "an edge that was cut before, in some of its layers' heads",
        lambda m, x, x2: m.run(x, Knockout(edges(x), heads=2), Knockout(edges(x))),
        EdgeError,
        "closed already.*an earlier edit of this run",
    ),
    Slip(
        "an edge that was open",
        lambda m, x, x2: m.run(x, Unmask(edges(x))),
        EditHadNoEffect,
        "every edge was open already",
    ),
    Slip(
        "the same edges opened twice",
        lambda m, x, x2: m.run(x, *[Unmask(x.grid.edges(src=9, dst=3))] * 2),
        EditHadNoEffect,
        "every edge was open already",
    ),
    Slip(
        "no edges",
        lambda m, x, x2: m.run(x, Knockout(edges(x) - edges(x))),
        EditHadNoEffect,
        "it holds no edges",
    ),
    Slip(
        "padding as the source",
        lambda m, x, x2: m.run(x2, Knockout(EdgeSet.of([(1, 0, 12)], 2, x2.n_pos))),
        EdgeError,
        "1 of these edges have a src that is padding, the first in row 1",
    ),
    Slip(
        "padding as the query",
        lambda m, x, x2: m.run(x2, Unmask(EdgeSet.of([(1, 12, PADDED - 1)], 2, x2.n_pos))),
        EdgeError,
        "have a dst that is padding",
    ),
    Slip(
        "edges of another batch size",
        lambda m, x, x2: m.run(x2, Knockout(edges(x))),
        EdgeError,
        "made for 1 x 21 positions, but this run has 2 x 24",
    ),
    Slip(
        "a query with no key left, whose output is zero and not what it was",
        lambda m, x, x2: m.run(x, Knockout(EdgeSet.of([(0, 0, 0)], 1, x.n_pos))),
        EmptyRow,
        "leaves 1 queries with no key to attend to",
    ),
    # -- at a place that leads nowhere -------------------------------------------------------------
    Slip(
        "a vision layer behind the one that the adapter reads",
        lambda m, x, x2: hooked(m, x, "vision.blocks.2.hook_resid_post", lambda r, hook: r * 0),
        EditHadNoEffect,
        "the adapter reads 'vision.blocks.1.hook_resid_post', and this lies behind it",
    ),
    Slip(
        "hook_embed at image tokens, which the adapter's output overwrites",
        lambda m, x, x2: hooked(m, x, "hook_embed", writes(0, ..., slice(2, 18), slice(None))),
        EditHadNoEffect,
        r"overwritten by the adapter's output; edit adapter\.hook_out",
    ),
    Slip(
        "the CLS token where the adapter reads, which it drops",
        lambda m, x, x2: hooked(
            m, x, "vision.blocks.1.hook_resid_post", writes(0, ..., 0, slice(None))
        ),
        EditHadNoEffect,
        "the adapter",
    ),
    Slip(
        "a layer after everything that is read",
        lambda m, x, x2: m.run(
            x, Knockout(edges(x), layers=2), read="blocks.[0-1].hook_resid_post", logits=False
        ),
        EditHadNoEffect,
        r"acts from blocks\.2 on, after everything that is read",
    ),
    Slip(
        "the layer itself, at its values, which no mask changes",
        lambda m, x, x2: m.run(
            x, Knockout(edges(x), layers=1), read="blocks.1.attn.hook_v", logits=False
        ),
        EditHadNoEffect,
        r"acts from blocks\.1 on, after everything that is read",
    ),
    Slip(
        "a cut of the language model with reads in the vision tower",
        lambda m, x, x2: m.run(x, Knockout(edges(x)), read="adapter.hook_out", logits=False),
        EditHadNoEffect,
        "after everything that is read",
    ),
    Slip(
        "a cut where the forward stops before it",
        lambda m, x, x2: m.run_with_cache(x, Knockout(edges(x), layers=1), stop_at_layer=1),
        EditHadNoEffect,
        r"acts from blocks\.1 on, after everything that is read",
    ),
    Slip(
        "a function where the forward stops before it",
        lambda m, x, x2: hooked(
            m, x, "blocks.1.attn.hook_z", lambda z, hook: z * 0, stop_at_layer=1
        ),
        EditHadNoEffect,
        "where stop_at_layer=1 ends the run",
    ),
    # -- not an edit at all ------------------------------------------------------------------------
    Slip(
        "a list of edits",
        lambda m, x, x2: m.run(x, [Knockout(edges(x))]),
        TypeError,
        "give edits one by one",
    ),
    Slip(
        "edges with nothing to do to them",
        lambda m, x, x2: m.run(x, edges(x)),
        TypeError,
        "is no edit",
    ),
    Slip(
        "pairs for edges",
        lambda m, x, x2: Knockout([(3, 12)]),
        EdgeError,
        "Knockout takes an EdgeSet, not list",
    ),
]


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.name)
def test_a_slip_is_told_and_not_run(rand, rx, rx2, slip):
    with pytest.raises(slip.error, match=slip.says):
        slip.typed(rand, rx, rx2)


def test_there_are_many_and_each_is_told_once():
    assert len({slip.name for slip in SLIPS}) == len(SLIPS) >= 15


def test_the_slips_put_right_do_something(rand, rx):
    """The same calls without the slip change the logits, so that what raises above is the slip."""
    clean = rand.run(rx).logits
    for run in (
        lambda: rand.run(rx, Knockout(edges(rx), layers=range(1, 3), heads=5)).logits,
        lambda: rand.run(rx, Unmask(rx.grid.edges(src=9, dst=3))).logits,
        lambda: hooked(rand, rx, MASK, writes(False, ..., 9, 3)),
        lambda: hooked(rand, rx, "blocks.1.attn.hook_k", writes(0, ..., 1, slice(None))),
        lambda: hooked(rand, rx, "hook_embed", writes(0, ..., slice(0, 18), slice(None))),
        lambda: hooked(rand, rx, "vision.blocks.1.hook_resid_post", writes(0, ..., 1, slice(None))),
    ):
        assert float((run() - clean).abs().max()) > 1e-3


# -- where the model itself sees it so -------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_a_picture_that_is_seen_both_ways_cannot_be_opened(name):
    module, processor = build(name)
    model = MLLM.load(module, processor=processor)
    x = inputs(model, name)
    with pytest.raises(EditHadNoEffect, match="every edge was open already"):
        model.run(x, Unmask(x.grid.image_block()))


def test_an_edge_beyond_the_sliding_window_cannot_be_cut():
    module, processor = build("llava-siglip-mistral")  # a window of 7 positions in every layer
    model = MLLM.load(module, processor=processor)
    x = inputs(model, "llava-siglip-mistral")
    far = x.grid.edges(src=0, dst=12)
    with pytest.raises(EdgeError, match=r"closed already.*the layers' own mask"):
        model.run(x, Knockout(far))
    assert model.run(x, Unmask(far)).receipts[0].changed == 1
