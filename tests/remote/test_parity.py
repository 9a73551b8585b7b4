"""Edits, their receipts, and all ways of running give on a stock model what they give here.

One request a family with every kind of edit in it (a second one where an edit must stand alone),
then each way of running (`run_many`, `keep=`, caches, hook functions, bare traces) on few.
"""

from __future__ import annotations

import pytest
import torch

from interp import Ablate, EditMask, Knockout, Patch, Scale, Steer, Unmask
from interp.errors import EditHadNoEffect
from tests.remote.pairs import CLASSES, padded, pair, random_bank, same
from tests.zoo import ZOO

READ = "blocks.*.hook_resid_post"


def near(mask, layer):
    """Each query sees the first two positions, itself and the five before it."""
    n = mask.shape[-1]
    allowed = torch.ones(n, n, dtype=torch.bool).triu(-5)
    allowed[:, :2] = True
    return mask & allowed


def compare(local, there, x, *edits, read=READ, **options):
    """Both runs, whose states, logits and receipts agree; the one from there."""
    a, b = (model.run(x, *edits, read=read, **options) for model in (local, there))
    assert list(a) == list(b)
    attended = x.tensors["attention_mask"].bool()
    for name in a:
        u, v = a[name], b[name]
        if u.shape[:2] == attended.shape:
            u, v = u[attended], v[attended]
        same(u, v, name)
    if a.logits is not None:
        same(a.logits[attended], b.logits[attended], "logits")
    alike(a.receipts, b.receipts)
    return b


def alike(ours, theirs):
    """Receipts that tell the same; numbers up to rounding."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        numbers = ("mass", "size")
        for name in vars(one):
            u, v = getattr(one, name), getattr(other, name)
            if name in numbers and u is not None:
                assert v == pytest.approx(u, abs=1e-5), (one.hook, name)
            else:
                assert u == v, (one.hook, name)


@pytest.fixture(scope="module", params=list(ZOO))
def case(request):
    local, there = pair(request.param)
    return local, there, padded(local, request.param)


def test_edits_and_receipts(case):
    """A knockout, a steered stream, scaled heads, a patched MLP and an ablation, in one run."""
    local, there, x = case
    d_model = local.cfg.d_model
    edges = x.grid.edges(src=[0, 1], dst=[2, 3])
    donor = local.run(x, Scale("blocks.1.hook_mlp_out", 2.0), read="blocks.1.hook_mlp_out")
    run = compare(
        local,
        there,
        x,
        Knockout(edges, layers=[0, 2], heads=[1, 4]),
        Steer("blocks.0.hook_resid_post", torch.linspace(-1, 1, d_model), 0.3, positions=x.grid),
        Scale("blocks.1.attn.hook_z", 0.5, heads=[0, 3]),
        Patch("blocks.1.hook_mlp_out", from_=donor, positions="image"),
        Ablate("blocks.2.attn.hook_z", heads=2, with_="mean"),
        change=True,
        strict=False,  # families differ in which of these edges were open
    )
    assert len(run.receipts) == 6
    masses = [r.mass for r in run.receipts if r.hook.endswith("hook_mask")]
    assert all(mass is not None for mass in masses)


def test_masks_in_both_directions_and_by_function(case):
    local, there, x = case
    compare(
        local, there, x, Unmask(x.grid.image_block(), layers=[0, 2]), strict=False, logits=False
    )
    compare(local, there, x, EditMask(near, layers=1), logits=False)


# -- ways of running, on one plain family, one with packed pictures and one with more norms --------


@pytest.fixture(scope="module", params=["llava-clip-llama", "qwen2.5-vl", "gemma3"])
def few(request):
    local, there = pair(request.param)
    return local, there, padded(local, request.param, alike=True)


def test_run_many(few):
    """Variants that start late, that start early, and none: each as if it were run alone."""
    local, there, x = few
    variants = [
        [],
        Knockout(x.grid.edges(src=[0], dst=[3]), layers=1, heads=2),
        [Ablate("blocks.1.attn.hook_z", heads=1), Scale("blocks.2.hook_mlp_out", 2.0)],
        Steer("adapter.hook_out", torch.ones(local.cfg.d_model)),
    ]
    before = there.host.traffic.requests
    ours, theirs = (m.run_many(x, variants, read=READ, batch_size=2) for m in (local, there))
    assert there.host.traffic.requests == before + 1
    attended = x.tensors["attention_mask"].bool()
    for a, b in zip(ours, theirs, strict=True):
        for name in a:
            same(a[name][attended], b[name][attended], name)
        same(a.logits[attended], b.logits[attended], "logits")
        alike(a.receipts, b.receipts)
    assert not torch.allclose(theirs[0].logits, theirs[2].logits)


def last_position(state, hook):
    """A function of one's own, for `keep=`; it may use what it is told of the hook."""
    return state[:, -1] * (1 + hook.layer())


@pytest.mark.parametrize("keep", [None, "tokens", "bank", last_position], ids=str)
def test_keep(few, keep):
    local, there, x = few
    if keep == "bank":
        keep = random_bank(local, local.hooks.expand(READ))
    run = compare(local, there, x, read=READ, keep=keep, logits=False)
    shape = tuple(run["blocks.1.hook_resid_post"].shape)
    n, d = x.grid.n_images, local.cfg.d_model
    if callable(keep):
        assert shape == (len(x), d)
    elif keep is None:
        assert shape == (len(x), x.n_pos, d)
    elif keep == "tokens":
        assert shape == (n, len(x.grid) // n, d)
    else:
        assert shape == (n, len(x.grid) // n)
        assert int(run["blocks.1.hook_resid_post"].max()) < len(CLASSES)


def test_caches(few):
    """TransformerLens's own arithmetic on what came back."""
    local, there, x = few
    wanted = "blocks.*.{attn.hook_pattern,attn.hook_z,hook_resid_post}"
    (a, ours), (b, theirs) = (m.run_with_cache(x, names_filter=wanted) for m in (local, there))
    attended = x.tensors["attention_mask"].bool()
    same(a[attended], b[attended], "logits")
    assert set(ours.keys()) == set(theirs.keys())
    for name in list(ours):
        u, v = ours[name], theirs[name]
        u, v = ((t.transpose(1, 2) if name.endswith("pattern") else t)[attended] for t in (u, v))
        same(u, v, name)
    stream, early = there.run_with_cache(x, names_filter="blocks.0.*_post", stop_at_layer=1)
    same(stream, early["blocks.0.hook_resid_post"])


def test_hook_functions(few):
    """One that returns, one that edits in place; both count."""
    local, there, x = few

    def halved(z, hook):
        return z / 2 if hook.layer() == 2 else None

    def silenced(value, hook):
        value[:, 1:3] = 0

    hooks = [("blocks.*.attn.hook_z", halved), ("blocks.1.hook_mlp_out", silenced)]
    attended = x.tensors["attention_mask"].bool()
    a, b, clean = (
        local.run_with_hooks(x, fwd_hooks=hooks),
        there.run_with_hooks(x, fwd_hooks=hooks),
        local.run(x).logits,
    )
    same(a[attended], b[attended])
    assert float((a - clean)[attended].abs().max()) > 1e-2


def by_hand(model, x):
    """A trace of one's own: in execution order, with an edit and four kinds of reads."""
    with model.trace(x, attn="eager"):
        query = model.hook("blocks.0.attn.hook_q").output.save()
        turned = model.hook("blocks.0.attn.hook_rot_q").output.save()
        mask = model.hook("blocks.1.attn.hook_mask").output.save()
        model.hook("blocks.1.attn.hook_z").output[:, :, 3] = 0
        result = model.hook("blocks.2.attn.hook_result").output.save()
        out = model.hook("blocks.2.hook_resid_post").output.save()
    return {"query": query, "turned": turned, "mask": mask, "result": result, "out": out}


def test_a_trace_of_ones_own(few):
    """`hook_rot_q` lies inside a forward, which nnsight must be told of before the pass."""
    local, there, x = few
    attended = x.tensors["attention_mask"].bool()
    ours, theirs = by_hand(local, x), by_hand(there, x)
    for name in ours:
        a, b = ours[name], theirs[name]
        a, b = ((t.expand(-1, 6, -1, -1).transpose(1, 2) if name == "mask" else t) for t in (a, b))
        same(a[attended], b[attended], name)
    assert not torch.allclose(theirs["query"], theirs["turned"])


def test_an_edit_that_does_nothing_is_an_error_there_too(few):
    local, there, x = few
    for model in (local, there):
        with pytest.raises(EditHadNoEffect, match="what it writes is there already"):
            model.run(x, Scale("blocks.1.hook_mlp_out", 1.0))
