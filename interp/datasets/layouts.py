"""How a set lies on a disk, written as data, and the one reader of all of them.

Sets of the field differ in names of folders and endings of files, and in nothing else: a picture
`images/validation/ADE_val_00000001.jpg` belongs to the mask `annotations/validation/
ADE_val_00000001.png`, because what is left without folder and ending is the same. A `Layout` says
which folders and endings; `Layout.open` then

1. looks for the folders, at the root or where archives of the set unpack to (`below`);
2. lists both folders, and the list of names if the set comes with one (`listing`);
3. pairs pictures with masks by name, in sorted order, and refuses to lose one silently;
4. hands over `Files`, which reads a pair when indexed.

Whatever is not as it should be is told by name: which places were looked for, what is there
instead, how many masks lack a picture and what the first are called.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from interp.datasets.base import Pictures, Sample
from interp.datasets.finding import PACKED, contents, first_names, named, packed, walk
from interp.datasets.masks import Coding, check_sizes, read_mask, read_picture
from interp.datasets.palettes import Color
from interp.errors import DataWrong

_FIRST = 4  # pairs whose bytes are part of the fingerprint


class Pair(NamedTuple):
    """A sample's files, relative to the set's base folder."""

    name: str
    picture: str
    mask: str


@dataclass(frozen=True)
class Listing:
    """The files of one split, before they are paired.

    Attributes:
        base: the folder that the files' names start from.
        pictures: name of the sample to file; masks: the same.
        coding: what the numbers in these masks mean.
        looked: where pictures and masks were looked for, in words.
    """

    base: Path
    pictures: dict[str, str]
    masks: dict[str, str]
    coding: Coding
    looked: tuple[str, str]

    def faults(self) -> list[str]:
        """What keeps the split from being read, in words; empty if nothing does."""
        found = []
        for files, looked in zip((self.pictures, self.masks), self.looked, strict=True):
            if not files:
                found.append(f"no {looked}")
        if not found:
            lonely = sorted(set(self.pictures) - set(self.masks))
            spare = sorted(set(self.masks) - set(self.pictures))
            if lonely:
                found.append(
                    f"{_count(lonely, 'picture')} of {len(self.pictures)} without a mask "
                    f"({self.looked[1]}): {first_names(lonely)}"
                )
            if spare:
                found.append(
                    f"{_count(spare, 'mask')} of {len(self.masks)} without a picture "
                    f"({self.looked[0]}): {first_names(spare)}"
                )
        return found


@dataclass(frozen=True)
class Layout:
    """Where a set's files are and what its masks' numbers mean.

    Attributes:
        kind: the set's name, such as "ade20k".
        title: for people.
        classes: names by class number; colors: RGB.
        splits: names of its parts.
        pictures: folder of pictures, with "{split}" where the split's name goes.
        masks: folder of masks, likewise.
        picture_endings: of pictures' files, from the end of the sample's name on.
        codings: endings of masks' files, and what their numbers mean. The first ending that is
            found at all is taken for the whole split.
        below: folders under the root in which the set may begin; "" is the root.
        names: file with the names of a split's samples, one a line; empty if all files count.
        released: how many samples each of `splits` has as released; empty if nobody knows.
    """

    kind: str
    title: str
    classes: tuple[str, ...]
    colors: tuple[Color, ...] = field(repr=False)
    splits: tuple[str, ...]
    pictures: str
    masks: str
    picture_endings: tuple[str, ...]
    codings: tuple[tuple[str, Coding], ...] = field(repr=False)
    below: tuple[str, ...] = ("",)
    names: str = ""
    released: tuple[int, ...] = ()

    def needs(self, split: str) -> list[str]:
        """Folders and files of a split, relative to the set's base."""
        return [n.format(split=split) for n in (self.pictures, self.masks, self.names) if n]

    def base(self, root: Path, split: str) -> Path | None:
        """The folder under `root` in which a split begins, or None."""
        for below in self.below:
            if all((root / below / need).exists() for need in self.needs(split)):
                return root / below
        return None

    def splits_in(self, root: Path) -> list[str]:
        """Splits that are there, by their folders."""
        return [split for split in self.splits if self.base(root, split) is not None]

    def open(self, root: str | os.PathLike[str], split: str) -> Files:
        """The samples of a split.

        Raises:
            DataWrong: an unknown split, folders that are not there, files without partner.
        """
        listing = self.listing(root, split)
        faults = listing.faults()
        if faults:
            raise DataWrong(f"{self.title}, split {split!r}, in {root}: " + "; ".join(faults))
        return self.files(listing, split)

    def files(self, listing: Listing, split: str) -> Files:
        """The samples of a listing that have both files, in order of their names."""
        both = sorted(set(listing.pictures) & set(listing.masks))
        pairs = [Pair(name, listing.pictures[name], listing.masks[name]) for name in both]
        return Files(self, split, listing.base, pairs, listing.coding)

    def listing(self, root: str | os.PathLike[str], split: str) -> Listing:
        """The files of a split, paired or not.

        Raises:
            DataWrong: an unknown split, folders that are not there, two files of one name.
        """
        if split not in self.splits:
            raise DataWrong(
                f"no split {split!r}: {self.title} has {', '.join(self.splits) or 'none'}"
            )
        base = self.base(Path(root), split)
        if base is None:
            raise DataWrong(self._not_there(Path(root), split))
        pictures = self.pictures.format(split=split)
        masks = self.masks.format(split=split)
        found = named(base, pictures, self.picture_endings)
        in_masks = list(walk(base / masks))
        by_ending = ((named(base, masks, (e,), in_masks), coding) for e, coding in self.codings)
        labels, coding = next((one for one in by_ending if one[0]), ({}, self.codings[0][1]))
        looked = [
            f"{folder}/*{' or *'.join(endings)}"
            for folder, endings in (
                (pictures, self.picture_endings),
                (masks, tuple(ending for ending, _ in self.codings)),
            )
        ]
        if self.names:
            wanted = _lines(base / self.names.format(split=split))
            # all that is named counts, be it there or not; what is not named belongs elsewhere
            found = {name: found[name] for name in wanted if name in found}
            labels = {name: labels[name] for name in wanted if name in labels}
            looked = [f"{place} named in {self.names.format(split=split)}" for place in looked]
            absent = [name for name in wanted if name not in found and name not in labels]
            if absent:
                raise DataWrong(
                    f"{self.names.format(split=split)} names {len(wanted)} samples; of "
                    f"{len(absent)} there is neither picture nor mask: {first_names(absent)}"
                )
        return Listing(base, found, labels, coding, (looked[0], looked[1]))

    def _not_there(self, root: Path, split: str) -> str:
        """What was looked for, and what is there."""
        if not root.is_dir():
            archive = root.is_file() and root.name.lower().endswith(PACKED)
            why = "is packed: unpack it first" if archive else "is no folder"
            return f"{self.title}: {root} {why}"
        lines = [f"no {self.title}, split {split!r}, in {root}; looked for"]
        for below in self.below:
            for need in self.needs(split):
                there = "there" if (root / below / need).exists() else "not there"
                lines.append(f"  {Path(below, need).as_posix()}: {there}")
        lines.append(f"found: {contents(root)}")
        lines += packed(root)
        others = [other for other in self.splits_in(root) if other != split]
        if others:
            lines.append(f"splits that are there: {', '.join(others)}")
        for above in list(root.absolute().parents)[:2]:
            if self.base(above, split) is not None:
                lines.append(f"the set begins further up: give {above}")
                break
        return "\n".join(lines)


class Files(Pictures):
    """Samples in files; made by `Layout.open`."""

    def __init__(
        self, layout: Layout, split: str, base: Path, pairs: list[Pair], coding: Coding
    ) -> None:
        super().__init__(layout.kind, split, layout.classes, layout.colors, len(pairs))
        self.base, self.pairs, self.coding = base, pairs, coding

    def read(self, index: int) -> Sample:
        """Sample `index`.

        Raises:
            DataWrong: files that cannot be read, of different sizes, or with numbers that are no
                class.
        """
        pair = self.pairs[index]
        image = read_picture(self.base / pair.picture, pair.picture)
        mask = self.coding.decode(read_mask(self.base / pair.mask, pair.mask), pair.mask)
        check_sizes(image, mask, pair.picture, pair.mask)
        return Sample(image, mask, pair.name)

    def identity(self, chosen: range) -> Iterator[bytes]:
        """Coding, names and sizes of files; the bytes of the first pairs."""
        yield repr(self.coding.table).encode()
        for count, index in enumerate(chosen):
            pair = self.pairs[index]
            files = [self.base / pair.picture, self.base / pair.mask]
            yield repr((pair.name, *(file.stat().st_size for file in files))).encode()
            if count < _FIRST:
                yield from (file.read_bytes() for file in files)


def _count(names: list[str], what: str) -> str:
    return f"{len(names)} {what}{'s' * (len(names) != 1)}"


def _lines(file: Path) -> list[str]:
    """The names in a list, each once."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(filter(None, lines)))
