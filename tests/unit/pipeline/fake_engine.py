"""An engine without a model: logits are a pure function of the tokens that are really in the pages.

Exact whatever the batch, so tests can demand equality bit for bit; a page that is wrong changes the output.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from penstock_core.batching import TokenBatch
from penstock_core.distributed import StepOutput
from penstock_core.distributed.inputs import carry
from penstock_core.models.tokenizer import Tokenizer
from penstock_core.pipeline import (
    ChoiceChunk,
    EngineRequest,
    FinishedRequest,
    PipelineConfig,
    UnifiedInferencePipeline,
)
from penstock_core.protocol.requests import SamplingParams

BUNDLED = Path(__file__).parents[3] / "worker/penstock_worker/bundled/penstock-story"
EOS = 1


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_checkpoint(BUNDLED)


class FakeEngine:
    """Stands in for DistributedInferenceEngine.

    `explode` raises in the next forward pass; `poison` makes all logits NaN; `sizes` records tokens per step.
    """

    def __init__(self, num_pages: int = 256, page_size: int = 4, max_model_len: int = 256, host_pages: int = 0) -> None:
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(vocab_size=tokenizer().vocab_size, eos_token_ids=(EOS,))
        self.num_pages, self.page_size, self.page_bytes = num_pages, page_size, 1024
        self.max_model_len = max_model_len
        self.num_host_pages = host_pages
        self.memory = ()
        self.host = np.full((host_pages, page_size), -1, dtype=np.int32)
        self.slots = np.full((num_pages, page_size), -1, dtype=np.int32)
        self.explode: Exception | None = None
        self.poison = False
        self.sizes: list[int] = []

    def forward(self, batch: TokenBatch, chosen: torch.Tensor | None = None) -> StepOutput:
        self.sizes.append(batch.num_tokens)
        if batch.carried is not None:
            assert chosen is not None
            carry(batch.carried, chosen, torch.from_numpy(batch.token_ids))
        if self.explode is not None:
            error, self.explode = self.explode, None
            raise error
        for page, slot in batch.offloads:
            self.host[slot] = self.slots[page]
        for slot, page in batch.restores:
            self.slots[page] = self.host[slot]
        for source, destination in batch.copies:
            self.slots[destination] = self.slots[source]
        self.slots.reshape(-1)[batch.slot_mapping] = batch.token_ids
        hidden = np.zeros((batch.num_tokens, 1), dtype=np.int64)
        for n in range(len(batch.sequences)):
            context = self.slots[batch.block_table[n]].reshape(-1)
            for token in range(batch.query_start[n], batch.query_start[n + 1]):
                hidden[token] = zlib.crc32(context[: batch.positions[token] + 1].tobytes())
        states = torch.from_numpy(hidden)
        self.states = states
        return StepOutput(self.logits(states[torch.from_numpy(batch.logit_rows)]))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.poison:
            return torch.full((len(hidden), self.config.vocab_size), float("nan"))
        rows = [np.random.default_rng(int(state)).normal(0, 2, self.config.vocab_size) for state in hidden]
        out = np.array(rows, dtype=np.float32).reshape(len(rows), self.config.vocab_size)
        out[:, EOS] += 2.0  # so that sequences end now and then
        return torch.from_numpy(out)

    def close(self) -> None:
        pass

    def prompt_logits(self, first: int, last: int) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(first, last, 3):
            yield start, self.logits(self.states[start : min(start + 3, last)])


def pipeline(engine: FakeEngine | None = None, clock: Any = None, **options: Any) -> UnifiedInferencePipeline:
    """A pipeline over a fake engine."""
    options.setdefault("max_num_sequences", 8)
    draft_engine = options.pop("draft_engine", None)
    config = PipelineConfig(model="fake", served_name="fake", **options)
    extra = {"draft_engine": draft_engine, **({"clock": clock} if clock is not None else {})}
    return UnifiedInferencePipeline(config, engine=engine or FakeEngine(), tokenizer=tokenizer(), **extra)  # type: ignore[arg-type]


class Collected:
    """Everything that a pipeline delivered, checked as it came: contiguous chunks, one output per request and step."""

    def __init__(self, pipe: UnifiedInferencePipeline) -> None:
        self.pipe = pipe
        self.chunks: dict[str, list[ChoiceChunk]] = {}
        self.results: dict[str, FinishedRequest] = {}

    def step(self) -> None:
        outputs = self.pipe.step()
        assert len({output.request_id for output in outputs}) == len(outputs)
        for output in outputs:
            assert output.request_id not in self.results, "an output after the end"
            for chunk in output.chunks:
                assert len(chunk.pieces) == max(1, len(chunk.token_ids))
            self.chunks.setdefault(output.request_id, []).extend(output.chunks)
            if output.result is not None:
                self.results[output.request_id] = output.result

    def run(self, steps: int = 10_000) -> Collected:
        while self.pipe.has_work and steps:
            self.step()
            steps -= 1
        return self

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        return [token for chunk in self._of(request_id, index) for token in chunk.token_ids]

    def text(self, request_id: str, index: int = 0) -> str:
        return "".join(piece for chunk in self._of(request_id, index) for piece in chunk.pieces)

    def _of(self, request_id: str, index: int) -> list[ChoiceChunk]:
        chunks = [chunk for chunk in self.chunks.get(request_id, []) if chunk.index == index]
        offset = chunks[0].offset if chunks else 0
        for chunk in chunks:
            assert chunk.offset == offset, "chunks leave a gap"
            offset += len(chunk.token_ids)
        return chunks


def request(request_id: str, prompt: list[int] | int = 10, **options: Any) -> EngineRequest:
    """A request; an integer prompt stands for that many tokens."""
    own = {key: options.pop(key) for key in list(options) if key in EngineRequest.__slots__}
    tokens = [20 + (7 * i) % 500 for i in range(prompt)] if isinstance(prompt, int) else prompt
    options.setdefault("max_tokens", 12)
    options.setdefault("seed", 11)
    return EngineRequest(request_id, tokens, SamplingParams(**options), **own)


def run_one(wanted: EngineRequest, pipe: UnifiedInferencePipeline | None = None) -> FinishedRequest:
    """The result of one request, alone in a pipeline."""
    pipe = pipe or pipeline()
    pipe.add_request(wanted)
    return Collected(pipe).run().results[wanted.request_id]
