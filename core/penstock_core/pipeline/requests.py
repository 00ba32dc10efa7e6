"""What goes into the pipeline and what comes out of it: plain records, no behaviour.

A worker turns a claimed job into an `EngineRequest`, and each step's `RequestOutput` into token chunks and a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock_core.protocol.jobs import Choice, FinishReason, Speculation, Timings, TokenLogprob, Usage
from penstock_core.protocol.records import quick
from penstock_core.protocol.requests import PRIORITY_DEFAULT, SamplingParams


@dataclass(frozen=True, slots=True)
class ResumedChoice:
    """What an earlier attempt already published of one choice; generation goes on behind it."""

    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None


@quick
@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One prompt to continue.

    Attributes:
        request_id: unique among the requests of this engine.
        prompt_token_ids: the prompt; at least one token.
        sampling: how to continue it. Without a seed, the pipeline draws one.
        priority: 0 to 9, most urgent last.
        deadline_s: time on the engine's clock after which it is expired.
        cache_salt: prompts of different salts share no cached pages (a tenant's name).
        arrival_s: time on the engine's clock at which it came; None: now.
        resume: tokens already produced, by choice.
        prompt_text: the prompt as text, for `echo`; None: decoded from its tokens.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = PRIORITY_DEFAULT
    deadline_s: float | None = None
    cache_salt: str = ""
    arrival_s: float | None = None
    resume: Sequence[ResumedChoice] = ()
    prompt_text: str | None = None


@quick
@dataclass(frozen=True, slots=True)
class ChoiceChunk:
    """New tokens of one choice: `protocol.events.TokenChunk` without the attempt."""

    index: int
    offset: int
    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@quick
@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A request's whole outcome, resumed tokens included. `error` says why, where a finish reason is `error`."""

    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    error: str | None = None
    speculation: Speculation | None = None

    @property
    def inter_token_ms(self) -> float:
        """Mean time between the tokens of a choice, after the first."""
        longest = max((len(choice.token_ids) for choice in self.choices), default=0)
        return self.timings.decode_ms / (longest - 1) if longest > 1 else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all choices per second from admission to the end."""
        spent = self.timings.prefill_ms + self.timings.decode_ms
        return self.usage.completion_tokens / spent * 1e3 if spent else 0.0


@quick
@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step brought for one request; `result` with the last."""

    request_id: str
    chunks: list[ChoiceChunk]
    result: FinishedRequest | None = None


@dataclass(frozen=True, slots=True)
class Capacity:
    """Room for more work: sequences, and tokens of prompt and output that the page pool has not promised yet."""

    free_sequences: int
    free_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """What does not change while an engine runs.

    Attributes:
        device: where rank 0 computes, `cpu` or `cuda:<n>`. ranks: processes that the model is cut over.
        num_pages, page_size: the pool of keys and values, of `page_size` tokens each.
    """

    device: str
    ranks: int
    num_pages: int
    page_size: int
