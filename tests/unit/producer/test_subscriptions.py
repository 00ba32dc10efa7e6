"""A channel is open once the server said so, and its owner hears of every interruption."""

from __future__ import annotations

import pytest

from penstock.subscriptions import Message, Subscriptions, parse_reply


def ignore(_: bytes) -> None:
    """Deliver to nobody."""


def unheard() -> None:
    """Tell nobody of an interruption."""


def subscribe(subscriptions: Subscriptions, name: str, log: list[str]) -> None:
    if subscriptions.add(name, ignore, lambda: log.append(name)):
        subscriptions.sent(name)


def acknowledge(subscriptions: Subscriptions, name: str) -> None:
    interrupted = subscriptions.acknowledged(name)
    if interrupted is not None:
        interrupted()


def test_only_an_acknowledged_channel_is_open() -> None:
    subscriptions = Subscriptions()
    log: list[str] = []
    subscribe(subscriptions, "a", log)
    assert not subscriptions.is_confirmed("a")
    acknowledge(subscriptions, "a")
    assert subscriptions.is_confirmed("a")
    assert log == [], "the first time, nothing was missed"


def test_after_a_reconnection_the_owner_is_told_once_the_channel_is_open_again() -> None:
    subscriptions = Subscriptions()
    log: list[str] = []
    subscribe(subscriptions, "a", log)
    acknowledge(subscriptions, "a")
    assert subscriptions.disconnected()
    assert not subscriptions.is_confirmed("a")
    assert not subscriptions.disconnected()
    assert log == []
    for name in subscriptions.names:
        subscriptions.sent(name)
    acknowledge(subscriptions, "a")
    assert log == ["a"]


def test_the_answer_to_an_earlier_command_opens_no_channel_that_was_dropped_since() -> None:
    """SUBSCRIBE, UNSUBSCRIBE, SUBSCRIBE under way: after the first answer the server is about to close the channel."""
    subscriptions = Subscriptions()
    log: list[str] = []
    subscribe(subscriptions, "a", log)
    assert subscriptions.remove("a")
    subscribe(subscriptions, "a", log)
    acknowledge(subscriptions, "a")
    assert not subscriptions.is_confirmed("a")
    acknowledge(subscriptions, "a")
    assert subscriptions.is_confirmed("a")


def test_a_channel_stays_open_for_its_last_user() -> None:
    subscriptions = Subscriptions()
    assert subscriptions.add("a", ignore, unheard)
    assert not subscriptions.add("a", ignore, unheard)
    assert not subscriptions.remove("a")
    assert subscriptions.receiver("a") is ignore
    assert subscriptions.remove("a")
    assert not subscriptions.remove("a")
    assert subscriptions.receiver("a") is None
    acknowledge(subscriptions, "a")
    assert not subscriptions.is_confirmed("a")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ([b"message", b"a", b"payload"], Message("message", "a", b"payload")),
        ([b"subscribe", b"a", 1], Message("subscribe", "a", b"")),
        (["message", "a", b"x"], Message("message", "a", b"x")),
        ([b"unsubscribe", None, 0], None),
        ([b"pong", b""], None),
        (b"PONG", None),
        (None, None),
    ],
)
def test_replies_of_both_protocol_versions_are_understood(reply: object, message: Message | None) -> None:
    assert parse_reply(reply) == message
