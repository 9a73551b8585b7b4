"""What is asked: labels in every form, wrong tokens, stages, batches; what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp import MLLM
from interp.attribution.asking import ask
from interp.attribution.direct import direct
from interp.attribution.exact import exact
from interp.attribution.gradient import gradient
from interp.attribution.sources import PLACE, REGION, Sources
from interp.attribution.targets import AnswerLogit, Custom, ProbeMargin
from interp.errors import Untestable
from interp.labels import IGNORE
from interp.probes import ProbeBank
from tests.attribution.plain import near, predicted, random_bank, random_labels
from tests.zoo import ZOO, build, picture

NAME = "llava-clip-llama"
END = "blocks.2.hook_resid_post"
METHODS = {
    "direct": lambda question: direct(question).heads,
    "gradient": gradient,
    "integrated": lambda question: gradient(question, steps=2),
    "exact": lambda question: exact(question),
}


class Batches:
    """Four pictures as one batch, and as two of one and three rows."""

    def __init__(self, name):
        module, processor = build(name)
        self.model = MLLM.load(module, processor=processor)
        prompt = ZOO[name].prompt
        pictures = [picture(seed=i) for i in range(4)]
        self.whole = self.model.prepare(pictures, prompt)
        self.first = self.model.prepare(pictures[:1], prompt)
        self.rest = self.model.prepare(pictures[1:], prompt)
        self.bank = random_bank(self.model, self.whole)
        self.labels = random_labels(self.whole)
        self.n = len(self.first.grid)

    def ask(self, batch=None, labels=None, **options):
        labels = self.labels if labels is None else labels
        return ask(self.model, batch or self.whole, self.bank, labels=labels, **options)


@pytest.fixture(scope="module")
def four():
    return Batches(NAME)


# -- labels ----------------------------------------------------------------------------------------


def test_labels_in_every_form_ask_the_same(four):
    flat, n = four.labels, four.n
    two = (four.first, four.rest)
    square = flat.reshape(4, n)
    forms = [
        (four.whole, flat),
        (four.whole, square),
        (four.whole, [flat]),
        (four.whole, list(flat)),
        (four.whole, torch.tensor(flat)),
        (four.whole, flat.astype(np.uint8)),
        (two, flat),
        (two, square),
        (two, [flat[:n], flat[n:]]),
        (two, (square[:1], square[1:])),
        (list(two), [torch.tensor(flat[:n]), torch.tensor(flat[n:])]),
    ]
    found = set()
    for batch, labels in forms:
        question = four.ask(batch, labels)
        readers = [
            (part.first_image + int(row), int(position))
            for part in question.parts
            for row, position in zip(part.sources.row, part.sources.position, strict=True)
        ]
        found.add(tuple(readers))
        assert question.n_images == 4
    assert len(found) == 1


def test_wrong_tokens_are_those_that_the_probe_at_the_start_misses(four):
    """By the adapter's state and the probe's weights, one by one."""
    question = four.ask()
    grid, said = four.whole.grid, predicted(four.model, four.whole, four.bank)
    wrong = (said != four.labels) & (four.labels != IGNORE)
    (part,) = question.parts
    assert part.score.row.tolist() == grid.row[wrong].tolist()
    assert part.score.position.tolist() == grid.position[wrong].tolist()
    assert wrong.any()
    assert not wrong.all()
    run = four.model.run(four.whole, read=END)
    weight, bias = four.bank.weights[END].double(), four.bank.intercepts[END].double()
    logits = run[END].double() @ weight.T + bias
    margins = [[] for _ in range(4)]
    for token in np.flatnonzero(wrong):
        line = logits[grid.row[token], grid.position[token]]
        margins[grid.row[token]].append(float(line[four.labels[token]] - line[said[token]]))
    assert part.score.of(run).tolist() == pytest.approx([np.mean(one) for one in margins], abs=1e-5)


def test_tokens_called_wrong_at_a_later_stage(four):
    """With `start` behind block 0 it is the probe there that says what is wrong."""
    start = "blocks.0.hook_resid_post"
    question = four.ask(start=start)
    state = four.model.run(four.whole, read=start)[start].double()
    logits = state @ four.bank.weights[start].double().T + four.bank.intercepts[start].double()
    grid = four.whole.grid
    said = logits[grid.row, grid.position].argmax(-1).numpy()
    wrong = (said != four.labels) & (four.labels != IGNORE)
    assert question.parts[0].score.position.tolist() == grid.position[wrong].tolist()
    assert question.layers == range(1, 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda flat, n: flat[:-1], "63.*64 image tokens.*x.grid.labels"),
        (lambda flat, n: [flat[:n], flat[n:]], "16, 48.*64"),
        (lambda flat, n: flat.astype(float), "whole numbers, not float64"),
        (lambda flat, n: np.full(4 * n, 4), "classes are 0..3"),
        (lambda flat, n: np.full(4 * n, -1), "classes are 0..3"),
    ],
)
def test_labels_that_do_not_fit_are_refused(four, labels, message):
    with pytest.raises(ValueError, match=message):
        four.ask(labels=labels(four.labels, four.n))


def test_labels_of_batches_in_the_wrong_order_are_refused(four):
    flat, n = four.labels, four.n
    with pytest.raises(ValueError, match=r"48, 16.*16, 48"):
        four.ask((four.first, four.rest), [flat[n:], flat[:n]])


def test_nothing_wrong_is_untestable(four):
    right = predicted(four.model, four.whole, four.bank)
    for labels in (right, np.full(len(right), IGNORE)):
        with pytest.raises(Untestable, match=r"no image token is wrong at 'adapter.hook_out'"):
            four.ask(labels=labels)


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NAME, "gemma3", "qwen3-vl", "paligemma"])
@pytest.mark.parametrize("method", METHODS)
def test_several_batches_are_one_batch(name, method):
    case = Batches(name)
    one = METHODS[method](case.ask())
    several = METHODS[method](case.ask((case.first, case.rest)))
    assert one.shape == (4, 3, 6, 5)
    near(several, one, 2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_a_wrong_token_is_nan_and_spoils_no_other(four, method):
    labels = four.labels.copy()
    labels[: four.n] = predicted(four.model, four.first, four.bank)
    ours = METHODS[method](four.ask((four.first, four.rest), labels))
    assert ours[0].isnan().all()
    near(ours[1:], METHODS[method](four.ask())[1:], 2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_wrong_token_and_one_row(four, method):
    """A single reader: arrays of one."""
    said = predicted(four.model, four.first, four.bank)
    labels = said.copy()
    labels[5] = (said[5] + 1) % 4
    question = four.ask(four.first, labels)
    assert len(question.parts[0].sources) == 1
    both = np.concatenate([labels, four.labels[four.n :]])
    near(METHODS[method](question), METHODS[method](four.ask(labels=both))[:1], 2e-5)
    answer = ask(four.model, four.first, target=AnswerLogit("dog"))
    whole = ask(four.model, four.whole, target=AnswerLogit("dog"))
    near(METHODS[method](answer), METHODS[method](whole)[:1], 2e-5)


def test_methods_one_after_another_leave_the_question_as_it_was(four):
    """What one keeps for the next (masks, clean states) does not change an answer."""
    alone = {name: method(four.ask()) for name, method in METHODS.items()}
    question = four.ask()
    gradient(question, keep=True)
    for _ in range(2):
        for name in ("exact", "direct", "integrated", "gradient", "exact"):
            assert torch.equal(METHODS[name](question), alone[name]), name


# -- stages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "layers"),
    [
        ("adapter.hook_out", None, range(3)),
        ("adapter.hook_out", "blocks.0.hook_resid_post", range(1)),
        ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", range(1, 2)),
        ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post", range(2, 3)),
    ],
)
def test_layers_between_two_stages(four, start, end, layers):
    question = four.ask(start=start, end=end)
    assert question.layers == layers
    assert question.shape == (len(layers), 6, 5)
    assert question.end == (end or END)


def test_layers_without_probes_at_the_start(four):
    target = Custom(lambda run: run[END].sum((1, 2)), END)
    for start, layers in (
        ("hook_embed", range(3)),
        ("vision.blocks.1.hook_resid_post", range(3)),
        ("blocks.1.hook_resid_pre", range(1, 3)),
    ):
        question = ask(four.model, four.whole, start=start, target=target, dst="image")
        assert question.layers == layers
    assert ask(four.model, four.whole, target=AnswerLogit("dog")).end == "logits"
    assert ask(four.model, four.whole, target=AnswerLogit("dog"), end="logits").end == "logits"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": END}, ValueError, "no head lies between"),
        ({"start": "blocks.1.hook_resid_mid"}, ValueError, "a stage of the residual stream"),
        ({"start": "blocks.9.hook_resid_post"}, Exception, "blocks.9"),
        ({"end": "blocks.1.hook_mlp_out"}, (ValueError, KeyError), "blocks.1.hook_mlp_out"),
        ({"end": "logits"}, (ValueError, KeyError), "no probe at 'logits'"),
        ({"dst": "words"}, ValueError, '"queries", "image" and "all"'),
        ({"sources": "regoin"}, ValueError, "region: .*place: .*whole"),
        ({"sources": ()}, ValueError, "sources"),
        ({"sources": ("self", "image", "other regions")}, ValueError, "kinds of groups"),
        ({"target": AnswerLogit("dog"), "end": END}, ValueError, "leave end out"),
        ({"target": 5}, TypeError, "target=5"),
        ({"target": lambda run: 0}, ValueError, 'end="logits"'),
        ({"target": [AnswerLogit("dog")] * 2}, ValueError, "2 targets for 1 batch"),
    ],
)
def test_options_that_make_no_question(four, options, error, message):
    with pytest.raises(error, match=message):
        four.ask(**options)


def test_what_a_question_needs(four):
    model, x, bank = four.model, four.whole, four.bank
    with pytest.raises(ValueError, match=r"labels=x.grid.labels"):
        ask(model, x, bank)
    with pytest.raises(ValueError, match=r"labels=x.grid.labels"):
        ask(model, x, labels=four.labels)
    with pytest.raises(ValueError, match='sources="place" does not'):
        ask(model, x, target=AnswerLogit("dog"), sources="region")
    with pytest.raises(ValueError, match='dst="image" or dst="all"'):
        ask(model, x, target=Custom(lambda run: run[END].sum((1, 2)), END))
    for batch in ([], "picture", [x, "picture"]):
        with pytest.raises(TypeError, match=r"model.prepare"):
            ask(model, batch, bank, labels=four.labels)
    two = model.prepare([[picture(), picture(seed=1)]], f"{ZOO[NAME].prompt} <image>")
    with pytest.raises(ValueError, match="2 pictures in 1 rows"):
        ask(model, two, bank, labels=four.labels[: 2 * four.n])


def test_default_groups_fit_the_readers(four):
    assert four.ask().groups == REGION
    assert ask(four.model, four.whole, target=AnswerLogit("dog")).groups == PLACE
    assert four.ask(target=AnswerLogit("dog")).groups == PLACE
    assert four.ask(sources="self").groups == ("self",)
    assert four.ask(sources=("self", "text and BOS")).groups == ("self", "text and BOS")
    assert four.ask(sources="whole").groups == ("all",)


def test_ready_made_sources_say_who_reads(four):
    row, position = torch.tensor([0, 3]), torch.tensor([4, 9])
    group = torch.zeros(2, four.whole.n_pos, dtype=torch.int8)
    question = four.ask(sources=Sources(("some",), row, position, group))
    assert question.groups == ("some",)
    ours = exact(question)
    assert (ours[1:3] == 0).all()  # nobody reads there
    assert float(ours[[0, 3]].abs().max()) > 0
    short = Sources(("some",), row, position, group[:, :-1])
    with pytest.raises(ValueError, match="positions"):
        four.ask(sources=short)
    with pytest.raises(ValueError, match="2 Sources for 1 batch"):
        four.ask(sources=[Sources(("some",), row, position, group)] * 2)


def test_margins_of_several_batches_are_given_one_by_one(four):
    n = four.n
    wrong = np.zeros(4 * n, dtype=bool)
    wrong[[3, n + 2, 2 * n, 4 * n - 1]] = True
    true, confused = np.zeros(4 * n, dtype=int), np.ones(4 * n, dtype=int)
    made = [
        ProbeMargin(four.bank, END, wrong[at], true[at], confused[at])
        for at in (slice(None), slice(n), slice(n, None))
    ]
    options = {"sources": "place"}
    one = gradient(ask(four.model, four.whole, target=made[0], **options))
    two = gradient(ask(four.model, (four.first, four.rest), target=made[1:], **options))
    near(two, one, 2e-5)
    with pytest.raises(ValueError, match="one a batch"):
        ask(four.model, (four.first, four.rest), target=made[1], **options)
    with pytest.raises(ValueError, match=r"tokens \[16\] for a batch of 64"):
        ask(four.model, four.whole, target=made[1], **options)


def test_what_was_asked_is_said_in_words(four):
    about = four.ask(start="blocks.0.hook_resid_post").about()
    assert about["start"] == "blocks.0.hook_resid_post"
    assert about["end"] == END
    assert about["n_images"] == 4
    assert about["groups"] == list(REGION)
    assert "LlavaForConditionalGeneration" in about["model"]
    assert END in about["target"]


# -- pictures of different sizes -------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2-vl", "llava-next", "internvl"])
def test_pictures_of_different_sizes_go_together(family):
    """A batch of two gives for each what it gives alone: verdicts, readers, estimates."""
    module, processor = build(family)
    model = MLLM.load(module, processor=processor)
    pictures = [picture(40, 32), picture(96, 64, 1)]
    both = model.prepare(pictures, ZOO[family].prompt)
    assert not both.grid.uniform
    stages = ["adapter.hook_out", "blocks.1.hook_resid_post"]
    labels, states = [], {stage: [] for stage in stages}
    for one in pictures:
        x = model.prepare(one, ZOO[family].prompt)
        run = model.run(x, read=stages, logits=False)
        for stage in stages:
            states[stage].append(run.tokens(stage).flatten(0, 1))
        random = np.random.default_rng(len(labels))
        labels.append(random.integers(0, 3, len(x.grid)))
    flat = torch.from_numpy(np.concatenate(labels))
    shifted = (flat + torch.arange(len(flat)) % 2) % 3
    bank = ProbeBank.fit({s: torch.cat(v) for s, v in states.items()}, shifted, list("abc"))
    asked = {"start": stages[0], "end": stages[1]}
    together = gradient(ask(model, both, bank, labels=np.concatenate(labels), **asked))
    for number, one in enumerate(pictures):
        x = model.prepare(one, ZOO[family].prompt)
        alone = gradient(ask(model, x, bank, labels=labels[number], **asked))
        torch.testing.assert_close(together[number], alone[0], rtol=1e-4, atol=1e-5)
