"""A real worker with an engine that computes nothing: what remains is the queue. Run by `benchmarks.queue`.

`python -m benchmarks.noop_worker <redis url> <queue>`. Every request is answered at once with 32 fixed tokens.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from penstock_core.batching import BatchingConfig
from penstock_core.pipeline import (
    Capacity,
    EngineDescription,
    EngineRequest,
    FinishedRequest,
    PipelineStatistics,
    RequestOutput,
)
from penstock_core.pipeline.requests import ChoiceChunk
from penstock_core.protocol.jobs import Choice, FinishReason, Timings, Usage
from penstock_core.protocol.requests import GenerationRequest
from penstock_worker.app import run
from penstock_worker.settings import WorkerSettings

ANSWER = tuple(range(32))
_PIECES = ("",) * len(ANSWER)
_SEQUENCES = 2048
_TOKENS = 10_000_000


class NoopEngine:
    """Answers what is submitted, all of it at each turn of its thread."""

    def __init__(self) -> None:
        self._requests: SimpleQueue[EngineRequest | None] = SimpleQueue()
        self._running = 0
        self._thread: threading.Thread | None = None

    def encode(self, request: GenerationRequest) -> list[int]:
        """The given ids."""
        return list(request.prompt_token_ids or ())

    def validate(self, request: EngineRequest) -> None:
        """Everything fits."""

    def start(self, on_outputs: Callable[[Sequence[RequestOutput]], None]) -> None:
        """Begin answering."""
        self._thread = threading.Thread(target=self._loop, args=(on_outputs,), daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        """Queue a request."""
        self._requests.put(request)

    def abort(self, request_id: str, reason: FinishReason) -> None:
        """Nothing runs long enough to be aborted."""

    def capacity(self) -> Capacity:
        """Room that is left."""
        return Capacity(_SEQUENCES - self._requests.qsize() - self._running, _TOKENS, _TOKENS)

    def statistics(self) -> PipelineStatistics:
        """Counts of an engine that did nothing."""
        from penstock_core.cache import CacheStatistics

        zero: dict[str, Any] = dict.fromkeys(PipelineStatistics.__dataclass_fields__, 0)
        cache = CacheStatistics(**dict.fromkeys(CacheStatistics.__dataclass_fields__, 0))
        budget = BatchingConfig(max_num_sequences=_SEQUENCES, max_batch_tokens=_TOKENS, max_model_len=_TOKENS)
        zero.update(
            finished={},
            cache=cache,
            speculation=None,
            memory=(),
            token_budget=budget.max_batch_tokens,
            sequence_limit=_SEQUENCES,
        )
        return PipelineStatistics(**zero)

    def describe(self) -> EngineDescription:
        """No device, no pages."""
        return EngineDescription("none", 1, 0, 1)

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        return self._thread is None or self._thread.is_alive()

    def fallen(self) -> None:
        """It has no other ranks."""

    def shutdown(self, timeout_s: float) -> None:
        """Stop answering."""
        self._requests.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _loop(self, on_outputs: Callable[[Sequence[RequestOutput]], None]) -> None:
        while (first := self._requests.get()) is not None:
            taken = [first]
            with suppress(Empty):
                while (request := self._requests.get_nowait()) is not None:
                    taken.append(request)
                self._requests.put(None)
            self._running = len(taken)
            outputs = [_answer(request) for request in taken]
            self._running = 0
            on_outputs(outputs)


def _answer(request: EngineRequest) -> RequestOutput:
    chunk = ChoiceChunk(0, 0, ANSWER, _PIECES, FinishReason.LENGTH)
    choice = Choice(0, "", ANSWER, FinishReason.LENGTH)
    usage = Usage(len(request.prompt_token_ids), len(ANSWER), 0)
    return RequestOutput(request.request_id, [chunk], FinishedRequest((choice,), usage, Timings()))


def main() -> None:
    """Serve the queue until SIGTERM."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    settings = WorkerSettings(redis_url=sys.argv[1], queue=sys.argv[2], max_num_sequences=_SEQUENCES)
    sys.exit(int(run(settings, load=lambda config: NoopEngine())))


if __name__ == "__main__":
    main()
