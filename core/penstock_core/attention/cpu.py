"""Paged attention on the CPU: gather pages, then one fused product per group of similar sequences.

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

LONG_QUERY = 32  # longer queries are attended alone: padding them to a batch would waste more than it saves
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


@dataclass(slots=True)
class CPUPlan:
    """What every layer of one forward pass shares."""

    slots: Tensor
    groups: list[_Group]


class CPUPagedAttention:
    """The portable implementation, in plain PyTorch operators."""

    def plan(self, batch: AttentionBatch) -> CPUPlan:
        """Group the batch's sequences; once per forward pass."""
        page_size = batch.page_size
        starts = batch.query_start.tolist()
        seq_lens = batch.seq_lens.tolist()
        members: dict[tuple[int, int, int], list[int]] = {}
        for n, seq_len in enumerate(seq_lens):
            query_len = starts[n + 1] - starts[n]
            pages = -(-seq_len // page_size)
            if query_len > LONG_QUERY:
                members[query_len, pages, n + 1] = [n]
            elif query_len:
                padded = 1 << (pages - 1).bit_length()  # contexts within a factor of two share a gather
                members.setdefault((query_len, padded, 0), []).append(n)
        groups = []
        device = batch.seq_lens.device
        for (query_len, _, _), sequences in members.items():
            longest = max(seq_lens[n] for n in sequences)
            num_pages = -(-longest // page_size)
            index = torch.tensor(sequences, device=device)
            offsets = torch.arange(query_len, device=device)
            groups.append(
                _Group(
                    query_len=query_len,
                    padded_len=num_pages * page_size,
                    rows=(batch.query_start[index].long()[:, None] + offsets).flatten(),
                    pages=batch.block_table[index, :num_pages].long().clamp_min(0).flatten(),
                    query_positions=batch.seq_lens[index].long()[:, None] - query_len + offsets,
                    starts_empty=len(sequences) == 1 and longest == query_len,
                )
            )
        return CPUPlan(batch.slot_mapping, groups)

    def write(self, k: Tensor, v: Tensor, pages: LayerPages, plan: CPUPlan) -> None:
        """Store this step's keys and values. k, v: [T, Hkv, D]."""
        store(k, pages.k, pages.k_scale, plan.slots)
        store(v, pages.v, pages.v_scale, plan.slots)

    def attend(self, q: Tensor, pages: LayerPages, plan: CPUPlan, spec: AttentionSpec) -> Tensor:
        """Attend every token to its sequence's pages. q: [T, H, D] -> [T, H, D]."""
        if len(plan.groups) == 1 and plan.groups[0].query_positions.shape[0] == 1:
            return _attend_group(q, pages, plan.groups[0], spec)
        out = torch.empty_like(q)
        for group in plan.groups:
            out[group.rows] = _attend_group(q[group.rows], pages, group, spec)
        return out


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


def store(values: Tensor, pages: Tensor, scales: Tensor | None, slots: Tensor) -> None:
    """Write rows into page slots, quantising if the pages are int8. values: [T, Hkv, D]; slots: int64 [T]."""
    if scales is not None:
        scale = values.abs().amax(-1).float().clamp_min(1e-12) / 127
        scales.view(-1, scales.shape[-1]).index_copy_(0, slots, scale)
        values = (values.float() / scale[..., None]).round()
    pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, values.to(pages.dtype))


def load(pages: Tensor, scales: Tensor | None, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather whole pages, dequantised. index: int64 [n] -> [n, page_size, Hkv, D]."""
    values = pages.index_select(0, index).to(dtype)
    if scales is not None:
        values = values * scales.index_select(0, index)[..., None].to(dtype)
    return values


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
