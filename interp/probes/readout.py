"""What a probe reads with: weights, intercepts, and what follows from them.

A readout is a bank of probes without its history: the part that is sent to a server, where it reads
states in the forward pass. `interp.probes.bank` fits, saves and loads.

Every probe is in raw feature space, the standardisation folded in, so

    logits = x @ weight.T + intercept          [..., n_classes]
    margin = x @ direction + bias              true class against another one

hold for plain states `x` with nothing else to remember. The direction is the vector that
attribution methods project on.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from interp.labels import IGNORE


@dataclass(frozen=True, eq=False, repr=False)
class Readout:
    """One linear readout a stage.

    Attributes:
        stages: where they read.
        classes: names of the classes.
        weights: stage -> `[n_classes, d]`.
        intercepts: stage -> `[n_classes]`.
    """

    stages: tuple[str, ...]
    classes: tuple[str, ...]
    weights: Mapping[str, Tensor]
    intercepts: Mapping[str, Tensor]

    def weight(self, stage: str) -> Tensor:
        """Raw-space weights [n_classes, d] of a stage; `KeyError` names the nearest stages."""
        self._require(stage)
        return self.weights[stage]

    def intercept(self, stage: str) -> Tensor:
        """Raw-space intercepts [n_classes] of a stage."""
        self._require(stage)
        return self.intercepts[stage]

    def logits(self, stage: str, x: Tensor) -> Tensor:
        """Logits [..., n_classes] of states `x` [..., d], in float32."""
        weight = self.weight(stage)
        if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"the probe at {stage!r} reads states [..., {weight.shape[1]}], got {list(x.shape)}"
            )
        return x.to(weight.dtype) @ weight.T + self.intercepts[stage]

    def predict(self, stage: str, x: Tensor) -> Tensor:
        """The winning class of each state, int64 [...]."""
        return self.logits(stage, x).argmax(-1)

    def direction(self, stage: str, true: Tensor | int, other: Tensor | int) -> Tensor:
        """`w_true - w_other` [..., d] in raw feature space; classes broadcast.

        ``margin = (x * direction).sum(-1) + bias`` is the logit of `true` less that of `other`.

        >>> weight, intercept = torch.tensor([[1.0], [3.0]]), torch.zeros(2)
        >>> Readout(("end",), ("sky", "sea"), {"end": weight}, {"end": intercept}).direction(
        ...     "end", 1, 0)
        tensor([2.])
        """
        weight = self.weight(stage)
        return weight[self._class(true, weight)] - weight[self._class(other, weight)]

    def bias(self, stage: str, true: Tensor | int, other: Tensor | int) -> Tensor:
        """The intercept [...] that goes with `direction`."""
        intercept = self.intercept(stage)
        return intercept[self._class(true, intercept)] - intercept[self._class(other, intercept)]

    def to(self, device: torch.device | str) -> Self:
        """The same with its tensors on `device`."""
        return replace(
            self,
            weights={name: value.to(device) for name, value in self.weights.items()},
            intercepts={name: value.to(device) for name, value in self.intercepts.items()},
        )

    def only(self, stages: Sequence[str]) -> Self:
        """The probes of some stages, which are fewer bytes to send."""
        for stage in stages:
            self._require(stage)
        return replace(
            self,
            stages=tuple(stages),
            weights={stage: self.weights[stage] for stage in stages},
            intercepts={stage: self.intercepts[stage] for stage in stages},
        )

    def _require(self, stage: str) -> None:
        if stage not in self.weights:
            near = difflib.get_close_matches(stage, self.stages, n=5, cutoff=0.3) or self.stages
            raise KeyError(f"no probe at {stage!r}; the nearest stages are {', '.join(near)}")

    def _class(self, index: Tensor | int, like: Tensor) -> Tensor:
        index = torch.as_tensor(index, device=like.device)
        # torch would take -1 for the last class, and 255 would fail without saying why.
        if bool(((index < 0) | (index >= len(self.classes))).any()):
            given = sorted(set(index.flatten().tolist()))
            raise ValueError(
                f"classes are 0..{len(self.classes) - 1}, got {given}; "
                f"drop ignored tokens ({IGNORE}) first"
            )
        return index.long()
