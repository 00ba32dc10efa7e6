"""/metrics and /health over HTTP: every series at zero from the start, and no client can hold the server up."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock_core.protocol.transitions import DepthLine, QueueSnapshot
from penstock_worker.health import Health
from penstock_worker.metrics import WorkerMetrics
from penstock_worker.status_server import StatusServer


class Bench:
    def __init__(self) -> None:
        self.metrics = WorkerMetrics("q", "tiny")
        self.status = "ready"
        self.port = 0

    def health(self) -> Health:
        return Health("w1", os.getpid(), self.status, True, 3, time.time())

    async def before_scrape(self) -> None:
        lines = [DepthLine(5, "a", 2, 1_000), DepthLine(5, "b", 3, 4_000), DepthLine(9, "a", 1, 9_000)]
        self.metrics.show_queue(QueueSnapshot(10_000, lines, 4, 1, 0, {}, []))

    async def ask(self, request: bytes) -> tuple[int, str]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        return (int(head.split()[1]) if head else 0), body.decode()

    async def get(self, path: str) -> tuple[int, str]:
        return await self.ask(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


@pytest.fixture
async def served() -> AsyncIterator[Bench]:
    made = Bench()
    server = StatusServer(made.metrics.registry, made.health, made.before_scrape, "127.0.0.1", 0)
    made.port = await server.start()
    yield made
    await server.shutdown()


async def test_every_series_is_present_at_zero() -> None:
    samples = [sample for family in WorkerMetrics("q", "m").registry.collect() for sample in family.samples]
    measured = [sample for sample in samples if not sample.name.endswith("_created")]
    assert {sample.value for sample in measured} == {0.0}
    names = {sample.name for sample in measured}
    assert {
        "penstock_queue_depth",
        "penstock_oldest_wait_seconds",
        "penstock_queue_residence_seconds_count",
        "penstock_prefill_wait_seconds_count",
        "penstock_decode_seconds_count",
        "penstock_redelivered_jobs_total",
        "penstock_fenced_writes_total",
        "penstock_reclaim_latency_seconds_count",
        "penstock_dead_letters_total",
        "penstock_prompt_tokens_total",
        "penstock_prompt_tokens_cached_total",
        "penstock_completion_tokens_total",
        "penstock_drafted_tokens_total",
        "penstock_accepted_tokens_at_total",
        "penstock_draft_depth_total",
        "penstock_speculation_seconds_total",
    } <= names
    assert {sample.labels["priority"] for sample in measured if sample.name == "penstock_queue_depth"} == set(
        "0123456789"
    )


async def test_metrics_are_scraped_with_the_queue_of_this_moment(served: Bench) -> None:
    code, body = await served.get("/metrics?x=1")
    assert code == 200
    families = {family.name: family for family in text_string_to_metric_families(body)}
    depths = {sample.labels["priority"]: sample.value for sample in families["penstock_queue_depth"].samples}
    assert (depths["5"], depths["9"], depths["0"]) == (5.0, 1.0, 0.0)
    assert families["penstock_oldest_wait_seconds"].samples[0].value == 9.0


async def test_health_is_told_with_its_status_code(served: Bench) -> None:
    code, body = await served.get("/health")
    assert (code, json.loads(body)["healthy"], json.loads(body)["held"]) == (200, True, 3)
    served.status = "stalled"
    code, body = await served.get("/health")
    assert (code, json.loads(body)["healthy"]) == (503, False)


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (b"GET /secrets HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"nonsense\r\n\r\n", 405),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n", 0),
    ],
)
async def test_other_requests_are_refused(served: Bench, request_bytes: bytes, code: int) -> None:
    assert (await served.ask(request_bytes))[0] == code
    assert (await served.get("/health"))[0] == 200
