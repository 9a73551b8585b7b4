"""Where to start, which way to go, how far it is: what all logistic solvers share.

*Start*: linear discriminant analysis follows from sums of the features. Were states Gaussian
around their class, it would be the answer; a factor on its weights, tried on a few thousand tokens,
makes up for what they are not.

*Metric*: the Hessian is close to diag(h) (x) X'X, where h_k is the mean of p_k (1 - p_k) at the
start. (Boehning 1992, Ann. Inst. Stat. Math. 44:197, has the bound 1/2 X'X, which for a rare class
is a thousand times too steep.) One Cholesky factor a stage serves all classes.

*Objective*: the loss and its gradient in one pass over chunks of features.

Weights are rows [weights, intercept] in standardised units, `theta` [S, K, k + 1] in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from interp.probes.source import Chunks
from interp.probes.units import Fold, Sums
from interp.world import World

TRIED = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5)  # factors on the start's weights
_ALPHA = 1e-4  # of the discriminant's covariance, which need not be invertible


def start(sums: Sums, fold: Fold) -> Tensor:
    """The linear discriminant [S, K, k + 1], from the sums alone.

    A class's mean is shrunk as if d tokens of no class had been added to it: of a class with few
    tokens it is known that badly.
    """
    n, counts = sums.n, sums.y.clamp_min(0.5)
    frequency = counts / counts.sum()
    theta = fold.mean.new_empty(len(sums.gram), len(counts), fold.n_axes + 1)
    for i in range(len(sums.gram)):
        gram, cross = fold.gram(sums, i), fold.cross(sums, i)
        within = (gram - (cross / counts) @ cross.T) / n
        found = torch.cholesky_solve(cross / (counts + len(cross)), factored(within, _ALPHA)).T
        theta[i, :, :-1] = found
        theta[i, :, -1] = frequency.log() - ((cross / counts).T * found).sum(1) / 2
    return theta - theta.mean(1, keepdim=True)


def choose_start(
    fold: Fold,
    theta: Tensor,
    ridge: float,
    sample: Callable[[], Chunks],
    world: World,
) -> tuple[Tensor, Tensor]:
    """The best of the factors `TRIED` on some weights, and the curvature [S, K] there."""
    prior = theta.clone()
    tokens = theta.new_zeros(())
    # the intercepts that go with no weights at all
    flat = centre(fold.frequency.log().expand(len(theta), -1), 1)
    tried: list[Tensor] = []
    for factor in TRIED:
        trial = prior * factor
        trial[..., -1] += (1 - factor) * flat
        tried.append(trial)
    plain = [fold.plain(trial) for trial in tried]
    losses = theta.new_zeros(len(TRIED), len(theta))
    bends = theta.new_zeros(len(TRIED), *theta.shape[:2])
    for z, targets in sample():
        tokens += targets.total()
        for i, (weight, bias) in enumerate(plain):
            logp = _logp(z, weight, bias)
            p = logp.exp()
            bends[i] += targets.weigh(p * (1 - p)).sum(2)
            losses[i] += targets.residual_(logp)
    world.sum_(tokens, losses, bends)
    share = tokens / fold.n
    for i, trial in enumerate(tried):
        losses[i] += share * ridge / 2 * trial[..., :-1].square().sum((1, 2))
    losses = torch.where(torch.isfinite(losses), losses, torch.inf)
    best = losses.argmin(0)
    rows = torch.arange(len(theta), device=theta.device)
    bend = bends[best, rows] / tokens
    return torch.stack(tried)[best, rows], bend.clamp_min(1e-4 * float(bend.max()))


@dataclass
class Metric:
    """The inverse of (h_k X'X + ridge), nearly: `factor` [S, k, k] and `bend` [S, K]."""

    factor: Tensor
    bend: Tensor
    n: float

    @classmethod
    def of(cls, sums: Sums, fold: Fold, ridge: float, bend: Tensor) -> Metric:
        """Factor it. In the features' own precision, since it only steers."""
        factor = fold.mean.new_empty(len(sums.gram), fold.n_axes, fold.n_axes, dtype=sums.dtype)
        mean = bend.mean(1)
        for i in range(len(sums.gram)):
            factor[i] = factored(fold.gram(sums, i), ridge / float(mean[i]))
        return cls(factor, bend, float(sums.n))

    def solve(self, grad: Tensor) -> Tensor:
        """Its product with a gradient [S, K, k + 1]; both sum to zero over the classes.

        Features are centred: the intercept stands alone.
        """
        grad = centre(grad, 1)
        columns = grad[..., :-1].transpose(1, 2).to(self.factor.dtype)
        steps = torch.cholesky_solve(columns, self.factor).transpose(1, 2).to(grad.dtype)
        found = torch.cat([steps, grad[..., -1:] / self.n], -1) / self.bend[..., None]
        return centre(found, 1)

    def keep(self, rows: Tensor) -> Metric:
        """The metric of some stages."""
        return Metric(self.factor[rows], self.bend[rows], self.n)


def objective(
    chunks: Chunks,
    fold: Fold,
    theta: Tensor,
    ridge: float,
    world: World,
) -> tuple[Tensor, Tensor]:
    """Value [S] and gradient [S, K, k + 1] of the penalised loss, in one pass over the data."""
    value, grad_w, grad_b = loss(chunks, fold, theta)
    world.sum_(value, grad_w, grad_b)
    grad = fold.back(grad_w, grad_b)
    grad[..., :-1] += ridge * theta[..., :-1]
    return value + ridge / 2 * theta[..., :-1].square().sum((1, 2)), grad


def loss(chunks: Chunks, fold: Fold, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss [S] and its derivatives by plain weights [S, K, d] and biases [S, K, 1]."""
    weight, bias = fold.plain(theta)
    value = torch.zeros_like(theta[:, 0, 0])
    grad_w, grad_b = torch.zeros_like(weight), torch.zeros_like(bias)
    for z, targets in chunks:
        logp = _logp(z, weight, bias)
        value += targets.residual_(logp)
        # products are rounded to the features' precision, sums of them are not
        grad_w += logp @ z
        grad_b += logp.sum(2, keepdim=True)
    return value, grad_w, grad_b


def _logp(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias.to(z.dtype), weight.to(z.dtype), z.transpose(1, 2)).log_softmax(1)


def factored(matrix: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of a matrix [d, d] with something on its diagonal, more if need be."""
    for _ in range(12):
        loaded = matrix.clone()
        loaded.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(loaded)
        if not int(info):
            return factor
        # sums that were rounded may have eigenvalues just below zero; both users can bear it
        ridge = 10 * ridge + 1e-7 * float(matrix.diagonal().mean())
    raise ValueError("sums of squares that no multiple of the identity makes positive")


def centre(x: Tensor, dim: int) -> Tensor:
    """With a mean of zero along one dimension."""
    return x - x.mean(dim, keepdim=True)
