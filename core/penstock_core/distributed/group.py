"""The process group behind a tensor-parallel model, and the channel through which rank 0 tells the others what to do.

Only rank 0 decides. Each step it sends one flat message of integers; the other ranks follow. Built on torch.distributed
with Gloo; the ranks find one another through a file.
"""

from __future__ import annotations

from datetime import timedelta
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from penstock_core.batching import TokenBatch
from penstock_core.models import TensorParallelGroup

Int64 = npt.NDArray[np.int64]

FRAME = 8192  # integers of a message that need only one broadcast; longer ones send the rest in a second


class Order(IntEnum):
    """What a message asks of the followers."""

    STOP = 0
    STEP = 1  # move pages, run the forward pass, take part in the logits of the sampled rows
    PROMPT_LOGITS = 2  # take part in the logits of some more rows of the last step


class GlooGroup(TensorParallelGroup):
    """The ranks of this host. Collectives fail within `timeout_s`, or at once if a rank is gone."""

    def __init__(self, rank: int, size: int, rendezvous: Path, timeout_s: float) -> None:
        super().__init__(rank, size)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
        )

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place where the tensor is contiguous."""
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the ranks' equal shapes along the last dimension."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, -1)

    def least(self, number: int) -> int:
        """The least of the ranks' numbers."""
        tensor = torch.tensor([number])
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor.item())

    def close(self) -> None:
        """Leave the group."""
        dist.destroy_process_group()


def send(order: Order, payload: Int64) -> None:
    """Rank 0: tell the followers. The first two integers are the order and the payload's length."""
    frame = np.zeros(FRAME, dtype=np.int64)
    frame[0], frame[1] = order, len(payload)
    inline = min(len(payload), FRAME - 2)
    frame[2 : 2 + inline] = payload[:inline]
    dist.broadcast(torch.from_numpy(frame), 0)
    if inline < len(payload):
        dist.broadcast(torch.from_numpy(payload[inline:].copy()), 0)


def receive() -> tuple[Order, Int64]:
    """A follower: wait for the next message."""
    frame = np.zeros(FRAME, dtype=np.int64)
    dist.broadcast(torch.from_numpy(frame), 0)
    order, length = Order(int(frame[0])), int(frame[1])
    inline = min(length, FRAME - 2)
    if inline == length:
        return order, frame[2 : 2 + length]
    rest = np.zeros(length - inline, dtype=np.int64)
    dist.broadcast(torch.from_numpy(rest), 0)
    return order, np.concatenate([frame[2 : 2 + inline], rest])


def pack(batch: TokenBatch) -> Int64:
    """Everything of a step that a forward pass reads, as one array."""
    sequences, width = batch.block_table.shape
    moves = (batch.offloads, batch.restores, batch.copies)
    sizes = [batch.num_tokens, sequences, width, len(batch.logit_rows), *map(len, moves)]
    return np.concatenate(
        [
            np.array([*sizes, batch.max_query_len, batch.max_seq_len], dtype=np.int64),
            batch.token_ids,
            batch.positions,
            batch.slot_mapping,
            batch.query_start,
            batch.seq_lens,
            batch.block_table.reshape(-1),
            batch.logit_rows,
            *(np.array(pairs, dtype=np.int64).reshape(-1) for pairs in moves),
        ]
    )


def unpack(payload: Int64) -> TokenBatch:
    """The step that `pack` packed; what only rank 0 needs (sequences, sampling) stays empty."""
    tokens, sequences, width, logits, *moves, max_query_len, max_seq_len = (int(n) for n in payload[:9])
    place = 9

    def take(count: int) -> Int64:
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
        token_ids=take(tokens),
        positions=take(tokens),
        slot_mapping=take(tokens),
        query_start=take(sequences + 1).astype(np.int32),
        seq_lens=take(sequences).astype(np.int32),
        block_table=take(sequences * width).astype(np.int32).reshape(sequences, width),
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        logit_rows=take(logits),
        sample_rows=nothing,
        output_positions=nothing,
        offloads=pairs(moves[0]),
        restores=pairs(moves[1]),
        copies=pairs(moves[2]),
    )
