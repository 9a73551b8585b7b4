"""A table of head estimates as one parquet file.

The file is the rows as they are, so `pandas.read_parquet(path)` anywhere gives them without this
library. What is not a row goes along: `about` as JSON in the schema's metadata under the one key
`interp`, and the edges in a column of lists, those of an image at its first row. One file, because
two could be parted, and because a rename replaces one file in one step: `path` holds a whole table
or what it held before.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from interp.errors import TableError

KEY = b"interp"
COLUMN = "edges"


def write_table(
    path: str | os.PathLike[str],
    rows: pd.DataFrame,
    edges: pd.DataFrame | None,
    about: dict[str, Any],
    kind: str = "HeadTable",
) -> None:
    """Write beside `path`, then rename. Rows sorted by image, edges too, and only of their images.

    Equal tables give equal bytes.
    """
    path = Path(path)
    if path.suffix != ".parquet":
        raise TableError(f"{os.fspath(path)}: a {kind} is saved as parquet; end the name so")
    if not path.parent.is_dir():
        raise TableError(f"{os.fspath(path)}: there is no folder {os.fspath(path.parent)}")
    table = pa.Table.from_pandas(rows, preserve_index=False)
    if edges is not None:
        table = table.append_column(COLUMN, _nested(rows["image"].to_numpy(), edges))
    note = json.dumps({"format": f"interp.{kind}/1", "about": about, "edges": edges is not None})
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), KEY: note})
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        pq.write_table(table, part, compression="zstd")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_table(
    path: str | os.PathLike[str],
    kind: str = "HeadTable",
) -> tuple[pd.DataFrame, pd.DataFrame | None, dict[str, Any]]:
    """Rows, edges and about of a file that `write_table` wrote.

    Raises:
        TableError: the file is another kind, or damaged.
        FileNotFoundError: there is none.
    """
    try:
        table = pq.read_table(Path(path))
        note = json.loads((table.schema.metadata or {}).get(KEY, b"{}"))
    except (pa.ArrowException, ValueError) as error:
        raise TableError(
            f"{os.fspath(path)} is not a file that {kind}.save wrote: {error}"
        ) from error
    if (found := note.get("format")) != f"interp.{kind}/1":
        what = f"it holds {found}" if found else "pandas.read_parquet(path) may know what it holds"
        raise TableError(
            f"{os.fspath(path)} is a parquet file, but not one that {kind}.save wrote; {what}"
        )
    edges = None
    if note["edges"]:
        nested = table.column(COLUMN).combine_chunks().flatten()
        columns = zip(nested.type.names, nested.flatten(), strict=True)
        edges = pa.table(dict(columns)).to_pandas()
        table = table.drop_columns([COLUMN])
    return table.to_pandas(), edges, note["about"]


def _nested(image: np.ndarray, edges: pd.DataFrame) -> pa.Array:
    """A list of edges a row: those of an image at its first row, none at the others."""
    fields = {name: pa.array(edges[name].to_numpy()) for name in edges.columns}
    structs = pa.StructArray.from_arrays(list(fields.values()), names=list(fields))
    first = np.searchsorted(image, np.unique(image))
    lengths = np.zeros(len(image), dtype=np.int32)
    lengths[first] = np.bincount(
        np.searchsorted(image[first], edges["image"].to_numpy()), minlength=len(first)
    )
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), structs)
