"""The main job on real parts: submit, stream, result, in every form a request can take."""

from __future__ import annotations

import pytest

from penstock import Client, FinishReason, JobCancelled, JobExpired
from tests.worker_process import WorkerProcess, snapshot, until

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("worker")]

LONG = {"max_tokens": 900, "ignore_eos": True}


def test_stream_and_result_agree(client: Client) -> None:
    job = client.submit("The miller found a", max_tokens=40, seed=1, temperature=0.8, ignore_eos=True)
    chunks = list(job.stream(timeout=60))
    result = job.result(timeout=60)
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert [token for chunk in chunks for token in chunk.token_ids] == list(result.token_ids)
    assert len(result.token_ids) == result.usage.completion_tokens == 40
    assert result.choices[0].finish_reason is FinishReason.LENGTH
    assert result.model == "penstock-story"


def test_a_conversation_is_rendered_with_the_models_template(client: Client) -> None:
    messages = [{"role": "user", "content": "Tell me a story about a fox who lost a lantern."}]
    result = client.submit(messages=messages, max_tokens=60, seed=2, temperature=0.7).result(timeout=60)
    assert result.text.strip()
    assert "<|" not in result.text


def test_token_ids_are_taken_as_they_are(client: Client) -> None:
    ids = (11, 12, 13, 14, 15)
    result = client.submit(prompt_token_ids=ids, max_tokens=5, seed=3).result(timeout=60)
    assert result.usage.prompt_tokens == len(ids)


def test_the_same_seed_gives_the_same_tokens_in_any_company(client: Client) -> None:
    alone = client.submit("It was raining", max_tokens=30, seed=9, temperature=0.9, ignore_eos=True).result(timeout=60)
    crowd = [{"prompt": f"Letter {n} from the harbour", "max_tokens": 30, "seed": n} for n in range(31)]
    same = {"prompt": "It was raining", "max_tokens": 30, "seed": 9, "temperature": 0.9, "ignore_eos": True}
    handles = client.submit_many([*crowd[:15], same, *crowd[15:]])
    results = [handle.result(timeout=60) for handle in handles]  # type: ignore[union-attr]
    assert results[15].token_ids == alone.token_ids


def test_structured_output_has_the_form_asked_for(client: Client) -> None:
    answer = client.submit("Is the lantern lit? ", response_format={"choice": ["yes", "no"]}, seed=1).result(timeout=60)
    assert answer.text in ("yes", "no")
    assert answer.choices[0].finish_reason is FinishReason.STOP


def test_several_choices_differ_and_are_all_published(client: Client) -> None:
    job = client.submit("On the river", n=3, max_tokens=20, seed=4, temperature=1.0, ignore_eos=True)
    seen: dict[int, list[int]] = {}
    for chunk in job.stream(timeout=60):
        seen.setdefault(chunk.index, []).extend(chunk.token_ids)
    result = job.result(timeout=60)
    assert {choice.index: list(choice.token_ids) for choice in result.choices} == seen
    assert len({choice.token_ids for choice in result.choices}) == 3


def test_a_shared_beginning_is_computed_once(client: Client) -> None:
    shared = "The harbour master wrote down every ship, every cargo and every captain in a large blue book. " * 4
    client.submit(shared + "First.", max_tokens=4, seed=1).result(timeout=60)
    again = client.submit(shared + "Second.", max_tokens=4, seed=1).result(timeout=60)
    assert again.usage.cached_tokens >= 32


def test_another_tenant_shares_no_cached_page(client: Client) -> None:
    secret = "The captain hid the golden key beneath the third plank of the lower deck, and told nobody. " * 4
    client.submit(secret, tenant="harbour", max_tokens=4, seed=1).result(timeout=60)
    probe = client.submit(secret, tenant="rival", max_tokens=4, seed=1).result(timeout=60)
    assert probe.usage.cached_tokens == 0


def test_a_running_job_is_cancelled_and_keeps_what_it_has(client: Client) -> None:
    job = client.submit("Once upon a time", **LONG, n=8, seed=1)
    stream = job.stream(timeout=60)
    next(stream)
    assert job.cancel() == "cancelling"
    with pytest.raises(JobCancelled) as ended:
        job.result(timeout=60)
    assert ended.value.result is not None
    assert 0 < len(ended.value.result.choices[0].token_ids) < 900
    assert {choice.finish_reason for choice in ended.value.result.choices} == {FinishReason.CANCELLED}
    until(lambda: snapshot(client).running == 0, "the worker to let go of it")


def test_a_deadline_in_mid_run_ends_it_with_what_there_is(client: Client, worker: WorkerProcess) -> None:
    for deadline_s in (1.0, 5.0, 20.0):  # how soon some have begun and none is done is the machine's affair
        crowd = [{**LONG, "prompt": "Once", "seed": n, "deadline_s": deadline_s} for n in range(48)]
        outcomes = []
        for handle in client.submit_many(crowd):
            with pytest.raises(JobExpired) as ended:
                handle.result(timeout=60)  # type: ignore[union-attr]
            outcomes.append(ended.value.result)
        begun = [result for result in outcomes if result is not None and result.choices]
        if begun:
            break
    assert begun, "none had started"
    assert all(choice.finish_reason is FinishReason.EXPIRED for result in begun for choice in result.choices)
    assert worker.is_running


def test_urgent_jobs_overtake_those_that_wait(client: Client) -> None:
    slow = [{"prompt": "Once", "max_tokens": 300, "ignore_eos": True, "seed": n, "priority": 1} for n in range(150)]
    handles = client.submit_many(slow)
    urgent = client.submit("Now", max_tokens=8, seed=1, priority=9)
    urgent.result(timeout=90)
    waiting = sum(handle.status().state == "queued" for handle in handles)  # type: ignore[union-attr]
    assert waiting > 0, "the urgent job came last"
    for handle in handles:
        handle.cancel()  # type: ignore[union-attr]
    until(lambda: snapshot(client).running == 0, "the crowd to be gone")
