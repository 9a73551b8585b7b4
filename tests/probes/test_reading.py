"""A dataset as a stream of image tokens: the same states, labels and order as by hand."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from interp import MLLM, Unmask
from interp.datasets import scenes
from interp.datasets.scenes import CLASSES
from interp.labels import IGNORE
from interp.probes.groups import token_groups
from interp.probes.parts import QUESTION, DataParts, Part, ahead
from interp.probes.reading import NOISE, ModelStream
from interp.probes.readout import Readout
from interp.probes.ridge import fit_ridge
from interp.probes.scores import Scores
from interp.probes.scoring import bank_rows, score
from tests import zoo

STAGES = ["adapter.hook_out", "blocks.2.hook_resid_post"]


def test_features_and_labels_are_those_of_a_plain_run(tiny):
    data = scenes("test", 5)
    stream = ModelStream(tiny, DataParts(tiny, data, batch_size=2), STAGES)
    assert stream.n_parts == 3
    assert [len(part.names) for part in stream.source.parts(range(3))] == [2, 2, 1]
    assert stream.widths == {"adapter.hook_out": 96, "blocks.2.hook_resid_post": 96}
    assert stream.classes == CLASSES
    for part, tokens in stream.read([2, 0]):
        samples = [data[i] for i in range(2 * part, min(2 * part + 2, 5))]
        x = tiny.prepare([s.image for s in samples], QUESTION)
        run = tiny.run(x, read=STAGES)
        for stage in STAGES:
            assert torch.equal(tokens.features[stage], run.tokens(stage).flatten(0, 1))
        assert tokens.labels.tolist() == x.grid.labels([s.mask for s in samples], 10).tolist()
        assert tokens.shares is None
    assert [part for part, _ in stream.labels([1, 2])] == [1, 2]


def test_soft_labels_are_shares_of_classes(tiny):
    data = scenes("test", 2)
    stream = ModelStream(tiny, DataParts(tiny, data, batch_size=2), STAGES, soft=True)
    ((_, tokens),) = stream.labels([0])
    by_hand = np.concatenate(
        [np.eye(10)[s.mask].reshape(10, 8, 10, 8, 10).mean((1, 3)).reshape(100, 10) for s in data]
    )
    np.testing.assert_allclose(tokens.shares, by_hand, atol=1e-6)


def test_shuffling_is_an_order_of_the_seed_alone(tiny):
    data = scenes("test", 12)

    def names(batch_size: int, seed: int) -> list[str]:
        made = DataParts(tiny, data, batch_size=batch_size, shuffle=True, seed=seed)
        return [name for part in made.parts(range(made.n_parts)) for name in part.names]

    assert names(5, 1) == names(3, 1) != names(5, 2)
    assert sorted(names(5, 1)) == sorted(s.name for s in data) != names(5, 1)


def test_edits_are_in_force(tiny):
    data = scenes("test", 2)
    opened = ModelStream(
        tiny, DataParts(tiny, data), STAGES, edits=lambda part: [Unmask(part.x.grid.image_block())]
    )
    x = tiny.prepare([s.image for s in data], QUESTION)
    run = tiny.run(x, Unmask(x.grid.image_block()), read=STAGES)
    ((_, tokens),) = opened.read([0])
    assert torch.equal(tokens.features[STAGES[1]], run.tokens(STAGES[1]).flatten(0, 1))


def test_noise_is_the_same_in_every_pass_and_differs_between_parts(tiny):
    stream = ModelStream(tiny, DataParts(tiny, scenes("test", 4), batch_size=2), STAGES, noise=True)
    name = f"{NOISE}96"
    assert list(stream.widths) == [*STAGES, name]
    first, again = (dict(stream.read([0, 1])) for _ in range(2))
    for part in (0, 1):
        assert torch.equal(first[part].features[name], again[part].features[name])
    drawn = first[0].features[name]
    assert not torch.equal(drawn, first[1].features[name])
    assert abs(float(drawn.mean())) < 0.05
    assert abs(float(drawn.std()) - 1) < 0.05


def test_a_projection_is_a_stage_times_a_matrix(tiny):
    matrix = torch.randn(96, 7, generator=torch.Generator().manual_seed(0))
    made = {"squeezed": (STAGES[1], matrix)}
    stream = ModelStream(tiny, DataParts(tiny, scenes("test", 2)), STAGES, projections=made)
    assert stream.widths == {STAGES[0]: 96, STAGES[1]: 96, "squeezed": 7}
    ((_, tokens),) = stream.read([0])
    by_hand = tokens.features[STAGES[1]].double() @ matrix.double()
    torch.testing.assert_close(tokens.features["squeezed"].double(), by_hand, atol=1e-4, rtol=1e-5)


class Drawn:
    """Pictures of two sizes with a mask that tells left from right."""

    name, split, classes, colors = "drawn", "all", ("left", "right"), ((0, 0, 0), (9, 9, 9))

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int):
        size = [(64, 48), (32, 64), (64, 48)][index]
        mask = np.tile(np.arange(size[0]) >= size[0] // 2, (size[1], 1)).astype(np.int64)
        mask[:4] = IGNORE
        return type("Sample", (), {
            "image": zoo.picture(*size, seed=index), "mask": mask, "name": f"{index}",
        })  # fmt: skip


@pytest.mark.parametrize("name", ["qwen2-vl", "llava-next", "internvl"])
def test_pictures_with_different_grids_are_read_one_after_the_other(name):
    model = MLLM(*zoo.build(name))
    question = zoo.ZOO[name].prompt
    stages = ["vision.blocks.1.hook_resid_post", "adapter.hook_out", "blocks.1.hook_resid_post"]
    batched, single = (
        ModelStream(model, DataParts(model, Drawn(), question=question, batch_size=n), stages)
        for n in (3, 1)
    )
    together = dict(batched.read([0]))[0]
    alone = [tokens for _, tokens in single.read(range(3))]
    assert torch.equal(together.labels, torch.cat([t.labels for t in alone]))
    assert {0, 1} <= set(together.labels.tolist())
    for stage in stages:
        one = torch.cat([t.features[stage] for t in alone])
        torch.testing.assert_close(together.features[stage], one, atol=2e-5, rtol=1e-4)


def test_of_a_picture_in_tiles_only_the_finest_look_has_labels():
    model = MLLM(*zoo.build("llava-next"))
    question, samples = zoo.ZOO["llava-next"].prompt, [Drawn()[0], Drawn()[1]]
    whole = model.prepare([s.image for s in samples], question).grid
    part = Part.of(0, model, samples, question, 2)
    # a picture is looked at as 4 x 4 tokens, then in tiles of as many each, padding cut off
    assert [whole.view_names[v] for v in (0, 2)] == ["base", "base"]
    tiles = sum(whole.counts) - 2 * 16
    assert tiles > 2 * 16
    assert len(part.labels) == len(part.purity) == len(part.shares) == tiles
    assert part.x.grid.view_names == ("tiles", "tiles")
    ((_, tokens),) = ModelStream(
        model, DataParts(model, Drawn(), 2, question=question), "blocks.1.hook_resid_post"
    ).read([0])
    assert len(tokens.features["blocks.1.hook_resid_post"]) == len(tokens) == tiles


class Specked:
    """Scenes with a few pixels of another class in the midst of every seventh token.

    In the scenes themselves a mixed token lies beside one of another class, always.
    """

    name, split, classes = "specked", "all", CLASSES

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        sample = scenes("test")[index]
        mask = sample.mask.copy()
        for token in range(index, 100, 7):
            row, col = divmod(token, 10)
            mask[8 * row + 3 : 8 * row + 5, 8 * col + 3] += 1
        return type("Sample", (), {
            "image": sample.image, "mask": mask % 10, "name": f"{index}",
        })  # fmt: skip


def test_mixed_tokens_are_scored_as_boundaries(tiny):
    data = Specked()
    stream = ModelStream(tiny, DataParts(tiny, data, batch_size=2), STAGES[:1])
    bank = fit_ridge(stream, alphas=[1.0]).bank
    scores = Scores(bank.stages, CLASSES)
    score(stream, bank_rows(bank), [scores])
    masks = np.stack([s.mask for s in (data[i] for i in range(4))])
    cells = masks.reshape(4, 10, 8, 10, 8).swapaxes(2, 3).reshape(400, 64)
    counts = np.stack([np.bincount(cell, minlength=10) for cell in cells])
    labels, purity = counts.argmax(1), counts.max(1) / 64
    grid = tiny.prepare([data[i].image for i in range(4)], QUESTION).grid
    boundary = token_groups(grid, labels, purity)["boundary"].sum()
    assert boundary > token_groups(grid, labels)["boundary"].sum() + 10
    n = scores.table().query("metric == 'accuracy'").set_index("group")["n"]
    assert n["boundary"] == boundary
    assert n["interior"] == 400 - boundary


def test_too_many_pictures_are_refused(tiny):
    with pytest.raises(ValueError, match="13 pictures asked of scenes, which has 12"):
        DataParts(tiny, scenes("test", 12), 13)
    with pytest.raises(ValueError, match="in batches of 0"):
        DataParts(tiny, scenes("test", 12), batch_size=0)


def test_ahead_is_ordered_bounded_and_raises_where_it_is_asked():
    made: list[int] = []

    def make(n: int) -> int:
        made.append(n)
        if n == 3:
            raise RuntimeError("three")
        return n

    found = ahead(make, range(100))
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="three"):
        next(found)
    assert len(made) < 8
    before = threading.active_count()
    stopped = ahead(make, iter(range(4, 50)))
    next(stopped)
    stopped.close()
    assert threading.active_count() <= before


def test_no_two_threads_prepare_at_once(tiny, monkeypatch):
    """A tokenizer must not be used by two; scoring a stream that nobody has read yet."""
    busy, most, plain = [], [], Part.of

    def of(*arguments):
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.05)  # long enough for another thread to come in, if one may
        try:
            return plain(*arguments)
        finally:
            busy.pop()

    monkeypatch.setattr(Part, "of", of)
    stream = ModelStream(tiny, DataParts(tiny, scenes("test", 4), batch_size=1), STAGES)
    width = {stage: torch.zeros(10, 96) for stage in STAGES}
    nothing = {stage: torch.zeros(10) for stage in STAGES}
    readout = Readout(tuple(STAGES), CLASSES, width, nothing)
    score(stream, {stage: (stage, readout) for stage in STAGES}, [])
    assert len(most) == 5  # four parts, and the first for its widths
    assert max(most) == 1
