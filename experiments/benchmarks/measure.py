"""Time and memory, measured so that a busy machine does little harm.

**Time.** All calls run in one process, round after round, in an order that is shuffled anew for
each round. A call's time is divided by that of the reference, plain transformers, run just before
and just after it (the mean of the two; a reference stands between every `BETWEEN` calls). So a
machine that is slow for a while slows both sides of the ratio. What is reported is the median of
the ratios over the rounds with their quartiles. The reference is a call like any other too, and
the quartiles of *its* ratio, which is 1 but for noise, say how far the others can be trusted.

**Memory.** The largest number of bytes that torch's allocator had given out at any moment, from
the allocator's own events (the profiler's on a CPU, the allocator's counter on CUDA). Unlike the
resident size of a process this is the same in every run, and neither cached nor fragmented memory
is in it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

BETWEEN = 3  # calls between two runs of the reference

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Of one call: seconds and ratios to the reference, a number a round each."""

    seconds: Sequence[float]
    ratios: Sequence[float]

    @property
    def median(self) -> float:
        """The median ratio."""
        return float(np.median(self.ratios))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The ratio's first and third quartile."""
        low, high = np.quantile(self.ratios, (0.25, 0.75))
        return float(low), float(high)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"median": self.median, "seconds": [*self.seconds], "ratios": [*self.ratios]}


def interleaved(
    calls: Mapping[K, Callable[[], Any]],
    reference: Callable[[], Any],
    *,
    rounds: int,
    warmup: int = 1,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[dict[K, Timing], list[float]]:
    """Time all calls in all rounds (see the module); also the seconds of the reference's runs.

    Args:
        calls: by any key.
        reference: what their times are divided by.
        rounds: how often each call is timed.
        warmup: rounds before those, whose times are dropped.
        seed: of the order.
        device: on "cuda" each time waits for the device.
    """
    rng = np.random.default_rng(seed)
    keys = list(calls)
    seconds: dict[K, list[float]] = {key: [] for key in keys}
    ratios: dict[K, list[float]] = {key: [] for key in keys}
    plain: list[float] = []
    for number in range(warmup + rounds):
        order = rng.permutation(len(keys))
        before = timed(reference, device)
        for start in range(0, len(keys), BETWEEN):
            chunk = [keys[i] for i in order[start : start + BETWEEN]]
            taken = [timed(calls[key], device) for key in chunk]
            after = timed(reference, device)
            if number >= warmup:
                plain.append(after)
                for key, value in zip(chunk, taken):
                    seconds[key].append(value)
                    ratios[key].append(value / ((before + after) / 2))
            before = after
    return {key: Timing(seconds[key], ratios[key]) for key in keys}, plain


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds that `call` takes; letting go of what it returned is not part of it."""
    gc.collect()  # so that no call pays for another one's garbage
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    taken = time.perf_counter() - start
    del result
    return taken


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most that `call` had allocated at any moment, in bytes, over what was there before."""
    gc.collect()
    if device.startswith("cuda"):
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    # no public view keeps the order of the events that belong to an operator
    recorded = profile.profiler.kineto_results.events()
    memory = [event for event in recorded if event.name() == "[memory]"]
    if not memory:
        raise RuntimeError("the profiler saw no allocation; this torch names its events otherwise")
    memory.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in memory]).max())


def kept_bytes(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """(bytes in the tensors, bytes of the memory that they keep alive).

    The second is larger where a small view holds on to a large tensor. Tensors that share memory
    count once in both.
    """
    parts: dict[int, int] = {}
    whole: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        at = storage.data_ptr()
        whole[at] = storage.nbytes()
        parts[at] = max(parts.get(at, 0), tensor.numel() * tensor.element_size())
    return sum(parts.values()), sum(whole.values())
