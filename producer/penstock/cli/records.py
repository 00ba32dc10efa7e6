"""The JSON that commands print: one function per kind of record, the only place that names its fields."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import JobResult, TokenLogprob
from penstock_core.protocol.transitions import DeadLetter, JobStatus, QueueSnapshot


def status_record(status: JobStatus) -> dict[str, Any]:
    """A job's status; times in milliseconds of the server's clock."""
    return asdict(status) | {"state": str(status.state)}


def chunk_record(job_id: str, chunk: TokenChunk) -> dict[str, Any]:
    """Tokens of a stream."""
    record: dict[str, Any] = {
        "event": "tokens",
        "job_id": job_id,
        "attempt": chunk.attempt,
        "index": chunk.index,
        "offset": chunk.offset,
        "token_ids": list(chunk.token_ids),
        "text": chunk.text,
    }
    if chunk.finish_reason is not None:
        record["finish_reason"] = str(chunk.finish_reason)
    if chunk.logprobs is not None:
        record["logprobs"] = [_logprob(entry) for entry in chunk.logprobs]
    return record


def outcome_record(
    job_id: str, state: str, attempt: int | None, result: JobResult | None, error: dict[str, str] | None
) -> dict[str, Any]:
    """How a job ended, with what it left behind."""
    record: dict[str, Any] = {"job_id": job_id, "state": state, "attempt": attempt}
    record |= result_record(result) if result is not None else {"choices": []}
    record["error"] = error
    return record


def result_record(result: JobResult) -> dict[str, Any]:
    """A result: its choices, counts and timings."""
    record: dict[str, Any] = {
        "text": result.text,
        "choices": [
            {
                "index": choice.index,
                "text": choice.text,
                "token_ids": list(choice.token_ids),
                "finish_reason": str(choice.finish_reason),
            }
            | ({"logprobs": [_logprob(entry) for entry in choice.logprobs]} if choice.logprobs is not None else {})
            for choice in result.choices
        ],
        "usage": asdict(result.usage),
        "timings": asdict(result.timings),
        "worker": result.worker,
        "model": result.model,
    }
    if result.speculation is not None:
        record["speculation"] = asdict(result.speculation)
    if result.prompt_logprobs is not None:
        record["prompt_logprobs"] = [entry and _logprob(entry) for entry in result.prompt_logprobs]
    return record


def letter_record(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter."""
    return asdict(letter)


def snapshot_record(snapshot: QueueSnapshot, queue: str) -> dict[str, Any]:
    """A queue at one moment."""
    return {
        "queue": queue,
        "now_ms": snapshot.now_ms,
        "waiting": snapshot.waiting,
        "oldest_wait_ms": snapshot.oldest_wait_ms,
        "running": snapshot.running,
        "delayed": snapshot.delayed,
        "dead": snapshot.dead,
        "lines": [asdict(line) for line in snapshot.lines],
        "workers": [
            {"worker_id": view.worker_id, "heartbeat_age_ms": max(0, snapshot.now_ms - view.heartbeat_ms)}
            | (asdict(view.record) if view.record is not None else {})
            for view in snapshot.workers
        ],
        "stats": snapshot.stats,
    }


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    chosen, *others = entry.tokens or (None,) * (1 + len(entry.top))
    top = [
        {"token_id": token_id, "token": token, "logprob": value}
        for (token_id, value), token in zip(entry.top, others, strict=True)
    ]
    return {"token": chosen, "logprob": entry.logprob, "top": top}
