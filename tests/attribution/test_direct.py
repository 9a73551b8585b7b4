"""Direct attribution against its definition: plain transformers' patterns, values and weights."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch
import transformers as hf

from interp.attribution import direct as module
from interp.attribution.asking import ask
from interp.attribution.direct import direct
from interp.attribution.reading import Look
from interp.attribution.sources import REGION
from interp.attribution.strongest import Strongest, edge_table
from interp.attribution.targets import AnswerLogit, Custom
from interp.errors import SumMismatch
from interp.families.base import module_at
from tests import zoo
from tests.attribution.plain import (
    Case,
    asked_by_hand,
    by_image,
    near,
    predicted,
    random_bank,
    random_labels,
)
from tests.zoo import PROMPT, TEXT, VISION, ZOO

FEW = ["llava-clip-llama", "llava-siglip-mistral", "qwen3-vl", "gemma3", "paligemma2"]


@pytest.fixture(scope="module", params=[*ZOO, *(f"{name}, few wrong" for name in FEW)])
def case(request):
    name, _, few = request.param.partition(", ")
    return Case(name, few=bool(few))


@pytest.fixture(scope="module")
def llama():
    return Case("llava-clip-llama")


def margin_directions(case):
    """`[n, d_model]`: the margin's gradient at each wrong token, means over tokens included."""
    asked = case.asked
    weight = case.bank.weights[asked.end].double()
    row = torch.as_tensor(asked.row)
    share = 1 / torch.bincount(row, minlength=asked.n).double()[row]
    return (
        row,
        torch.as_tensor(asked.position),
        share[:, None] * (weight[asked.true] - weight[asked.confused]),
    )


def heads_by_hand(case, run, layer, row, position, direction, inside):
    """`[n, head, group]`: what A[q, k] v_k, through W_O (and the norm behind it), adds."""
    model, block = case.model, case.plain.blocks[layer]
    n_heads, d_head = model.cfg.n_heads, model.cfg.d_head
    w_o = block.self_attn.o_proj.weight.reshape(-1, n_heads, d_head)  # [d_model, head, d_head]
    if model.family.language.names.post_norms:
        norm = block.post_attention_layernorm
        out = run.state[f"blocks.{layer}.attn"][row, position]
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        scale = (out.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        direction = direction * (1 + norm.weight) / scale
    line = run.pattern[layer][row, :, position]  # [n, head, k]
    each = torch.einsum("nhk,nhkd,mhd,nm->nhk", line, run.value[layer][row], w_o, direction)
    return torch.einsum("nhk,nkg->nhg", each, inside.double())


def test_every_head_and_group_is_what_its_values_write(case):
    question = case.ask()
    parts, run = direct(question), case.plain.run(case.x)
    row, position, direction = margin_directions(case)
    sources = question.parts[0].sources
    assert torch.equal(sources.row, row)
    assert torch.equal(sources.position, position)
    by_hand = [
        heads_by_hand(case, run, layer, row, position, direction, case.inside(question))
        for layer in question.layers
    ]
    near(parts.heads, torch.stack([by_image(one, row, 2) for one in by_hand], 1))


def test_parts_add_up_to_the_margin_layer_by_layer(case):
    """Heads, biases and the MLP are what a block adds; the rest, what comes between two blocks."""
    parts, run = direct(case.ask()), case.plain.run(case.x)
    row, position, direction = margin_directions(case)

    def along(name):
        return by_image((run.state[name][row, position] * direction).sum(-1), row, 2)

    near(parts.target, case.asked.margin(run))
    near(parts.total, case.asked.margin(run))
    scale = float(parts.target.abs().max())
    ends = [(f"blocks.{i}.hook_resid_pre", f"blocks.{i}.hook_resid_post") for i in range(3)]
    for layer, (pre, post) in enumerate(ends):
        added = parts.heads[:, layer].sum((1, 2)) + parts.mlps[:, layer] + parts.biases[:, layer]
        assert torch.allclose(added, along(post) - along(pre), atol=2e-5 * scale)
        if layer < 2:
            between = along(ends[layer + 1][0]) - along(post)
            assert torch.allclose(parts.rest[:, layer], between, atol=2e-5 * scale)
    assert (parts.rest.abs().max() > 1e-3) == (case.name.startswith("qwen3-vl"))
    constant = parts.target - along("blocks.2.hook_resid_post")
    assert torch.allclose(parts.start, along(ends[0][0]) + constant, atol=2e-5 * scale)
    assert torch.allclose(parts.change, parts.target - parts.start)


def test_heads_equal_hook_result_along_the_probe_direction(tiny, x):
    """On the bundled model, against the hook that holds what each head writes."""
    labels = torch.randint(0, 3, (len(x.grid),), generator=torch.Generator().manual_seed(0)).numpy()
    bank, end = random_bank(tiny, x), "blocks.3.hook_resid_post"
    parts = direct(ask(tiny, x, bank, labels=labels, end=end))
    asked = asked_by_hand(tiny, x, bank, labels, end)
    weight = bank.weights[end].double()
    d = (weight[asked.true] - weight[asked.confused]) / len(asked.row)
    for layer in range(4):
        name = f"blocks.{layer}.attn.hook_result"
        result = tiny.run(x, read=name, logits=False)[name][0, asked.position].double()
        by_hand = torch.einsum("nhm,nm->h", result, d)
        near(parts.heads[0, layer].sum(-1), by_hand, 1e-4)


def test_an_attention_bias_is_a_part_of_its_own(monkeypatch):
    """No case of the zoo has one behind its heads; Llama's configuration allows it."""

    def built():
        text = hf.LlamaConfig(**TEXT, attention_bias=True)
        return zoo.llava(text, hf.CLIPVisionConfig(**VISION))

    monkeypatch.setitem(ZOO, "biased", zoo.Case(built, PROMPT))
    case = Case("biased")
    parts = direct(case.ask())
    row, _, direction = margin_directions(case)
    by_hand = [
        by_image(direction @ block.self_attn.o_proj.bias, row, 2) for block in case.plain.blocks
    ]
    near(parts.biases, torch.stack(by_hand, 1))
    near(parts.total, case.asked.margin(case.plain.run(case.x)))


def test_a_source_group_is_what_the_pattern_restricted_to_it_gives(llama):
    """In block 0, by a hook that closes the pattern to everything else."""
    question = llama.ask()
    parts, sources = direct(question), question.parts[0].sources
    _, _, direction = margin_directions(llama)
    by_hand = []
    for group in range(len(question.groups)):
        kept: dict = {}

        def only_group(pattern, hook, group=group):
            mask = torch.zeros(2, llama.x.n_pos, llama.x.n_pos)
            mask[sources.row, sources.position] = llama.inside(question)[..., group].float()
            return pattern * mask[:, None]

        llama.model.run_with_hooks(
            llama.x,
            fwd_hooks=[
                ("blocks.0.attn.hook_pattern", only_group),
                ("blocks.0.attn.hook_result", lambda r, hook, kept=kept: kept.update(r=r.clone())),
            ],
        )
        result = kept["r"][sources.row, sources.position].double()
        written = torch.einsum("nhm,nm->nh", result, direction)
        by_hand.append(by_image(written, sources.row, 2))
    near(parts.heads[:, 0], torch.stack(by_hand, -1))


# -- the answer's logit ----------------------------------------------------------------------------


@pytest.mark.parametrize("against", [None, "red"])
def test_the_answers_logit_adds_up_behind_the_final_norm(case, against):
    """The norm's scale frozen at what it was: the parts are those of the unembedding's rows."""
    question = ask(case.model, case.x, target=AnswerLogit("dog", against), sources="place")
    if case.name == "paligemma2":
        with pytest.raises(ValueError, match="not known"):
            direct(question)
        return
    parts, run = direct(question), case.plain.run(case.x)
    ids = case.model.tokenizer.convert_tokens_to_ids
    position = torch.tensor([int(m.nonzero()[-1]) for m in case.x.tensors["attention_mask"]])
    row = torch.arange(2)
    logits = run.logits[row, position]
    unembed = module_at(case.plain.module, case.model.family.unembed).weight
    u = unembed[ids("dog")] - (0 if against is None else unembed[ids("red")])
    logit = logits[:, ids("dog")] - (0 if against is None else logits[:, ids("red")])
    near(parts.target, logit)
    near(parts.total, logit)
    norm = module_at(case.plain.module, case.model.family.language.final_norm)
    last = run.state["blocks.2.hook_resid_post"][row, position]
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    scale = (last.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    direction = u * (norm.weight + case.model.family.language.names.norm_offset) / scale
    inside = case.inside(question)
    by_hand = [
        heads_by_hand(case, run, layer, row, position, direction, inside) for layer in range(3)
    ]
    near(parts.heads, torch.stack(by_hand, 1), 2e-5)


# -- stages, groups, images, precision -------------------------------------------------------------


def test_between_two_stages_the_start_is_the_state_there(llama):
    question = llama.ask(start="blocks.0.hook_resid_post", end="blocks.1.hook_resid_post")
    parts, score = direct(question), question.parts[0].score
    run = llama.plain.run(llama.x)
    assert parts.heads.shape[1] == 1
    near(parts.target, score.of({question.end: run.state[question.end]}))
    linear = score.linear(None)
    state = run.state["blocks.1.hook_resid_pre"][score.row, score.position]
    by_hand = by_image((state * linear.direction).sum(-1), score.row, 2) + linear.constant
    near(parts.start, by_hand)
    near(parts.total, parts.target)


def test_groups_left_out_change_nothing_of_the_others(case):
    """What heads write from elsewhere is counted, by itself."""
    everything = direct(case.ask())
    some = direct(case.ask(sources=("text and BOS", "self")))
    near(some.heads, everything.heads[..., [3, 4]], 1e-9)
    near(some.total, everything.target)
    near(some.elsewhere, everything.heads[..., :3].sum((2, 3)), 1e-9)
    assert (everything.elsewhere == 0).all()


def over_the_whole_prompt(case, question):
    """The question's sources as a user would make them, words behind the pictures included."""
    own = question.parts[0].sources
    missing = case.x.n_pos - own.group.shape[1]
    words = REGION.index("text and BOS")
    return replace(own, group=torch.nn.functional.pad(own.group, (0, missing), value=words))


def test_readers_in_another_order_are_the_same_readers(llama):
    question = llama.ask()
    own = over_the_whole_prompt(llama, question)
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(0))
    shuffled = replace(
        own, row=own.row[order], position=own.position[order], group=own.group[order]
    )
    near(direct(llama.ask(sources=shuffled)).heads, direct(question).heads, 1e-9)


def test_readers_that_are_not_the_targets_own_raise(llama):
    own = over_the_whole_prompt(llama, llama.ask())
    fewer = replace(own, row=own.row[1:], position=own.position[1:], group=own.group[1:])
    moved = replace(own, position=own.position.clone() - 1)
    for other in (fewer, moved):
        with pytest.raises(ValueError, match="position"):
            direct(llama.ask(sources=other))
    with pytest.raises(ValueError, match='dst="queries"'):
        direct(llama.ask(dst="image"))


def test_images_without_a_wrong_token_are_nan(llama):
    """And the others as they are without them."""
    labels = random_labels(llama.x)
    first = llama.x.grid.image == 0
    labels[first] = predicted(llama.model, llama.x, llama.bank)[first]
    ours = direct(ask(llama.model, llama.x, llama.bank, labels=labels))
    whole = direct(llama.ask())
    for name in ("heads", "mlps", "start", "target"):
        assert getattr(ours, name)[0].isnan().all(), name
        near(getattr(ours, name)[1], getattr(whole, name)[1], 1e-6)
    assert ours.total[0].isnan()


@pytest.mark.parametrize("name", ["llava-clip-llama", "gemma3", "qwen3-vl"])
def test_bfloat16_is_float32_up_to_its_rounding(name):
    """The same rounded weights in float64: every head within 3% of the largest."""
    case = Case(name, torch.bfloat16)
    question = case.ask()
    parts, run = direct(question), case.plain.run(case.x)
    row, position, direction = margin_directions(case)
    inside = case.inside(question)
    by_hand = [
        heads_by_hand(case, run, layer, row, position, direction, inside)
        for layer in question.layers
    ]
    near(parts.heads, torch.stack([by_image(one, row, 2) for one in by_hand], 1), 0.03)
    near(parts.total, parts.target, 0.05)


def test_the_strongest_edges_are_the_largest_parts(llama):
    question, kept = llama.ask(), Strongest(30)
    direct(question, kept)
    run = llama.plain.run(llama.x)
    row, position, direction = margin_directions(llama)
    alone = torch.eye(llama.x.n_pos)[None].expand(len(row), -1, -1)
    rows = []
    for layer in question.layers:
        each = heads_by_hand(llama, run, layer, row, position, direction, alone)  # [n, head, k]
        for n, head, src in each.nonzero().tolist():
            value = float(each[n, head, src])
            rows.append((int(row[n]), layer, head, int(position[n]), src, value))
    table = edge_table(kept, question)
    for image in (0, 1):
        by_hand = sorted((one for one in rows if one[0] == image), key=lambda one: -abs(one[5]))
        ours = table[table["image"] == image]
        names = ["image", "layer", "head", "dst_position", "src_position"]
        assert list(map(tuple, ours[names].values)) == [one[:5] for one in by_hand[:30]]
        assert ours["estimate"].tolist() == pytest.approx([o[5] for o in by_hand[:30]], rel=1e-4)


# -- what is refused -------------------------------------------------------------------------------


def test_a_sum_that_does_not_hold_raises(llama, monkeypatch):
    """Parts that were tampered with, and values that are not what the model read."""
    parts = direct(llama.ask())
    wrong = dataclasses.replace(parts, mlps=parts.mlps + 0.01 * parts.heads.abs().sum((2, 3)))
    with pytest.raises(SumMismatch, match="miss the target"):
        module._check_sum(wrong)
    values = Look.values
    monkeypatch.setattr(Look, "values", lambda self, row: values(self, row) * 1.01)
    with pytest.raises(SumMismatch, match="not accounted for"):
        direct(llama.ask())


def test_a_target_that_is_not_linear_is_refused(llama):
    target = Custom(lambda run: run[llama.end].pow(2).sum((1, 2)), llama.end)
    with pytest.raises(ValueError, match='method="direct"'):
        direct(ask(llama.model, llama.x, target=target, dst="image"))
