"""Depth follows what pays: measured step times against chances of acceptance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_core.protocol.errors import InvalidConfiguration
from penstock_core.speculative import SpeculationConfig
from penstock_core.speculative.acceptance import GradedAcceptance, SequenceBias
from penstock_core.speculative.cost import StepCost
from penstock_core.speculative.depth import Costs, choose_depths, draft_depth, worth_checking


def measured(curve: dict[int, float]) -> StepCost:
    cost = StepCost()
    for tokens, seconds in curve.items():
        for _ in range(10):
            cost.observe(tokens, seconds)
    return cost


def costs(curve: dict[int, float], *drafting: StepCost) -> Costs:
    """Steps with drafts cost what others do."""
    return Costs(measured(curve), measured(curve), *drafting)


FLAT = {1: 0.010, 64: 0.0101}
LINEAR = {1: 0.001, 100: 0.100}


def test_free_tokens_are_all_checked_and_dear_ones_never() -> None:
    chances = [[0.5] * 8, [0.3] * 3]
    assert choose_depths(chances, 2, 2, costs(FLAT)) == [8, 3]
    assert choose_depths([[0.9] * 8] * 4, 4, 4, costs(LINEAR)) == [0, 0, 0, 0]
    assert sum(choose_depths([[0.9] * 8] * 4, 4, 4, costs(LINEAR), some=True)) >= 1  # a try


def test_depth_shrinks_as_the_batch_grows() -> None:
    known = costs({1: 0.010, 12: 0.011, 128: 0.090})
    depths = [sum(choose_depths([[0.7] * 8] * n, n, n, known)) / n for n in (1, 2, 4, 8, 32)]
    assert depths[0] >= 6
    assert depths == sorted(depths, reverse=True)
    assert depths[-1] == 0


def test_the_surer_sequence_gets_the_deeper_draft() -> None:
    sure, unsure = choose_depths([[0.95] * 8, [0.4] * 8], 2, 2, costs({2: 0.010, 6: 0.0105, 32: 0.040}))
    assert sure > unsure


@given(
    chances=st.lists(st.lists(st.floats(0.02, 0.98), min_size=1, max_size=3), min_size=1, max_size=3),
    slope=st.floats(0.0, 2.0),
)
@settings(max_examples=200, deadline=None)
def test_no_other_choice_of_depths_would_be_faster(chances: list[list[float]], slope: float) -> None:
    known = costs({1: 1.0, 20: 1.0 + 19 * slope})
    count = len(chances)

    def rate(depths: tuple[int, ...]) -> float:
        emitted = count + sum(float(np.cumprod(c)[:d].sum()) for c, d in zip(chances, depths, strict=True) if d)
        return emitted / known.plain.at(count + sum(depths))

    chosen = tuple(choose_depths(chances, count, count, known))
    best = max(rate(depths) for depths in itertools.product(*(range(len(c) + 1) for c in chances)))
    assert rate(chosen) >= best * (1 - 1e-9)


def test_steps_with_drafts_are_told_apart_from_others() -> None:
    known = Costs(measured({1: 0.010, 9: 0.010}), measured({2: 0.030, 9: 0.030}))
    assert choose_depths([[0.6] * 8], 1, 1, known) == [0]
    assert choose_depths([[0.9] * 8], 1, 1, known) == [8]


def test_steps_grow_only_as_far_as_their_time_can_be_told() -> None:
    unknown = Costs(measured({32: 0.010}), StepCost())
    assert sum(choose_depths([[0.9] * 8] * 32, 32, 32, unknown)) <= 32
    assert draft_depth(0.9, 32, 32, unknown, 8)[0] == 1
    assert draft_depth(0.9, 1, 1, Costs(measured({1: 0.010}), StepCost()), 8)[0] > 1


def test_a_draft_model_guesses_deeper_the_likelier_and_the_cheaper_it_is() -> None:
    cheap, dear = measured({1: 0.001}), measured({1: 0.009})
    deep, floor = draft_depth(0.8, 1, 1, costs(FLAT, cheap, cheap), 8)
    assert deep >= 4
    assert 0.0 < floor < 0.8
    assert draft_depth(0.8, 1, 1, costs(FLAT, cheap, dear), 8)[0] < deep
    assert draft_depth(0.1, 1, 1, costs(FLAT, cheap, cheap), 8)[0] < deep
    assert draft_depth(0.8, 32, 32, costs(LINEAR, cheap, cheap), 8)[0] < deep


def test_what_it_costs_to_begin_is_paid_back_by_drafting_deeper() -> None:
    cheap, some = measured({1: 0.001}), measured({1: 0.005})
    deeper, floor = draft_depth(0.8, 1, 1, costs(FLAT, some, cheap), 8)
    depth, dearer_floor = draft_depth(0.8, 1, 1, costs(FLAT, cheap, cheap), 8)
    assert deeper >= depth
    assert floor <= dearer_floor  # once begun, a guess costs only itself


def test_guesses_are_checked_as_far_as_all_of_them_are_likely() -> None:
    assert worth_checking([0.9, 0.9, 0.5, 0.9], 0.6) == 2
    assert worth_checking([0.5, 0.9], 0.6) == 0
    assert worth_checking([], 0.6) == 0


def test_sizes_hardly_seen_are_tried() -> None:
    cost = StepCost()
    cost.observe(4, 1.0)  # the first of a size is slow for reasons of its own
    assert not cost.known
    cost.observe(4, 0.010)
    assert cost.at(8) == 0.010  # optimism: as if more tokens were free
    assert cost.at(1) == pytest.approx(0.0025)  # and fewer cost their share only
    for _ in range(2):
        cost.observe(4, 0.010)
    for _ in range(3):
        cost.observe(8, 0.020)
    assert cost.at(8) == 0.010  # the first is left out, and two may be accidents
    cost.observe(8, 0.020)
    assert cost.curve(6, 2, 6) == pytest.approx([0.015, 0.030])


def test_one_slow_step_does_not_bend_the_curve() -> None:
    cost = measured({4: 0.010})
    cost.observe(4, 5.0)
    assert cost.at(4) == 0.010


def test_a_size_that_only_met_disturbances_costs_no_more_per_token_than_smaller_ones() -> None:
    cost = measured({1: 0.010, 4: 5.0})
    assert cost.at(4) == pytest.approx(0.040)


def test_a_curve_not_seen_for_long_is_forgotten() -> None:
    cost = measured({1: 0.010, 32: 0.500})
    for _ in range(3000):
        cost.observe(1, 0.010)
    assert cost.at(32) == 0.010


def test_predicted_times_never_fall_with_tokens() -> None:
    cost = measured({1: 0.02, 4: 0.01, 8: 0.03})
    assert (np.diff(cost.curve(1, 20)) >= 0).all()


def test_acceptance_is_learned_by_grade() -> None:
    acceptance, rng = GradedAcceptance(np.array([0.5, 0.5])), np.random.default_rng(0)
    for _ in range(3000):
        acceptance.observe(0, bool(rng.random() < 0.2))
        acceptance.observe(1, bool(rng.random() < 0.9))
    assert acceptance.rates == pytest.approx([0.2, 0.9], abs=0.07)
    for _ in range(3000):  # the text changes, and so does what a grade means
        acceptance.observe(1, False)
    assert acceptance.rate(1) < 0.05


def test_a_sequence_that_fares_worse_lowers_its_own_estimate() -> None:
    better, worse, rates = SequenceBias(), SequenceBias(), [0.5, 0.8]
    for _ in range(30):
        better.observe(0.5, True)
        worse.observe(0.5, False)
    for rate, up, down in zip(rates, better.adjust(rates), worse.adjust(rates), strict=True):
        assert 0.0 < down < rate < up < 1.0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"proposer": "oracle"}, "speculation.proposer"),
        ({"max_depth": 0}, "speculation.max_depth"),
        ({"fixed_depth": 9}, "speculation.fixed_depth"),
        ({"min_match": 5, "max_match": 4}, "speculation.min_match"),
        ({"learned_tokens": -1}, "speculation.learned_tokens"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidConfiguration, match=field):
        SpeculationConfig(**options)  # type: ignore[arg-type]
