"""The language of hook names; hooks behind the layer that the adapter reads.

That every hook of every family fires and counts is `tests/families/test_contract.py`.
"""

from __future__ import annotations

import pytest
import torch

from interp import MLLM
from interp.errors import EditHadNoEffect, UnknownHook
from interp.hooks import Vocabulary, canonical
from tests.conftest import random_llava

VOCABULARY = Vocabulary(n_layers=3, n_vision_layers=3)
#: `random_llava` reads vision layer -2, so its third and last vision block leads nowhere
OFF_PATH = VOCABULARY.expand("vision.blocks.2.*")


def other(value, hook=None):
    """A real edit. Not a mere factor, nor a shift: the next norm would undo it."""
    if value.dtype == torch.bool:  # everyone sees the first token and nothing else
        return value & (torch.arange(value.shape[-1]) == 0)
    return value * torch.linspace(0.5, 1.5, value.shape[-1])


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


def through_hooks(model, x, name, edit):
    return model.run_with_hooks(x, fwd_hooks=[(name, edit)])


@pytest.fixture(scope="module")
def clean(rand, rx):
    return rand.run(rx).logits


@pytest.mark.parametrize("name", OFF_PATH)
def test_edit_behind_the_adapters_layer_moves_nothing_and_is_refused(rand, rx, clean, name):
    """The only hooks whose edits cannot reach the logits: the test above covers all others."""
    read = rand.run(rx, read=name).logits
    assert torch.equal(through_trace(rand, rx, name, other_in_place), read)
    with pytest.raises(EditHadNoEffect, match="cannot reach the logits"):
        through_trace(rand, rx, name, other)
    for edit in (other, other_in_place):
        with pytest.raises(EditHadNoEffect, match=r"adapter reads 'vision\.blocks\.1\.hook_resid"):
            through_hooks(rand, rx, name, edit)
    through_hooks(rand, rx, name, lambda value, hook: None)  # looking is allowed


def test_other_vision_layers_are_off_the_path_when_the_adapter_reads_another():
    last = MLLM.load(random_llava(vision_feature_layer=-1))
    assert last.adapter_reads == "vision.blocks.2.hook_resid_post"
    assert not any(last.off_path(name) for name in last.hooks.names)
    first = MLLM.load(random_llava(vision_feature_layer=1))
    assert first.adapter_reads == "vision.blocks.0.hook_resid_post"
    assert [name for name in first.hooks.names if first.off_path(name)] == first.hooks.expand(
        "vision.blocks.[1-2].*"
    )


def only(positions):
    def edit(value, hook):
        value[:, positions] += torch.linspace(-1, 1, value.shape[-1])

    return edit


def test_positions_that_a_later_step_overwrites_carry_no_edit(rand, rx, clean):
    """Inside hooks that do reach the logits, these positions do not, and are refused: the image
    placeholders of `hook_embed` (replaced by the adapter's output) and the CLS token that the
    adapter drops."""
    for name, dead, alive, says in [
        ("hook_embed", rx.grid.position, [0, 1, 18, 19, 20], "placeholders are overwritten"),
        ("vision.blocks.1.hook_resid_post", [0], [1, 2], "the adapter drops it"),
    ]:
        with pytest.raises(EditHadNoEffect, match=says):
            rand.run_with_hooks(rx, fwd_hooks=[(name, only(dead))])
        moved = rand.run_with_hooks(rx, fwd_hooks=[(name, only(alive))])
        assert float((moved - clean).abs().max()) > 1e-2


# -- patterns --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("blocks.*.hook_resid_post", [f"blocks.{i}.hook_resid_post" for i in range(3)]),
        ("blocks.[1-2].attn.hook_z", ["blocks.1.attn.hook_z", "blocks.2.attn.hook_z"]),
        ("blocks.[0,2].hook_mlp_out", ["blocks.0.hook_mlp_out", "blocks.2.hook_mlp_out"]),
        ("blocks.?.hook_resid_mid", [f"blocks.{i}.hook_resid_mid" for i in range(3)]),
        ("blocks.1.attn.hook_{k,q}", ["blocks.1.attn.hook_q", "blocks.1.attn.hook_k"]),
        ("vision_encoder.blocks.0.hook_resid_pre", ["vision.blocks.0.hook_resid_pre"]),
        ("vision_encoder.encoder_layers.0.hook_resid_pre", ["vision.blocks.0.hook_resid_pre"]),
        ("vision_projector.*", ["adapter.hook_in", "adapter.hook_out"]),
        (["hook_embed", "adapter.hook_out", "hook_embed"], ["hook_embed", "adapter.hook_out"]),
        (lambda name: "ln_final" in name, ["ln_final.hook_scale", "ln_final.hook_normalized"]),
        (None, []),
    ],
)
def test_pattern_expands_in_execution_order(pattern, found):
    assert VOCABULARY.expand(pattern) == found


def test_ranges_are_of_numbers_not_of_characters():
    deep = Vocabulary(n_layers=13, n_vision_layers=1)
    names = deep.expand("blocks.[8-11].hook_resid_post")
    assert names == [f"blocks.{i}.hook_resid_post" for i in (8, 9, 10, 11)]


def test_a_glob_of_the_language_model_leaves_the_vision_tower_alone():
    assert not [n for n in VOCABULARY.expand("blocks.*") if n.startswith("vision.")]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("blocks.1.hook_resid_pots", "did you mean blocks.1.hook_resid_post"),
        ("blocks.*.hook_patern", r"'blocks\.\*\.hook_patern' matches no hook.*hook_pattern"),
        ("blocks.7.hook_resid_post", "no hook 'blocks.7.hook_resid_post' on this model"),
        ("vision.blocks.0.attn.hook_rot_q", "no hook 'vision.blocks.0.attn.hook_rot_q'"),
        ("blocks.[a-b].hook_z", r"\[a-b\] in the pattern .* is no range of layers; write \[3\]"),
        ("blocks.[3.hook_z", "matches no hook"),
        (lambda name: False, "accepts none of this model's hooks"),
        (["hook_embed", "nonsense"], "no hook 'nonsense'"),
    ],
)
def test_pattern_that_matches_nothing_raises_and_names_the_nearest(pattern, says):
    with pytest.raises(UnknownHook, match=says):
        VOCABULARY.expand(pattern)


def test_unknown_hook_is_a_key_error_with_a_readable_message():
    with pytest.raises(KeyError) as caught:
        VOCABULARY.rank("hook_nowhere")
    assert str(caught.value).startswith("no hook 'hook_nowhere' on this model")


@pytest.mark.parametrize("use", ["run", "run_with_cache", "run_with_hooks", "hook"])
def test_every_entrance_refuses_an_unknown_hook(rand, rx, use):
    calls = {
        "run": lambda: rand.run(rx, read="blocks.0.hook_zz"),
        "run_with_cache": lambda: rand.run_with_cache(rx, names_filter="blocks.0.hook_zz"),
        "run_with_hooks": lambda: rand.run_with_hooks(rx, fwd_hooks=[("blocks.0.hook_zz", other)]),
        "hook": lambda: rand.hook("blocks.0.hook_zz"),
    }
    with pytest.raises(UnknownHook, match=r"blocks\.0\.hook_zz"):
        calls[use]()


def test_canonical_leaves_house_names_alone():
    assert [canonical(name) for name in VOCABULARY.names] == VOCABULARY.names


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ([], "an empty list"),
        ("blocks.[1-9].hook_resid_post", "blocks.3.hook_resid_post"),
        ("blocks.[2-1].hook_resid_post", "runs backwards"),
        ("blocks.0.{attn.hook_q,mlp.nothing*}", "mlp.nothing"),
    ],
)
def test_no_part_of_a_pattern_is_dropped_silently(pattern, says):
    with pytest.raises(UnknownHook, match=says):
        VOCABULARY.expand(pattern)


def test_braces_hold_globs():
    assert VOCABULARY.expand("blocks.0.{attn.hook_q,mlp.*}") == [
        "blocks.0.attn.hook_q",
        "blocks.0.mlp.hook_pre",
        "blocks.0.mlp.hook_pre_linear",
        "blocks.0.mlp.hook_post",
    ]
