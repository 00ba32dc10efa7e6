"""One command's connection to its queue, and where the address comes from.

A URL on the command line wins, then PENSTOCK_REDIS_URL, then the `penstock serve` that this user runs on this machine,
then Redis on its usual port.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import redis

    from penstock.client import Client
    from penstock_core.protocol.keys import QueueKeys
    from penstock_core.protocol.script import Call

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Address:
    """A broker and a queue on it."""

    url: str
    queue: str

    @property
    def shown_url(self) -> str:
        """The URL without its password."""
        from penstock_core.protocol.connection import masked

        return masked(self.url)


def locate(redis_url: str | None, queue: str | None) -> Address:
    """Resolve what the command line left open."""
    from penstock import settings

    return Address(*settings.locate(redis_url, queue, None))


@dataclass(frozen=True, slots=True)
class Queue:
    """An open queue: runs transitions, and turns the broker's failures into `BrokerUnavailable`."""

    address: Address
    keys: QueueKeys
    client: redis.Redis

    def run(self, call: Call[T]) -> T:
        """Execute a transition."""
        from penstock_core.protocol.transitions import run

        with self.errors():
            return run(self.client, call)

    def errors(self) -> AbstractContextManager[None]:
        """Turn the failures of plain commands into `BrokerUnavailable`."""
        from penstock_core.protocol.connection import broker_errors

        return broker_errors(self.address.url)


@contextmanager
def open_queue(redis_url: str | None, queue: str | None) -> Iterator[Queue]:
    """Connect to a queue for the duration of a command."""
    from penstock_core.protocol.connection import broker_errors, connect
    from penstock_core.protocol.keys import QueueKeys

    address = locate(redis_url, queue)
    keys = QueueKeys(address.queue)
    client = connect(address.url, client_name="penstock-cli")
    try:
        with broker_errors(address.url):
            yield Queue(address, keys, client)
    finally:
        client.close()


def open_client(address: Address, *, answering: bool = False) -> Client:
    """The SDK's client of a queue.

    With `answering` the broker is asked for a sign of life first: someone who begins to wait for a job is told at once
    that there is no broker, while one that goes away later is borne for a while.
    """
    from penstock.client import Client

    if answering:
        from penstock_core.protocol.connection import broker_errors, connect

        with broker_errors(address.url), connect(address.url) as connection:
            connection.ping()
    return Client(address.url, queue=address.queue)
