"""A linear probe, as a scikit-learn estimator.

What a linear probe tells. A probe is a linear classifier fitted on one stage's states, with
the model frozen. If it names a token's class on images that it never saw, then the class can
be *read off linearly* at that stage: some direction in the states separates it. What it does
not tell: that the model uses that direction, or that a class it misses is absent. A stage may
hold it in a form that no hyperplane separates. Hence the controls: the majority class, the
same probe at other stages, and interventions, which alone speak of cause.

The model is multinomial logistic regression on standardised features. It is standardised
because a few features of a language model are a thousand times larger than the rest, and a
penalty on raw weights would let those through for free. The objective is scikit-learn's,

    sum_n  -log softmax(W z_n + b)[y_n]  +  1/(2C) ||W||^2        z = (x - mean) / scale

with an unpenalised b, so that numbers compare across the two libraries.

The solver, which fits the probes of many stages at once, is `interp.probes.solver`.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from interp.probes.solver import DEFAULT_C, DEFAULT_TOL, fit_logistic


class LinearProbe(ClassifierMixin, BaseEstimator):
    """One linear probe as a scikit-learn estimator, on the solver above.

    The counterpart is ``make_pipeline(StandardScaler(), LogisticRegression(C=C))``, with the
    scaling folded back: `coef_` [K, d] and `intercept_` [K] act on raw features (one row for
    two classes, as in scikit-learn). `C` defaults to scikit-learn's 1.0. The losses are summed,
    so the penalty fades as tokens are added: a value that suits 2,000 tokens (0.3 to 1 on
    simulated and digit data; below 0.03 probes underfit) is mild for 60,000. Choose it on
    held-out images, once, for all stages. Rows labelled `ignore_label` are dropped.

    Learned: `classes_`, `coef_`, `intercept_`, `mean_`, `scale_`, `n_iter_`, `n_features_in_`.
    A fit that stops at `max_iter` gives scikit-learn's `ConvergenceWarning`.

    >>> probe = LinearProbe().fit([[0.0], [1.0], [2.0], [3.0]], ["sky", "sky", "sea", "sea"])
    >>> probe.predict([[-1.0], [4.0]]).tolist()
    ['sky', 'sea']
    """

    classes_: NDArray[Any]
    coef_: NDArray[np.floating]
    intercept_: NDArray[np.floating]
    mean_: NDArray[np.floating]
    scale_: NDArray[np.floating]
    n_iter_: int
    n_features_in_: int

    def __init__(
        self,
        C: float = DEFAULT_C,
        max_iter: int = 500,
        tol: float = DEFAULT_TOL,
        ignore_label: int | None = None,
    ) -> None:
        self.C = C
        self.max_iter = max_iter
        self.tol = tol
        self.ignore_label = ignore_label

    def fit(self, X: ArrayLike, y: ArrayLike) -> LinearProbe:
        """Fit on `X` [n_samples, d] and labels `y` [n_samples] of any type scikit-learn takes."""
        data, target = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(target)
        if self.ignore_label is not None:
            keep = target != self.ignore_label
            data, target = data[keep], target[keep]
        self.classes_, codes = np.unique(target, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"a probe needs at least two classes, the labels hold {self.classes_.tolist()}: "
                "only one class or none"
            )
        found = fit_logistic(
            torch.tensor(data)[None],
            torch.from_numpy(codes),
            len(self.classes_),
            C=self.C,
            max_iter=self.max_iter,
            tol=self.tol,
            overwrite=True,
        )
        weight, intercept = found.weight[0].numpy(), found.intercept[0].numpy()
        if len(self.classes_) == 2:
            weight, intercept = weight[1:] - weight[:1], intercept[1:] - intercept[:1]
        self.coef_, self.intercept_ = weight, intercept
        self.mean_, self.scale_ = found.mean[0].numpy(), found.scale[0].numpy()
        self.n_iter_ = int(found.n_iter[0])
        if not bool(found.converged[0]):
            warnings.warn(
                f"the probe stopped after max_iter={self.max_iter} steps with a mean gradient of "
                f"{float(found.gradient[0]):.1e} > tol={self.tol:.1e}: raise max_iter or lower C",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.floating]:
        """Logits [n_samples, K]; for two classes the one logit of the second, [n_samples]."""
        check_is_fitted(self)
        data = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        scores: NDArray[np.floating] = data @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The class of each row, [n_samples]; ties go to the class that sorts first."""
        scores = self.decision_function(X)
        index = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)
        labels: NDArray[Any] = self.classes_[index]
        return labels

    def predict_proba(self, X: ArrayLike) -> NDArray[np.floating]:
        """Probabilities [n_samples, K] in the order of `classes_`."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            scores = np.stack([np.zeros_like(scores), scores], 1)
        probabilities: NDArray[np.floating] = softmax(scores, axis=1)
        return probabilities
