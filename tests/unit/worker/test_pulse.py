"""The pulse: the record tells the truth, a stalled engine is not healthy, and an orphan drains."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock_core.cache import CacheStatistics
from penstock_core.pipeline import EngineDescription
from penstock_core.speculative import SpeculationStatistics
from penstock_worker.drain import Drain
from penstock_worker.health import HealthFile, read_all
from penstock_worker.pulse import STALLED_AFTER_S, Pulse
from penstock_worker.settings import WorkerSettings
from tests.unit.worker.conftest import WORKER, Bench
from tests.unit.worker.doubles import ScriptedEngine
from tests.unit.worker.test_reclaim import Bell


@pytest.fixture
def drain(bench: Bench) -> Drain:
    return Drain(clock=bench.clock)


@pytest.fixture
def settings() -> WorkerSettings:
    return WorkerSettings(worker_id=WORKER, max_num_sequences=8)


@pytest.fixture
def make_pulse(bench: Bench, drain: Drain, settings: WorkerSettings, tmp_path: Path) -> Callable[..., Pulse]:
    def make(**changes: object) -> Pulse:
        bell: Any = Bell(client_id=42)
        return Pulse(
            settings.model_copy(update=changes),
            "tiny",
            bench.broker,
            bench.engine,
            bench.held,
            bench.publisher,
            bell,
            drain,
            bench.metrics,
            HealthFile(tmp_path, WORKER),
            clock=bench.clock,
        )

    return make


@pytest.fixture
def pulse(make_pulse: Callable[..., Pulse]) -> Pulse:
    return make_pulse()


async def test_the_record_tells_what_the_worker_does(bench: Bench, pulse: Pulse, drain: Drain) -> None:
    await bench.hold(2)
    await bench.step(5)
    record = pulse.describe()
    assert (record.worker_id, record.model, record.pid) == (WORKER, "tiny", os.getpid())
    assert (record.connection_id, record.running, record.free_sequences, record.max_sequences) == (42, 2, 6, 8)
    assert (record.tokens_out, record.draining) == (10, False)
    drain.request("test")
    assert pulse.describe().draining
    assert type(record).decode(record.encode()) == record


async def test_the_rate_follows_the_tokens(bench: Bench, pulse: Pulse) -> None:
    await bench.hold()
    for _ in range(20):
        bench.engine.step(10)
        bench.publisher.collect()
        bench.clock.tick(1.0)
        pulse.beat()
    assert pulse.describe().tokens_per_s == pytest.approx(10.0, rel=0.05)


async def test_an_engine_with_work_and_no_progress_is_stalled(bench: Bench, pulse: Pulse) -> None:
    await bench.hold()
    pulse.beat()
    assert pulse.health().status == "ready"
    bench.clock.tick(STALLED_AFTER_S + 1)
    pulse.beat()
    assert pulse.health().status == "stalled"
    await bench.step()
    pulse.beat()
    assert pulse.health().status == "ready"


async def test_it_writes_the_health_file_and_takes_it_along(pulse: Pulse, tmp_path: Path) -> None:
    pulse.start()
    async with asyncio.timeout(60):
        while not read_all(tmp_path):
            await asyncio.sleep(0.01)
    await pulse.shutdown()
    assert read_all(tmp_path) == []


async def test_an_idle_engine_is_not_stalled(bench: Bench, pulse: Pulse) -> None:
    for _ in range(3):
        bench.clock.tick(STALLED_AFTER_S + 1)
        pulse.beat()
    assert pulse.health().is_healthy


async def test_a_dead_engine_is_noticed_without_any_output(bench: Bench, pulse: Pulse) -> None:
    bench.engine.alive = False
    pulse.beat()
    assert bench.publisher.engine_died.is_set()


async def test_a_dead_rank_is_noticed_while_nothing_runs(bench: Bench, pulse: Pulse) -> None:
    bench.engine.broken = "rank 1 (process 7) ended with exit code -9"
    pulse.beat()
    assert bench.publisher.engine_died.is_set()


async def test_the_record_names_the_real_device_and_its_pages(
    bench: Bench, make_pulse: Callable[..., Pulse], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_pulse().describe().device == "cpu", "--device is auto"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setattr(bench.engine, "describe", lambda: EngineDescription("cuda:1", 2, 100, 16))
    pages = CacheStatistics(*[0] * len(CacheStatistics.__dataclass_fields__))
    pages = replace(pages, total_pages=100, used_pages=30, cached_pages=20)
    monkeypatch.setattr(bench.engine, "statistics", lambda: replace(ScriptedEngine().statistics(), cache=pages))
    record = make_pulse().describe()
    assert (record.device, record.ranks) == ("cuda:5,6", 2)
    assert (record.total_pages, record.used_pages, record.cached_pages, record.page_size) == (100, 30, 20, 16)


async def test_speculation_is_told_in_the_record_and_the_metrics(
    bench: Bench, pulse: Pulse, monkeypatch: pytest.MonkeyPatch
) -> None:
    deepest = [0] * 10
    seen = SpeculationStatistics(
        drafted=12,
        accepted=7,
        drafted_at=(6, 4, *[0] * 7, 2),
        accepted_at=(5, 2, *[0] * 8),
        depths=(3, 2, 2, *deepest),
        drafted_by={"draft": 8, "suffix": 4},
        accepted_by={"draft": 5, "suffix": 2},
        propose_s=1.0,
        step_s=3.0,
        plain_s=6.0,
    )
    assert pulse.describe().speculation_gain == 0.0
    monkeypatch.setattr(bench.engine, "statistics", lambda: replace(ScriptedEngine().statistics(), speculation=seen))
    assert pulse.describe().speculation_gain == 1.5
    pulse.beat()
    assert bench.counter("drafted_tokens", proposer="draft") == 8
    assert bench.counter("accepted_tokens", proposer="suffix") == 2
    assert bench.counter("drafted_tokens", proposer="ngram") == 0
    assert bench.counter("drafted_tokens_at", position="1") == 6
    assert bench.counter("drafted_tokens_at", position="8") == 2  # with all that are deeper
    assert bench.counter("draft_depth", depth="2") == 2
    assert bench.counter("speculation_seconds", part="plain") == 6.0


@pytest.mark.parametrize(
    ("parent", "drains"), [(os.getppid(), False), (1 if os.getppid() != 1 else 2, True)], ids=["alive", "gone"]
)
async def test_a_worker_whose_supervisor_is_gone_drains(
    drain: Drain, make_pulse: Callable[..., Pulse], parent: int, drains: bool
) -> None:
    pulse = make_pulse(supervisor_pid=parent)
    pulse.beat()
    pulse.beat()
    assert drain.requested.is_set() is drains
    assert not drain.hurried.is_set()
