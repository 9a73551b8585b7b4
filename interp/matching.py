"""Matched controls: which candidates stand in for a set of attention edges.

Cutting edges hurts, whatever they carry: the attention that is left is spread anew. So an effect
counts only beside that of as many *other* edges of the same queries, and how like the others must
be is a question of what one wants to rule out:

* `by_count` - that so many edges were cut at all: as many a query, at random;
* `by_distance` - that near (or far) edges were cut: a query's control lies as far from it as its
  own edges, up to a tolerance;
* `by_attention` - that much attention was cut: a query's control carries, in sum, as nearly as it
  can be had what its own edges carry.

Queries do not share candidates, so each is a small problem of its own, and all are solved side by
side; no loop here runs over edges. `EdgeSet.random_like` is what one calls. Here queries are
numbers ("groups") from 0, and a pool is two arrays: the group of each candidate (-1 for a query
that wants none), and its distance or attention. What comes back are numbers of candidates.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

#: entries of the largest table that `by_distance` fills at a time
CHUNK = 8_000_000

#: equally near candidates are told apart by a random number up to this, in the unit of distance
JITTER = 1e-6

#: rounding must not refuse what lies on the border of the tolerance
SLACK = 1 + 1e-9


def by_count(wanted: np.ndarray, pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """At random, without replacement; a group with too few candidates gets all of them.

    Args:
        wanted: `[n_groups]` how many edges each group wants.
        pool: `[n_candidates]` the group of each candidate.
        rng: source of the draw.

    >>> by_count(np.array([1]), np.array([0, -1]), np.random.default_rng(0)).tolist()
    [0]
    """
    order = np.lexsort((rng.random(len(pool)), pool))
    limit = np.append(wanted, 0)[pool[order]]  # the last one is for group -1
    return np.asarray(order[_rank(pool[order]) < limit])


def by_distance(
    group: np.ndarray,
    distance: np.ndarray,
    pool: np.ndarray,
    pool_distance: np.ndarray,
    tolerance: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """One candidate an edge, no farther from the edge's distance than `tolerance`.

    Of all ways to do that, one that serves the most edges, and of those one whose deviations have
    the smallest sum (to within `JITTER` an edge); which of the equally good ones is up to `rng`.

    Both sides are points on a line, so of the best assignments one keeps the order (uncrossing two
    pairs never costs), and a table over (edges so far, candidates so far) finds it, as in the
    alignment of two strings. Its time grows with edges x candidates of a query: some 7,000 edges to
    near neighbours among 576 tokens take a fraction of a second, a million edges take minutes.

    Args:
        group: `[n_edges]` the group of each edge.
        distance: `[n_edges]` its distance.
        pool: `[n_candidates]` the group of each candidate.
        pool_distance: `[n_candidates]` its distance; NaN is near to nothing.
        tolerance: largest deviation.
        rng: decides between equally good choices.
    """
    n_groups = int(group.max(initial=-1)) + 1
    edges = np.lexsort((distance, group))
    low, high = np.full(n_groups, np.inf), np.full(n_groups, -np.inf)
    np.minimum.at(low, group, distance)
    np.maximum.at(high, group, distance)
    near = np.flatnonzero(pool >= 0)  # and of those, what some edge of the query may take
    off = np.maximum(low[pool[near]] - pool_distance[near], pool_distance[near] - high[pool[near]])
    near = near[off <= tolerance * SLACK]
    near = near[np.lexsort((rng.random(len(near)), pool_distance[near], pool[near]))]
    wanted = np.bincount(group, minlength=n_groups)
    there = np.bincount(pool[near], minlength=n_groups)
    chosen = []
    for some in _chunks(wanted, there):
        at, candidate = _padded(group[edges], some), _padded(pool[near], some)
        d = np.where(at < 0, np.inf, distance[edges][at])
        c = np.where(candidate < 0, np.inf, pool_distance[near][candidate])
        taken = candidate[_assign(d, c, tolerance, rng)]
        chosen.append(near[taken])
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)


def _assign(d: np.ndarray, c: np.ndarray, tolerance: float, rng: np.random.Generator) -> np.ndarray:
    """`[group, candidate]` bool: which of the sorted `c` are taken for the sorted `d`; inf pads."""
    (n, k), m = d.shape, c.shape[1]
    scale = sum(np.where(np.isfinite(side), side, 0).max(initial=0) for side in (c, d))
    skip = 1 + k * min(tolerance, scale)  # leaving one edge out costs more than all deviations
    jitter = rng.random((n, m)) * JITTER
    best = np.zeros((n, m + 1))  # cost of the edges so far with the candidates so far
    where = np.zeros((k, n, m + 1), dtype=np.int32)  # which candidate was the last that mattered
    took = np.zeros((k, n, m + 1), dtype=bool)  # and whether the edge took it
    for i in range(k):
        with np.errstate(invalid="ignore"):  # inf - inf, which is no candidate either
            deviation = np.abs(d[:, i : i + 1] - c)
        take = best[:, :-1] + np.where(deviation <= tolerance * SLACK, deviation + jitter, np.inf)
        now = best + skip
        took[i, :, 1:] = take < now[:, 1:]
        np.minimum(now[:, 1:], take, out=now[:, 1:])
        best = np.minimum.accumulate(now, axis=1)
        fresh = np.zeros((n, m + 1), dtype=np.int32)
        fresh[:, 1:] = np.where(now[:, 1:] < best[:, :-1], np.arange(1, m + 1), 0)
        where[i] = np.maximum.accumulate(fresh, axis=1)
    taken = np.zeros((n, m), dtype=bool)
    groups, at = np.arange(n), np.full(n, m)
    for i in reversed(range(k)):
        at = where[i, groups, at]
        took_it = took[i, groups, at]
        taken[groups[took_it], at[took_it] - 1] = True
        at = at - took_it
    return taken


def _chunks(wanted: np.ndarray, there: np.ndarray) -> Iterator[np.ndarray]:
    """Groups of like size together, so many that their table stays below `CHUNK` entries."""
    order = np.flatnonzero((wanted > 0) & (there > 0))
    order = order[np.lexsort((there[order], wanted[order]))]
    start = 0
    while start < len(order):
        n = len(order) - start
        while n > 1:
            some = order[start : start + n]
            size = n * int(wanted[some].max()) * (int(there[some].max()) + 1)
            if size <= CHUNK:
                break
            n = max(1, min(n - 1, n * CHUNK // size))
        yield order[start : start + n]
        start += n


def _padded(group: np.ndarray, some: np.ndarray) -> np.ndarray:
    """Numbers of the entries of each of `some` groups in the sorted `group`, -1 behind the last."""
    first, last = (np.searchsorted(group, some, side) for side in ("left", "right"))
    number = first[:, None] + np.arange((last - first).max())
    return np.where(number < last[:, None], number, -1)


def by_attention(
    wanted: np.ndarray,
    target: np.ndarray,
    pool: np.ndarray,
    attention: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """As many as wanted, whose attention adds up to the target as nearly as exchanges can bring it.

    1. Draw at random (`by_count`).
    2. While the sum is off by more than that changes, exchange the weakest drawn for the strongest
       not drawn (the other way round where the sum is too large).
    3. Make the best single exchange, again and again, until none brings the sum nearer.

    So the result is a local optimum: exchanging any one edge for any one other candidate does not
    bring a query's sum nearer to its target. For a query with one edge it is the best there is.

    Args:
        wanted: `[n_groups]` how many edges each group wants.
        target: `[n_groups]` what their attention should add up to.
        pool: `[n_candidates]` the group of each candidate.
        attention: `[n_candidates]` what it carries, from 0.
        rng: source of the first draw.
    """
    n_groups = len(wanted)
    drawn = np.zeros(len(pool), dtype=bool)
    drawn[by_count(wanted, pool, rng)] = True
    order = np.flatnonzero(pool >= 0)
    order = order[np.lexsort((attention[order], pool[order]))]
    group, value, taken = pool[order], attention[order].astype(np.float64), drawn[order]
    missing = target - np.bincount(group[taken], value[taken], n_groups)
    _exchange_many(group, value, taken, missing)
    # step 3, in all groups side by side: sorted keys in which a group's values are its own stretch
    scale = max(float(value.max(initial=0)), float(np.abs(target).max(initial=0)), 1e-300)
    key = 4 * group + value / scale
    active = np.ones(n_groups, dtype=bool)
    while active.any():
        missing = target - np.bincount(group[taken], value[taken], n_groups)
        out = np.flatnonzero(taken & active[group])
        others = np.flatnonzero(~taken & active[group])
        if not len(out) or not len(others):
            break
        sought = np.clip((value[out] + missing[group[out]]) / scale, -1, 2) + 4 * group[out]
        at = np.searchsorted(key[others], sought)
        # the nearest candidate above, and the one below
        out = np.tile(out, 2)
        into = others[np.concatenate([at - 1, at]).clip(0, len(others) - 1)]
        same = group[out] == group[into]
        out, into = out[same], into[same]
        off = np.abs(missing[group[out]] - (value[into] - value[out]))
        better = off < np.abs(missing[group[out]]) - 1e-12 * scale
        out, into, off = out[better], into[better], off[better]
        best = np.lexsort((off, group[out]))
        best = best[_rank(group[out][best]) == 0]
        taken[out[best]], taken[into[best]] = False, True
        active = np.bincount(group[out], minlength=n_groups) > 0
    return np.asarray(order[taken])


def _exchange_many(
    group: np.ndarray, value: np.ndarray, taken: np.ndarray, missing: np.ndarray
) -> None:
    """Step 2 of `by_attention`, in place in `taken`."""
    upwards = np.where(missing < 0, -1.0, 1.0)[group] * value  # more of this is what is missing
    out, into = np.flatnonzero(taken), np.flatnonzero(~taken)
    out = out[np.lexsort((upwards[out], group[out]))]
    into = into[np.lexsort((-upwards[into], group[into]))]
    n = np.minimum(*(np.bincount(group[side], minlength=len(missing)) for side in (out, into)))
    out, into = (side[_rank(group[side]) < n[group[side]]] for side in (out, into))
    gain = (upwards[into] - upwards[out]).clip(0)
    total = np.cumsum(gain)
    before = (total - gain)[np.searchsorted(group[out], group[out])]  # of the groups before
    do = (gain > 0) & (total - before <= np.abs(missing)[group[out]])
    taken[out[do]], taken[into[do]] = False, True


def _rank(group: np.ndarray) -> np.ndarray:
    """The number of each entry within its group, `group` being sorted.

    >>> _rank(np.array([4, 4, 7, 7, 7])).tolist()
    [0, 1, 0, 1, 2]
    """
    return np.asarray(np.arange(len(group)) - np.searchsorted(group, group))
