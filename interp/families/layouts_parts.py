"""What the layout functions are made of: grids cut into tiles, and edges of patches.

Columns and rows of patches are pairs (start, end) in pixels of the original picture. So a tile may
have any place and any scale, and a patch grid that does not fill its tile (14-pixel patches in 384
pixels) leaves the gap that the model leaves. `tiled_view` makes a view of them: a grid that is cut
into equal tiles, each of them one row of the vision tower's batch; one tile is the plain case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from interp.families.geometry import Geometry, X, Y
from interp.layout import Lattice, View, raster_boxes

Sizes = Sequence[tuple[int, int]]
Tiles = Sequence[tuple[int, int]] | None


def tiled_view(
    name: str,
    x: np.ndarray,
    y: np.ndarray,
    *,
    tiles: tuple[int, int] = (1, 1),
    row: int,
    n_rows: int,
    slot: int = 0,
    merge: int = 1,
    prefix: int = 0,
    fed: int = 0,
) -> View:
    """A grid cut into equal tiles, whose tokens come tile by tile, in each of them row by row.

    Args:
        name: of the view.
        x: `[columns, 2]` start and end of each column of patches, in the original picture.
        y: `[rows, 2]` likewise.
        tiles: (rows, columns) of tiles.
        row: the first tile's row in the vision tower's batch.
        n_rows: rows of that batch.
        slot: the first placeholder.
        merge: a block of merge x merge patches is one token.
        prefix: tokens in front of the patches in a vision state (CLS).
        fed: how many of those the adapter is fed, and the prompt has placeholders for.
    """
    if len(x) // tiles[1] % merge or len(y) // tiles[0] % merge:
        raise NotImplementedError(
            f"tiles of {len(y) // tiles[0]} x {len(x) // tiles[1]} patches do not divide into "
            f"blocks of {merge} x {merge}"
        )
    patches = tiled_lattice(x, y, tiles, row, n_rows, prefix)
    adapter = tiled_lattice(merged(x, merge), merged(y, merge), tiles, row, n_rows, fed)
    tile, position = adapter.at.T
    slots = slot + (tile - row) * adapter.extent[1] + position
    return View(name, adapter.shape, adapter.boxes, slots, adapter, patches)


def tiled_lattice(
    x: np.ndarray, y: np.ndarray, tiles: tuple[int, int], row: int, n_rows: int, prefix: int
) -> Lattice:
    """The lattice of a grid of which each tile is a row of the state; `tiled_view` explains."""
    rows, cols = len(y) // tiles[0], len(x) // tiles[1]
    r, c = np.indices((len(y), len(x))).reshape(2, -1)
    tile = row + (r // rows) * tiles[1] + c // cols
    position = prefix + (r % rows) * cols + c % cols
    return Lattice(
        (len(y), len(x)),
        raster_boxes(x, y),
        np.stack([tile, position], axis=1),
        (n_rows, prefix + rows * cols),
    )


def at_row(row: int, positions: np.ndarray) -> np.ndarray:
    """`Lattice.at` of cells that all stand in one row of the state."""
    return np.stack([np.full(positions.size, row), positions.ravel()], axis=1)


def steps(tile: int, patch: int, n_tiles: int = 1) -> np.ndarray:
    """(start, end) of the patches along one axis of some tiles, `[n, 2]` in model pixels.

    >>> steps(5, 2, n_tiles=2).tolist()     # the fifth pixel of each tile is in no patch
    [[0, 2], [2, 4], [5, 7], [7, 9]]
    """
    start = (np.arange(n_tiles)[:, None] * tile + np.arange(tile // patch) * patch).ravel()
    return np.stack([start, start + patch], axis=1)


def merged(edges: np.ndarray, n: int) -> np.ndarray:
    """(start, end) of blocks of `n` patches, from those of the patches.

    >>> merged(np.array([[0, 2], [2, 4], [5, 7], [7, 9]]), 2).tolist()
    [[0, 4], [5, 9]]
    """
    blocks = edges[: len(edges) // n * n].reshape(-1, n, 2)
    return np.stack([blocks[:, 0, 0], blocks[:, -1, 1]], axis=1)


def patches_of(
    geometry: Geometry, vision: Any, tiles: tuple[int, int] = (1, 1)
) -> tuple[np.ndarray, np.ndarray]:
    """(start, end) of columns and of rows of patches in the original picture."""
    patch = number(vision.patch_size)
    x, y = (
        geometry.back(axis, steps(geometry.target[axis] // n, patch, n))
        for axis, n in ((X, tiles[1]), (Y, tiles[0]))
    )
    return x, y


def prefix_tokens(config: Any) -> tuple[int, int]:
    """How many tokens stand in front of the patches in a vision state, and how many are fed on.

    Raises:
        NotImplementedError: a tower that is not known, or one without CLS of which the first patch
            would be dropped in its place.
    """
    kind = config.vision_config.model_type
    known = {
        "clip_vision_model": 1,
        "internvl_vision": 1,
        "siglip_vision_model": 0,
        "idefics3_vision": 0,
        "smolvlm_vision": 0,
    }
    if kind not in known:
        raise NotImplementedError(
            f"a vision tower of type {kind!r}: how many tokens stand in front of its patches is "
            f"not known; it is for {', '.join(known)}"
        )
    prefix = known[kind]
    if getattr(config, "vision_feature_select_strategy", "full") == "full":
        return prefix, prefix
    if not prefix:
        raise NotImplementedError(
            f"vision_feature_select_strategy='default' drops the first token of a {kind}, which "
            "is a patch: what is left is no grid; 'full' keeps it"
        )
    return prefix, 0


def model_pixels(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(width, height) of what the vision tower is given."""
    height, width = tensors["pixel_values"].shape[-2:]
    return width, height


def number(size: Any) -> int:
    """A size that some configurations write as a number and some as two equal ones."""
    return int(size if isinstance(size, int) else size[0])


def rows_of_batch(tensors: Mapping[str, Tensor], n: int, what: str) -> None:
    """Raise unless `pixel_values` has the rows that the pictures should give."""
    found = len(tensors["pixel_values"])
    if found != n:
        raise ValueError(f"pixel_values has {found} rows where these pictures give {n}, {what}")


def runs(tensors: Mapping[str, Tensor], config: Any) -> list[int]:
    """Unbroken runs of image placeholders in each row of the batch."""
    is_image = (tensors["input_ids"] == config.image_token_id).int()
    starts = is_image.clone()
    starts[:, 1:] -= is_image[:, :-1]
    return (starts > 0).sum(1).tolist()


def how_cut(
    sizes: Sizes | None,
    tiles: Tiles,
    *,
    n_rows: int,
    tile: tuple[int, int],
    rule: Callable[[tuple[int, int]], tuple[int, int]] | None,
    uncut: bool,
) -> tuple[Sizes, Sequence[tuple[int, int]]]:
    """The size of each picture and the (rows, columns) of its tiles, from what is told.

    Args:
        sizes: of the original pictures, if told.
        tiles: as told.
        n_rows: squares of pixels that the model is given.
        tile: (width, height) of one.
        rule: what the processor makes of a size; None without a processor.
        uncut: whether the tensors themselves say that each square is a picture.

    Raises:
        ValueError: it does not follow from all that.
    """
    if tiles is not None:
        if sizes is None:
            sizes = [(max(cols, 1) * tile[X], max(rows, 1) * tile[Y]) for rows, cols in tiles]
        if len(sizes) != len(tiles):
            raise ValueError(f"tiles of {len(tiles)} pictures, but sizes of {len(sizes)}")
        return sizes, tiles
    if sizes is not None and rule is not None:
        return sizes, [rule(size) for size in sizes]
    n_pictures = None if sizes is None else len(sizes)
    if n_pictures == n_rows or (sizes is None and uncut):
        return [tile] * n_rows if sizes is None else sizes, [(0, 0)] * n_rows
    raise ValueError(
        f"{n_rows} squares of pixels for {n_pictures or 'an unknown number of'} picture(s): the "
        "tensors alone do not say which squares are one picture, and how they lie in it. Give "
        "tiles=[(rows, columns), ...], one a picture, (0, 0) for one that was not cut; or sizes="
        "[(width, height), ...] of the original pictures and the processor"
    )


def several(tiles: tuple[int, int]) -> int:
    """How many tiles; none, if the picture was not cut."""
    n = tiles[0] * tiles[1]
    return n if n > 1 else 0
