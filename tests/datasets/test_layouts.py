"""Folders that are not as they should be: errors name what was looked for and what is there."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from interp.datasets import ade20k, cityscapes, coco_stuff, folder, voc
from interp.errors import DataWrong, InterpError
from tests.datasets import drawn


@pytest.fixture
def ade(tmp_path):
    return drawn.ade20k(tmp_path).root


@pytest.fixture
def mine(tmp_path):
    return drawn.folder(tmp_path).root


def told(call, *arguments, **options) -> str:
    """The words of the error that a call raises."""
    with pytest.raises(DataWrong) as error:
        call(*arguments, **options)
    assert isinstance(error.value, InterpError)
    assert isinstance(error.value, ValueError)
    return str(error.value)


def test_an_empty_folder_says_every_place_that_was_looked_for(tmp_path):
    words = told(ade20k, tmp_path)
    for part in (
        "ADE20K",
        "validation",
        str(tmp_path),
        "  images/validation: not there",
        "  annotations/validation: not there",
        "  ADEChallengeData2016/images/validation: not there",
        "found: an empty folder",
    ):
        assert part in words


def test_what_is_there_instead_is_named(tmp_path):
    for name in ("notes", "x", ".hidden"):
        (tmp_path / name).mkdir()
    assert "found: notes/, x/" in told(voc, tmp_path)
    assert "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt: not there" in told(voc, tmp_path)


def test_half_of_the_layout(ade):
    shutil.rmtree(ade / "annotations")
    words = told(ade20k, ade)
    assert "  images/validation: there" in words
    assert "  annotations/validation: not there" in words
    assert "found: images/" in words


def test_archives_that_were_not_unpacked(tmp_path):
    (tmp_path / "ADEChallengeData2016.zip").write_bytes(b"PK")
    words = told(ade20k, tmp_path)
    assert "still packed, unpack first: ADEChallengeData2016.zip" in words
    assert "is packed: unpack it first" in told(ade20k, tmp_path / "ADEChallengeData2016.zip")
    assert "is no folder" in told(ade20k, tmp_path / "absent")


def test_a_root_too_deep(ade):
    assert f"give {ade}" in told(ade20k, ade / "images")
    assert f"give {ade}" in told(ade20k, ade / "images" / "validation")


def test_splits(ade):
    assert "no split 'val': ADE20K (SceneParse150) has training, validation" in told(
        ade20k, ade, "val"
    )
    shutil.rmtree(ade / "images" / "validation")
    assert "splits that are there: training" in told(ade20k, ade)


def test_masks_that_lack(ade):
    gone = [ade / "annotations" / "validation" / f"ADE_val_0000000{k}.png" for k in (4, 2)]
    for file in gone:
        file.unlink()
    words = told(ade20k, ade)
    assert "2 pictures of 5 without a mask (annotations/validation/*.png)" in words
    assert words.endswith("ADE_val_00000002, ADE_val_00000004")
    assert len(ade20k(ade, "training")) == 5


def test_pictures_that_lack(ade):
    (ade / "images" / "validation" / "ADE_val_00000003.jpg").unlink()
    words = told(ade20k, ade)
    assert "1 mask of 5 without a picture (images/validation/*.jpg): ADE_val_00000003" in words


def test_an_empty_split(ade):
    for file in (ade / "images" / "validation").iterdir():
        file.unlink()
    assert "no images/validation/*.jpg" in told(ade20k, ade)


def test_files_that_other_systems_leave_behind(ade):
    (ade / "images" / "validation" / "._ADE_val_00000001.jpg").write_bytes(b"x")
    (ade / "annotations" / "validation" / ".DS_Store").write_bytes(b"x")
    (ade / "images" / "validation" / "Thumbs.db").write_bytes(b"x")
    assert len(ade20k(ade)) == 5


def test_masks_that_were_shifted_already(ade):
    file = ade / "annotations" / "validation" / "ADE_val_00000003.png"
    raw = np.asarray(Image.open(file)).astype(int)
    drawn.grey(np.where(raw == 0, 255, raw - 1)).save(file)
    data = ade20k(ade)
    words = told(lambda: data[2])
    assert "annotations/validation/ADE_val_00000003.png holds 255" in words
    assert "0..150" in words
    assert "shifted already" in words
    assert data[1].name == "ADE_val_00000002"  # the others read


def test_sizes_that_differ(ade):
    file = ade / "annotations" / "validation" / "ADE_val_00000001.png"
    Image.open(file).resize((30, 36), Image.Resampling.NEAREST).save(file)
    words = told(lambda: ade20k(ade)[0])
    assert "images/validation/ADE_val_00000001.jpg is 48 x 36" in words
    assert "annotations/validation/ADE_val_00000001.png is 30 x 36" in words


def test_a_palette_mask_that_went_through_rgb(tmp_path):
    root = drawn.voc(tmp_path).root
    file = root / "SegmentationClass" / "2007_000033.png"
    Image.open(file).convert("RGB").save(file)
    words = told(lambda: voc(root)[0])
    assert "SegmentationClass/2007_000033.png is an image of mode RGB" in words
    assert "released" in words


def test_voc_takes_what_its_lists_name(tmp_path):
    root = drawn.voc(tmp_path).root
    (root / "SegmentationClass" / "2007_000133.png").unlink()
    assert "1 picture of 5 without a mask" in told(voc, root)
    assert "2007_000133" in told(voc, root)
    assert len(voc(root, "train")) == 5
    (root / "JPEGImages" / "2007_000133.jpg").unlink()
    words = told(voc, root)
    assert "val.txt names 5 samples; of 1 there is neither picture nor mask: 2007_000133" in words


def test_cityscapes_has_cities(tmp_path):
    root = drawn.cityscapes(tmp_path).root
    shutil.rmtree(root / "gtFine" / "val" / "lindau")
    words = told(cityscapes, root)
    assert "2 pictures of 5 without a mask" in words
    assert "gtFine/val/*_gtFine_labelIds.png or *_gtFine_labelTrainIds.png" in words
    assert "lindau/lindau_000000_000019, lindau/lindau_000000_000029" in words
    file = root / "gtFine" / "train" / "aachen" / "aachen_000000_000019_gtFine_labelIds.png"
    drawn.grey(np.full((36, 48), 34)).save(file)
    assert "holds 34" in told(lambda: cityscapes(root, "train")[0])


def test_coco_half_converted(tmp_path):
    root = drawn.coco_stuff(tmp_path).root
    (root / "annotations" / "val2017" / "000000000139_labelTrainIds.png").unlink()
    assert "1 picture of 5 without a mask" in told(coco_stuff, root)
    assert "000000000139" in told(coco_stuff, root)


def test_coco_gaps_are_no_classes(tmp_path):
    root = drawn.coco_stuff(tmp_path, released=True).root
    file = root / "annotations" / "val2017" / "000000000139.png"
    drawn.grey(np.full((36, 48), 11)).save(file)
    assert "000000000139.png holds 11 (100.0%" in told(lambda: coco_stuff(root)[0])


def test_folder_without_classes(mine):
    (mine / "classes.txt").unlink()
    words = told(folder, mine, "train")
    assert "no classes.txt" in words
    assert "found: images/, masks/" in words
    assert folder(mine, "train", classes="a,b,c,d").classes == ("a", "b", "c", "d")
    assert "no such folder" in told(folder, mine / "absent")


def test_folder_with_other_names_endings_and_numbers(tmp_path, mine):
    meant = drawn.folder(tmp_path / "again").masks["train"]
    root = tmp_path / "other"
    for name, mask in meant.items():
        drawn.save(Image.new("RGB", mask.shape[::-1]), root / "train" / "pics" / f"{name}.JPEG")
        numbers = np.where(mask == drawn.VOID, 0, mask + 1)
        numbers[-1, -1] = 9
        drawn.save(drawn.grey(numbers), root / "train" / "labels" / f"{name}_seg.png")
    options = {"images": "{split}/pics", "masks": "{split}/labels", "mask_endings": "_seg.png"}
    data = folder(
        root, "train", **options, classes=["a", "b", "c", "d"], reduce_zero_label=True, ignore=9
    )
    assert [sample.name for sample in data] == sorted(meant)
    for sample in data:
        expected = meant[sample.name].copy()
        expected[-1, -1] = drawn.VOID
        assert np.array_equal(sample.mask, expected)
    plain = folder(root, "train", **options, classes=["a", "b", "c", "d"])
    words = told(lambda: plain[0])
    assert "holds 4, 9" in words
    assert "reduce_zero_label=True" in words
    assert "no split 'val'" in told(folder, root, "val", **options, classes="a,b,c,d")


def test_folder_without_splits_takes_all_that_is_there(mine):
    data = folder(mine)
    assert len(data) == 10
    assert data.split == ""
    assert data[0].name == "train/train0"


def test_two_pictures_of_one_name(mine):
    file = mine / "images" / "train" / "train0"
    shutil.copy(f"{file}.png", f"{file}.jpg")
    words = told(folder, mine, "train")
    assert "two files of one name" in words
    assert "images/train/train0.jpg" in words
    assert "images/train/train0.png" in words
