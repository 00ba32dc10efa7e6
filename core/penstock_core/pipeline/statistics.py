"""PipelineStatistics: counters of a whole pipeline, and the meter that keeps them.

Only sums and maxima, so that two readings can be subtracted; a worker turns them into metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock_core.cache import CacheStatistics
from penstock_core.distributed import MemoryReport
from penstock_core.pipeline.requests import FinishedRequest
from penstock_core.protocol.jobs import FinishReason
from penstock_core.speculative import SpeculationStatistics


@dataclass(frozen=True, slots=True)
class PipelineStatistics:
    """A pipeline since it started. Sums of milliseconds and of tokens, unless said otherwise.

    Attributes:
        running, waiting: sequences at this moment.
        steps, step_ms: steps computed, and their time. forward_ms: part of it spent in the model and the sampler.
        batch_tokens, batch_sequences: computed over all steps. token_budget, sequence_limit: what they could have been.
        prompt_tokens, output_tokens: of finished requests, resumed tokens included. cached_tokens: of their prompts.
        drafted_tokens, accepted_tokens: speculation.
        finished: choices by finish reason.
        queue_ms, prefill_ms, ttft_ms, decode_ms: sums over finished requests. requests: how many those are.
        cache: the page pool at this moment.
        speculation: drafts in detail, where speculation is on.
        memory: what each rank's memory is used for, by rank.
    """

    running: int
    waiting: int
    steps: int
    step_ms: float
    forward_ms: float
    batch_tokens: int
    batch_sequences: int
    token_budget: int
    sequence_limit: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    queue_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms: float
    finished: dict[FinishReason, int]
    cache: CacheStatistics
    speculation: SpeculationStatistics | None = None
    memory: tuple[MemoryReport, ...] = ()

    @property
    def batch_fill(self) -> float:
        """Share of the sequence rows that steps used, 0 to 1."""
        return self.batch_sequences / self.sequence_limit if self.sequence_limit else 0.0

    @property
    def budget_fill(self) -> float:
        """Share of the token budget that steps used, 0 to 1."""
        return self.batch_tokens / self.token_budget if self.token_budget else 0.0

    @property
    def mean_step_ms(self) -> float:
        """Mean time of a step."""
        return self.step_ms / self.steps if self.steps else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of drafted tokens that the model confirmed, 0 to 1."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0


@dataclass(slots=True)
class Meter:
    """The counters behind `PipelineStatistics`; written by the step loop only."""

    steps: int = 0
    step_s: float = 0.0
    forward_s: float = 0.0
    batch_tokens: int = 0
    batch_sequences: int = 0
    token_budget: int = 0
    sequence_limit: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    ttft_ms: float = 0.0
    decode_ms: float = 0.0
    finished: dict[FinishReason, int] = field(default_factory=lambda: dict.fromkeys(FinishReason, 0))

    def add_result(self, result: FinishedRequest) -> None:
        """Count one finished request."""
        usage, timings = result.usage, result.timings
        self.requests += 1
        self.prompt_tokens += usage.prompt_tokens
        self.output_tokens += usage.completion_tokens
        self.cached_tokens += usage.cached_tokens
        self.drafted_tokens += timings.drafted_tokens
        self.accepted_tokens += timings.accepted_tokens
        for choice in result.choices:
            self.finished[choice.finish_reason] += 1
        self.queue_ms += timings.queue_ms
        self.prefill_ms += timings.prefill_ms
        self.ttft_ms += timings.ttft_ms
        self.decode_ms += timings.decode_ms

    def read(
        self,
        running: int,
        waiting: int,
        preemptions: int,
        cache: CacheStatistics,
        speculation: SpeculationStatistics | None = None,
        memory: tuple[MemoryReport, ...] = (),
    ) -> PipelineStatistics:
        """The counters with the state of this moment."""
        return PipelineStatistics(
            running=running,
            waiting=waiting,
            steps=self.steps,
            step_ms=self.step_s * 1e3,
            forward_ms=self.forward_s * 1e3,
            batch_tokens=self.batch_tokens,
            batch_sequences=self.batch_sequences,
            token_budget=self.token_budget,
            sequence_limit=self.sequence_limit,
            requests=self.requests,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            cached_tokens=self.cached_tokens,
            preemptions=preemptions,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            queue_ms=self.queue_ms,
            prefill_ms=self.prefill_ms,
            ttft_ms=self.ttft_ms,
            decode_ms=self.decode_ms,
            finished=dict(self.finished),
            cache=cache,
            speculation=speculation,
            memory=memory,
        )
