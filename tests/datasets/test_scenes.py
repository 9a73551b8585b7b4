"""The scenes keep their promises: what is drawn, what is random, what never leaks."""

import importlib

import numpy as np
import pytest

from interp.datasets.scenes import CELL, CLASSES, COLORS, GRID, SIBLINGS, SIZE, SPLITS, scenes

# By its full name: the package exports the function `scenes`, which hides the module.
module = importlib.import_module("interp.datasets.scenes")
SAMPLE = [scene for split in SPLITS for scene in scenes(split, n=40)]


def cells(array: np.ndarray) -> np.ndarray:
    """[80, 80] -> [10, 10, 64], the pixels of each patch."""
    return array.reshape(GRID, CELL, GRID, CELL).transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)


def test_names_fit_together():
    assert len(CLASSES) == len(set(CLASSES)) == len(COLORS) == 10
    assert [k for pair in SIBLINGS for k in pair] == list(range(10))
    assert {split: len(scenes(split)) for split in SPLITS} == SPLITS


def test_shapes_and_types():
    scene = scenes("test")[17]
    assert scene.name == "test/17"
    assert scene.image.size == (SIZE, SIZE)
    assert scene.image.mode == "RGB"
    assert scene.mask.shape == scene.regions.shape == (SIZE, SIZE)
    assert scene.mask.dtype == scene.regions.dtype == np.uint8
    assert scene.marks.shape == (GRID, GRID)
    assert scene.marks.dtype == bool


def test_a_scene_depends_on_its_split_and_index_alone():
    again = scenes("probe")[5]
    assert np.array_equal(again.image, scenes("probe", n=6)[-1].image)
    assert np.array_equal(again.image, scenes("probe")[3:9][2].image)
    assert again.name == scenes("probe")[3:9][2].name == "probe/5"
    assert not np.array_equal(again.image, scenes("test")[5].image)


def test_every_scene_has_a_sibling_pair_and_three_to_five_regions():
    for scene in SAMPLE:
        present = set(np.unique(scene.mask).tolist())
        n = int(scene.regions.max()) + 1
        assert 3 <= n == len(present) <= 5, scene.name
        assert any(set(pair) <= present for pair in SIBLINGS), scene.name


def test_a_region_has_one_class_and_at_least_one_mark():
    for scene in SAMPLE:
        marked = scene.marks.repeat(CELL, 0).repeat(CELL, 1)
        for region in range(scene.regions.max() + 1):
            assert len(np.unique(scene.mask[scene.regions == region])) == 1
            assert (marked & (scene.regions == region)).any(), scene.name


def test_marks_lie_in_pure_cells_and_are_dark():
    for scene in SAMPLE:
        ids = cells(scene.regions)[scene.marks]
        assert (ids == ids[:, :1]).all()
        darkest = cells(np.asarray(scene.image).max(-1)).min(-1)
        assert (darkest[scene.marks] < 60).all()
        # No other patch holds ink: a class is written only where `marks` says so.
        assert (darkest[~scene.marks] > 60).all(), scene.name


def test_marks_are_sparse_and_spread_over_the_region():
    shares, places = [], []
    for scene in scenes("train", n=300):
        for region in range(scene.regions.max() + 1):
            pure = (cells(scene.regions) == region).all(-1)
            shares.append(scene.marks[pure].mean())
            order = np.flatnonzero(pure)
            if len(order) >= 20:
                places.extend(
                    np.searchsorted(order, np.flatnonzero(pure & scene.marks)) / len(order)
                )
    assert 0.13 < np.mean(shares) < 0.17
    assert 0.45 < np.mean(places) < 0.53  # neither in the region's upper part nor its lower


def test_the_splits_share_no_digit_sample():
    seen = [{x.tobytes() for digit in module._digits(split) for x in digit} for split in SPLITS]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert all(len(digit) >= 20 for split in SPLITS for digit in module._digits(split))


def test_siblings_differ_in_nothing_but_tint_and_marks():
    """The colours of unmarked pixels do not tell siblings apart on average."""
    sums = np.zeros((10, 3))
    counts = np.zeros(10)
    for scene in scenes("train", n=600):
        bare = ~scene.marks.repeat(CELL, 0).repeat(CELL, 1)
        pixels, mask = np.asarray(scene.image)[bare], scene.mask[bare]
        counts += np.bincount(mask, minlength=10)
        for channel in range(3):
            sums[:, channel] += np.bincount(mask, pixels[:, channel], minlength=10)
    mean = sums / counts[:, None]
    siblings = np.abs(mean[0::2] - mean[1::2]).max()
    pairs = (mean[0::2] + mean[1::2]) / 2
    strangers = min(np.abs(pairs[i] - pairs[j]).max() for i in range(5) for j in range(i))
    assert siblings < 9
    assert strangers > 25


def test_lazy_sequence():
    split = scenes("train")
    part = split[100:200:7]
    assert len(split) == 9_000
    assert len(part) == 15
    assert part[1].name == "train/107"
    assert part[-1].name == "train/198"
    assert [s.name for s in part[:2]] == ["train/100", "train/107"]
    with pytest.raises(IndexError):
        part[15]


def test_fingerprint_changes_with_the_scenes(monkeypatch):
    whole = scenes("test").fingerprint()
    assert whole == scenes("test").fingerprint()
    assert len(whole) == 64
    others = {scenes("probe").fingerprint(), scenes("test", n=20).fingerprint()}
    monkeypatch.setattr(module, "MARK_DENSITY", 0.3)
    others.add(scenes("test").fingerprint())
    assert len(others | {whole}) == 4


@pytest.mark.parametrize("split", ["val", "", "Test"])
def test_a_wrong_split_names_the_right_ones(split):
    with pytest.raises(ValueError, match=r"train, probe, test"):
        scenes(split)


def test_asking_for_too_many_scenes():
    with pytest.raises(ValueError, match=r"n=1001.*1000"):
        scenes("test", n=1001)
