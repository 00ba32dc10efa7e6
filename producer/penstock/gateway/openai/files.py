"""Files of a tenant, kept in Redis beside the queue: bounded in size and number, gone after a week.

Another tenant's file is answered like one that does not exist.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from penstock.gateway.books import Books
from penstock.submission import new_job_id
from penstock_core.protocol.connection import broker_errors
from penstock_core.protocol.errors import InvalidRequest, JobNotFound, QueueFull

FILE_TTL_S = 7 * 86_400
MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_TENANT_FILES = 1000
MAX_TENANT_BYTES = 512 * 1024 * 1024
_PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What is known of a file without reading it."""

    file_id: str
    tenant: str
    name: str
    purpose: str
    size: int
    created: int

    def shown(self) -> dict[str, Any]:
        """As OpenAI's file object."""
        return {
            "id": self.file_id,
            "object": "file",
            "bytes": self.size,
            "created_at": self.created,
            "expires_at": self.created + FILE_TTL_S,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


class FileStore:
    """The files of one queue.

    Args:
        books: of the queue; its connections are used.
    """

    def __init__(self, books: Books) -> None:
        self.url = books.url
        self.keys = books.keys
        self.redis = books.redis

    async def add(self, tenant: str, name: str, purpose: str, data: bytes, *, file_id: str | None = None) -> StoredFile:
        """Store a file. Raises `InvalidRequest` or, where the tenant has too much already, `QueueFull`."""
        if not data:
            raise InvalidRequest("file", "is empty; a batch needs one request per line")
        if len(data) > MAX_FILE_BYTES:
            raise InvalidRequest("file", f"has {len(data)} bytes, allowed are {MAX_FILE_BYTES}; split it")
        present = await self.of_tenant(tenant)
        held = sum(file.size for file in present)
        if len(present) >= MAX_TENANT_FILES or held + len(data) > MAX_TENANT_BYTES:
            raise QueueFull(
                f"the tenant has {len(present)} files of {held} bytes together, allowed are {MAX_TENANT_FILES} files "
                f"and {MAX_TENANT_BYTES} bytes; delete some",
                60.0,
            )
        file = StoredFile(file_id or f"file-{new_job_id()}", tenant, name, purpose, len(data), int(time.time()))
        with broker_errors(self.url):
            async with self.redis.pipeline(transaction=True) as pipe:
                pipe.set(self.keys.filedata(file.file_id), data, ex=FILE_TTL_S)
                self.register(pipe, file)
                await pipe.execute()
        return file

    def register(self, pipe: Any, file: StoredFile) -> None:
        """Queue the commands that make the file known."""
        record = {
            "tenant": file.tenant,
            "name": file.name,
            "purpose": file.purpose,
            "size": file.size,
            "created": file.created,
        }
        pipe.hset(self.keys.file(file.file_id), mapping=record)
        pipe.expire(self.keys.file(file.file_id), FILE_TTL_S)
        pipe.expire(self.keys.filedata(file.file_id), FILE_TTL_S)
        pipe.zadd(self.keys.files(file.tenant), {file.file_id: file.created})
        pipe.expire(self.keys.files(file.tenant), FILE_TTL_S)

    async def get(self, file_id: str, tenant: str) -> StoredFile:
        """A file of this tenant. Raises `JobNotFound`."""
        with broker_errors(self.url):
            values = await self.redis.hgetall(self.keys.file(file_id))
        file = _file(file_id, values)
        if file is None or file.tenant != tenant:
            raise JobNotFound(f"no file {file_id}; files are kept for {FILE_TTL_S // 86_400} days")
        return file

    async def of_tenant(self, tenant: str) -> list[StoredFile]:
        """The tenant's files, newest first."""
        with broker_errors(self.url):
            ids = await self.redis.zrevrange(self.keys.files(tenant), 0, -1)
            async with self.redis.pipeline(transaction=False) as pipe:
                for file_id in ids:
                    pipe.hgetall(self.keys.file(file_id.decode()))
                answers = await pipe.execute()
            found = {file_id: _file(file_id.decode(), values) for file_id, values in zip(ids, answers, strict=True)}
            gone = [file_id for file_id, file in found.items() if file is None]
            if gone:
                await self.redis.zrem(self.keys.files(tenant), *gone)
        return [file for file in found.values() if file is not None]

    async def delete(self, file_id: str, tenant: str) -> None:
        """Forget a file. Raises `JobNotFound`."""
        await self.get(file_id, tenant)
        with broker_errors(self.url):
            await self.redis.delete(self.keys.file(file_id), self.keys.filedata(file_id))
            await self.redis.zrem(self.keys.files(tenant), file_id)

    async def read(self, file_id: str) -> bytes:
        """All of a file's bytes; b'' where it is gone."""
        with broker_errors(self.url):
            data: bytes | None = await self.redis.get(self.keys.filedata(file_id))
        return data or b""

    async def pieces(self, file: StoredFile) -> AsyncIterator[bytes]:
        """A file's bytes, some at a time."""
        for start in range(0, file.size, _PIECE_BYTES):
            end = min(file.size, start + _PIECE_BYTES) - 1
            with broker_errors(self.url):
                piece: bytes = await self.redis.getrange(self.keys.filedata(file.file_id), start, end)
            yield piece


def _file(file_id: str, values: dict[bytes, bytes]) -> StoredFile | None:
    if b"tenant" not in values:
        return None
    text = {name.decode(): value.decode(errors="replace") for name, value in values.items()}
    return StoredFile(file_id, text["tenant"], text["name"], text["purpose"], int(text["size"]), int(text["created"]))
