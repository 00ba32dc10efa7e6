"""A draft model's guesses in one call of the kernels: those that the sampler would have chosen level by level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import penstock_worker
from penstock_core.batching import SequenceState
from penstock_core.cache import PageConfig
from penstock_core.pipeline import EngineRequest, PipelineConfig, UnifiedInferencePipeline
from penstock_core.protocol.requests import SamplingParams
from penstock_core.speculative import DraftModelProposer, SpeculationConfig
from penstock_core.speculative.draft_model import _Context, _Part

MODEL = Path(penstock_worker.__file__).parent / "bundled" / "penstock-story"
OPTIONS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 1.7}, {"temperature": 0.0}]


def speculating(**options: Any) -> tuple[UnifiedInferencePipeline, DraftModelProposer]:
    """A pipeline on the bundled models with four sequences, a few tokens in."""
    made = UnifiedInferencePipeline(
        PipelineConfig(
            MODEL,
            max_num_sequences=8,
            page=PageConfig(num_pages=128),
            threads=2,
            speculation=SpeculationConfig(proposer="draft", draft_pages=PageConfig(num_pages=128), **options),
        )
    )
    for number, sampling in enumerate(OPTIONS):
        made.add_request(
            EngineRequest(
                f"r{number}",
                made.tokenizer.encode(f"Once upon a time, {number} goats lived by"),
                SamplingParams(seed=number, max_tokens=60, ignore_eos=True, **sampling),
            )
        )
    for _ in range(4):
        made.step()
    assert made._speculator is not None
    proposer = made._speculator._model
    assert isinstance(proposer, DraftModelProposer)
    return made, proposer


def parts(sequences: list[SequenceState]) -> list[_Part]:
    return [_Part(place, 1, sequence, _Context(place), [1]) for place, sequence in enumerate(sequences)]


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("threads_from", [0, 1 << 60], ids=["team", "alone"])
def test_one_call_guesses_what_the_sampler_would(
    floor: float, threads_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock_core.kernels.decoder.PARALLEL_WORK", threads_from)
    made, proposer = speculating(fixed_depth=4)
    if proposer._engine.model.whole is None:
        pytest.skip("no C kernels here")
    started: list[tuple[Any, Any]] = []
    in_one_call = proposer._guess_in_one_call

    def both(drafting: list[_Part], floor: float) -> Any:
        by_levels = proposer._guess_by_levels(drafting, floor)
        read = [list(part.context.guesses) for part in drafting]
        for part in drafting:
            part.context.guesses.clear()
            part.context.computed -= len(part.unread)
        at_once = in_one_call(drafting, floor)
        started.append((by_levels, at_once))
        assert [part.context.guesses for part in drafting] == read
        return at_once

    monkeypatch.setattr(proposer, "_guess_in_one_call", both)
    sequences = made.batcher.running
    proposer.propose(sequences, [8, 1, 5, 8], floor)
    assert len(started) == 1
    (one, one_levels, _), (other, other_levels, _) = started[0]
    assert one_levels == other_levels
    assert [draft.token_ids for draft in one] == [draft.token_ids for draft in other]
    for left, right in zip(one, other, strict=True):
        assert left.grades == right.grades
    assert sum(len(draft.token_ids) for draft in one) >= 4
    made.close()


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.9, "top_p": 0.5}, {"temperature": 0.9, "top_k": 3}, {"repetition_penalty": 1.3}],
    ids=str,
)
def test_options_that_the_kernels_do_not_know_go_level_by_level(sampling: dict[str, Any]) -> None:
    made, proposer = speculating(fixed_depth=4)
    made.add_request(
        EngineRequest("x", made.tokenizer.encode("The fox"), SamplingParams(max_tokens=40, ignore_eos=True, **sampling))
    )
    made.step()
    made.step()
    sequences = made.batcher.running
    assert not proposer._in_one_call(parts(sequences))
    assert proposer._in_one_call(parts(sequences[:4])) == (proposer._engine.model.whole is not None)
    made.close()
