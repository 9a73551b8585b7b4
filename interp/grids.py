"""The three grids of a batch: image tokens in the prompt, behind the adapter, in the vision tower.

A picture passes three stages, and a cell of it stands somewhere else in each: as one or several
patches in a vision state `[row, position, d]`, as a vector in `adapter.hook_out`, as a token of the
language model. `build_grids` puts the layouts of a batch's pictures together into one `TokenGrid` a
stage, so that labels, gathering and boxes work at every stage in the same way.

Which placeholder is which is a matter of counting: pictures fill the placeholders of the prompts in
reading order, row by row, and each takes as many as its layout says. A text-only model has no
pictures; in place of its grids stands what tells so whoever asks for an image token (`NoTokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np

from interp.errors import NO_VISION, NotMultimodal
from interp.layout import Layout
from interp.tokens import TokenGrid


class Grids(NamedTuple):
    """The same pictures at three stages.

    Attributes:
        llm: positions in the language model's sequence.
        adapter: (row, position) in `adapter.hook_out`.
        vision: patches, (row, position) in `vision.blocks.*.hook_resid_post`.
    """

    llm: TokenGrid
    adapter: TokenGrid
    vision: TokenGrid


class NoTokens:
    """Stands for a grid at a stage that a text-only model lacks; whatever is asked of it raises.

    Raises:
        NotMultimodal: saying that there is no vision tower.
    """

    def __len__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "no image tokens"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying and pickling ask for such, and may be told no
            raise AttributeError(name)
        raise NotMultimodal(NO_VISION)


@dataclass(frozen=True, eq=False, repr=False)
class NoPictures(NoTokens):
    """Stands for the grid of a text-only batch in the language model's sequence.

    Attributes:
        n_batch: rows of the batch.
        n_pos: length of the sequence, padding included.
    """

    n_batch: int
    n_pos: int

    @property
    def is_placeholder(self) -> np.ndarray:
        """`[n_batch, n_pos]` bool: False, every position is a word's or padding."""
        return np.zeros((self.n_batch, self.n_pos), dtype=bool)


#: one view of one picture at one stage: image, name, shape, boxes, (row, position)
_Piece = tuple[int, str, tuple[int, int], np.ndarray, np.ndarray]


def build_grids(
    input_ids: np.ndarray,
    image_token: int | None,
    layouts: Sequence[Layout],
) -> Grids:
    """The grids of a prepared batch.

    Args:
        input_ids: `[batch, pos]`, in which `image_token` stands once for each placeholder.
        image_token: its id; None if the model is text-only.
        layouts: of the pictures, in the order in which they appear.

    Raises:
        ValueError: the prompts hold another number of placeholders than the pictures need, or a
            picture's would lie in two rows.
    """
    n_batch, n_pos = input_ids.shape
    if image_token is None:
        none = cast(Any, NoTokens())
        return Grids(cast(Any, NoPictures(n_batch, n_pos)), none, none)
    places = np.argwhere(input_ids == image_token)
    ends = np.cumsum([0, *(layout.n_slots for layout in layouts)])
    if ends[-1] != len(places):
        raise ValueError(
            f"the prompts hold {len(places)} image placeholders, but {len(layouts)} image(s) "
            f"give {ends[-1]} image tokens; use one placeholder an image and let the processor "
            "expand it"
        )
    llm: list[_Piece] = []
    adapter: list[_Piece] = []
    vision: list[_Piece] = []
    fillers = []
    for image, layout in enumerate(layouts):
        own = places[ends[image] : ends[image + 1]]
        if own[0, 0] != own[-1, 0]:
            raise ValueError(
                f"picture {image} needs {len(own)} placeholders, and they would lie in rows "
                f"{own[0, 0]} and {own[-1, 0]} of the batch"
            )
        fillers.append(own[layout.fillers])
        for view in layout.views:
            llm.append((image, view.name, view.shape, view.boxes, own[view.slots]))
            for pieces, lattice in ((adapter, view.adapter), (vision, view.patches)):
                pieces.append((image, view.name, lattice.shape, lattice.boxes, lattice.at))
    first, sizes = layouts[0].views[0], [layout.size for layout in layouts]
    none = np.zeros((0, 2), dtype=int)
    return Grids(
        _grid(llm, sizes, (n_batch, n_pos), np.concatenate(fillers)),
        _grid(adapter, sizes, first.adapter.extent, none),
        _grid(vision, sizes, first.patches.extent, none),
    )


def _grid(
    pieces: Sequence[_Piece],
    sizes: Sequence[tuple[int, int]],
    extent: tuple[int, int],
    fillers: np.ndarray,
) -> TokenGrid:
    images, names, shapes, boxes, places = zip(*pieces, strict=True)
    lengths = [len(box) for box in boxes]
    at = np.concatenate(places)
    return TokenGrid(
        row=at[:, 0],
        position=at[:, 1],
        image=np.repeat(images, lengths),
        view=np.repeat(np.arange(len(pieces)), lengths),
        cell=np.concatenate([np.indices(shape).reshape(2, -1).T for shape in shapes]),
        box=np.concatenate(boxes).astype(float),
        fillers=fillers,
        shapes=tuple(shapes),
        view_image=tuple(images),
        view_names=tuple(names),
        sizes=tuple((int(width), int(height)) for width, height in sizes),
        n_batch=extent[0],
        n_pos=extent[1],
    )
