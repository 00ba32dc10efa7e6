"""Decode steps as CUDA graphs: the hundreds of kernels of a step launched as one, at a ladder of batch sizes.

A graph replays fixed work on fixed addresses. So inputs lie in buffers that every graph reads, a batch is filled up to
the next size of the ladder with rows that write to a scratch page and are thrown away, and lengths and page numbers are
read on the device. The engine runs whatever does not fit (prompts, mixed and larger steps) kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from penstock_core.attention import AttentionBatch
from penstock_core.batching import TokenBatch
from penstock_core.distributed.inputs import carry

LARGEST = 512  # rows; of larger batches the kernels take longer than their launches
_STEP = 32
_WARM_UPS = 2

Replay = Callable[[], object]


class Recorder(Protocol):
    """Makes work that can be repeated."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Warm `work` up and record it: a function that repeats it, and the tensor that each repetition fills."""


class CUDARecorder:
    """Captures graphs of one device. They share one pool of memory: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """See `Recorder`. Whatever is loaded, chosen or tried on first use happens before the capture."""
        with torch.cuda.device(self._device):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    work()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = work()
        return graph.replay, out


def ladder(most: int) -> list[int]:
    """Sizes that are recorded for batches of up to `most` rows, ascending: 1, 2, 4, 8, 16, 32, 64, 96, ..."""
    sizes = [1, 2, 4, 8, 16, *range(_STEP, LARGEST + 1, _STEP)]
    reach = next((place for place, size in enumerate(sizes) if size >= most), len(sizes) - 1)
    return sizes[: reach + 1]


class DecodeGraphs:
    """The recorded steps of one model.

    Args:
        forward: runs the model on a batch and writes to its pages: hidden states [T, hidden].
        max_rows: sequences that run at once.
        max_len: longest sequence in tokens.
        page_size: tokens per page.
        scratch_page: one that no sequence ever holds.
        device: of the model.
        recorder: makes the repeatable work.
    """

    def __init__(
        self,
        forward: Callable[[AttentionBatch], Tensor],
        *,
        max_rows: int,
        max_len: int,
        page_size: int,
        scratch_page: int,
        device: torch.device,
        recorder: Recorder,
    ) -> None:
        self._forward = forward
        self._sizes = ladder(max_rows)
        self._rows = self._sizes[-1]
        self._width = -(-max_len // page_size)
        self._max_len, self._page_size, self._scratch_page = max_len, page_size, scratch_page
        # Tokens, positions, slots and lengths of all rows, then their block tables: one copy fills what a step needs.
        self._inputs = torch.zeros(self._rows * (4 + self._width), dtype=torch.int32, device=device)
        self._query_start = torch.arange(self._rows + 1, dtype=torch.int32, device=device)
        self._recorded: dict[int, tuple[Replay, Tensor]] = {}
        for size in reversed(self._sizes):  # the largest first: the others find room in the memory that it took
            self._fill(self._host_inputs(size, None))
            self._recorded[size] = recorder.record(self._work(size))

    def fits(self, batch: TokenBatch) -> bool:
        """Whether there is a recorded step for this batch."""
        return batch.max_query_len == 1 and len(batch.token_ids) <= self._rows and bool(self._recorded)

    def run(self, batch: TokenBatch, chosen: Tensor | None = None) -> Tensor:
        """Hidden states [T, hidden] of a step that fits, good until the next one runs.

        Args:
            batch: one token of each of its sequences.
            chosen: see `DistributedInferenceEngine.forward`.
        """
        count = len(batch.token_ids)
        size = next(size for size in self._sizes if size >= count)
        self._fill(self._host_inputs(size, batch))
        if batch.carried is not None and chosen is not None:
            carry(batch.carried, chosen, self._inputs[:size])
        replay, out = self._recorded[size]
        replay()
        return out[:count]

    def forget(self) -> None:
        """Give the recordings up, with their memory; nothing fits from now on."""
        self._recorded.clear()

    def _work(self, size: int) -> Callable[[], Tensor]:
        rows = self._rows
        token_ids, positions, slots, lengths = (self._inputs[n * rows : n * rows + size] for n in range(4))
        tables = self._inputs[4 * rows : 4 * rows + size * self._width].view(size, self._width)
        query_start = self._query_start[: size + 1]

        def work() -> Tensor:
            return self._forward(
                AttentionBatch(
                    token_ids=token_ids.long(),
                    positions=positions.long(),
                    slot_mapping=slots.long(),
                    query_start=query_start,
                    seq_lens=lengths,
                    block_table=tables,
                    max_query_len=1,
                    max_seq_len=self._max_len,
                    page_size=self._page_size,
                )
            )

        return work

    def _host_inputs(self, size: int, batch: TokenBatch | None) -> torch.Tensor:
        """What the inputs begin with: the batch's rows, then, up to `size`, rows that write to the scratch page."""
        rows, width = self._rows, self._width
        inputs = np.zeros(4 * rows + size * width, dtype=np.int32)
        parts = inputs[: 4 * rows].reshape(4, rows)
        tables = inputs[4 * rows :].reshape(size, width)
        count = 0
        if batch is not None:
            count = len(batch.token_ids)
            parts[0, :count], parts[1, :count] = batch.token_ids, batch.positions
            parts[2, :count], parts[3, :count] = batch.slot_mapping, batch.seq_lens
            tables[:count, : batch.block_table.shape[1]] = batch.block_table
        parts[2, count:size] = self._scratch_page * self._page_size
        parts[3, count:size] = 1
        tables[count:, 0] = self._scratch_page
        return torch.from_numpy(inputs)

    def _fill(self, inputs: Tensor) -> None:
        """Copy to the device; from pinned memory, which PyTorch reuses only after the copy."""
        if self._inputs.device.type == "cuda":
            inputs = inputs.pin_memory()
        self._inputs[: len(inputs)].copy_(inputs, non_blocking=True)
