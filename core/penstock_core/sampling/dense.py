"""The same choice as the host's, computed densely in torch for logits on an accelerator.

There, hashing a whole vocabulary costs less than bringing its logits to the host. Noise and scores have the same bits
as the host's (`noise.py` is shared), so for equal logits the tokens are equal; a test holds the two to each other.
Nothing here waits for the device, except to find out how many tokens a top-k or a top-p leaves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from penstock_core.sampling.noise import Int64, log, position_keys, token_noise

if TYPE_CHECKING:
    from penstock_core.sampling.table import SamplingTable


def choose(table: SamplingTable, logits: torch.Tensor, rows: Int64, positions: Int64) -> torch.Tensor:
    """Choose one token per row of logits [R, vocab]; -1 where there is none to choose. int64 [R], on their device."""
    greedy = table.greedy[rows]
    most_likely = logits.argmax(-1)
    tokens = most_likely
    if not greedy.all():
        sampled = _to(logits.device, np.flatnonzero(~greedy))
        tokens = most_likely.index_copy(0, sampled, _draw(table, logits[sampled], rows[~greedy], positions[~greedy]))
    finite = logits.gather(-1, most_likely[:, None])[:, 0].isfinite()
    return torch.where(finite, tokens, -1)


def waits(table: SamplingTable, rows: Int64) -> bool:
    """Whether choosing for `rows` waits for the device."""
    return bool((((table.top_k[rows] > 0) | (table.top_p[rows] < 1.0)) & ~table.greedy[rows]).any())


def _to(device: torch.device, array: npt.NDArray[np.generic]) -> torch.Tensor:
    """An array on the device; from pinned memory, which PyTorch reuses only after the copy, so nobody waits for it."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _draw(table: SamplingTable, logits: torch.Tensor, rows: Int64, positions: Int64) -> torch.Tensor:
    temperature = _to(logits.device, table.temperature[rows])[:, None]
    keys = _to(logits.device, position_keys(table.stream[rows], positions))[:, None]
    kept = _filter(table, logits, rows, temperature) if table.filtered[rows].any() else None
    ids = torch.arange(logits.shape[-1], dtype=torch.int64, device=logits.device)
    scores = logits.double() / temperature - log(token_noise(keys, ids))
    if kept is not None:
        scores = scores.masked_fill(~kept, -torch.inf)
    return scores.argmax(-1)


def _filter(table: SamplingTable, logits: torch.Tensor, rows: Int64, temperature: torch.Tensor) -> torch.Tensor:
    """Mask of the tokens left by top-k, top-p and min-p, [n, vocab]."""
    vocab = logits.shape[-1]
    weight = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).exp()
    min_p, top_p, top_k = (
        _to(logits.device, option[rows])[:, None] for option in (table.min_p, table.top_p, table.top_k)
    )
    kept = (weight >= min_p) & (logits > -torch.inf)
    if not ((table.top_k[rows] > 0) | (table.top_p[rows] < 1.0)).any():
        return kept
    limited = top_k > 0
    everything = ~limited & (top_p >= 1.0)
    total = weight.sum(-1, keepdim=True)
    wanted = min(vocab, max(64, int(table.top_k[rows].max()) + 1))
    while True:
        values, ids = _leading(logits, wanted)
        inside = (torch.arange(wanted, device=logits.device) < top_k) | ~limited
        mass = weight.gather(-1, ids) * inside
        reached = mass.cumsum(-1)
        goal = top_p * torch.where(limited, reached[:, -1:], total)
        before = torch.nn.functional.pad(reached[:, :-1], (1, 0))
        surviving = inside & ((before < goal) | (top_p >= 1.0))
        # The list is long enough if it goes on below the last survivor: then mass and equals are all accounted for.
        last = values.gather(-1, (surviving.sum(-1, keepdim=True) - 1).clamp(min=0))
        if wanted == vocab or bool(((last > values[:, -1:]) | everything).all()):
            break
        wanted = min(vocab, wanted * 8)
    return kept & (torch.zeros_like(kept).scatter(-1, ids, surviving) | everything)


def _leading(logits: torch.Tensor, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `wanted` largest logits of each row and their ids, by falling logit, then rising id; [n, wanted] each."""
    values, ids = logits.topk(wanted, dim=-1, sorted=False)
    ids, order = ids.sort(-1)
    values, order = values.gather(-1, order).sort(stable=True, dim=-1, descending=True)
    return values, ids.gather(-1, order)
