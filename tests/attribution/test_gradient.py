"""Attribution patching against autograd, finite differences and plain attention in float64."""

from __future__ import annotations

import gc

import pytest
import torch

from interp.attribution.asking import ask
from interp.attribution.exact import exact
from interp.attribution.gradient import gradient
from interp.attribution.strongest import Strongest, edge_table
from interp.attribution.targets import AnswerLogit, Custom
from interp.errors import EditHadNoEffect
from tests.attribution.plain import (
    Case,
    by_image,
    cuts,
    gradients,
    load,
    near,
    predicted,
    random_labels,
)
from tests.zoo import ZOO

END = "blocks.2.hook_resid_post"
FEW = ["llava-clip-llama", "llava-siglip-mistral", "qwen3-vl", "gemma3", "paligemma2"]


@pytest.fixture(scope="module", params=[*ZOO, *(f"{name}, few wrong" for name in FEW)])
def case(request):
    name, _, few = request.param.partition(", ")
    return Case(name, few=bool(few))


@pytest.fixture(scope="module", params=FEW)
def few(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def llama():
    return Case("llava-clip-llama")


# -- the estimate ----------------------------------------------------------------------------------


def test_the_estimate_is_autograds_gradient_times_what_cutting_changes(case):
    """`g . (z - z')`, z' from the renormalised pattern: every layer, head, group and image."""
    question = case.ask()
    run, cut = case.by_hand(question)
    g = gradients(case.asked, run)
    reference = torch.stack(
        [
            by_image(
                (g[i][cut.row, cut.position][:, :, None] * (cut.z[i][:, :, None] - cut.cut[i])).sum(
                    -1
                ),
                cut.row,
                case.asked.n,
            )
            for i in question.layers
        ],
        1,
    )
    near(gradient(question), reference)


def test_uncorrected_it_is_the_derivative_by_the_edges_unnormalised_weights(case):
    """Autograd through the softmax: a gate on every edge, closed from 1 towards 0."""
    question = case.ask()
    n_heads, n_pos = case.model.cfg.n_heads, case.x.n_pos
    gates = {
        layer: torch.ones(2, n_heads, n_pos, n_pos, dtype=torch.float64).requires_grad_()
        for layer in question.layers
    }
    margin = case.asked.margin(case.plain.run(case.x, gate=gates))
    made = torch.autograd.grad(margin.sum(), list(gates.values()))
    sources = question.parts[0].sources
    lines = torch.stack([one[sources.row, :, sources.position] for one in made], 1)
    reference = torch.einsum("nlhk,nkg->nlhg", lines, case.inside(question).double())
    near(gradient(question, corrected=False), by_image(reference, sources.row, 2))
    assert not torch.allclose(gradient(question), gradient(question, corrected=False), rtol=1e-2)


def test_uncorrected_it_is_a_finite_difference_of_a_gate(llama):
    """log(1 - eps) on the scores of the group's edges, one head at a time."""
    question = llama.ask()
    ours = gradient(question, corrected=False)
    sources, eps, inside = question.parts[0].sources, 1e-3, llama.inside(question)
    for layer, head, group in ((0, 1, 0), (0, 5, 4), (1, 2, 3), (2, 3, 2)):
        found = []
        for sign in (1, -1):
            gate = torch.ones(2, 6, llama.x.n_pos, llama.x.n_pos, dtype=torch.float64)
            for n in range(len(sources)):
                line = gate[sources.row[n], head, sources.position[n]]
                line[inside[n, :, group]] = 1 - sign * eps
            with torch.no_grad():
                found.append(llama.asked.margin(llama.plain.run(llama.x, gate={layer: gate})))
        by_difference = -(found[0] - found[1]) / (2 * eps)
        assert torch.allclose(ours[:, layer, head, group], by_difference, rtol=1e-3, atol=1e-6)


def test_it_is_a_finite_difference_along_the_cut(few):
    """A hundredth of the way from z to z' and back: the sign and size of what is lost."""
    question = few.ask()
    run, cut = few.by_hand(question, leaf=None)
    ours, eps = gradient(question), 1e-2
    scale = float(ours.abs().max())
    for layer, head, group in ((0, 1, 2), (1, 4, 3), (2, 2, 4)):
        found = []
        for sign in (1, -1):
            add = torch.zeros_like(run.z[layer])
            change = cut.cut[layer][:, head, group] - cut.z[layer][:, head]
            add[cut.row, cut.position, head] = sign * eps * change
            found.append(few.asked.margin(few.plain.run(few.x, add={layer: add})))
        lost = -(found[0] - found[1]) / (2 * eps)
        assert torch.allclose(ours[:, layer, head, group], lost, rtol=5e-3, atol=1e-3 * scale)


def test_with_nothing_nonlinear_behind_it_equals_the_knockout():
    """The last layer before the end, its MLP silent: there the correction leaves no error."""
    case = Case("llava-clip-llama")
    mlp = case.model.module.get_submodule(case.model.family.block_path(2, "mlp"))
    with torch.no_grad():
        mlp.down_proj.weight.zero_()
    for sources in ("region", "place", "whole"):
        question = case.ask(sources=sources)
        cut = exact(question, [unit for unit in _units(question) if unit[0] == 2])
        near(gradient(question)[:, 2], cut[:, 2])
        plain = gradient(question, corrected=False)[:, 2]
        if sources != "whole":
            assert float((plain - cut[:, 2]).abs().max()) > 0.05 * float(cut[:, 2].abs().max())


def _units(question):
    layers, heads, groups = question.shape
    first = question.layers[0]
    return [(first + i, h, g) for i in range(layers) for h in range(heads) for g in range(groups)]


def test_readers_that_look_at_one_group_only_lose_all_they_read(few):
    """sources="whole": what is lost is the head's output along the gradient."""
    question = few.ask(sources="whole")
    run, cut = few.by_hand(question)
    g = gradients(few.asked, run)
    reference = torch.stack(
        [
            by_image((g[i][cut.row, cut.position] * cut.z[i]).sum(-1)[..., None], cut.row, 2)
            for i in question.layers
        ],
        1,
    )
    near(gradient(question), reference)


@pytest.mark.parametrize("dst", ["image", "all"])
def test_other_readers_than_the_targets_own(llama, dst):
    question = llama.ask(dst=dst, sources="place")
    run, cut = llama.by_hand(question)
    g = gradients(llama.asked, run)
    reference = [
        (g[i][cut.row, cut.position][:, :, None] * (cut.z[i][:, :, None] - cut.cut[i])).sum(-1)
        for i in question.layers
    ]
    near(gradient(question), torch.stack([by_image(one, cut.row, 2) for one in reference], 1))


def test_start_and_end_inside_the_model(llama):
    """Between block 0 and block 1: one layer, tokens called wrong behind block 0."""
    start, end = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
    question = llama.ask(start=start, end=end)
    assert question.layers == range(1, 2)
    run, cut = llama.by_hand(question, leaf=1)
    score = question.parts[0].score
    target = score.of({end: run.state[end]})
    (g,) = torch.autograd.grad(target[~target.isnan()].sum(), [run.z[1]])
    lost = (g[cut.row, cut.position][:, :, None] * (cut.z[1][:, :, None] - cut.cut[1])).sum(-1)
    near(gradient(question), by_image(lost, cut.row, 2)[:, None])


def test_the_answers_logit_has_gradients_at_all_readers(few):
    """Through the final norm, the unembedding and, in Gemma 2, its bound on logits."""
    token = few.model.tokenizer.convert_tokens_to_ids("dog")
    question = ask(few.model, few.x, target=AnswerLogit("dog"), sources="place", dst="all")
    run, cut = few.by_hand(question, leaf=0)
    last = [int(line.nonzero()[-1]) for line in few.x.tensors["attention_mask"]]
    target = torch.stack([run.logits[row, at, token] for row, at in enumerate(last)])
    made = torch.autograd.grad(target.sum(), [run.z[i] for i in question.layers])
    lost = [
        (g[cut.row, cut.position][:, :, None] * (cut.z[i][:, :, None] - cut.cut[i])).sum(-1)
        for i, g in zip(question.layers, made, strict=True)
    ]
    near(gradient(question), torch.stack([by_image(one, cut.row, 2) for one in lost], 1), 5e-5)


# -- integrated gradients --------------------------------------------------------------------------


def toward(run, cut):
    """By layer, `[batch, pos, head, d_head]`: from z to z' with the one group cut."""
    out = {}
    for layer, z in cut.z.items():
        out[layer] = torch.zeros_like(run.z[layer])
        out[layer][cut.row, cut.position] = cut.cut[layer][:, :, 0] - z
    return out


def along(case, run, change, alpha):
    add = {layer: alpha * one for layer, one in change.items()}
    return case.plain.run(case.x, add=add)


@pytest.mark.parametrize("name", ["llava-clip-llama", "gemma3", "paligemma"])
def test_integrated_gradients_add_up_to_the_change_of_the_target(name):
    """Over all heads: F(0) - F(1), F(alpha) the target with alpha dz added at every head."""
    case = Case(name)
    question = case.ask(sources="image")
    run, cut = case.by_hand(question, leaf=None)
    change = toward(run, cut)
    lost = case.asked.margin(run) - case.asked.margin(along(case, run, change, 1.0))
    near(gradient(question, steps=50).sum((1, 2, 3)), lost, 5e-3)
    once = gradient(question).sum((1, 2, 3))
    assert float((once - lost).abs().max()) > 0.05 * float(lost.abs().max())


def test_integrated_gradients_are_means_of_the_gradient_on_the_way(few):
    """Two steps: a quarter and three quarters of the way to the run with all groups cut."""
    question = few.ask()
    run, cut = few.by_hand(question, leaf=None)
    everything = few.ask(sources="whole")
    change = toward(run, few.by_hand(everything, leaf=None)[1])
    g = {layer: torch.zeros_like(run.z[layer]) for layer in question.layers}
    for alpha in (0.25, 0.75):
        add = {layer: alpha * one for layer, one in change.items()}
        for layer, one in gradients(few.asked, few.plain.run(few.x, add=add, leaf=0)).items():
            g[layer] += one / 2
    lost = [
        (g[i][cut.row, cut.position][:, :, None] * (cut.z[i][:, :, None] - cut.cut[i])).sum(-1)
        for i in question.layers
    ]
    ours = gradient(question, steps=2)
    near(ours, torch.stack([by_image(one, cut.row, 2) for one in lost], 1), 5e-5)
    assert float((ours - gradient(question)).abs().max()) > 1e-2 * float(ours.abs().max())


# -- patching --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava-clip-llama", "gemma3", "qwen2-vl"])
def test_a_patch_is_the_difference_of_outputs_along_the_gradient(name):
    case = Case(name)
    there = case.model.inputs(
        **{
            **case.x.tensors,
            "pixel_values": case.x.tensors["pixel_values"].flip(0) * 0.7,
        }
    )
    question = case.ask(sources="whole")
    run, cut = case.by_hand(question)
    g = gradients(case.asked, run)
    moved = case.plain.run(there)
    at = (cut.row, cut.position)
    lost = [(g[i][at] * (cut.z[i] - moved.z[i][at])).sum(-1)[..., None] for i in question.layers]
    near(gradient(question, patch=[there]), torch.stack([by_image(o, cut.row, 2) for o in lost], 1))

    change = {}
    for layer in question.layers:
        change[layer] = torch.zeros_like(run.z[layer])
        change[layer][at] = (moved.z[layer] - run.z[layer].detach())[at]
    gone = case.asked.margin(run) - case.asked.margin(along(case, run, change, 1.0))
    near(gradient(question, patch=[there], steps=20).sum((1, 2, 3)), gone.detach(), 5e-3)


def test_a_patch_needs_whole_heads_and_the_same_shape(llama):
    with pytest.raises(ValueError, match='sources="whole" would do'):
        gradient(llama.ask(), patch=[llama.x])
    whole = llama.ask(sources="whole")
    with pytest.raises(ValueError, match="no edges to keep"):
        gradient(whole, patch=[llama.x], strongest=Strongest(3))
    shorter = load("llava-clip-llama", n_images=1)[1]
    with pytest.raises(ValueError, match="position by position"):
        gradient(whole, patch=[shorter])
    with pytest.raises(ValueError, match="position by position"):
        gradient(whole, patch=[llama.x, llama.x])
    assert float(gradient(whole, patch=[llama.x]).abs().max()) == 0


# -- images, batches, precision --------------------------------------------------------------------


def test_images_without_a_wrong_token_are_nan_and_others_as_if_alone(llama):
    labels = random_labels(llama.x)
    right = predicted(llama.model, llama.x, llama.bank)
    first = llama.x.grid.image == 0
    labels[first] = right[first]
    ours = gradient(ask(llama.model, llama.x, llama.bank, labels=labels))
    assert ours[0].isnan().all()
    near(ours[1], gradient(llama.ask())[1])


@pytest.mark.parametrize("name", ["llava-clip-llama", "gemma3"])
def test_bfloat16_is_float32_up_to_its_rounding(name):
    """The same (rounded) weights: 4% of the largest estimate, everywhere, bar wrong tokens that
    rounding turns right."""
    case = Case(name, torch.bfloat16)
    question = case.ask()
    run, cut = case.by_hand(question)
    g = gradients(case.asked, run)
    lost = [
        (g[i][cut.row, cut.position][:, :, None] * (cut.z[i][:, :, None] - cut.cut[i])).sum(-1)
        for i in question.layers
    ]
    near(gradient(question), torch.stack([by_image(one, cut.row, 2) for one in lost], 1), 0.04)


# -- edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrected", [True, False])
def test_the_strongest_edges_are_those_of_every_edge_cut_alone(llama, corrected):
    """All edges by hand, one group each; sources in no group do not count."""
    question = llama.ask(sources=("same-region wrong", "other regions", "text and BOS"))
    sources, kept = question.parts[0].sources, Strongest(25)
    gradient(question, corrected=corrected, strongest=kept)
    run = llama.plain.run(llama.x, leaf=0)
    each = torch.eye(llama.x.n_pos, dtype=torch.bool)[None].expand(len(sources), -1, -1)
    cut = cuts(run, sources.row, sources.position, each)
    g = gradients(llama.asked, run)
    rows = []
    for layer in question.layers:
        at = g[layer][cut.row, cut.position]
        lost = (at[:, :, None] * (cut.z[layer][:, :, None] - cut.cut[layer])).sum(-1)
        if not corrected:  # a cut edge leaves z' = (z - A v) / (1 - A): undo the division
            pattern = run.pattern[layer].detach()[cut.row, :, cut.position]
            lost = lost * (1 - pattern)
        lost = lost.masked_fill(~llama.inside(question).any(-1)[:, None], 0.0)
        for n, head, src in lost.nonzero().tolist():
            row, dst = int(sources.row[n]), int(sources.position[n])
            rows.append((row, layer, head, dst, src, float(lost[n, head, src])))
    table = edge_table(kept, question)
    for image in (0, 1):
        by_hand = sorted((r for r in rows if r[0] == image), key=lambda r: -abs(r[5]))[:25]
        ours = table[table["image"] == image]
        names = ["image", "layer", "head", "dst_position", "src_position"]
        assert set(map(tuple, ours[names].values)) == {r[:5] for r in by_hand}
        assert ours["estimate"].tolist() == pytest.approx([r[5] for r in by_hand], rel=1e-3)
        token = llama.x.grid.token_at[image]
        first = 16 * image
        for _, edge in ours.iterrows():
            for end in ("dst", "src"):
                number = token[int(edge[f"{end}_position"])]
                assert edge[end] == (number - first if number >= 0 else -1)


# -- what is left behind ---------------------------------------------------------------------------


def test_flags_are_as_before_also_after_an_error(llama):
    parameters = dict(llama.model.module.named_parameters())
    for number, one in enumerate(parameters.values()):
        one.requires_grad_(number % 3 != 0)
    before = {name: one.requires_grad for name, one in parameters.items()}
    gradient(llama.ask())
    assert {name: one.requires_grad for name, one in parameters.items()} == before
    question = llama.ask()

    def fail(module, args):
        raise RuntimeError("in the middle of the pass")

    blocks = llama.model.module.get_submodule(llama.model.family.language.blocks)
    handle = blocks[1].mlp.register_forward_pre_hook(fail)
    try:
        with pytest.raises(Exception, match="in the middle of the pass"):
            gradient(question)
    finally:
        handle.remove()
    assert {name: one.requires_grad for name, one in parameters.items()} == before
    for one in parameters.values():
        assert one.grad is None
        one.requires_grad_(True)


def test_no_graph_is_left_and_none_reaches_the_towers(llama):
    def graphs():
        gc.collect()
        tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
        return sum(one.grad_fn is not None for one in tensors)

    before, seen = graphs(), {}
    options = {"sources": "place", "start": "blocks.0.hook_resid_post"}
    question = ask(llama.model, llama.x, target=AnswerLogit("dog"), **options)

    def note(name):
        def hook(module, args, out):
            state = out[0] if isinstance(out, tuple) else out
            seen[name] = state.requires_grad

        return hook

    family, module = llama.model.family, llama.model.module
    vision = module.get_submodule(family.vision.blocks)[1]
    blocks = module.get_submodule(family.language.blocks)
    handles = [vision.register_forward_hook(note("vision"))]
    handles += [block.register_forward_hook(note(i)) for i, block in enumerate(blocks)]
    try:
        values = gradient(question, steps=2)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == {"vision": False, 0: False, 1: True, 2: True}
    assert not values.requires_grad
    del values
    assert graphs() == before


# -- errors ----------------------------------------------------------------------------------------


def test_a_target_without_gradient_says_what_would_do(llama):
    def detached(run):
        return run[END].detach().sum((1, 2))

    def elsewhere(run):
        return torch.zeros(2, requires_grad=True) * 1.0

    with pytest.raises(ValueError, match=r"has no gradient.*exact"):
        gradient(ask(llama.model, llama.x, target=Custom(detached, END), dst="image"))
    with pytest.raises(EditHadNoEffect, match="does not depend"):
        gradient(ask(llama.model, llama.x, target=Custom(elsewhere, END), dst="image"))
    with pytest.raises(ValueError, match="steps=-1"):
        gradient(llama.ask(), steps=-1)
