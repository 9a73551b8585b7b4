"""Many edits of one input: the same as one by one, while what they share is run once."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from interp import MLLM, EdgeSet, Knockout, Unmask, attention
from interp.edits.masks import EditMask
from interp.edits.values import Ablate, Patch, Scale
from interp.errors import EdgeError, EditHadNoEffect, EmptyRow, HeadError, UnknownHook
from interp.execution import execute
from interp.many import run_many
from tests.zoo import ZOO, build, picture


def assert_same(model, x, variants, atol=1e-5, **options):
    """`run_many` against `model.run`, variant by variant: states, logits, receipts."""
    options = {"read": "blocks.*.hook_resid_post", **options}
    runs = run_many(model, x, variants, **options)
    options.pop("batch_size", None)
    names = model.hooks.expand(options["read"])
    assert len(runs) == len(variants)
    for run, variant in zip(runs, variants, strict=True):
        edits = variant if isinstance(variant, (list, tuple)) else [variant]
        alone = execute(model, x, edits=edits, **{**options, "read": names})
        assert list(run) == list(alone)
        for name in alone:
            assert run[name].dtype == alone[name].dtype
            torch.testing.assert_close(
                run[name].float(), alone[name].float(), atol=atol, rtol=atol, msg=name
            )
        assert (run.logits is None) == (alone.logits is None)
        if alone.logits is not None:
            torch.testing.assert_close(run.logits, alone.logits, atol=atol, rtol=atol)
        ours, theirs = run.receipts.table(), alone.receipts.table()
        exact = ["edit", "hook", "layer", "asked", "open", "changed", "empty_rows"]
        assert ours[exact].equals(theirs[exact])
        for column in ("mass", "size"):
            apart = (ours[column].astype(float) - theirs[column].astype(float)).abs()
            assert not (apart > max(atol, 1e-5)).any()
            assert ours[column].isna().equals(theirs[column].isna())
    return runs


def some_edits(model, x):
    """Single heads, several layers, both kinds, several edits at once, and none."""
    ends = [int(row.nonzero().max()) for row in x.tensors["attention_mask"]]
    size = {"n_batch": len(x), "n_pos": x.n_pos}
    last = EdgeSet.of([(row, end - 1, end) for row, end in enumerate(ends)], **size)
    before = EdgeSet.of([(0, ends[0] - 2, ends[0])], **size)
    ahead = x.grid.edges([2, 3], [0, 1])
    return [
        Knockout(last, layers=2, heads=5),
        Knockout(last, layers=0, heads=0),
        [],
        Knockout(last, layers=1, heads=[1, 4]),
        Knockout(last),
        [Knockout(last, layers=2), Knockout(before, layers=1, heads=3)],
        [Unmask(ahead, layers=1), Knockout(before, layers=[1, 2], heads=0)],
        Knockout(before, layers=1),
    ]


def load(name, **options):
    """A model of the zoo and two rows for it, of different lengths."""
    module, processor = build(name, **options)
    model = MLLM.load(module, processor=processor)
    prompt = ZOO[name].prompt
    return model, model.prepare([picture(), picture(seed=1)], [prompt, f"{prompt} a red dog"])


@contextmanager
def counted(model):
    """Rows and positions that each block of both towers is run on, call by call.

    Its first norm tells: a block that is skipped is still called.
    """
    seen = {}

    def count(name):
        def hook(module, args):
            seen.setdefault(name, []).append(tuple(args[0].shape[:2]))

        return hook

    family, handles = model.family, []
    for prefix, vision, n in (
        ("vision.", True, model.cfg.n_vision_layers),
        ("", False, model.cfg.n_layers),
    ):
        for layer in range(n):
            norm = model.module.get_submodule(family.block_path(layer, "ln1", vision=vision))
            handles.append(norm.register_forward_pre_hook(count(f"{prefix}blocks.{layer}")))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# -- the same as one by one -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_mask_edits_in_every_family(name):
    model, x = load(name)
    edits = some_edits(model, x)
    loose = {"atol": 2e-5, "strict": False}
    assert_same(model, x, edits, change=True, **loose)
    # somebody looks inside the blocks, so none of them can be left out; other sizes of batches
    look = ["blocks.*.attn.hook_z", "blocks.*.hook_resid_pre", "blocks.2.mlp.hook_post"]
    assert_same(model, x, edits, read=look, batch_size=3, **loose)


@pytest.mark.parametrize("name", ZOO)
def test_value_edits_in_every_family(name):
    model, x = load(name)
    other = model.run(x, Scale("hook_embed", 2.0), read="blocks.1.attn.hook_z")
    edits = [
        Scale("blocks.1.attn.hook_z", 3.0, heads=2),
        Scale("blocks.2.hook_resid_pre", 2.0),
        Ablate("blocks.1.attn.hook_z", heads=[0, 5]),
        Scale("adapter.hook_out", 1.5),
        Scale("vision.blocks.0.hook_resid_post", 2.0),
        [Scale("blocks.[1-2].hook_mlp_out", 0.5), some_edits(model, x)[0]],
        Scale("vision.blocks.0.attn.hook_z", 0.5, heads=1),
        Scale("blocks.2.attn.hook_z", 3.0, heads=1),
        Scale("blocks.2.hook_resid_post", 3.0),
        Ablate("blocks.1.mlp.hook_post", positions=[8, 9], with_="resample"),
        Patch("blocks.1.attn.hook_z", other, heads=1),
    ]
    read = ["vision.blocks.*.hook_resid_post", "adapter.hook_out", "blocks.*.hook_resid_post"]
    assert_same(model, x, edits, read=read, atol=2e-5, batch_size=4)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_stock_kernels(kernel):
    module, processor = build("gemma3")
    model = MLLM.load(module, processor=processor)
    attention.register(model.module, model.family, kernel)
    x = model.prepare([picture(), picture(seed=1)], [ZOO["gemma3"].prompt] * 2)
    assert_same(model, x, some_edits(model, x), atol=2e-5, strict=False)
    with pytest.raises(UnknownHook, match="only interp's own attention"):
        run_many(model, x, [[]], read="blocks.1.attn.hook_pattern")


def test_bfloat16():
    model, x = load("qwen3-vl", dtype=torch.bfloat16)
    edits = some_edits(model, x)[:4]
    assert_same(model, x, edits, atol=0.05, logits=False, strict=False)


def test_batches_of_one_row_with_and_without_padding(rand, rx, rx2):
    for x in (rx, rx2):
        assert_same(rand, x, some_edits(rand, x), strict=False, read="*")


def test_all_heads_and_single_heads_share_a_batch(rand, rx):
    last = EdgeSet.of([(0, 3, 20)], n_batch=1, n_pos=rx.n_pos)
    edits = [Knockout(last), Knockout(last, heads=1), Knockout(last, layers=[0, 2], heads=[0, 5])]
    assert_same(rand, rx, edits, read="blocks.*.attn.hook_mask")


def test_a_function_of_the_mask_and_the_vision_tower(rand, rx2):
    def no_first(mask, layer):
        mask[:, 1, 5:, 3] = False

    patches = rx2.patches.edges(src=[0, 1], dst=[5, 6])
    edits = [
        EditMask(no_first, layers=1),
        Knockout(patches, layers=0, heads=1, tower="vision"),
        Knockout(patches, layers=1, tower="vision"),
    ]
    assert_same(rand, rx2, edits, read="*hook_resid_post")


def test_results_come_in_the_order_given(rand, rx):
    factors = [3.0, 0.5, 2.0]
    name = "blocks.1.hook_resid_post"
    edits = [Scale(f"blocks.{2 - i}.hook_resid_pre", f) for i, f in enumerate(factors)]
    runs = run_many(rand, rx, edits, read=[name, "blocks.0.hook_resid_pre"])
    assert [run.receipts[0].edit for run in runs] == [repr(edit) for edit in edits]
    clean = rand.run(rx, read="blocks.0.hook_resid_pre")["blocks.0.hook_resid_pre"]
    torch.testing.assert_close(runs[2]["blocks.0.hook_resid_pre"], clean * 2)
    assert torch.equal(runs[0]["blocks.0.hook_resid_pre"], clean)


def test_grid_and_tokens_of_a_run(rand, rx):
    (run,) = run_many(
        rand, rx, [Scale("blocks.1.hook_resid_pre", 2.0)], read="blocks.1.*resid_post"
    )
    assert run.tokens("blocks.1.hook_resid_post").shape == (1, 16, 48)


# -- what is not run -------------------------------------------------------------------------------


def test_vision_tower_and_prefix_run_once(rand, rx):
    last = EdgeSet.of([(0, 3, 20), (0, 4, 20), (0, 4, 19)], n_batch=1, n_pos=rx.n_pos)
    edits = [Knockout(last, layers=2, heads=h) for h in range(6)]
    edits += [Knockout(last, layers=1, heads=h) for h in range(6)]
    with counted(rand) as seen:
        run_many(rand, rx, edits, read="blocks.2.hook_resid_post", logits=False)
    n_pos = rx.n_pos
    assert all(len(seen[f"vision.blocks.{i}"]) == 1 for i in range(3))
    assert seen["blocks.0"] == [(1, n_pos)]
    # where the edits are, six variants at the two changed positions; behind them, at all
    assert sorted(seen["blocks.1"]) == [(1, n_pos), (6, 2)]
    assert sorted(seen["blocks.2"]) == [(1, n_pos), (6, 2), (6, n_pos)]


def test_no_deeper_than_the_reads(rand, rx):
    edits = [Scale("blocks.0.attn.hook_z", 2.0, heads=h) for h in range(6)]
    with counted(rand) as seen:
        run_many(rand, rx, edits, read="blocks.1.hook_resid_post", logits=False)
    # the clean run stops where the language model begins
    assert [seen.get(f"blocks.{i}") for i in range(3)] == [[(6, rx.n_pos)], [(6, rx.n_pos)], None]
    assert all(len(seen[f"vision.blocks.{i}"]) == 1 for i in range(3))


def test_batch_size_bounds_the_rows(rand, rx2):
    edits = [Scale("blocks.1.attn.hook_z", 2.0, heads=h) for h in range(5)]
    with counted(rand) as seen:
        run_many(rand, rx2, edits, batch_size=2)
    assert [rows for rows, _ in seen["blocks.2"]] == [4, 4, 2]
    with pytest.raises(ValueError, match="batch_size=0"):
        run_many(rand, rx2, edits, batch_size=0)


def test_onset_needs_nobody_inside_the_block(rand, rx):
    last = EdgeSet.of([(0, 3, 20)], n_batch=1, n_pos=rx.n_pos)
    with counted(rand) as seen:
        run_many(rand, rx, [Knockout(last, layers=1)], read="blocks.1.attn.hook_pattern")
    assert seen["blocks.1"] == [(1, rx.n_pos)]


def test_no_variants_and_clean_ones(rand, rx):
    assert run_many(rand, rx, []) == []
    with counted(rand) as seen:
        runs = run_many(rand, rx, [[], []], read="blocks.2.hook_resid_post")
    assert len(seen["blocks.2"]) == 1
    assert torch.equal(runs[1].logits, rand.run(rx).logits)


# -- what is refused -------------------------------------------------------------------------------


def test_errors_say_which_variant(rand, rx):
    last = EdgeSet.of([(0, 3, 20)], n_batch=1, n_pos=rx.n_pos)
    whole = EdgeSet.of([(0, i, 2) for i in range(3)], n_batch=1, n_pos=rx.n_pos)
    fine = Knockout(last, layers=1)
    for bad, error in (
        (Knockout(last, layers=1, heads=6), HeadError),
        (Knockout(EdgeSet.of([(0, 9, 3)], 1, rx.n_pos)), EdgeError),
        (Knockout(whole, layers=1), EmptyRow),
        (Unmask(last, layers=2), EditHadNoEffect),
        (Scale("blocks.1.attn.hook_z", 1.0), EditHadNoEffect),
        (Scale("blocks.1.attn.hook_z", 2.0, heads=9), HeadError),
        (Scale("blocks.9.attn.hook_z", 2.0), UnknownHook),
        ("blocks.1.attn.hook_z", TypeError),
    ):
        item = bad if isinstance(bad, (Knockout, Unmask, Scale)) else [bad]
        with pytest.raises(error) as caught:
            run_many(rand, rx, [fine, item], read="blocks.2.hook_resid_post")
        assert any("variant 1 " in note for note in caught.value.__notes__)
    assert_same(rand, rx, [fine])  # and the model is as it was


def test_an_edit_behind_all_reads_is_refused(rand, rx):
    late = Scale("blocks.2.attn.hook_z", 2.0)
    with pytest.raises(EditHadNoEffect, match="after everything"):
        run_many(rand, rx, [late], read="blocks.1.hook_resid_post", logits=False)
    with pytest.raises(ValueError, match="nothing to do"):
        run_many(rand, rx, [late], logits=False)


def test_one_variants_states_are_its_own(rand, rx):
    """What a variant reads is not changed by what another one writes at the next hook."""
    first, second = "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"
    edits = [[Scale(first, 2.0), Scale(second, 3.0)], Scale(first, 5.0)]
    assert_same(rand, rx, edits, read=[first, second, "blocks.2.hook_resid_post"])
