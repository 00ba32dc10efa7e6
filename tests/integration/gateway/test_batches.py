"""Files and batches through OpenAI's own client: order, errors, cancellation, isolation, a killed gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Batch

from tests.integration.gateway.conftest import KEYS, Gateway
from tests.key_accounting import leaked_keys
from tests.redis_server import RedisServer
from tests.worker_process import until

pytestmark = pytest.mark.integration

MODEL = "penstock-story"


def line(custom_id: str, **body: Any) -> bytes:
    request = {"model": MODEL, "prompt": "The miller", "max_tokens": 6, "ignore_eos": True, **body}
    record = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": request}
    return json.dumps(record).encode() + b"\n"


def client_of(gateway: Gateway, tenant: str) -> openai.OpenAI:
    key = next(key for key, owner in KEYS.items() if owner == tenant)
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=8, timeout=60)


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with client_of(gateway, "mill") as made:
        yield made


def begin(client: openai.OpenAI, data: bytes, **more: Any) -> Batch:
    file = client.files.create(file=("requests.jsonl", data), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", **more)


def ended(client: openai.OpenAI, batch: Batch) -> Batch:
    seen = [batch]

    def is_over() -> bool:
        seen.append(client.batches.retrieve(batch.id))
        return seen[-1].status in ("completed", "failed", "expired", "cancelled")

    until(is_over, f"batch {batch.id} to end")
    return seen[-1]


def records(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(text) for text in client.files.content(file_id).text.splitlines()]


def test_answers_come_in_order_and_errors_in_their_own_file(client: openai.OpenAI) -> None:
    bodies = [line(f"r-{n}", seed=n) for n in range(40)]
    bodies[7] = line("r-7", temperature=9)
    bodies[9] = line("r-9", prompt=[5] * 5000)
    batch = ended(client, begin(client, b"".join(bodies), metadata={"run": "1"}))
    assert batch.status == "completed"
    assert batch.metadata == {"run": "1"}
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (40, 38, 2)
    output = records(client, batch.output_file_id)
    assert [record["custom_id"] for record in output] == [f"r-{n}" for n in range(40) if n not in (7, 9)]
    alone = client.completions.create(
        model=MODEL, prompt="The miller", max_tokens=6, seed=3, extra_body={"ignore_eos": True}
    )
    assert output[3]["response"]["body"]["choices"][0]["text"] == alone.choices[0].text
    errors = {record["custom_id"]: record["response"] for record in records(client, batch.error_file_id)}
    assert errors["r-7"]["status_code"] == errors["r-9"]["status_code"] == 400
    assert errors["r-7"]["body"]["error"]["param"] == "temperature"


def test_file_that_is_no_batch_is_refused_line_by_line(client: openai.OpenAI) -> None:
    data = line("a") + b"not json\n" + line("a") + b'{"custom_id": "c", "method": "GET"}\n'
    batch = ended(client, begin(client, data))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [(error.line, error.code) for error in batch.errors.data or []] == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "invalid_method"),
    ]


def test_another_gateway_goes_on_where_a_killed_one_stood(
    client: openai.OpenAI, gateway: Gateway, story_redis: RedisServer
) -> None:
    """Each line is answered once: the next driver finds the jobs that are there by their idempotency keys."""
    with story_redis.client() as redis:
        submitted = int(redis.hget("penstock:{penstock-story}:stats", "submitted") or 0)
        batch = begin(client, b"".join(line(f"k-{n}", seed=n, max_tokens=60) for n in range(120)))
        until(
            lambda: (client.batches.retrieve(batch.id).request_counts or batch.request_counts).completed,  # type: ignore[union-attr]
            "the first answers",
        )
        gateway.kill()
        gateway.start()
        batch = ended(client, batch)
        output = records(client, batch.output_file_id)
        assert [record["custom_id"] for record in output] == [f"k-{n}" for n in range(120)]
        assert int(redis.hget("penstock:{penstock-story}:stats", "submitted") or 0) - submitted == 120
        leaked = [key for key in leaked_keys(redis, "penstock-story") if ":file" in key or ":batch" in key]
        assert not leaked


def test_cancelled_batch_keeps_what_was_answered(client: openai.OpenAI) -> None:
    batch = begin(client, b"".join(line(f"c-{n}", max_tokens=200, n=2) for n in range(300)))
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = ended(client, batch)
    assert batch.status == "cancelled"
    errors = records(client, batch.error_file_id)
    assert {record["error"]["code"] for record in errors} == {"batch_cancelled"}
    counts = batch.request_counts
    assert counts is not None
    assert counts.failed == len(errors)
    assert counts.completed + counts.failed in (0, 300)


def test_files_are_listed_read_and_deleted(client: openai.OpenAI) -> None:
    data = line("a")
    made = client.files.create(file=("mine.jsonl", data), purpose="batch")
    assert made.bytes == len(data)
    assert made.filename == "mine.jsonl"
    assert made.id in [file.id for file in client.files.list()]
    assert client.files.content(made.id).read() == data
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_another_tenants_files_and_batches_do_not_exist(client: openai.OpenAI, gateway: Gateway) -> None:
    made = client.files.create(file=("mine.jsonl", line("a")), purpose="batch")
    batch = client.batches.create(input_file_id=made.id, endpoint="/v1/completions", completion_window="24h")
    with client_of(gateway, "harbour") as stranger:
        assert made.id not in [file.id for file in stranger.files.list()]
        for probe in (
            lambda: stranger.files.retrieve(made.id),
            lambda: stranger.files.content(made.id),
            lambda: stranger.files.delete(made.id),
            lambda: stranger.batches.retrieve(batch.id),
            lambda: stranger.batches.cancel(batch.id),
            lambda: stranger.batches.create(input_file_id=made.id, endpoint="/v1/completions", completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                probe()
        assert not stranger.batches.list().data
    assert batch.id in [found.id for found in client.batches.list(limit=2)]
    ended(client, batch)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"completion_window": "soon"}, "completion_window"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"extra_body": {"output_expires_after": {}}}, "output_expires_after"),
    ],
)
def test_bad_batches_are_refused_by_field(client: openai.OpenAI, change: dict[str, Any], field: str) -> None:
    file = client.files.create(file=("mine.jsonl", line("a")), purpose="batch")
    given: dict[str, Any] = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    with pytest.raises(openai.BadRequestError) as refused:
        client.batches.create(**given | change)
    assert refused.value.param == field
