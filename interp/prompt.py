"""Places in a prompt, by name: who asks, who answers, where the picture is.

A prepared batch knows which of its positions are a picture's, which are words, which is the last
one (the position that answers). With these names a question to the model reads as it is meant:

    x.edges(src="image", dst="last")                   what the answer reads from the picture itself
    x.edges(src="image", dst="text").causal()          what the question reads from the picture
    x.edges(src="bos", dst="image")                    what image tokens leave on the first token
    x.edges(src=x.grid.inside(box), dst="last")        what the answer reads from a piece of it
    x.edges(src=x.grid.image == 0, dst=x.grid.image == 1).causal()    one picture read by the next

Every place is a bool array `[batch, pos]`, False on padding, so that `|`, `&` and `~` make others:
`x.is_text & ~x.is_bos`. Edges are all pairs of one row, in both directions; `.causal()` keeps those
that a causal mask leaves open, and `Unmask(x.edges("all", "all"))` makes the prompt a prefix block,
in which everything sees everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from interp.edges import EdgeSet
from interp.errors import EdgeError, nearest
from interp.tokens import TokenGrid

Places = str | int | Sequence[int] | np.ndarray | Tensor

#: the names of places, and the property that has each
NAMES = {
    "image": "is_image",
    "text": "is_text",
    "bos": "is_bos",
    "first": "is_first",
    "last": "is_last",
    "all": "is_attended",
}


class Prompt:
    """Places of a prepared batch (`Inputs` is what one meets)."""

    tensors: dict[str, Tensor]
    grid: TokenGrid
    bos_token: int | None

    @property
    def is_attended(self) -> np.ndarray:
        """`[batch, pos]` bool: all that is no padding."""
        return np.asarray(self.tensors["attention_mask"].cpu().numpy().astype(bool))

    @property
    def is_image(self) -> np.ndarray:
        """`[batch, pos]` bool: image tokens, those of `grid`; `grid.mark` has some of them."""
        return self.grid.is_image

    @property
    def is_text(self) -> np.ndarray:
        """`[batch, pos]` bool: tokens of the prompt that no picture fills and that are no padding.

        BOS is among them. Newline and CLS tokens of a picture are not: they are `grid.fillers`.
        """
        return np.asarray(self.is_attended & ~self.grid.is_placeholder)

    @property
    def is_first(self) -> np.ndarray:
        """`[batch, pos]` bool: the first position of each row, where much attention rests."""
        attended = self.is_attended
        return np.asarray(attended & (attended.cumsum(1) == 1))

    @property
    def is_last(self) -> np.ndarray:
        """`[batch, pos]` bool: the last position of each row, the one that answers."""
        attended = self.is_attended
        return np.asarray(attended & (attended[:, ::-1].cumsum(1)[:, ::-1] == 1))

    @property
    def is_bos(self) -> np.ndarray:
        """`[batch, pos]` bool: the token that begins a text; PaliGemma has it behind the picture.

        Raises:
            EdgeError: a row without one, as in families that use none.
        """
        ids = self.tensors["input_ids"].cpu().numpy()
        found = self.is_attended & (ids == (-1 if self.bos_token is None else self.bos_token))
        if not found.any(1).all():
            row = int((~found.any(1)).argmax())
            raise EdgeError(
                f"row {row} has no BOS token (id {self.bos_token}); 'first' is the first position"
            )
        return np.asarray(found)

    def places(self, which: Places) -> np.ndarray:
        """Places as a bool array `[batch, pos]`.

        Args:
            which: a name ("image", "text", "bos", "first", "last", "all"); position numbers, one
                or several, the same in every row; bools `[batch, pos]`; or bools over the image
                tokens, `[n_tokens]`, as `grid.at`, `grid.inside` and `grid.of_class` give them.

        Raises:
            EdgeError: anything else, or a position that the batch does not have.
        """
        if isinstance(which, str):
            if which not in NAMES:
                raise EdgeError(
                    f"no place {which!r} in a prompt; {nearest(which, NAMES)} "
                    f"There are {', '.join(NAMES)}"
                )
            return np.asarray(getattr(self, NAMES[which]))
        array = which.cpu().numpy() if isinstance(which, Tensor) else np.asarray(which)
        shape = tuple(self.tensors["input_ids"].shape)
        if array.dtype == np.bool_ and array.shape == shape:
            return array
        if array.dtype == np.bool_ and array.shape == (len(self.grid),):
            return self.grid.mark(array)
        if array.ndim > 1 or (array.size and array.dtype.kind not in "iu"):
            raise EdgeError(
                f"places are a name ({', '.join(NAMES)}), position numbers, bools {list(shape)} "
                f"over positions or [{len(self.grid)}] over image tokens, not {array.dtype} "
                f"{list(array.shape)}"
            )
        numbers = np.atleast_1d(array).astype(np.int64)
        outside = numbers[(numbers < 0) | (numbers >= shape[1])]
        if len(outside):
            raise EdgeError(f"no position {outside[0]}: rows of this batch have 0..{shape[1] - 1}")
        out = np.zeros(shape, dtype=bool)
        out[:, numbers] = True
        return out

    def edges(self, src: Places, dst: Places) -> EdgeSet:
        """All edges from places `src` (keys) to places `dst` (queries) of the same row.

        Args:
            src: as in `places`.
            dst: likewise.

        Usage: `model.run(x, Knockout(x.edges(src="image", dst="last")))`
        """
        return EdgeSet.between(self.places(src), self.places(dst))
