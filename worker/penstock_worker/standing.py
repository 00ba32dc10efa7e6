"""How the supervised groups stand: what each is doing, whether all serve, and the series that say so.

A group serves once its worker has written so in its health file, and no longer when its process is gone or silent. The
supervisor is healthy while it starts and while every group serves; from the moment one is down until it serves again it
is not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock_worker.health import Health, default_folder, read_one


class Stand(Enum):
    """What a group is doing."""

    STARTING = "starting"  # for the first time
    SERVING = "serving"
    DOWN = "down"  # its worker died, hangs, or starts again
    ENDED = "ended"  # drained


@dataclass(slots=True)
class GroupStanding:
    """One group.

    Attributes:
        worker_id: of its present life; '' between two lives. restarts: lives that followed a death.
        held: jobs it holds. broker_up: whether it reaches Redis.
        reason: why it is down, in words.
    """

    slot: int
    worker_id: str = ""
    stand: Stand = Stand.STARTING
    has_served: bool = False
    restarts: int = 0
    held: int = 0
    broker_up: bool = True
    reason: str = ""
    down_since: float | None = None


@dataclass(slots=True)
class Standing:
    """All groups of a supervisor. The supervisor says when processes begin and end; `look` reads how they fare.

    Attributes:
        outage_s: how long the group that came back last was down.
    """

    worker_id: str
    groups: Sequence[GroupStanding]
    folder: Path = field(default_factory=default_folder)
    draining: bool = False
    outage_s: float = 0.0

    def started(self, slot: int, worker_id: str) -> None:
        """A process was started for a group."""
        group = self.groups[slot]
        group.worker_id = worker_id
        if group.stand is Stand.DOWN:
            group.restarts += 1

    def died(self, slot: int, reason: str) -> bool:
        """A group's process is gone, and not because it was asked to go. Returns whether the group has ever served."""
        group = self.groups[slot]
        group.worker_id, group.held = "", 0  # its file may still say that it is ready
        self._down(group, reason)
        return group.has_served

    def ended(self, slot: int) -> None:
        """A group drained."""
        self.groups[slot].stand = Stand.ENDED
        self.groups[slot].held = 0

    def look(self) -> list[GroupStanding]:
        """Read every group's health file; returns the groups that serve again after they were down."""
        back = []
        for group in self.groups:
            told = read_one(self.folder, group.worker_id) if group.worker_id else None
            if told is None or group.stand is Stand.ENDED:
                continue
            group.held, group.broker_up = told.held, told.broker_up
            if not told.is_healthy:
                silent = "its engine hangs" if told.status == "stalled" else "it is silent"
                self._down(group, f"{group.worker_id}: {silent}")
            elif told.status in ("ready", "draining"):
                if group.down_since is not None:
                    self.outage_s = time.monotonic() - group.down_since
                    back.append(group)
                group.stand, group.reason, group.down_since, group.has_served = Stand.SERVING, "", None, True
        return back

    def health(self) -> Health:
        """The supervisor's own health."""
        down = [group for group in self.groups if group.stand is Stand.DOWN]
        starting = any(group.stand is Stand.STARTING for group in self.groups)
        serving = sum(group.stand is Stand.SERVING for group in self.groups)
        status = "draining" if self.draining else "degraded" if down else "loading" if starting else "ready"
        return Health(
            worker_id=self.worker_id,
            pid=os.getpid(),
            status=status,
            broker_up=all(group.broker_up for group in self.groups),
            held=sum(group.held for group in self.groups),
            written_at=time.time(),
            detail="; ".join([f"{serving} of {len(self.groups)} groups serve", *(group.reason for group in down)]),
        )

    @staticmethod
    def _down(group: GroupStanding, reason: str) -> None:
        group.stand, group.reason = Stand.DOWN, reason
        if group.down_since is None:
            group.down_since = time.monotonic()


class StandingMetrics(Collector):
    """The supervisor's series."""

    def __init__(self, standing: Standing, queue: str, model: str) -> None:
        self.registry = CollectorRegistry()
        self._standing = standing
        self._labels = {"queue": queue, "model": model}
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The families, for the registry."""
        names, values = [*self._labels, "group"], list(self._labels.values())
        up = GaugeMetricFamily("penstock_group_up", "1 while the group serves.", labels=names)
        restarts = CounterMetricFamily("penstock_group_restarts", "Lives that followed a death.", labels=names)
        for group in self._standing.groups:
            up.add_metric([*values, str(group.slot)], float(group.stand is Stand.SERVING))
            restarts.add_metric([*values, str(group.slot)], float(group.restarts))
        outage = GaugeMetricFamily(
            "penstock_group_outage_seconds", "How long the group that came back last was down.", labels=names[:-1]
        )
        outage.add_metric(values, self._standing.outage_s)
        yield from (up, restarts, outage)
