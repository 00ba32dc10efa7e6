"""The decoder on a simulated machine: it speculates where that pays, keeps out of the way elsewhere, and comes back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from penstock_core.protocol.jobs import FinishReason
from tests.unit.speculative.machine import Machine, Oracle, arithmetic_bound, copying, memory_bound, novel


@pytest.mark.parametrize("proposer", ["ngram", "suffix", "auto"])
def test_a_copying_text_is_decoded_several_times_faster(proposer: str) -> None:
    assert Machine([copying(600)], memory_bound, proposer).run() > 3.0


@pytest.mark.parametrize("proposer", ["ngram", "suffix"])
@pytest.mark.parametrize("step_s", [memory_bound, arithmetic_bound])
@pytest.mark.parametrize("count", [1, 8, 32])
def test_a_text_that_nobody_can_guess_is_decoded_as_fast_as_plainly(
    proposer: str, step_s: Callable[[int], float], count: int
) -> None:
    machine = Machine([novel(400, seed) for seed in range(count)], step_s, proposer)
    assert machine.run() > 0.97


@pytest.mark.parametrize("proposer", ["ngram", "suffix"])
def test_where_time_follows_tokens_depth_shrinks_with_the_batch(proposer: str) -> None:
    drafts = []
    for count in (1, 32):
        machine = Machine([copying(400, seed) for seed in range(count)], arithmetic_bound, proposer)
        assert machine.run() > 0.97
        statistics = machine.decoder.statistics()
        drafts.append(statistics.drafted / sum(statistics.depths))
    assert drafts[1] < 0.4 * drafts[0]


@pytest.mark.parametrize("proposer", ["ngram", "suffix"])
def test_speculation_comes_back_when_a_text_begins_to_copy(proposer: str) -> None:
    text = novel(1000)
    machine = Machine([text + text[200:900]], memory_bound, proposer)
    machine.run(1000)
    assert machine.run(600) > 2.5


@pytest.mark.parametrize(("chance", "least", "most"), [(0.9, 2.5, 9.0), (0.6, 1.3, 3.0), (0.02, 0.97, 1.05)])
def test_a_draft_model_is_used_as_far_as_it_is_good(chance: float, least: float, most: float) -> None:
    oracle = Oracle(chance, level_s=0.0005)
    machine = Machine([novel(1500)], memory_bound, "draft", oracle)
    assert least < machine.run() < most


def test_a_dear_draft_model_is_left_alone() -> None:
    oracle = Oracle(0.9, level_s=0.012)
    machine = Machine([novel(1500)], memory_bound, "draft", oracle)
    assert machine.run() > 0.97


def test_a_draft_model_that_becomes_good_is_noticed() -> None:
    oracle = Oracle(0.02, level_s=0.0005)
    machine = Machine([novel(9000)], memory_bound, "draft", oracle)
    machine.run(2000)
    oracle.chance = 0.95
    machine.run(4000)
    assert machine.run(1000) > 2.0


def test_auto_takes_whichever_gains_more() -> None:
    oracle = Oracle(0.7, level_s=0.0005)
    machine = Machine([novel(500) + copying(800, seed=1)], memory_bound, "auto", oracle)
    machine.run(500)
    before = machine.decoder.statistics()
    assert before.drafted_by["draft"] > 10 * before.drafted_by["suffix"]
    machine.run(100)
    middle = machine.decoder.statistics()
    machine.run()
    after = machine.decoder.statistics()
    assert (
        after.drafted_by["suffix"] - middle.drafted_by["suffix"]
        > after.drafted_by["draft"] - middle.drafted_by["draft"]
    )


def test_the_gain_that_is_reported_is_the_gain_there_was() -> None:
    machine = Machine([copying(1200)], memory_bound, "ngram")
    speed = machine.run()
    assert machine.decoder.statistics().gain == pytest.approx(speed, rel=0.1)


def test_ended_sequences_are_forgotten() -> None:
    oracle = Oracle(0.9, level_s=0.0005)
    machine = Machine([novel(20), novel(60)], memory_bound, "draft", oracle)
    while not machine.ended or not oracle.finished:
        machine.step()
    assert machine.ended[0].finish_reason is FinishReason.LENGTH
    assert oracle.finished == 1
    machine.decoder.close()
    assert oracle.finished == 2
