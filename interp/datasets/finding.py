"""Files in folders, by name, and words for what is there.

Listing is all that these do: no file is opened, so that a set of a hundred thousand pictures is
looked through in a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from interp.errors import DataWrong

PACKED = (".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar")


def walk(folder: Path) -> Iterator[str]:
    """Files in a folder and those below it, relative to it, with "/"; hidden ones left out."""
    waiting = [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                # "._x.jpg" and the like are what macOS leaves in archives
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(f"{below}{entry.name}/")
                else:
                    yield below + entry.name


def named(
    base: Path, folder: str, endings: tuple[str, ...], files: list[str] | None = None
) -> dict[str, str]:
    """Files with one of some endings, by what is left of their name without it.

    Raises:
        DataWrong: two files that leave the same name.
    """
    found: dict[str, str] = {}
    for file in walk(base / folder) if files is None else files:
        for ending in endings:
            if file.lower().endswith(ending.lower()):
                name = file[: -len(ending)]
                path = f"{folder}/{file}" if folder else file
                if name in found:
                    raise DataWrong(f"two files of one name: {found[name]} and {path}")
                found[name] = path
                break
    return found


def contents(folder: Path) -> str:
    """What is in a folder, in a few words."""
    names = sorted(
        entry.name + "/" * entry.is_dir()
        for entry in os.scandir(folder)
        if not entry.name.startswith(".")
    )
    return first_names(names) if names else "an empty folder"


def packed(folder: Path) -> list[str]:
    """What to say of archives in a folder: one line, or none."""
    names = sorted(entry.name for entry in folder.iterdir())
    files = [name for name in names if name.lower().endswith(PACKED)]
    return [f"still packed, unpack first: {first_names(files)}"] if files else []


def first_names(names: list[str], n: int = 5) -> str:
    """The first of some names, and how many more there are.

    >>> first_names(["a", "b", "c"], n=2)
    'a, b and 1 more'
    """
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
