"""Value edits: the numbers are those of functions written by hand, and of plain transformers."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from interp import MLLM, Ablate, EdgeSet, Knockout, Patch, Scale, Steer, window
from interp.edits import edit_from_json
from interp.edits.values import check_together
from interp.errors import HeadError, NotRead, UnknownHook
from interp.families.base import module_at
from tests.conftest import plain_logits, random_inputs, random_llava
from tests.zoo import ZOO, build, picture


def two_rows(model, name, seed=1):
    """Two pictures, the first row padded."""
    prompt = ZOO[name].prompt
    pictures = [picture(40, 32, seed=seed + 1), picture(36, 50, seed=seed)]
    return model.prepare(pictures, [prompt, f"{prompt} a red dog"])


@pytest.fixture(scope="module", params=list(ZOO))
def case(request):
    """(name, model, a batch of two rows, the first padded)."""
    module, processor = build(request.param)
    model = MLLM.load(module, processor=processor)
    return request.param, model, two_rows(model, request.param)


def ramp(n):
    return torch.linspace(-1.0, 2.0, n)


def at(pairs, edit):
    """A hook function that replaces each vector (or heads by vector) at (row, position) pairs."""

    def function(value, hook):
        before = value.clone()
        for row, position in pairs:
            value[row, position] = edit(before[row, position], before)

    return function


def heads_of(heads, edit):
    """On `[head, d_head]`: only these heads."""

    def change(vectors, _):
        return torch.stack([edit(v) if h in heads else v for h, v in enumerate(vectors)])

    return change


def pairs_of(grid):
    return list(zip(grid.row.tolist(), grid.position.tolist(), strict=True))


# -- every family ----------------------------------------------------------------------------------


def by_hand(model, x):
    """(edit, hook, the same as a function) in both towers, the adapter, and grouped heads."""
    attended = [tuple(p) for p in x.tensors["attention_mask"].nonzero().tolist()]
    image, patches, adapter = pairs_of(x.grid), pairs_of(x.patches), pairs_of(x.adapter)
    steered = ramp(model.cfg.d_model)
    last = model.hooks.expand("vision.blocks.*.hook_resid_post")
    read = next(n for n in reversed(last) if not model.off_path(n))
    layer = int(read.split(".")[2])
    mean = "adapter.hook_out"
    mean_at = torch.tensor(adapter)
    return [
        (
            Ablate("attn.hook_z", layers=window(1, 3), heads=[1, 4]),
            "blocks.[0-2].attn.hook_z",
            at(attended, heads_of([1, 4], torch.zeros_like)),
        ),
        (
            Scale("blocks.1.attn.hook_v", -0.5, heads=0, positions=x.grid),
            "blocks.1.attn.hook_v",
            at(image, heads_of([0], lambda v: v * -0.5)),
        ),
        (
            Steer("blocks.0.hook_resid_post", steered, 1.5, positions=x.grid),
            "blocks.0.hook_resid_post",
            at(image, lambda v, _: v + 1.5 * steered),
        ),
        (
            Ablate(mean, "mean", positions=x.adapter),
            mean,
            at(adapter, lambda _, all_: all_[mean_at[:, 0], mean_at[:, 1]].mean(0)),
        ),
        (
            Ablate("vision.attn.hook_z", heads={layer: 2}, positions=x.patches),
            f"vision.blocks.{layer}.attn.hook_z",
            at(patches, heads_of([2], torch.zeros_like)),
        ),
        (
            Scale("vision.blocks.0.mlp.hook_post", 2, positions=x.patches),
            "vision.blocks.0.mlp.hook_post",
            at(patches, lambda v, _: v * 2),
        ),
        (
            Scale("blocks.1.attn.hook_pattern", 0.5, heads=3, positions=x.grid),
            "blocks.1.attn.hook_pattern",
            lambda value, hook: [value[r, 3, p].mul_(0.5) for r, p in image] and None,
        ),
    ]


def test_edits_give_what_functions_by_hand_give(case):
    _, model, x = case
    attended = x.tensors["attention_mask"].bool()
    clean = model.run(x).logits
    for edit, hook, function in by_hand(model, x):
        run = model.run(x, edit)
        reference = model.run_with_hooks(x, fwd_hooks=[(hook, function)])
        assert torch.allclose(run.logits[attended], reference[attended], atol=1e-5), edit
        assert float((run.logits - clean)[attended].abs().max()) > 1e-3, edit
        assert all(r.changed == r.asked > 0 and r.size > 0 for r in run.receipts), edit


def test_all_edits_together_give_what_all_functions_give(case):
    _, model, x = case
    attended = x.tensors["attention_mask"].bool()
    edits, hooks, functions = zip(*by_hand(model, x), strict=True)
    run = model.run(x, *edits)
    reference = model.run_with_hooks(x, fwd_hooks=list(zip(hooks, functions, strict=True)))
    assert torch.allclose(run.logits[attended], reference[attended], atol=2e-5)


def hooked(plain, hooks, x):
    """Logits of plain transformers with forward hooks: (path, "pre" or "post", function)."""
    handles = []
    for path, side, function in hooks:
        module = module_at(plain, path)
        if side == "pre":
            handles.append(
                module.register_forward_pre_hook(lambda m, a, f=function: (f(a[0]), *a[1:]))
            )
        else:
            handles.append(
                module.register_forward_hook(
                    lambda m, a, out, f=function: (
                        (f(out[0]), *out[1:]) if isinstance(out, tuple) else f(out)
                    )
                )
            )
    try:
        return plain_logits(plain, x)
    finally:
        for handle in handles:
            handle.remove()


def test_edits_give_what_plain_transformers_gives_with_forward_hooks(case):
    name, model, x = case
    family, cfg = model.family, model.cfg
    plain = build(name)[0]
    plain.set_attn_implementation("eager")
    direction = ramp(cfg.d_model)

    def no_head(d_head, head):
        def function(z):
            z = z.clone()
            z[..., head * d_head : (head + 1) * d_head] = 0
            return z

        return function

    def steer(stream):
        stream = stream.clone()
        stream[torch.from_numpy(x.grid.is_image)] += 2 * direction
        return stream

    edits = [
        Ablate("vision.blocks.0.attn.hook_z", heads=1),
        Ablate("blocks.1.attn.hook_z", heads=5),
        Steer("blocks.2.hook_resid_post", direction, 2, positions=x.grid),
        Scale("adapter.hook_out", 0.25),
    ]
    hooks = [
        (family.block_path(0, "o", vision=True), "pre", no_head(cfg.d_vision_head, 1)),
        (family.block_path(1, "o"), "pre", no_head(cfg.d_head, 5)),
        (family.block_path(2), "post", steer),
        (family.adapter, "post", lambda out: out * 0.25),
    ]
    attended = x.tensors["attention_mask"].bool()
    clean, together = model.run(x).logits, model.run(x, *edits).logits
    assert torch.allclose(together[attended], hooked(plain, hooks, x)[attended], atol=1e-4)
    for edit, hook in zip(edits, hooks, strict=True):
        ours = model.run(x, edit).logits
        assert torch.allclose(ours[attended], hooked(plain, [hook], x)[attended], atol=1e-4), edit
        assert float((ours - clean)[attended].abs().max()) > 1e-3, edit


def test_patching_the_whole_last_state_gives_the_other_runs_logits(case):
    name, model, x = case
    other = two_rows(model, name, seed=5)
    attended = x.tensors["attention_mask"].bool()
    hook = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    source = model.run(other, read=[hook, "adapter.hook_out"])
    assert float((source.logits - model.run(x).logits)[attended].abs().max()) > 1e-2
    patched = model.run(x, Patch(hook, source))
    assert torch.allclose(patched.logits[attended], source.logits[attended], atol=1e-6)
    if "deepstack.0.hook_out" in model.hooks.names:
        return  # pictures reach the language model on other ways too
    patched = model.run(x, Patch("adapter.hook_out", source))
    assert torch.allclose(patched.logits[attended], source.logits[attended], atol=1e-5)


# -- numbers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half():
    return MLLM.load(random_llava(dtype=torch.bfloat16))


def test_bfloat16_values_stay_bfloat16(half):
    x = random_inputs(half, 2, padding=3)
    names = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "adapter.hook_out"]
    direction = ramp(48)
    edits = [
        Steer(names[0], direction, 3.0),
        Scale(names[1], 0.5, heads=2),
        Ablate(names[2], "mean"),
    ]
    clean = half.run(x, read=names)
    run = half.run(x, *edits, read=names)
    assert all(run[name].dtype == torch.bfloat16 for name in names)
    mean = clean[names[2]].float().mean((0, 1)).bfloat16()
    assert torch.equal(run[names[2]], mean.expand_as(run[names[2]]))

    def steer(value, hook):
        return value + (3.0 * direction).bfloat16()

    def scale(value, hook):
        value[:, :, 2] *= 0.5

    def to_mean(value, hook):
        return value.float().mean((0, 1)).bfloat16().expand_as(value).clone()

    functions = zip(names, [steer, scale, to_mean], strict=True)
    reference = half.run_with_hooks(x, fwd_hooks=list(functions))
    attended = x.tensors["attention_mask"].bool()
    assert torch.equal(run.logits[attended], reference[attended])


def test_mean_is_of_the_selected_vectors_head_by_head(rand, rx2):
    hook = "blocks.1.attn.hook_z"
    clean = rand.run(rx2, read=hook)[hook].double().numpy()
    pairs = [(0, 4), (0, 9), (1, 7)]
    run = rand.run(rx2, Ablate(hook, "mean", heads=[2, 5], positions=pairs), read=hook)
    for head in range(6):
        chosen = np.stack([clean[row, position, head] for row, position in pairs])
        mean = chosen.mean(0) if head in (2, 5) else chosen
        got = np.stack([run[hook][row, position, head].numpy() for row, position in pairs])
        assert np.allclose(got, np.broadcast_to(mean, got.shape), atol=1e-6)


def test_mean_leaves_padding_out(rand, rx2):
    hook = "blocks.0.hook_mlp_out"
    clean, run = rand.run(rx2, read=hook)[hook], rand.run(rx2, Ablate(hook, "mean"), read=hook)
    attended = rx2.tensors["attention_mask"].bool()
    assert int((~attended).sum()) == 3
    mean = clean[attended].mean(0)
    assert torch.allclose(run[hook][attended], mean.expand(45, -1), atol=1e-6)
    assert torch.equal(run[hook][~attended], clean[~attended])


def test_a_tensor_is_put_in_for_every_head_or_each(rand, rx):
    hook, heads = "blocks.1.attn.hook_z", [0, 3]
    each, one = torch.randn(6, 8), torch.randn(8)
    run = rand.run(rx, Ablate(hook, each, heads=heads, positions=7), read=hook)
    assert torch.equal(run[hook][0, 7, heads], each[heads])
    run = rand.run(rx, Ablate(hook, one, heads=heads, positions=7), read=hook)
    assert torch.equal(run[hook][0, 7, heads], one.expand(2, 8))


def test_resampling_takes_the_same_image_token_of_the_other_row(rand, rx2):
    """The second row is padded on the left, so its tokens have other positions."""
    hook = "blocks.1.hook_resid_post"
    clean = rand.run(rx2, read=hook)[hook]
    run = rand.run(rx2, Ablate(hook, "resample", positions=rx2.grid), read=hook)
    assert torch.equal(run[hook][0, 2:18], clean[1, 5:21])
    assert torch.equal(run[hook][1, 5:21], clean[0, 2:18])
    rest = ~torch.from_numpy(rx2.grid.is_image)
    assert torch.equal(run[hook][rest], clean[rest])


def test_resampling_is_seeded_and_without_fixed_points(rand):
    x = random_inputs(rand, 5)
    hook = "blocks.1.hook_resid_post"
    clean = rand.run(x, read=hook)[hook]
    seen = set()
    for seed in range(8):
        states = rand.run(x, Ablate(hook, "resample", seed=seed), read=hook)[hook]
        again = rand.run(x, Ablate(hook, "resample", seed=seed), read=hook)[hook]
        assert torch.equal(states, again)
        donors = tuple(
            next(d for d in range(5) if torch.equal(states[row], clean[d])) for row in range(5)
        )
        assert sorted(donors) == list(range(5))
        assert all(donor != row for row, donor in enumerate(donors))
        seen.add(donors)
    assert len(seen) > 3


def test_a_row_takes_from_the_same_row_at_every_hook(rand):
    x = random_inputs(rand, 5)
    hooks = ["blocks.0.hook_mlp_out", "blocks.2.hook_mlp_out"]
    edits = [Ablate(hook, "resample") for hook in hooks]
    donors = []
    for hook, edit in zip(hooks, edits, strict=True):
        clean, run = rand.run(x, read=hook)[hook], rand.run(x, edit, read=hook)[hook]
        donors.append(
            [next(d for d in range(5) if torch.equal(run[row], clean[d])) for row in range(5)]
        )
    assert donors[0] == donors[1]


def test_relative_steering_adds_a_share_of_each_vectors_norm(rand, rx):
    hook, direction = "blocks.1.hook_resid_post", torch.randn(48) * 7
    clean = rand.run(rx, read=hook)[hook]
    run = rand.run(rx, Steer(hook, direction, 0.5, relative=True), read=hook)
    added = run[hook] - clean
    assert torch.allclose(added.norm(dim=-1), 0.5 * clean.norm(dim=-1), rtol=1e-4)
    cosine = torch.cosine_similarity(added, direction.expand_as(added), dim=-1)
    assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-4)
    assert run.receipts[0].size == pytest.approx(0.5, rel=1e-4)


def test_scores_that_the_mask_closed_stay_closed(rand, rx):
    """Zero everywhere would open the future; scaled by nothing, minus infinity would be NaN."""
    hook, pattern = "blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern"
    for edit in (Ablate(hook, heads=2), Scale(hook, 0.0, heads=2)):
        run = rand.run(rx, edit, read=pattern)
        flat = torch.ones(rx.n_pos, rx.n_pos).tril()
        assert torch.allclose(run[pattern][0, 2], flat / flat.sum(-1, keepdim=True), atol=1e-6)
        assert np.isfinite(run.receipts[0].size)
        assert run.receipts[0].size > 0.1


def test_a_value_edit_behind_a_mask_edit_sees_what_that_left(rand, rx):
    cut = Knockout(rx.grid.edges([0, 1], [9, 12]), layers=1)
    hook = "blocks.1.attn.hook_z"
    left = rand.run(rx, cut, read=hook)[hook]
    run = rand.run(rx, Scale(hook, 2.0, heads=1), cut, read=hook)
    left[:, :, 1] *= 2
    assert torch.equal(run[hook], left)
    assert [r.edit.split("(")[0] for r in run.receipts] == ["Knockout", "Scale"]


def test_edits_at_one_hook_apply_in_order(rand, rx):
    hook, one = "blocks.1.hook_resid_post", torch.ones(48)
    clean = rand.run(rx, read=hook)[hook]
    run = rand.run(rx, Scale(hook, 2.0), Steer(hook, one), read=hook)
    assert torch.equal(run[hook], clean * 2 + 1)
    run = rand.run(rx, Steer(hook, one), Scale(hook, 2.0), read=hook)
    assert torch.equal(run[hook], (clean + 1) * 2)
    run = rand.run(rx, Ablate(hook), Steer(hook, one), read=hook)
    assert torch.equal(run[hook], torch.ones_like(clean))


def test_what_is_not_selected_keeps_every_bit(rand, rx2):
    hook = "blocks.1.attn.hook_z"
    clean = rand.run(rx2, read=hook)[hook]
    run = rand.run(rx2, Scale(hook, 3.0, heads=[1, 2], positions=[(0, 5), (1, 6)]), read=hook)
    expected = clean.clone()
    expected[[[0], [1]], [[5], [6]], [[1, 2]]] *= 3
    assert torch.equal(run[hook], expected)


# -- where -----------------------------------------------------------------------------------------


def test_layers_and_heads_by_layer_name_the_hooks(rand):
    z = "blocks.{}.attn.hook_z".format
    assert Ablate("attn.hook_z", layers=[0, 2]).names(rand) == [z(0), z(2)]
    assert Ablate("attn.hook_z", heads={2: 0, 1: [4]}).names(rand) == [z(1), z(2)]
    assert Ablate("blocks.*.attn.hook_z", heads={1: 0}).names(rand) == [z(1)]
    assert Ablate("attn.hook_{k,v}", layers=1).names(rand) == [
        "blocks.1.attn.hook_k",
        "blocks.1.attn.hook_v",
    ]
    vision = Ablate("vision_encoder.attn.hook_z", layers=[0, 1], heads={1: 3})
    assert vision.names(rand) == ["vision.blocks.1.attn.hook_z"]
    assert Ablate("adapter.hook_out").names(rand) == ["adapter.hook_out"]


def test_places_by_name_are_those_of_the_tensor_at_the_hook(rand, rx2):
    """The image tokens of the prompt, the patches of the tower, what leaves the adapter."""
    at = {
        ("blocks.1.hook_resid_post", "image"): rx2.grid.is_image,
        ("blocks.1.hook_resid_post", "last"): rx2.is_last,
        ("blocks.1.hook_resid_post", "text"): rx2.is_text,
        ("vision.blocks.0.hook_resid_post", "image"): rx2.patches.is_image,
        ("adapter.hook_out", "image"): rx2.adapter.is_image,
    }
    for (hook, place), mask in at.items():
        run = rand.run(rx2, Ablate(hook, positions=place), read=hook)
        assert np.array_equal((run[hook] == 0).all(-1).numpy(), mask)
    edit = Ablate("blocks.1.hook_resid_post", positions="last")
    assert repr(edit) == "Ablate('blocks.1.hook_resid_post', positions='last')"
    assert edit_from_json(json.loads(json.dumps(edit.to_json()))) == edit


def test_heads_by_layer_are_edited_in_their_layers(rand, rx):
    hooks = ["blocks.1.attn.hook_z", "blocks.2.attn.hook_z"]
    run = rand.run(rx, Ablate("attn.hook_z", heads={1: [0, 3], 2: 5}), read=hooks)
    dead = [(run[hook] == 0).all(-1).all(1)[0].nonzero()[:, 0].tolist() for hook in hooks]
    assert dead == [[0, 3], [5]]
    assert [r.asked for r in run.receipts] == [2 * rx.n_pos, rx.n_pos]


def test_key_value_heads_are_counted_by_themselves(rand, rx):
    """Two of them for six query heads: head 1 is query heads 3, 4, 5."""
    z = "blocks.1.attn.hook_z"
    run = rand.run(rx, Ablate("blocks.1.attn.hook_v", heads=1), read=z)
    assert (run[z][:, :, 3:] == 0).all()
    assert (run[z][:, :, :3] != 0).any(-1).all()
    with pytest.raises(HeadError, match=r"2 key-value heads, 0\.\.1, for 6 query heads, so no .*4"):
        rand.run(rx, Ablate("blocks.1.attn.hook_rot_k", heads=4))


# -- contradictions --------------------------------------------------------------------------------

Z = "blocks.1.attn.hook_z"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Ablate(Z), Ablate(Z, "mean")),
        (Ablate(Z, heads=[0, 1]), Ablate("blocks.*.attn.hook_z", heads=[1, 2])),
        (Ablate(Z, positions=[3, 4]), Ablate(Z, "mean", positions=[(0, 4), (0, 5)])),
        (Scale(Z, 2.0), Ablate(Z, heads=3)),
        (Ablate(Z), Ablate(Z)),
    ],
)
def test_setting_over_an_earlier_edit_is_refused(rand, rx, first, second):
    with pytest.raises(ValueError, match=r"overwrites what (Ablate|Scale)\(.* writes at blocks\.1"):
        check_together([first, second], rand, rx)


def test_a_run_asks_whether_its_edits_go_together(rand, rx):
    with pytest.raises(ValueError, match="overwrites what"):
        rand.run(rx, Scale(Z, 2.0), Ablate(Z, heads=3))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Ablate(Z, heads=0), Ablate(Z, "mean", heads=1)),
        (Ablate(Z, positions=3), Ablate(Z, "mean", positions=[4, 5])),
        (Ablate(Z, heads={1: 0}), Ablate("attn.hook_z", layers=2, heads=0)),
        (Ablate(Z), Steer(Z, torch.ones(8))),
        (Scale(Z, 2.0), Scale(Z, 3.0)),
    ],
)
def test_edits_that_do_not_overwrite_go_together(rand, rx, first, second):
    check_together([first, second], rand, rx)
    receipts = rand.run(rx, first, second).receipts
    assert len(receipts) == 2
    assert all(r.changed for r in receipts)


# -- receipts --------------------------------------------------------------------------------------


def test_receipts_count_vectors_and_measure_the_change(rand, rx2):
    z, resid = "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"
    clean = rand.run(rx2, read=[z, resid])
    first, second = rand.run(
        rx2, Ablate(z, heads=[0, 2], positions=[4, 5]), Scale(resid, 1.5, positions=rx2.grid)
    ).receipts
    assert (first.hook, first.layer, first.asked, first.changed) == (z, 1, 8, 8)
    gone = clean[z][:, 4:6][:, :, [0, 2]].norm() / clean[z].norm()
    assert first.size == pytest.approx(float(gone), rel=1e-5)
    assert (second.hook, second.layer, second.asked, second.changed) == (resid, 1, 32, 32)
    assert (first.open, first.mass, first.empty_rows) == (None, None, 0)


def test_receipts_count_only_what_is_another_now(rand, rx):
    """A patch from the same input, but for one row of values."""
    hook = "blocks.1.hook_mlp_out"
    states = {hook: rand.run(rx, read=hook)[hook].clone()}
    states[hook][0, 6] += 1
    (receipt,) = rand.run(rx, Patch(hook, states)).receipts
    assert (receipt.asked, receipt.changed) == (rx.n_pos, 1)


def test_receipts_of_the_vision_tower_name_its_layer(rand, rx):
    receipts = rand.run(
        rx, Scale("vision.blocks.[0-1].attn.hook_z", 2), Scale("adapter.hook_out", 2)
    ).receipts
    assert [(r.hook.split(".")[0], r.layer) for r in receipts] == [
        ("vision", 0),
        ("vision", 1),
        ("adapter", None),
    ]


# -- as data ---------------------------------------------------------------------------------------


def digest(tensor):
    head = f"{tensor.dtype} {list(tensor.shape)};".encode()
    return hashlib.sha256(head + tensor.numpy().tobytes()).hexdigest()[:8]


def made(rx2):
    direction = torch.linspace(0, 1, 48)
    return {
        "Ablate('blocks.1.attn.hook_z')": Ablate("blocks.1.attn.hook_z"),
        "Ablate('attn.hook_z', with_='mean', layers=[8, 9, 10, 11, 12], heads=[3])": Ablate(
            "attn.hook_z", "mean", layers=window(10, 5), heads=3
        ),
        "Ablate('attn.hook_z', with_='resample', heads={2: [0, 1]}, seed=4)": Ablate(
            "attn.hook_z", "resample", heads={2: [1, 0]}, seed=4
        ),
        f"Ablate('ln_final.hook_scale', with_=tensor([1] {digest(torch.ones(1))}), "
        "positions=[(0, 5), (1, 6)])": (
            Ablate("ln_final.hook_scale", torch.ones(1), positions=[(1, 6), (0, 5)])
        ),
        f"Steer('blocks.1.hook_mlp_out', direction=tensor([48] {digest(direction)}), scale=2.0, "
        "positions=<32 positions in 2 rows, 2..20>)": Steer(
            "blocks.1.hook_mlp_out", direction, 2, positions=rx2.grid
        ),
        "Scale('vision.blocks.0.hook_mlp_out', factor=0.5)": Scale(
            "vision.blocks.0.hook_mlp_out", 0.5
        ),
    }


def test_edits_print_as_the_call(rx2):
    for text, edit in made(rx2).items():
        assert repr(edit) == text


def test_edits_come_back_from_json_equal_and_hash_alike(rx2):
    edits, again = list(made(rx2).values()), list(made(rx2).values())
    back = [edit_from_json(json.loads(json.dumps(edit.to_json()))) for edit in edits]
    assert back == edits == again
    assert [hash(edit) for edit in back] == [hash(edit) for edit in edits]
    assert len({*edits, *back}) == len(edits)


def test_an_edit_from_json_runs_the_same(rand, rx2):
    torch.manual_seed(0)
    edit = Steer("blocks.1.hook_resid_post", torch.randn(48), 0.3, positions=rx2.grid)
    back = edit_from_json(json.loads(json.dumps(edit.to_json())))
    assert torch.equal(rand.run(rx2, back).logits, rand.run(rx2, edit).logits)


def test_edits_that_differ_are_not_equal():
    one, other = torch.ones(4), torch.ones(4)
    other[2] = 1.0001
    assert Steer("h", one) == Steer("h", torch.ones(4)) != Steer("h", other)
    assert repr(Steer("h", one)) != repr(Steer("h", other))
    assert Ablate("h", heads=1) != Ablate("h", heads=2)
    assert Ablate("h", positions=1) != Ablate("h", positions=[(0, 1)])
    assert Ablate("h") != Scale("h", 0.0)


def test_a_patch_comes_back_only_with_its_run(rand, rx):
    hook = "blocks.1.attn.hook_z"
    source = rand.run(
        random_inputs(rand, seed=3), read=["blocks.*.attn.hook_z", "adapter.hook_out"]
    )
    patch = Patch("attn.hook_z", source, layers=1, heads=[2], positions=4)
    assert repr(patch).startswith("Patch('attn.hook_z', from_=Run(1 state ")
    data = json.loads(json.dumps(patch.to_json()))
    with pytest.raises(ValueError, match=r"it read blocks\.1\.attn\.hook_z.*from_=run\)"):
        edit_from_json(data)
    back = Patch.from_json(data, from_=source)
    assert back == patch
    assert hash(back) == hash(patch)
    assert torch.equal(rand.run(rx, back).logits, rand.run(rx, patch).logits)
    with pytest.raises(ValueError, match="not the run that was patched from"):
        Patch.from_json(data, from_=rand.run(rx, read=hook))
    assert patch != Patch("attn.hook_z", rand.run(rx, read=hook), layers=1, heads=2, positions=4)


def test_patch_takes_a_cache_as_well_as_a_run(rand, rx):
    hook, other = "blocks.1.hook_resid_post", random_inputs(rand, seed=3)
    _, cache = rand.run_with_cache(other, names_filter=hook)
    assert Patch(hook, cache) == Patch(hook, rand.run(other, read=hook))


def test_patch_moves_only_the_heads_and_positions_named(rand, rx):
    hook = "blocks.1.attn.hook_z"
    source = rand.run(random_inputs(rand, seed=3), read=hook)
    run = rand.run(rx, Patch(hook, source, heads=[1, 4], positions=[6, 7]), read=hook)
    expected = rand.run(rx, read=hook)[hook].clone()
    expected[:, 6:8, [1, 4]] = source[hook][:, 6:8, [1, 4]]
    assert torch.equal(run[hook], expected)
    assert run.receipts[0].changed == 4


def test_patch_says_what_the_other_run_lacks(rand, rx, rx2):
    source = rand.run(rx, read="blocks.0.hook_resid_post")
    with pytest.raises(NotRead, match=r"did not read it.*blocks\.0\.hook_resid_post"):
        Patch("blocks.1.hook_resid_post", source)
    with pytest.raises(NotRead, match=r"acts at blocks\.1\.hook_resid_post"):
        rand.run(rx, Patch("blocks.*.hook_resid_post", source))
    with pytest.raises(ValueError, match=r"\[1, 21, 48\].*this one.*\[2, 24, 48\]"):
        rand.run(rx2, Patch("blocks.0.hook_resid_post", source))
    with pytest.raises(TypeError, match=r"a run .or a cache. is patched from"):
        Patch("blocks.0.hook_resid_post", rx)


def test_hooks_are_named_once():
    with pytest.raises(UnknownHook, match="names its layers twice"):
        Ablate("blocks.1.attn.hook_z", layers=1)
    with pytest.raises(UnknownHook, match="takes a hook name or a glob"):
        Ablate(["blocks.1.attn.hook_z"])
    edges = EdgeSet.of([(0, 1, 3)], 1, 8)
    with pytest.raises(UnknownHook, match="takes a hook name"):
        Ablate(edges)
