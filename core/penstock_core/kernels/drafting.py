"""Several guesses per sequence from a small model in one call of the C kernels.

Read what is new, choose, read that, choose again: the sampler's choices, without a word of Python between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, pointer
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock_core.kernels.decoder import WholeDecoder
from penstock_core.kernels.native import DraftCall

_NOISE_BLOCK = 64  # as in draw.c


@dataclass(frozen=True, slots=True)
class Unread:
    """A sequence that gets guesses.

    Attributes:
        tokens: those the model has not read, at least one. start: position of the first of them.
        row: of the block tables, with pages for the guesses too.
        limit: guesses wanted, at least 1.
        temperature: 0 takes the likeliest token. stream: key of its noise. index: of the first guess in its output.
    """

    tokens: list[int]
    start: int
    row: int
    limit: int
    temperature: float
    stream: int
    index: int


@dataclass(frozen=True, slots=True)
class Guesses:
    """By sequence: tokens and their grades; how many the model has read; seconds after what was new had been read."""

    tokens: list[list[int]]
    grades: list[list[int]]
    read: list[int]
    guessing_s: float


def draft(
    whole: WholeDecoder,
    sequences: Sequence[Unread],
    block_table: npt.NDArray[np.int32],
    rates: npt.NDArray[np.float64],
    edges: npt.NDArray[np.float32],
    floor: float,
) -> Guesses:
    """Read what the model, bound to its pages, has not read of some sequences, and guess on.

    Args:
        whole: the draft model.
        sequences: what to read and how far to guess.
        block_table: [rows, pages].
        rates: [2 * (edges + 1)], chance that a guess of each grade is right; grades of sampled tokens come second.
        edges: probabilities between grades.
        floor: a sequence stops where the chance that all its guesses are right falls below this.

    Raises:
        IndexError: a token is outside the vocabulary.
    """
    n, depth = len(sequences), max(one.limit for one in sequences)
    numbers = [(len(one.tokens), one.start, one.row, one.limit, one.stream, one.index) for one in sequences]
    unread = [token for one in sequences for token in one.tokens]
    inputs = np.array([value for column in zip(*numbers, strict=True) for value in column] + unread, dtype=np.int64)
    temperature = np.array([one.temperature for one in sequences], dtype=np.float64)
    tokens = len(unread)
    reach = max(one.start + len(one.tokens) + one.limit for one in sequences)
    width = -(-reach // whole.table.page_size)
    hidden, vocab = whole.shape.hidden, whole.shape.vocab
    threads = whole.threads(max(n, tokens))
    out = np.empty(2 * n * (depth + 1), dtype=np.int64)
    integers = np.empty(3 * tokens + n * (10 + width) + 2, dtype=np.int64)
    floats = whole.scratch(tokens + n, extra=3 * hidden + vocab)
    doubles = np.empty(1 + n + threads * 3 * -(-vocab // _NOISE_BLOCK))
    call = DraftCall(
        pointer(whole.table),
        *[_address(array) for array in (inputs, temperature, block_table, rates, edges, out, integers)],
        floats.data_ptr(),
        _address(doubles),
        floor,
        n,
        tokens,
        depth,
        block_table.shape[1],
        width,
        len(edges),
        threads,
    )
    if not whole.draft(byref(call)):
        raise whole.unknown_token()
    chosen, grades = out[: 2 * n * depth].reshape(2, n, depth)
    counts, read = out[2 * n * depth :].reshape(2, n).tolist()
    return Guesses(
        [row[:count] for row, count in zip(chosen.tolist(), counts, strict=True)],
        [row[:count] for row, count in zip(grades.tolist(), counts, strict=True)],
        read,
        float(doubles[0]),
    )


def _address(array: Any) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
