"""A step's arrays as tensors on the engine's device, and which device that is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from penstock_core.attention import AttentionBatch
from penstock_core.batching import TokenBatch
from penstock_core.protocol.errors import InvalidConfiguration


def on_device(batch: TokenBatch, page_size: int, device: torch.device) -> AttentionBatch:
    """A step's inputs as tensors.

    On the CPU the tensors share the batch's arrays. Elsewhere everything travels in one copy, from pinned memory that
    PyTorch does not reuse before the copy is done.
    """
    parts = (
        batch.token_ids,
        batch.positions,
        batch.slot_mapping,
        batch.query_start,
        batch.seq_lens,
        batch.block_table.reshape(-1),
    )
    tensors: Sequence[torch.Tensor]
    if device.type == "cpu":
        tensors = [torch.from_numpy(part) for part in parts]
    else:
        flat = torch.from_numpy(np.concatenate(parts)).pin_memory().to(device, non_blocking=True)
        tensors = torch.split(flat, [len(part) for part in parts])
    token_ids, positions, slot_mapping, query_start, seq_lens, block_table = tensors
    return AttentionBatch(
        token_ids=token_ids,
        positions=positions,
        slot_mapping=slot_mapping,
        query_start=query_start.to(torch.int32),
        seq_lens=seq_lens.to(torch.int32),
        block_table=block_table.to(torch.int32).view(batch.block_table.shape),
        max_query_len=batch.max_query_len,
        max_seq_len=batch.max_seq_len,
        page_size=page_size,
    )


def carry(carried: npt.NDArray[np.int64], chosen: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Put tokens that are still on the device among a step's inputs, without waiting for them.

    Args:
        carried: int64 [2, C]; see `TokenBatch`.
        chosen: int64 [R], the tokens of the step before. One that is no token (-1) is replaced by any: its sequence is
            at its end, and what this step makes of it is thrown away.
        token_ids: of this step, filled in place.
    """
    places, sources = index_on_device(carried, token_ids.device)
    token_ids.index_copy_(0, places, chosen.index_select(0, sources).clamp_min(0).to(token_ids.dtype))


def index_on_device(rows: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Row numbers as a tensor, without waiting for the device."""
    index = torch.from_numpy(rows)
    return index if device.type == "cpu" else index.pin_memory().to(device, non_blocking=True)


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidConfiguration("device", f"{name!r} is unknown; use auto, cpu, cuda or cuda:<n>") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidConfiguration("device", f"{name!r} is not supported; use auto, cpu, cuda or cuda:<n>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise InvalidConfiguration("device", f"{name!r} is not there, {found} CUDA devices are; use cpu")
    return device
