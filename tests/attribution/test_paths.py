"""Path effects against path patching written with plain torch hooks on transformers' module."""

from __future__ import annotations

import copy
import re
from contextlib import ExitStack

import numpy as np
import pandas as pd
import pytest
import torch

from interp import MLLM
from interp.attribution.cost import Cost
from interp.attribution.path_table import ROWS, PathTable
from interp.attribution.paths import path_attribution
from interp.attribution.targets import AnswerLogit, Custom, Score, Target
from interp.edits import Ablate
from interp.errors import HeadError, TableError, Untestable
from interp.probes import ProbeBank
from interp.report.text import MINUS
from tests import zoo
from tests.attribution.planted import planted
from tests.conftest import random_inputs, random_llava

CASES = ["llava-clip-llama", "gemma3", "paligemma2", "qwen3-vl", "llava-siglip-mistral"]
PAIRS = [((0, 1), (1, 2)), ((0, 3), (2, 5)), ((1, 0), (2, 0))]
TOKEN = 7


class ByHand:
    """Path patching one pair at a time on an untouched module, by hooks on its own submodules."""

    def __init__(self, module, x, target, reading):
        """`target(logits, states after each block)` -> [n_rows]; `reading` [batch, pos] bool."""
        self.module, self.target, self.reading = module, target, reading
        self.tensors = x.tensors
        self.blocks = module.model.language_model.layers
        self.d_head = self.blocks[0].self_attn.head_dim
        self.clean = self.run()

    def run(self, *hooks):
        """Each block's input, q, k, v, z and what attention added, under hooks (module, fn)."""
        seen, states = {}, []
        with ExitStack() as stack:
            for module, fn in hooks:
                pre = module.register_forward_pre_hook if fn[0] == "in" else None
                handle = (pre or module.register_forward_hook)(fn[1])
                stack.callback(handle.remove)
            for i, block in enumerate(self.blocks):
                attn = block.self_attn
                post = hasattr(block, "pre_feedforward_layernorm")
                added = block.post_attention_layernorm if post else attn.o_proj
                spots = {
                    ("pre", i): (block, "in"), ("z", i): (attn.o_proj, "in"),
                    ("q", i): (attn.q_proj, "out"), ("k", i): (attn.k_proj, "out"),
                    ("v", i): (attn.v_proj, "out"), ("out", i): (added, "out"),
                    ("post", i): (block, "out"),
                }  # fmt: skip
                for name, (module, side) in spots.items():
                    stack.callback(_watch(module, side, seen, name).remove)
            with torch.no_grad():
                logits = self.module(**self.tensors, use_cache=False).logits
        states = [seen["post", i] for i in range(len(self.blocks))]
        return seen, self.target(logits, states)

    def without(self, layer, head, at=None):
        """The hook that sets a head's z to zero."""
        columns = slice(head * self.d_head, (head + 1) * self.d_head)

        def cut(module, args):
            z = args[0].clone()
            where = slice(None) if at is None else at
            z[:, where, columns] = 0
            return (z,)

        return self.blocks[layer].self_attn.o_proj, ("in", cut)

    def effect(self, sender, receiver, through, direct, at=None):
        clean, before = self.clean
        (layer, head), attn = receiver, self.blocks[receiver[0]].self_attn
        edited, _ = self.run(self.without(*sender, at))
        stream = edited["pre", layer]
        if direct:
            change = edited["out", sender[0]] - clean["out", sender[0]]
            stream = clean["pre", layer] + change
        hooks = [(self.blocks[layer], ("in", lambda module, args: (stream, *args[1:])))]
        for part in {"q", "k", "v"} - set(through):
            module = getattr(attn, f"{part}_proj")
            hooks.append((module, ("out", lambda *_, part=part: clean[part, layer])))
        there, _ = self.run(*hooks)
        columns = slice(head * self.d_head, (head + 1) * self.d_head)

        def put(module, args):
            z = args[0].clone()
            z[..., columns] = torch.where(
                self.reading[..., None], there["z", layer][..., columns], z[..., columns]
            )
            return (z,)

        return before - self.run((attn.o_proj, ("in", put)))[1]


def _watch(module, side, seen, name):
    def keep(value):
        seen[name] = (value[0] if isinstance(value, tuple) else value).detach().clone()

    if side == "in":
        return module.register_forward_pre_hook(lambda module, args: keep(args))
    return module.register_forward_hook(lambda module, args, out: keep(out))


def last_logit(logits, states):
    return logits[:, -1, TOKEN].double()


def estimates(table, pairs):
    """`[n_pairs, n_images]`."""
    found = table.rows.set_index([*ROWS[:4], "image"])["estimate"]
    return np.array([[found[(*b, *a, i)] for i in range(table.n_images)] for b, a in pairs])


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """A model under interp, its untouched twin, and a batch of one picture."""
    module, processor = zoo.build(request.param)
    model = MLLM.load(copy.deepcopy(module), processor=processor)
    x = zoo.inputs(model, request.param)
    reading = torch.zeros(x.shape, dtype=torch.bool)
    reading[:, -1] = True
    return model, x, ByHand(module, x, last_logit, reading)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("through", [("q", "k", "v"), ("k", "v"), ("q",), ("v",)])
def test_effects_equal_path_patching_by_hand(case, through, direct):
    model, x, by_hand = case
    table = path_attribution(
        model, x, target=AnswerLogit(TOKEN), pairs=PAIRS, through=through, direct=direct
    )
    expected = torch.stack([by_hand.effect(b, a, through, direct) for b, a in PAIRS])
    assert expected.abs().max() > 1e-3  # there is something to get wrong
    np.testing.assert_allclose(estimates(table, PAIRS), expected.numpy(), atol=1e-5)


# -- who reads where, who is edited where ----------------------------------------------------------

END = "blocks.1.hook_resid_post"
WEIGHT = torch.linspace(-1, 1, 48, dtype=torch.float64)


def mid_target(run):
    """Of the stream in the middle of the model, at three positions of the picture."""
    return (run[END][:, [9, 12, 15]].double() @ WEIGHT).mean(1)


@pytest.fixture(scope="module")
def rows():
    """Two rows, the second padded; the target is read in block 1, and all image tokens read."""
    module = random_llava()
    model = MLLM.load(copy.deepcopy(module))
    x = random_inputs(model, 2, padding=3)

    def target(logits, states):
        return (states[1][:, [9, 12, 15]].double() @ WEIGHT).mean(1)

    return model, x, ByHand(module, x, target, torch.as_tensor(x.grid.is_image))


@pytest.mark.parametrize("direct", [True, False])
def test_readers_are_the_dst_positions_and_the_end_may_be_early(rows, direct):
    model, x, by_hand = rows
    pairs = [((0, 0), (1, 3)), ((0, 5), (1, 1))]
    table = path_attribution(
        model, x, target=mid_target, end=END, dst="image", pairs=pairs, direct=direct
    )
    expected = torch.stack([by_hand.effect(*pair, ("k", "v"), direct) for pair in pairs])
    assert expected.abs().max() > 1e-2
    np.testing.assert_allclose(estimates(table, pairs), expected.numpy(), atol=1e-5)
    assert table.about["target"] == "mid_target"


def test_the_sender_is_edited_at_the_positions_given(rows):
    model, x, by_hand = rows
    pairs, at = [((0, 2), (1, 4))], [4, 8]
    options = {"target": mid_target, "end": END, "dst": "image", "pairs": pairs}
    table = path_attribution(model, x, at=at, **options)
    expected = by_hand.effect(*pairs[0], ("k", "v"), True, at=at)
    np.testing.assert_allclose(estimates(table, pairs)[0], expected.numpy(), atol=1e-5)
    assert (
        np.abs(estimates(path_attribution(model, x, **options), pairs) - expected.numpy()).max()
        > 1e-3
    )


def test_the_mean_is_over_the_edited_positions(rows):
    model, x, by_hand = rows
    pairs = [((0, 2), (1, 4))]
    table = path_attribution(
        model, x, target=mid_target, end=END, dst="image", pairs=pairs, ablate="mean"
    )
    there = torch.as_tensor(x.is_attended)
    columns = slice(2 * 8, 3 * 8)

    def to_mean(module, args):
        z = args[0].clone()
        z[..., columns] = torch.where(
            there[..., None], z[there][:, columns].mean(0), z[..., columns]
        )
        return (z,)

    by_hand.without = lambda layer, head, at: (
        by_hand.blocks[layer].self_attn.o_proj,
        ("in", to_mean),
    )
    try:
        expected = by_hand.effect(*pairs[0], ("k", "v"), True)
    finally:
        del by_hand.without
    np.testing.assert_allclose(estimates(table, pairs)[0], expected.numpy(), atol=1e-5)


def test_a_patched_sender_is_what_it_is_on_the_other_batch(rows):
    model, x, by_hand = rows
    other = random_inputs(model, 2, padding=3, seed=5)
    pairs = [((0, 2), (1, 4))]
    options = {"target": mid_target, "end": END, "dst": "image", "pairs": pairs}
    table = path_attribution(model, x, patch=other, **options)
    there, columns = torch.as_tensor(x.is_attended), slice(2 * 8, 3 * 8)
    by_hand.tensors, mine = other.tensors, by_hand.tensors
    z_other = by_hand.run()[0]["z", 0][..., columns]
    by_hand.tensors = mine

    def to_other(module, args):
        z = args[0].clone()
        z[..., columns] = torch.where(there[..., None], z_other, z[..., columns])
        return (z,)

    by_hand.without = lambda layer, head, at: (
        by_hand.blocks[layer].self_attn.o_proj,
        ("in", to_other),
    )
    try:
        expected = by_hand.effect(*pairs[0], ("k", "v"), True)
    finally:
        del by_hand.without
    assert expected.abs().min() > 1e-3
    np.testing.assert_allclose(estimates(table, pairs)[0], expected.numpy(), atol=1e-5)
    # the batch itself changes nothing
    assert not path_attribution(model, x, patch=x, **options).rows["estimate"].any()
    few = path_attribution(model, x, patch=other, at=[4], **options)
    assert np.abs(estimates(few, pairs)[0] - expected.numpy()).min() > 1e-3


class At(Target):
    """The stream's first number behind the last block, at one position."""

    def __init__(self, position):
        self.position = position

    def on(self, model, x):
        end, n = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", len(x)
        return Score(
            "one position",
            end,
            lambda run: run[end][:, self.position, 0].double(),
            torch.arange(n),
            torch.full((n,), self.position),
        )


@pytest.mark.parametrize("direct", [True, False])
def test_a_receiver_that_cannot_see_where_the_sender_wrote_has_no_effect(rand, rx, direct):
    def effect(position, at, through):
        table = path_attribution(
            rand, rx, target=At(position), pairs=[((0, 1), (2, 2))], at=at, through=through,
            direct=direct,
        )  # fmt: skip
        return table.rows["estimate"].abs().max()

    # the receiver reads at position 10: later ones are closed to it
    assert effect(10, [11, 15], ("q", "k", "v")) < 1e-6
    assert effect(10, [9], ("k", "v")) > 1e-4
    # its query is made at position 10, from what was written there
    assert effect(10, [10], ("q",)) > 1e-4
    if direct:  # nobody carries it there
        assert effect(10, [9], ("q",)) == 0
    else:
        assert effect(10, [9], ("q",)) > 1e-4


# -- the bundled model -----------------------------------------------------------------------------


def test_the_default_question_on_the_bundled_model(tiny, plain_tiny, x):
    """Margins of tokens that a (random) probe takes for the wrong class."""
    rng = torch.Generator().manual_seed(0)
    start, end = "adapter.hook_out", "blocks.3.hook_resid_post"
    weight = {name: torch.randn(3, tiny.cfg.d_model, generator=rng) for name in (start, end)}
    bank = ProbeBank(
        stages=(start, end),
        classes=("a", "b", "c"),
        weights=weight,
        intercepts=dict.fromkeys((start, end), torch.zeros(3)),
        seen=(True,) * 3,
        n_iter=dict.fromkeys((start, end), 0),
        converged=dict.fromkeys((start, end), True),
    )
    labels = torch.randint(0, 3, (len(x.grid),), generator=rng)
    seen = {}
    spot = _watch(plain_tiny.model.multi_modal_projector, "out", seen, "adapter")
    with torch.no_grad():
        plain_tiny(**x.tensors)
    spot.remove()
    said = (seen["adapter"][0] @ weight[start].T).argmax(-1)
    wrong = said != labels
    position = torch.as_tensor(x.grid.position)[wrong]
    direction = (weight[end][labels] - weight[end][said])[wrong].double()

    def margin(logits, states):
        return (states[3][0, position].double() * direction).sum(-1).mean()[None]

    reading = torch.zeros(x.shape, dtype=torch.bool)
    reading[0, position] = True
    by_hand = ByHand(plain_tiny, x, margin, reading)
    pairs = [((0, 1), (1, 2)), ((1, 5), (3, 0)), ((0, 3), (2, 4))]
    for direct in (True, False):
        table = path_attribution(
            tiny, x, bank, labels=labels.numpy(), end=end, pairs=pairs, direct=direct
        )
        expected = torch.stack([by_hand.effect(*pair, ("k", "v"), direct) for pair in pairs])
        assert expected.abs().max() > 1e-3
        np.testing.assert_allclose(estimates(table, pairs), expected.numpy(), atol=1e-5)


# -- sums ------------------------------------------------------------------------------------------


def test_receivers_and_the_skip_add_up_to_the_senders_whole_effect():
    """Where the target is read right behind the receivers' block, whose MLP is silent, it is linear
    in their z: all paths through them and the one past them are the sender's whole effect."""
    module = random_llava()
    module.model.language_model.layers[2].mlp.down_proj.weight.data.zero_()
    model = MLLM.load(module)
    x = random_inputs(model, 1)
    end, position, sender = "blocks.2.hook_resid_post", 14, (0, 4)
    pairs = [(sender, (2, head)) for head in range(6)]
    table = path_attribution(
        model, x, target=At(position), pairs=pairs, through=("q", "k", "v"), direct=False
    )
    read = [end, "blocks.2.hook_resid_pre"]
    clean = model.run(x, read=read)
    edited = model.run(x, Ablate("blocks.0.attn.hook_z", heads=4), read=read)
    whole, past = ((clean[name] - edited[name])[0, position, 0].double() for name in read)
    assert abs(whole - past) > 1e-2
    np.testing.assert_allclose(table.rows["estimate"].sum(), whole - past, atol=1e-5)


def test_between_neighbours_only_the_mlp_tells_direct_from_free():
    module = random_llava()
    x = random_inputs(MLLM.load(copy.deepcopy(module)), 1)
    options = {"target": At(14), "pairs": [((1, 4), (2, 0))]}

    def both(module):
        model = MLLM.load(module)
        tables = [path_attribution(model, x, direct=d, **options) for d in (True, False)]
        return [table.rows["estimate"][0] for table in tables]

    direct, free = both(copy.deepcopy(module))
    assert abs(direct - free) > 1e-3
    module.model.language_model.layers[1].mlp.down_proj.weight.data.zero_()
    direct, free = both(module)
    np.testing.assert_allclose(direct, free, atol=1e-6)


# -- the planted model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case_planted():
    return planted(6, calm=(2,))


@pytest.fixture(scope="module")
def found(case_planted):
    p = case_planted
    end = "blocks.3.hook_resid_post"
    return path_attribution(p.model, p.x, p.bank, labels=p.labels, end=end, top=4)


def test_the_planted_sender_is_found_behind_its_receiver(case_planted, found):
    p = case_planted
    best = found.top(1).iloc[0]
    assert (best["sender_layer"], best["sender_head"]) == p.head("sender")
    assert (best["layer"], best["head"]) == p.head("receiver")
    assert best["low"] > 0
    assert best["estimate"] > 5 * found.summary()["estimate"].abs()[1:].max()


def test_an_image_without_wrong_tokens_has_no_rows(found):
    assert sorted(found.rows["image"].unique()) == [0, 1, 3, 4, 5]
    assert found.n_images == 6
    assert "5 of 6 images" in str(found)


def test_it_has_none_either_if_no_path_is_open(case_planted):
    p = case_planted
    pairs = [(p.head("sender"), p.head("receiver"))]
    table = path_attribution(
        p.model, p.x, p.bank, labels=p.labels, end="blocks.3.hook_resid_post", pairs=pairs,
        at=[0], through=("q",),
    )  # fmt: skip
    assert not table.rows["estimate"].any()
    assert sorted(table.rows["image"]) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("through", [("k", "v"), ("q", "k", "v")])
def test_the_default_heads_are_those_of_the_largest_first_order_effect(rand, rx2, through):
    """Receivers by what a small step towards no z changes at the last position; senders everywhere,
    or, where only keys and values count, everywhere else."""
    eps, top = 1e-2, 3
    table = path_attribution(rand, rx2, target=AnswerLogit(TOKEN), top=top, through=through)
    clean = rand.run(rx2)
    everywhere = torch.as_tensor(rx2.is_attended)
    last = torch.as_tensor(rx2.is_last)

    def best(layers, where):
        size = {}
        for layer, head in [(i, h) for i in layers for h in range(6)]:

            def shrink(z, hook, head=head):
                z = z.clone()
                z[:, :, head] *= torch.where(where, 1 - eps, 1)[..., None]
                return z

            logits = rand.run_with_hooks(rx2, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", shrink)])
            size[layer, head] = float((clean.logits - logits)[:, -1, TOKEN].sum().abs())
        return set(sorted(size, key=size.get)[-top:])

    senders = best(range(2), everywhere if "q" in through else everywhere & ~last)
    receivers = best(range(1, 3), last)
    expected = {(b, a) for b in senders for a in receivers if b[0] < a[0]}
    rows = table.rows[list(ROWS[:4])].drop_duplicates().to_numpy().tolist()
    assert {((a, b), (c, d)) for a, b, c, d in rows} == expected


# -- batches, cost ---------------------------------------------------------------------------------


def test_batches_are_images_one_behind_the_other(rand):
    batches = [random_inputs(rand, n, seed=n) for n in (2, 1)]
    options = {"target": AnswerLogit(TOKEN), "pairs": PAIRS}
    both = path_attribution(rand, batches, **options)
    assert both.n_images == 3
    one, two = (estimates(path_attribution(rand, x, **options), PAIRS) for x in batches)
    np.testing.assert_allclose(estimates(both, PAIRS), np.concatenate([one, two], 1), atol=1e-6)


@pytest.mark.parametrize("direct", [True, False])
def test_the_cost_counts_the_forwards_that_are_made(rand, direct):
    x = random_inputs(rand, 2)
    count, pairs = [], [((0, 1), (2, 2)), ((0, 3), (2, 5)), ((1, 0), (2, 0))]
    blocks = rand.module.model.language_model
    options = {"target": AnswerLogit(TOKEN), "pairs": pairs, "direct": direct}
    planned = path_attribution(rand, x, dry_run=True, **options)
    assert isinstance(planned, Cost)
    assert planned.seconds > 0
    handle = blocks.register_forward_pre_hook(lambda *_: count.append(1))
    try:
        table = path_attribution(rand, x, **options)
    finally:
        handle.remove()
    assert table.about["cost"]["forwards"] == planned.forwards == len(count)
    # a clean run; the receivers of layer 2; the senders of layers 0 and 1
    assert len(count) == (2 if direct else 4)


def test_a_dry_run_without_pairs_says_what_it_costs_at_most(rand, rx):
    options = {"target": AnswerLogit(TOKEN), "top": 3}
    planned = path_attribution(rand, rx, dry_run=True, **options)
    cost = path_attribution(rand, rx, **options).about["cost"]
    assert planned.backwards == cost["backwards"] == 1
    assert planned.blocks >= cost["blocks"]
    assert planned.gigabytes >= cost["gigabytes"]


def test_results_do_not_depend_on_memory(rand, rx):
    options = {"target": AnswerLogit(TOKEN), "pairs": PAIRS}
    wide = path_attribution(rand, rx, **options)
    narrow = path_attribution(rand, rx, memory=wide.about["cost"]["gigabytes"] / 8, **options)
    assert narrow.about["cost"]["forwards"] >= wide.about["cost"]["forwards"]
    np.testing.assert_allclose(estimates(narrow, PAIRS), estimates(wide, PAIRS), atol=1e-6)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"pairs": [((1, 0), (1, 2))]}, HeadError, "1.0 cannot send to 1.2"),
        ({"pairs": [((0, 0), (3, 2))]}, HeadError, "no head 3.2 here: .* layers 0 to 2"),
        ({"pairs": [((0, 6), (2, 2))]}, HeadError, "no head 0.6"),
        ({"pairs": []}, ValueError, "pairs is empty"),
        ({"through": ("z",)}, ValueError, "some of 'q', 'k', 'v'"),
        ({"through": ()}, ValueError, "through"),
        ({"ablate": "resample"}, ValueError, '"zero" or "mean"'),
        ({"top": 0}, ValueError, "at least one head"),
        ({"sources": "place"}, ValueError, "no sources="),
        ({"start": "blocks.1.hook_resid_post"}, Untestable, "two layers.* layer 2 alone"),
    ],
)
def test_what_cannot_be_is_said(rand, rx, options, error, words):
    with pytest.raises(error, match=words):
        path_attribution(rand, rx, target=AnswerLogit(TOKEN), **options)


def test_a_patch_of_another_shape_is_refused(rand, rx, rx2):
    with pytest.raises(ValueError, match=r"\[\[2, 24\]\], the question \[\[1, 21\]\]"):
        path_attribution(rand, rx, target=AnswerLogit(TOKEN), patch=rx2)
    with pytest.raises(ValueError, match="both say"):
        path_attribution(rand, rx, target=AnswerLogit(TOKEN), patch=rx, ablate="mean")


def test_a_target_without_a_gradient_needs_pairs(rand, rx):
    blind = Custom(lambda run: run[END][:, -1, 0].detach(), END)
    with pytest.raises(ValueError, match="give pairs="):
        path_attribution(rand, rx, target=blind, dst="image")
    table = path_attribution(rand, rx, target=blind, dst="all", pairs=[((0, 0), (1, 0))])
    assert table.rows["estimate"].abs().max() > 0


# -- the table -------------------------------------------------------------------------------------


def made_rows():
    """Three paths in two images."""
    values = {(0, 2, 2, 3): (0.5, 0.7), (0, 10, 2, 3): (-1.0, -1.4), (1, 0, 2, 0): (0.0, 0.1)}
    return pd.DataFrame(
        [(*path, i, v) for path, own in values.items() for i, v in enumerate(own)],
        columns=list(ROWS),
    ).sample(frac=1, random_state=0)


def test_the_strongest_come_first_whatever_their_sign():
    table = PathTable(made_rows())
    top = table.top(2)
    assert top[list(ROWS[:4])].to_numpy().tolist() == [[0, 10, 2, 3], [0, 2, 2, 3]]
    np.testing.assert_allclose(top["estimate"], [-1.2, 0.6])
    np.testing.assert_allclose(top[["low", "high"]], [[-1.4, -1.0], [0.5, 0.7]])


def test_the_matrix_has_senders_and_receivers_in_order():
    matrix = PathTable(made_rows()).matrix()
    assert list(matrix.index) == ["0.2", "0.10", "1.0"]
    assert list(matrix.columns) == ["2.0", "2.3"]
    expected = [[np.nan, 0.6], [np.nan, -1.2], [0.05, np.nan]]
    np.testing.assert_allclose(matrix.to_numpy(), expected)


def test_the_graph_draws_heads_by_layer_and_paths_by_strength():
    fig = PathTable(made_rows()).graph()
    *lines, nodes = fig.data
    assert sorted(nodes.text) == ["0.10", "0.2", "1.0", "2.0", "2.3"]
    place = dict(zip(nodes.text, zip(nodes.x, nodes.y, strict=True), strict=True))
    assert {name: x for name, (x, _) in place.items()} == {
        "0.2": 0, "0.10": 0, "1.0": 1, "2.0": 2, "2.3": 2,
    }  # fmt: skip
    by_name = {line.name: line for line in lines}
    strong, weak = by_name["0.10 → 2.3"], by_name["1.0 → 2.0"]
    assert strong.line.width > by_name["0.2 → 2.3"].line.width > weak.line.width
    assert (strong.x[0], strong.y[0]) == place["0.10"]
    np.testing.assert_allclose((strong.x[-1], strong.y[-1]), place["2.3"])
    assert strong.line.color.split(",")[0] != weak.line.color.split(",")[0]  # against, for
    assert len(PathTable(made_rows()).graph(n=1).data) == 2


def test_it_reads_well_in_a_terminal():
    table = PathTable(made_rows(), {"method": "path patching", "target": "t", "n_images": 3})
    text = str(table)
    assert "path patching: t" in text
    assert "3 paths, 2 of 3 images with an estimate" in text
    assert re.search(r"0\.10 +2\.3 +", text)
    assert f"{MINUS}1.20 [{MINUS}1.40, {MINUS}1.00]" in text
    assert max(map(len, text.split("\n"))) <= 100
    assert "no interval" in str(PathTable(made_rows().query("image == 0"))).lower()
    assert "No image has an estimate" in str(PathTable(made_rows().head(0)))


def test_it_is_saved_and_loaded(found, tmp_path):
    path = tmp_path / "paths.parquet"
    found.save(path)
    again = PathTable.load(path)
    pd.testing.assert_frame_equal(again.rows, found.rows)
    assert again.about == found.about
    assert (
        again.about["how"]
        == "sender set to zero at all positions; through k, v; all between frozen"
    )


def test_rows_that_are_not_whole_are_refused():
    rows = made_rows()
    with pytest.raises(TableError, match="lack image"):
        PathTable(rows.drop(columns="image"))
    with pytest.raises(TableError, match="5 rows of 3 paths in 2 images"):
        PathTable(rows.iloc[:-1])
    with pytest.raises(TableError, match="has no rows"):
        PathTable(rows.assign(estimate=np.nan))
    with pytest.raises(TableError, match="nothing to draw"):
        PathTable(rows.head(0)).graph()
