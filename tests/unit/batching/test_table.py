"""A gathered step says exactly what a step written out by hand says."""

from __future__ import annotations

import numpy as np

from penstock_core.attention import AttentionBatch
from penstock_core.batching import TokenBatch
from tests.unit.batching.support import Bench


def by_hand(batch: TokenBatch, page_size: int) -> AttentionBatch:
    tokens, computed, pages = [], [], []
    for sequence, length in zip(batch.sequences, batch.query_lens, strict=True):
        known = [*sequence.prompt_ids.tolist(), *sequence.output_ids, *sequence.draft_ids]
        tokens.append(known[sequence.num_computed : sequence.num_computed + length])
        computed.append(sequence.num_computed)
        pages.append(sequence.pages)
    return AttentionBatch.build(tokens, computed, pages, page_size)


def check(batch: TokenBatch, page_size: int) -> None:
    expected = by_hand(batch, page_size)
    for name in ("token_ids", "positions", "slot_mapping", "query_start", "seq_lens"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(expected, name).numpy(), err_msg=name)
    assert (batch.max_query_len, batch.max_seq_len) == (expected.max_query_len, expected.max_seq_len)
    for n, length in enumerate(expected.seq_lens.tolist()):
        used = -(-length // page_size)
        np.testing.assert_array_equal(batch.block_table[n, :used], expected.block_table[n, :used])
    for name in ("token_ids", "positions", "slot_mapping", "logit_rows", "sample_rows", "output_positions"):
        assert getattr(batch, name).dtype == np.int64, name
    for name in ("query_start", "seq_lens", "block_table"):
        assert getattr(batch, name).dtype == np.int32, name


def test_prefill_chunks_decodes_and_drafts_in_one_step() -> None:
    bench = Bench(max_batch_tokens=20, num_pages=64, max_num_sequences=4)
    first, second = bench.add(5, 20), bench.add(3, 20)
    bench.step()
    bench.add(30, 4)
    first.propose([4, 4])
    batch = bench.batcher.schedule()
    assert batch is not None
    check(batch, 4)
    assert batch.query_lens == [3, 1, 16]
    assert batch.num_samples == [3, 1, 0]
    assert batch.logit_rows.tolist() == [0, 1, 2, 3]
    assert batch.sample_rows.tolist() == [first.row] * 3 + [second.row]
    assert batch.output_positions.tolist() == [1, 2, 3, 1]
    assert batch.drafts is not None
    assert batch.drafts.tolist() == [-1, 4, 4, -1]


def test_every_step_of_a_busy_batcher() -> None:
    bench = Bench(num_pages=24, page_size=4, max_batch_tokens=11, max_num_sequences=4, max_model_len=48)
    for n in range(9):
        bench.add(3 + 4 * n, 5 + n % 3)
    while bench.batcher.has_work:
        batch = bench.batcher.schedule()
        assert batch is not None
        check(batch, 4)
        if max(batch.num_samples) <= 1:
            assert batch.drafts is None
        bench.finish(batch)
