"""Places of a prompt by name, against the tokens themselves, and the edges between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp import Knockout
from interp.errors import EdgeError
from interp.families import family_of
from interp.inputs import prepare
from tests.conftest import IMAGE_TOKEN, random_inputs
from tests.zoo import ZOO, build, picture


@pytest.fixture(scope="module")
def bundled(tiny, scene):
    """Two rows for the bundled model, the first with one picture and a longer question."""
    return tiny.prepare([scene.image] * 2, ["What is in the picture?", "What is ?"])


def as_dict(edges) -> dict[int, set[tuple[int, int]]]:
    return {row: {(s, d) for r, s, d in edges if r == row} for row in range(edges.n_batch)}


def test_places_of_a_padded_batch_are_what_the_tokens_say(bundled, tiny):
    ids, attended = (bundled.tensors[n].numpy() for n in ("input_ids", "attention_mask"))
    assert not attended.all()
    for row in range(2):
        real = [p for p in range(bundled.n_pos) if attended[row, p]]
        image = [p for p in real if ids[row, p] == tiny.config.image_token_id]
        expected = {
            "all": real,
            "first": real[:1],
            "last": real[-1:],
            "image": image,
            "text": [p for p in real if p not in image],
            "bos": [p for p in real if tiny.processor.tokenizer.decode([ids[row, p]]) == "<s>"],
        }
        for name, positions in expected.items():
            assert np.flatnonzero(bundled.places(name)[row]).tolist() == positions, name
        assert len(expected["bos"]) == 1


def test_bos_is_the_tokenizers_token_wherever_it_stands():
    """PaliGemma has it behind the picture, and the others' configurations may not know it."""
    where = {}
    for name in ("paligemma", "llava-clip-qwen2", "qwen3-vl", "llava-clip-llama"):
        module, processor = build(name)
        x = prepare(family_of(module), module.config, processor, picture(), TEXT[name])
        (where[name],) = x.is_bos.nonzero()[1]
        assert x.tensors["input_ids"][0, where[name]] == 2
    assert where["paligemma"] > 0
    assert [where[n] for n in where if n != "paligemma"] == [0, 0, 0]


TEXT = {name: ZOO[name].prompt for name in ZOO}


def test_prompt_without_bos_says_so(rx):
    with pytest.raises(EdgeError, match=r"row 0 has no BOS token .id 1.; 'first' is the first"):
        rx.edges(src="bos", dst="image")


@pytest.mark.parametrize(
    ("src", "dst"), [("image", "last"), ("first", "image"), ("text", "image"), ("all", "all")]
)
def test_edges_join_all_pairs_of_a_row(rand, src, dst):
    x = random_inputs(rand, 2, padding=3)
    edges = as_dict(x.edges(src=src, dst=dst))
    for row in range(2):
        keys, queries = (np.flatnonzero(x.places(name)[row]).tolist() for name in (src, dst))
        assert edges[row] == {(s, d) for s in keys for d in queries}
        assert edges[row]


def test_places_combine_and_come_from_tokens_positions_and_arrays(rx2):
    x = rx2
    tokens = x.grid.at((0, 0)) | x.grid.at((3, 3), image=1)
    assert as_dict(x.edges(src=tokens, dst="last")) == {0: {(2, 23)}, 1: {(5, 23), (20, 23)}}
    assert as_dict(x.edges(src=[2, 6], dst=7)) == {key: {(2, 7), (6, 7)} for key in (0, 1)}
    words = torch.tensor(x.is_text & ~x.is_first)
    both = as_dict(x.edges(src=words, dst=23))
    assert both == {
        row: {(p, 23) for p in np.flatnonzero(x.is_text[row])[1:].tolist()} for row in (0, 1)
    }
    assert x.edges(src=x.is_image, dst=x.grid.image >= 0) == x.grid.image_block()


def test_edges_run_from_one_picture_to_the_next():
    module, processor = build("llava-clip-llama")
    x = prepare(
        family_of(module),
        module.config,
        processor,
        [[picture(), picture(seed=1)]],
        "<bos> <image> <image> what is in the picture ?",
    )
    first, second = (x.grid.position[x.grid.of_image(i)].tolist() for i in (0, 1))
    edges = x.edges(src=x.grid.image == 0, dst=x.grid.image == 1)
    assert as_dict(edges)[0] == {(s, d) for s in first for d in second}
    assert edges.causal() == edges
    assert not len(edges & x.grid.image_block())


def test_cutting_edges_by_name_is_cutting_them_in_the_model(rand):
    """What the last position reads from the picture, gone from the pattern; all else is open."""
    x = random_inputs(rand, 2, padding=3)
    cut = rand.run(x, Knockout(x.edges(src="image", dst="last")), read="blocks.*.attn.hook_pattern")
    for pattern in cut.states.values():
        ids = x.tensors["input_ids"]
        for row in range(2):
            at_last = pattern[row, :, -1]
            assert (at_last[:, ids[row] == IMAGE_TOKEN] == 0).all()
            words = (ids[row] != IMAGE_TOKEN) & (x.tensors["attention_mask"][row] == 1)
            assert (at_last[:, words] > 0).all()


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("image_tokens", "no place 'image_tokens' in a prompt; .*There are image, text, bos,"),
        ("lasst", "did you mean last"),
        (21, r"no position 21: rows of this batch have 0\.\.20"),
        ([0, -1], "no position -1"),
        ([0.5], r"bools \[1, 21\] over positions or \[16\] over image tokens, not float64 \[1\]"),
        (np.ones(21, bool), r"not bool \[21\]"),
        (np.ones((2, 21), bool), r"not bool \[2, 21\]"),
    ],
)
def test_place_that_a_prompt_does_not_have_is_refused(rx, which, says):
    with pytest.raises(EdgeError, match=says):
        rx.edges(src=which, dst="last")
