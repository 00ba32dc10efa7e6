"""What rank 0 tells the others: one flat array of integers per step, and what is in it.

Only rank 0 decides. The other ranks follow, and need of a step what a forward pass reads.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from penstock_core.batching import TokenBatch

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


class Order(IntEnum):
    """What a message asks of the followers."""

    STOP = 0
    STEP = 1  # move pages, run the forward pass, take part in the logits of the sampled rows
    PROMPT_LOGITS = 2  # take part in the logits of some more rows of the last step


def pack(batch: TokenBatch) -> Int32:
    """Everything of a step that a forward pass reads, as one array. Token ids and page slots are below 2**31."""
    sequences, width = batch.block_table.shape
    moves = (batch.offloads, batch.restores, batch.copies)
    sizes = [batch.num_tokens, sequences, width, len(batch.logit_rows), *map(len, moves)]
    return np.concatenate(
        [
            np.array([*sizes, batch.max_query_len, batch.max_seq_len], dtype=np.int32),
            batch.token_ids,
            batch.positions,
            batch.slot_mapping,
            batch.query_start,
            batch.seq_lens,
            batch.block_table.reshape(-1),
            batch.logit_rows,
            *(np.array(pairs, dtype=np.int32).reshape(-1) for pairs in moves),
        ],
        dtype=np.int32,
        casting="same_kind",
    )


def unpack(payload: Int32) -> TokenBatch:
    """The step that `pack` packed; what only rank 0 needs (sequences, sampling) stays empty."""
    tokens, sequences, width, logits, *moves, max_query_len, max_seq_len = (int(n) for n in payload[:9])
    place = 9

    def take(count: int) -> Int32:
        nonlocal place
        place += count
        return payload[place - count : place]

    def pairs(count: int) -> list[tuple[int, int]]:
        return [(int(a), int(b)) for a, b in take(2 * count).reshape(-1, 2)]

    nothing = np.zeros(0, dtype=np.int64)
    return TokenBatch(
        sequences=[],
        query_lens=[],
        num_samples=[],
        token_ids=take(tokens).astype(np.int64),
        positions=take(tokens).astype(np.int64),
        slot_mapping=take(tokens).astype(np.int64),
        query_start=take(sequences + 1).copy(),
        seq_lens=take(sequences).copy(),
        block_table=take(sequences * width).copy().reshape(sequences, width),
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        logit_rows=take(logits).astype(np.int64),
        sample_rows=nothing,
        output_positions=nothing,
        offloads=pairs(moves[0]),
        restores=pairs(moves[1]),
        copies=pairs(moves[2]),
    )


def cut(batch: TokenBatch, parts: int) -> list[TokenBatch]:
    """The forward passes of a step in `parts` pieces, to be run in order.

    Pieces have equal numbers of tokens; a sequence may lie in two of them, for its later tokens find the earlier ones'
    keys and values in the pages. Rows to sample and page moves stay with the whole step.
    """
    if parts <= 1:
        return [batch]
    tokens = batch.num_tokens
    starts, nothing = batch.query_start, np.zeros(0, dtype=np.int64)
    pieces = []
    for number in range(parts):
        begin, end = number * tokens // parts, (number + 1) * tokens // parts
        if begin == end:
            continue
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        last = int(np.searchsorted(starts, end, side="left"))
        query_start = (np.clip(starts[first : last + 1], begin, end) - begin).astype(np.int32)
        seq_lens = batch.seq_lens[first:last].copy()
        seq_lens[-1] -= starts[last] - end  # what later pieces compute
        pieces.append(
            TokenBatch(
                sequences=[],
                query_lens=[],
                num_samples=[],
                token_ids=batch.token_ids[begin:end],
                positions=batch.positions[begin:end],
                slot_mapping=batch.slot_mapping[begin:end],
                query_start=query_start,
                seq_lens=seq_lens,
                block_table=batch.block_table[first:last],
                max_query_len=int(np.diff(query_start).max()),
                max_seq_len=batch.max_seq_len,
                logit_rows=nothing,
                sample_rows=nothing,
                output_positions=nothing,
            )
        )
    return pieces
