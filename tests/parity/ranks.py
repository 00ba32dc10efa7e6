"""One rank of a model that is cut over processes: computes prompts' logits through the engine's own groups."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from penstock_core.attention import AttentionBatch
from penstock_core.cache import PageShape, allocate_pages
from penstock_core.distributed import DistributedConfig
from penstock_core.distributed.group import ProcessGroup
from penstock_core.distributed.rendezvous import Place, Rendezvous
from penstock_core.models import DecoderModel, load_model

PAGE = 4


def main(work: Path, rank: int, config: DistributedConfig, families: list[str]) -> None:
    """Every family in turn, over one group; rank 0 writes what it has at the end."""
    torch.set_num_threads(1)
    size = config.num_ranks
    rendezvous = Rendezvous.in_file(work / "rendezvous", Place(rank, size, rank, size), 60.0)
    group = ProcessGroup(
        rendezvous, config, torch.device("cpu"), max_batch_tokens=64, hidden_bytes=256, deterministic=False
    )
    assert group.shared == config.shared_memory, "the ranks should share memory exactly where they may"
    results = {}
    for family in families:
        model = load_model(work / family, group=group.tensor, stage=group.stage)
        prompts = torch.load(work / "prompts.pt")
        results[family] = [logits(model, group, prompt) for prompt in prompts]
    if rank == 0:
        torch.save(results, work / "logits.pt")
    group.least(0)
    group.close()


def logits(model: DecoderModel, group: ProcessGroup, prompt: list[int]) -> torch.Tensor:
    """A prompt in chunks of 7, as every rank sees it; whole on rank 0."""
    count = -(-len(prompt) // PAGE)
    shape = PageShape(model.num_local_layers, PAGE, model.num_local_kv_heads, model.config.head_dim, torch.float32)
    pages = allocate_pages(shape, count, torch.device("cpu"))
    table = list(reversed(range(count)))
    parts = []
    for start in range(0, len(prompt), 7):
        batch = AttentionBatch.build([prompt[start : start + 7]], [start], [table], PAGE)
        hidden = None
        if group.previous is not None:
            hidden = group.previous.receive(torch.empty(batch.num_tokens, model.config.hidden_size))
        hidden = model.forward(batch, pages, hidden)
        if group.following is not None:
            group.following.send(hidden)
        out = model.logits(hidden) if group.stage.is_last else torch.empty(0)
        if group.results is not None:
            if group.stage.is_last:
                group.results.send(out)
            else:
                out = group.results.receive(torch.empty(batch.num_tokens, model.config.vocab_size))
        group.flush()
        parts.append(out)
    return torch.cat(parts)


if __name__ == "__main__":
    order = json.loads(os.environ["RANK_ORDER"])
    main(Path(sys.argv[1]), int(sys.argv[2]), DistributedConfig(**order["config"]), order["families"])
