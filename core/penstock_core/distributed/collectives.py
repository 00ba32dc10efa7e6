"""What the ranks of one stage do together in a forward pass, through shared memory or through torch.distributed.

Both sum in rank order on the CPU, so all ranks get the same bits and a row's bits do not depend on its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from penstock_core.kernels.ranks import SharedSegment
from penstock_core.models import TensorParallelGroup


@dataclass(slots=True)
class Traffic:
    """What this rank has exchanged with others: calls, bytes of its own that went in, and the time it took.

    Time includes waiting for ranks that are late; on a GPU it is only the time to enqueue.
    """

    calls: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    def add(self, num_bytes: int, started: float) -> None:
        """Count one exchange, begun at `started` on the performance counter."""
        self.calls += 1
        self.num_bytes += num_bytes
        self.seconds += perf_counter() - started


class SharedMemoryGroup(TensorParallelGroup):
    """Ranks of one host, on the CPU."""

    def __init__(self, rank: int, size: int, segment: SharedSegment, traffic: Traffic) -> None:
        super().__init__(rank, size)
        self._segment = segment
        self._traffic = traffic

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place where the tensor is contiguous and float32."""
        started = perf_counter()
        wide = tensor.float().contiguous()
        self._segment.all_reduce(wide)
        self._traffic.add(tensor.nbytes, started)
        return wide.to(tensor.dtype)

    def gather(self, tensor: Tensor) -> Tensor:
        """Rank 0: the ranks' equal shapes [R, n] side by side. The others get their own back."""
        started = perf_counter()
        part = tensor.contiguous()
        out = None
        if self.rank == 0:
            out = torch.empty(part.shape[0], part.shape[1] * self.size, dtype=part.dtype)
        self._segment.gather(part, out)
        self._traffic.add(tensor.nbytes, started)
        return tensor if out is None else out


class SocketGroup(TensorParallelGroup):
    """Ranks anywhere: Gloo on the CPU, NCCL on CUDA (which no machine at hand could measure).

    Args:
        in_order: sum in rank order whatever it costs. Gloo with more than two ranks, and NCCL, choose an order by size.
    """

    def __init__(
        self, rank: int, size: int, group: dist.ProcessGroup | None, traffic: Traffic, *, in_order: bool
    ) -> None:
        super().__init__(rank, size)
        self._group = group
        self._traffic = traffic
        self._in_order = in_order

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place where the tensor is contiguous."""
        started = perf_counter()
        tensor = tensor.contiguous()
        if self._in_order:
            parts = [torch.empty_like(tensor) for _ in range(self.size)]
            dist.all_gather(parts, tensor, group=self._group)
            total = parts[0].float()
            for part in parts[1:]:
                total += part
            tensor = total.to(tensor.dtype)
        else:
            dist.all_reduce(tensor, group=self._group)
        self._traffic.add(tensor.nbytes, started)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Rank 0: the ranks' equal shapes [R, n] side by side. The others get their own back."""
        started = perf_counter()
        part = tensor.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(part, parts, group=self._group, group_dst=0)
        whole = tensor if parts is None else torch.cat(parts, -1)
        self._traffic.add(tensor.nbytes, started)
        return whole
