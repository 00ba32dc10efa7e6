"""A step that travels to the other ranks arrives as it was."""

from __future__ import annotations

import numpy as np

from penstock_core.cache import HostPages
from penstock_core.distributed.group import pack, unpack
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
