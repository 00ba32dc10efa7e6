"""The queue without a model, beside other queues: `python -m benchmarks.queue [--json] [--quick] [--peers FOLDER]`.

One producer and one worker process, a job of 128 integers in and 32 out that does nothing; results included. A burst
(jobs/s from the first submission to the last result) and one job at a time (submit to result, p50 and p99). Every
contestant gets its own fresh redis-server, in turn; ours is measured with and without AOF, the peers without. Peers
run where `make bench-peers` has made a virtual environment for them.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import processor_time
from benchmarks.report import alternate, chart, console, parser, publish, table
from penstock import Client, EmbeddedBroker, JobHandle

PEERS = ("celery", "dramatiq", "rq", "arq", "taskiq", "streaq")
_HERE = Path(__file__).parent / "peers"
_PAYLOAD = list(range(128))
_ANSWER = tuple(range(32))


def main() -> None:
    """Measure everyone who is installed, in turn."""
    options = parser(__doc__)
    options.add_argument("--peers", type=Path, default=Path(".bench-venvs"), help="folder of the peers' environments")
    options.add_argument("--jobs", type=int, default=20_000, help="our burst")
    options.add_argument("--peer-jobs", type=int, default=1000, help="the peers' burst")
    options.add_argument("--singles", type=int, default=200, help="jobs sent one at a time")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.runs, arguments.jobs, arguments.peer_jobs, arguments.singles = 1, 5000, 200, 50
    singles = arguments.singles
    contestants: dict[str, Callable[[], Mapping[str, float]]] = {
        "penstock (AOF)": partial(_ours, arguments.jobs, singles, appendonly=True),
        "penstock": partial(_ours, arguments.jobs, singles, appendonly=False),
    }
    for name in PEERS:
        python = arguments.peers / name / "bin" / "python"
        if python.exists() and _works(name, python):
            contestants[name] = partial(_peer, name, python, arguments.peer_jobs, singles)
        elif not python.exists():
            console.print(f"{name} is not installed under {arguments.peers}: left out (make bench-peers)")
    figures = alternate(contestants, arguments.runs, "queue")
    peers = {name: values for name, values in figures.items() if not name.startswith("penstock")}
    ratios = {
        name: {
            "jobs_per_s": figures["penstock (AOF)"]["jobs_per_s"] / values["jobs_per_s"],
            "p50_ms": values["p50_ms"] / figures["penstock (AOF)"]["p50_ms"],
            "p99_ms": values["p99_ms"] / figures["penstock (AOF)"]["p99_ms"],
        }
        for name, values in peers.items()
    }
    with _redis(appendonly=False) as url:
        version = _server(url).version
    table(
        f"one producer, one worker, results included (redis-server {version})",
        ["", "jobs/s", "p50 ms", "p99 ms", "ours (AOF) is ... times faster"],
        [
            [name, values["jobs_per_s"], values["p50_ms"], values["p99_ms"], ratios.get(name, {}).get("jobs_per_s", "")]
            for name, values in figures.items()
        ],
    )
    processes = ("producer", "worker", "redis")
    table(
        "processor time of a job in the burst, microseconds",
        ["", *processes],
        [[name, *(figures[name][f"{process}_us"] for process in processes)] for name in ("penstock (AOF)", "penstock")],
    )
    chart("jobs/s", {name: values["jobs_per_s"] for name, values in figures.items()})
    chart("p50, ms", {name: values["p50_ms"] for name, values in figures.items()})
    publish("queue", {"figures": figures, "ratios": ratios, "burst": arguments.jobs}, as_json=arguments.json)


def _ours(jobs: int, singles: int, *, appendonly: bool) -> Mapping[str, float]:
    with _redis(appendonly=appendonly) as url:
        worker = _process([sys.executable, "-m", "benchmarks.noop_worker", url, "bench"])
        with worker as worker_pid, Client(url, queue="bench") as client:
            _check(client.submit(prompt_token_ids=_PAYLOAD, max_tokens=32).result(timeout=60))
            pids = {"producer": os.getpid(), "worker": worker_pid, "redis": _server(url).pid}
            before = {name: processor_time.of_process(pid) for name, pid in pids.items()}
            started = time.perf_counter()
            handles: list[JobHandle] = []
            for first in range(0, jobs, 500):
                batch = [{"prompt_token_ids": _PAYLOAD, "max_tokens": 32} for _ in range(min(500, jobs - first))]
                for handle in client.submit_many(batch):
                    if not isinstance(handle, JobHandle):
                        raise handle
                    handles.append(handle)
            for handle in handles:
                _check(handle.result(timeout=60))
            elapsed = time.perf_counter() - started
            spent = {name: processor_time.of_process(pid) - before[name] for name, pid in pids.items()}
            latencies = []
            for _ in range(singles):
                began = time.perf_counter()
                _check(client.submit(prompt_token_ids=_PAYLOAD, max_tokens=32).result(timeout=60))
                latencies.append((time.perf_counter() - began) * 1e3)
    latencies.sort()
    return {
        "jobs_per_s": jobs / elapsed,
        "p50_ms": latencies[len(latencies) // 2],
        "p99_ms": latencies[min(len(latencies) - 1, len(latencies) * 99 // 100)],
        **{f"{name}_us": seconds / jobs * 1e6 for name, seconds in spent.items()},
    }


def _check(result: object) -> None:
    if result.token_ids != _ANSWER:  # type: ignore[attr-defined]
        raise SystemExit(f"wrong result: {result!r}")


def _works(name: str, python: Path) -> bool:
    """Whether a peer gets through a few jobs here; if not, it is left out, and its last words are shown."""
    try:
        _peer(name, python, 10, 2)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        console.print(f"{name} does not work here and is left out: {last}")
        return False
    return True


def _peer(name: str, python: Path, jobs: int, singles: int) -> Mapping[str, float]:
    """Run a peer's worker and producer in its own environment."""
    source = ast.parse((_HERE / f"{name}_queue.py").read_text())
    worker = next(
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "WORKER"
    )
    interpreter = str(python.absolute())
    with _redis(appendonly=False) as url:
        environment = {**os.environ, "BENCH_REDIS_URL": url, "RQ_REDIS_URL": url, "PYTHONPATH": str(_HERE)}
        with _process([interpreter, *worker], cwd=_HERE, env=environment):
            produced = subprocess.run(
                [interpreter, f"{name}_queue.py", url, str(jobs), str(singles)],
                cwd=_HERE,
                env=environment,
                capture_output=True,
                text=True,
                timeout=600,
                check=True,
            )
    figures: dict[str, float] = json.loads(produced.stdout.strip().splitlines()[-1])
    return figures


@contextmanager
def _redis(*, appendonly: bool) -> Iterator[str]:
    """A fresh redis-server of its own."""
    import redis

    with EmbeddedBroker() as broker:
        with redis.Redis.from_url(broker.url) as admin:
            admin.config_set("appendonly", "yes" if appendonly else "no")
            admin.config_set("requirepass", "")  # not every peer's URL parser takes one
        yield "redis://" + broker.url.rpartition("@")[2]


@dataclass(frozen=True, slots=True)
class Server:
    """The redis-server behind a URL."""

    pid: int
    version: str


def _server(url: str) -> Server:
    import redis

    with redis.Redis.from_url(url) as admin:
        about = admin.info("server")
    return Server(int(about["process_id"]), str(about["redis_version"]))


@contextmanager
def _process(command: list[str], **settings: object) -> Iterator[int]:
    """A process that is ended after use; yields its pid."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, **settings)  # type: ignore[call-overload]
        try:
            yield process.pid
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
