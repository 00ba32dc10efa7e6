"""How much of what drafting can gain is gained, and how little is lost where it gains nothing: on a simulated clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from penstock_core.speculative import SpeculationConfig, SpeculativeDecoder
from penstock_core.speculative.budget import LossBudget, Standing, Standings
from tests.unit.speculative.machine import Machine, Oracle, arithmetic_bound, copying, memory_bound, novel, small_model

# Steps, and what a draft model costs there: per guess, and to begin.
MACHINES: dict[str, tuple[Callable[[int], float], float, float]] = {
    "small model": (small_model, 20e-6, 60e-6),
    "memory bound": (memory_bound, 500e-6, 1e-3),
    "arithmetic bound": (arithmetic_bound, 50e-6, 100e-6),
}
REACHED = 0.95  # of the best fixed depth's speed
REGRET = 0.97  # of plain speed


def drafting(machine: str, chance: float, count: int, length: int, depth: int | None = None) -> Machine:
    step_s, level_s, start_s = MACHINES[machine]
    oracle = Oracle(chance, level_s, start_s)
    return Machine([novel(length, seed) for seed in range(count)], step_s, "draft", oracle, fixed_depth=depth)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("chance", [0.0, 0.4, 0.6, 0.8, 0.95])
def test_speed_is_that_of_the_best_fixed_depth_where_one_gains_and_of_plain_decoding_elsewhere(
    machine: str, count: int, chance: float
) -> None:
    best = max(drafting(machine, chance, count, 400, depth).run() for depth in (1, 2, 4, 6, 8))
    controlled = drafting(machine, chance, count, 2500)
    assert controlled.run(1200) >= REGRET
    assert controlled.run(1200) >= max(REGRET, REACHED * best)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("chance", [0.0, 0.9])
def test_short_sequences_begin_with_what_the_worker_knows(machine: str, chance: float) -> None:
    def texts(first: int, count: int) -> list[list[int]]:
        return [novel(32, first + number) for number in range(count)]

    best = max(drafting(machine, chance, 0, 0, depth).serve(texts(0, 20), 1) for depth in (1, 2, 4, 8))
    controlled = drafting(machine, chance, 0, 0)
    assert controlled.serve(texts(0, 20), 1) >= REGRET
    assert controlled.serve(texts(20, 60), 1) >= max(REGRET, REACHED * best)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("period", [300, 1000])
def test_a_draft_model_that_is_good_by_turns_loses_next_to_nothing_in_between(machine: str, period: int) -> None:
    controlled = drafting(machine, 0.0, 1, 20 * period)
    oracle = controlled.decoder._model
    assert isinstance(oracle, Oracle)
    for turn in range(12):
        oracle.chance = 0.9 * (turn % 2)
        controlled.run(period)
    assert controlled.plain_s / controlled.now >= REGRET
    gains = controlled.decoder.statistics().accepted_at[0]
    assert gains > 0  # and it is found out again and again that it is good


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("chance", [0.0, 0.5, 0.9])
def test_batches_of_changing_size_lose_next_to_nothing(machine: str, chance: float) -> None:
    controlled = drafting(machine, chance, 0, 0)
    for turn, at_once in enumerate((1, 16, 4, 32, 2, 8)):
        controlled.serve([novel(64, 1000 * turn + seed) for seed in range(3 * at_once)], at_once)
    assert controlled.plain_s / controlled.now >= REGRET


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("proposer", ["ngram", "suffix"])
@pytest.mark.parametrize("count", [1, 8, 32])
def test_lookups_that_find_nothing_cost_next_to_nothing(machine: str, proposer: str, count: int) -> None:
    step_s = MACHINES[machine][0]
    fresh = Machine([], step_s, proposer, look_s=2e-6 * count)
    assert fresh.serve([novel(32, seed) for seed in range(10 * count)], count) >= REGRET
    lasting = Machine([novel(400, seed) for seed in range(count)], step_s, proposer, look_s=2e-6 * count)
    assert lasting.run() >= REGRET


def test_disturbed_steps_do_not_end_what_pays() -> None:
    controlled = drafting("small model", 0.9, 1, 3000)
    controlled.run(300)
    steady = controlled.run(800)
    calm = controlled.step_s
    controlled.step_s = lambda tokens: calm(tokens) * (50.0 if len(controlled.running[0].output_ids) % 97 < 3 else 1.0)
    controlled.run(800)
    controlled.step_s = calm
    assert controlled.run(300) >= 0.9 * steady


def test_where_steps_with_drafts_stall_again_and_again_they_end() -> None:
    controlled = drafting("small model", 0.9, 1, 6000)
    controlled.run(600)
    calm = controlled.step_s
    controlled.step_s = lambda tokens: calm(tokens) * (100.0 if tokens > 1 and controlled.now * 1e5 % 7 < 2 else 1.0)
    before = sum(controlled.decoder.statistics().depths)
    controlled.run(1500)
    assert sum(controlled.decoder.statistics().depths) - before < 200
    controlled.step_s = calm
    controlled.run(3000)
    assert controlled.run(300) > 1.5  # and begin again when that is over


def test_copies_are_found_by_lookup_at_every_batch_where_that_pays() -> None:
    for count, least in ((1, 2.5), (8, 1.4)):
        assert Machine([copying(600, seed) for seed in range(count)], small_model, "suffix").run() > least


# --- the budget and the standings by themselves ---------------------------------------------------------------------


def tried(standing: Standing, budget: LossBudget, step: int, spent_s: float) -> int:
    """Steps until a try is over, of steps that took that long where plain ones take 1."""
    steps = 0
    while standing.tried:
        budget.earn(spent_s, 1.0 - spent_s, 1.0)
        standing.record(1.0, spent_s, step + steps, budget)
        steps += 1
    return steps


def test_a_try_that_gains_goes_on() -> None:
    standing, budget = Standing(), LossBudget()
    budget.earn(1.0, 0.0, 1.0)
    assert standing.allows(1, budget, 1.0)
    tried(standing, budget, 1, 0.5)
    assert standing.pays


def test_what_is_lost_in_tries_is_a_hundredth_of_the_time_and_a_few_steps() -> None:
    standing, budget, lost, now = Standing(), LossBudget(), 0.0, 0.0
    budget.earn(1.0, 0.0, 1.0)
    tries, step = 0, 0
    while step < 20_000:
        step += 1
        if standing.allows(step, budget, 1.0):
            steps = tried(standing, budget, step, 1.8)
            lost, now, step, tries = lost + steps * 0.8, now + steps * 1.8, step + steps, tries + 1
        else:
            budget.earn(1.0, 0.0, 1.0)
            now += 1.0
    assert 5 < tries < 40
    assert lost <= 0.01 * now + 8.0


def test_fewer_sequences_are_tried_where_more_failed_but_not_the_other_way_round() -> None:
    standings, budget = Standings(), LossBudget()
    budget.earn(1.0, 0.0, 1.0)
    standings.of(8).allows(1, budget, 1.0)
    tried(standings.of(8), budget, 1, 3.0)
    for _ in range(5000):
        budget.earn(1.0, 0.0, 1.0)
    assert not standings.of(32).allows(20, budget, 1.0)
    assert standings.of(2).allows(20, budget, 1.0)


def test_a_larger_batch_goes_on_as_long_as_it_gains() -> None:
    standings, budget = Standings(), LossBudget()
    budget.earn(1.0, 0.0, 1.0)
    standings.of(2).allows(1, budget, 1.0)
    tried(standings.of(2), budget, 1, 0.6)
    larger = standings.of(16)
    assert larger.allows(30, budget, 1.0)
    for step in range(31, 60):
        if larger.pays:
            larger.record(1.0, 1.5, step, budget)
    assert not larger.pays
    assert standings.of(2).pays


def test_what_stalled_steps_of_a_large_batch_lost_does_not_stop_a_small_one_that_gains() -> None:
    standings, budget = Standings(), LossBudget()
    budget.earn(1.0, 0.0, 1.0)
    standings.of(1).allows(1, budget, 1.0)
    tried(standings.of(1), budget, 1, 0.5)
    assert standings.of(1).pays
    for _ in range(20):
        budget.earn(300.0, -290.0, 10.0)
    assert budget.is_overdrawn
    for step in range(40, 60):
        budget.earn(0.5, 0.5, 1.0)
        standings.of(1).record(1.0, 0.5, step, budget)
    assert standings.of(1).pays


def test_a_step_of_prompts_alone_is_accounted_for_at_a_fixed_depth_too() -> None:
    speculator = SpeculativeDecoder(SpeculationConfig(proposer="ngram", fixed_depth=2))
    for _ in range(64):
        speculator.costs.plain.observe(1, 1e-3)
    assert speculator.due()
    speculator.propose([])
    speculator.measure(64, 0.01)
    assert speculator.statistics().drafted == 0
