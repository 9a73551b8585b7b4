"""Direct attribution against the definition: parts from hook_result, weights and hidden states."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from interp.attribution import direct
from interp.attribution.direct import direct_attribution
from interp.errors import SumMismatch
from interp.probes import ProbeBank

END = "blocks.3.hook_resid_post"
GROUPS = ("self", "image", "text")


@pytest.fixture(scope="module")
def case(tiny, x):
    """One scene, its states, random labels, a bank of probes fitted on them."""
    n = len(x.grid)
    labels = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(0))
    read = [END, "blocks.0.hook_resid_pre"]
    for layer in range(4):
        read += [f"blocks.{layer}.attn.hook_result", f"blocks.{layer}.hook_mlp_out"]
    run = tiny.run(x, read=read, logits=False)
    bank = ProbeBank.fit({END: run.tokens(END)[0]}, labels, ["a", "b", "c"], C=0.01)
    queries = torch.zeros(1, n, dtype=torch.bool)
    queries[0, [3, 40, 77]] = True
    true = labels[None]
    confused = (true + 1) % 3
    position = torch.as_tensor(x.grid.position)
    sources = torch.full((1, n, x.n_pos), GROUPS.index("text"))
    sources[:, :, position] = GROUPS.index("image")
    sources[0, torch.arange(n), position] = GROUPS.index("self")
    arguments = {
        "queries": queries,
        "true": true,
        "confused": confused,
        "sources": sources,
        "groups": GROUPS,
        "end": END,
    }
    return run, bank, arguments


def test_heads_equal_hook_result_along_the_probe_direction(tiny, x, case):
    run, bank, arguments = case
    parts = direct_attribution(tiny, x, bank, **arguments)
    d = bank.direction(
        END, arguments["true"][0, parts.token], arguments["confused"][0, parts.token]
    )
    at = torch.as_tensor(x.grid.position)[parts.token]
    for layer in range(4):
        result = run[f"blocks.{layer}.attn.hook_result"][0, at]  # [n, head, d_model]
        by_hand = torch.einsum("nhm,nm->nh", result.double(), d.double())
        torch.testing.assert_close(parts.heads[:, layer].sum(-1), by_hand, rtol=1e-4, atol=1e-4)


def test_parts_add_up_to_the_margin(tiny, x, case):
    run, bank, arguments = case
    parts = direct_attribution(tiny, x, bank, **arguments)
    logits = bank.logits(END, run.tokens(END)[0])[parts.token].double()
    true, confused = (arguments[k][0, parts.token][:, None] for k in ("true", "confused"))
    margin = (logits.gather(1, true) - logits.gather(1, confused))[:, 0]
    torch.testing.assert_close(parts.margin, margin, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(parts.total, parts.margin, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        parts.change, parts.heads.sum((1, 2, 3)) + parts.mlps.sum(1), rtol=1e-4, atol=1e-3
    )


def test_a_source_group_is_what_cutting_its_values_would_take(tiny, x, case):
    """In block 0 the group's part is that of the pattern restricted to the group."""
    _, bank, arguments = case
    parts = direct_attribution(tiny, x, bank, **arguments)
    keep = arguments["sources"][0] == GROUPS.index("image")  # [token, pos]
    position = torch.as_tensor(x.grid.position)

    def only_group(pattern, hook):
        mask = torch.zeros(x.n_pos, x.n_pos)
        mask[position] = keep.float()
        return pattern * mask

    read: dict = {}
    tiny.run_with_hooks(
        x,
        fwd_hooks=[
            ("blocks.0.attn.hook_pattern", only_group),
            ("blocks.0.attn.hook_result", lambda r, hook: read.update(result=r.detach().clone())),
        ],
    )
    d = bank.direction(
        END, arguments["true"][0, parts.token], arguments["confused"][0, parts.token]
    )
    result = read["result"][0, position[parts.token]].double()
    by_hand = torch.einsum("nhm,nm->nh", result, d.double())
    group = parts.heads[:, 0, :, GROUPS.index("image")]
    torch.testing.assert_close(group, by_hand, rtol=1e-4, atol=1e-4)


def test_a_sum_that_does_not_hold_raises(tiny, x, case):
    _, bank, arguments = case
    parts = direct_attribution(tiny, x, bank, **arguments)
    wrong = dataclasses.replace(parts, mlps=parts.mlps + 0.01 * parts.heads.abs().sum((2, 3)))
    with pytest.raises(SumMismatch, match="miss the margin"):
        direct._check_sum(wrong)


def test_only_block_outputs_can_be_explained(tiny, x, case):
    _, bank, arguments = case
    with pytest.raises(ValueError, match="hook_resid_post"):
        direct_attribution(tiny, x, bank, **{**arguments, "end": "adapter.hook_out"})
