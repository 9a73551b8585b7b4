"""The contract that every hook of every family keeps.

For each name, on a random model of each family, in float32 and bfloat16: it fires, its tensor has
the documented axes, an identity edit changes no bit of the logits, and a real edit moves them, in
whichever way it is written: returned or in place, through `run_with_hooks` or in a bare trace. A
hook that a family lacks raises.

What these tests find is the table in `docs/hooks.md` (`tests/test_hooks_page.py`).
"""

from __future__ import annotations

import pytest
import torch

from interp import MLLM
from interp.errors import UnknownHook
from interp.hooks import BLOCK_HOOKS, FINAL_NORM
from tests.record import contract
from tests.zoo import ZOO, build, picture

HOOKS = [
    "hook_embed",
    *(f"blocks.*.{suffix}" for suffix in BLOCK_HOOKS),
    *FINAL_NORM,
    "vision.hook_embed",
    # (no tower of this world has norms behind attention and MLP)
    *(f"vision.blocks.*.{suffix}" for suffix in BLOCK_HOOKS if "_post." not in suffix),
    *(f"vision.{name}" for name in FINAL_NORM),
    "adapter.hook_in",
    "adapter.hook_out",
    "deepstack.*.hook_out",
]
#: reading these writes attention out, which rounds differently from the fused kernel
WRITTEN_OUT = ("hook_attn_scores", "hook_pattern")


def same(value, hook=None):
    return value.clone()


def same_in_place(value, hook=None):
    value.logical_and_(torch.tensor(True)) if value.dtype == torch.bool else value.mul_(1)


def other(value, hook=None):
    """A real edit. Not a mere factor, nor a shift: the next norm would undo it (in Gemma3 even of
    a norm's scale, one factor a token)."""
    if value.dtype == torch.bool:  # who sees itself sees nothing else (padding doesn't)
        itself = value & torch.eye(value.shape[-1], dtype=torch.bool)
        return torch.where(itself.any(-1, keepdim=True), itself, value)
    axis = -1 if value.shape[-1] > 1 else -2
    factor = torch.linspace(0.5, 1.5, value.shape[axis]).to(value.dtype)
    return value * (factor if axis == -1 else factor[:, None])


def other_in_place(value, hook=None):
    value.copy_(other(value))


def through_trace(model, x, name, edit):
    """Logits under an edit in a bare nnsight trace; `edit` returns a value or works in place."""
    with torch.no_grad(), model.trace(x):
        site = model.hook(name)
        edited = edit(site.output)
        if edited is not None:
            site.output = edited
        logits = model.nn.output.logits.save()
    return logits


def sizes_of(model, x, name, n_vision_rows):
    """The length of each axis that a hook's shape names, from the inputs and the sizes alone."""
    cfg, rows, n_pos = model.cfg, len(x), x.n_pos
    n_patches = x.patches.n_pos
    sizes = {"batch": rows, "pos": n_pos, "query": n_pos, "key": n_pos, "1": 1}
    sizes |= {"head": cfg.n_heads, "kv_head": cfg.n_key_value_heads, "d_head": cfg.d_head}
    sizes |= {"d_model": cfg.d_model, "d_mlp": cfg.d_mlp, "image": n_vision_rows}
    if name.startswith("vision."):
        sizes |= {"pos": n_patches, "query": n_patches, "key": n_patches, "batch": n_vision_rows}
        sizes |= {"head": cfg.n_vision_heads, "kv_head": cfg.n_vision_heads}
        sizes |= {"d_head": cfg.d_vision_head, "d_model": cfg.d_vision, "d_mlp": cfg.d_vision_mlp}
    return sizes


def two_rows(model, name):
    """A batch of two pictures of different sizes, whose first row is padded."""
    prompt = ZOO[name].prompt
    return model.prepare([picture(40, 32), picture(36, 50, seed=1)], [prompt, f"{prompt} a dog"])


@pytest.fixture(scope="module", params=list(ZOO))
def case(request):
    """(name, model, inputs, clean logits) of one family, float32."""
    module, processor = build(request.param)
    model = MLLM.load(module, processor=processor)
    x = two_rows(model, request.param)
    return request.param, model, x, model.run(x).logits


@pytest.fixture(scope="module")
def half(case):
    """The same in bfloat16."""
    name = case[0]
    module, processor = build(name, dtype=torch.bfloat16)
    model = MLLM.load(module, processor=processor)
    x = two_rows(model, name)
    return model, x, model.run(x).logits


def names_of(model, hook):
    """The layers' names of a hook of this model, or [] if the family lacks it."""
    try:
        return model.hooks.expand(hook)
    except UnknownHook:
        return []


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_keeps_the_contract(case, hook):
    family, model, x, clean = case
    names = names_of(model, hook)
    if not names:
        with pytest.raises(UnknownHook):
            model.run(x, read=hook.replace("*", "0"))
        contract[hook, family, "float32"] = False
        return

    read = model.run(x, read=hook)
    for name in names:
        state, axes = read[name], model.hooks.shape(name).split()
        sizes = sizes_of(model, x, name, x.patches.n_batch)
        wrong = {
            axis: (length, sizes[axis])
            for axis, length in zip(axes, state.shape, strict=True)
            if axis in sizes and length != sizes[axis]
        }
        assert not wrong, name
        assert (state.dtype == torch.bool) == name.endswith("hook_mask")
        assert state.dtype == torch.bool or not state.isnan().any()
    if hook.endswith(WRITTEN_OUT):
        # one float32 rounding of attention, carried through the blocks with logits up to 10
        assert torch.allclose(read.logits, clean, atol=1e-4, rtol=0)
    else:
        assert torch.equal(read.logits, clean)

    alive = [name for name in names if not model.off_path(name)]
    for edit in (same, same_in_place):
        assert torch.equal(model.run_with_hooks(x, fwd_hooks=[(alive, edit)]), read.logits)
    for name in {alive[0], alive[-1]}:
        base = model.run(x, read=name).logits
        returned = model.run_with_hooks(x, fwd_hooks=[(name, other)])
        assert float((returned - base).abs().max()) > 1e-3, name
        in_place = model.run_with_hooks(x, fwd_hooks=[(name, other_in_place)])
        assert torch.allclose(in_place, returned, atol=1e-5, rtol=0), name
    for edit in (other, other_in_place):  # of the loop's last name
        assert torch.allclose(through_trace(model, x, name, edit), returned, atol=1e-5, rtol=0)
    for edit in (same, same_in_place):
        assert torch.equal(through_trace(model, x, name, edit), base)
    contract[hook, family, "float32"] = True


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_keeps_the_contract_in_bfloat16(case, half, hook):
    family = case[0]
    model, x, clean = half
    names = [name for name in names_of(model, hook) if not model.off_path(name)]
    if not names:
        contract[hook, family, "bfloat16"] = False
        return
    name = names[-1]
    read = model.run(x, read=name)
    assert read[name].dtype in (torch.bool, torch.bfloat16, torch.float32)
    if not hook.endswith(WRITTEN_OUT):
        assert torch.equal(read.logits, clean)
    for edit in (same, same_in_place):
        assert torch.equal(model.run_with_hooks(x, fwd_hooks=[(name, edit)]), read.logits)
    moved = model.run_with_hooks(x, fwd_hooks=[(name, other)])
    assert float((moved - read.logits).abs().max()) > 0.02
    contract[hook, family, "bfloat16"] = True
