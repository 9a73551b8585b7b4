"""What `Cost` says against what hooks count: passes, blocks, towers, rows together, memory."""

from __future__ import annotations

import gc
from collections import Counter

import numpy as np
import pytest
import torch

from interp.attribution.asking import ask
from interp.attribution.cost import (
    Cost,
    batch_size_within,
    cost_of,
    default_batch_size,
    onset_share,
    pace,
)
from interp.attribution.direct import direct
from interp.attribution.exact import exact, open_edges
from interp.attribution.gradient import gradient
from interp.attribution.heads import head_attribution
from interp.datasets import scenes
from tests.attribution.plain import Case, random_bank


class Counted:
    """Hooks on plain torch modules of a model.

    Attributes:
        passes, towers: of the language model and of the vision tower.
        blocks: by layer, MLP passes over the whole batch (a part of one for a part of its rows).
        rows: the most rows that the language model was given.
    """

    def __init__(self, case):
        family, module = case.model.family, case.model.module
        stack = module.get_submodule(family.language.blocks.rpartition(".")[0])
        blocks = module.get_submodule(family.language.blocks)
        tower = module.get_submodule(family.vision.blocks)[0]
        short = case.ask().parts[0].x  # what follows the pictures is left out
        n = short.shape.numel()
        self.passes = self.towers = self.rows = 0
        self.blocks = Counter()
        self.gradients = 0

        def one_pass(module, args, kwargs):
            self.passes += 1

        def one_tower(module, args):
            self.towers += 1

        def one_block(layer):
            def hook(module, args):
                self.blocks[layer] += args[0].numel() / args[0].shape[-1] / n
                if args[0].ndim == 3 and args[0].shape[1] == short.n_pos:
                    self.rows = max(self.rows, args[0].shape[0])

            return hook

        def one_gradient(module, args, out):
            if out.requires_grad:
                out.register_hook(lambda g: setattr(self, "gradients", self.gradients + 1))

        self.handles = [
            stack.register_forward_pre_hook(one_pass, with_kwargs=True),
            tower.register_forward_pre_hook(one_tower),
            blocks[1].mlp.register_forward_hook(one_gradient),
        ]
        self.handles += [
            b.mlp.register_forward_pre_hook(one_block(i)) for i, b in enumerate(blocks)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.fixture(scope="module")
def case():
    return Case("llava-clip-llama", n_images=3)


@pytest.mark.parametrize(
    ("options", "say"),
    [
        ({}, {}),
        ({"start": "blocks.0.hook_resid_post"}, {}),
        ({"end": "blocks.1.hook_resid_post"}, {}),
        ({}, {"steps": 4}),
        ({"sources": "whole"}, {"patch": True}),
        ({"sources": "whole"}, {"patch": True, "steps": 2}),
    ],
)
def test_passes_of_the_gradient(case, options, say):
    """Forwards through the blocks up to the end, as many backwards as were said."""
    question = case.ask(**options)
    cost = cost_of(question, "gradient", **say)
    patch = [case.x] if say.get("patch") else None
    with Counted(case) as counted:
        gradient(question, steps=say.get("steps", 0), patch=patch)
    depth, behind = question.layers[-1] + 1, len(question.layers)
    assert counted.passes == cost.forwards
    # the other batch is read at its heads: the last block stops before its MLP
    assert sum(counted.blocks.values()) + bool(patch) == cost.forwards * depth
    assert counted.gradients == cost.backwards
    assert cost.blocks == cost.forwards * depth + 2 * cost.backwards * behind
    assert set(counted.blocks) == set(range(depth))


def test_direct_is_one_pass_without_gradients(case):
    question = case.ask(end="blocks.1.hook_resid_post")
    cost = cost_of(question, "direct")
    with Counted(case) as counted:
        direct(question)
    assert (counted.passes, cost.forwards, cost.backwards) == (1, 1, 0)
    assert sum(counted.blocks.values()) == cost.blocks == 2


@pytest.mark.parametrize("size", [1, 5, 26])
@pytest.mark.parametrize(
    "options",
    [{}, {"start": "blocks.0.hook_resid_post"}, {"end": "blocks.1.hook_resid_post"}],
)
def test_passes_of_the_exact_study(case, options, size):
    """The blocks behind each unit's own, once a unit; units without an edge are not run."""
    question = case.ask(**options)
    (part,) = question.parts
    with Counted(case) as counted:
        exact(question, batch_size=size)
    n_heads, n_groups = question.shape[1:]
    there = [
        sum(len(open_edges(question, part, layer, group)) > 0 for group in range(n_groups))
        for layer in question.layers
    ]
    n_units = [n_heads * groups for groups in there]
    cost = cost_of(question, "exact", n_units=n_units, batch_size=size)
    assert counted.passes == cost.forwards
    last = question.layers[-1]
    own = dict.fromkeys(range(last + 1), 0.0)
    for layer, n in zip(question.layers, n_units, strict=True):
        for behind in range(layer + 1, last + 1):
            own[behind] += n
    for layer in range(last + 1):
        units = dict(zip(question.layers, n_units, strict=True)).get(layer, 0)
        within = counted.blocks[layer] - 1 - own[layer]  # one clean pass
        # in its own block a unit makes anew only where somebody reads, in any of the rows
        anywhere = len(part.sources.position.unique()) / part.x.n_pos
        assert within <= units * anywhere * 1.0001
        assert within >= units * 0.1
    assert cost.blocks == pytest.approx(
        last + 1 + sum(own.values()) + onset_share(question) * sum(n_units)
    )
    upper = cost_of(question, "exact", batch_size=size)
    assert upper.forwards >= cost.forwards
    assert upper.blocks >= cost.blocks
    assert counted.rows == min(size, max(n_units)) * len(case.x)


def test_passes_of_an_exact_patch(case):
    pixels = case.x.tensors["pixel_values"] * 0.5
    there = case.model.inputs(**{**case.x.tensors, "pixel_values": pixels})
    question = case.ask(sources="whole")
    cost = cost_of(question, "exact", patch=True, batch_size=6)
    with Counted(case) as counted:
        exact(question, patch=[there], batch_size=6)
    assert counted.passes == cost.forwards == 2 + 3


def test_the_towers_run_once_and_not_again(case):
    """`ask` has run them, and left what the language model is given."""
    for study in (direct, lambda q: gradient(q, steps=3), lambda q: exact(q, batch_size=4)):
        with Counted(case) as counted:
            question = case.ask()
            assert counted.towers == 1
            study(question)
        assert counted.towers == 1


def test_several_batches_are_counted_each(case):
    question = case.ask()
    twice = ask(case.model, [case.x, case.x], case.bank, labels=np.concatenate([case.labels] * 2))
    for method, say in (("direct", {}), ("gradient", {"steps": 2}), ("exact", {"batch_size": 4})):
        one, two = cost_of(question, method, **say), cost_of(twice, method, **say)
        assert (two.forwards, two.backwards) == (2 * one.forwards, 2 * one.backwards)
        assert two.blocks == pytest.approx(2 * one.blocks)
    with Counted(case) as counted:
        gradient(twice)
    assert counted.passes == cost_of(twice, "gradient").forwards


# -- memory ----------------------------------------------------------------------------------------


def test_a_budget_decides_how_many_go_together(case):
    """As many as fit, by the hooks' own count of rows; results do not depend on it."""
    question = case.ask(sources="place")
    sizes, found = [], []
    for size in (1, 3, 8):
        budget = cost_of(question, "exact", batch_size=size).gigabytes * 1.0001
        assert batch_size_within(question, budget) == size
        with Counted(case) as counted:
            table = head_attribution(
                case.model, case.x, case.bank, labels=case.labels, sources="place",
                method="exact", memory=budget,
            )  # fmt: skip
        sizes.append(counted.rows // len(case.x))
        found.append(table.rows["estimate"].to_numpy())
        assert table.about["cost"]["batch_size"] == size
        assert table.about["cost"]["gigabytes"] <= budget
    assert sizes == [1, 3, 8]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    np.testing.assert_allclose(found[0], found[2], atol=1e-6)
    assert batch_size_within(question, 100.0) == default_batch_size(question, question.parts[0])
    with pytest.raises(ValueError, match=r"memory=1e-06 GB: one edit.*fewer pictures a batch"):
        batch_size_within(question, 1e-6)


def peak(call):
    """GB that torch allocates at the same time, beyond what is there."""
    gc.collect()
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    taken = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = np.cumsum([nbytes for _, nbytes in sorted(taken, key=lambda one: one[0])])
    return float(held.max()) / 1e9


def test_no_more_is_held_than_was_said(tiny):
    """The allocator's own events, on the bundled model: 80% of truth at least, 4 times at most."""
    data = scenes("test")
    x = tiny.prepare([data[i].image for i in range(2)], "What is in the picture?")
    bank, labels = random_bank(tiny, x), np.random.default_rng(0).integers(0, 4, len(x.grid))

    def question():
        return ask(tiny, x, bank, labels=labels)

    units = [(2, head, group) for head in range(4) for group in (1, 2)]
    for method, say, call in (
        ("direct", {}, direct),
        ("gradient", {}, gradient),
        ("gradient", {"steps": 2}, lambda q: gradient(q, steps=2)),
        ("exact", {"batch_size": 4}, lambda q: exact(q, units, batch_size=4)),
    ):
        asked = question()
        held = peak(lambda call=call, asked=asked: call(asked))
        said = cost_of(asked, method, **say).gigabytes
        assert 0.8 * held <= said <= 4 * held, (method, say, held, said)


# -- time and words --------------------------------------------------------------------------------


def test_a_dry_run_runs_clean_passes_only(case):
    """Time is measured; nothing is cut."""
    with Counted(case) as counted:
        cost = head_attribution(
            case.model, case.x, case.bank, labels=case.labels, method="exact", dry_run=True
        )
    assert isinstance(cost, Cost)
    assert counted.passes == 1 + 4  # ask, and twice up to the first and to the last block
    assert counted.rows == len(case.x)
    assert cost.seconds is not None
    measured = pace(case.ask())
    cheap = cost_of(case.ask(), "direct", measured=measured)
    dear = cost_of(case.ask(), "exact", measured=measured)
    assert 0 < cheap.seconds < dear.seconds
    assert "about" in str(dear)
    assert "not timed" in str(cost_of(case.ask(), "direct"))


def test_costs_one_after_the_other_add_up():
    a = Cost(2, 1, 9.0, 0.5, 1.5, 1)
    b = Cost(10, 0, 40.0, 2.0, 200.0, 8)
    assert a + b == Cost(12, 1, 49.0, 2.0, 201.5, 8)
    assert (a + Cost(1, 0, 1.0, 0.1, None, 1)).seconds is None
    assert str(a) == (
        "2 forwards and 1 backwards, 9 block passes, 0.5 GB beyond the weights, about 1.5 s"
    )
    assert str(b).endswith("about 3 min")
    assert str(Cost(1, 0, 1.0, 1.0, 3 * 3600.0, 1)).endswith("about 3.0 h")
    assert a.as_dict()["forwards"] == 2
