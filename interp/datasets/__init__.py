"""Pictures with segmentation masks.

`scenes` draws the bundled ones. A dataset here is a sequence of samples with an `image`, a `mask`
of class numbers in the picture's own size, and a `name`; the sequence knows its `classes` and their
`colors`, and has a `fingerprint()`. A new dataset is one function that returns such a sequence.
"""

from __future__ import annotations

from interp.datasets.scenes import Scene, Scenes, scenes

__all__ = ["Scene", "Scenes", "scenes"]
