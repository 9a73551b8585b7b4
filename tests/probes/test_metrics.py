"""Segmentation scores against scikit-learn and against cases small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    jaccard_score,
)
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from interp.labels import IGNORE
from interp.probes import metrics as m
from interp.stats import bootstrap


@pytest.fixture
def masks():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, (6, 16, 20))
    said = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 5, truth.shape))
    truth[rng.random(truth.shape) < 0.15] = IGNORE
    truth[truth == 3] = 2  # class 3 is said but never true, class 5 neither
    return truth, said


def test_scores_equal_scikit_learn(masks):
    truth, said = masks
    keep = truth != IGNORE
    conf = m.confusion(truth, said, 6)
    assert conf.dtype == np.int64
    np.testing.assert_array_equal(conf, confusion_matrix(truth[keep], said[keep], labels=range(6)))
    assert m.accuracy(conf) == pytest.approx(accuracy_score(truth[keep], said[keep]))
    jaccard = jaccard_score(truth[keep], said[keep], labels=range(5), average=None)
    np.testing.assert_allclose(m.iou_per_class(conf)[:5], jaccard)
    assert np.isnan(m.iou_per_class(conf)[5])
    # class 3 counts (with 0): it occurs as a prediction; class 5 does not occur
    assert jaccard[3] == 0
    assert m.mean_iou(conf) == pytest.approx(jaccard.mean())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_classes=st.integers(2, 30),
    used=st.integers(1, 30),
    ignored=st.sampled_from([0.0, 0.2, 0.9]),
    right=st.sampled_from([0.0, 0.3, 1.0]),
)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_scores_equal_scikit_learn_and_torchmetrics(seed, n_classes, used, ignored, right):
    rng = np.random.default_rng(seed)
    truth = rng.choice(rng.integers(0, n_classes, used), (3, 7, 11))
    said = np.where(rng.random(truth.shape) < right, truth, rng.integers(0, n_classes, truth.shape))
    truth = np.where(rng.random(truth.shape) < ignored, IGNORE, truth)
    truth[0, 0, 0] = 0  # something is to be scored
    keep = truth != IGNORE
    flat = truth[keep], said[keep]
    conf = m.confusion(truth, said, n_classes)
    np.testing.assert_array_equal(conf, confusion_matrix(*flat, labels=range(n_classes)))
    assert m.accuracy(conf) == pytest.approx(accuracy_score(*flat))
    assert m.mean_accuracy(conf) == pytest.approx(balanced_accuracy_score(*flat))
    assert m.mean_iou(conf) == pytest.approx(jaccard_score(*flat, average="macro"))
    options = {"num_classes": n_classes, "ignore_index": IGNORE}
    pair = torch.tensor(said), torch.tensor(truth)
    for got, metric in (
        (m.mean_iou(conf), MulticlassJaccardIndex(average="macro", **options)),
        (m.accuracy(conf), MulticlassAccuracy(average="micro", **options)),
        (np.nan_to_num(m.iou_per_class(conf)), MulticlassJaccardIndex(average="none", **options)),
    ):
        for part in range(3):
            metric.update(pair[0][part : part + 1], pair[1][part : part + 1])
        np.testing.assert_allclose(got, metric.compute().numpy(), rtol=1e-6)
    # ours is over the classes that are true, torchmetrics' over those that occur
    recall = MulticlassAccuracy(average="none", **options)(*pair).double().numpy()
    true = conf.sum(1) > 0
    assert m.mean_accuracy(conf) == pytest.approx(recall[true].mean(), rel=1e-6)
    occur = true | (conf.sum(0) > 0)
    macro = MulticlassAccuracy(average="macro", **options)(*pair).item()
    assert m.mean_accuracy(conf) * true.sum() / occur.sum() == pytest.approx(macro, rel=1e-6)


def test_margins_are_what_scores_need_and_add_up(masks):
    each = m.confusion_per_image(*masks, 6)
    margins = m.margins(each)
    assert margins.shape == (6, 3, 6)
    truth, said = masks
    one = truth[0][truth[0] != IGNORE], said[0][truth[0] != IGNORE]
    for c in range(6):
        want = [((one[0] == c) & (one[1] == c)).sum(), (one[0] == c).sum(), (one[1] == c).sum()]
        assert margins[0, :, c].tolist() == want
    np.testing.assert_array_equal(margins.sum(0), m.margins(each.sum(0)))
    for score, of in (
        (m.accuracy, m.accuracy_of),
        (m.mean_accuracy, m.mean_accuracy_of),
        (m.iou_per_class, m.iou_of),
        (m.mean_iou, m.mean_iou_of),
    ):
        np.testing.assert_array_equal(score(each), of(margins))
    assert np.isnan(m.mean_accuracy(np.zeros((2, 2))))


def test_per_image_matrices_add_up_and_scores_keep_the_leading_axes(masks):
    truth, said = masks
    each = m.confusion_per_image(truth, said, 6)
    assert each.shape == (6, 6, 6)
    for i in range(6):
        np.testing.assert_array_equal(each[i], m.confusion(truth[i], said[i], 6))
    np.testing.assert_array_equal(each.sum(0), m.confusion(truth, said, 6))
    stack = np.stack([each, 2 * each])
    assert m.mean_iou(stack).shape == m.accuracy(stack).shape == (2, 6)
    np.testing.assert_allclose(m.mean_iou(stack)[1], [m.mean_iou(c) for c in each])
    iv = bootstrap(m.mean_iou, each, n_boot=200)
    assert iv.low < iv.estimate < iv.high


def test_miou_is_of_the_set_and_not_the_mean_over_images():
    # image 1 is all right; image 2 has nine pixels of class 1, all called 0
    each = np.array([[[9, 0], [0, 1]], [[0, 0], [9, 0]]])
    assert m.mean_iou(each).mean() == 0.5
    assert m.mean_iou(each.sum(0)) == pytest.approx((9 / 18 + 1 / 10) / 2)


def test_torch_and_small_integer_types_give_the_same(masks):
    truth, said = masks
    want = m.confusion(truth, said, 6)
    tensors = torch.tensor(truth).to(torch.uint8), torch.tensor(said)
    np.testing.assert_array_equal(m.confusion(*tensors, 6), want)


def test_empty_and_ignored_only_is_nan_not_zero():
    conf = m.confusion([IGNORE, IGNORE], [0, 1], 2)
    assert conf.sum() == 0
    assert np.isnan(m.accuracy(conf))
    assert np.isnan(m.mean_iou(conf))


@pytest.mark.parametrize(
    ("labels", "predictions", "error", "message"),
    [
        ([0, 3], [0, 0], ValueError, r"labels must be 0..2 .* got \[3\]"),
        ([0, -1], [0, 0], ValueError, "labels must be"),
        ([0, 1], [0, IGNORE], ValueError, r"predictions must be .* got \[255\]"),
        ([0, 1], [0], ValueError, "one shape"),
        ([0.0, 1.0], [0, 1], TypeError, "labels must be integers, got float64"),
    ],
)
def test_bad_labels_raise(labels, predictions, error, message):
    with pytest.raises(error, match=message):
        m.confusion(labels, predictions, 3)


def test_ceiling_counted_by_hand():
    mask = np.array([[[0, 0, 1, 1], [0, 1, 1, 1], [2, 2, 2, 2], [2, IGNORE, 2, 0]]])
    tokens = np.array([[[0, 1], [2, 2]]])
    # top left token says 0 and is wrong about one pixel; bottom right says 2, wrong about one
    want = [[[3, 0, 1], [1, 4, 0], [0, 0, 6]]]
    np.testing.assert_array_equal(m.ceiling_confusion(tokens, mask, 3), want)
    # a token without a label says the best it can, so the ceiling stays a ceiling
    tokens[0, 0, 0] = IGNORE
    np.testing.assert_array_equal(m.ceiling_confusion(tokens, mask, 3), want)


def test_ceiling_is_one_on_token_aligned_masks_and_beats_any_token_map():
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 4, (2, 3, 5))
    aligned = tokens.repeat(4, 1).repeat(6, 2)
    assert m.accuracy(m.ceiling_confusion(tokens, aligned, 4).sum(0)) == 1
    # an uneven size: each pixel belongs to the token that its centre lies in, as torch says
    size = (14, 33)
    want = torch.nn.functional.interpolate(
        torch.tensor(tokens)[:, None].double(), size, mode="nearest-exact"
    )[:, 0].long()
    masks = rng.integers(0, 4, (2, *size))
    np.testing.assert_array_equal(
        m.ceiling_confusion(tokens, masks, 4), m.confusion_per_image(masks, want, 4)
    )
    with pytest.raises(ValueError, match="token_labels must be"):
        m.ceiling_confusion(tokens + 4, masks, 4)
