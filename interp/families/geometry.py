"""From the model's square back to the photographer's picture.

An image processor resizes, then perhaps crops. Both are undone by one affine map an axis: a pixel
at `x` in the model's input lies at `(x + offset) / scale` in the original picture, where `scale`
is the resize factor and `offset` what the crop cut off on that side (negative where it padded).

>>> g = Geometry(scale=(0.5, 0.5), offset=(8.0, 0.0), target=(16, 16))
>>> g.boxes(2, 2)[0]          # the upper left of 2 x 2 cells: left, top, right, bottom
array([16.,  0., 32., 16.])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Geometry:
    """The affine map of one picture through the processor (x first, then y).

    Attributes:
        scale: model pixels per original pixel.
        offset: model pixels cut off at the left and at the top.
        target: (width, height) of the model's input.
    """

    scale: tuple[float, float]
    offset: tuple[float, float]
    target: tuple[int, int]

    @classmethod
    def of(cls, processor: Any, size: tuple[int, int], target: tuple[int, int]) -> Geometry:
        """What `processor` does to a picture of `size` = (width, height), ending in `target`.

        Args:
            processor: a transformers image processor, or None for inputs that were made by hand
                (the picture is then taken to be stretched to the target).
            size: of the original picture.
            target: of the model's input.

        Raises:
            NotImplementedError: a processor with a setting this does not undo.
        """
        if getattr(processor, "do_pad", False):
            raise NotImplementedError(
                f"{type(processor).__name__} pads its pictures (do_pad); the way back from a token "
                "to its pixels is not known for that yet"
            )
        width, height = size
        resized = (width, height)
        if processor is None:
            resized = target
        elif processor.do_resize:
            resized = _resized(dict(processor.size), width, height, type(processor).__name__)
        if processor is not None and processor.do_center_crop:
            crop = dict(processor.crop_size)
            cropped = (crop["width"], crop["height"])
        else:
            cropped = resized
        if cropped != target:
            raise ValueError(
                f"the processor makes {cropped[0]} x {cropped[1]} pixels of a picture, but the "
                f"vision tower takes {target[0]} x {target[1]}"
            )
        # transformers' center_crop starts at (resized - crop) // 2, which pads when negative
        offset = ((resized[0] - cropped[0]) // 2, (resized[1] - cropped[1]) // 2)
        return cls(
            scale=(resized[0] / width, resized[1] / height),
            offset=(float(offset[0]), float(offset[1])),
            target=target,
        )

    def boxes(self, rows: int, cols: int) -> np.ndarray:
        """Boxes (left, top, right, bottom) in the original picture of a rows x cols grid."""
        x = (np.linspace(0, self.target[0], cols + 1) + self.offset[0]) / self.scale[0]
        y = (np.linspace(0, self.target[1], rows + 1) + self.offset[1]) / self.scale[1]
        left, top = np.meshgrid(x[:-1], y[:-1])
        right, bottom = np.meshgrid(x[1:], y[1:])
        return np.stack([left, top, right, bottom], axis=-1).reshape(-1, 4)


def _resized(size: dict[str, int], width: int, height: int, name: str) -> tuple[int, int]:
    if "shortest_edge" in size and "longest_edge" not in size:
        short = size["shortest_edge"]
        # as transformers' get_resize_output_image_size: the long edge is truncated, not rounded
        if width <= height:
            return short, int(short * height / width)
        return int(short * width / height), short
    if "height" in size and "width" in size:
        return size["width"], size["height"]
    raise NotImplementedError(
        f"{name} resizes by {size}; only height/width and shortest_edge are known"
    )
