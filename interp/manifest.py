"""What a run says about itself: plain data, versions, hashes; no path of the machine.

`interp.runs` writes these into `manifest.json`. The helpers here turn arguments into JSON that any
language reads (no nan, no NumPy types), strip absolute paths, and hash files.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import numpy as np

PACKAGES = (
    "torch", "transformers", "nnsight", "transformer-lens", "numpy", "scikit-learn", "plotly",
)  # fmt: skip
"""The packages whose versions a manifest records."""

#: arguments that tell in a few words what a run is about
IDENTITY = ("model", "data")


def jsonable(data: Any, at: str = "") -> Any:
    """`data` as plain JSON values; `at` is its key path, for the error messages.

    NumPy numbers and arrays become plain ones, and so does whatever has an `as_dict()`, such as
    an `Interval`. A nan is refused rather than written: JSON has none, and a reader in another
    language would stumble over it long after the run that could tell why.

    >>> jsonable({"recovery": {"low": float("nan")}}, "summary.json")
    Traceback (most recent call last):
    ValueError: summary.json.recovery.low is nan: write null, or leave the key out
    """
    if hasattr(data, "as_dict"):
        data = data.as_dict()
    if isinstance(data, np.ndarray | np.generic):
        data = data.tolist()
    if isinstance(data, Mapping):
        if odd := [key for key in data if not isinstance(key, str)]:
            raise TypeError(f"{at}: the key {odd[0]!r} is no text, and JSON knows no other keys")
        return {key: jsonable(value, f"{at}.{key}") for key, value in data.items()}
    if isinstance(data, list | tuple | range):
        return [jsonable(value, f"{at}[{i}]") for i, value in enumerate(data)]
    if isinstance(data, float) and not math.isfinite(data):
        raise ValueError(f"{at} is {data}: write null, or leave the key out")
    if data is None or isinstance(data, str | bool | int | float):
        return data
    if isinstance(data, PurePath):
        return str(data)
    raise TypeError(f"{at} is a {type(data).__name__}, which JSON has no word for")


def write_whole(path: Path, data: dict[str, Any]) -> None:
    """Write JSON beside its place, then rename it: never half a file under its name."""
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")
    temporary.replace(path)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest, or None if there is none or if it is not one of ours."""
    try:
        data = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return data if isinstance(data, dict) and {"kind", "files"} <= set(data) else None


def file_fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def describe(manifest: dict[str, Any]) -> str:
    """A run in a few words: "study of model tiny, data scenes"."""
    arguments = manifest.get("arguments", {})
    of = ", ".join(f"{key} {arguments[key]}" for key in IDENTITY if key in arguments)
    return f"{manifest['kind']} of {of}" if of else str(manifest["kind"])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def without_paths(data: Any) -> Any:
    """Absolute paths shortened to their last part and a hash that still tells them apart.

    A dataset's word is looked at behind its kind: "ade20k:/data/ade" is a path, too.
    """
    if isinstance(data, dict):
        return {key: without_paths(value) for key, value in data.items()}
    if isinstance(data, list):
        return [without_paths(value) for value in data]
    if isinstance(data, str) and (kind := re.match(r"[a-z][a-z0-9-]+:(?=[/~](?!/))", data)):
        return kind[0] + str(without_paths(data[kind.end() :]))
    if isinstance(data, str) and (PurePath(data).is_absolute() or data.startswith("~")):
        return f"{PurePath(data).name} (path {hashlib.sha256(data.encode()).hexdigest()[:8]})"
    return data
