"""Multinomial logistic regression for many stages at once.

The method, in four steps, on all stages of equal width together (no loop over stages):

1. *Sums* (`interp.probes.units`): mean, spread and X'X of every stage, in the one pass that
   also brings the features into units of their own.
2. *Start* (`interp.probes.newton`): linear discriminant analysis, from the sums alone.
3. *Metric* (there, too): X'X times a curvature for each class.
4. *L-BFGS* from there (Nocedal and Wright 2006, algorithm 7.4). Each stage halves its own step
   when it must, and stops on its own gradient. A stage that is done leaves, the rest go on.

Features come in chunks from a `Source`: a stack in memory, or a file. Full batches and no random
numbers: the same input gives the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from interp.probes.newton import Metric, choose_start, objective, start
from interp.probes.source import Source, Stack
from interp.probes.units import Fold, Sums, wide
from interp.world import World

DEFAULT_C = 1.0
DEFAULT_TOL = 1e-4  # scikit-learn's
HISTORY = 10  # pairs that L-BFGS remembers; scikit-learn's solver keeps 10 as well
SAMPLE = 4096  # tokens that the start is tried on


@dataclass
class LogisticFit:
    """What `fit_logistic` found, for S stages, K classes and d features.

    `weight` [S, K, d] and `intercept` [S, K] act on *raw* features: the standardisation is
    folded in. Both sum to zero over the classes. `mean` and `scale` [S, d] are what the
    features were standardised with, `objective` [S] is the value that was minimised (float64
    where the device has it), `gradient` [S] the largest entry of its gradient over N.
    """

    weight: Tensor
    intercept: Tensor
    mean: Tensor
    scale: Tensor
    n_iter: Tensor
    objective: Tensor
    gradient: Tensor
    converged: Tensor


@dataclass
class Minimum:
    """Where `minimise` stopped: `theta` [S, K, k + 1] in standardised units, the rest [S]."""

    theta: Tensor
    n_iter: Tensor
    objective: Tensor
    gradient: Tensor


def fit_logistic(
    features: Tensor | list[Tensor],
    labels: Tensor | None,
    n_classes: int,
    *,
    shares: Tensor | None = None,
    weights: Tensor | None = None,
    C: float = DEFAULT_C,
    max_iter: int = 500,
    tol: float = DEFAULT_TOL,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> LogisticFit:
    """Fit S multinomial logistic regressions at once, one a stage.

    Args:
        features: `[S, N, d]` in float32 or float64, or a list of S tensors `[N, d]`, which may
            also be of half precision and are fitted in float32 then.
        labels: `[N]` with values 0..K-1, the same for every stage; None where labels are soft.
        n_classes: K.
        shares: `[N, K]`, soft labels: the share of each class in a token; rows add up to 1. The
            same as each token once a class, with its share as its weight.
        weights: `[N]`, of the tokens, positive; scikit-learn's `sample_weight`, which the means
            and spreads heed as well.
        C: scikit-learn's inverse penalty.
        max_iter: passes over the data after which a stage stops in any case.
        tol: a stage stops when no entry of its mean gradient, in standardised units, exceeds it.
        overwrite: standardise `[S, N, d]` in place, which saves a copy.
        progress: called with the number of stages done.

    A constant feature gets scale 1 and weight 0. With two classes the penalty is that of
    scikit-learn's single-vector (binomial) form, so that the same `C` gives the same model.

    Raises:
        ValueError: shapes, labels, weights or numbers that are no such thing.

    >>> x = torch.tensor([[[0.0], [1.0], [2.0], [3.0]]])
    >>> fit = fit_logistic(x, torch.tensor([0, 0, 1, 1]), 2)
    >>> (x[0] @ fit.weight[0].T + fit.intercept[0]).argmax(-1)
    tensor([0, 0, 1, 1])
    """
    source, sums = Stack.of(
        features, labels, n_classes, shares=shares, weights=weights, overwrite=overwrite
    )
    return fit_stack(source, sums, C=C, max_iter=max_iter, tol=tol, progress=progress)


def fit_stack(
    source: Source,
    sums: Sums,
    *,
    C: float = DEFAULT_C,
    max_iter: int = 500,
    tol: float = DEFAULT_TOL,
    fold: Fold | None = None,
    world: World | None = None,
    progress: Callable[[int], None] | None = None,
) -> LogisticFit:
    """`fit_logistic` for features that have been brought into units and summed up.

    `fold` may bring them to principal components; `world` is as in `minimise`.
    """
    if not (C > 0 and tol > 0 and max_iter >= 1):
        raise ValueError(f"C, tol and max_iter must be positive, got {C}, {tol}, {max_iter}")
    fold = fold or Fold.of(sums)
    found = minimise(
        source, sums, fold, penalty(C, len(sums.y)),
        max_iter=max_iter, tol=tol, world=world, progress=progress,
    )  # fmt: skip
    weight, intercept = fold.raw(found.theta, sums)
    dtype = source.dtype
    mean, std = sums.unit * fold.mean + sums.shift, sums.unit * fold.std
    return LogisticFit(
        weight=weight.to(dtype),
        intercept=intercept.to(dtype),
        mean=mean.to(dtype),
        scale=torch.where(fold.varies, std, 1.0).to(dtype),
        n_iter=found.n_iter,
        objective=found.objective,
        gradient=found.gradient,
        converged=found.gradient <= tol,
    )


def penalty(C: float, n_classes: int) -> float:
    """What half the squared weights of K softmax rows are multiplied by.

    A binomial w is +-w/2 in two softmax rows, half its squared norm: hence twice the penalty.
    """
    return (2.0 if n_classes == 2 else 1.0) / C


def minimise(
    source: Source,
    sums: Sums,
    fold: Fold,
    ridge: float,
    *,
    max_iter: int = 500,
    tol: float = DEFAULT_TOL,
    world: World | None = None,
    progress: Callable[[int], None] | None = None,
) -> Minimum:
    """Minimise the summed loss plus `ridge` / 2 times the squared weights, at every stage.

    The source gives up stages that are done. `sums` and `fold` must be the same in every process
    of `world`; each brings a source of its own.
    """
    world = world or World()
    n = float(sums.n)
    n_stages = len(sums.gram)

    # Step 2 and 3, on a sample that is the same whoever holds its tokens.
    stride = max(1, int(source.n_tokens) // SAMPLE)
    theta, curvature_of = choose_start(
        fold, start(sums, fold), ridge, lambda: source.chunks(stride), world
    )
    metric = Metric.of(sums, fold, ridge, curvature_of)
    value, grad = objective(source.chunks(), fold, theta, ridge, world)

    alive = torch.arange(n_stages, device=theta.device)
    final = (theta.clone(), value.clone(), grad.clone())
    n_iter = torch.zeros(n_stages, dtype=torch.int64, device=theta.device)
    memory: list[tuple[Tensor, Tensor, Tensor]] = []
    gamma = value.new_ones(n_stages)
    noise = 4 * torch.finfo(source.dtype).eps  # rounding of the objective, relative
    step = torch.ones_like(value)
    direction = _direction(grad, memory, gamma, metric)

    for _ in range(max_iter):
        # Step 4: stages that are done leave.
        done = grad.abs().amax((1, 2)) <= tol * n
        if bool(done.any()):
            for full, part in zip(final, (theta, value, grad), strict=True):
                full[alive] = part
            keep = torch.nonzero(~done).flatten()
            source.keep(keep.tolist())
            fold, metric = fold.keep(keep), metric.keep(keep)
            alive, theta, value, grad = alive[keep], theta[keep], value[keep], grad[keep]
            direction, step, gamma = direction[keep], step[keep], gamma[keep]
            memory = [(s[keep], t[keep], r[keep]) for s, t, r in memory]
            if progress is not None:
                progress(n_stages - len(keep))
            if len(keep) == 0:
                break

        # One L-BFGS step for every stage still here; where it fails, half of it next.
        slope = _dot(grad, direction)
        trial = theta + step[:, None, None] * direction
        trial_value, trial_grad = objective(source.chunks(), fold, trial, ridge, world)
        n_iter[alive] += 1
        good = trial_value <= value + 1e-4 * step * slope + noise * value.abs()

        moved, turned = trial - theta, trial_grad - grad
        bent = _dot(moved, turned)
        paired = good & (bent > 0)
        # A stage without a good pair remembers zeros: they take no part in its history.
        rho = torch.where(paired, 1 / bent, 0.0)
        moved, turned = (torch.where(paired[:, None, None], v, 0.0) for v in (moved, turned))
        memory = [*memory[-(HISTORY - 1) :], (moved, turned, rho)]
        gamma = torch.where(paired, bent / _dot(turned, metric.solve(turned)), gamma)

        pick = good[:, None, None]
        theta = torch.where(pick, trial, theta)
        grad = torch.where(pick, trial_grad, grad)
        value = torch.where(good, trial_value, value)
        fresh = _direction(grad, memory, gamma, metric)
        direction = torch.where(pick, fresh, direction)
        step = torch.where(good, torch.ones_like(step), step / 2)
    for full, part in zip(final, (theta, value, grad), strict=True):
        full[alive] = part
    if progress is not None and len(alive):
        progress(n_stages)
    theta, value, grad = final
    return Minimum(theta, n_iter, value, grad.abs().amax((1, 2)) / n)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), dtype=wide(a))


def _direction(
    grad: Tensor, memory: list[tuple[Tensor, Tensor, Tensor]], gamma: Tensor, metric: Metric
) -> Tensor:
    """Two-loop recursion: minus the inverse Hessian estimate times the gradient."""
    q, alphas = grad, []
    for moved, turned, rho in reversed(memory):
        alpha = rho * _dot(moved, q)
        q = q - alpha[:, None, None] * turned
        alphas.append(alpha)
    q = gamma[:, None, None] * metric.solve(q)
    for (moved, turned, rho), alpha in zip(memory, reversed(alphas), strict=True):
        beta = rho * _dot(turned, q)
        q = q + (alpha - beta)[:, None, None] * moved
    return -q
