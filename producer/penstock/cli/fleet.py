"""What `penstock top` looks at: the snapshots of one queue, or of every queue of a broker, and sums over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock_core.protocol.keys import EVERY_STATS, QueueKeys, queue_of_stats
from penstock_core.protocol.transitions import QueueSnapshot, WorkerView, snapshot

if TYPE_CHECKING:
    import redis

    from penstock.cli.session import Queue
    from penstock_core.protocol.workers import WorkerRecord

GONE_AFTER_MS = 5000
"""A worker that has been silent for so long is shown as gone, and its rates no longer count."""
_MOST_QUEUES = 256


@dataclass(frozen=True, slots=True)
class Pages:
    """KV pages of all workers."""

    used: int
    cached: int
    total: int

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return self.total - self.used - self.cached


@dataclass(frozen=True, slots=True)
class Fleet:
    """Queues by name, each at about the same moment."""

    queues: Mapping[str, QueueSnapshot]

    @property
    def now_ms(self) -> int:
        """The server's clock."""
        return max((seen.now_ms for seen in self.queues.values()), default=0)

    def total(self, statistic: str) -> int:
        """A counter or gauge, summed over the queues."""
        return sum(seen.stats[statistic] for seen in self.queues.values())

    @property
    def oldest_wait_ms(self) -> int:
        """How long the longest-waiting job has waited."""
        return max((seen.oldest_wait_ms for seen in self.queues.values()), default=0)

    def workers(self) -> Iterator[tuple[str, QueueSnapshot, WorkerView]]:
        """Every worker with its queue."""
        for name, seen in self.queues.items():
            for view in seen.workers:
                yield name, seen, view

    def live_records(self) -> list[WorkerRecord]:
        """The records of the workers that are heard of."""
        return [
            view.record
            for _, seen, view in self.workers()
            if view.record is not None and seen.now_ms - view.heartbeat_ms <= GONE_AFTER_MS
        ]

    @property
    def tokens_per_s(self) -> float:
        """Of all workers."""
        return sum(record.tokens_per_s for record in self.live_records())

    @property
    def pages(self) -> Pages:
        """Of all workers."""
        records = self.live_records()
        return Pages(
            sum(record.used_pages for record in records),
            sum(record.cached_pages for record in records),
            sum(record.total_pages for record in records),
        )

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the prompt tokens that came from prefix caches, 0 to 1."""
        records = self.live_records()
        tokens = sum(record.tokens_in for record in records)
        return sum(record.prefix_hit_rate * record.tokens_in for record in records) / tokens if tokens else 0.0

    @property
    def draft_acceptance(self) -> float | None:
        """Mean share of drafted tokens that were right, over the workers that draft; None where none does."""
        rates = [record.draft_acceptance for record in self.live_records() if record.draft_acceptance]
        return sum(rates) / len(rates) if rates else None


def is_stranded(seen: QueueSnapshot) -> bool:
    """Whether jobs wait and no worker is heard of."""
    return seen.waiting + seen.running > 0 and not live_workers(seen)


def live_workers(seen: QueueSnapshot) -> int:
    """How many workers of a queue are heard of."""
    return sum(seen.now_ms - view.heartbeat_ms <= GONE_AFTER_MS for view in seen.workers)


def read_fleet(session: Queue, *, all_queues: bool) -> Fleet:
    """Look at the session's queue, or at every queue of its broker, by name."""
    names = [session.address.queue]
    if all_queues:
        with session.errors():
            names = find_queues(session.client)
    return Fleet({name: session.run(snapshot(QueueKeys(name))) for name in names})


def find_queues(client: redis.Redis) -> list[str]:
    """Names of the queues that the broker knows, in order; no more than 256 of them."""
    found: set[str] = set()
    for key in client.scan_iter(match=EVERY_STATS, count=1000):
        found.add(queue_of_stats(key.decode()))
        if len(found) >= _MOST_QUEUES:
            break
    return sorted(found)
