"""What one forward pass needs besides weights: the flattened batch, and the pages one layer reads and writes.

`AttentionBatch` is built once per step by the batcher, `LayerPages` once per engine by the cache. Both are plain data;
nothing here computes. T is the number of tokens of the step, N the number of sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Prefill chunks, decodes and draft checks of one step, flattened; every tensor is on the model's device.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T], each token's place in its sequence.
        slot_mapping: int64 [T], `page * page_size + offset`: where the token's key and value go.
        query_start: int32 [N + 1], running sum of the query lengths.
        seq_lens: int32 [N], context length including this step's tokens.
        block_table: int32 [N, P], page numbers in order; entries past a sequence's last page are never read.
        max_query_len: longest query of the step.
        max_seq_len: longest context of the step.
        page_size: tokens per page.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    max_query_len: int
    max_seq_len: int
    page_size: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        """N."""
        return self.seq_lens.shape[0]

    @classmethod
    def build(
        cls,
        tokens: Sequence[Sequence[int]],
        computed: Sequence[int],
        pages: Sequence[Sequence[int]],
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> AttentionBatch:
        """A batch from Python lists: each sequence's new tokens, how many came before them, and its pages.

        For tests, tools and warm-up; the step loop fills preallocated arrays instead.
        """
        positions = [range(start, start + len(new)) for new, start in zip(tokens, computed, strict=True)]
        lengths = [len(new) for new in tokens]
        width = max(len(table) for table in pages)
        return cls(
            token_ids=torch.tensor([token for new in tokens for token in new], device=device),
            positions=torch.tensor([position for span in positions for position in span], device=device),
            slot_mapping=torch.tensor(
                [
                    table[position // page_size] * page_size + position % page_size
                    for span, table in zip(positions, pages, strict=True)
                    for position in span
                ],
                device=device,
            ),
            query_start=torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32),
            seq_lens=torch.tensor([span.stop for span in positions], dtype=torch.int32, device=device),
            block_table=torch.tensor(
                [[*table, *[0] * (width - len(table))] for table in pages], dtype=torch.int32, device=device
            ),
            max_query_len=max(lengths),
            max_seq_len=max(span.stop for span in positions),
            page_size=page_size,
        )


@dataclass(frozen=True, slots=True)
class LayerPages:
    """One layer's key and value pages.

    Attributes:
        k, v: [num_pages, page_size, num_kv_heads, head_dim] in any float dtype, or in 8 bits (int8, float8_e4m3fn) with
            scales. They must start
            zeroed: a kernel may read (and mask) the unused rest of a page, which must not hold NaN.
        k_scale, v_scale: float32 [num_pages, page_size, num_kv_heads], present exactly when k and v have 8 bits:
            value = stored * scale, one scale per token and head.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def quantized(self) -> bool:
        """Whether keys and values are stored in 8 bits with scales."""
        return self.k_scale is not None


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one layer's attention computes.

    Attributes:
        scale: factor on the scores.
        window: a query sees this many latest positions, itself included; None for all.
        softcap: scores become `softcap * tanh(score / softcap)`; None for none.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
