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
from penstock_core.speculative.depth import WORTH, choose_depths, draft_depth, least_paying_chance


def measured(curve: dict[int, float]) -> StepCost:
    cost = StepCost()
    for tokens, seconds in curve.items():
        for _ in range(10):
            cost.observe(tokens, seconds)
    return cost


FLAT = measured({1: 0.010, 64: 0.0101})
LINEAR = measured({1: 0.001, 100: 0.100})


def test_free_tokens_are_all_checked_and_dear_ones_never() -> None:
    chances = [np.full(8, 0.5), np.full(3, 0.3)]
    assert choose_depths(chances, 2, 2, FLAT) == [8, 3]
    assert choose_depths([np.full(8, 0.9)] * 4, 4, 4, LINEAR) == [0, 0, 0, 0]


def test_depth_shrinks_as_the_batch_grows() -> None:
    cost = measured({1: 0.010, 12: 0.011, 128: 0.090})
    depths = [sum(choose_depths([np.full(8, 0.7)] * n, n, n, cost)) / n for n in (1, 2, 4, 8, 32)]
    assert depths[0] >= 6
    assert depths == sorted(depths, reverse=True)
    assert depths[-1] == 0


def test_the_surer_sequence_gets_the_deeper_draft() -> None:
    cost = measured({2: 0.010, 6: 0.0105, 32: 0.040})
    sure, unsure = choose_depths([np.full(8, 0.95), np.full(8, 0.4)], 2, 2, cost)
    assert sure > unsure


@given(
    chances=st.lists(st.lists(st.floats(0.02, 0.98), min_size=1, max_size=3), min_size=1, max_size=3),
    slope=st.floats(0.0, 2.0),
)
@settings(max_examples=200, deadline=None)
def test_no_other_choice_of_depths_would_be_faster(chances: list[list[float]], slope: float) -> None:
    cost = measured({1: 1.0, 20: 1.0 + 19 * slope})
    count = len(chances)

    def rate(depths: tuple[int, ...]) -> float:
        emitted = count + sum(float(np.cumprod(c)[:d].sum()) for c, d in zip(chances, depths, strict=True))
        return emitted / cost.at(count + sum(depths))

    chosen = tuple(choose_depths([np.array(c) for c in chances], count, count, cost))
    best = max(rate(depths) for depths in itertools.product(*(range(len(c) + 1) for c in chances)))
    assert rate(chosen) * WORTH >= best - 1e-9


def test_a_draft_model_is_asked_only_where_its_own_time_pays_too() -> None:
    cheap, dear = measured({1: 0.001}), measured({1: 0.009})
    likely = np.array([0.8])
    depth, floor = draft_depth(likely, 1, 1, FLAT, cheap, cheap, 8)
    assert depth >= 4
    assert 0.0 < floor < 0.8
    assert draft_depth(likely, 1, 1, FLAT, cheap, dear, 8)[0] == 0
    assert draft_depth(np.array([0.05]), 1, 1, FLAT, cheap, cheap, 8)[0] == 0
    assert draft_depth(np.full(32, 0.8), 32, 32, LINEAR, cheap, cheap, 8)[0] == 0


def test_what_it_costs_to_begin_is_paid_back_by_drafting_deeper_or_not_at_all() -> None:
    cheap, some, much = measured({1: 0.001}), measured({1: 0.005}), measured({1: 0.05})
    likely = np.array([0.8])
    deeper, floor = draft_depth(likely, 1, 1, FLAT, some, cheap, 8)
    depth, dearer_floor = draft_depth(likely, 1, 1, FLAT, cheap, cheap, 8)
    assert deeper >= depth
    assert floor <= dearer_floor  # once begun, a guess costs only itself
    assert draft_depth(likely, 1, 1, FLAT, much, cheap, 8)[0] == 0


def test_hopeless_batches_are_known_without_asking_anyone() -> None:
    assert least_paying_chance(1, 1, FLAT) < 0.06
    assert least_paying_chance(16, 16, LINEAR) > 0.95
    assert least_paying_chance(16, 16, StepCost()) == 0.0


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
    assert acceptance.rates(np.array([0, 1])) == pytest.approx([0.2, 0.9], abs=0.07)
    for _ in range(3000):  # the text changes, and so does what a grade means
        acceptance.observe(1, False)
    assert acceptance.rate(1) < 0.05


def test_a_sequence_that_fares_worse_lowers_its_own_estimate() -> None:
    better, worse, rates = SequenceBias(), SequenceBias(), np.array([0.5, 0.8])
    for _ in range(30):
        better.observe(0.5, True)
        worse.observe(0.5, False)
    assert (better.adjust(rates) > rates).all()
    assert (worse.adjust(rates) < rates).all()
    assert (better.adjust(rates) < 1.0).all()
    assert (worse.adjust(rates) > 0.0).all()


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
