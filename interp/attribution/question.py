"""What is asked of the heads, made once and handed to every method.

A question has a model, some batches of pictures, and for each batch a target (`targets`) and
source groups (`sources`); and the layers between `start` and `end`. Whether the answer then comes
from an exact sum, from gradients or from knockouts is the method's business: they all answer the
same question, in the same unit and with the same sign, so that they can be compared.

`interp.attribution.asking` makes questions of what a user says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from interp.attribution.sources import Sources
from interp.attribution.targets import Score
from interp.clean import Clean
from interp.edges import EdgeSet
from interp.inputs import Inputs
from interp.model import MLLM


@dataclass(frozen=True, eq=False)
class Part:
    """A question on one batch.

    Attributes:
        x: the batch.
        score: its target.
        sources: who reads, and from which groups.
        first_image: number of its first row over all batches.
        clean: what clean runs of the batch have left, so that the towers need not run again.
        shape: (rows, positions) of the batch as it was given; `x` may end with its last picture.
        masks: by layer, `[n, pos]` bool, what the readers may attend to; filled when first needed.
        edges: by layer and group, the open edges between them, likewise.
    """

    x: Inputs
    score: Score
    sources: Sources
    first_image: int
    clean: Clean
    shape: torch.Size
    masks: dict[int, torch.Tensor] = field(default_factory=dict)
    edges: dict[tuple[int, int], EdgeSet] = field(default_factory=dict)

    @property
    def read_at(self) -> torch.Tensor | None:
        """`[n]` the positions at which the target is read in any row; None where that is not known,
        or is nearly everywhere."""
        position = self.score.position
        if position is None or self.score.end == "logits":
            return None
        at = position.unique()
        return at if len(at) < 0.8 * self.x.n_pos else None


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked; make one with `ask`.

    Attributes:
        model: of whose heads.
        parts: one a batch.
        start, end: stages between which heads are looked at.
        layers: their layers.
        groups: names of the source groups.
        dst: whose reading is looked at: "queries", "image" or "all"; "given" where ready-made
            sources say it, and not the target's queries.
    """

    model: MLLM
    parts: tuple[Part, ...]
    start: str
    end: str
    layers: range
    groups: tuple[str, ...]
    dst: str

    @property
    def n_images(self) -> int:
        """Rows of all batches."""
        return sum(len(part.x) for part in self.parts)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, heads, source groups) of the answer."""
        return len(self.layers), self.model.cfg.n_heads, len(self.groups)

    def alone(self, number: int) -> Question:
        """The question on one of its batches."""
        return replace(self, parts=(self.parts[number],))

    def patched_by(self, patch: Sequence[Inputs]) -> list[Inputs]:
        """Other batches whose heads are to be put in, cut off where the question's are.

        Raises:
            ValueError: they cannot be patched in, position by position and head by head.
        """
        if self.groups != ("all",):
            raise ValueError(
                f"patch= puts in whole heads, and this question has the source groups "
                f'{", ".join(self.groups)}; sources="whole" would do'
            )
        shapes = [part.shape for part in self.parts]
        if [x.shape for x in patch] != shapes:
            raise ValueError(
                f"patch= has batches {[list(x.shape) for x in patch]}, the question "
                f"{[list(shape) for shape in shapes]}: position by position, so alike"
            )
        return [x.until(part.x.n_pos) for x, part in zip(patch, self.parts, strict=True)]

    def about(self) -> dict[str, Any]:
        """What was asked, in words, for a result's metadata."""
        return {
            "model": repr(self.model),
            "target": self.parts[0].score.name,
            "start": self.start,
            "end": self.end,
            "dst": self.dst,
            "groups": list(self.groups),
            "n_images": self.n_images,
            "sizes": [list(size) for part in self.parts for size in part.x.grid.sizes],
        }
