"""Is a folder of pictures and masks what it should be? An answer in about a second.

`check_data` tells which kind of set a folder is, lists every split (which takes no reading), and
reads a few samples spread evenly over each. What it finds wrong comes first:

    files       splits or folders that are not there, archives not unpacked, pictures without masks
                and masks without pictures
    samples     files that cannot be read, masks in colours, sizes that differ, numbers that are no
                class, masks in which nothing is labelled

What is unusual but usable is a note: another number of pictures than the set was released with, for
instance.

>>> report = check_data("scenes")
>>> report.ok, [(split.split, split.n) for split in report.splits]
(True, [('train', 9000), ('probe', 1000), ('test', 1000)])
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import numpy as np
from PIL import Image
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from interp.datasets.base import Segmentation, spread
from interp.datasets.finding import contents, packed
from interp.datasets.layouts import Files, Layout
from interp.datasets.opening import KINDS, Spec, looks_like, parse, splits_of
from interp.errors import DataWrong, nearest
from interp.labels import IGNORE


@dataclass(frozen=True)
class SplitCheck:
    """What was found in one split.

    Attributes:
        split: its name; empty if the set has none.
        n: samples that have a picture and a mask.
        sizes: (width, height) of the samples that were read, by area.
        modes: how pictures and masks are stored, in Pillow's words, such as "RGB and P".
        classes: numbers of the classes in them.
        ignored: share of their pixels without a label; NaN if none was read.
        problems: what is wrong.
    """

    split: str
    n: int
    sizes: tuple[tuple[int, int], ...] = ()
    modes: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    ignored: float = float("nan")
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `check_data` found; `print(report)` shows it.

    Attributes:
        kind: of the set, such as "ade20k"; empty if it was not recognised.
        title: for people.
        splits: one entry a split.
        problems: what is wrong with the set as a whole.
        notes: what is unusual, but usable.
        sets: the splits that can be opened, by name (incomplete ones without what lacks).
    """

    kind: str
    title: str
    splits: tuple[SplitCheck, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sets: dict[str, Segmentation] = field(default_factory=dict, repr=False)

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.all_problems()

    def all_problems(self) -> list[str]:
        """What is wrong, of the set and of its splits."""
        of_splits = [
            f"{split.split}: {problem}" if split.split else problem
            for split in self.splits
            for problem in split.problems
        ]
        return [*self.problems, *of_splits]

    def __rich__(self) -> Group:
        problems = self.all_problems()
        lines: list[Text | Table] = [Text(f"wrong: {problem}", "red") for problem in problems]
        if self.splits:
            lines.append(self._table())
        lines += [Text(f"note: {note}", "yellow") for note in self.notes]
        if not problems:
            verdict = Text(f"{self.title}: nothing wrong was found", "green")
        else:
            count = f"{len(problems)} thing{'s' * (len(problems) != 1)} wrong"
            verdict = Text(f"{self.title or 'no known set'}: {count}", "red")
        return Group(*lines, verdict)

    def __str__(self) -> str:
        out = StringIO()
        Console(file=out, width=100, color_system=None).print(self)
        return out.getvalue().rstrip()

    def _table(self) -> Table:
        """A column a split: a terminal has room for few columns, and sets have few splits."""
        names = (split.split or "no splits" for split in self.splits)
        table = Table("", *names, box=box.SIMPLE_HEAD)
        low, middle, high = zip(*(_three(split.sizes) for split in self.splits), strict=True)
        table.add_row("samples", *(f"{split.n:,}" for split in self.splits))
        table.add_row("of which read", *(f"{len(split.sizes)}" for split in self.splits))
        table.add_row("smallest", *low)
        table.add_row("median", *middle)
        table.add_row("largest", *high)
        table.add_row("stored as", *(", ".join(split.modes) for split in self.splits))
        table.add_row("classes in them", *(f"{len(split.classes)}" for split in self.splits))
        table.add_row("without a label", *(_share(split.ignored) for split in self.splits))
        return table


def check_data(place: str | os.PathLike[str], n: int = 6, kind: str | None = None) -> Report:
    """Find out what is wrong with a set of pictures and masks. Never raises for what it finds.

    Args:
        place: a folder, or a set as `open_data` takes it ("ade20k:PATH").
        n: samples to read of each split.
        kind: what the folder is meant to be; by default what it looks like.
    """
    try:
        spec = _spec(str(place), kind)
        row = KINDS[spec.kind]
        if row.layout is None:
            return _check_plain(spec, n)
        return _check_files(spec, row.layout(spec.place, **spec.options), n)
    except DataWrong as error:
        return Report(kind or "", kind or "", problems=(str(error),))


def _spec(place: str, kind: str | None) -> Spec:
    if kind is not None:
        if kind not in KINDS:
            close = nearest(kind, KINDS) or "there are"
            raise DataWrong(f"no kind of set {kind!r}; {close} ({', '.join(KINDS)})")
        return parse(place if place.startswith(f"{kind}:") else f"{kind}:{place}")
    if place.partition("?")[0].partition(":")[0] in KINDS:
        return parse(place)
    path = Path(place)
    if not path.is_dir():
        raise DataWrong(f"{place} is no folder" + " but a file" * path.is_file())
    kinds = looks_like(path)
    if not kinds:
        examples = ", ".join(row.example for row in KINDS.values())
        lines = [f"{place} looks like no kind of set ({examples})", f"found: {contents(path)}"]
        raise DataWrong("\n".join([*lines, *packed(path), "--kind says what was looked for"]))
    return parse(f"{kinds[0]}:{place}")


def _check_files(spec: Spec, layout: Layout, n: int) -> Report:
    """A set whose files can be listed."""
    root = Path(spec.place)
    there = layout.splits_in(root)
    problems, notes = [], []
    if spec.kind == "folder":
        if not there:  # pictures and masks directly in their folders
            layout = KINDS["folder"].layout(root, split=False, **spec.options)  # type: ignore[misc]
            there = [""]
            notes.append("no splits: open_data wants folders such as images/train and images/val")
    else:
        for split in (*KINDS[spec.kind].fit, *KINDS[spec.kind].test):
            if split not in there:
                try:
                    layout.listing(root, split)
                except DataWrong as error:
                    problems.append(str(error))
    splits: list[SplitCheck] = []
    sets: dict[str, Segmentation] = {}
    for split in there:
        try:
            listing = layout.listing(root, split)
        except DataWrong as error:
            splits.append(SplitCheck(split, 0, problems=(str(error),)))
            continue
        data = layout.files(listing, split)
        sets[split] = data
        splits.append(_sampled(data, n, listing.faults()))
        released = dict(zip(layout.splits, layout.released)).get(split, len(data))
        if len(data) != released:
            notes.append(f"{split}: {len(data):,} samples; the set was released with {released:,}")
    return Report(spec.kind, layout.title, tuple(splits), tuple(problems), tuple(notes), sets)


def _check_plain(spec: Spec, n: int) -> Report:
    """A set that can only be opened and read."""
    splits, sets = [], {}
    for split in splits_of(spec):
        try:
            sets[split] = KINDS[spec.kind].open(spec.place, split=split, **spec.options)
            splits.append(_sampled(sets[split], n, []))
        except DataWrong as error:
            splits.append(SplitCheck(split, 0, problems=(str(error),)))
    return Report(spec.kind, spec.kind, tuple(splits), sets=sets)


def _sampled(data: Segmentation, n: int, faults: Sequence[str]) -> SplitCheck:
    """Read a few samples, and say what is wrong with them."""
    problems = list(faults)
    sizes, modes, counts = [], dict[str, None](), np.zeros(IGNORE + 1, dtype=np.int64)
    for index in spread(len(data), n):
        if isinstance(data, Files):
            modes[_modes(data, index)] = None
        try:
            sample = data[index]
        except DataWrong as error:
            problems.append(str(error))
            continue
        sizes.append(sample.image.size)
        counts += np.bincount(sample.mask.ravel(), minlength=len(counts))
        if (sample.mask == IGNORE).all():
            problems.append(f"in the mask of {sample.name} no pixel is labelled")
    total = counts.sum()
    return SplitCheck(
        data.split,
        len(data),
        tuple(sorted(sizes, key=lambda size: (size[0] * size[1], size))),
        tuple(modes),
        tuple(int(k) for k in np.flatnonzero(counts[:IGNORE])),
        float(counts[IGNORE] / total) if total else float("nan"),
        tuple(problems),
    )


def _modes(data: Files, index: int) -> str:
    """How a sample's picture and mask are stored."""
    pair, found = data.pairs[index], []
    for file in (pair.picture, pair.mask):
        try:
            with Image.open(data.base / file) as image:
                found.append(image.mode)
        except (OSError, SyntaxError):
            found.append("unreadable")  # reading it says why
    return " and ".join(found)


def _share(share: float) -> str:
    return "" if np.isnan(share) else f"{share:.1%}"


def _three(sizes: Sequence[tuple[int, int]]) -> tuple[str, str, str]:
    """The smallest, the median and the largest size, in words."""
    if not sizes:
        return "", "", ""
    words = [f"{width} x {height}" for width, height in sizes]
    return words[0], words[len(words) // 2], words[-1]
