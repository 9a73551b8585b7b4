"""A clean run is the stock model's, and hooks hold what transformers itself computes.

The reference is another copy of the same random weights that this library never touches, under
transformers' own eager or sdpa attention.
"""

from __future__ import annotations

import sys

import pytest
import torch

from interp import MLLM
from interp.families.base import module_at
from interp.points import norm_scale
from tests.conftest import plain_logits
from tests.record import proved
from tests.zoo import ZOO, build, picture

#: SDPA knows no softcap: transformers refuses it for Gemma 2, so eager alone is the reference
NO_SDPA = ("paligemma2",)


def norm(a: torch.Tensor) -> float:
    return float(a.float().norm())


@pytest.fixture(scope="module", params=list(ZOO))
def case(request):
    """(name, model, plain copy, a batch of two rows, the first of them padded)."""
    module, processor = build(request.param)
    model = MLLM.load(module, processor=processor)
    prompt = ZOO[request.param].prompt
    x = model.prepare([picture(40, 32), picture(36, 50, seed=1)], [prompt, f"{prompt} a red dog"])
    return request.param, model, build(request.param)[0], x


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_clean_run_is_the_stock_models(case, kernel):
    name, model, plain, x = case
    ours = model.run(x).logits
    if kernel == "sdpa" and name in NO_SDPA:
        with pytest.raises(ValueError, match=r"does not support .*scaled_dot_product"):
            plain.set_attn_implementation("sdpa")
        proved(name, kernel, "refused")
        return
    plain.set_attn_implementation(kernel)
    reference = plain_logits(plain, x)
    attended = x.tensors["attention_mask"].bool()  # padding's own states mean nothing
    assert norm((ours - reference)[attended]) <= 1e-6 * norm(reference[attended])
    if kernel == "sdpa":
        assert torch.equal(ours[attended], reference[attended])
    proved(name, kernel)


def test_residual_stream_is_transformers_hidden_states(case):
    """Of the language model `hidden_states[i]` is what enters block i, and the last of them is
    *behind* the final norm: TransformerLens's `blocks.{n-1}.hook_resid_post` is not among them."""
    family, model, plain, x = case
    n = model.cfg.n_layers
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        states = plain(**x.tensors, use_cache=False, output_hidden_states=True).hidden_states
    run = model.run(x, read=["blocks.*.hook_resid_{pre,post}", "ln_final.hook_normalized"])
    assert len(states) == n + 1
    assert_near(run["blocks.0.hook_resid_pre"], states[0], x)
    for layer in range(1, n):
        assert_near(run[f"blocks.{layer - 1}.hook_resid_post"], states[layer], x)
    final = module_at(plain, model.family.language.final_norm)
    weight = final.weight + model.family.language.names.norm_offset
    assert_near(run["ln_final.hook_normalized"] * weight, states[n], x)
    assert_near(final(run[f"blocks.{n - 1}.hook_resid_post"]), states[n], x)
    proved(family, "hidden states")


def test_vision_states_are_transformers_hidden_states():
    """Of CLIP and SigLIP towers the last of `hidden_states` is *before* the final norm."""
    for name in ("llava-clip-llama", "llava-siglip-mistral", "gemma3", "internvl"):
        module, processor = build(name)
        model = MLLM.load(module, processor=processor)
        x = model.prepare(picture(), ZOO[name].prompt)
        plain = build(name)[0]
        plain.set_attn_implementation("eager")
        with torch.no_grad():
            out = plain.model.vision_tower(x.tensors["pixel_values"], output_hidden_states=True)
        run = model.run(x, read="vision.blocks.*.hook_resid_{pre,post}", logits=False)
        ours = [run["vision.blocks.0.hook_resid_pre"]]
        ours += [run[f"vision.blocks.{i}.hook_resid_post"] for i in range(3)]
        for mine, reference in zip(ours, out.hidden_states, strict=True):
            assert torch.allclose(mine, reference, atol=2e-5), name
        if model.family.vision.final_norm:
            behind = module_at(plain, model.family.vision.final_norm)(ours[-1])
            assert torch.allclose(out.last_hidden_state, behind, atol=2e-5)
            assert not torch.allclose(out.last_hidden_state, ours[-1], atol=0.1)


def test_pattern_is_what_eager_attention_returns(case):
    """For both towers, with the chunks of packed towers as blocks on the diagonal."""
    family, model, plain, x = case
    plain.set_attn_implementation("eager")
    for tower, prefix in ((model.family.language, ""), (model.family.vision, "vision.")):
        seen: dict[str, list[torch.Tensor]] = {}
        watch_eager(plain, tower, prefix, seen)
        plain_logits(plain, x)
        run = model.run(x, read=f"{prefix}blocks.*.attn.hook_pattern")
        for layer in range(len(module_at(plain, tower.blocks))):
            name = f"{prefix}blocks.{layer}.attn.hook_pattern"
            chunks = seen[name]
            if tower.packed:
                reference = torch.stack(
                    [
                        torch.block_diag(*[c[0, h] for c in chunks])
                        for h in range(chunks[0].shape[1])
                    ]
                )[None]
            else:
                (reference,) = chunks
            rows = (run[name].sum(-1) > 0) & (reference.sum(-1) > 0)
            if not prefix:  # padding: eager spreads a closed row, we and sdpa give zeros
                rows &= x.tensors["attention_mask"].bool()[:, None]
            assert rows.any()
            assert torch.allclose(run[name][rows], reference[rows], atol=1e-5), name
    proved(family, "patterns")


def watch_eager(plain, tower, prefix, seen):
    """Record the weights that transformers' own eager attention function computes, by hook name."""
    blocks = module_at(plain, tower.blocks)
    attentions = [module_at(block, tower.names.part("attn")) for block in blocks]
    code = sys.modules[type(attentions[0]).__module__]
    stock = getattr(code.eager_attention_forward, "__wrapped__", code.eager_attention_forward)

    def recording(module, *args, **kwargs):
        out, weights = stock(module, *args, **kwargs)
        if module in attentions:
            layer = attentions.index(module)
            seen.setdefault(f"{prefix}blocks.{layer}.attn.hook_pattern", []).append(weights)
        return out, weights

    recording.__wrapped__ = stock
    code.eager_attention_forward = recording


def test_mask_is_the_one_the_layer_truly_uses(case):
    """Causal, sliding, image blocks open both ways, padding: as plain eager is given it."""
    family, model, plain, x = case
    plain.set_attn_implementation("eager")
    given: list[torch.Tensor] = []
    handles = [
        block.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(kwargs["attention_mask"]), with_kwargs=True
        )
        for block in module_at(plain, model.family.language.blocks)
    ]
    plain_logits(plain, x)
    for handle in handles:
        handle.remove()
    run = model.run(x, read="blocks.*.attn.hook_mask", logits=False)
    for layer, additive in enumerate(given):
        mask = run[f"blocks.{layer}.attn.hook_mask"]
        assert mask.dtype == torch.bool
        assert mask.shape == (2, model.cfg.n_heads, x.n_pos, x.n_pos)
        # a query that is padding: eager lets it see something, sdpa nothing
        real = x.tensors["attention_mask"].bool()[:, None, :, None].expand_as(mask)
        assert torch.equal(mask[real], (additive == 0).expand_as(mask)[real])
    proved(family, "masks")


def test_families_that_see_pictures_both_ways_do():
    def mask_of(name):
        module, processor = build(name)
        model = MLLM.load(module, processor=processor)
        x = model.prepare(picture(), ZOO[name].prompt)
        masks = model.run(x, read="blocks.*.attn.hook_mask")
        at = x.grid.position
        return [masks[f"blocks.{i}.attn.hook_mask"][0, 0][at][:, at].all() for i in (0, 1)]

    assert mask_of("gemma3") == [True, True]
    assert mask_of("paligemma") == [True, True]
    assert mask_of("qwen2-vl") == [False, False]


def test_windowed_vision_layers_show_their_windows():
    """Qwen2.5-VL: layer 1 sees the whole picture, the others windows of 2 x 2 merged patches."""
    module, processor = build("qwen2.5-vl")
    model = MLLM.load(module, processor=processor)
    x = model.prepare([picture(96, 64), picture(32, 64)], ZOO["qwen2.5-vl"].prompt)
    run = model.run(x, read="vision.blocks.*.attn.hook_mask", logits=False)
    image = torch.as_tensor(x.patches.image)[torch.as_tensor(x.patches.position).argsort()]
    whole = run["vision.blocks.1.attn.hook_mask"][0, 0]
    assert torch.equal(whole, image[:, None] == image)
    windows = run["vision.blocks.0.attn.hook_mask"][0, 0]
    assert (whole | ~windows).all()
    assert not torch.equal(windows, whole)
    assert windows.sum(-1).unique().tolist() == [16]  # 32 pixels a side, patches of 8


def assert_near(ours: torch.Tensor, reference: torch.Tensor, x) -> None:
    """Equal to 1e-6 of the whole, on tokens that are no padding."""
    attended = x.tensors["attention_mask"].bool()
    assert norm((ours - reference)[attended]) <= 2e-6 * norm(reference[attended])


def test_norms_scale_is_transformerlens_scale(case):
    """`ln1.hook_scale` is the root mean square (of the centred stream, for LayerNorm)."""
    _, model, plain, x = case
    run = model.run(x, read=["blocks.1.hook_resid_pre", "blocks.1.ln1.hook_{scale,normalized}"])
    ln1 = module_at(plain, model.family.block_path(1, "ln1"))
    stream = run["blocks.1.hook_resid_pre"]
    centred, scale = norm_scale(ln1, stream)
    assert torch.allclose(run["blocks.1.ln1.hook_scale"], scale)
    weight = ln1.weight + model.family.language.names.norm_offset
    with torch.no_grad():
        assert torch.allclose(centred / scale * weight, ln1(stream), atol=1e-5)


def test_edited_norm_is_what_the_queries_are_made_of(case):
    """Twice the scale and a shift of the normalised stream, through the norm's own weight."""
    _, model, plain, x = case
    clean = model.run(x, read="blocks.1.ln1.hook_normalized")["blocks.1.ln1.hook_normalized"]
    shift = torch.linspace(-1, 1, clean.shape[-1])
    seen = {}
    model.run_with_hooks(
        x,
        fwd_hooks=[
            ("blocks.1.ln1.hook_scale", lambda scale, hook: scale * 2),
            ("blocks.1.ln1.hook_normalized", lambda normalized, hook: normalized + shift),
            ("blocks.1.attn.hook_q", lambda q, hook: seen.update(q=q.flatten(-2).clone())),
        ],
    )
    ln1 = module_at(plain, model.family.block_path(1, "ln1"))
    weight = ln1.weight + model.family.language.names.norm_offset
    with torch.no_grad():
        made = module_at(plain, model.family.block_path(1, "q"))((clean / 2 + shift) * weight)
    assert torch.allclose(seen["q"], made, atol=1e-4)
