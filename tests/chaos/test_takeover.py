"""A worker dies, freezes or is drained in mid-stream: another goes on at the next token, and nobody can tell."""

from __future__ import annotations

from typing import Any

import pytest

from penstock import Client, FinishReason
from tests.chaos.conftest import StartWorker
from tests.chaos.ledger import Follower, account
from tests.worker_process import WorkerProcess, end_leases, holders, snapshot, until

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}
PROMPT = "Once upon a time there was a miller"
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "seed": 1, **LONG},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "seed": 2, **LONG},
    "two choices": {"temperature": 0.9, "n": 2, "seed": 3, **LONG},
    "penalties": {
        "temperature": 0.8, "seed": 4, "presence_penalty": 0.6, "frequency_penalty": 0.3, "repetition_penalty": 1.1,
        **LONG,
    },
    "log-probabilities": {"temperature": 0.7, "seed": 5, "logprobs": 2, **LONG},
    "stop string": {"temperature": 1.2, "seed": 6, "stop": ["zzzz qqqq"], **LONG},
    "regex": {"temperature": 0.9, "seed": 7, "response_format": {"regex": "([a-z]{3,7} ){150}"}, "max_tokens": 700},
}  # fmt: skip


def submit_all(client: Client) -> dict[str, Follower]:
    return {name: Follower(client.submit(PROMPT, **options)) for name, options in KINDS.items()}


@pytest.fixture
def undisturbed(client: Client, start_worker: StartWorker) -> dict[str, Any]:
    """What the same requests give when nothing happens."""
    worker = start_worker()
    results = {name: account(client, follower) for name, follower in submit_all(client).items()}
    worker.terminate()
    assert worker.wait() == 0, worker.log
    return results


def assert_same(results: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    for name, result in results.items():
        expected = undisturbed[name]
        for got, wanted in zip(result.choices, expected.choices, strict=True):
            assert got.token_ids == wanted.token_ids, name
            assert got.text == wanted.text, name
            assert got.finish_reason == wanted.finish_reason, name
            assert (got.logprobs is None) == (wanted.logprobs is None), name
            if wanted.logprobs is not None:
                assert len(got.logprobs) == len(wanted.token_ids), name
        assert result.usage.completion_tokens == expected.usage.completion_tokens, name


def test_after_sigkill_every_stream_goes_on_at_the_next_token(
    client: Client, start_worker: StartWorker, undisturbed: dict[str, Any]
) -> None:
    victim = start_worker()
    followers = submit_all(client)
    for follower in followers.values():
        assert follower.started.wait(180)
    victim.kill()
    heir = start_worker(ready=False)
    results = {name: account(client, follower) for name, follower in followers.items()}
    assert_same(results, undisturbed)
    assert any(follower.attempts == {1, 2} for follower in followers.values()), "nobody was interrupted"
    assert {result.worker for result in results.values()} <= {heir.worker_id, victim.worker_id}
    assert snapshot(client).stats["reclaimed"] >= 1


def test_a_drained_worker_hands_its_streams_on_without_a_crash_counted(
    client: Client, start_worker: StartWorker, undisturbed: dict[str, Any]
) -> None:
    leaver = start_worker("--grace-s", "0")
    followers = submit_all(client)
    for follower in followers.values():
        assert follower.started.wait(180)
    leaver.terminate()
    assert leaver.wait() == 0, leaver.log
    start_worker()
    assert_same({name: account(client, follower) for name, follower in followers.items()}, undisturbed)
    assert snapshot(client).stats["released"] >= 1
    assert snapshot(client).stats["reclaimed"] == 0
    assert all(follower.job.status().crashes == 0 for follower in followers.values())


def test_a_zombie_wakes_up_to_find_every_write_refused(client: Client, start_worker: StartWorker) -> None:
    zombie = start_worker()
    jobs = [
        Follower(client.submit(PROMPT, temperature=0.9, seed=seed, **{**LONG, "max_tokens": 700})) for seed in range(4)
    ]
    for follower in jobs:
        assert follower.started.wait(180)
    zombie.freeze()
    start_worker()
    end_leases(client, zombie.worker_id)
    until(lambda: snapshot(client).stats["reclaimed"] >= 1, "the frozen worker's jobs to be reclaimed")
    before = snapshot(client).stats["fenced"]
    zombie.thaw()
    results = [account(client, follower) for follower in jobs]
    assert all(len(result.token_ids) == 700 for result in results)
    until(lambda: snapshot(client).stats["fenced"] > before, "the zombie's writes to be refused")
    until(lambda: holders(client, zombie.worker_id) == 0, "the zombie to hold nothing")
    zombie.terminate()
    assert zombie.wait() == 0, zombie.log


def test_a_job_that_kills_every_worker_is_dead_lettered(client: Client, start_worker: StartWorker) -> None:
    job = client.submit(PROMPT, **{**LONG, "max_tokens": 800}, seed=1)
    follower = Follower(job)
    for crash in (1, 2):
        worker = start_worker("--max-crashes", "2")
        until(lambda: holders(client, worker.worker_id) == 1, "the job to be claimed")  # noqa: B023
        worker.kill()
        if crash == 1:
            assert not job.status().state.is_terminal
    heir = start_worker()  # the number is the queue's by now: others need not be told
    follower.join()
    assert heir.is_running
    status = job.status()
    assert status.state == "dead"
    assert status.failure is not None
    assert status.failure.code == "poison"


def test_a_cancelled_job_of_a_dead_worker_ends_cancelled(client: Client, start_worker: StartWorker) -> None:
    worker = start_worker()
    job = client.submit(PROMPT, seed=1, **{**LONG, "max_tokens": 900})
    follower = Follower(job)
    assert follower.started.wait(180)
    worker.freeze()
    assert job.cancel() == "cancelling"
    worker.kill()
    start_worker()
    follower.join()
    assert job.status().state == "cancelled"


def test_redis_killed_and_restarted_loses_no_job(start_redis: Any, tmp_path: Any, queue: str) -> None:
    """With AOF a killed server comes back with all it acknowledged; client and worker go on by themselves."""
    server = start_redis(None, "--appendfsync", "always")
    with Client(server.url, queue=queue, patience_s=120) as client:
        worker = WorkerProcess(server.url, tmp_path, "w1", "--queue", queue)
        try:
            worker.wait_until_ready(client)
            followers = [Follower(client.submit(PROMPT, temperature=0.9, seed=seed, **LONG)) for seed in range(6)]
            for follower in followers:
                assert follower.started.wait(180)
            server.kill()
            server.start()
            results = [account(client, follower) for follower in followers]
            assert all(len(result.token_ids) == 400 for result in results)
            assert all(result.choices[0].finish_reason is FinishReason.LENGTH for result in results)
            worker.terminate()
            assert worker.wait() == 0, worker.log
        finally:
            worker.end()


def test_a_worker_that_died_with_redis_is_missed_when_redis_is_back(
    start_redis: Any, tmp_path: Any, queue: str
) -> None:
    """Its heartbeat is old as everybody's, and nobody's connection survived: who comes back shows who does not."""
    server = start_redis(None, "--appendfsync", "always")
    with Client(server.url, queue=queue, patience_s=120) as client:
        workers = [WorkerProcess(server.url, tmp_path, f"w{n}", "--queue", queue, "--lease-s", "600") for n in (1, 2)]
        try:
            for worker in workers:
                worker.wait_until_ready(client)
            jobs = [
                Follower(client.submit(PROMPT, temperature=0.9, seed=n, **{**LONG, "max_tokens": 900}))
                for n in range(6)
            ]
            for follower in jobs:
                assert follower.started.wait(180)
            victim = next(worker for worker in workers if holders(client, worker.worker_id))
            survivor = next(worker for worker in workers if worker is not victim)
            server.kill()
            victim.kill()
            server.start()
            results = [account(client, follower) for follower in jobs]
            assert {result.worker for result in results} == {survivor.worker_id}
            stats = snapshot(client).stats
            assert (stats["reclaimed"] > 0, stats["fenced"]) == (True, 0), "the survivor was never taken for gone"
        finally:
            for worker in workers:
                worker.end()
