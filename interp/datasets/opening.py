"""A set by a word: `open_data("ade20k:PATH")` gives what probes are fitted on and what is reported.

`KINDS` has a row for every kind of set: how it is opened, and which of its splits serve for fitting
and for testing. A new kind is one function and one row.

    scenes                         the bundled ones
    ade20k:PATH  voc:PATH  cityscapes:PATH  coco-stuff:PATH
    folder:PATH                    images and masks of one's own
    hf:REPO@REVISION               a set of the Hugging Face `datasets` library

Options of a kind follow as in a web address, or are given by name:
`hf:owner/set@0f1e2d?mask=label&classes=ade20k&reduce_zero_label=true`.

>>> data = open_data("scenes")
>>> data.fit, data.test
(Scenes(split='probe', 1000 scenes), Scenes(split='test', 1000 scenes))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from interp.datasets.ade20k import ADE20K
from interp.datasets.base import Segmentation
from interp.datasets.cityscapes import CITYSCAPES
from interp.datasets.coco_stuff import COCO_STUFF
from interp.datasets.finding import contents
from interp.datasets.folder import CLASSES, folder, folder_layout
from interp.datasets.hf import hf, hf_splits
from interp.datasets.layouts import Layout
from interp.datasets.scenes import SPLITS, scenes
from interp.datasets.voc import VOC
from interp.errors import DataWrong, nearest


class Data(NamedTuple):
    """Two splits of a set.

    Attributes:
        fit: what probes are fitted on.
        test: what is reported.
    """

    fit: Segmentation
    test: Segmentation


@dataclass(frozen=True)
class Kind:
    """A kind of set.

    Attributes:
        open: place, split and options to a set.
        options: the function that says which options there are; None if there are none.
        splits: place and options to the splits that are there.
        fit: splits to fit on, the first that is there; test: likewise.
        layout: place and options to the layout of its files, if it has one.
        fits: does a folder look like one?
        example: how it is written.
    """

    open: Callable[..., Segmentation]
    splits: Callable[..., Sequence[str]]
    fit: tuple[str, ...]
    test: tuple[str, ...]
    fits: Callable[[Path], bool]
    example: str
    options: Callable[..., Any] | None = None
    layout: Callable[..., Layout] | None = None


class Spec(NamedTuple):
    """A set as it is written: its kind, its place (empty for the scenes) and options."""

    kind: str
    place: str
    options: dict[str, Any]


def open_data(
    spec: str, *, fit: str | None = None, test: str | None = None, **options: Any
) -> Data:
    """The two splits of a set that a study needs.

    Args:
        spec: kind and place, see the module.
        fit: split that probes are fitted on; by default the set's own for training.
        test: split that is reported; by default the set's own for validation.
        options: of `folder` and `hf`, such as classes=.

    Raises:
        DataWrong: an unknown kind, option or split, or files that are not as they should be.

    >>> open_data("scenes", test="train").test.split
    'train'
    """
    kind, place, options = parse(spec, **options)
    row = KINDS[kind]
    there = splits_of(Spec(kind, place, options)) if None in (fit, test) else ()
    chosen = [
        given if given is not None else _first(wanted, there, what, kind, place)
        for given, wanted, what in ((fit, row.fit, "fit"), (test, row.test, "test"))
    ]
    try:
        return Data(*(row.open(place, split=split, **options) for split in chosen))
    except DataWrong as error:
        raise DataWrong(f"{error}{_rather(kind, place)}") from error


def parse(spec: str, **options: Any) -> Spec:
    """Kind, place and options of a set as it is written.

    Raises:
        DataWrong: an unknown kind or option, or a place that is missing.

    >>> parse("folder:mine?ignore=0,255&classes=voc")
    Spec(kind='folder', place='mine', options={'ignore': (0, 255), 'classes': 'voc'})
    """
    head, _, tail = spec.partition("?")
    kind, _, place = head.partition(":")
    if kind not in KINDS:
        raise DataWrong(_unknown(head, kind))
    row = KINDS[kind]
    if kind != "scenes" and not place:
        raise DataWrong(f"{spec!r} says no place: {row.example}")
    if kind == "scenes" and place:
        raise DataWrong(f"the scenes are bundled and take no place; {spec!r} was given")
    written = {}
    for part in filter(None, tail.split("&")):
        key, equals, value = part.partition("=")
        if not equals:
            raise DataWrong(f"{part!r} in {spec!r}: options are written name=value")
        written[key] = _READ.get(key, str)(value)
    both = {**written, **options}
    known = _options(row)
    for key in both:
        if key not in known:
            which = f"{kind} takes {', '.join(known)}" if known else f"{kind} takes none"
            raise DataWrong(f"no option {key!r}: {which}{_or_rather(key, known)}")
    return Spec(kind, place, both)


def splits_of(spec: Spec) -> Sequence[str]:
    """Splits of a set that are there."""
    return KINDS[spec.kind].splits(spec.place, **spec.options)


def looks_like(path: Path) -> list[str]:
    """Kinds that a folder could be, the likeliest first."""
    return [kind for kind, row in KINDS.items() if path.is_dir() and row.fits(path)]


def _first(wanted: Sequence[str], there: Sequence[str], what: str, kind: str, place: str) -> str:
    for split in wanted:
        if split in there:
            return split
    if KINDS[kind].layout is not None and kind != "folder":
        return wanted[0]  # opening it says what was looked for, and what is there
    raise DataWrong(
        f"{kind}:{place} has no split {' or '.join(wanted)}; there "
        f"{'are ' + ', '.join(there) if there else 'are none'}. Say which: {what}=..."
        + _rather(kind, place)
    )


def _rather(kind: str, place: str) -> str:
    """What a place looks like instead, for the end of an error message."""
    others = [other for other in looks_like(Path(place)) if other != kind] if place else []
    return f"\nthis looks like {others[0]}: give {others[0]}:{place}" if others else ""


def _unknown(head: str, kind: str) -> str:
    examples = ", ".join(row.example for row in KINDS.values())
    path = Path(head)
    if path.is_dir():
        kinds = looks_like(path)
        if kinds:
            return f"{head} says no kind of set. This looks like {kinds[0]}: {kinds[0]}:{head}"
        return (
            f"{head} says no kind of set, and looks like none; found: {contents(path)}. "
            f"Kinds: {examples}"
        )
    return f"no kind of set {kind!r}{_or_rather(kind, KINDS)}; kinds: {examples}"


def _or_rather(name: str, known: Iterable[str]) -> str:
    close = nearest(name, known)
    return f"; {close}" if close else ""


def _options(row: Kind) -> list[str]:
    if row.options is None:
        return []
    taken = ("root", "repo", "split", "revision")  # said by the place, or by fit= and test=
    return [name for name in inspect.signature(row.options).parameters if name not in taken]


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise DataWrong(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1")


def _numbers(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise DataWrong(f"ignore={text}: give whole numbers, such as ignore=0,255")
    return tuple(int(part) for part in text.split(","))


def _texts(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


_READ: dict[str, Callable[[str], Any]] = {
    "ignore": _numbers,
    "reduce_zero_label": _truth,
    "picture_endings": _texts,
    "mask_endings": _texts,
}


def _with_layout(layout: Layout, fit: str, test: str) -> Kind:
    """The row of a set whose layout is fixed."""
    return Kind(
        open=layout.open,
        splits=lambda place: layout.splits_in(Path(place)),
        fit=(fit,),
        test=(test,),
        fits=lambda path: bool(layout.splits_in(path)),
        example=f"{layout.kind}:PATH",
        layout=lambda place: layout,
    )


def _folder_splits(place: str, **options: Any) -> Sequence[str]:
    return folder_layout(place, **options).splits_in(Path(place))


def _is_folder(path: Path) -> bool:
    return (path / CLASSES).is_file() or all((path / name).is_dir() for name in ("images", "masks"))


def _repo(place: str) -> tuple[str, str | None]:
    """A repository and its revision."""
    if Path(place).exists():
        return place, None
    repo, _, revision = place.partition("@")
    return repo, revision or None


def _hf(place: str, split: str, **options: Any) -> Segmentation:
    repo, revision = _repo(place)
    return hf(repo, split, revision=revision, **options)


def _hf_splits(place: str, config: str | None = None, **options: Any) -> Sequence[str]:
    repo, revision = _repo(place)
    return hf_splits(repo, revision, config)


def _is_hf(path: Path) -> bool:
    return any(path.glob("*.parquet")) or any(path.glob("data/*.parquet"))


_FIT, _TEST = ("train", "training"), ("validation", "val", "test")

KINDS: dict[str, Kind] = {
    "scenes": Kind(
        open=lambda place, split: scenes(split),
        splits=lambda place: tuple(SPLITS),
        fit=("probe",),
        test=("test",),
        fits=lambda path: False,
        example="scenes",
    ),
    "ade20k": _with_layout(ADE20K, "training", "validation"),
    "voc": _with_layout(VOC, "train", "val"),
    "cityscapes": _with_layout(CITYSCAPES, "train", "val"),
    "coco-stuff": _with_layout(COCO_STUFF, "train2017", "val2017"),
    "folder": Kind(
        open=folder,
        splits=_folder_splits,
        fit=_FIT,
        test=_TEST,
        fits=_is_folder,
        example="folder:PATH",
        options=folder,
        layout=folder_layout,
    ),
    "hf": Kind(
        open=_hf,
        splits=_hf_splits,
        fit=_FIT,
        test=_TEST,
        fits=_is_hf,
        example="hf:REPO@REVISION",
        options=hf,
    ),
}
