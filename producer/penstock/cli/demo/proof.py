"""The proof at the end of a demo: nothing lost, nothing twice, nothing missing, nothing different.

Three independent readings of every job are held against each other: what its subscriber received, what the token log in
Redis holds, and the result. The interrupted jobs are then run once more, undisturbed, and must give the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.cli.session import Queue
from penstock_core.protocol.codec import decode_event
from penstock_core.protocol.events import JobEnded, TokenChunk
from penstock_core.protocol.jobs import JobResult, JobState
from penstock_core.protocol.transitions import read_events


@dataclass(slots=True)
class Audit:
    """Tokens of one job as they came in: every offset must come exactly once and in order."""

    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    duplicate_tokens: int = 0
    missing_tokens: int = 0
    ends: int = 0
    attempts: set[int] = field(default_factory=set)

    def take(self, chunk: TokenChunk) -> None:
        """Take in the next chunk of choice 0."""
        expected = len(self.token_ids)
        self.duplicate_tokens += max(0, min(expected, chunk.end) - chunk.offset)
        if chunk.offset > expected:
            self.missing_tokens += chunk.offset - expected
            self.token_ids += [-1] * (chunk.offset - expected)
        self.token_ids += chunk.token_ids[max(0, expected - chunk.offset) :]
        self.pieces += chunk.pieces
        self.attempts.add(chunk.attempt)

    @property
    def text(self) -> str:
        """The text that came in."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the readings of all jobs add up to.

    Attributes:
        lost: jobs without a completed result.
        duplicate_tokens, missing_tokens: over subscribers and logs.
        wrong_output: jobs whose readings differ from each other, or from the undisturbed run.
        compared: interrupted jobs that were run again.
        faults: one sentence per fault found.
    """

    jobs: int
    completed: int
    lost: int
    duplicate_tokens: int
    missing_tokens: int
    wrong_output: int
    compared: int
    faults: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing at all was found."""
        faults = self.lost or self.duplicate_tokens or self.missing_tokens or self.wrong_output
        return not faults and not self.faults and self.completed == self.jobs


@dataclass(slots=True)
class Evidence:
    """The readings of one job."""

    job_id: str
    title: str
    received: Audit
    result: JobResult | None = None
    logged: Audit | None = None
    undisturbed: JobResult | None = None
    must_compare: bool = False


def read_log(queue: Queue, job_id: str) -> tuple[Audit, JobResult | None]:
    """Read a job's token log again from its beginning, and the result stored with it."""
    audit = Audit()
    result: JobResult | None = None
    after = ""
    while (page := queue.run(read_events(queue.keys, job_id, after=after))) is not None and page.last_id != after:
        after = page.last_id
        for data in page.events:
            event = decode_event(data)
            if isinstance(event, JobEnded):
                audit.ends += 1
                if event.state is JobState.COMPLETED:
                    result = event.result
            elif audit.ends:
                audit.duplicate_tokens += len(event.token_ids)  # nothing may follow the end
            else:
                audit.take(event)
    return audit, result


def judge(evidence: Sequence[Evidence]) -> Verdict:
    """Hold all readings against each other."""
    duplicate = missing = wrong = completed = compared = 0
    faults: list[str] = []
    for job in evidence:
        found = _differences(job)
        if job.result is None:
            found.append("has no completed result")
        else:
            completed += 1
        readings = [job.received] + ([job.logged] if job.logged is not None else [])
        duplicate += sum(reading.duplicate_tokens for reading in readings)
        missing += sum(reading.missing_tokens for reading in readings)
        if job.result is not None:
            missing += sum(max(0, len(job.result.token_ids) - len(reading.token_ids)) for reading in readings)
            wrong += bool(found)
        compared += job.undisturbed is not None
        faults += [f"{job.title} ({job.job_id}) {fault}" for fault in found]
    return Verdict(
        len(evidence), completed, len(evidence) - completed, duplicate, missing, wrong, compared, tuple(faults)
    )


def _differences(job: Evidence) -> list[str]:
    result = job.result
    if result is None:
        return []
    faults: list[str] = []
    expected = list(result.token_ids)
    if job.received.token_ids != expected:
        faults.append("reached its subscriber with other tokens than its result has")
    if job.received.text != result.text:
        faults.append("reached its subscriber with another text than its result has")
    if job.logged is None:
        faults.append("has no token log")
    else:
        if job.logged.token_ids != expected:
            faults.append("has other tokens in its log than in its result")
        if job.logged.ends != 1:
            faults.append(f"has {job.logged.ends} terminal events")
    if job.undisturbed is not None:
        if list(job.undisturbed.token_ids) != expected or job.undisturbed.text != result.text:
            faults.append("gave other tokens than the same request gave undisturbed")
    elif job.must_compare:
        faults.append("was interrupted and could not be run again for comparison")
    return faults
