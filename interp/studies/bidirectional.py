"""Claim 4: causal attention starves early tokens; opening the image block feeds them.

Under a causal mask an image token sees only earlier image tokens, so a token near the start of the
raster (or one whose region's anchors all come later) has nobody to be corrected by. `Unmask` opens
all image-to-image edges inside each image, everything else stays causal, positions and rotations
stay as they are.

Early positions are also the top of the picture, so accuracy by row alone proves nothing. Reported
is *bidirectional minus causal* for the same tokens, early third against late third, and the
dose-response: accuracy by how many earlier anchors a misclassified token has. There are two
readings of the opened model. The frozen probes ask whether the states move to where the class was
read before; probes refitted under the new mask ask whether the class can be read at all.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from interp.edits import Unmask
from interp.errors import Untestable
from interp.probes.scoring import bank_rows
from interp.stats import Interval, bootstrap, ratio
from interp.studies.recovery import Baseline
from interp.studies.result import Finding, Result, difference, points, rate
from interp.studies.split import EditsOf, Progress, Split

TITLE = "Causal attention starves early tokens"
CAUSAL = "causal"
FROZEN = "bidirectional, frozen probes"
REFITTED = "bidirectional, refitted probes"
THIRDS = ("early", "middle", "late")
DOSES = ((0, 0, "0"), (1, 2, "1-2"), (3, 5, "3-5"), (6, 10, "6-10"), (11, 10**9, "11+"))


def bidirectional(base: Baseline, *, seed: int = 0, on_batch: Progress | None = None) -> Result:
    """Compare the causal with the opened model, by position and by number of anchors."""
    test = base.test
    if sees_both_ways(test):
        raise Untestable(
            f"image tokens of {test.model.family.name} see each other both ways already"
        )
    llm = [s for s in base.bank.stages if s.startswith("blocks.")]
    refitted = base.probe.fit(
        llm, opened(base.probe), fitting=base.fitting, seed=seed, on_batch=on_batch
    )
    rows = {
        **bank_rows(base.bank.only(llm), suffix=FROZEN),
        **bank_rows(refitted, suffix=REFITTED),
    }
    said = test.said(rows, opened(test), on_batch=on_batch)

    def readings(stage: str) -> dict[str, np.ndarray]:
        return {
            CAUSAL: base.right(stage),
            FROZEN: base.hits(said[f"{stage}{FROZEN}"]),
            REFITTED: base.hits(said[f"{stage}{REFITTED}"]),
        }

    right = {"adapter": base.right(base.reference), **readings(base.readout)}
    curve = []
    for order, stage in enumerate(llm):
        for name, hits in readings(stage).items():
            interval = rate(test.counts(hits, test.labelled), seed)
            curve.append({"condition": name, "stage": stage, "order": order, **interval.as_dict()})

    gains = _thirds(test, right, seed)
    early_against_late, per_error = _early_against_late(test, right, seed)
    early, late = gains[("early", "refitted - causal")], gains[("late", "refitted - causal")]
    holds = early.low > 0 and early_against_late.low > 0 and per_error.low > 0
    starved = _gain_of_starved(base, right, seed)
    text = (
        f"Seeing the picture both ways changes the accuracy of the early third by {points(early)} "
        f"points and of the late third by {points(late)} (probes refitted); early minus late: "
        f"{points(early_against_late)}. Misclassified tokens with no earlier anchor gain "
        f"{points(starved)}."
    )
    finding = Finding(
        TITLE,
        early,
        late,
        "the same for late tokens",
        holds,
        text,
    )
    tables = {
        "bidirectional": pd.DataFrame(curve),
        "positions": _positions(test, right, seed),
        "thirds": pd.DataFrame(
            [
                {"third": third, "comparison": comparison, **interval.as_dict()}
                for (third, comparison), interval in gains.items()
            ]
        ),
        "dose": _dose(base, right, seed),
    }
    figures = {
        "starved_gain": starved,
        "early_minus_late": early_against_late,
        "early_minus_late_per_error": per_error,
    }
    return Result(finding, tables, figures)


def sees_both_ways(split: Split) -> bool:
    """Whether the family opens all image-to-image edges by itself (PaliGemma, Gemma3)."""
    return bool((split.visible | np.eye(split.n_tokens, dtype=bool)).all())


def opened(split: Split) -> EditsOf:
    """Edits of every batch of a split: all image-to-image edges opened; none where they all are."""
    if sees_both_ways(split):
        return lambda number: []
    return lambda number: [Unmask(split.batches[number].grid.image_block())]


def thirds(split: Split) -> np.ndarray:
    """`[n_tokens]` 0, 1 or 2: early, middle or late in raster order."""
    return np.arange(split.n_tokens) * 3 // split.n_tokens


def _gain_counts(
    test: Split, right: dict[str, np.ndarray], name: str, third: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    among = test.labelled & (thirds(test) == third)
    return test.counts(right[name], among), test.counts(right[CAUSAL], among)


def _thirds(
    test: Split, right: dict[str, np.ndarray], seed: int
) -> dict[tuple[str, str], Interval]:
    return {
        (THIRDS[third], f"{short} - causal"): difference(
            *_gain_counts(test, right, name, third), seed
        )
        for short, name in (("frozen", FROZEN), ("refitted", REFITTED))
        for third in range(3)
    }


def _early_against_late(
    test: Split, right: dict[str, np.ndarray], seed: int
) -> tuple[Interval, Interval]:
    """The early third's gain minus the late third's, paired: in accuracy, and per causal error.

    Tokens that are wrong more often have more to gain. The second interval divides each gain by
    the causal error rate of its third, so that headroom alone cannot make the difference.
    """
    (a, n), (b, _) = _gain_counts(test, right, REFITTED, 0)
    (c, m), (d, _) = _gain_counts(test, right, REFITTED, 2)
    return (
        bootstrap(
            lambda a, b, n, c, d, m: ratio(a - b, n) - ratio(c - d, m), a, b, n, c, d, m, seed=seed
        ),
        bootstrap(
            lambda a, b, n, c, d, m: ratio(a - b, n - b) - ratio(c - d, m - d),
            *(a, b, n, c, d, m),
            seed=seed,
        ),
    )


def _gain_of_starved(base: Baseline, right: dict[str, np.ndarray], seed: int) -> Interval:
    """Accuracy gain, probes refitted, of misclassified tokens that have no earlier anchor."""
    among = base.wrong(base.reference) & (_n_anchors(base) == 0)
    if not among.any():
        raise Untestable("every misclassified token has an earlier anchor")
    opened_, causal = (base.test.counts(right[name], among) for name in (REFITTED, CAUSAL))
    return difference(opened_, causal, seed)


def _n_anchors(base: Baseline) -> np.ndarray:
    """`[n_images, n_tokens]` how many earlier tokens of its region are right at the reference."""
    test = base.test
    anchors = base.right(base.reference)[:, None, :] & test.same_region & test.visible
    return np.asarray(anchors.sum(2))


def _positions(test: Split, right: dict[str, np.ndarray], seed: int) -> pd.DataFrame:
    """Accuracy by grid row, in every condition."""
    row_of = np.arange(test.n_tokens) // test.shape[1]
    table = []
    for name, hits in right.items():
        for row in range(test.shape[0]):
            counts = test.counts(hits, test.labelled & (row_of == row))
            table.append({"row": row, "condition": name, **rate(counts, seed).as_dict()})
    return pd.DataFrame(table)


def _dose(base: Baseline, right: dict[str, np.ndarray], seed: int) -> pd.DataFrame:
    """Accuracy of initially wrong tokens by their number of earlier anchors."""
    test = base.test
    wrong = base.wrong(base.reference)
    n_anchors = _n_anchors(base)
    table = []
    for order, (low, high, name) in enumerate(DOSES):
        among = wrong & (n_anchors >= low) & (n_anchors <= high)
        if (among.sum(1) > 0).sum() < 2:
            continue  # no interval over images without images
        for condition in (CAUSAL, FROZEN, REFITTED):
            interval = rate(test.counts(right[condition], among), seed)
            table.append(
                {
                    "anchors": name,
                    "order": order,
                    "condition": condition,
                    "n_tokens": int(among.sum()),
                    **interval.as_dict(),
                }
            )
    return pd.DataFrame(table)
