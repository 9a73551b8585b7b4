"""Sums of shards: against NumPy in float64, and to the same bytes in any order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.probes.moments import Frame, Moments, Pile
from interp.probes.stream import Tokens


def tokens(n: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tokens, Tensor]:
    """Features with means a thousand times their spread, and soft targets of 3 classes."""
    rng = np.random.default_rng(seed)
    features = {
        name: torch.from_numpy(rng.normal(1000.0, 1.0, (n, d)) * [10.0**k for k in range(d)])
        for name, d in (("thin", 3), ("wide", 5))
    }
    shares = torch.from_numpy(rng.dirichlet(np.ones(3), n))
    states = {name: x.to(dtype) for name, x in features.items()}
    return Tokens(states, shares.argmax(1), shares.float()), shares


def of(n: int = 40, seed: int = 0, frame: Frame | None = None, **options: bool) -> Moments:
    made, shares = tokens(n, seed, torch.float64)
    return Moments.of(made, shares, frame or Frame.of(made), **options)


def same(a: Moments, b: Moments) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("precise", [False, True])
def test_sums_are_numpys_in_float64(precise):
    made, shares = tokens(500, 1)
    weights = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    frame = Frame.of(made)
    found = Moments.of(made, shares, frame, weights=weights, precise=precise)
    w, y = weights.numpy(), shares.numpy()
    tolerance = 1e-12 if precise else 2e-6
    for stage, x in made.features.items():
        z = (x.double() - frame.shift[stage]) / frame.unit[stage]
        z = z.numpy()
        scale = np.sqrt(np.outer((w[:, None] * z * z).sum(0), (w[:, None] * z * z).sum(0)))
        np.testing.assert_array_less(
            np.abs(found.xx[stage].numpy() - z.T @ (w[:, None] * z)) / scale, tolerance
        )
        np.testing.assert_allclose(found.xy[stage], z.T @ (w[:, None] * y), atol=tolerance * 500)
        np.testing.assert_allclose(found.x[stage], w @ z, atol=tolerance * 500)
    np.testing.assert_allclose(found.y, w @ y, rtol=1e-6)
    np.testing.assert_allclose(found.yy, w @ y**2, rtol=1e-6)
    assert found.n.tolist() == pytest.approx([w.sum(), 500])


def test_means_of_a_billion_are_taken_off_before_float64_becomes_float32():
    rng = np.random.default_rng(0)
    centred = rng.normal(size=(500, 4)).round(6)
    centred = np.round(centred * 2**20) / 2**20  # so that adding a billion rounds nothing
    shares = torch.from_numpy(rng.dirichlet(np.ones(3), 500))
    made = Tokens({"a": torch.from_numpy(centred + 1e9)}, shares.argmax(1))
    frame = Frame.of(made)
    found = Moments.of(made, shares, frame, precise=False)
    unit = frame.unit["a"].numpy()
    z = (centred - (frame.shift["a"].numpy() - 1e9)) / unit
    np.testing.assert_allclose(found.xx["a"], z.T @ z, atol=1e-5 * 500)
    np.testing.assert_allclose(found.xy["a"], z.T @ shares.numpy(), atol=1e-5 * 500)
    np.testing.assert_allclose(found.x["a"], z.sum(0), atol=1e-5 * 500)


def test_units_are_powers_of_two_near_the_spread_and_constants_get_one():
    x = torch.tensor([[3.0, 7.0], [5.0, 7.0], [1.0, 7.0]])
    frame = Frame.of(Tokens({"a": x}, torch.zeros(3, dtype=torch.int64)))
    assert frame.shift["a"].tolist() == [3, 7]
    assert frame.unit["a"].tolist() == [2, 1]  # spread 1.63, and none


@pytest.mark.parametrize("n_shards", [1, 2, 3, 5, 6, 7, 8, 11])
def test_a_piles_total_has_the_same_bytes_in_any_order(n_shards):
    frame = Frame.of(tokens(40, 0)[0])
    shards = [of(20 + s, s, frame, precise=True) for s in range(n_shards)]
    rng = np.random.default_rng(0)
    totals = []
    for trial in range(6):
        order = rng.permutation(n_shards) if trial else range(n_shards)
        piles = [Pile(n_shards) for _ in range(3)]
        for shard in order:
            piles[rng.integers(3) if trial else 0].add(int(shard), shards[shard])
        first, *rest = [piles[i] for i in rng.permutation(3)]
        for pile in rest:
            first.merge(pile)
        totals.append(first.total())
    assert all(same(totals[0], total) for total in totals)
    plain = shards[0]
    for shard in shards[1:]:
        plain = plain + shard
    for mine, theirs in zip(totals[0].tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-9)


def test_order_matters_to_plain_sums_so_the_test_above_can_fail():
    frame = Frame.of(tokens(40, 0)[0])
    # sums of float32 products are often exact in float64; these are not
    shards = [of(20 + s, s, frame, precise=True) for s in range(7)]
    plain = {
        sum(order[1:], start=order[0]).xx["wide"].numpy().tobytes()
        for order in itertools.islice(itertools.permutations(shards), 200)
    }
    assert len(plain) > 1


def test_at_most_one_node_a_level_waits_when_shards_come_in_order():
    frame = Frame.of(tokens(40, 0)[0])
    shard, pile = of(10, 0, frame), Pile(64)
    most = 0
    for number in range(64):
        pile.add(number, shard)
        most = max(most, len(list(pile.nodes())))
    assert most == 6


def test_shards_that_are_missing_or_come_twice_are_named():
    frame = Frame.of(tokens(40, 0)[0])
    pile, shard = Pile(6), of(10, 0, frame)
    for number in (0, 1, 4):
        pile.add(number, shard)
    assert pile.shards == {0, 1, 4}
    with pytest.raises(ValueError, match="3 of 6 shards are missing: 2, 3, 5"):
        pile.total()
    with pytest.raises(ValueError, match=r"shards \[1\] are in the pile already"):
        pile.add(1, shard)
    with pytest.raises(ValueError, match="shard 6 of 6"):
        pile.add(6, shard)
    with pytest.raises(ValueError, match="piles of 6 and of 7 shards"):
        pile.merge(Pile(7))


def test_sums_of_different_frames_do_not_add_up():
    with pytest.raises(ValueError, match="different frames"):
        of(10, 0) + of(10, 1)


def test_what_is_not_finite_is_refused_with_its_stage():
    made, shares = tokens(10, 0)
    frame = Frame.of(made)
    made.features["wide"][3, 2] = torch.nan
    with pytest.raises(ValueError, match="stage 'wide' holds nan"):
        Moments.of(made, shares, frame)
    with pytest.raises(ValueError, match="stage 'wide' holds nan"):
        Frame.of(made)
