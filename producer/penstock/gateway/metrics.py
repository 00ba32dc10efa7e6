"""What `/metrics` shows: the queue as Redis sees it at the scrape, and what this gateway has answered.

Every series is there from the first scrape on, at zero. Labels are bounded: of many tenants the deepest are named and
the others are summed, and a request that no route matched counts under one name.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.gateway.handler import HEARTBEAT_GRACE_MS
from penstock_core.protocol.requests import DEFAULT_TENANT, PRIORITY_HIGHEST, PRIORITY_LOWEST
from penstock_core.protocol.transitions import COUNTERS, QueueSnapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_TENANTS = 50
OTHER_TENANTS = "_other"
"""No tenant has this name: a tenant's begins with a letter or a digit."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STATUSES = ("2xx", "3xx", "4xx", "5xx")


class RequestMeters:
    """What this process has answered."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "penstock_gateway_requests_total", "Requests answered.", ("route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "penstock_gateway_request_seconds",
            "From a request's arrival to the end of its answer.",
            ("route",),
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.in_flight = Gauge(
            "penstock_gateway_requests_in_flight", "Requests being answered.", registry=self.registry
        )
        self.open_streams = Gauge("penstock_gateway_open_streams", "Event streams held open.", registry=self.registry)

    def know(self, routes: Iterable[str]) -> None:
        """Begin the series of these routes at zero."""
        for route in (*routes, "unmatched"):
            self._seconds.labels(route)
            for status in _STATUSES:
                self._requests.labels(route, status)

    def count(self, route: str, status: int, seconds: float) -> None:
        """One request was answered."""
        self._requests.labels(route, f"{status // 100}xx").inc()
        self._seconds.labels(route).observe(seconds)


class Measured:
    """ASGI middleware that counts requests and open event streams."""

    def __init__(self, app: ASGIApp, meters: RequestMeters) -> None:
        self._app = app
        self._meters = meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and count its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        meters, started, status, streams = self._meters, time.perf_counter(), 500, False

        async def noticing(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                if (b"content-type", b"text/event-stream; charset=utf-8") in message["headers"]:
                    streams = True
                    meters.open_streams.inc()
            await send(message)

        meters.in_flight.inc()
        try:
            await self._app(scope, receive, noticing)
        finally:
            meters.in_flight.dec()
            if streams:
                meters.open_streams.dec()
            route = scope.get("route")
            name = route.path if isinstance(route, Route) else "unmatched"
            meters.count(name, status, time.perf_counter() - started)


def exposition(meters: RequestMeters, seen: QueueSnapshot, queue: str) -> bytes:
    """The Prometheus text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_QueueCollector(seen, queue))
    return generate_latest(registry) + generate_latest(meters.registry)


class _QueueCollector:
    """The series of one snapshot."""

    def __init__(self, seen: QueueSnapshot, queue: str) -> None:
        self._seen = seen
        self._queue = queue

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        seen, queue = self._seen, self._queue
        by_priority: Tally[int] = Tally(dict.fromkeys(range(PRIORITY_LOWEST, PRIORITY_HIGHEST + 1), 0))
        by_tenant: Tally[str] = Tally({DEFAULT_TENANT: 0})
        for line in seen.lines:
            by_priority[line.priority] += line.depth
            by_tenant[line.tenant] += line.depth
        depth = GaugeMetricFamily("penstock_queue_depth_jobs", "Waiting jobs.", labels=("queue", "priority"))
        for priority in sorted(by_priority):
            depth.add_metric((queue, str(priority)), by_priority[priority])
        yield depth
        tenants = GaugeMetricFamily(
            "penstock_queue_tenant_depth_jobs",
            f"Waiting jobs of the {MAX_TENANTS} deepest tenants; the others' together are {OTHER_TENANTS}.",
            labels=("queue", "tenant"),
        )
        named = by_tenant.most_common(MAX_TENANTS)
        for tenant, waiting in named:
            tenants.add_metric((queue, tenant), waiting)
        tenants.add_metric((queue, OTHER_TENANTS), by_tenant.total() - sum(waiting for _, waiting in named))
        yield tenants
        for name, text, value in (
            ("queue_oldest_wait_seconds", "How long the longest-waiting job has waited.", seen.oldest_wait_ms / 1e3),
            ("queue_waiting_jobs", "Jobs ready to be claimed.", seen.waiting),
            ("queue_running_jobs", "Jobs running on any worker.", seen.running),
            ("queue_delayed_jobs", "Jobs scheduled for later.", seen.delayed),
            ("queue_dead_letters", "Dead letters kept.", seen.dead),
        ):
            gauge = GaugeMetricFamily(f"penstock_{name}", text, labels=("queue",))
            gauge.add_metric((queue,), value)
            yield gauge
        for name in COUNTERS:
            counter = CounterMetricFamily(
                f"penstock_queue_{name}_total", f"The queue's counter {name}, since its beginning.", labels=("queue",)
            )
            counter.add_metric((queue,), seen.stats[name])
            yield counter
        yield from self._workers()

    def _workers(self) -> Iterator[Metric]:
        seen = self._seen
        records = [
            view.record
            for view in seen.workers
            if view.record is not None and seen.now_ms - view.heartbeat_ms < HEARTBEAT_GRACE_MS
        ]
        for name, text, value in (
            ("workers", "Live workers.", len(records)),
            ("workers_draining", "Live workers that claim no more.", sum(record.draining for record in records)),
            ("workers_free_sequences", "Sequences that workers have room for.", sum(r.free_sequences for r in records)),
            ("workers_free_tokens", "KV-cache tokens that are free.", sum(r.free_tokens for r in records)),
            ("workers_kv_cache_tokens", "KV-cache tokens there are.", sum(r.total_tokens for r in records)),
            ("workers_tokens_per_second", "Tokens generated a second.", sum(r.tokens_per_s for r in records)),
        ):
            gauge = GaugeMetricFamily(f"penstock_{name}", text, labels=("queue",))
            gauge.add_metric((self._queue,), value)
            yield gauge
