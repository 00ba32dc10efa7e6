"""Several guesses per sequence from a small model in one call of the C kernels.

Read what is new, choose, read that, choose again: the sampler's choices, without a word of Python between them.
"""

from __future__ import annotations

from ctypes import byref, pointer
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from penstock_core.attention.batch import AttentionBatch
from penstock_core.kernels.decoder import WholeDecoder
from penstock_core.kernels.native import DraftCall

_NOISE_BLOCK = 64  # as in draw.c


@dataclass(frozen=True, slots=True)
class Guesses:
    """Of n sequences: tokens and grades [n, depth], the first `counts[i]` of each; and how many the model has read.

    `guessing_s`: seconds after what was new had been read.
    """

    tokens: npt.NDArray[np.int64]
    grades: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    read: npt.NDArray[np.int64]
    guessing_s: float


def draft(
    whole: WholeDecoder,
    batch: AttentionBatch,
    wanted: npt.NDArray[np.int64],
    temperature: npt.NDArray[np.float64],
    keys: npt.NDArray[np.int64],
    limits: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    block_table: npt.NDArray[np.int32],
    rates: npt.NDArray[np.float64],
    edges: npt.NDArray[np.float32],
    floor: float,
) -> Guesses:
    """Compute a batch, and guess on after some of its rows. The model is bound to its pages.

    Args:
        whole: the draft model.
        batch: what it has not read yet.
        wanted: [n], the rows that end a sequence which gets guesses.
        temperature: [n]; 0 takes the likeliest token.
        keys: [depth, n], the noise of each position.
        limits: [n], guesses wanted, 1 to depth.
        starts: [n], position of each sequence's first guess.
        block_table: [n, pages], with room for `limits` tokens from `starts` on.
        rates: [2 * (edges + 1)], chance that a guess of each grade is right; grades of sampled tokens come second.
        edges: probabilities between grades.
        floor: a sequence stops where the chance that all its guesses are right falls below this.

    Raises:
        IndexError: a token is outside the vocabulary.
    """
    depth, n = keys.shape
    tokens_in, hidden, vocab = batch.num_tokens, whole.shape.hidden, whole.shape.vocab
    threads = whole.threads(n)
    scratch = whole.scratch(max(n, tokens_in), extra=2 * hidden)
    out = torch.empty(tokens_in * hidden + n * vocab)
    block_table = np.ascontiguousarray(block_table)
    inputs: tuple[npt.NDArray[Any], ...] = (temperature, keys, limits, starts, block_table, rates, edges)
    results = np.empty((2, n, depth), dtype=np.int64)
    ends = np.empty((2, n), dtype=np.int64)
    doubles = np.empty(1 + 2 * n + threads * 3 * -(-vocab // _NOISE_BLOCK))
    integers = np.empty(6 * n + 1, dtype=np.int64)
    done = whole.draft(
        byref(
            DraftCall(
                pointer(whole.call(batch, out, scratch)),
                _address(wanted),
                out.data_ptr() + 4 * tokens_in * hidden,
                *(_address(array) for array in inputs),
                *(_address(array) for array in (*results, *ends)),
                _address(doubles),
                scratch.data_ptr(),
                _address(doubles) + 8,
                _address(integers),
                floor,
                n,
                depth,
                block_table.shape[1],
                len(edges),
                threads,
            )
        )
    )
    if not done:
        raise whole.unknown_token()
    return Guesses(results[0], results[1], ends[0], ends[1], float(doubles[0]))


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
