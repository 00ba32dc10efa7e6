"""Schemathesis against a running gateway: whatever the schema admits, and what it does not, gets no 500 and no hang.

Requests that are answered when their job is done get a short deadline and no delay: a long wait would be no hang. What
still waits, for a duplicate's scheduled job say, the gateway ends by its own limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from penstock.gateway.app import create_app
from penstock.gateway.settings import GatewaySettings
from tests.integration.gateway.conftest import Gateway
from tests.redis_server import RedisServer
from tests.worker_process import WorkerProcess

schemathesis = pytest.importorskip("schemathesis")

pytestmark = pytest.mark.integration

EXAMPLES = 25
LABELS = sorted(
    f"{method.upper()} {path}"
    for path, methods in create_app(GatewaySettings()).openapi()["paths"].items()
    for method in methods
)
_ANSWERS_WHEN_DONE = ("/v1/generate", "/v1/batch", "/v1/chat/completions", "/v1/completions", "/v1/responses")


@pytest.fixture(scope="module")
def open_gateway(
    story_redis: RedisServer, story_worker: WorkerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    gateway = Gateway(story_redis.url, tmp_path_factory.mktemp("gateway"), "--request-timeout", "5")
    gateway.start()
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def operations(open_gateway: Gateway) -> dict[str, Any]:
    schema = schemathesis.openapi.from_url(f"{open_gateway.url}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return {operation.label: operation for operation in found}


def _with_deadline(body: Any) -> Any:
    if isinstance(body, dict):
        if isinstance(body.get("requests"), list):
            return {**body, "requests": [_with_deadline(one) for one in body["requests"]]}
        return {**{name: body[name] for name in body if name not in ("delay_s", "not_before")}, "deadline_s": 0.5}
    return body


@pytest.mark.parametrize("label", LABELS)
def test_no_operation_breaks_or_hangs(operations: dict[str, Any], open_gateway: Gateway, label: str) -> None:
    operation = operations[label]
    modes = schemathesis.GenerationMode
    cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in (modes.POSITIVE, modes.NEGATIVE)))

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def probe(case: Any) -> None:
        if operation.path in _ANSWERS_WHEN_DONE:
            case.body = _with_deadline(case.body)
        answer = case.call(base_url=open_gateway.url, timeout=120)
        assert answer.status_code not in (500, 502), f"{operation.label}: {answer.text[:500]}"

    probe()


def test_gateway_is_sound_after_it(open_gateway: Gateway) -> None:
    assert httpx.get(f"{open_gateway.url}/v1/metrics", timeout=120).status_code == 200
