"""Penstock: push LLM generation jobs onto Redis, get token streams back, lose nothing.

    from penstock import Client

    with Client() as client:
        job = client.submit("Once upon a time", max_tokens=100)
        for chunk in job.stream():
            print(chunk.text, end="", flush=True)

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.aio import AsyncClient, AsyncJobHandle
    from penstock.client import Client, JobHandle
    from penstock.embedded import EmbeddedBroker
    from penstock.submission import JobItem, SubmitOptions
    from penstock_core.protocol.errors import (
        BrokerMisconfigured,
        BrokerUnavailable,
        ClientClosed,
        InvalidConfiguration,
        InvalidRequest,
        JobCancelled,
        JobDead,
        JobError,
        JobExpired,
        JobFailed,
        JobNotFound,
        PenstockError,
        QueueFull,
        ResultTimeout,
    )
    from penstock_core.protocol.events import TokenChunk
    from penstock_core.protocol.jobs import (
        Choice,
        FinishReason,
        JobResult,
        JobState,
        Speculation,
        Timings,
        TokenLogprob,
        Usage,
    )
    from penstock_core.protocol.requests import (
        ChatMessage,
        GenerationRequest,
        JobOptions,
        ResponseFormat,
        SamplingParams,
    )
    from penstock_core.protocol.transitions import JobStatus, QueueSnapshot

_HOMES = {
    "penstock.client": ("Client", "JobHandle"),
    "penstock.aio": ("AsyncClient", "AsyncJobHandle"),
    "penstock.embedded": ("EmbeddedBroker",),
    "penstock.submission": ("JobItem", "SubmitOptions"),
    "penstock_core.protocol.errors": (
        "BrokerMisconfigured",
        "BrokerUnavailable",
        "ClientClosed",
        "InvalidConfiguration",
        "InvalidRequest",
        "JobCancelled",
        "JobDead",
        "JobError",
        "JobExpired",
        "JobFailed",
        "JobNotFound",
        "PenstockError",
        "QueueFull",
        "ResultTimeout",
    ),
    "penstock_core.protocol.events": ("TokenChunk",),
    "penstock_core.protocol.jobs": (
        "Choice",
        "FinishReason",
        "JobResult",
        "JobState",
        "Speculation",
        "Timings",
        "TokenLogprob",
        "Usage",
    ),
    "penstock_core.protocol.requests": (
        "ChatMessage",
        "GenerationRequest",
        "JobOptions",
        "ResponseFormat",
        "SamplingParams",
    ),
    "penstock_core.protocol.transitions": ("JobStatus", "QueueSnapshot"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 - what most people need comes first
    "Client",
    "AsyncClient",
    "JobHandle",
    "AsyncJobHandle",
    "EmbeddedBroker",
    "SubmitOptions",
    "JobItem",
    "SamplingParams",
    "ResponseFormat",
    "ChatMessage",
    "GenerationRequest",
    "JobOptions",
    "TokenChunk",
    "JobResult",
    "Choice",
    "Usage",
    "Timings",
    "Speculation",
    "TokenLogprob",
    "FinishReason",
    "JobState",
    "JobStatus",
    "QueueSnapshot",
    "PenstockError",
    "InvalidRequest",
    "InvalidConfiguration",
    "QueueFull",
    "JobError",
    "JobFailed",
    "JobDead",
    "JobCancelled",
    "JobExpired",
    "JobNotFound",
    "ResultTimeout",
    "BrokerUnavailable",
    "ClientClosed",
    "BrokerMisconfigured",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'penstock' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
