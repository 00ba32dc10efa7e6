"""`/metrics` is Prometheus text in which every series stands from the first scrape on."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock_core.protocol.transitions import COUNTERS
from tests.integration.gateway.conftest import Gateway

pytestmark = pytest.mark.integration


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_series_is_there_from_the_start(operator: httpx.Client) -> None:
    answer = operator.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    seen = samples(answer.text)
    queue = ("queue", "penstock-story")
    for priority in range(10):
        assert ("penstock_queue_depth_jobs", (("priority", str(priority)), queue)) in seen
    for tenant in ("default", "_other"):
        assert ("penstock_queue_tenant_depth_jobs", (queue, ("tenant", tenant))) in seen
    for counter in COUNTERS:
        assert (f"penstock_queue_{counter}_total", (queue,)) in seen
    for status in ("2xx", "4xx", "5xx"):
        assert ("penstock_gateway_requests_total", (("route", "/v1/generate"), ("status", status))) in seen
    assert ("penstock_gateway_open_streams", ()) in seen


def test_requests_are_counted_by_route_and_not_by_address(operator: httpx.Client) -> None:
    before = samples(operator.get("/metrics").text)
    operator.get("/v1/jobs/00000000000000000000000000000001")
    operator.get("/v1/nowhere/at/all")
    after = samples(operator.get("/metrics").text)
    for route in ("/v1/jobs/{job_id}", "unmatched"):
        key = ("penstock_gateway_requests_total", (("route", route), ("status", "4xx")))
        assert after[key] == before[key] + 1


def test_metrics_ask_for_an_operators_key(gateway: Gateway, http: httpx.Client) -> None:
    assert httpx.get(f"{gateway.url}/metrics").status_code == 401
    assert http.get("/metrics").status_code == 403
