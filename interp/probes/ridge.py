"""Ridge probes: one pass over the tokens, and an exact answer.

The probe of a stage is the least-squares map from standardised states to one-hot (or soft) class
targets, with an unpenalised intercept; the largest output names the class. That is scikit-learn's
`RidgeClassifier` on standardised features (whose targets are -1 and 1 instead of 0 and 1: the same
classes). It needs only the sums of `interp.probes.moments`:

    W = (n R + alpha I)^-1 n c        R: correlations of features, c: their covariances with targets

The penalty is chosen a stage, by the squared error on held-out shards, which the same sums give;
then the probe is solved again on all shards. Squared error is not accuracy, but it is what the
sums can tell without a second pass, and it is monotone enough to choose a power of ten by.

Stages differ in width, and a wider stage gives its probe more to fit with. `components` brings all
stages to one capacity: the first so many principal components of the standardised features, also
from the sums. The weights are folded back, so a probe reads plain states in any case.

The control with shuffled labels is a second block of targets in the same pass: each token gets the
label of a token drawn from the whole set, so that class frequencies stay and everything else goes.
(Shuffling among the tokens of a batch would not do: a batch's pictures have frequencies of their
own, which its states tell.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from interp.labels import IGNORE
from interp.probes.bank import UNSEEN, ProbeBank
from interp.probes.moments import Frame, Moments, Pile
from interp.probes.stream import Tokens, TokenStream, draw_labels, label_counts
from interp.probes.weighting import ClassWeight, class_weights
from interp.world import World

#: penalties that are tried, as shares of the number of tokens
ALPHAS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
N_SHARDS = 20
HELD_EVERY = 5  # of so many shards, the last one chooses the penalty

Progress = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """Ridge probes of all stages.

    Attributes:
        bank: the probes.
        shuffled: probes of the shuffled labels, or None.
        errors: stage -> alpha (share of the tokens) -> mean squared error of the held-out tokens,
            divided by the variance of their targets: 1 is no better than knowing the frequencies.
        moments: the sums over all tokens (in the first process).
    """

    bank: ProbeBank
    shuffled: ProbeBank | None
    errors: Mapping[str, Mapping[float, float]]
    moments: Moments


def fit_ridge(
    stream: TokenStream,
    *,
    alphas: Sequence[float] = ALPHAS,
    class_weight: ClassWeight = None,
    components: int | None = None,
    shuffled: bool = False,
    seed: int = 0,
    precise: bool = False,
    world: World | None = None,
    progress: Progress | None = None,
) -> RidgeFit:
    """Fit a ridge probe at every stage of a stream, in one pass.

    Args:
        stream: the tokens.
        alphas: penalties to choose from, as shares of the (weighted) number of tokens; one alone
            is taken as it is.
        class_weight: class name -> weight of its tokens, or "balanced" (one over the class's
            frequency, from a pass over the labels alone), or None.
        components: principal components that each probe may use.
        shuffled: also fit the control.
        seed: of the shuffling.
        precise: products in float64 instead of float32.
        world: processes that share the work; the result is the first one's, in all of them.
        progress: called with the number of a part that is done.

    Raises:
        ValueError: too few parts to hold any out, labels of fewer than two classes, alphas that
            are not positive, nan or infinite features.
    """
    world = world or World()
    if not alphas or min(alphas) <= 0:
        raise ValueError(f"alphas={tuple(alphas)}: positive numbers would do")
    if components is not None and components < 1:
        raise ValueError(f"components={components}: at least 1 would do")
    weights = class_weights(stream, class_weight, world)
    fit, held = sums(
        stream, weights, shuffled=shuffled, seed=seed, precise=precise, world=world,
        hold_out=len(alphas) > 1, progress=progress,
    )  # fmt: skip
    k = len(stream.classes)
    errors: dict[str, dict[float, float]] = {}
    weight, intercept = {}, {}
    chosen = torch.full((len(stream.widths),), float(alphas[0]), dtype=torch.float64)
    if world.first and held is not None and not (fit.n[0] > 0 and held.n[0] > 0):
        raise ValueError(
            f"{int(fit.n[1])} labelled tokens to fit on and {int(held.n[1])} to choose a penalty "
            "by: more pictures, or a single alpha, would do"
        )
    all_ = fit if held is None else fit + held
    world.from_first_(all_.n, all_.y)
    _require_classes(all_, stream.classes)
    for i, (stage, width) in enumerate(stream.widths.items()):
        blank = all_.xy[stage].new_zeros
        w, b = blank(all_.xy[stage].shape[1], width), blank(all_.xy[stage].shape[1])
        if world.first:
            if held is not None:
                tried = Stage.of(fit, stage, components)
                errors[stage] = {a: tried.error(tried.solve(a), held, k) for a in alphas}
                chosen[i] = min(errors[stage], key=lambda a: errors[stage][a])
            final = Stage.of(all_, stage, components)
            chosen[i], solved = final.solved(float(chosen[i]))
            w, b = final.raw(solved)
        world.from_first_(w, b)
        weight[stage], intercept[stage] = w, b
    world.from_first_(chosen)
    picked = dict(zip(stream.widths, (chosen * float(all_.n[0])).tolist(), strict=True))
    blocks = [
        _bank(stream, picked, weight, intercept, all_.y, slice(at, at + k))
        for at in range(0, k * (1 + shuffled), k)
    ]
    return RidgeFit(blocks[0], blocks[1] if shuffled else None, errors, all_)


def sums(
    stream: TokenStream,
    weights: Tensor | None = None,
    *,
    shuffled: bool = False,
    seed: int = 0,
    precise: bool = False,
    world: World | None = None,
    hold_out: bool = True,
    frame: Frame | None = None,
    progress: Progress | None = None,
) -> tuple[Moments, Moments | None]:
    """One pass: the sums of the shards that fit, and those of the shards that choose.

    They are taken in `frame`; None takes that of the stream's first part. In processes other than
    the first, what comes back has the right shapes and no meaning.
    """
    world = world or World()
    if len(stream.classes) > IGNORE:
        raise ValueError(
            f"{len(stream.classes)} classes would make {IGNORE}, the ignored label, a class"
        )
    n_shards = min(N_SHARDS, stream.n_parts)
    if n_shards < 1 + hold_out:
        raise ValueError(
            f"a stream of {stream.n_parts} parts: choosing a penalty needs 2, one to fit on and "
            "one to choose on; smaller batches, or a single alpha, would do"
        )
    every = min(HELD_EVERY, n_shards)
    is_held = [hold_out and s % every == every - 1 for s in range(n_shards)]
    place = [sum(h == is_held[s] for h in is_held[:s]) for s in range(n_shards)]
    piles = {held: Pile(max(1, is_held.count(held))) for held in (False, True)}
    first: dict[int, Tokens] = {}
    if frame is None:
        first = dict(stream.read([0]))
        frame = Frame.of(first[0]).shared(world)
        if not world.first:
            first.clear()  # the first process adds it up
    others = label_counts(stream, world) if shuffled else None
    like: Moments | None = None
    # each kind of shard is shared out by itself, so that every process holds whole nodes
    for held, pile in piles.items():
        for number in world.share([s for s in range(n_shards) if is_held[s] == held]):
            shard = None
            for part, tokens in _read(stream, _parts(stream, number, n_shards), first):
                some = tokens.labelled()
                targets = some.targets(len(stream.classes), torch.float64)
                of_token = None if weights is None else targets @ weights.to(targets)
                if others is not None:
                    drawn = draw_labels(others, len(some), seed, part)
                    targets = torch.cat([targets, one_hot(drawn, len(others)).to(targets)], 1)
                made = Moments.of(some, targets, frame, weights=of_token, precise=precise)
                shard = made if shard is None else shard.add_(made)
                if progress:
                    progress(part)
            assert shard is not None  # no shard is without parts
            # a device holds the shard that is worked on; those that are done wait in main memory
            like = shard.cpu()
            pile.add(place[number], like)
    like = _blank(stream, frame.cpu(), shuffled) if like is None else like
    for held in (False, True) if hold_out else (False,):
        piles[held].gather(world, like)
    if not world.first:
        return like, like if hold_out else None
    return piles[False].total(), piles[True].total() if hold_out else None


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage's normal equations, standardised, perhaps on principal components.

    Attributes:
        moments, stage: where it is from.
        mean, std: `[d]`, of z (see `interp.probes.moments`); std is 1 where nothing varies.
        axes: `[d, k]` from standardised features to what is solved for.
        gram: `[k, k]` their sums of squares.
        cross: `[k, T]` their sums with the centred targets.
    """

    moments: Moments
    stage: str
    mean: Tensor
    std: Tensor
    axes: Tensor | None
    gram: Tensor
    cross: Tensor

    @classmethod
    def of(cls, moments: Moments, stage: str, components: int | None = None) -> Stage:
        """Standardise one stage of some sums, and rotate it if `components` are fewer."""
        n, x = moments.n[0], moments.x[stage]
        mean = x / n
        gram = moments.xx[stage] - torch.outer(x, mean)
        cross = moments.xy[stage] - torch.outer(mean, moments.y)
        spread = (gram.diagonal() / n).clamp_min(0).sqrt()
        # z has a spread near one unless a feature varies outside the part the frame is from
        varies = spread > 1e-6 * (1 + mean.abs())
        std = torch.where(varies, spread, 1.0)
        scale = varies / std
        gram = gram * scale[:, None] * scale
        cross = cross * scale[:, None]
        axes = None
        if components is not None and components < len(mean):
            axes = torch.linalg.eigh(gram).eigenvectors[:, -components:]
            gram, cross = axes.T @ gram @ axes, axes.T @ cross
        return cls(moments, stage, mean, std, axes, gram, cross)

    def solve(self, alpha: float) -> Tensor | None:
        """Weights `[d, T]` on z; `alpha` is a share of the number of tokens.

        None if the equations are not positive: features that depend on one another have eigenvalues
        of zero, which rounded products may put below it, further than a weak penalty lifts.
        """
        ridge = self.gram.clone()
        ridge.diagonal().add_(alpha * self.moments.n[0])
        factor, info = torch.linalg.cholesky_ex(ridge)
        if int(info):
            return None
        found = torch.cholesky_solve(self.cross, factor)
        if self.axes is not None:
            found = self.axes @ found
        return found / self.std[:, None]

    def solved(self, alpha: float) -> tuple[float, Tensor]:
        """The same with the penalty that it took: `alpha`, or the first tenfold that does.

        Raises:
            ValueError: none does, up to the features' own variance.
        """
        while alpha <= 100:
            found = self.solve(alpha)
            if found is not None:
                return alpha, found
            alpha *= 10
        raise ValueError(f"the sums at {self.stage!r} are no sums of squares")

    def error(self, weight: Tensor | None, held: Moments, n_targets: int) -> float:
        """Mean squared error of the first targets on other sums, over their variance; infinite
        where there are no weights."""
        if weight is None:
            return float("inf")
        w = weight[:, :n_targets]
        b = self._intercept(weight)[:n_targets]
        n, y, yy = held.n[0], held.y[:n_targets], held.yy[:n_targets]
        x, xx, xy = held.x[self.stage], held.xx[self.stage], held.xy[self.stage][:, :n_targets]
        left = yy.sum() - 2 * (w * xy).sum() - 2 * (b * y).sum() + (w * (xx @ w)).sum()
        left = left + 2 * (b * (x @ w)).sum() + n * b.square().sum()
        return float(left / (yy.sum() - y.square().sum() / n).clamp_min(1e-12))

    def raw(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The same on plain states: weights `[T, d]` and intercepts `[T]`."""
        frame = self.moments.frame
        plain = (weight / frame.unit[self.stage][:, None]).T.contiguous()
        return plain, self._intercept(weight) - plain @ frame.shift[self.stage]

    def _intercept(self, weight: Tensor) -> Tensor:
        return self.moments.y / self.moments.n[0] - self.mean @ weight


def _bank(
    stream: TokenStream,
    penalty: Mapping[str, float],
    weight: Mapping[str, Tensor],
    intercept: Mapping[str, Tensor],
    y: Tensor,
    block: slice,
) -> ProbeBank:
    """The probes of one block of targets; scores add up to zero over the classes seen."""
    seen = y[block] > 0
    weights, intercepts = {}, {}
    for stage in stream.widths:
        w, b = weight[stage][block], intercept[stage][block]
        w = torch.where(seen[:, None], w - w[seen].mean(0), 0.0)
        b = torch.where(seen, b - b[seen].mean(), UNSEEN)
        weights[stage], intercepts[stage] = w.float(), b.float()
    return ProbeBank(
        stages=tuple(stream.widths),
        classes=stream.classes,
        weights=weights,
        intercepts=intercepts,
        seen=tuple(seen.tolist()),
        solver="ridge",
        penalty=dict(penalty),
        n_iter=dict.fromkeys(stream.widths, 1),
        converged=dict.fromkeys(stream.widths, True),
    )


def _require_classes(moments: Moments, classes: Sequence[str]) -> None:
    there = [name for name, n in zip(classes, moments.y.tolist(), strict=False) if n > 0]
    if len(there) < 2:
        raise ValueError(
            f"a probe needs tokens of at least two classes; the labels hold {there} "
            f"in {int(moments.n[1])} tokens that are not {IGNORE}"
        )


def _read(
    stream: TokenStream, parts: range, first: dict[int, Tokens]
) -> Iterator[tuple[int, Tokens]]:
    """The parts, of which those in `first` are taken out of it instead of being read again."""
    known = [part for part in parts if part in first]
    for part in known:
        yield part, first.pop(part)
    yield from stream.read([part for part in parts if part not in known])


def _parts(stream: TokenStream, shard: int, n_shards: int) -> range:
    return range(shard * stream.n_parts // n_shards, (shard + 1) * stream.n_parts // n_shards)


def _blank(stream: TokenStream, frame: Frame, shuffled: bool) -> Moments:
    """Zeros of the right shapes, for a process that has no shard."""
    t = len(stream.classes) * (1 + shuffled)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64)

    return Moments(
        frame, zeros(2), zeros(t), zeros(t),
        {s: zeros(d) for s, d in stream.widths.items()},
        {s: zeros(d, d) for s, d in stream.widths.items()},
        {s: zeros(d, t) for s, d in stream.widths.items()},
    )  # fmt: skip
