"""Workers that torchrun starts: two groups on loopback stand for two hosts, and serve one model together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from penstock import Client
from tests.redis_server import RedisServer, free_port
from tests.worker_process import snapshot, until

pytestmark = pytest.mark.integration


@pytest.fixture
def two_hosts(server: RedisServer, client: Client, tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    port = free_port()
    agents = []
    for host in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--node-rank", str(host), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        command += ["-m", "penstock_worker", "--redis-url", server.url, "--queue", client.settings.queue]
        command += ["--pipeline-parallel", "2", "--threads", "1", "--device", "cpu", "--max-model-len", "512"]
        with (tmp_path / f"host-{host}.log").open("wb") as log:
            agents.append(subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    yield agents
    for agent in agents:
        if agent.poll() is None:
            for process in [*psutil.Process(agent.pid).children(recursive=True), agent]:
                process.kill()


def test_one_model_over_two_hosts_until_it_is_drained(
    client: Client, two_hosts: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    def logs() -> str:
        return "\n".join(path.read_text() for path in sorted(tmp_path.glob("host-*.log")))

    def ready() -> bool:
        assert all(agent.poll() is None for agent in two_hosts), logs()
        return bool(snapshot(client).workers)

    until(ready, "the worker")
    record = snapshot(client).workers[0].record
    assert record is not None
    assert record.ranks == 2
    assert len(client.submit("Once upon a time", max_tokens=8, seed=1).result(timeout=60).token_ids) == 8
    os.kill(record.pid, signal.SIGTERM)  # rank 0 drains, and tells the other to stop
    assert [agent.wait(timeout=90) for agent in two_hosts] == [0, 0], logs()
    assert not snapshot(client).workers
