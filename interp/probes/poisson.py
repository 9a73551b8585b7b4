"""How often each picture is drawn: a bootstrap over images that keeps no image.

The bootstrap of `interp.stats` draws n of n images, so it must have them all. Over a stream it is
enough to give each image, as it passes, a weight of its own in each replicate: the number of times
it is drawn. Among n of n images that number is binomial with mean 1, nearly Poisson(1); taken to be
Poisson, the weights of two images are independent, and nobody needs to know n (Hanley and MacGibbon
2006; Chamandy et al. 2012, "Estimating uncertainty for massive data streams"). The number of images
drawn then differs from replicate to replicate, which cancels in a ratio of sums, as all scores here
are; below some twenty images the intervals are as doubtful as the other ones.

An image's weights are drawn from its *name* and a seed, by a hash that is the same on every
machine and under every version of NumPy. So two processes, or two runs a year apart, draw the same
images in replicate 7: sums of replicates add up, and a difference between two models is paired.

>>> poisson_weights(["0001.jpg", "0002.jpg"], 8)
array([[1, 0, 1, 0, 1, 1, 2, 0],
       [0, 1, 2, 1, 0, 0, 3, 1]])
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import exp, factorial

import numpy as np
from numpy.typing import NDArray

#: a number below the first is no draw, below the second one draw, ...: 2**32 P(draws <= k)
_STEPS = np.array(list(accumulate(2**32 * exp(-1) / factorial(k) for k in range(12)))).astype(
    np.uint32
)


def poisson_weights(names: Sequence[str], n_boot: int, seed: int = 0) -> NDArray[np.int64]:
    """How often each picture is drawn in each replicate, `[n_pictures, n_boot]`.

    Args:
        names: of the pictures; equal names draw alike.
        n_boot: replicates.
        seed: another seed gives other draws.
    """
    out = np.empty((len(names), n_boot), np.int64)
    for row, name in zip(out, names, strict=True):
        random = hashlib.shake_256(f"{seed}:{name}".encode()).digest(4 * n_boot)
        row[:] = np.searchsorted(_STEPS, np.frombuffer(random, "<u4"), side="right")
    return out


def fingerprint(names: Iterable[str]) -> NDArray[np.int64]:
    """How many pictures, and the sum of their names' hashes (mod 2**64): `[2]`.

    Fingerprints of two sets add up to that of both, in any order; a picture that is missing or
    counted twice shows.

    >>> bool((fingerprint(["a", "b"]) == fingerprint(["b"]) + fingerprint(["a"])).all())
    True
    """
    out = np.zeros(2, np.int64)
    for name in names:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        out += np.array([1, int.from_bytes(digest, "little", signed=True)])
    return out
