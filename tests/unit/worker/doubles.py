"""Doubles for the worker's unit tests: an engine that is stepped by hand, a broker that fails on demand, a clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from penstock_core.cache import CacheStatistics
from penstock_core.pipeline import (
    Capacity,
    ChoiceChunk,
    EngineDescription,
    EngineRequest,
    FinishedRequest,
    PipelineStatistics,
    RequestOutput,
)
from penstock_core.pipeline.statistics import Meter
from penstock_core.protocol.errors import BrokerUnavailable, InvalidRequest
from penstock_core.protocol.jobs import Choice, FinishReason, Timings, Usage
from penstock_core.protocol.requests import GenerationRequest
from penstock_worker.broker import Broker

T = TypeVar("T")


class Clock:
    """Seconds, moved by hand."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Running:
    request: EngineRequest
    tokens: list[int] = field(default_factory=list)


class ScriptedEngine:
    """Makes one token a step: `1000 + position`, spelled ` <token>`. Everything else is up to the test."""

    def __init__(self, *, sequences: int = 8, tokens: int = 10_000) -> None:
        self.room = Capacity(sequences, tokens, tokens)
        self.running: dict[str, Running] = {}
        self.aborted: list[tuple[str, FinishReason]] = []
        self.alive = True
        self.broken: str | None = None
        self.on_outputs: Callable[[Sequence[RequestOutput]], None] = lambda outputs: None
        self.refusal: Exception | None = None
        self._meter = Meter()

    def encode(self, request: GenerationRequest) -> list[int]:
        if request.prompt_token_ids is not None:
            return list(request.prompt_token_ids)
        return [len(word) for word in (request.prompt or "").split()]

    def validate(self, request: EngineRequest) -> None:
        if self.refusal is not None:
            raise self.refusal
        if len(request.prompt_token_ids) > 100:
            raise InvalidRequest("prompt", f"{len(request.prompt_token_ids)} tokens, limit 100; shorten the prompt")

    def start(self, on_outputs: Callable[[Sequence[RequestOutput]], None]) -> None:
        self.on_outputs = on_outputs

    def submit(self, request: EngineRequest) -> None:
        tokens = list(request.resume[0].token_ids) if request.resume else []
        self.running[request.request_id] = Running(request, tokens)

    def abort(self, request_id: str, reason: FinishReason) -> None:
        self.aborted.append((request_id, reason))

    def capacity(self) -> Capacity:
        return Capacity(self.room.free_sequences - len(self.running), self.room.free_tokens, self.room.total_tokens)

    def statistics(self) -> PipelineStatistics:
        cache = CacheStatistics(*[0] * len(CacheStatistics.__dataclass_fields__))
        return self._meter.read(len(self.running), 0, 0, cache)

    def describe(self) -> EngineDescription:
        return EngineDescription("cpu", 1, self.room.total_tokens // 16, 16)

    @property
    def is_alive(self) -> bool:
        return self.alive

    def fallen(self) -> str | None:
        return self.broken

    def shutdown(self, timeout_s: float) -> None:
        self.alive = False

    # --- moved by the test

    def step(self, count: int = 1) -> None:
        """Make `count` tokens for every running request."""
        for _ in range(count):
            self._meter.steps += 1
            self.on_outputs([self._advance(name, running) for name, running in list(self.running.items())])

    def deliver_aborts(self) -> None:
        """What the real engine does at the next step with aborted requests."""
        for name, reason in self.aborted:
            if name in self.running:
                self.finish(name, reason)

    def finish(self, name: str, reason: FinishReason, error: str | None = None) -> None:
        """End a request now."""
        running = self.running.pop(name)
        chunk = ChoiceChunk(0, len(running.tokens), (), ("",), reason)
        self.on_outputs([RequestOutput(name, [chunk], finished(running, reason, error))])

    def _advance(self, name: str, running: Running) -> RequestOutput:
        offset = len(running.tokens)
        token = 1000 + offset
        running.tokens.append(token)
        if len(running.tokens) < (running.request.sampling.max_tokens or 10):
            return RequestOutput(name, [ChoiceChunk(0, offset, (token,), (f" {token}",))])
        del self.running[name]
        chunk = ChoiceChunk(0, offset, (token,), (f" {token}",), FinishReason.LENGTH)
        return RequestOutput(name, [chunk], finished(running, FinishReason.LENGTH))


def finished(running: Running, reason: FinishReason, error: str | None = None) -> FinishedRequest:
    text = "".join(f" {token}" for token in running.tokens)
    usage = Usage(len(running.request.prompt_token_ids), len(running.tokens))
    return FinishedRequest((Choice(0, text, tuple(running.tokens), reason),), usage, Timings(), None, error)


class FailingBroker(Broker):
    """A broker whose next calls fail: before Redis hears of them, or after it answered (a lost reply)."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.calls = 0
        self._failures: list[str] = []

    def fail(self, *how: str) -> None:
        """Let the next calls fail, each `before` or `after` it reached Redis."""
        self._failures += how

    def recover(self) -> None:
        self._failures.clear()

    async def guard(self, command: Awaitable[T], *, ends_outage: bool = True) -> T:
        self.calls += 1
        if not self._failures:
            return await super().guard(command, ends_outage=ends_outage)
        how = self._failures.pop(0)
        if how == "after":
            await command
        else:
            asyncio.ensure_future(command).cancel()
        return await super().guard(_raise(BrokerUnavailable(f"scripted failure {how} the call")))


async def _raise(error: Exception) -> Any:
    raise error
