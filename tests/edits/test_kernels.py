"""Mask edits on every kernel and in both towers, against plain transformers with masks by hand.

The reference never meets the library: a fresh copy of the module, on transformers' own eager or
SDPA attention, whose masks are written in an ordinary torch hook. Packed towers take no mask at
all, so there the reference is an attention function of its own, which sees one chunk at a time.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from interp import MLLM, EdgeSet, Knockout, Unmask, attention
from interp.edits.masks import EditMask
from interp.errors import EdgeError, EditHadNoEffect, EmptyRow, UnknownHook
from interp.families.base import module_at
from tests.conftest import plain_logits, random_inputs, random_llava
from tests.zoo import ZOO, build, picture

STOCK = ("sdpa", "eager")
BY_HAND = "by_hand_chunks"


@pytest.fixture(scope="module", params=list(ZOO))
def case(request):
    """(name, model, plain copy, a batch of two rows, two pictures in the second; padded)."""
    module, processor = build(request.param)
    model = MLLM.load(module, processor=processor)
    prompt, word = ZOO[request.param].prompt, ZOO[request.param].prompt.split()[0]
    several = f"{prompt} {prompt.removeprefix(word) if word == '<bos>' else prompt}"
    pictures = [[picture(40, 32)], [picture(36, 50, seed=1), picture(32, 32, seed=2)]]
    x = model.prepare(pictures, [prompt, several])
    return request.param, model, build(request.param)[0], x


def edges_of(x, closed_or_open, seed=0):
    """A third of the image-to-image entries of a `[batch, pos, pos]` mask, no edge to oneself."""
    mask = closed_or_open & x.grid.image_block().to_mask()
    mask &= ~torch.eye(x.n_pos, dtype=torch.bool)
    drawn = torch.from_numpy(np.random.default_rng(seed).random(tuple(mask.shape)) < 0.35)
    return EdgeSet.from_mask(mask & drawn)


def plain_under(plain, kernel, tower, x, layers, heads, edges, *, opens, causal):
    """Logits of transformers on a stock kernel, with `edges` written into its layers' masks."""
    at = edges.to_mask()

    def write(module, args, kwargs):
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        n_batch, n_pos = states.shape[:2]
        n_heads = (module.q_proj.out_features) // module.head_dim
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(n_pos, n_pos, dtype=torch.bool)
            mask = (mask.tril() if causal else mask)[None, None]
            if kernel == "eager":
                mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        mask = mask.expand(n_batch, n_heads, -1, -1).clone()
        yes, no = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
        for head in heads:
            mask[:, head][at] = yes if opens else no
        return args, {**kwargs, "attention_mask": mask}

    plain.set_attn_implementation(kernel)
    blocks = module_at(plain, tower.blocks)
    handles = [
        module_at(blocks[layer], tower.names.attn).register_forward_pre_hook(
            write, with_kwargs=True
        )
        for layer in layers
    ]
    try:
        return plain_logits(plain, x)
    finally:
        for handle in handles:
            handle.remove()


def on(model, kernel):
    """Switch a loaded model's kernel, as loading with `attn=` does."""
    attention.register(model.module, model.family, kernel)
    return model


def refuses(name, kernel):
    """Whether transformers itself has no such kernel for the family: Gemma 2's scores are bounded,
    which SDPA cannot do."""
    return (name, kernel) == ("paligemma2", "sdpa")


def test_a_kernel_that_transformers_refuses_is_refused():
    module, processor = build("paligemma2")
    model = MLLM.load(module, processor=processor)
    with pytest.raises(ValueError, match="does not support an attention implementation"):
        on(model, "sdpa")


@pytest.mark.parametrize("kind", [Knockout, Unmask])
@pytest.mark.parametrize("kernel", STOCK)
def test_language_edits_on_a_stock_kernel(case, kind, kernel):
    name, model, plain, x = case
    if refuses(name, kernel):
        return
    masks = model.run(x, read="blocks.*.attn.hook_mask", logits=False)
    seen = torch.stack([masks[f"blocks.{layer}.attn.hook_mask"][:, 0] for layer in range(3)])
    attended = x.tensors["attention_mask"].bool()
    edges = edges_of(x, seen.all(0) if kind is Knockout else ~seen.any(0))
    edges &= EdgeSet.from_mask(attended[:, :, None] & attended[:, None])
    if not len(edges):
        assert kind is Unmask  # images that see each other both ways
        return
    edit = kind(edges, layers=[0, 2], heads=[1, 4])
    ours = model.run(x, edit)
    try:
        stock = on(model, kernel).run(x, edit)
    finally:
        on(model, "interp")
    opens = kind is Unmask
    tower = model.family.language
    hand = plain_under(plain, kernel, tower, x, [0, 2], [1, 4], edges, opens=opens, causal=True)
    assert torch.allclose(stock.logits[attended], hand[attended], atol=1e-5)
    assert float((stock.logits - plain_logits(plain, x))[attended].abs().max()) > 1e-2
    assert [(r.changed, r.mass) for r in stock.receipts] == [(len(edges), None)] * 2
    assert torch.allclose(stock.logits[attended], ours.logits[attended], atol=5e-5)


def vision_edges(model, x):
    """A third of what the first two vision layers both see, in the tower's positions."""
    name = "vision.blocks.[0,1].attn.hook_mask"
    read = model.run(x, read=name, logits=False)
    seen = read["vision.blocks.0.attn.hook_mask"] & read["vision.blocks.1.attn.hook_mask"]
    seen = seen[:, 0] & ~torch.eye(seen.shape[-1], dtype=torch.bool)
    drawn = torch.from_numpy(np.random.default_rng(0).random(tuple(seen.shape)) < 0.35)
    return EdgeSet.from_mask(seen & drawn)


@pytest.mark.parametrize("kernel", ["interp", *STOCK])
def test_vision_edits_on_every_kernel(case, kernel):
    name, model, plain, x = case
    if refuses(name, kernel):
        return
    edges = vision_edges(model, x)
    assert (edges.n_batch, edges.n_pos) == (x.patches.n_batch, x.patches.n_pos)
    edit = Knockout(edges, layers=[0, 1], heads=[1, 3], tower="vision")
    tower = model.family.vision
    try:
        on(model, kernel)
        if tower.packed and kernel != "interp":
            with pytest.raises(NotImplementedError, match="once a picture or window, without"):
                model.run(x, edit)
            return
        run = model.run(x, edit)
    finally:
        on(model, "interp")
    if tower.packed:
        hand = packed_by_hand(plain, tower, x, [0, 1], [1, 3], edges)
    else:
        at = "eager" if kernel == "interp" else kernel
        hand = plain_under(plain, at, tower, x, [0, 1], [1, 3], edges, opens=False, causal=False)
    attended = x.tensors["attention_mask"].bool()
    assert torch.allclose(run.logits[attended], hand[attended], atol=5e-5)
    assert float((run.logits - model.run(x).logits)[attended].abs().max()) > 1e-3
    assert [(r.hook, r.changed) for r in run.receipts] == [
        (f"vision.blocks.{layer}.attn.hook_mask", len(edges)) for layer in (0, 1)
    ]


def packed_by_hand(plain, tower, x, layers, heads, edges):
    """The same of a packed tower: a function of ours gets its chunks, one after the other."""
    cut = edges.to_mask()[0]

    def attend(module, query, key, value, attention_mask, scaling, **_):
        n = query.shape[2]
        start = module.__dict__.get("start", 0)
        module.__dict__["start"] = start + n
        scores = (query @ key.transpose(-1, -2) * scaling).double()
        if module.number in layers:
            own = cut[start : start + n, start : start + n]
            for head in heads:
                scores[:, head][:, own] = -torch.inf
        pattern = scores.softmax(-1).to(value.dtype)
        return (pattern @ value).transpose(1, 2), None

    AttentionInterface.register(BY_HAND, attend)
    plain.set_attn_implementation("eager")
    blocks = module_at(plain, tower.blocks)
    for number, block in enumerate(blocks):
        module_at(block, tower.names.attn).__dict__.update(number=number, start=0)
    config = module_at(blocks[0], tower.names.attn).config
    config._attn_implementation_internal = BY_HAND
    return plain_logits(plain, x)


def test_vision_mass_and_size_are_those_of_the_patterns(case):
    _, model, _, x = case
    edges = vision_edges(model, x)
    names = "vision.blocks.0.attn.{hook_pattern,hook_z,hook_v}"
    clean = model.run(x, read=names)
    edit = Knockout(edges, layers=0, tower="vision")
    # (`change=True` of `model.run`)
    from interp.execution import execute

    edited = execute(model, x, edits=[edit], read=model.hooks.expand(names), change=True)
    pattern = clean["vision.blocks.0.attn.hook_pattern"]
    at = edges.to_mask()
    shares = (pattern * at[:, None]).sum(-1)[at.any(-1)[:, None].expand(pattern.shape[:3])]
    (receipt,) = edited.receipts
    assert receipt.mass == pytest.approx(float(shares.mean()), abs=1e-5)
    before, after = (run["vision.blocks.0.attn.hook_z"] for run in (clean, edited))
    assert receipt.size == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    assert receipt.size > 1e-3


# -- what is refused ------------------------------------------------------------------------------


def test_vision_edges_that_lead_nowhere_are_refused(case):
    _, model, _, x = case
    n_batch, n_pos = x.patches.n_batch, x.patches.n_pos
    same = EdgeSet.of([(0, 1, 2)], n_batch, n_pos)
    if model.off_path("vision.blocks.2.attn.hook_z"):
        with pytest.raises(EditHadNoEffect, match=r"vision\.blocks\.2 cannot reach the logits"):
            model.run(x, Knockout(same, layers=[0, 2], tower="vision"))
        on_path = model.run(x, Knockout(same, tower="vision"))  # all means all that are read
        assert [r.layer for r in on_path.receipts] == [0, 1]
    with pytest.raises(EdgeError, match="but the vision tower has"):
        model.run(x, Knockout(EdgeSet.of([(0, 1, 2)], n_batch + 1, n_pos), tower="vision"))
    with pytest.raises(EditHadNoEffect, match="every edge was open already"):
        model.run(x, Unmask(same, tower="vision"))
    if not model.family.vision.packed:
        return
    first, last = x.patches.position.min(), x.patches.position.max()
    apart = EdgeSet.of([(0, int(first), int(last))], n_batch, n_pos)
    with pytest.raises(EdgeError, match="different pictures or windows"):
        model.run(x, Knockout(apart, tower="vision"))
    with pytest.raises(EdgeError, match="another picture or window, or to padding"):
        model.run(x, Unmask(apart, tower="vision"))


def test_windows_are_respected():
    """Qwen2.5-VL: in one picture, two windows; only the layer with full attention has the edge."""
    module, processor = build("qwen2.5-vl")
    model = MLLM.load(module, processor=processor)
    x = model.prepare(picture(64, 64), ZOO["qwen2.5-vl"].prompt)
    across = EdgeSet.of([(0, 0, x.patches.n_pos - 1)], 1, x.patches.n_pos)
    run = model.run(x, Knockout(across, tower="vision"))
    assert [(r.layer, r.open, r.changed) for r in run.receipts] == [(0, 0, 0), (1, 1, 1), (2, 0, 0)]
    with pytest.raises(EdgeError, match="different pictures or windows"):
        model.run(x, Knockout(across, layers=[0, 2], tower="vision"))


def test_patches_of_padding_are_refused():
    """Idefics3 hides patches by `pixel_attention_mask`; nobody sees them."""
    module, processor = build("idefics3")
    model = MLLM.load(module, processor=processor)
    x = model.prepare(picture(32, 32), ZOO["idefics3"].prompt)
    hidden = x.tensors["pixel_attention_mask"].clone()
    hidden[..., 24:, :] = 0  # the last of four rows of patches
    x.tensors["pixel_attention_mask"] = hidden
    for src, dst in ((15, 2), (2, 15)):
        edges = EdgeSet.of([(0, src, dst)], x.patches.n_batch, x.patches.n_pos)
        with pytest.raises(EdgeError, match="begin or end in padding"):
            model.run(x, Knockout(edges, tower="vision"))


@pytest.fixture(scope="module")
def llava():
    model = MLLM.load(random_llava())
    return model, random_inputs(model, 2, padding=3)


def test_edit_mask_is_the_same_on_every_kernel(llava):
    model, x = llava

    def local(mask, layer):
        at = torch.arange(mask.shape[-1])
        mask &= (at[:, None] - at) <= 4 + layer
        mask[:, 2] = mask[:, 3]

    runs = {}
    try:
        for kernel in attention.KERNELS:
            runs[kernel] = on(model, kernel).run(x, EditMask(local))
    finally:
        on(model, "interp")
    attended = x.tensors["attention_mask"].bool()
    for kernel in STOCK:
        got, ours = runs[kernel].logits[attended], runs["interp"].logits[attended]
        assert torch.allclose(got, ours, atol=1e-5)
    assert float((ours - model.run(x).logits[attended]).abs().max()) > 1e-2


def test_an_empty_row_is_refused_in_eager_attention_even_where_allowed(llava):
    """Its softmax over equally low scores would look at everything, the future too."""
    model, x = llava
    edges = EdgeSet.of([(0, src, 3) for src in range(4)], 2, x.n_pos)
    allowed = {"allow_empty_rows": True}
    ours = model.run(x, Knockout(edges), **allowed).logits
    try:
        assert torch.allclose(
            on(model, "sdpa").run(x, Knockout(edges), **allowed).logits[0], ours[0], atol=1e-5
        )
        with pytest.raises(EmptyRow, match="attends to everything alike in eager attention"):
            on(model, "eager").run(x, Knockout(edges), **allowed)
    finally:
        on(model, "interp")


def test_our_functions_hooks_are_refused_by_name_on_a_stock_kernel(llava):
    model, _ = llava
    names = ["blocks.0.hook_resid_post", "blocks.0.attn.hook_q", "blocks.0.attn.hook_pattern"]
    try:
        on(model, "eager")
        attention.require(model.module, names[:2])
        with pytest.raises(UnknownHook, match=r"^blocks\.0\.attn\.hook_pattern: only interp's own"):
            attention.require(model.module, names)
    finally:
        on(model, "interp")
    attention.require(model.module, names)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "paged|sdpa"])
def test_other_kernels_are_refused_with_words(name):
    module = random_llava()
    family = MLLM.load(module).family
    with pytest.raises(ValueError, match="make their masks themselves"):
        attention.register(module, family, name)


def test_a_model_that_comes_with_flex_attention_is_switched_with_a_word():
    module = random_llava(attn_implementation="flex_attention")
    with pytest.warns(UserWarning, match="came with 'flex_attention' attention.*through 'interp'"):
        model = MLLM.load(module)
    assert attention.kernel(model.module) == "interp"


def test_a_kernel_that_somebody_set_behind_our_back_is_refused(llava):
    model, x = llava
    try:
        model.module.set_attn_implementation("flex_attention")
        with pytest.raises(NotImplementedError, match="'flex_attention': that kernel takes no"):
            model.run(x, Knockout(x.grid.edges(0, 3)))
    finally:
        model.module.set_attn_implementation("interp")
