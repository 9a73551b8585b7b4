"""Splits: labels, regions and visibility against slow and plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp import Unmask
from interp.datasets import scenes
from interp.probes.fitting import Fitting
from interp.probes.ridge import fit_ridge
from interp.probes.stream import Held
from interp.studies.split import Split


def test_labels_are_the_majority_of_each_cell(splits):
    _, test = splits
    for image in (0, 5):
        mask = scenes("test")[image].mask
        for token in (0, 37, 99):
            r, c = divmod(token, 10)
            cell = mask[8 * r : 8 * r + 8, 8 * c : 8 * c + 8]
            counts = np.bincount(cell.ravel(), minlength=10)
            assert counts[test.labels[image, token]] == counts.max()
            assert test.purity[image, token] == counts.max() / 64


def test_regions_are_connected_and_of_one_class(splits):
    _, test = splits
    labels = test.labels[3].reshape(10, 10)
    regions = test.regions[3].reshape(10, 10)
    for r, c in np.ndindex(10, 9):
        same_class = labels[r, c] == labels[r, c + 1]
        assert (regions[r, c] == regions[r, c + 1]) == same_class
    for region in np.unique(regions):
        assert len(np.unique(labels[regions == region])) == 1


def test_visible_is_strictly_causal_in_a_causal_model(splits):
    _, test = splits
    before = np.tril(np.ones((test.n_tokens, test.n_tokens), dtype=bool), -1)
    assert (test.visible == before).all()


def test_read_joins_batches_in_order(splits, tiny):
    _, test = splits
    states = test.read(["adapter.hook_out"])["adapter.hook_out"]
    x = tiny.prepare(scenes("test")[9].image, "What is in the picture?")
    alone = tiny.run(x, read="adapter.hook_out").tokens("adapter.hook_out")[0]
    assert (states[9] - alone).abs().max() < 1e-5


def test_probes_under_edits_are_fitted_on_edited_states(splits, tiny):
    _, test = splits
    end, ridge = "blocks.4.hook_resid_post", Fitting("ridge", alphas=(0.01,))

    def opened(number: int) -> list[Unmask]:
        return [Unmask(test.batches[number].grid.image_block())]

    states = [
        tiny.run(x, *opened(number), read=end, logits=False).tokens(end).flatten(0, 1)
        for number, x in enumerate(test.batches)
    ]
    labels = torch.from_numpy(test.labels.ravel())
    stream = Held({end: torch.cat(states)}, labels, test.classes, tokens_a_part=800)
    by_hand = fit_ridge(stream, alphas=[0.01]).bank.weight(end)
    scale = by_hand.abs().max()
    refitted = test.fit([end], opened, fitting=ridge).weight(end)
    assert (refitted - by_hand).abs().max() < 1e-4 * scale
    plain = test.fit([end], fitting=ridge).weight(end)
    assert (plain - by_hand).abs().max() > 0.05 * scale


def test_more_images_than_there_are(tiny):
    with pytest.raises(ValueError, match="which has 1000"):
        Split.prepare(tiny, scenes("test"), 1001, "?")
