"""How probes are fitted: two solvers behind one word, and what they may use.

    bank = Fitting("ridge").fit(stream)
    bank = Fitting("logistic", C=0.1, memory=8e9).fit(stream)

| solver | passes over the pictures | what it minimises |
|---|---|---|
| `ridge` | one | squared error of one-hot targets; exact, from sums |
| `logistic` | one if the features fit `memory` or `disk`, else 1 + `epochs` | cross-entropy |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from interp.probes.bank import ProbeBank
from interp.probes.ridge import ALPHAS, fit_ridge
from interp.probes.solver import DEFAULT_C
from interp.probes.store import Place, where_features_go
from interp.probes.stream import Shuffled, TokenStream, label_counts
from interp.probes.streamed import fit_logistic_stream
from interp.world import World

SOLVERS = ("logistic", "ridge")


@dataclass(frozen=True, eq=False)
class Fitted:
    """Probes, and what was learned on the way.

    Attributes:
        bank: the probes.
        shuffled: probes fitted on shuffled labels, or None.
        counts: `[K]` tokens of each class (shares added up, where labels are soft).
        errors: see `interp.probes.ridge.RidgeFit`; empty for `logistic`.
    """

    bank: ProbeBank
    shuffled: ProbeBank | None
    counts: np.ndarray
    errors: Mapping[str, Mapping[float, float]]


@dataclass(frozen=True)
class Fitting:
    """What decides a fit, besides the tokens.

    Attributes:
        solver: one of `SOLVERS`.
        C: inverse penalty of `logistic`, as scikit-learn has it.
        alphas: penalties that `ridge` chooses from, as shares of the number of tokens.
        class_weight: "balanced", weights by class name, or None.
        components: principal components that each probe may use, so that stages of different
            widths have one capacity; None for all features.
        memory: GB in which `logistic` may keep features.
        disk: GB on disk in which it may, as bfloat16, if they do not fit the memory.
        folder: where on disk; the system's place for temporary files if None.
        epochs: passes of `logistic` over features that are not kept.
        parts_a_step: batches that go into one of its steps then.
    """

    solver: str = "logistic"
    C: float = DEFAULT_C
    alphas: Sequence[float] = ALPHAS
    class_weight: Mapping[str, float] | str | None = None
    components: int | None = None
    memory: float = 4.0
    disk: float = 0.0
    folder: str | None = None
    epochs: int = 4
    parts_a_step: int = 8

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r}; there are {' and '.join(SOLVERS)}")
        least = {"C": 0.0, "memory": -1e-12, "disk": -1e-12, "epochs": 0.0, "parts_a_step": 0.0}
        if self.components is not None:
            least["components"] = 0.0
        for name, low in least.items():
            if not getattr(self, name) > low:
                kind = "a positive number" if low == 0 else "no negative number"
                raise ValueError(f"{name}={getattr(self, name)}: {kind} would do")
        if not self.alphas or min(self.alphas) <= 0:
            raise ValueError(f"alphas={tuple(self.alphas)}: positive numbers would do")
        if isinstance(self.class_weight, str) and self.class_weight != "balanced":
            raise ValueError(
                f'class_weight={self.class_weight!r}; "balanced", weights by class name or None '
                "would do"
            )

    def check(self, n_parts: int) -> None:
        """Raise for a stream of too few parts, before anything is run.

        Raises:
            ValueError: `ridge` has none to choose its penalty by.
        """
        if self.solver == "ridge" and len(self.alphas) > 1 and n_parts < 2:
            raise ValueError(
                f"{n_parts} batch of pictures to fit on: choosing a penalty needs 2, one to fit on "
                "and one to choose by; smaller batches, or a single alpha, would do"
            )

    def where(self, n_tokens: int, widths: Mapping[str, int], n_soft: int = 0) -> Place:
        """Where features of so many tokens are kept between passes: "stream" for nowhere."""
        if self.solver == "ridge":
            return "stream"
        return where_features_go(
            n_tokens, widths, int(1e9 * self.memory), int(1e9 * self.disk), n_soft
        )

    def passes(self, n_tokens: int, widths: Mapping[str, int], n_soft: int = 0) -> int:
        """How often the model is run over all pictures, without the controls."""
        if self.solver == "ridge" or self.where(n_tokens, widths, n_soft) != "stream":
            return 1
        return 1 + self.epochs

    def fit(
        self,
        stream: TokenStream,
        *,
        shuffled: bool = False,
        seed: int = 0,
        world: World | None = None,
    ) -> Fitted:
        """Fit a probe at every stage of a stream.

        Args:
            stream: the tokens.
            shuffled: fit the control with shuffled labels, too; for `logistic` a fit of its own.
            seed: of every random draw.
            world: processes that share the work; all of them get the same probes.

        Raises:
            ValueError: options or tokens that cannot be; see `fit_ridge`, `fit_logistic_stream`.
        """
        if self.solver == "ridge":
            fit = fit_ridge(
                stream,
                alphas=self.alphas,
                class_weight=self.class_weight,
                components=self.components,
                shuffled=shuffled,
                seed=seed,
                world=world,
            )
            counts = fit.moments.y[: len(stream.classes)]
            if self.class_weight is not None:  # those are weighted
                counts = label_counts(stream, world)
            return Fitted(fit.bank, fit.shuffled, counts.cpu().numpy(), fit.errors)
        counted = label_counts(stream, world)
        banks = [
            fit_logistic_stream(
                one,
                C=self.C,
                class_weight=self.class_weight,
                components=self.components,
                budget=int(1e9 * self.memory),
                disk=int(1e9 * self.disk),
                folder=self.folder,
                n_tokens=round(float(counted.sum())),
                epochs=self.epochs,
                parts_a_step=self.parts_a_step,
                seed=seed,
                world=world,
            )
            for one in ([stream, Shuffled(stream, counted, seed)] if shuffled else [stream])
        ]
        return Fitted(banks[0], banks[1] if shuffled else None, counted.numpy(), {})
