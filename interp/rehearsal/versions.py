"""Whether a client's versions go with the server's.

nnsight's payload holds pickled parts of nnsight's own classes, so nnsight must agree in its first
two numbers. Functions travel by source, which any Python reads. A client says what it has in the
header `nnsight-version`; one that says nothing is not refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version


def installed(pretend: str | None = None) -> dict[str, str]:
    """nnsight's version here, or the one pretended."""
    return {"nnsight": pretend or version("nnsight")}


def misfit(headers: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Why a client with these headers cannot be served, or nothing.

    Args:
        headers: of its request.
        here: as from `installed`.
    """
    ours = here["nnsight"]
    theirs = headers.get("nnsight-version", "").partition(" ")[0]
    if theirs and _minor(theirs) != _minor(ours):
        return (
            f"The client's nnsight {theirs[:40]} is incompatible with the server's nnsight {ours}: "
            f"pip install nnsight=={ours}"
        )
    return ""


def _minor(text: str) -> str:
    found = re.match(r"\d+\.\d+", text)
    return found.group() if found else text
