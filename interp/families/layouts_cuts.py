"""Into how many tiles a processor cuts a picture of some size: three families' rules.

Tensors do not say it, and the text does so in words only a tokenizer can read, so the processors'
rules are followed here from their settings (`geometry.image_settings`). The count that comes out is
compared with the tiles that are there, and the tests compare the arrangement with the processors'
own pictures.
"""

from __future__ import annotations

import math
from typing import Any

from interp.families.geometry import X, Y

LARGEST = 4096  # what Idefics3's processor cuts a longer edge down to


def pan_and_scan(settings: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of a picture's crops, by Gemma3ImageProcessor's rules; (0, 0) for none."""
    if not settings.do_pan_and_scan:
        return 0, 0
    long, short = max(size), min(size)
    if long / short < settings.pan_and_scan_min_ratio_to_activate:
        return 0, 0
    n = min(long // settings.pan_and_scan_min_crop_size, math.floor(long / short + 0.5))
    n = min(max(2, n), settings.pan_and_scan_max_num_crops)
    if min(math.ceil(long / n), short) < settings.pan_and_scan_min_crop_size:
        return 0, 0
    return (1, n) if size[X] >= size[Y] else (n, 1)


def closest_canvas(settings: Any, tile: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of InternVL's tiles; (1, 1) where the picture is not cut."""
    if not settings.crop_to_patches or settings.max_patches <= 1:
        return 1, 1
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    cols, rows = get_optimal_tiled_canvas(
        (size[Y], size[X]), (tile[Y], tile[X]), settings.min_patches, settings.max_patches
    )
    return rows, cols


def split(settings: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of Idefics3's tiles, by its processor's rules; (0, 0) if not cut."""
    if not settings.do_image_splitting:
        return 0, 0
    width, height = size
    if settings.do_resize:
        longest = dict(settings.size).get("longest_edge")
        if longest is None or longest > LARGEST:
            raise NotImplementedError(
                f"{settings.kind} resizes by {dict(settings.size)}; only a longest_edge of up to "
                f"{LARGEST} is known"
            )
        width, height = _longest(width, height, longest)
    tile = settings.max_image_size["longest_edge"]
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * ratio) / tile) * tile
    rows, cols = height // tile, width // tile
    return (rows, cols) if rows * cols > 1 else (0, 0)


def _longest(width: int, height: int, longest: int) -> tuple[int, int]:
    """A size whose longer edge is `longest`, and the other one even."""
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    return max(width, 1), max(height, 1)
