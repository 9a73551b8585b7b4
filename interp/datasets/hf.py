"""Any Hugging Face `datasets` set with a column of pictures and a column of masks.

    hf("owner/set", mask="label", revision="0f1e2d...", split="train", classes="ade20k",
       reduce_zero_label=True)

takes a repository, a local folder that `datasets` understands (parquet files, a picture folder), or
a `datasets.Dataset` that is in memory already. Pictures and masks are read from their bytes by the
same code as files on disk; the library's own decoder would turn them by their EXIF orientation.

A repository changes; a commit does not. Without `revision=` a warning is given, and the fingerprint
says so. Code from a repository is never run. The `datasets` library is imported when first needed,
and whether it may use the network is its own business (`HF_HUB_OFFLINE=1` forbids it).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from interp.datasets.base import Pictures, Sample, spread
from interp.datasets.masks import Coding, check_sizes, read_mask, read_picture
from interp.datasets.palettes import Color, class_list
from interp.errors import DataWrong
from interp.labels import IGNORE

_READ = 16  # rows whose bytes are part of the fingerprint; files have sizes, rows have none


class Columns(Pictures):
    """Samples in two columns of a `datasets.Dataset`; made by `hf`."""

    def __init__(
        self,
        name: str,
        split: str,
        classes: tuple[str, ...],
        colors: tuple[Color, ...],
        rows: Any,
        columns: tuple[str, str],
        coding: Coding,
        source: str,
    ) -> None:
        super().__init__(name, split, classes, colors, len(rows))
        self._rows, self._columns, self.coding, self._source = rows, columns, coding, source

    def read(self, index: int) -> Sample:
        """Sample `index`; it is called after split and row, such as "validation/17".

        Raises:
            DataWrong: a row that cannot be read, of different sizes, or with wrong numbers.
        """
        picture, mask = self._cells(index)
        name = f"{self.split or 'row'}/{index}"
        called = [f"{name} ({column})" for column in self._columns]
        if not isinstance(picture, bytes):
            picture = _png(np.asarray(picture, dtype=np.uint8))
        image = read_picture(picture, called[0])
        raw = read_mask(mask, called[1]) if isinstance(mask, bytes) else np.asarray(mask)
        if raw.ndim != 2 or not np.issubdtype(raw.dtype, np.integer):
            raise DataWrong(
                f"{called[1]} holds {raw.dtype} {list(raw.shape)}; a mask is [height, width] of "
                "whole numbers"
            )
        labels = self.coding.decode(raw, called[1])
        check_sizes(image, labels, *called)
        return Sample(image, labels, name)

    def identity(self, chosen: range) -> Iterator[bytes]:
        """Repository and revision, columns, coding, rows; bytes of rows spread over the set."""
        yield repr((self._source, self._columns, self.coding.table, chosen)).encode()
        for place in spread(len(chosen), _READ):
            for cell in self._cells(chosen[place]):
                yield cell if isinstance(cell, bytes) else np.asarray(cell).tobytes()

    def _cells(self, index: int) -> list[Any]:
        """Picture and mask of a row: bytes of files, or nested lists."""
        row = self._rows[index]
        cells = []
        for column in self._columns:
            cell = row[column]
            if isinstance(cell, dict):  # an undecoded picture: its bytes, or where they are
                cell = cell["bytes"] or Path(cell["path"]).read_bytes()
            if cell is None:
                raise DataWrong(f"row {index} of {self.split or 'the set'} has no {column}")
            cells.append(cell)
        return cells


def hf(
    repo: Any,
    split: str = "validation",
    *,
    image: str = "image",
    mask: str = "annotation",
    revision: str | None = None,
    config: str | None = None,
    classes: Sequence[str] | str | None = None,
    colors: Sequence[Color] | None = None,
    ignore: int | tuple[int, ...] = IGNORE,
    reduce_zero_label: bool = False,
) -> Columns:
    """A set of the Hugging Face `datasets` library.

    Args:
        repo: a repository ("owner/set"), a local folder, or a `datasets.Dataset` or `DatasetDict`.
        split: of a repository, a folder or a `DatasetDict`; of a `Dataset`, what to call it.
        image: column of the pictures.
        mask: column of the masks: pictures, or nested lists of whole numbers.
        revision: commit of the repository; without one a warning is given.
        config: which of a repository's configurations.
        classes: names by class number, or the name of a known list ("ade20k", "voc", "cityscapes",
            "coco_stuff"); None takes those of the mask column, if it has a `ClassLabel`.
        colors: RGB by class number.
        ignore: number, or numbers, in the masks that mean "no label".
        reduce_zero_label: 0 means "no label" and class k is written k + 1.

    Raises:
        DataWrong: a repository, split or column that is not there, or no class names.
    """
    import datasets

    rows, source = _rows(repo, split, revision, config)
    for column in (image, mask):
        if column not in rows.features:
            raise DataWrong(
                f"no column {column!r}: there are {', '.join(rows.features)}. Give image= and "
                "mask=, names of columns"
            )
    if classes is None:
        classes = _label_names(rows.features[mask])
        if not classes:
            raise DataWrong(
                f"the column {mask!r} does not say what its numbers mean; give classes=, a list of "
                'names, or a known list such as classes="ade20k"'
            )
    names, given = class_list(classes, colors)
    coding = Coding.plain(
        len(names),
        ignore=ignore,
        reduce_zero_label=reduce_zero_label,
        hint=f"There are {len(names)} classes. Masks that count from 1 want "
        "reduce_zero_label=True; another number for 'no label' is given as ignore=",
    )
    for column in (image, mask):
        if isinstance(rows.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return Columns("hf", split, names, given, rows, (image, mask), coding, source)


def hf_splits(repo: str, revision: str | None = None, config: str | None = None) -> list[str]:
    """Names of the splits of a repository or local folder.

    Raises:
        DataWrong: not there.
    """
    import datasets

    try:
        return list(datasets.get_dataset_split_names(repo, config, revision=revision))
    except Exception as error:  # the library's errors have no common base
        raise DataWrong(f"datasets cannot find {repo!r}: {error}") from error


def _rows(repo: Any, split: str, revision: str | None, config: str | None) -> tuple[Any, str]:
    """The rows, and what to call their source in a fingerprint."""
    import datasets

    if isinstance(repo, datasets.Dataset):
        return repo, "in memory"
    if isinstance(repo, datasets.DatasetDict):
        if split not in repo:
            raise DataWrong(f"no split {split!r}: there are {', '.join(map(str, repo))}")
        return repo[split], "in memory"
    if not isinstance(repo, str | Path):
        raise DataWrong(
            f"{type(repo).__name__} is no repository, folder, datasets.Dataset or DatasetDict"
        )
    local = Path(repo).exists()
    if revision is None and not local:
        warnings.warn(
            f"{repo} without a revision: what is read may change from day to day. Give "
            "revision=, a commit of the repository",
            stacklevel=3,
        )
    try:
        rows = datasets.load_dataset(str(repo), config, split=split, revision=revision)
    except Exception as error:  # the library's errors have no common base
        raise DataWrong(f"datasets cannot open {repo!r}, split {split!r}: {error}") from error
    # a folder's place on this machine is nobody's business
    return rows, "folder" if local else f"{repo}@{revision or 'unpinned'} {config or ''}"


def _label_names(feature: Any) -> list[str] | None:
    """Names of the `ClassLabel` that a column's numbers are, however deep they are nested."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    inner = getattr(feature, "feature", None)
    return _label_names(inner) if inner is not None else None


def _png(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
