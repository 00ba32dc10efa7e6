"""20,000 random steps of the batcher with a mocked model that answers from what the pages really hold.

The mock stores token ids in page slots and derives each next token from all tokens it reads back through the block
table, so a page that was freed, shared, copied, evicted or named wrongly changes an output. Invariants are checked at
each step; every finished sequence must have the tokens that its prompt alone determines.
"""

from __future__ import annotations

import os
import random
import zlib
from collections import Counter

import numpy as np
import pytest

from penstock_core.batching import BatchingConfig, SequenceState, TokenBatch, TokenBatcher
from penstock_core.cache import PagedAttentionKVCache, root_digest
from penstock_core.protocol.jobs import FinishReason

STEPS = 20_000
VOCAB = 50
STOP = frozenset({7})


def next_token(tokens: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(tokens, dtype=np.int32).tobytes()) % VOCAB


def expected_output(prompt: np.ndarray, max_new_tokens: int, min_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_new_tokens:
        token = next_token(np.array(tokens))
        tokens.append(token)
        if token in STOP and len(tokens) - len(prompt) > min_tokens:
            break
    return [int(t) for t in tokens[len(prompt) :]]


class PageModel:
    """Writes every token of the step first, as attention does, then reads each sampled context back."""

    def __init__(self, num_pages: int, page_size: int, host_pages: int) -> None:
        self.host = np.full((host_pages, page_size), -2, dtype=np.int32)
        self.slots = np.full((num_pages, page_size), -1, dtype=np.int32)

    def forward(self, batch: TokenBatch, before: list[int]) -> list[int]:
        """`before`: what the step before answered, of which the batch's tokens may carry some."""
        if batch.carried is not None:
            for at, place in batch.carried.T.tolist():
                batch.token_ids[at] = before[place]
        for moves in (batch.offloads, batch.restores, batch.copies):
            assert len({to for _, to in moves}) == len(moves), "two pages of a step move to one place"
        for page, slot in batch.offloads:
            self.host[slot] = self.slots[page]
        for slot, page in batch.restores:
            self.slots[page] = self.host[slot]
        if batch.copies:
            sources, destinations = (list(side) for side in zip(*batch.copies, strict=True))
            self.slots[destinations] = self.slots[sources]
        assert len(set(batch.slot_mapping.tolist())) == batch.num_tokens, "two tokens of a step go to one slot"
        self.slots.reshape(-1)[batch.slot_mapping] = batch.token_ids
        answers = []
        place = 0
        for n, samples in enumerate(batch.num_samples):
            if samples:
                context = self.slots[batch.block_table[n]].reshape(-1)
                for position in batch.positions[batch.logit_rows[place : place + samples]]:
                    answers.append(next_token(context[: position + 1]))
                place += samples
        return answers


class Fuzz:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.page_size = self.random.choice([1, 2, 4, 8])
        self.max_len = 48
        num_pages = -(-self.max_len // self.page_size) + self.random.choice([0, 3, 20, 60])
        rows = self.random.choice([1, 2, 4, 8])
        self.config = BatchingConfig(
            max_num_sequences=rows,
            max_batch_tokens=rows + self.random.choice([0, 3, 10, 60]),
            max_model_len=self.max_len,
            watermark_pages=self.random.choice([0, 1, 2]),
            aging_interval_s=20.0,
            preemption_margin=self.random.choice([None, 0.0, 0.5]),
            preemption_min_steps=self.random.choice([0, 3]),
        )
        prefix_cache = self.random.random() < 0.8
        host_pages = self.random.choice([0, 1, 5, 40])
        self.cache = PagedAttentionKVCache(num_pages, self.page_size, prefix_cache=prefix_cache, host_pages=host_pages)
        self.batcher = TokenBatcher(self.config, self.cache)
        self.model = PageModel(num_pages, self.page_size, host_pages)
        self.drafts = self.random.choice([0, 0, 3])
        self.looks_ahead = not self.drafts and self.random.random() < 0.7
        self.ahead: tuple[TokenBatch, list[int]] | None = None  # a step whose tokens are not read yet
        self.ended: list[SequenceState] = []  # whose pages a step in flight still writes to
        self.now = 0.0
        self.arrivals = 0
        self.live: dict[SequenceState, float] = {}
        self.stems = [self.tokens(self.max_len) for _ in range(3)]
        self.finished: Counter[str] = Counter()
        self.preempted = 0

    def tokens(self, count: int) -> np.ndarray:
        return np.array([self.random.randrange(VOCAB) for _ in range(count)], dtype=np.int32)

    def add_request(self) -> None:
        stem = self.random.choice(self.stems)
        cut = self.random.randrange(1, self.max_len - 2)
        own = self.tokens(self.random.choice([0, 0, 1, 5]))
        prompt = np.concatenate([stem[:cut], own])[: self.max_len - 2]
        room = self.max_len - len(prompt)
        max_new = self.random.randrange(1, room + 1)
        priority = self.random.choice([0, 5, 5, 9])
        salt = self.random.choice(["a", "b"])
        deadline = self.now + self.random.uniform(0, 30) if self.random.random() < 0.1 else None
        group: list[SequenceState] = []
        wants_prompt_logits = self.random.random() < 0.05
        for index in range(self.random.choice([1, 1, 1, 3])):
            self.arrivals += 1
            resumed = []
            if self.random.random() < 0.1:
                whole = expected_output(prompt, max_new, 0)
                resumed = whole[: self.random.randrange(len(whole))]
            group.append(
                SequenceState(
                    request_id=f"r{self.arrivals}",
                    index=index,
                    prompt_ids=prompt,
                    max_new_tokens=max_new,
                    urgency=self.config.urgency(self.now, priority),
                    arrival=self.arrivals,
                    root=root_digest(salt),
                    deadline_s=deadline,
                    stop_ids=STOP,
                    output_ids=resumed,
                    wants_prompt_logits=wants_prompt_logits and index == 0,
                )
            )
        for sequence in group:
            sequence.siblings = group
            self.batcher.add(sequence)
            self.live[sequence] = self.now

    def end(self, sequence: SequenceState) -> None:
        if sequence.in_flight:
            self.ended.append(sequence)
            return
        born = self.live.pop(sequence)
        assert sequence.finish_reason is not None
        assert not sequence.pending
        self.finished[sequence.finish_reason] += 1
        self.preempted += sequence.preemptions
        whole = expected_output(sequence.prompt_ids, sequence.max_new_tokens, sequence.min_tokens)
        assert sequence.output_ids == whole[: len(sequence.output_ids)]
        if sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert sequence.output_ids == whole
        assert sequence.row == -1
        assert not sequence.pages
        assert self.now - born < 5_000.0, "a sequence starved"

    def propose(self) -> None:
        for sequence in self.batcher.running:
            if sequence.num_tokens - sequence.num_computed == 1 and self.random.random() < 0.7:
                tokens = np.concatenate([sequence.prompt_ids, np.array(sequence.output_ids, dtype=np.int32)])
                drafts: list[int] = []
                for _ in range(self.random.randrange(self.drafts + 1)):
                    right = self.random.random() < 0.7
                    drafts.append(next_token(tokens) if right else self.random.randrange(VOCAB))
                    tokens = np.append(tokens, drafts[-1])
                sequence.propose(drafts)

    def step(self, arrival_rate: float) -> None:
        self.now += self.random.uniform(0.1, 1.0)
        if self.random.random() < arrival_rate and len(self.live) < 40:
            self.add_request()
        going = [sequence for sequence in self.live if sequence.finish_reason is None]
        if going and self.random.random() < 0.02:
            victim = self.random.choice(going)
            self.batcher.finish(victim, FinishReason.CANCELLED)
            self.end(victim)
        if self.random.random() < 0.005:
            self.cache.invalidate(self.random.choice([None, "a"]))
        for sequence in self.batcher.expire(self.now):
            self.end(sequence)
        if self.drafts:
            self.propose()
        if self.random.random() < 0.1:
            self.read()
        had_work = self.batcher.has_work
        batch = self.batcher.schedule()
        if batch is None:
            assert not had_work or self.ahead is not None, "work is left, but nothing was scheduled"
            self.read()
            if self.batcher.holds_nothing:
                self.cache.check(idle=True)
            return
        self.check(batch)
        if self.random.random() < 0.005:
            self.read()
            self.fail(batch)
            return
        answers = self.model.forward(batch, self.ahead[1] if self.ahead else [])
        doomed = None
        if self.random.random() < 0.02:  # cancelled while the step is in flight
            doomed = self.random.choice(batch.sequences)
            held = list(doomed.pages)
            self.batcher.finish(doomed, FinishReason.CANCELLED)
            assert doomed.pages == held, "pages were freed while a write to them was pending"
            self.ended.append(doomed)
        if not self.read():
            self.fail(batch)  # it was computed on top of one that failed
        elif self.looks_ahead and self.random.random() < 0.9:
            self.batcher.launch(batch)
            self.ahead = batch, answers
        else:
            self.update(batch, answers)

    def read(self) -> bool:
        """Take the tokens of the step that was launched ahead, if there is one; False if it has failed."""
        if self.ahead is None:
            return True
        ahead, self.ahead = self.ahead, None
        if self.random.random() < 0.005:
            self.fail(ahead[0])
            return False
        self.update(*ahead)
        return True

    def fail(self, batch: TokenBatch) -> None:
        for sequence in self.batcher.fail(batch):
            self.end(sequence)
        self.bury()

    def update(self, batch: TokenBatch, answers: list[int]) -> None:
        for sequence, _, count in self.batcher.update(batch, answers):
            assert 1 <= count <= 1 + self.drafts
            if sequence.finish_reason is not None:
                self.end(sequence)
        self.bury()

    def bury(self) -> None:
        """Ended sequences that no step writes to any more are gone."""
        ended, self.ended = self.ended, []
        for sequence in ended:
            if sequence in self.live:
                self.end(sequence)

    def check(self, batch: TokenBatch) -> None:
        self.cache.check()
        assert batch.num_tokens == sum(batch.query_lens) <= self.config.max_batch_tokens
        assert len(set(batch.sequences)) == len(batch.sequences)
        assert all(length > 0 for length in batch.query_lens)
        running, waiting = self.batcher.running, self.batcher.waiting
        assert len(running) <= self.config.max_num_sequences
        assert len({s.row for s in running}) == len(running)
        assert set(running) | set(waiting) == {s for s in self.live if s.finish_reason is None}
        assert [s.order for s in running] == sorted(s.order for s in running)
        assert [s.order for s in waiting] == sorted(s.order for s in waiting)
        held = Counter(page for s in self.live if s.is_running for page in s.pages)
        assert all(self.cache.holders(page) == count for page, count in held.items())
        assert self.cache.statistics().used_pages == len(held)
        decoding = [s for s in running if s.num_tokens - s.num_computed == 1 and not s.is_closing]
        assert len(batch.sequences) >= len(decoding), "a decode was left out"
        for n, sequence in enumerate(batch.sequences):
            assert sequence.row >= 0
            assert len(sequence.pages) * self.page_size >= sequence.num_computed + batch.query_lens[n]
            assert (batch.block_table[n][: len(sequence.pages)] == sequence.pages[: batch.block_table.shape[1]]).all()
        writers: dict[int, set[int]] = {}
        for token, page in enumerate((batch.slot_mapping // self.page_size).tolist()):
            writers.setdefault(page, set()).add(int(np.searchsorted(batch.query_start, token, side="right")))
        fresh = self.batcher._fresh_pages  # filled by this step, and perhaps shared by those admitted into it
        for page, sequences in writers.items():
            assert len(sequences) == 1
            assert self.cache.holders(page) == 1 or page in fresh, "a shared page is written"

    def drain(self) -> None:
        for _ in range(5_000):
            if not self.batcher.has_work and self.ahead is None:
                break
            self.step(arrival_rate=0.0)
        assert not self.live
        self.cache.check(idle=True)


@pytest.mark.parametrize("part", range(40))
def test_batcher_keeps_its_invariants_over_random_steps(part: int) -> None:
    base = int(os.environ.get("PENSTOCK_FUZZ_SEED", "20260729"))
    seed = base * 100 + part
    print(f"fuzz seed {seed} (PENSTOCK_FUZZ_SEED={base}, part {part})")
    fuzz = Fuzz(seed)
    for _ in range(STEPS // 40):
        fuzz.step(arrival_rate=0.4)
    fuzz.drain()
    assert sum(fuzz.finished.values()) > 30
