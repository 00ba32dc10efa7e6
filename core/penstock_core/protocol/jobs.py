"""The life of a job: its states, how it ended, and the result it left.

The job hash in Redis is the truth; these are its typed views. Times are integer milliseconds of the server's clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from penstock_core.protocol.records import quick


class JobState(StrEnum):
    """State of a job, as stored in its hash. Terminal states never change, except by `requeue` of a dead job."""

    DELAYED = "delayed"  # scheduled for later, or waiting out a retry's backoff
    QUEUED = "queued"  # in a ready stream, waiting for a worker with room
    RUNNING = "running"  # leased by the worker named in `owner`
    COMPLETED = "completed"  # every choice ended with finish reason stop or length
    FAILED = "failed"  # refused by the worker, or its retries are spent
    CANCELLED = "cancelled"  # by request
    EXPIRED = "expired"  # its deadline passed
    DEAD = "dead"  # dead-lettered: crashed its workers too often, or could not be decoded

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended."""
        return self in _TERMINAL


_TERMINAL = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED, JobState.DEAD})


class FinishReason(StrEnum):
    """Why a choice stopped producing tokens."""

    STOP = "stop"  # end of sequence, a stop id, a stop string, or a completed grammar
    LENGTH = "length"  # max_tokens or the model's context
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    ERROR = "error"


@quick
@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a job. `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@quick
@dataclass(frozen=True, slots=True)
class Timings:
    """Durations in milliseconds of the job's last attempt, and its counts over all attempts."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    ttft_ms: float = 0.0
    decode_ms: float = 0.0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Speculation:
    """What speculative decoding did for a job in its last attempt; none of it changes a token.

    Attributes:
        drafted_at, accepted_at: tokens that were drafted and checked, and those found right, by position in the draft.
        depths: steps by the number of drafts checked in them, from none on. Where drafting did not pay nobody was
            asked, and those steps are not counted.
        saved_ms: decoding time it saved, over all choices, estimated from what steps without drafts usually take;
            below 0: lost.
    """

    drafted_at: tuple[int, ...] = ()
    accepted_at: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    saved_ms: float = 0.0


@quick
@dataclass(frozen=True, slots=True)
class Choice:
    """One generated answer. `logprobs` has one record per token when asked for."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None


@quick
@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural, after temperature-free softmax of the raw logits) of a token, and of the top ones.

    Attributes:
        logprob: of the chosen token.
        top: (token id, log-probability) of the likeliest tokens, in falling order.
        spelled: the bytes of the chosen token, then of each of `top`, as they stand in the middle of a text; they may
            be part of a character.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    spelled: tuple[bytes, ...] = ()

    @property
    def tokens(self) -> tuple[str, ...]:
        """`spelled` as text; what is no whole text is written as OpenAI does, `bytes:\\xe2\\x98`."""
        return tuple(_text_of(spelling) for spelling in self.spelled)


def _text_of(spelling: bytes) -> str:
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


@quick
@dataclass(frozen=True, slots=True)
class JobResult:
    """What a job left behind. A cancelled or expired job has the choices as far as they got.

    `speculation` is there where drafts were looked for.
    """

    choices: tuple[Choice, ...] = ()
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    worker: str = ""
    model: str = ""
    speculation: Speculation | None = None

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text if self.choices else ""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of the first choice."""
        return self.choices[0].token_ids if self.choices else ()


@dataclass(frozen=True, slots=True)
class JobFailure:
    """Why a job did not complete: a stable code and a sentence for people."""

    code: str
    message: str
