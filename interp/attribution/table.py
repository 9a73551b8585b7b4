"""`HeadTable`: what each head, reading from each group of sources, is worth to a target, per image.

Every method of `interp.attribution` answers in the same unit, **what the target would lose if this
head no longer read these sources**, and with the same table, so that they can be laid side by side:

    table = head_attribution(model, x, bank, method="exact", labels=labels)
    print(table)                       # the top heads, their intervals, what they mostly read
    table.top(20, source="same-region correct")
    table.heatmap().show()             # layers x heads
    table.edges_on(0, picture).show()  # the strongest edges as arrows over the picture
    table.spearman(other), table.overlap(other)

The table is long: one row a unit (layer, head, source group) and image. A head is the sum over what
it reads, and the estimate of a set of images is the plain mean over them, each image weighing the
same however many tokens it was averaged over. Intervals resample images (`interp.stats`); with one
image there is none, and it is nan rather than zero wide.

Adding up over heads is bookkeeping, not a claim. What heads *write* adds up (`direct`), what they
*cost* when cut does not: two heads that do the same work cost little each and much together. A
*share* is of the sum over all heads of the table, and says no more than that.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from rich.console import Console, Group

from interp.attribution import figures, storage, text
from interp.attribution.estimates import Estimates
from interp.attribution.frames import PLACES, place_edges
from interp.errors import TableError
from interp.report.tables import records
from interp.tokens import TokenGrid

#: heads that the text shows
N_TOLD = 10

#: what tables must have in common to be one table
SAME = (
    "method", "target", "start", "end", "model", "groups", "sources", "dst", "steps", "corrected",
    "patched",
)  # fmt: skip


class HeadTable(Estimates):
    """Estimates of heads by source group and image, with intervals over images.

    Args:
        rows: columns layer, head, source, image, estimate and, if some were checked exactly, bool
            verified. One row a unit and image; an image with nothing to explain has none.
        edges: None, or the strongest edges of each image: image, layer, head, dst_position,
            src_position, dst and src (token numbers within the image, -1 for text), estimate and,
            to be drawn without a grid, dst_x, dst_y, src_x, src_y (`frames.place_edges`).
        about: plain JSON: method, target, start, end, model, `n_images` (those without rows
            included), `groups` (source names in order), `sizes` ((width, height) of each image in
            pixels), cost, verification, and whatever else is worth keeping.

    Attributes:
        rows, edges, about: the same, sorted and checked; n_images and groups always filled in.

    >>> units = {"layer": 0, "head": [0, 0, 1, 1] * 2, "source": ["region", "text"] * 4}
    >>> values = {"image": [0] * 4 + [1] * 4, "estimate": [0.5, 0.1, 0, -0.2, 0.7, 0.1, 0.1, -0.2]}
    >>> table = HeadTable(pd.DataFrame(units | values), about={"method": "direct"})
    >>> table
    HeadTable(direct: 1 layer x 2 heads x 2 sources, 2 images)
    >>> table.matrix().round(2).tolist()
    [[0.7, -0.15]]
    >>> table.summary(by="source").round(2)
       source  estimate  low  high  share
    0  region      0.65  0.5   0.8   1.18
    1    text     -0.10 -0.1  -0.1  -0.18

    Raises:
        TableError: a missing column, a doubled or a missing row, a source that is no group, ...
    """

    # -- pictures ---------------------------------------------------------------------------------

    def heatmap(self, source: str | None = None) -> go.Figure:
        """Layers x heads, blue towards the target and orange away from it; intervals on hover."""
        if not len(self.rows):
            raise TableError("no image has an estimate: there is nothing to draw")
        read = f"; read from {source}" if source else ""
        return figures.heatmap(self.summary(source=source), text.question(self.about) + read)

    def edges_on(
        self,
        image: int,
        picture: Any = None,
        grid: TokenGrid | None = None,
        n: int = 20,
        *,
        image_in_grid: int | None = None,
    ) -> go.Figure:
        """The `n` strongest edges of an image as arrows over its picture, from source to reader.

        Blue pulls towards the target, orange away; edges that start in the text are listed.

        Args:
            image: its number in the table.
            picture: the original picture, as `prepare` got it: PIL or uint8 array; None for a
                blank one.
            grid: where the tokens lie, for a table whose edges do not say it themselves.
            n: edges drawn.
            image_in_grid: the image's number in `grid`, which knows one batch only; may be left out
                if the grid is of one image, or of as many as the table.

        Raises:
            TableError: the table has no edges, none of this image, or does not know where they lie.
            ImageError: `picture` is no picture, or not the one that the edges were measured in.
        """
        if self.edges is None:
            raise TableError("the table has no edges: ask for some with edges=N")
        if n < 1:
            raise TableError(f"n={n} edges; at least one")
        edges = self.edges[self.edges["image"] == image]
        if not len(edges):
            known = self.edges["image"].unique().tolist()
            shown = ", ".join(map(str, known[:20])) + (", ..." if len(known) > 20 else "")
            raise TableError(f"no edges of image {image}; there are some of {shown or 'none'}")
        sizes = self.about.get("sizes")
        size = tuple(sizes[image]) if sizes else None
        if grid is not None:
            number = self._in_grid(image, grid) if image_in_grid is None else image_in_grid
            edges = place_edges(edges, grid, first_image=image - number)
            size = grid.sizes[number]
        elif PLACES[0] not in edges:
            raise TableError(
                f"the edges do not say where they lie (columns {', '.join(PLACES)}): give the "
                "batch's grid=x.grid"
            )
        title = f"image {image}: {text.question(self.about)}"
        return figures.arrows(edges, picture, size, n, title)

    # -- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one parquet file: whole, or not at all (`interp.attribution.storage`)."""
        storage.write_table(path, self.rows, self.edges, self.about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadTable:
        """Read what `save` wrote. `TableError` if the file is another kind."""
        return cls(*storage.read_table(path))

    @classmethod
    def concat(cls, tables: Sequence[HeadTable]) -> HeadTable:
        """One table of several of other images, which are numbered one behind the other.

        What else differs in `about` (cost, verification) is kept under "parts", one entry a table.

        Raises:
            TableError: tables of another method, target or model, or that hold other columns.
        """
        if not tables:
            raise TableError("concat of no tables")
        first = tables[0].about
        for number, table in enumerate(tables[1:], 1):
            for key in SAME:
                if first.get(key) != table.about.get(key):
                    raise TableError(
                        f"tables 0 and {number} differ in {key}: {first.get(key)!r} and "
                        f"{table.about.get(key)!r}; one table is of one {key}"
                    )
        start = np.cumsum([0, *(table.n_images for table in tables)]).tolist()
        rows = _stacked([table.rows for table in tables], start, "rows")
        edges = [table.edges for table in tables if table.edges is not None]
        if len(edges) not in (0, len(tables)):
            raise TableError("some of the tables have edges and some have none")
        joined = _stacked(edges, start, "edges") if edges else None
        return cls(rows, joined, {**_joined([t.about for t in tables]), "n_images": start[-1]})

    # -- words ------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        counts = [_counted(self._units[name].nunique(), noun) for name, noun in
                  (("layer", "layer"), ("head", "head"), ("source", "source"))]  # fmt: skip
        edges = "" if self.edges is None else f", {_counted(len(self.edges), 'edge')}"
        method = self.about.get("method", "unnamed method")
        return f"HeadTable({method}: {' x '.join(counts)}, {self._image_count()}{edges})"

    def __str__(self) -> str:
        console = Console(width=text.WIDTH, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().rstrip().split("\n"))

    def __rich__(self) -> Group:
        return text.rendering(*self._told())

    def _repr_html_(self) -> str:
        return text.html(*self._told())

    def _told(self) -> tuple[list[str], pd.DataFrame, dict[str, Any], list[str]]:
        """Heading, the top heads, the sum of all heads, and notes."""
        model = str(self.about.get("model", ""))
        units = f"{_counted(len(self._units), 'unit')} (layer, head, source), {self._image_count()}"
        heading = [text.question(self.about), *([model] if model else []), units]
        heads = self.summary()
        top = heads.head(N_TOLD)
        if not len(heads):
            return heading, top, {}, ["No image has an estimate."]
        [total], notes = records(self.summary(by=())), []
        total["name"] = f"all {_counted(len(heads), 'head')}"
        last = records(heads)[-1]
        if last["estimate"] < 0 and len(heads) > len(top):
            name = text.head_name(last["layer"], last["head"])
            told = text.interval(last, text.decimals(top["estimate"]))
            notes.append(f"Pulls away most: {name}, {told}.")
        if total["low"] <= 0 <= total["high"]:  # shares of nothing
            top = top.assign(share=np.nan)
            notes.append("No shares: the sum over all heads cannot be told from zero.")
        if len(self._images) > 1:
            notes.append(
                "Intervals: 95%, bootstrap over images. Shares: of the sum over all heads."
            )
        else:
            notes.append("No intervals: they are over images, and there is one.")
        checked = text.verification(self.about)
        top = self._with_source(top) if len(self.groups) > 1 else top
        return heading, top, total, [*notes, checked] if checked else notes

    def _image_count(self) -> str:
        n = len(self._images)
        if n == self.n_images:
            return _counted(n, "image")
        return f"{n} of {_counted(self.n_images, 'image')} with an estimate"

    # -- inside -----------------------------------------------------------------------------------

    def _in_grid(self, image: int, grid: TokenGrid) -> int:
        if grid.n_images == 1:
            return 0
        if grid.n_images == self.n_images:
            return image
        raise TableError(
            f"the grid is of {grid.n_images} images and the table of {self.n_images}: say which of "
            f"the grid's is image {image} with image_in_grid"
        )


def _stacked(frames: Sequence[pd.DataFrame], start: Sequence[int], what: str) -> pd.DataFrame:
    for number, frame in enumerate(frames):
        if odd := set(frame) ^ set(frames[0]):
            raise TableError(
                f"{what} of tables 0 and {number} differ in columns: {', '.join(map(str, odd))}"
            )
    moved = [frame.assign(image=frame["image"] + s) for frame, s in zip(frames, start)]
    return pd.concat(moved, ignore_index=True)


def _joined(abouts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all have in common, sizes one behind the other, and the rest by table in "parts"."""
    own = [{k: v for k, v in a.items() if k not in ("n_images", "sizes")} for a in abouts]
    about = {k: v for k, v in own[0].items() if all(k in o and o[k] == v for o in own)}
    rest = [{k: v for k, v in o.items() if k not in about} for o in own]
    if any(rest):
        about["parts"] = [part for r in rest for part in r.get("parts", [r])]
    if all("sizes" in a for a in abouts):
        about["sizes"] = [size for a in abouts for size in a["sizes"]]
    return about


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
