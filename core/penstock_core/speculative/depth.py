"""How many drafts of each sequence to check in the next step: as many as raise tokens per second.

A draft at position j of a sequence yields a token with the product of the chances up to it. Drafts of the batch are
ranked by that yield, and taken while the expected rate, tokens over the predicted time of the step, still rises. A full
batch makes a step's time steep in its tokens, so depth shrinks under load by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from penstock_core.speculative.cost import StepCost

UNKNOWN_DRAFT = 0.25
"""Share of a step that a draft model's step is taken to cost until one was measured."""

_FIRST_TOKENS = 8  # of a step with drafts that are checked before it is known what such steps cost


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured times: of steps without drafts, of steps with drafts, and of the draft model by number of sequences.

    A step with drafts costs more than its tokens: there is more to prepare and to compare.
    """

    plain: StepCost
    checking: StepCost
    start: StepCost | None = None
    level: StepCost | None = None

    def of_checking(self, first: int, count: int, stride: int = 1) -> list[float]:
        """Seconds of steps of `first`, `first + stride`, ... tokens, drafts among them."""
        known = self.checking if self.checking.known else self.plain
        return known.curve(first, count, stride)

    def most_tokens(self, step_tokens: int) -> int:
        """Tokens of a step up to which its time can be told, or is small enough to find out."""
        return max(_FIRST_TOKENS, 2 * step_tokens, 2 * self.checking.largest)


def choose_depths(
    chances: Sequence[Sequence[float]], step_tokens: int, emitting: int, costs: Costs, *, some: bool = False
) -> list[int]:
    """Drafts to check of each sequence, where making them cost nothing.

    Args:
        chances: by sequence, each draft's chance of being accepted if those before it are, [depth].
        step_tokens: tokens of the step without drafts.
        emitting: sequences that get a token in the step anyway.
        costs: measured times.
        some: check drafts even if that is not expected to pay.
    """
    yields = sorted(
        ((-gain, place) for place, chance in enumerate(chances) for gain in accumulate(chance, mul)),
    )[: max(0, costs.most_tokens(step_tokens) - step_tokens)]
    depths = [0] * len(chances)
    if not yields:
        return depths
    seconds = costs.of_checking(step_tokens + 1, len(yields))
    best, best_rate, emitted = 0, 0.0 if some else emitting / costs.plain.at(step_tokens), float(emitting)
    for number, ((gain, _), spent_s) in enumerate(zip(yields, seconds, strict=True), 1):
        emitted -= gain
        if emitted > best_rate * spent_s:
            best, best_rate = number, emitted / spent_s
    for _, place in yields[:best]:
        depths[place] += 1
    return depths


def draft_depth(chance: float, step_tokens: int, emitting: int, costs: Costs, max_depth: int) -> tuple[int, float]:
    """How deep a draft model should draft for a batch, before it is known what it will say, if it drafts at all.

    Args:
        chance: the mean chance that a next guess is right.
        step_tokens, emitting, costs: as in `choose_depths`.

    Returns:
        (depth, floor): at least 1. Below the floor, the chance of a guess is not worth its time.
    """
    deepest = max(1, min(max_depth, (costs.most_tokens(step_tokens) - step_tokens) // emitting))
    seconds = costs.of_checking(step_tokens, deepest + 2, emitting)
    start_s, level_s = (
        UNKNOWN_DRAFT * seconds[0] if known is None or not known.known else known.at(emitting)
        for known in (costs.start, costs.level)
    )
    best, best_rate, yielded, gain = 1, 0.0, 1.0, 1.0
    for depth in range(1, deepest + 1):
        gain *= chance
        yielded += gain
        rate = emitting * yielded / (seconds[depth] + start_s + depth * level_s)
        if rate > best_rate:
            best, best_rate = depth, rate
    # Measured times have steps and dents: the price of one more is taken from around the best depth.
    more_s = (seconds[best + 1] - seconds[best - 1]) / 2 if best > 1 else seconds[2] - seconds[1]
    more_s = max(more_s, (seconds[-1] - seconds[1]) / (2 * deepest))
    return best, min(0.9, best_rate * (more_s + level_s) / emitting)


def worth_checking(chances: Sequence[float], floor: float) -> int:
    """How many drafts of a sequence are as likely to be all right as `floor`."""
    number = 0
    for gain in accumulate(chances, mul):
        if gain < floor:
            break
        number += 1
    return number
