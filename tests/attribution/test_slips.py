"""Slips of a first day with head attribution: each is told, by the name of what was called."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp.attribution import (
    AnswerLogit,
    HeadTable,
    Sources,
    attribute,
    head_attribution,
    minimal_heads,
    path_attribution,
    verify_edges,
)
from interp.errors import EdgeError, TableError, Untestable

SEA = AnswerLogit("sea", against="lake")


@pytest.mark.parametrize("call", [head_attribution, attribute, minimal_heads, path_attribution])
def test_a_mistyped_option_is_told_in_the_name_of_what_was_called(call, tiny, x):
    with pytest.raises(TypeError, match=rf"{call.__name__}\(\) has no option 'source'.*sources"):
        call(tiny, x, target=SEA, source="self")


def test_a_reader_counts_once(tiny, x):
    twice = torch.tensor([0, 0])
    group = torch.zeros(2, x.n_pos, dtype=torch.int8)
    with pytest.raises(EdgeError, match="there twice, and would be counted twice"):
        Sources(("a",), twice, torch.tensor([5, 5]), group)
    with pytest.raises(EdgeError, match="a name is there twice"):
        Sources(["a", "a"], twice, torch.tensor([5, 6]), group)


def test_arrays_of_ones_own_are_sources(tiny, x):
    """NumPy arrays and a list of names are what one has."""
    last = x.n_pos - 1
    group = np.zeros((1, x.n_pos), dtype=np.int8)
    own = Sources(["all"], np.array([0]), np.array([last]), group)
    made = head_attribution(tiny, x, target=SEA, sources=own)
    whole = head_attribution(tiny, x, target=SEA, sources="whole")
    np.testing.assert_allclose(made.rows["estimate"], whole.rows["estimate"], atol=1e-9)


@pytest.mark.parametrize("word", [3.5, True, None])
def test_a_token_is_a_word_or_a_number(word, tiny, x):
    with pytest.raises(TypeError, match="neither a word nor a token's id"):
        head_attribution(tiny, x, target=AnswerLogit(word))


def test_an_answer_against_itself(tiny, x):
    with pytest.raises(ValueError, match="so the difference is 0"):
        head_attribution(tiny, x, target=AnswerLogit("sea", against="sea"))


def test_a_target_that_is_no_number(tiny, x):
    def nothing(run):
        return run.logits[:, -1, 5] * float("nan")

    with pytest.raises(Untestable, match="no number in any of the 1 images"):
        head_attribution(tiny, x, target=nothing, end="logits", dst="all", method="exact")


def test_options_that_would_be_ignored(tiny, x):
    asked = {"target": SEA, "sources": "whole"}
    with pytest.raises(ValueError, match="patch= cuts none"):
        head_attribution(tiny, x, patch=x, corrected=False, **asked)
    with pytest.raises(ValueError, match="steps=-1"):
        head_attribution(tiny, x, steps=-1, dry_run=True, **asked)
    table = head_attribution(tiny, x, target=SEA, edges=3)
    with pytest.raises(ValueError, match="n=0 edges of each image"):
        verify_edges(table, tiny, x, target=SEA, n=0)


def test_a_table_is_saved_as_parquet(tiny, x, tmp_path):
    table = head_attribution(tiny, x, target=SEA)
    with pytest.raises(TableError, match="saved as parquet"):
        table.save(tmp_path / "heads.csv")
    with pytest.raises(TableError, match="there is no folder"):
        table.save(tmp_path / "none/heads.parquet")
    table.save(tmp_path / "heads.parquet")
    assert HeadTable.load(tmp_path / "heads.parquet").n_images == 1


def test_a_recall_is_not_told_by_a_few_random_units(tiny, x):
    few = attribute(tiny, x, target=SEA, sources="whole", budget=0.1)
    assert few.about["verification"]["n_sampled"] == 3
    assert few.about["verification"]["recall"] is None
    assert "recall" not in str(few)
    more = attribute(tiny, x, target=SEA, sources="whole", budget=0.1, sample=0.4)
    assert 0 <= more.about["verification"]["recall"] <= 1
