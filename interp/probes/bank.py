"""A bank of probes: one linear probe a stage, fitted together and then frozen.

The claims of the paper are about a *curve*: how well a token's class can be read at the vision
layers, after the adapter, and layer by layer in the language model. A bank is the ruler for
that curve. It is fitted once, on training images, without any intervention; afterwards it
only reads. The same frozen bank then reads a model under a knockout or another mask, so that
a change in its verdicts comes from the states and not from a new fit. (Refitting under the
intervention answers another question: could *any* linear reader still see it?)

Every probe is stored in raw feature space, the standardisation folded in; what it reads with is
`interp.probes.readout`.

Stages differ in width. A wider stage gives its probe more freedom, so a curve across widths
wants its controls: the same penalty on standardised features, and held-out images.

Two kinds of missing label are kept apart. A token labelled `IGNORE` (255) is dropped before
fitting. A *class* that no token carries cannot be fitted: it gets weight 0 and the intercept
`UNSEEN`. The logits of the fitted classes sum to zero at every x, so the largest of them is
never below zero and an unseen class never wins. `bank.seen` tells which classes were fitted.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from interp.labels import IGNORE
from interp.probes.readout import Readout
from interp.probes.solver import DEFAULT_C, DEFAULT_TOL, fit_stack
from interp.probes.source import Stack
from interp.probes.stream import Held
from interp.probes.weighting import ClassWeight, class_weights

UNSEEN = -1e4  # finite, so that upsampled logits and margins stay numbers, also in bfloat16
_FORMAT = "interp.ProbeBank/2"
_OLDER = "interp.ProbeBank/1"  # one C for all stages


@dataclass(frozen=True, eq=False, repr=False)
class ProbeBank(Readout):
    """One linear probe a stage. Make one with `ProbeBank.fit` or `ProbeBank.load`.

    >>> states = {"adapter": torch.tensor([[0.0], [1.0], [4.0], [5.0]])}
    >>> bank = ProbeBank.fit(states, torch.tensor([0, 0, 1, 1]), ["sky", "sea"])
    >>> bank
    ProbeBank(1 stage: 'adapter'; 2 classes: 'sky', 'sea')
    >>> bank.predict("adapter", torch.tensor([[-3.0], [7.0]]))
    tensor([0, 1])
    """

    seen: tuple[bool, ...]
    n_iter: Mapping[str, int]
    converged: Mapping[str, bool]
    solver: str = "logistic"
    penalty: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        features: Mapping[str, Tensor],
        labels: Tensor,
        classes: Sequence[str],
        *,
        C: float = DEFAULT_C,
        class_weight: ClassWeight = None,
        shares: Tensor | None = None,
        max_iter: int = 500,
        tol: float = DEFAULT_TOL,
        stages_at_once: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> ProbeBank:
        """Fit a logistic probe a stage on `features` {stage: [n_tokens, d_stage]}.

        Ridge probes, and whatever does not fit the memory: `interp.probes.Fitting`.

        Args:
            features: the caller's tensors stay as they are. Stages of equal width are copied into
                one stack and fitted together; half-precision states are fitted in float32.
            labels: `[n_tokens]` integers, 0..len(classes)-1 or `IGNORE`, the same tokens for every
                stage.
            classes: their names.
            C: scikit-learn's inverse penalty.
            class_weight: class name -> weight of its tokens, or "balanced", or None.
            shares: `[n_tokens, n_classes]`, the share of each class in a token, where labels are
                soft; rows add up to 1 (those of ignored tokens may hold anything).
            max_iter, tol: where a stage stops.
            stages_at_once: bounds the stack where memory is short.
            progress: called with (stages done, stages in all).

        Warns:
            ConvergenceWarning: names the stages that stopped at `max_iter`.

        Raises:
            ValueError: shapes, labels or numbers that are no such thing.
        """
        classes = tuple(str(name) for name in classes)
        features = {name: torch.as_tensor(x) for name, x in features.items()}
        labels = torch.as_tensor(labels)
        keep, codes, fitted = _check(features, labels, classes, shares)
        soft = None if shares is None else shares[keep][:, fitted]
        of_class = class_weights(Held(features, labels.long(), classes, shares), class_weight)
        weights_of = None
        if of_class is not None:
            of_class = of_class[fitted].to(codes.device)
            weights_of = of_class[codes] if soft is None else soft.to(of_class) @ of_class
        weights: dict[str, Tensor] = {}
        intercepts: dict[str, Tensor] = {}
        n_iter: dict[str, int] = {}
        converged: dict[str, bool] = {}
        done = 0

        for names in _groups(features, stages_at_once):
            first = features[names[0]]
            rows = None if len(keep) == len(first) else keep
            source, sums = Stack.of(
                [features[name] for name in names],
                None if soft is not None else codes,
                len(fitted),
                shares=soft,
                weights=weights_of,
                rows=rows,
                names=names,
            )

            def report(n: int, before: int = done) -> None:
                if progress is not None:
                    progress(before + n, len(features))

            found = fit_stack(source, sums, C=C, max_iter=max_iter, tol=tol, progress=report)
            del source, sums  # the next stack must not meet this one in memory
            done += len(names)
            for i, name in enumerate(names):
                index = fitted.to(found.weight.device)
                weight = found.weight.new_zeros(len(classes), found.weight.shape[-1])
                weight[index] = found.weight[i]
                intercept = found.intercept.new_full((len(classes),), UNSEEN)
                intercept[index] = found.intercept[i]
                weights[name], intercepts[name] = weight.float(), intercept.float()
                n_iter[name], converged[name] = int(found.n_iter[i]), bool(found.converged[i])

        late = [name for name in features if not converged[name]]
        if late:
            warnings.warn(
                f"{len(late)} of {len(features)} probes stopped at max_iter={max_iter} before "
                f"their gradient fell below tol={tol:.1e}: {', '.join(late)}",
                ConvergenceWarning,
                stacklevel=2,
            )
        present = set(fitted.tolist())
        return cls(
            stages=tuple(features),
            classes=classes,
            weights={name: weights[name] for name in features},
            intercepts={name: intercepts[name] for name in features},
            seen=tuple(i in present for i in range(len(classes))),
            penalty=dict.fromkeys(features, 1.0 / C),
            n_iter={name: n_iter[name] for name in features},
            converged={name: converged[name] for name in features},
        )

    def readout(self, stages: Sequence[str] | None = None) -> Readout:
        """What reads, of some stages or of all: what is sent to a server."""
        all_ = Readout(self.stages, self.classes, self.weights, self.intercepts)
        return all_ if stages is None else all_.only(stages)

    def only(self, stages: Sequence[str]) -> ProbeBank:
        """The probes of some stages."""
        few = self.readout().only(stages)
        return replace(
            self,
            stages=few.stages,
            weights=few.weights,
            intercepts=few.intercepts,
            n_iter={stage: self.n_iter[stage] for stage in stages},
            converged={stage: self.converged[stage] for stage in stages},
            penalty={s: self.penalty[s] for s in stages if s in self.penalty},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank as safetensors (float32, everything else as JSON in its metadata).

        It is written beside `path` and renamed, so `path` never holds half a file. Equal banks
        give equal bytes.
        """
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        for i, name in enumerate(self.stages):
            tensors[f"{i:04d}.weight"] = self.weights[name].cpu().contiguous()
            tensors[f"{i:04d}.intercept"] = self.intercepts[name].cpu().contiguous()
        about = {
            "format": _FORMAT,
            "stages": self.stages,
            "classes": self.classes,
            "seen": self.seen,
            "solver": self.solver,
            "penalty": [self.penalty.get(name) for name in self.stages],
            "n_iter": [self.n_iter[name] for name in self.stages],
            "converged": [self.converged[name] for name in self.stages],
        }
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            # One metadata key: safetensors writes several of them in an order of its own.
            save_file(tensors, part, metadata={"interp": json.dumps(about)})
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ProbeBank:
        """Read a bank that `save` wrote, onto the CPU. `ValueError` if the file is another kind."""
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("interp", "{}"))
            if about.get("format") not in (_FORMAT, _OLDER):
                raise ValueError(f"{os.fspath(path)} is not a file that ProbeBank.save wrote")
            stages = tuple(about["stages"])
            penalty = about.get("penalty") or [1.0 / about["C"]] * len(stages)
            weights = {n: file.get_tensor(f"{i:04d}.weight") for i, n in enumerate(stages)}
            intercepts = {n: file.get_tensor(f"{i:04d}.intercept") for i, n in enumerate(stages)}
        return cls(
            stages=stages,
            classes=tuple(about["classes"]),
            weights=weights,
            intercepts=intercepts,
            seen=tuple(about["seen"]),
            solver=about.get("solver", "logistic"),
            penalty={name: value for name, value in zip(stages, penalty, strict=True) if value},
            n_iter=dict(zip(stages, about["n_iter"], strict=True)),
            converged=dict(zip(stages, about["converged"], strict=True)),
        )

    def __repr__(self) -> str:
        stages, classes = _listed(self.stages, "stage"), _listed(self.classes, "class")
        return f"ProbeBank({stages}; {classes})"


def _listed(names: Sequence[str], noun: str) -> str:
    plural = noun if len(names) == 1 else noun + ("es" if noun.endswith("s") else "s")
    few = names if len(names) <= 6 else (*names[:3], ..., *names[-2:])
    shown = ", ".join("..." if name is ... else repr(name) for name in few)
    return f"{len(names)} {plural}: {shown}"


def _check(
    features: Mapping[str, Tensor],
    labels: Tensor,
    classes: Sequence[str],
    shares: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to keep [n], their labels among the fitted classes [n], and those classes' ids.

    With shares a class is fitted that any token has a share of, and the labels mean nothing.
    """
    if not features:
        raise ValueError("no stage to fit: features is empty")
    if len(classes) > IGNORE:
        raise ValueError(f"{len(classes)} classes would make {IGNORE}, the ignored label, a class")
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be integers [n_tokens], got {list(labels.shape)} {labels.dtype}"
        )
    for name, x in features.items():
        if x.ndim != 2 or len(x) != len(labels) or not x.is_floating_point():
            raise ValueError(
                f"stage {name!r} must be floats [{len(labels)}, width], one row a label; "
                f"got {list(x.shape)} {x.dtype}"
            )
    labels = labels.long()
    keep = torch.nonzero(labels != IGNORE).flatten()
    fitted, codes = torch.unique(labels[keep], return_inverse=True)
    if len(fitted) and (fitted[0] < 0 or fitted[-1] >= len(classes)):
        raise ValueError(
            f"labels must be 0..{len(classes) - 1} or {IGNORE}, got {fitted.tolist()[:20]}"
        )
    if shares is not None:
        if shares.shape != (len(labels), len(classes)):
            raise ValueError(
                f"shares must be [{len(labels)}, {len(classes)}], got {list(shares.shape)}"
            )
        fitted = torch.nonzero(shares[keep].sum(0) > 0).flatten()
    if len(fitted) < 2:
        raise ValueError(
            f"a probe needs tokens of at least two classes, got {[classes[i] for i in fitted]} "
            f"in {len(labels)} labels of which {len(keep)} are not {IGNORE}"
        )
    return keep, codes, fitted


def _groups(features: Mapping[str, Tensor], at_once: int | None) -> list[list[str]]:
    """Stages that go into one stack: equal width, device and solver dtype."""
    groups: dict[tuple[int, torch.device, torch.dtype], list[str]] = {}
    for name, x in features.items():
        groups.setdefault((x.shape[1], x.device, _solver_dtype(x)), []).append(name)
    return [
        names[i : i + (at_once or len(names))]
        for names in groups.values()
        for i in range(0, len(names), at_once or len(names))
    ]


def _solver_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
