"""Run a model cut over Gloo ranks, one process each, and bring its logits back."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from penstock_core.models import TensorParallelGroup, load_model
from tests.parity.checkpoints import logits_of


class GlooGroup(TensorParallelGroup):
    """The default process group."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, -1)


def main(folder: str, work: str, rank: int, size: int) -> None:
    """One rank: every rank's logits must be whole, so each writes its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{work}/rendezvous-{size}", rank=rank, world_size=size)
    prompts = torch.load(f"{work}/prompts.pt")
    model = load_model(folder, group=GlooGroup(rank, size))
    torch.save(logits_of(model, prompts, chunk=7), Path(work) / f"logits-{size}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
