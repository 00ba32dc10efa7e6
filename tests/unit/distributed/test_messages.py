"""A step that travels to the other ranks arrives as it was; its pieces are the whole."""

from __future__ import annotations

import numpy as np
import pytest

from penstock_core.cache import HostPages
from penstock_core.distributed.messages import cut, pack, unpack
from tests.unit.batching.support import Bench

ARRAYS = ("token_ids", "positions", "slot_mapping", "query_start", "seq_lens", "block_table", "logit_rows")


def test_unpacked_step_is_the_packed_one() -> None:
    bench = Bench(num_pages=24, page_size=4, max_batch_tokens=11, max_num_sequences=4, max_model_len=48)
    bench.cache.host = HostPages(64)
    for n in range(9):
        bench.add(3 + 4 * n, 5 + n % 3, salt="shared" if n % 2 else None)
    moved = 0
    while bench.batcher.has_work:
        batch = bench.batcher.schedule()
        assert batch is not None
        copy = unpack(pack(batch))
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(copy, name), getattr(batch, name), err_msg=name)
            assert getattr(copy, name).dtype == getattr(batch, name).dtype, name
        for name in ("max_query_len", "max_seq_len", "offloads", "restores", "copies"):
            assert getattr(copy, name) == getattr(batch, name), name
        moved += len(batch.offloads)
        bench.finish(batch)
    assert moved > 0


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_pieces_of_a_step_are_the_whole_step_in_order(parts: int) -> None:
    bench = Bench(num_pages=64, page_size=4, max_batch_tokens=23, max_num_sequences=6, max_model_len=48)
    for n in range(9):
        bench.add(3 + 4 * n, 5 + n % 3)
    split = 0
    while bench.batcher.has_work:
        batch = bench.batcher.schedule()
        assert batch is not None
        pieces = cut(batch, parts)
        assert len(pieces) == min(parts, batch.num_tokens)
        for name in ("token_ids", "positions", "slot_mapping"):
            whole = np.concatenate([getattr(piece, name) for piece in pieces])
            np.testing.assert_array_equal(whole, getattr(batch, name), err_msg=name)
        for piece in pieces:
            lengths = np.diff(piece.query_start)
            assert (lengths > 0).all()
            assert piece.query_start[-1] == piece.num_tokens
            assert piece.max_query_len == lengths.max()
            # A context ends with the piece's last token of the sequence, and the piece's pages are the sequence's.
            np.testing.assert_array_equal(piece.seq_lens, piece.positions[piece.query_start[1:] - 1] + 1)
            rows = np.repeat(np.arange(len(lengths)), lengths)
            pages = piece.block_table[rows, piece.positions // 4]
            np.testing.assert_array_equal(pages * 4 + piece.positions % 4, piece.slot_mapping)
        split += sum(len(piece.seq_lens) for piece in pieces) - len(batch.seq_lens)
        bench.finish(batch)
    assert (split > 0) == (parts > 1)
