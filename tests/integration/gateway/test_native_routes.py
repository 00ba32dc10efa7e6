"""The native routes over real HTTP: answers, streams that resume, isolation, and refusals that name the field."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.gateway.conftest import Gateway
from tests.redis_server import RedisServer
from tests.worker_process import WorkerProcess, until

pytestmark = pytest.mark.integration

STORY = {"prompt": "The miller found", "max_tokens": 24, "seed": 5, "temperature": 0.7, "ignore_eos": True}


def events(response: httpx.Response) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """The server-sent events of a response: (event, id, data)."""
    kind, event_id, data = "message", None, ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            kind = line[7:]
        elif line.startswith("id: "):
            event_id = line[4:]
        elif line.startswith("data: "):
            data = line[6:]
        elif not line and data:
            yield kind, event_id, json.loads(data)
            kind, event_id, data = "message", None, ""


def test_generate_answers_with_text_tokens_and_rates(http: httpx.Client) -> None:
    answer = http.post("/v1/generate", json=STORY)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert len(body["token_ids"]) == body["generated_tokens"] == 24
    assert body["text"]
    assert body["finish_reason"] == "length"
    assert body["prompt_tokens"] > 0
    assert body["latency_ms"] > 0
    assert body["throughput_tokens_per_sec"] == pytest.approx(24 / (body["latency_ms"] / 1e3), rel=1e-6)
    again = http.post("/v1/generate", json=STORY).json()
    assert again["token_ids"] == body["token_ids"], "same seed, same tokens"


def test_generate_returns_every_choice(http: httpx.Client) -> None:
    body = http.post("/v1/generate", json={**STORY, "n": 3}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert len({choice["text"] for choice in body["choices"]}) > 1
    assert body["generated_tokens"] == 72


def test_logprobs_that_were_asked_for_are_in_the_answer_the_stream_and_the_job(http: httpx.Client) -> None:
    """The story: /v1/generate took the option, had them computed, and left them out of its answer."""
    asked = {**STORY, "logprobs": 2, "prompt_logprobs": 1, "n": 2}
    body = http.post("/v1/generate", json=asked).json()
    for choice in body["choices"]:
        assert [len(entry["top"]) for entry in choice["logprobs"]] == [2] * 24
        assert "".join(entry["token"] for entry in choice["logprobs"]) == choice["text"]
    assert body["logprobs"] == body["choices"][0]["logprobs"]
    assert body["prompt_logprobs"][0] is None
    assert len(body["prompt_logprobs"]) == body["prompt_tokens"]
    view = http.get(f"/v1/jobs/{body['request_id']}").json()["result"]
    assert [choice["logprobs"] for choice in view["choices"]] == [choice["logprobs"] for choice in body["choices"]]
    assert view["prompt_logprobs"] == body["prompt_logprobs"]
    with http.stream("GET", f"/v1/jobs/{body['request_id']}/stream?index=1&from_offset=5") as response:
        streamed = [data for kind, _, data in events(response) if kind == "tokens"]
    assert [entry for data in streamed for entry in data["logprobs"]] == body["choices"][1]["logprobs"][5:]
    assert http.post("/v1/generate", json=STORY).json()["logprobs"] is None


@pytest.mark.parametrize(
    ("path", "headers", "content", "said"),
    [
        ("/v1/generate", {"Content-Type": "application/json"}, b'{"prompt": ', "request: the body is no JSON: "),
        ("/v1/generate", {}, b'{"prompt": "x"}', "send it with the header Content-Type: application/json"),
        ("/v1/generate", {"Content-Type": "application/json"}, b"[]", "request: the body is no JSON object"),
        (
            "/v1/chat/completions",
            {"Content-Type": "application/json"},
            b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": []}',
            "tools: is not honoured by this gateway; leave it out",
        ),
    ],
)
def test_a_body_that_cannot_be_read_is_refused_with_the_remedy(
    http: httpx.Client, path: str, headers: dict[str, str], content: bytes, said: str
) -> None:
    answer = http.post(path, content=content, headers=headers)
    assert answer.status_code in (400, 422)
    assert said in answer.json()["error"]["message"]


def test_batch_keeps_order_and_isolates_failures(http: httpx.Client) -> None:
    requests = [{**STORY, "seed": 1}, {"prompt_token_ids": [999_999], "max_tokens": 4}, {**STORY, "seed": 2}]
    answer = http.post("/v1/batch", json={"requests": requests})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    first, broken, last = body["responses"]
    assert first["response"]["generated_tokens"] == last["response"]["generated_tokens"] == 24
    assert first["response"]["token_ids"] != last["response"]["token_ids"]
    assert broken["response"] is None
    assert broken["error"]["code"] == "invalid_request"
    assert body["total_latency_ms"] > 0
    assert body["batch_throughput_tokens_per_sec"] > 0


def test_job_is_accepted_followed_and_read(http: httpx.Client) -> None:
    accepted = http.post("/v1/jobs", json=STORY)
    assert accepted.status_code == 202
    job = accepted.json()
    assert accepted.headers["Location"] == job["status_url"]
    with http.stream("GET", job["stream_url"]) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        seen = list(events(response))
    tokens = [data for kind, _, data in seen if kind == "tokens"]
    assert [kind for kind, _, _ in seen][-1] == "end"
    assert sum(len(data["token_ids"]) for data in tokens) == 24
    view = http.get(job["status_url"]).json()
    assert view["state"] == "completed"
    assert view["result"]["choices"][0]["text"] == "".join(data["text"] for data in tokens)


class Follower:
    """One client of a stream: it reads until the stream ends or breaks, and can go on where it stopped."""

    def __init__(self, http: httpx.Client, url: str) -> None:
        self._http = http
        self._url = url
        self._last: str | None = None
        self.tokens: dict[int, list[int]] = {}
        self.ended = False
        self.begun = threading.Event()

    def follow(self) -> None:
        headers = {} if self._last is None else {"Last-Event-ID": self._last}
        with suppress(httpx.TransportError), self._http.stream("GET", self._url, headers=headers) as response:
            for kind, event_id, data in events(response):
                if kind == "tokens":
                    mine = self.tokens.setdefault(data["index"], [])
                    assert data["offset"] == len(mine), "a gap or a duplicate"
                    mine += data["token_ids"]
                    self._last = event_id
                    self.begun.set()
                self.ended = self.ended or kind == "end"


def test_every_stream_resumes_exactly_after_the_gateway_was_killed(http: httpx.Client, gateway: Gateway) -> None:
    """`Last-Event-ID` is a position in the log, so a new gateway goes on where the killed one ended."""
    body = {**STORY, "max_tokens": 300}
    jobs = [http.post("/v1/jobs", json={**body, "seed": n, "n": 1 + n % 2}).json() for n in range(12)]
    followers = [Follower(http, job["stream_url"]) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        following = [pool.submit(follower.follow) for follower in followers]
        assert all(follower.begun.wait(60) for follower in followers)
        gateway.kill()
        for one in following:
            one.result(60)
        interrupted = [follower for follower in followers if not follower.ended]
        assert interrupted
        gateway.start()
        for one in [pool.submit(follower.follow) for follower in interrupted]:
            one.result(60)
    for job, follower in zip(jobs, followers, strict=True):
        assert follower.ended
        whole = http.get(job["status_url"]).json()["result"]["choices"]
        assert follower.tokens == {choice["index"]: choice["token_ids"] for choice in whole}


def test_several_choices_resume_each_at_its_own_place(http: httpx.Client) -> None:
    job = http.post("/v1/jobs", json={**STORY, "n": 2}).json()
    with http.stream("GET", job["stream_url"]) as response:
        whole = [(event_id, data) for kind, event_id, data in events(response) if kind == "tokens"]
    for cut in range(len(whole)):  # the first: of the other choice nothing was heard yet
        with http.stream("GET", job["stream_url"], headers={"Last-Event-ID": str(whole[cut][0])}) as response:
            rest = [data for kind, _, data in events(response) if kind == "tokens"]
        for index in (0, 1):
            expected = [token for _, data in whole if data["index"] == index for token in data["token_ids"]]
            before = [token for _, data in whole[: cut + 1] if data["index"] == index for token in data["token_ids"]]
            after = [token for data in rest if data["index"] == index for token in data["token_ids"]]
            assert before + after == expected, cut


def test_who_has_seen_a_choices_end_is_not_told_again(http: httpx.Client) -> None:
    """What the end releases beyond the last token has no offset of its own, so the position says that it was seen."""
    job = http.post("/v1/jobs", json=STORY).json()
    with http.stream("GET", job["stream_url"]) as response:
        last = [event_id for kind, event_id, _ in events(response) if kind == "tokens"][-1]
    assert last == "24e"
    with http.stream("GET", job["stream_url"], headers={"Last-Event-ID": last}) as response:
        assert [kind for kind, _, _ in events(response)] == ["end"]


def test_idempotency_key_returns_the_same_job(http: httpx.Client) -> None:
    headers = {"Idempotency-Key": "order-77"}
    first = http.post("/v1/jobs", json=STORY, headers=headers).json()
    assert http.post("/v1/jobs", json=STORY, headers=headers).json()["id"] == first["id"]


def test_cancel_ends_a_running_job(http: httpx.Client) -> None:
    job = http.post("/v1/jobs", json={**STORY, "max_tokens": 900}).json()
    with http.stream("GET", job["stream_url"]) as response:
        stream = events(response)
        next(stream)
        assert http.delete(job["status_url"]).json()["outcome"] in ("cancelling", "cancelled")
        kind, _, data = list(stream)[-1]
    assert kind == "end"
    assert data["state"] == "cancelled"


@contextmanager
def asking(gateway: Gateway, http: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    """A client that asks for an answer and hangs up at the end of the block; gives the id of its job, which runs."""
    data = json.dumps({**body, "metadata": {"who": "hangs up"}}).encode()
    head = f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    if key := http.headers.get("Authorization"):
        head += f"Authorization: {key}\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.sendall(f"{head}\r\n".encode() + data)
        found: list[dict[str, Any]] = []

        def runs() -> bool:
            found[:] = http.get("/v1/jobs?limit=1").json()
            return bool(found and found[0]["metadata"] == {"who": "hangs up"} and found[0]["state"] == "running")

        until(runs, "the job to run")
        yield found[0]["id"]


def test_a_client_that_hangs_up_cancels_its_request(gateway: Gateway, http: httpx.Client) -> None:
    with asking(gateway, http, {**STORY, "max_tokens": 900, "n": 16}) as job_id:
        pass
    until(lambda: http.get(f"/v1/jobs/{job_id}").json()["state"] == "cancelled", "the job to be cancelled")


def test_where_it_is_so_configured_hanging_up_leaves_the_job(
    story_redis: RedisServer, story_worker: WorkerProcess, tmp_path: Path
) -> None:
    gateway = Gateway(story_redis.url, tmp_path, "--keep-on-disconnect")
    gateway.start()
    try:
        with httpx.Client(base_url=gateway.url, timeout=60) as http:
            with asking(gateway, http, {**STORY, "max_tokens": 300, "n": 8}) as job_id:
                pass
            with http.stream("GET", f"/v1/jobs/{job_id}/stream") as response:
                _, _, end = list(events(response))[-1]
            assert end["state"] == "completed"
    finally:
        gateway.stop()


def test_a_job_whose_time_is_over_is_not_found(http: httpx.Client) -> None:
    job = http.post("/v1/jobs", json={**STORY, "max_tokens": 1, "result_ttl_s": 0.01}).json()
    until(lambda: http.get(job["status_url"]).status_code == 404, "the job to be forgotten")
    for path in (job["status_url"], job["stream_url"]):
        assert http.get(path).status_code == 404
    assert job["id"] not in [seen["id"] for seen in http.get("/v1/jobs").json()]


def test_another_tenants_job_does_not_exist(http: httpx.Client, stranger: httpx.Client) -> None:
    job = http.post("/v1/jobs", json=STORY).json()
    missing = stranger.get("/v1/jobs/0123456789abcdef0123456789abcdef")
    for answer in (
        stranger.get(job["status_url"]),
        stranger.get(job["stream_url"]),
        stranger.delete(job["status_url"]),
    ):
        assert answer.status_code == missing.status_code == 404
        assert answer.json()["error"]["code"] == missing.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("header", [None, "Bearer nobody-has-this-key", "Basic abc", "Bearer"])
def test_without_a_known_key_nothing_is_answered(gateway: Gateway, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    answer = httpx.post(f"{gateway.url}/v1/generate", json=STORY, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temprature": 1}, "temprature"),
        ({"priority": 12}, "priority"),
        ({"prompt": None}, "request"),
        ({"max_tokens": 5, "min_tokens": 9}, "request"),
        ({"stop": [""]}, "stop.0"),
    ],
)
def test_bad_requests_are_refused_naming_the_field(http: httpx.Client, change: dict[str, Any], field: str) -> None:
    answer = http.post("/v1/generate", json={**STORY, **change})
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["code"] == "invalid_request"
    assert answer.json()["error"]["field"] == field


def test_too_large_a_body_is_refused_unread(http: httpx.Client) -> None:
    answer = http.post("/v1/generate", json={"prompt": "x" * 70_000})
    assert answer.status_code == 413
    assert "65536" in answer.json()["error"]["message"]


def test_prompt_the_model_cannot_hold_is_refused_by_the_worker(http: httpx.Client) -> None:
    answer = http.post("/v1/generate", json={"prompt_token_ids": [5] * 5000, "max_tokens": 4})
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["code"] == "invalid_request"


def test_health_and_metrics_tell_the_condition(http: httpx.Client, operator: httpx.Client) -> None:
    health = http.get("/v1/health")
    assert health.status_code == 200
    assert health.json()["status"] == "ok"
    assert health.json()["workers"] == 1
    metrics = operator.get("/v1/metrics").json()
    assert metrics["scope"] == "queue"
    assert metrics["counters"]["submitted"] >= 1
    assert "running" not in metrics["counters"], "what goes up and down is no counter"
    worker = metrics["workers"][0]
    assert (worker["model"], worker["device"], worker["ranks"]) == ("penstock-story", "cpu", 1)
    assert worker["used_pages"] + worker["cached_pages"] <= worker["total_pages"]
    assert worker["total_pages"] > 0
    own = http.get("/v1/metrics").json()
    assert (own["scope"], own["counters"], own["workers"]) == ("tenant", {}, [])


def test_openapi_describes_every_route(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/generate", "/v1/batch", "/v1/jobs", "/v1/jobs/{job_id}", "/v1/health", "/v1/metrics"} <= set(paths)
