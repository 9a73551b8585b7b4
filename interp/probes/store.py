"""Features that are kept between passes: in memory, on disk, or not at all.

A pass over a stream runs a model. So the first pass, which takes the sums, also keeps the features
if they fit: as float32 in memory within `budget` bytes, else as bfloat16 in files within `disk`
bytes. A store is whole or it is not used: if the disk fills up on the way, what is there is thrown
away and the caller goes on without. Its folder goes in any case, also on an error or Ctrl-C.

bfloat16 has 8 bits of precision. Features are stored in units near the standard ones
(`interp.probes.units`), so that the error of each is at most 1/256 of its size *from the mean*,
whatever the mean: noise of about a sixth of a percent of the spread, which moves no accuracy.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

import torch
from torch import Tensor

from interp.probes.source import Chunks, Source, Targets, chunk_size, slices

Place = Literal["memory", "disk", "stream"]


def bytes_needed(n_tokens: int, widths: Mapping[str, int], n_soft: int = 0) -> dict[Place, int]:
    """Bytes that a place takes: float32 or bfloat16 a feature, and float32 a soft label's share.

    >>> bytes_needed(1000, {"adapter": 64, "blocks.0.hook_resid_post": 32})
    {'memory': 392000, 'disk': 200000, 'stream': 0}
    """
    features, labels = n_tokens * sum(widths.values()), n_tokens * (8 + 4 * n_soft)
    return {"memory": 4 * features + labels, "disk": 2 * features + labels, "stream": 0}


def where_features_go(
    n_tokens: int, widths: Mapping[str, int], budget: int, disk: int, n_soft: int = 0
) -> Place:
    """The first place that takes all tokens: memory within `budget` bytes, then disk.

    ADE20K's 11.6 million tokens in 57 stages of LLaVA-1.5-7B take 3.7 TB even as bfloat16:

    >>> stages = {f"vision.{i}": 1024 for i in range(24)} | {f"blocks.{i}": 4096 for i in range(33)}
    >>> round(bytes_needed(11_600_000, stages)["disk"] / 1e12, 1)
    3.7
    >>> where_features_go(11_600_000, stages, budget=64 * 2**30, disk=10**12)
    'stream'
    >>> where_features_go(60_000, {"adapter": 256}, budget=2**30, disk=0)
    'memory'
    """
    needed = bytes_needed(n_tokens, widths, n_soft)
    if needed["memory"] <= budget:
        return "memory"
    return "disk" if needed["disk"] <= disk else "stream"


class Store(Protocol):
    """What features are put into, part by part, and read from afterwards."""

    def add(self, z: Mapping[str, Tensor], targets: Targets) -> None:
        """Append some tokens: stage -> [m, d], in their units."""
        ...

    def source(self, stages: Sequence[str], n_tokens: int, device: torch.device) -> Source:
        """The features of some stages of equal width; `n_tokens` as in `Source`."""
        ...


@dataclass(eq=False)
class Memory:
    """A store in memory, float32. A source takes its stages' features over."""

    z: list[dict[str, Tensor]] = field(default_factory=list)
    targets: list[Targets] = field(default_factory=list)

    def add(self, z: Mapping[str, Tensor], targets: Targets) -> None:
        """See `Store`."""
        self.z.append({stage: some.cpu() for stage, some in z.items()})
        self.targets.append(targets.to(torch.empty(0)))

    def source(self, stages: Sequence[str], n_tokens: int, device: torch.device) -> Source:
        """See `Store`."""
        blocks = []
        for z, targets in zip(self.z, self.targets, strict=True):
            blocks.append((torch.stack([z.pop(stage) for stage in stages]), targets))
        return _Blocks(blocks, n_tokens, device)


@dataclass(eq=False)
class _Blocks:
    """Parts [S, m, d] in memory."""

    blocks: list[tuple[Tensor, Targets]]
    n_tokens: int
    device: torch.device
    dtype: torch.dtype = torch.float32

    def chunks(self, stride: int = 1) -> Chunks:
        """See `Source`. Every part is cut by itself, so pieces do not depend on who holds it."""
        for whole, targets in self.blocks:
            z, some = whole[:, ::stride], targets[::stride]
            for at in slices(z.shape[1], chunk_size(z)):
                yield _on(self.device, z[:, at], some[at])

    def keep(self, rows: Sequence[int]) -> None:
        """See `Source`."""
        self.blocks = [(z[list(rows)], targets) for z, targets in self.blocks]


class Disk:
    """A store in files of a folder of its own, bfloat16. Use it as a context manager.

    Args:
        stages: their names.
        folder: where its folder is made; None for the system's own place for such.
        n_bytes: what it will take. What is free is asked beforehand.

    Raises:
        OSError: less is free, or while it is filled: no space left.
    """

    def __init__(self, stages: Sequence[str], folder: Path | str | None, n_bytes: int) -> None:
        where = Path(tempfile.gettempdir() if folder is None else folder)
        free = shutil.disk_usage(where).free
        if free < n_bytes:
            raise OSError(
                f"features take {n_bytes / 1e9:.1f} GB on disk, and {free / 1e9:.1f} GB are free "
                "in the folder for them; another folder, or disk=0 to keep none, would do"
            )
        self._made = tempfile.TemporaryDirectory(prefix="interp-features-", dir=where)
        self._files = {s: Path(self._made.name) / f"{i:04d}.bf16" for i, s in enumerate(stages)}
        self._open = {s: file.open("wb") for s, file in self._files.items()}
        self._shape: dict[str, int] = {}
        self._parts: list[tuple[slice, Targets]] = []

    def __enter__(self) -> Disk:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Delete the folder. Sources of it are of no use afterwards."""
        for file in self._open.values():
            with contextlib.suppress(OSError):  # what is not written yet is not wanted any more
                file.close()
        self._made.cleanup()

    def add(self, z: Mapping[str, Tensor], targets: Targets) -> None:
        """See `Store`."""
        first = self._parts[-1][0].stop if self._parts else 0
        m = len(next(iter(z.values())))
        for stage, some in z.items():
            plain = some.to("cpu", torch.bfloat16).contiguous()
            self._open[stage].write(plain.view(torch.int16).numpy().data)
            self._shape[stage] = some.shape[1]
        self._parts.append((slice(first, first + m), targets.to(torch.empty(0))))

    def source(self, stages: Sequence[str], n_tokens: int, device: torch.device) -> Source:
        """See `Store`."""
        maps = []
        n = self._parts[-1][0].stop if self._parts else 0
        for stage in stages if n else ():
            self._open[stage].flush()
            size = n * self._shape[stage]
            whole = torch.from_file(str(self._files[stage]), False, size, dtype=torch.bfloat16)
            maps.append(whole.view(n, self._shape[stage]))
        return _Mapped(maps, self._parts, n_tokens, device)


@dataclass(eq=False)
class _Mapped:
    """Files in memory's address space: [N, d] a stage."""

    maps: list[Tensor]
    parts: list[tuple[slice, Targets]]
    n_tokens: int
    device: torch.device
    dtype: torch.dtype = torch.float32

    def chunks(self, stride: int = 1) -> Iterator[tuple[Tensor, Targets]]:
        """See `Source`; pieces as those of the store in memory."""
        for part, targets in self.parts:
            views = [whole[part][::stride] for whole in self.maps]
            some = targets[::stride]
            for at in slices(len(views[0]), chunk_size(views[0][None])):
                z = torch.stack([view[at] for view in views])
                yield _on(self.device, z, some[at])

    def keep(self, rows: Sequence[int]) -> None:
        """See `Source`."""
        self.maps = [self.maps[row] for row in rows]


def _on(device: torch.device, z: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
    z = z.to(device).float()
    return z, targets.to(z)
