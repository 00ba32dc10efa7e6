"""What a flow asks of the world: the few kinds of I/O that submitting and following a job need.

A flow (see `flows`) is a generator that yields these and is sent the answers; `client` and `aio` perform them, one with
threads, the other with asyncio. Everything else, and so every decision, exists once.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from penstock.feed import Inbox
from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.transitions import Call

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Run:
    """Execute calls in one round trip. Answer: their results, in order."""

    calls: Sequence[Call[Any]]


@dataclass(frozen=True, slots=True)
class RunToDisk:
    """Execute calls, then WAITAOF on the same connection. Answer: (results, how many disks of the server have it)."""

    calls: Sequence[Call[Any]]
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Command:
    """Execute one plain Redis command. Answer: its reply; an error reply is raised as redis-py's ResponseError."""

    words: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Confirm:
    """Wait until the server has acknowledged the subscription to a channel. Answer: None."""

    channel: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait until something is pushed into the inbox (if there is one), or the time is over. Answer: None."""

    inbox: Inbox | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Emit:
    """Hand a chunk to whoever iterates. Answer: None, when the next one is wanted."""

    chunk: TokenChunk


Effect = Run | RunToDisk | Command | Confirm | Pause | Emit
Flow = Generator[Effect, Any, T]
"""Effects out, answers in, and a return value; every effect but Emit and Pause may raise `BrokerUnavailable`."""
