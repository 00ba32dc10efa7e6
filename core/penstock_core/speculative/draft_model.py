"""Drafting with a small model of the same vocabulary: its own paged cache, all sequences in one batch, the same noise.

The draft samples with the target's sampling table, so with the target's options and the target's noise: where the two
models' distributions are near, they choose the same token (coupling by common random numbers; Daliri, Musco, Suresh
2024). Keys and values of guesses that turned out right are kept; wrong ones are overwritten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from penstock_core.attention import AttentionBatch
from penstock_core.batching import SequenceState
from penstock_core.cache import PagedAttentionKVCache
from penstock_core.distributed import DistributedInferenceEngine
from penstock_core.protocol.errors import InvalidConfiguration
from penstock_core.sampling import NO_TOKEN, Sampler, SamplingTable
from penstock_core.sampling.noise import Int64
from penstock_core.speculative.acceptance import GradedAcceptance
from penstock_core.speculative.cost import StepCost
from penstock_core.speculative.proposer import EMPTY, Draft

_PROBABILITY_EDGES = np.array([0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97])
_PRIOR = np.array([0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
_CATCH_UP_TOKENS = 512  # of prompts and preempted sequences, read by the draft model per call


@dataclass(slots=True)
class _Context:
    """What the draft model has of a sequence.

    Attributes:
        slot: row of the block tables.
        pages: its pages.
        computed: tokens of the sequence in them, without guesses. guesses: those read after them.
    """

    slot: int
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    guesses: list[int] = field(default_factory=list)


class DraftModelProposer:
    """Drafts with a model. Grades are bands of the probability it gave to its choice, apart for greedy sequences.

    Args:
        engine: the loaded draft model with its pages.
        table: the target's sampling table; its rows are the sequences' rows.
        max_num_sequences: sequences that run at once.
        clock: seconds, for the cost of drafting.
    """

    name = "draft"

    def __init__(
        self,
        engine: DistributedInferenceEngine,
        table: SamplingTable,
        max_num_sequences: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if engine.config.vocab_size != table.vocab_size:
            raise InvalidConfiguration(
                "speculation.draft_model",
                f"has a vocabulary of {engine.config.vocab_size} tokens, the model one of {table.vocab_size}; "
                "use a draft model that was trained with the model's tokenizer",
            )
        self.acceptance = GradedAcceptance(np.concatenate([_PRIOR, _PRIOR]))
        self.cost = StepCost()
        self._engine = engine
        self._table = table
        self._clock = clock
        self._sampler = Sampler()
        self._cache = PagedAttentionKVCache(engine.num_pages, engine.page_size, prefix_cache=False)
        width = -(-engine.max_model_len // engine.page_size)
        self._block_table = np.zeros((max_num_sequences, width), dtype=np.int32)
        self._free_slots = list(range(max_num_sequences))
        self._contexts: dict[SequenceState, _Context] = {}
        first = np.zeros(1, dtype=np.int64)
        self._forward(first, first, first, first + 1, first)  # the first pass is slow, and would be taken for the cost

    def propose(self, sequences: Sequence[SequenceState], depths: Sequence[int], floor: float = 0.0) -> list[Draft]:
        """Drafts of up to `depths[i]` tokens; none while the model still reads the prompt, or has no pages left."""
        drafts = [EMPTY] * len(sequences)
        ready, contexts, unread = self._prepare(sequences, depths)
        if not contexts:
            return drafts
        starts = np.array([context.computed for context in contexts])
        lengths = np.array([len(tokens) for tokens in unread])
        drafting = np.array([place >= 0 for place in ready])
        wanted = (np.cumsum(lengths) - 1)[drafting]
        slots = np.array([context.slot for context in contexts])
        began = self._clock()
        logits = self._forward(np.concatenate(unread), slots, starts, lengths, wanted)
        for context, tokens in zip(contexts, unread, strict=True):
            context.computed += len(tokens)
        chosen = [place for place in ready if place >= 0]
        if not chosen:
            return drafts
        guesses: list[list[int]] = [[] for _ in chosen]
        grades: list[list[int]] = [[] for _ in chosen]
        rows = np.array([sequences[place].row for place in chosen])
        positions = np.array([len(sequences[place].output_ids) for place in chosen])
        limits = np.array([depths[place] for place in chosen])
        active, slots = np.arange(len(chosen)), slots[drafting]
        ends = (starts + lengths)[drafting]
        chance = np.ones(len(chosen))
        level, batch_tokens = 0, int(lengths.sum())
        try:
            while True:
                tokens, found = self._choose(logits, rows[active], positions[active] + level)
                self.cost.observe(batch_tokens, self._clock() - began)
                possible = tokens != NO_TOKEN
                active, tokens, found = active[possible], tokens[possible], found[possible]
                for index, token, grade in zip(active.tolist(), tokens.tolist(), found.tolist(), strict=True):
                    guesses[index].append(token)
                    grades[index].append(grade)
                chance[active] *= self.acceptance.rates(found)
                level += 1
                going = (chance[active] >= floor) & (limits[active] > level)
                active, tokens = active[going], tokens[going]
                if not len(active):
                    break
                self._table.push(rows[active], tokens)
                for index, token in zip(active.tolist(), tokens.tolist(), strict=True):
                    self._contexts[sequences[chosen[index]]].guesses.append(token)
                began, batch_tokens = self._clock(), len(active)
                ones = np.ones(len(active), dtype=np.int64)
                logits = self._forward(tokens, slots[active], ends[active] + level - 1, ones, np.arange(len(active)))
        finally:
            self._table.pop(rows)
        for place, tokens_, grades_ in zip(chosen, guesses, grades, strict=True):
            drafts[place] = Draft(tokens_, np.array(grades_, dtype=np.int64))
        return drafts

    def finish(self, sequence: SequenceState) -> None:
        """Give the sequence's pages back."""
        context = self._contexts.pop(sequence, None)
        if context is not None:
            self._cache.release(context.pages)
            self._free_slots.append(context.slot)

    def _prepare(
        self, sequences: Sequence[SequenceState], depths: Sequence[int]
    ) -> tuple[list[int], list[_Context], list[Int64]]:
        """What the model must read first: (place among `sequences`, or -1 if only reading), context, unread tokens."""
        ready: list[int] = []
        contexts: list[_Context] = []
        unread: list[Int64] = []
        budget = _CATCH_UP_TOKENS
        for place, (sequence, depth) in enumerate(zip(sequences, depths, strict=True)):
            if not depth or sequence.num_tokens + depth > self._engine.max_model_len:
                continue
            context = self._context(sequence)
            if context is None:
                continue
            missing = sequence.num_tokens - context.computed
            part = min(missing, budget)
            if part <= 0 or not self._grow(context, context.computed + part + (depth if part == missing else 0)):
                continue
            budget -= part
            ready.append(place if part == missing else -1)
            contexts.append(context)
            unread.append(_tokens(sequence, context.computed, context.computed + part))
        return ready, contexts, unread

    def _context(self, sequence: SequenceState) -> _Context | None:
        """The sequence's context, with the guesses that came true counted as computed. None: no slot is free."""
        context = self._contexts.get(sequence)
        if context is None:
            if not self._free_slots:
                return None
            context = self._contexts[sequence] = _Context(self._free_slots.pop())
        if context.guesses:
            actual = sequence.output_ids[context.computed - sequence.num_prompt :]
            # The last token stays unread: its logits are wanted.
            for guess, token in zip(context.guesses, actual[:-1], strict=False):
                if guess != token:
                    break
                context.computed += 1
            context.guesses.clear()
        return context

    def _grow(self, context: _Context, tokens: int) -> bool:
        missing = -(-tokens // self._engine.page_size) - len(context.pages)
        if missing > self._cache.num_available:
            return False
        if missing > 0:
            held = len(context.pages)
            context.pages += self._cache.allocate(missing)
            self._block_table[context.slot, held : held + missing] = context.pages[held:]
        return True

    def _choose(self, logits: torch.Tensor, rows: Int64, positions: Int64) -> tuple[Int64, Int64]:
        """Tokens as the target would choose them from these logits, and the grades of the choices."""
        tokens = self._sampler.sample(self._table, logits, rows, positions, with_logprobs=False).token_ids
        probability = _probability(logits, np.maximum(tokens, 0), self._table.temperature[rows].astype(np.float32))
        grades = np.searchsorted(_PROBABILITY_EDGES, np.nan_to_num(probability))
        return tokens, grades + np.where(self._table.greedy[rows], 0, len(_PRIOR))

    def _forward(self, tokens: Int64, slots: Int64, starts: Int64, lengths: Int64, wanted: Int64) -> torch.Tensor:
        """Read `lengths[i]` tokens per slot from position `starts[i]` on; logits of the `wanted` places."""
        engine, size = self._engine, self._engine.page_size
        query_start = np.zeros(len(slots) + 1, dtype=np.int32)
        np.cumsum(lengths, out=query_start[1:])
        positions = np.arange(len(tokens)) + np.repeat(starts - query_start[:-1], lengths)
        pages = self._block_table[np.repeat(slots, lengths), positions // size].astype(np.int64)
        ends = starts + lengths
        longest = int(ends.max())

        def tensor(array: npt.NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(array).to(engine.device)

        batch = AttentionBatch(
            token_ids=tensor(tokens),
            positions=tensor(positions),
            slot_mapping=tensor(pages * size + positions % size),
            query_start=tensor(query_start),
            seq_lens=tensor(ends.astype(np.int32)),
            block_table=tensor(self._block_table[slots, : -(-longest // size)]),
            max_query_len=int(lengths.max()),
            max_seq_len=longest,
            page_size=size,
        )
        hidden = engine.model.forward(batch, engine.layers)
        if len(wanted) < len(tokens):
            hidden = hidden.index_select(0, tensor(wanted))
        return engine.model.logits(hidden)


def _probability(logits: torch.Tensor, tokens: Int64, heat: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Probability of one token per row in softmax(logits / heat), [n]."""
    if logits.device.type != "cpu":
        scaled = logits / torch.from_numpy(heat).to(logits.device)[:, None]
        chosen = scaled.gather(-1, torch.from_numpy(tokens).to(logits.device)[:, None])[:, 0]
        return (chosen - scaled.logsumexp(-1)).exp().cpu().numpy()
    values = logits.numpy()
    picked = values[np.arange(len(values)), tokens]
    with np.errstate(over="ignore", invalid="ignore"):  # a row without a choice, or one far below the likeliest token
        total: npt.NDArray[np.float32] = np.exp((values - picked[:, None]) / heat[:, None]).sum(-1)
    return 1.0 / total


def _tokens(sequence: SequenceState, start: int, end: int) -> Int64:
    """Tokens `start` to `end` of prompt and output."""
    prompt = sequence.num_prompt
    if start >= prompt:
        return np.array(sequence.output_ids[start - prompt : end - prompt], dtype=np.int64)
    read = sequence.prompt_ids[start : min(end, prompt)].astype(np.int64)
    return read if end <= prompt else np.concatenate([read, np.array(sequence.output_ids[: end - prompt], np.int64)])
