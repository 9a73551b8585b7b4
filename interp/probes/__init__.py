"""Linear probes for all stages at once, and the segmentation scores they are judged by.

A *stage* is a place in the model whose states are read: a vision layer, the adapter's output,
a layer of the language model. The question of this room is "what could be read off there?",
asked of every stage with the same ruler.

What is read:

- `parts`: pictures prepared for a model, batch by batch, with labels of their image tokens;
- `reading`: `ModelStream`, which runs a model over them; `stream`: what a solver asks of it.

How a probe is fitted:

- `linear`: what a linear probe is (`LinearProbe`, a scikit-learn estimator);
- `fitting`: `Fitting`, two solvers behind one word;
- `moments`, `ridge`: sums that are all least squares needs; probes from them in one pass
  (`weighting`: what a token counts by its class);
- `solver`, `source`, `store`, `streamed`: logistic probes in memory, from disk, from a stream;
- `bank`: `ProbeBank`, one probe a stage, frozen after fitting; logits, verdicts, and the
  directions that attribution needs.

How it is judged:

- `metrics`: confusion matrices, accuracy, mIoU over tokens and over pixels, floor and ceiling;
- `scores`: `Scores` of all stages while pictures pass, with intervals over pictures (`poisson`), by
  groups of tokens (`groups`) and over pixels (`painting`); `scoring` runs the pass.
"""

from interp.probes.bank import ProbeBank
from interp.probes.fitting import Fitted, Fitting
from interp.probes.linear import LinearProbe
from interp.probes.metrics import (
    accuracy,
    confusion,
    confusion_per_image,
    iou_per_class,
    mean_accuracy,
    mean_iou,
)
from interp.probes.painting import pixel_classes
from interp.probes.ridge import fit_ridge
from interp.probes.scores import CEILING, FLOOR, Scores
from interp.probes.solver import LogisticFit, fit_logistic
from interp.probes.store import bytes_needed, where_features_go
from interp.probes.stream import Held, Tokens, TokenStream
from interp.probes.streamed import fit_logistic_stream

__all__ = [
    "CEILING",
    "FLOOR",
    "Fitted",
    "Fitting",
    "Held",
    "LinearProbe",
    "LogisticFit",
    "ProbeBank",
    "Scores",
    "TokenStream",
    "Tokens",
    "accuracy",
    "bytes_needed",
    "confusion",
    "confusion_per_image",
    "fit_logistic",
    "fit_logistic_stream",
    "fit_ridge",
    "iou_per_class",
    "mean_accuracy",
    "mean_iou",
    "pixel_classes",
    "where_features_go",
]
