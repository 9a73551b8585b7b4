"""What the rows and the edges of a `HeadTable` are, and the checks they pass once.

*Rows*: one estimate a unit (layer, head, source group) and image. An image that has rows has one
for every unit of the table; a head that read nothing from a group has a row with 0 in it. So a sum
or a mean over rows means what it says, and a table that lost rows on the way is found out here
rather than averaged over. An image in which there is nothing to explain has no rows at all.

*Edges*: single attention edges of single images, `src -> dst`, by position in the prompt and by
token number within the image (-1: text). Where a token lies in the picture comes with the edge
(`place_edges`), so a table read from a file can be drawn with nothing but the picture.

Rows are sorted by image, layer, head and source, edges by image and then left as they came.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from interp.errors import TableError, nearest
from interp.tokens import TokenGrid

ROWS = ("layer", "head", "source", "image", "estimate")
EDGES = (
    "image", "layer", "head", "dst_position", "src_position", "dst", "src", "estimate",
)  # fmt: skip
PLACES = ("dst_x", "dst_y", "src_x", "src_y")
"""Optional columns of edges: centres of both tokens' boxes in pixels of the original picture."""

TEXT = -1


def checked_rows(rows: pd.DataFrame, groups: Sequence[str] | None) -> pd.DataFrame:
    """The rows sorted, with plain types: int64, str, float64, bool.

    Args:
        rows: see the module docstring; columns beyond `ROWS` are kept as they are.
        groups: names of the source groups in their order; None for the order of appearance.

    Raises:
        TableError: a missing column, a wrong type, an estimate that is no number, a source that is
            none of the groups, a doubled or a missing row.
    """
    frame = _columns(rows, ROWS, "rows").copy()
    _integers(frame, ("layer", "head", "image"), "rows")
    _numbers(frame, ("estimate",), "rows")
    if "verified" in frame and frame["verified"].dtype != bool:
        raise TableError(f"rows: verified is {frame['verified'].dtype}, bool would do")
    names = frame["source"].unique().tolist()
    if odd := [name for name in names if not isinstance(name, str)]:
        raise TableError(f"rows: the source {odd[0]!r} is no text")
    known = list(names if groups is None else groups)
    for name in names:
        if name not in known:
            raise TableError(
                f"rows: the source {name!r} is none of the groups {', '.join(known)} "
                f"{nearest(name, known)}".rstrip()
            )
    frame["source"] = frame["source"].astype(str)
    number = frame["source"].map({name: i for i, name in enumerate(known)}).to_numpy(np.int64)
    order = np.lexsort((number, frame["head"], frame["layer"], frame["image"]))
    frame = frame.iloc[order].reset_index(drop=True)
    _complete(frame)
    return frame


def checked_edges(edges: pd.DataFrame) -> pd.DataFrame:
    """The edges sorted by image, with plain types; places as float64, NaN for text.

    Raises:
        TableError: a missing column or a wrong type, an edge given twice, a place without the
            other three.
    """
    frame = _columns(edges, EDGES, "edges").copy()
    _integers(frame, EDGES[:-1], "edges", least=TEXT)
    _numbers(frame, ("estimate",), "edges")
    some = [name for name in PLACES if name in frame]
    if some:
        _columns(frame, PLACES, "edges with a place")
        for name in PLACES:
            frame[name] = frame[name].astype(np.float64)
            end = name.split("_")[0]
            if (lost := frame[name].isna() & (frame[end] != TEXT)).any():
                number = frame.loc[lost, end].iloc[0]
                raise TableError(f"edges: {name} of token {number} is missing; nan is for text, -1")
    key = ["image", "layer", "head", "dst_position", "src_position"]
    if (twice := frame.duplicated(key)).any():
        raise TableError(f"edges: {_told(frame[twice])} is there twice")
    return frame.sort_values("image", kind="stable").reset_index(drop=True)


def place_edges(edges: pd.DataFrame, grid: TokenGrid, first_image: int = 0) -> pd.DataFrame:
    """The edges with the columns `PLACES`: where both ends lie in the original picture.

    Args:
        edges: of one batch, with token numbers `dst` and `src` counted within the image.
        grid: the batch's `x.grid`.
        first_image: the number in `edges` of the batch's image 0.

    Raises:
        TableError: an image or a token that the grid does not have.
    """
    centre = (grid.box[:, :2] + grid.box[:, 2:]) / 2
    places = np.full((len(edges), 4), np.nan)
    number = edges["image"].to_numpy()
    for image in np.unique(number):
        if not 0 <= image - first_image < grid.n_images:
            raise TableError(
                f"edges of image {image} for a grid of the images "
                f"{first_image}..{first_image + grid.n_images - 1}"
            )
        own = centre[grid.of_image(int(image - first_image))]
        here = np.flatnonzero(number == image)
        for column, name in ((0, "dst"), (2, "src")):
            token = edges[name].to_numpy()[here]
            if (token >= len(own)).any():
                raise TableError(
                    f"edges: image {image} has no token {token.max()}: its {len(own)} tokens in "
                    f"this grid are numbered 0..{len(own) - 1}"
                )
            seen = token != TEXT
            places[here[seen], column : column + 2] = own[token[seen]]
    return edges.assign(**{name: places[:, i] for i, name in enumerate(PLACES)})


def _columns(frame: pd.DataFrame, needed: Sequence[str], what: str) -> pd.DataFrame:
    if not isinstance(frame, pd.DataFrame):
        raise TableError(f"{what} are a {type(frame).__name__}; a pandas DataFrame would do")
    if missing := [name for name in needed if name not in frame]:
        raise TableError(
            f"{what} lack {', '.join(missing)}; they have {', '.join(map(str, frame.columns))}"
        )
    return frame


def _integers(frame: pd.DataFrame, names: Sequence[str], what: str, least: int = 0) -> None:
    for name in names:
        # no row has no type: an empty frame's columns are objects
        if len(frame) and not pd.api.types.is_integer_dtype(frame[name].dtype):
            raise TableError(f"{what}: {name} is {frame[name].dtype}, whole numbers would do")
        if frame[name].isna().any() or (len(frame) and frame[name].min() < least):
            raise TableError(f"{what}: {name} counts from {least}, and one is less or missing")
        frame[name] = frame[name].astype(np.int64)


def _numbers(frame: pd.DataFrame, names: Sequence[str], what: str) -> None:
    for name in names:
        try:
            frame[name] = frame[name].astype(np.float64)
        except (TypeError, ValueError) as error:
            raise TableError(f"{what}: {name} is {frame[name].dtype}, floats would do") from error
        if not (finite := np.isfinite(frame[name].to_numpy())).all():
            bad = frame[~finite]
            raise TableError(
                f"{what}: the {name} of {_told(bad)} is {bad[name].iloc[0]}; an image without an "
                "estimate has no rows"
            )


def _complete(rows: pd.DataFrame) -> None:
    """Each image has each unit once."""
    units = rows.groupby(["layer", "head", "source"], sort=True).ngroup().to_numpy()
    images, image = np.unique(rows["image"].to_numpy(), return_inverse=True)
    count = np.zeros((len(images), units.max() + 1 if len(units) else 0), dtype=np.int64)
    np.add.at(count, (image, units), 1)
    if (count == 1).all():
        return
    at, unit = np.argwhere(count != 1)[0]
    named = rows[units == unit].drop(columns="image")
    if count[at, unit]:
        raise TableError(
            f"rows: image {images[at]} has {count[at, unit]} rows for {_told(named)}; one a unit "
            "and image"
        )
    raise TableError(
        f"rows: image {images[at]} has no row for {_told(named)}, which other images have; a head "
        "that read nothing there has a row with 0"
    )


def _told(rows: pd.DataFrame) -> str:
    """Which row the first of some is."""
    key = ("image", "layer", "head", "source", "dst_position", "src_position")
    return ", ".join(f"{name} {rows[name].iloc[0]}" for name in key if name in rows)
