"""Evicted prefixes move to host memory and come back; a slot never has two uses."""

from __future__ import annotations

import pytest

from penstock_core.cache import HostPages
from tests.unit.batching.support import Bench
from tests.unit.pipeline.fake_engine import FakeEngine, pipeline, request, run_one


def name(number: int) -> bytes:
    return bytes([number]) * 32


def test_coldest_slot_is_given_up_first() -> None:
    host = HostPages(2)
    for number in (1, 2, 1, 3):  # 1 is used again before 3 comes
        host.offload(10 + number, name(number), b"a")
    assert host.count([name(1)]) == host.count([name(3)]) == 1
    assert host.count([name(2)]) == 0
    host.check()


def test_chain_is_found_up_to_its_first_gap() -> None:
    host = HostPages(4)
    for number in (1, 2, 4):
        host.offload(number, name(number), b"a")
    assert host.count([name(n) for n in (1, 2, 3, 4)]) == 2
    assert host.count([]) == 0


def test_slot_that_is_read_by_this_step_is_not_written_by_it() -> None:
    host = HostPages(1)
    host.offload(5, name(1), b"a")
    host.take_moves()
    slots = host.take([name(1)])
    host.restore(slots, [7])
    host.offload(6, name(2), b"a")  # there is no room: the only slot is on its way out
    assert host.take_moves() == ([], [(0, 7)])
    host.check()
    host.offload(6, name(2), b"a")
    assert host.take_moves() == ([(6, 0)], [])


def test_slot_given_up_twice_in_a_step_is_written_once() -> None:
    host = HostPages(1)
    host.offload(5, name(1), b"a")
    host.offload(6, name(2), b"a")
    assert host.take_moves() == ([(6, 0)], [])
    assert host.count([name(1)]) == 0
    host.check()


def test_tenant_can_be_forgotten() -> None:
    host = HostPages(4)
    host.offload(1, name(1), b"a")
    host.offload(2, name(2), b"b")
    assert host.forget(b"a") == 1
    assert host.count([name(1)]) == 0
    assert host.forget(None) == 1
    host.take_moves()
    host.check()
    assert host.num_used == 0


def test_failed_step_leaves_no_page_that_was_not_written() -> None:
    bench = Bench(num_pages=8, page_size=4, max_model_len=32)
    bench.cache.host = HostPages(16)
    bench.add(20, 1, salt="s")
    bench.run()
    bench.add(24, 1)  # evicts some of the first one's pages
    batch = bench.batcher.schedule()
    assert batch is not None
    assert batch.offloads
    bench.batcher.fail(batch)
    assert bench.cache.statistics().host_pages == 0
    bench.cache.check(idle=True)


@pytest.mark.parametrize("length", [40, 41, 43])
def test_prefix_comes_back_from_host_memory_unchanged(length: int) -> None:
    engine = FakeEngine(num_pages=24, page_size=4, max_model_len=96, host_pages=64)
    pipe = pipeline(engine)
    cold = run_one(request("cold", length, temperature=1.0), pipe)
    for n in range(3):
        run_one(request(f"other {n}", 80, cache_salt=f"{n}"), pipe)
    before = pipe.statistics().cache
    assert before.offloaded_pages > 10
    warm = run_one(request("warm", length, temperature=1.0), pipe)
    assert warm.choices == cold.choices
    assert warm.usage.cached_tokens >= (length - 1) // 4 * 4
    assert pipe.statistics().cache.restored_pages >= length // 4
    pipe.cache.check(idle=True)


def test_invalidation_reaches_host_memory() -> None:
    pipe = pipeline(FakeEngine(num_pages=24, page_size=4, max_model_len=96, host_pages=64))
    run_one(request("a", 40, cache_salt="a"), pipe)
    for n in range(3):
        run_one(request(f"other {n}", 80, cache_salt="b"), pipe)
    assert pipe.statistics().cache.host_pages > 0
    pipe.cache.invalidate("a")
    assert run_one(request("a", 40, cache_salt="a"), pipe).usage.cached_tokens == 0
