"""The Node.js example against a real broker and a real worker: the same seed gives the text the Python client gets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from penstock import Client
from penstock_core.protocol.keys import QueueKeys
from tests.redis_server import RedisServer
from tests.worker_process import WorkerProcess, until

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[3]
INSTALL_TIMEOUT_S, RUN_TIMEOUT_S = 120, 120
QUEUE = "node-example"
PROMPT = "Once upon a time there was a miller"
KINDS: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 0.9, "top_p": 0.95, "seed": 11, "max_tokens": 80},
    "text held back for a stop string": {"temperature": 1.1, "seed": 12, "stop": [" the king", " and the"]},
    "two choices": {"n": 2, "seed": 13, "max_tokens": 40},
}


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example with its packages installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    major = int(
        subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout[1:].split(".")[0]
    )
    if major < 20:
        pytest.skip(f"node {major} is installed, the example needs 20")
    folder = tmp_path_factory.mktemp("node") / "example"
    shutil.copytree(ROOT / "examples" / "node", folder, ignore=shutil.ignore_patterns("node_modules"))
    command = ["npm", "install", "--package-lock=false", "--no-audit", "--no-fund", "--prefer-offline"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm install took longer than {INSTALL_TIMEOUT_S} s")
    if done.returncode:
        pytest.skip(f"npm could not install the example's packages: {done.stderr.strip().splitlines()[-1:]}")
    return folder


@pytest.fixture(scope="module")
def url(example: Path, start_redis: Callable[..., RedisServer]) -> str:
    """A broker of this module's own, where the example can run at all."""
    return start_redis().url


@pytest.fixture(scope="module")
def worker(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """A real worker of the example's queue."""
    made = WorkerProcess(url, tmp_path_factory.mktemp("worker"), "w1", "--queue", QUEUE, "--deterministic")
    try:
        with Client(url, queue=QUEUE) as client:
            made.wait_until_ready(client)
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def client(url: str, worker: WorkerProcess) -> Iterator[Client]:
    """A client of the queue that the worker serves."""
    with Client(url, queue=QUEUE) as made:
        yield made


def start_node(example: Path, client: Client, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PENSTOCK_REDIS_URL": client.settings.url,
        "PENSTOCK_QUEUE": QUEUE,
        "PENSTOCK_SCRIPTS": str(ROOT / "core/penstock_core/protocol/scripts"),
    }
    command = ["node", "main.mjs", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=example, env=environment, stdout=pipe, stderr=pipe, text=True)


def run_node(example: Path, client: Client, *arguments: str) -> subprocess.CompletedProcess[str]:
    with start_node(example, client, *arguments) as process:
        try:
            out, err = process.communicate(timeout=RUN_TIMEOUT_S)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_node_streams_the_text_that_the_python_client_gets(
    example: Path, client: Client, options: dict[str, Any]
) -> None:
    done = run_node(example, client, PROMPT, json.dumps(options))
    assert done.returncode == 0, done.stderr
    result = client.submit(PROMPT, **options).result(timeout=RUN_TIMEOUT_S)
    assert done.stdout == result.text
    job = client.job(done.stderr.split()[1])
    assert job.result(timeout=0).choices == result.choices


def test_node_reads_an_ended_job_from_its_log(example: Path, client: Client) -> None:
    job = client.submit(PROMPT, seed=21, max_tokens=60)
    result = job.result(timeout=RUN_TIMEOUT_S)
    done = run_node(example, client, "--job", job.id)
    assert done.returncode == 0, done.stderr
    assert done.stdout == result.text


def test_node_loses_and_repeats_nothing_when_its_connections_are_cut(
    example: Path, client: Client, worker: WorkerProcess
) -> None:
    """The worker stands still while node starts and while it is cut off, so that both happen in mid-stream."""
    worker.freeze()
    job = client.submit(PROMPT, seed=22, max_tokens=600, ignore_eos=True)
    channel = QueueKeys(QUEUE).channel(job.id)
    with start_node(example, client, "--job", job.id) as process, redis.Redis.from_url(client.settings.url) as admin:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            until(lambda: process.poll() is not None or admin.pubsub_numsub(channel)[0][1], "node to listen")
            worker.thaw()
            text = process.stdout.read(1)
            worker.freeze()
            cut = [admin.client_kill_filter(_type=kind, skipme=True) for kind in ("normal", "pubsub")]
            worker.thaw()
            text += process.stdout.read()
            said = process.stderr.read()
            process.wait(RUN_TIMEOUT_S)
        finally:
            worker.thaw()
            process.kill()
    assert min(cut) >= 1
    assert process.returncode == 0, said
    assert text == job.result(timeout=RUN_TIMEOUT_S).text


def test_node_says_that_a_job_is_unknown(example: Path, client: Client) -> None:
    done = run_node(example, client, "--job", "0" * 32)
    assert done.returncode == 1
    assert "there is no job 000" in done.stderr
