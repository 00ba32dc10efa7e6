"""What the audience sees: the streams, the workers and the queue of a demo run, as plain data.

The director writes it, the dashboard and the plain printer read it. Times are seconds since the curtain rose.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from penstock.cli.demo.workload import Part


@dataclass(slots=True)
class Segment:
    """Consecutive tokens of one attempt, produced by one worker (unknown until the first poll says which)."""

    attempt: int
    worker: str | None = None
    tokens: int = 0
    text: str = ""


@dataclass(slots=True)
class Stream:
    """One job as its subscriber sees it."""

    job_id: str
    part: Part
    state: str = "queued"
    segments: list[Segment] = field(default_factory=list)
    submitted_s: float = 0.0
    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_s: float | None = None
    resumed_s: float | None = None
    held_at_kill: bool = False
    tokens_at_kill: int = 0

    @property
    def tokens(self) -> int:
        """Tokens received so far."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def text(self) -> str:
        """Text received so far."""
        return "".join(segment.text for segment in self.segments)

    @property
    def is_over(self) -> bool:
        """Whether the job has ended."""
        return self.ended_s is not None

    def receive(self, attempt: int, tokens: int, text: str, now_s: float) -> bool:
        """Take in a chunk; true when it is the first of a new attempt, which is a takeover."""
        taken_over = bool(self.segments) and self.segments[-1].attempt != attempt
        if not self.segments or taken_over:
            self.segments.append(Segment(attempt))
        self.segments[-1].tokens += tokens
        self.segments[-1].text += text
        if self.first_token_s is None and tokens:
            self.first_token_s = now_s
        if taken_over and self.resumed_s is None:
            self.resumed_s = now_s
        self.last_token_s = now_s
        self.state = "running"
        return taken_over


@dataclass(slots=True)
class Performer:
    """One worker process."""

    name: str
    colour: str
    pid: int = 0
    alive: bool = False
    seats: int = 0
    holding: int = 0
    tokens: int = 0
    killed_s: float | None = None
    held_at_kill: int = 0
    rates: deque[float] = field(default_factory=lambda: deque([0.0] * 24, maxlen=24))


@dataclass(frozen=True, slots=True)
class Moment:
    """A line of the story: when, how important, what."""

    at_s: float
    kind: str  # "plain", "kill", "takeover", "good", "bad"
    text: str


@dataclass(slots=True)
class Stage:
    """Everything on view."""

    streams: dict[str, Stream] = field(default_factory=dict)
    performers: dict[str, Performer] = field(default_factory=dict)
    moments: list[Moment] = field(default_factory=list)
    broker: str = ""
    model: str = ""
    phase: str = "starting"
    spotlight: str | None = None
    tokens: int = 0
    rates: deque[float] = field(default_factory=lambda: deque([0.0] * 160, maxlen=160))
    started: float = field(default_factory=time.monotonic)
    _last_rate: tuple[float, int] = (0.0, 0)
    _last_worker_tokens: dict[str, int] = field(default_factory=dict)

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def tell(self, kind: str, text: str) -> Moment:
        """Add a line to the story."""
        moment = Moment(self.now(), kind, text)
        self.moments.append(moment)
        return moment

    def receive(self, job_id: str, attempt: int, tokens: int, text: str) -> bool:
        """Take in a chunk of a stream; true when it is the first after a takeover."""
        stream = self.streams[job_id]
        taken_over = stream.receive(attempt, tokens, text, self.now())
        self.tokens += tokens
        worker = stream.segments[-1].worker
        if worker in self.performers:
            self.performers[worker].tokens += tokens
        return taken_over

    def attribute(self, job_id: str, attempt: int, worker: str) -> None:
        """Note which worker runs an attempt."""
        for segment in self.streams[job_id].segments:
            if segment.attempt == attempt and segment.worker is None:
                segment.worker = worker
                if worker in self.performers:
                    self.performers[worker].tokens += segment.tokens

    def sample_rates(self) -> None:
        """Add a point to the throughput curves; call it at a steady pace."""
        now = self.now()
        before, tokens = self._last_rate
        span = max(1e-3, now - before)
        self.rates.append((self.tokens - tokens) / span)
        self._last_rate = (now, self.tokens)
        for performer in self.performers.values():
            earlier = self._last_worker_tokens.get(performer.name, 0)
            performer.rates.append((performer.tokens - earlier) / span)
            self._last_worker_tokens[performer.name] = performer.tokens

    def count(self, *states: str) -> int:
        """Number of streams in any of these states."""
        return sum(stream.state in states for stream in self.streams.values())
