"""Fake engines that make speculation interesting: a text that repeats itself, and drafts that are often right."""

from __future__ import annotations

import zlib
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from penstock_core.attention import AttentionBatch
from penstock_core.pipeline import UnifiedInferencePipeline
from penstock_core.speculative import SpeculationConfig
from tests.unit.pipeline.fake_engine import FakeEngine, pipeline

WORDS = np.arange(40, 72)


class RepetitiveEngine(FakeEngine):
    """Logits depend on the last two tokens and prefer a few words, so texts run into loops."""

    looks_back = 2

    def forward(self, batch: Any, chosen: Any = None) -> Any:
        output = super().forward(batch, chosen)
        hidden = np.zeros((batch.num_tokens, 1), dtype=np.int64)
        for n in range(len(batch.sequences)):
            context = self.slots[batch.block_table[n]].reshape(-1)
            for token in range(batch.query_start[n], batch.query_start[n + 1]):
                hidden[token] = state_of(context[: batch.positions[token] + 1], self.looks_back)
        states = torch.from_numpy(hidden)
        return type(output)(self.logits(states[torch.from_numpy(batch.logit_rows)]))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return logits_of(hidden, self.config.vocab_size)


def state_of(context: np.ndarray, memory: int) -> int:
    assert (context >= 0).all(), "a page was read before it was written"
    return zlib.crc32(context[-memory:].astype(np.int32).tobytes())


def logits_of(hidden: torch.Tensor, vocab_size: int, noise: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(np.stack([_row(state, vocab_size, noise) for state in hidden[:, 0].tolist()]))


@lru_cache(maxsize=4096)
def _row(state: int, vocab_size: int, noise: float) -> np.ndarray:
    row = np.random.default_rng(state).normal(0, 2, vocab_size)
    row[WORDS] += 6.0
    if noise:
        row += np.random.default_rng(state + 1).normal(0, noise, vocab_size)
    return row.astype(np.float32)


class DraftEngine:
    """Stands in for the draft model's engine; `noise` 0 makes it as good as the target."""

    def __init__(self, noise: float = 0.5, num_pages: int = 256, page_size: int = 4, max_model_len: int = 256) -> None:
        self.config = SimpleNamespace(vocab_size=FakeEngine().config.vocab_size)
        self.num_pages, self.page_size, self.max_model_len = num_pages, page_size, max_model_len
        self.device = torch.device("cpu")
        self.layers: list[Any] = []
        self.slots = np.full((num_pages, page_size), -1, dtype=np.int32)
        self.noise = noise
        self.model = self
        self.whole = None  # no kernels know it
        self.tokens_read = 0

    def forward(self, batch: AttentionBatch, layers: list[Any]) -> torch.Tensor:
        self.tokens_read += batch.num_tokens
        self.slots.reshape(-1)[batch.slot_mapping.numpy()] = batch.token_ids.numpy()
        starts, hidden = batch.query_start.tolist(), np.zeros((batch.num_tokens, 1), dtype=np.int64)
        for n in range(batch.num_sequences):
            context = self.slots[batch.block_table[n].numpy()].reshape(-1)
            assert batch.seq_lens[n] == batch.positions[starts[n + 1] - 1] + 1
            for token in range(starts[n], starts[n + 1]):
                hidden[token] = state_of(context[: int(batch.positions[token]) + 1], RepetitiveEngine.looks_back)
        return torch.from_numpy(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return logits_of(hidden, self.config.vocab_size, self.noise)


def speculating(
    proposer: str,
    depth: int | None = 4,
    engine: FakeEngine | None = None,
    draft: DraftEngine | None = None,
    **options: Any,
) -> UnifiedInferencePipeline:
    """A pipeline over a repetitive engine that speculates; `depth` None lets measured times decide."""
    if proposer in ("draft", "auto"):
        options["draft_engine"] = draft or DraftEngine()
    speculation = SpeculationConfig(proposer=proposer, fixed_depth=depth)
    return pipeline(engine or RepetitiveEngine(), speculation=speculation, **options)
