"""What a worker says of itself with every heartbeat: which model, how much room, how it fares.

Read by the dashboard, `penstock top`, autoscalers and the reclaim role; the queue's scripts never look inside.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from penstock_core.protocol.codec import decode_fields, encode_fields
from penstock_core.protocol.errors import UndecodableRecord

MAX_WORKER_RECORD_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One worker's record. Counters run from the worker's start; rates are of the last seconds.

    Attributes:
        worker_id: unique per process start.
        connection_id: Redis CLIENT ID of its doorbell connection; 0 if unknown. The connection's absence from
            CLIENT LIST shows the process gone before its leases run out.
        device: where it computes, in the machine's own names: `cpu`, `cuda:0`, `cuda:2,3`. ranks: processes of it.
        draining: finishes what it holds and claims no more.
        free_sequences, free_tokens: room left in the batch and in the KV cache.
        total_tokens: size of the KV cache in tokens.
        used_pages, cached_pages: of the `total_pages` of `page_size` tokens, those that sequences hold, and those kept
            for later prompts that begin alike; the rest are free.
        draft_acceptance: share of the drafted tokens that were right. speculation_gain: speed against decoding without
            drafts, as the worker estimates it from measured step times; 0: speculation is off.
    """

    worker_id: str
    model: str = ""
    host: str = ""
    pid: int = 0
    version: str = ""
    device: str = ""
    started_ms: int = 0
    connection_id: int = 0
    draining: bool = False
    running: int = 0
    max_sequences: int = 0
    free_sequences: int = 0
    free_tokens: int = 0
    total_tokens: int = 0
    ranks: int = 1
    page_size: int = 0
    total_pages: int = 0
    used_pages: int = 0
    cached_pages: int = 0
    jobs_done: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_per_s: float = 0.0
    prefix_hit_rate: float = 0.0
    draft_acceptance: float = 0.0
    speculation_gain: float = 0.0
    step_ms: float = 0.0
    fenced: int = 0
    broker_errors: int = 0

    def encode(self) -> bytes:
        """The record as stored."""
        return encode_fields(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> WorkerRecord:
        """The stored record; fields of a later version are ignored. Raises `UndecodableRecord`."""
        values = decode_fields(data, MAX_WORKER_RECORD_BYTES, "worker record")
        known: dict[str, Any] = {}
        for field in fields(cls):
            if field.name in values:
                value = values[field.name]
                if type(value).__name__ != field.type and not (field.type == "float" and type(value) is int):
                    raise UndecodableRecord(f"worker record: {field.name} is a {field.type}, got {value!r:.60}")
                known[field.name] = value
        if "worker_id" not in known:
            raise UndecodableRecord("worker record: it names no worker_id")
        return cls(**known)
