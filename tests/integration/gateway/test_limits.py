"""What a tenant may use, who may see what, and that no request waits for ever. Nothing here needs a worker."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from penstock import Client
from penstock.gateway.auth import digest_of
from tests.integration.gateway.conftest import Gateway
from tests.redis_server import RedisServer

pytestmark = pytest.mark.integration

QUEUE = "nobody-works-here"
MILL, HARBOUR, SLOW, OPERATOR = (f"pk_of-{name}" for name in ("the-mill", "the-harbour", "the-snail", "the-operator"))
KEYS: dict[str, Any] = {
    MILL: "mill",
    HARBOUR: "harbour",
    SLOW: {"tenant": "snail", "requests_per_minute": 1},
    OPERATOR: {"role": "operator"},
}
LATER = {"prompt": "later", "delay_s": 3600}


@pytest.fixture(scope="module")
def limited(start_redis: Callable[..., RedisServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("limited")
    (folder / "keys.json").write_text(json.dumps({digest_of(key): entry for key, entry in KEYS.items()}))
    options = ("--queue", QUEUE, "--api-keys", str(folder / "keys.json"), "--request-timeout", "0.4")
    gateway = Gateway(start_redis().url, folder, *options, "--cors-origin", "https://app.example.com")
    gateway.start()
    yield gateway
    gateway.stop()


@pytest.fixture
def ask(limited: Gateway) -> Iterator[Callable[..., httpx.Response]]:
    """`ask(key, method, path, **options)`."""
    with httpx.Client(base_url=limited.url, timeout=30) as client:

        def call(key: str, method: str, path: str, **options: Any) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}", **options.pop("headers", {})}
            return client.request(method, path, headers=headers, **options)

        yield call


def openai_client(limited: Gateway, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{limited.url}/v1", api_key=key, max_retries=0, timeout=30)


def test_queued_jobs_are_limited_per_tenant_and_the_use_is_visible(ask: Any, limited: Gateway) -> None:
    set_to = ask(OPERATOR, "PUT", "/v1/tenants/mill/quota", json={"max_queued": 2, "max_running": 3})
    assert set_to.json()["limits"] == {"max_queued": 2, "max_running": 3, "tokens_per_minute": None}
    jobs = [ask(MILL, "POST", "/v1/jobs", json=LATER) for _ in range(3)]
    assert [answer.status_code for answer in jobs] == [202, 202, 429]
    assert int(jobs[2].headers["Retry-After"]) >= 1
    error = jobs[2].json()["error"]
    assert error["code"] == "queue_full"
    assert "max_queued is 2" in error["message"]
    quota = ask(MILL, "GET", "/v1/quota").json()
    assert (quota["tenant"], quota["queued"], quota["running"], quota["limits"]["max_queued"]) == ("mill", 2, 0, 2)
    assert ask(OPERATOR, "GET", "/v1/tenants/mill/quota").json()["queued"] == 2
    with openai_client(limited, MILL) as client, pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(model="m", prompt="x")
    assert refused.value.type == "rate_limit_error"
    assert refused.value.code == "rate_limit_exceeded"
    assert int(refused.value.response.headers["Retry-After"]) >= 1
    assert ask(HARBOUR, "POST", "/v1/jobs", json=LATER).status_code == 202, "the limit is the other tenant's"
    assert ask(OPERATOR, "PUT", "/v1/tenants/mill/quota", json={}).json()["limits"]["max_queued"] is None
    assert ask(MILL, "POST", "/v1/jobs", json=LATER).status_code == 202


def test_tokens_per_minute_are_limited_and_say_when_to_come_back(ask: Any) -> None:
    ask(OPERATOR, "PUT", "/v1/tenants/harbour/quota", json={"tokens_per_minute": 600})
    begun = time.monotonic()
    first = ask(HARBOUR, "POST", "/v1/jobs", json={"prompt_token_ids": [1] * 100, "max_tokens": 400})
    second = ask(HARBOUR, "POST", "/v1/jobs", json={"prompt_token_ids": [1] * 100, "max_tokens": 400})
    assert (first.status_code, second.status_code) == (202, 429)
    come_back_s = int(second.headers["Retry-After"]) + (time.monotonic() - begun)
    assert come_back_s >= 39, "400 tokens come back in 40 seconds"
    assert int(second.headers["Retry-After"]) <= 40
    assert "tokens_per_minute 600" in second.json()["error"]["message"]
    charged = ask(HARBOUR, "GET", "/v1/quota").json()["tokens_charged"]
    assert 500 - 10 * (time.monotonic() - begun) - 1 <= charged <= 500, "ten come back every second"
    ask(OPERATOR, "PUT", "/v1/tenants/harbour/quota", json={})
    ask(HARBOUR, "DELETE", first.json()["status_url"])


def test_requests_per_minute_are_limited_per_key_over_all_gateways(ask: Any, limited: Gateway, tmp_path: Path) -> None:
    begun = time.monotonic()
    first, second = (ask(SLOW, "GET", "/v1/quota") for _ in range(2))
    assert first.json()["requests_per_minute"] == 1
    assert second.status_code == 429
    assert int(second.headers["Retry-After"]) + (time.monotonic() - begun) >= 59
    assert int(second.headers["Retry-After"]) <= 60
    assert second.json()["error"]["code"] == "too_many_requests"
    openais = ask(SLOW, "GET", "/v1/models")
    assert (openais.status_code, openais.json()["error"]["type"]) == (429, "rate_limit_error")
    assert ask(MILL, "GET", "/v1/quota").status_code == 200
    (tmp_path / "keys.json").write_text(json.dumps({digest_of(SLOW): KEYS[SLOW]}))
    other = Gateway(limited.redis_url, tmp_path, "--queue", QUEUE, "--api-keys", str(tmp_path / "keys.json"))
    other.start()
    try:
        answer = httpx.get(f"{other.url}/v1/quota", headers={"Authorization": f"Bearer {SLOW}"})
        assert answer.status_code == 429, "a second gateway is no second minute's worth"
    finally:
        other.stop()


def test_only_an_operator_reaches_other_tenants_and_the_queue(ask: Any) -> None:
    job = ask(MILL, "POST", "/v1/jobs", json=LATER).json()
    for method, path in (
        ("GET", "/metrics"),
        ("GET", "/v1/tenants/harbour/quota"),
        ("PUT", "/v1/tenants/mill/quota"),
        ("POST", f"/v1/jobs/{job['id']}/requeue"),
        ("GET", "/v1/jobs?tenant=harbour"),
    ):
        refused = ask(MILL, method, path, **({"json": {}} if method == "PUT" else {}))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden"), path
    for method in ("GET", "DELETE"):
        assert ask(HARBOUR, method, job["status_url"]).status_code == 404
    assert ask(OPERATOR, "GET", job["status_url"]).json()["tenant"] == "mill"
    assert ask(OPERATOR, "POST", f"/v1/jobs/{job['id']}/requeue").json()["outcome"] == "not_dead"
    assert job["id"] in [seen["id"] for seen in ask(OPERATOR, "GET", "/v1/jobs").json()]
    assert ask(OPERATOR, "DELETE", job["status_url"]).json()["outcome"] == "cancelled"


def test_listing_is_the_tenants_own_and_goes_on_page_by_page(ask: Any, limited: Gateway) -> None:
    ids = [ask(MILL, "POST", "/v1/jobs", json=LATER).json()["id"] for _ in range(5)]
    theirs = ask(HARBOUR, "POST", "/v1/jobs", json=LATER).json()["id"]
    first = [job["id"] for job in ask(MILL, "GET", "/v1/jobs?limit=2").json()]
    second = [job["id"] for job in ask(MILL, "GET", f"/v1/jobs?limit=3&before={first[-1]}").json()]
    assert first + second == ids[::-1]
    assert theirs not in [job["id"] for job in ask(MILL, "GET", "/v1/jobs?limit=1000").json()]
    ask(MILL, "DELETE", f"/v1/jobs/{ids[0]}")
    cancelled = [job["id"] for job in ask(MILL, "GET", "/v1/jobs?state=cancelled").json()]
    assert ids[0] in cancelled
    assert ids[1] not in cancelled
    unknown = ask(MILL, "GET", f"/v1/jobs?before={theirs}")
    assert (unknown.status_code, unknown.json()["error"]["field"]) == (422, "before"), "as if it were not there"
    assert theirs in [job["id"] for job in ask(OPERATOR, "GET", "/v1/jobs?tenant=harbour").json()]


def test_no_request_waits_longer_than_it_may_and_its_job_goes_on(ask: Any, limited: Gateway) -> None:
    """Nobody works here: each wait ends with the job's id, under which the answer can be fetched later."""
    for path, body in (
        ("/v1/generate", {"prompt": "x"}),
        ("/v1/completions", {"model": "m", "prompt": "x"}),
        ("/v1/completions", {"model": "m", "prompt": "x", "logprobs": 1}),
        ("/v1/completions", {"model": "m", "prompt": "x", "stream": True}),
        ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x"}]}),
    ):
        late = ask(MILL, "POST", path, json=body)
        assert late.status_code == 504, late.text
        error = late.json()["error"]
        job_id = next(job["id"] for job in ask(MILL, "GET", "/v1/jobs?limit=1").json())
        assert error["code"] == "timeout"
        assert f"GET /v1/jobs/{job_id} " in error["message"]
        assert ask(MILL, "GET", f"/v1/jobs/{job_id}").json()["state"] == "queued"
        ask(MILL, "DELETE", f"/v1/jobs/{job_id}")
    batch = ask(MILL, "POST", "/v1/batch", json={"requests": [{"prompt": "x"}]})
    (item,) = batch.json()["responses"]
    assert item["error"]["code"] == "timeout"
    assert ask(MILL, "GET", f"/v1/jobs/{item['error']['job_id']}").json()["state"] == "queued"


def test_a_duplicate_of_a_scheduled_job_does_not_hang_its_caller(ask: Any) -> None:
    """The story: a fuzzer's second request with one Idempotency-Key waited for a job due next year."""
    headers = {"Idempotency-Key": "next-year"}
    job = ask(MILL, "POST", "/v1/jobs", json={**LATER, "delay_s": 3e7}, headers=headers).json()
    late = ask(MILL, "POST", "/v1/generate", json={"prompt": "x", "timeout_s": 3600}, headers=headers)
    assert late.status_code == 504
    assert late.json()["error"]["job_id"] == job["id"]
    assert ask(MILL, "GET", job["status_url"]).json()["state"] == "delayed", "it is not the duplicate's to cancel"


def test_browsers_may_call_from_the_named_origin_only(limited: Gateway, gateway_without_options: Gateway) -> None:
    def preflight(gateway: Gateway, origin: str) -> str | None:
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answer = httpx.options(f"{gateway.url}/v1/jobs", headers=asked)
        return answer.headers.get("Access-Control-Allow-Origin")

    assert preflight(limited, "https://app.example.com") == "https://app.example.com"
    assert preflight(limited, "https://evil.example.com") is None
    assert preflight(gateway_without_options, "https://app.example.com") is None


@pytest.fixture(scope="module")
def gateway_without_options(
    start_redis: Callable[..., RedisServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    gateway = Gateway(start_redis().url, tmp_path_factory.mktemp("open"), "--queue", QUEUE)
    gateway.start()
    yield gateway
    gateway.stop()


def test_it_says_at_its_start_who_may_do_what(limited: Gateway, gateway_without_options: Gateway) -> None:
    assert "API keys of 3 tenants and 1 operators" in limited.log
    assert "no API keys: whoever reaches 127.0.0.1 may" in gateway_without_options.log
    assert httpx.get(f"{gateway_without_options.url}/v1/metrics").json()["scope"] == "queue"


def test_health_tells_nobody_where_redis_is(start_redis: Callable[..., RedisServer], tmp_path: Path) -> None:
    redis = start_redis()
    gateway = Gateway(redis.url, tmp_path, "--queue", QUEUE)
    gateway.start()
    try:
        redis.stop()
        answer = httpx.get(f"{gateway.url}/v1/health", timeout=30)
        assert answer.status_code == 503
        assert answer.json()["broker"] == "down"
        assert "127.0.0.1" not in answer.text
        assert httpx.post(f"{gateway.url}/v1/jobs", json={"prompt": "x"}, timeout=30).status_code == 503
    finally:
        gateway.stop()


def test_a_chunked_body_is_bounded_too(limited: Gateway) -> None:
    def endless() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(200):
            yield b"x" * 65_536

    with httpx.Client(base_url=limited.url, timeout=30) as client:
        try:
            answer = client.post("/v1/jobs", content=endless(), headers={"Authorization": f"Bearer {MILL}"})
        except httpx.WriteError:
            return  # it hung up while we were writing, which is as good
    assert answer.status_code == 413, answer.text


def test_sdk_jobs_are_listed_beside_those_of_the_gateway(ask: Any, limited: Gateway) -> None:
    with Client(limited.redis_url, queue=QUEUE, tenant="mill") as client:
        job = client.submit("by the SDK", delay_s=60)
        assert ask(MILL, "GET", "/v1/jobs?limit=1").json()[0]["id"] == job.id
