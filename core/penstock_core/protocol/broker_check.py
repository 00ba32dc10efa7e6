"""Whether a broker is set up to keep what it accepts: used by worker start-up and `penstock doctor`.

Looks only at INFO, which managed services allow too. Never changes the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import redis
import redis.asyncio
from redis.exceptions import ResponseError

OLDEST_SERVER = (6, 2)


@dataclass(frozen=True, slots=True)
class BrokerWarning:
    """Something about the broker an operator should know.

    Attributes:
        severity: `error` means Penstock cannot work, or accepted jobs will be lost; `warning` that they can be.
        code: stable name, such as `no_aof`.
        message: what is found, what it means, and the remedy.
    """

    severity: Literal["error", "warning"]
    code: str
    message: str


def check_broker(client: redis.Redis) -> list[BrokerWarning]:
    """What is wrong with the broker; empty where all is well. Raises redis-py's errors if it cannot be reached."""
    try:
        return judge(_one_server(client.info("all")))
    except ResponseError as error:
        return [_unchecked(error)]


async def check_broker_async(client: redis.asyncio.Redis) -> list[BrokerWarning]:
    """As `check_broker`, for asyncio."""
    try:
        return judge(_one_server(await client.info("all")))
    except ResponseError as error:
        return [_unchecked(error)]


def _one_server(info: Mapping[str, Any]) -> Mapping[str, Any]:
    """A cluster client gives one INFO per node: the first primary stands for all."""
    if "redis_version" in info:
        return info
    servers = [node for node in info.values() if isinstance(node, Mapping)]
    return next((node for node in servers if node.get("role") == "master"), servers[0] if servers else {})


def _unchecked(error: ResponseError) -> BrokerWarning:
    return BrokerWarning(
        "warning", "unchecked", f"INFO is refused ({error}), so persistence and memory policy are unknown; allow +info"
    )


def judge(info: Mapping[str, Any]) -> list[BrokerWarning]:
    """The warnings that an INFO gives rise to."""
    found: list[BrokerWarning] = []

    def warn(severity: Literal["error", "warning"], code: str, message: str) -> None:
        found.append(BrokerWarning(severity, code, message))

    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < OLDEST_SERVER:
        warn("error", "old_server", f"Redis {version}: Penstock needs 6.2 or newer, or Valkey; upgrade the server")
    if info.get("role") == "slave":
        warn("error", "replica", "this server is a read-only replica; point the URL at the primary")
    if not int(info.get("aof_enabled", 0)):
        warn(
            "warning",
            "no_aof",
            "appendonly is off: a crash of Redis loses accepted jobs; set `appendonly yes` (and appendfsync everysec)",
        )
    if str(info.get("aof_last_write_status", "ok")) != "ok":
        warn("error", "aof_failing", "the last write of the append-only file failed: is the disk of Redis full?")
    policy, limit = str(info.get("maxmemory_policy", "noeviction")), int(info.get("maxmemory", 0))
    if policy != "noeviction" and limit:
        warn(
            "error",
            "evicting",
            f"maxmemory-policy is {policy}: when {limit} bytes are full Redis deletes jobs; set it to noeviction",
        )
    used = int(info.get("used_memory", 0))
    if limit and used > 0.9 * limit:
        warn("warning", "memory", f"{used} of {limit} bytes (maxmemory) are used; raise it, or add workers")
    return found
