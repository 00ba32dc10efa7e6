"""What whole steps with drafts cost on the bundled models, and the acceptance at which they break even.

Requests that a suffix proposer has served before get drafts that cost a lookup and are right; so their steps show what
checking costs, and how fast decoding can become at most. The draft model's are measured with as many guesses each.
Times are the lower quartile of many steps: what disturbs a machine only makes a step longer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.report import table

LOOKED_UP, GUESSED = "suffix", "draft"
_TITLES = {LOOKED_UP: "drafts that cost a lookup", GUESSED: "guesses of the draft model, drafting included"}

Costs = dict[str, dict[str, dict[str, float]]]
"""Milliseconds of a step by kind of drafts, batch and depth (0: plain), where there were such steps."""


def break_even(ratio: float, depth: int) -> float:
    """Least acceptance a of each token at which 1 + a + ... + a^k tokens a step make up for its cost; above 1: none."""
    if ratio > depth + 1:
        return ratio / (depth + 1)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(depth + 1)) < ratio else (low, middle)
    return high


def measure(
    engine_of: Callable[[str | None, int | None], Any],
    texts: Sequence[str],
    batches: Sequence[int],
    depths: Sequence[int],
    tokens: int,
) -> Costs:
    """Serve the same requests plainly, and at each fixed depth with either kind of drafts.

    Args:
        engine_of: makes an executor of a proposer's name (None: plain) and a depth.
        texts: prompts, as many as the largest batch. tokens: to be generated for each.
    """
    costs: Costs = {LOOKED_UP: {}, GUESSED: {}}
    plain = engine_of(None, None).pipeline
    prompts = [plain.tokenizer.encode(text) for text in texts]
    for batch in batches:
        _step_ms(plain, prompts[:batch], tokens, 0)
        own = _step_ms(plain, prompts[:batch], tokens, 0)
        assert own is not None
        for by_batch in costs.values():
            by_batch[str(batch)] = {"0": own}
    for depth in depths:
        for kind, by_batch in costs.items():
            pipeline = engine_of(kind, depth).pipeline
            for batch in batches:
                for _ in range(2 if kind == LOOKED_UP else 1):  # the first time it learns them
                    _step_ms(pipeline, prompts[:batch], tokens, depth)
                taken = _step_ms(pipeline, prompts[:batch], tokens, depth)
                if taken is not None:
                    by_batch[str(batch)][str(depth)] = taken
    return costs


def _step_ms(pipeline: Any, prompts: Sequence[Sequence[int]], tokens: int, depth: int) -> float | None:
    """Usual time of steps in which all of these requests decode, each with so many drafts; None: there were none."""
    from penstock_core.pipeline import EngineRequest
    from penstock_core.sampling import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        pipeline.add_request(EngineRequest(str(number), prompt, params))
    full, taken = len(prompts) * (depth + 1), []
    computed = pipeline.statistics().batch_tokens
    while pipeline.has_work:
        began = time.perf_counter()
        pipeline.step()
        seconds = time.perf_counter() - began
        before, computed = computed, pipeline.statistics().batch_tokens
        if computed - before == full:
            taken.append(seconds)
    return statistics.quantiles(taken, n=4)[0] * 1e3 if len(taken) > 1 else None


def show(costs: Costs) -> None:
    """A table for each kind of drafts: time over a plain step's, and the acceptance at which that breaks even."""
    for kind, by_batch in costs.items():
        depths = sorted({int(depth) for by_depth in by_batch.values() for depth in by_depth} - {0})
        table(
            f"time of a step with k {_TITLES[kind]}, times a plain step (acceptance at which it breaks even)",
            ["sequences", "plain, ms", *(f"k={depth}" for depth in depths)],
            [
                [batch, by_depth["0"], *(_cell(by_depth.get(str(depth)), by_depth["0"], depth) for depth in depths)]
                for batch, by_depth in by_batch.items()
            ],
        )


def _cell(milliseconds: float | None, plain: float, depth: int) -> str:
    if milliseconds is None:
        return "-"
    ratio = milliseconds / plain
    needed = break_even(ratio, depth)
    return f"{ratio:.2f} ({needed:.2f})" if needed <= 1 else f"{ratio:.2f} (never)"
