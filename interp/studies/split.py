"""A dataset split made ready for studies: prepared batches, token labels, regions.

Everything a study says is about image tokens in grid order, so its arrays are `[n_images, tokens]`.
Where a family looks at a picture twice, as a whole and in tiles, the tokens are those of the finest
look; where its adapter merges patches, a stage before it has the mean of each token's patches.
`Split.read` runs the model over the batches and collects states, with edits that may differ from
image to image; `Split.stream` hands them out batch by batch, so that probes are fitted on what no
memory could hold (`Split.fit`). Nothing else in the studies opens a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from interp.probes.fitting import Fitting
from interp.probes.parts import Part
from interp.probes.reading import ModelStream
from interp.probes.scores import Scores
from interp.probes.scoring import Rows, score

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
        masks: one `[height, width]` an image, class numbers.
        labels: `[n_images, n_tokens]` int64, majority class; `IGNORE` where nothing is labelled.
        purity: `[n_images, n_tokens]` share of that class in the token.
        marks: `[n_images, n_tokens]` bool, tokens that carry a mark (bundled scenes only), or None.
        names: of the images.
        classes: their names.
    """

    name: str
    model: MLLM
    batches: tuple[Inputs, ...]
    masks: tuple[np.ndarray, ...]
    labels: np.ndarray
    purity: np.ndarray
    marks: np.ndarray | None
    names: tuple[str, ...]
    classes: tuple[str, ...]

    @classmethod
    def prepare(
        cls, model: MLLM, data: Any, n: int, question: str, *, batch_size: int = 50
    ) -> Split:
        """The first `n` samples of `data`, in batches.

        Raises:
            ValueError: fewer samples than asked for, or images whose grids differ (the model looks
                at them in their own sizes: bring them to one, as `interp.datasets.resized` does).
        """
        if not 2 <= n <= len(data):
            raise ValueError(
                f"{n} images asked of {data.name}, which has {len(data)}; a study needs at least 2"
            )
        n_classes = len(data.classes)
        batches: list[Inputs] = []
        labels, purity, masks, names, marks = [], [], [], [], []
        for start in range(0, n, batch_size):
            part = [data[i] for i in range(start, min(start + batch_size, n))]
            x = model.prepare([sample.image for sample in part], question).select("finest")
            first = (batches[0] if batches else x).grid
            if not x.grid.uniform or x.grid.shapes[0] != first.shapes[0]:
                others = sorted({*first.shapes, *x.grid.shapes})
                raise ValueError(
                    f"pictures of {data.name} have token grids of {others[0]} and {others[-1]}; a "
                    "study compares tokens by their place in one grid. Bring the pictures to one "
                    "size: resized(data, (width, height)), on the command line --resize 448x448"
                )
            shares = x.grid.fractions([sample.mask for sample in part], n_classes)
            shares = shares.reshape(len(part), -1, n_classes)
            labels.append(np.where(shares.any(2), shares.argmax(2), IGNORE).astype(np.int64))
            purity.append(shares.max(2))
            batches.append(x)
            names += [sample.name for sample in part]
            # narrow, since masks of all pictures stay in memory; signed, so nothing wraps
            masks += [sample.mask.astype(np.int16) for sample in part]
            # marks are known by drawn patch; they are the model's tokens only if the grids agree
            marks += [sample.marks.ravel() for sample in part if _marked(sample, first.shapes[0])]
        return cls(
            name=f"{data.name}/{data.split}",
            model=model,
            batches=tuple(batches),
            masks=tuple(masks),
            labels=np.concatenate(labels),
            purity=np.concatenate(purity),
            marks=np.stack(marks) if len(marks) == n else None,
            names=tuple(names),
            classes=tuple(data.classes),
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def n_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

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

    def parts(self, numbers: Iterable[int]) -> Iterator[Part]:
        """Batches with their labels, by number (see `interp.probes.parts`)."""
        at = [images for _, images in self.slices()]
        for number in numbers:
            here = at[number]
            yield Part(
                number,
                self.batches[number],
                self.masks[here],
                self.names[here],
                self.labels[here].ravel(),
                self.purity[here].ravel(),
            )

    @property
    def n_parts(self) -> int:
        """How many batches."""
        return len(self.batches)

    def stream(
        self,
        stages: Sequence[str],
        edits: EditsOf | None = None,
        *,
        model: MLLM | None = None,
        on_batch: Progress | None = None,
        **options: Any,
    ) -> ModelStream:
        """The image tokens of all images at some stages, batch by batch.

        Args:
            stages: hook names.
            edits: what to change in each batch.
            model: another model with the same inputs (a control), instead of the split's own.
            on_batch: called with the number of images done.
            options: further ones of `ModelStream`.
        """
        by_part = None if edits is None else lambda part: edits(part.number)
        return ModelStream(
            model or self.model, self, stages, edits=by_part, on_run=on_batch, **options
        )

    def fit(
        self,
        stages: Sequence[str],
        edits: EditsOf | None = None,
        *,
        fitting: Fitting | None = None,
        seed: int = 0,
        on_batch: Progress | None = None,
    ) -> ProbeBank:
        """Probes at some stages, on all labelled tokens.

        Args:
            stages: hook names.
            edits: what to change in each batch.
            fitting: how; the default of `interp.probes.fitting` if None.
            seed: of the order of minibatches.
            on_batch: called with the number of images done.
        """
        stream = self.stream(stages, edits, on_batch=on_batch)
        return (fitting or Fitting()).fit(stream, seed=seed).bank

    def said(
        self,
        rows: Rows,
        edits: EditsOf | None = None,
        *,
        scores: Sequence[Scores] = (),
        model: MLLM | None = None,
        on_batch: Progress | None = None,
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """Classes that probes read of all images, `{row: [n_images, n_tokens]}`, in one pass.

        Args:
            rows: row -> the stage that is read, and the bank that reads it.
            edits: what to change in each batch.
            scores: to be added to.
            model: another model with the same inputs, instead of the split's own.
            on_batch: called with the number of images done.
            options: further ones of `ModelStream`.
        """
        made = options.get("projections") or {}
        stages = [s for s in dict.fromkeys(stage for stage, _ in rows.values()) if s not in made]
        stream = self.stream(stages, edits, model=model, on_batch=on_batch, **options)
        found: dict[str, list[np.ndarray]] = {row: [] for row in rows}

        def keep(part: Part, logits: dict[str, Tensor]) -> None:
            for row, values in logits.items():
                found[row].append(values.argmax(-1).cpu().numpy().reshape(len(part.names), -1))

        score(stream, rows, scores, on_part=keep)
        return {row: np.concatenate(parts) for row, parts in found.items()}

    def read(
        self,
        stages: Sequence[str],
        edits: EditsOf | None = None,
        *,
        model: MLLM | None = None,
        on_batch: Progress | None = None,
    ) -> dict[str, Tensor]:
        """Image-token states `{stage: [n_images, n_tokens, d]}` of all images; mind the memory.

        Args: as of `stream`.
        """
        stream = self.stream(stages, edits, model=model, on_batch=on_batch)
        parts: dict[str, list[Tensor]] = {stage: [] for stage in stages}
        for _, tokens in stream.read(range(self.n_parts)):
            for stage in stages:
                state = tokens.features[stage].float().cpu()
                parts[stage].append(state.unflatten(0, (-1, self.n_tokens)))
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


def _marked(sample: Any, shape: tuple[int, int]) -> bool:
    return hasattr(sample, "marks") and sample.marks.shape == shape
