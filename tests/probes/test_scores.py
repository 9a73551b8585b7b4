"""Scores of a stream against those of everything at once, by scikit-learn and by plain loops."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from scipy.stats import binom, chisquare, poisson
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, jaccard_score

from interp.errors import Untestable
from interp.labels import IGNORE
from interp.probes import metrics
from interp.probes.groups import GROUPS, position_bins, token_groups
from interp.probes.metrics import ceiling_confusion, confusion
from interp.probes.painting import pixel_classes
from interp.probes.poisson import fingerprint, poisson_weights
from interp.probes.scores import CEILING, FLOOR, METRICS, Scores
from interp.stats import bootstrap
from tests.probes.lattices import grid_of, lattice, whole

K = 6
STAGES = ("vision", "adapter", "block")
CLASSES = ("sky", "sea", "sand", "ship", "gull", "never")
OPTIONS = {"n_boot": 40, "shape": (4, 6), "pixels": True, "majority": 1}


def picture(number):
    """Name, (size, views), labels, logits of three stages, mask. Some are cut at the sides."""
    rng = np.random.default_rng(number)
    size, shape = ((26, 17), (4, 6)) if number % 3 else ((20, 31), (5, 3))
    box = (3, 0, size[0] - 2, size[1]) if number % 2 else (0, 0, *size)
    mask = rng.integers(0, K - 1, (4, 4)).repeat(8, 0).repeat(8, 1)[: size[1], : size[0]]
    mask = np.where(rng.random(mask.shape) < 0.1, IGNORE, mask)
    views = [("base", shape, lattice(shape, box))]
    grid = grid_of((size, views))
    labels = grid.labels(mask, K, pure=0.5)
    right = np.where(labels == IGNORE, 0, labels)
    logits = [rng.normal(size=(len(grid), K)) + s * np.eye(K)[right] for s in (0.5, 0, 3)]
    return f"{number:04}.jpg", (size, views), labels, np.stack(logits).astype(np.float32), mask


PICTURES = [picture(i) for i in range(12)]


def feed(scores, numbers, batch=3):
    for start in range(0, len(numbers), batch):
        names, views, labels, logits, masks = zip(
            *(PICTURES[i] for i in numbers[start : start + batch]), strict=True
        )
        said = dict(zip(STAGES, torch.tensor(np.concatenate(logits, 1)), strict=True))
        at = np.concatenate(labels)
        scores.update(names, grid_of(*views), at, said, masks=list(masks))
    return scores


@pytest.fixture(scope="module")
def scores():
    return feed(Scores(STAGES, CLASSES, **OPTIONS), range(12))


def together(stage, group="all"):
    """Labels and answers of all labelled tokens of a group, put in a row without `Scores`."""
    truth, said = [], []
    for _, views, labels, logits, _ in PICTURES:
        rows, cols = views[1][0][1]
        for i, label in enumerate(labels):
            r, c = divmod(i, cols)
            beside = [
                labels[y * cols + x]
                for y, x in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
                if 0 <= y < rows and 0 <= x < cols
            ]
            edge = any(other not in (label, IGNORE) for other in beside)
            third = 3 * i // len(labels)
            which = {"all", "boundary" if edge else "interior", GROUPS[2 + third]}
            if label != IGNORE and group in which:
                truth.append(label)
                said.append(logits[STAGES.index(stage), i].argmax())
    return np.array(truth), np.array(said)


def bytes_of(scores):
    return hashlib.sha256(save(scores.state())).hexdigest()


def row(table, stage, metric, unit="token", group="all"):
    at = (table.stage == stage) & (table.metric == metric) & (table.unit == unit)
    found = table[at & (table.group == group)]
    assert len(found) == 1
    return found.iloc[0]


# -- estimates ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("group", ["all", *GROUPS])
def test_token_scores_are_scikit_learns_on_all_tokens_at_once(scores, group):
    table = scores.table()
    for stage in STAGES:
        truth, said = together(stage, group)
        assert len(truth) > 20
        want = {
            "accuracy": (truth == said).mean(),
            "mean_accuracy": balanced_accuracy_score(truth, said),
            "miou": jaccard_score(truth, said, average="macro"),
        }
        for metric, value in want.items():
            got = row(table, stage, metric, group=group)
            assert got.estimate == pytest.approx(value)
            assert got.n == len(truth)
        each = scores.per_class(stage, group=group)
        assert each.true.tolist() == np.bincount(truth, minlength=K).tolist()
        assert each.said.tolist() == np.bincount(said, minlength=K).tolist()
        occurs = np.union1d(truth, said)
        np.testing.assert_allclose(
            each.iou[occurs], jaccard_score(truth, said, labels=occurs, average=None)
        )
    np.testing.assert_array_equal(
        scores.confusion("adapter"), confusion_matrix(*together("adapter"), labels=range(K))
    )


def test_pixel_scores_are_those_of_the_painted_pictures(scores):
    total, unseen, labelled = np.zeros((K, K), int), 0, 0
    ceiling = np.zeros((K, K), int)
    for _, views, labels, logits, mask in PICTURES:
        said = pixel_classes(torch.tensor(logits[2]), grid_of(views)).numpy()
        total += confusion(
            np.where(said == IGNORE, IGNORE, mask), np.where(said == IGNORE, 0, said), K
        )
        unseen += ((said == IGNORE) & (mask != IGNORE)).sum()
        labelled += (mask != IGNORE).sum()
        seen = (said != IGNORE).any(0)  # what is cut off here are columns
        shape = views[1][0][1]
        ceiling += ceiling_confusion(labels.reshape(1, *shape), mask[None, :, seen], K)[0]
    np.testing.assert_array_equal(scores.confusion("block", "pixel"), total)
    np.testing.assert_array_equal(scores.confusion(CEILING, "pixel"), ceiling)
    assert 0 < scores.unseen == pytest.approx(unseen / labelled)
    table = scores.table()
    assert row(table, "block", "miou", "pixel").estimate == pytest.approx(metrics.mean_iou(total))
    assert row(table, CEILING, "miou", "pixel").n == labelled - unseen


def test_the_floor_says_one_class(scores):
    truth, _ = together("block", "late")
    got = row(scores.table(), FLOOR, "accuracy", group="late")
    assert got.estimate == pytest.approx((truth == 1).mean())
    pixels = scores.confusion(FLOOR, "pixel")
    np.testing.assert_array_equal(pixels.sum(1), scores.confusion("block", "pixel").sum(1))
    assert pixels.sum() == pixels[:, 1].sum()


def test_positions_are_cells_and_other_grids_go_where_their_centres_lie(scores):
    right, counted = np.zeros((2, 4, 6))
    for _, views, labels, logits, _ in PICTURES:
        rows, cols = views[1][0][1]
        for i, label in enumerate(labels):
            r, c = divmod(i, cols)
            at = int((r + 0.5) / rows * 4), int((c + 0.5) / cols * 6)
            counted[at] += label != IGNORE
            right[at] += label == logits[1, i].argmax()
    np.testing.assert_allclose(scores.per_position("adapter"), right / counted)
    alone = Scores(["a"], CLASSES, n_boot=0, shape=(3, 3))
    alone.update(
        ["x"], grid_of(whole((3, 3), (9, 9))), [0] * 4 + [IGNORE] * 5, {"a": [0, 1] * 4 + [0]}
    )
    want = [[1, 0, 1], [0, np.nan, np.nan], [np.nan] * 3]
    np.testing.assert_array_equal(alone.per_position("a"), want)


def test_groups_by_hand():
    grid = grid_of(whole((3, 4), (40, 30)))
    labels = np.array([[0, 0, 0, 1], [0, 0, 0, 1], [IGNORE, 0, 0, 0]]).ravel()
    groups = token_groups(grid, labels)
    want = [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]  # no label is no other label
    np.testing.assert_array_equal(groups["boundary"].reshape(3, 4), np.array(want, bool))
    np.testing.assert_array_equal(groups["interior"], ~groups["boundary"])
    assert groups["middle"].nonzero()[0].tolist() == [4, 5, 6, 7]
    purity = np.ones(12)
    purity[4] = 0.99
    assert (token_groups(grid, labels, purity)["boundary"] != groups["boundary"]).nonzero()[0] == 4
    with pytest.raises(ValueError, match=r"labels of shape \[11\] for 12 tokens"):
        token_groups(grid, labels[1:])


def test_neighbours_and_thirds_are_of_one_view():
    views = [(name, (1, 3), lattice((1, 3), (0, 0, 9, 3))) for name in ("base", "tiles")]
    grid = grid_of(((9, 3), views), whole((3, 1), (3, 9)))
    groups = token_groups(grid, [0, 0, 0, 1, 1, 1, 2, 2, 3])
    assert groups["boundary"].astype(int).tolist() == [0] * 7 + [1, 1]
    assert groups["early"].nonzero()[0].tolist() == [0, 3, 6]
    assert position_bins(grid, (3, 3)).tolist() == [3, 4, 5, 3, 4, 5, 1, 4, 7]


# -- sums -----------------------------------------------------------------------------------------


def test_any_order_any_batches_and_any_split_give_the_same_bytes(scores):
    want = bytes_of(scores)
    rng = np.random.default_rng(0)
    for batch in (1, 2, 5, 12):
        order = rng.permutation(12)
        assert bytes_of(feed(Scores(STAGES, CLASSES, **OPTIONS), order, batch)) == want
        cuts = sorted(rng.integers(0, 13, 2))
        parts = [
            feed(Scores(STAGES, CLASSES, **OPTIONS), order[a:b], batch)
            for a, b in pairwise([0, *cuts, 12])
        ]
        one, two, three = (parts[i] for i in rng.permutation(3))
        assert bytes_of(one + (two + three)) == want
        assert bytes_of(one) != want  # a sum is new
        assert bytes_of(three.merge(one).merge(two)) == want
    assert bytes_of(feed(Scores(STAGES, CLASSES, **OPTIONS), range(11))) != want
    # summed in place, as all_reduce does it
    a, b = (feed(Scores(STAGES, CLASSES, **OPTIONS), at) for at in (range(5), range(5, 12)))
    for mine, its in zip(a.state().values(), b.state().values(), strict=True):
        mine += its
    assert bytes_of(a) == want
    a.table()  # and can be read


def test_replicates_are_sums_of_pictures_as_often_as_drawn(scores, monkeypatch):
    weights = poisson_weights([p[0] for p in PICTURES], 40)
    for draw in (0, 17, 39):
        again = np.repeat(np.arange(12), weights[:, draw])
        drawn = feed(Scores(STAGES, CLASSES, **{**OPTIONS, "n_boot": 0}), again.tolist(), 1)
        for stage in STAGES:
            for unit in ("token", "pixel"):
                for metric in METRICS:
                    _, draws = scores._values(stage, metric, unit, "all")
                    want, _ = drawn._values(stage, metric, unit, "all")
                    assert draws[draw] == pytest.approx(want, nan_ok=True)
            _, draws = scores._values(stage, "accuracy", "token", "boundary")
            assert draws[draw] == pytest.approx(
                drawn._values(stage, "accuracy", "token", "boundary")[0]
            )
    want = bytes_of(scores)
    monkeypatch.setattr("interp.probes.counting._HELD", 2)
    monkeypatch.setattr("interp.probes.counting._BLOCK", 1)
    assert bytes_of(feed(Scores(STAGES, CLASSES, **OPTIONS), range(12))) == want


def test_memory_does_not_grow_and_is_what_is_said():
    scores = Scores(STAGES, CLASSES, **OPTIONS)
    before = scores.nbytes
    feed(scores, range(12))
    assert before == scores.nbytes == sum(t.nbytes for t in scores.state().values())
    # 4 token rows, 5 pixel rows, and of five groups what accuracy needs
    numbers = sum(t.numel() for key, t in scores.state().items() if key.endswith("replicates"))
    assert numbers == 40 * (9 * K + 11 * K + 5 * 5)


def test_groups_keep_all_replicates_if_asked():
    full = feed(Scores(STAGES, CLASSES, **OPTIONS, group_intervals=True), range(12)).table()
    part = feed(Scores(STAGES, CLASSES, **OPTIONS), range(12)).table()
    known = part.low.notna()
    assert known.mean() < full.low.notna().mean() == 1
    assert full[known].equals(part[known])
    assert set(part[~known].metric) == {"mean_accuracy", "miou"}
    assert (full.estimate == part.estimate).all()


def test_a_state_travels_and_is_checked(scores):
    options = json.loads(json.dumps(scores.options()))
    again = Scores.from_state(load(save(scores.state())), **options)
    assert bytes_of(again) == bytes_of(scores)
    assert again.table().equals(scores.table())
    feed(again, [3])
    assert bytes_of(again) != bytes_of(scores)  # a copy
    state = scores.state()
    with pytest.raises(ValueError, match="7 tensors differ, the first is pixel/all/rep"):
        Scores.from_state(state, **{**options, "n_boot": 41})
    with pytest.raises(ValueError, match="1 tensors differ, the first is pictures"):
        Scores.from_state({**state, "pictures": state["pictures"].int()}, **options)


def test_scores_that_differ_do_not_add_up(scores):
    for change in ({"seed": 1}, {"n_boot": 3}, {"shape": (2, 2)}, {"majority": 2}):
        with pytest.raises(ValueError, match=f"if they differ: {next(iter(change))}"):
            scores + Scores(STAGES, CLASSES, **{**OPTIONS, **change})
    with pytest.raises(ValueError, match="if they differ: stages"):
        scores + Scores(STAGES[::-1], CLASSES, **OPTIONS)


def test_pictures_missing_or_twice_are_found(scores):
    names = [p[0] for p in PICTURES]
    scores.check(reversed(names))
    assert scores.n_images == 12
    for wrong in (names[1:], [*names, names[0]], [names[1], *names[1:]]):
        with pytest.raises(ValueError, match="12 pictures were scored"):
            scores.check(wrong)
    assert fingerprint(["a"])[1] != fingerprint(["b"])[1]


# -- intervals ------------------------------------------------------------------------------------


def test_weights_are_poisson_independent_and_the_names_own():
    weights = poisson_weights([f"{i}.png" for i in range(400)], 500)
    seen = np.bincount(np.minimum(weights, 5).ravel())
    odds = np.append(poisson.pmf(range(5), 1), poisson.sf(4, 1))
    assert chisquare(seen, odds * weights.size).pvalue > 0.001
    assert abs(np.corrcoef(weights)[np.triu_indices(400, 1)]).max() < 6 / np.sqrt(500)
    assert abs(np.corrcoef(weights.T)[np.triu_indices(500, 1)]).max() < 6 / np.sqrt(400)
    again = poisson_weights(["7.png", "b"], 300)
    np.testing.assert_array_equal(again[0], weights[7, :300])
    assert (poisson_weights(["7.png"], 300, seed=1) != again[0]).mean() > 0.5


def simulated(rng, n, bias=0.0):
    """Labels and answers [n, 40] of pictures that differ in classes and in how hard they are."""
    main = rng.integers(0, K, (n, 1))
    truth = np.where(rng.random((n, 40)) < 0.6, main, rng.integers(0, K, (n, 40)))
    hard = rng.beta(2, 2, (n, 1))
    right = rng.random((n, 40)) < 0.3 + 0.6 * hard + bias
    return truth, np.where(right, truth, rng.integers(0, K, (n, 40)))


def stream(truth, *said, n_boot, seed=0):
    """Scores of stages 0, 1, ... whose pictures are lines of 40 tokens."""
    stages = [str(i) for i in range(len(said))]
    scores = Scores(stages, CLASSES, n_boot=n_boot, seed=seed, shape=(1, 40))
    grid = grid_of(*[whole((1, 40), (40, 1))] * len(truth))
    answers = dict(zip(stages, map(np.ravel, said), strict=True))
    scores.update([str(i) for i in range(len(truth))], grid, truth.ravel(), answers)
    return scores


def test_intervals_agree_with_the_bootstrap_that_holds_all_images():
    # An end from B draws has the Monte Carlo error sqrt(p (1 - p) / B) / density = 2.67 / sqrt(B)
    # standard errors at p = 2.5 %. Of a difference of two ends, sqrt(2) times that; four of those.
    n_boot = 4000
    tolerance = 4 * np.sqrt(2) * 2.67 / np.sqrt(n_boot)
    truth, said = simulated(np.random.default_rng(0), 300)
    _, better = simulated(np.random.default_rng(0), 300, bias=0.05)
    scores = stream(truth, said, better, n_boot=n_boot)
    one, two = (metrics.confusion_per_image(truth, x, K) for x in (said, better))
    functions = {
        "accuracy": metrics.accuracy,
        "mean_accuracy": metrics.mean_accuracy,
        "miou": metrics.mean_iou,
    }
    for metric, score in functions.items():
        pairs = [
            (scores.interval("0", metric), bootstrap(score, one, n_boot=n_boot)),
            (
                scores.difference("1", "0", metric),
                bootstrap(lambda a, b, s=score: s(b) - s(a), one, two, n_boot=n_boot),
            ),
        ]
        for got, want in pairs:
            error = (want.high - want.low) / (2 * 1.96)
            assert got.estimate == pytest.approx(want.estimate)
            assert abs(got.low - want.low) < tolerance * error
            assert abs(got.high - want.high) < tolerance * error
        (alone, _), (paired, _) = pairs
        assert paired.high - paired.low < 0.8 * (alone.high - alone.low)
    # another run of the same pictures is paired as another stage is
    other = stream(truth, better, n_boot=n_boot)
    assert other.difference("0", "0", other=scores) == scores.difference("1", "0")


def test_an_interval_holds_the_truth_as_often_as_it_says():
    population = simulated(np.random.default_rng(10), 20_000)
    whole_set = confusion(*population, K)
    held = dict.fromkeys(("accuracy", "miou"), 0)
    for repeat in range(200):
        rng = np.random.default_rng(1000 + repeat)
        truth, said = simulated(rng, 60)
        scores = stream(truth, said, n_boot=300, seed=repeat)
        for metric, score in (("accuracy", metrics.accuracy), ("miou", metrics.mean_iou)):
            held[metric] += not scores.interval("0", metric).excludes(float(score(whole_set)))
    for n in held.values():  # 90 .. 99 %, which an honest 95 % interval leaves once in 500 times
        assert 180 <= n <= 198
    assert binom.cdf(179, 200, 0.95) + binom.sf(198, 200, 0.95) < 0.01


def test_where_there_is_no_interval_there_is_none(scores):
    one = stream(*(x[:1] for x in simulated(np.random.default_rng(0), 5)), n_boot=50)
    none = stream(*simulated(np.random.default_rng(0), 5), n_boot=0)
    for lacking in (one, none):
        with pytest.raises(Untestable, match="too few pictures"):
            lacking.interval("0")
        table = lacking.table()
        assert table.low.isna().all()
        assert table[table.group == "all"].estimate.notna().all()
    with pytest.raises(Untestable):
        scores.interval("block", "miou", group="early")
    with pytest.raises(ValueError, match="same pictures"):
        scores.difference("block", "block", other=feed(Scores(STAGES, CLASSES, **OPTIONS), [0]))


# -- what is refused ------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_and_leaves_no_trace():
    grid, labels = grid_of(whole((1, 2), (4, 2))), [0, 1]
    good, mask = {"a": torch.eye(6)[:2]}, np.zeros((2, 4), int)
    scores = Scores(["a"], CLASSES, n_boot=3, pixels=True)
    empty = bytes_of(scores)
    bad = torch.eye(6)[:2].clone()
    bad[0, 0] = torch.nan
    cases = [
        ("1 names.* 2 pictures", (["x"], grid_of(*[whole((1, 1), (4, 2))] * 2), labels, good), {}),
        ("one a picture", (["x"], grid, labels, good), {"masks": None}),
        ("labels of shape", (["x"], grid, [0], good), {}),
        ("not both: a, b", (["x"], grid, labels, {"b": good["a"]}), {}),
        ("original picture's size", (["x"], grid, labels, good), {"masks": [mask.T]}),
        (r"pixels need logits", (["x"], grid, labels, {"a": [0, 1]}), {}),
        (r"logits \[2, 6\] are due", (["x"], grid, labels, {"a": torch.eye(7)[:2]}), {}),
        ("not all finite", (["x"], grid, labels, {"a": bad}), {}),
        (r"labels must be 0\.\.5", (["x"], grid, [0, 6], good), {}),
        (r"masks must be 0\.\.5", (["x"], grid, labels, good), {"masks": [mask + 7]}),
        ("purities of shape", (["x"], grid, labels, good), {"purity": [1.0]}),
    ]
    for match, args, options in cases:
        with pytest.raises(ValueError, match=match):
            scores.update(*args, **{"masks": [mask], **options})
    with pytest.raises(ValueError, match="2 names, 1 of them different"):
        scores.update(
            ["x", "x"], grid_of(*[whole((1, 1), (4, 2))] * 2), labels, good, masks=[mask] * 2
        )
    assert bytes_of(scores) == empty
    plain = Scores(["a"], CLASSES)
    with pytest.raises(ValueError, match="pixels=True"):
        plain.update(["x"], grid, labels, good, masks=[mask])
    with pytest.raises(ValueError, match=r"predictions must be 0\.\.5"):
        plain.update(["x"], grid, labels, {"a": [0, 9]})
    for match, ask in (
        ("pixel.*pixels=True", lambda: plain.confusion("a", "pixel")),
        ("no token row 'b'", lambda: plain.per_position("b")),
        ("metric='mIoU'", lambda: plain.interval("a", "mIoU")),
        ("group='edge'", lambda: plain.per_class("a", group="edge")),
        ("a pixel has all", lambda: scores.per_class("a", "pixel", "late")),
        ("0 < level < 1", lambda: plain.interval("a", level=95)),
    ):
        with pytest.raises(ValueError, match=match):
            ask()


@pytest.mark.parametrize(
    ("args", "options", "match"),
    [
        ((["a", "a"], CLASSES), {}, "stages are names"),
        ((["a"], []), {}, "classes are names"),
        ((["a", CEILING], CLASSES), {}, "reference row"),
        ((["a"], CLASSES), {"majority": 6}, "majority=6 of 6"),
        ((["a"], CLASSES), {"n_boot": -1}, "too small"),
        ((["a"], [str(i) for i in range(256)]), {}, "label of none"),
    ],
)
def test_scores_of_nonsense_are_not_made(args, options, match):
    with pytest.raises(ValueError, match=match):
        Scores(*args, **options)
