"""A dataset split made ready for studies: prepared batches, token labels, regions.

Everything a study says is about image tokens in grid order, so its arrays are `[n_images, tokens]`.
Where a family looks at a picture twice, as a whole and in tiles, the tokens are those of the finest
look; where its adapter merges patches, a stage before it has the mean of each token's patches.
`Split.read` runs the model over the batches and collects states, with edits that may differ from
image to image; nothing else in the studies opens a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from interp.edges import EdgeSet
from interp.edits import MaskEdit
from interp.inputs import Inputs
from interp.labels import IGNORE
from interp.model import MLLM
from interp.probes import ProbeBank

#: number of a batch -> its edits
EditsOf = Callable[[int], Sequence[MaskEdit]]
Progress = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Split:
    """Images of a dataset, prepared for one model.

    Attributes:
        name: of the dataset and split.
        model: the model they were prepared for.
        batches: the prepared batches, in order.
        masks: `[n_images, height, width]` class numbers.
        labels: `[n_images, n_tokens]` int64, majority class; `IGNORE` where nothing is labelled.
        purity: `[n_images, n_tokens]` share of that class in the token.
        marks: `[n_images, n_tokens]` bool, tokens that carry a mark (bundled scenes only), or None.
        names: of the images.
        n_classes: how many classes there are.
    """

    name: str
    model: MLLM
    batches: tuple[Inputs, ...]
    masks: np.ndarray
    labels: np.ndarray
    purity: np.ndarray
    marks: np.ndarray | None
    names: tuple[str, ...]
    n_classes: int

    @classmethod
    def prepare(
        cls, model: MLLM, data: Any, n: int, question: str, *, batch_size: int = 50
    ) -> Split:
        """The first `n` samples of `data`, in batches.

        Raises:
            ValueError: fewer samples than asked for, or images whose grids differ.
        """
        if not 2 <= n <= len(data):
            raise ValueError(
                f"{n} images asked of {data.name}, which has {len(data)}; a study needs at least 2"
            )
        samples = [data[i] for i in range(n)]
        n_classes = len(data.classes)
        batches, labels, purity = [], [], []
        for start in range(0, n, batch_size):
            part = samples[start : start + batch_size]
            x = model.prepare([sample.image for sample in part], question).select("finest")
            if not x.grid.uniform:
                raise ValueError("a study needs images that share one token grid")
            masks = [sample.mask for sample in part]
            shape = (len(part), -1)
            labels.append(x.grid.labels(masks, n_classes).reshape(shape))
            purity.append(x.grid.purity(masks, n_classes).reshape(shape))
            batches.append(x)
        marks = None
        # marks are known by drawn patch; they are the model's tokens only if the grids agree
        if hasattr(samples[0], "marks") and samples[0].marks.shape == batches[0].grid.shapes[0]:
            marks = np.stack([sample.marks.reshape(-1) for sample in samples])
        return cls(
            name=f"{data.name}/{data.split}",
            model=model,
            batches=tuple(batches),
            masks=np.stack([sample.mask for sample in samples]),
            labels=np.concatenate(labels),
            purity=np.concatenate(purity),
            marks=marks,
            names=tuple(sample.name for sample in samples),
            n_classes=n_classes,
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the token grid."""
        return self.batches[0].grid.shapes[0]

    @property
    def n_tokens(self) -> int:
        """Image tokens of each image."""
        return int(self.labels.shape[1])

    @property
    def labelled(self) -> np.ndarray:
        """`[n_images, n_tokens]` bool: tokens that have a label."""
        return np.asarray(self.labels != IGNORE)

    @cached_property
    def regions(self) -> np.ndarray:
        """`[n_images, n_tokens]` number of the connected region (4 neighbours, one class)."""
        rows, cols = self.shape
        out = np.zeros((len(self), rows, cols), dtype=np.int64)
        for image, labels in enumerate(self.labels.reshape(-1, rows, cols)):
            n = 0
            for label in np.unique(labels):
                found, k = ndimage.label(labels == label)
                out[image] += np.where(found > 0, found + n, 0)
                n += k
        return out.reshape(len(self), -1)

    @cached_property
    def same_region(self) -> np.ndarray:
        """`[n_images, dst, src]` bool: two different tokens of one region."""
        same = self.regions[:, :, None] == self.regions[:, None, :]
        return same & ~np.eye(self.n_tokens, dtype=bool)

    @cached_property
    def visible(self) -> np.ndarray:
        """`[n_images, dst, src]` bool: every layer lets dst see src, itself not counted.

        In most families these are the tokens that come before it in the prompt; a sliding window
        makes them fewer, a picture seen both ways all.
        """
        x = self.batches[0]
        hooks = "blocks.*.attn.hook_mask"
        at = x.grid.of_image(0)
        row, position = int(x.grid.row[at[0]]), x.grid.position[at].tolist()

        def image_block(mask: Tensor, hook: Any) -> Tensor:
            return mask[row].all(0)[position][:, position]

        run = self.model.run(x, read=hooks, keep=image_block, logits=False)
        seen = np.ones((len(at), len(at)), dtype=bool)
        for mask in run.states.values():
            seen &= mask.cpu().numpy()
        seen &= ~np.eye(len(at), dtype=bool)
        return np.broadcast_to(seen, (len(self), *seen.shape))

    def slices(self) -> Iterator[tuple[Inputs, slice]]:
        """The batches, each with the images it holds."""
        start = 0
        for x in self.batches:
            yield x, slice(start, start + len(x))
            start += len(x)

    def edges(self, where: np.ndarray) -> list[EdgeSet]:
        """One `EdgeSet` a batch from `[n_images, dst, src]` bool over tokens."""
        return [x.grid.edges_where(where[at]) for x, at in self.slices()]

    def per_query(self, edges: Sequence[EdgeSet]) -> np.ndarray:
        """How many edges each token has as a query, `[n_images, n_tokens]`; one set a batch."""
        counts = []
        for x, found in zip(self.batches, edges, strict=True):
            at = np.zeros((found.n_batch, found.n_pos), dtype=np.int64)
            np.add.at(at, (found.row, found.dst), 1)
            counts.append(at[x.grid.row, x.grid.position].reshape(len(x), -1))
        return np.concatenate(counts)

    def read(
        self,
        stages: Sequence[str],
        edits: EditsOf | None = None,
        *,
        model: MLLM | None = None,
        on_batch: Progress | None = None,
    ) -> dict[str, Tensor]:
        """Image-token states `{stage: [n_images, n_tokens, d]}` of all images.

        Args:
            stages: hook names.
            edits: what to change in each batch.
            model: another model with the same inputs (a control), instead of the split's own.
            on_batch: called with the number of images done.
        """
        model = model or self.model
        parts: dict[str, list[Tensor]] = {stage: [] for stage in stages}
        for number, x in enumerate(self.batches):
            changes = edits(number) if edits else ()
            run = model.run(x, *changes, read=stages, keep="tokens", logits=False, mass=False)
            for stage in stages:
                parts[stage].append(run[stage].float().cpu())
            if on_batch:
                on_batch(len(x))
        return {stage: torch.cat(found) for stage, found in parts.items()}

    def judge(
        self, bank: ProbeBank, edits: EditsOf | None = None, *, on_batch: Progress | None = None
    ) -> dict[str, np.ndarray]:
        """Classes that probes read at all of their stages, `{stage: [n_images, n_tokens]}`.

        They are read where the model is: no state is kept, or comes back from a server.

        Args:
            bank: the probes.
            edits: what to change in each batch.
            on_batch: called with the number of images done.
        """
        parts: dict[str, list[np.ndarray]] = {stage: [] for stage in bank.stages}
        for number, x in enumerate(self.batches):
            changes = edits(number) if edits else ()
            read = list(bank.stages)
            run = self.model.run(x, *changes, read=read, keep=bank, logits=False, mass=False)
            for stage in bank.stages:
                parts[stage].append(run[stage].cpu().numpy())
            if on_batch:
                on_batch(len(x))
        return {stage: np.concatenate(found) for stage, found in parts.items()}

    def counts(self, hits: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per image: how many of the tokens `among` are hits, and how many there are."""
        return (hits & among).sum(1), among.sum(1)
