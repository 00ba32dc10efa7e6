"""How many drafts of each sequence to check in the next step: as many as raise tokens per second, down to none.

A draft at position j of a sequence yields a token with the product of the chances up to it. All drafts of the batch are
ranked by that yield, and taken while the expected rate, tokens over the predicted time of the step, still rises. A full
batch makes a step's time steep in its tokens, so depth shrinks under load by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from penstock_core.sampling.noise import Float64
from penstock_core.speculative.cost import StepCost

WORTH = 1.05
"""A gain of less than this factor is within the noise of measured times, and not taken."""

UNKNOWN_DRAFT = 0.25
"""Share of a step that a draft model's step is taken to cost until one was measured."""


def choose_depths(chances: Sequence[Float64], step_tokens: int, emitting: int, cost: StepCost) -> list[int]:
    """Drafts to check of each sequence.

    Args:
        chances: by sequence, each draft's chance of being accepted if those before it are, [depth].
        step_tokens: tokens of the step without drafts.
        emitting: sequences that get a token in the step anyway.
        cost: measured time of steps.
    """
    yields = [np.cumprod(chance) for chance in chances]
    lengths = [len(gain) for gain in yields]
    everything = np.concatenate(yields) if yields else np.zeros(0)
    if not everything.size or not cost.known:
        return lengths
    owner = np.repeat(np.arange(len(yields)), lengths)
    order = np.argsort(-everything, kind="stable")
    emitted = emitting + np.concatenate([[0.0], np.cumsum(everything[order])])
    rate = emitted / cost.curve(step_tokens, everything.size + 1)
    best = int(rate.argmax())
    if rate[best] < WORTH * rate[0]:
        return [0] * len(yields)
    depths: list[int] = np.bincount(owner[order[:best]], minlength=len(yields)).tolist()
    return depths


def least_paying_chance(step_tokens: int, emitting: int, cost: StepCost) -> float:
    """The chance of acceptance from which one draft for every emitting sequence would pay; above 1 if none can."""
    if not cost.known or not emitting:
        return 0.0
    return cost.at(step_tokens + emitting) / cost.at(step_tokens) * WORTH - 1.0


def draft_depth(
    chances: Float64,
    step_tokens: int,
    emitting: int,
    cost: StepCost,
    start_cost: StepCost,
    level_cost: StepCost,
    max_depth: int,
) -> tuple[int, float]:
    """How deep a draft model should draft for a batch, before it is known what it will say.

    Args:
        chances: by sequence, the mean chance that its next guess is right, [n].
        step_tokens, emitting, cost: as in `choose_depths`.
        start_cost, level_cost: measured time of the draft model: until it can guess, and per guess of each sequence.

    Returns:
        (depth, floor): 0 where drafting does not pay. Below the floor, the chance of a guess is not worth its time.
    """
    count = len(chances)
    if not count or not cost.known:
        return 0, 1.0
    levels = np.arange(max_depth + 1, dtype=np.float64)
    emitted = emitting + np.cumsum((chances[:, None] ** levels).sum(0)) - count
    plain = cost.curve(step_tokens, max_depth + 1, count)
    start_s, level_s = (
        known.at(count) if known.known else UNKNOWN_DRAFT * plain[0] for known in (start_cost, level_cost)
    )
    seconds = plain + level_s * levels + start_s * (levels > 0)
    rate = emitted / seconds
    best = int(rate.argmax())
    if rate[best] < WORTH * rate[0]:
        return 0, 1.0
    return best, float(rate[best] * (plain[best] - plain[best - 1] + level_s) / count)
