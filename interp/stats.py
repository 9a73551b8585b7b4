"""Intervals round a number: the paired bootstrap over images.

A probe is scored on tokens, but tokens are not what was sampled: *images* were. The tokens of
one image share a scene, a light, a photographer and, in a transformer, one another's states.
A hundred tokens of one sky are nearer to one observation than to a hundred. An interval that
resamples tokens treats them as independent and comes out far too narrow; one that resamples
images asks the right question, "what if other images had been drawn?" (Field and Welsh 2007
call it the cluster bootstrap).

*Paired* means that every condition is scored on the same draw of images. Hard images are hard
under every mask; taking the difference within a draw cancels that, and the interval of a
difference becomes narrower than the two intervals would suggest. Never compare two intervals
by eye: bootstrap the difference.

How it is done. A draw of n images with replacement is a vector of n counts that sum to n. All
scores here are functions of sums over images (correct tokens, confusion matrices), so a draw
of the score is the function of the *weighted* sums. That is one matrix product for all draws,
and the function is called once on all of them. mIoU comes out right as well: one confusion
matrix over the drawn set, never a mean of per-image values.

The interval is the percentile interval (Efron 1979): for 95 %, the 2.5 % and 97.5 % quantiles
of the draws. It needs some images to be trusted: below about twenty it is too narrow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from interp.errors import Untestable

Array = NDArray[np.float64]

_BLOCK = 4_000_000  # numbers of draws held at once by `bootstrap_columns`: 32 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with the two ends of its interval, all in the unit of the statistic.

    >>> gain = Interval(0.068, 0.056, 0.080)
    >>> print(gain)
    0.068 [0.056, 0.080]
    >>> f"{gain:+.2%}"
    '+6.80% [+5.60%, +8.00%]'
    >>> gain.excludes(0)
    True
    """

    estimate: float
    low: float
    high: float

    def excludes(self, value: float = 0.0) -> bool:
        """Whether `value` lies outside [low, high]."""
        return not self.low <= value <= self.high

    def as_dict(self) -> dict[str, float]:
        """`{"estimate": ..., "low": ..., "high": ...}`, plain floats."""
        return asdict(self)

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self, "")


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> Array:
    """Numerator / denominator, nan where the denominator is 0: a statistic for `bootstrap`.

    >>> ratio([3.0, 0.0], [4.0, 0.0]).tolist()
    [0.75, nan]
    """
    top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    out = np.full(np.broadcast_shapes(top.shape, bottom.shape), np.nan)
    np.divide(top, bottom, out=out, where=bottom != 0)
    return out


def bootstrap(
    statistic: Callable[..., Any],
    *per_image: ArrayLike,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of `statistic`, images resampled jointly for all arrays.

    Each of `per_image` is [n_images, ...] and *additive*: counts, sums, confusion matrices
    [n_images, C, C]. `statistic` gets one array for each, summed over the drawn images, with a
    leading axis [1 + n_boot, ...] (entry 0 holds the plain sums), and returns [1 + n_boot].

    A difference is bootstrapped by passing both conditions to one call:

    >>> rng = np.random.default_rng(0)
    >>> tokens = np.full(200, 100)
    >>> before = rng.binomial(100, 0.6, 200)
    >>> after = before - rng.binomial(10, 0.5, 200)
    >>> drop = bootstrap(lambda a, b, n: (b - a) / n, before, after, tokens)
    >>> print(drop)
    -0.050 [-0.052, -0.048]

    Draws in which the statistic is not a number (0/0) are left out. `Untestable` (a `ValueError`)
    if that is more than half of them or if the estimate itself is none; `ValueError` if the arrays
    differ in their number of images, or if there are fewer than two images.
    """
    arrays = [np.asarray(array, np.float64) for array in per_image]
    sizes = [len(array) if array.ndim else 0 for array in arrays]
    if not arrays or len(set(sizes)) > 1:
        raise ValueError(f"every array needs the same number of images, got {sizes}")
    n_images = sizes[0]
    if n_images < 2:
        raise ValueError(f"a bootstrap over images needs at least 2 images, got {n_images}")
    if not 0 < level < 1 or n_boot < 1:
        raise ValueError(f"need 0 < level < 1 and n_boot >= 1, got {level} and {n_boot}")

    weights = _draws(n_images, n_boot, seed)
    sums = [
        (weights @ array.reshape(n_images, -1)).reshape(1 + n_boot, *array.shape[1:])
        for array in arrays
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.asarray(statistic(*sums), np.float64)
    if values.shape != (1 + n_boot,):
        raise ValueError(
            f"the statistic must return one value a draw, [{1 + n_boot}], got "
            f"{list(values.shape)}: let it work on the last axes and keep the first"
        )
    draws = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]):
        raise Untestable(
            f"the statistic of all {n_images} images is {values[0]}: is a count of it 0?"
        )
    if 2 * len(draws) < n_boot:
        raise Untestable(
            f"the statistic is not a finite number in {n_boot - len(draws)} of {n_boot} draws: "
            f"too few of the {n_images} images contribute to it"
        )
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values[0]), float(low), float(high))


def bootstrap_columns(
    per_image: ArrayLike,
    per: ArrayLike | None = None,
    *,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Array, Array, Array]:
    """Percentile intervals of many ratios of sums at once, on one set of draws.

    Column by column what `bootstrap(ratio, column, per)` gives with the same seed, up to rounding,
    but with one matrix product for all of them: a thousand heads cost about as much as ten.

    Args:
        per_image: `[n_images, ...]`, a sum over each image for every column.
        per: `[n_images]` the denominator that all columns share. None for 1 an image, which makes
            the ratios plain means over images.
        n_boot: draws.
        level: of the interval.
        seed: of the draws.

    Returns:
        estimate, low and high, each of shape `per_image.shape[1:]`.

    Raises:
        Untestable, ValueError: as `bootstrap` does, here also if a value is not a finite number.

    >>> values = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 6.0]])
    >>> estimate, low, high = bootstrap_columns(values)
    >>> estimate.tolist(), low.tolist(), high.tolist()
    ([2.0, 2.0], [1.0, 0.0], [3.0, 6.0])
    """
    array = np.asarray(per_image, np.float64)
    n_images = len(array) if array.ndim else 0
    under = np.ones(n_images) if per is None else np.asarray(per, np.float64)
    if under.shape != (n_images,):
        raise ValueError(f"per is {list(under.shape)}; one number an image is [{n_images}]")
    if n_images < 2:
        raise ValueError(f"a bootstrap over images needs at least 2 images, got {n_images}")
    if not 0 < level < 1 or n_boot < 1:
        raise ValueError(f"need 0 < level < 1 and n_boot >= 1, got {level} and {n_boot}")
    if not (np.isfinite(array).all() and np.isfinite(under).all()):
        raise ValueError("per_image and per must be finite: leave an image out rather than nan")

    weights = _draws(n_images, n_boot, seed)
    shared = weights @ under
    if shared[0] == 0:
        raise Untestable(f"what all {n_images} images are divided by adds up to 0")
    usable = np.flatnonzero(shared)[1:]
    if 2 * len(usable) < n_boot:
        raise Untestable(
            f"the denominator is 0 in {n_boot - len(usable)} of {n_boot} draws: too few of the "
            f"{n_images} images contribute to it"
        )
    columns = array.reshape(n_images, -1).T
    tails = [(1 - level) / 2, (1 + level) / 2]
    estimate = columns @ weights[0] / shared[0]
    ends = np.empty((2, len(columns)))
    block = max(1, _BLOCK // n_boot)
    for start in range(0, len(columns), block):
        draws = columns[start : start + block] @ weights[usable].T / shared[usable]
        ends[:, start : start + block] = np.quantile(draws, tails, axis=1)
    shape = array.shape[1:]
    return estimate.reshape(shape), ends[0].reshape(shape), ends[1].reshape(shape)


@lru_cache(maxsize=8)  # a study asks for the same draws some hundred times
def _draws(n_images: int, n_boot: int, seed: int) -> Array:
    """How often each image is drawn, [1 + n_boot, n_images]; row 0 draws each once."""
    rng = np.random.default_rng(seed)
    weights = np.ones((1 + n_boot, n_images))
    for row in weights[1:]:
        row[:] = np.bincount(rng.integers(n_images, size=n_images), minlength=n_images)
    weights.flags.writeable = False
    return weights
