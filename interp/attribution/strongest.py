"""The strongest edges of every image, kept while a method goes over all of them.

An image of 600 tokens has some ten million edges in a model of 32 x 32 heads, of which one wants to
see twenty. Methods hand every layer's estimates to `Strongest`, which keeps so many an image: plain
numbers, since that happens where the model is. `edge_table` makes the table of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.attribution.frames import EDGES, PLACES, TEXT, place_edges
from interp.attribution.question import Part, Question

COLUMNS = (*EDGES[:-1], *PLACES, EDGES[-1])


@dataclass
class Strongest:
    """The `n` edges an image whose estimates are largest, of either sign.

    Attributes:
        n: how many.
        kept: by image, `[n, 5]` float64: layer, head, dst and src position, estimate.
    """

    n: int
    kept: dict[int, Tensor] = field(default_factory=dict)

    def see(self, part: Part, layer: int, at: Tensor, estimates: Tensor) -> None:
        """Take in the edges of one layer to some reading positions of one row.

        Args:
            part: of the question.
            layer: of the heads.
            at: `[n_here]` which reading positions of `part.sources`.
            estimates: `[n_here, head, key]`; sources in no group do not count.
        """
        sources = part.sources
        estimates = estimates.masked_fill((sources.group[at] < 0)[:, None], 0.0)
        flat = estimates.flatten()
        _, chosen = flat.abs().topk(min(self.n, len(flat)))
        chosen = chosen[flat[chosen] != 0]
        here, head, src = torch.unravel_index(chosen, estimates.shape)
        dst = sources.position[at][here]
        columns = [torch.full_like(head, layer), head, dst, src, flat[chosen]]
        found = torch.stack([column.double() for column in columns], 1)
        image = part.first_image + int(sources.row[at[0]])
        if image in self.kept:
            found = torch.cat([self.kept[image], found])
        order = found[:, -1].abs().argsort(descending=True, stable=True)
        self.kept[image] = found[order[: self.n]]


def edge_table(strongest: Strongest | None, question: Question) -> pd.DataFrame | None:
    """One row an edge, the strongest of each image first; None if none were to be kept."""
    if strongest is None:
        return None
    tables = []
    for part in question.parts:
        grid = part.x.grid
        for row in range(len(part.x)):
            image = part.first_image + row
            if image not in strongest.kept:
                continue
            columns = strongest.kept[image].numpy().T
            layer, head, dst, src = (column.astype(np.int64) for column in columns[:4])
            table = pd.DataFrame({"image": image, "layer": layer, "head": head})
            table["dst_position"], table["src_position"] = dst, src
            own = grid.of_image(row)
            for end, position in (("dst", dst), ("src", src)):
                token = grid.token_at[row, position]
                table[end] = np.where(token < 0, TEXT, token - own[0])
            table = place_edges(table, grid, part.first_image)
            table["estimate"] = columns[4]
            tables.append(table)
    if not tables:
        return pd.DataFrame(columns=list(COLUMNS))
    return pd.concat(tables, ignore_index=True)[list(COLUMNS)]
