"""When the engine breaks: a step sends its own jobs into a retry, a dead thread ends the worker; the queue goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock import Client, JobDead, JobFailed
from penstock_worker.exit_codes import ExitCode
from tests.integration.worker.breaking_worker import STEP, THREAD
from tests.redis_server import RedisServer
from tests.worker_process import WorkerProcess, snapshot, until

pytestmark = pytest.mark.integration

BREAKING = "tests.integration.worker.breaking_worker"


@pytest.fixture
def own_client(server: RedisServer, queue: str) -> Iterator[Client]:
    with Client(server.url, queue=queue) as made:
        yield made


@pytest.fixture
def start(server: RedisServer, own_client: Client, tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    started: list[WorkerProcess] = []

    def begin(name: str, *options: str, module: str = BREAKING, ready: bool = True) -> WorkerProcess:
        queue = own_client.settings.queue
        worker = WorkerProcess(server.url, tmp_path, name, "--queue", queue, *options, module=module)
        started.append(worker)
        if ready:
            worker.wait_until_ready(own_client)
        return worker

    yield begin
    for worker in started:
        worker.end()


def test_a_step_that_breaks_is_tried_again_and_fails_its_own_jobs_only(
    own_client: Client, start: Callable[..., WorkerProcess]
) -> None:
    worker = start("w1")
    fine = own_client.submit("Once upon a time", max_tokens=200, ignore_eos=True, seed=1)
    stream = fine.stream(timeout=60)
    next(stream)
    doomed = own_client.submit(prompt_token_ids=STEP, max_tokens=4, seed=1, max_retries=1)
    with pytest.raises(JobFailed, match="out of memory, as the test wants it") as failed:
        doomed.result(timeout=60)
    assert failed.value.code == "engine_error"
    assert (doomed.status().attempt, doomed.status().errors, doomed.status().crashes) == (2, 2, 0)
    assert len(fine.result(timeout=60).token_ids) == 200, "its neighbour was retried, or was not in that step"
    assert own_client.submit("Still here", max_tokens=4, seed=1).result(timeout=60).token_ids
    worker.terminate()
    assert worker.wait() == ExitCode.OK, worker.log


def test_a_dead_engine_thread_ends_the_worker_and_its_jobs_go_on_elsewhere(
    own_client: Client, start: Callable[..., WorkerProcess]
) -> None:
    worker = start("w1")
    fine = own_client.submit("Once upon a time", max_tokens=700, ignore_eos=True, seed=1)
    next(fine.stream(timeout=60))
    killer = own_client.submit(prompt_token_ids=THREAD, max_tokens=4, seed=1)
    assert worker.wait() == ExitCode.ENGINE, worker.log
    until(lambda: snapshot(own_client).running == 0, "its jobs to be taken back before it was gone")
    assert (killer.status().crashes, killer.status().errors) == (1, 0)
    killer.cancel()
    heir = start("w2", module="penstock_worker")
    assert len(fine.result(timeout=60).token_ids) == 700
    heir.terminate()
    assert heir.wait() == ExitCode.OK, heir.log


def test_a_request_that_kills_every_engine_is_dead_lettered(
    own_client: Client, start: Callable[..., WorkerProcess]
) -> None:
    """A release would spend nothing, and such a request would go round for ever."""
    killer = own_client.submit(prompt_token_ids=THREAD, max_tokens=4, seed=1)
    for number in range(2):
        worker = start(f"w{number}", "--max-crashes", "2", ready=False)
        assert worker.wait() == ExitCode.ENGINE, worker.log
    with pytest.raises(JobDead) as dead:
        killer.result(timeout=60)
    assert dead.value.code == "poison"
