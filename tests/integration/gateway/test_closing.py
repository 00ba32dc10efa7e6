"""SIGTERM with requests open: streams hand over at once, waits get the grace, and no job is cancelled by it.

The story: a restarted gateway held its open streams for ten seconds, then cut them without a word, and cancelled the
jobs of OpenAI's streams and of synchronous requests, so that the retry with the same Idempotency-Key found a cancelled
job.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from penstock import Client
from tests.integration.gateway.conftest import Gateway
from tests.redis_server import RedisServer

pytestmark = pytest.mark.integration

QUEUE = "nobody-works-on-it"
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
PATIENT, HASTY = ("--grace", "600"), ("--grace", "0.2")


@pytest.fixture
def start(start_redis: Callable[..., RedisServer], tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """`start(*options)`: a gateway of the one broker, in front of a queue where nothing ever ends."""
    redis, started = start_redis(), []

    def start(*options: str) -> Gateway:
        gateway = Gateway(redis.url, tmp_path, "--queue", QUEUE, *options)
        gateway.start()
        started.append(gateway)
        return gateway

    yield start
    for gateway in started:
        gateway.stop()


def lines_of(url: str, begun: threading.Event) -> list[str]:
    with httpx.stream("GET", url, timeout=60) as response:
        begun.set()
        return list(response.iter_lines())


def test_a_stream_that_can_be_resumed_ends_at_once_and_says_so(start: Any) -> None:
    """With ten minutes of grace the process could not have ended in `stop`'s thirty seconds."""
    gateway, begun = start(*PATIENT), threading.Event()
    job = httpx.post(f"{gateway.url}/v1/jobs", json={"prompt": "x"}).json()
    response = httpx.post(f"{gateway.url}/v1/responses", json={"model": "m", "input": "x", "background": True}).json()
    with ThreadPoolExecutor(2) as pool:
        native = pool.submit(lines_of, gateway.url + job["stream_url"], begun)
        openais = pool.submit(
            lines_of, f"{gateway.url}/v1/responses/{response['id']}?stream=true&starting_after=3", threading.Event()
        )
        assert begun.wait(30)
        _wait_for_streams(gateway, 2)
        gateway.stop()
        kind, data = [line for line in native.result(30) if line][-2:]
        last = [line for line in openais.result(30) if line][-1]
    assert kind == "event: interrupted"
    error = json.loads(data.removeprefix("data: "))
    assert (error["code"], error["job_id"]) == ("gateway_stopping", job["id"])
    assert "starting_after" in last


def test_waits_that_outlive_the_grace_are_told_where_their_jobs_go_on(start: Any) -> None:
    gateway = start(*HASTY)
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/generate", {"prompt": "x"}),
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "stream": True}),
        ("/v1/chat/completions", {**CHAT, "logprobs": True}),
        ("/v1/responses", {"model": "m", "input": "x"}),
    ]

    def ask(number: int) -> httpx.Response:
        path, body = asked[number]
        return httpx.post(gateway.url + path, json=body, timeout=60, headers={"Idempotency-Key": f"key-{number}"})

    with Client(gateway.redis_url, queue=QUEUE) as client, ThreadPoolExecutor(len(asked)) as pool:
        answers = [pool.submit(ask, number) for number in range(len(asked))]
        _wait_for_jobs(client, len(asked))
        gateway.stop()
        for answer in [answer.result(60) for answer in answers]:
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1"), answer.text
            assert answer.json()["error"]["code"] == "gateway_stopping"
        assert client.queue_snapshot().waiting == len(asked), "no job was cancelled"


def test_a_response_that_is_waited_for_breaks_off_and_goes_on(start: Any) -> None:
    """Its first event is the stream's own, so the answer has begun when the gateway stops."""
    gateway = start(*HASTY)
    with (
        Client(gateway.redis_url, queue=QUEUE) as client,
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as api,
        api.responses.create(model="m", input="x", stream=True) as stream,
    ):
        assert next(iter(stream)).type == "response.created"
        gateway.stop()
        assert [event.type for event in stream][-1] == "response.content_part.added", "it breaks off, visibly"
        assert client.queue_snapshot().waiting == 1


def test_a_stream_under_way_ends_with_an_error_and_its_job_goes_on_to_its_end(
    story_redis: RedisServer, story_worker: None, tmp_path: Path
) -> None:
    gateway = Gateway(story_redis.url, tmp_path, *HASTY)
    gateway.start()
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as api:
        stream = api.completions.create(
            model="penstock-story", prompt="x", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
        )
        first = next(iter(stream))
        gateway.stop()
        with pytest.raises(openai.APIError, match=r"this gateway is stopping; job .* goes on"):
            for _ in stream:
                pass
    with Client(story_redis.url, queue="penstock-story") as client:
        assert client.job(first.id.removeprefix("cmpl-")).result(timeout=60).usage.completion_tokens == 1000


def _wait_for_jobs(client: Client, count: int) -> None:
    done = threading.Event()
    for _ in range(600):
        if client.queue_snapshot().waiting == count:
            return
        done.wait(0.05)
    raise AssertionError(f"{count} jobs should wait: {client.queue_snapshot()}")


def _wait_for_streams(gateway: Gateway, count: int) -> None:
    done = threading.Event()
    for _ in range(600):
        if f"penstock_gateway_open_streams {count}.0" in httpx.get(f"{gateway.url}/metrics").text:
            return
        done.wait(0.05)
    raise AssertionError(f"{count} streams should be open")
