"""The draw over a whole vocabulary, exact without computing a whole vocabulary's noise.

The token is the argmax of `logit / temperature - log(noise)`. The noise of a block of 64 tokens is bounded by one hash
(`noise.py`), so a row looks at a few promising blocks, and then only at tokens whose bound beats what was found there.
Called by the sampler for rows with a temperature and no top-k or top-p. Rows never influence one another.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from penstock_core.kernels.native import DrawCall, Kernels
from penstock_core.sampling.noise import BLOCK, Float64, Int64, block_minimum, log, member_noise

Float32 = npt.NDArray[np.float32]

_FIRST = 4  # blocks looked at before the bound is put to use


def block_maxima(logits: Float32) -> tuple[Float32, Float32]:
    """Cut rows into blocks of 64 tokens: ([n, blocks, 64], maxima [n, blocks]) of float32 logits [n, vocab].

    A last, shorter block is filled up with -inf.
    """
    rows, vocab = logits.shape
    missing = -vocab % BLOCK
    if missing:
        logits = np.pad(logits, ((0, 0), (0, missing)), constant_values=-np.inf)
    blocks = logits.reshape(rows, -1, BLOCK)
    maxima: Float32 = torch.from_numpy(blocks).amax(-1).numpy()  # ten times numpy's speed for short runs
    return blocks, maxima


def draw(
    blocks: Float32, maxima: Float32, temperature: Float64, keys: Int64, floor: Float32 | None = None
) -> tuple[Int64, Float64]:
    """Draw one token per row from softmax(logits / temperature).

    Args:
        blocks: logits [n, blocks, 64], `maxima` their maxima [n, blocks], as from `block_maxima`.
        temperature: [n], above 0.
        keys: draw keys [n].
        floor: [n]; tokens with a smaller logit do not take part. At least one token per row must be finite and in.

    Returns:
        token ids [n] and their scores [n]; the lowest id wins a tie.
    """
    rows, count, _ = blocks.shape
    every = np.arange(rows)[:, None]
    heat = temperature[:, None]
    minimum, member = block_minimum(keys[:, None], np.arange(count, dtype=np.int64))
    ease = log(minimum)  # a token's score is at most logit / temperature - ease
    bound = maxima / heat - ease
    lowest = np.full(rows, -np.inf, dtype=np.float32) if floor is None else floor
    bound[maxima < lowest[:, None]] = -np.inf

    first = np.argpartition(bound, max(count - _FIRST, 0), axis=-1)[:, -_FIRST:]
    first.sort(axis=-1)  # so that of equal scores the lowest id comes first
    near = blocks[every, first].reshape(rows, -1)
    ids = (first[:, :, None] * BLOCK + np.arange(BLOCK)).reshape(rows, -1)
    shared = [np.repeat(known[every, first], BLOCK, axis=-1) for known in (minimum, member)]
    scores = near / heat - log(member_noise(keys[:, None], ids, *shared))
    scores[near < lowest[:, None]] = -np.inf
    winner = scores.argmax(-1)[:, None]
    token, score = ids[every, winner], scores[every, winner]

    bound[every, first] = -np.inf
    row, block = np.nonzero((bound >= score) & (bound > -np.inf))
    if row.size == 0:
        return token[:, 0], score[:, 0]
    # The float32 comparison lets a little too many through; the exact scores below decide.
    reach = np.maximum((score[row, 0] + ease[row, block]) * temperature[row], lowest[row])
    reach -= np.abs(reach) * 1e-6 + 1e-9
    rest = blocks[row, block]
    flat = np.flatnonzero(rest >= reach.astype(np.float32)[:, None])
    pair, ids = flat // BLOCK, block[flat // BLOCK] * BLOCK + flat % BLOCK
    row, block, near = row[pair], block[pair], rest.ravel()[flat]
    kept = near >= lowest[row]
    row, block, near, ids = row[kept], block[kept], near[kept], ids[kept]
    scores = near / temperature[row] - log(member_noise(keys[row], ids, minimum[row, block], member[row, block]))
    row, ids, scores = np.append(row, every), np.append(ids, token), np.append(scores, score)
    best = lexicographic_best(row, ids, scores)
    return ids[best], scores[best]


def draw_natively(
    native: Kernels, logits: Float32, temperature: Float64, keys: Int64, floor: Float32 | None = None
) -> Int64:
    """The tokens of `draw` for contiguous logits [n, vocab], from the C kernel: the same, bit for bit.

    -1 for rows in which nothing can be chosen: no logit is finite, or one is NaN or infinite.
    """
    rows, vocab = logits.shape
    threads = torch.get_num_threads()
    tokens = np.empty(rows, dtype=np.int64)
    scratch = np.empty(threads * 3 * -(-vocab // BLOCK))
    arrays = (logits, temperature, keys, floor, scratch, tokens)
    addresses = [None if array is None else array.__array_interface__["data"][0] for array in arrays]
    native.draw(ctypes.byref(DrawCall(*addresses, rows, vocab, threads)))
    return tokens


def lexicographic_best(row: Int64, ids: Int64, scores: Float64) -> Int64:
    """Index, for each row number present (ascending), of its entry of highest score; of equals, of the lowest id."""
    order = np.lexsort((ids, -scores, row))
    ranked = row[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = ranked[1:] != ranked[:-1]
    return order[first]
