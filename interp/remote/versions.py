"""Which versions are here and there, and whether they go together.

What is sent is pickled classes of nnsight's, and functions as source; modules are found by the
paths that transformers gives them. So:

* nnsight must agree in its first two numbers;
* Python may differ in its second, since no bytecode is sent of this library's, nor of functions
  that are defined in files;
* transformers must agree in the first number, since module trees change with it; with another
  second number it is worth a look, as is another torch.

>>> there = Versions(python="3.10.4", nnsight="0.8.1", torch="2.13.0", transformers="5.21.0")
>>> here = Versions(python="3.11.9", nnsight="0.8.1", torch="2.13.0", transformers="5.23.0")
>>> [(p.what, p.blocks) for p in misfits(here, there)]  # doctest: +NORMALIZE_WHITESPACE
[('Python is 3.11.9 here and 3.10.4 there', False),
 ('transformers is 5.23.0 here and 5.21.0 there', False)]
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any


@dataclass(frozen=True)
class Problem:
    """Something in the way of a request, and what would do about it.

    Attributes:
        what: the trouble, in words.
        fix: what to do.
        blocks: a request would fail; otherwise it is worth knowing.
    """

    what: str
    fix: str
    blocks: bool

    def __str__(self) -> str:
        return f"{self.what}: {self.fix}"


@dataclass(frozen=True)
class Versions:
    """The four versions that matter; "" where unknown."""

    python: str = ""
    nnsight: str = ""
    torch: str = ""
    transformers: str = ""


PACKAGES = ("nnsight", "torch", "transformers")


def versions_here() -> Versions:
    """The versions of this environment."""
    return Versions(
        platform.python_version(), **{package: metadata.version(package) for package in PACKAGES}
    )


def versions_there(env: Any) -> Versions:
    """The versions in a server's /env; all "" if it says nothing that can be read."""
    if not isinstance(env, Mapping):
        return Versions()
    packages = env.get("packages")
    packages = packages if isinstance(packages, Mapping) else {}
    python = (str(env.get("python_version") or "").split() or [""])[0]
    return Versions(python, **{name: str(packages.get(name) or "") for name in PACKAGES})


def misfits(here: Versions, there: Versions) -> list[Problem]:
    """What does not go together, the worst first; a version that is unknown is no problem."""
    problems = []
    for name, blocking, noted in (
        ("python", 1, 2),
        ("nnsight", 2, 3),
        ("transformers", 1, 2),
        ("torch", 1, 1),
    ):
        ours, theirs = getattr(here, name), getattr(there, name)
        if not ours or not theirs or _first(ours, noted) == _first(theirs, noted):
            continue
        blocks = name != "torch" and _first(ours, blocking) != _first(theirs, blocking)
        shown = "Python" if name == "python" else name
        problems.append(
            Problem(
                f"{shown} is {ours} here and {theirs} there", _fix(name, theirs, blocks), blocks
            )
        )
    return sorted(problems, key=lambda problem: not problem.blocks)


def pip_command(there: Versions, here: Versions) -> str:
    """What makes the packages here those of the server, "" if they agree or are unknown."""
    wanted = [
        f'"{name}=={getattr(there, name).partition("+")[0]}"'
        for name in ("nnsight", "transformers")
        if getattr(there, name)
        and _first(getattr(there, name), 3) != _first(getattr(here, name), 3)
    ]
    return f"pip install {' '.join(wanted)}" if wanted else ""


def _fix(name: str, theirs: str, blocks: bool) -> str:
    if name == "python":
        made = f"an environment with Python {'.'.join(_first(theirs, 2))} would do"
        return made if blocks else f"likely fine; if a job cannot be unpacked there, {made}"
    command = f'pip install "{name}=={theirs.partition("+")[0]}"'
    return command if blocks else f"likely fine; if results differ, {command}"


def _first(version: str, n: int) -> tuple[str, ...]:
    """The first `n` numbers of a version: `_first("0.8.1.dev3", 2)` is `("0", "8")`."""
    return tuple(re.findall(r"\d+", version.partition("+")[0])[:n])
