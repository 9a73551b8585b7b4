"""Source groups against a walk over readers, positions and cells, one at a time."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch

from interp import MLLM
from interp.attribution.asking import ask
from interp.attribution.sources import PLACE, REGION, WHOLE, Sources, by_place, by_region, whole
from interp.attribution.targets import AnswerLogit
from interp.errors import EdgeError
from interp.labels import IGNORE
from tests.attribution.plain import Case, load, predicted, random_bank, random_labels
from tests.zoo import ZOO, build, picture


@pytest.fixture(scope="module", params=list(ZOO))
def case(request):
    """(model, batch, labels in patches of few classes, which tokens are right)."""
    model, x = load(request.param)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, len(x.grid))  # two classes: regions of several tokens
    labels[rng.random(len(labels)) < 0.1] = IGNORE
    # a region that ends with the last token, beside newlines where there are some
    labels[-min(12, len(labels) // 4) :] = 0
    right = rng.random(len(labels)) < 0.5
    return model, x, labels, right & (labels != IGNORE)


def connected(grid, labels, a, b):
    """Whether a walk from token a to b over sides of cells keeps to one label."""
    if labels[a] == IGNORE or labels[a] != labels[b] or grid.view[a] != grid.view[b]:
        return False
    there = {tuple(grid.cell[t]): t for t in np.flatnonzero(grid.view == grid.view[a])}
    seen, todo = {tuple(grid.cell[a])}, deque([tuple(grid.cell[a])])
    while todo:
        row, col = todo.popleft()
        for step in ((row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)):
            token = there.get(step)
            if token is not None and step not in seen and labels[token] == labels[a]:
                seen.add(step)
                todo.append(step)
    return tuple(grid.cell[b]) in seen


def token_of(grid):
    """{(row, position): token}"""
    return {(int(r), int(p)): t for t, (r, p) in enumerate(zip(grid.row, grid.position))}


def test_regions_token_by_token(case):
    """Same region right and wrong, other image tokens, words, the reader itself."""
    model, x, labels, right = case
    grid, tokens = x.grid, token_of(x.grid)
    image_id = model.config.image_token_id
    ids = x.tensors["input_ids"]
    rng = np.random.default_rng(1)
    readers = np.append(rng.choice(len(grid) - 1, min(9, len(grid) - 1), False), len(grid) - 1)
    row, position = torch.as_tensor(grid.row[readers]), torch.as_tensor(grid.position[readers])
    ours = by_region(x, row, position, labels, right)
    assert ours.names == REGION
    for n, reader in enumerate(readers):
        for src in range(x.n_pos):
            token = tokens.get((int(row[n]), src))
            if src == int(position[n]):
                name = "self"
            elif token is not None and connected(grid, labels, reader, token):
                name = "same-region correct" if right[token] else "same-region wrong"
            elif token is not None or ids[row[n], src] == image_id:  # newlines between rows, say
                name = "other regions"
            else:
                name = "text and BOS"
            assert REGION[ours.group[n, src]] == name, (reader, src)
    assert {REGION[i] for i in ours.group.unique().tolist()} == set(REGION)


def test_places_position_by_position(case):
    model, x, _, _ = case
    attended = x.tensors["attention_mask"].bool()
    row, position = attended.nonzero(as_tuple=True)
    ours = by_place(x, row, position)
    ids, image_id = x.tensors["input_ids"], model.config.image_token_id
    for n in range(len(row)):
        first = int(attended[row[n]].nonzero()[0])
        for src in range(x.n_pos):
            if src == int(position[n]):
                name = "self"
            elif src == first:
                name = "first token"
            else:
                name = "image" if ids[row[n], src] == image_id else "text"
            assert PLACE[ours.group[n, src]] == name


@pytest.mark.parametrize("name", ["llava-clip-llama", "qwen2-vl", "gemma3", "smolvlm"])
def test_the_first_token_behind_padding_on_the_left(name):
    module, processor = build(name)
    model, prompt = MLLM.load(module, processor=processor), ZOO[name].prompt
    processor.tokenizer.padding_side = "left"
    x = model.prepare([picture(), picture(seed=1)], [prompt, f"{prompt} a red dog"])
    attended = x.tensors["attention_mask"]
    assert not attended[0, 0]
    ours = by_place(x, torch.tensor([0]), torch.tensor([x.n_pos - 1]))
    first = (ours.group[0] == PLACE.index("first token")).nonzero()[:, 0]
    assert first.tolist() == [int(attended[0].argmax())]


def test_whole_has_one_group_with_everything():
    _, x = load("llava-clip-llama")
    ours = whole(x, torch.tensor([0, 1]), torch.tensor([3, 4]))
    assert ours.names == WHOLE
    assert ours.group.tolist() == [[0] * x.n_pos] * 2


def test_some_groups_leave_the_others_out():
    _, x = load("llava-clip-llama")
    row, position = torch.tensor([0, 1]), torch.tensor([3, 20])
    everything = by_place(x, row, position)
    ours = everything.only(["self", "image"])
    assert ours.names == ("self", "image")
    for n in range(2):
        for src in range(x.n_pos):
            name = PLACE[everything.group[n, src]]
            assert ours.group[n, src] == {"self": 0, "image": 1}.get(name, -1)
            assert ours.is_in[n, src].tolist() == [name == "self", name == "image"]
    with pytest.raises(EdgeError, match=r"no source group 'imge'.*image"):
        everything.only(["imge"])


def test_edges_of_a_group_are_those_that_are_visible():
    _, x = load("llava-clip-llama")
    row, position = torch.tensor([0, 1, 1]), torch.tensor([6, 2, 20])
    sources = by_place(x, row, position)
    visible = torch.rand(3, x.n_pos, generator=torch.Generator().manual_seed(0)) < 0.5
    edges = sources.edges(0, visible, len(x))
    by_hand = {
        (int(row[n]), src, int(position[n]))
        for n in range(3)
        for src in range(x.n_pos)
        if visible[n, src] and sources.group[n, src] == 0
    }
    assert set(zip(edges.row.tolist(), edges.src.tolist(), edges.dst.tolist())) == by_hand
    assert len(edges) == len(by_hand) > 10


def test_what_the_default_question_reads_from():
    """Readers are the wrong tokens, "right" is what the probe at the start says."""
    case = Case("llava-clip-llama")
    ours = case.ask().parts[0].sources
    said = predicted(case.model, case.x, case.bank)
    right = (said == case.labels) & (case.labels != IGNORE)
    assert ours.row.tolist() == case.asked.row.tolist()
    assert ours.position.tolist() == case.asked.position.tolist()
    tokens = token_of(case.x.grid)
    for n in range(len(ours)):
        reader = tokens[int(ours.row[n]), int(ours.position[n])]
        for src in range(case.x.n_pos):
            token = tokens.get((int(ours.row[n]), src))
            if token is None or token == reader:
                continue
            same = connected(case.x.grid, case.labels, reader, token)
            name = "other regions"
            if same:
                name = "same-region correct" if right[token] else "same-region wrong"
            assert REGION[ours.group[n, src]] == name


def test_dst_says_who_reads():
    case = Case("llava-clip-llama")
    ids, attended = case.x.tensors["input_ids"], case.x.tensors["attention_mask"].bool()
    image = (ids == case.model.config.image_token_id).nonzero().tolist()
    for dst, by_hand in (("image", image), ("all", attended.nonzero().tolist())):
        ours = case.ask(dst=dst, sources="place").parts[0].sources
        assert torch.stack([ours.row, ours.position], 1).tolist() == by_hand


def test_words_have_no_region():
    model, x = load("llava-clip-llama")
    bank, labels = random_bank(model, x), random_labels(x)
    options = {"labels": labels, "target": AnswerLogit("dog")}
    with pytest.raises(EdgeError, match='sources="place"'):
        ask(model, x, bank, **options, sources="region")
    assert ask(model, x, bank, **options).groups == PLACE
    assert ask(model, x, bank, **options, dst="image").groups == REGION


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (torch.zeros(3, 8, dtype=torch.int8), "one row, position and line"),
        (torch.zeros(2, dtype=torch.int8), "one row, position and line"),
        (torch.full((2, 8), 2, dtype=torch.int8), "0..1"),
        (torch.full((2, 8), -2, dtype=torch.int8), "-1 .none."),
    ],
)
def test_arrays_that_do_not_fit_are_refused(group, message):
    with pytest.raises(EdgeError, match=message):
        Sources(("a", "b"), torch.tensor([0, 1]), torch.tensor([3, 4]), group)
