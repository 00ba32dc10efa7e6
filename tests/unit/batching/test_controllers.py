"""The two controllers: a token budget that holds a step time, and a wait that must pay."""

from __future__ import annotations

import random

import pytest

from penstock_core.batching import AdaptiveBatchTimeout, BudgetController
from tests.unit.batching.support import Bench


@pytest.mark.parametrize(
    ("fixed", "per_token", "wanted"), [(0.005, 0.0001, 150), (0.002, 0.001, 18), (0.0, 0.0002, 100)]
)
def test_budget_settles_where_steps_take_the_target_time(fixed: float, per_token: float, wanted: int) -> None:
    noise = random.Random(1)
    controller = BudgetController(target_s=0.020, minimum=4, maximum=2048)
    seen = []
    for _ in range(300):
        tokens = noise.choice([controller.budget, controller.budget, 4 + noise.randrange(8)])
        controller.observe(tokens, (fixed + per_token * tokens) * noise.uniform(0.95, 1.05))
        seen.append(controller.budget)
    assert sum(seen[-100:]) / 100 == pytest.approx(wanted, rel=0.25)


def test_budget_stays_within_its_bounds_and_moves_slowly() -> None:
    controller = BudgetController(target_s=0.001, minimum=16, maximum=512)
    before = controller.budget
    assert before == 512
    for _ in range(100):
        controller.observe(controller.budget, 1.0)
        assert controller.budget >= int(before / BudgetController.SLEW)
        before = controller.budget
    assert controller.budget == 16
    for _ in range(400):
        controller.observe(16, 0.0001)
    assert controller.budget == 512


def test_short_decode_steps_do_not_shrink_the_budget() -> None:
    controller = BudgetController(target_s=0.050, minimum=4, maximum=1024)
    for _ in range(100):
        controller.observe(1, 0.005)
    assert controller.budget == 1024


def test_batcher_obeys_the_controller() -> None:
    bench = Bench(max_batch_tokens=64, target_step_ms=10.0, num_pages=128)
    assert bench.batcher.budget is not None
    sequence = bench.add(120, 2)
    assert bench.step()[sequence] == 64
    for _ in range(5):
        bench.batcher.budget.observe(64, 0.1)
    assert bench.step()[sequence] < 40


def test_lone_request_without_history_starts_at_once() -> None:
    timeout = AdaptiveBatchTimeout(0.010)
    assert timeout.wait_s(5.0, 5.0) == 0.0
    timeout.arrived(5.0)
    assert timeout.wait_s(5.0, 5.0) == 0.0


def test_sparse_arrivals_are_not_waited_for() -> None:
    timeout = AdaptiveBatchTimeout(0.010)
    for second in range(5):
        timeout.arrived(float(second))
    assert timeout.wait_s(4.0, 4.0) == 0.0


def test_dense_arrivals_are_waited_for_within_the_limit() -> None:
    timeout = AdaptiveBatchTimeout(0.010)
    for tick in range(20):
        timeout.arrived(tick * 0.002)
    now = 19 * 0.002
    assert timeout.wait_s(now, now) == pytest.approx(0.004)  # twice the usual gap
    assert timeout.wait_s(now + 0.003, now) == pytest.approx(0.001)
    assert timeout.wait_s(now + 0.005, now) == 0.0  # a lull: company does not come
    for tick in range(20, 60):
        timeout.arrived(tick * 0.002)
    assert timeout.wait_s(59 * 0.002, 59 * 0.002 - 0.009) == pytest.approx(0.001)  # the limit counts from the first
