"""The order of service, admission, preemption, sharing, and the known ways to lock up a scheduler."""

from __future__ import annotations

import pytest

from penstock_core.batching import BatchingConfig, TokenBatcher
from penstock_core.cache import PagedAttentionKVCache
from penstock_core.protocol.errors import InvalidConfiguration
from penstock_core.protocol.jobs import FinishReason
from tests.unit.batching.support import ANSWER, Bench


def test_decodes_are_never_held_up_by_a_prompt() -> None:
    bench = Bench(max_batch_tokens=10, num_pages=200)
    first, second = bench.add(4), bench.add(4)
    bench.step()
    long = bench.add(60)
    assert bench.step() == {first: 1, second: 1, long: 8}
    assert bench.step() == {first: 1, second: 1, long: 8}


def test_prompts_are_computed_in_chunks_of_what_the_budget_leaves() -> None:
    bench = Bench(max_batch_tokens=10)
    sequence = bench.add(23, new=2)
    assert [bench.step()[sequence] for _ in range(4)] == [10, 10, 3, 1]
    assert sequence.output_ids == [ANSWER, ANSWER]


def test_waiting_sequences_are_served_by_priority_then_arrival() -> None:
    bench = Bench(max_num_sequences=1, preemption_margin=None)
    late = bench.add(4, 1, priority=9, arrival_s=3.0)
    early = bench.add(4, 1, priority=9, arrival_s=1.0)
    low = bench.add(4, 1, priority=0, arrival_s=0.0)
    order = [next(iter(bench.step())) for _ in range(3)]
    assert order == [early, late, low]


def test_waiting_long_enough_outweighs_priority() -> None:
    bench = Bench(max_num_sequences=1, aging_interval_s=10.0)
    old = bench.add(4, 1, priority=0, arrival_s=0.0)
    new = bench.add(4, 1, priority=9, arrival_s=91.0)
    assert list(bench.step()) == [old]
    assert list(bench.step()) == [new]


def test_large_sequence_is_not_overtaken_for_ever() -> None:
    bench = Bench(num_pages=10, page_size=4, max_num_sequences=8, max_model_len=40)
    running = bench.add(20, 4)
    bench.step()
    large, small = bench.add(28, 1), bench.add(4, 1)
    bench.step()
    assert not large.is_running
    assert not small.is_running  # it would fit, but it waits behind
    while running.finish_reason is None:
        bench.step()
    assert large in bench.step()


def test_admission_leaves_the_watermark_to_those_that_run() -> None:
    bench = Bench(num_pages=10, page_size=4, watermark_pages=3, max_model_len=40)
    bench.add(16, 4)
    bench.step()
    waiting = bench.add(12, 4)  # 3 pages; the running one holds 5, so 5 are left
    bench.step()
    assert not waiting.is_running
    assert bench.run() < 30


def test_watermark_does_not_lock_out_a_sequence_that_is_alone() -> None:
    bench = Bench(num_pages=10, page_size=4, watermark_pages=5, max_model_len=40)
    bench.add(36, 4)
    assert bench.run() < 10


def test_exhausted_pool_preempts_the_least_urgent_newest() -> None:
    bench = Bench(num_pages=9, page_size=4, max_model_len=36)
    urgent = bench.add(11, 12, priority=9)
    old, new = bench.add(11, 12, arrival_s=1.0), bench.add(11, 12, arrival_s=2.0)
    bench.step()
    while not new.preemptions:
        bench.step()
    assert urgent.preemptions == old.preemptions == 0
    assert bench.batcher.waiting == [new]
    bench.run()
    assert new.output_ids == [ANSWER] * 12


def test_preempted_sequence_gets_its_place_back_at_the_head() -> None:
    bench = Bench(num_pages=9, page_size=4, max_model_len=36)
    bench.add(14, 12)
    victim = bench.add(14, 12, arrival_s=1.0)
    later = bench.add(14, 12, arrival_s=2.0)
    while not victim.preemptions:
        bench.step()
    assert bench.batcher.waiting == [victim, later]
    bench.run()


def test_recompute_after_preemption_takes_what_is_still_cached() -> None:
    bench = Bench(num_pages=9, page_size=4, max_model_len=36)
    first, victim = bench.add(14, 4), bench.add(14, 12, arrival_s=1.0)
    while not victim.preemptions:
        bench.step()
    while first.finish_reason is None:
        bench.step()
    known = victim.num_tokens
    assert bench.step()[victim] < known
    bench.run()
    assert victim.output_ids == [ANSWER] * 12


def test_urgent_arrival_preempts_a_less_urgent_sequence_for_its_row() -> None:
    bench = Bench(max_num_sequences=1, preemption_min_steps=3)
    low = bench.add(4, 50, priority=1)
    bench.step()
    high = bench.add(4, 2, priority=9, arrival_s=1.0)
    assert list(bench.step()) == [low]  # it may run undisturbed for a few steps
    for _ in range(2):
        bench.step()
    assert list(bench.step()) == [high]
    assert low.preemptions == 1
    assert bench.batcher.waiting == [low]
    bench.run()
    assert low.output_ids == [ANSWER] * 50
    assert low.preemptions == 1


def test_urgent_arrival_preempts_for_pages_only_if_that_makes_enough_room() -> None:
    bench = Bench(num_pages=12, page_size=4, max_model_len=48, preemption_min_steps=0)
    equal = bench.add(24, 8, priority=9)
    low = bench.add(8, 16, priority=0)
    for _ in range(3):
        bench.step()
    high = bench.add(24, 2, priority=9, arrival_s=1.0)
    bench.step()
    assert low.preemptions == 0  # its three pages would not be enough: the other holds seven
    small = bench.add(12, 2, priority=9, arrival_s=0.5)
    assert small in bench.step()
    assert low.preemptions == 1
    assert equal.preemptions == high.preemptions == 0
    bench.run()


@pytest.mark.parametrize(("margin", "preempts"), [(None, False), (0.9, True), (1.1, False)])
def test_preemption_needs_the_margin(margin: float | None, preempts: bool) -> None:
    bench = Bench(max_num_sequences=1, preemption_min_steps=0, preemption_margin=margin, aging_interval_s=60.0)
    low = bench.add(4, 20, priority=4)
    bench.step()
    bench.step()
    bench.add(4, 2, priority=5)
    bench.step()
    assert (low.preemptions == 1) == preempts


def test_preemption_cannot_go_back_and_forth() -> None:
    bench = Bench(max_num_sequences=1, preemption_min_steps=0)
    sequences = [bench.add(4, 6, priority=priority) for priority in range(10)]
    bench.run()
    assert sum(sequence.preemptions for sequence in sequences) == 0  # the most urgent simply went first
    low = bench.add(4, 30, priority=0)
    bench.step()
    bench.step()
    rivals = [bench.add(4, 6, priority=9, arrival_s=float(n)) for n in range(5)]
    bench.run()
    assert low.preemptions == 1
    assert all(rival.preemptions == 0 for rival in rivals)


def test_urgent_prompt_goes_before_the_rest_of_a_long_one() -> None:
    bench = Bench(num_pages=64, max_batch_tokens=16)
    long = bench.add(100, 2, priority=5)
    bench.step()
    urgent = bench.add(12, 2, priority=9)
    assert bench.step() == {urgent: 12, long: 4}


def test_deadlines_expire_sequences_that_wait_or_run() -> None:
    bench = Bench(max_num_sequences=1)
    running, waiting = bench.add(4, deadline_s=10.0), bench.add(4, deadline_s=5.0)
    done = bench.add(4, 1, deadline_s=1.0, priority=9)
    bench.step()
    assert done.finish_reason is FinishReason.LENGTH
    bench.step()
    assert bench.batcher.expire(4.9) == []
    assert bench.batcher.expire(5.0) == [waiting]
    assert bench.batcher.expire(11.0) == [running]
    assert running.finish_reason is waiting.finish_reason is FinishReason.EXPIRED
    bench.cache.check(idle=True)


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    bench = Bench(page_size=4)
    first, second = bench.add(23, salt="s"), bench.add(23, salt="s")
    assert bench.step() == {first: 23, second: 3}
    assert first.pages[:5] == second.pages[:5]
    assert bench.cache.statistics().shared_pages == 5


def test_fully_cached_prompt_leaves_one_token_to_compute() -> None:
    bench = Bench(page_size=4)
    first = bench.add(24, 1, salt="s")
    bench.step()
    second = bench.add(24, 1, salt="s")
    assert bench.step() == {second: 1}
    assert second.cached_tokens == 23
    assert first.output_ids == second.output_ids
    bench.cache.check(idle=True)


def test_fully_cached_prompt_does_not_write_to_a_page_that_another_reads() -> None:
    bench = Bench(page_size=4)
    first = bench.add(24, 8, salt="s")
    bench.step()
    second = bench.add(24, 8, salt="s")
    batch = bench.batcher.schedule()
    assert batch is not None
    assert batch.copies == [(first.pages[5], second.pages[5])]
    assert second.pages[:5] == first.pages[:5]
    bench.finish(batch)
    bench.run()


def test_page_filled_by_this_step_is_shared_but_never_copied() -> None:
    bench = Bench(page_size=4)
    first, second = bench.add(24, salt="s"), bench.add(24, salt="s")
    batch = bench.batcher.schedule()
    assert batch is not None
    assert batch.copies == []  # the last page is not computed yet, so the second computes its own
    assert dict(zip(batch.sequences, batch.query_lens, strict=True)) == {first: 24, second: 4}
    bench.finish(batch)


def test_choices_that_wait_for_their_prompt_hold_no_row() -> None:
    """All rows taken by sequences that wait for a sibling would be a deadlock; waiting ones hold none."""
    bench = Bench(max_num_sequences=2, max_batch_tokens=8, page_size=4)
    group = bench.group(30, 6)
    other = bench.add(4, 1)
    bench.step()
    assert [sequence.is_running for sequence in group] == [True] + [False] * 5
    bench.step()
    assert bench.run() < 200
    assert all(sequence.output_ids == [ANSWER] * 8 for sequence in group)
    assert other.finish_reason is FinishReason.LENGTH


def test_choices_go_on_alone_if_the_one_that_computes_their_prompt_is_cancelled() -> None:
    bench = Bench(max_batch_tokens=8, prefix_cache=False)
    group = bench.group(30, 3)
    bench.step()
    bench.batcher.finish(group[0], FinishReason.CANCELLED)
    bench.run()
    assert [len(sequence.output_ids) for sequence in group] == [0, 8, 8]


def test_choices_share_the_prompt_without_a_prefix_cache() -> None:
    bench = Bench(page_size=4, prefix_cache=False)
    group = bench.group(22, 3)
    bench.step()
    batch = bench.batcher.schedule()
    assert batch is not None
    assert batch.query_lens == [1, 1, 1]
    assert {copy[0] for copy in batch.copies} == {group[0].pages[5]}
    assert len(batch.copies) == 2
    bench.finish(batch)
    bench.run()


def test_pages_stay_held_while_a_write_to_them_is_pending() -> None:
    bench = Bench()
    sequence = bench.add(4)
    bench.step()
    sequence.propose([ANSWER, ANSWER, 9])
    batch = bench.batcher.schedule()
    assert batch is not None
    assert batch.query_lens == [4]
    bench.batcher.finish(sequence, FinishReason.CANCELLED)
    assert sequence.pages
    assert bench.cache.statistics().used_pages == len(sequence.pages)
    assert bench.batcher.update(batch, [ANSWER] * 4) == []
    bench.cache.check(idle=True)
    assert not bench.batcher.has_work


def test_failed_step_ends_its_sequences_and_forgets_its_pages() -> None:
    bench = Bench()
    sequence = bench.add(24, salt="s")
    batch = bench.batcher.schedule()
    assert batch is not None
    assert bench.batcher.fail(batch) == [sequence]
    assert sequence.finish_reason is FinishReason.ERROR
    bench.cache.check(idle=True)
    again = bench.add(24, salt="s")
    assert bench.step() == {again: 24}


def test_drafts_are_accepted_as_far_as_they_are_right() -> None:
    bench = Bench()
    sequence = bench.add(4, new=20)
    bench.step()
    sequence.propose([ANSWER, ANSWER, 9, ANSWER])
    assert bench.step() == {sequence: 5}
    assert sequence.output_ids == [ANSWER] * 4  # one before, two right drafts, and the target's own
    assert sequence.num_computed == sequence.num_tokens - 1
    assert bench.step() == {sequence: 1}


def test_drafts_end_where_the_sequence_must() -> None:
    bench = Bench()
    sequence = bench.add(4, new=4, stop_ids=frozenset({7}))
    bench.step()
    sequence.propose([ANSWER] * 10)
    assert len(sequence.draft_ids) == 2  # one place is left for the target's own token
    bench.step()
    assert sequence.output_ids == [ANSWER] * 4


def test_stop_id_among_accepted_drafts_cuts_the_rest() -> None:
    bench = Bench()
    sequence = bench.add(4, new=20, stop_ids=frozenset({ANSWER}), min_tokens=2)
    bench.step()
    sequence.propose([ANSWER] * 5)
    bench.step()
    assert sequence.output_ids == [ANSWER] * 3
    assert sequence.finish_reason is FinishReason.STOP


def test_drafts_preempt_nobody() -> None:
    bench = Bench(num_pages=6, page_size=4, max_model_len=24)
    first, second = bench.add(11, 8), bench.add(11, 8)
    bench.step()
    first.propose([ANSWER] * 5)
    assert bench.step() == {first: 1, second: 1}
    assert second.preemptions == 0


def test_drafts_leave_a_share_of_the_budget_to_prompts() -> None:
    bench = Bench(max_batch_tokens=16, num_pages=128)
    running = [bench.add(4, 40) for _ in range(2)]
    bench.step()
    long = bench.add(100, 2)
    for sequence in running:
        sequence.propose([ANSWER] * 12)
    assert bench.step()[long] >= 16 // 4


def test_what_can_never_fit_is_refused_at_the_door() -> None:
    bench = Bench(max_model_len=32)
    with pytest.raises(ValueError, match="exceed max_model_len 32"):
        bench.add(30, 8)
    with pytest.raises(ValueError, match="cannot hold one sequence"):
        TokenBatcher(BatchingConfig(max_model_len=65), PagedAttentionKVCache(16, 4))


def test_sequence_as_long_as_the_pool_runs_to_its_end() -> None:
    bench = Bench(num_pages=8, page_size=4, max_model_len=32)
    sequence = bench.add(20, 12)
    other = bench.add(20, 12)
    bench.run()
    assert len(sequence.output_ids) == len(other.output_ids) == 12


def test_budget_must_feed_every_row() -> None:
    with pytest.raises(InvalidConfiguration, match="max_batch_tokens"):
        BatchingConfig(max_num_sequences=8, max_batch_tokens=7)
