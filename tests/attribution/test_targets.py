"""Targets against NumPy in float64 and against plain transformers' logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from interp import MLLM
from interp.attribution.targets import AnswerLogit, Custom, ProbeMargin, Target
from tests.attribution.plain import Plain, load, random_bank
from tests.conftest import plain_logits
from tests.zoo import ZOO, build, picture

NAME = "llava-clip-llama"
END = "blocks.1.hook_resid_post"
SCALE = "ln_final.hook_scale"
LAST = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def llama():
    """(model, three rows, a random bank)."""
    model, x = load(NAME, n_images=3)
    return model, x, random_bank(model, x)


@pytest.fixture
def margin(llama):
    """A margin over two tokens of image 0, all of image 1, none of image 2."""
    _, x, bank = llama
    rng = np.random.default_rng(0)
    tokens = np.zeros(len(x.grid), dtype=bool)
    tokens[[3, 9]] = True
    tokens[16:32] = True
    true = rng.integers(0, 4, len(tokens))
    return ProbeMargin(bank, END, tokens, true, (true + 1) % 4)


# -- margins of probes -----------------------------------------------------------------------------


def margins_by_numpy(x, bank, target, state):
    """One number an image, token by token."""
    weight, bias = (np.float64(t[END].numpy()) for t in (bank.weights, bank.intercepts))
    out = []
    for image in range(len(x)):
        each = []
        for token in np.flatnonzero(target.tokens & (x.grid.image == image)):
            logits = weight @ state[image, x.grid.position[token]] + bias
            each.append(logits[target.true[token]] - logits[target.confused[token]])
        out.append(np.mean(each) if each else np.nan)
    return np.array(out)


def test_a_margin_is_numpys(llama, margin):
    model, x, bank = llama
    score = margin.on(model, x)
    state = model.run(x, read=END)[END]
    reference = margins_by_numpy(x, bank, margin, state.double().numpy())
    ours = score.of({END: state})
    assert ours.dtype == torch.float64
    assert np.isnan(reference[2])
    np.testing.assert_allclose(ours.numpy(), reference, rtol=1e-6)  # a float32 bank
    assert (score.end, score.row.tolist()) == (END, [0] * 2 + [1] * 16)
    assert score.position.tolist() == x.grid.position[margin.tokens].tolist()


def test_a_margin_is_linear_in_the_state_and_says_how(llama, margin):
    """In any states, not only the model's."""
    model, x, bank = llama
    score = margin.on(model, x)
    rng = np.random.default_rng(1)
    state = rng.normal(size=(3, x.n_pos, 48))
    linear = score.linear({})
    direction, constant = linear.direction.numpy(), linear.constant.numpy()
    by_hand = constant.copy()
    for n in range(len(score.row)):
        by_hand[score.row[n]] += state[score.row[n], score.position[n]] @ direction[n]
    reference = margins_by_numpy(x, bank, margin, state)
    np.testing.assert_allclose(by_hand[:2], reference[:2], rtol=1e-6)


def test_a_margin_has_the_gradient_of_its_mean(llama, margin):
    model, x, bank = llama
    state = torch.randn(3, x.n_pos, 48, dtype=torch.float64, requires_grad=True)
    values = margin.on(model, x).of({END: state})
    (g,) = torch.autograd.grad(values[~values.isnan()].sum(), state)
    weight = bank.weights[END].double()
    by_hand = torch.zeros_like(g)
    for token in np.flatnonzero(margin.tokens):
        share = 1 / 2 if x.grid.image[token] == 0 else 1 / 16
        along = weight[margin.true[token]] - weight[margin.confused[token]]
        by_hand[x.grid.row[token], x.grid.position[token]] = share * along
    torch.testing.assert_close(g, by_hand, rtol=1e-5, atol=1e-8)


def test_margins_that_do_not_fit_are_refused(llama, margin):
    model, x, bank = llama
    with pytest.raises(ValueError, match=r"true \[5\] for a batch of 48 image tokens"):
        replace(margin, true=np.zeros(5, dtype=int)).on(model, x)
    with pytest.raises(KeyError, match="no probe at"):
        replace(margin, end="blocks.1.hook_mlp_out").on(model, x)
    with pytest.raises(ValueError, match=r"classes are 0\.\.3"):
        replace(margin, true=np.full(48, 255)).on(model, x)
    assert len(bank.classes) == 4


# -- the answer's logit ----------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", list(ZOO))
def test_the_answers_logit_is_plain_transformers(name, side):
    """At the last token that is no padding, each row by itself: padding is not even there."""
    module, processor = build(name)
    model = MLLM.load(module, processor=processor)
    processor.tokenizer.padding_side = side
    prompts = [ZOO[name].prompt, f"{ZOO[name].prompt} a red dog"]
    pictures = [picture(), picture(seed=1)]
    x = model.prepare(pictures, prompts)
    on_left = side == "left" or name == "internvl"  # whose processor pads left whatever it is told
    assert bool(x.tensors["attention_mask"][0, -1]) == on_left
    ids = processor.tokenizer.convert_tokens_to_ids
    stock = build(name)[0]
    stock.set_attn_implementation("eager")
    alone = [plain_logits(stock, model.prepare(*one)) for one in zip(pictures, prompts)]
    reference = torch.stack([one[0, -1] for one in alone]).double()
    run = model.run(x)
    for target, expected in (
        (AnswerLogit("dog"), reference[:, ids("dog")]),
        (AnswerLogit("dog", "red"), reference[:, ids("dog")] - reference[:, ids("red")]),
        (AnswerLogit(7, against=9), reference[:, 7] - reference[:, 9]),
    ):
        score = target.on(model, x)
        assert score.end == "logits"
        scale = float(reference.abs().max())
        assert torch.allclose(score.of(run), expected, atol=2e-5 * scale)


@pytest.mark.parametrize("name", [NAME, "gemma3", "qwen3-vl", "paligemma"])
def test_the_answers_logit_is_linear_once_the_final_norm_is_frozen(name):
    """direction . last state + constant, with the scale of the run: Gemma's weight is 1 + w."""
    model, x = load(name)
    run = model.run(x, read=[LAST, SCALE])
    reference = Plain(name, model).run(x).logits
    for target in (AnswerLogit("dog"), AnswerLogit("dog", "red")):
        score = target.on(model, x)
        assert score.extra == (SCALE,)
        linear = score.linear(run)
        state = run[LAST][score.row, score.position].double()
        ours = (state * linear.direction).sum(-1) + linear.constant
        ids = model.tokenizer.convert_tokens_to_ids
        at = reference[score.row, score.position]
        expected = at[:, ids("dog")]
        if target.against:
            expected = expected - at[:, ids("red")]
        assert torch.allclose(ours, expected, atol=1e-4)


def test_an_unembedding_with_a_bias(llama):
    model, x, _ = llama
    unembed = model.module.lm_head
    bias = torch.randn(len(unembed.weight), generator=torch.Generator().manual_seed(0))
    unembed.bias = torch.nn.Parameter(bias)
    try:
        run = model.run(x, read=[LAST, SCALE])
        for target in (AnswerLogit(5), AnswerLogit(5, 6)):
            score = target.on(model, x)
            linear = score.linear(run)
            state = run[LAST][score.row, score.position].double()
            ours = (state * linear.direction).sum(-1) + linear.constant
            assert torch.allclose(ours, score.of(run), atol=1e-4)
    finally:
        unembed.bias = None


def test_a_bounded_logit_is_not_linear():
    """Gemma 2 bounds its logits by a tanh."""
    model, x = load("paligemma2")
    assert AnswerLogit("dog").on(model, x).linear is None


# -- which token is a word -------------------------------------------------------------------------


def fast(inner, **special):
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


def words(prepend):
    """Merges of "dog" with a mark in front, as SentencePiece has them."""
    pieces = ["<unk>", "▁", "d", "o", "g", "do", "dog", "▁dog"]
    merges = [("d", "o"), ("do", "g"), ("▁", "dog")]
    inner = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>"))
    steps = [normalizers.Replace(" ", "▁")]
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), *steps] if prepend else steps
    )
    inner.decoder = decoders.Replace("▁", " ")
    return fast(inner), pieces


def bytes_():
    """Byte pieces with a mark for the space, as GPT-2 and Qwen have them."""
    pieces = ["<unk>", "Ġ", "d", "o", "g", "do", "dog", "Ġdog"]
    merges = [("d", "o"), ("do", "g"), ("Ġ", "dog")]
    inner = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return fast(inner), pieces


@pytest.mark.parametrize(
    ("made", "token"),
    [
        (lambda: words(prepend=True), "▁dog"),  # Llama: " dog" is a lone mark, then the word
        (lambda: words(prepend=False), "▁dog"),  # Gemma
        (bytes_, "Ġdog"),  # Qwen
    ],
)
def test_a_words_token_is_the_one_with_its_space(made, token):
    """Never the lone mark of a space, which some tokenizers give first."""
    module, processor = build(NAME)
    processor.tokenizer, pieces = made()
    model = MLLM.load(module, processor=processor)
    _, x = load(NAME)
    logits = torch.arange(128.0).expand(2, x.n_pos, -1)

    class Run:
        pass

    run = Run()
    run.logits = logits
    assert AnswerLogit("dog").on(model, x).of(run).tolist() == [float(pieces.index(token))] * 2


def test_a_word_or_number_that_is_no_token(llama):
    model, x, _ = llama
    for target in (AnswerLogit("zebra"), AnswerLogit("dog", "zebra"), AnswerLogit("")):
        with pytest.raises(ValueError, match="no token for"):
            target.on(model, x)
    for number in (-1, 128):
        with pytest.raises(ValueError, match=r"0\.\.127"):
            AnswerLogit(number).on(model, x)


# -- functions -------------------------------------------------------------------------------------


def test_a_function_is_called_on_the_run(llama):
    model, x, _ = llama
    run = model.run(x, read=END)

    def norm_of_the_last(run):
        return run[END][:, -1].norm(dim=-1)

    score = Custom(norm_of_the_last, END).on(model, x)
    assert score.name == "norm_of_the_last"
    assert score.row is None
    assert score.linear is None
    reference = np.linalg.norm(run[END][:, -1].numpy().astype(np.float64), axis=-1)
    np.testing.assert_allclose(score.of(run).numpy(), reference, rtol=1e-6)
    assert score.of(run).dtype == torch.float64


@pytest.mark.parametrize(
    "wrong", [lambda run: 1.0, lambda run: torch.zeros(2), lambda run: torch.zeros(3, 1)]
)
def test_a_function_gives_one_number_a_row(llama, wrong):
    model, x, _ = llama
    with pytest.raises(ValueError, match=r"for a batch of 3 rows; one number a row"):
        Custom(wrong, END).on(model, x).of({})


def test_a_target_says_what_it_is():
    with pytest.raises(NotImplementedError):
        Target().on(None, None)
