"""A step launched before the last one's tokens are read: what is late, what is thrown away, and what never is.

That the tokens are the same is in `test_same_tokens.py`; this is about order, endings, failures and buffers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penstock_core.pipeline import ResumedChoice
from penstock_core.pipeline.returns import ReturningTokens, TokenReturns
from penstock_core.protocol.errors import InvalidConfiguration
from penstock_core.protocol.jobs import FinishReason
from penstock_core.speculative import SpeculationConfig
from tests.unit.pipeline.fake_engine import Collected, FakeEngine, pipeline, request, run_one


class Diary:
    """A pipeline that overlaps, and the order in which steps are computed and read."""

    def __init__(self, engine: FakeEngine | None = None, **options: Any) -> None:
        self.engine = engine or FakeEngine()
        self.entries: list[str] = []
        self.pipe = pipeline(self.engine, overlap=True, **options)
        forward, returns = self.engine.forward, self.pipe._returns
        assert returns is not None
        send, numbers = returns.send, iter(range(10_000))

        def compute(*arguments: Any) -> Any:
            self.entries.append("compute")
            return forward(*arguments)

        def note(tokens: torch.Tensor) -> ReturningTokens:
            returning, number = send(tokens), next(numbers)
            read = returning.read
            returning.read = lambda: self.entries.append(f"read {number}") or read()  # type: ignore
            return returning

        self.engine.forward = compute  # type: ignore[method-assign]
        returns.send = note  # type: ignore[method-assign]


def test_a_step_is_computed_before_the_last_one_is_read() -> None:
    diary = Diary()
    diary.pipe.add_request(request("x", 10, max_tokens=4, ignore_eos=True))
    Collected(diary.pipe).run()
    assert diary.entries == ["compute", "compute", "read 0", "compute", "read 1", "compute", "read 2", "read 3"]
    assert diary.engine.sizes == [10, 1, 1, 1], "the length limit is known without reading: nothing is computed in vain"


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.2},
        {"logit_bias": {300: 1.0}},
        {"logprobs": 1},
        {"response_format": {"regex": "[a-z ]{4,60}"}},
        {"min_tokens": 3},
    ],
)
def test_steps_whose_options_need_the_host_are_read_at_once(options: dict[str, Any]) -> None:
    diary = Diary()
    diary.pipe.add_request(request("x", max_tokens=3, **options))
    Collected(diary.pipe).run()
    assert set(diary.entries) == {"compute"}


def test_a_request_that_needs_the_host_joins_steps_that_do_not() -> None:
    alone = run_one(request("plain", 9, ignore_eos=True)), run_one(request("biased", 7, logit_bias={300: 3.0}))
    diary = Diary()
    diary.pipe.add_request(request("plain", 9, ignore_eos=True))
    collected = Collected(diary.pipe)
    collected.step()
    collected.step()
    diary.pipe.add_request(request("biased", 7, logit_bias={300: 3.0}))
    collected.run()
    assert (collected.results["plain"].choices, collected.results["biased"].choices) == tuple(a.choices for a in alone)


@pytest.mark.parametrize(
    "ending", [{"stop": ("e", "th")}, {"stop_token_ids": tuple(range(64))}], ids=["stop string", "stop token"]
)
def test_a_late_found_end_throws_the_extra_token_away(ending: dict[str, Any]) -> None:
    options = {"temperature": 1.0, "ignore_eos": True, "max_tokens": 60, **ending}
    expected = run_one(request("x", **options))
    assert expected.choices[0].finish_reason is FinishReason.STOP
    diary = Diary()
    diary.pipe.add_request(request("x", **options))
    collected = Collected(diary.pipe).run()
    assert collected.results["x"].choices == expected.choices
    assert collected.tokens("x") == list(expected.choices[0].token_ids)
    assert len(diary.engine.sizes) == len(expected.choices[0].token_ids) + 1, "one token too many was computed"
    diary.pipe.cache.check(idle=True)


def test_an_ended_sequences_pages_are_kept_until_its_step_is_read() -> None:
    diary = Diary(FakeEngine(num_pages=64), prefix_cache=False)
    diary.pipe.add_request(request("x", 10, max_tokens=100, ignore_eos=True))
    collected = Collected(diary.pipe)
    for _ in range(3):
        collected.step()
    held = diary.pipe.statistics().cache.used_pages
    diary.pipe.abort("x", FinishReason.CANCELLED)
    assert diary.pipe.statistics().cache.used_pages == held
    collected.run()
    assert collected.tokens("x") == list(collected.results["x"].choices[0].token_ids)
    assert len(collected.tokens("x")) == 2, "the token that nobody had read is not delivered"
    diary.pipe.cache.check(idle=True)


def test_tokens_chosen_before_a_failing_step_are_delivered() -> None:
    diary = Diary()
    diary.pipe.add_request(request("x", 10, max_tokens=20, ignore_eos=True))
    diary.pipe.add_request(request("waits", 10, max_tokens=3))
    collected = Collected(diary.pipe)
    for _ in range(3):
        collected.step()
    diary.engine.explode = RuntimeError("out of memory")
    collected.run()
    assert "out of memory" in (collected.results["x"].error or "")
    undisturbed = run_one(request("x", 10, max_tokens=20, ignore_eos=True)).choices[0].token_ids
    assert tuple(collected.tokens("x")) == undisturbed[:3]
    diary.pipe.cache.check(idle=True)


def test_a_step_that_turns_out_to_have_failed_takes_the_next_one_with_it() -> None:
    """A GPU says late that it failed: what was launched since was computed from what it should have written."""
    diary = Diary(max_num_sequences=2)
    diary.pipe.add_request(request("x", 10, max_tokens=20, ignore_eos=True))
    collected = Collected(diary.pipe)
    collected.step()

    def lost() -> Any:
        raise RuntimeError("the device is lost")

    assert diary.pipe._launched is not None
    diary.pipe._launched.returning.read = lost  # type: ignore[method-assign]
    diary.pipe.add_request(request("joins", 10, max_tokens=20, ignore_eos=True, cache_salt="other"))
    collected.step()
    for name in ("x", "joins"):
        assert "the device is lost" in (collected.results[name].error or "")
    assert diary.pipe.statistics().cache.cached_pages == 0
    diary.pipe.cache.check(idle=True)
    diary.pipe.add_request(request("after"))
    assert collected.run().results["after"].choices == run_one(request("after")).choices


def test_logits_that_are_not_finite_end_the_request_and_no_step() -> None:
    engine = FakeEngine()
    engine.poison = True
    result = run_one(request("x", temperature=1.0), pipeline(engine, overlap=True))
    assert result.choices[0].finish_reason is FinishReason.ERROR
    assert result.choices[0].token_ids == ()


def test_an_interrupt_leaves_a_pipeline_that_goes_on() -> None:
    diary = Diary()
    diary.pipe.add_request(request("x", max_tokens=20, ignore_eos=True))
    collected = Collected(diary.pipe)
    collected.step()
    collected.step()
    diary.engine.explode = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        diary.pipe.step()
    collected.run()
    assert collected.results["x"].choices[0].finish_reason is FinishReason.ERROR
    diary.pipe.cache.check(idle=True)
    assert run_one(request("b"), diary.pipe).choices == run_one(request("b")).choices


def test_closing_with_a_step_under_way_gives_every_page_back() -> None:
    diary = Diary()
    diary.pipe.add_request(request("x", n=2, max_tokens=20, ignore_eos=True))
    diary.pipe.step()
    diary.pipe.step()
    diary.pipe.close()  # checks the pages


def test_a_resumed_request_goes_on_at_the_next_token() -> None:
    whole = run_one(request("x", temperature=1.0, ignore_eos=True)).choices[0]
    diary = Diary()
    diary.pipe.add_request(
        request("x", temperature=1.0, ignore_eos=True, resume=[ResumedChoice(0, whole.token_ids[:5])])
    )
    collected = Collected(diary.pipe).run()
    assert collected.tokens("x") == list(whole.token_ids[5:])


class Clockwork:
    """Buffers and events that tell when a buffer is written while its tokens are still on their way."""

    def __init__(self) -> None:
        self.made = 0

    def memory(self, size: int) -> torch.Tensor:
        self.made += 1
        return torch.full((size,), -9)

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def test_a_buffer_is_written_again_only_after_it_was_read() -> None:
    clockwork = Clockwork()
    returns = TokenReturns(torch.device("cpu"), 4, clockwork.memory, lambda: clockwork)
    first, second = returns.send(torch.tensor([1, 2, 3])), returns.send(torch.tensor([4]))
    assert clockwork.made == 2, "the first was not read: the second needs memory of its own"
    assert first.read().tolist() == [1, 2, 3]
    third = returns.send(torch.tensor([5, 6]))
    assert clockwork.made == 2
    assert second.read().tolist() == [4]
    assert third.read().tolist() == [5, 6]


def test_tokens_that_could_not_be_read_keep_their_buffer() -> None:
    clockwork = Clockwork()
    returns = TokenReturns(torch.device("cpu"), 4, clockwork.memory, lambda: clockwork)
    lost = returns.send(torch.tensor([1]))
    clockwork.synchronize = lambda: (_ for _ in ()).throw(RuntimeError("lost"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="lost"):
        lost.read()
    del clockwork.synchronize
    returns.send(torch.tensor([2]))
    assert clockwork.made == 2


@pytest.mark.parametrize(
    "options", [{"speculation": SpeculationConfig()}, {"distributed": "two ranks"}], ids=["speculation", "ranks"]
)
def test_what_overlap_does_not_work_with_is_refused(options: dict[str, Any]) -> None:
    from penstock_core.distributed import DistributedConfig

    if "distributed" in options:
        options = {"distributed": DistributedConfig(tensor_parallel=2)}
    with pytest.raises(InvalidConfiguration, match="overlap"):
        pipeline(overlap=True, **options)


@pytest.mark.parametrize(("device", "expected"), [("cpu", False), ("cuda", True)])
def test_overlap_is_for_gpus_where_nothing_else_is_said(device: str, expected: bool) -> None:
    assert pipeline().config.overlaps(device) is expected
    assert not pipeline(speculation=SpeculationConfig(proposer="ngram")).config.overlaps("cuda")
    assert pipeline(overlap=True).config.overlaps(device)
    assert not pipeline(overlap=False).config.overlaps(device)
