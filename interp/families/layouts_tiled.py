"""Layouts of families that look twice: at the whole picture, and at tiles of it.

* `anyres` (LLaVA-NeXT, LLaVA-OneVision): resize with the aspect kept, pad to a canvas of whole
  tiles, encode tile by tile. Behind the adapter the tiles are put together again, columns or rows
  that are padding are cut off, a newline token ends each row, and OneVision resamples what is still
  too large.
* `tiled_thumbnail` (InternVL) and `tiled_global` (Idefics3, SmolVLM): stretch the picture over a
  canvas of whole tiles. Tokens stay tile by tile; the whole picture comes last.

A picture that is not cut has the view "base" alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.families.geometry import Geometry, X, Y, image_settings
from interp.families.layouts_cuts import closest_canvas, split
from interp.families.layouts_parts import (
    Sizes,
    Tiles,
    how_cut,
    model_pixels,
    number,
    patches_of,
    prefix_tokens,
    rows_of_batch,
    runs,
    several,
    tiled_lattice,
    tiled_view,
)
from interp.layout import Lattice, Layout, View, numbers, raster_boxes


def anyres(
    config: Any,
    processor: Any,
    tensors: Mapping[str, Tensor],
    sizes: Sizes | None,
    tiles: Tiles = None,
) -> list[Layout]:
    """The whole picture, then its tiles row by row with newline tokens: LLaVA-NeXT and OneVision.

    OneVision takes several pictures of one prompt without tiles, padded to a square. Of a picture
    many times as long as wide no patch of the tiles is left; then it has the view "base" alone.

    Raises:
        NotImplementedError: CLS is fed on, which leaves no grid, or a square that is cropped.
    """
    width, height = model_pixels(tensors)
    side = config.vision_config.image_size
    prefix, fed = prefix_tokens(config)
    if fed or (width, height) != (side, side):
        raise NotImplementedError(
            f"tiles of {width} x {height} pixels with {fed} extra token(s): only the vision "
            f"tower's own {side} x {side}, without CLS, can be put together to a picture"
        )
    if sizes is None:
        sizes = [(wide, high) for high, wide in tensors["image_sizes"].tolist()]
    counts = tensors.get("batch_num_images")
    alone = [n == 1 for n in counts.tolist() for _ in range(n)] if counts is not None else None
    canvases = [
        _canvas(config, size) if alone is None or alone[i] else None for i, size in enumerate(sizes)
    ]
    n_rows = sum(1 + (g.target[X] * g.target[Y] // side**2 if g else 0) for g in canvases)
    out, row = [], 0
    for size, canvas in zip(sizes, canvases, strict=True):
        # a picture alone is stretched, those of a prompt with several are padded
        make = Geometry.stretched if canvas else Geometry.letterboxed
        whole = make(size, (side, side))
        x, y = patches_of(whole, config.vision_config)
        base = tiled_view("base", x, y, row=row, n_rows=n_rows, prefix=prefix)
        row, first = row + 1, len(base.slots)
        if canvas is None:
            out.append(Layout(size, first + 1, (base,)))  # one newline token
            continue
        grid = (canvas.target[Y] // side, canvas.target[X] // side)
        fine = _fine_view(config, canvas, grid, size, (row, n_rows, prefix, first))
        rows, cols = fine.shape
        views = (base, fine) if rows * cols else (base,)
        out.append(Layout(size, first + rows * (cols + 1), views))
        row += grid[0] * grid[1]
    return out


def tiled_thumbnail(
    config: Any,
    processor: Any,
    tensors: Mapping[str, Tensor],
    sizes: Sizes | None,
    tiles: Tiles = None,
) -> list[Layout]:
    """Tiles, then the whole picture, small: InternVL."""
    n_rows = len(tensors["pixel_values"])
    tile, settings = model_pixels(tensors), image_settings(processor)
    sizes, tiles = how_cut(
        sizes,
        tiles,
        n_rows=n_rows,
        tile=tile,
        rule=None if settings is None else partial(closest_canvas, settings, tile),
        uncut=sum(runs(tensors, config)) == n_rows,  # a picture is one run, however it is cut
    )
    rows_of_batch(tensors, sum(1 + several(t) for t in tiles), "tiles and thumbnails")
    merge = round(1 / config.downsample_ratio)
    return _tiles_then_whole(config, tile, sizes, tiles, n_rows, merge)


def tiled_global(
    config: Any,
    processor: Any,
    tensors: Mapping[str, Tensor],
    sizes: Sizes | None,
    tiles: Tiles = None,
) -> list[Layout]:
    """Tiles between words that name them, then the whole picture: Idefics3 and SmolVLM.

    `pixel_values` is `[batch, tile, 3, height, width]`, filled up with tiles of zeros that the
    model drops.
    """
    pixels = tensors["pixel_values"]
    n_rows = int(pixels.flatten(2).any(-1).sum())
    tile, settings = model_pixels(tensors), image_settings(processor)
    sizes, tiles = how_cut(
        sizes,
        tiles,
        n_rows=n_rows,
        tile=tile,
        rule=None if settings is None else partial(split, settings),
        uncut=runs(tensors, config) == [1] * n_rows,  # each tile is a run
    )
    n = sum(1 + several(t) for t in tiles)
    if n != n_rows:
        raise ValueError(
            f"pixel_values has {n_rows} tiles that are not all zero where these pictures give {n}"
        )
    return _tiles_then_whole(config, tile, sizes, tiles, n_rows, config.scale_factor)


def _tiles_then_whole(
    config: Any,
    tile: tuple[int, int],
    sizes: Sizes,
    tiles: Sequence[tuple[int, int]],
    n_rows: int,
    merge: int,
) -> list[Layout]:
    prefix, fed = prefix_tokens(config)
    if fed:
        raise NotImplementedError("a CLS token among the image tokens leaves no grid to shuffle")
    out, row = [], 0
    for size, (rows, cols) in zip(sizes, tiles, strict=True):
        views, n_slots = [], 0
        for name, grid in (("tiles", (rows, cols)), ("base", (1, 1))):
            if name == "tiles" and not several(grid):
                continue
            canvas = Geometry.stretched(size, (grid[1] * tile[X], grid[0] * tile[Y]))
            x, y = patches_of(canvas, config.vision_config, grid)
            view = tiled_view(
                name, x, y, tiles=grid, row=row, n_rows=n_rows, slot=n_slots, merge=merge,
                prefix=prefix,
            )  # fmt: skip
            views.append(view)
            n_slots += len(view.slots)
            row += grid[0] * grid[1]
        out.append(Layout(size, n_slots, tuple(views)))
    return out


# -- anyres ----------------------------------------------------------------------------------------


def _canvas(config: Any, size: tuple[int, int]) -> Geometry:
    """The picture on the canvas of tiles that suits it best."""
    from transformers.image_processing_utils import select_best_resolution

    width, height = size
    high, wide = select_best_resolution((height, width), config.image_grid_pinpoints)
    # as transformers' get_patch_output_size: the other edge is rounded up, for the pixels only
    if wide / width < high / height:
        resized = wide, min(math.ceil(height * (wide / width)), high)
    else:
        resized = min(math.ceil(width * (high / height)), wide), high
    return Geometry(
        scale=(resized[X] / width, resized[Y] / height),
        offset=(-float((wide - resized[X]) // 2), -float((high - resized[Y]) // 2)),
        target=(wide, high),
    )


def _fine_view(
    config: Any,
    canvas: Geometry,
    grid: tuple[int, int],
    size: tuple[int, int],
    start: tuple[int, int, int, int],
) -> View:
    """The view "tiles": what is left of the canvas when the padding is cut off.

    Args:
        config: the model's configuration.
        canvas: the picture on the canvas.
        grid: (rows, columns) of tiles.
        size: of the original picture.
        start: first row of the tower's batch, its rows, tokens in front of the patches, and the
            first placeholder.
    """
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    row, n_rows, prefix, slot = start
    x, y = patches_of(canvas, config.vision_config, grid)
    # which patches are left is the model's own rule, asked with the patches' numbers
    number_of = torch.arange(len(x) * len(y)).reshape(1, len(y), len(x))
    kept = unpad_image(number_of, (size[Y], size[X]))[0].numpy()
    if not kept.size:  # a view of no tokens: only its newline tokens are counted
        nowhere = Lattice(kept.shape, np.zeros((0, 4)), np.zeros((0, 2), dtype=int), (0, 0))
        return View("tiles", kept.shape, nowhere.boxes, nowhere.at[:, 0], nowhere, nowhere)
    columns, lines = kept[0] % len(x), kept[:, 0] // len(x)

    def cut(whole: Lattice) -> Lattice:
        at = whole.at[kept.ravel()]
        return Lattice(kept.shape, raster_boxes(x[columns], y[lines]), at, whole.extent)

    patches = cut(tiled_lattice(x, y, grid, row, n_rows, prefix))
    adapter = cut(tiled_lattice(x, y, grid, row, n_rows, 0))
    rows, cols = _resampled(config, kept.shape)
    boxes = raster_boxes(_regrid(x[columns], cols), _regrid(y[lines], rows))
    slots = (slot + numbers((rows, cols + 1))[:, :-1]).ravel()  # a newline token ends each row
    return View("tiles", (rows, cols), boxes, slots, adapter, patches)


def _resampled(config: Any, shape: tuple[int, int]) -> tuple[int, int]:
    """The grid that OneVision's "anyres_max_N" leaves of a larger one: about N tiles' worth."""
    kind = getattr(config, "vision_aspect_ratio", None)
    if kind is None:
        return shape
    rows, cols = shape
    side = config.vision_config.image_size // number(config.vision_config.patch_size)
    ratio = math.sqrt(rows * cols / (int(kind.removeprefix("anyres_max_")) * side**2))
    return (int(rows // ratio), int(cols // ratio)) if ratio > 1.1 else shape


def _regrid(edges: np.ndarray, n: int) -> np.ndarray:
    """(start, end) of `n` equal parts of a row of patches, `[n, 2]`.

    >>> _regrid(np.array([[0, 2], [2, 4], [5, 7]]), 2).tolist()
    [[0.0, 3.0], [3.0, 7.0]]
    """
    at = np.linspace(0, len(edges), n + 1)
    first = np.minimum(np.floor(at[:-1]).astype(int), len(edges) - 1)
    last = np.maximum(np.ceil(at[1:]).astype(int) - 1, 0)
    length = edges[:, 1] - edges[:, 0]
    start = edges[first, 0] + (at[:-1] - first) * length[first]
    end = edges[last, 0] + (at[1:] - last) * length[last]
    return np.stack([start, end], axis=1)
