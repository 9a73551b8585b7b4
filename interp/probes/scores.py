"""Scores of all stages while a model runs: what comes out of the sums of `interp.probes.counting`.

    scores = Scores(bank.stages, bank.classes, pixels=True, majority=0)
    for names, x, masks, logits in batches:
        scores.update(names, x.grid, x.grid.labels(masks, K), logits, masks=masks)
    scores.table()                                     # every stage, group, unit and metric
    scores.difference("blocks.20...", "adapter...")    # paired, over images

Three metrics, each a function of the summed margins and never a mean over pictures: `accuracy`,
`mean_accuracy` (over the classes that are true) and `miou` (over those that occur), of tokens and,
if asked for, of pixels (`interp.probes.metrics` has the conventions).

**Reference rows** are stages like any other in all tables, with intervals and differences.
`FLOOR` always says the most frequent class of the set that the probes were fitted on (`majority`).
`CEILING`, of pixels only, is what perfect token labels would reach.

**Intervals** are percentiles over Poisson replicates, as good as those of `interp.stats.bootstrap`
up to the draws' own chance: an end of a 95 % interval from 1,000 replicates is off by some 8 % of
the standard error. Two stages, or two runs over the same pictures, are compared by the interval of
their `difference`, never by whether two intervals overlap.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from interp.errors import Untestable, nearest
from interp.probes import metrics
from interp.probes.counting import CEILING, FLOOR, Counts
from interp.stats import Interval

Ints = NDArray[np.int64]

__all__ = ["CEILING", "FLOOR", "METRICS", "Scores"]

METRICS = {
    "accuracy": metrics.accuracy_of,
    "mean_accuracy": metrics.mean_accuracy_of,
    "miou": metrics.mean_iou_of,
}


class Scores(Counts):
    """Scores of several stages over a stream of pictures.

    Args:
        stages: names of what is scored; each says one class a token.
        classes: names of the classes.
        n_boot: replicates for intervals; 0 for none.
        seed: of the replicates. Scores of one seed over the same pictures are paired.
        shape: (rows, columns) of the map by position.
        pixels: whether pixels are scored as well; `update` then needs logits and masks.
        majority: the most frequent class of the set that the probes were fitted on; adds `FLOOR`.
        group_intervals: whether groups of tokens get intervals of mIoU and mean accuracy, too.

    Raises:
        ValueError: names twice, or numbers out of range.

    >>> from interp.cells import CellGrid
    >>> cell, box = [[0, 0], [0, 1]], [[0.0, 0, 2, 2], [2, 0, 4, 2]]
    >>> grid = CellGrid(*np.zeros((4, 2), int), np.array(cell), np.array(box), np.zeros((0, 2)),
    ...                 ((1, 2),), (0,), ("base",), ((4, 2),), 1, 2)
    >>> scores = Scores(["adapter", "block"], ["sky", "sea"], n_boot=100)
    >>> scores.update(["a.jpg"], grid, [0, 1], {"adapter": [0, 0], "block": [0, 1]})
    >>> scores.update(["b.jpg"], grid, [0, 0], {"adapter": [0, 0], "block": [0, 0]})
    >>> scores.confusion("adapter").tolist()
    [[3, 0], [1, 0]]
    >>> print(scores.difference("block", "adapter", "accuracy"))
    0.250 [0.000, 0.500]
    """

    @property
    def unseen(self) -> float:
        """Share of the labelled pixels that no token sees, which are not scored."""
        self._row("pixel", CEILING)
        unseen, labelled = self._sums["pixel/unseen"].tolist()
        return unseen / labelled if labelled else float("nan")

    def table(self, *, level: float = 0.95) -> pd.DataFrame:
        """One row a stage, group, unit and metric: estimate, low, high, and n tokens or pixels.

        Low and high are NaN where no interval can be had: fewer than two pictures, a group whose
        replicates are not kept, a class too rare to be drawn.
        """
        rows = []
        for unit, stages in self.rows.items():
            for stage in stages:
                for group in self.groups(unit):
                    margins = self._margins(stage, unit, group)
                    for metric, score in METRICS.items():
                        row = {"stage": stage, "group": group, "unit": unit, "metric": metric}
                        try:
                            found = self.interval(
                                stage, metric, unit=unit, group=group, level=level
                            )
                        except Untestable:
                            found = Interval(float(score(margins)), float("nan"), float("nan"))
                        rows.append({**row, **found.as_dict(), "n": int(margins[1].sum())})
        return pd.DataFrame(rows)

    def interval(
        self,
        stage: str,
        metric: str = "miou",
        *,
        unit: str = "token",
        group: str = "all",
        level: float = 0.95,
    ) -> Interval:
        """A score and its percentile interval over images.

        Raises:
            Untestable: no interval can be had.
            ValueError: no such stage, metric, unit or group.
        """
        estimate, draws = self._values(stage, metric, unit, group)
        return self._percentiles(estimate, draws, level)

    def difference(
        self,
        stage: str,
        minus: str,
        metric: str = "miou",
        *,
        unit: str = "token",
        group: str = "all",
        level: float = 0.95,
        other: Scores | None = None,
    ) -> Interval:
        """A stage's score minus another's on the same pictures, paired by replicate.

        Args:
            stage: from which is subtracted.
            minus: which is subtracted.
            metric: a name in `METRICS`.
            unit: "token" or "pixel".
            group: "all", or one of `GROUPS`.
            level: of the interval.
            other: where `minus` is looked up: the scores of another run over the same pictures.

        Raises:
            Untestable: no interval can be had.
            ValueError: no such stage, metric, unit or group, or other pictures or replicates.
        """
        other = other or self
        same = np.array_equal(self._sums["pictures"], other._sums["pictures"])
        draws_of = [(s.spec.n_boot, s.spec.seed) for s in (self, other)]
        if not same or draws_of[0] != draws_of[1]:
            raise ValueError(
                "a paired difference needs the same pictures, n_boot and seed; these are "
                f"{self.n_images} and {other.n_images} pictures, with {draws_of}"
            )
        one, one_draws = self._values(stage, metric, unit, group)
        two, two_draws = other._values(minus, metric, unit, group)
        return self._percentiles(one - two, one_draws - two_draws, level)

    def confusion(self, stage: str, unit: str = "token") -> Ints:
        """Counts `[K, K]` of true class (row) against class said (column)."""
        row = self._row(unit, stage)
        return self._sums[f"{unit}/confusion"][row].copy()

    def per_class(self, stage: str, unit: str = "token", group: str = "all") -> pd.DataFrame:
        """One row a class: iou, accuracy (NaN if there is none), counts right, true and said."""
        margins = self._margins(stage, unit, group)
        right, true, said = margins
        columns = {
            "class": self.classes,
            "iou": metrics.iou_of(margins),
            "accuracy": right / np.where(true > 0, true, np.nan),
            "right": right,
            "true": true,
            "said": said,
        }
        return pd.DataFrame(columns)

    def per_position(self, stage: str) -> NDArray[np.float64]:
        """Accuracy at each position `[rows, columns]`; NaN where no labelled token lay."""
        sums = self._sums["token/positions"]
        counted = np.where(sums[-1] > 0, sums[-1], np.nan)
        return np.asarray(sums[self._row("token", stage)] / counted)

    def _row(self, unit: str, stage: str, group: str = "all") -> int:
        """The number of a stage among a unit's rows."""
        if unit not in self.rows:
            raise ValueError(
                f"unit={unit!r}; scored are {' and '.join(self.rows)}"
                + (", pixels with Scores(..., pixels=True)" if unit == "pixel" else "")
            )
        if group not in self.groups(unit):
            raise ValueError(f"group={group!r}; a {unit} has {', '.join(self.groups(unit))}")
        if stage not in self.rows[unit]:
            raise ValueError(
                f"no {unit} row {stage!r} among {len(self.rows[unit])}; "
                f"{nearest(stage, self.rows[unit])}"
            )
        return self.rows[unit].index(stage)

    def _margins(self, stage: str, unit: str, group: str) -> Ints:
        """Right, true and said of a stage, [3, K]."""
        row = self._row(unit, stage, group)
        sums = self._sums[f"{unit}/{group}/margins"]
        return sums[[row, -1, row + len(self.rows[unit])]]

    def _values(
        self, stage: str, metric: str, unit: str, group: str
    ) -> tuple[float, NDArray[np.float64]]:
        """A score, and its replicates; none where they are not kept."""
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r}; there are {', '.join(METRICS)}")
        score, row = METRICS[metric], self._row(unit, stage, group)
        estimate = float(score(self._margins(stage, unit, group)))
        self._flush()
        kept = self._sums[f"{unit}/{group}/replicates"]
        n_rows = len(self.rows[unit])
        if kept.shape[1] == 2 * n_rows + 1:
            return estimate, score(kept[:, [row, -1, row + n_rows]])
        if metric == "accuracy":  # which asks not how often a class was said
            return estimate, score(kept[:, [row, -1, -1]])
        return estimate, np.full(len(kept), np.nan)

    def _percentiles(self, estimate: float, draws: NDArray[np.float64], level: float) -> Interval:
        """The interval round an estimate, as `interp.stats.bootstrap` makes it."""
        if not 0 < level < 1:
            raise ValueError(f"need 0 < level < 1, got {level}")
        finite = draws[np.isfinite(draws)]
        if self.n_images < 2 or not np.isfinite(estimate) or 2 * len(finite) < max(1, len(draws)):
            raise Untestable(
                f"no interval of {estimate} from {self.n_images} pictures, of whose {len(draws)} "
                f"replicates {len(finite)} are numbers: too few pictures, a class too rare, "
                "n_boot=0, or a group's mIoU without group_intervals=True"
            )
        low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
        return Interval(estimate, float(low), float(high))
