"""Pooling patches into image tokens: means, whatever the sizes of the pictures."""

from __future__ import annotations

import pytest
import torch

from interp import MLLM
from interp.pooling import pool, pool_flat
from tests import zoo

SIZES = [(64, 64), (96, 32)]  # (width, height): 8 x 8 and 4 x 12 patches of 8 pixels


@pytest.fixture(scope="module")
def grids():
    """Patches and image tokens (2 x 2 patches each) of two pictures of different sizes."""
    model = MLLM(*zoo.build("qwen2-vl"))
    pictures = [zoo.picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    x = model.prepare(pictures, zoo.ZOO["qwen2-vl"].prompt)
    assert x.patches.shapes == ((8, 8), (4, 12))
    assert x.grid.shapes == ((4, 4), (2, 6))
    return x.patches, x.grid


def test_ones_stay_ones(grids):
    fine, coarse = grids
    ones = torch.ones(fine.n_batch, fine.n_pos, 3)
    torch.testing.assert_close(pool_flat(ones, fine, coarse), torch.ones(28, 3))


def test_a_token_has_the_mean_of_its_patches(grids):
    fine, coarse = grids
    state = torch.randn(fine.n_batch, fine.n_pos, 5, generator=torch.Generator().manual_seed(0))
    found = pool_flat(state, fine, coarse)
    assert found.shape == (28, 5)
    row, position = torch.from_numpy(fine.row), torch.from_numpy(fine.position)
    patches = state[row, position]  # in raster order, picture after picture
    for token in range(28):
        (r, c), image = coarse.cell[token], coarse.image[token]
        under = (fine.image == image) & (fine.cell // 2 == (r, c)).all(1)
        assert under.sum() == 4
        torch.testing.assert_close(found[token], patches[torch.from_numpy(under)].mean(0))


def test_pictures_of_one_size_pool_alike(grids):
    fine, coarse = grids
    with pytest.raises(ValueError, match="pictures with different grids, do not pool"):
        pool(torch.ones(1, 112, 3), fine, coarse)
