"""Runs that depart from a clean one, a prompt that ends with its picture, a last block in part:
each saves work, and none changes a number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp import MLLM, EdgeSet, Knockout
from interp.clean import Clean, clean_run
from interp.edits.values import Ablate
from interp.errors import PositionError
from interp.families import family_of
from interp.many import each_run, run_many
from tests.zoo import ZOO, build, inputs

CASES = sorted(ZOO)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    module, processor = build(request.param)
    model = MLLM.load(module, processor=processor)
    return model, inputs(model, request.param)


def last_block(model) -> str:
    return f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"


def a_knockout(x, layer: int, head: int = 0) -> Knockout:
    """The last position of each row no longer sees the one before it."""
    ends = [int(row.nonzero().max()) for row in x.tensors["attention_mask"]]
    edges = EdgeSet.of([(r, e - 1, e) for r, e in enumerate(ends)], len(x), x.n_pos)
    return Knockout(edges, layers=layer, heads=head)


def counted(model, call):
    """What a call gives, and how often it ran the vision tower and each block."""
    runs: dict[str, int] = {}
    family = model.family
    modules = {"vision": f"{family.vision.blocks}.0"}
    modules |= {str(i): family.block_path(i) for i in range(model.cfg.n_layers)}
    handles = [
        model.module.get_submodule(path).register_forward_pre_hook(
            lambda *_, name=name: runs.__setitem__(name, runs.get(name, 0) + 1)
        )
        for name, path in modules.items()
    ]
    try:
        return call(), runs
    finally:
        for handle in handles:
            handle.remove()


# -- a clean run that is there already -------------------------------------------------------------


def test_edits_after_a_clean_run_are_what_they_are_without_it(case):
    """One clean run, kept; edits of masks and of values then start from it."""
    model, x = case
    end, n = last_block(model), model.cfg.n_layers
    variants = [
        [],
        [a_knockout(x, 0)],
        [a_knockout(x, n - 1)],
        [Ablate("attn.hook_z", layers=1, heads=0)],
        [Ablate("blocks.0.hook_mlp_out")],
    ]
    kept = clean_run(model, x, [end], onsets=range(n), starts=range(n))
    alone = run_many(model, x, variants, read=end, logits=False)
    again, runs = counted(
        model, lambda: dict(each_run(model, x, variants, read=end, logits=False, clean=kept))
    )
    for number, run in enumerate(alone):
        torch.testing.assert_close(again[number][end], run[end], atol=1e-5, rtol=1e-5)
    assert "vision" not in runs
    assert runs["0"] <= len(variants) - 1  # no clean run among them


def test_what_is_missing_is_run_behind_the_towers(case):
    """Only what the language model was given is kept: the blocks run, the towers do not."""
    model, x = case
    end = last_block(model)
    first = clean_run(model, x, ["adapter.hook_out"])
    assert not first.has([end], False, [], [])
    second, runs = counted(
        model, lambda: clean_run(model, x, [end], given=Clean(inputs=first.inputs))
    )
    assert "vision" not in runs
    torch.testing.assert_close(
        second.states[end], model.run(x, read=end)[end], atol=1e-5, rtol=1e-5
    )


def test_a_stage_of_the_towers_runs_them(case):
    model, x = case
    first = clean_run(model, x, ["adapter.hook_out"])
    given = Clean(inputs=first.inputs)
    again, runs = counted(model, lambda: clean_run(model, x, ["adapter.hook_in"], given=given))
    assert runs["vision"] >= 1
    assert "adapter.hook_in" in again.states


# -- a prompt that ends with its picture -----------------------------------------------------------


def test_words_behind_the_last_picture_do_not_matter(case):
    """Unless the prompt is one block, and then they do: the family's table says which."""
    model, x = case
    last = int(np.flatnonzero(x.grid.is_placeholder.any(0)).max()) + 1
    cut = x.until(last)
    assert cut.n_pos == last < x.n_pos
    states = [model.run(one, read="blocks.*.hook_resid_post", logits=False) for one in (x, cut)]
    apart = 0.0
    for name in states[0]:
        whole, part = (run.tokens(name) for run in states)
        apart = max(apart, float((whole - part).abs().max()))
    assert (apart > 1e-3) == model.family.prefix
    assert apart < 2e-5 or model.family.prefix


def test_a_picture_is_not_cut(tiny, x):
    last = int(x.grid.position.max())
    with pytest.raises(PositionError, match=f"ends at position {last}"):
        x.until(last)
    with pytest.raises(PositionError, match="would do"):
        x.until(x.n_pos + 1)
    assert x.until(x.n_pos).shape == x.shape


# -- the last block where it is looked at ----------------------------------------------------------


def test_the_last_mlp_at_some_positions_only(case):
    model, x = case
    end = last_block(model)
    at = torch.as_tensor(np.unique(x.grid.position[::3]))
    variants = [[], *([a_knockout(x, i)] for i in range(model.cfg.n_layers))]
    whole = run_many(model, x, variants, read=end, logits=False)
    made = dict(each_run(model, x, variants, read=end, logits=False, only=at))
    for number, run in enumerate(whole):
        torch.testing.assert_close(made[number][end][:, at], run[end][:, at], atol=1e-5, rtol=1e-5)
    elsewhere = [i for i in range(x.n_pos) if i not in set(at.tolist())]
    assert not torch.allclose(made[1][end][:, elsewhere], whole[1][end][:, elsewhere])


def test_only_is_for_one_state(tiny, x):
    with pytest.raises(ValueError, match="only= is for reading one"):
        list(each_run(tiny, x, [[]], read="blocks.*.hook_resid_post", only=torch.tensor([3])))


def test_only_paligemma_is_one_block():
    """The table says so, and nothing else is."""
    says = {name: family_of(build(name)[0]).prefix for name in CASES}
    assert {name for name, one in says.items() if one} == {"paligemma", "paligemma2"}
