"""What may remain in Redis after a test: only keys of the documented catalogue, each with a TTL or a reason."""

from __future__ import annotations

import re
from typing import Any

import redis

_ENDED = {b"completed", b"failed", b"cancelled", b"expired", b"dead"}
_PERMANENT = {"tenants", "stats", "config", "affinity", "dead"}
_MEMBERS_ARE_JOBS = {"leases", "delayed", "deadlines"}


def queue_of(key: str) -> str | None:
    """The queue a key belongs to."""
    found = re.match(r"penstock:\{(.*?)\}:", key)
    return found[1] if found else None


def leaked_keys(client: redis.Redis, queue: str) -> list[str]:
    """Keys of the queue that nobody will ever remove, each with what is wrong about it."""
    prefix = f"penstock:{{{queue}}}:"
    found = sorted({key.decode() for key in client.scan_iter(match=_escaped(prefix) + "*", count=1000)})
    with client.pipeline(transaction=False) as pipeline:
        for key in found:
            pipeline.pttl(key)
        ttls = pipeline.execute()
    gone = -2
    there = {key: ttl >= 0 for key, ttl in zip(found, ttls, strict=True) if ttl != gone}
    return [
        f"{key}: {why}"
        for key, has_ttl in there.items()
        if (why := _leaked(client, prefix, key.removeprefix(prefix), has_ttl))
    ]


def _escaped(text: str) -> str:
    return re.sub(r"([\[\]*?\\])", r"\\\1", text)


def _leaked(client: Any, prefix: str, name: str, has_ttl: bool) -> str | None:
    """Why a key is a leak, or None where it is not."""
    key = prefix + name
    kind, _, rest = name.partition(":")
    if name in _PERMANENT:
        return None
    if kind == "job":
        return None if has_ttl or _unfinished(client, prefix, rest) else "it has ended, and has no TTL"
    if kind == "events":
        return None if has_ttl or _unfinished(client, prefix, rest) else "a log without TTL"
    if kind == "dedupe":
        return None if has_ttl or _unfinished(client, prefix, client.get(key).decode()) else "no TTL, and its job ended"
    if kind == "tenant":
        busy = sum(int(n or 0) for n in client.hmget(key, "queued", "delayed", "running"))
        return None if has_ttl or busy > 0 else "no TTL, and the tenant has no job"
    if kind in ("ready", "resume"):
        return _stray(client, prefix, [fields.get(b"id", b"") for _, fields in client.xrange(key)])
    if kind == "recent":
        return None if has_ttl else "an index of jobs without TTL"
    if kind == "rate":
        return None if has_ttl else "a bucket of requests without TTL"
    if kind in ("file", "filedata", "files", "batch", "batches"):
        return None if has_ttl else "a gateway's key without TTL"
    if name in _MEMBERS_ARE_JOBS:
        return _stray(client, prefix, client.zrange(key, 0, -1))
    if kind == "held":
        return _stray(client, prefix, client.smembers(key))
    if kind in ("heads", "fair"):
        lines = [f"{at}:{rest}:{tenant.decode()}" for tenant in client.zrange(key, 0, -1) for at in ("ready", "resume")]
        waiting = [line for line in lines if client.xlen(prefix + line)]
        return None if 2 * len(waiting) >= len(lines) else "names a tenant that waits for nothing"
    if name == "workers":
        gone = [worker for worker in client.hkeys(key) if client.zscore(prefix + "heartbeats", worker) is None]
        return f"records of {gone} without heartbeat" if gone else None
    if name == "batchwork":
        gone = [batch for batch in client.zrange(key, 0, -1) if not client.exists(f"{prefix}batch:{batch.decode()}")]
        return f"names {gone}, which are no batches" if gone else None
    if name == "heartbeats":
        return None  # reclaim forgets the workers in it
    return "not in the catalogue of protocol/keys.py"


def _unfinished(client: Any, prefix: str, job_id: str) -> bool:
    state = client.hget(f"{prefix}job:{job_id}", "state")
    return state is not None and state not in _ENDED


def _stray(client: Any, prefix: str, ids: Any) -> str | None:
    stray = [job_id.decode() for job_id in ids if not _unfinished(client, prefix, job_id.decode())]
    return f"names {stray}, which are not unfinished jobs" if stray else None
