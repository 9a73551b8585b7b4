"""`PathTable`: how much of one head's effect runs through another, per image.

    paths = path_attribution(model, x, bank, labels=labels)
    print(paths)              # the strongest paths, with their intervals
    paths.top(5); paths.matrix(); paths.graph().show()

One row a path (sender, receiver) and image. The estimate of some images is the plain mean over
them, and intervals resample images (`interp.stats`). Strong is what has a large estimate *of either
sign*: a path through which a head is held back is as much of a finding as one that helps it.

Estimates do not add up over paths. Two receivers that do the same work carry little each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from interp.attribution.storage import read_table, write_table
from interp.attribution.text import WIDTH, decimals, head_name, interval, question
from interp.errors import TableError
from interp.manifest import jsonable
from interp.report.palette import INK, RIGHT, WRONG, axis, faded
from interp.report.plots import figure
from interp.report.tables import records
from interp.stats import bootstrap_columns

PATH = ("sender_layer", "sender_head", "layer", "head")
ROWS = (*PATH, "image", "estimate")
N_TOLD = 10
N_DRAWN = 40  # paths in a graph, unless asked otherwise
STEPS = 16  # straight pieces of a bent line


class PathTable:
    """Effects of senders through receivers.

    Args:
        rows: columns sender_layer, sender_head, layer, head (of the receiver), image, estimate
            (what the target loses). Each image that has rows has one for every path.
        about: plain JSON: what was asked, and how.

    Attributes:
        rows, about: the same, rows sorted by path and image.

    >>> rows = pd.DataFrame([(0, 1, 2, 3, 0, 0.5), (0, 1, 2, 3, 1, 0.7), (0, 0, 2, 3, 0, -0.1),
    ...                      (0, 0, 2, 3, 1, 0.0)], columns=list(ROWS))
    >>> table = PathTable(rows, {"n_images": 2})
    >>> table
    PathTable(2 paths, 2 images)
    >>> table.matrix().loc["0.1", "2.3"].round(2).item()
    0.6

    Raises:
        TableError: columns that lack, or paths that some images have and others have not.
    """

    def __init__(self, rows: pd.DataFrame, about: Mapping[str, Any] | None = None) -> None:
        if missing := [name for name in ROWS if name not in rows]:
            raise TableError(
                f"rows of paths lack {', '.join(missing)}; they have {', '.join(map(str, rows))}"
            )
        rows = rows[list(ROWS)].astype(dict.fromkeys(ROWS[:-1], np.int64) | {"estimate": float})
        self.rows = rows.sort_values(list(ROWS[:-1]), ignore_index=True)
        self.about: dict[str, Any] = jsonable(dict(about or {}), "about")
        self._images = np.unique(rows["image"])
        n_paths = len(rows[list(PATH)].drop_duplicates())
        if len(rows) != n_paths * len(self._images) or rows.duplicated(list(ROWS[:-1])).any():
            raise TableError(
                f"{len(rows)} rows of {n_paths} paths in {len(self._images)} images; one a path "
                "and image would do"
            )
        if rows["estimate"].isna().any():
            raise TableError("an estimate is missing; an image without one has no rows")

    @property
    def n_images(self) -> int:
        """Images that were looked at, those without an estimate included."""
        return int(self.about.get("n_images", len(self._images)))

    # -- numbers ----------------------------------------------------------------------------------

    def summary(self) -> pd.DataFrame:
        """One row a path: mean over images with its interval (95%; nan with one image).

        Returns:
            sender_layer, sender_head, layer, head, estimate, low, high; strongest first, whatever
            the sign.
        """
        if not len(self.rows):
            return pd.DataFrame(columns=[*PATH, "estimate", "low", "high"])
        n = len(self._images)
        out = self.rows.loc[::n, list(PATH)].reset_index(drop=True)  # sorted: a path's rows follow
        values = self.rows["estimate"].to_numpy().reshape(-1, n).T
        if n > 1:
            out["estimate"], out["low"], out["high"] = bootstrap_columns(values)
        else:
            out["estimate"], out["low"], out["high"] = values[0], np.nan, np.nan
        order = out["estimate"].abs().sort_values(ascending=False, kind="stable").index
        return out.loc[order].reset_index(drop=True)

    def top(self, n: int = 10) -> pd.DataFrame:
        """The `n` strongest paths, as `summary` has them."""
        return self.summary().head(n)

    def matrix(self) -> pd.DataFrame:
        """Senders x receivers, both called "layer.head"; nan where a path was not looked at."""
        out = self.summary()
        names = {
            end: [head_name(*at) for at in zip(out[columns[0]], out[columns[1]], strict=True)]
            for end, columns in (("sender", PATH[:2]), ("receiver", PATH[2:]))
        }
        wide = out.assign(**names).pivot(index="sender", columns="receiver", values="estimate")

        def by_number(name: str) -> tuple[int, ...]:
            return tuple(int(part) for part in name.split("."))

        return wide.loc[sorted(wide.index, key=by_number), sorted(wide.columns, key=by_number)]

    # -- picture ----------------------------------------------------------------------------------

    def graph(self, n: int = N_DRAWN) -> go.Figure:
        """Heads as nodes, layers from left to right, the `n` strongest paths as lines.

        Blue: the sender helps the target through this receiver; orange: it is against it. The
        stronger, the thicker; numbers and intervals on hover.
        """
        if not len(self.rows):
            raise TableError("no image has an estimate: there is nothing to draw")
        paths = self.summary().head(n)
        heads = {(int(a), int(b)) for a, b in paths[list(PATH[:2])].to_numpy()}
        heads |= {(int(a), int(b)) for a, b in paths[list(PATH[2:])].to_numpy()}
        layers = sorted({layer for layer, _ in heads})
        place: dict[tuple[int, int], tuple[float, float]] = {}
        for number, layer in enumerate(layers):
            own = sorted(head for at, head in heads if at == layer)
            for i, head in enumerate(own):
                place[layer, head] = (number, (len(own) - 1) / 2 - i)
        tall = max(sum(at == layer for at, _ in heads) for layer in layers)
        width = 150 + 150 * len(layers)
        fig = figure(
            130 + 64 * max(tall, 3),
            width=width,
            hovermode="closest",
            title={"text": question(self.about), "font": {"size": 14}, "x": 0.02},
            margin={"l": 30, "r": 30, "t": 70, "b": 60},
        )
        most, digits = float(paths["estimate"].abs().max()) or 1.0, decimals(paths["estimate"])
        for path in reversed(records(paths)):  # the strongest on top
            ends = (path["sender_layer"], path["sender_head"]), (path["layer"], path["head"])
            strength = abs(path["estimate"]) / most
            color = RIGHT if path["estimate"] >= 0 else WRONG
            x, y = _bent(place[ends[0]], place[ends[1]])
            name = f"{head_name(*ends[0])} → {head_name(*ends[1])}"
            fig.add_trace(
                go.Scatter(
                    x=x,
                    y=y,
                    mode="lines",
                    line={
                        "color": faded(color, round(0.25 + 0.65 * strength, 3)),
                        "width": 0.7 + 6 * strength,
                    },
                    hovertemplate=f"<b>{name}</b><br>{interval(path, digits)}<extra></extra>",
                    name=name,
                )
            )
        fig.add_trace(
            go.Scatter(
                x=[x for x, _ in place.values()],
                y=[y for _, y in place.values()],
                text=[head_name(*head) for head in place],
                mode="markers+text",
                textposition="middle center",
                textfont={"size": 12, "color": INK},
                marker={"size": 34, "color": "white", "line": {"color": INK, "width": 1.2}},
                hovertemplate="<b>head %{text}</b><extra></extra>",
                name="heads",
            )
        )
        ticks = {"tickvals": list(range(len(layers))), "ticktext": [str(layer) for layer in layers]}
        fig.update_xaxes(axis("layer", showgrid=False, **ticks), range=[-0.5, len(layers) - 0.5])
        fig.update_yaxes(visible=False)
        return fig

    # -- files and words --------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one parquet file, whole or not at all."""
        write_table(path, self.rows, None, self.about, "PathTable")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PathTable:
        """What `save` wrote.

        Raises:
            TableError: the file is something else.
        """
        rows, _, about = read_table(path, "PathTable")
        return cls(rows, about)

    def __repr__(self) -> str:
        n_paths = len(self.rows) // max(len(self._images), 1)
        return f"PathTable({n_paths} path{'s' * (n_paths != 1)}, {self._image_count()})"

    def __str__(self) -> str:
        console = Console(width=WIDTH, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().rstrip().split("\n"))

    def __rich__(self) -> Group:
        summary = self.summary()
        heading = [Text(question(self.about), style="bold")]
        if how := self.about.get("how"):
            heading.append(Text(how))
        heading.append(Text(f"{len(summary)} paths, {self._image_count()}"))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("sender", "receiver", "through it the target loses"):
            table.add_column(name, no_wrap=True)
        digits = decimals(summary["estimate"])
        for row in records(summary.head(N_TOLD)):
            table.add_row(
                head_name(row["sender_layer"], row["sender_head"]),
                head_name(row["layer"], row["head"]),
                interval(row, digits),
            )
        if not len(summary):
            note = "No image has an estimate."
        elif len(self._images) > 1:
            note = "Strongest first. Intervals: 95%, bootstrap over images."
        else:
            note = "Strongest first. No intervals: they are over images, and there is one."
        return Group(*heading, table, Text(note))

    def _image_count(self) -> str:
        n = len(self._images)
        images = f"{self.n_images} image{'s' * (self.n_images != 1)}"
        return images if n == self.n_images else f"{n} of {images} with an estimate"


def _bent(start: tuple[float, float], end: tuple[float, float]) -> tuple[list[float], list[float]]:
    """A line from one node to another that goes round those of the layers between."""
    (x0, y0), (x1, y1) = start, end
    t = np.linspace(0, 1, STEPS)
    bend = 0.35 * (x1 - x0 - 1)  # neighbours are joined by straight lines
    y = y0 + (y1 - y0) * t + 4 * bend * t * (1 - t)
    return (x0 + (x1 - x0) * t).tolist(), y.tolist()
