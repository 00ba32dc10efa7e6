"""The step's inputs on the device are the batch's arrays, in one copy where the device is not the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penstock_core.distributed.inputs import on_device
from tests.unit.batching.support import Bench

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_arrive_as_they_are(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    bench = Bench(max_batch_tokens=11, num_pages=64)
    for n in range(4):
        bench.add(3 + 5 * n, 6)
    while bench.batcher.has_work:
        batch = bench.batcher.schedule()
        assert batch is not None
        inputs = on_device(batch, 4, torch.device(device))
        assert inputs.token_ids.device.type == device
        for name in ("token_ids", "positions", "slot_mapping", "query_start", "seq_lens", "block_table"):
            tensor = getattr(inputs, name).cpu().numpy()
            np.testing.assert_array_equal(tensor, getattr(batch, name), err_msg=name)
            assert tensor.dtype == getattr(batch, name).dtype, name
        bench.finish(batch)
