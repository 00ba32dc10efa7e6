"""Sequences and a batcher whose model always answers the same token."""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock_core.batching import BatchingConfig, SequenceState, TokenBatch, TokenBatcher
from penstock_core.cache import PagedAttentionKVCache, root_digest

ANSWER = 3


class Bench:
    """A batcher and the means to drive it."""

    def __init__(self, num_pages: int = 64, page_size: int = 4, prefix_cache: bool = True, **options: Any) -> None:
        options.setdefault("max_model_len", min(128, num_pages * page_size))
        options.setdefault("max_num_sequences", 4)
        options.setdefault("max_batch_tokens", 64)
        self.config = BatchingConfig(**options)
        self.cache = PagedAttentionKVCache(num_pages, page_size, prefix_cache=prefix_cache)
        self.batcher = TokenBatcher(self.config, self.cache)
        self.added = 0

    def add(
        self,
        prompt: int | list[int],
        new: int = 8,
        *,
        priority: int = 5,
        arrival_s: float = 0.0,
        salt: str | None = None,
        **fields: Any,
    ) -> SequenceState:
        """Queue a sequence; prompts given by length share nothing unless they share a salt."""
        self.added += 1
        tokens = list(range(10, 10 + prompt)) if isinstance(prompt, int) else prompt
        sequence = SequenceState(
            request_id=f"r{self.added}",
            index=0,
            prompt_ids=np.array(tokens, dtype=np.int32),
            max_new_tokens=new,
            urgency=self.config.urgency(arrival_s, priority),
            arrival=self.added,
            root=root_digest(f"own {self.added}" if salt is None else salt),
            **fields,
        )
        self.batcher.add(sequence)
        return sequence

    def group(self, prompt: int, count: int, new: int = 8) -> list[SequenceState]:
        """Choices of one request."""
        members: list[SequenceState] = []
        for index in range(count):
            member = self.add(prompt, new, salt="group", siblings=members)
            member.index = index
            members.append(member)
        return members

    def step(self) -> dict[SequenceState, int]:
        """One step; tokens computed by sequence."""
        batch = self.batcher.schedule()
        if batch is None:
            return {}
        self.finish(batch)
        return dict(zip(batch.sequences, batch.query_lens, strict=True))

    def finish(self, batch: TokenBatch) -> None:
        self.batcher.update(batch, [ANSWER] * sum(batch.num_samples))
        self.cache.check()

    def run(self, limit: int = 1000) -> int:
        """Steps until all is done."""
        for steps in range(limit):
            if not self.batcher.has_work:
                self.cache.check(idle=True)
                return steps
            assert self.step(), "work is left, but nothing was scheduled"
        raise AssertionError("the batcher does not come to an end")
