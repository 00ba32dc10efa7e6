"""Several models on one Redis: each job reaches the workers of its model, whoever else is idle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock import Client
from tests.redis_server import RedisServer
from tests.worker_process import WorkerProcess, snapshot, until

pytestmark = pytest.mark.integration

MODELS = ("penstock-story", "penstock-story-draft")


@pytest.fixture(scope="module")
def workers(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, WorkerProcess]]:
    """One worker for each model, on the queues that are named after them."""
    folder = tmp_path_factory.mktemp("models")
    started = {model: WorkerProcess(server.url, folder, f"of-{model}", "--model", model) for model in MODELS}
    for model, worker in started.items():
        with Client(server.url, model=model) as client:
            worker.wait_until_ready(client)
    yield started
    for worker in started.values():
        worker.end()


def test_a_job_is_run_by_a_worker_of_its_model(server: RedisServer, workers: dict[str, WorkerProcess]) -> None:
    for model, worker in workers.items():
        with Client(server.url, model=model) as client:
            handles = [client.submit("The miller", max_tokens=4, seed=seed) for seed in range(4)]
            results = [handle.result(timeout=60) for handle in handles]
            assert {(result.model, result.worker) for result in results} == {(model, worker.worker_id)}
            (view,) = snapshot(client).workers
            assert view.record is not None
            assert (view.record.model, view.record.device, view.record.ranks) == (model, "cpu", 1)
            assert view.record.total_pages * view.record.page_size == view.record.total_tokens


def test_a_job_of_a_model_without_workers_waits_until_one_comes(
    server: RedisServer, workers: dict[str, WorkerProcess], tmp_path: Path
) -> None:
    assert all(worker.is_running for worker in workers.values())
    with Client(server.url, model="latecomer") as client:
        job = client.submit("The miller", max_tokens=4, seed=1)
        assert snapshot(client).workers == []
        assert job.status().state == "queued"
        late = WorkerProcess(server.url, tmp_path, "late", "--served-name", "latecomer")
        try:
            assert job.result(timeout=90).worker == "late"
            until(lambda: snapshot(client).waiting == 0, "the queue to be empty")
        finally:
            late.end()
