"""Which process this is of how many, and sums over all of them.

    torchrun --nproc-per-node 4 -m interp probe ...

`torchrun` starts the same program several times and tells each copy by environment variables who it
is. `World.join` reads them; without them the world is one process, and every method here does the
right thing at no cost. So code above says what is shared out and what is added up, once, and runs
alone as it runs on eight machines.

Sums of integers are exact. Sums of floating-point numbers depend on their order; where bytes
matter, numbers are not summed here but sent whole and added in an order of their own
(`interp.probes.piles`). Only tensors travel, no pickled objects.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """All processes of a run.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        local_rank: the GPU that this process takes on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    @contextmanager
    def join(cls, *, timeout: float = 86_400.0) -> Iterator[World]:
        """The world that `torchrun` made, or one of a single process; left at the end.

        Args:
            timeout: seconds to wait for another process before giving up. Processes wait for
                each other's share of the pictures; one that dies is noticed by `torchrun`.

        Usage: `with World.join() as world: ...`
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls()
            return
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if torch.cuda.is_available():
            local %= torch.cuda.device_count()
            torch.cuda.set_device(local)
        # gloo moves what is on the CPU, nccl what is on GPUs
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        try:
            yield cls(dist.get_rank(), dist.get_world_size(), local)
        finally:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def share(self, of: Sequence[T]) -> Sequence[T]:
        """This process's part of a sequence: contiguous, and as even as can be.

        >>> [list(World(rank, 3).share(range(7))) for rank in range(3)]
        [[0, 1], [2, 3], [4, 5, 6]]
        """
        return of[self.rank * len(of) // self.size : (self.rank + 1) * len(of) // self.size]

    def sum_(self, *tensors: Tensor) -> None:
        """Add each tensor up over all processes, in place and in every process."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def from_first_(self, *tensors: Tensor) -> None:
        """Overwrite each tensor with the first process's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def to_first(self, tensor: Tensor, rank: int) -> Tensor:
        """The tensor that process `rank` holds, in the first process; others get their own back.

        Only the first process and `rank` may call this, with tensors of one shape and type.
        """
        if rank == 0:
            return tensor
        if self.rank == rank:
            dist.send(tensor.contiguous(), 0)
            return tensor
        received = torch.empty_like(tensor)
        dist.recv(received, rank)
        return received

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, in order; they have one shape and type."""
        if self.size == 1:
            return [tensor]
        all_ = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(all_, tensor.contiguous())
        return all_

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()
