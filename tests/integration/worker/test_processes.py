"""The worker as a process: signals, a supervised group, and what it tells of itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock import Client
from penstock_worker.exit_codes import ExitCode
from tests.redis_server import RedisServer, free_port
from tests.worker_process import WorkerProcess, holders, snapshot, until

pytestmark = pytest.mark.integration

LONG = {"max_tokens": 900, "ignore_eos": True}


@pytest.fixture
def own_client(server: RedisServer, queue: str) -> Iterator[Client]:
    with Client(server.url, queue=queue) as made:
        yield made


@pytest.fixture
def start(server: RedisServer, own_client: Client, tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    started: list[WorkerProcess] = []

    def begin(*options: str) -> WorkerProcess:
        worker = WorkerProcess(server.url, tmp_path, "w1", "--queue", own_client.settings.queue, *options)
        started.append(worker)
        return worker

    yield begin
    for worker in started:
        worker.end()


def test_a_second_signal_hands_the_jobs_back_at_once(own_client: Client, start: Callable[..., WorkerProcess]) -> None:
    worker = start("--grace-s", "600")
    worker.wait_until_ready(own_client)
    jobs = [own_client.submit("Once upon a time", seed=n, **LONG) for n in range(24)]
    until(lambda: holders(own_client, "w1") == 24, "the jobs to be claimed")
    worker.terminate()
    until(lambda: "draining" in worker.log, "the drain to begin")
    worker.terminate()
    assert worker.wait() == ExitCode.OK, worker.log
    waiting = [job for job in jobs if job.status().state == "queued"]
    assert waiting
    assert {job.status().crashes for job in jobs} == {0}
    for job in waiting:
        job.cancel()


def test_it_tells_of_itself_over_http_and_to_the_health_command(
    own_client: Client, start: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    port = free_port()
    worker = start("--metrics-port", str(port))
    worker.wait_until_ready(own_client)
    (view,) = snapshot(own_client).workers
    assert view.record is not None
    assert view.record.connection_id > 0, "known by its doorbell from the first heartbeat, or its death is missed late"
    own_client.submit("Once upon a time", max_tokens=12, ignore_eos=True, seed=1).result(timeout=60)

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    assert json.loads(get("/health"))["healthy"] is True
    labels = f'{{model="penstock-story",queue="{own_client.settings.queue}"}}'
    until(lambda: f"penstock_completion_tokens_total{labels} 12.0" in get("/metrics"), "the tokens to be counted")
    checked = subprocess.run(
        [sys.executable, "-m", "penstock_worker.health"],
        env={**os.environ, "PENSTOCK_HEALTH_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
    assert "w1: healthy, ready" in checked.stdout
    second = WorkerProcess(own_client.settings.url, tmp_path, "w2", "--metrics-port", str(port))
    assert second.wait() == ExitCode.USAGE
    assert "metrics-port" in second.log
    worker.terminate()
    assert worker.wait() == ExitCode.OK, worker.log


def test_a_killed_child_of_a_group_is_replaced_and_its_jobs_go_on_at_once(
    own_client: Client, start: Callable[..., WorkerProcess]
) -> None:
    group = start("--processes", "2", "--lease-s", "600", "--heartbeat-s", "60", "--reclaim-tick-s", "60")
    until(lambda: len(snapshot(own_client).workers) == 2, "both workers")
    before = {view.worker_id for view in snapshot(own_client).workers}
    jobs = [own_client.submit("Once upon a time", seed=n, **LONG) for n in range(8)]
    held = {
        view.worker_id: lambda name=view.worker_id: holders(own_client, name) for view in snapshot(own_client).workers
    }
    until(lambda: any(count() for count in held.values()), "a child to hold jobs")
    busy = max(held, key=lambda name: held[name]())
    (victim,) = [view.record for view in snapshot(own_client).workers if view.worker_id == busy]
    assert victim is not None
    os.kill(victim.pid, signal.SIGKILL)
    assert all(len(job.result(timeout=90).token_ids) == 900 for job in jobs), (
        "no lease and no heartbeat can have run out"
    )
    until(lambda: len({view.worker_id for view in snapshot(own_client).workers} - before) == 1, "the replacement")
    group.terminate()
    assert group.wait() == ExitCode.OK, group.log
    assert snapshot(own_client).workers == []


def test_a_group_without_hope_ends_with_its_childs_code(start: Callable[..., WorkerProcess], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    group = start("--processes", "2", "--model", str(tmp_path / "empty"))
    assert group.wait() == ExitCode.MODEL


def test_children_drain_when_their_supervisor_is_killed(
    own_client: Client, start: Callable[..., WorkerProcess]
) -> None:
    group = start("--processes", "2")
    until(lambda: len(snapshot(own_client).workers) == 2, "both workers")
    group.kill()
    until(lambda: snapshot(own_client).workers == [], "the orphans to drain and sign off")


def test_a_worker_told_to_stop_while_it_waits_for_redis_stops(tmp_path: Path) -> None:
    worker = WorkerProcess(f"redis://127.0.0.1:{free_port()}", tmp_path, "early")
    until(lambda: "waiting for Redis" in worker.log, "the worker to say what it waits for")
    worker.terminate()
    assert worker.wait() == ExitCode.OK, worker.log


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['w', '--help']\ntry: runpy.run_module('penstock_worker', run_name='__main__')\n"
    )
    code += "except SystemExit: print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "False"
