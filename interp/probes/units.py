"""Units near the standard ones, sums in them, and what is missing to standardised features.

Features are kept as z = (x - shift) / unit, with a shift near the mean and a unit near the spread.
So rounding (float32, or bfloat16 on disk) costs each feature the same, however far it lies from
zero. What is missing to *exactly* standardised features, perhaps on their principal components, is
a linear map. It is put on the weights, of which there are K a feature, and not on the features, of
which there are N (`Fold`). It follows from sums of z (`Sums`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interp.probes.moments import Moments


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over weighted tokens in units of (shift, unit); S stages of one width d, K classes.

    Attributes:
        n: the sum of the weights.
        y: [K] sums of the targets.
        shift, unit: [S, d] float64; z = (x - shift) / unit.
        x: [S, d] sums of z.
        gram: S of [d, d], sums of z z'.
        cross: S of [d, K], sums of z y'.
        dtype: the precision of the features that were summed.
    """

    n: float
    y: Tensor
    shift: Tensor
    unit: Tensor
    x: Tensor
    gram: Sequence[Tensor]
    cross: Sequence[Tensor]
    dtype: torch.dtype

    @classmethod
    def of(
        cls, moments: Moments, stages: Sequence[str], seen: Tensor, device: torch.device
    ) -> Sums:
        """Those of some stages of equal width, and of the classes `seen` (numbers)."""
        frame = moments.frame

        def stacked(of: Mapping[str, Tensor]) -> Tensor:
            return torch.stack([of[stage] for stage in stages]).to(device)

        return cls(
            n=float(moments.n[0]),
            y=moments.y[seen].to(device),
            shift=stacked(frame.shift),
            unit=stacked(frame.unit),
            x=stacked(moments.x),
            gram=[moments.xx[stage].to(device) for stage in stages],
            cross=[moments.xy[stage][:, seen].to(device) for stage in stages],
            dtype=torch.float32,
        )


@dataclass(frozen=True, eq=False)
class Fold:
    """From weights on standardised features (perhaps on principal components) to weights on z.

    Attributes:
        mean, std: [S, d] of z, float64.
        varies: [S, d] which features do; the others get weight 0.
        axes: [S, d, k] principal axes of the standardised features, or None.
        frequency: [K] of the classes.
        n: the sum of the weights.
    """

    mean: Tensor
    std: Tensor
    varies: Tensor
    axes: Tensor | None
    frequency: Tensor
    n: float

    @classmethod
    def of(cls, sums: Sums, components: int | None = None) -> Fold:
        """Exact standardisation, and `components` principal components if that is fewer."""
        mean = sums.x / sums.n
        square = torch.stack([gram.diagonal().to(mean) for gram in sums.gram]) / sums.n
        std = (square - mean.square()).clamp_min(0).sqrt()
        # A spread within the rounding of the raw mean is no signal; scaled up it would be one.
        rounding = 10 * torch.finfo(sums.dtype).eps * (mean + sums.shift / sums.unit).abs()
        counts = sums.y.to(mean).clamp_min(0.5)
        fold = cls(mean, std, std > rounding, None, counts / counts.sum(), sums.n)
        if components is None or components >= mean.shape[1]:
            return fold
        axes = [
            torch.linalg.eigh(fold.gram(sums, i)).eigenvectors[:, -components:]
            for i in range(len(mean))
        ]
        return cls(mean, std, std > rounding, torch.stack(axes), fold.frequency, sums.n)

    @property
    def n_axes(self) -> int:
        """How many weights a class has."""
        return self.mean.shape[1] if self.axes is None else self.axes.shape[2]

    def keep(self, rows: Tensor) -> Fold:
        """Those of some stages."""
        axes = None if self.axes is None else self.axes[rows]
        some = self.mean[rows], self.std[rows], self.varies[rows]
        return Fold(*some, axes, self.frequency, self.n)

    def gram(self, sums: Sums, i: int) -> Tensor:
        """[k, k] of stage i: sums of squares of its standardised features."""
        scale, mean = self._scale()[i], self.mean[i]
        gram = sums.gram[i].to(mean) - self.n * torch.outer(mean, mean)
        gram = gram * scale[:, None] * scale
        return gram if self.axes is None else self.axes[i].T @ gram @ self.axes[i]

    def cross(self, sums: Sums, i: int) -> Tensor:
        """[k, K] of stage i: sums of standardised features with the classes."""
        centred = sums.cross[i].to(self.mean) - torch.outer(self.mean[i], sums.y.to(self.mean))
        cross = centred * self._scale()[i][:, None]
        return cross if self.axes is None else self.axes[i].T @ cross

    def plain(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [S, K, d] and biases [S, K, 1] on z, of rows [weights, intercept]."""
        weight = theta[..., :-1]
        if self.axes is not None:
            weight = weight @ self.axes.transpose(1, 2)
        weight = weight * self._scale()[:, None]
        return weight, theta[..., -1:] - weight @ self.mean[..., None]

    def back(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Derivatives by `plain`'s results -> derivatives by its argument."""
        weight = (weight - bias * self.mean[:, None]) * self._scale()[:, None]
        if self.axes is not None:
            weight = weight @ self.axes
        return torch.cat([weight, bias], -1)

    def raw(self, theta: Tensor, sums: Sums) -> tuple[Tensor, Tensor]:
        """Weights [S, K, d] and intercepts [S, K] on plain states; both sum to zero over K."""
        weight, bias = self.plain(theta - theta.mean(1, keepdim=True))
        weight = weight / sums.unit[:, None]
        return weight, bias[..., 0] - (weight @ sums.shift[..., None])[..., 0]

    def _scale(self) -> Tensor:
        return torch.where(self.varies, 1 / self.std, 0.0)


def wide(x: Tensor) -> torch.dtype:
    """float64 for sums and small factorisations, except on Apple's MPS, which has none."""
    return torch.float32 if x.device.type == "mps" else torch.float64
