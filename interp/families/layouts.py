"""Which image token is which piece of the picture, family by family.

A layout function takes what the processor made of some pictures and says for each of them how its
image tokens lie (`interp.layout`):

    layout(config, processor, tensors, sizes, tiles=None) -> [Layout, ...]

`sizes` are the (width, height) of the original pictures in order of appearance; None stands for
what the tensors say of them, or else the pixels that the model is given. `tiles`, the (rows,
columns) of each picture's tiles, replaces what the processor would tell; without both, a family
whose tensors do not say it raises. The functions:

* `square`: one square grid a picture (LLaVA, PaliGemma);
* `crops`: the whole picture, then pan-and-scan crops, patches pooled (Gemma3);
* `packed`: every picture at its own resolution, 2x2 patches merged (Qwen-VL);
* `anyres`: the whole picture, then tiles with newline tokens (LLaVA-NeXT, LLaVA-OneVision);
* `tiled_thumbnail`: tiles, then the whole picture, 2x2 patches shuffled into a token (InternVL);
* `tiled_global`: the same between words that name the tiles (Idefics3, SmolVLM).

The last three are in `layouts_tiled`.
`layouts_parts` holds what they share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from interp.families.geometry import Geometry, X, Y, image_settings
from interp.families.layouts_cuts import pan_and_scan
from interp.families.layouts_parts import (
    Sizes,
    Tiles,
    at_row,
    how_cut,
    merged,
    model_pixels,
    number,
    patches_of,
    prefix_tokens,
    rows_of_batch,
    runs,
    several,
    steps,
    tiled_view,
)
from interp.families.layouts_tiled import anyres, tiled_global, tiled_thumbnail
from interp.layout import Lattice, Layout, View, numbers, raster_boxes

__all__ = ["Layout", "anyres", "crops", "packed", "square", "tiled_global", "tiled_thumbnail"]


def square(
    config: Any,
    processor: Any,
    tensors: Mapping[str, Tensor],
    sizes: Sizes | None,
    tiles: Tiles = None,
) -> list[Layout]:
    """One grid a picture, a patch a token: LLaVA and PaliGemma."""
    target = model_pixels(tensors)
    # without the original's size there is nothing in front of the model's pixels to be undone
    settings = image_settings(processor) if sizes is not None else None
    if sizes is None:
        sizes = [target] * len(tensors["pixel_values"])
    rows_of_batch(tensors, len(sizes), "one picture each")
    prefix, fed = prefix_tokens(config)
    out = []
    for row, size in enumerate(sizes):
        geometry = Geometry.of(settings, size, target)
        x, y = patches_of(geometry, config.vision_config)
        view = tiled_view("base", x, y, row=row, n_rows=len(sizes), prefix=prefix, fed=fed)
        out.append(Layout(size, len(view.slots) + fed, (view,)))
    return out


def crops(
    config: Any,
    processor: Any,
    tensors: Mapping[str, Tensor],
    sizes: Sizes | None,
    tiles: Tiles = None,
) -> list[Layout]:
    """The whole picture and then, of a long one, its pan-and-scan crops: Gemma3.

    The crops cut the picture along its longer side; together they are the view "tiles". Each is
    stretched to the tower's square, and blocks of patches are averaged into a token.
    """
    target = model_pixels(tensors)
    settings = image_settings(processor)
    n_rows = len(tensors["pixel_values"])
    alone = runs(tensors, config) == [1] * n_rows  # a picture that is cut has three runs or more
    sizes, tiles = how_cut(
        sizes,
        tiles,
        n_rows=n_rows,
        tile=target,
        rule=None if settings is None else partial(pan_and_scan, settings),
        uncut=alone or (settings is not None and not settings.do_pan_and_scan),
    )
    rows_of_batch(tensors, sum(1 + several(t) for t in tiles), "one a picture and a crop")
    side = target[X] // number(config.vision_config.patch_size)
    merge = side // math.isqrt(config.mm_tokens_per_image)
    out, row = [], 0
    for size, (rows, cols) in zip(sizes, tiles, strict=True):
        x, y = patches_of(Geometry.of(settings, size, target), config.vision_config)
        base = tiled_view("base", x, y, row=row, n_rows=n_rows, merge=merge)
        views, n_slots = [base], len(base.slots)
        if n := several((rows, cols)):
            # the last crop ends with the picture
            width, height = math.ceil(size[X] / cols), math.ceil(size[Y] / rows)
            x = np.concatenate([_crop(x, size[X], i * width, width) for i in range(cols)])
            y = np.concatenate([_crop(y, size[Y], i * height, height) for i in range(rows)])
            views.append(
                tiled_view(
                    "tiles", x, y, tiles=(rows, cols), row=row + 1, n_rows=n_rows, slot=n_slots,
                    merge=merge,
                )
            )  # fmt: skip
        out.append(Layout(size, n_slots * (1 + n), tuple(views)))
        row += 1 + n
    return out


def packed(
    config: Any,
    processor: Any,
    tensors: Mapping[str, Tensor],
    sizes: Sizes | None,
    tiles: Tiles = None,
) -> list[Layout]:
    """Pictures at their own resolution in one row, blocks of patches merged: the Qwen-VL family.

    The patches come block by block. Where the tower attends in windows (Qwen2.5-VL), it puts the
    blocks into the windows' order in front of its first layer and undoes that behind the adapter:
    `patches` and `adapter` are in its order, the slots are not.

    Raises:
        NotImplementedError: a video.
    """
    vision = config.vision_config
    patch, merge = vision.patch_size, vision.spatial_merge_size
    grids = tensors["image_grid_thw"].tolist()
    if sizes is None:
        sizes = [(cols * patch, rows * patch) for _, rows, cols in grids]
    if len(grids) != len(sizes):
        raise ValueError(f"image_grid_thw is of {len(grids)} pictures, not of {len(sizes)}")
    order = window_order(vision, tensors["image_grid_thw"])
    n_blocks, first = len(order), 0
    out = []
    for (frames, rows, cols), size in zip(grids, sizes, strict=True):
        if frames != 1:
            raise NotImplementedError(
                f"image_grid_thw has {frames} frames; videos are not laid out"
            )
        geometry = Geometry.stretched(size, (cols * patch, rows * patch))
        x = geometry.back(X, steps(cols * patch, patch))
        y = geometry.back(Y, steps(rows * patch, patch))
        shape = (rows // merge, cols // merge)
        block = order[first + numbers(shape)]
        within = np.tile(numbers((merge, merge)), shape)
        boxes = raster_boxes(merged(x, merge), merged(y, merge))
        adapter = Lattice(shape, boxes, at_row(0, block), (1, n_blocks))
        patches = Lattice(
            (rows, cols),
            raster_boxes(x, y),
            at_row(0, np.kron(block, np.ones((merge, merge), int)) * merge**2 + within),
            (1, n_blocks * merge**2),
        )
        slots = numbers(shape).ravel()
        view = View("base", shape, boxes, slots, adapter, patches)
        out.append(Layout(size, len(slots), (view,)))
        first += len(slots)
    return out


def window_order(vision: Any, grid_thw: Tensor) -> np.ndarray:
    """Where a Qwen tower puts each block of merged patches, `[n_blocks]`; as it came, if nowhere.

    Args:
        vision: the tower's configuration.
        grid_thw: `[n_pictures, 3]` frames, rows and columns of patches.
    """
    merge = vision.spatial_merge_size
    if not hasattr(vision, "window_size"):
        return np.arange(int(grid_thw.prod(1).sum()) // merge**2)
    from transformers.vision_utils import get_vision_window_index

    index, _ = get_vision_window_index(grid_thw, merge, vision.window_size, vision.patch_size)
    return np.asarray(index.argsort().cpu())


def _crop(edges: np.ndarray, size: int, start: int, length: int) -> np.ndarray:
    """Patches of the whole picture, moved and shrunk into a part of it."""
    end = min(start + length, size)
    return start + edges * (end - start) / size
