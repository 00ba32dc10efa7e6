"""TokenBatcher: decides which sequences compute which tokens in the next step, and keeps their pages.

One rule for everything: each sequence's `num_computed` chases its `num_tokens`, running sequences first, then waiting
ones, until the token budget is spent. The pipeline calls expire, schedule and update in turn; nothing here touches
tensors, text or clocks. Where it looks one step ahead, it calls `launch` and schedules again before it updates: then
each sampled sequence has one pending token, whose place is known and whose value is not.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Sequence
from operator import attrgetter

import numpy as np

from penstock_core.batching.budget import BudgetController
from penstock_core.batching.config import BatchingConfig
from penstock_core.batching.sequence import WAITING, SequenceState
from penstock_core.batching.table import SequenceTable, TokenBatch
from penstock_core.cache import PagedAttentionKVCache, extend_digests
from penstock_core.protocol.jobs import FinishReason

_ORDER = attrgetter("order")


class TokenBatcher:
    """Scheduler of one engine. Single-threaded: all calls come from the step loop.

    Args:
        config: settings.
        cache: the page pool; must hold at least one sequence of `config.max_model_len` tokens.
    """

    def __init__(self, config: BatchingConfig, cache: PagedAttentionKVCache) -> None:
        if cache.num_pages * cache.page_size < config.max_model_len:
            raise ValueError(
                f"a pool of {cache.num_pages} pages cannot hold one sequence of max_model_len {config.max_model_len}"
            )
        self.config = config
        self.cache = cache
        self.table = SequenceTable(config.max_num_sequences, config.max_model_len, cache.page_size)
        self.running: list[SequenceState] = []  # both lists in order of service
        self.waiting: list[SequenceState] = []
        self.budget: BudgetController | None = None
        if config.target_step_ms is not None:
            self.budget = BudgetController(
                config.target_step_ms / 1e3, config.max_num_sequences, config.max_batch_tokens
            )
        self._free_rows = list(range(config.max_num_sequences - 1, -1, -1))
        self._deadlines: list[tuple[float, int, SequenceState]] = []
        self._step = 0
        self._admitted: list[SequenceState] = []
        self._vacated: list[int] = []
        self._copies: list[tuple[int, int]] = []
        self._fresh_pages: set[int] = set()  # named in this step, computed only by its forward pass
        self._launched = 0  # steps counted as computed whose tokens nobody has read
        self._doomed: list[SequenceState] = []  # finished while their step was in flight
        self.preemptions = 0

    # --- what the pipeline asks -----------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any sequence runs or waits."""
        return bool(self.running or self.waiting)

    @property
    def holds_nothing(self) -> bool:
        """Whether no sequence holds a page, not even one that has ended while its step was in flight."""
        return not (self.running or self._doomed)

    def add(self, sequence: SequenceState) -> None:
        """Queue a sequence. Its prompt and `max_new_tokens` must fit `max_model_len` (the pipeline refuses others)."""
        if sequence.num_prompt + sequence.max_new_tokens > self.config.max_model_len:
            raise ValueError(
                f"{sequence.num_prompt} prompt and {sequence.max_new_tokens} output tokens exceed "
                f"max_model_len {self.config.max_model_len}"
            )
        insort(self.waiting, sequence, key=_ORDER)
        if sequence.deadline_s is not None:
            heapq.heappush(self._deadlines, (sequence.deadline_s, sequence.arrival, sequence))

    def expire(self, now_s: float) -> list[SequenceState]:
        """Finish every sequence whose deadline has passed, waiting or running; the sequences."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            sequence = heapq.heappop(self._deadlines)[2]
            if sequence.finish_reason is None:
                self.finish(sequence, FinishReason.EXPIRED)
                expired.append(sequence)
        return expired

    def finish(self, sequence: SequenceState, reason: FinishReason) -> None:
        """End a sequence. Its pages go back now, or after the update if a step in flight still writes to them."""
        sequence.finish_reason = reason
        self._leave(sequence)

    def schedule(self) -> TokenBatch | None:
        """Choose the next step. None when there is nothing to compute."""
        self._step += 1
        self._fresh_pages.clear()
        self._make_room()
        budget = self.config.max_batch_tokens if self.budget is None else self.budget.budget
        running = self.running.copy()
        if self._launched:
            running = [sequence for sequence in running if not sequence.is_closing]
        decoding = sum(1 for s in running if s.num_tokens - s.num_computed == 1)
        prefilling = self.waiting or decoding < len(running)
        kept_from_drafts = budget // 4 if prefilling else 0
        chosen: list[SequenceState] = []
        lengths: list[int] = []
        for sequence in running:
            if not sequence.is_running:
                continue  # preempted just now, for the pages of a more urgent one
            known = sequence.num_tokens
            if known - sequence.num_computed == 1:
                decoding -= 1
            else:  # a partly computed prompt goes after every decode, and after more urgent arrivals
                budget = self._admit_waiting(budget, decoding, chosen, lengths, ahead_of=sequence)
            room = budget - decoding
            query_len = min(known - sequence.num_computed, room)
            if query_len <= 0:
                continue
            if sequence.draft_ids:
                query_len += max(0, min(len(sequence.draft_ids), room - kept_from_drafts - query_len))
            granted, undone = self._grow(sequence, query_len)
            decoding -= undone
            if granted:
                self._choose(sequence, granted, chosen, lengths)
                budget -= granted
        self._admit_waiting(budget, 0, chosen, lengths)
        if not chosen:
            return None
        batch = self.table.gather(chosen, lengths)
        if self._launched:
            places = [(at, s.place) for at, s in zip(batch.query_start.tolist(), chosen, strict=False) if s.pending]
            batch.carried = np.ascontiguousarray(np.array(places, dtype=np.int64).T) if places else None
        batch.copies, self._copies = self._copies, []
        if self.cache.host is not None:
            batch.offloads, batch.restores = self.cache.host.take_moves()
        batch.admitted, self._admitted = self._admitted, []
        batch.vacated, self._vacated = self._vacated, []
        return batch

    def launch(self, batch: TokenBatch) -> None:
        """Count a step without drafts as computed, so that the next can be scheduled before its tokens are read."""
        batch.launched = True
        self._launched += 1
        place = 0
        for sequence, query_len, num_samples in zip(batch.sequences, batch.query_lens, batch.num_samples, strict=True):
            sequence.num_computed += query_len
            sequence.pending += num_samples
            sequence.place = place
            place += num_samples

    def update(self, batch: TokenBatch, tokens: Sequence[int]) -> list[tuple[SequenceState, int, int]]:
        """Take the target's tokens [R] at the sampled positions: accept drafts, append, finish, free pages.

        Returns (sequence, place of its first new token among the R, number of new tokens) for every sequence that was
        sampled. A finished one has its `finish_reason` set, and has given its pages back.
        """
        grown: list[tuple[SequenceState, int, int]] = []
        rows: list[int] = []
        columns: list[int] = []
        written: list[int] = []
        place = 0
        launched = batch.launched
        self._launched -= launched
        for sequence, query_len, num_samples in zip(batch.sequences, batch.query_lens, batch.num_samples, strict=True):
            sequence.in_flight -= 1
            if launched:
                sequence.pending -= num_samples
            else:
                sequence.num_computed += query_len
            if not num_samples:
                continue
            accepted = 1  # the target's own token; each draft equal to the token before it accepts one more
            last = num_samples - 1
            while accepted <= last and tokens[place + accepted - 1] == sequence.draft_ids[accepted - 1]:
                accepted += 1
            new = list(tokens[place : place + accepted])
            first, place = place, place + num_samples
            if accepted < num_samples:
                sequence.num_computed -= num_samples - accepted
            if sequence.draft_ids:
                sequence.draft_ids = []
            if sequence.finish_reason is not None:
                continue  # ended while in flight
            known = sequence.num_tokens - sequence.pending
            kept = sequence.append(new)
            grown.append((sequence, first, kept))
            if sequence.finish_reason is not None:
                self._leave(sequence)
            elif not sequence.is_running:
                continue  # preempted while in flight
            elif kept == 1:
                rows.append(sequence.row)
                columns.append(known)
                written.append(new[0])
            else:
                rows += [sequence.row] * kept
                columns += range(known, known + kept)
                written += new
        if rows:
            self.table.append(rows, columns, written)
        self._release_doomed()
        return grown

    def fail(self, batch: TokenBatch) -> list[SequenceState]:
        """The step could not be computed: end its sequences and forget the pages it should have written."""
        failed = []
        self._launched -= batch.launched
        if batch.launched:  # pages were named since, on top of what it should have written
            self.cache.invalidate()
        self.cache.forget(self._fresh_pages)
        if self.cache.host is not None:
            self.cache.host.distrust_last_moves()
        for sequence, num_samples in zip(batch.sequences, batch.num_samples, strict=True):
            sequence.in_flight -= 1
            if batch.launched:
                sequence.pending -= num_samples
            if sequence.finish_reason is None:
                self.finish(sequence, FinishReason.ERROR)
                failed.append(sequence)
        self._release_doomed()
        return failed

    # --- the steps of schedule ------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Preempt running sequences for the most urgent waiting one, if it is urgent enough and they suffice."""
        margin = self.config.preemption_margin
        if margin is None or not self.waiting or not self.running:
            return
        head = next((s for s in self.waiting if not self._deferred(s)), None)
        if head is None:
            return
        gap = margin * self.config.aging_interval_s
        if self.running[-1].urgency - head.urgency <= gap:
            return
        rows = len(self._free_rows)
        pages = self.cache.num_available - self._pages_wanted(head, *self._reusable(head)) - self.config.watermark_pages
        victims = []
        for sequence in reversed(self.running):
            if (rows and pages >= 0) or sequence.urgency - head.urgency <= gap:
                break
            if self._step - sequence.admitted_step > self.config.preemption_min_steps:
                victims.append(sequence)
                rows += 1
                pages += self.cache.num_sole(sequence.pages)
        if rows and (pages >= 0 or len(victims) == len(self.running)):
            for victim in victims:
                self._preempt(victim)

    def _grow(self, sequence: SequenceState, query_len: int) -> tuple[int, int]:
        """Give a running sequence pages for `query_len` more tokens: (tokens granted, decodes undone).

        Where the pool is exhausted, drafts are dropped, then the least urgent running sequence is preempted, at worst
        this one.
        """
        page_size = self.cache.page_size
        held = len(sequence.pages) * page_size
        if sequence.num_computed + query_len <= held:
            return query_len, 0
        missing = -(-(sequence.num_computed + query_len - held) // page_size)
        if missing > self.cache.num_available:  # drafts are worth no preemption
            query_len = min(query_len, sequence.num_tokens - sequence.num_computed)
            missing = -(-(sequence.num_computed + query_len - held) // page_size)
        undone = 0
        while missing > self.cache.num_available:
            victim = self.running[-1]
            if victim is not sequence and victim.num_tokens - victim.num_computed == 1 and not victim.is_closing:
                undone += 1
            self._preempt(victim)
            if victim is sequence:
                return 0, undone
        if missing > 0:
            self.table.extend_pages(sequence, self.cache.allocate(missing))
        return query_len, undone

    def _admit_waiting(
        self,
        budget: int,
        reserved: int,
        chosen: list[SequenceState],
        lengths: list[int],
        ahead_of: SequenceState | None = None,
    ) -> int:
        """Admit waiting sequences in order while row, pages and budget last; the budget left.

        Stops at the first that does not fit, so that a large one is not overtaken for ever. With `ahead_of`, only those
        more urgent than it.
        """
        place = 0
        while place < len(self.waiting) and budget > reserved and self._free_rows:
            sequence = self.waiting[place]
            if ahead_of is not None and sequence.order > ahead_of.order:
                break
            if sequence.pending:
                break  # preempted just now: in the next step it is known what it has to compute
            if self._deferred(sequence):
                place += 1
                continue
            if not self._admit(sequence):
                break
            del self.waiting[place]
            query_len = min(sequence.num_tokens - sequence.num_computed, budget - reserved)
            self._choose(sequence, query_len, chosen, lengths)
            budget -= query_len
        return budget

    def _admit(self, sequence: SequenceState) -> bool:
        """Give a waiting sequence a row and pages for all tokens it has, sharing what is computed already."""
        cache, page_size = self.cache, self.cache.page_size
        shared, start = self._reusable(sequence)
        spare = self.config.watermark_pages if self.running else 0
        if self._pages_wanted(sequence, shared, start) + spare > cache.num_available:
            return False
        known, held = len(shared), self._pages_for(start)
        slots = cache.host.take(sequence.digests[known:held]) if cache.host is not None and held > known else []
        cache.acquire(shared)
        if self._writes_to_shared(shared, start):
            source = shared[-1]
            shared[-1] = cache.copy_on_write(source)
            self._copies.append((source, shared[-1]))
        sequence.pages = shared + cache.allocate(self._pages_for(sequence.num_tokens) - known)
        if slots and cache.host is not None:
            restored = sequence.pages[known:held]
            cache.host.restore(slots, restored)
            self._fresh_pages.update(restored)
            for page, digest in zip(restored, sequence.digests[known:held], strict=True):
                cache.index(page, digest, sequence.root)
        sequence.num_indexed = start // page_size
        sequence.num_computed = start
        sequence.row = self._free_rows.pop()
        sequence.admitted_step = self._step
        self.table.load(sequence)
        insort(self.running, sequence, key=_ORDER)
        self._admitted.append(sequence)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(start, sequence.num_prompt)
            if cache.prefix:
                cache.prefix.count(sequence.num_tokens, start)
        return True

    def _reusable(self, sequence: SequenceState) -> tuple[list[int], int]:
        """Pages that hold a beginning of the sequence, and how many of its tokens need no computing.

        From the prefix cache, or from a sibling whose prompt is computed. Where the tokens reach beyond the pages, the
        rest is in host memory. At least one token is left to compute: its logits are wanted.
        """
        page_size = self.cache.page_size
        limit = sequence.num_tokens - 1
        pages: list[int] = []
        if self.cache.prefix and not sequence.wants_prompt_logits:
            tokens = sequence.prompt_ids
            if sequence.output_ids:
                tokens = np.concatenate([tokens, np.array(sequence.output_ids, dtype=np.int32)])
            extend_digests(sequence.digests, sequence.root, tokens, page_size)
            pages = self.cache.match(sequence.digests)
        known = len(pages)
        if self.cache.host is not None and not sequence.wants_prompt_logits:
            known += self.cache.host.count(sequence.digests[known:])
        start = min(known * page_size, limit)
        for sibling in sequence.siblings:
            computed = min(sibling.num_computed, sequence.num_prompt, limit)
            if sibling.is_running and computed > start:
                start, pages = computed, sibling.pages
        pages = pages[: self._pages_for(start)]
        if start < len(pages) * page_size and pages[-1] in self._fresh_pages:  # not computed yet: cannot be copied
            pages.pop()
            start = len(pages) * page_size
        return pages, start

    def _deferred(self, sequence: SequenceState) -> bool:
        """Whether it waits for a running sibling to compute the prompt they share. It holds no row meanwhile."""
        if sequence.pending:
            return True
        needed = min(sequence.num_prompt, sequence.num_tokens - 1)
        computing = False
        for sibling in sequence.siblings:
            if sibling.is_running:
                if sibling.num_computed >= needed:
                    return False
                computing = True
        return computing

    def _choose(self, sequence: SequenceState, query_len: int, chosen: list[SequenceState], lengths: list[int]) -> None:
        """Put tokens of a running sequence into the step, and name the pages that it will have filled."""
        chosen.append(sequence)
        lengths.append(query_len)
        sequence.in_flight += 1
        page_size = self.cache.page_size
        reach = sequence.num_computed + query_len
        if reach // page_size > sequence.num_indexed and self.cache.prefix:
            known = sequence.num_tokens - sequence.pending
            full = min(reach, known) // page_size
            tokens = self.table.token_ids[sequence.row, :known]
            extend_digests(sequence.digests, sequence.root, tokens, page_size)
            for index in range(sequence.num_indexed, full):
                page = sequence.pages[index]
                self.cache.index(page, sequence.digests[index], sequence.root)
                self._fresh_pages.add(page)
            sequence.num_indexed = full

    def _preempt(self, sequence: SequenceState) -> None:
        """Take a sequence's row and pages; it computes its tokens again later, from its old place in the order."""
        self.running.remove(sequence)
        self._vacate(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        insort(self.waiting, sequence, key=_ORDER)

    def _leave(self, sequence: SequenceState) -> None:
        """Take an ended sequence out of service; a step in flight may still write to its pages."""
        if not sequence.is_running:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        if sequence.in_flight:
            self._doomed.append(sequence)
        else:
            self._vacate(sequence)

    def _vacate(self, sequence: SequenceState) -> None:
        self.cache.release(sequence.pages)
        self._free_rows.append(sequence.row)
        self._vacated.append(sequence.row)
        sequence.pages = []
        sequence.num_indexed = 0
        sequence.num_computed = 0
        sequence.draft_ids = []
        sequence.row = WAITING

    def _release_doomed(self) -> None:
        if self._doomed:
            for sequence in self._doomed:
                if not sequence.in_flight:
                    self._vacate(sequence)
            self._doomed = [sequence for sequence in self._doomed if sequence.in_flight]

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.cache.page_size)

    def _writes_to_shared(self, shared: list[int], start: int) -> bool:
        """Whether a sequence that goes on at `start` would write to a page of `shared` that another holds."""
        return start < len(shared) * self.cache.page_size and self.cache.holders(shared[-1]) > 1

    def _pages_wanted(self, sequence: SequenceState, shared: list[int], start: int) -> int:
        """Pages that admitting a waiting sequence would take from the available ones."""
        copied = start < len(shared) * self.cache.page_size and self.cache.holders(shared[-1]) > 0
        return self._pages_for(sequence.num_tokens) - len(shared) + copied + self.cache.num_idle(shared)
