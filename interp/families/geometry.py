"""From the model's square back to the photographer's picture.

An image processor perhaps pads a picture, resizes it, then perhaps crops it. All that is undone by
one affine map an axis: a pixel at `x` in the model's input lies at `(x + offset) / scale` in the
original picture, where `scale` is the resize factor and `offset` what the crop cut off on that side
(negative where something was added).

>>> g = Geometry(scale=(0.5, 0.5), offset=(8.0, 0.0), target=(16, 16))
>>> g.boxes(2, 2)[0]          # the upper left of 2 x 2 cells: left, top, right, bottom
array([16.,  0., 32., 16.])
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from interp.layout import raster_boxes

X, Y = 0, 1


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
    def stretched(cls, size: tuple[int, int], target: tuple[int, int]) -> Geometry:
        """The picture fills the model's input, each axis at its own scale."""
        return cls((target[X] / size[X], target[Y] / size[Y]), (0.0, 0.0), target)

    @classmethod
    def letterboxed(cls, size: tuple[int, int], target: tuple[int, int]) -> Geometry:
        """The picture in the middle of a square, the rest of which is padding."""
        side = max(size)
        scale = (target[X] / side, target[Y] / side)
        offset = [-((side - size[i]) // 2) * scale[i] for i in (X, Y)]
        return cls(scale, (offset[X], offset[Y]), target)

    @classmethod
    def of(cls, processor: Any, size: tuple[int, int], target: tuple[int, int]) -> Geometry:
        """What `processor` does to a picture of `size` = (width, height), ending in `target`.

        Args:
            processor: a transformers image processor or its `image_settings`, or None for inputs
                that were made by hand (the picture is then taken to be stretched to the target).
            size: of the original picture.
            target: of the model's input.

        Raises:
            NotImplementedError: a processor with a setting this does not undo.
            ValueError: it makes pictures of another size.
        """
        if processor is None:
            return cls.stretched(size, target)
        kind = getattr(processor, "kind", type(processor).__name__)
        width, height = size
        pad = (0, 0)
        if getattr(processor, "do_pad", False):
            if not hasattr(processor, "pad_to_square"):
                raise NotImplementedError(
                    f"{kind} pads its pictures (do_pad) in a way that is not known here, so the "
                    "way back from a token to its pixels is not either"
                )
            side = max(size)
            pad = ((side - width) // 2, (side - height) // 2)
            width = height = side
        resized = (width, height)
        if processor.do_resize:
            resized = _resized(dict(processor.size), width, height, kind)
        cropped = resized
        if getattr(processor, "do_center_crop", False):
            crop = dict(processor.crop_size)
            cropped = (crop["width"], crop["height"])
        if cropped != target:
            raise ValueError(
                f"the processor makes {cropped[0]} x {cropped[1]} pixels of a picture, but the "
                f"vision tower takes {target[0]} x {target[1]}"
            )
        scale = (resized[X] / width, resized[Y] / height)
        pil = getattr(processor, "backend", "pil") == "pil"
        offset = [_cut(resized[i] - cropped[i], pil) - pad[i] * scale[i] for i in (X, Y)]
        return cls(scale, (float(offset[X]), float(offset[Y])), target)

    def back(self, axis: int, at: np.ndarray) -> np.ndarray:
        """Model coordinates along an axis (`X` or `Y`), as coordinates in the original picture."""
        return (at + self.offset[axis]) / self.scale[axis]

    def boxes(self, rows: int, cols: int) -> np.ndarray:
        """Boxes (left, top, right, bottom) in the original picture of a rows x cols grid."""
        x, y = (np.linspace(0, self.target[axis], n + 1) for axis, n in ((X, cols), (Y, rows)))
        columns, lines = (np.stack([edge[:-1], edge[1:]], axis=1) for edge in (x, y))
        return raster_boxes(self.back(X, columns), self.back(Y, lines))


def image_settings(processor: Any) -> Any:
    """What a processor's image part will do: its own settings under those the processor sets.

    Args:
        processor: a transformers processor, or None.

    Returns:
        An object with the image processor's attributes, and `kind`, its name; None for None.
    """
    images = getattr(processor, "image_processor", None)
    if images is None:
        return None
    made = SimpleNamespace(kind=type(images).__name__)
    for name in ("do_resize", "size", "do_center_crop", "crop_size", "do_pad", "backend"):
        setattr(made, name, getattr(images, name, None))
    for name in getattr(type(images), "valid_kwargs", dict).__annotations__:
        setattr(made, name, getattr(images, name, None))
    if hasattr(images, "pad_to_square"):
        made.pad_to_square = images.pad_to_square
    above = getattr(processor, "images_kwargs", {})
    vars(made).update({name: value for name, value in above.items() if value is not None})
    return made


def _cut(excess: int, pil: bool) -> int:
    """Pixels that transformers' centre crop cuts off in front; negative where it pads.

    Of an odd number to be padded, Pillow's version puts the larger half in front, torchvision's the
    smaller one.
    """
    return excess // 2 if excess >= 0 or pil else -(-excess // 2)


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
