"""ProcessGroup: one rank's place among all ranks of a model, and its ways to the others.

Ranks of one host on the CPU talk through shared memory where all of those concerned can, which they find out together;
all others through torch.distributed.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from penstock_core.distributed.channels import Link, Messages, SharedLink, SharedMessages, SocketLink, SocketMessages
from penstock_core.distributed.collectives import SharedMemoryGroup, SocketGroup, Traffic
from penstock_core.distributed.config import DistributedConfig
from penstock_core.distributed.memory import MemoryReport
from penstock_core.distributed.rendezvous import Rendezvous
from penstock_core.kernels.ranks import SharedSegment
from penstock_core.models import Stage, TensorParallelGroup

_logger = logging.getLogger(__name__)

_IDLE = timedelta(days=365)  # between two messages: an idle engine sends none, and a lost rank 0 ends the wait anyway
_MESSAGE_BYTES = 2**18
_HIDDEN_BYTES = 2**22  # what a stage can hand on before the next takes it
_SPIN_S = 2e-4


class ProcessGroup:
    """The ranks of one model. All of them construct it together; `close` leaves it.

    Attributes:
        rank, size: among all ranks. stage: of this one. config: of the group.
        tensor: the ranks that share this stage's layers.
        previous, following: from the stage before, to the stage after; None at the ends.
        results: logits, from the last stage's first rank to rank 0; None elsewhere, and where these are one.
        messages: from rank 0 to all.
        traffic: of this rank in collectives. handed_on: hidden states and logits between stages. told: messages.
        shared: whether all of that goes through shared memory.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        config: DistributedConfig,
        device: torch.device,
        *,
        max_batch_tokens: int,
        hidden_bytes: int,
        deterministic: bool,
    ) -> None:
        self.config = config
        self.rank, self.size = rendezvous.place.rank, rendezvous.place.size
        self.stage = config.stage_of(self.rank)
        self.traffic, self.handed_on, self.told = Traffic(), Traffic(), Traffic()
        self._rendezvous = rendezvous
        self._device = device
        self._segments: list[SharedSegment] = []
        self._timeout_s = config.timeout_s
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        crowded = rendezvous.place.local_size * torch.get_num_threads() > cores
        self._spin_s = _SPIN_S / 20 if crowded else _SPIN_S
        dist.init_process_group(
            "gloo",
            store=PrefixStore("gloo", rendezvous.store),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=config.timeout_s),
        )
        on_cuda = device.type == "cuda"
        everyone = list(range(self.size))
        self._cuda_links = (
            dist.new_group(everyone, backend="nccl") if on_cuda and config.pipeline_parallel > 1 else None
        )

        tensor_groups = [config.ranks_of(Stage(n, config.pipeline_parallel)) for n in range(config.pipeline_parallel)]
        self.tensor = self._tensor_group(tensor_groups[self.stage.index], in_order=deterministic)
        room = min(_HIDDEN_BYTES, max(4096, max_batch_tokens * hidden_bytes))
        self.previous: Link | None = None
        self.following: Link | None = None
        self.results: Link | None = None
        for sender in range(self.size - config.tensor_parallel):
            receiver = sender + config.tensor_parallel
            link = self._link(f"hidden/{sender}", sender, receiver, room)
            if self.rank == sender:
                self.following = link
            elif self.rank == receiver:
                self.previous = link
        last = tensor_groups[-1][0]
        if last != 0:
            self.results = self._link("results", last, 0, _HIDDEN_BYTES)
        self.messages = self._messages(everyone)
        self.shared = len(self._segments) == self._num_ways()

    def least(self, number: int) -> int:
        """The least of the ranks' numbers."""
        return min(row[0] for row in self.tell_all([number]))

    def tell_all(self, numbers: list[int]) -> list[list[int]]:
        """Every rank's numbers, by rank."""
        mine = torch.tensor(numbers, dtype=torch.int64)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return [part.tolist() for part in parts]

    def tell_reports(self, mine: MemoryReport) -> tuple[MemoryReport, ...]:
        """Every rank's report, by rank."""
        return tuple(MemoryReport(*numbers) for numbers in self.tell_all(list(dataclasses.astuple(mine))))

    def ranks_here(self, device: torch.device) -> int:
        """Ranks that share a device's memory with this one: on a GPU it has it alone."""
        return 1 if device.type == "cuda" else self._rendezvous.place.local_size

    def flush(self) -> None:
        """At the end of a step: what was handed on has arrived."""
        for link in (self.following, self.results):
            if link is not None:
                link.flush()

    def fallen(self) -> str | None:
        """Which rank has ended, as far as this one can see. Any thread."""
        lost = self._rendezvous.watch()
        if lost is not None:
            return lost
        for segment in self._segments:
            place = segment.lost()
            if place is not None:
                return f"a rank of the {self.size} has ended (number {place} of those that share memory with this one)"
        return None

    def close(self) -> None:
        """Leave the group."""
        for segment in self._segments:
            segment.close()
        dist.destroy_process_group()

    def _tensor_group(self, members: list[int], *, in_order: bool) -> TensorParallelGroup:
        place, size = members.index(self.rank), len(members)
        if size == 1:
            return TensorParallelGroup()
        segment = self._segment(f"tensor/{members[0]}", members, 2**20)
        if segment is not None:
            return SharedMemoryGroup(place, size, segment, self.traffic)
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        group = dist.new_group(
            members, timedelta(seconds=self._timeout_s), backend=backend, use_local_synchronization=True
        )
        return SocketGroup(place, size, group, self.traffic, in_order=in_order and (size > 2 or backend == "nccl"))

    def _link(self, name: str, sender: int, receiver: int, room: int) -> Link | None:
        if self.rank not in (sender, receiver):
            return None
        segment = self._segment(name, [sender, receiver], room)
        if segment is not None:
            return SharedLink(segment, self.handed_on)
        return SocketLink(receiver if self.rank == sender else sender, self._cuda_links, self.handed_on)

    def _messages(self, everyone: list[int]) -> Messages:
        segment = self._segment("messages", everyone, _MESSAGE_BYTES, any_device=True)
        if segment is not None:
            segment.set_patience(timeout_s=None if self.rank else self._timeout_s, spin_s=self._spin_s)
            return SharedMessages(segment, self.told)
        return SocketMessages(dist.new_group(everyone, _IDLE, backend="gloo"), self.told)

    def _segment(
        self, name: str, members: list[int], slot_bytes: int, *, any_device: bool = False
    ) -> SharedSegment | None:
        """A segment that all members share, or None for all of them."""
        if not self.config.shared_memory or (self._device.type != "cpu" and not any_device):
            return None
        rendezvous, place = self._rendezvous, members.index(self.rank)
        segment: SharedSegment | None = None
        reason = ""
        try:
            if place == 0:
                segment = SharedSegment.create(len(members), slot_bytes)
                rendezvous.say(f"{name}/address", segment.address)
            else:
                address = rendezvous.hear(f"{name}/address")
                if address:
                    segment = SharedSegment.join(address, place, len(members))
        except (OSError, AttributeError) as error:
            reason = str(error)
            if place == 0:
                rendezvous.say(f"{name}/address", "")
        rendezvous.say(f"{name}/joined/{place}", "yes" if segment is not None else "no")
        joined = [rendezvous.hear(f"{name}/joined/{member}") for member in range(len(members))]
        if segment is None or "no" in joined:
            if reason:
                _logger.info("rank %d shares no memory with the others (%s): sockets are used", self.rank, reason)
            if segment is not None:
                segment.close()
            return None
        segment.set_patience(timeout_s=self._timeout_s, spin_s=self._spin_s)
        self._segments.append(segment)
        return segment

    def _num_ways(self) -> int:
        links = (self.previous, self.following, self.results)
        return 1 + (self.tensor.size > 1) + sum(link is not None for link in links)
