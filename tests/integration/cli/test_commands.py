"""Each command against a real Redis and a worker that does as the test says: output, JSON, exit codes."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from typer.testing import Result

from penstock import Client, JobHandle
from penstock_core.protocol.jobs import JobFailure, JobState
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.requests import JobOptions
from penstock_core.protocol.transitions import BuryRecord, bury, configure, renew, run
from penstock_core.protocol.workers import WorkerRecord
from tests.integration.producer.scripted import BusyWorker, ScriptedWorker, piece
from tests.queue_driver import QueueDriver

pytestmark = pytest.mark.integration


@pytest.fixture
def worker(redis_client: redis.Redis, keys: QueueKeys) -> ScriptedWorker:
    return ScriptedWorker(redis_client, keys)


@pytest.fixture
def busy(redis_url: str, keys: QueueKeys) -> Iterator[BusyWorker]:
    with BusyWorker(lambda: redis.Redis.from_url(redis_url), keys) as busy_worker:
        yield busy_worker


def lines(outcome: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in outcome.stdout.splitlines()]


def text_of(count: int, index: int = 0) -> str:
    return "".join(piece(index, offset) for offset in range(count))


# --- submit


def test_submit_prints_the_id_and_nothing_else_into_a_pipe(cli, sdk):
    outcome = cli("submit", "hello", "--priority", "9", "--tenant", "web")
    assert outcome.exit_code == 0
    assert outcome.stderr == ""
    status = sdk.job(outcome.stdout.strip()).status()
    assert (status.state, status.priority, status.tenant) == (JobState.QUEUED, 9, "web")
    sdk.job(status.job_id).cancel()


def test_submit_reads_the_prompt_from_stdin(cli, sdk, worker):
    from penstock_core.protocol.codec import decode_request

    job_id = cli("submit", "--chat", input="from a pipe\n").stdout.strip()
    job = worker.claim_one(job_id)
    request = decode_request(job.request)
    assert [(m.role, m.content) for m in request.messages or ()] == [("user", "from a pipe\n")]
    worker.end(job)


def test_submit_json_says_whether_the_job_is_new(cli, sdk, queue):
    first = json.loads(cli("submit", "x", "--idempotency-key", "k", "--json").stdout)
    again = json.loads(cli("submit", "x", "--idempotency-key", "k", "--json").stdout)
    assert first == {"job_id": first["job_id"], "queue": queue, "duplicate": False, "workers": 0}
    assert again == {"job_id": first["job_id"], "queue": queue, "duplicate": True, "workers": 0}
    sdk.job(first["job_id"]).cancel()


def test_submit_wait_prints_the_text(cli, busy):
    outcome = cli("submit", "hello", "--max-tokens", "20", "--wait")
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (0, text_of(20) + "\n", "")


def test_submit_stream_prints_the_same_text(cli, busy):
    outcome = cli("submit", "hello", "--max-tokens", "20", "--stream")
    assert (outcome.exit_code, outcome.stdout) == (0, text_of(20) + "\n")


def test_submit_wait_that_is_interrupted_says_how_to_find_the_job(cli, sdk, monkeypatch):
    """The story: into a pipe nothing was printed, and with the id the answer was lost."""

    def interrupted(self: JobHandle, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(JobHandle, "result", interrupted)
    outcome = cli("submit", "hello", "--wait")
    assert outcome.exit_code == 130
    (job_id,) = re.findall(r"penstock result (\w+)", outcome.stderr)
    assert sdk.job(job_id).status().state == JobState.QUEUED
    sdk.job(job_id).cancel()


def test_submit_wait_json_is_one_object(cli, busy):
    (record,) = lines(cli("submit", "hello", "--max-tokens", "3", "--wait", "--json"))
    assert record["state"] == "completed"
    assert record["text"] == text_of(3)
    assert record["choices"] == [{"index": 0, "text": text_of(3), "token_ids": [0, 1, 2], "finish_reason": "length"}]
    assert record["usage"]["completion_tokens"] == 3
    assert record["attempt"] == 1
    assert record["error"] is None


def test_submit_stream_json_is_a_line_per_event(cli, busy):
    records = lines(cli("submit", "hello", "--max-tokens", "20", "--stream", "--json"))
    assert records[0]["event"] == "submitted"
    assert records[-1]["event"] == "ended"
    assert records[-1]["state"] == "completed"
    tokens = [record for record in records if record["event"] == "tokens"]
    assert [token for record in tokens for token in record["token_ids"]] == list(range(20))
    assert "".join(record["text"] for record in tokens) == text_of(20) == records[-1]["text"]
    assert {record["job_id"] for record in records} == {records[0]["job_id"]}


def test_submit_wait_gives_up_with_6_and_the_job_goes_on(cli, sdk):
    outcome = cli("submit", "hello", "--wait", "--timeout", "0.05")
    assert outcome.exit_code == 6
    assert outcome.stderr.startswith("error: timeout: ")
    (status,) = sdk.jobs()
    assert status.state is JobState.QUEUED
    sdk.job(status.job_id).cancel()


def test_a_full_queue_is_exit_code_3(cli, sdk, keys, redis_client):
    run(redis_client, configure(keys, {"max_waiting_jobs": 1}))
    job_id = cli("submit", "one").stdout.strip()
    outcome = cli("submit", "two")
    assert outcome.exit_code == 3
    assert outcome.stdout == ""
    assert "max_waiting_jobs is 1" in outcome.stderr
    assert "try again in" in outcome.stderr
    sdk.job(job_id).cancel()


# --- result and watch


def failed_job(sdk: Client, worker: ScriptedWorker) -> str:
    handle = sdk.submit("hello")
    job = worker.claim_one(handle.id)
    worker.say(job, 3)
    worker.end(job, JobState.FAILED, failure=JobFailure("worker_error", "the engine tripped"))
    return handle.id


@pytest.mark.parametrize("command", ["result", "watch"])
def test_a_failed_job_gives_5_its_partial_text_and_the_reason(cli, sdk, worker, command):
    outcome = cli(command, failed_job(sdk, worker))
    assert outcome.exit_code == 5
    assert outcome.stdout == text_of(3) + "\n"
    assert "the engine tripped (worker_error)" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_a_failed_job_as_json_is_still_a_record(cli, sdk, worker):
    outcome = cli("result", failed_job(sdk, worker), "--json")
    assert outcome.exit_code == 5
    (record,) = lines(outcome)
    assert record["state"] == "failed"
    assert record["error"] == {"code": "worker_error", "message": "the engine tripped"}
    assert record["text"] == text_of(3)


@pytest.mark.parametrize("command", ["result", "watch"])
def test_an_unknown_job_is_exit_code_4(cli, command, redis_client):
    outcome = cli(command, "nobody")
    assert outcome.exit_code == 4
    assert outcome.stderr.startswith("error: job: no job nobody in queue ")


def test_result_of_several_choices_names_each(cli, sdk, worker):
    handle = sdk.submit("hello", n=2)
    job = worker.claim_one(handle.id)
    worker.say(job, 2, index=0)
    worker.say(job, 1, index=1)
    worker.end(job)
    outcome = cli("result", handle.id)
    assert outcome.stdout == f"── 0 ── length\n{text_of(2)}\n── 1 ── length\n{text_of(1, 1)}\n"
    assert cli("watch", handle.id, "--index", "1").stdout == text_of(1, 1) + "\n"


def test_watch_begins_at_any_offset_and_marks_nothing_in_a_pipe(cli, sdk, worker):
    handle = sdk.submit("hello")
    job = worker.claim_one(handle.id)
    worker.say(job, 10)
    worker.end(job)
    assert cli("watch", handle.id, "--from", "7").stdout == " 0:7 0:8 0:9\n"


def test_watch_follows_a_job_while_it_runs(cli, sdk, worker):
    """The watcher starts before the worker does; the tokens arrive over the push channel."""
    handle = sdk.submit("hello")
    outcomes: list[Result] = []
    watcher = threading.Thread(target=lambda: outcomes.append(cli("watch", handle.id)))
    watcher.start()
    job = worker.claim_one(handle.id)
    for _ in range(5):
        worker.say(job, 2)
    worker.end(job)
    watcher.join(timeout=30)
    assert outcomes[0].exit_code == 0
    assert outcomes[0].stdout == text_of(10) + "\n"


def test_watch_of_several_jobs_prints_each_and_the_worst_exit_code(cli, sdk, worker):
    good = sdk.submit("hello").id
    job = worker.claim_one(good)
    worker.say(job, 2)
    worker.end(job)
    bad = failed_job(sdk, worker)
    outcome = cli("watch", good, bad)
    assert outcome.exit_code == 5
    assert outcome.stdout == f"── {good} ── completed\n{text_of(2)}\n── {bad} ── failed\n{text_of(3)}\n"
    records = lines(cli("watch", good, bad, "--json"))
    ended = {record["job_id"]: record["state"] for record in records if record["event"] == "ended"}
    assert ended == {good: "completed", bad: "failed"}


# --- cancel, jobs


def test_cancel_says_what_became_of_each_job(cli, sdk, worker):
    running = sdk.submit("one").id
    job = worker.claim_one(running)
    queued = sdk.submit("two").id
    outcome = cli("cancel", running, queued, "nobody", "--json")
    assert outcome.exit_code == 4
    assert lines(outcome) == [
        {"job_id": running, "outcome": "cancelling"},
        {"job_id": queued, "outcome": "cancelled"},
        {"job_id": "nobody", "outcome": "unknown"},
    ]
    worker.end(job, JobState.CANCELLED, failure=JobFailure("cancelled", "by request"))
    again = cli("cancel", queued)
    assert (again.exit_code, again.stdout) == (0, "")
    assert f"{queued} had already ended" in again.stderr


def test_jobs_lists_by_state_and_tenant_newest_first(cli, sdk, worker):
    first = sdk.submit("one", tenant="a").id
    job = worker.claim_one(first)
    second = sdk.submit("two", tenant="b").id
    later = sdk.submit("three", tenant="b", delay_s=60).id
    failed = sdk.submit("four", tenant="a", priority=9).id
    worker.fail(worker.claim_one(failed), "worker_error", "tripped")
    ids = [record["job_id"] for record in lines(cli("jobs", "--json"))]
    assert ids == [failed, later, second, first]
    by_state = {
        name: lines(cli("jobs", "--state", name, "--json")) for name in ("running", "queued", "delayed", "failed")
    }
    assert {name: [record["job_id"] for record in found] for name, found in by_state.items()} == {
        "running": [first], "queued": [second], "delayed": [later], "failed": [failed],
    }  # fmt: skip
    assert [r["job_id"] for r in lines(cli("jobs", "--tenant", "b", "--limit", "1", "--json"))] == [later]
    both = lines(cli("jobs", "--state", "queued", "--state", "running", "--json"))
    assert [record["job_id"] for record in both] == [second, first]
    assert by_state["failed"][0]["failure"] == {"code": "worker_error", "message": "tripped"}
    table = cli("jobs", env={"COLUMNS": "140"}).stdout
    assert first in table
    assert "● running" in table
    assert "tripped" in table
    narrow = cli("jobs", env={"COLUMNS": "80"}).stdout
    assert max(map(len, narrow.splitlines())) <= 80
    assert first in narrow
    worker.end(job)
    cli("cancel", second, later)


def test_jobs_by_id_and_an_unknown_one(cli, sdk):
    job_id = sdk.submit("one").id
    outcome = cli("jobs", job_id, "nobody", "--json")
    assert outcome.exit_code == 4
    assert [record["state"] for record in lines(outcome)] == ["queued"]
    sdk.job(job_id).cancel()


def test_no_jobs_is_no_error(cli, redis_client):
    outcome = cli("jobs")
    assert (outcome.exit_code, outcome.stdout) == (0, "")
    assert "no such jobs" in outcome.stderr
    assert cli("jobs", "--json").stdout == ""


# --- dead


def dead_job(sdk: Client, worker: ScriptedWorker, redis_client: redis.Redis, keys: QueueKeys) -> str:
    handle = sdk.submit("a [bold]cursed[/] prompt")
    job = worker.claim_one(handle.id)
    worker.say(job, 2)
    from penstock_core.protocol.codec import encode_event
    from penstock_core.protocol.events import JobEnded

    ended = encode_event(JobEnded(JobState.DEAD, job.attempt, None, JobFailure("poison", "it [red]crashed[/]")))
    record = BuryRecord(job.job_id, job.attempt, "poison", "it [red]crashed[/]", ended)
    assert run(redis_client, bury(keys, worker.id, [record])) == ["ok"]
    return handle.id


def test_dead_jobs_are_listed_shown_and_requeued(cli, sdk, worker, redis_client, keys):
    job_id = dead_job(sdk, worker, redis_client, keys)
    (letter,) = lines(cli("dead", "list", "--json"))
    assert (letter["job_id"], letter["code"], letter["message"]) == (job_id, "poison", "it [red]crashed[/]")
    wide = {"COLUMNS": "140"}
    assert "it [red]crashed[/]" in cli("dead", "list", env=wide).stdout  # markup in a message is text
    (shown,) = lines(cli("dead", "show", job_id, "--json"))
    assert shown["request"]["prompt"] == "a [bold]cursed[/] prompt"
    assert shown["text"] == text_of(2)
    page = cli("dead", "show", job_id, env=wide).stdout
    assert "a [bold]cursed[/] prompt" in page
    assert "it [red]crashed[/] (poison)" in page
    assert lines(cli("dead", "requeue", job_id, "--json")) == [{"job_id": job_id, "outcome": "requeued"}]
    assert cli("dead", "requeue", job_id).exit_code == 4
    assert cli("dead", "show", job_id).exit_code == 4
    assert sdk.job(job_id).status().state is JobState.QUEUED
    sdk.job(job_id).cancel()
    assert "no dead jobs" in cli("dead", "requeue", "--all").stderr


def test_dead_jobs_are_purged_only_when_meant(cli, sdk, worker, redis_client, keys):
    ids = [dead_job(sdk, worker, redis_client, keys) for _ in range(3)]
    refused = cli("dead", "purge", "--all")
    assert refused.exit_code == 2
    assert "confirm with --yes" in refused.stderr
    assert lines(cli("dead", "purge", ids[0], "--json")) == [{"purged": 1}]
    assert lines(cli("dead", "purge", "--all", "--yes", "--json")) == [{"purged": 2}]
    assert cli("dead", "list", "--json").stdout == ""
    assert cli("dead", "purge", ids[0]).exit_code == 4


# --- top and doctor


def test_top_shows_the_queue_at_one_moment(cli, sdk, worker, redis_client, keys, queue):
    sdk.submit("one", tenant="web", priority=9)
    job = worker.claim_one(sdk.jobs()[0].job_id)
    waiting = sdk.submit("two", tenant="batch", priority=2).id
    record = WorkerRecord(
        worker.id, model="m", device="cpu", running=1, max_sequences=8, free_tokens=50, total_tokens=100
    )
    run(redis_client, renew(keys, worker.id, [(job.job_id, 1)], lease_ms=15_000, record=record.encode()))
    (seen,) = lines(cli("top", "--once", "--json"))
    assert (seen["queue"], seen["running"], seen["waiting"]) == (queue, 1, 1)
    assert seen["lines"][0]["tenant"] == "batch"
    assert seen["workers"][0]["worker_id"] == worker.id
    assert seen["stats"]["submitted"] == 2
    page = cli("top", "--once", env={"COLUMNS": "120"}).stdout
    for words in ("1 running", "batch", worker.id, "1/8", "50%"):
        assert words in page
    assert max(map(len, page.splitlines())) <= 120
    worker.end(job)
    sdk.job(waiting).cancel()


def test_top_shows_every_queue_of_the_broker(cli, sdk, worker, redis_client, redis_url, keys, queue):
    """Two models on one Redis: one is served, the other's job waits for a worker that nobody started."""
    other = f"{queue}-other"
    record = WorkerRecord(
        worker.id, model="story", device="cuda:2,3", ranks=2, tokens_per_s=120.0, tokens_in=100, prefix_hit_rate=0.25,
        draft_acceptance=0.5, page_size=16, total_pages=400, used_pages=100, cached_pages=60,
    )  # fmt: skip
    with Client(redis_url, queue=other) as stranger:
        job = stranger.submit("for the other model", tenant="batch", priority=8)
        try:
            sdk.submit("one", tenant="web")
            run(redis_client, renew(keys, worker.id, [], lease_ms=15_000, record=record.encode()))
            seen = {one["queue"]: one for one in lines(cli("top", "--all", "--once", "--json"))}
            assert {queue, other} <= set(seen)
            assert [one["model"] for one in seen[queue]["workers"]] == ["story"]
            assert (seen[other]["waiting"], seen[other]["workers"]) == (1, [])
            page = cli("top", "--all", "--once", env={"COLUMNS": "140"}).stdout
            for words in (
                other, "batch", "cuda:2,3 ×2", "100/400", "100 used  60 cached  240 free", "25% prefix hits",
                "50% drafts accepted", "120 tokens/s",
            ):  # fmt: skip
                assert words in page, words
            assert max(map(len, page.splitlines())) <= 140
        finally:
            job.cancel()
            redis_client.delete(*redis_client.keys(f"penstock:{{{other}}}:*"))
    refused = cli("top", "--all", "--queue", queue)
    assert refused.exit_code == 2
    assert "--all" in refused.stderr


def test_doctor_reports_every_check_and_agrees_with_its_exit_code(cli, redis_client, queue):
    outcome = cli("doctor", "--no-model", "--json")
    (report,) = lines(outcome)
    checks = {check["name"]: check for check in report["checks"]}
    assert outcome.exit_code == 0
    assert report["ok"]
    assert report["queue"] == queue
    assert {
        "python",
        "penstock",
        "redis",
        "torch",
        "disk",
        "broker",
        "latency",
        "version",
        "persistence",
        "eviction",
    } <= set(checks)
    assert checks["persistence"]["data"]["aof"]
    assert checks["workers"]["status"] == "warning"
    assert "penstock worker" in checks["workers"]["remedy"]
    page = cli("doctor", "--no-model", env={"COLUMNS": "100"}).stdout
    assert "This machine" in page
    assert "→ start one" in page


def test_doctor_calls_a_queue_that_waits_for_nobody_broken(cli, sdk):
    handle = sdk.submit("one")
    outcome = cli("doctor", "--no-model", "--json")
    assert outcome.exit_code == 1
    (report,) = lines(outcome)
    assert [check["name"] for check in report["checks"] if check["status"] == "error"] == ["workers"]
    handle.cancel()


def test_a_job_that_no_worker_is_there_for_is_announced(cli, sdk, worker, redis_client, keys, queue, monkeypatch):
    """A misspelt model names a queue that nobody serves: its jobs wait, and submit, doctor and top say so."""
    misspelt = f"{queue}-tpyo"
    assert lines(cli("submit", "one", "--queue", misspelt, "--json"))[0]["workers"] == 0
    monkeypatch.setattr("penstock.cli.submit.is_terminal", lambda stream: True)
    assert f"no worker serves queue {misspelt} now" in cli("submit", "two", "--queue", misspelt).stderr
    try:
        (report,) = lines(cli("doctor", "--no-model", "--json"))
        checks = {check["name"]: check for check in report["checks"]}
        assert checks["other queues"]["status"] == "warning"
        assert f"{misspelt} (2 waiting)" in checks["other queues"]["detail"]
        run(redis_client, renew(keys, worker.id, [], lease_ms=15_000, record=WorkerRecord(worker.id).encode()))
        (served,) = lines(cli("submit", "one", "--json"))
        assert served["workers"] == 1
        sdk.job(served["job_id"]).cancel()
    finally:
        redis_client.delete(*redis_client.keys(f"penstock:{{{misspelt}}}:*"))


def test_doctor_without_a_broker_is_exit_code_7(cli):
    outcome = cli("doctor", "--no-model", "--json", "--redis", "redis://127.0.0.1:1")
    assert outcome.exit_code == 7
    (report,) = lines(outcome)
    broken = [check for check in report["checks"] if check["status"] == "error"]
    assert [check["name"] for check in broken] == ["broker"]
    assert broken[0]["remedy"]


def test_doctor_calls_a_broker_that_evicts_broken_and_warns_of_one_that_forgets(cli, start_redis):
    server = start_redis(None, "--appendonly", "no", "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    outcome = cli("doctor", "--no-model", "--json", "--redis", server.url)
    assert outcome.exit_code == 1
    (report,) = lines(outcome)
    checks = {check["name"]: check for check in report["checks"]}
    assert (checks["persistence"]["status"], checks["eviction"]["status"]) == ("warning", "error")
    assert "appendonly yes" in checks["persistence"]["remedy"]
    assert "noeviction" in checks["eviction"]["remedy"]


# --- ids are free-form: another client may have made them


def test_markup_in_a_job_id_is_text(cli, redis_client, keys):
    driver = QueueDriver(redis_client, keys)
    driver.now = 0
    driver.submit_all([driver.new_job("[bold]x[/]", **JobOptions().model_dump(exclude_unset=True))])
    assert "[bold]x[/]" in cli("jobs").stdout
    cli("cancel", "[bold]x[/]")
