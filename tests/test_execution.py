"""Runs: reads after edits, functions in order, early stops, TransformerLens and nnsight inside."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from interp import Knockout
from interp.errors import EmptyRow, NotRead
from interp.execution import execute
from tests.conftest import random_inputs


def double(value, hook):
    return value * 2


def plus_one(value, hook):
    value += 1


def test_read_takes_the_value_after_the_edits_at_its_place(rand, rx):
    seen = {}
    name = "blocks.1.attn.hook_z"
    clean = rand.run(rx, read=name)[name]

    def look(value, hook):
        seen[hook.name] = value.clone()

    rand.run_with_hooks(rx, fwd_hooks=[(name, double), (name, plus_one), (name, look)])
    assert torch.equal(seen[name], clean * 2 + 1)
    rand.run_with_hooks(rx, fwd_hooks=[(name, plus_one), (name, double), (name, look)])
    assert torch.equal(seen[name], (clean + 1) * 2)


def test_states_read_are_not_changed_by_edits_further_on(rand, rx):
    """resid_post of a block and resid_pre of the next are one tensor: what was seen first stays."""
    first, second = "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"
    clean = rand.run(rx, read=first)[first]
    run = execute(rand, rx, read=[first, second], functions=[(second, plus_one)])
    assert torch.equal(run[first], clean)
    assert torch.equal(run[second], clean + 1)


def test_order_of_reads_and_hooks_is_free(rand, rx):
    names = ["ln_final.hook_scale", "vision.hook_embed", "blocks.2.attn.hook_z", "adapter.hook_out"]
    run, again = rand.run(rx, read=names), rand.run(rx, read=names[::-1])
    assert list(run) == list(again) == rand.hooks.expand(names)
    assert all(torch.equal(run[name], again[name]) for name in names)
    late_first = [("blocks.2.hook_resid_post", double), ("blocks.0.hook_resid_post", double)]
    expected = rand.run_with_hooks(rx, fwd_hooks=late_first[::-1])
    assert torch.equal(rand.run_with_hooks(rx, fwd_hooks=late_first), expected)


def test_hooks_and_mask_edits_combine_at_the_very_same_points(rand, rx):
    edit = Knockout(rx.grid.edges([0, 1], [8, 9]))
    hooks = [
        (f"blocks.*.attn.hook_{p}", lambda v, hook: v) for p in ("rot_q", "rot_k", "mask", "q")
    ]
    assert torch.equal(rand.run_with_hooks(rx, edit, fwd_hooks=hooks), rand.run(rx, edit).logits)
    table, alone = (
        rand.run(rx, edit, read="*").receipts.table(),
        rand.run(rx, edit).receipts.table(),
    )
    pd.testing.assert_frame_equal(table, alone, rtol=1e-5)


def test_knockout_acts_before_a_mask_hook_in_the_same_layer(rand, rx):
    seen = {}
    edit = Knockout(rx.grid.edges([0, 1], [8, 9]), layers=1)
    keep = ("blocks.1.attn.hook_mask", lambda mask, hook: seen.update(mask=mask.clone()))
    rand.run_with_hooks(rx, edit, fwd_hooks=[keep])
    assert not (seen["mask"] & edit.edges.to_mask()[:, None]).any()


def test_function_hears_the_hooks_name_and_layer(rand, rx):
    heard = []
    names = ["vision.blocks.1.hook_resid_post", "blocks.2.attn.hook_q", "adapter.hook_out"]

    def listen(value, hook):
        heard.append((hook.name, hook.layer() if "blocks" in hook.name else None))

    rand.run_with_hooks(rx, fwd_hooks=[(names, listen)])
    assert heard == [(names[0], 1), (names[2], None), (names[1], 2)]


def test_without_logits_the_forward_stops_after_the_last_step(rand, rx):
    ran = []
    layers = rand.module.model.language_model.layers
    handles = [
        layer.register_forward_pre_hook(lambda module, args, i=i: ran.append(i))
        for i, layer in enumerate(layers)
    ]
    try:
        run = rand.run(rx, read="blocks.0.hook_resid_post", logits=False)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0]
    assert run.logits is None
    full = rand.run(rx, read="blocks.0.hook_resid_post")
    assert torch.equal(run["blocks.0.hook_resid_post"], full["blocks.0.hook_resid_post"])


def test_edits_are_done_even_where_the_forward_stops_early(rand, rx):
    edit = Knockout(rx.grid.edges([0, 1], [8, 9]), layers=[0, 2])
    run = rand.run(rx, edit, read="blocks.0.hook_resid_post", logits=False)
    assert [receipt.layer for receipt in run.receipts] == [0, 2]
    assert run.receipts == rand.run(rx, edit).receipts


def test_run_asked_for_a_state_it_did_not_read(rand, rx):
    run = rand.run(rx, read="blocks.0.hook_resid_post")
    assert torch.equal(run["blocks.0.hook_resid_post"], next(iter(run.states.values())))
    with pytest.raises(NotRead, match=r"did you mean blocks\.0\.hook.*Pass read='blocks\.1\.hook"):
        run["blocks.1.hook_resid_post"]


def test_run_prints_short(rand, rx):
    run = rand.run(rx, Knockout(rx.grid.edges(1, 3)), read="blocks.*.hook_resid_post")
    assert repr(run) == "Run(3 states, logits [1, 21, 64], 3 receipts)"
    assert "no logits" in repr(rand.run(rx, read="hook_embed", logits=False))


def test_image_tokens_of_a_state_in_grid_order(rand, rx2):
    names = ["vision.blocks.0.attn.hook_z", "adapter.hook_out", "blocks.1.hook_resid_post"]
    run = rand.run(rx2, read=[*names, "blocks.1.attn.hook_pattern"])
    assert torch.equal(run.tokens(names[0]), run[names[0]][:, 1:])
    assert torch.equal(run.tokens(names[1]), run[names[1]])
    assert torch.equal(run.tokens(names[2])[1], run[names[2]][1, 5:21])
    with pytest.raises(ValueError, match=r"\[batch head query key\]: it has no token axis"):
        run.tokens("blocks.1.attn.hook_pattern")


def test_rows_of_a_batch_do_not_see_each_other(rand):
    two = random_inputs(rand, 2)
    alone = random_inputs(rand, 2)
    for name in alone.tensors:
        alone.tensors[name][1] = alone.tensors[name][0]
    cut = two.grid.edges([0, 1], [8, 9], image=1)
    logits = rand.run(two, Knockout(cut)).logits
    assert torch.allclose(logits[0], rand.run(alone).logits[0], atol=1e-5)


def test_an_error_inside_a_function_comes_out_and_leaves_the_model_clean(rand, rx):
    clean = rand.run(rx).logits
    with pytest.raises(ZeroDivisionError):
        rand.run_with_hooks(rx, fwd_hooks=[("blocks.1.hook_resid_post", lambda v, hook: 1 / 0)])
    assert torch.equal(rand.run(rx).logits, clean)


# -- the neighbours' own ways ----------------------------------------------------------------------


def test_hook_added_to_a_hookpoint_acts_inside_run(rand, rx):
    point = rand.module.model.language_model.layers[1].self_attn.hook_pattern
    hooked = rand.run_with_hooks(rx, fwd_hooks=[("blocks.1.attn.hook_pattern", double)])
    heard = []
    point.add_hook(lambda pattern, hook: heard.append(hook.name) or pattern * 2)
    try:
        assert torch.equal(rand.run(rx).logits, hooked)
    finally:
        point.remove_hooks()
    assert heard == ["blocks.1.attn.hook_pattern"]
    assert not torch.equal(rand.run(rx).logits, hooked)


@pytest.mark.parametrize("hook", ["hook_pattern", "hook_mask"])
def test_words_are_the_same_while_somebody_looks_inside_attention(tiny, scene, hook):
    """Also past the first word, where one query meets the keys of the cache."""
    x = tiny.prepare([scene.image] * 2, ["what is in the picture ?", "what is in row 1 ?"])
    expected = tiny.generate(x, max_new_tokens=8)
    shapes = []
    points = [getattr(b.self_attn, hook) for b in tiny.module.model.language_model.layers]
    for point in points:
        point.add_hook(lambda value, hook: shapes.append(tuple(value.shape[-2:])))
    try:
        assert tiny.generate(x, max_new_tokens=8) == expected
    finally:
        for point in points:
            point.remove_hooks()
    assert shapes[0] == (x.n_pos, x.n_pos)
    assert (1, x.n_pos + 1) in shapes


def test_nnsight_cache_records_points_inside_attention(rand, rx):
    name = "blocks.1.attn.hook_pattern"
    envoy = rand.envoy(rand.family.place(name, 8).path)
    with torch.no_grad(), rand.trace(rx) as tracer:
        cache = tracer.cache(modules=[envoy])
    assert torch.equal(cache[envoy.path].output, rand.run(rx, read=name)[name])


def test_gradients_flow_through_a_bare_trace(rand, rx):
    """d logit / d pattern, against a finite difference along a random direction."""
    name = "blocks.1.attn.hook_pattern"
    with rand.trace(rx):
        pattern = rand.hook(name).output
        logit = rand.nn.output.logits[0, -1, 7]
        value = logit.detach().save()
        with logit.backward():
            gradient = pattern.grad.save()
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
    step = 1e-3
    moved = rand.run_with_hooks(rx, fwd_hooks=[(name, lambda p, hook: p + step * direction)])
    slope = float(moved[0, -1, 7] - value) / step
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=0.02, abs=1e-3)


@pytest.mark.parametrize("wrong", [lambda v, hook: v[:, :1], lambda v, hook: 0.0])
def test_a_result_of_another_shape_is_refused(rand, rx, wrong):
    with pytest.raises(ValueError, match=r"'blocks\.0\.attn\.hook_pattern' was given"):
        rand.run_with_hooks(rx, fwd_hooks=[("blocks.0.attn.hook_pattern", wrong)])


def test_a_mask_function_may_not_empty_a_row(rand, rx):
    with pytest.raises(EmptyRow, match="no key to attend to"):
        rand.run_with_hooks(rx, fwd_hooks=[("blocks.0.attn.hook_mask", lambda m, hook: m & False)])


def test_placeholders_are_no_image_tokens(rand, rx):
    with pytest.raises(ValueError, match=r"read adapter\.hook_out"):
        rand.run(rx, read="hook_embed").tokens("hook_embed")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, x: m.run(x.tensors), "model.prepare"),
        (lambda m, x: m.run(x, "blocks.0.hook_resid_pre"), "pass read="),
        (lambda m, x: m.run(x, [Knockout(x.grid.edges(src=1, dst=5))]), r"as \*edits"),
        (lambda m, x: m.run_with_hooks(x, x.grid.edges(src=1, dst=5)), "is no edit"),
    ],
)
def test_slips_of_the_first_day_are_told(rand, rx, call, says):
    with pytest.raises(TypeError, match=says):
        call(rand, rx)
