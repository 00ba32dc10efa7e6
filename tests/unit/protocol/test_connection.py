"""URLs, settings chosen on purpose, and errors that say what to do."""

from __future__ import annotations

import asyncio

import pytest
import redis
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncSentinelPool
from redis.sentinel import SentinelConnectionPool

from penstock_core.protocol.broker_check import judge
from penstock_core.protocol.connection import (
    broker_errors,
    check_broker,
    check_broker_async,
    connect,
    connect_async,
    masked,
    unavailable,
)
from penstock_core.protocol.errors import BrokerUnavailable, InvalidConfiguration


@pytest.mark.parametrize("connector", [connect, connect_async])
def test_nothing_is_left_to_the_driver_s_defaults(connector) -> None:
    settings = connector("redis://h:1/2", client_name="me").connection_pool.connection_kwargs
    assert (settings["host"], settings["port"], settings["db"], settings["client_name"]) == ("h", 1, 2, "me")
    assert (settings["protocol"], settings["decode_responses"]) == (2, False)
    assert (settings["socket_timeout"], settings["socket_connect_timeout"]) == (5.0, 5.0)
    assert settings["retry"].get_retries() == 0


def test_users_passwords_tls_and_sockets_are_read_from_the_url() -> None:
    tls = connect("rediss://user:p%40ss@h:6380/1?ssl_cert_reqs=none").connection_pool
    assert (tls.connection_kwargs["username"], tls.connection_kwargs["password"]) == ("user", "p@ss")
    assert tls.connection_class is redis.SSLConnection
    unix = connect("unix:///run/redis.sock?db=3").connection_pool
    assert (unix.connection_kwargs["path"], unix.connection_kwargs["db"]) == ("/run/redis.sock", 3)


@pytest.mark.parametrize(
    ("connector", "pool_class"), [(connect, SentinelConnectionPool), (connect_async, AsyncSentinelPool)]
)
def test_a_sentinel_url_names_sentinels_service_and_database(connector, pool_class) -> None:
    url = "rediss+sentinel://u:p@s1:26380,s2,[::1]:5/my-service/4?sentinel_password=sp&ssl_cert_reqs=none"
    pool = connector(url).connection_pool
    assert isinstance(pool, pool_class)
    assert (pool.service_name, pool.connection_kwargs["db"]) == ("my-service", 4)
    assert (pool.connection_kwargs["username"], pool.connection_kwargs["password"]) == ("u", "p")
    nodes = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]
    assert [(node["host"], node["port"]) for node in nodes] == [("s1", 26380), ("s2", 26379), ("::1", 5)]
    assert {node["password"] for node in nodes} == {"sp"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:6379", "begins with none of redis"),
        ("http://h", "begins with none of redis"),
        ("redis://h:port", "h:port"),
        ("redis://h?nonsense=1", "nonsense"),
        ("redis+sentinel://h:1", "names no service"),
        ("redis+sentinel://h:1/s/x", "no number"),
        ("redis+sentinel://h:x/s", "no host:port"),
        ("redis+sentinel://h/s?nonsense=1", "unknown option nonsense"),
        ("redis+cluster://h/1", "one database"),
    ],
)
@pytest.mark.parametrize("connector", [connect, connect_async])
def test_a_wrong_url_is_refused_at_once(connector, url: str, message: str) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        connector(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@h:1/0", "redis://user:***@h:1/0"),
        ("redis://:s@cret@h", "redis://:***@h"),
        (
            "redis+sentinel://u:secret@a,b/s?sentinel_password=secret",
            "redis+sentinel://u:***@a,b/s?sentinel_password=***",
        ),
        ("redis://h:6379", "redis://h:6379"),
    ],
)
def test_no_message_shows_a_password(url: str, shown: str) -> None:
    assert masked(url) == shown
    assert "secret" not in str(unavailable(url, redis.ConnectionError("Connection refused")))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://127.0.0.1:1", r"redis://127.0.0.1:1: .*refused.*; start Redis there"),
        ("unix:///nowhere.sock", r"No such file.*; check the socket's path"),
        ("redis+cluster://127.0.0.1:1", r"redis\+cluster://127.0.0.1:1: "),
    ],
)
def test_an_unreachable_broker_is_named_with_a_remedy(url: str, message: str) -> None:
    with pytest.raises(BrokerUnavailable, match=message), broker_errors(url):
        connect(url, timeout_s=1.0).ping()


@pytest.mark.parametrize(
    ("reply", "remedy"),
    [
        (redis.AuthenticationError("WRONGPASS invalid username-password pair"), "check user and password"),
        (redis.exceptions.NoPermissionError("NOPERM no permissions"), "allow the ACL user"),
        (redis.ResponseError("OOM command not allowed when used memory > 'maxmemory'"), "raise maxmemory"),
        (redis.exceptions.ReadOnlyError("READONLY You can't write"), "point the URL at the primary"),
        (redis.ResponseError("MISCONF Redis is configured to save"), "its disk"),
        (redis.BusyLoadingError("LOADING dataset"), "try again"),
        (redis.TimeoutError("Timeout reading"), "overloaded"),
        (redis.ConnectionError("gone"), "can be reached"),
        (OSError("broken pipe"), "can be reached"),
    ],
)
def test_each_kind_of_refusal_has_its_remedy(reply: Exception, remedy: str) -> None:
    with pytest.raises(BrokerUnavailable, match=remedy), broker_errors("redis://h"):
        raise reply


@pytest.mark.parametrize(
    "error", [redis.ResponseError("ERR syntax"), redis.exceptions.NoScriptError("NOSCRIPT"), KeyError("x")]
)
def test_errors_that_are_not_the_broker_s_state_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)), broker_errors("redis://h"):
        raise error


GOOD_INFO = {
    "redis_version": "7.2.4",
    "role": "master",
    "aof_enabled": 1,
    "maxmemory_policy": "noeviction",
    "maxmemory": 0,
}


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ({}, []),
        ({"redis_version": "6.2.14"}, []),
        ({"redis_version": "6.0.16"}, ["old_server"]),
        ({"redis_version": "255.255.255"}, []),
        ({"aof_enabled": 0}, ["no_aof"]),
        ({"role": "slave"}, ["replica"]),
        ({"maxmemory_policy": "allkeys-lru", "maxmemory": 0}, []),
        ({"maxmemory_policy": "allkeys-lru", "maxmemory": 100}, ["evicting"]),
        ({"maxmemory": 100, "used_memory": 95}, ["memory"]),
        ({"aof_last_write_status": "err"}, ["aof_failing"]),
    ],
)
def test_a_broker_that_can_lose_jobs_is_reported(change, codes: list[str]) -> None:
    assert [warning.code for warning in judge(GOOD_INFO | change)] == codes


def test_a_broker_that_hides_its_info_is_reported_as_unchecked(fake_redis) -> None:
    (warning,) = check_broker(fake_redis)
    assert (warning.severity, warning.code) == ("warning", "unchecked")


@pytest.mark.integration
def test_the_tests_own_broker_is_set_up_to_keep_jobs(redis_client, redis_url: str) -> None:
    assert check_broker(redis_client) == []

    async def check() -> None:
        client = connect_async(redis_url)
        assert await check_broker_async(client) == []
        await client.aclose()

    asyncio.run(check())
