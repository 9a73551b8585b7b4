"""Value edits that would silently do nothing, each as a user might type it: all of them raise."""

from __future__ import annotations

import pytest
import torch

from interp import MLLM, Ablate, EditHadNoEffect, Patch, Scale, Steer
from interp.errors import EdgeError, HeadError, NotRead, PositionError, UnknownHook
from tests.conftest import IMAGE_TOKEN, random_inputs, random_llava
from tests.zoo import ZOO, build, picture

Z, STREAM = "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"


# what changes no number

NOTHING = {
    "a factor of one": lambda model, x: [Scale(Z, 1.0)],
    "a scale of zero": lambda model, x: [Steer(STREAM, torch.ones(48), 0.0)],
    "a direction of zeros": lambda model, x: [Steer(STREAM, torch.zeros(48), 3.0)],
    "a patch from the same run": lambda model, x: [Patch(Z, model.run(x, read=Z))],
    "the mean of one vector": lambda model, x: [Ablate(STREAM, "mean", positions=[(0, 5)])],
    "zeros scaled": lambda model, x: [Ablate(Z, heads=2), Scale(Z, 2.0, heads=2)],
    "zeros scaled to zero twice": lambda model, x: [Scale(Z, 0), Scale(Z, 0)],
    "what another edit has put there": lambda model, x: [
        Ablate("blocks.1.attn.hook_v", heads=1),
        Ablate(Z, heads=[3, 4, 5]),
    ],
    "a mean that is there already": lambda model, x: [
        Ablate(STREAM, torch.ones(48)),
        Ablate("blocks.2.hook_resid_pre", "mean"),
    ],
}


@pytest.mark.parametrize("what", NOTHING)
def test_no_number_changes(rand, rx2, what):
    edits = NOTHING[what](rand, rx2)
    with pytest.raises(EditHadNoEffect, match="changes nothing: what it writes is there already"):
        rand.run(rx2, *edits)
    receipts = rand.run(rx2, *edits, strict=False).receipts
    assert receipts[-1].changed == 0
    assert receipts[-1].asked > 0


def test_too_small_a_step_for_bfloat16():
    model = MLLM.load(random_llava(dtype=torch.bfloat16))
    with pytest.raises(EditHadNoEffect, match="changes nothing"):
        model.run(random_inputs(model), Scale(STREAM, 1.0005))


# what changes numbers that lead nowhere


def test_behind_the_adapters_layer(rand, rx):
    for edit in (
        Ablate("vision.blocks.2.attn.hook_z", heads=1),
        Scale("vision.blocks.*.hook_mlp_out", 2.0),
        Steer("vision.hook_resid_post", torch.ones(32), layers=2),
    ):
        with pytest.raises(EditHadNoEffect, match=r"^\w+\(.*cannot reach the logits.*lies behind"):
            rand.run(rx, edit)


def test_cls_where_the_adapter_drops_it(rand, rx):
    for suffix in ("attn.hook_q", "attn.hook_z", "mlp.hook_post", "hook_resid_post"):
        hook = f"vision.blocks.1.{suffix}"
        with pytest.raises(EditHadNoEffect, match=r"cannot reach the logits.*\(CLS\) is dropped"):
            rand.run(rx, Scale(hook, 2.0, positions=0))
        assert rand.run(rx, Scale(hook, 2.0, positions=[0, 1])).receipts[0].changed
    clean = rand.run(rx).logits
    for hook in ("vision.blocks.1.attn.hook_v", "vision.blocks.0.hook_resid_post"):
        away = torch.linspace(-1, 2, 8 if "hook_v" in hook else 32)
        moved = rand.run(rx, Steer(hook, away, positions=0)).logits
        assert float((moved - clean).abs().max()) > 1e-3


def test_cls_where_the_adapter_takes_it():
    module = random_llava()
    module.config.vision_feature_select_strategy = "full"
    model = MLLM.load(module)
    ids = torch.tensor([[5, 6, *[IMAGE_TOKEN] * 17, 7, 8]])
    x = model.inputs(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32))
    moved = model.run(x, Scale("vision.blocks.1.hook_resid_post", 2.0, positions=0)).logits
    assert float((moved - model.run(x).logits).abs().max()) > 1e-3


def test_placeholders_in_the_embedding(rand, rx):
    with pytest.raises(EditHadNoEffect, match=r"edit adapter\.hook_out"):
        rand.run(rx, Ablate("hook_embed", positions=rx.grid))


def test_after_everything_that_is_read(rand, rx):
    with pytest.raises(EditHadNoEffect, match="after everything that is read"):
        rand.run(rx, Scale("blocks.2.attn.hook_z", 2.0), read=Z, logits=False)
    with pytest.raises(EditHadNoEffect, match="after everything that is read"):
        rand.run_with_cache(rx, Scale("blocks.2.attn.hook_z", 2.0), stop_at_layer=1)


# what names nothing

NOWHERE = [
    (lambda x: Ablate("blocks.1.attn.hook_zz"), UnknownHook, "did you mean"),
    (lambda x: Ablate("attn.hook_z"), UnknownHook, "no hook 'attn.hook_z'"),
    (lambda x: Ablate("blocks.[2-3].attn.hook_z"), UnknownHook, r"blocks\.3"),
    (lambda x: Ablate("attn.hook_z", layers=3), UnknownHook, r"blocks\.3"),
    (lambda x: Ablate("blocks.1.attn.hook_z", heads={2: 0}), HeadError, "has heads of layer 2"),
    (lambda x: Ablate(Z, heads=6), HeadError, r"has no head 6; its 6 are 0\.\.5"),
    (lambda x: Ablate("vision.blocks.0.attn.hook_k", heads=4), HeadError, r"its 4 are 0\.\.3"),
    (lambda x: Ablate("blocks.1.attn.hook_k", heads=2), HeadError, "2 key-value heads.*head 2 r"),
    (lambda x: Ablate("blocks.1.attn.hook_v", heads=7), HeadError, "so no head 7$"),
    (lambda x: Scale(STREAM, 2, heads=0), HeadError, r"\[batch pos d_model\], without an axis of"),
    (lambda x: Scale("adapter.hook_out", 2, heads=0), HeadError, "without an axis of heads"),
    (lambda x: Ablate("blocks.1.attn.hook_mask"), UnknownHook, "is a mask.*Knockout and Unmask"),
    (lambda x: Ablate(STREAM, positions=24), PositionError, r"no position 24: .* 0\.\.23"),
    (lambda x: Ablate(STREAM, positions=[(2, 5)]), PositionError, r"rows 0\.\.1"),
    (lambda x: Ablate(STREAM, positions=[(1, 2)]), PositionError, "position 2 of row 1"),
    (lambda x: Ablate(STREAM, positions=[1, 2, 9]), PositionError, "2 of these positions are pad"),
    (lambda x: Ablate(STREAM, positions=x.patches), PositionError, "2 x 17.*2 x 24.*from x.grid"),
    (
        lambda x: Ablate("vision.blocks.0.hook_resid_post", positions=x.grid),
        PositionError,
        "from x.patches in the vision tower",
    ),
    (lambda x: Ablate("adapter.hook_out", positions=x.grid), PositionError, "from x.adapter"),
    (lambda x: Ablate("adapter.hook_out", positions="last"), PositionError, "no place 'last'"),
    (lambda x: Ablate(STREAM, positions="imag"), EdgeError, "no place 'imag'.*did you mean image"),
    (lambda x: Ablate(STREAM, positions=torch.ones(2, 23) > 0), PositionError, "2 x 23.*2 x 24"),
    (lambda x: Ablate(STREAM, "resample"), PositionError, r"selects \[24, 21\] in the rows"),
    (
        lambda x: Ablate(STREAM, "resample", positions=[(0, 4), (0, 5)]),
        EditHadNoEffect,
        "it selects in 1 of 2",
    ),
    (lambda x: Steer(STREAM, torch.ones(32)), ValueError, "a direction of 32 for vectors of 48"),
    (lambda x: Ablate(Z, torch.ones(6)), ValueError, r"\[8\] or \[6, 8\] would do"),
    (
        lambda x: Ablate("blocks.1.attn.hook_pattern", "mean"),
        UnknownHook,
        "scores or weights by key",
    ),
    (
        lambda x: Steer("blocks.1.attn.hook_attn_scores", torch.ones(24)),
        UnknownHook,
        "scores or weights by key",
    ),
    (
        lambda x: Patch(STREAM, {STREAM: torch.ones(2, 24, 48, dtype=torch.bfloat16)}),
        ValueError,
        "bfloat16.*this one torch.float32",
    ),
]


@pytest.mark.parametrize("number", range(len(NOWHERE)))
def test_names_nothing_there(rand, rx2, number):
    make, error, words = NOWHERE[number]
    with pytest.raises(error, match=words):
        rand.run(rx2, make(rx2), strict=False)


MALFORMED = [
    (lambda: Ablate(Z, heads=[]), HeadError, r"heads=\[\] edits nothing"),
    (lambda: Ablate(Z, heads={}), HeadError, "edits nothing"),
    (lambda: Ablate(Z, heads={1: None}), HeadError, "heads of layer 1"),
    (lambda: Ablate(Z, heads=1.5), HeadError, "whole numbers"),
    (lambda: Ablate(Z, positions=[]), PositionError, "no positions"),
    (lambda: Ablate(Z, positions=torch.zeros(2, 5) > 0), PositionError, "no positions"),
    (lambda: Ablate(Z, positions=-1), PositionError, r"x\.is_last is the last"),
    (lambda: Ablate(Z, positions=[(-1, 4)]), PositionError, "count from 0"),
    (lambda: Ablate(Z, positions=[True, False]), PositionError, "whole numbers"),
    (lambda: Ablate(Z, positions=[0.5]), PositionError, "whole numbers"),
    (lambda: Ablate(Z, positions=torch.ones(2, 24)), PositionError, "a bool mask .batch, pos."),
    (lambda: Ablate(Z, with_="median"), ValueError, '"zero", "mean", "resample" or a tensor'),
    (lambda: Ablate(Z, seed=3), ValueError, "only with_='resample' draws"),
    (lambda: Steer(Z, torch.ones(2, 8)), ValueError, "a tensor of 1 axes"),
    (lambda: Steer(Z, torch.tensor([1.0, torch.nan])), ValueError, "finite numbers"),
    (lambda: Steer(Z, torch.zeros(8), relative=True), EditHadNoEffect, "no unit length"),
    (lambda: Steer(Z, torch.ones(8), float("inf")), ValueError, "no finite number"),
    (lambda: Scale(Z, float("nan")), ValueError, "no finite number"),
    (lambda: Patch(Z, {}), NotRead, "did not read it"),
]


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_malformed_edits_are_refused_when_made(number):
    make, error, words = MALFORMED[number]
    with pytest.raises(error, match=words):
        make()


def test_a_run_is_no_ablation(rand, rx):
    with pytest.raises(ValueError, match="Patch"):
        Ablate(Z, with_=rand.run(rx, read=Z))


def test_resampling_needs_another_row(rand, rx):
    with pytest.raises(EditHadNoEffect, match="it selects in 1 of 1; give a batch"):
        rand.run(rx, Ablate(STREAM, "resample"))


def test_a_tensor_edited_after_the_edit_was_made(rand, rx):
    direction = torch.ones(48)
    edit = Steer(STREAM, direction)
    direction *= 2
    with pytest.raises(RuntimeError, match="changed in place after the edit was made"):
        rand.run(rx, edit)


def test_packed_and_reordered_towers():
    """Qwen2.5-VL: one row of patches, in another order behind the embedding."""
    module, processor = build("qwen2.5-vl")
    model = MLLM.load(module, processor=processor)
    prompt = ZOO["qwen2.5-vl"].prompt
    x = model.prepare([picture(), picture(seed=1)], [prompt, prompt])
    with pytest.raises(EditHadNoEffect, match="it selects in 1 of 1"):
        model.run(x, Ablate("vision.blocks.0.hook_resid_post", "resample"))
    with pytest.raises(ValueError, match="reorders its patches"):
        model.run(x, Ablate("vision.hook_embed", positions=x.patches))
