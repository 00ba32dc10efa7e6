"""OpenAI's own Python client, unmodified, against the gateway: answers, streams, and refusals in OpenAI's form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.integration.gateway.conftest import KEYS, Gateway
from tests.worker_process import until

pytestmark = pytest.mark.integration

MODEL = "penstock-story"
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me a story about a fox who lost a lantern."}],
    "seed": 7,
    "max_tokens": 24,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    key = next(key for key, tenant in KEYS.items() if tenant == "mill")
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, timeout=60) as made:
        yield made


def test_chat_answers_with_usage(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    assert client.chat.completions.create(**CHAT).choices[0].message.content == answer.choices[0].message.content


def test_chat_streams_the_same_text_and_the_counts_at_the_end(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT)
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage or (chunks[-1].usage and chunks[-1].usage.completion_tokens == 24)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_ends_in_done(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "The miller", "stream": True, "max_tokens": 4}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_several_choices_each_with_its_own_stream(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, n=3)
    whole = {choice.index: choice.message.content for choice in answer.choices}
    assert sorted(whole) == [0, 1, 2]
    assert len(set(whole.values())) > 1
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**CHAT, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == whole


def test_chat_logprobs_name_each_token(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 24
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert math.isclose(max(top.logprob for top in entry.top_logprobs), entry.top_logprobs[0].logprob)
        assert len({top.token for top in entry.top_logprobs}) == 3
        assert all(bytes(top.bytes or ()).decode(errors="replace") for top in entry.top_logprobs)
        chosen = [top.token for top in entry.top_logprobs if top.logprob == entry.logprob]
        assert not chosen or chosen == [entry.token], "the same token goes by the same name"
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3, stream=True):
        for choice in chunk.choices:
            streamed += (choice.logprobs.content if choice.logprobs else None) or []
    assert [entry.token for entry in streamed] == [entry.token for entry in content]


def test_completion_of_several_prompts_numbers_all_choices(client: openai.OpenAI) -> None:
    wanted: dict[str, Any] = {"model": MODEL, "prompt": ["The miller", "The harbour"], "n": 2, "seed": 3}
    answer = client.completions.create(**wanted, max_tokens=8, logprobs=2, extra_body={"ignore_eos": True})
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 32
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert len(choice.logprobs.tokens) == 8
        assert "".join(choice.logprobs.tokens) == choice.text
        assert not any("token_id" in name for top in choice.logprobs.top_logprobs or () for name in top)
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**wanted, max_tokens=8, stream=True, extra_body={"ignore_eos": True}):
        for streamed in chunk.choices:
            texts[streamed.index] += streamed.text
    assert texts == {choice.index: choice.text for choice in answer.choices}


def test_completion_of_token_ids_echo_and_defaults(client: openai.OpenAI) -> None:
    by_ids = client.completions.create(model=MODEL, prompt=[5, 6, 7], extra_body={"ignore_eos": True})
    assert by_ids.usage is not None
    assert by_ids.usage.prompt_tokens == 3
    assert by_ids.usage.completion_tokens == 16
    echoed = client.completions.create(model=MODEL, prompt="The miller", echo=True, max_tokens=4)
    assert echoed.choices[0].text.startswith("The miller")


def test_stop_ends_the_text_and_penalties_and_bias_change_it(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(**CHAT).choices[0].message.content
    assert plain is not None
    word = plain.split()[3]
    stopped = client.chat.completions.create(**CHAT, stop=[word]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == plain[: plain.index(word)]
    for change in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0, "temperature": 1.3}):
        assert client.chat.completions.create(**CHAT | change).choices[0].message.content is not None
    biased = client.completions.create(
        model=MODEL, prompt="The", max_tokens=5, logit_bias={"400": 100}, extra_body={"ignore_eos": True}
    )
    forced = client.completions.create(
        model=MODEL, prompt="The", max_tokens=5, extra_body={"ignore_eos": True}, logit_bias={"400": 100}, seed=99
    )
    assert biased.choices[0].text == forced.choices[0].text


def test_response_format_is_enforced(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"lit": {"type": "boolean"}, "count": {"enum": [1, 2, 3]}},
        "required": ["lit", "count"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Is it lit?"}],
        max_completion_tokens=80,
        temperature=0,
        frequency_penalty=2,
        response_format={"type": "json_schema", "json_schema": {"name": "lamp", "strict": True, "schema": schema}},
    )
    parsed = json.loads(answer.choices[0].message.content or "")
    assert set(parsed) == {"lit", "count"}
    loose = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Say it as JSON."}],
        max_tokens=2,
        response_format={"type": "json_object"},
    )
    assert (loose.choices[0].message.content or "").lstrip().startswith("{")


def test_roles_and_text_parts_are_taken(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Write tales."},
            {"role": "user", "content": [{"type": "text", "text": "Tell me a story."}]},
        ],
        max_tokens=4,
        user="u-1",
        metadata={"who": "me"},
        extra_body={"priority": 9, "deadline_s": 60},
    )
    assert answer.choices[0].message.content
    follow_up = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "user", "content": "Tell me a story."},
            answer.choices[0].message,  # type: ignore[list-item]  # the client takes its own objects back
            {"role": "user", "content": "And then?"},
        ],
        max_tokens=4,
    )
    assert follow_up.choices[0].message.content


def test_models_are_those_of_live_workers(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-unheard-of")
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 2}, "request"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "request"),
        ({"extra_body": {"beam_width": 4}}, "beam_width"),
        ({"stream_options": {"include_usage": True}}, "request"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(client: openai.OpenAI, change: dict[str, Any], field: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**CHAT | change)
    assert refused.value.param == field
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_worker_come_as_errors_of_the_request(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(**CHAT | {"model": "gpt-unheard-of", "stream": stream})
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=MODEL, prompt=[5] * 5000, stream=stream)
    assert "5000" in too_long.value.message


def test_unknown_key_is_an_authentication_error(gateway: Gateway) -> None:
    with (
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="nobody-has-this-key", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        client.models.list()
    assert refused.value.code == "invalid_api_key"


def test_leaving_a_stream_cancels_its_job(client: openai.OpenAI, operator: httpx.Client) -> None:
    before = operator.get("/v1/metrics").json()["counters"]["cancelled"]
    with client.chat.completions.create(**CHAT | {"max_tokens": 900, "n": 8, "stream": True}) as stream:
        next(iter(stream))
    until(lambda: operator.get("/v1/metrics").json()["counters"]["cancelled"] > before, "the job to be cancelled")


async def test_asynchronous_client_streams(gateway: Gateway) -> None:
    key = next(iter(KEYS))
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
        stream = await client.chat.completions.create(**CHAT, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text


def test_a_killed_gateway_breaks_a_stream_visibly_and_the_same_key_gets_it_whole(
    client: openai.OpenAI, gateway: Gateway, operator: httpx.Client
) -> None:
    """OpenAI's streams carry no position. The job goes on; the same Idempotency-Key finds it and streams it again."""
    wanted: dict[str, Any] = {**CHAT, "max_tokens": 900, "stream": True, "extra_headers": {"Idempotency-Key": "k-1"}}
    seen, job_id = "", ""

    def read() -> None:
        nonlocal seen, job_id
        for chunk in client.chat.completions.create(**wanted):
            job_id = chunk.id
            seen += chunk.choices[0].delta.content or ""
            if len(seen) > 20:
                gateway.kill()

    with pytest.raises((openai.APIConnectionError, httpx.TransportError)):
        read()
    gateway.start()
    submitted = operator.get("/v1/metrics").json()["counters"]["submitted"]
    again = list(client.chat.completions.create(**wanted))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in again)
    assert again[0].id == job_id
    assert text.startswith(seen)
    assert again[-1].choices[0].finish_reason == "length"
    assert operator.get("/v1/metrics").json()["counters"]["submitted"] == submitted, "nothing was computed again"
    job = operator.get(f"/v1/jobs/{job_id.removeprefix('chatcmpl-')}").json()
    assert job["result"]["choices"][0]["text"] == text
