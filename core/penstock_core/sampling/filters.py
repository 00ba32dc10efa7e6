"""Top-k, top-p and min-p as a floor under the logits that take part in the draw, without ever sorting the vocabulary.

The k-th largest of the block maxima is a floor under at least k tokens, and everything at or above a floor is found by
looking into the few blocks that reach it. Where a nucleus is wider than the first few tokens, masses are gathered in
bands and one band is sorted; the cut is exact either way. Filters act on the distribution after temperature, in this
order: top-k, top-p of what is left, min-p of the most likely token. `leading_tokens` also serves log-probabilities.
"""

from __future__ import annotations

import numpy as np

from penstock_core.sampling.noise import BLOCK, Float64, Int64
from penstock_core.sampling.race import Float32

_FIRST_CANDIDATES = 64
_BANDS_PER_NAT = np.float32(32.0)
_BANDS = 32 * 64  # the last band holds whatever is less likely than exp(-64)


def leading_tokens(blocks: Float32, maxima: Float32, wanted: Int64) -> tuple[Int64, Float32]:
    """The most likely tokens of each row, in order of falling logit, then rising id.

    Args:
        blocks: logits [n, blocks, 64], `maxima` their maxima [n, blocks].
        wanted: [n]; at least this many tokens are returned (of the finite ones), and every token equal to the last.

    Returns:
        ids [n, c] and logits [n, c]; rows with fewer than c tokens are filled up with id 0 and logit -inf.
    """
    rows, count, _ = blocks.shape
    floor = np.full(rows, -np.inf, dtype=np.float32)
    for number in np.unique(wanted[wanted <= count]):
        those = wanted == number
        floor[those] = np.partition(maxima[those], count - number, axis=-1)[:, count - number]
    for index in np.flatnonzero(wanted > count):
        logits, rank = blocks[index].ravel(), blocks[index].size - wanted[index]
        if rank > 0:
            floor[index] = np.partition(logits, rank)[rank]
    row, block = np.nonzero((maxima >= floor[:, None]) & (maxima > -np.inf))
    inside = blocks[row, block]
    flat = np.flatnonzero((inside >= floor[row, None]) & (inside > -np.inf))
    pair = flat // BLOCK
    row = row[pair]
    found = np.bincount(row, minlength=rows)
    column = np.arange(len(row)) - np.repeat(np.cumsum(found) - found, found)
    ids = np.zeros((rows, int(found.max(initial=0))), dtype=np.int64)
    values = np.full(ids.shape, -np.inf, dtype=np.float32)
    ids[row, column] = block[pair] * BLOCK + flat % BLOCK
    values[row, column] = inside.ravel()[flat]
    order = np.argsort(-values, axis=-1, kind="stable")
    return np.take_along_axis(ids, order, -1), np.take_along_axis(values, order, -1)


def filter_floors(
    blocks: Float32, maxima: Float32, temperature: Float64, top_k: Int64, top_p: Float64, min_p: Float64
) -> tuple[Float32, list[tuple[int, Int64]]]:
    """The least logit left by the filters in each row.

    Args:
        blocks, maxima: as in `leading_tokens`; every row has a finite maximum.
        temperature: [n], above 0. top_k: [n], 0 keeps all. top_p: [n], 1 keeps all. min_p: [n], 0 keeps all.

    Returns:
        floors [n], and for the rare rows where the cut falls among equals, (row, ids that are out although they reach
        the floor): of equals, the lowest ids stay.
    """
    peak = maxima.max(-1)
    with np.errstate(divide="ignore"):
        floors = (peak + temperature * np.log(min_p)).astype(np.float32)
    out: list[tuple[int, Int64]] = []
    those = np.flatnonzero((top_k > 0) | (top_p < 1.0))
    if len(those) == 0:
        return floors, out
    limited = top_k[those] > 0
    wanted = np.where(limited, top_k[those], _FIRST_CANDIDATES)
    ids, values = leading_tokens(blocks[those], maxima[those], wanted)
    weight = np.exp((values.astype(np.float64) - peak[those, None]) / temperature[those, None])
    weight[np.arange(ids.shape[1]) >= np.where(limited, wanted, ids.shape[1])[:, None]] = 0.0
    reached = np.cumsum(weight, axis=-1)
    for place, row in enumerate(those):
        found = int(np.count_nonzero(values[place] > -np.inf))
        if limited[place]:
            kept, total = min(found, int(top_k[row])), reached[place, -1]
        else:
            kept, total = found, probability_mass(blocks[row], peak[row], temperature[row])
        if top_p[row] < 1.0:
            goal = top_p[row] * total
            if not limited[place] and reached[place, -1] < goal:
                floor, surplus = _nucleus(blocks[row].ravel(), peak[row], temperature[row], top_p[row])
                floors[row] = max(floors[row], floor)
                if len(surplus):
                    out.append((int(row), surplus))
                continue
            kept = min(
                kept, int(np.searchsorted(reached[place], goal)) + 1
            )  # the first to reach the goal is the last in
        last = values[place, kept - 1]
        floors[row] = max(floors[row], last)
        if kept < found and values[place, kept] == last:
            out.append((int(row), ids[place, kept:found][values[place, kept:found] == last]))
    return floors, out


def probability_mass(blocks: Float32, peak: np.float32, temperature: float) -> float:
    """Sum over one row's vocabulary of exp((logit - peak) / temperature)."""
    inverse = np.float32(min(1.0 / temperature, 1e30))
    return float(np.exp((blocks.ravel() - peak) * inverse).sum(dtype=np.float64))


def _nucleus(logits: Float32, peak: np.float32, temperature: float, top_p: float) -> tuple[np.float32, Int64]:
    """Floor of one row's top-p where many tokens make it up, and the ids of equals cut off: [vocab] in.

    Masses are gathered in narrow bands of falling probability; only the band in which the goal is reached is sorted.
    """
    depth = (peak - logits) * np.float32(min(1.0 / temperature, 1e30))
    weight = np.exp(-depth).astype(np.float64)
    band = np.minimum(depth * _BANDS_PER_NAT, _BANDS).astype(np.int64)
    reached = np.cumsum(np.bincount(band, weights=weight, minlength=_BANDS + 1))
    goal = top_p * reached[-1]
    crossed = int(np.searchsorted(reached, goal))
    inside = np.flatnonzero(band == crossed)
    inside = inside[np.argsort(-logits[inside], kind="stable")]
    mass = np.cumsum(weight[inside]) + (reached[crossed - 1] if crossed else 0.0)
    kept = min(int(np.searchsorted(mass, goal)) + 1, len(inside))
    floor = logits[inside[kept - 1]]
    return floor, inside[kept:][logits[inside[kept:]] == floor]
