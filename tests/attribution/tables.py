"""Head tables made of random numbers, for the tests of tables and figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from interp.attribution.table import HeadTable

GROUPS = ("same region", "elsewhere", "text")


def rows_of(values: np.ndarray, groups=GROUPS, images=None, first_layer: int = 0) -> pd.DataFrame:
    """Long form of `[n_images, n_layers, n_heads, n_groups]`, written out by loops."""
    records = []
    for image, layer, head, group in np.ndindex(values.shape):
        records.append(
            {
                "layer": first_layer + layer,
                "head": head,
                "source": groups[group],
                "image": image if images is None else images[image],
                "estimate": values[image, layer, head, group],
            }
        )
    return pd.DataFrame(records)


def random_values(shape=(6, 2, 3, 3), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.1, 1.0, shape)


def edges_of(*edges: tuple[Any, ...], image: int = 0, width: int = 10) -> pd.DataFrame:
    """Edges (layer, head, src, dst, estimate); tokens in a raster of 8 px cells, -1 is text."""
    records = []
    for number, (layer, head, src, dst, estimate) in enumerate(edges):
        record: dict[str, Any] = {"image": image, "layer": layer, "head": head}
        for end, token in (("dst", dst), ("src", src)):
            at = (np.nan, np.nan) if token < 0 else (token % width * 8 + 4, token // width * 8 + 4)
            record |= {f"{end}_position": number if token < 0 else token + 5, end: token}
            record |= {f"{end}_x": at[0], f"{end}_y": at[1]}
        records.append({**record, "estimate": estimate})
    return pd.DataFrame(records)


def table_of(values: np.ndarray | None = None, edges=None, groups=GROUPS, **about: Any):
    values = random_values() if values is None else values
    facts = {"method": "exact", "target": "probe margin", "groups": list(groups)}
    return HeadTable(rows_of(values, groups), edges, {**facts, **about})
