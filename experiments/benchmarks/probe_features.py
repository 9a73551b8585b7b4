"""States for the probe benchmark, drawn to be like a model's, and not like a textbook's.

Features are correlated (a spectrum that falls off as a power, turned at random), of unlike scale
(log-normal, a few a thousand times larger), and two spreads away from zero. Classes lie around
means of their own. Stages differ by their random numbers only, so a time per stage means something.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Data:
    """Stages {name: [N, d]} float32 and labels [N], to fit on and to test on."""

    fit: dict[str, Tensor]
    fit_labels: Tensor
    test: dict[str, Tensor]
    test_labels: Tensor
    classes: list[str]

    @property
    def first(self) -> str:
        """The stage that is measured where one is enough."""
        return next(iter(self.fit))


def draw(
    stages: int, tokens: int, width: int, classes: int, *, power: float = 0.6, seed: int = 0
) -> Data:
    """`tokens` to fit on, a third as many to test on.

    Args:
        stages, tokens, width, classes: how many.
        power: the spectrum's k-th entry is k**-power; 0 for features without correlations.
        seed: of everything.
    """
    g = torch.Generator().manual_seed(seed)
    n = tokens + tokens // 3
    labels = torch.randint(0, classes, (n,), generator=g)
    fit, test = {}, {}
    for stage in range(stages):
        spectrum = (1 + torch.arange(width)) ** -power
        turn = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
        means = 2.56 / width**0.5 * torch.randn(classes, width, generator=g)
        x = (means[labels] + torch.randn(n, width, generator=g)) * spectrum @ turn
        scale = torch.randn(width, generator=g).exp()
        scale[:3] *= 1000
        # in units of each feature's own spread, as a model's are before its norm's weight
        x = (x + 2 * torch.randn(width, generator=g) * x.std(0)) * scale
        fit[f"stage {stage}"], test[f"stage {stage}"] = x[:tokens].clone(), x[tokens:]
    names = [f"class {i}" for i in range(classes)]
    return Data(fit, labels[:tokens], test, labels[tokens:], names)
