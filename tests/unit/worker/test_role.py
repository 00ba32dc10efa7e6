"""A role never ends by itself: it waits outages out, logs and counts surprises, and stops when told."""

from __future__ import annotations

import asyncio

import pytest

from penstock_core.protocol.errors import BrokerUnavailable
from penstock_worker.role import Backoff, RoleLoop


def test_backoff_is_jittered_and_bounded_and_resets() -> None:
    backoff = Backoff(base_s=0.1, cap_s=1.0, draw=lambda: 1.0)
    assert [backoff.next_s() for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    backoff.reset()
    assert backoff.next_s() == 0.1
    assert Backoff(draw=lambda: 0.0).next_s() == 0.0


@pytest.mark.parametrize("error", [BrokerUnavailable("away"), ValueError("a bug")])
async def test_it_goes_on_after_an_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock_worker.role.Backoff.next_s", lambda self: 0.0)
    recovered = asyncio.Event()
    failed: list[str] = []
    turns = 0

    async def iterate() -> None:
        nonlocal turns
        turns += 1
        if turns < 4:
            raise error
        recovered.set()
        await asyncio.sleep(3600)

    role = RoleLoop("test", iterate, failed.append)
    role.start()
    await asyncio.wait_for(recovered.wait(), 60)
    await role.shutdown()
    assert failed == ([] if isinstance(error, BrokerUnavailable) else ["test"] * 3)


async def test_shutdown_is_heard_even_where_a_library_swallows_the_first_cancellation() -> None:
    """redis-py, interrupted in the middle of a reply, can swallow a CancelledError; the role then went on for ever."""
    swallowed = asyncio.Event()

    async def iterate() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if swallowed.is_set():
                raise
            swallowed.set()

    role = RoleLoop("deaf", iterate, lambda name: None)
    role.start()
    await asyncio.sleep(0)
    await asyncio.wait_for(role.shutdown(), 60)
    assert swallowed.is_set()


async def test_a_role_that_was_never_started_can_be_shut_down() -> None:
    await RoleLoop("idle", lambda: asyncio.sleep(0), lambda name: None).shutdown()
