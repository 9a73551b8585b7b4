"""What all edits have in common: they are data.

An edit is a frozen dataclass that prints as the call that made it, compares, hashes, goes to JSON
and comes back. Layers and heads are whole numbers, one or several, or None for all of them;
`window(center=10, width=5)` is a range of layers around one.

>>> list(window(center=10, width=5))
[8, 9, 10, 11, 12]
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from interp.errors import HeadError

Indices = int | Iterable[int] | None


@dataclass(frozen=True, repr=False)
class Edit:
    """Base of all edits. A subclass is a frozen dataclass, and is known by its name."""

    abstract: ClassVar[bool] = True

    def __repr__(self) -> str:
        """The call that makes this edit; what is at its default is left out."""
        words = []
        for number, field in enumerate(fields(self)):
            value = getattr(self, field.name)
            if number and value == field.default:
                continue
            shown = repr(list(value)) if isinstance(value, tuple) else repr(value)
            words.append(shown if number == 0 else f"{field.name}={shown}")
        return f"{type(self).__name__}({', '.join(words)})"

    def to_json(self) -> dict[str, Any]:
        """Plain data; `edit_from_json` gives an equal edit back."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Edit:
        """The edit of this kind that `to_json` wrote."""
        raise NotImplementedError


def kinds(base: type[Edit] = Edit) -> dict[str, type[Edit]]:
    """Every kind of edit by its name, without the bases, which say `abstract`."""
    found: dict[str, type[Edit]] = {}
    for cls in base.__subclasses__():
        found |= kinds(cls)
        if not vars(cls).get("abstract"):
            found[cls.__name__] = cls
    return found


def edit_from_json(data: dict[str, Any], **given: Any) -> Edit:
    """The edit that `to_json` wrote.

    Args:
        data: what it wrote.
        given: what JSON does not hold (`from_=run` of a Patch).

    Raises:
        ValueError: an unknown kind of edit.
    """
    kind = kinds().get(data.get("edit", ""))
    if kind is None:
        raise ValueError(f"no edit {data.get('edit')!r}; there are {sorted(kinds())}")
    return kind.from_json(data, **given)


def window(center: int, width: int) -> range:
    """`width` layers around `center`, cut off at layer 0 (Geva et al. 2023 cut in such windows).

    Raises:
        HeadError: a width that is no odd positive number, or a centre below 0.
    """
    if width < 1 or width % 2 == 0 or center < 0:
        raise HeadError(
            f"window(center={center}, width={width}): the width is an odd number of layers, so "
            "that there is a centre, and the centre a layer"
        )
    return range(max(0, center - width // 2), center + width // 2 + 1)


class HeadsByLayer(Mapping[int, tuple[int, ...]]):
    """Heads that differ by layer: a dict that does not change, so that it can be hashed."""

    def __init__(self, heads: Mapping[Any, Indices]) -> None:
        if not heads:
            raise HeadError("heads={} edits nothing; leave heads out to mean all of them")
        found: dict[int, tuple[int, ...]] = {}
        for layer, chosen in heads.items():
            (number,) = indices(layer, "layers") or ()
            if chosen is None:
                raise HeadError(f"heads={{{number}: None}}: say which heads of layer {number}")
            found[number] = indices(chosen, "heads") or ()
        self._heads = dict(sorted(found.items()))

    def __getitem__(self, layer: int) -> tuple[int, ...]:
        return self._heads[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)

    def __hash__(self) -> int:
        return hash(tuple(self._heads.items()))

    def __repr__(self) -> str:
        return repr({layer: list(heads) for layer, heads in self._heads.items()})


def indices(value: Indices, name: str) -> tuple[int, ...] | None:
    """Layers or heads as a sorted tuple without doubles, or None for all.

    Raises:
        HeadError: an empty list, or something that is no whole number from 0.
    """
    if value is None:
        return None
    given = list(value) if isinstance(value, Iterable) else [value]
    if not given:
        raise HeadError(f"{name}=[] edits nothing; leave {name} out to mean all of them")
    return tuple(sorted({_index(one, name) for one in given}))


def _index(value: Any, name: str) -> int:
    try:
        index = operator.index(value)  # takes NumPy's and torch's whole numbers too
    except TypeError:
        index = -1
    # a bool tensor's entries pass for 0 and 1
    if index < 0 or isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        raise HeadError(f"{name} are whole numbers from 0, not {value!r}")
    return index
