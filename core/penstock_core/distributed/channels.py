"""One-way channels between ranks: rank 0's messages to all, hidden states to the next stage, logits back.

Each exists twice: through shared memory, for ranks of one host on the CPU, and through torch.distributed.
"""

from __future__ import annotations

from time import perf_counter
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from penstock_core.distributed.collectives import Traffic
from penstock_core.distributed.messages import Int32, Order
from penstock_core.kernels.ranks import SharedSegment


class Messages(Protocol):
    """From rank 0 to all others. A follower waits as long as rank 0 lives: an idle engine says nothing."""

    def send(self, order: Order, payload: Int32) -> None:
        """Rank 0: tell the followers."""

    def receive(self) -> tuple[Order, Int32]:
        """A follower: wait for the next message."""


class SharedMessages:
    """Through shared memory; a message that fits one frame is one copy."""

    _FRAME = 1024  # integers

    def __init__(self, segment: SharedSegment, told: Traffic) -> None:
        self._segment = segment
        self._told = told
        self._frame = np.zeros(self._FRAME, dtype=np.int32)

    def send(self, order: Order, payload: Int32) -> None:
        """Rank 0: tell the followers. The first two integers are the order and the payload's length."""
        frame, count = self._frame, len(payload)
        inline = min(count, self._FRAME - 2)
        frame[0], frame[1] = order, count
        frame[2 : 2 + inline] = payload[:inline]
        started = perf_counter()
        self._copy(frame)
        if inline < count:
            self._copy(np.ascontiguousarray(payload[inline:]))
        self._told.add(8 + payload.nbytes, started)

    def receive(self) -> tuple[Order, Int32]:
        """A follower: wait for the next message."""
        frame = self._frame
        self._copy(frame)
        order, count = Order(int(frame[0])), int(frame[1])
        inline = min(count, self._FRAME - 2)
        if inline == count:
            return order, frame[2 : 2 + count].copy()
        rest = np.empty(count - inline, dtype=np.int32)
        self._copy(rest)
        return order, np.concatenate([frame[2 : 2 + inline], rest])

    def _copy(self, array: Int32) -> None:
        self._segment.broadcast(array.ctypes.data, array.nbytes)


class SocketMessages:
    """Through Gloo."""

    _FRAME = 8192

    def __init__(self, group: dist.ProcessGroup | None, told: Traffic) -> None:
        self._group = group
        self._told = told

    def send(self, order: Order, payload: Int32) -> None:
        """Rank 0: tell the followers. The first two integers are the order and the payload's length."""
        frame = np.zeros(self._FRAME, dtype=np.int32)
        inline = min(len(payload), self._FRAME - 2)
        frame[0], frame[1] = order, len(payload)
        frame[2 : 2 + inline] = payload[:inline]
        started = perf_counter()
        self._broadcast(frame)
        if inline < len(payload):
            self._broadcast(payload[inline:].copy())
        self._told.add(8 + payload.nbytes, started)

    def receive(self) -> tuple[Order, Int32]:
        """A follower: wait for the next message."""
        frame = np.zeros(self._FRAME, dtype=np.int32)
        self._broadcast(frame)
        order, count = Order(int(frame[0])), int(frame[1])
        inline = min(count, self._FRAME - 2)
        if inline == count:
            return order, frame[2 : 2 + count]
        rest = np.zeros(count - inline, dtype=np.int32)
        self._broadcast(rest)
        return order, np.concatenate([frame[2 : 2 + inline], rest])

    def _broadcast(self, array: Int32) -> None:
        dist.broadcast(torch.from_numpy(array), 0, group=self._group)


class Link(Protocol):
    """From one rank to one other. `flush` returns once everything sent may be forgotten."""

    def send(self, tensor: Tensor) -> None:
        """Give a tensor to the other rank."""

    def receive(self, into: Tensor) -> Tensor:
        """Wait for the next tensor; shape and dtype are known on both sides."""

    def flush(self) -> None:
        """At the end of a step."""


class SharedLink:
    """Through shared memory: the sender goes on once its bytes are copied."""

    def __init__(self, segment: SharedSegment, traffic: Traffic) -> None:
        self._segment = segment
        self._traffic = traffic

    def send(self, tensor: Tensor) -> None:
        """Give a tensor to the other rank."""
        started = perf_counter()
        tensor = tensor.contiguous()
        self._segment.broadcast(tensor.data_ptr(), tensor.nbytes)
        self._traffic.add(tensor.nbytes, started)

    def receive(self, into: Tensor) -> Tensor:
        """Wait for the next tensor."""
        started = perf_counter()
        self._segment.broadcast(into.data_ptr(), into.nbytes)
        self._traffic.add(into.nbytes, started)
        return into

    def flush(self) -> None:
        """Nothing is left to wait for."""


class SocketLink:
    """Through Gloo or NCCL, without waiting for the receiver."""

    def __init__(self, peer: int, group: dist.ProcessGroup | None, traffic: Traffic) -> None:
        self._peer = peer
        self._group = group
        self._traffic = traffic
        self._sending: list[tuple[dist.Work | None, Tensor]] = []

    def send(self, tensor: Tensor) -> None:
        """Give a tensor to the other rank."""
        started = perf_counter()
        tensor = tensor.contiguous()
        self._sending.append((dist.isend(tensor, self._peer, group=self._group), tensor))
        self._traffic.add(tensor.nbytes, started)

    def receive(self, into: Tensor) -> Tensor:
        """Wait for the next tensor."""
        started = perf_counter()
        dist.recv(into, self._peer, group=self._group)
        self._traffic.add(into.nbytes, started)
        return into

    def flush(self) -> None:
        """Wait until the receiver has everything."""
        for work, _ in self._sending:
            if work is not None:
                work.wait()
        self._sending.clear()
