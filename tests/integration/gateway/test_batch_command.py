"""`penstock batch`: answers in the input's order, a second run that goes on, refusals before anything is submitted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.testing import CliRunner, Result

from penstock import AsyncClient, Client
from penstock.cli.app import app
from penstock.cli.batch_run import Request, Runner, Summary
from penstock.cli.session import Address
from penstock_core.protocol.jobs import JobState
from penstock_core.protocol.keys import QueueKeys
from tests.integration.producer.scripted import BusyWorker
from tests.worker_process import hear_interrupts, until

pytestmark = pytest.mark.integration


@pytest.fixture
def busy(redis_url: str, keys: QueueKeys) -> Iterator[BusyWorker]:
    with BusyWorker(lambda: redis.Redis.from_url(redis_url), keys) as worker:
        yield worker


@pytest.fixture
def batch(redis_url: str, queue: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Run `penstock batch` on these lines."""
    monkeypatch.setenv("PENSTOCK_REDIS_URL", redis_url)
    monkeypatch.setenv("PENSTOCK_QUEUE", queue)

    def call(lines: list[Any], *options: str) -> Result:
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return CliRunner().invoke(
            app, ["batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *options]
        )

    return call


def records(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def chat(custom_id: str, **body: Any) -> dict[str, Any]:
    request = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": request}


def test_answers_stand_in_the_inputs_order(batch: Any, busy: BusyWorker, tmp_path: Path) -> None:
    lines = [{"custom_id": f"n-{n}", "prompt": "hello", "max_tokens": 1 + n % 7} for n in range(150)]
    outcome = batch([*lines, chat("o-1")], "--json", "--window", "40")
    assert outcome.exit_code == 0, outcome.output
    summary = json.loads(outcome.stdout)
    assert (summary["total"], summary["completed"], summary["failed"], summary["skipped"]) == (151, 151, 0, 0)
    written = records(tmp_path)
    assert [record["custom_id"] for record in written] == [*(f"n-{n}" for n in range(150)), "o-1"]
    assert [len(record["choices"][0]["token_ids"]) for record in written[:-1]] == [1 + n % 7 for n in range(150)]
    assert written[-1]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"


def test_second_run_goes_on_behind_the_last_whole_line(
    batch: Any, busy: BusyWorker, tmp_path: Path, redis_url: str, queue: str
) -> None:
    lines = [{"custom_id": f"n-{n}", "prompt": "hello", "max_tokens": 2} for n in range(20)]
    assert batch(lines).exit_code == 0
    whole = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(whole[:12]) + whole[12][:30])
    with Client(redis_url, queue=queue) as client:
        before = client.queue_snapshot().stats["submitted"]
        outcome = batch(lines, "--json")
        assert client.queue_snapshot().stats["submitted"] - before == 8
    assert json.loads(outcome.stdout)["skipped"] == 12
    assert [record["custom_id"] for record in records(tmp_path)] == [f"n-{n}" for n in range(20)]


def test_bad_request_has_its_error_in_its_place(batch: Any, busy: BusyWorker, tmp_path: Path) -> None:
    lines = [{"prompt": "a", "max_tokens": 2}, {"prompt": "b", "temperature": -1}, chat("c", tools=[]), chat("d")]
    outcome = batch(lines)
    assert outcome.exit_code == 5, outcome.output
    first, second, third, fourth = records(tmp_path)
    assert first["state"] == "completed"
    assert "temperature" in second["error"]["message"]
    assert third["response"]["body"]["error"]["param"] == "tools"
    assert fourth["response"]["status_code"] == 200


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([["a list"]], "line 1"),
        ([{"custom_id": "x", "prompt": "a"}, {"custom_id": "x", "prompt": "b"}], "used twice"),
        ([{"prompt": "a", "temprature": 1}], "temprature"),
        ([{"custom_id": "x", "url": "/v1/embeddings", "body": {}}], "/v1/completions"),
        ([], "no requests"),
    ],
)
def test_bad_file_is_refused_before_anything_is_submitted(
    batch: Any, lines: list[Any], said: str, redis_url: str, queue: str
) -> None:
    outcome = batch(lines)
    assert outcome.exit_code == 2
    assert said in outcome.stderr
    with Client(redis_url, queue=queue) as client:
        assert client.queue_snapshot().stats["submitted"] == 0


def test_interruption_cancels_what_is_in_the_queue(redis_url: str, queue: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": f"{n}"}) + "\n" for n in range(30)))
    command = [sys.executable, "-m", "penstock", "batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    environment = {**os.environ, "PENSTOCK_REDIS_URL": redis_url, "PENSTOCK_QUEUE": queue}
    with Client(redis_url, queue=queue) as client:
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
        )
        until(lambda: client.queue_snapshot().waiting == 30, "all lines to be submitted")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 130, said
        assert "0 of 30 are answered" in said
        assert "the same command goes on there" in said
        assert client.queue_snapshot().waiting == 0


async def test_interruption_cancels_what_the_queue_has_and_the_command_has_not_heard_of(
    redis_url: str, queue: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored, heard = asyncio.Event(), asyncio.Event()
    submit_many = AsyncClient.submit_many

    async def reply_late(self: AsyncClient, items: Any) -> Any:
        outcomes = await submit_many(self, items)
        stored.set()
        await heard.wait()
        return outcomes

    monkeypatch.setattr(AsyncClient, "submit_many", reply_late)
    requests = [Request(f"{n}", {"prompt": f"{n}"}, None) for n in range(5)]
    with (tmp_path / "out.jsonl").open("ab") as output:
        runner = Runner(Summary(5, 0), output, "0" * 32, 1, "default", 10, lambda: None)
        running = asyncio.ensure_future(runner.run(Address(redis_url, queue), requests))
        await stored.wait()
        running.cancel()
        await asyncio.sleep(0)  # the interruption arrives before the reply
        heard.set()
        with pytest.raises(asyncio.CancelledError):
            await running
    async with AsyncClient(redis_url, queue=queue) as client:
        assert (await client.queue_snapshot()).waiting == 0
        assert {status.state for status in await client.jobs()} == {JobState.CANCELLED}


def test_after_sigkill_no_line_is_run_twice_and_none_is_lost(
    redis_url: str, redis_client: redis.Redis, keys: QueueKeys, queue: str, tmp_path: Path
) -> None:
    lines = [{"custom_id": f"n-{n}", "prompt": "hello", "max_tokens": 2} for n in range(40)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "penstock", "batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    command += ["--window", "16"]
    environment = {**os.environ, "PENSTOCK_REDIS_URL": redis_url, "PENSTOCK_QUEUE": queue}
    with Client(redis_url, queue=queue) as client:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        until(lambda: client.queue_snapshot().waiting == 16, "the window to be full")
        process.kill()
        process.communicate()
        assert (tmp_path / "out.jsonl.run").exists()
        with BusyWorker(lambda: redis.Redis.from_url(redis_url), keys):
            finished = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=120, check=False
            )
        assert finished.returncode == 0, finished.stderr
        assert client.queue_snapshot().stats["submitted"] == 40
    assert [record["custom_id"] for record in records(tmp_path)] == [f"n-{n}" for n in range(40)]
    assert not (tmp_path / "out.jsonl.run").exists()
