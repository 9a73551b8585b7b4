"""Linear probes for all stages at once, and the segmentation scores they are judged by.

A *stage* is a place in the model whose states are read: a vision layer, the adapter's output,
a layer of the language model. The question of this room is "what could be read off there?",
asked of every stage with the same ruler.

- `linear`: what a linear probe is (`LinearProbe`, a scikit-learn estimator).
- `solver`: `fit_logistic`, which fits the probes of all stages together.
- `bank`: `ProbeBank`, one probe a stage, frozen after fitting; logits, verdicts, and the
  directions that attribution needs.
- `metrics`: confusion matrices, accuracy, mIoU over tokens and over pixels, the floor (always
  the most frequent class) and the ceiling (perfect token labels).

Scores are sums over images, kept apart by image, so that `interp.stats.bootstrap` can put an
interval round any of them.
"""

from interp.probes.bank import ProbeBank
from interp.probes.linear import LinearProbe
from interp.probes.metrics import (
    accuracy,
    ceiling_confusion,
    confusion,
    confusion_per_image,
    iou_per_class,
    majority_floor,
    mean_iou,
    pixel_confusion,
    pixel_logits,
)
from interp.probes.solver import LogisticFit, fit_logistic

__all__ = [
    "LinearProbe",
    "LogisticFit",
    "ProbeBank",
    "accuracy",
    "ceiling_confusion",
    "confusion",
    "confusion_per_image",
    "fit_logistic",
    "iou_per_class",
    "majority_floor",
    "mean_iou",
    "pixel_confusion",
    "pixel_logits",
]
