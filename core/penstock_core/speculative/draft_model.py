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
from penstock_core.kernels import drafting
from penstock_core.protocol.errors import InvalidConfiguration
from penstock_core.sampling import NO_TOKEN, Sampler, SamplingTable
from penstock_core.sampling.noise import Int64, position_keys
from penstock_core.speculative.acceptance import GradedAcceptance
from penstock_core.speculative.cost import StepCost
from penstock_core.speculative.proposer import EMPTY, Draft

_PROBABILITY_EDGES = np.array([0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97], dtype=np.float32)
_PRIOR = np.array([0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
_CAUGHT_UP = 4  # tokens per sequence up to which reading them is part of every draft
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


@dataclass(frozen=True, slots=True)
class _Start:
    """Sequences whose every token the model has read, and that get guesses.

    Attributes:
        limits: guesses wanted of each, [n]. slots: rows of the block tables. ends: positions of the first guesses.
        rows: of the sampling table. positions: index of the output token that the first guess is.
    """

    sequences: list[SequenceState]
    contexts: list[_Context]
    limits: Int64
    slots: Int64
    ends: Int64
    rows: Int64
    positions: Int64


class DraftModelProposer:
    """Drafts with a model. Grades are bands of the probability it gave to its choice, apart for greedy sequences.

    Args:
        engine: the loaded draft model with its pages.
        table: the target's sampling table; its rows are the sequences' rows.
        max_num_sequences: sequences that run at once.
        clock: seconds, for the cost of drafting.

    Attributes:
        start_cost: seconds until the first guess can be chosen, by number of sequences. cost: for each level.
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
        self.start_cost, self.cost = StepCost(), StepCost()
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
        self._logits(
            self._batch(first, first, first, first + 1)
        )  # the first pass is slow, and would be taken for the cost

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
        batch = self._batch(np.concatenate(unread), slots, starts, lengths)
        for context, tokens in zip(contexts, unread, strict=True):
            context.computed += len(tokens)
        chosen = [place for place in ready if place >= 0]
        if not chosen:
            self._engine.model.forward(batch, self._engine.layers)
            return drafts
        start = _Start(
            [sequences[place] for place in chosen],
            [self._contexts[sequences[place]] for place in chosen],
            np.array([depths[place] for place in chosen]),
            slots[drafting],
            (starts + lengths)[drafting],
            np.array([sequences[place].row for place in chosen]),
            np.array([len(sequences[place].output_ids) for place in chosen]),
        )
        guess = self._guess_in_one_call if self._in_one_call(start) else self._guess_by_levels
        found, levels, guessing_s = guess(start, batch, wanted, floor)
        if batch.num_tokens <= _CAUGHT_UP * len(lengths):  # else the time went into reading a text
            self.start_cost.observe(len(chosen), self._clock() - began - guessing_s)
            self.cost.observe(len(chosen), guessing_s / levels)
        for place, draft in zip(chosen, found, strict=True):
            drafts[place] = draft
        return drafts

    def _in_one_call(self, start: _Start) -> bool:
        """Whether the kernels can choose for all of these as the sampler would."""
        model, table, rows = self._engine.model, self._table, start.rows
        return (
            model.whole is not None
            and model.config.logit_softcap is None
            and not (table.filtered[rows] | table.stateful(rows)).any()
            and model.whole.bind(self._engine.layers, int((start.ends + start.limits).max()))
        )

    def _guess_in_one_call(
        self, start: _Start, batch: AttentionBatch, wanted: Int64, floor: float
    ) -> tuple[list[Draft], int, float]:
        """All levels in the kernels: (drafts, deepest level, seconds after the first reading)."""
        table, rows, depth = self._table, start.rows, int(start.limits.max())
        assert self._engine.model.whole is not None
        width = -(-int((start.ends + start.limits).max()) // self._engine.page_size)
        guesses = drafting.draft(
            self._engine.model.whole,
            batch,
            wanted,
            np.where(table.greedy[rows], 0.0, table.temperature[rows]),
            position_keys(table.stream[rows], start.positions + np.arange(depth)[:, None]),
            start.limits,
            start.ends,
            self._block_table[start.slots, :width],
            self.acceptance.all_rates(),
            _PROBABILITY_EDGES,
            floor,
        )
        counts, read = guesses.counts.tolist(), guesses.read.tolist()
        drafts = []
        for index, context in enumerate(start.contexts):
            tokens = guesses.tokens[index, : counts[index]].tolist()
            context.guesses.extend(tokens[: read[index]])
            drafts.append(Draft(tokens, guesses.grades[index, : counts[index]]))
        return drafts, max(1, *counts), guesses.guessing_s

    def _guess_by_levels(
        self, start: _Start, batch: AttentionBatch, wanted: Int64, floor: float
    ) -> tuple[list[Draft], int, float]:
        """The same with the sampler itself, a step of the model per level: for every option there is."""
        logits = self._logits(batch, wanted)
        began = self._clock()
        rows, positions, count = start.rows, start.positions, len(start.sequences)
        guesses: list[list[int]] = [[] for _ in range(count)]
        grades: list[list[int]] = [[] for _ in range(count)]
        active, level = np.arange(count), 0
        chance = np.ones(count)
        try:
            while True:
                tokens, found = self._choose(logits, rows[active], positions[active] + level)
                possible = tokens != NO_TOKEN
                active, tokens, found = active[possible], tokens[possible], found[possible]
                for index, token, grade in zip(active.tolist(), tokens.tolist(), found.tolist(), strict=True):
                    guesses[index].append(token)
                    grades[index].append(grade)
                chance[active] *= self.acceptance.rates(found)
                level += 1
                going = (chance[active] >= floor) & (start.limits[active] > level)
                active, tokens = active[going], tokens[going]
                if not len(active):
                    break
                self._table.push(rows[active], tokens)
                for index, token in zip(active.tolist(), tokens.tolist(), strict=True):
                    start.contexts[index].guesses.append(token)
                ones = np.ones(len(active), dtype=np.int64)
                places = start.ends[active] + level - 1
                logits = self._logits(self._batch(tokens, start.slots[active], places, ones))
        finally:
            self._table.pop(rows)
        drafts = [
            Draft(tokens_, np.array(grades_, dtype=np.int64)) for tokens_, grades_ in zip(guesses, grades, strict=True)
        ]
        return drafts, level, self._clock() - began

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

    def _batch(self, tokens: Int64, slots: Int64, starts: Int64, lengths: Int64) -> AttentionBatch:
        """`lengths[i]` tokens per slot from position `starts[i]` on."""
        engine, size = self._engine, self._engine.page_size
        query_start = np.zeros(len(slots) + 1, dtype=np.int32)
        np.cumsum(lengths, out=query_start[1:])
        positions = np.arange(len(tokens)) + np.repeat(starts - query_start[:-1], lengths)
        pages = self._block_table[np.repeat(slots, lengths), positions // size].astype(np.int64)
        ends = starts + lengths
        longest = int(ends.max())

        def tensor(array: npt.NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(array).to(engine.device)

        return AttentionBatch(
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

    def _logits(self, batch: AttentionBatch, wanted: Int64 | None = None) -> torch.Tensor:
        """Read a batch; logits of the `wanted` rows, or of all."""
        model = self._engine.model
        hidden = model.forward(batch, self._engine.layers)
        if wanted is not None and len(wanted) < len(hidden):
            hidden = hidden.index_select(0, torch.from_numpy(wanted).to(self._engine.device))
        return model.logits(hidden)


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
