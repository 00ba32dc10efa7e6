"""Which channels a reader connection listens to, and what the server has confirmed of it. No I/O.

PUBLISH before SUBSCRIBE is acknowledged reaches nobody, so a channel counts as open only once the server said so; and
after a reconnection everything published in between is gone, which the channel's owner is told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class _Channel:
    deliver: Callable[[bytes], None]
    interrupted: Callable[[], None]
    users: int = 1
    confirmed: bool = False
    was_confirmed: bool = False


class Subscriptions:
    """The channels of one reader connection. Not thread-safe: its reader guards it."""

    def __init__(self) -> None:
        self._channels: dict[str, _Channel] = {}
        self._unanswered: dict[str, int] = {}  # SUBSCRIBE commands sent and not yet acknowledged

    @property
    def names(self) -> list[str]:
        """Channels to subscribe to on a fresh connection."""
        return list(self._channels)

    def add(self, name: str, deliver: Callable[[bytes], None], interrupted: Callable[[], None]) -> bool:
        """One more user of a channel; whether SUBSCRIBE must be sent.

        Args:
            name: the channel.
            deliver: called with each message.
            interrupted: called when the channel is open again after a time in which messages were missed.
        """
        channel = self._channels.get(name)
        if channel is not None:
            channel.users += 1
            return False
        self._channels[name] = _Channel(deliver, interrupted)
        return True

    def remove(self, name: str) -> bool:
        """One user less; whether UNSUBSCRIBE must be sent."""
        channel = self._channels.get(name)
        if channel is None:
            return False
        channel.users -= 1
        if channel.users:
            return False
        del self._channels[name]
        return True

    def sent(self, name: str) -> None:
        """SUBSCRIBE was sent for the channel."""
        self._unanswered[name] = self._unanswered.get(name, 0) + 1

    def disconnected(self) -> bool:
        """The connection is gone, and with it every subscription; returns whether any had been confirmed on it."""
        self._unanswered.clear()
        worked = any(channel.confirmed for channel in self._channels.values())
        for channel in self._channels.values():
            channel.confirmed = False
        return worked

    def is_confirmed(self, name: str) -> bool:
        """Whether messages published from now on arrive."""
        channel = self._channels.get(name)
        return channel is not None and channel.confirmed

    def acknowledged(self, name: str) -> Callable[[], None] | None:
        """The server acknowledged a SUBSCRIBE; returns whom to tell of an interruption that is now over.

        A channel that was dropped and wanted again has several commands under way; only the last one counts.
        """
        left = self._unanswered[name] = self._unanswered.get(name, 1) - 1
        if left > 0:
            return None
        self._unanswered.pop(name, None)
        channel = self._channels.get(name)
        if channel is None:
            return None
        again, channel.confirmed, channel.was_confirmed = channel.was_confirmed, True, True
        return channel.interrupted if again else None

    def receiver(self, name: str) -> Callable[[bytes], None] | None:
        """Who gets the messages of the channel."""
        channel = self._channels.get(name)
        return channel.deliver if channel is not None else None


@dataclass(frozen=True, slots=True)
class Message:
    """One reply on a subscribed connection, whichever protocol version carried it."""

    kind: str
    channel: str
    payload: bytes


def parse_reply(reply: Any) -> Message | None:
    """The message in a reply, or None for a pong and other replies that concern no channel."""
    if not isinstance(reply, list) or len(reply) != 3:
        return None
    kind, channel, payload = reply
    if not isinstance(channel, bytes | str):
        return None
    return Message(_text(kind), _text(channel), payload if isinstance(payload, bytes) else b"")


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()
