"""A rank of a group is killed in mid-stream: its group goes down as one, its jobs lose no token, and it comes back."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from penstock import Client
from penstock_core.protocol.workers import WorkerRecord
from tests.chaos.conftest import StartWorker
from tests.chaos.ledger import Follower, account
from tests.redis_server import free_port
from tests.worker_process import WorkerProcess, snapshot, until

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

GROUP = ("--ranks", "2", "--tensor-parallel", "2")
REQUESTS: list[dict[str, Any]] = [
    {"prompt": "Once upon a time there was a miller", "temperature": 0.0, "seed": 1},
    {"prompt": "The ferryman and the fox", "temperature": 0.9, "seed": 2},
    {"prompt": "It was raining on the river", "temperature": 0.9, "n": 2, "seed": 3},
]


def follow(client: Client) -> list[Follower]:
    return [Follower(client.submit(**request, max_tokens=500, ignore_eos=True)) for request in REQUESTS]


def the_worker(client: Client) -> WorkerRecord | None:
    """The one worker that claims here; None while there is none."""
    records = [view.record for view in snapshot(client).workers if view.record is not None]
    return records[0] if len(records) == 1 else None


def serving(client: Client, *, after: WorkerRecord | None = None) -> WorkerRecord:
    """Wait for the group's worker, another than `after`."""
    found: list[WorkerRecord] = []

    def there() -> bool:
        worker = the_worker(client)
        if worker is not None and (after is None or worker.worker_id != after.worker_id):
            found.append(worker)
        return bool(found)

    until(there, "the group to serve")
    return found[0]


def ask_health(port: int) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refusal:
        return refusal.code, json.load(refusal)


@pytest.fixture(scope="module")
def undisturbed() -> list[Any]:
    """What the requests give when nothing happens; filled by the first test."""
    return []


@pytest.mark.parametrize("victim", ["follower", "rank 0"])
def test_a_killed_rank_costs_no_job_and_no_token_and_its_group_is_back(
    client: Client, start_worker: StartWorker, tmp_path: Path, undisturbed: list[Any], victim: str
) -> None:
    port = free_port()
    supervisor: WorkerProcess = start_worker(*GROUP, "--metrics-port", str(port), ready=False)
    first = serving(client)
    assert (first.device, first.ranks) == ("cpu", 2)
    until(lambda: ask_health(port)[0] == 200, "health to be green")
    if not undisturbed:
        undisturbed += [account(client, follower) for follower in follow(client)]
    rank_0 = psutil.Process(first.pid)
    (follower_process,) = rank_0.children()
    followers = follow(client)
    for one in followers:
        assert one.started.wait(180)
    killed_at = time.monotonic()
    os.kill(rank_0.pid if victim == "rank 0" else follower_process.pid, signal.SIGKILL)
    until(lambda: ask_health(port)[0] == 503, "health to turn red")
    red_after_s = time.monotonic() - killed_at
    assert "0 of 1 groups serve" in ask_health(port)[1]["detail"]
    _, left = psutil.wait_procs([rank_0, follower_process], timeout=120)
    assert not left, "a rank outlived its group"
    second = serving(client, after=first)
    back_after_s = time.monotonic() - killed_at
    until(lambda: ask_health(port)[0] == 200, "health to turn green again")
    results = [account(client, one) for one in followers]
    for got, wanted in zip(results, undisturbed, strict=True):
        assert [choice.token_ids for choice in got.choices] == [choice.token_ids for choice in wanted.choices]
        assert got.text == wanted.text
    assert any(one.attempts == {1, 2} for one in followers), "nobody was interrupted"
    assert {result.worker for result in results} == {second.worker_id}
    assert snapshot(client).stats["dead"] == 0
    print(f"{victim}: health red after {red_after_s:.2f} s, serving again after {back_after_s:.2f} s")
    supervisor.terminate()
    assert supervisor.wait() == 0, supervisor.log
    assert re.search(r'"a group serves again"', supervisor.log)


def test_a_group_goes_with_its_supervisor(client: Client, start_worker: StartWorker) -> None:
    """Killed with -9, the supervisor can tell nobody: rank 0 sees that its parent is gone, followers that theirs is."""
    supervisor: WorkerProcess = start_worker(*GROUP, ready=False)
    rank_0 = psutil.Process(serving(client).pid)
    ranks = [rank_0, *rank_0.children()]
    assert len(ranks) == 2
    supervisor.kill()
    _, left = psutil.wait_procs(ranks, timeout=120)
    assert not left
    until(lambda: snapshot(client).workers == [], "the group to sign off")
