"""Logistic probes of a stream: kept features if they fit, and minibatches if not.

1. A pass over the labels counts tokens; `where_features_go` says where their features fit.
2. The first pass over the features takes the sums of `interp.probes.moments`, for all stages, and
   keeps the features if there is a place. Mean, spread, principal components, the start and the
   metric of the solver follow from the sums.
3. Kept: L-BFGS over the store (`interp.probes.solver`), as exact as in memory.
4. Not kept: minibatch steps over further passes (`interp.probes.minibatch`).

Several processes share out the parts of each pass, or of each step, and add up what they have in
float64. All of them hold the same weights at every step, and return the same probes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from interp.labels import IGNORE
from interp.probes.bank import UNSEEN, ProbeBank
from interp.probes.minibatch import STREAM_TOL, Group, Progress, descend
from interp.probes.moments import Frame, Moments
from interp.probes.ridge import sums
from interp.probes.solver import DEFAULT_C, DEFAULT_TOL, fit_stack, penalty
from interp.probes.source import Chunks, Source, Targets
from interp.probes.store import Disk, Memory, Store, bytes_needed, where_features_go
from interp.probes.stream import Tokens, TokenStream
from interp.probes.units import Fold, Sums
from interp.probes.weighting import ClassWeight, class_weights
from interp.world import World


def fit_logistic_stream(
    stream: TokenStream,
    *,
    C: float = DEFAULT_C,
    class_weight: ClassWeight = None,
    components: int | None = None,
    budget: int = 2**31,
    disk: int = 0,
    folder: Path | str | None = None,
    n_tokens: int | None = None,
    epochs: int = 4,
    parts_a_step: int = 1,
    max_iter: int = 500,
    tol: float = DEFAULT_TOL,
    seed: int = 0,
    world: World | None = None,
    progress: Progress | None = None,
) -> ProbeBank:
    """Fit a logistic probe at every stage of a stream.

    Args:
        stream: the tokens.
        C: scikit-learn's inverse penalty, of the losses of all tokens together.
        class_weight: as in `fit_ridge`.
        components: principal components that each probe may use.
        budget: bytes of memory, over all processes, for features as float32.
        disk: bytes of disk, over all processes, for features as bfloat16.
        folder: where on disk; a folder is made there and removed at the end.
        n_tokens: at most so many labelled tokens; None to count them in a pass over the labels.
        epochs: further passes, where features are not kept.
        parts_a_step: parts that make a step then; a few thousand tokens are a good step.
        max_iter, tol: of L-BFGS, where features are kept.
        seed: of the order of the parts.
        world: processes that share the work.
        progress: called with (pass, part) when a part is done; L-BFGS's passes are not told.

    Warns:
        ConvergenceWarning: names the stages whose gradient is larger than it should be.

    Raises:
        ValueError: numbers that are none, or fewer than two classes in the labels.
        OSError: the disk has less space free than the features take.
    """
    world = world or World()
    if not C > 0:
        raise ValueError(f"C must be positive, got {C}")
    if epochs < 1 or parts_a_step < 1:
        raise ValueError(f"epochs and parts_a_step are at least 1, got {epochs}, {parts_a_step}")
    weights = class_weights(stream, class_weight, world)
    soft = any(tokens.shares is not None for _, tokens in stream.labels([0]))
    n_soft = len(stream.classes) if soft else 0
    if n_tokens is None:
        n_tokens = _count(stream, world)
    place = where_features_go(n_tokens, stream.widths, budget, disk, n_soft)
    with ExitStack() as stack:
        store: Store | None = None
        if place == "memory":
            store = Memory()
        elif place == "disk":
            needed = bytes_needed(n_tokens, stream.widths, n_soft)["disk"] // world.size
            store = stack.enter_context(Disk(tuple(stream.widths), folder, needed))
        first = next(iter(stream.read([0])))[1]
        frame = Frame.of(first).shared(world)
        devices = {stage: x.device for stage, x in first.features.items()}
        del first
        keeping = Keeping(stream, store, weights, frame, n_tokens)
        told = None if progress is None else lambda part: progress(0, part)
        moments, _ = sums(keeping, weights, hold_out=False, world=world, frame=frame, progress=told)
        world.from_first_(*moments.tensors())
        seen = torch.nonzero(moments.y > 0).flatten()
        if len(seen) < 2:
            raise ValueError(
                "a probe needs tokens of at least two classes; the labels hold "
                f"{[stream.classes[i] for i in seen.tolist()]} in {int(moments.n[1])} tokens that "
                f"are not {IGNORE}"
            )
        kept = torch.tensor(float(keeping.store is not None))
        world.sum_(kept)
        groups = _groups(stream, moments, devices, seen, components)
        if int(kept) == world.size:
            assert keeping.store is not None
            for group in groups:
                source = keeping.store.source(group.stages, int(moments.n[1]), group.sums.x.device)
                found = fit_stack(
                    _Seen(source, seen), group.sums, fold=group.fold, C=C,
                    max_iter=max_iter, tol=tol, world=world,
                )  # fmt: skip
                group.weight, group.intercept = found.weight, found.intercept
                group.n_iter, group.gradient = found.n_iter, found.gradient
            passed = tol
        else:
            keeping.drop()  # another process may have had no room
            descend(
                keeping, groups, seen, penalty(C, len(seen)), epochs, parts_a_step, seed, world,
                progress,
            )  # fmt: skip
            passed = STREAM_TOL
    return _bank(stream, groups, seen, C, passed)


class Keeping:
    """A stream that also puts what is read into a store, in the units of a frame."""

    def __init__(
        self,
        stream: TokenStream,
        store: Store | None,
        weights: Tensor | None,
        frame: Frame,
        n_tokens: int,
    ) -> None:
        self.stream, self.store, self.weights, self.frame = stream, store, weights, frame
        self._left, self._bound = n_tokens, n_tokens

    @property
    def classes(self) -> tuple[str, ...]:
        """See `TokenStream`."""
        return self.stream.classes

    @property
    def widths(self) -> Mapping[str, int]:
        """See `TokenStream`."""
        return self.stream.widths

    @property
    def n_parts(self) -> int:
        """See `TokenStream`."""
        return self.stream.n_parts

    def labels(self, parts: Iterable[int]) -> Iterator[tuple[int, Tokens]]:
        """See `TokenStream`."""
        return self.stream.labels(parts)

    def read(self, parts: Iterable[int]) -> Iterator[tuple[int, Tokens]]:
        """See `TokenStream`."""
        for part, tokens in self.stream.read(parts):
            if self.store is not None:
                self._put(self.store, tokens)
            yield part, tokens

    def _put(self, store: Store, tokens: Tokens) -> None:
        self._left -= int((tokens.labels != IGNORE).sum())
        if self._left < 0:
            raise ValueError(
                f"there are more labelled tokens than n_tokens={self._bound}, by which their place "
                "was chosen; None would count them"
            )
        try:
            store.add(*self.in_units(tokens))
        except OSError as error:
            warnings.warn(
                f"features are not kept, more passes over the stream instead: {error}", stacklevel=2
            )
            self.drop()

    def drop(self) -> None:
        """Give up the store, if there is one, and its room on disk."""
        if isinstance(self.store, Disk):
            self.store.remove()
        self.store = None

    def in_units(self, tokens: Tokens) -> tuple[dict[str, Tensor], Targets]:
        """Labelled tokens as the solver wants them: float32, and weighted."""
        some = tokens.labelled()
        z = {}
        for stage, states in some.features.items():
            shift, unit = self.frame.shift[stage], self.frame.unit[stage]
            z[stage] = ((states.float() - shift.float()) / unit.float()).float()
        weights = None
        if self.weights is not None:
            weights = some.targets(len(self.weights), torch.float64) @ self.weights.to(
                some.labels.device
            )
        return z, Targets(some.labels, some.shares, weights)


@dataclass
class _Seen:
    """A source whose targets speak of the classes that occur, counted from 0."""

    inner: Source
    seen: Tensor

    @property
    def n_tokens(self) -> int:
        return self.inner.n_tokens

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    def chunks(self, stride: int = 1) -> Chunks:
        return ((z, targets.only(self.seen)) for z, targets in self.inner.chunks(stride))

    def keep(self, rows: Sequence[int]) -> None:
        self.inner.keep(rows)


def _count(stream: TokenStream, world: World) -> int:
    counted = torch.zeros((), dtype=torch.int64)
    for _, tokens in stream.labels(world.share(range(stream.n_parts))):
        counted += int((tokens.labels != IGNORE).sum())
    world.sum_(counted)
    return int(counted)


def _groups(
    stream: TokenStream,
    moments: Moments,
    devices: Mapping[str, torch.device],
    seen: Tensor,
    components: int | None,
) -> list[Group]:
    alike: dict[tuple[int, torch.device], list[str]] = {}
    for stage, width in stream.widths.items():
        alike.setdefault((width, devices[stage]), []).append(stage)
    made = []
    for (_, device), stages in alike.items():
        taken = Sums.of(moments, stages, seen, device)
        made.append(Group(tuple(stages), taken, Fold.of(taken, components)))
    return made


def _bank(
    stream: TokenStream, groups: list[Group], seen: Tensor, C: float, passed: float
) -> ProbeBank:
    weights, intercepts, n_iter, gradient = {}, {}, {}, {}
    for group in groups:
        assert group.weight is not None
        assert group.intercept is not None
        assert group.n_iter is not None
        assert group.gradient is not None
        for i, stage in enumerate(group.stages):
            weight = torch.zeros(len(stream.classes), group.weight.shape[2])
            weight[seen] = group.weight[i].float().cpu()
            intercept = torch.full((len(stream.classes),), UNSEEN)
            intercept[seen] = group.intercept[i].float().cpu()
            weights[stage], intercepts[stage] = weight, intercept
            n_iter[stage], gradient[stage] = int(group.n_iter[i]), float(group.gradient[i])
    order = tuple(stream.widths)
    late = [stage for stage in order if not gradient[stage] <= passed]
    if late:
        worst = max(gradient[stage] for stage in late)
        warnings.warn(
            f"{len(late)} of {len(order)} probes ended with a mean gradient of up to {worst:.1e}, "
            f"above {passed:.1e}: {', '.join(late)}. More epochs or max_iter would do, or more "
            "tokens a step",
            ConvergenceWarning,
            stacklevel=3,
        )
    there = set(seen.tolist())
    return ProbeBank(
        stages=order,
        classes=stream.classes,
        weights={stage: weights[stage] for stage in order},
        intercepts={stage: intercepts[stage] for stage in order},
        seen=tuple(i in there for i in range(len(stream.classes))),
        penalty=dict.fromkeys(order, 1.0 / C),
        n_iter={stage: n_iter[stage] for stage in order},
        converged={stage: stage not in late for stage in order},
    )
