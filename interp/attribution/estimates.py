"""The numbers of a `HeadTable`: sums over units, means over images, their intervals.

The rows are one array `[n_images, n_units]`, a unit being (layer, head, source group). Whatever is
asked adds up columns of it within each image and then takes the mean over images, so a head's
estimate is exactly the sum of what it reads from each group, and the interval of a sum is
bootstrapped as that sum, not put together from the intervals of its parts.

Pictures, files and words are `interp.attribution.table`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from interp.attribution.frames import checked_edges, checked_rows
from interp.errors import TableError, Untestable, nearest
from interp.manifest import jsonable
from interp.stats import bootstrap_columns

HEADS = ("layer", "head")
UNIT = ("layer", "head", "source")


class Estimates:
    """Rows, edges and about of a table, checked, and what adds up from them: see `HeadTable`."""

    def __init__(
        self,
        rows: pd.DataFrame,
        edges: pd.DataFrame | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.about: dict[str, Any] = jsonable(dict(about or {}), "about")
        self.rows = checked_rows(rows, self.about.get("groups"))
        self.edges = None if edges is None else checked_edges(edges)
        last = int(self.rows["image"].max()) if len(self.rows) else -1
        self.about.setdefault("n_images", last + 1)
        self.about.setdefault("groups", list(dict.fromkeys(rows["source"].tolist())))
        if not last < self.n_images:
            raise TableError(
                f"rows go up to image {last}, and about says n_images={self.n_images}: images are "
                "counted from 0"
            )
        sizes = self.about.get("sizes")
        if sizes is not None and len(sizes) != self.n_images:
            raise TableError(f"{len(sizes)} sizes for {self.n_images} images; one an image")
        if (
            self.edges is not None
            and (bare := np.setdiff1d(self.edges["image"].unique(), self._images)).size
        ):
            raise TableError(f"edges of image {bare[0]}, which has no rows")

    # -- what is in it ----------------------------------------------------------------------------

    @property
    def n_images(self) -> int:
        """Images that were looked at, those without an estimate included."""
        return int(self.about["n_images"])

    @property
    def groups(self) -> list[str]:
        """Names of the source groups, in order."""
        return list(self.about["groups"])

    # What follows is kept: a table is not changed once it is made.

    @cached_property
    def _images(self) -> np.ndarray:
        """Numbers of the images that have an estimate."""
        return np.unique(self.rows["image"].to_numpy())

    @cached_property
    def _units(self) -> pd.DataFrame:
        """Layer, head, source of each unit, in the order of an image's rows."""
        n = len(self.rows) // max(len(self._images), 1)
        return self.rows[list(UNIT)].iloc[:n].reset_index(drop=True)

    @cached_property
    def _values(self) -> np.ndarray:
        """`[n_images with an estimate, n_units]`."""
        return self.rows["estimate"].to_numpy().reshape(len(self._images), len(self._units))

    # -- numbers ----------------------------------------------------------------------------------

    def summary(
        self, by: str | Sequence[str] = HEADS, *, source: str | None = None
    ) -> pd.DataFrame:
        """Mean over images, with its interval, of the sum over all that is not in `by`.

        Args:
            by: any of "layer", "head", "source"; () for one row, the sum of everything.
            source: count only what is read from this group.

        Returns:
            The columns of `by`, estimate, low, high (95%, bootstrap over images; nan with one
            image), share (of the sum over all heads and sources) and, where the table has it,
            verified (the share of what was added up that was checked exactly). Largest first.
        """
        names = [by] if isinstance(by, str) else list(by)
        if set(names) - set(UNIT) or len(set(names)) < len(names):
            raise TableError(
                f"by={names}; any of {', '.join(UNIT)} would do, each once (images are what the "
                "mean and its interval go over)"
            )
        chosen = self._of(source)
        units, values = self._units[chosen], self._values[:, chosen]
        label = units.groupby(names, sort=False).ngroup() if names else units["layer"] * 0
        code = label.to_numpy()
        out = units[names].iloc[np.unique(code, return_index=True)[1]].reset_index(drop=True)
        estimate, low, high = _intervals(_added(values, code))
        total = self._values.sum(1).mean() if len(self._images) else np.nan
        out = out.assign(estimate=estimate, low=low, high=high)
        out["share"] = out["estimate"] / total if total else np.nan
        if "verified" in self.rows:
            checked = self.rows["verified"].to_numpy(float).reshape(self._values.shape)
            out["verified"] = _added(checked[:, chosen], code).mean(0) / np.bincount(code)
        return out.sort_values("estimate", ascending=False, kind="stable", ignore_index=True)

    def top(self, n: int = 10, source: str | None = None) -> pd.DataFrame:
        """The `n` heads that pull most towards the target: `summary` with what each mostly reads.

        The column `mostly` names the group that adds most to the head's estimate, in its direction.
        """
        heads = self.summary(source=source).head(n)
        return heads if source is not None or len(self.groups) < 2 else self._with_source(heads)

    def sources(self) -> pd.DataFrame:
        """What is read from each source group, over all heads; in the groups' order.

        Returns:
            source, estimate, low, high, and the share of the sum over all groups with its own
            interval: share, share_low, share_high (nan where that sum is zero).
        """
        out = self.summary(by="source").set_index("source")
        out = out.loc[[name for name in self.groups if name in out.index]].reset_index()
        code = self._units["source"].map({name: i for i, name in enumerate(out["source"])})
        added = _added(self._values, code.to_numpy(np.int64))
        shares = _intervals(added, added.sum(1))
        columns = ["source", "estimate", "low", "high"]
        return out[columns].assign(**dict(zip(("share", "share_low", "share_high"), shares)))

    def matrix(self, source: str | None = None) -> np.ndarray:
        """`[n_layers, n_heads]` estimates, by layer and head number; nan where there is none."""
        heads = self.summary(source=source)
        if not len(heads):
            return np.zeros((0, 0))
        out = np.full((int(heads["layer"].max()) + 1, int(heads["head"].max()) + 1), np.nan)
        out[heads["layer"].to_numpy(), heads["head"].to_numpy()] = heads["estimate"]
        return out

    def spearman(self, other: Self, by: str | Sequence[str] = HEADS) -> float:
        """Rank correlation of the two tables' estimates; nan if one of them is all ties.

        Raises:
            TableError: the tables are not of the same heads.
        """
        mine, theirs = self._beside(other, by)
        if np.ptp(mine) == 0 or np.ptp(theirs) == 0:
            return float("nan")
        return float(np.corrcoef(rankdata(mine), rankdata(theirs))[0, 1])

    def overlap(self, other: Self, k: int = 10, by: str | Sequence[str] = HEADS) -> float:
        """Share of the `k` largest estimates (of either sign) that are among the other's `k`.

        Raises:
            TableError: the tables are not of the same heads, or have fewer than `k`.
        """
        mine, theirs = self._beside(other, by)
        if not 1 <= k <= len(mine):
            raise TableError(f"k={k}: the tables have {len(mine)} to choose from")
        first, second = (
            set(np.argsort(-np.abs(v), kind="stable")[:k].tolist()) for v in (mine, theirs)
        )
        return len(first & second) / k

    # -- inside -----------------------------------------------------------------------------------

    def _of(self, source: str | None) -> np.ndarray:
        """`[n_units]` bool: the units that read from `source`."""
        if source is None:
            return np.ones(len(self._units), dtype=bool)
        if source not in self.groups:
            raise TableError(
                f"no source {source!r}; there are {', '.join(self.groups)} "
                f"{nearest(source, self.groups)}".rstrip()
            )
        return (self._units["source"] == source).to_numpy()

    def _with_source(self, heads: pd.DataFrame) -> pd.DataFrame:
        """With the column `mostly`: the group that adds most to each head, in its direction."""
        parts = self._units.assign(part=self._values.mean(0))
        both = parts.merge(heads[[*HEADS, "estimate"]], on=list(HEADS))
        both["part"] *= np.where(both["estimate"] < 0, -1, 1)
        most = both.loc[both.groupby(list(HEADS))["part"].idxmax()].set_index(list(HEADS))
        names = most["source"].loc[list(zip(heads["layer"], heads["head"]))].tolist()
        out = heads.copy()
        out.insert(list(heads).index("share") + 1, "mostly", names)
        return out

    def _beside(self, other: Self, by: str | Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Estimates of both tables, in the same order."""
        names = [by] if isinstance(by, str) else list(by)
        mine, theirs = (t.summary(by=names).set_index(names)["estimate"] for t in (self, other))
        if len(apart := mine.index.symmetric_difference(theirs.index)):
            one = apart[0] if isinstance(apart[0], tuple) else (apart[0],)
            told = ", ".join(f"{name} {value}" for name, value in zip(names, one))
            raise TableError(f"the tables are not of the same heads: only one of them has {told}")
        return mine.to_numpy(), theirs.reindex(mine.index).to_numpy()


def _added(values: np.ndarray, code: np.ndarray) -> np.ndarray:
    """`[n, k]`: the columns of `values` `[n, n_units]` added up by their code 0..k-1."""
    out = np.zeros((int(code.max()) + 1 if len(code) else 0, len(values)))
    np.add.at(out, code, values.T)
    return out.T


def _intervals(values: np.ndarray, per: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Estimate, low and high of each column; no interval from one image, nothing from none."""
    none = np.full(values.shape[1], np.nan)
    if len(values) >= 2:
        try:
            return bootstrap_columns(values, per)
        except Untestable:
            return none, none, none
    if not len(values) or (per is not None and not per.any()):
        return none, none, none
    return values[0] / (1.0 if per is None else per[0]), none, none
