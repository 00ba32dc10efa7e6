"""InferencePipelineExecutor: runs a pipeline, for a caller who waits or for a worker that does not.

Offline, `generate` and `stream` step the pipeline in the caller's thread. For a worker, `start` steps it in a thread
of its own that sleeps while there is nothing to do; requests and aborts come in through an inbox, outputs go to a
callback.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

from penstock_core.batching import AdaptiveBatchTimeout
from penstock_core.pipeline.config import PipelineConfig
from penstock_core.pipeline.intake import reserved_tokens
from penstock_core.pipeline.pipeline import UnifiedInferencePipeline
from penstock_core.pipeline.requests import (
    Capacity,
    ChoiceChunk,
    EngineDescription,
    EngineRequest,
    FinishedRequest,
    RequestOutput,
)
from penstock_core.pipeline.statistics import PipelineStatistics
from penstock_core.protocol.errors import InvalidRequest, JobFailed
from penstock_core.protocol.jobs import Choice, FinishReason, JobResult, Timings, Usage
from penstock_core.protocol.requests import ChatMessage, GenerationRequest, SamplingParams

_logger = logging.getLogger(__name__)

Prompt: TypeAlias = str | Sequence[int] | Sequence[ChatMessage] | Sequence[Mapping[str, str]]
OnOutputs: TypeAlias = Callable[[list[RequestOutput]], None]
Command: TypeAlias = EngineRequest | tuple[str, FinishReason]


class InferencePipelineExecutor:
    """Drives one pipeline.

    Args:
        pipeline: the pipeline, its configuration, or the model to load with default settings.
    """

    def __init__(self, pipeline: UnifiedInferencePipeline | PipelineConfig | str | Path) -> None:
        if isinstance(pipeline, str | Path):
            pipeline = PipelineConfig(pipeline)
        if isinstance(pipeline, PipelineConfig):
            pipeline = UnifiedInferencePipeline(pipeline)
        self.pipeline = pipeline
        self.failure: BaseException | None = None  # what ended the thread, if not `shutdown`
        self._numbers = count(1)
        self._mailboxes: dict[str, list[RequestOutput]] = {}
        self._condition = threading.Condition()  # guards everything below
        self._inbox: deque[Command] = deque()
        self._known: set[str] = set()
        self._queued_sequences = 0
        self._queued_tokens = 0
        self._stopping = False
        self._thread: threading.Thread | None = None
        timeout_ms = pipeline.config.batch_timeout_ms
        self._company = AdaptiveBatchTimeout(timeout_ms / 1e3) if timeout_ms else None

    # --- offline ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[JobResult]:
        """Continue prompts and wait for all of them.

        Args:
            prompts: one prompt or several; a prompt is a text, token ids, or a conversation.
            params: options for all, or one for each.
            progress: show a progress bar on standard error.

        Raises:
            InvalidRequest: a prompt or an option cannot be honoured; nothing was run.
            JobFailed: the engine could not compute one of them.
        """
        several: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
        each = [params] * len(several) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(several):
            raise InvalidRequest("params", f"{len(each)} sets of options for {len(several)} prompts; give one for each")
        requests = [self._request(prompt, own) for prompt, own in zip(several, each, strict=True)]
        for request in requests:
            self.pipeline.validate(request)
        results: dict[str, FinishedRequest] = {}
        with _progress_bar(len(requests), progress) as advance:
            for request_id, output in self._run(requests):
                if output.result is not None:
                    results[request_id] = output.result
                advance(sum(len(chunk.token_ids) for chunk in output.chunks), output.result is not None)
        return [self._result(request.request_id, results[request.request_id]) for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[ChoiceChunk]:
        """Continue one prompt, chunk by chunk. Several streams may be read in turns; closing one cancels it.

        Raises:
            InvalidRequest: the prompt or an option cannot be honoured.
            JobFailed: the engine could not compute it.
        """
        request = self._request(prompt, params)
        self.pipeline.validate(request)
        return self._stream(request)

    def _stream(self, request: EngineRequest) -> Iterator[ChoiceChunk]:
        for request_id, output in self._run([request]):
            yield from output.chunks
            if output.result is not None:
                self._result(request_id, output.result)

    def _run(self, requests: list[EngineRequest]) -> Iterator[tuple[str, RequestOutput]]:
        """Step the pipeline until these requests are done; others' outputs wait in their mailboxes."""
        if self._thread is not None:
            raise RuntimeError("the executor runs in its thread; use submit, or a second executor")
        waiting = {request.request_id for request in requests}
        try:
            for request in requests:
                self._mailboxes[request.request_id] = []
                self.pipeline.add_request(request)
            while waiting:
                for request_id in list(waiting):
                    outputs, self._mailboxes[request_id] = self._mailboxes[request_id], []
                    for output in outputs:
                        if output.result is not None:
                            waiting.discard(request_id)
                        yield request_id, output
                if waiting:
                    for output in self.pipeline.step():
                        if output.request_id in self._mailboxes:
                            self._mailboxes[output.request_id].append(output)
        finally:
            for request in requests:
                if request.request_id in waiting:
                    self.pipeline.abort(request.request_id, FinishReason.CANCELLED)
                self._mailboxes.pop(request.request_id, None)

    def _request(self, prompt: Prompt, params: SamplingParams | None) -> EngineRequest:
        field = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
        if field != "prompt" and len(prompt) and not isinstance(prompt[0], int):
            field = "messages"
        request = GenerationRequest.parse({field: prompt, "sampling": params or SamplingParams()})
        return EngineRequest(
            request_id=f"offline-{next(self._numbers)}",
            prompt_token_ids=self.pipeline.encode(request),
            sampling=request.sampling,
            prompt_text=request.prompt,
        )

    def _result(self, request_id: str, finished: FinishedRequest) -> JobResult:
        if finished.error is not None:
            raise JobFailed(request_id, finished.error, "engine_error")
        return JobResult(
            choices=finished.choices,
            usage=finished.usage,
            timings=finished.timings,
            prompt_logprobs=finished.prompt_logprobs,
            model=self.pipeline.config.name,
            speculation=finished.speculation,
        )

    # --- for a worker -----------------------------------------------------------------------------------------------

    def encode(self, request: GenerationRequest) -> list[int]:
        """Token ids of the prompt; raises `InvalidRequest`. Any thread."""
        return self.pipeline.encode(request)

    def validate(self, request: EngineRequest) -> None:
        """Raise `InvalidRequest` where the request cannot be honoured. Any thread."""
        self.pipeline.validate(request)

    def start(self, on_outputs: OnOutputs) -> None:
        """Begin stepping in a thread of its own; `on_outputs` is called there with each step's outputs."""
        if self._thread is not None:
            raise RuntimeError("the executor is started already")
        self._thread = threading.Thread(target=self._loop, args=(on_outputs,), name="penstock-engine", daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        """Queue a request for the next step. Any thread.

        Raises:
            InvalidRequest: its id is in use.
            RuntimeError: the thread is not running.
        """
        if request.arrival_s is None:
            request = replace(request, arrival_s=self.pipeline.clock())
        with self._condition:
            if not self.is_alive:
                raise RuntimeError("the engine's thread is not running") from self.failure
            if request.request_id in self._known:
                raise InvalidRequest("request_id", f"{request.request_id!r} is running already; give each its own")
            self._known.add(request.request_id)
            self._queued_sequences += request.sampling.num_choices
            self._queued_tokens += reserved_tokens(request, self.pipeline.engine.max_model_len)
            if self._company is not None:
                self._company.arrived(self.pipeline.clock())
            self._inbox.append(request)
            self._condition.notify()

    def abort(self, request_id: str, reason: FinishReason) -> None:
        """End a request at the next step, which delivers its result so far; unknown ids are ignored. Any thread."""
        with self._condition:
            self._inbox.append((request_id, reason))
            self._condition.notify()

    def capacity(self) -> Capacity:
        """Room that is left, everything submitted included. Any thread."""
        with self._condition:
            room = self.pipeline.capacity()
            return Capacity(
                free_sequences=max(0, room.free_sequences - self._queued_sequences),
                free_tokens=max(0, room.free_tokens - self._queued_tokens),
                total_tokens=room.total_tokens,
            )

    def statistics(self) -> PipelineStatistics:
        """Counters since the start, and the state of this moment. Any thread."""
        return self.pipeline.statistics()

    def describe(self) -> EngineDescription:
        """The engine as it was loaded. Any thread."""
        engine = self.pipeline.engine
        device = engine.device
        place = f"{device.type}:{device.index or 0}" if device.type == "cuda" else device.type
        return EngineDescription(place, engine.num_ranks, engine.num_pages, engine.page_size)

    @property
    def is_alive(self) -> bool:
        """Whether the thread steps, or would if there were work."""
        return self._thread is not None and self._thread.is_alive() and self.failure is None and not self._stopping

    def fallen(self) -> str | None:
        """Which rank has ended, if one has: the next step will fail, or never return. Any thread."""
        return self.pipeline.engine.fallen()

    def shutdown(self, timeout_s: float) -> None:
        """Stop the thread after its current step. Requests that are not done end without a result.

        Raises:
            TimeoutError: the step takes longer than `timeout_s`.
        """
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TimeoutError(f"the engine's step has not ended within {timeout_s} s")
        if self.failure is None:
            self.pipeline.close()
        else:
            self.pipeline.engine.close()

    def _loop(self, on_outputs: OnOutputs) -> None:
        try:
            while self._await_work():
                outputs = self._take_in() + self.pipeline.step()
                if outputs:
                    self._hand_over(outputs, on_outputs)
        except BaseException as error:  # a bug here or in the callback: say so, and leave nobody waiting
            _logger.critical("the engine's thread ends", exc_info=error)
            with self._condition:
                self.failure = error
                lost = [_failed(request_id, f"{type(error).__name__}: {error}") for request_id in self._known]
                self._known.clear()
            on_outputs(lost)

    def _await_work(self) -> bool:
        """Sleep until there is something to do; False when it is to stop."""
        with self._condition:
            idle = not self.pipeline.has_work
            while not (self._inbox or self._stopping or self.pipeline.has_work):
                self._condition.wait()
            if idle and self._company is not None:
                first_s = self.pipeline.clock()
                while not self._stopping and (rest := self._company.wait_s(self.pipeline.clock(), first_s)) > 0.0:
                    self._condition.wait(rest)
            return not self._stopping

    def _take_in(self) -> list[RequestOutput]:
        """Move the inbox into the pipeline; outputs for what the pipeline refuses."""
        refused = []
        while self._inbox:
            command = self._inbox.popleft()
            if not isinstance(command, EngineRequest):
                self.pipeline.abort(*command)
                continue
            try:
                self.pipeline.add_request(command)
            except InvalidRequest as error:
                refused.append(_failed(command.request_id, str(error)))
            with self._condition:
                self._queued_sequences -= command.sampling.num_choices
                self._queued_tokens -= reserved_tokens(command, self.pipeline.engine.max_model_len)
        return refused

    def _hand_over(self, outputs: list[RequestOutput], on_outputs: OnOutputs) -> None:
        ended = [output.request_id for output in outputs if output.result is not None]
        if ended:
            with self._condition:
                self._known.difference_update(ended)
        on_outputs(outputs)


def _failed(request_id: str, error: str) -> RequestOutput:
    """The end of a request that the pipeline cannot answer for."""
    choice = Choice(0, "", (), FinishReason.ERROR)
    return RequestOutput(request_id, [], FinishedRequest((choice,), Usage(), Timings(), error=error))


def _is_one(prompts: Any) -> bool:
    """Whether this is a single prompt: a text, token ids, or a conversation."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | ChatMessage | Mapping))


class _progress_bar:  # noqa: N801 - used as a function: `with _progress_bar(...) as advance`
    """A bar of finished requests with output tokens per second, or nothing."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar: Any = None
        if shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("generating"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[tokens]} tokens"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("generating", total=total, tokens=0)
            self._tokens = 0

    def __enter__(self) -> Callable[[int, bool], None]:
        if self._bar is None:
            return lambda tokens, done: None
        self._bar.start()
        return self._advance

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _advance(self, tokens: int, done: bool) -> None:
        self._tokens += tokens
        self._bar.update(self._task, advance=int(done), tokens=self._tokens)
