"""Paged attention in plain PyTorch, on any device: gather pages, then one fused product per group of sequences.

Short queries (decodes and draft checks) of equal length and similar context are batched over a padded gather; a long
prefill chunk is gathered alone. Keys and values are always read back from the pages, so a chunked, cached or whole
prefill computes the same thing. Query heads that share a KV head are folded into the query axis: no repeats of K or V.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock_core.attention.batch import AttentionBatch, AttentionSpec, LayerPages
from penstock_core.attention.pages import load

LONG_QUERY = 32  # longer queries are attended alone: padding them to a batch would waste more than it saves
GATHERED_TOKENS = 1 << 16  # keys of one group of decodes whose lengths the host does not know
SOFTCAP_BLOCK = 128  # query rows whose scores are held at a time where no fused kernel exists


@dataclass(slots=True)
class _Group:
    """Sequences attended together: same query length, contexts padded to the same number of pages."""

    query_len: int
    padded_len: int  # tokens, a whole number of pages
    rows: Tensor  # int64 [n * query_len], their tokens in the flattened batch
    pages: Tensor  # int64 [n * padded pages]
    query_positions: Tensor  # int64 [n, query_len]
    starts_empty: bool  # one sequence, all of whose context is in this step
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, shared: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores: 0 where a key may be seen, -inf elsewhere; made once per window.

        [n, 1, shared * query_len, padded_len], or [1, 1, query_len, padded_len] for a sequence attended alone.
        """
        if window not in self.masks:
            keys = torch.arange(self.padded_len, device=self.query_positions.device)
            last = self.query_positions[:, :, None]
            seen = keys <= last
            if window is not None:
                seen &= keys > last - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
            if mask.shape[0] > 1:
                mask = mask.repeat(1, shared, 1)
            self.masks[window] = mask[:, None]
        return self.masks[window]


class PortablePagedAttention:
    """The implementation that runs everywhere.

    `deterministic` attends every token alone: slow, but its bits cannot depend on chunking or on the batch.
    """

    def __init__(self, deterministic: bool = False) -> None:
        self._deterministic = deterministic

    def plan(self, batch: AttentionBatch) -> list[_Group]:
        """Group the batch's sequences; once per forward pass."""
        starts = batch.query_start.tolist()
        seq_lens = batch.seq_lens.tolist()
        groups: list[_Group] = []
        similar: dict[tuple[int, int], list[int]] = {}
        for n in range(len(seq_lens)):
            query_len = starts[n + 1] - starts[n]
            if self._deterministic:
                groups += [_group(batch, [n], 1, seq_lens[n] - query_len + i + 1, i) for i in range(query_len)]
            elif query_len > LONG_QUERY:
                groups.append(_group(batch, [n], query_len, seq_lens[n]))
            elif query_len:  # contexts within a factor of two share a gather
                similar.setdefault((query_len, (seq_lens[n] - 1).bit_length()), []).append(n)
        for (query_len, _), sequences in similar.items():
            groups.append(_group(batch, sequences, query_len, max(seq_lens[n] for n in sequences)))
        return groups

    def plan_decodes(self, batch: AttentionBatch) -> list[_Group]:
        """The plan of a step with one query per sequence, made without reading anything from the device.

        All contexts count as long as the longest, so it gathers more than `plan` does.
        """
        num_pages = -(-batch.max_seq_len // batch.page_size)
        padded = num_pages * batch.page_size
        rows = torch.arange(batch.num_sequences, device=batch.seq_lens.device)
        positions = batch.seq_lens.long()[:, None] - 1
        pages = batch.block_table[:, :num_pages].long()
        each = max(1, GATHERED_TOKENS // padded)
        return [
            _Group(1, padded, *parts, starts_empty=False)
            for parts in zip(
                torch.split(rows, each),
                [part.flatten() for part in torch.split(pages, each)],
                torch.split(positions, each),
                strict=True,
            )
        ]

    def attend(self, q: Tensor, pages: LayerPages, plan: list[_Group], spec: AttentionSpec) -> Tensor:
        """Attend every token to its sequence's pages. q: [T, H, D] -> [T, H, D]."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for group in plan:
            out[group.rows] = _attend_group(q[group.rows], pages, group, spec)
        return out


def _group(batch: AttentionBatch, sequences: list[int], query_len: int, longest: int, skip: int = 0) -> _Group:
    """Queries `skip` to `skip + query_len` of each sequence, none of which sees more than `longest` tokens."""
    device = batch.seq_lens.device
    num_pages = -(-longest // batch.page_size)
    index = torch.tensor(sequences, device=device)
    offsets = torch.arange(skip, skip + query_len, device=device)
    starts = batch.query_start.long()
    computed = batch.seq_lens[index].long() - (starts[index + 1] - starts[index])
    return _Group(
        query_len=query_len,
        padded_len=num_pages * batch.page_size,
        rows=(starts[index][:, None] + offsets).flatten(),
        pages=batch.block_table[index, :num_pages].long().clamp_min(0).flatten(),
        query_positions=computed[:, None] + offsets,
        starts_empty=len(sequences) == 1 and longest == query_len,
    )


def _attend_group(q: Tensor, pages: LayerPages, group: _Group, spec: AttentionSpec) -> Tensor:
    """q: [n * query_len, H, D] -> the same shape."""
    _, heads, dim = q.shape
    kv_heads = pages.k.shape[2]
    shared = heads // kv_heads
    n, length = group.query_positions.shape
    k = load(pages.k, pages.k_scale, group.pages, q.dtype).view(n, group.padded_len, kv_heads, dim).transpose(1, 2)
    v = load(pages.v, pages.v_scale, group.pages, q.dtype).view(n, group.padded_len, kv_heads, dim).transpose(1, 2)
    if n == 1:  # the KV heads become the batch; each one's query heads read the same keys, without copies
        q = q.view(length, kv_heads, shared, dim).permute(1, 2, 0, 3)
        k = k[0][:, None].expand(-1, shared, -1, -1)
        v = v[0][:, None].expand(-1, shared, -1, -1)
        if group.starts_empty and spec.softcap is None and (spec.window is None or spec.window >= length):
            k, v = k[:, :, :length], v[:, :, :length]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale)
        else:
            out = _attention(q, k, v, group.mask(spec.window, shared, q.dtype), spec)
        return out.permute(2, 0, 1, 3).reshape(length, heads, dim)
    q = q.view(n, length, kv_heads, shared, dim).permute(0, 2, 3, 1, 4).reshape(n, kv_heads, shared * length, dim)
    out = _attention(q, k, v, group.mask(spec.window, shared, q.dtype), spec).view(n, kv_heads, shared, length, dim)
    return out.permute(0, 3, 1, 2, 4).reshape(n * length, heads, dim)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, spec: AttentionSpec) -> Tensor:
    """Masked attention. q: [..., Lq, D]; k, v: [..., L, D]; mask, added: [..., Lq, L]."""
    if spec.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale)
    out = torch.empty_like(q)
    for start in range(0, q.shape[-2], SOFTCAP_BLOCK):
        block = slice(start, start + SOFTCAP_BLOCK)
        scores = (q[..., block, :] @ k.transpose(-1, -2)).float() * spec.scale
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
        scores += mask[..., block, :]
        out[..., block, :] = scores.softmax(-1).to(v.dtype) @ v
    return out
