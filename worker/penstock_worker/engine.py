"""What the worker needs of an engine, and nothing else of the engine's.

`InferencePipelineExecutor` behind `start_engine` is the real one; tests and the queue benchmark drive the worker with
scripted ones. All methods may be called from the event loop; the callbacks are called in the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from penstock_core.pipeline import Capacity, EngineDescription, EngineRequest, PipelineStatistics, RequestOutput
from penstock_core.protocol.jobs import FinishReason
from penstock_core.protocol.requests import GenerationRequest

OnOutputs = Callable[[Sequence[RequestOutput]], None]


class Engine(Protocol):
    """Runs requests; answers each with outputs, the last of which carries its result."""

    def encode(self, request: GenerationRequest) -> list[int]:
        """Token ids of the prompt; raises `InvalidRequest`. Touches nothing of the step loop: safe in any thread."""
        ...

    def validate(self, request: EngineRequest) -> None:
        """Raise `InvalidRequest` where the request cannot run on this model; safe in any thread."""
        ...

    def start(self, on_outputs: OnOutputs) -> None:
        """Begin stepping in a thread of its own."""
        ...

    def submit(self, request: EngineRequest) -> None:
        """Queue a validated request for the next step."""
        ...

    def abort(self, request_id: str, reason: FinishReason) -> None:
        """End a request, if it is known, at the next step; its result says `reason`."""
        ...

    def capacity(self) -> Capacity:
        """Room that is left, everything submitted included."""
        ...

    def statistics(self) -> PipelineStatistics:
        """Counts since the start, and rates of the last seconds."""
        ...

    def describe(self) -> EngineDescription:
        """What does not change while it runs."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether the thread steps, or would if there were work."""
        ...

    def fallen(self) -> str | None:
        """Which rank has ended, if one has: the next step will fail, or never return."""
        ...

    def shutdown(self, timeout_s: float) -> None:
        """Stop the thread."""
        ...
