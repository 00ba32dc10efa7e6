"""What is wrong is refused by name, wherever it comes from; no worker dies of it and no client waits for ever."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
import redis
from safetensors.torch import load_file, save_file

from penstock import Client, InvalidRequest, JobDead, JobFailed
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.requests import JobOptions
from penstock_core.protocol.transitions import NewJob, dead_letters, run, submit
from penstock_worker.exit_codes import ExitCode
from penstock_worker.models import BUNDLED
from tests.redis_server import RedisServer
from tests.worker_process import WorkerProcess, until

pytestmark = pytest.mark.integration


def raw_job(client: Client, request: bytes, job_id: str) -> None:
    """Write a request into Redis as another producer would, past this SDK's validation."""
    keys = QueueKeys(client.settings.queue)
    with redis.Redis.from_url(client.settings.url) as connection:
        (outcome,) = run(connection, submit(keys, [NewJob(job_id, request, JobOptions(), 4, 4, "")]))
    assert outcome.status == "accepted"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temprature": 0.7}, "temprature"),
        ({"priority": 12}, "priority"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"tenant": "a tenant"}, "tenant"),
        ({"messages": [{"role": "user", "content": "x"}]}, "prompt"),
    ],
)
def test_the_client_refuses_before_anything_is_stored(client: Client, options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        client.submit("x", **options)  # type: ignore[arg-type]


def test_a_prompt_longer_than_the_model_allows_fails_and_names_the_limit(client: Client, worker: WorkerProcess) -> None:
    limit = json.loads((BUNDLED / "penstock-story" / "config.json").read_text())["max_position_embeddings"]
    with pytest.raises(JobFailed, match=str(limit)) as failed:
        client.submit(prompt_token_ids=[5] * (limit + 1), max_tokens=4).result(timeout=60)
    assert failed.value.code == "invalid_request"
    assert worker.is_running


def test_a_token_the_model_does_not_have_fails_and_is_named(client: Client, worker: WorkerProcess) -> None:
    with pytest.raises(JobFailed, match="999999"):
        client.submit(prompt_token_ids=[999_999], max_tokens=4).result(timeout=60)
    assert worker.is_running


def test_an_unknown_option_of_a_foreign_producer_fails_and_is_named(client: Client, worker: WorkerProcess) -> None:
    raw_job(client, msgpack.packb((1, {"prompt": "x", "sampling": {"temprature": 1.0}})), "foreign-1")
    with pytest.raises(JobFailed, match="temprature"):
        client.job("foreign-1").result(timeout=60)
    assert worker.is_running


def test_an_undecodable_request_is_dead_lettered_with_its_reason(client: Client, worker: WorkerProcess) -> None:
    raw_job(client, b"\xc1 no msgpack", "foreign-2")
    with pytest.raises(JobDead) as dead:
        client.job("foreign-2").result(timeout=60)
    assert dead.value.code == "undecodable"
    assert worker.is_running


def test_an_undecodable_stream_entry_is_dead_lettered_and_others_are_served(
    client: Client, worker: WorkerProcess
) -> None:
    keys = QueueKeys(client.settings.queue)
    with redis.Redis.from_url(client.settings.url) as connection:
        connection.xadd(keys.ready(5, "default"), {"nonsense": "1"})
        connection.xadd(keys.ready(5, "default"), {"id": "no-such-job", "t": "1", "cost": "1"})
        assert client.submit("Still here?", max_tokens=4, seed=1).result(timeout=60).token_ids
        until(
            lambda: {letter.code for letter in run(connection, dead_letters(keys))} >= {"undecodable"},
            "the dead letters",
        )
        named = {letter.job_id for letter in run(connection, dead_letters(keys))}
        assert "no-such-job" in named
        assert connection.xlen(keys.ready(5, "default")) == 0
    assert worker.is_running


def test_a_request_for_another_model_says_which_is_served(client: Client, worker: WorkerProcess) -> None:
    with pytest.raises(JobFailed, match="penstock-story"):
        client.submit("x", model="enormous").result(timeout=60)
    assert worker.is_running


def test_an_impossible_schema_fails_and_names_the_field(client: Client, worker: WorkerProcess) -> None:
    with pytest.raises(JobFailed, match="response_format"):
        client.submit("x", response_format={"regex": "(unclosed"}, max_tokens=4).result(timeout=60)
    assert worker.is_running


def test_a_checkpoint_with_a_missing_tensor_is_refused_by_name(server: RedisServer, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(BUNDLED / "penstock-story", folder)
    tensors = load_file(folder / "model.safetensors")
    missing = next(name for name in tensors if name.endswith("o_proj.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != missing}, folder / "model.safetensors")
    worker = WorkerProcess(server.url, tmp_path, "broken", "--model", str(folder))
    assert worker.wait() == ExitCode.MODEL
    assert missing in worker.log
    assert "Traceback" not in worker.log


def test_an_unknown_model_is_refused_by_name(server: RedisServer, tmp_path: Path) -> None:
    worker = WorkerProcess(server.url, tmp_path, "nobody", "--model", str(tmp_path / "nothing"))
    assert worker.wait() == ExitCode.MODEL
    assert "nothing" in worker.log
    assert "Traceback" not in worker.log


def test_a_wrong_flag_is_refused_by_name(server: RedisServer, tmp_path: Path) -> None:
    worker = WorkerProcess(server.url, tmp_path, "flags", "--max-num-sequences", "0")
    assert worker.wait() == ExitCode.USAGE
    assert "max-num-sequences" in worker.log


def test_a_wrong_password_ends_the_worker_with_a_remedy(
    start_redis: Callable[..., RedisServer], tmp_path: Path
) -> None:
    server = start_redis()
    with server.client() as admin:
        admin.config_set("requirepass", "secret")
    worker = WorkerProcess(server.url, tmp_path, "stranger")
    assert worker.wait() == ExitCode.BROKER
    assert "Traceback" not in worker.log


def test_a_worker_waits_for_a_redis_that_is_down(
    start_redis: Callable[..., RedisServer], tmp_path: Path, queue: str
) -> None:
    server = start_redis()
    server.kill()
    worker = WorkerProcess(server.url, tmp_path, "early", "--queue", queue)
    try:
        until(lambda: "waiting for Redis" in worker.log, "the worker to say what it waits for")
        server.start()
        with Client(server.url, queue=queue) as client:
            assert client.submit("At last", max_tokens=4, seed=1).result(timeout=90).token_ids
        worker.terminate()
        assert worker.wait() == 0, worker.log
    finally:
        worker.end()
