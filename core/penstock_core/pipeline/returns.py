"""Tokens on their way from the device to the host, for a pipeline that goes on before they have arrived.

Each step's tokens are copied to a pinned buffer behind the work that chooses them, and an event says when they are
there. A buffer is written again only after its tokens were read. On the CPU everything is there at once, and the same
bookkeeping runs with plain memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from penstock_core.sampling.noise import Int64


class Event(Protocol):
    """A point in the work that the device was given."""

    def record(self) -> None:
        """Happen when all work that was given to the device so far is done."""

    def synchronize(self) -> None:
        """Wait until it has happened."""


class _CUDAEvent:
    """On one device's current stream, whichever device the calling thread calls its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def synchronize(self) -> None:
        self._event.synchronize()


class _Past:
    """An event that has happened."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@dataclass(slots=True)
class _Buffer:
    memory: torch.Tensor
    event: Event


class ReturningTokens:
    """One step's tokens.

    Attributes:
        tokens: int64 [R], on the device, where the next step takes them from.
    """

    def __init__(self, tokens: torch.Tensor, buffer: _Buffer, free: list[_Buffer]) -> None:
        self.tokens = tokens
        self._buffer: _Buffer | None = buffer
        self._free = free

    def read(self) -> Int64:
        """Wait for the tokens; once. The buffer is free again when this returns, and not if it raises."""
        assert self._buffer is not None, "tokens are read once"
        self._buffer.event.synchronize()
        arrived: Int64 = self._buffer.memory[: len(self.tokens)].numpy().copy()
        self._free.append(self._buffer)
        self._buffer = None
        return arrived


class TokenReturns:
    """Sends steps' tokens to the host.

    Args:
        device: where the tokens are chosen.
        capacity: most tokens of one step.
        new_memory, new_event: of one buffer; by default what `device` needs.
    """

    def __init__(
        self,
        device: torch.device,
        capacity: int,
        new_memory: Callable[[int], torch.Tensor] | None = None,
        new_event: Callable[[], Event] | None = None,
    ) -> None:
        on_cuda = device.type == "cuda"
        self._new_memory = new_memory or (lambda size: torch.empty(size, dtype=torch.int64, pin_memory=on_cuda))
        self._new_event = new_event or (lambda: _CUDAEvent(device) if on_cuda else _Past())
        self._capacity = capacity
        self._free: list[_Buffer] = []

    def send(self, tokens: torch.Tensor) -> ReturningTokens:
        """Copy int64 [R] to the host, behind whatever computes them."""
        buffer = self._free.pop() if self._free else _Buffer(self._new_memory(self._capacity), self._new_event())
        buffer.memory[: len(tokens)].copy_(tokens, non_blocking=True)
        buffer.event.record()
        return ReturningTokens(tokens, buffer, self._free)
