"""Sites: a hook's value inside a trace, as a view that edits reach."""

from __future__ import annotations

import pytest
import torch


def test_site_prints_its_name_and_place(rand):
    path = "model.model.language_model.layers.2.self_attn.q_proj.output"
    assert repr(rand.hook("blocks.2.attn.hook_q")) == f"Site('blocks.2.attn.hook_q' at {path})"
    assert repr(rand.hook("vision_projector.hook_in")).startswith("Site('adapter.hook_in' at ")


def test_slices_of_a_split_or_unpacked_value_can_be_edited_in_place(rand, rx):
    """Views by head (q) and into a tuple (attn_out): the edit must reach the module's output."""
    with torch.no_grad(), rand.trace(rx):
        rand.hook("blocks.0.attn.hook_q").output[:, 4:, 2] = 0
        queries = rand.envoy("model.language_model.layers.0.self_attn.q_proj").output.save()
        rand.hook("blocks.0.hook_attn_out").output[:, 7] = 0
        written = rand.envoy("model.language_model.layers.0.self_attn").output[0].save()
    by_head = queries.unflatten(-1, (6, 8))
    assert not by_head[:, 4:, 2].any()
    assert by_head[:, :4].all()
    assert by_head[:, 4:, [0, 1, 3, 4, 5]].all()
    assert not written[:, 7].any()
    assert written[:, 8].all()


def test_assigning_keeps_the_rest_of_a_tuple(rand, rx):
    clean = rand.run(rx).logits
    with torch.no_grad(), rand.trace(rx):
        site = rand.hook("blocks.0.hook_attn_out")
        site.output = site.output.clone()
        whole = rand.envoy("model.language_model.layers.0.self_attn").output.save()
        logits = rand.nn.output.logits.save()
    assert isinstance(whole, tuple)
    assert len(whole) == 2
    assert torch.equal(logits, clean)


@pytest.mark.parametrize(
    "wrong",
    [lambda v: v[:, -1:], lambda v: v.double(), lambda v: 0.0],
    ids=["another shape", "another precision", "no tensor"],
)
def test_assigning_what_does_not_fit_is_refused(rand, rx, wrong):
    """It would broadcast, or be mixed in, without a word."""
    with pytest.raises(ValueError, match=r"'blocks\.1\.hook_attn_out' was given"), rand.trace(rx):  # noqa: PT012
        site = rand.hook("blocks.1.hook_attn_out")
        site.output = wrong(site.output)


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_mid", "vision.blocks.0.hook_resid_mid"])
def test_what_was_saved_stays_what_it_was_when_the_hook_is_edited(rand, rx, name):
    clean = rand.run(rx, read=name)[name]
    with torch.no_grad(), rand.trace(rx):
        site = rand.hook(name)
        before = site.output.save()
        site.output = before * 2
    assert torch.equal(before, clean)
