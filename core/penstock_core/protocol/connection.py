"""Connections to Redis, made on purpose: every setting that redis-py would choose for us is chosen here.

URLs: `redis://`, `rediss://` (TLS), `unix://`, `redis+sentinel://host:port,host:port/service/db` and
`redis+cluster://host:port,host:port`, the last two also as `rediss+...`; users as in `redis://user:password@host`.
Everybody gets RESP2, bytes, timeouts, and no retries by the transport: what may be repeated, and when, is the caller's
knowledge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast
from urllib.parse import parse_qs, unquote, urlsplit

import redis
import redis.asyncio
import redis.asyncio.retry
from redis.asyncio.cluster import ClusterNode as AsyncClusterNode
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry
from redis.sentinel import Sentinel

from penstock_core.protocol.broker_check import BrokerWarning as BrokerWarning
from penstock_core.protocol.broker_check import check_broker as check_broker
from penstock_core.protocol.broker_check import check_broker_async as check_broker_async
from penstock_core.protocol.errors import BrokerUnavailable, InvalidConfiguration
from penstock_core.protocol.packing import pack_in_c

TIMEOUT_S = 5.0
HEALTH_CHECK_S = 30

_SCHEMES = (
    "redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster",
)  # fmt: skip
# redis-py leaves these three untyped.
_SENTINEL: Any = Sentinel
_ASYNC_SENTINEL: Any = AsyncSentinel
_NODE: Any = ClusterNode
_DEFAULT_PORT = {"sentinel": 26379, "cluster": 6379}


def masked(url: str) -> str:
    """The URL with its passwords hidden, for messages and logs."""
    shown = re.sub(r"(?<=://)([^/@]*?):[^/]*@", r"\1:***@", url)
    return re.sub(r"(password=)[^&]*", r"\1***", shown)


@dataclass(frozen=True, slots=True)
class _Broker:
    """A parsed URL of the sentinel or cluster kind."""

    kind: Literal["sentinel", "cluster"]
    nodes: list[tuple[str, int]]
    service: str
    options: dict[str, Any]
    sentinel_options: dict[str, Any]


def _scheme(url: str) -> str:
    scheme = url.partition("://")[0]
    if scheme not in _SCHEMES or "://" not in url:
        raise InvalidConfiguration(
            "redis", f"{masked(url)!r} begins with none of {', '.join(_SCHEMES)} and ://; write redis://host:port"
        )
    return scheme


def _parse(url: str) -> _Broker:
    """The parts of a sentinel or cluster URL; raises `InvalidConfiguration`."""
    scheme, _, kind = _scheme(url).partition("+")
    parts = urlsplit(url)
    credentials, _, places = parts.netloc.rpartition("@")
    username, _, password = credentials.partition(":")
    nodes = [_node(place, _DEFAULT_PORT[kind], url) for place in places.split(",")]
    options: dict[str, Any] = {"ssl": True} if scheme == "rediss" else {}
    if username:
        options["username"] = unquote(username)
    if password:
        options["password"] = unquote(password)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    tls = {name: query.pop(name) for name in list(query) if name.startswith("ssl_")}
    options.update(tls)
    sentinel_options: dict[str, Any] = dict(tls, ssl=True) if scheme == "rediss" else {}
    for name in ("username", "password"):
        if f"sentinel_{name}" in query:
            sentinel_options[name] = query.pop(f"sentinel_{name}")
    if query:
        raise InvalidConfiguration("redis", f"{masked(url)!r}: unknown option {sorted(query)[0]}; remove it")
    service, _, db = parts.path.strip("/").partition("/")
    if kind == "cluster":
        if parts.path.strip("/"):
            raise InvalidConfiguration("redis", f"{masked(url)!r}: a cluster has one database; remove {parts.path!r}")
        return _Broker("cluster", nodes, "", options, {})
    if not service:
        raise InvalidConfiguration(
            "redis", f"{masked(url)!r} names no service; write redis+sentinel://host:port/service"
        )
    if not (db or "0").isdecimal():
        raise InvalidConfiguration("redis", f"{masked(url)!r}: database {db!r} is no number")
    return _Broker("sentinel", nodes, unquote(service), dict(options, db=int(db or "0")), sentinel_options)


def _node(place: str, default_port: int, url: str) -> tuple[str, int]:
    host, _, port = place.rpartition(":") if not place.endswith("]") else (place, "", "")
    if not host and port and not port.isdecimal():
        host, port = port, ""
    if (port and not port.isdecimal()) or not host:
        raise InvalidConfiguration("redis", f"{masked(url)!r}: {place!r} is no host:port")
    return host.strip("[]"), int(port or default_port)


def _settings(url: str, timeout_s: float, client_name: str | None, max_connections: int | None) -> dict[str, Any]:
    keepalive = {} if url.startswith("unix:") else {"socket_keepalive": True}
    return {
        "protocol": 2,
        "decode_responses": False,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": min(timeout_s, TIMEOUT_S),
        **keepalive,
        "health_check_interval": HEALTH_CHECK_S,
        "client_name": client_name,
        "max_connections": max_connections,
    }


def connect(
    url: str, *, timeout_s: float = TIMEOUT_S, client_name: str | None = None, max_connections: int | None = None
) -> redis.Redis:
    """A client of the broker at `url`; it connects when first used. Raises `InvalidConfiguration` for a bad URL.

    Commands are answered or fail within `timeout_s` and are never repeated by the transport.
    A cluster's client is redis-py's `RedisCluster`, which has the same commands.
    """
    settings = _settings(url, timeout_s, client_name, max_connections)
    if "+" not in _scheme(url):
        try:
            client = redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **settings)
            client.connection_pool.connection_class(
                **client.connection_pool.connection_kwargs
            )  # refuses unknown options
            return client
        except (ValueError, TypeError) as error:
            raise InvalidConfiguration("redis", f"{masked(url)!r}: {error}") from None
    broker = _parse(url)
    if broker.kind == "sentinel":
        sentinel = _SENTINEL(broker.nodes, sentinel_kwargs={"socket_timeout": timeout_s, **broker.sentinel_options})
        master = sentinel.master_for(broker.service, retry=Retry(NoBackoff(), 0), **settings, **broker.options)
        return cast(redis.Redis, master)
    nodes = [_NODE(host, port) for host, port in broker.nodes]
    with broker_errors(url):
        if max_connections is None:
            del settings["max_connections"]
        cluster = RedisCluster(startup_nodes=nodes, retry=Retry(NoBackoff(), 0), **settings, **broker.options)
    return cast(redis.Redis, cluster)


def connect_async(
    url: str, *, timeout_s: float = TIMEOUT_S, client_name: str | None = None, max_connections: int | None = None
) -> redis.asyncio.Redis:
    """As `connect`, for asyncio."""
    settings = _settings(url, timeout_s, client_name, max_connections)
    retry = redis.asyncio.retry.Retry(NoBackoff(), 0)
    if "+" not in _scheme(url):
        try:
            client = redis.asyncio.Redis.from_url(url, retry=retry, **settings)
            client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
            return pack_in_c(client)
        except (ValueError, TypeError) as error:
            raise InvalidConfiguration("redis", f"{masked(url)!r}: {error}") from None
    broker = _parse(url)
    if broker.kind == "sentinel":
        sentinel = _ASYNC_SENTINEL(
            broker.nodes, sentinel_kwargs={"socket_timeout": timeout_s, **broker.sentinel_options}
        )
        master = sentinel.master_for(broker.service, retry=retry, **settings, **broker.options)
        return pack_in_c(cast(redis.asyncio.Redis, master))
    nodes = [AsyncClusterNode(host, port) for host, port in broker.nodes]
    if max_connections is None:
        del settings["max_connections"]
    cluster = redis.asyncio.RedisCluster(startup_nodes=nodes, retry=retry, **settings, **broker.options)
    return cast(redis.asyncio.Redis, cluster)


@contextmanager
def broker_errors(url: str) -> Iterator[None]:
    """Turn what redis-py raises when the broker cannot be used now into `BrokerUnavailable` with a remedy."""
    try:
        yield
    except (redis.exceptions.RedisError, redis.exceptions.RedisClusterException, OSError) as error:
        if isinstance(error, BrokerUnavailable) or not _is_unavailable(error):
            raise
        raise unavailable(url, error) from error


_PASSING = ("LOADING", "MASTERDOWN", "READONLY", "OOM", "MISCONF", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS", "BUSY")
_REFUSED = (
    "WRONGPASS", "NOAUTH", "NOPERM", "DENIED", "invalid username-password", "AUTH ", "DB index is out of range",
)  # fmt: skip


# redis-py cuts the code off the replies it has a class for.
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (redis.exceptions.NoPermissionError, "NOPERM"),
    (redis.exceptions.OutOfMemoryError, "OOM"),
    (redis.exceptions.ReadOnlyError, "READONLY"),
    (redis.exceptions.BusyLoadingError, "LOADING"),
)

# Redis 6 wraps what a command inside a script was refused with; later servers hand it on as it is.
_IN_SCRIPT = re.compile(r"^(ERR )?Error running script.*?@user_script: \d+: -?")
_FORBIDDEN_IN_SCRIPT = ("The user executing the script can't run", "ACL failure in script")  # up to 7.0; from 7.2


def _reply(error: Exception) -> str:
    """The error in the server's words, code first."""
    reason = " ".join((str(error) or type(error).__name__).split()).rstrip(".")
    reason = _IN_SCRIPT.sub("", reason)
    code = next((code for kind, code in _CODES if isinstance(error, kind)), "")
    if any(words in reason for words in _FORBIDDEN_IN_SCRIPT):
        code = "NOPERM"
    return reason if code in reason else f"{code} {reason}"


def _is_unavailable(error: Exception) -> bool:
    if isinstance(error, redis.exceptions.ResponseError):
        return _reply(error).startswith(_PASSING + _REFUSED)
    return isinstance(
        error,
        redis.exceptions.ConnectionError
        | redis.exceptions.TimeoutError
        | redis.exceptions.RedisClusterException
        | OSError,
    )


def unavailable(url: str, error: Exception) -> BrokerUnavailable:
    """The error for a broker that cannot be used now: where, why, and what to do."""
    reason = _reply(error)
    return BrokerUnavailable(f"Redis at {masked(url)}: {reason}; {_remedy(error, reason)}")


def _remedy(error: Exception, reason: str) -> str:
    for word, remedy in (
        (
            "NOPERM",
            "allow the ACL user resetchannels ~penstock:* &penstock:* "
            "+@all -@dangerous +info +client|setname +client|id",
        ),
        ("WRONGPASS", "check user and password in the URL"),
        ("NOAUTH", "put the password in the URL: redis://:password@host"),
        ("invalid username-password", "check user and password in the URL"),
        ("without any password", "leave the password out of the URL, or give the server one"),
        ("DB index", "the URL ends with a number of a database that this server has, such as /0"),
        ("OOM", "raise maxmemory, or add workers so that the queue drains"),
        ("MISCONF", "Redis cannot write its disk; look into its log"),
        ("NOREPLICAS", "it takes no writes until enough replicas follow it (min-replicas-to-write)"),
        ("READONLY", "this is a replica; point the URL at the primary, or use redis+sentinel://"),
        ("LOADING", "it is loading its data; try again shortly"),
        ("SSL", "check the certificate options, or use redis:// for a server without TLS"),
        ("certificate", "check the certificate options (ssl_ca_certs, ssl_certfile, ssl_keyfile)"),
        ("Name or service", "check the host name"),
        ("No such file", "check the socket's path"),
        ("No master found", "check the service name, and that the sentinels see the primary"),
        ("refused", "start Redis there, or correct the URL; `penstock serve` brings its own"),
        ("Error 111", "start Redis there, or correct the URL; `penstock serve` brings its own"),
    ):
        if word in reason:
            return remedy
    if isinstance(error, redis.exceptions.TimeoutError | TimeoutError):
        return "it is overloaded, frozen, or behind a network that drops packets"
    return "check that Redis runs there and can be reached"
