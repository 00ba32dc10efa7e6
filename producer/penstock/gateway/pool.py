"""The gateway's connections to Redis: a handful for everything, however many requests and streams are open."""

from __future__ import annotations

import redis.asyncio

from penstock_core.protocol.connection import connect_async

MOST = 24
_WAIT_S = 20.0


def bounded_connections(url: str) -> redis.asyncio.Redis:
    """A client of the broker that makes at most `MOST` connections; who finds none free waits for one.

    Behind sentinels and in a cluster the pool is redis-py's own, which has no waiting kind for them.
    """
    client = connect_async(url, client_name="penstock-gateway")
    pool = client.connection_pool if isinstance(client, redis.asyncio.Redis) else None
    if type(pool) is redis.asyncio.ConnectionPool:
        client.connection_pool = redis.asyncio.BlockingConnectionPool(
            max_connections=MOST, timeout=_WAIT_S, connection_class=pool.connection_class, **pool.connection_kwargs
        )
    return client
