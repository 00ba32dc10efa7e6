"""The HTTP gateway without a model: `python -m benchmarks.gateway [--json] [--quick]`.

A worker that computes nothing answers 32 tokens. Measured: one request at a time through `POST /v1/generate` and
through the SDK, in turn (p50 of each and their difference); requests/s over many connections, alternating with the
floor, a FastAPI application over a Redis list and one channel that does nothing else (`peers/fastapi_pubsub`); and how
many event streams one gateway process holds open at once, all tokens delivered to every one, over how many connections
to Redis and in how much memory. Client, gateway, worker and Redis share the machine.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import redis

from benchmarks.noop_worker import ANSWER
from benchmarks.queue import _process, _redis
from benchmarks.report import chart, parser, publish, table
from penstock import AsyncClient

_QUEUE = "bench"
_BODY = json.dumps({"prompt_token_ids": list(range(128)), "max_tokens": 32}).encode()


def main() -> None:
    """Measure one gateway process."""
    options = parser(__doc__)
    options.add_argument("--singles", type=int, default=400, help="requests sent one at a time, each way")
    options.add_argument("--burst", type=int, default=3000, help="requests over --connections at once")
    options.add_argument("--connections", type=int, default=64)
    options.add_argument("--streams", type=int, default=2000, help="event streams held open at once")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.runs, arguments.singles, arguments.burst, arguments.streams = 1, 100, 500, 300
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * arguments.streams + 1000
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, wanted)), hard))
    rates: dict[str, list[float]] = {"penstock": [], "floor": []}
    floor = [sys.executable, "-m", "benchmarks.peers.fastapi_pubsub"]
    with _redis(appendonly=True) as url, _gateway(url) as (port, pid):
        floor_port = _free_port()
        with (
            _process([sys.executable, "-m", "benchmarks.noop_worker", url, _QUEUE]),
            _process([*floor, "work", url]),
            _process([*floor, "serve", url, str(floor_port)]),
        ):
            _await_server(floor_port, "/openapi.json")
            latency = asyncio.run(_latency(url, port, floor_port, arguments.singles))
            for turn in range(arguments.runs + 1):
                for name, at in (("penstock", port), ("floor", floor_port)):
                    rate = asyncio.run(_rate(at, arguments.burst, arguments.connections))
                    if turn:  # the first is the warm-up
                        rates[name].append(rate)
        streams = asyncio.run(_streams(url, port, pid, arguments.streams))
    ours, theirs = (statistics.median(rates[name]) for name in ("penstock", "floor"))
    figures = {**latency, "requests_per_s": ours, "floor_requests_per_s": theirs, **streams}
    table(
        f"one gateway process ({streams['streams_held']:,} streams)",
        ["", "penstock", "floor"],
        [
            ["one request at a time, p50 ms", latency["gateway_p50_ms"], latency["floor_p50_ms"]],
            ["of these added to the SDK's, ms", latency["added_p50_ms"], ""],
            [f"requests/s over {arguments.connections} connections", f"{ours:,.0f}", f"{theirs:,.0f}"],
            ["event streams held, every token delivered", streams["streams_whole"], ""],
            ["connections to Redis meanwhile", streams["connections_to_redis"], ""],
            ["memory meanwhile, MiB", streams["gateway_resident_mib"], ""],
        ],
    )
    chart("requests/s", {"penstock": ours, "floor": theirs})
    chart("one request, p50 ms", {"penstock": latency["gateway_p50_ms"], "floor": latency["floor_p50_ms"]})
    publish("gateway", {"figures": figures}, as_json=arguments.json)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _await_server(port: int, path: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).close()
        except (URLError, ConnectionError):
            time.sleep(0.1)
        else:
            return
    raise SystemExit(f"nothing answers on port {port}")


@contextmanager
def _gateway(url: str) -> Iterator[tuple[int, int]]:
    """Its port and its process id."""
    port = _free_port()
    command = [sys.executable, "-m", "penstock", "gateway", "--redis", url, "--queue", _QUEUE, "--port", str(port)]
    with subprocess.Popen([*command, "--log-level", "error"], stderr=subprocess.DEVNULL) as process:
        try:
            _await_server(port, "/")
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(30)


class _Http:
    """One keep-alive connection: as little client as can be, since client and gateway share the machine."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> _Http:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def post(self, path: str, body: bytes) -> dict[str, object]:
        head = f"POST {path} HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        self._writer.write(head.encode() + b"\r\n\r\n" + body)
        answered = await self._reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1]) for line in answered.split(b"\r\n") if line.lower().startswith(b"content-length")
        )
        answer: dict[str, object] = json.loads(await self._reader.readexactly(length))
        return answer

    async def tokens(self, path: str, opened: asyncio.Event) -> list[int]:
        """All tokens of an event stream."""
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: gateway\r\n\r\n".encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise SystemExit(f"no stream: {head!r}")
        opened.set()
        found: list[int] = []
        while True:
            line = await self._reader.readline()
            if line.startswith(b"data: "):
                data = json.loads(line[6:])
                if "token_ids" not in data:
                    return found
                found += data["token_ids"]
            elif not line:
                return found

    def close(self) -> None:
        self._writer.close()


async def _latency(url: str, port: int, floor_port: int, singles: int) -> dict[str, float]:
    http, floor = await _Http.open(port), await _Http.open(floor_port)
    sdk: list[float] = []
    gateway: list[float] = []
    least: list[float] = []
    async with AsyncClient(url, queue=_QUEUE) as client:
        for turn in range(singles + 20):
            started = time.perf_counter()
            result = await (await client.submit(prompt_token_ids=list(range(128)), max_tokens=32)).result(60)
            middle = time.perf_counter()
            answer = await http.post("/v1/generate", _BODY)
            ended = time.perf_counter()
            await floor.post("/v1/generate", _BODY)
            last = time.perf_counter()
            if result.token_ids != ANSWER or answer.get("token_ids") != list(ANSWER):
                raise SystemExit(f"wrong answer: {answer}")
            if turn >= 20:  # warm by then
                sdk.append((middle - started) * 1e3)
                gateway.append((ended - middle) * 1e3)
                least.append((last - ended) * 1e3)
    http.close()
    floor.close()
    direct, through = statistics.median(sdk), statistics.median(gateway)
    return {
        "sdk_p50_ms": direct,
        "gateway_p50_ms": through,
        "added_p50_ms": through - direct,
        "floor_p50_ms": statistics.median(least),
    }


async def _rate(port: int, burst: int, connections: int) -> float:
    left = iter(range(burst))

    async def client() -> None:
        http = await _Http.open(port)
        for _ in left:
            await http.post("/v1/generate", _BODY)
        http.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(connections)))
    return burst / (time.perf_counter() - started)


def _resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


async def _streams(url: str, port: int, pid: int, count: int) -> dict[str, float]:
    """Open all streams while nobody works, then start a worker and read all of them to their ends."""
    async with AsyncClient(url, queue=_QUEUE) as client:
        items = [{"prompt_token_ids": [1, 2, 3], "max_tokens": 32} for _ in range(count)]
        jobs = [job.id for job in await client.submit_many(items) if not isinstance(job, Exception)]
    opened = [asyncio.Event() for _ in jobs]
    gate = asyncio.Semaphore(100)

    async def follow(job_id: str, event: asyncio.Event) -> int:
        async with gate:
            http = await _Http.open(port)
            reading = asyncio.ensure_future(http.tokens(f"/v1/jobs/{job_id}/stream", event))
            await asyncio.wait({reading, asyncio.ensure_future(event.wait())}, return_when=asyncio.FIRST_COMPLETED)
        found = await reading
        http.close()
        return int(tuple(found) == ANSWER)

    following = [asyncio.ensure_future(follow(job, event)) for job, event in zip(jobs, opened, strict=True)]
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in opened)), 120)
    with redis.Redis.from_url(url) as broker:
        connections = sum(client["name"].startswith("penstock-gateway") for client in broker.client_list())
    memory_mib = _resident_mib(pid)
    started = time.perf_counter()
    worker = await asyncio.to_thread(
        subprocess.Popen, [sys.executable, "-m", "benchmarks.noop_worker", url, _QUEUE], stderr=subprocess.DEVNULL
    )
    try:
        whole = sum(await asyncio.wait_for(asyncio.gather(*following), 120))
    finally:
        worker.terminate()
        worker.wait(30)
    if whole != len(jobs):
        raise SystemExit(f"{len(jobs) - whole} of {len(jobs)} streams lack tokens")
    return {
        "streams_held": len(jobs),
        "streams_whole": whole,
        "connections_to_redis": connections,
        "gateway_resident_mib": memory_mib,
        "streams_delivered_with_worker_start_s": time.perf_counter() - started,
    }


if __name__ == "__main__":
    main()
