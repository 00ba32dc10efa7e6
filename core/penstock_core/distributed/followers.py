"""The ranks behind rank 0: started here, watched here, and the program they run.

A follower loads its slice of the model and does what each message says. It ends when rank 0 says so, when rank 0 is
gone (its standard input closes) or when a collective fails: a group lives and dies as one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from penstock_core.cache import PageConfig
from penstock_core.distributed.config import DistributedConfig
from penstock_core.distributed.group import GlooGroup, Order, receive, unpack

if TYPE_CHECKING:
    from penstock_core.distributed.engine import EngineConfig


class Followers:
    """Ranks 1 and up of a group, as processes of this host.

    Attributes:
        rendezvous: file through which the ranks find one another.
    """

    def __init__(self, config: EngineConfig, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="penstock-group-")
        self.rendezvous = Path(self._folder.name) / "rendezvous"
        order = {
            "config": dataclasses.asdict(dataclasses.replace(config, model=str(config.model))),
            "size": size,
            "rendezvous": str(self.rendezvous),
            "threads": torch.get_num_threads(),
        }
        self._processes = []
        for rank in range(1, size):
            process = subprocess.Popen(
                [sys.executable, "-m", "penstock_core.distributed.followers"], stdin=subprocess.PIPE
            )
            assert process.stdin is not None
            process.stdin.write(json.dumps({**order, "rank": rank}).encode() + b"\n")
            process.stdin.flush()
            self._processes.append(process)

    @property
    def process_ids(self) -> list[int]:
        """Of the followers, by rank."""
        return [process.pid for process in self._processes]

    def fallen(self) -> str | None:
        """Which follower has ended and how, if one has."""
        for rank, process in enumerate(self._processes, 1):
            if process.poll() is not None:
                return f"rank {rank} (process {process.pid}) ended with exit code {process.returncode}"
        return None

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


def follow(order: dict[str, Any]) -> None:
    """One follower's life."""
    from penstock_core.distributed.engine import DistributedInferenceEngine, EngineConfig

    torch.set_num_threads(order["threads"])
    values = order["config"]
    config = EngineConfig(
        **{
            **values,
            "page": PageConfig(**values["page"]),
            "distributed": DistributedConfig(**values["distributed"]),
        }
    )
    group = GlooGroup(order["rank"], order["size"], Path(order["rendezvous"]), config.distributed.timeout_s)
    engine = DistributedInferenceEngine.load_rank(config, group)
    hidden = None
    while True:
        kind, payload = receive()
        if kind is Order.STOP:
            break
        if kind is Order.STEP:
            hidden = engine.compute(unpack(payload)).hidden
        elif hidden is not None:
            engine.model.logits(hidden[int(payload[0]) : int(payload[1])])
    group.close()


def _end_with_rank_0() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    order = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    follow(order)
