"""Examples of every answer, for `/openapi.json`. A test checks each against its schema and that none is missing."""

from __future__ import annotations

from typing import Any

_JOB = "0199f3f2a1b07c5e9d3c4b5a69788796"
_FILE = "file-0199f3f2a1b07c5e9d3c4b5a69788796"
_BATCH = "batch_0199f3f2a1b07c5e9d3c4b5a69788796"
_ANSWER = {
    "request_id": _JOB,
    "model": "penstock-story",
    "prompt_tokens": 5,
    "generated_tokens": 3,
    "cached_tokens": 0,
    "text": " lantern. ",
    "token_ids": [311, 1204, 13],
    "latency_ms": 41.7,
    "throughput_tokens_per_sec": 71.9,
    "finish_reason": "length",
    "choices": None,
    "speculation": None,
}
_VIEW = {
    "id": _JOB,
    "tenant": "mill",
    "state": "queued",
    "priority": 7,
    "attempt": 0,
    "crashes": 0,
    "submitted_ms": 1760000000000,
    "started_ms": None,
    "finished_ms": None,
    "deadline_ms": None,
    "tokens": 0,
    "metadata": {"order": "1234"},
    "result": None,
    "error": None,
}
_QUOTA: dict[str, Any] = {
    "tenant": "mill",
    "queued": 12,
    "running": 3,
    "tokens_charged": 5400,
    "limits": {"max_queued": 1000, "max_running": 8, "tokens_per_minute": 60000},
    "requests_per_minute": 600,
}
_METRICS = {
    "queue": "penstock-story",
    "scope": "queue",
    "waiting": 12,
    "running": 3,
    "delayed": 0,
    "dead": 0,
    "oldest_wait_ms": 830,
    "tokens_per_s": 412.5,
    "waiting_bytes": 48211,
    "counters": {"submitted": 9120, "completed": 9101},
    "depths": [{"priority": 5, "tenant": "mill", "depth": 12, "oldest_wait_ms": 830}],
    "workers": [
        {
            "worker_id": "box-1-4711-9f2e",
            "model": "penstock-story",
            "host": "box-1",
            "device": "cpu",
            "ranks": 1,
            "total_pages": 4096,
            "used_pages": 320,
            "cached_pages": 911,
            "running": 3,
            "free_sequences": 29,
            "free_tokens": 60416,
            "total_tokens": 65536,
            "tokens_per_s": 412.5,
            "prefix_hit_rate": 0.41,
            "draft_acceptance": 0.63,
            "speculation_gain": 1.42,
            "draining": False,
        }
    ],
}
_USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 3,
    "total_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 0},
}
_CHAT = {
    "id": f"chatcmpl-{_JOB}",
    "created": 1760000000,
    "object": "chat.completion",
    "model": "penstock-story",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "A fox lost"},
            "finish_reason": "length",
            "logprobs": None,
        }
    ],
    "usage": _USAGE,
}
_COMPLETION = {
    "id": f"cmpl-{_JOB}",
    "created": 1760000000,
    "object": "text_completion",
    "model": "penstock-story",
    "choices": [{"index": 0, "text": " lantern.", "finish_reason": "length", "logprobs": None}],
    "usage": _USAGE,
}
_MODEL = {"id": "penstock-story", "object": "model", "created": 1760000000, "owned_by": "penstock"}
_STORED = {
    "id": _FILE,
    "object": "file",
    "bytes": 1234,
    "created_at": 1760000000,
    "expires_at": 1760604800,
    "filename": "requests.jsonl",
    "purpose": "batch",
    "status": "processed",
}
_RUN = {
    "id": _BATCH,
    "object": "batch",
    "endpoint": "/v1/chat/completions",
    "errors": None,
    "input_file_id": _FILE,
    "completion_window": "24h",
    "status": "in_progress",
    "output_file_id": None,
    "error_file_id": None,
    "created_at": 1760000000,
    "expires_at": 1760086400,
    "in_progress_at": 1760000001,
    "finalizing_at": None,
    "completed_at": None,
    "failed_at": None,
    "expired_at": None,
    "cancelling_at": None,
    "cancelled_at": None,
    "request_counts": {"total": 300, "completed": 120, "failed": 0},
    "metadata": {"run": "1"},
}


_RESPONSE = {
    "id": f"resp_{_JOB}",
    "object": "response",
    "created_at": 1760000000,
    "status": "queued",
    "model": "penstock-story",
    "output": [],
    "error": None,
    "incomplete_details": None,
    "usage": None,
    "metadata": {"run": "1"},
    "parallel_tool_calls": False,
    "tool_choice": "none",
    "tools": [],
}


def _page(one: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": [one], "first_id": one["id"], "last_id": one["id"], "has_more": False}


STREAM = (
    'event: tokens\nid: 2\ndata: {"index": 0, "offset": 0, "token_ids": [311, 1204], "text": " lantern", '
    '"finish_reason": null}\n\nevent: end\ndata: {"state": "completed", "usage": {"prompt_tokens": 5, '
    '"completion_tokens": 2, "cached_tokens": 0}}\n\n'
)
CHAT_STREAM = (
    f'data: {{"id": "chatcmpl-{_JOB}", "created": 1760000000, "object": "chat.completion.chunk", "model": '
    '"penstock-story", "choices": [{"index": 0, "delta": {"content": "A fox"}, "finish_reason": null, "logprobs": '
    "null}]}\n\ndata: [DONE]\n\n"
)

RESPONSE_STREAM = (
    'event: response.output_text.delta\ndata: {"type": "response.output_text.delta", "sequence_number": 6, "item_id": '
    f'"msg_{_JOB}", "output_index": 0, "content_index": 0, "delta": "A fox", "logprobs": []}}\n\n'
)

JSON: dict[str, Any] = {
    "POST /v1/responses": _RESPONSE,
    "GET /v1/responses/{response_id}": _RESPONSE,
    "POST /v1/responses/{response_id}/cancel": {**_RESPONSE, "status": "cancelled"},
    "POST /v1/generate": _ANSWER,
    "POST /v1/batch": {
        "responses": [{"response": _ANSWER, "error": None}],
        "total_latency_ms": 42.0,
        "batch_throughput_tokens_per_sec": 71.4,
    },
    "POST /v1/jobs": {
        "id": _JOB,
        "state": "queued",
        "status_url": f"/v1/jobs/{_JOB}",
        "stream_url": f"/v1/jobs/{_JOB}/stream",
    },
    "GET /v1/jobs": [_VIEW],
    "GET /v1/jobs/{job_id}": _VIEW,
    "DELETE /v1/jobs/{job_id}": {"id": _JOB, "outcome": "cancelled"},
    "POST /v1/jobs/{job_id}/requeue": {"id": _JOB, "outcome": "requeued"},
    "GET /v1/quota": _QUOTA,
    "GET /v1/tenants/{name}/quota": _QUOTA,
    "PUT /v1/tenants/{name}/quota": _QUOTA,
    "GET /v1/health": {
        "status": "ok",
        "queue": "penstock-story",
        "broker": "up",
        "workers": 2,
        "version": "0.1.0",
        "detail": None,
    },
    "GET /v1/metrics": _METRICS,
    "POST /v1/chat/completions": _CHAT,
    "POST /v1/completions": _COMPLETION,
    "GET /v1/models": {"object": "list", "data": [_MODEL]},
    "GET /v1/models/{model}": _MODEL,
    "POST /v1/files": _STORED,
    "GET /v1/files": _page(_STORED),
    "GET /v1/files/{file_id}": _STORED,
    "DELETE /v1/files/{file_id}": {"id": _FILE, "object": "file", "deleted": True},
    "POST /v1/batches": _RUN,
    "GET /v1/batches": _page(_RUN),
    "GET /v1/batches/{batch_id}": _RUN,
    "POST /v1/batches/{batch_id}/cancel": {**_RUN, "status": "cancelling", "cancelling_at": 1760000100},
}
"""The good answer of each operation that answers JSON."""

TEXT: dict[str, dict[str, str]] = {
    "GET /v1/jobs/{job_id}/stream": {"text/event-stream": STREAM},
    "POST /v1/chat/completions": {"text/event-stream": CHAT_STREAM},
    "POST /v1/completions": {"text/event-stream": CHAT_STREAM.replace("chatcmpl", "cmpl")},
    "POST /v1/responses": {"text/event-stream": RESPONSE_STREAM},
    "GET /v1/responses/{response_id}": {"text/event-stream": RESPONSE_STREAM},
    "GET /metrics": {
        "text/plain": '# TYPE penstock_queue_waiting_jobs gauge\npenstock_queue_waiting_jobs{queue="q"} 12.0\n'
    },
    "GET /v1/files/{file_id}/content": {"application/octet-stream": '{"custom_id": "r-1", "method": "POST"}\n'},
}
"""And of those that answer something else, by media type."""

REQUESTS: dict[str, dict[str, Any]] = {
    "POST /v1/responses": {"model": "penstock-story", "input": "Tell me a story about a fox.", "background": True},
    "POST /v1/batch": {"requests": [{"prompt": "The miller lost her", "max_tokens": 64, "seed": 7}]},
    "PUT /v1/tenants/{name}/quota": _QUOTA["limits"],
    "POST /v1/batches": {
        "input_file_id": _FILE,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    },
}
"""Of requests whose model has no example of its own."""

_NATIVE_ERRORS: dict[int, tuple[str, str, dict[str, Any]]] = {
    401: ("unauthorized", "this gateway asks for an API key: send 'Authorization: Bearer <key>'", {}),
    403: ("forbidden", "this needs an operator's key; yours is a tenant's", {}),
    404: ("not_found", f"no job {_JOB} in queue penstock-story", {}),
    409: ("cancelled", f"job {_JOB}: cancelled by request", {"job_id": _JOB}),
    413: ("too_large", "the request's body is larger than 8388608 bytes; send less, or raise --max-body-bytes", {}),
    422: ("invalid_request", "temperature: Input should be greater than or equal to 0", {"field": "temperature"}),
    429: (
        "queue_full",
        "queue penstock-story: 1000 jobs of tenant mill wait, max_queued is 1000; submit slower or raise it",
        {"retry_after_s": 2.5},
    ),
    500: ("error", f"job {_JOB}: the engine failed", {"job_id": _JOB}),
    503: ("broker_unavailable", "Redis at redis://redis:6379/0: connection refused; start Redis there", {}),
    504: (
        "timeout",
        f"job {_JOB} has not ended after 300 s and goes on: GET /v1/jobs/{_JOB} has its result later, ...",
        {"job_id": _JOB},
    ),
}
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}


def error(status: int, *, openai: bool) -> dict[str, Any]:
    """The body of an error with this status, in the native form or in OpenAI's."""
    code, message, more = _NATIVE_ERRORS[422 if status == 400 else status]
    if not openai:
        return {"error": {"code": code, "message": message, **more}}
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": more.get("field"), "code": code}}
