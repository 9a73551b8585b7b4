"""What a token counts by its class, so that rare classes are heard."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from interp.probes.stream import TokenStream, label_counts
from interp.world import World

#: "balanced", class name -> weight, or None
ClassWeight = Mapping[str, float] | str | None


def class_weights(
    stream: TokenStream, class_weight: ClassWeight, world: World | None = None
) -> Tensor | None:
    """`[K]` float64 weights of tokens by class, or None.

    Raises:
        ValueError: a class that there is not, or a weight that is not positive.
    """
    if class_weight is None:
        return None
    if class_weight == "balanced":
        counts = label_counts(stream, world)
        # as scikit-learn's "balanced", among the classes that occur
        weights: Tensor = torch.where(
            counts > 0, counts.sum() / ((counts > 0).sum() * counts.clamp_min(1e-9)), 0.0
        )
        return weights
    if isinstance(class_weight, str):
        raise ValueError(f'class_weight={class_weight!r}; "balanced", a dict or None would do')
    if unknown := sorted(set(class_weight) - set(stream.classes)):
        raise ValueError(f"class_weight names {', '.join(unknown)}, which are no classes here")
    made = torch.tensor([class_weight.get(c, 1.0) for c in stream.classes], dtype=torch.float64)
    if not bool((made > 0).all()):
        raise ValueError("class weights are positive; drop a class by labelling it IGNORE")
    return made
