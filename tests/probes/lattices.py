"""Grids of image tokens without a model: any lattice of boxes on any pictures."""

from __future__ import annotations

import numpy as np

from interp.tokens import TokenGrid


def lattice(shape, box):
    """Boxes [rows * cols, 4] that cut (left, top, right, bottom) into equal cells."""
    x = np.linspace(box[0], box[2], shape[1] + 1)
    y = np.linspace(box[1], box[3], shape[0] + 1)
    out = np.empty((*shape, 4))
    out[..., 0], out[..., 2] = x[:-1], x[1:]
    out[..., 1], out[..., 3] = y[:-1, None], y[1:, None]
    return out.reshape(-1, 4)


def grid_of(*pictures):
    """A grid of pictures given as (size, [(view name, shape, boxes [n, 4]), ...])."""
    views = [(i, *view) for i, (_, own) in enumerate(pictures) for view in own]
    image, names, shapes, boxes = zip(*views, strict=True)
    length = [len(one) for one in boxes]
    image_of = np.repeat(image, length)
    n = np.bincount(image_of)
    return TokenGrid(
        row=image_of,
        position=np.concatenate([np.arange(k) for k in n]),
        image=image_of,
        view=np.repeat(np.arange(len(views)), length),
        cell=np.concatenate([np.indices(shape).reshape(2, -1).T for shape in shapes]),
        box=np.concatenate(boxes).astype(float),
        fillers=np.zeros((0, 2), int),
        shapes=tuple(shapes),
        view_image=tuple(image),
        view_names=tuple(names),
        sizes=tuple(size for size, _ in pictures),
        n_batch=len(pictures),
        n_pos=int(n.max()),
    )


def whole(shape, size):
    """One picture of (width, height), cut into equal cells from edge to edge."""
    return size, [("base", shape, lattice(shape, (0, 0, *size)))]
