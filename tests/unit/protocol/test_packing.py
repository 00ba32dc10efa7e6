"""Commands packed in C are, byte for byte, the commands redis-py packs."""

from __future__ import annotations

from typing import Any

import pytest
import redis.asyncio
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio.connection import Connection
from redis.exceptions import DataError

from penstock_core.protocol.connection import connect_async

argument = st.one_of(st.binary(max_size=50), st.text(max_size=50), st.integers(-(2**63), 2**63 - 1))


def fast() -> Any:
    return connect_async("redis://127.0.0.1:1").connection_pool.make_connection()


@given(st.sampled_from(["EVALSHA", "CONFIG GET", "CLIENT ID"]), st.lists(argument, max_size=30))
def test_the_bytes_are_the_same(name: str, args: list[Any]) -> None:
    plain = redis.asyncio.Redis(protocol=2).connection_pool.make_connection()
    assert isinstance(plain, Connection)
    assert b"".join(fast().pack_command(name, *args)) == b"".join(plain.pack_command(name, *args))


@pytest.mark.parametrize("wrong", [None, [1], {"a": 1}])
def test_what_redis_py_refuses_is_refused(wrong: object) -> None:
    with pytest.raises(DataError):
        fast().pack_command("SET", "key", wrong)


def test_unix_sockets_and_tls_pack_alike() -> None:
    for url in ("unix:///tmp/no.sock", "rediss://127.0.0.1:1"):
        connection = connect_async(url).connection_pool.make_connection()
        assert connection.pack_command("GET", "k") == [b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n"]
