"""What goes wrong in practice with queues on Redis Streams, one test each, on every server there is.

Most of it comes with consumer groups, which Penstock does not use: these tests show that it cannot happen here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import redis

from penstock_core.protocol import transitions as t
from penstock_core.protocol.connection import connect
from penstock_core.protocol.keys import QueueKeys
from tests.queue_driver import LEASE_MS, REQUEST, QueueDriver
from tests.redis_server import RedisServer, server_binaries

pytestmark = pytest.mark.integration


@pytest.fixture(params=list(server_binaries()))
def driver(
    request: pytest.FixtureRequest, shared_servers: Callable[[str], RedisServer], keys: QueueKeys
) -> Iterator[QueueDriver]:
    """A queue on every server in turn, through a connection as the product makes it."""
    with connect(shared_servers(request.param).url) as client:
        yield QueueDriver(client, keys)
        for key in client.scan_iter(f"{keys.prefix}*", count=1000):
            client.delete(key)


def ready(driver: QueueDriver) -> str:
    return driver.keys.ready(5, "default")


def test_scan_limit_hundreds_of_live_long_jobs_hide_no_lost_one(driver: QueueDriver) -> None:
    """XAUTOCLAIM looks at COUNT x 10 entries from the oldest, and never gets past many live ones."""
    driver.submit_all([driver.new_job() for _ in range(800)])
    holds = [(job.job_id, 1) for job in driver.claim("alive", 800)]
    lost = driver.submit()
    driver.take("gone")
    driver.tick(LEASE_MS - 1)
    driver.renew("alive", *holds)
    driver.tick(1)
    assert driver.reclaim(limit=5).requeued == [lost]


def test_blocked_readers_take_neither_a_batch_nor_the_wrong_job(driver: QueueDriver) -> None:
    """A blocked XREADGROUP over several streams is not served in key order; one reader takes a whole MULTI batch."""
    with driver.listening(driver.keys.bell) as heard:  # the workers sleep at the bell
        driver.submit_all([driver.new_job(f"p{priority}", priority=priority) for priority in (2, 9, 5)])
    assert [data for _, data in heard] == [b"job"], "one ring wakes everybody, and gives nobody anything"
    assert [driver.claim_ids(worker, 1) for worker in ("w1", "w2", "w3")] == [["p9"], ["p5"], ["p2"]]


def test_zombie_acks_remove_nothing(driver: QueueDriver) -> None:
    """XACK does not ask who owns an entry, and XCLAIM as a heartbeat steals a job back from its new owner."""
    job_id = driver.submit()
    driver.take("zombie")
    driver.tick(LEASE_MS)
    driver.reclaim()
    driver.take("heir")
    assert driver.renew("zombie", (job_id, 1)) == ["fenced"]
    assert driver.finish("zombie", driver.final(job_id, 1)) == ["fenced"]
    assert driver.release("zombie", (job_id, 1)) == ["fenced"]
    status = driver.status(job_id)
    assert (status.state, status.owner, status.attempt) == ("running", "heir", 2)
    assert driver.finish("heir", driver.final(job_id, 2)) == ["ok"]


@pytest.mark.parametrize(
    "trim",
    [lambda client, key: client.xtrim(key, maxlen=1, approximate=False), lambda client, key: client.delete(key)],
    ids=["trimmed", "deleted"],
)
def test_trimmed_and_vanished_streams_lose_no_job(
    driver: QueueDriver, trim: Callable[[redis.Redis, str], object]
) -> None:
    """MAXLEN drops entries nobody has acknowledged. Ours are pointers, made anew from the jobs."""
    names = [driver.submit(), driver.submit(), driver.submit()]
    assert not any(driver.run(t.missing(driver.keys)))
    trim(driver.client, ready(driver))
    assert driver.run(t.missing(driver.keys)).queued >= 2
    assert set(driver.run(t.mend(driver.keys, names, driver.now))) >= set(names[:2])
    assert not any(driver.run(t.missing(driver.keys)))
    assert driver.run(t.mend(driver.keys, names, driver.now)) == []
    assert sorted(driver.claim_ids("w1", 10)) == names
    assert driver.claim("w1", 10) == []
    assert driver.run(t.dead_letters(driver.keys)) == []
    assert driver.stats()["queued"] == 0


def test_vanished_indexes_lose_no_job(driver: QueueDriver) -> None:
    """A vanished consumer group loses what it had given out; ours are indexes, made anew from the jobs."""
    waiting, delayed = driver.submit("waiting"), driver.submit("delayed", delay_s=60.0)
    running = driver.submit("running", priority=9)
    driver.take("gone")
    keys = driver.keys
    driver.client.delete(keys.heads(5), keys.fair(5), keys.leases, keys.delayed, keys.held("gone"))
    assert driver.claim("w1", 5) == [], "nobody can find it"
    assert driver.run(t.missing(keys)) == (1, 1, 1)
    assert sorted(driver.run(t.mend(keys, [waiting, running, delayed], driver.now))) == sorted(
        [waiting, running, delayed]
    )
    assert not any(driver.run(t.missing(keys)))
    assert driver.claim_ids("w1", 5) == [waiting]
    driver.finish("w1", driver.final(waiting, 1))
    driver.tick(60_000)
    outcome = driver.reclaim()
    assert (outcome.requeued, outcome.promoted) == ([running], 1)
    assert driver.claim_ids("w1", 5) == [running, delayed]


def test_a_live_worker_s_lease_that_vanished_is_made_anew_and_kept_up(driver: QueueDriver) -> None:
    job_id = driver.submit()
    driver.take("alive")
    driver.client.delete(driver.keys.leases)
    driver.run(t.mend(driver.keys, [job_id], driver.now))
    for _ in range(5):
        driver.tick(10_000)
        assert driver.renew("alive", (job_id, 1)) == ["ok"]
        assert driver.reclaim().requeued == []


def test_undecodable_entries_are_set_aside_and_hold_up_nobody(driver: QueueDriver) -> None:
    driver.client.xadd(ready(driver), {"nonsense": b"\xff"})
    driver.client.xadd(ready(driver), {"id": "nobody", "t": driver.now, "cost": 1, "tag": ""})
    good = driver.submit()
    assert driver.claim_ids("w1", 5) == [good]
    assert [letter.code for letter in driver.run(t.dead_letters(driver.keys))] == ["undecodable"] * 2


def test_there_is_no_group_to_vanish_and_no_consumer_to_delete(driver: QueueDriver) -> None:
    """XGROUP DELCONSUMER loses its pending entries, and a group created at $ misses what was there before."""
    driver.submit_all([driver.new_job() for _ in range(4)])
    driver.claim("w1", 2)
    assert driver.client.xinfo_groups(ready(driver)) == []
    driver.run(t.deregister(driver.keys, "w1", driver.now))
    assert len(driver.claim("w2", 10)) == 4


def test_depth_is_exact_after_a_cancellation(driver: QueueDriver) -> None:
    """Deleting an entry that was not delivered makes a group's lag unknown, and autoscalers blind."""
    names = [driver.submit() for _ in range(5)]
    driver.cancel(names[2])
    assert sum(line.depth for line in driver.snapshot().lines) == driver.stats()["queued"] == 4


def test_a_stream_holds_pointers_and_no_payloads(driver: QueueDriver) -> None:
    """Deleting 95 % of a stream's entries frees 5 % of its memory."""
    driver.submit()
    ((_, fields),) = driver.client.xrange(ready(driver))
    assert set(fields) == {b"id", b"t", b"cost", b"tag"}
    assert REQUEST not in fields.values()
    driver.take()
    assert not driver.client.exists(ready(driver)), "a claimed pointer is gone, and so is its stream"
