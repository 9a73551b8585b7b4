"""A set by a word: kinds, splits, options, and what is said when a word is wrong."""

from __future__ import annotations

import pytest

from interp.datasets import open_data, scenes
from interp.datasets.opening import KINDS, looks_like, parse
from interp.errors import DataWrong
from tests.datasets import drawn

DRAWN = {
    "ade20k": (drawn.ade20k, "training", "validation"),
    "voc": (drawn.voc, "train", "val"),
    "cityscapes": (drawn.cityscapes, "train", "val"),
    "coco-stuff": (drawn.coco_stuff, "train2017", "val2017"),
    "folder": (drawn.folder, "train", "val"),
}


@pytest.fixture(params=DRAWN)
def kind(request):
    return request.param


def test_standard_splits(kind, tmp_path):
    draw, fit, test = DRAWN[kind]
    set_ = draw(tmp_path)
    data = open_data(f"{kind}:{set_.root}")
    assert (data.fit.split, data.test.split) == (fit, test)
    assert [sample.name for sample in data.fit] == sorted(set_.masks[fit])
    assert [sample.name for sample in data.test] == sorted(set_.masks[test])
    assert data.fit.classes == data.test.classes
    turned = open_data(f"{kind}:{set_.root}", fit=test, test=fit)
    assert (turned.fit.split, turned.test.split) == (test, fit)


def test_a_path_without_its_kind(kind, tmp_path):
    root = DRAWN[kind][0](tmp_path).root
    assert looks_like(root)[0] == kind
    with pytest.raises(DataWrong, match=f"This looks like {kind}: {kind}:{root}"):
        open_data(str(root))


def test_a_path_with_another_kind(tmp_path):
    root = drawn.voc(tmp_path).root
    with pytest.raises(DataWrong) as error:
        open_data(f"ade20k:{root}")
    assert "images/training: not there" in str(error.value)
    assert f"this looks like voc: give voc:{root}" in str(error.value)


def test_scenes():
    data = open_data("scenes")
    assert data.fit.fingerprint() == scenes("probe").fingerprint()
    assert data.test.fingerprint() == scenes("test").fingerprint()
    assert open_data("scenes", fit="train").fit.split == "train"
    with pytest.raises(DataWrong, match="bundled"):
        open_data("scenes:here")


def test_unknown_kinds_name_the_nearest_and_all(tmp_path):
    with pytest.raises(DataWrong, match=r"'ade20'; did you mean ade20k\?") as error:
        open_data("ade20:x")
    assert all(row.example in str(error.value) for row in KINDS.values())
    with pytest.raises(DataWrong, match="looks like none; found: an empty folder"):
        open_data(str(tmp_path))
    with pytest.raises(DataWrong, match="no kind of set 'nowhere/x'"):
        open_data("nowhere/x")
    with pytest.raises(DataWrong, match="says no place: voc:PATH"):
        open_data("voc:")


def test_folder_splits(tmp_path):
    root = drawn.folder(tmp_path).root
    for part in ("images", "masks"):
        (root / part / "train").rename(root / part / "training")
        (root / part / "val").rename(root / part / "test")
    data = open_data(f"folder:{root}")
    assert (data.fit.split, data.test.split) == ("training", "test")
    for part in ("images", "masks"):
        (root / part / "training").rename(root / part / "one")
    with pytest.raises(DataWrong, match=r"no split train or training; there are one, test.*fit="):
        open_data(f"folder:{root}")
    assert len(open_data(f"folder:{root}", fit="one").fit) == 5
    with pytest.raises(DataWrong, match="no split 'two'"):
        open_data(f"folder:{root}", fit="two")


def test_options(tmp_path):
    spec = parse(
        "folder:p?ignore=0,7&reduce_zero_label=true&mask_endings=_a.png,_b.png&classes=voc"
    )
    assert spec.options == {
        "ignore": (0, 7),
        "reduce_zero_label": True,
        "mask_endings": ("_a.png", "_b.png"),
        "classes": "voc",
    }
    assert parse("folder:p?reduce_zero_label=0").options == {"reduce_zero_label": False}
    root = drawn.folder(tmp_path).root
    assert open_data(f"folder:{root}?classes=a,b,c,d").fit.classes == ("a", "b", "c", "d")
    assert open_data(f"folder:{root}", classes="a,b,c,d").fit.classes == ("a", "b", "c", "d")
    for spec, words in {
        "folder:p?clases=a": r"no option 'clases'.*did you mean classes",
        "ade20k:p?classes=a": "ade20k takes none",
        "folder:p?classes": "written name=value",
        "folder:p?ignore=x": "ignore=x: give whole numbers",
        "folder:p?reduce_zero_label=maybe": "neither true nor false",
        "folder:p?split=train": "no option 'split'",
    }.items():
        with pytest.raises(DataWrong, match=words):
            parse(spec)
