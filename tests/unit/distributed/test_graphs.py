"""Recorded decode steps: what is filled in, which size is taken, and that tokens are those of steps that are not.

A stand-in records and repeats on the CPU; `tests/unit/attention/test_cuda.py` captures real graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock_core.attention import AttentionBatch, LayerPages, varlen
from penstock_core.attention.cuda import CUDAPagedAttention
from penstock_core.cache import PageConfig, PageShape, allocate_pages
from penstock_core.distributed import graphs
from penstock_core.distributed.graphs import DecodeGraphs, ladder
from penstock_core.models import DecoderModel, load_model, loading
from penstock_core.pipeline import InferencePipelineExecutor, PipelineConfig
from penstock_core.protocol.errors import InvalidConfiguration
from penstock_core.protocol.requests import SamplingParams
from tests.unit.attention.test_varlen import flash_2
from tests.unit.batching.support import Bench

BUNDLED = Path(__file__).parents[3] / "worker/penstock_worker/bundled/penstock-story"
CPU = torch.device("cpu")


class Repeater:
    """Like a graph, repeats fixed work on fixed tensors and writes its result to one place."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replayed: list[int] = []

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        out = work().clone()
        size = len(out)
        self.recorded.append(size)

        def replay() -> None:
            self.replayed.append(size)
            out.copy_(work())

        return replay, out


class Echo:
    """A model whose hidden states are its inputs, so that a test sees what was filled in."""

    def __init__(self) -> None:
        self.last: AttentionBatch | None = None

    def __call__(self, batch: AttentionBatch) -> Tensor:
        self.last = batch
        columns = [batch.token_ids, batch.positions, batch.slot_mapping, batch.seq_lens.long()]
        return torch.stack([*columns, *batch.block_table.long().unbind(1)], 1)


def recorded(max_rows: int, scratch_page: int = 99) -> tuple[DecodeGraphs, Repeater, Echo]:
    repeater, echo = Repeater(), Echo()
    made = DecodeGraphs(
        echo, max_rows=max_rows, max_len=40, page_size=4, scratch_page=scratch_page, device=CPU, recorder=repeater
    )
    return made, repeater, echo


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, [1]), (3, [1, 2, 4]), (32, [1, 2, 4, 8, 16, 32]), (33, [1, 2, 4, 8, 16, 32, 64]), (100, 9), (10_000, 21)],
)
def test_the_ladder_reaches_the_batch_and_no_further(most: int, sizes: Any) -> None:
    found = ladder(most)
    assert found == sizes or len(found) == sizes
    assert found == sorted(set(found))
    assert found[-1] >= min(most, graphs.LARGEST)


def test_the_largest_is_recorded_first() -> None:
    _, repeater, _ = recorded(20)
    assert repeater.recorded == [32, 16, 8, 4, 2, 1]


def decode_batches(count: int, steps: int = 6) -> Iterator[Any]:
    """Steps of a batcher with `count` sequences that decode together."""
    bench = Bench(max_num_sequences=count, max_batch_tokens=64, num_pages=96, max_model_len=40)
    for n in range(count):
        bench.add(3 + n, steps)
    while (batch := bench.batcher.schedule()) is not None:
        yield batch
        bench.finish(batch)


def test_rows_are_the_batchs_and_the_rest_write_to_the_scratch_page() -> None:
    made, repeater, echo = recorded(8)
    ran = 0
    for batch in decode_batches(5):
        if not made.fits(batch):
            assert batch.max_query_len > 1
            continue
        hidden = made.run(batch).numpy()
        ran += 1
        assert repeater.replayed[-1] == 8
        assert hidden.shape[0] == 5
        for column, name in enumerate(("token_ids", "positions", "slot_mapping", "seq_lens")):
            np.testing.assert_array_equal(hidden[:, column], getattr(batch, name), err_msg=name)
        width = batch.block_table.shape[1]
        np.testing.assert_array_equal(hidden[:, 4 : 4 + width], batch.block_table)
        whole = echo.last
        assert whole is not None
        assert whole.slot_mapping[5:].tolist() == [99 * 4] * 3
        assert whole.seq_lens[5:].tolist() == [1] * 3
        assert whole.block_table[5:, 0].tolist() == [99] * 3
        assert whole.query_start.tolist() == list(range(9))
        assert whole.max_seq_len == 40, "what is baked into the recording holds for every context"
        assert whole.token_ids[5:].tolist() == [0] * 3, "nothing is left of larger batches"
    assert ran >= 4


def test_a_smaller_batch_after_a_larger_one_finds_nothing_of_it() -> None:
    made, _, echo = recorded(8)
    large, small = (next(b for b in decode_batches(n) if b.max_query_len == 1) for n in (8, 3))
    made.run(large)
    made.run(small)
    assert echo.last is not None
    assert echo.last.token_ids.shape[0] == 4
    assert echo.last.slot_mapping[3:].tolist() == [99 * 4]
    assert not echo.last.block_table[:, small.block_table.shape[1] :].any()


def test_tokens_that_are_still_on_the_device_are_put_in_place() -> None:
    made, _, _ = recorded(4)
    batch = next(b for b in decode_batches(3) if b.max_query_len == 1)
    batch.carried = np.array([[0, 2], [1, 0]])
    hidden = made.run(batch, torch.tensor([41, -1]))
    assert hidden[:, 0].tolist() == [0, int(batch.token_ids[1]), 41], "what is no token becomes any"


def test_prompts_larger_batches_and_forgotten_recordings_do_not_fit() -> None:
    made, _, _ = recorded(2)
    batches = list(decode_batches(3))
    assert not any(made.fits(batch) for batch in batches if len(batch.token_ids) > 2)
    fitting = next(b for b in decode_batches(2) if b.max_query_len == 1)
    assert made.fits(fitting)
    made.forget()
    assert not made.fits(fitting)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def executor(with_graphs: bool, **options: Any) -> tuple[InferencePipelineExecutor, Repeater]:
    page = PageConfig(num_pages=80, page_size=8)
    made = InferencePipelineExecutor(
        PipelineConfig(BUNDLED, device="cpu", page=page, max_num_sequences=6, max_model_len=120, **options)
    )
    engine, repeater = made.pipeline.engine, Repeater()
    if with_graphs:
        engine.layers = pages_of(engine.model, 8, engine.num_pages + 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("penstock_core.distributed.engine.CUDARecorder", lambda device: repeater)
            patch.setattr(engine.model, "capturable", lambda layers: True)
            engine._graphs = engine._capture(6)
    return made, repeater


def pages_of(model: DecoderModel, page_size: int, count: int, dtype: torch.dtype | None = None) -> list[LayerPages]:
    config = model.config
    shape = PageShape(config.num_layers, page_size, config.num_kv_heads, config.head_dim, dtype or model.dtype)
    return allocate_pages(shape, count, CPU)


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
def test_a_model_gives_the_same_tokens_recorded_as_not(overlap: bool) -> None:
    prompts = ["Once upon a time", "The fox", "Beside the river there lived a baker and", "One", "A", "It was", "Why"]
    params = [
        SamplingParams(temperature=0.0 if n % 2 else 0.8, seed=n, max_tokens=10 + 3 * n, ignore_eos=True)
        for n in range(len(prompts))
    ]
    plain, _ = executor(False)
    fast, repeater = executor(True, overlap=overlap)
    expected = [result.token_ids for result in plain.generate(prompts, params)]
    assert [result.token_ids for result in fast.generate(prompts, params)] == expected
    assert set(repeater.replayed) >= {1, 2, 8}, "batches shrink down the ladder"
    fast.pipeline.close()
    plain.pipeline.close()


@pytest.mark.parametrize(
    ("page_size", "stored", "expected"),
    [
        (256, torch.bfloat16, True),
        (16, torch.bfloat16, False),
        (256, torch.int8, False),
        (256, torch.float8_e4m3fn, False),
    ],
)
def test_steps_are_captured_where_a_kernel_reads_pages_in_place(
    monkeypatch: pytest.MonkeyPatch, page_size: int, stored: torch.dtype, expected: bool
) -> None:
    varlen.convention_for.cache_clear()
    monkeypatch.setattr(varlen, "kernel", lambda: flash_2)
    monkeypatch.setattr(loading, "attention_for", lambda device, deterministic: CUDAPagedAttention(deterministic))
    model = load_model(BUNDLED, dtype="bfloat16")
    assert model.capturable(pages_of(model, page_size, 3, stored)) is expected
    varlen.convention_for.cache_clear()


def test_a_capture_that_fails_leaves_an_engine_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Repeater):
        def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
            raise RuntimeError("operation not permitted when stream is capturing")

    made, _ = executor(False)
    engine = made.pipeline.engine
    monkeypatch.setattr("penstock_core.distributed.engine.CUDARecorder", lambda device: Refusing())
    monkeypatch.setattr(engine.model, "capturable", lambda layers: True)
    engine.layers = pages_of(engine.model, 8, engine.num_pages + 1)
    assert engine._capture(6) is None
    (result,) = made.generate("The fox", SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(result.token_ids) == 3


def test_graphs_that_cannot_be_are_refused_by_name() -> None:
    with pytest.raises(InvalidConfiguration, match="graphs"):
        executor(False, graphs=True)
