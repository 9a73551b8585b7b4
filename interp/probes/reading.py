"""Pictures read through a model, as a stream of image tokens.

`ModelStream` runs a model over prepared pictures, part after part, and hands out what it read at
each stage with the tokens' labels. Nothing is kept: a second pass runs the model again.

    data = open_data("ade20k:PATH")
    stream = ModelStream(model, DataParts(model, data.fit, batch_size=8))
    fit = fit_ridge(stream)

Stages may be any hooks with a value at each image token: `blocks.*.hook_resid_post`, also per-head
ones such as `blocks.*.attn.hook_z`, which are read flat. Two kinds of stage are made here:

- `projections`: a stage times a matrix (a control for width);
- `noise`: Gaussian noise of each width. A probe that reads anything off it has seen its test
  pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from interp.model import MLLM
from interp.probes.parts import Part, Parts
from interp.probes.stream import Tokens

NOISE = "random features, width "


class ModelStream:
    """Image tokens of prepared pictures at some stages of a model (a `TokenStream`)."""

    def __init__(
        self,
        model: MLLM,
        source: Parts,
        stages: str | Sequence[str] | None = None,
        *,
        edits: Callable[[Part], Sequence[Any]] | None = None,
        soft: bool = False,
        projections: Mapping[str, tuple[str, Tensor]] | None = None,
        noise: bool = False,
        seed: int = 0,
        on_run: Callable[[int], None] | None = None,
    ) -> None:
        """Say what to read; nothing is run yet.

        Args:
            model: what is run.
            source: the prepared pictures.
            stages: hook names or patterns; all of the model's stages if None.
            edits: what to change in each part.
            soft: a token's target is the share of each class in it, not its majority.
            projections: name of a stage that is made -> the stage it is made of, and a matrix
                `[d, k]`.
            noise: add the random-feature control.
            seed: of the noise.
            on_run: called with the number of pictures that were run; an attribute, too.

        Raises:
            HookNotFound: stages that the model lacks.
            TypeError: edits that are no function.
        """
        if edits is not None and not callable(edits):
            raise TypeError(
                f"edits={type(edits).__name__}: a function from a part to its edits would do, such "
                "as edits=lambda part: [Unmask(part.x.grid.image_block())]"
            )
        self.model, self.source = model, source
        self.stages = list(model.stages if stages is None else model.hooks.expand(stages))
        self._edits, self._soft, self._noise, self._seed = edits, soft, noise, seed
        self._projections = dict(projections or {})
        self.on_run = on_run

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.source.classes

    @property
    def n_parts(self) -> int:
        """How many parts."""
        return self.source.n_parts

    @cached_property
    def widths(self) -> Mapping[str, int]:
        """Stage -> width, found by running the first part."""
        part = next(iter(self.source.parts([0])))
        found = {stage: int(state.shape[1]) for stage, state in self._run(part).items()}
        noise = sorted(set(found.values())) if self._noise else []
        return {**found, **{f"{NOISE}{width}": width for width in noise}}

    def read(self, parts: Iterable[int]) -> Iterator[tuple[int, Tokens]]:
        """See `TokenStream`."""
        return ((part.number, self.tokens(part)) for part in self.source.parts(parts))

    def labels(self, parts: Iterable[int]) -> Iterator[tuple[int, Tokens]]:
        """See `TokenStream`."""
        return ((part.number, self._tokens(part, {})) for part in self.source.parts(parts))

    def tokens(self, part: Part) -> Tokens:
        """Run the model on a part."""
        widths = self.widths  # may run the model, so not while another run's states are held
        features = self._run(part)
        for stage, width in widths.items():
            if stage not in features:
                like = next(iter(features.values()))
                features[stage] = self._drawn(part, width).to(like.device)
        if self.on_run is not None:
            self.on_run(len(part.names))
        return self._tokens(part, features)

    def _run(self, part: Part) -> dict[str, Tensor]:
        edits = self._edits(part) if self._edits else ()
        run = self.model.run(
            part.x, *edits, read=self.stages, keep="flat", logits=False, mass=False
        )
        found = {stage: run[stage].flatten(1) for stage in self.stages}
        for name, (stage, matrix) in self._projections.items():
            found[name] = found[stage] @ matrix.to(found[stage])
        return found

    def _tokens(self, part: Part, features: dict[str, Tensor]) -> Tokens:
        device = next((x.device for x in features.values()), torch.device("cpu"))
        shares = None
        if self._soft:
            if part.shares is None:
                raise ValueError("soft labels of pictures whose shares of classes were not kept")
            shares = torch.from_numpy(part.shares).float().to(device)
        return Tokens(features, torch.from_numpy(part.labels).to(device), shares)

    def _drawn(self, part: Part, width: int) -> Tensor:
        seed = (self._seed * 1_000_003 + part.number) * 65_537 + width
        generator = torch.Generator().manual_seed(seed % 2**63)
        return torch.randn(len(part.labels), width, generator=generator)
