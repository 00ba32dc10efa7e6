"""Packing commands in C for asyncio: redis-py's sync connections use hiredis for it, its asyncio ones pack in Python.

A script call that writes a batch has hundreds of arguments, and packing them in Python is a fifth of a worker's time at
ten thousand jobs a second.
"""

from __future__ import annotations

from typing import Any

import redis.asyncio
from redis.exceptions import DataError

try:
    import hiredis
except ImportError:  # an interpreter it has no wheel for: redis-py's own way then
    hiredis = None  # type: ignore[assignment]


def pack_in_c(client: redis.asyncio.Redis) -> redis.asyncio.Redis:
    """Have the connections that `client` will make pack their commands with hiredis."""
    if hiredis is not None:
        pool = client.connection_pool
        base = pool.connection_class
        pool.connection_class = type(f"Packing{base.__name__}", (_Packing, base), {})
    return client


class _Packing:
    """The method that is replaced."""

    def pack_command(self, *args: Any) -> list[bytes]:
        """The command as the wire has it; the first argument may hold several words, such as `CONFIG GET`."""
        first, *rest = args
        words = first.encode().split() if isinstance(first, str) else first.split()
        try:
            return [hiredis.pack_command((*words, *rest))]
        except TypeError as error:
            raise DataError(f"a command's arguments are bytes, text or numbers: {error}") from None
