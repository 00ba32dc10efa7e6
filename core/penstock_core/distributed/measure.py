"""The largest step, run once before the pages are allocated, to see what it takes on a CUDA device."""

from __future__ import annotations

import torch

from penstock_core.attention import AttentionBatch
from penstock_core.cache import PageShape, allocate_pages
from penstock_core.models import DecoderModel


def measure_activations(
    model: DecoderModel, shape: PageShape, *, tokens: int, sequences: int, length: int, rows: int
) -> int:
    """Peak bytes of a step beside weights and pages. All ranks call it together, because the step needs them all.

    Args:
        model: or this rank's part of it. shape: of its pages.
        tokens: in the step, of at most `sequences` sequences of at most `length` tokens. rows: of logits.
    """
    device = model.device
    tokens = min(tokens, sequences * length)
    lengths = [min(length, tokens - start) for start in range(0, tokens, length)]
    pages = -(-length // shape.page_size)
    layers = allocate_pages(shape, pages, device)  # all sequences write to the same: nobody reads the result
    batch = AttentionBatch.build(
        [[0] * n for n in lengths], [0] * len(lengths), [range(pages)] * len(lengths), shape.page_size, device
    )
    hidden = None
    if not model.stage.is_first:
        hidden = torch.zeros(tokens, model.config.hidden_size, dtype=model.dtype, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    hidden = model.forward(batch, layers, hidden)
    if model.stage.is_last:
        model.logits(hidden[:rows])
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del layers, hidden
    torch.cuda.empty_cache()
    return int(peak)
