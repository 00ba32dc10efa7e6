"""What waits to be written to Redis: tokens by job and choice, and how jobs ended.

The outbox merges what several engine steps made of one choice into one chunk, so that a slow round trip makes larger
writes, not more of them. A batch that was sent and not answered is kept as it is and sent again before anything newer:
it may have been applied, and only an identical repetition is known to be harmless. Not thread-safe; lives on the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import JobResult, JobState
from penstock_core.protocol.records import quick
from penstock_worker.held import HeldJob, HeldJobs


@quick
@dataclass(frozen=True, slots=True)
class Finish:
    """The job ended with a result: completed, or as far as it got when it was cancelled or expired."""

    state: JobState
    result: JobResult


@dataclass(frozen=True, slots=True)
class Fail:
    """The job could not be run. A retryable failure goes back to the queue until the job's retries are spent."""

    code: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Bury:
    """The job can never be run by anyone: dead-lettered with its reason."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class HandBack:
    """Another worker is to go on from what is published; spends neither a retry nor a crash."""

    reason: str


Ending = Finish | Fail | Bury | HandBack

MAX_CHUNK_TOKENS = 512
"""Where joining stops: bounds a record's size, and the copying that a long outage costs."""


@dataclass(slots=True)
class Parcel:
    """What one job has to write."""

    job: HeldJob
    chunks: dict[int, TokenChunk] = field(default_factory=dict)
    closed: list[TokenChunk] = field(default_factory=list)
    ending: Ending | None = None
    tokens: int = 0

    def add(self, chunk: TokenChunk) -> None:
        """Append `chunk` to what is kept of its choice."""
        known = self.chunks.get(chunk.index)
        joined = chunk if known is None else join(known, chunk)
        if joined is None:
            assert known is not None
            self.closed.append(known)
            joined = chunk
        self.chunks[chunk.index] = joined
        self.tokens += len(chunk.token_ids)

    def all_chunks(self) -> list[TokenChunk]:
        """Every chunk, each choice's in order of offset."""
        return self.closed + list(self.chunks.values())


class Outbox:
    """Parcels by job, in order of first arrival.

    Attributes:
        urgent: some job's end waits, which a client may be waiting for.
    """

    def __init__(self, held: HeldJobs) -> None:
        self.urgent = False
        self._held = held
        self._parcels: dict[str, Parcel] = {}
        self._sent: list[Parcel] = []

    @property
    def tokens(self) -> int:
        """Tokens waiting, those sent and not yet answered included."""
        return sum(parcel.tokens for parcel in (*self._parcels.values(), *self._sent))

    def __len__(self) -> int:
        return len(self._parcels) + len(self._sent)

    def add_chunk(self, job: HeldJob, chunk: TokenChunk) -> None:
        """Keep tokens of `job` until they are written."""
        self._parcel(job).add(chunk)

    def end(self, job: HeldJob, ending: Ending) -> None:
        """Keep how `job` ended. The first ending counts, and nothing more is taken from the engine for it."""
        if not job.ended:
            job.ended = self.urgent = True
            self._parcel(job).ending = ending

    def take(self) -> Sequence[Parcel]:
        """The batch to send now: the unanswered one if there is one, else everything that waits.

        Parcels of jobs that are no longer held are left out: their writes would be fenced.
        """
        if not self._sent:
            self._sent = list(self._parcels.values())
            self._parcels, self.urgent = {}, False
        self._sent = [parcel for parcel in self._sent if parcel.job in self._held]
        return self._sent

    def answered(self) -> None:
        """The batch last taken was answered."""
        self._sent = []

    def drop(self, job: HeldJob) -> None:
        """Forget what was kept of `job` and not yet sent."""
        self._parcels.pop(job.request_id, None)

    def largest_first(self) -> Iterator[Parcel]:
        """Unsent parcels by the tokens they hold."""
        yield from sorted(self._parcels.values(), key=lambda parcel: -parcel.tokens)

    def _parcel(self, job: HeldJob) -> Parcel:
        parcel = self._parcels.get(job.request_id)
        if parcel is None:
            parcel = self._parcels[job.request_id] = Parcel(job)
        return parcel


def join(first: TokenChunk, second: TokenChunk) -> TokenChunk | None:
    """One chunk saying what two consecutive chunks of a choice say, or None where that cannot be said in one.

    Text released without a token of its own (held back for a stop string that never came) joins the last token's piece.
    """
    if second.offset != first.end or first.finish_reason is not None or not first.token_ids:
        return None
    if len(first.token_ids) + len(second.token_ids) > MAX_CHUNK_TOKENS:
        return None
    if (first.logprobs is None) != (second.logprobs is None) and second.token_ids:
        return None
    with_tail = (*first.pieces[:-1], first.pieces[-1] + second.text)
    pieces = first.pieces + second.pieces if second.token_ids else with_tail
    return replace(
        first,
        token_ids=first.token_ids + second.token_ids,
        pieces=pieces,
        finish_reason=second.finish_reason,
        logprobs=None if first.logprobs is None else first.logprobs + (second.logprobs or ()),
    )
