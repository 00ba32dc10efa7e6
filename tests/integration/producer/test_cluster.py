"""The client over Redis Cluster: its queue's keys share a slot, and any node carries its messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from penstock import InvalidRequest
from penstock_core.protocol.connection import connect
from penstock_core.protocol.keys import QueueKeys
from tests.integration.producer.conftest import FACES, BlockingClient
from tests.integration.producer.scripted import BusyWorker
from tests.redis_server import RedisServer
from tests.worker_process import until

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster_url(start_redis: Callable[..., RedisServer]) -> str:
    """A cluster of one node that has every slot."""
    server = start_redis(None, "--cluster-enabled", "yes")
    with server.client() as client:
        client.execute_command("CLUSTER ADDSLOTS", *range(16384))
        until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "the cluster")
    return server.url.replace("redis://", "redis+cluster://")


@pytest.mark.parametrize("face", FACES, ids=lambda face: face[0])
def test_a_cluster_carries_jobs_and_their_tokens(cluster_url: str, face: tuple[str, Callable[..., Any], str]) -> None:
    name, kind, mode = face
    with BusyWorker(lambda: connect(cluster_url), QueueKeys(name)), kind(cluster_url, queue=name, mode=mode) as sdk:
        job = sdk.submit("story", max_tokens=20)
        assert [token for chunk in job.stream(timeout=30) for token in chunk.token_ids] == list(range(20))
        assert job.result(timeout=30).token_ids == tuple(range(20))
        assert len(list(sdk.job(job.id).stream(from_offset=18, timeout=30))) == 2
        assert len(sdk.submit_many(["story"] * 600)) == 600
        assert sdk.queue_snapshot().stats["submitted"] == 601
        assert len(sdk.jobs(limit=1000)) == 601
        with pytest.raises(InvalidRequest, match="in a cluster"):
            sdk.submit("story", durability="fsync")
    if isinstance(sdk, BlockingClient):
        sdk.end_loop()
