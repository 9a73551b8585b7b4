"""`check_data` finds what was planted, and nothing in sets that are right."""

from __future__ import annotations

import importlib
import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from interp.commands.data import app
from interp.datasets import ade20k, check_data, contact_sheet, folder, scenes
from interp.datasets.sheet import colored
from tests.datasets import drawn
from tests.datasets.test_opening import DRAWN

# by its full name: the package exports functions that hide modules
layouts = importlib.import_module("interp.datasets.layouts")


@pytest.fixture
def ade(tmp_path):
    return drawn.ade20k(tmp_path).root


def mask(root, k: int = 1):
    return root / "annotations" / "validation" / f"ADE_val_{k:08d}.png"


@pytest.mark.parametrize("kind", DRAWN)
def test_sets_that_are_right(kind, tmp_path):
    draw, fit, test = DRAWN[kind]
    set_ = draw(tmp_path)
    report = check_data(set_.root)
    assert report.ok, str(report)
    assert report.kind == kind
    found = {split.split: split for split in report.splits}
    assert {fit, test} <= set(found)
    for name in (fit, test):
        masks = np.concatenate([m.ravel() for m in set_.masks[name].values()])
        assert found[name].n == 5
        assert found[name].classes == tuple(sorted(set(masks.tolist()) - {drawn.VOID}))
        assert found[name].ignored == pytest.approx((masks == drawn.VOID).mean())
        assert found[name].sizes[0] == (33, 47)  # 1551 pixels, the fewest
        assert found[name].sizes[-1] == (64, 40)
        stored = "RGB and P" if kind == "voc" else "RGB and L"
        assert found[name].modes == (stored,)
    words = str(report)
    assert "nothing wrong was found" in words
    shown = {line[2:17].strip(): line[17:] for line in words.splitlines()}
    assert shown["samples"].split()[:2] == ["5", "5"]
    assert shown["smallest"].count("33 x 47") == len(report.splits)
    assert shown["median"].count("48 x 36") == 2
    assert shown["largest"].count("64 x 40") == len(report.splits)
    assert shown["stored as"].count(stored) == len(report.splits)
    assert shown["classes in them"].split()[:2] == ["4", "4"]
    assert shown["without a label"].split()[0] == f"{found[report.splits[0].split].ignored:.1%}"
    if kind != "folder":
        assert "the set was released with" in words
        assert check_data(f"{kind}:{set_.root.parent}").ok


FAULTS = {}


def fault(words):
    """A fault that is planted by a function of the set's root, and what must be said of it."""

    def keep(plant):
        FAULTS[plant.__name__] = (plant, words)
        return plant

    return keep


@fault("validation: 1 picture of 5 without a mask (annotations/validation/*.png): ADE_val_00000001")
def no_mask(root):
    mask(root).unlink()


@fault("validation: annotations/validation/ADE_val_00000001.png is an image of mode RGB")
def rgb_mask(root):
    Image.open(mask(root)).convert("RGB").save(mask(root))


@fault("ADE_val_00000001.jpg is 48 x 36 pixels, but its mask")
def other_size(root):
    drawn.grey(np.ones((36, 47), int)).save(mask(root))


@fault("ADE_val_00000005.png holds 151")
def out_of_range(root):
    drawn.grey(np.full((47, 33), 151)).save(mask(root, 5))


@fault("ADE_val_00000002.png holds 255 (1.")
def shifted(root):
    drawn.grey(np.r_[np.full((47, 36), 3), np.full((1, 36), 3)]).save(mask(root, 2))
    raw = np.full((48, 36), 149)
    raw[0, :20] = 255
    drawn.grey(raw).save(mask(root, 2))


@fault("validation: no images/validation/*.jpg")
def empty_split(root):
    for file in (root / "images" / "validation").iterdir():
        file.unlink()


@fault("annotations/validation: not there")
def no_folder(root):
    shutil.rmtree(root / "annotations" / "validation")


@fault("in the mask of ADE_val_00000003 no pixel is labelled")
def all_ignored(root):
    drawn.grey(np.zeros((40, 64), int)).save(mask(root, 3))


@fault("ADE_val_00000004.png cannot be read as a picture")
def broken(root):
    content = mask(root, 4).read_bytes()
    mask(root, 4).write_bytes(content[: len(content) // 2])


@fault("1 mask of 5 without a picture (images/validation/*.jpg): ADE_val_00000002")
def no_picture(root):
    (root / "images" / "validation" / "ADE_val_00000002.jpg").unlink()


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found_and_come_first(name, ade):
    plant, words = FAULTS[name]
    plant(ade)
    report = check_data(ade)
    assert not report.ok
    assert not report.splits[0].problems  # of the other split nothing wrong is said
    assert any(words in problem for problem in report.all_problems()), report.all_problems()
    assert len(report.all_problems()) == 1
    shown = str(report)
    assert shown.startswith("wrong: ")
    assert shown.index("wrong: ") < shown.index("training")
    assert "1 thing wrong" in shown
    if name not in ("no_folder", "empty_split"):
        assert report.splits[1].n >= 4


def test_an_archive_that_was_not_unpacked(tmp_path):
    (tmp_path / "ADEChallengeData2016.zip").write_bytes(b"PK")
    for kind in (None, "ade20k"):
        words = str(check_data(tmp_path, kind=kind))
        assert "still packed, unpack first: ADEChallengeData2016.zip" in words
        assert "wrong: " in words


def test_places_that_are_no_sets(tmp_path):
    report = check_data(tmp_path)
    assert not report.ok
    assert "looks like no kind of set" in str(report)
    assert "is no folder" in str(check_data(tmp_path / "absent"))
    (tmp_path / "a.zip").write_bytes(b"PK")
    assert "is no folder but a file" in str(check_data(tmp_path / "a.zip"))
    assert "did you mean ade20k?" in check_data(tmp_path, kind="ade20").problems[0]


def test_what_was_meant_is_said(tmp_path):
    root = drawn.voc(tmp_path).root
    report = check_data(root, kind="ade20k")
    assert not report.ok
    assert "ADEChallengeData2016/images/training: not there" in str(report)
    assert "voc" not in report.kind


def test_folders_without_splits(tmp_path):
    root = drawn.folder(tmp_path).root
    for part in ("images", "masks"):
        for split in ("train", "val"):
            for file in (root / part / split).iterdir():
                file.rename(root / part / file.name)
            (root / part / split).rmdir()
    report = check_data(root)
    assert report.ok, str(report)
    assert [(split.split, split.n) for split in report.splits] == [("", 10)]
    assert "no splits" in str(report)
    (root / "classes.txt").unlink()
    assert "has no classes.txt" in str(check_data(root))
    assert check_data(f"folder:{root}?classes=a,b,c,d").ok


def test_few_files_are_opened_however_many_there_are(ade, monkeypatch):
    opened = []
    read = layouts.read_mask
    monkeypatch.setattr(
        layouts, "read_mask", lambda path, file: opened.append(file) or read(path, file)
    )
    check_data(ade, n=3)
    assert [file[-12:] for file in opened] == [f"0000000{k}.png" for k in (1, 3, 5)] * 2


def test_sheet_shows_picture_mask_and_legend(ade):
    data = ade20k(ade)
    sheet = np.asarray(contact_sheet(data, n=2, height=72))
    # the first picture is 48 x 36, so its row is 3 panels of 96 x 72 under a line of 18
    top, left = 8 + 18, 8
    panels = [sheet[top : top + 72, left + k * 104 : left + k * 104 + 96] for k in range(3)]
    sample = data[0]
    big = sample.mask.repeat(2, 0).repeat(2, 1)
    labelled = big != drawn.VOID
    meant = np.array(data.colors)[np.where(labelled, big, 0)]
    assert np.array_equal(panels[1][labelled], meant[labelled])
    ignored = panels[1][~labelled]
    assert set(np.unique(ignored)) == {165, 205}
    assert np.array_equal(ignored[:, 0], ignored[:, 2])
    picture = np.asarray(sample.image.resize((96, 72), Image.Resampling.BICUBIC)).astype(int)
    assert np.array_equal(panels[0], picture)
    assert np.abs(panels[2][labelled] - (picture[labelled] + meant[labelled]) / 2).max() <= 1
    assert np.array_equal(panels[2][~labelled], picture[~labelled])
    legend = sheet[top + 72 + 8 + 18 + 72 + 8 :]
    for k in (0, 1, 2, 149):  # grey of words may be a wall's grey
        extra = (legend == data.colors[k]).all(-1).sum() - 12 * 12
        assert 0 <= extra <= 20 * (k == 0), data.classes[k]
    assert not (legend == data.colors[3]).all(-1).any()


def test_sheet_of_scenes_and_of_nothing(tmp_path):
    assert contact_sheet(scenes("test"), n=3).height > 3 * 160
    data = folder(drawn.folder(tmp_path).root, "val")
    with pytest.raises(ValueError, match="empty"):
        contact_sheet(data[:0])
    assert (colored(np.full((9, 9), 255), data) != 255).all()


def run(*words):
    return CliRunner().invoke(app, ["check", *map(str, words)], env={"COLUMNS": "100"})


def test_command(ade, tmp_path):
    sheet = tmp_path / "sheet.png"
    right = run(ade, "--out", sheet)
    assert right.exit_code == 0, right.output
    assert "nothing wrong was found" in right.output
    assert Image.open(sheet).size == contact_sheet(ade20k(ade), 6).size
    sheet.unlink()
    no_mask(ade)
    wrong = run(ade, "--kind", "ade20k", "--out", sheet)
    assert wrong.exit_code == 1
    assert "1 picture of 5 without a mask" in wrong.output
    assert sheet.exists()  # of the four that can be read: a look may tell what is wrong
    nothing = run(tmp_path / "absent", "--out", tmp_path / "none.png")
    assert nothing.exit_code == 1
    assert "no contact sheet" in nothing.output
    assert not (tmp_path / "none.png").exists()
    assert run("scenes", "--n", 2).exit_code == 0
