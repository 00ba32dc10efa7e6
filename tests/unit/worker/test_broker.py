"""The broker: what makes Redis unusable for a while is an outage; what a command did wrong is not."""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from typing import Any

import fakeredis
import pytest
from redis import exceptions

from penstock_core.protocol.errors import BrokerUnavailable
from penstock_worker.broker import Broker
from tests.unit.worker.doubles import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def plain_broker(clock: Clock) -> Broker:
    return Broker(fakeredis.FakeAsyncRedis(protocol=2), "redis://user:secret@host", clock=clock)


async def answer(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


def guarded(broker: Broker, value: Any) -> Awaitable[Any]:
    return broker.guard(answer(value))


@pytest.mark.parametrize(
    "error",
    [
        exceptions.ConnectionError("reset by peer"),
        exceptions.TimeoutError("no answer"),
        ConnectionRefusedError("nobody listens"),
        exceptions.BusyLoadingError("loading the dataset"),
        exceptions.ReadOnlyError("You can't write against a read only replica."),
        exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        exceptions.ResponseError("MISCONF Redis is configured to save RDB snapshots"),
        exceptions.ResponseError("ERR Error running script: @user_script: 1: -OOM command not allowed"),
    ],
)
async def test_a_passing_trouble_is_an_outage(plain_broker: Broker, error: Exception) -> None:
    with pytest.raises(BrokerUnavailable):
        await guarded(plain_broker, error)
    assert not plain_broker.available
    assert await guarded(plain_broker, 1) == 1
    assert plain_broker.available
    assert plain_broker.outages == 1


async def test_the_time_of_day_is_no_sign_that_redis_is_back(plain_broker: Broker) -> None:
    """It is told while the data is still being loaded, when nothing else is."""
    with pytest.raises(BrokerUnavailable):
        await guarded(plain_broker, exceptions.BusyLoadingError("loading the dataset"))
    await plain_broker.compare_clocks()
    assert not plain_broker.available


async def test_only_an_outage_that_lasted_is_remembered(plain_broker: Broker, clock: Clock) -> None:
    for lasted_s, remembered in ((0.05, float("-inf")), (0.5, clock.now + 0.55)):
        with pytest.raises(BrokerUnavailable):
            await guarded(plain_broker, exceptions.ConnectionError("reset by peer"))
        clock.tick(lasted_s)
        await guarded(plain_broker, 1)
        assert plain_broker.back_since == pytest.approx(remembered)


async def test_a_wrong_command_is_no_outage(plain_broker: Broker) -> None:
    with pytest.raises(exceptions.ResponseError):
        await guarded(plain_broker, exceptions.ResponseError("WRONGTYPE Operation against a key"))
    assert plain_broker.available


async def test_an_outage_is_logged_once_when_it_begins_and_once_when_it_ends(
    plain_broker: Broker, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "penstock_worker.broker")
    for _ in range(5):
        with pytest.raises(BrokerUnavailable):
            await guarded(plain_broker, exceptions.ConnectionError("gone"))
        clock.tick(1.0)
    await guarded(plain_broker, 1)
    await guarded(plain_broker, 1)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert vars(caplog.records[1])["away_s"] == 5.0
    assert "secret" not in caplog.text


async def test_the_servers_clock_is_followed_without_asking_again(plain_broker: Broker, clock: Clock) -> None:
    server_ms = await plain_broker.compare_clocks()
    clock.tick(2.5)
    assert plain_broker.server_now_ms() == pytest.approx(server_ms + 2500, abs=1)
