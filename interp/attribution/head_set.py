"""`MinimalHeads`: the fewest heads that carry a target, and what they are worth on other images.

    found = minimal_heads(model, batches, bank, labels=labels)
    print(found)                 # the heads in the order they were taken, with their shares
    found.heads; found.held_out; found.beyond; found.plot()

All shares are of the same thing, on the same images: what cutting *all* heads of the question takes
from the target. The curve over the selection images is an optimum over noise and flatters the set;
what it is worth is told by the held-out images, and what that means by random sets of equal size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from interp.attribution.text import WIDTH, decimals, head_name, interval, percent, question
from interp.report.palette import GREYS, MUTED, RIGHT, Style, axis
from interp.report.plots import figure, line, value_range
from interp.report.tables import records
from interp.stats import Interval

Head = tuple[int, int]  # layer, head
HELD_OUT = ["held_out", "low", "high"]


@dataclass(frozen=True, eq=False)
class MinimalHeads:
    """Heads found by `interp.attribution.minimal.minimal_heads`.

    Attributes:
        heads: (layer, head), in the order in which they were taken.
        goal: the share that was to be removed.
        reached: whether they remove it, on the selection images.
        steps: one row a head taken: n (heads so far), layer, head, selection (share of the first n
            heads on the selection images), held_out, low, high (on the held-out ones, 95%).
        whole: what cutting all heads takes from the target, of which the shares are: mean over the
            held-out images.
        random: share of random sets of as many heads, on the held-out images: the mean over sets,
            its interval over images.
        beyond: how much more the heads remove than random sets, paired by image.
        random_sets: the random sets, drawn from all heads of the question.
        random_shares: the share of each.
        candidates: the heads that were tried.
        about: plain JSON: what was asked, numbers of images, the cost.
    """

    heads: tuple[Head, ...]
    goal: float
    reached: bool
    steps: pd.DataFrame
    whole: Interval
    random: Interval
    beyond: Interval
    random_sets: tuple[tuple[Head, ...], ...]
    random_shares: tuple[float, ...]
    candidates: tuple[Head, ...]
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.heads)

    @property
    def selection(self) -> float:
        """Share that the heads remove on the images they were chosen on."""
        return float(self.steps["selection"].iloc[-1])

    @property
    def held_out(self) -> Interval:
        """Share that the heads remove on held-out images."""
        return Interval(*(float(self.steps[name].iloc[-1]) for name in HELD_OUT))

    def to_frame(self) -> pd.DataFrame:
        """`steps`, a copy."""
        return self.steps.copy()

    def plot(self) -> go.Figure:
        """Share over number of heads: selection, held out with its band, random sets, the goal."""
        n = len(self.heads)
        zero = {"n": 0, "estimate": 0.0, "low": 0.0, "high": 0.0}
        curves = {}
        for name, columns in (("selection", ["selection"] * 3), ("held out", HELD_OUT)):
            rows = self.steps[columns].set_axis(["estimate", "low", "high"], axis=1)
            rows.insert(0, "n", self.steps["n"])
            curves[name] = pd.concat([pd.DataFrame([zero]), rows], ignore_index=True)
        fig = figure(360, width=max(420, 200 + 40 * n), showlegend=True)
        grey, blue = Style(GREYS[1], "dash", "circle-open", 1.6), Style(RIGHT)
        line(fig, curves["selection"], "n", "selection", grey, band=0)
        line(fig, curves["held out"], "n", "held out", blue, showlegend=True)
        fig.data[1].showlegend = False  # the band
        sets = ["<br>".join(head_name(*head) for head in one) for one in self.random_sets]
        fig.add_trace(
            go.Scatter(
                x=[n] * len(self.random_shares),
                y=list(self.random_shares),
                text=sets,
                name="random sets, held out",
                mode="markers",
                marker={"color": GREYS[0], "size": 6, "opacity": 0.6, "symbol": "line-ew-open"},
                hovertemplate="<b>%{y:.1%}</b><br>%{text}<extra></extra>",
            )
        )
        fig.add_hline(
            y=self.goal,
            line={"color": MUTED, "dash": "dot", "width": 1.2},
            annotation={"text": f"goal {self.goal:.0%}", "font": {"color": MUTED, "size": 12}},
            annotation_position="top left",
        )
        frames = list(curves.values())
        fig.update_yaxes(
            axis("share of what cutting all heads removes", tickformat=".0%"),
            range=value_range(frames, self.goal, *self.random_shares),
        )
        names = ["none", *(f"+{head_name(*head)}" for head in self.heads)]
        fig.update_xaxes(
            axis("heads taken", showgrid=False, tickvals=list(range(n + 1)), ticktext=names)
        )
        return fig

    # -- in words ---------------------------------------------------------------------------------

    def __repr__(self) -> str:
        named = ", ".join(head_name(*head) for head in self.heads)
        told = "reached" if self.reached else "not reached"
        return f"MinimalHeads([{named}], goal {self.goal:.0%} {told})"

    def __str__(self) -> str:
        console = Console(width=WIDTH, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(part.rstrip() for part in capture.get().rstrip().split("\n"))

    def __rich__(self) -> Group:
        n, about = len(self.heads), self.about
        verdict = (
            f"Cutting {n} of {about['n_heads']} heads removes {percent(self.selection)} of what "
            "cutting all of them removes, on the selection images: "
        )
        if self.reached:
            verdict += f"the goal of {percent(self.goal)} is reached there."
        else:
            verdict += (
                f"the goal of {percent(self.goal)} is NOT reached with all candidates. Give more "
                "of them, or ask for less."
            )
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("heads", "taken", "selection", "held out"):
            table.add_column(name, no_wrap=True, justify="right" if name == "heads" else "left")
        for row in records(self.steps):
            told = Interval(*(row[name] for name in HELD_OUT))
            table.add_row(
                str(row["n"]),
                head_name(row["layer"], row["head"]),
                percent(row["selection"]),
                _percent(told),
            )
        above = sum(share >= self.held_out.estimate for share in self.random_shares)
        k, vague = len(self.random_sets), not self.whole.excludes(0)
        digits = decimals(pd.Series([self.whole.estimate]))
        notes = [
            f"Cutting all takes {interval(self.whole.as_dict(), digits)} from the target (held out)"
            + (", which cannot be told from nothing: so can no share." if vague else "."),
            f"{k} random sets of {n} of all {about['n_heads']} heads remove "
            f"{_percent(self.random)}, {above} of them as much as these.",
            f"Beyond random sets: {_percent(self.beyond)}.",
            f"{about['n_selection']} selection and {about['n_held_out']} held-out images with a "
            "target. Intervals: 95%, paired bootstrap over images.",
        ]
        return Group(
            Text(question(about), style="bold"), Text(verdict), table, *(Text(n) for n in notes)
        )


def _percent(told: Interval) -> str:
    # rounded here, since a share of -0.1% is 0%, not -0%
    middle, low, high = (percent(round(v, 2) + 0.0) for v in told.as_dict().values())
    return f"{middle} [{low.removesuffix('%')}, {high.removesuffix('%')}]"
