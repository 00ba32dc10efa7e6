"""The HTTP gateway without a model: `python -m benchmarks.gateway [--json] [--quick]`.

A worker that computes nothing answers 32 tokens. Measured: one request at a time through `POST /v1/generate` and
through the SDK, in turn (p50 of each and their difference); requests/s over many connections; and how many event
streams one gateway process holds open at once, all tokens delivered to every one.
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
from urllib.error import URLError

from benchmarks.noop_worker import ANSWER
from benchmarks.queue import _process, _redis
from benchmarks.report import parser, publish, table
from penstock import AsyncClient

_QUEUE = "bench"
_BODY = json.dumps({"prompt_token_ids": list(range(128)), "max_tokens": 32}).encode()


def main() -> None:
    """Measure one gateway process."""
    options = parser(__doc__)
    options.add_argument("--singles", type=int, default=400, help="requests sent one at a time, each way")
    options.add_argument("--burst", type=int, default=4000, help="requests over --connections at once")
    options.add_argument("--connections", type=int, default=64)
    options.add_argument("--streams", type=int, default=2000, help="event streams held open at once")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.singles, arguments.burst, arguments.streams = 100, 500, 300
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * arguments.streams + 1000
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, wanted)), hard))
    with _redis(appendonly=True) as url, _gateway(url) as port:
        with _process([sys.executable, "-m", "benchmarks.noop_worker", url, _QUEUE]):
            latency = asyncio.run(_latency(url, port, arguments.singles))
            rate = asyncio.run(_rate(port, arguments.burst, arguments.connections))
        streams = asyncio.run(_streams(url, port, arguments.streams))
    figures = {**latency, "requests_per_s": rate, **streams}
    table("one gateway process", ["", "value"], [[name, value] for name, value in figures.items()])
    publish("gateway", {"figures": figures}, as_json=arguments.json)


@contextmanager
def _gateway(url: str) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "penstock", "gateway", "--redis", url, "--queue", _QUEUE, "--port", str(port)]
    with _process([*command, "--log-level", "error"]):
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                break
            except (URLError, ConnectionError):
                time.sleep(0.1)
        yield port


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


async def _latency(url: str, port: int, singles: int) -> dict[str, float]:
    http = await _Http.open(port)
    ours: list[float] = []
    theirs: list[float] = []
    async with AsyncClient(url, queue=_QUEUE) as client:
        for turn in range(singles + 20):
            started = time.perf_counter()
            result = await (await client.submit(prompt_token_ids=list(range(128)), max_tokens=32)).result(60)
            middle = time.perf_counter()
            answer = await http.post("/v1/generate", _BODY)
            ended = time.perf_counter()
            if result.token_ids != ANSWER or answer.get("token_ids") != list(ANSWER):
                raise SystemExit(f"wrong answer: {answer}")
            if turn >= 20:  # warm by then
                ours.append((middle - started) * 1e3)
                theirs.append((ended - middle) * 1e3)
    http.close()
    sdk, gateway = statistics.median(ours), statistics.median(theirs)
    return {"sdk_p50_ms": sdk, "gateway_p50_ms": gateway, "added_p50_ms": gateway - sdk}


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


async def _streams(url: str, port: int, count: int) -> dict[str, float]:
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
        "streams_delivered_with_worker_start_s": time.perf_counter() - started,
    }


if __name__ == "__main__":
    main()
