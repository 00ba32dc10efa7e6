"""Driving a pipeline: offline in the caller's thread, and for a worker in a thread that sleeps, wakes and owns up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from penstock_core.pipeline import InferencePipelineExecutor, RequestOutput
from penstock_core.protocol.errors import EngineFailed, InvalidRequest, JobFailed
from penstock_core.protocol.jobs import FinishReason
from penstock_core.protocol.requests import ChatMessage, SamplingParams
from tests.unit.pipeline.fake_engine import FakeEngine, pipeline, request, run_one, tokenizer

SAMPLED = SamplingParams(temperature=1.0, seed=3, max_tokens=8, ignore_eos=True)


class Sink:
    """Takes outputs in the engine's thread; tests wait on its condition."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}
        self.tokens: dict[str, int] = {}
        self.changed = threading.Condition()

    def __call__(self, outputs: list[RequestOutput]) -> None:
        with self.changed:
            for output in outputs:
                done = sum(len(chunk.token_ids) for chunk in output.chunks)
                self.tokens[output.request_id] = self.tokens.get(output.request_id, 0) + done
                if output.result is not None:
                    self.results[output.request_id] = output.result
            self.changed.notify_all()

    def wait(self, *request_ids: str) -> list[Any]:
        with self.changed:
            assert self.changed.wait_for(lambda: all(i in self.results for i in request_ids), timeout=30)
        return [self.results[request_id] for request_id in request_ids]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(num_pages=1024)


@pytest.fixture
def executor(engine: FakeEngine) -> Iterator[InferencePipelineExecutor]:
    made = InferencePipelineExecutor(pipeline(engine, max_num_sequences=16))
    yield made
    made.shutdown(timeout_s=30)


def test_generate_takes_one_prompt_or_several_in_every_form(executor: InferencePipelineExecutor) -> None:
    ids = tokenizer().encode("The fox")
    (one,) = executor.generate("The fox", SAMPLED)
    (same,) = executor.generate(ids, SAMPLED)
    assert one.token_ids == same.token_ids
    several = executor.generate(["The fox", ids, "A moth"], SAMPLED)
    assert several[0].token_ids == several[1].token_ids == one.token_ids
    assert several[2].token_ids != one.token_ids
    assert one.model == "fake"
    assert executor.generate([], SAMPLED) == []


def test_generate_renders_conversations(executor: InferencePipelineExecutor) -> None:
    if not tokenizer().has_chat_template:
        with pytest.raises(InvalidRequest, match="no chat template"):
            executor.generate([{"role": "user", "content": "hi"}], SAMPLED)
        return
    (plain,) = executor.generate([{"role": "user", "content": "hi"}], SAMPLED)
    (typed,) = executor.generate([ChatMessage(role="user", content="hi")], SAMPLED)
    assert plain.token_ids == typed.token_ids


def test_generate_takes_options_for_each(executor: InferencePipelineExecutor) -> None:
    short = SAMPLED.model_copy(update={"max_tokens": 2})
    results = executor.generate(["a", "a"], [SAMPLED, short])
    assert [len(result.token_ids) for result in results] == [8, 2]
    with pytest.raises(InvalidRequest, match="one for each"):
        executor.generate(["a", "a"], [SAMPLED])


def test_generate_runs_nothing_if_one_prompt_is_refused(executor: InferencePipelineExecutor) -> None:
    with pytest.raises(InvalidRequest):
        executor.generate([[5], [999_999]], SAMPLED)
    assert not executor.pipeline.has_work


def test_generate_reports_what_the_engine_could_not_do(executor: InferencePipelineExecutor, engine: FakeEngine) -> None:
    engine.explode = RuntimeError("no memory")
    with pytest.raises(JobFailed, match="no memory"):
        executor.generate(["a", "b"], SAMPLED)
    assert executor.generate("a", SAMPLED)[0].token_ids


def test_progress_bar_changes_nothing(executor: InferencePipelineExecutor, capsys: pytest.CaptureFixture[str]) -> None:
    shown = executor.generate(["a", "b"], SAMPLED, progress=True)
    assert "2/2" in capsys.readouterr().err
    assert [r.token_ids for r in executor.generate(["a", "b"], SAMPLED)] == [r.token_ids for r in shown]


def test_stream_is_the_result_in_pieces(executor: InferencePipelineExecutor) -> None:
    (whole,) = executor.generate("The fox", SAMPLED)
    chunks = list(executor.stream("The fox", SAMPLED))
    assert "".join(piece for chunk in chunks for piece in chunk.pieces) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == list(whole.token_ids)


def test_streams_may_be_read_in_turns_and_dropped(executor: InferencePipelineExecutor) -> None:
    first, second = executor.stream("The fox", SAMPLED), executor.stream("A moth", SAMPLED)
    dropped = executor.stream("A bear", SAMPLED)
    next(dropped)
    dropped.close()  # type: ignore[attr-defined]
    turns = [next(first), next(second), next(first)]
    rest = [*first]
    assert [c.offset for c in [turns[0], turns[2], *rest]] == list(range(8))
    assert [c.offset for c in second] == list(range(1, 8))
    assert not executor.pipeline.batcher.has_work


def test_thread_answers_requests_from_many_threads(executor: InferencePipelineExecutor) -> None:
    sink = Sink()
    executor.start(sink)
    names = [f"{n}" for n in range(24)]
    threads = [threading.Thread(target=executor.submit, args=(request(name, 5 + int(name)),)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, result in zip(names, sink.wait(*names), strict=True):
        assert result.choices == run_one(request(name, 5 + int(name))).choices
    assert executor.capacity().free_sequences == 16
    assert executor.is_alive


def test_idle_thread_sleeps_until_it_is_needed(executor: InferencePipelineExecutor, engine: FakeEngine) -> None:
    sink = Sink()
    executor.start(sink)
    executor.submit(request("a"))
    sink.wait("a")
    steps = len(engine.sizes)
    executor.abort("unknown", FinishReason.CANCELLED)
    executor.submit(request("b", max_tokens=1))
    sink.wait("b")
    assert len(engine.sizes) == steps + 1  # nothing was computed in between


def test_abort_reaches_requests_that_run_and_requests_just_submitted(executor: InferencePipelineExecutor) -> None:
    sink = Sink()
    executor.start(sink)
    executor.submit(request("a", max_tokens=None, ignore_eos=True))
    with sink.changed:
        assert sink.changed.wait_for(lambda: sink.tokens.get("a", 0) > 2, timeout=30)
    executor.abort("a", FinishReason.CANCELLED)
    (result,) = sink.wait("a")
    assert result.choices[0].finish_reason is FinishReason.CANCELLED
    executor.submit(request("b", max_tokens=None, ignore_eos=True))
    executor.abort("b", FinishReason.EXPIRED)
    (result,) = sink.wait("b")
    assert result.choices[0].finish_reason is FinishReason.EXPIRED


def test_capacity_counts_what_is_still_in_the_inbox(executor: InferencePipelineExecutor, engine: FakeEngine) -> None:
    gate, entered = threading.Event(), threading.Event()

    def wait_at_the_gate(outputs: list[RequestOutput]) -> None:
        entered.set()
        assert gate.wait(30)

    executor.start(wait_at_the_gate)
    executor.submit(request("a", 10, max_tokens=20, ignore_eos=True))
    assert entered.wait(30)
    executor.submit(request("b", 10, n=3, max_tokens=20))
    assert executor.capacity().free_sequences == 16 - 1 - 3
    assert executor.capacity().free_tokens == 4096 - 30 - 3 * (10 + 20)
    gate.set()


def test_ids_in_use_are_refused(executor: InferencePipelineExecutor) -> None:
    sink = Sink()
    executor.start(sink)
    executor.submit(request("a", max_tokens=None, ignore_eos=True))
    with pytest.raises(InvalidRequest, match="running already"):
        executor.submit(request("a"))


def test_request_refused_inside_ends_with_the_reason(executor: InferencePipelineExecutor) -> None:
    sink = Sink()
    executor.start(sink)
    executor.submit(request("a", [999_999]))  # submitted without being validated
    (result,) = sink.wait("a")
    assert result.choices[0].finish_reason is FinishReason.ERROR
    assert "vocabulary" in result.error
    executor.submit(request("b"))
    assert sink.wait("b")[0].error is None


def test_failing_step_does_not_end_the_thread(executor: InferencePipelineExecutor, engine: FakeEngine) -> None:
    sink = Sink()
    executor.start(sink)
    engine.explode = RuntimeError("lost device")
    executor.submit(request("a"))
    assert "lost device" in sink.wait("a")[0].error
    executor.submit(request("b"))
    assert sink.wait("b")[0].error is None
    assert executor.is_alive


def test_dying_thread_says_so_and_leaves_nobody_waiting(
    executor: InferencePipelineExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Sink()

    def broken() -> Any:
        raise ZeroDivisionError("a bug")

    executor.start(sink)
    monkeypatch.setattr(executor.pipeline, "_deliver", lambda now_s: broken())
    executor.submit(request("a"))
    assert "ZeroDivisionError: a bug" in sink.wait("a")[0].error
    executor._thread.join(30)  # type: ignore[union-attr]
    assert not executor.is_alive
    assert isinstance(executor.failure, ZeroDivisionError)
    with pytest.raises(RuntimeError, match="not running"):
        executor.submit(request("b"))


def test_engine_that_cannot_go_on_ends_the_thread_and_every_request(
    executor: InferencePipelineExecutor, engine: FakeEngine
) -> None:
    sink = Sink()
    engine.explode = EngineFailed("rank 1 is gone")
    executor.start(sink)
    executor.submit(request("a"))
    executor._thread.join(30)  # type: ignore[union-attr]
    assert "rank 1 is gone" in sink.wait("a")[0].error
    assert not executor.is_alive


def test_generate_and_the_thread_exclude_each_other(executor: InferencePipelineExecutor) -> None:
    executor.start(Sink())
    with pytest.raises(RuntimeError, match="runs in its thread"):
        executor.generate("a")
    with pytest.raises(RuntimeError, match="started already"):
        executor.start(Sink())


def test_shutdown_stops_between_steps_and_drops_the_rest(engine: FakeEngine) -> None:
    executor = InferencePipelineExecutor(pipeline(engine))
    sink = Sink()
    executor.start(sink)
    executor.submit(request("a", max_tokens=None, ignore_eos=True))
    with sink.changed:
        assert sink.changed.wait_for(lambda: sink.tokens.get("a", 0) > 0, timeout=30)
    executor.shutdown(timeout_s=30)
    assert not executor.is_alive
    assert executor.statistics().cache.used_pages == 0
    with pytest.raises(RuntimeError, match="not running"):
        executor.submit(request("b"))


class UntilFourHaveCome:
    """In place of AdaptiveBatchTimeout: company pays until there are four."""

    def __init__(self) -> None:
        self.count = 0

    def arrived(self, now_s: float) -> None:
        self.count += 1

    def wait_s(self, now_s: float, first_arrival_s: float) -> float:
        return 30.0 if self.count < 4 else 0.0


def test_idle_engine_holds_the_first_request_while_company_is_expected(engine: FakeEngine) -> None:
    executor = InferencePipelineExecutor(pipeline(engine, batch_timeout_ms=5.0))
    executor._company = UntilFourHaveCome()  # type: ignore[assignment]
    sink = Sink()
    executor.start(sink)
    for name in ("a", "b", "c", "d"):
        executor.submit(request(name, 6, max_tokens=1, cache_salt=name))
    sink.wait("a", "b", "c", "d")
    executor.shutdown(timeout_s=30)
    assert engine.sizes == [24]
