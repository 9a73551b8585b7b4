"""The sets of the field, read from drawn folders: every mask is what was meant, in order."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from interp.datasets import ade20k, cityscapes, coco_stuff, folder, resized, scenes, voc
from interp.datasets.cityscapes import TRAIN_IDS as CITY
from interp.datasets.coco_stuff import TRAIN_IDS as COCO
from interp.labels import IGNORE
from tests.datasets import drawn

SETS = {
    "ade20k": (ade20k, drawn.ade20k, 150),
    "voc": (voc, drawn.voc, 21),
    "cityscapes": (cityscapes, drawn.cityscapes, 19),
    "cityscapes trainIds": (cityscapes, lambda to: drawn.cityscapes(to, train_ids=True), 19),
    "coco-stuff": (coco_stuff, drawn.coco_stuff, 171),
    "coco-stuff released": (coco_stuff, lambda to: drawn.coco_stuff(to, released=True), 171),
    "folder": (folder, drawn.folder, 4),
}


@pytest.fixture(scope="module", params=SETS)
def field(request, tmp_path_factory):
    """What opens the set, the drawn set and its number of classes."""
    open_set, draw, n = SETS[request.param]
    return open_set, draw(tmp_path_factory.mktemp("set")), n


def test_every_mask_is_the_one_that_was_drawn(field):
    open_set, set_, n = field
    for split, masks in set_.masks.items():
        data = open_set(set_.root, split)
        assert [sample.name for sample in data] == sorted(masks)
        assert (data.split, len(data), len(data.classes), len(data.colors)) == (
            split,
            len(masks),
            n,
            n,
        )
        for sample in data:
            meant = masks[sample.name]
            assert sample.mask.dtype == np.int64
            assert np.array_equal(sample.mask, meant)
            assert {0, n - 1, IGNORE} <= set(np.unique(sample.mask))  # the borders of uint8
            assert sample.image.mode == "RGB"
            assert sample.image.size == meant.shape[::-1]


def test_a_picture_belongs_to_its_mask(field):
    """Colours follow classes, so a picture beside another's mask would not fit."""
    open_set, set_, _ = field
    split = next(iter(set_.masks))
    palette = np.random.default_rng(0).integers(30, 226, (256, 3))  # as `drawn.picture_of` has it
    for sample in open_set(set_.root, split):
        off = np.abs(np.asarray(sample.image, float) - palette[sample.mask]).mean()
        assert off < 15, sample.name  # noise and JPEG; another picture's mask gives about 50


def test_the_folder_above_will_do_too(tmp_path):
    assert len(ade20k(drawn.ade20k(tmp_path).root.parent, "training")) == 5
    assert len(voc(drawn.voc(tmp_path).root.parent)) == 5  # VOCdevkit
    assert len(voc(tmp_path, "trainval")) == 10
    assert len(cityscapes(drawn.cityscapes(tmp_path).root.parent)) == 5
    assert len(coco_stuff(drawn.coco_stuff(tmp_path).root.parent, "train2017")) == 5


def test_slices_are_sets_and_read_nothing(field, monkeypatch):
    open_set, set_, _ = field
    split, masks = next(iter(set_.masks.items()))
    names = sorted(masks)
    data = open_set(set_.root, split)
    monkeypatch.setattr("interp.datasets.layouts.read_picture", None)
    part = data[1:5:2]
    turned = data[::-1]
    assert (len(part), len(turned), len(data[:0])) == (2, len(names), 0)
    assert (part.split, part.classes, type(part)) == (split, data.classes, type(data))
    monkeypatch.undo()
    assert [sample.name for sample in part] == names[1:5:2]
    assert [sample.name for sample in turned] == names[::-1]
    assert part[-1].name == part[1].name == names[3]
    assert data[np.int64(2)].name == data[1:][1].name == names[2]
    assert np.array_equal(turned[0].mask, masks[names[-1]])
    with pytest.raises(IndexError):
        part[2]


def test_sets_travel_to_workers(field):
    open_set, set_, _ = field
    split, masks = next(iter(set_.masks.items()))
    data = resized(open_set(set_.root, split), (24, 24))
    loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=list)
    seen = [sample for batch in loader for sample in batch]
    assert [sample.name for sample in seen] == sorted(masks)
    again = pickle.loads(pickle.dumps(data[1:]))  # noqa: S301
    assert again[0].name == sorted(masks)[1]
    assert again.fingerprint() == data[1:].fingerprint()


def test_fingerprint_is_of_the_content_not_of_the_place(field, tmp_path):
    open_set, set_, _ = field
    split = next(iter(set_.masks))
    data = open_set(set_.root, split)
    copy = shutil.copytree(set_.root, tmp_path / "elsewhere")
    assert open_set(copy, split).fingerprint() == data.fingerprint()
    prints = {data.fingerprint(), data[1:].fingerprint(), data[::-1].fingerprint()}
    other = open_set(copy, split)
    for file in (copy / other.pairs[0].picture, copy / other.pairs[0].mask):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1  # of the first few files every byte counts
        file.write_bytes(content)
        prints.add(other.fingerprint())
    assert len(prints) == 5
    last = copy / other.pairs[-1].mask  # of the others their size
    with last.open("ab") as file:
        file.write(b"x")
    assert other.fingerprint() not in prints
    assert len(data.fingerprint()) == 64


def test_fingerprints_differ_between_sets_and_splits(tmp_path):
    set_ = drawn.folder(tmp_path)
    prints = [
        folder(set_.root, "train"),
        folder(set_.root, "val"),
        folder(set_.root, "train", ignore=3),
        folder(set_.root, "train", classes=["a", "b", "c", "d"]),
        folder(set_.root, "train", name="other"),
        resized(folder(set_.root, "train"), (20, 20)),
        resized(folder(set_.root, "train"), (20, 21)),
        resized(folder(set_.root, "train")[1:], (20, 20)),
        resized(folder(set_.root, "train"), (20, 20))[1:3],
        resized(folder(set_.root, "train"), (20, 20))[::-1],
    ]
    assert len({data.fingerprint() for data in prints}) == len(prints)
    data = folder(set_.root, "train")
    for part in (slice(1, None), slice(None, None, -1)):
        whole = resized(data, (9, 9))
        assert whole[part].fingerprint() == resized(data[part], (9, 9)).fingerprint()


def test_cityscapes_ids():
    """The whole table, from the set's own list of labels."""
    scored = {
        7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
        26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
    }  # fmt: skip
    ignored = [*range(7), 9, 10, 14, 15, 16, 18, 29, 30, 255]
    assert {**scored, **dict.fromkeys(ignored, 255)} == CITY


def test_coco_gaps():
    """Against class numbers of the field's converter, and COCO's own ids, which are one more."""
    assert len(COCO) == 172
    assert sorted(COCO.values()) == [*range(171), 255]
    known = {v: k for k, v in drawn.COCO_IDS.items()}
    assert {raw: COCO[raw] for raw in known} == known
    unused = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}  # of COCO's ids 1..182
    assert {v + 1 for v in range(182) if v not in COCO} == unused


def test_resized_makes_up_no_class(tmp_path):
    # sides for which no middle of a new pixel falls between two old ones
    data = ade20k(drawn.ade20k(tmp_path, size=(50, 38)).root)
    small = resized(data, (32, 20))
    for before, after in zip(data, small, strict=True):
        assert after.image.size == (32, 20)
        assert after.mask.shape == (20, 32)
        assert after.mask.dtype == np.int64
        height, width = before.mask.shape
        # the pixel under the middle of the new one
        y = ((np.arange(20) + 0.5) * height / 20).astype(int)
        x = ((np.arange(32) + 0.5) * width / 32).astype(int)
        assert np.array_equal(after.mask, before.mask[np.ix_(y, x)])
        meant = before.image.resize((32, 20), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(after.image), np.asarray(meant))
    assert (small.classes, small.colors, small.split) == (data.classes, data.colors, "validation")
    assert small[1:3][0].name == data[1].name
    assert resized(scenes("test"), (8, 8))[3:5][1].name == "test/4"
    for size in ((0, 3), (3.5, 2), (3,)):
        with pytest.raises(ValueError, match="width, height"):
            resized(data, size)


def test_representation_tells_size_and_split(tmp_path):
    data = ade20k(drawn.ade20k(tmp_path).root)
    assert repr(data[:3]) == "ade20k(split='validation', 3 pictures, 150 classes)"
