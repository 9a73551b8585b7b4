"""Multinomial logistic regression for many stages at once.

The method, in four steps, on all stages of equal width together ([S, N, d], no loop over S):

1. Standardise in place. Form X'X, once.
2. Boehning (1992, Ann. Inst. Stat. Math. 44:197): the Hessian never exceeds
   1/2 (I - 11'/K) (x) X'X. On weights that sum to zero over classes this is 1/2 X'X for every
   class alike, so one Cholesky factor a stage inverts the bound for all K classes.
3. That inverse is the starting metric of L-BFGS (Nocedal and Wright 2006, algorithm 7.4).
   Its first step cannot overshoot; later steps learn how loose the bound is.
4. Each stage halves its own step when it must, and stops on its own gradient. A stage that is
   done leaves the stack, and the rest go on.

Full batches and no random numbers: the same input gives the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_C = 1.0
DEFAULT_TOL = 1e-5
HISTORY = 10  # pairs that L-BFGS remembers; scikit-learn's solver keeps 10 as well


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


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    n_classes: int,
    *,
    C: float = DEFAULT_C,
    max_iter: int = 500,
    tol: float = DEFAULT_TOL,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> LogisticFit:
    """Fit S multinomial logistic regressions at once, one a stage.

    `features` is [S, N, d] (float32 or float64), `labels` [N] with values 0..K-1, the same for
    every stage. `C` is scikit-learn's inverse penalty. A stage stops when no entry of its mean
    gradient (in standardised units) exceeds `tol`, or after `max_iter` passes over the data.
    With `overwrite` the features are standardised in place, which saves a copy; a caller that
    still needs them leaves it off. `progress` is called with the number of stages done.

    A constant feature gets scale 1 and weight 0. With two classes the penalty is that of
    scikit-learn's single-vector (binomial) form, so that the same `C` gives the same model.

    >>> x = torch.tensor([[[0.0], [1.0], [2.0], [3.0]]])
    >>> fit = fit_logistic(x, torch.tensor([0, 0, 1, 1]), 2)
    >>> (x[0] @ fit.weight[0].T + fit.intercept[0]).argmax(-1)
    tensor([0, 0, 1, 1])
    """
    if features.ndim != 3 or features.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "features must be [stages, tokens, width] in float32 or float64, "
            f"got {list(features.shape)} {features.dtype}"
        )
    n_stages, n_tokens, width = features.shape
    if labels.shape != (n_tokens,) or n_tokens == 0:
        raise ValueError(
            f"labels must be [{n_tokens}], one a token and at least one, got {list(labels.shape)}"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise ValueError(
            f"labels must be 0..{n_classes - 1}, got {int(labels.min())}..{int(labels.max())}"
        )
    if not (C > 0 and tol > 0 and max_iter >= 1):
        raise ValueError(f"C, tol and max_iter must be positive, got {C}, {tol}, {max_iter}")
    x = features if overwrite else features.clone()
    y = labels.to(x.device, torch.int64)

    # Steps 1 and 2: standardise, and factor the bound.
    mean, scale = _standardise(x)
    broken = torch.nonzero(~torch.isfinite(mean + scale).all(1)).flatten().tolist()
    if broken:
        raise ValueError(f"features of stages {broken} hold nan or infinite values")
    # A binomial w is +-w/2 in two softmax rows, half its squared norm: hence twice the penalty.
    ridge = (2.0 if n_classes == 2 else 1.0) / C
    metric = _bound(x, ridge)

    # Rows are [weights, intercept]; the intercepts start at the log frequencies.
    theta = x.new_zeros(n_stages, n_classes, width + 1)
    counts = torch.bincount(y, minlength=n_classes).to(x.dtype)
    theta[..., -1] = _centre(counts.clamp_min(0.5).log(), 0)
    value, grad = _objective(x, y, theta, ridge)

    alive = torch.arange(n_stages, device=x.device)
    final = (theta.clone(), value.clone(), grad.clone())
    n_iter = torch.zeros(n_stages, dtype=torch.int64, device=x.device)
    memory: list[tuple[Tensor, Tensor, Tensor]] = []
    gamma = value.new_ones(n_stages)
    noise = 4 * torch.finfo(x.dtype).eps  # rounding of the objective, relative
    step = torch.ones_like(value)
    direction = _direction(grad, memory, gamma, metric, n_tokens)

    for _ in range(max_iter):
        # Step 4: stages that are done leave the stack.
        done = grad.abs().amax((1, 2)) <= tol * n_tokens
        if bool(done.any()):
            for full, part in zip(final, (theta, value, grad), strict=True):
                full[alive] = part
            keep = torch.nonzero(~done).flatten()
            # Close the gaps in place: a second copy of the features would not always fit.
            for to, source in enumerate(keep.tolist()):
                if to != source:
                    x[to].copy_(x[source])
            x = x[: len(keep)]
            alive, theta, value, grad = alive[keep], theta[keep], value[keep], grad[keep]
            direction, step, gamma = direction[keep], step[keep], gamma[keep]
            metric = metric[keep]
            memory = [(s[keep], t[keep], r[keep]) for s, t, r in memory]
            if progress is not None:
                progress(n_stages - len(keep))
            if len(keep) == 0:
                break

        # Step 3: one L-BFGS step for every stage still here; where it fails, half of it next.
        slope = _dot(grad, direction)
        trial = theta + step.to(x.dtype)[:, None, None] * direction
        trial_value, trial_grad = _objective(x, y, trial, ridge)
        n_iter[alive] += 1
        good = trial_value <= value + 1e-4 * step * slope + noise * value.abs()

        moved, turned = trial - theta, trial_grad - grad
        curvature = _dot(moved, turned)
        paired = good & (curvature > 0)
        # A stage without a good pair remembers zeros: they take no part in its history.
        rho = torch.where(paired, 1 / curvature, 0.0)
        moved, turned = (torch.where(paired[:, None, None], v, 0.0) for v in (moved, turned))
        memory = [*memory[-(HISTORY - 1) :], (moved, turned, rho)]
        turned_norm = _dot(turned, _solve(turned, metric, n_tokens))
        gamma = torch.where(paired, curvature / turned_norm, gamma)

        pick = good[:, None, None]
        theta = torch.where(pick, trial, theta)
        grad = torch.where(pick, trial_grad, grad)
        value = torch.where(good, trial_value, value)
        fresh = _direction(grad, memory, gamma, metric, n_tokens)
        direction = torch.where(pick, fresh, direction)
        step = torch.where(good, torch.ones_like(step), step / 2)
    for full, part in zip(final, (theta, value, grad), strict=True):
        full[alive] = part
    if progress is not None and len(alive):
        progress(n_stages)

    theta, value, grad = final
    steepest = grad.abs().amax((1, 2)) / n_tokens
    wide = _wide(theta)
    theta = _centre(theta.to(wide), 1)
    weight = theta[..., :-1] / scale.to(wide)[:, None]
    intercept = theta[..., -1] - (weight * mean.to(wide)[:, None]).sum(-1)
    dtype = features.dtype
    return LogisticFit(
        weight=weight.to(dtype),
        intercept=intercept.to(dtype),
        mean=mean,
        scale=scale,
        n_iter=n_iter,
        objective=value,
        gradient=steepest,
        converged=steepest <= tol,
    )


def _wide(x: Tensor) -> torch.dtype:
    """float64 for sums and small factorisations, except on Apple's MPS, which has none."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), dtype=_wide(a))


def _centre(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim, keepdim=True)


def _chunk(x: Tensor, per_token: int) -> int:
    """Tokens at a time, when a token of a stage needs `per_token` numbers of working memory.

    Small beside the features whatever the model, but no smaller: threads wait for each other
    at every operation, which on a busy machine costs more than the operation.
    """
    budget, most = (2**22, 8192) if x.device.type == "cpu" else (2**26, 2**16)
    return min(most, max(256, budget // (len(x) * per_token)))


def _standardise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and scale [S, N, d] in place; returns mean and scale [S, d]."""
    n, wide = x.shape[1], _wide(x)
    mean = torch.zeros(x.shape[0], x.shape[2], dtype=wide, device=x.device)
    for part in torch.split(x, _chunk(x, x.shape[2]), 1):
        mean += part.sum(1, dtype=wide)
    mean = (mean / n).to(x.dtype)
    x -= mean[:, None]
    square = torch.zeros_like(mean, dtype=wide)
    for part in torch.split(x, _chunk(x, x.shape[2]), 1):
        square += part.to(wide).square().sum(1)
    scale = (square / n).sqrt().to(x.dtype)
    # A spread within the rounding of the mean is no signal; scaling it up would make it one.
    constant = scale <= 10 * torch.finfo(x.dtype).eps * mean.abs()
    scale = torch.where(constant, torch.ones_like(scale), scale)
    x *= (~constant / scale)[:, None]
    return mean, scale


def _bound(x: Tensor, ridge: float) -> Tensor:
    """Cholesky factors [S, d, d] of Boehning's bound on the weights' Hessian."""
    gram = (x.transpose(1, 2) @ x).to(_wide(x)).mul_(0.5)
    gram.diagonal(dim1=1, dim2=2).add_(ridge)
    factor: Tensor = torch.linalg.cholesky(gram)
    return factor.to(x.dtype)


def _solve(grad: Tensor, metric: Tensor, n_tokens: int) -> Tensor:
    """The bound's inverse times [S, K, d + 1]. Features are centred: the intercept stands alone."""
    weights = torch.cholesky_solve(grad[..., :-1].transpose(1, 2), metric).transpose(1, 2)
    return _centre(torch.cat([weights, grad[..., -1:] * (2 / n_tokens)], -1), 1)


def _direction(
    grad: Tensor,
    memory: list[tuple[Tensor, Tensor, Tensor]],
    gamma: Tensor,
    metric: Tensor,
    n_tokens: int,
) -> Tensor:
    """Two-loop recursion: minus the inverse Hessian estimate times the gradient."""
    q, alphas = grad, []
    for moved, turned, rho in reversed(memory):
        alpha = rho * _dot(moved, q)
        q = q - alpha.to(q.dtype)[:, None, None] * turned
        alphas.append(alpha)
    q = gamma.to(q.dtype)[:, None, None] * _solve(q, metric, n_tokens)
    for (moved, turned, rho), alpha in zip(memory, reversed(alphas), strict=True):
        beta = rho * _dot(turned, q)
        q = q + (alpha - beta).to(q.dtype)[:, None, None] * moved
    return -q


def _objective(x: Tensor, y: Tensor, theta: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Value [S] and gradient [S, K, d + 1] of the penalised loss, in one pass over the data."""
    weight, bias = theta[..., :-1].contiguous(), theta[..., -1:].contiguous()
    wide = _wide(x)
    value = weight.square().sum((1, 2), dtype=wide) * (ridge / 2)
    grad_w, grad_b = weight * ridge, torch.zeros_like(bias)
    size = _chunk(x, theta.shape[1])
    for start in range(0, x.shape[1], size):
        part = x[:, start : start + size]
        index = y[start : start + size].expand(len(x), 1, -1)
        logp = torch.baddbmm(bias, weight, part.transpose(1, 2)).log_softmax(1)
        value -= logp.gather(1, index).sum((1, 2), dtype=wide)
        residual = logp.exp_()
        residual.scatter_add_(1, index, residual.new_full((1, 1, 1), -1.0).expand(index.shape))
        grad_w.baddbmm_(residual, part)
        grad_b += residual.sum(2, keepdim=True)
    return value, torch.cat([grad_w, grad_b], -1)
