"""What a stream of scored pictures leaves behind: whole numbers that add up in any order.

A validation set passes once. Of each batch we know, for every stage, what its probe said of each
image token, and the truth; then the batch is gone. `Counts` keeps what any score of the whole set
can be computed from, and its size does not depend on how many pictures pass:

1. one confusion matrix a stage for tokens, and one for pixels (`pixels=True`: bilinear logits in
   the picture's own size, `interp.probes.painting`);
2. *margins* (right, said and true of each class) of the groups of tokens in `interp.probes.groups`,
   since accuracy, mean accuracy and mIoU need no more of a matrix;
3. right answers by position in the grid;
4. the same margins once more for each of `n_boot` replicates of the set, in which every picture is
   drawn a Poisson number of times (`interp.probes.poisson`): intervals over images, and paired
   differences between stages, without keeping any image.

All of it is int64, so sums are exact and have no order: batches shuffled, split over processes and
merged give the same bytes. A picture's weights come from its name, so they are the same wherever it
passes. Sums cannot tell that a picture passed twice, as samplers that fill up the last batch let
happen; `check(names)` can.

**Memory.** The replicates take most of it: 8 bytes x n_boot x (2 stages + 1) x classes for tokens,
as much again for pixels, 140 MB each for 57 stages, 150 classes and 1,000 replicates. Replicates
of the five groups would take five times that, so of groups only right and counted are kept, which
gives intervals of accuracy; `group_intervals=True` keeps all. `nbytes` says how much it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from interp.cells import CellGrid
from interp.labels import IGNORE
from interp.probes.batches import answers_of, margins_of, pixel_counts, token_counts
from interp.probes.groups import GROUPS
from interp.probes.metrics import integers
from interp.probes.poisson import fingerprint, poisson_weights

Ints = NDArray[np.int64]

#: reference rows: always the most frequent class; what perfect token labels would reach
FLOOR, CEILING = "majority_floor", "token_ceiling"

_HELD = 64  # pictures whose margins wait for the next matrix product
_BLOCK = 1 << 20  # numbers of that product made at once: 8 MB


@dataclass(frozen=True)
class Spec:
    """What two `Counts` must have in common to add up; see `interp.probes.scores.Scores`."""

    stages: tuple[str, ...]
    classes: tuple[str, ...]
    n_boot: int
    seed: int
    shape: tuple[int, int]
    pixels: bool
    majority: int | None
    group_intervals: bool

    def check(self) -> None:
        """See that it makes sense.

        Raises:
            ValueError: it does not.
        """
        for what, given in (("stages", self.stages), ("classes", self.classes)):
            if not given or len(set(given)) != len(given):
                raise ValueError(f"{what} are names, one or more, each once; not {given}")
        reserved = {FLOOR, CEILING} & set(self.stages)
        if reserved:
            raise ValueError(f"{', '.join(reserved)} is no stage but a reference row made here")
        if self.n_boot < 0 or min(self.shape) < 1:
            raise ValueError(f"n_boot={self.n_boot}, shape={self.shape}: one is too small")
        if len(self.classes) > IGNORE:
            raise ValueError(f"{len(self.classes)} classes, but {IGNORE} is the label of none")
        if self.majority is not None and not 0 <= self.majority < len(self.classes):
            raise ValueError(f"majority={self.majority} of {len(self.classes)} classes")


class Counts:
    """Sums over a stream of pictures; `Scores` reads them, and documents the arguments."""

    def __init__(
        self,
        stages: Sequence[str],
        classes: Sequence[str],
        *,
        n_boot: int = 1000,
        seed: int = 0,
        shape: tuple[int, int] = (24, 24),
        pixels: bool = False,
        majority: int | None = None,
        group_intervals: bool = False,
    ) -> None:
        self.spec = Spec(
            tuple(stages),
            tuple(classes),
            n_boot,
            seed,
            (shape[0], shape[1]),
            pixels,
            majority,
            group_intervals,
        )
        self.spec.check()
        floor = () if majority is None else (FLOOR,)
        self.rows = {"token": (*self.stages, *floor)}
        if pixels:
            self.rows["pixel"] = (*self.stages, *floor, CEILING)
        k = len(self.classes)
        self._sums: dict[str, Ints] = {
            "pictures": np.zeros(2, np.int64),
            "token/positions": np.zeros((len(self.rows["token"]) + 1, *self.spec.shape), np.int64),
        }
        if pixels:
            self._sums["pixel/unseen"] = np.zeros(2, np.int64)
        for unit, rows in self.rows.items():
            self._sums[f"{unit}/confusion"] = np.zeros((len(rows), k, k), np.int64)
            for group in self.groups(unit):
                margins = np.zeros((2 * len(rows) + 1, k), np.int64)
                replicates = np.zeros((n_boot, *self._kept(group, margins).shape), np.int64)
                self._sums[f"{unit}/{group}/margins"] = margins
                self._sums[f"{unit}/{group}/replicates"] = replicates
        self._waiting: list[tuple[Ints, dict[str, Ints]]] = []

    @property
    def stages(self) -> tuple[str, ...]:
        """What is scored, without the reference rows."""
        return self.spec.stages

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.spec.classes

    @property
    def n_images(self) -> int:
        """Pictures that passed."""
        return int(self._sums["pictures"][0])

    @property
    def nbytes(self) -> int:
        """Bytes of all sums; the margins of up to 64 pictures wait besides."""
        return sum(array.nbytes for array in self._sums.values())

    def groups(self, unit: str) -> tuple[str, ...]:
        """Groups that are told apart: of tokens all of `GROUPS`, of pixels none."""
        return ("all", *GROUPS) if unit == "token" else ("all",)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.stages)} stages, {len(self.classes)} classes, "
            f"{self.n_images} pictures, {' and '.join(self.rows)}; {self.nbytes / 1e6:.1f} MB)"
        )

    # -- counting ---------------------------------------------------------------------------------

    def update(
        self,
        names: Sequence[str],
        grid: CellGrid,
        labels: ArrayLike | Tensor,
        said: Mapping[str, ArrayLike | Tensor],
        *,
        purity: ArrayLike | None = None,
        masks: Sequence[np.ndarray] | None = None,
    ) -> None:
        """Count a batch of whole pictures. If it is refused, nothing of it has been counted.

        Args:
            names: of the pictures of `grid`, each unique in the whole set.
            grid: where the batch's tokens lie (`x.grid`).
            labels: `[n_tokens]` int, classes or `IGNORE`.
            said: of each stage, logits `[n_tokens, K]` or classes `[n_tokens]`. Pixels need logits.
            purity: `[n_tokens]`, see `token_groups`.
            masks: `[height, width]` int of each picture in its own size, if pixels are scored. Of
                pictures with several views the finest one's tokens say the pixels.

        Raises:
            ValueError: other stages, numbers of tokens, classes or sizes than there should be.
        """
        names, truth = list(names), integers(labels, "labels")
        self._check(names, grid, truth, said, masks)
        rows = [said[stage] for stage in self.stages]
        k, majority = len(self.classes), self.spec.majority
        answers = answers_of(rows, self.stages, len(grid), k, majority)
        new, waiting = token_counts(grid, truth, answers, k, self.spec.shape, purity)
        if masks is not None:
            parts = [
                pixel_counts(grid, i, truth, rows, mask, k, majority)
                for i, mask in enumerate(masks)
            ]
            matrices = np.stack([matrix for matrix, _ in parts])
            new["pixel/confusion"] = matrices.sum(0)
            new["pixel/unseen"] = np.sum([unseen for _, unseen in parts], axis=0)
            waiting["pixel/all"] = margins_of(matrices)
        new["pictures"] = fingerprint(names)
        for key, value in new.items():
            self._sums[key] += value.reshape(self._sums[key].shape)
        for key, value in waiting.items():
            self._sums[f"{key}/margins"] += value.sum(0)
        if self.spec.n_boot:
            kept = {key: self._kept(key.split("/")[1], value) for key, value in waiting.items()}
            self._waiting.append((poisson_weights(names, self.spec.n_boot, self.spec.seed), kept))
            if sum(len(weights) for weights, _ in self._waiting) >= _HELD:
                self._flush()

    def _check(
        self,
        names: list[str],
        grid: CellGrid,
        truth: Ints,
        said: Mapping[str, ArrayLike | Tensor],
        masks: Sequence[np.ndarray] | None,
    ) -> None:
        if len(names) != grid.n_images or len(set(names)) != len(names):
            raise ValueError(
                f"{len(names)} names, {len(set(names))} of them different, for {grid.n_images} "
                "pictures: each has a name of its own, from which its draws are made"
            )
        if truth.shape != (len(grid),):
            raise ValueError(f"labels of shape {list(truth.shape)} for {len(grid)} tokens")
        if set(said) != set(self.stages):
            differ = sorted(set(said) ^ set(self.stages))
            raise ValueError(f"stages scored here, or said, but not both: {', '.join(differ)}")
        if (masks is not None) != self.spec.pixels:
            raise ValueError(
                "pixels are scored with masks=..., and were not announced: Scores(..., pixels=True)"
                if masks is not None
                else "pixels were announced, so update needs masks=[one a picture]"
            )
        if masks is not None:
            sizes = [(mask.shape[1], mask.shape[0]) for mask in masks]
            if tuple(sizes) != grid.sizes:
                raise ValueError(
                    f"masks of (width, height) {sizes} for pictures of {list(grid.sizes)}: masks "
                    "are given in the original picture's size"
                )
            flat = [stage for stage in self.stages if np.ndim(said[stage]) != 2]
            if flat:
                raise ValueError(
                    f"{flat[0]} says {list(np.shape(said[flat[0]]))}: pixels need logits "
                    f"[n_tokens, {len(self.classes)}]"
                )

    def _kept(self, group: str, margins: Ints) -> Ints:
        """What replicates keep of margins [..., 2 rows + 1, K]: all, or [..., rows + 1, 1]."""
        if group == "all" or self.spec.group_intervals:
            return margins
        n_rows = margins.shape[-2] // 2
        both = np.concatenate([margins[..., :n_rows, :], margins[..., -1:, :]], -2)
        return both.sum(-1, keepdims=True)

    def _flush(self) -> None:
        """Add the pictures that wait to the replicates."""
        if not self._waiting:
            return
        # whole numbers below 2**53 are exact in float64, and only there is the product fast
        weights = np.concatenate([weights for weights, _ in self._waiting]).T.astype(np.float64)
        for key in self._waiting[0][1]:
            margins = np.concatenate([kept[key] for _, kept in self._waiting])
            flat = margins.reshape(len(margins), -1).astype(np.float64)
            into = self._sums[f"{key}/replicates"].reshape(len(weights), -1)
            step = max(1, _BLOCK // into.shape[1])
            for start in range(0, len(weights), step):
                part = slice(start, start + step)
                into[part] += (weights[part] @ flat).astype(np.int64)
        self._waiting.clear()

    # -- adding up --------------------------------------------------------------------------------

    def merge(self, other: Counts) -> Self:
        """Add what another of the same stages, classes and options has counted.

        Raises:
            ValueError: it differs in one of them.
        """
        mine, its = self.options(), other.options()
        differ = [name for name in mine if mine[name] != its[name]]
        if differ:
            raise ValueError(
                "scores do not add up if they differ: "
                + ", ".join(f"{name} {mine[name]!r} and {its[name]!r}" for name in differ)
            )
        other._flush()
        for key, array in self._sums.items():
            array += other._sums[key]
        return self

    def __add__(self, other: Counts) -> Self:
        return self.from_state(self.state(), **self.options()).merge(other)

    def options(self) -> dict[str, Any]:
        """What it was made with, plain data: for `from_state`, and for the header of a file."""
        return asdict(self.spec)

    def state(self) -> dict[str, Tensor]:
        """All sums, int64 by name. They are not copies: summing them in place over processes
        (all_reduce) makes these the scores of all processes."""
        self._flush()
        return {key: torch.from_numpy(array) for key, array in self._sums.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], **options: Any) -> Self:
        """Scores from a copy of a `state()`, and the `options()` of what it is of.

        Raises:
            ValueError: tensors that are not those of such scores.
        """
        out = cls(**options)
        want = {key: (torch.int64, array.shape) for key, array in out._sums.items()}
        got = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items()}
        wrong = sorted(key for key in {*got, *want} if got.get(key) != want.get(key))
        if wrong:
            key = wrong[0]
            raise ValueError(
                f"no state of such scores: {len(wrong)} tensors differ, the first is {key}, "
                f"{got.get(key)} instead of {want.get(key)}"
            )
        for key, tensor in state.items():
            out._sums[key][...] = tensor.cpu().numpy()
        return out

    def check(self, names: Iterable[str]) -> None:
        """See that exactly these pictures passed, each once.

        Raises:
            ValueError: some did not, or some passed twice.
        """
        want = fingerprint(names)
        if not np.array_equal(want, self._sums["pictures"]):
            raise ValueError(
                f"{self.n_images} pictures were scored where these {want[0]} should be, each once: "
                "does a sampler repeat some to fill the last batch?"
            )
