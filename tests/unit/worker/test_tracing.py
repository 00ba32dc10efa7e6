"""Spans: one trace from the submission to the end, whatever happens to the attempts in between."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator

import fakeredis
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from penstock import Client
from penstock_core.protocol.jobs import FinishReason, Timings
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.trace_context import write_traceparent
from penstock_worker.outbox import Bury
from penstock_worker.tracing import tracer
from tests.unit.worker.conftest import Bench, assembled

SUBMITTER = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """An application with OpenTelemetry: ended spans are kept here."""
    made = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(made))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield made
    provider.shutdown()


@pytest.fixture
async def traced(exporter: InMemorySpanExporter, bench: Bench) -> Bench:
    """A worker that was assembled where spans are recorded."""
    return bench


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def traceparent_of(span: ReadableSpan) -> str:
    context = span.get_span_context()
    assert context is not None
    return write_traceparent(context.trace_id, context.span_id, context.trace_flags)


async def test_a_trace_goes_on_across_a_killed_attempt(
    exporter: InMemorySpanExporter, traced: Bench, fake_redis: fakeredis.FakeRedis, keys: QueueKeys
) -> None:
    with (
        Client(queue=keys.queue, mode="poll", connection=fake_redis) as client,
        trace.get_tracer("app").start_as_current_span("request"),
    ):
        job_id = client.submit("once upon a time", max_tokens=3).id
    victim = traced
    await victim.claimer.claim_once()
    await victim.step(2)
    first = victim.held.by_job(job_id).span.traceparent
    victim.driver.client.zadd(keys.leases, {job_id: 1})  # it is killed: nothing of it ends any more
    victim.driver.reclaim()
    async with assembled(fake_redis, keys, "heir") as heir:
        await heir.claimer.claim_once()
        await heir.step()
    assert victim.driver.state(job_id) == "completed"

    (request,), (send,) = named(exporter, "request"), named(exporter, f"send {keys.queue}")
    assert send.kind is SpanKind.PRODUCER
    assert send.parent is not None
    assert send.parent.span_id == request.get_span_context().span_id
    assert victim.driver.status(job_id).traceparent == traceparent_of(send)
    (attempt,) = named(exporter, f"process {keys.queue}")
    assert attempt.kind is SpanKind.CONSUMER
    assert attempt.parent is not None
    assert attempt.parent.span_id == send.get_span_context().span_id
    assert attempt.attributes is not None
    assert attempt.attributes["penstock.attempt"] == 2
    assert attempt.attributes["penstock.outcome"] == "completed"
    (link,) = attempt.links
    assert write_traceparent(link.context.trace_id, link.context.span_id, link.context.trace_flags) == first
    (queued,) = named(exporter, "queue")
    assert queued.parent is not None
    assert f"{queued.parent.span_id:016x}" in first, "the first attempt's wait was told before it was killed"
    everything = exporter.get_finished_spans()
    assert len({span.get_span_context().trace_id for span in everything}) == 1


async def test_the_phases_follow_one_another_inside_the_attempt(
    exporter: InMemorySpanExporter, traced: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Timings(queue_ms=0.1, prefill_ms=0.2, ttft_ms=0.3, decode_ms=0.4)
    monkeypatch.setattr("tests.unit.worker.doubles.Timings", lambda: measured)
    traced.driver.submit("job", traceparent=SUBMITTER)
    await traced.claimer.claim_once()
    await traced.step(2)
    traced.engine.finish(traced.held.by_job("job").request_id, FinishReason.STOP)
    await traced.step()
    (attempt,) = named(exporter, f"process {traced.keys.queue}")
    assert traceparent_of(attempt).split("-")[1] == SUBMITTER.split("-")[1]
    spans = [named(exporter, name)[0] for name in ("queue", "prefill", "decode", "publish")]
    for span in spans:
        assert span.parent is not None
        assert span.parent.span_id == attempt.get_span_context().span_id
    for earlier, later in itertools.pairwise(spans):
        assert earlier.end_time <= later.start_time
    assert attempt.attributes is not None
    assert attempt.attributes["gen_ai.usage.output_tokens"] > 0


async def test_a_fenced_attempt_ends_as_lost_and_a_buried_one_as_an_error(
    exporter: InMemorySpanExporter, traced: Bench
) -> None:
    lost, buried = await traced.hold(2)
    traced.driver.client.zadd(traced.keys.leases, {lost.job_id: 1})
    traced.driver.reclaim()
    traced.publisher.end(buried, Bury("undecodable", "no request"))
    await traced.step()
    outcomes = {
        span.attributes["messaging.message.id"]: span for span in named(exporter, f"process {traced.keys.queue}")
    }
    assert outcomes[lost.job_id].attributes["penstock.outcome"] == "lost"
    assert outcomes[buried.job_id].attributes["penstock.outcome"] == "dead"
    assert outcomes[buried.job_id].status.status_code is StatusCode.ERROR


async def test_an_unsampled_submission_is_not_traced(exporter: InMemorySpanExporter, traced: Bench) -> None:
    traced.driver.submit("job", traceparent=SUBMITTER[:-1] + "0")
    await traced.claimer.claim_once()
    assert traced.held.by_job("job").span is None
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize("loaded", [False, True])
async def test_nothing_is_traced_where_nobody_uses_opentelemetry(
    monkeypatch: pytest.MonkeyPatch, fake_redis: fakeredis.FakeRedis, keys: QueueKeys, loaded: bool
) -> None:
    """A library may have loaded it (redis-py does); without a tracer provider it is not in use."""
    if not loaded:
        monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    assert tracer(keys.queue, "w1", "tiny") is None
    with Client(queue=keys.queue, mode="poll", connection=fake_redis) as client:
        job = client.submit("a")
        assert job.status().traceparent is None
        job.cancel()


def test_our_modules_import_nothing_of_opentelemetry() -> None:
    code = "import sys; sys.modules['opentelemetry'] = None; import penstock.client, penstock.aio, penstock_worker.app"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_explicit_contexts_of_a_batch_are_kept(
    exporter: InMemorySpanExporter, fake_redis: fakeredis.FakeRedis, keys: QueueKeys
) -> None:
    with Client(queue=keys.queue, mode="poll", connection=fake_redis) as client:
        own, other = client.submit_many([{"prompt": "a", "traceparent": SUBMITTER}, "b"])
        one = client.submit("c", traceparent=SUBMITTER)
        batch, single = named(exporter, f"send {keys.queue}")
        assert own.status().traceparent == SUBMITTER
        assert other.status().traceparent == traceparent_of(batch)
        assert one.status().traceparent == traceparent_of(single)
        assert traceparent_of(single).split("-")[1] == SUBMITTER.split("-")[1], "the caller's trace goes on"
        for job in (own, other, one):
            job.cancel()
