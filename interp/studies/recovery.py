"""Claim 1 and 2: segmentation drops at the adapter and recovers over the language model.

One linear probe a stage, fitted on held-apart images, reads every image token's class: at the
vision embedding, after every vision layer, before and after the adapter, after every block of the
language model. The curve of test accuracy over these stages shows where the information is lost
and where it comes back.

Three controls. A random projection of the adapter's input to the width of its output, with a probe
of its own, tells how much of the drop is a matter of width. A language model whose weights are
shuffled (each matrix keeps its values, in random places) gets the same inputs and fresh probes of
its own: if its curve rose too, the rise would be a property of adding layers, not of what was
learned. And lines for the floor (always saying the most frequent class) and the ceiling (perfect
labels for every token, scored on pixels).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from interp.errors import Untestable
from interp.model import MLLM
from interp.probes import ProbeBank
from interp.probes.fitting import Fitting
from interp.probes.scores import CEILING, FLOOR, Scores
from interp.probes.scoring import bank_rows
from interp.studies.controls import random_projection, shuffled_llm
from interp.studies.result import Finding, Result, difference, points
from interp.studies.split import EditsOf, Progress, Split
from interp.studies.stages import kind_of, label

SQUEEZED = "adapter.hook_in, projected"
#: the stage at which tokens are called right or wrong
REFERENCE = "adapter.hook_out"
#: what the curve shows of (unit, metric), by the name that the figures know
MEASURES = {
    ("token", "accuracy"): "accuracy",
    ("token", "mean_accuracy"): "mean_accuracy",
    ("token", "miou"): "token_miou",
    ("pixel", "miou"): "pixel_miou",
}


@dataclass(frozen=True, eq=False)
class Baseline:
    """The un-intervened model as the other studies need it.

    Attributes:
        probe, test: images the probes were fitted on, and images everything is reported on.
        bank: the frozen probes of all stages.
        fitting: how they were fitted, for those that fit their own.
        predicted: `{stage: [n_images, n_tokens]}` the probes' classes on the test images.
        predicted_probe: the same on the probe images, at the reference stage only.
        reference: the stage at which tokens are called right or wrong.
        readout: the stage at which recovery is read.
    """

    probe: Split
    test: Split
    bank: ProbeBank
    fitting: Fitting
    predicted: dict[str, np.ndarray]
    predicted_probe: np.ndarray
    reference: str
    readout: str

    @classmethod
    def fit(cls, probe: Split, test: Split, fitting: Fitting | None = None) -> Baseline:
        """Probes behind the adapter and at the end, and what they read: all that short scripts
        need, and little for a hosted model to send back."""
        reference, readout = REFERENCE, probe.model.stages[-1]
        fitting = fitting or Fitting()
        bank = probe.fit([reference, readout], fitting=fitting)
        return cls(
            probe=probe,
            test=test,
            bank=bank,
            fitting=fitting,
            predicted=test.judge(bank),
            predicted_probe=probe.judge(bank.only([reference]))[reference],
            reference=reference,
            readout=readout,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.test.classes

    def right(self, stage: str) -> np.ndarray:
        """`[n_images, n_tokens]` bool: labelled tokens that the probe at `stage` gets right."""
        return self.hits(self.predicted[stage])

    def wrong(self, stage: str) -> np.ndarray:
        """`[n_images, n_tokens]` bool: labelled tokens that it gets wrong."""
        return np.asarray((self.predicted[stage] != self.test.labels) & self.test.labelled)

    def reread(
        self,
        edits: EditsOf,
        stages: Sequence[str] | None = None,
        on_batch: Progress | None = None,
    ) -> dict[str, np.ndarray]:
        """Classes that the frozen probes read under edits, `{stage: [n_images, n_tokens]}`.

        Batches without an edit are not run again: their classes are known.

        Args:
            edits: number of a batch -> its edits.
            stages: where to read; the readout if None.
            on_batch: called with the number of images done.
        """
        stages = [self.readout] if stages is None else stages
        said = {stage: self.predicted[stage].copy() for stage in stages}
        for number, (x, at) in enumerate(self.test.slices()):
            changes = edits(number)
            if changes:
                run = self.test.model.run(
                    x, *changes, read=stages, keep=self.bank, logits=False, mass=False
                )
                for stage in stages:
                    said[stage][at] = run[stage].cpu().numpy()
            if on_batch:
                on_batch(len(x))
        return said

    def hits(self, said: np.ndarray) -> np.ndarray:
        """`[n_images, n_tokens]` bool: labelled test tokens whose class was read rightly."""
        return np.asarray((said == self.test.labels) & self.test.labelled)


def recovery(
    probe: Split,
    test: Split,
    *,
    fitting: Fitting | None = None,
    seed: int = 0,
    on_batch: Progress | None = None,
) -> tuple[Baseline, list[Result]]:
    """Fit the probes, draw the curve, judge drop-off and recovery.

    Returns:
        The baseline for the other studies, and two results ("drop_off", "recovery"); the tables
        `stages`, `groups` and `references` are in the first.

    Raises:
        NotHere: a hosted model, whose weights cannot be shuffled; `Baseline.fit` needs none.
    """
    model = probe.model
    model.require_weights("the control with shuffled weights")
    fitting = fitting or Fitting()
    width = probe.stream(["adapter.hook_in"]).widths["adapter.hook_in"]
    squeeze = random_projection(width, model.cfg.d_model, seed)
    made = {} if squeeze is None else {SQUEEZED: ("adapter.hook_in", squeeze)}
    stages = model.stages
    fitted = fitting.fit(probe.stream(stages, on_batch=on_batch, projections=made), seed=seed).bank
    scores = Scores(
        stages, test.classes, pixels=True, majority=_most_frequent(probe), seed=seed,
        shape=test.shape,
    )  # fmt: skip
    said = test.said(bank_rows(fitted), scores=[scores], on_batch=on_batch, projections=made)
    squeezed = said.pop(SQUEEZED, None)
    bank = fitted.only(stages)
    baseline = Baseline(
        probe=probe,
        test=test,
        bank=bank,
        fitting=fitting,
        predicted=said,
        predicted_probe=probe.judge(bank.only([REFERENCE]))[REFERENCE],
        reference=REFERENCE,
        readout=stages[-1],
    )
    kinds = {stage: kind_of(stage) for stage in stages}
    curves = [_curve(scores.table(), model, kinds)]
    shuffled_right = None
    try:
        control, control_said = _shuffled_llm(probe, test, fitting, seed, on_batch)
    except Untestable:
        pass  # said in the finding
    else:
        shuffled_right = baseline.hits(control_said)
        curves.append(_curve(control, model, dict.fromkeys(_blocks(model), "random_llm")))
    tables = {
        "stages": pd.concat(curves, ignore_index=True),
        "groups": _groups(scores.table(), stages),
        "references": _references(scores),
    }
    squeezed_right = None if squeezed is None else baseline.hits(squeezed)
    return baseline, _findings(baseline, shuffled_right, squeezed_right, tables, seed)


def _findings(
    base: Baseline,
    shuffled_right: np.ndarray | None,
    squeezed_right: np.ndarray | None,
    tables: dict[str, pd.DataFrame],
    seed: int,
) -> list[Result]:
    test = base.test

    def counts(right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return test.counts(right, test.labelled)

    before, after, end = (
        counts(base.right(stage)) for stage in ("adapter.hook_in", base.reference, base.readout)
    )
    drop = difference(after, before, seed)
    rise = difference(end, after, seed)
    control = beyond = None
    if shuffled_right is not None:
        control = difference(counts(shuffled_right), after, seed)
        beyond = difference(end, counts(shuffled_right), seed)
    width = None if squeezed_right is None else difference(counts(squeezed_right), before, seed)
    figures = {}
    drop_holds = drop.high < 0
    if squeezed_right is not None:
        figures["drop_beyond_width"] = difference(after, counts(squeezed_right), seed)
        drop_holds = drop_holds and figures["drop_beyond_width"].high < 0
    rise_holds = rise.low > 0 and beyond is not None and beyond.low > 0
    drop_text = (
        f"Token accuracy changes by {points(drop)} points at the adapter"
        + ("" if width is None else f"; a random projection to its width costs {points(width)}")
        + ("." if drop_holds else ". So no drop is told from none here.")
    )
    rise_text = f"Over the language model it changes by {points(rise)} points; " + (
        "its control is missing: weights that are quantised, or not in memory, cannot be shuffled."
        if control is None
        else f"with the language model's weights shuffled, by {points(control)}."
    )
    return [
        Result(
            Finding(
                "Drop-off at the adapter",
                drop,
                width,
                "random projection to the same width",
                drop_holds,
                drop_text,
            ),
            tables,
            figures,
        ),
        Result(
            Finding(
                "Recovery in the language model",
                rise,
                control,
                "language model with shuffled weights",
                rise_holds,
                rise_text,
            ),
            {},
            {} if beyond is None else {"recovery_beyond_shuffled": beyond},
        ),
    ]


def _curve(table: pd.DataFrame, model: MLLM, kinds: dict[str, str]) -> pd.DataFrame:
    """Rows of the table `stages`: what `Scores.table` tells of all tokens and pixels."""
    rows = table[(table["group"] == "all") & table["stage"].isin(list(kinds))]
    rows = rows[[(unit, metric) in MEASURES for unit, metric in zip(rows["unit"], rows["metric"])]]
    stages = rows["stage"].tolist()
    order = {stage: number for number, stage in enumerate(model.stages)}
    return pd.DataFrame(
        {
            "stage": stages,
            "label": [label(stage) for stage in stages],
            "order": [order[stage] for stage in stages],
            "kind": [kinds[stage] for stage in stages],
            "on_path": [not model.off_path(stage) for stage in stages],
            "metric": [MEASURES[pair] for pair in zip(rows["unit"], rows["metric"], strict=True)],
            **{name: rows[name].tolist() for name in ("estimate", "low", "high")},
        }
    )


def _groups(table: pd.DataFrame, stages: Sequence[str]) -> pd.DataFrame:
    """Token accuracy by where tokens lie: at boundaries or inside, early or late."""
    at = (table["group"] != "all") & (table["metric"] == "accuracy") & table["stage"].isin(stages)
    rows = table[at].drop(columns=["unit"]).reset_index(drop=True)
    return rows.assign(order=[list(stages).index(stage) for stage in rows["stage"]])


def _references(scores: Scores) -> pd.DataFrame:
    """Floor and ceiling of each metric."""
    ceiling = scores.interval(CEILING, "miou", unit="pixel").estimate
    values = [
        ("majority_floor", "accuracy", scores.interval(FLOOR, "accuracy").estimate),
        ("token_ceiling", "accuracy", 1.0),
        ("token_ceiling", "token_miou", 1.0),
        ("token_ceiling", "pixel_miou", ceiling),
    ]
    return pd.DataFrame(values, columns=["name", "metric", "estimate"])


def _most_frequent(split: Split) -> int:
    """The class of most labelled tokens."""
    return int(np.bincount(split.labels[split.labelled], minlength=split.n_classes).argmax())


def _blocks(model: MLLM) -> list[str]:
    return [stage for stage in model.stages if stage.startswith("blocks.")]


def _shuffled_llm(
    probe: Split, test: Split, fitting: Fitting, seed: int, on_batch: Progress | None
) -> tuple[pd.DataFrame, np.ndarray]:
    """The control's scores, and what its probe says of the test tokens at its last block."""
    with shuffled_llm(probe.model, seed) as model:
        stages = _blocks(model)
        bank = fitting.fit(probe.stream(stages, on_batch=on_batch), seed=seed).bank
        scores = Scores(stages, test.classes, pixels=True, seed=seed, shape=test.shape)
        said = test.said(bank_rows(bank), scores=[scores], on_batch=on_batch)
    return scores.table(), said[stages[-1]]
