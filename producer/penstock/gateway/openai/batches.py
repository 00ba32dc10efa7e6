"""Batches as Redis keeps them: the record, the progress, and which gateway drives one at the moment.

A driver's writes are fenced by its name and by the line it stands at, so a gateway that lost its lease adds nothing.
Everything that a batch is stands in Redis: any gateway goes on where another one crashed.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from penstock.gateway.openai.files import FILE_TTL_S, FileStore, StoredFile
from penstock.submission import new_job_id
from penstock_core.protocol.connection import broker_errors
from penstock_core.protocol.errors import JobNotFound, QueueFull

Status = Literal["validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"]
FINAL: frozenset[str] = frozenset({"completed", "failed", "expired", "cancelled"})
LEASE_MS = 10_000
MAX_TENANT_BATCHES = 1000

# KEYS batchwork, batch; ARGV driver, lease_ms. 1: the caller drives this batch until the lease ends. 0: another does,
# or it has ended.
_CLAIM = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local due = redis.call('ZSCORE', KEYS[1], ARGV[3])
if not due or (tonumber(due) > now and redis.call('HGET', KEYS[2], 'driver') ~= ARGV[1]) then return 0 end
if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('ZREM', KEYS[1], ARGV[3]) return 0 end
redis.call('HSET', KEYS[2], 'driver', ARGV[1])
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[3])
return 1
"""
# KEYS batch, output data, error data; ARGV driver, line expected, lines, output bytes, error bytes, completed, failed,
# ttl_s
_SAVE = """
if redis.call('HGET', KEYS[1], 'driver') ~= ARGV[1] then return 0 end
if (redis.call('HGET', KEYS[1], 'done') or '0') ~= ARGV[2] then return 0 end
if ARGV[4] ~= '' then redis.call('APPEND', KEYS[2], ARGV[4]) redis.call('EXPIRE', KEYS[2], ARGV[8]) end
if ARGV[5] ~= '' then redis.call('APPEND', KEYS[3], ARGV[5]) redis.call('EXPIRE', KEYS[3], ARGV[8]) end
redis.call('HINCRBY', KEYS[1], 'done', ARGV[3])
redis.call('HINCRBY', KEYS[1], 'completed', ARGV[6])
redis.call('HINCRBY', KEYS[1], 'failed', ARGV[7])
return 1
"""
# KEYS batch; ARGV driver ('' for anyone), statuses it may have (one string, each between commas), fields and values
_CHANGE = """
if ARGV[1] ~= '' and redis.call('HGET', KEYS[1], 'driver') ~= ARGV[1] then return 0 end
local status = redis.call('HGET', KEYS[1], 'status')
if not status or not string.find(ARGV[2], ',' .. status .. ',', 1, true) then return 0 end
for i = 3, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
return 1
"""


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch.

    Attributes:
        done: lines answered, in order; `intended`: lines that may have been submitted.
        times: seconds at which it reached each status.
        errors: why its file was refused.
    """

    batch_id: str
    tenant: str
    endpoint: str
    window: str
    input_file_id: str
    output_file_id: str
    error_file_id: str
    status: Status
    created: int
    expires: int
    total: int = 0
    done: int = 0
    intended: int = 0
    completed: int = 0
    failed: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    has_output: bool = False
    has_errors: bool = False

    def shown(self) -> dict[str, Any]:
        """As OpenAI's batch object."""
        return {
            "id": self.batch_id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.window,
            "status": self.status,
            "output_file_id": self.output_file_id if self.has_output else None,
            "error_file_id": self.error_file_id if self.has_errors else None,
            "created_at": self.created,
            "expires_at": self.expires,
            **{f"{name}_at": self.times.get(name) for name in _TIMED},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata or None,
        }


_TIMED = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
_NUMBERS = ("created", "expires", "total", "done", "intended", "completed", "failed")
_TEXTS = ("tenant", "endpoint", "window", "input_file_id", "output_file_id", "error_file_id", "status")


class BatchStore:
    """The batches of one queue, beside its files."""

    def __init__(self, files: FileStore) -> None:
        self.files = files
        self._redis = files.redis
        self._keys = files.keys

    async def create(
        self, tenant: str, endpoint: str, window: str, window_s: float, input_file_id: str, metadata: dict[str, str]
    ) -> Batch:
        """Store a batch for a driver to find. Raises `QueueFull`."""
        if len(await self.of_tenant(tenant)) >= MAX_TENANT_BATCHES:
            raise QueueFull(f"the tenant has {MAX_TENANT_BATCHES} batches, the most that are kept; try again later", 60)
        now, number = int(time.time()), new_job_id()
        batch_id, ttl_s = f"batch_{number}", int(window_s) + FILE_TTL_S
        fields: dict[str, str | int] = {
            "tenant": tenant,
            "endpoint": endpoint,
            "window": window,
            "input_file_id": input_file_id,
            "output_file_id": f"file-{number}o",
            "error_file_id": f"file-{number}e",
            "status": "validating",
            "created": now,
            "expires": now + int(window_s),
            "metadata": json.dumps(metadata),
        }
        with broker_errors(self.files.url):
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(self._keys.batch(batch_id), mapping=fields)
                pipe.expire(self._keys.batch(batch_id), ttl_s)
                pipe.zadd(self._keys.batches(tenant), {batch_id: now})
                pipe.expire(self._keys.batches(tenant), 30 * 86_400 + FILE_TTL_S)
                pipe.zadd(self._keys.batchwork, {batch_id: 0})
                await pipe.execute()
        return await self.get(batch_id, tenant)

    async def get(self, batch_id: str, tenant: str | None = None) -> Batch:
        """A batch (of this tenant). Raises `JobNotFound`."""
        with broker_errors(self.files.url):
            values = await self._redis.hgetall(self._keys.batch(batch_id))
        batch = _batch(batch_id, values)
        if batch is None or (tenant is not None and batch.tenant != tenant):
            raise JobNotFound(f"no batch {batch_id}")
        return batch

    async def of_tenant(self, tenant: str) -> list[Batch]:
        """The tenant's batches, newest first."""
        with broker_errors(self.files.url):
            ids = await self._redis.zrevrange(self._keys.batches(tenant), 0, -1)
            async with self._redis.pipeline(transaction=False) as pipe:
                for batch_id in ids:
                    pipe.hgetall(self._keys.batch(batch_id.decode()))
                answers = await pipe.execute()
            found = {one: _batch(one.decode(), values) for one, values in zip(ids, answers, strict=True)}
            gone = [batch_id for batch_id, batch in found.items() if batch is None]
            if gone:
                await self._redis.zrem(self._keys.batches(tenant), *gone)
        return [batch for batch in found.values() if batch is not None]

    async def ask_to_cancel(self, batch_id: str, tenant: str) -> Batch:
        """The batch, cancelling unless it has ended. Raises `JobNotFound`."""
        await self.get(batch_id, tenant)
        await self.change(batch_id, "", ("validating", "in_progress"), "cancelling")
        return await self.get(batch_id, tenant)

    async def due(self) -> list[str]:
        """Unfinished batches that nobody drives."""
        with broker_errors(self.files.url):
            seconds, micros = await self._redis.time()
            now_ms = seconds * 1000 + micros // 1000
            return [one.decode() for one in await self._redis.zrangebyscore(self._keys.batchwork, "-inf", now_ms)]

    async def claim(self, batch_id: str, driver: str) -> bool:
        """Become its driver, or stay it for another lease."""
        keys = (self._keys.batchwork, self._keys.batch(batch_id))
        return await self._eval(_CLAIM, keys, driver, LEASE_MS, batch_id)

    async def intend(self, batch_id: str, driver: str, lines: int) -> bool:
        """Note that so many lines may be submitted from now on."""
        return await self._set(batch_id, driver, ("in_progress",), {"intended": lines})

    async def save(self, batch: Batch, driver: str, output: list[bytes], errors: list[bytes]) -> bool:
        """Append answers of the next lines; False where another gateway drives the batch by now."""
        keys = [self._keys.filedata(one) for one in (batch.output_file_id, batch.error_file_id)]
        return await self._eval(
            _SAVE,
            (self._keys.batch(batch.batch_id), *keys),
            driver,
            batch.done,
            len(output) + len(errors),
            b"".join(output),
            b"".join(errors),
            len(output),
            len(errors),
            FILE_TTL_S + 30 * 86_400,
        )

    async def change(
        self, batch_id: str, driver: str, before: tuple[Status, ...], status: Status, **fields: str | int
    ) -> bool:
        """Give it another status, if it has one of those."""
        values: dict[str, str | int] = {"status": status, f"at_{status}": int(time.time()), **fields}
        return await self._set(batch_id, driver, before, values)

    async def finish(self, batch: Batch, driver: str, status: Status) -> None:
        """Make its files known and end it."""
        with broker_errors(self.files.url):
            sizes = [
                await self._redis.strlen(self._keys.filedata(one))
                for one in (batch.output_file_id, batch.error_file_id)
            ]
            async with self._redis.pipeline(transaction=True) as pipe:
                for file_id, size, kind in zip(
                    (batch.output_file_id, batch.error_file_id), sizes, ("output", "error"), strict=True
                ):
                    if size:
                        name = f"{batch.batch_id}_{kind}.jsonl"
                        file = StoredFile(file_id, batch.tenant, name, f"batch_{kind}", size, int(time.time()))
                        self.files.register(pipe, file)
                await pipe.execute()
        shown = {"has_output": int(sizes[0] > 0), "has_errors": int(sizes[1] > 0)}
        if await self.change(batch.batch_id, driver, (batch.status,), status, **shown):
            with broker_errors(self.files.url):
                await self._redis.zrem(self._keys.batchwork, batch.batch_id)

    async def forget(self, batch_id: str) -> None:
        """Take a batch that is gone off the list of work."""
        with broker_errors(self.files.url):
            await self._redis.zrem(self._keys.batchwork, batch_id)

    async def _set(self, batch_id: str, driver: str, before: tuple[Status, ...], values: dict[str, str | int]) -> bool:
        flat = [part for pair in values.items() for part in pair]
        return await self._eval(_CHANGE, (self._keys.batch(batch_id),), driver, f",{','.join(before)},", *flat)

    async def _eval(self, script: str, keys: tuple[str, ...], *arguments: str | int | bytes) -> bool:
        with broker_errors(self.files.url):
            return bool(await self._redis.eval(script, len(keys), *keys, *arguments))


def _batch(batch_id: str, values: dict[bytes, bytes]) -> Batch | None:
    text = {name.decode(): value.decode() for name, value in values.items()}
    if "status" not in text:
        return None
    known: dict[str, Any] = {name: text[name] for name in _TEXTS}
    known |= {name: int(text.get(name, "0")) for name in _NUMBERS}
    return Batch(
        batch_id=batch_id,
        **known,
        metadata=json.loads(text.get("metadata", "{}")),
        times={name: int(text[f"at_{name}"]) for name in _TIMED if f"at_{name}" in text},
        errors=json.loads(text.get("errors", "[]")),
        has_output=text.get("has_output") == "1",
        has_errors=text.get("has_errors") == "1",
    )
