"""The reclaim role: nobody's jobs are taken without proof, and there is none while others may be on their way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from redis.exceptions import NoPermissionError

from penstock_core.protocol import transitions
from penstock_core.protocol.errors import BrokerUnavailable
from penstock_core.protocol.jobs import JobState
from penstock_core.protocol.workers import WorkerRecord
from penstock_worker.doorbell import bell_name
from penstock_worker.presence import SETTLE_S, Presence
from penstock_worker.reclaim import Reclaimer, take_back_from
from tests.unit.worker.conftest import WORKER, Bench


@dataclass
class Bell:
    """A doorbell that is up, on a server it knows since a moment of the bench's clock."""

    client_id: int | None = 1
    server_since: float = 0.0


@dataclass
class Clients:
    """CLIENT LIST, which fakeredis lacks: connection ids with their names."""

    names: dict[int, str] = field(default_factory=dict)
    refusal: Exception | None = None
    asked: int = 0

    async def list(self, client_id: list[int] | None = None, _type: str | None = None) -> list[dict[str, str]]:
        self.asked += 1
        if self.refusal is not None:
            raise self.refusal
        if client_id is None:
            assert _type == "pubsub"
            client_id = list(self.names)
        return [{"id": str(one), "name": self.names[one]} for one in client_id if one in self.names]


@pytest.fixture
def clients(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Clients:
    made = Clients()
    monkeypatch.setattr(bench.broker.client, "client_list", made.list)
    return made


@pytest.fixture
def bell() -> Bell:
    return Bell()


@pytest.fixture
def reclaimer(bench: Bench, bell: Bell, clients: Clients) -> Reclaimer:
    doorbell: Any = bell
    presence = Presence(bench.broker, bench.keys, doorbell, worker_id=WORKER, heartbeat_s=1.0, clock=bench.clock)
    return Reclaimer(bench.broker, bench.keys, presence, bench.metrics, tick_s=0.5)


def beat(bench: Bench, worker: str, *, age_ms: int, connection: int = 7) -> None:
    """A worker that was heard of `age_ms` ago."""
    seconds, micros = bench.driver.client.time()
    record = WorkerRecord(worker, connection_id=connection).encode()
    now_ms = seconds * 1000 + micros // 1000 - age_ms
    bench.driver.run(transitions.renew(bench.keys, worker, [], lease_ms=15_000, record=record, now_ms=now_ms))


async def test_a_worker_without_heartbeat_and_connection_loses_its_jobs(bench: Bench, reclaimer: Reclaimer) -> None:
    job_id = bench.submit()
    bench.driver.take("gone")
    beat(bench, "gone", age_ms=1500)
    await reclaimer.tick()
    status = bench.driver.status(job_id)
    assert (status.state, status.crashes, status.errors) == (JobState.QUEUED, 1, 0)
    assert bench.counter("reclaimed_jobs") == 1
    assert [worker.worker_id for worker in bench.driver.snapshot().workers] == []


async def test_every_job_taken_back_has_its_line(
    bench: Bench, reclaimer: Reclaimer, caplog: pytest.LogCaptureFixture
) -> None:
    bench.driver.set_config(max_crashes=2)
    twice, once = bench.submit(), bench.submit()
    bench.driver.take("gone")
    beat(bench, "gone", age_ms=1500)
    with caplog.at_level("INFO", "penstock_worker"):
        await reclaimer.tick()
        bench.driver.claim("gone", 2)
        beat(bench, "gone", age_ms=1500)
        await reclaimer.tick()
    told = [(line.job, line.attempt, line.levelname) for line in caplog.records if hasattr(line, "job")]
    assert told[0] == (twice, 1, "INFO")
    assert sorted(told[1:]) == sorted([(twice, 2, "ERROR"), (once, 1, "INFO")])


async def test_a_late_worker_whose_connection_stands_keeps_its_jobs(
    bench: Bench, reclaimer: Reclaimer, clients: Clients
) -> None:
    job_id = bench.submit()
    bench.driver.take("busy")
    beat(bench, "busy", age_ms=5000)
    clients.names[7] = bell_name("busy")
    await reclaimer.tick()
    assert bench.driver.state(job_id) == "running"


async def test_a_stranger_on_the_dead_workers_connection_id_is_not_taken_for_it(
    bench: Bench, reclaimer: Reclaimer, clients: Clients
) -> None:
    """After a restart Redis counts connections from the beginning again."""
    job_id = bench.submit()
    bench.driver.take("gone")
    beat(bench, "gone", age_ms=1500)
    clients.names[7] = bell_name("somebody-else")
    await reclaimer.tick()
    assert bench.driver.state(job_id) == "queued"


async def test_a_worker_with_a_fresh_heartbeat_is_not_even_asked_for(
    bench: Bench, reclaimer: Reclaimer, clients: Clients
) -> None:
    job_id = bench.submit()
    bench.driver.take("fine")
    beat(bench, "fine", age_ms=500)
    await reclaimer.tick()
    assert bench.driver.state(job_id) == "running"
    assert clients.asked == 0


@pytest.mark.parametrize("reason", ["another run of the server", "an outage", "our own doorbell is away"])
async def test_while_others_may_be_on_their_way_back_only_leases_count(
    bench: Bench, reclaimer: Reclaimer, bell: Bell, reason: str
) -> None:
    """When Redis comes back every heartbeat is old, and the others' connections are not there yet."""
    job_id = bench.submit()
    bench.driver.take("reconnecting")
    beat(bench, "reconnecting", age_ms=4000)
    if reason == "another run of the server":
        bell.server_since = bench.clock.now
    elif reason == "an outage":
        bench.broker.fail("before")
        with pytest.raises(BrokerUnavailable):
            await reclaimer.tick()
        bench.clock.tick(0.5)
    else:
        bell.client_id = None
    await reclaimer.tick()
    assert bench.driver.state(job_id) == "running"
    bell.client_id = 1
    bench.clock.tick(SETTLE_S)
    await reclaimer.tick()
    assert bench.driver.state(job_id) == "queued"


async def test_a_single_lost_connection_delays_no_takeover(bench: Bench, reclaimer: Reclaimer) -> None:
    """Until this was told apart from an outage, every reconnect put takeover off by five seconds."""
    bench.broker.fail("before")
    with pytest.raises(BrokerUnavailable):
        await reclaimer.tick()
    bench.clock.tick(0.05)
    job_id = bench.submit()
    bench.driver.take("gone")
    beat(bench, "gone", age_ms=1500)
    await reclaimer.tick()
    assert bench.driver.state(job_id) == "queued"


async def test_a_worker_whose_bell_is_connected_anew_keeps_its_jobs(
    bench: Bench, reclaimer: Reclaimer, clients: Clients
) -> None:
    """Its record names the old connection as long as its heartbeat is stuck on a connection of its own."""
    job_id = bench.submit()
    bench.driver.take("stuck")
    beat(bench, "stuck", age_ms=4000, connection=7)
    clients.names[8] = bell_name("stuck")
    await reclaimer.tick()
    assert bench.driver.state(job_id) == "running"


async def test_a_worker_of_unknown_connection_keeps_its_jobs_until_the_lease_ends(
    bench: Bench, reclaimer: Reclaimer
) -> None:
    job_id = bench.submit()
    bench.driver.take("mute")
    beat(bench, "mute", age_ms=4000, connection=0)
    await reclaimer.tick()
    assert bench.driver.state(job_id) == "running"
    bench.driver.client.zadd(bench.keys.leases, {job_id: 1})
    await reclaimer.tick()
    assert bench.driver.state(job_id) == "queued"


async def test_where_clients_may_not_be_listed_leases_decide(
    bench: Bench, reclaimer: Reclaimer, clients: Clients
) -> None:
    clients.refusal = NoPermissionError("this user has no permissions to run the 'client|list' command")
    job_id = bench.submit()
    bench.driver.take("gone")
    beat(bench, "gone", age_ms=1500)
    await reclaimer.tick()
    await reclaimer.tick()
    assert bench.driver.state(job_id) == "running"
    assert clients.asked == 1, "it is asked once"


async def test_several_gone_workers_are_dealt_with_one_after_another(bench: Bench, reclaimer: Reclaimer) -> None:
    names = [bench.submit() for _ in range(3)]
    for worker in ("a", "b", "c"):
        bench.driver.take(worker)
        beat(bench, worker, age_ms=1500)
    ticks = 1
    while await reclaimer.tick():
        ticks += 1
    assert ticks == 3
    assert {bench.driver.state(name) for name in names} == {"queued"}


async def test_a_worker_that_held_more_than_one_call_takes_is_emptied_in_several(
    bench: Bench, reclaimer: Reclaimer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock_worker.reclaim._LIMIT", 2)
    names = [bench.submit() for _ in range(5)]
    bench.driver.claim("gone", 5)
    beat(bench, "gone", age_ms=1500)
    ticks = 1
    while await reclaimer.tick():
        ticks += 1
    assert ticks == 3
    assert {bench.driver.state(name) for name in names} == {"queued"}


async def test_one_call_a_tick_where_nobody_is_missing(bench: Bench, reclaimer: Reclaimer) -> None:
    beat(bench, "fine", age_ms=100)
    calls = bench.broker.calls
    await reclaimer.tick()
    assert bench.broker.calls - calls <= 3, "the clock, the heartbeats, the upkeep"


async def test_a_worker_does_not_reclaim_from_itself(bench: Bench, reclaimer: Reclaimer) -> None:
    (job,) = await bench.hold()
    beat(bench, WORKER, age_ms=5000)
    await reclaimer.tick()
    assert bench.driver.state(job.job_id) == "running"


async def test_all_jobs_of_a_worker_known_to_be_dead_come_back_at_once(bench: Bench) -> None:
    names = [bench.submit() for _ in range(150)]
    bench.driver.claim("dead", 150)
    beat(bench, "dead", age_ms=0)
    outcome = await take_back_from(bench.broker, bench.keys, "dead")
    assert sorted(outcome.requeued) == sorted(names)
    assert {bench.driver.status(name).crashes for name in names} == {1}


async def test_nothing_comes_back_from_a_worker_that_signed_off(bench: Bench) -> None:
    assert (await take_back_from(bench.broker, bench.keys, "nobody")).requeued == []


async def test_due_jobs_become_ready_and_passed_deadlines_end_waiting_jobs(bench: Bench, reclaimer: Reclaimer) -> None:
    bench.submit("later", delay_s=1000.0)
    bench.driver.client.zadd(bench.keys.delayed, {"later": 1})
    bench.submit("late", deadline_s=1000.0)
    bench.driver.client.zadd(bench.keys.deadlines, {"late": 1})
    bench.driver.client.hset(bench.keys.job("late"), "deadline", 1)
    await reclaimer.tick()
    assert bench.driver.state("later") == "queued"
    assert bench.driver.ended("late").state is JobState.EXPIRED
    assert bench.counter("promoted_jobs") == 1
