"""Background responses through OpenAI's own client: stored, fetched, cancelled, and streamed on from any event."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.integration.gateway.conftest import KEYS, Gateway
from tests.worker_process import until

pytestmark = pytest.mark.integration

MODEL = "penstock-story"
STORY: dict[str, Any] = {
    "model": MODEL,
    "input": "Tell me a story about a fox who lost a lantern.",
    "max_output_tokens": 40,
    "extra_body": {"seed": 7, "ignore_eos": True},
}


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    key = next(key for key, tenant in KEYS.items() if tenant == "mill")
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, timeout=60) as made:
        yield made


def ended(client: openai.OpenAI, response: Any) -> Any:
    seen = [response]

    def is_over() -> bool:
        if seen[-1].status in ("queued", "in_progress"):
            seen.append(client.responses.retrieve(response.id))
        return seen[-1].status not in ("queued", "in_progress")

    until(is_over, f"response {response.id} to end")
    return seen[-1]


def test_background_response_is_stored_and_fetched_later(client: openai.OpenAI) -> None:
    begun = client.responses.create(**STORY, background=True, metadata={"run": "1"})
    assert begun.status in ("queued", "in_progress", "incomplete")
    response = ended(client, begun)
    assert (response.status, response.metadata) == ("incomplete", {"run": "1"})
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == 40
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": STORY["input"]}], max_tokens=40, seed=7,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert response.output_text == chat.choices[0].message.content
    assert client.responses.create(**STORY).output_text == response.output_text, "waited for, it is the same"


def test_stream_goes_on_behind_any_event_after_the_gateway_was_killed(client: openai.OpenAI, gateway: Gateway) -> None:
    whole = list(client.responses.create(**STORY, background=True, stream=True))
    assert [event.type for event in whole[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert whole[-1].type == "response.incomplete"
    numbers = [event.sequence_number for event in whole]
    assert numbers == sorted(set(numbers))
    text = "".join(event.delta for event in whole if event.type == "response.output_text.delta")
    response = whole[-1].response
    assert response.output_text == text
    gateway.kill()
    gateway.start()
    for cut in range(len(whole)):
        seen = [event.delta for event in whole[: cut + 1] if event.type == "response.output_text.delta"]
        rest = list(client.responses.retrieve(response.id, stream=True, starting_after=whole[cut].sequence_number))
        assert all(event.sequence_number > whole[cut].sequence_number for event in rest)
        more = [event.delta for event in rest if event.type == "response.output_text.delta"]
        assert "".join(seen + more) == text
        assert [event.type for event in rest[-1:]] == (["response.incomplete"] if cut < len(whole) - 1 else [])


def test_cancelled_response_ends_and_says_so(client: openai.OpenAI) -> None:
    long: dict[str, Any] = {**STORY, "max_output_tokens": 900, "background": True}
    response = client.responses.create(**long)
    assert ended(client, client.responses.cancel(response.id)).status == "cancelled"
    stream = client.responses.create(**long, stream=True)
    events = [next(iter(stream))]
    client.responses.cancel(events[0].response.id)  # type: ignore[union-attr]
    events += list(stream)
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.status == "cancelled"


def test_leaving_a_background_stream_leaves_the_job(client: openai.OpenAI) -> None:
    with client.responses.create(**STORY, background=True, stream=True) as stream:
        first = next(iter(stream))
    assert ended(client, client.responses.retrieve(first.response.id)).status == "incomplete"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"store": False}, "store"),
        ({"temperature": 3}, "temperature"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(client: openai.OpenAI, change: dict[str, Any], field: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**{**STORY, **change})
    assert refused.value.param == field


def test_another_tenants_response_and_a_plain_job_do_not_exist(client: openai.OpenAI, gateway: Gateway) -> None:
    response = client.responses.create(**STORY, background=True)
    key = next(key for key, tenant in KEYS.items() if tenant == "harbour")
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as stranger:
        for probe in (stranger.responses.retrieve, stranger.responses.cancel):
            with pytest.raises(openai.NotFoundError):
                probe(response.id)
    chat = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=2)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(chat.id.replace("chatcmpl-", "resp_"))
    ended(client, response)
