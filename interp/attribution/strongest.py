"""The strongest edges of every image, kept while a method goes over all of them.

An image of 600 tokens has some ten million edges in a model of 32 x 32 heads, of which one wants to
see twenty. Methods hand every layer's estimates to `Strongest`, which keeps so many an image.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.attribution.frames import EDGES, PLACES, TEXT, place_edges
from interp.attribution.question import Part

COLUMNS = (*EDGES[:-1], *PLACES, EDGES[-1])


@dataclass
class Strongest:
    """The `n` edges an image whose estimates are largest, of either sign.

    Usage: `strongest = Strongest(100)`, `direct(question, strongest)`, `strongest.table()`
    """

    n: int
    _kept: dict[int, pd.DataFrame] = field(default_factory=dict)

    def see(self, part: Part, layer: int, at: Tensor, estimates: Tensor) -> None:
        """Take in the edges of one layer to some reading positions of one row.

        Args:
            part: of the question.
            layer: of the heads.
            at: `[n_here]` which reading positions of `part.sources`.
            estimates: `[n_here, head, key]`; sources in no group do not count.
        """
        sources, grid = part.sources, part.x.grid
        estimates = estimates.masked_fill((sources.group[at] < 0)[:, None], 0.0)
        flat = estimates.flatten()
        _, chosen = flat.abs().topk(min(self.n, len(flat)))
        chosen = chosen[flat[chosen] != 0]
        here, head, src = (i.numpy() for i in torch.unravel_index(chosen, estimates.shape))
        row = int(sources.row[at[0]])
        image = part.first_image + row
        dst = sources.position[at][here].numpy()
        table = pd.DataFrame({"image": image, "layer": layer, "head": head})
        table["dst_position"], table["src_position"] = dst, src
        own = grid.of_image(row)
        for end, position in (("dst", dst), ("src", src)):
            token = grid.token_at[row, position]
            table[end] = np.where(token < 0, TEXT, token - own[0])
        table = place_edges(table, grid, part.first_image)
        table["estimate"] = flat[chosen].numpy()
        if image in self._kept:
            table = pd.concat([self._kept[image], table], ignore_index=True)
        order = table["estimate"].abs().sort_values(ascending=False, kind="stable").index
        self._kept[image] = table.loc[order[: self.n]].reset_index(drop=True)

    def table(self) -> pd.DataFrame:
        """One row an edge, the strongest of each image first."""
        if not self._kept:
            return pd.DataFrame(columns=list(COLUMNS))
        tables = [self._kept[image] for image in sorted(self._kept)]
        return pd.concat(tables, ignore_index=True)[list(COLUMNS)]
