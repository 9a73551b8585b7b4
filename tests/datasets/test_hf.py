"""Sets of the Hugging Face library: in memory and from local folders, never from the network."""

from __future__ import annotations

import json
import pickle
import warnings
from io import BytesIO

import datasets
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from interp.datasets import hf, open_data
from interp.errors import DataWrong
from interp.labels import IGNORE
from tests.datasets import drawn

INTEGER = datasets.Value("int64")
NAMES = ["sky", "grass", "road", "house"]
MASKS = {f"validation/{k}": drawn.mask_of((0, 1, 2, 3), drawn.SIZES[k], seed=k) for k in range(5)}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def rows(shift: bool = False, **features) -> datasets.Dataset:
    """Five rows in memory; masks counted from 1 if `shift`."""
    pictures = [drawn.picture_of(mask, 0) for mask in MASKS.values()]
    masks = [
        drawn.grey(np.where(mask == drawn.VOID, 0, mask + 1) if shift else mask)
        for mask in MASKS.values()
    ]
    columns = {"image": datasets.Image(), "annotation": datasets.Image(), **features}
    return datasets.Dataset.from_dict(
        {"image": pictures, "annotation": masks}, features=datasets.Features(columns)
    )


def check(data) -> None:
    assert [sample.name for sample in data] == list(MASKS)
    for sample in data:
        assert sample.mask.dtype == np.int64
        assert np.array_equal(sample.mask, MASKS[sample.name])
        meant = drawn.picture_of(MASKS[sample.name], 0)
        assert np.array_equal(np.asarray(sample.image), np.asarray(meant))


def test_in_memory():
    check(hf(rows(), classes=NAMES))
    check(hf(rows(shift=True), classes=NAMES, reduce_zero_label=True))
    both = datasets.DatasetDict(train=rows(shift=True), validation=rows())
    check(hf(both, classes=",".join(NAMES)))
    data = hf(rows(), classes=NAMES)
    assert (data.name, data.classes, len(data), len(data.colors)) == ("hf", tuple(NAMES), 5, 4)
    assert [sample.name for sample in data[3:0:-2]] == ["validation/3", "validation/1"]


def test_palette_masks_and_pictures_with_an_orientation():
    mask = MASKS["validation/0"]
    indices = Image.frombytes("P", mask.shape[::-1], mask.astype(np.uint8).tobytes())
    indices.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    file = BytesIO()
    drawn.picture_of(mask, 0).save(file, "PNG", exif=exif)
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": file.getvalue(), "path": None}], "annotation": [indices]},
        features=datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()}),
    )
    assert data[0]["image"].size == mask.shape  # the library's own decoder turns it
    sample = hf(data, classes=NAMES)[0]
    assert sample.image.size == mask.shape[::-1]
    assert np.array_equal(sample.mask, mask)


def test_masks_as_lists_bring_their_names():
    numbers = datasets.List(datasets.List(datasets.ClassLabel(names=NAMES)))
    small = np.array([[0, 1], [2, 3], [3, 3]])
    data = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (2, 3))], "labels": [small.tolist()]},
        features=datasets.Features({"image": datasets.Image(), "labels": numbers}),
    )
    opened = hf(data, mask="labels")
    assert opened.classes == tuple(NAMES)
    assert opened[0].mask.tolist() == small.tolist()


def test_parquet_folder(tmp_path):
    place = tmp_path / "set" / "data"
    place.mkdir(parents=True)
    for split in ("train", "validation"):
        rows().to_parquet(place / f"{split}-00000-of-00001.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a folder has no revision
        check(hf(place.parent, classes=NAMES))
    data = open_data(f"hf:{place.parent}", classes=NAMES)
    assert (data.fit.split, data.test.split) == ("train", "validation")
    check(data.test)
    with pytest.raises(DataWrong, match="split 'nope'"):
        hf(place.parent, "nope", classes=NAMES)
    other = tmp_path / "elsewhere"
    place.parent.rename(other)
    assert hf(other, classes=NAMES).fingerprint() == data.test.fingerprint()


def test_picture_folder(tmp_path):
    place = tmp_path / "set" / "validation"
    lines = []
    for k, mask in enumerate(MASKS.values()):
        drawn.save(drawn.picture_of(mask, 0), place / f"{k}.png")
        drawn.save(drawn.grey(mask), place / "masks" / f"{k}.png")
        lines.append(json.dumps({"file_name": f"{k}.png", "mask_file_name": f"masks/{k}.png"}))
    (place / "metadata.jsonl").write_text("\n".join(lines))
    check(hf(place.parent, mask="mask", classes=NAMES))


def test_sets_travel_to_workers():
    data = hf(rows(), classes=NAMES)
    loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=list)
    check([sample for batch in loader for sample in batch])
    again = pickle.loads(pickle.dumps(data[2:]))  # noqa: S301
    assert again[0].name == "validation/2"
    assert again.fingerprint() == data[2:].fingerprint()


def test_fingerprints():
    prints = [
        hf(rows(), classes=NAMES),
        hf(rows(), classes=NAMES)[:4],
        hf(rows(), classes=NAMES)[::-1],
        hf(rows(), classes=NAMES, ignore=3),
        hf(rows(), "test", classes=NAMES),
        hf(rows(shift=True), classes=NAMES),
    ]
    assert len({data.fingerprint() for data in prints}) == len(prints)
    assert hf(rows(), classes=NAMES).fingerprint() == prints[0].fingerprint()


def test_fingerprint_notices_a_mask_at_the_end_and_which_rows_are_taken():
    whole = rows()
    first = hf(whole, classes=NAMES).fingerprint()
    last = whole[4]["annotation"].copy()
    last.putpixel((20, 20), 1 - min(1, last.getpixel((20, 20))))
    masks = [*whole[:4]["annotation"], last]
    other = datasets.Dataset.from_dict(
        {"image": whole["image"][:], "annotation": masks}, features=whole.features
    )
    assert hf(other, classes=NAMES).fingerprint() != first
    alike = hf(datasets.concatenate_datasets([whole.select([0])] * 3), classes=NAMES)
    assert alike[:2].fingerprint() != alike[1:].fingerprint()  # the samples' names differ


def test_a_repository_is_asked_for_by_its_commit(monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pinned = hf("owner/set", revision="0f1e", classes=NAMES)
    assert asked == [(("owner/set", None), {"split": "validation", "revision": "0f1e"})]
    with pytest.warns(UserWarning, match="owner/set without a revision"):
        loose = hf("owner/set", classes=NAMES)
    assert pinned.fingerprint() != loose.fingerprint()
    with pytest.warns(UserWarning, match="without a revision"):
        open_data("hf:owner/set?classes=a,b,c,d", fit="train", test="validation")
    data = open_data(
        "hf:owner/set@0f1e?classes=voc&mask=annotation&config=full", fit="train", test="validation"
    )
    assert asked[-1] == (("owner/set", "full"), {"split": "validation", "revision": "0f1e"})
    assert len(data.test.classes) == 21


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "does not say what its numbers mean; give classes="),
        (
            {"classes": NAMES, "mask": "anotation"},
            "no column 'anotation'.*image, annotation.*mask=",
        ),
        ({"classes": NAMES, "image": "picture"}, "no column 'picture'"),
    ],
)
def test_columns_that_are_not_there(options, words):
    with pytest.raises(DataWrong, match=words):
        hf(rows(), **options)


def test_rows_that_are_wrong():
    with pytest.raises(DataWrong, match=r"validation/0 \(annotation\) holds 3"):
        hf(rows(), classes=NAMES[:3])[0]
    with pytest.raises(DataWrong, match=r"mask of|mode RGB"):
        hf(rows(), classes=NAMES, mask="image")[0]
    data = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (2, 1))], "annotation": [[[0], [1]]]},
        features=datasets.Features(
            {"image": datasets.Image(), "annotation": datasets.List(datasets.List(INTEGER))}
        ),
    )
    with pytest.raises(DataWrong, match=r"validation/0 \(image\) is 2 x 1.*is 1 x 2"):
        hf(data, classes=NAMES)[0]
    with pytest.raises(DataWrong, match="ndarray is no repository"):
        hf(np.zeros(3), classes=NAMES)
    with pytest.raises(DataWrong, match="no split 'validation': there are train"):
        hf(datasets.DatasetDict(train=rows()), classes=NAMES)
    fractions = datasets.List(datasets.List(datasets.Value("float32")))
    numbers = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (2, 1))], "annotation": [[[0.5, 1.0]]]},
        features=datasets.Features({"image": datasets.Image(), "annotation": fractions}),
    )
    with pytest.raises(DataWrong, match=r"float.*whole numbers"):
        hf(numbers, classes=NAMES)[0]


def test_no_row_is_taken_for_another_when_one_lacks_its_mask():
    data = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (2, 1))], "annotation": [None]},
        features=datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()}),
    )
    with pytest.raises(DataWrong, match="row 0 of validation has no annotation"):
        hf(data, classes=NAMES)[0]


def test_ignored_is_255_whatever_the_set_writes():
    assert (hf(rows(), classes=NAMES, ignore=(0, 255))[0].mask == IGNORE).mean() > 0.2
