"""The producer's span: one per submission, in applications that use OpenTelemetry.

Nothing of OpenTelemetry is imported here; where the application has not set up a tracer provider, nothing happens. The
span's context travels with the jobs (`traceparent`), and their workers' spans become its children.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from penstock_core.protocol.trace_context import read_traceparent, write_traceparent
from penstock_core.protocol.transitions import NewJob


@contextmanager
def submission(queue: str, jobs: Sequence[NewJob]) -> Iterator[Sequence[NewJob]]:
    """The jobs to submit inside the block: they carry the context of a new span, if the application records it.

    The span continues the trace of the application's current span, else the one `traceparent` that all jobs name. Jobs
    of a batch that name different ones keep theirs.
    """
    api: Any = sys.modules.get("opentelemetry.trace")
    if api is None or isinstance(api.get_tracer_provider(), api.ProxyTracerProvider):
        yield jobs
        return
    named = {job.options.traceparent for job in jobs}
    parent = named.pop() if len(named) == 1 else None
    context = None
    if parent is not None and not api.get_current_span().is_recording():
        trace_id, span_id, flags = read_traceparent(parent)
        remote = api.SpanContext(trace_id, span_id, is_remote=True, trace_flags=api.TraceFlags(flags))
        context = api.set_span_in_context(api.NonRecordingSpan(remote))
    attributes: dict[str, str | int] = {
        "messaging.system": "penstock",
        "messaging.operation.type": "send",
        "messaging.destination.name": queue,
    }
    if len(jobs) == 1:
        attributes["messaging.message.id"] = jobs[0].job_id
    else:
        attributes["messaging.batch.message_count"] = len(jobs)
    tracer = api.get_tracer("penstock")
    with tracer.start_as_current_span(
        f"send {queue}", context=context, kind=api.SpanKind.PRODUCER, attributes=attributes
    ) as span:
        if not span.is_recording():
            yield jobs
            return
        here = span.get_span_context()
        traceparent = write_traceparent(here.trace_id, here.span_id, here.trace_flags)
        yield [
            replace(job, options=job.options.model_copy(update={"traceparent": traceparent}))
            if job.options.traceparent in (None, parent)
            else job
            for job in jobs
        ]
