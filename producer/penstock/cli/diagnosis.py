"""The checks of `penstock doctor`, one function each; none changes anything. Yields a sentence before slow ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, Literal

import redis

from penstock.cli.fleet import find_queues, is_stranded
from penstock.cli.processes import bundled_model
from penstock.cli.screen import duration, size
from penstock.cli.session import Address
from penstock_core.protocol.connection import broker_errors, check_broker, connect
from penstock_core.protocol.errors import BrokerUnavailable, PenstockError
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import QueueSnapshot, run, snapshot

_MIN_FREE_BYTES = 2 * 1024**3
_SLOW_MS = 5.0
_LATE_BEAT_MS = 10_000
_MODEL_TIMEOUT_S = 120
_REINSTALL = "reinstall it: pip install --force-reinstall 'penstock[worker]'"
_PACKAGES = (("redis", (6, 4)), ("msgpack", (1, 1)), ("pydantic", (2, 11)), ("torch", (2, 11)))

# Runs in a process of its own, because the client side never imports torch.
_LOAD_MODEL = """
import json, sys, time
import torch
from penstock_core.pipeline import InferencePipelineExecutor, PipelineConfig
from penstock_core.protocol.requests import SamplingParams
begun = time.monotonic()
executor = InferencePipelineExecutor(PipelineConfig(model=sys.argv[1], device="cpu"))
loaded = time.monotonic()
executor.generate(["Once"], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
warm = time.monotonic()
result = executor.generate(["Once upon a time"], SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True))[0]
done = time.monotonic()
executor.shutdown(5.0)
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"load_s": loaded - begun, "tokens": len(result.token_ids), "generate_s": done - warm,
                  "text": result.text, "gpus": gpus, "threads": torch.get_num_threads()}))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    section: str
    name: str
    status: Literal["ok", "warning", "error", "skipped"]
    detail: str
    remedy: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The finding as JSON."""
        return asdict(self)


def examine(address: Address, *, load_model: bool) -> Iterator[Finding | str]:
    """Run all checks."""
    yield from _machine()
    yield f"asking {address.shown_url}"
    yield from _broker(address)
    if load_model:
        yield "loading the bundled model"
        yield _model()


def _machine() -> Iterator[Finding]:
    section = "This machine"
    current = ".".join(map(str, sys.version_info[:3]))
    yield Finding(section, "python", "ok", f"{current} ({sys.executable})", data={"version": current})
    yield Finding(section, "penstock", "ok", own_version())
    for package, oldest in _PACKAGES:
        yield _package(section, package, oldest)
    yield _disk(section)


def own_version() -> str:
    """Version of the installed distribution."""
    try:
        return version_of("penstock")
    except PackageNotFoundError:
        return "unknown (not installed as a distribution)"


def _package(section: str, name: str, oldest: tuple[int, int]) -> Finding:
    needed = ".".join(map(str, oldest))
    try:
        found = version_of(name)
    except PackageNotFoundError:
        if name == "torch":
            return Finding(section, name, "skipped", "not installed: this machine can submit, but run no worker",
                           "pip install 'penstock[worker]'")  # fmt: skip
        return Finding(section, name, "error", "not installed", f"pip install '{name}>={needed}'")
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdecimal())
    if numbers < oldest:
        return Finding(section, name, "error", found, f"pip install '{name}>={needed}'")
    return Finding(section, name, "ok", found)


def _disk(section: str) -> Finding:
    place = Path(tempfile.gettempdir())
    free = shutil.disk_usage(place).free
    detail = f"{size(free)} free in {place}"
    data = {"free_bytes": free, "path": str(place)}
    if free < _MIN_FREE_BYTES:
        remedy = "free some space, or set TMPDIR to a larger disk: the embedded broker keeps its append-only file there"
        return Finding(section, "disk", "warning", detail, remedy, data)
    return Finding(section, "disk", "ok", detail, data=data)


def _broker(address: Address) -> Iterator[Finding]:
    section = "Broker"
    try:
        client = connect(address.url, client_name="penstock-doctor")
    except PenstockError as error:
        yield Finding(section, "broker", "error", str(error), "correct --redis or PENSTOCK_REDIS_URL")
        return
    try:
        with broker_errors(address.url):
            yield from _reachable(section, client)
            yield from _settings(section, client)
            seen = run(client, snapshot(QueueKeys(address.queue)))
            others = {name: run(client, snapshot(QueueKeys(name))) for name in find_queues(client)}
    except BrokerUnavailable as error:
        problem, _, remedy = str(error).rpartition("; ")
        yield Finding(section, "broker", "error", problem or str(error), remedy)
        return
    finally:
        client.close()
    yield from _other_queues(section, {name: other for name, other in others.items() if name != address.queue})
    yield from _queue(address, seen)


def _reachable(section: str, client: redis.Redis) -> Iterator[Finding]:
    client.ping()
    trips = []
    for _ in range(20):
        begun = time.perf_counter()
        client.ping()
        trips.append((time.perf_counter() - begun) * 1000)
    median = sorted(trips)[len(trips) // 2]
    yield Finding(section, "broker", "ok", "reachable")
    data = {"median_ms": median, "worst_ms": max(trips)}
    detail = f"{median:.2f} ms a round trip, worst {max(trips):.2f} ms"
    if median > _SLOW_MS:
        remedy = "put workers and clients nearer to Redis: each engine step publishes in one round trip"
        yield Finding(section, "latency", "warning", detail, remedy, data)
    else:
        yield Finding(section, "latency", "ok", detail, data=data)


def _settings(section: str, client: redis.Redis) -> Iterator[Finding]:
    warnings = {warning.code: warning for warning in check_broker(client)}
    info: dict[str, Any] = {}
    if "unchecked" not in warnings:
        raw: Any = client.info("all")
        info = next(iter(raw.values())) if raw and all(isinstance(value, dict) for value in raw.values()) else raw
    version = str(info.get("valkey_version") or info.get("redis_version") or "?")
    flavour = "valkey" if info.get("valkey_version") else "redis"
    limit = int(info.get("maxmemory", 0) or 0)
    used = int(info.get("used_memory", 0) or 0)
    facts = (
        ("version", ("old_server", "replica"), f"{flavour} {version}", {"version": version, "flavour": flavour}),
        ("persistence", ("no_aof", "aof_failing"), "append-only file is on", {"aof": bool(info.get("aof_enabled"))}),
        ("eviction", ("evicting",), str(info.get("maxmemory_policy", "?")), {"policy": info.get("maxmemory_policy")}),
        ("memory", ("memory",), f"{size(used)} used, {f'limit {size(limit)}' if limit else 'no limit'}",
         {"used_bytes": used, "maxmemory_bytes": limit}),
    )  # fmt: skip
    if "unchecked" in warnings:
        yield _from_warning(section, "settings", warnings.pop("unchecked"))
        return
    for name, codes, detail, data in facts:
        problem = next((warnings.pop(code) for code in codes if code in warnings), None)
        yield (
            _from_warning(section, name, problem, data) if problem else Finding(section, name, "ok", detail, data=data)
        )
    for warning in warnings.values():
        yield _from_warning(section, warning.code, warning)


def _from_warning(section: str, name: str, warning: Any, data: dict[str, Any] | None = None) -> Finding:
    detail, _, remedy = warning.message.rpartition("; ")
    return Finding(section, name, warning.severity, detail or warning.message, remedy if detail else "", data or {})


def _queue(address: Address, seen: QueueSnapshot) -> Iterator[Finding]:
    section = f"Queue {address.queue}"
    yield Finding(
        section, "jobs", "ok", f"{seen.running} running, {seen.waiting} waiting, {seen.delayed} delayed",
        data={"running": seen.running, "waiting": seen.waiting, "delayed": seen.delayed},
    )  # fmt: skip
    if seen.dead:
        yield Finding(section, "dead letters", "warning", f"{seen.dead} dead jobs", "see `penstock dead list`")
    ages = {view.worker_id: max(0, seen.now_ms - view.heartbeat_ms) for view in seen.workers}
    alive = [view for view in seen.workers if ages[view.worker_id] <= _LATE_BEAT_MS]
    late = [worker for worker, age in ages.items() if age > _LATE_BEAT_MS]
    if not alive:
        status: Literal["error", "warning"] = "error" if seen.waiting or seen.running else "warning"
        yield Finding(section, "workers", status, "none serves this queue, so jobs wait",
                      "start one: `penstock worker`, or broker and worker together: `penstock serve`")  # fmt: skip
    else:
        places = ", ".join(
            f"{view.worker_id} ({view.record.device})" if view.record else view.worker_id for view in alive[:4]
        )
        more = f" and {len(alive) - 4} more" if len(alive) > 4 else ""
        yield Finding(section, "workers", "ok", f"{len(alive)} alive: {places}{more}", data={"alive": len(alive)})
    if late:
        shown = ", ".join(f"{worker} ({duration(ages[worker] / 1000)} ago)" for worker in late[:3])
        yield Finding(section, "heartbeats", "warning", f"silent: {shown}",
                      "their jobs go to others once their leases end; look at these workers' logs")  # fmt: skip
    versions = {view.record.version for view in alive if view.record is not None and view.record.version}
    if versions:
        own = own_version()
        if versions == {own}:
            yield Finding(section, "versions", "ok", f"workers and this command agree on {own}")
        else:
            theirs = ", ".join(sorted(versions))
            detail = f"workers run {theirs}, this command {own}"
            yield Finding(section, "versions", "warning", detail, "upgrade both to one version")


def _other_queues(section: str, others: Mapping[str, QueueSnapshot]) -> Iterator[Finding]:
    """A job goes to the queue of its model: a misspelt one waits for ever, and nobody looks there."""
    if not others:
        return
    stranded = [f"{name} ({seen.waiting} waiting)" for name, seen in others.items() if is_stranded(seen)]
    if stranded:
        more = f" and {len(stranded) - 3} more" if len(stranded) > 3 else ""
        yield Finding(section, "other queues", "warning", f"jobs without a worker: {', '.join(stranded[:3])}{more}",
                      "start workers with --model or --queue of that name, or cancel the jobs; "
                      "`penstock top --all` shows all queues")  # fmt: skip
    else:
        yield Finding(section, "other queues", "ok", f"{len(others)} more on this broker, none waits for a worker")


def _model() -> Finding:
    section, name = "Model", "bundled"
    try:
        version_of("torch")
    except PackageNotFoundError:
        return Finding(section, name, "skipped", "needs the worker extra")
    folder = bundled_model()
    if folder is None:
        return Finding(section, name, "error", "is missing", _REINSTALL)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOAD_MODEL, str(folder)], capture_output=True, text=True,
            timeout=_MODEL_TIMEOUT_S, stdin=subprocess.DEVNULL, env={**os.environ},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        detail = f"did not load within {_MODEL_TIMEOUT_S} s"
        return Finding(section, name, "error", detail, "is the machine overloaded?")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return Finding(section, name, "error", f"does not load: {lines[-1] if lines else done.returncode}",
                       _REINSTALL)  # fmt: skip
    data = json.loads(done.stdout.strip().splitlines()[-1])
    speed = data["tokens"] / max(1e-6, data["generate_s"])
    text = " ".join(data["text"].split())
    gpus = f"; GPUs: {', '.join(data['gpus'])}" if data["gpus"] else ""
    detail = f"loads in {data['load_s']:.1f} s, {speed:,.0f} tokens/s for one stream{gpus}: “{text[:48]}…”"
    return Finding(section, name, "ok", detail, data=data)
