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
from penstock_core.kernels.drafting import Unread, draft
from penstock_core.protocol.errors import InvalidConfiguration
from penstock_core.sampling import NO_TOKEN, Sampler, SamplingTable
from penstock_core.sampling.noise import Int64
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
class _Part:
    """A sequence in one call: its place among the caller's, guesses wanted, and tokens to read, at least one."""

    place: int
    depth: int
    sequence: SequenceState
    context: _Context
    unread: list[int]


class DraftModelProposer:
    """Drafts with a model. Grades are bands of the probability it gave to its choice, apart for greedy sequences.

    Args:
        engine: the loaded draft model with its pages.
        table: the target's sampling table; its rows are the sequences' rows.
        max_num_sequences: sequences that run at once.
        clock: seconds, for the cost of drafting.

    Attributes:
        start_cost: seconds until the first guess can be chosen, by number of sequences. cost: for each level.
        reading_s: seconds of the latest call in which it read prompts, from which later calls profit.
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
        self.reading_s = 0.0
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
        reading, drafting = self._prepare(sequences, depths)
        self.reading_s = 0.0
        began = self._clock()
        if reading:
            self._engine.model.forward(self._read(reading), self._engine.layers)
            self.reading_s, began = self._clock() - began, self._clock()
        if not drafting:
            return drafts
        new_tokens = sum(len(part.unread) for part in drafting)
        guess = self._guess_in_one_call if self._in_one_call(drafting) else self._guess_by_levels
        found, levels, guessing_s = guess(drafting, floor)
        start_s = self._clock() - began - guessing_s
        if new_tokens <= _CAUGHT_UP * len(drafting):
            self.start_cost.observe(len(drafting), start_s)
            self.cost.observe(len(drafting), guessing_s / levels)
        elif self.start_cost.known:  # the rest of the time went into reading a text
            self.reading_s += max(0.0, start_s - self.start_cost.at(len(drafting)))
        for part, guessed in zip(drafting, found, strict=True):
            drafts[part.place] = guessed
        return drafts

    def _read(self, parts: list[_Part]) -> AttentionBatch:
        """The batch that computes what is unread of these; it counts as computed from here on."""
        batch = self._batch(
            np.array([token for part in parts for token in part.unread]),
            np.array([part.context.slot for part in parts]),
            np.array([part.context.computed for part in parts]),
            np.array([len(part.unread) for part in parts]),
        )
        for part in parts:
            part.context.computed += len(part.unread)
        return batch

    def _in_one_call(self, drafting: list[_Part]) -> bool:
        """Whether the kernels can choose for all of these as the sampler would."""
        model, table = self._engine.model, self._table
        if model.whole is None or model.config.logit_softcap is not None:
            return False
        rows = np.array([part.sequence.row for part in drafting])
        longest = max(part.sequence.num_tokens + part.depth for part in drafting)
        plain = not (table.filtered[rows] | table.stateful(rows)).any()
        return plain and model.whole.bind(self._engine.layers, longest)

    def _guess_in_one_call(self, drafting: list[_Part], floor: float) -> tuple[list[Draft], int, float]:
        """All levels in the kernels: (drafts, deepest level, seconds after the first reading)."""
        table = self._table
        unread = []
        for part in drafting:
            row, context = part.sequence.row, part.context
            heat = 0.0 if table.greedy[row] else float(table.temperature[row])
            index = len(part.sequence.output_ids)
            unread.append(
                Unread(part.unread, context.computed, context.slot, part.depth, heat, int(table.stream[row]), index)
            )
            context.computed += len(part.unread)
        whole, rates = self._engine.model.whole, self.acceptance.rates
        assert whole is not None
        guesses = draft(whole, unread, self._block_table, rates, _PROBABILITY_EDGES, floor)
        drafts = []
        for part, tokens, grades, read in zip(drafting, guesses.tokens, guesses.grades, guesses.read, strict=True):
            part.context.guesses.extend(tokens[:read])
            drafts.append(Draft(tokens, grades))
        return drafts, max(1, *map(len, guesses.tokens)), guesses.guessing_s

    def _guess_by_levels(self, drafting: list[_Part], floor: float) -> tuple[list[Draft], int, float]:
        """The same with the sampler itself, a step of the model per level: for every option there is."""
        wanted = np.cumsum([len(part.unread) for part in drafting]) - 1
        logits = self._logits(self._read(drafting), wanted)
        began = self._clock()
        count = len(drafting)
        rows = np.array([part.sequence.row for part in drafting])
        positions = np.array([len(part.sequence.output_ids) for part in drafting])
        limits = np.array([part.depth for part in drafting])
        slots = np.array([part.context.slot for part in drafting])
        ends = np.array([part.context.computed for part in drafting])
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
                chance[active] *= self.acceptance.rates[found]
                level += 1
                going = (chance[active] >= floor) & (limits[active] > level)
                active, tokens = active[going], tokens[going]
                if not len(active):
                    break
                self._table.push(rows[active], tokens)
                for index, token in zip(active.tolist(), tokens.tolist(), strict=True):
                    drafting[index].context.guesses.append(token)
                ones = np.ones(len(active), dtype=np.int64)
                logits = self._logits(self._batch(tokens, slots[active], ends[active] + level - 1, ones))
        finally:
            self._table.pop(rows)
        drafts = [Draft(some, of) for some, of in zip(guesses, grades, strict=True)]
        return drafts, level, self._clock() - began

    def finish(self, sequence: SequenceState) -> None:
        """Give the sequence's pages back."""
        context = self._contexts.pop(sequence, None)
        if context is not None:
            self._cache.release(context.pages)
            self._free_slots.append(context.slot)

    def _prepare(self, sequences: Sequence[SequenceState], depths: Sequence[int]) -> tuple[list[_Part], list[_Part]]:
        """What the model reads in this call: of sequences that it will not have read to their end; of those it will."""
        reading: list[_Part] = []
        drafting: list[_Part] = []
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
            unread = _tokens(sequence, context.computed, context.computed + part)
            (drafting if part == missing else reading).append(_Part(place, depth, sequence, context, unread))
        return reading, drafting

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


def _tokens(sequence: SequenceState, start: int, end: int) -> list[int]:
    """Tokens `start` to `end` of prompt and output."""
    prompt = sequence.num_prompt
    if start >= prompt:
        return sequence.output_ids[start - prompt : end - prompt]
    read: list[int] = sequence.prompt_ids[start : min(end, prompt)].tolist()
    return read if end <= prompt else read + sequence.output_ids[: end - prompt]
