"""Requests of an API key: one bucket of a minute's worth in Redis, whoever asks for it."""

from __future__ import annotations

import pytest

from penstock_core.protocol import transitions as t
from tests.queue_driver import QueueDriver

PER_MINUTE = 4


@pytest.fixture
def ask(driver: QueueDriver):
    return lambda key="k1", rate=PER_MINUTE: driver.run(t.charge_request(driver.keys, key, rate, now_ms=driver.now))


def test_a_minutes_worth_passes_at_once_and_then_one_as_it_refills(driver: QueueDriver, ask) -> None:
    assert [ask() for _ in range(PER_MINUTE)] == [0.0] * PER_MINUTE
    assert ask() == 15.0
    driver.tick(14_000)
    assert ask() == 1.0, "what was refused is not charged"
    driver.tick(1_000)
    assert (ask(), ask()) == (0.0, 15.0)


def test_an_idle_bucket_holds_no_more_than_a_minutes_worth(driver: QueueDriver, ask) -> None:
    ask()
    driver.tick(3_600_000)
    assert [ask() > 0 for _ in range(PER_MINUTE + 1)] == [False] * PER_MINUTE + [True]


def test_keys_are_counted_apart_and_a_lower_limit_holds_at_once(driver: QueueDriver, ask) -> None:
    ask("k1", 100)
    assert [ask("k1", 1), ask("k1", 1)] == [0.0, 60.0]
    assert ask("k2", 1) == 0.0
    assert 0 < driver.client.pttl(driver.keys.rate("k1")) <= 60_000
