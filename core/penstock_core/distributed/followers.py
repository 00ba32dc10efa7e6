"""The ranks behind rank 0: how they are started here, how they are watched, and what they do.

A follower loads its part of the model and does what each message says. It ends when rank 0 says so, when rank 0 is
gone or when an exchange fails: a group lives and dies as one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from penstock_core.distributed import launch
from penstock_core.distributed.messages import Order, unpack
from penstock_core.distributed.rendezvous import Place, Rendezvous
from penstock_core.protocol.errors import InvalidConfiguration

if TYPE_CHECKING:
    from penstock_core.distributed.engine import DistributedInferenceEngine, EngineConfig


class Followers:
    """Ranks 1 and up of a group, as processes of this host.

    Attributes:
        rendezvous: rank 0's.
    """

    def __init__(self, config: EngineConfig) -> None:
        size = config.distributed.num_ranks
        place = Place(0, size, 0, size)
        launch.device_of(config.device, place)  # refuses what cannot be before it starts
        self._folder = tempfile.TemporaryDirectory(prefix="penstock-group-")
        meeting = Path(self._folder.name) / "rendezvous"
        order = {
            "config": dataclasses.asdict(dataclasses.replace(config, model=str(config.model))),
            "size": size,
            "rendezvous": str(meeting),
        }
        self._processes = []
        for rank in range(1, size):
            process = subprocess.Popen([sys.executable, "-m", "penstock_core.distributed"], stdin=subprocess.PIPE)
            assert process.stdin is not None
            process.stdin.write(json.dumps({**order, "rank": rank}).encode() + b"\n")
            process.stdin.flush()
            self._processes.append(process)
        self.rendezvous = Rendezvous.in_file(meeting, place, config.distributed.timeout_s, self.fallen)

    def assembled(self) -> None:
        """All have met: what they met in is removed now, for a killed process removes nothing."""
        self._folder.cleanup()

    @property
    def process_ids(self) -> list[int]:
        """Of the followers, by rank."""
        return [process.pid for process in self._processes]

    def fallen(self, wait_s: float = 0.0) -> str | None:
        """Which follower has ended and how, if one has, or does within `wait_s`."""
        deadline = time.monotonic() + wait_s
        while True:
            ended = [place for place in enumerate(self._processes, 1) if place[1].poll() is not None]
            if ended:  # the one that was killed is the cause, others may have followed it
                rank, process = min(ended, key=lambda place: place[1].returncode)
                return f"rank {rank} (process {process.pid}) ended with exit code {process.returncode}"
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.01)

    def close(self, timeout_s: float) -> None:
        """Wait for the followers to end; what is left after `timeout_s` is killed."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()


def follow(engine: DistributedInferenceEngine) -> None:
    """One follower's life, after it has loaded its part."""
    group = engine.group
    assert group is not None
    while True:
        order, payload = group.messages.receive()
        if order is Order.STOP:
            break
        if order is Order.STEP:
            engine.compute(unpack(payload))
        else:
            engine.logits(np.arange(int(payload[0]), int(payload[1])))
    engine.close()


def follow_from_environment(config: EngineConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Join the group that torchrun's variables describe as one of its followers; returns when rank 0 says stop.

    Signals to end are left to rank 0, which may have jobs to finish first.

    Raises:
        InvalidConfiguration: the ranks do not agree, or this one is no follower.
        EngineFailed: a rank did not come, or the group broke.
    """
    from penstock_core.distributed.engine import DistributedInferenceEngine

    place = Place.from_environment(environment)
    if place is None or place.rank == 0:
        raise InvalidConfiguration("RANK", "is not that of a follower; start the ranks with torchrun")
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    launch.check_ranks(config)
    launch.check_place(place, config.distributed)
    rendezvous = Rendezvous.over_tcp(place, config.distributed.timeout_s)
    follow(DistributedInferenceEngine.load_rank(config, rendezvous))
