"""The producer side that every peer shares: throughput of a burst, and latency one job at a time.

Run by a peer's file as a script: `python <peer>_queue.py <redis url> <burst> <singles>`. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

PAYLOAD = list(range(128))
RESULT = list(range(32))


def main(
    submit: Callable[[list[int]], Any],
    result: Callable[[Any], Any],
) -> None:
    """Measure a synchronous queue client."""
    _, burst, singles = _arguments()
    _check(result(submit(PAYLOAD)))  # worker is up, connections are warm
    started = time.perf_counter()
    handles = [submit(PAYLOAD) for _ in range(burst)]
    for handle in handles:
        _check(result(handle))
    elapsed = time.perf_counter() - started
    latencies = []
    for _ in range(singles):
        began = time.perf_counter()
        _check(result(submit(PAYLOAD)))
        latencies.append(time.perf_counter() - began)
    _report(burst, elapsed, latencies)


async def main_async(
    submit: Callable[[list[int]], Awaitable[Any]],
    result: Callable[[Any], Awaitable[Any]],
) -> None:
    """Measure an asyncio queue client; the burst's results are awaited together."""
    _, burst, singles = _arguments()
    _check(await result(await submit(PAYLOAD)))
    started = time.perf_counter()
    handles = [await submit(PAYLOAD) for _ in range(burst)]
    width = 256  # results awaited at a time: more pollers only slow the peers down
    for first in range(0, burst, width):
        for answer in await asyncio.gather(*(result(handle) for handle in handles[first : first + width])):
            _check(answer)
    elapsed = time.perf_counter() - started
    latencies = []
    for _ in range(singles):
        began = time.perf_counter()
        _check(await result(await submit(PAYLOAD)))
        latencies.append(time.perf_counter() - began)
    _report(burst, elapsed, latencies)


def redis_url() -> str:
    """The broker: first argument of the producer, or the environment of the worker."""
    import os

    return os.environ.get("BENCH_REDIS_URL") or _arguments()[0]


def _arguments() -> tuple[str, int, int]:
    return sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def _check(answer: Sequence[int]) -> None:
    if list(answer) != RESULT:
        raise SystemExit(f"wrong result: {answer!r}")


def _report(burst: int, elapsed: float, latencies: list[float]) -> None:
    latencies.sort()
    print(
        json.dumps(
            {
                "jobs_per_s": burst / elapsed,
                "p50_ms": latencies[len(latencies) // 2] * 1e3,
                "p99_ms": latencies[min(len(latencies) - 1, len(latencies) * 99 // 100)] * 1e3,
            }
        )
    )
