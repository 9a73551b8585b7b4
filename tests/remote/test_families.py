"""Every hook that a stock model has holds, in every family, what it holds in this process.

One request reads them all, under eager attention, which patterns need. What a stock model lacks
raises before anything is sent, and says what would do.
"""

from __future__ import annotations

import pytest

from interp.errors import EditHadNoEffect, UnknownHook
from interp.stock import PACKED, SCALED, SCORES, instead_of
from tests.remote.pairs import padded, pair, same
from tests.zoo import ZOO


@pytest.fixture(scope="module", params=list(ZOO))
def case(request):
    """(here, as on a server, two rows, the first of them padded)."""
    local, there = pair(request.param)
    return local, there, padded(local, request.param)


def test_states_at_every_hook(case):
    local, there, x = case
    names = there.hooks.names
    run, other = local.run(x, read=names), there.run(x, read=names)
    attended = x.tensors["attention_mask"].bool()
    same(run.logits[attended], other.logits[attended], "logits")
    for name in names:
        a, b = run[name], other[name]
        suffix = name.rpartition(".")[2]
        if not name.startswith("vision.") and suffix not in ("hook_out", "hook_in"):
            # states of padding mean nothing, and kernels differ in them; a pattern's rows by query
            by_head = suffix in ("hook_pattern", "hook_mask")
            a, b = ((t.transpose(1, 2) if by_head else t)[attended] for t in (a, b))
        same(a, b, name)
    assert there.host.last.requests == 1


def test_what_is_lacking_is_told_before_anything_is_sent(case):
    local, there, x = case
    before = there.host.traffic.requests
    lacks = [name for name in local.hooks.names if name not in there.hooks.names]
    assert lacks, "there is always something: scores"
    told = set()
    for name in lacks:
        with pytest.raises(UnknownHook) as caught:
            there.run(x, read=name)
        told.add(str(caught.value).partition(": ")[2])
    known = {SCORES, PACKED, SCALED.format(before="pre", after="mid")}
    assert told <= known | {SCALED.format(before="mid", after="post")}
    assert there.host.traffic.requests == before


def test_what_is_read_only_is_told_before_anything_is_sent(case):
    """Through edits, hook functions, and a bare assignment."""
    _, there, x = case
    before = there.host.traffic.requests
    fixed = [name for name in there.hooks.names if "blocks.1." in name and instead_of(name)]
    assert {"blocks.1.hook_resid_mid", "blocks.1.attn.hook_pattern"} <= set(fixed)
    for name in fixed:
        with pytest.raises(UnknownHook, match="can only be read") as caught:
            there.run_with_hooks(x, fwd_hooks=[(name, lambda value, hook: value * 0)])
        assert instead_of(name) in str(caught.value)
    assert there.host.traffic.requests == before


def test_a_bare_trace_cannot_edit_what_is_read_only(case):
    _, there, x = case
    with pytest.raises(EditHadNoEffect, match=r"attn\.hook_z, head by head"):
        zero_in_place(there, x)


def zero_in_place(model, x):
    with model.trace(x):
        model.hook("blocks.1.attn.hook_result").output[:] = 0
        model.hook("blocks.2.hook_resid_post").output.save()
