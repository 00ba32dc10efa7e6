"""The worker's spans: one per attempt of a job, its phases inside, linked to the attempt before it.

Spans are made where the process has an OpenTelemetry tracer provider, as under `opentelemetry-instrument`; nothing of
it is imported here. The submitter's `traceparent` is their parent. The context of an attempt's span is kept in Redis
while the attempt runs, because a worker that is killed takes its open spans with it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from penstock_core.protocol.jobs import JobResult
from penstock_core.protocol.trace_context import read_traceparent, write_traceparent
from penstock_core.protocol.transitions import ClaimedJob

_MS = 1_000_000  # nanoseconds


class AttemptSpan:
    """The span of one attempt, open from its claim until its worker lets the job go."""

    def __init__(self, tracer: Tracer, span: Any, claimed_ns: int) -> None:
        self._tracer = tracer
        self._span = span
        self._claimed_ns = claimed_ns
        self._outcome = "lost"

    @property
    def traceparent(self) -> str:
        """Its context."""
        here = self._span.get_span_context()
        return write_traceparent(here.trace_id, here.span_id, here.trace_flags)

    def outcome(self, outcome: str, error: str | None = None) -> None:
        """How the attempt ends."""
        self._outcome = outcome
        if error is not None:
            self._span.set_status(self._tracer.api.Status(self._tracer.api.StatusCode.ERROR, error))

    def ran(self, result: JobResult, queue_ms: float) -> None:
        """Show the phases of an attempt that reached its end; what is left until now is the publication."""
        timings, usage = result.timings, result.usage
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "gen_ai.response.finish_reasons": [choice.finish_reason.value for choice in result.choices],
            }
        )
        if timings.ttft_ms <= 0:
            return
        first_ns = self._claimed_ns + round(timings.ttft_ms * _MS)
        admitted_ns = self._claimed_ns + round(max(0.0, timings.queue_ms - queue_ms) * _MS)
        last_ns = first_ns + round(timings.decode_ms * _MS)
        self._tracer.phase("prefill", self._span, admitted_ns, first_ns)
        self._tracer.phase("decode", self._span, first_ns, last_ns)
        self._tracer.phase("publish", self._span, last_ns, max(last_ns, self._tracer.wall()))

    def end(self) -> None:
        """The worker lets the job go."""
        self._span.set_attribute("penstock.outcome", self._outcome)
        self._span.end()


class Tracer:
    """Makes spans."""

    def __init__(
        self, api: Any, queue: str, worker_id: str, served_name: str, wall: Callable[[], int] = time.time_ns
    ) -> None:
        self.api = api
        self.wall = wall
        self._tracer = api.get_tracer("penstock")
        self._name = f"process {queue}"
        self._attributes = {
            "messaging.system": "penstock",
            "messaging.operation.type": "process",
            "messaging.destination.name": queue,
            "gen_ai.request.model": served_name,
            "penstock.worker": worker_id,
        }

    def begin(self, claimed: ClaimedJob) -> AttemptSpan | None:
        """The span of a job just claimed; None where nobody records it."""
        now_ns = self.wall()
        context = None
        if claimed.traceparent is not None:
            parent = self.api.NonRecordingSpan(self._context(claimed.traceparent))
            context = self.api.set_span_in_context(parent)
        links = []
        if claimed.previous_span is not None:
            links.append(self.api.Link(self._context(claimed.previous_span), {"penstock.link": "previous attempt"}))
        span = self._tracer.start_span(
            self._name,
            context=context,
            kind=self.api.SpanKind.CONSUMER,
            links=links,
            start_time=now_ns,
            attributes={
                **self._attributes,
                "messaging.message.id": claimed.job_id,
                "penstock.attempt": claimed.attempt,
            },
        )
        if not span.is_recording():
            return None
        if claimed.attempt == 1:  # later ones count their wait from the submission, other attempts included
            waited_ms = max(0, claimed.claimed_ms - claimed.enqueued_ms)
            self.phase("queue", span, now_ns - waited_ms * _MS, now_ns)
        return AttemptSpan(self, span, now_ns)

    def phase(self, name: str, parent: Any, start_ns: int, end_ns: int) -> None:
        """A finished child of `parent`."""
        context = self.api.set_span_in_context(parent)
        self._tracer.start_span(name, context=context, start_time=start_ns).end(end_ns)

    def _context(self, traceparent: str) -> Any:
        trace_id, span_id, flags = read_traceparent(traceparent)
        return self.api.SpanContext(trace_id, span_id, is_remote=True, trace_flags=self.api.TraceFlags(flags))


def tracer(queue: str, worker_id: str, served_name: str) -> Tracer | None:
    """The worker's tracer; None where nobody has set up OpenTelemetry in this process."""
    api: Any = sys.modules.get("opentelemetry.trace")
    if api is None or isinstance(api.get_tracer_provider(), api.ProxyTracerProvider):
        return None
    return Tracer(api, queue, worker_id, served_name)
