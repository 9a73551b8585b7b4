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
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.model import MLLM
from interp.probes import ProbeBank
from interp.probes.metrics import (
    accuracy,
    ceiling_confusion,
    confusion_per_image,
    majority_floor,
    mean_iou,
    pixel_confusion,
)
from interp.stats import bootstrap
from interp.studies.controls import random_projection, shuffled_llm
from interp.studies.result import Finding, Result, difference, points
from interp.studies.split import EditsOf, Progress, Split

SQUEEZED = "adapter.hook_in, projected"
#: the stage at which tokens are called right or wrong
REFERENCE = "adapter.hook_out"


@dataclass(frozen=True, eq=False)
class Baseline:
    """The un-intervened model as the other studies need it.

    Attributes:
        probe, test: images the probes were fitted on, and images everything is reported on.
        bank: the frozen probes of all stages.
        classes: names of the classes.
        predicted: `{stage: [n_images, n_tokens]}` the probes' classes on the test images.
        predicted_probe: the same on the probe images, at the reference stage only.
        reference: the stage at which tokens are called right or wrong.
        readout: the stage at which recovery is read.
    """

    probe: Split
    test: Split
    bank: ProbeBank
    classes: tuple[str, ...]
    predicted: dict[str, np.ndarray]
    predicted_probe: np.ndarray
    reference: str
    readout: str

    @classmethod
    def fit(cls, probe: Split, test: Split, classes: tuple[str, ...]) -> Baseline:
        """Probes behind the adapter and at the end, and what they read: all that short scripts
        need, and little for a hosted model to send back."""
        reference, readout = REFERENCE, probe.model.stages[-1]
        states = probe.read([reference, readout])
        bank = fit_bank(probe, states, classes)
        return cls(
            probe=probe,
            test=test,
            bank=bank,
            classes=classes,
            predicted=test.judge(bank),
            predicted_probe=bank.predict(reference, states[reference]).numpy(),
            reference=reference,
            readout=readout,
        )

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


def fit_bank(split: Split, states: dict[str, Tensor], classes: tuple[str, ...]) -> ProbeBank:
    """Probes of all stages in `states`, on all labelled tokens of a split."""
    flat = {stage: state.flatten(0, 1) for stage, state in states.items()}
    return ProbeBank.fit(flat, torch.from_numpy(split.labels).flatten(), classes)


def recovery(
    probe: Split,
    test: Split,
    classes: tuple[str, ...],
    *,
    seed: int = 0,
    on_batch: Progress | None = None,
) -> tuple[Baseline, list[Result]]:
    """Fit the probes, draw the curve, judge drop-off and recovery.

    Returns:
        The baseline for the other studies, and two results ("drop_off", "recovery"); the tables
        `stages` and `references` are in the first.

    Raises:
        NotHere: a hosted model, whose weights cannot be shuffled; `Baseline.fit` needs none.
    """
    model = probe.model
    model.require_weights("the control with shuffled weights")
    states = probe.read(model.stages, on_batch=on_batch)
    bank = fit_bank(probe, states, classes)
    squeeze = random_projection(states["adapter.hook_in"].shape[-1], model.cfg.d_model, seed)
    squeezed = None
    if squeeze is not None:
        squeezed = fit_bank(probe, {SQUEEZED: states["adapter.hook_in"] @ squeeze}, classes)
    predicted_probe = bank.predict(REFERENCE, states[REFERENCE]).numpy()
    del states
    states = test.read(model.stages, on_batch=on_batch)
    table = [
        row
        for order, stage in enumerate(model.stages)
        for row in _scores(test, bank, stage, states[stage], order, _kind(stage), model, seed)
    ]
    baseline = Baseline(
        probe=probe,
        test=test,
        bank=bank,
        classes=classes,
        predicted={s: bank.predict(s, state).numpy() for s, state in states.items()},
        predicted_probe=predicted_probe,
        reference=REFERENCE,
        readout=model.stages[-1],
    )
    squeezed_right = None
    if squeezed is not None and squeeze is not None:
        said = squeezed.predict(SQUEEZED, states["adapter.hook_in"] @ squeeze)
        squeezed_right = baseline.hits(said.numpy())
    shuffled, shuffled_right = _shuffled_llm(
        probe, test, classes, len(model.stages), seed, on_batch
    )
    tables = {"stages": pd.DataFrame(table + shuffled), "references": _references(probe, test)}
    return baseline, _findings(baseline, shuffled_right, squeezed_right, tables, seed)


def _findings(
    base: Baseline,
    shuffled_right: np.ndarray,
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
    control = difference(counts(shuffled_right), after, seed)
    beyond = difference(end, counts(shuffled_right), seed)
    width = None if squeezed_right is None else difference(counts(squeezed_right), before, seed)
    figures = {}
    drop_holds = drop.high < 0
    if squeezed_right is not None:
        figures["drop_beyond_width"] = difference(after, counts(squeezed_right), seed)
        drop_holds = drop_holds and figures["drop_beyond_width"].high < 0
    rise_holds = rise.low > 0 and beyond.low > 0
    drop_text = (
        f"Token accuracy changes by {points(drop)} points at the adapter"
        + ("" if width is None else f"; a random projection to its width costs {points(width)}")
        + ("." if drop_holds else ". So no drop is told from none here.")
    )
    rise_text = (
        f"Over the language model it changes by {points(rise)} points; with the language model's "
        f"weights shuffled, by {points(control)}."
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
            {"recovery_beyond_shuffled": beyond},
        ),
    ]


def _scores(
    test: Split,
    bank: ProbeBank,
    stage: str,
    state: Tensor,
    order: int,
    kind: str,
    model: MLLM,
    seed: int,
) -> list[dict[str, Any]]:
    """Table rows of one stage: token accuracy, token-mIoU and pixel-mIoU with intervals."""
    logits = bank.logits(stage, state)
    tokens = confusion_per_image(test.labels, logits.argmax(-1).numpy(), test.n_classes)
    pixels = pixel_confusion(logits.unflatten(1, test.shape), test.masks)
    measured = {
        "accuracy": bootstrap(accuracy, tokens, seed=seed),
        "token_miou": bootstrap(mean_iou, tokens, seed=seed),
        "pixel_miou": bootstrap(mean_iou, pixels, seed=seed),
    }
    row = {
        "stage": stage,
        "label": label(stage),
        "order": order,
        "kind": kind,
        "on_path": not model.off_path(stage),
    }
    return [{**row, "metric": m, **interval.as_dict()} for m, interval in measured.items()]


def _references(probe: Split, test: Split) -> pd.DataFrame:
    """Floor and ceiling of each metric."""
    floor = majority_floor(probe.labels, test.labels)
    ceiling = ceiling_confusion(
        test.labels.reshape(-1, *test.shape), test.masks, test.n_classes
    ).sum(0)
    values = [
        ("majority_floor", "accuracy", floor),
        ("token_ceiling", "accuracy", 1.0),
        ("token_ceiling", "token_miou", 1.0),
        ("token_ceiling", "pixel_miou", float(mean_iou(ceiling))),
    ]
    return pd.DataFrame(values, columns=["name", "metric", "estimate"])


def _shuffled_llm(
    probe: Split,
    test: Split,
    classes: tuple[str, ...],
    order: int,
    seed: int,
    on_batch: Progress | None,
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The control's rows, and which test tokens it gets right at its last block."""
    model = shuffled_llm(probe.model, seed)
    stages = [stage for stage in model.stages if stage.startswith("blocks.")]
    first = order - len(stages)
    bank = fit_bank(probe, probe.read(stages, model=model, on_batch=on_batch), classes)
    states = test.read(stages, model=model, on_batch=on_batch)
    table = [
        row
        for i, stage in enumerate(stages)
        for row in _scores(test, bank, stage, states[stage], first + i, "random_llm", model, seed)
    ]
    said = bank.predict(stages[-1], states[stages[-1]]).numpy()
    return table, np.asarray((said == test.labels) & test.labelled)


def label(stage: str) -> str:
    """A stage's name for people: "vision 1", "adapter out", "LLM 3"."""
    if stage.startswith("adapter."):
        return "adapter in" if stage.endswith("in") else "adapter out"
    if stage == "vision.hook_embed":
        return "vision embedding"
    number = stage.split(".")[-2]
    return f"vision {number}" if stage.startswith("vision.") else f"LLM {number}"


def _kind(stage: str) -> str:
    if stage.startswith("vision."):
        return "vision"
    return "adapter" if stage.startswith("adapter.") else "llm"
