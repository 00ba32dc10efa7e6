"""W3C trace context as it travels with a job: `00-<trace id>-<span id>-<flags>`, all in hexadecimal."""

from __future__ import annotations


def read_traceparent(traceparent: str) -> tuple[int, int, int]:
    """Trace id, span id and flags of a `traceparent` that has the right form, as `JobOptions` holds it to."""
    _, trace_id, span_id, flags = traceparent.split("-")
    return int(trace_id, 16), int(span_id, 16), int(flags, 16)


def write_traceparent(trace_id: int, span_id: int, flags: int) -> str:
    """The `traceparent` of a span."""
    return f"00-{trace_id:032x}-{span_id:016x}-{flags:02x}"
