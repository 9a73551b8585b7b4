"""Scenes: small drawn landscapes whose meaning must travel from patch to patch.

A scene is an 80 x 80 picture of 3 to 5 regions (a sea beside a lake, a forest, a beach). The
picture is built so that *what a patch is* can rarely be seen in that patch alone, which is the
situation in which a model has to move meaning between image tokens:

- **Ten classes in five sibling pairs** (sea/lake, forest/orchard, ...). Siblings are drawn with
  the same texture, so a bare patch tells the pair and leaves a coin flip between the two. At
  least one pair of siblings meets in every scene.
- **Marks tell siblings apart.** A few patches of each region carry a handwritten digit (from
  scikit-learn's `load_digits`): digit k is written in regions of class k, and nowhere else.
- **A tint holds a region together.** Every region of a scene is lit in another of six tints,
  drawn at random and unrelated to its class. It says "these patches belong together", no more.

A reader that goes through the patches in raster order, as a causal language model does, reaches
the upper patches of a region before the first mark that could tell what they are.

Three splits never share a digit sample: a model is trained on `train`, probes are fitted on
`probe`, figures are reported on `test`. A scene is a pure function of its split and index, and
is drawn when asked for (about 2 ms); nothing is stored.

>>> from interp.datasets import scenes
>>> scene = scenes("test")[17]
>>> scene.name, scene.image.size, scene.mask.shape
('test/17', (80, 80), (80, 80))
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES: tuple[str, ...] = (
    "sea", "lake", "forest", "orchard", "meadow", "field", "desert", "beach", "snow", "cloud",
)  # fmt: skip
"""Class names; the two of a sibling pair are neighbours: class k pairs with class k ^ 1."""

SIBLINGS: tuple[tuple[int, int], ...] = tuple((k, k + 1) for k in range(0, len(CLASSES), 2))
"""The five pairs of classes that share a texture."""

COLORS: tuple[tuple[int, int, int], ...] = (
    (31, 87, 164), (96, 190, 226), (20, 92, 48), (122, 178, 60), (64, 168, 112),
    (226, 200, 64), (204, 120, 52), (244, 182, 132), (150, 140, 200), (110, 110, 120),
)  # fmt: skip
"""RGB colours to *display* classes with; the drawn pictures use other, ambiguous ones."""

SIZE = 80  # pixels a side
CELL = 8  # pixels a side of a patch: the size of a digit in load_digits
GRID = SIZE // CELL
SEED = 20260317

SPLITS: dict[str, int] = {"train": 9_000, "probe": 1_000, "test": 1_000}
"""The splits and how many scenes each holds."""

MARK_DENSITY = 0.15  # share of a region's pure cells that carry a digit (at least one does)
MIN_PURE = 5  # pure cells that a region needs, or the scene's borders are drawn anew
TINT = 45.0  # size of a tint's shift of colour, in RGB levels a channel
TINT_JITTER = 3.0  # standard deviation of a region's own deviation from its tint
INK = np.array([18.0, 18.0, 22.0])

# Base colour and two colours' worth of texture a sibling pair; all bright enough for dark ink.
_BASES = np.array(
    [[92, 138, 190], [88, 148, 96], [150, 176, 84], [208, 172, 116], [206, 210, 216]], float
)
_WAVES = ((0.0, 7.0), (0.8, 4.0), (1.57, 5.0), (2.4, 9.0), (0.4, 13.0))  # angle, wavelength


@dataclass(frozen=True, eq=False)
class Scene:
    """One drawn scene. Patch (r, c) covers the pixels [8r, 8r + 8) x [8c, 8c + 8)."""

    image: Image.Image
    """The picture, RGB, 80 x 80."""
    mask: NDArray[np.uint8]
    """[80, 80]: the class of every pixel, an index into `CLASSES`."""
    regions: NDArray[np.uint8]
    """[80, 80]: the region of every pixel, 0 .. n_regions - 1."""
    marks: NDArray[np.bool_]
    """[10, 10]: the patches that carry a digit."""
    name: str
    """Split and index, such as "test/17"."""


class Scenes(Sequence[Scene]):
    """A split of scenes, drawn when indexed. A slice is again a `Scenes`."""

    name = "scenes"
    classes = CLASSES
    colors = COLORS

    def __init__(self, split: str, indices: range) -> None:
        self.split = split
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice) -> Scenes: ...
    def __getitem__(self, index: int | slice) -> Scene | Scenes:
        if isinstance(index, slice):
            return Scenes(self.split, self._indices[index])
        return draw(self.split, self._indices[index])

    def __iter__(self) -> Iterator[Scene]:
        return (draw(self.split, i) for i in self._indices)

    def __repr__(self) -> str:
        return f"Scenes(split={self.split!r}, {len(self)} scenes)"

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the recipe, the indices, and the first scenes' pixels and masks."""
        recipe = (SEED, SPLITS, MARK_DENSITY, MIN_PURE, TINT, TINT_JITTER)
        digest = hashlib.sha256(repr((self.split, self._indices, recipe, CLASSES)).encode())
        for scene in self[:4]:
            digest.update(np.asarray(scene.image).tobytes())
            digest.update(scene.mask.tobytes())
        return digest.hexdigest()


def scenes(split: str = "test", n: int | None = None) -> Scenes:
    """The scenes of a split, or its first `n`.

    >>> len(scenes("probe")), scenes("train", n=3)
    (1000, Scenes(split='train', 3 scenes))

    Raises:
        ValueError: an unknown split, or an `n` that the split does not have.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: the scenes' splits are {', '.join(SPLITS)}")
    total = SPLITS[split]
    if n is not None and not 0 <= n <= total:
        raise ValueError(f"n={n}: the split {split!r} has {total} scenes")
    return Scenes(split, range(total if n is None else n))


def draw(split: str, index: int) -> Scene:
    """Draw scene `index` of a split."""
    rng = np.random.default_rng([SEED, list(SPLITS).index(split), index])
    region_class = _choose_classes(rng)
    regions = _draw_regions(rng, len(region_class))
    tints = _choose_tints(rng, len(region_class))

    # One crop of the texture sheets a scene: a lake continues the sea's waves, so that not
    # even the pattern's phase betrays where one sibling ends and the other begins.
    y, x = rng.integers(0, SIZE, 2)
    shade = _texture_sheets()[:, y : y + SIZE, x : x + SIZE]
    pair = (region_class // 2)[regions]
    pixels = _BASES[pair] + tints[regions]
    pixels += np.take_along_axis(shade, pair[None], 0)[0][..., None]
    pixels += rng.normal(0.0, 6.0, (SIZE, SIZE, 1))

    marks = np.zeros((GRID, GRID), bool)
    for region, cls in enumerate(region_class):
        samples = _digits(split)[cls]
        for r, c in _choose_marks(rng, regions, region):
            marks[r, c] = True
            ink = samples[rng.integers(len(samples))][..., None]
            patch = pixels[CELL * r : CELL * (r + 1), CELL * c : CELL * (c + 1)]
            patch += ink * (INK - patch)

    return Scene(
        image=Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)),
        mask=region_class[regions].astype(np.uint8),
        regions=regions,
        marks=marks,
        name=f"{split}/{index}",
    )


def _choose_classes(rng: np.random.Generator) -> NDArray[np.intp]:
    """Distinct classes of 3 to 5 regions, a sibling pair among them, in random order."""
    n = int(rng.integers(3, 6))
    pair = SIBLINGS[rng.integers(len(SIBLINGS))]
    others = rng.permutation([k for k in range(len(CLASSES)) if k not in pair])
    return rng.permutation(np.concatenate([pair, others[: n - 2]]))


def _draw_regions(rng: np.random.Generator, n: int) -> NDArray[np.uint8]:
    """[80, 80] region ids of a weighted Voronoi diagram with wobbly borders."""
    at = (np.arange(SIZE) + 0.5) / SIZE
    while True:
        # The wobble moves every pixel by a few waves before it looks for its nearest centre.
        wave = rng.uniform(4, 12, (2, 2)), rng.uniform(0, 2 * np.pi, (2, 2))
        bend = 0.025 * np.sin(wave[0][..., None] * at + wave[1][..., None]).sum(1)
        y = at[:, None] + bend[0][None, :]
        x = at[None, :] + bend[1][:, None]
        centres = rng.uniform(0.05, 0.95, (n, 2))
        weights = rng.uniform(0.0, 0.15, n)
        apart = np.hypot(*(centres[:, None] - centres[None]).transpose(2, 0, 1))
        if apart[np.triu_indices(n, 1)].min() < 0.28:
            continue
        distance = np.hypot(y - centres[:, 0, None, None], x - centres[:, 1, None, None])
        regions = (distance - weights[:, None, None]).argmin(0).astype(np.uint8)
        if all(len(_pure_cells(regions, k)) >= MIN_PURE for k in range(n)):
            return regions


def _choose_tints(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """[n, 3] shifts of colour: every region of a scene is lit by another of six tints."""
    red = np.array([1.0, -0.5, -0.5])
    hues = np.stack([sign * np.roll(red, k) for sign in (1, -1) for k in range(3)])
    return TINT * hues[rng.permutation(6)[:n]] + rng.normal(0.0, TINT_JITTER, (n, 3))


def _choose_marks(
    rng: np.random.Generator, regions: NDArray[np.uint8], region: int
) -> NDArray[np.intp]:
    """[n_marks, 2] grid cells of a region that get a digit."""
    pure = _pure_cells(regions, region)
    n_marks = max(1, round(MARK_DENSITY * len(pure)))
    return pure[rng.permutation(len(pure))[:n_marks]]


def _pure_cells(regions: NDArray[np.uint8], region: int) -> NDArray[np.intp]:
    """[n, 2] grid cells that lie in one region entirely, in raster order."""
    inside = (regions == region).reshape(GRID, CELL, GRID, CELL).all((1, 3))
    return np.argwhere(inside)


@cache
def _texture_sheets() -> NDArray[np.float64]:
    """[5, 160, 160] shading of every sibling pair, cut anew by each scene."""
    y, x = np.mgrid[: 2 * SIZE, : 2 * SIZE]
    sheets = []
    for angle, length in _WAVES:
        along = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / length
        across = (y * np.cos(angle) - x * np.sin(angle)) * 2 * np.pi / (2.3 * length)
        sheets.append(11.0 * np.sin(along + 1.5 * np.sin(across)))
    return np.stack(sheets)


@cache
def _digits(split: str) -> tuple[NDArray[np.float64], ...]:
    """Per class, the split's own handwritten samples [n, 8, 8], ink in 0..1.

    Of each digit's samples 70% go to train and 15% each to probe and test.
    """
    # takes two seconds to import, and who checks a folder of their own needs no digits
    from sklearn.datasets import load_digits

    data = load_digits()
    cut = {"train": (0.0, 0.7), "probe": (0.7, 0.85), "test": (0.85, 1.0)}[split]
    chosen = []
    for k in range(len(CLASSES)):
        samples = data.images[data.target == k] / 16.0
        # The file is ordered by writer; shuffled, so that no split is a writer's hand.
        samples = samples[np.random.default_rng([SEED, k]).permutation(len(samples))]
        low, high = (round(edge * len(samples)) for edge in cut)
        chosen.append(samples[low:high])
    return tuple(chosen)
